"""More play, a larger predictor or more steps: what lowers the held-out error?

    python -m bench.laws                      # the features of make demo; about 35 minutes
    python -m bench.laws --widths 64 128      # about 17
    python -m bench.laws --data 'features/train/*.tar' --val_data 'features/val/*.tar' \\
        --scaler s.pkl --minutes 60 240 960 --widths 256 512 1024 --depth 12 --steps 20000

Trains train_ac.py on each of --minutes of play (whole recordings, the smaller sets inside the
larger ones) with each of --widths, at a constant learning rate, and reads the held-out error at
eighths, quarters, halves and all of --steps. A run that is finished is not trained again, and one
that was interrupted continues.

The error is that of one step ahead over that of copying the last step. What is fitted to it is

    error = floor + a / parameters^x + b / minutes^y + c / steps^z

with none of floor, a, b and c below 0. Intervals are 95 % of refits to runs drawn again with
replacement, so they say how far the runs determine the law, and nothing about other seeds. Prints a
row for each run; the law; by how much the error falls if one of the three doubles; and for a range
of budgets the width and the steps of the lowest error that the law gives on all of the minutes.
OUT/laws.png is the plot, OUT/laws.json has all numbers."""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys

import numpy as np
import torch

import checkpoint
from bench import report
from bench.step import useful_flops
from bench.trainings import run
from data import ActionScaler, open_records
from files.disk import continue_folder, write_atomically
from files.features import feature_settings
from files.logs import read_csv
from files.progress import tqdm
from model import Predictor
from weights import build_encoder

# epochs of a run, and after which of them the held-out error is read
PARTS = 8
READ = (1, 2, 4, 8)

# settings of the features, which train_ac.py needs as flags
CUT = ("fps", "frames_per_step", "frames_per_clip", "crop_size", "encode")

# features and target as in make demo, at a constant learning rate
FIXED = "--feature_norm standardize --predict change --log_every 50 --warmup 1 --anneal 0".split()

# what the law is about, in the order of its columns
AXES = ("parameters", "minutes", "steps")

# the exponents that are tried, and how often the law is fitted to runs drawn again
EXPONENTS = np.linspace(0.1, 1.2, 12)
REFITS = 200


# --- the runs ---


def digest(records):
    """A short text that tells these features from others."""
    keys = "\n".join(sorted(r.key for r in records))
    return f"({len(records)} members, sha256 {hashlib.sha256(keys.encode()).hexdigest()[:8]})"


def minutes_of_play(records, settings):
    """{recording: minutes} of features. Those of several phases lie over one another."""
    # from when to when each record lasts: its key names the tick where it starts
    seconds_a_step = int(settings["frames_per_step"]) / float(settings["fps"])
    spans_of = {}
    for r in records:
        start = int(r.key.rpartition("@")[2]) / 20
        stop = start + r.length * seconds_a_step
        spans_of.setdefault(r.recording, []).append((start, stop))

    # each span adds what lies behind the end of those before it
    minutes = {}
    for name, spans in spans_of.items():
        seconds = 0.0
        end = 0.0
        for start, stop in sorted(spans):
            seconds += max(stop - max(start, end), 0)
            end = max(end, stop)
        minutes[name] = seconds / 60
    return minutes


def choose(minutes_of, wanted, seed):
    """(names, minutes): recordings in a random order that depends on the seed alone, until there
    are enough. Smaller sets are inside larger ones. ValueError where there is less play."""
    # recordings are taken whole, so 2 % more or less is as good as what was asked for
    total = sum(minutes_of.values())
    if wanted > 1.02 * total:
        raise ValueError(f"--minutes {wanted:g}: --data has {total:.1f} minutes of play")

    # the order knows nothing of `wanted`
    names = sorted(minutes_of)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = []
    minutes = 0.0
    for i in order:
        if minutes >= 0.98 * wanted:
            break
        chosen.append(names[i])
        minutes += minutes_of[names[i]]
    return chosen, minutes


def sizes_of(width, depth, settings, action_dim, batch_size):
    """(parameters, useful FLOPs of a training step) of a predictor."""
    # on the meta device, where weights have a shape and take no memory
    side = int(settings["grid"])
    size = {"pred_dim": width, "depth": depth, "num_heads": width // 32}
    with torch.device("meta"):
        predictor = Predictor(settings["embed_dim"], action_dim, 2, (side, side), **size)
        encoder = build_encoder("vit_tiny")
    parameters = sum(p.numel() for p in predictor.parameters())

    # features are stored, so the encoder costs nothing
    steps = int(settings["frames_per_clip"]) // int(settings["frames_per_step"])
    _, flops = useful_flops(encoder, predictor, batch_size, steps)
    return parameters, flops


def is_trained(folder):
    """Whether the run has come to its end."""
    log = os.path.join(folder, "val.csv")
    return os.path.exists(log) and max(read_csv(log)["epoch"]) >= PARTS


def points_of(folder, point, ipe):
    """Rows of a finished run, at each of READ. point: what is known of it; ipe: steps an epoch."""
    log = read_csv(os.path.join(folder, "val.csv"))
    epochs = list(log["epoch"])
    rows = []
    for epoch in READ:
        # the learning rate is constant: a point on the way is a shorter run's end
        i = epochs.index(epoch)
        steps = epoch * ipe
        row = {
            "steps": steps,
            "error / copying": float(log["tf_skill"][i]),
            "error": float(log["tf_true"][i]),
            "action gap": float(log["tf_gap"][i]),
            "FLOPs": point["FLOPs a step"] * steps,
        }
        rows.append(point | row)
    return rows


# --- the law ---


def terms_of(rows):
    """What the law is fitted to: the AXES of each row (n, 3), and its error (n,)."""
    x = [[row[axis] for axis in AXES] for row in rows]
    y = [row["error / copying"] for row in rows]
    return np.array(x, float), np.array(y)


def fit(x, y):
    """The law of least squares: {"floor", "weights" (3,), "exponents" (3,)}. x (n, 3) is in units
    of its largest values.

    No weight may be negative. So every set of terms is fitted with all exponents, and the best of
    those without a negative weight is taken. A grid cannot end in a local minimum."""
    # with the exponents fixed the law is linear: a column for each term, and one for the floor
    exponents = np.array(list(itertools.product(EXPONENTS, repeat=3)))
    columns = x[None] ** -exponents[:, None]  # (exponents, n, 3)
    floor = np.ones((*columns.shape[:2], 1))
    truth = y[:, None]
    best = {"loss": np.inf}
    for count in range(4):
        for terms in itertools.combinations(range(3), count):
            # normal equations; a little of the identity where an axis has a single value
            matrix = np.concatenate([floor, columns[:, :, terms]], axis=2)
            transposed = matrix.transpose(0, 2, 1)
            square = transposed @ matrix + 1e-9 * np.eye(1 + count)
            solutions = np.linalg.solve(square, transposed @ truth)

            # a negative weight would say that more of it does harm
            losses = np.square(matrix @ solutions - truth).sum((1, 2))
            is_negative = (solutions < 0).any((1, 2))
            losses[is_negative] = np.inf

            # terms that are left out have no weight
            i = losses.argmin()
            if losses[i] < best["loss"]:
                weights = np.zeros(3)
                weights[list(terms)] = solutions[i, 1:, 0]
                best = {
                    "loss": losses[i],
                    "floor": solutions[i, 0, 0],
                    "weights": weights,
                    "exponents": exponents[i],
                }
    return best


def predicted(law, x):
    """Errors (n,) of the law at x (n, 3)."""
    terms = law["weights"] * x ** -law["exponents"]
    return law["floor"] + terms.sum(-1)


def gains(law):
    """By how much the error falls if parameters, minutes or steps double, each from its largest."""
    # the largest of each is 1; a row of `doubled` has one of them at 2
    largest = np.ones((1, 3))
    doubled = 1 + np.eye(3)
    return predicted(law, largest)[0] - predicted(law, doubled)


def interval(values):
    """95 % of the values, by column."""
    return np.percentile(np.array(values), [2.5, 97.5], axis=0)


def best_sizes(law, scale, widths, budgets, size_of):
    """For each budget in FLOPs the row of the width whose steps give the lowest error, on all of
    the minutes. scale (3,): the units of the law; size_of(width): parameters, FLOPs a step."""
    rows = []
    for budget in budgets:
        # a wider predictor gets fewer steps for the same budget
        candidates = []
        for width in widths:
            parameters, flops = size_of(width)
            steps = budget / flops
            x = np.array([[parameters, scale[1], steps]]) / scale
            error = predicted(law, x)[0]
            candidates.append((error, width, parameters, round(steps)))

        # the lowest error; the narrower one of equals
        error, width, parameters, steps = min(candidates)
        row = {
            "FLOPs": budget,
            "width": width,
            "parameters": parameters,
            "steps": steps,
            "error / copying": error,
        }
        rows.append(row)
    return rows


def plot(rows, best, doubled, low, high, path):
    """Error over minutes, error over FLOPs with the compute-optimal line, what doubling gains."""
    from matplotlib.figure import Figure  # takes a second to import

    fig = Figure(figsize=(13, 4.2), layout="constrained")
    by_minutes, by_flops, by_doubling = fig.subplots(1, 3)

    # a line for each width: over the minutes at the end, over the FLOPs on all of the minutes
    error = "error / copying"
    last = max(row["steps"] for row in rows)
    most = max(row["minutes"] for row in rows)
    for width in sorted({row["width"] for row in rows}):
        of_width = [row for row in rows if row["width"] == width]
        at_the_end = [(row["minutes"], row[error]) for row in of_width if row["steps"] == last]
        on_all = [(row["FLOPs"], row[error]) for row in of_width if row["minutes"] == most]
        by_minutes.plot(*zip(*sorted(at_the_end)), "o-", label=f"width {width}")
        by_flops.plot(*zip(*sorted(on_all)), "o-", label=f"width {width}")

    # the compute-optimal line, beside the runs that it is to beat
    line = [(row["FLOPs"], row[error]) for row in best]
    by_flops.plot(*zip(*line), "k--", label="the law's best width")
    by_minutes.set(title=f"after {last} steps", xlabel="minutes of play", ylabel=error)
    by_flops.set(title=f"on {most:.3g} minutes", xlabel="FLOPs of training")
    for ax in (by_minutes, by_flops):
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)

    # a grid has few values: each is a tick
    minutes = sorted({row["minutes"] for row in rows})
    by_minutes.set_xticks(minutes, [f"{m:.3g}" for m in minutes])
    by_minutes.minorticks_off()

    # intervals of refits need not contain the fit itself, and a bar of error has no negative length
    reach = [np.maximum(doubled - low, 0), np.maximum(high - doubled, 0)]
    by_doubling.bar(AXES, doubled, yerr=reach, capsize=4)
    by_doubling.set(title="doubled, the error falls by (95 %)", ylabel=error)
    by_doubling.axhline(0, color="grey", lw=0.5)
    write_atomically(path, lambda f: fig.savefig(f, dpi=110))


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    several = {"nargs": "+"}
    data_help = "feature shards to train on (default demo/features/train/*.tar)"
    flag("--data", **several, default=["demo/features/train/*.tar"], help=data_help)
    val_help = "feature shards to judge on (default demo/features/val/*.tar)"
    flag("--val_data", **several, default=["demo/features/val/*.tar"], help=val_help)
    flag("--scaler", default="demo/scaler.pkl", help="of the actions (default demo/scaler.pkl)")
    flag("--action_space", type=int, default=36, help="of train_ac.py (default 36)")
    # the grid
    flag("--minutes", type=float, **several, default=[3, 9, 24], help="of play (default 3 9 24)")
    widths_help = "of the predictor, multiples of 32 (default 64 128 192)"
    flag("--widths", type=int, **several, default=[64, 128, 192], help=widths_help)
    flag("--steps", type=int, default=400, help="of the longest runs, 8 or more (default 400)")
    # what all runs share
    flag("--depth", type=int, default=4, help="blocks of the predictor (default 4)")
    flag("--batch_size", type=int, default=32, help="clips a step (default 32)")
    flag("--lr", type=float, default=1e-3, help="learning rate, constant (default 1e-3)")
    flag("--val_clips", type=int, default=256, help="clips to judge on (default 256)")
    flag("--num_workers", type=int, default=0, help="loader processes (default 0)")
    flag("--seed", type=int, default=0, help="of weights, order and chosen play (default 0)")
    flag("--out", default="out/laws", help="folder of the runs (default out/laws)")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    sys.excepthook = checkpoint.short_excepthook

    # what no run could be made with
    if args.steps < PARTS:
        parser.error(f"--steps {args.steps} is too small: at least {PARTS}")
    for width in args.widths:
        if width < 32 or width % 32:
            parser.error(f"--widths {width} is no multiple of 32")
    for minutes in args.minutes:
        if not 0 < minutes < math.inf:
            parser.error(f"--minutes {minutes:g} is no play: give numbers above 0")

    # --- the runs ---
    # what all runs need is opened before the first one is trained
    records, _ = open_records(args.data)
    held_out, _ = open_records(args.val_data)
    scaler = ActionScaler.load(args.scaler)
    settings = feature_settings(records)
    minutes_of = minutes_of_play(records, settings)
    ipe = args.steps // PARTS

    # runs of other data are no points of this law
    shared = {
        "data": digest(records),
        "val_data": digest(held_out),
        "encoder": settings["encoder"],
        **{name: settings[name] for name in CUT},
        "scaler": scaler.hash,
        "action_space": args.action_space,
        "val_clips": args.val_clips,
    }
    continue_folder(args.out, "made_with.json", shared)

    # sizes of all widths that may be asked for, trained or not
    size_of = {}
    for width in range(32, 2 * max(args.widths) + 1, 32):
        sizes = sizes_of(width, args.depth, settings, args.action_space, args.batch_size)
        size_of[width] = sizes

    # the play of all runs, before the first one is trained: there may be too little
    play = {wanted: choose(minutes_of, wanted, args.seed) for wanted in args.minutes}

    # a run for each cell of the grid
    rows = []
    cells = list(itertools.product(args.minutes, args.widths))
    for wanted, width in tqdm(cells, desc="laws", unit="run"):
        names, minutes = play[wanted]
        listed = os.path.join(args.out, f"minutes-{wanted:g}.txt")
        write_atomically(listed, "\n".join(names).encode())

        # the name says everything that is not in the fixed flags
        run_name = f"m{wanted:g}-w{width}-d{args.depth}-s{args.steps}-b{args.batch_size}"
        folder = os.path.join(args.out, f"{run_name}-lr{args.lr:g}-{args.seed}")
        if not is_trained(folder):
            # the clips, cut as the features were made
            flags = ["--data", *args.data, "--val_data", *args.val_data]
            flags += ["--recordings", listed, "--scaler", args.scaler]
            flags += ["--action_space", args.action_space]
            for name in CUT:
                flags += [f"--{name}", settings[name]]

            # the predictor, with heads of 32 channels
            flags += ["--pred_dim", width, "--pred_depth", args.depth]
            flags += ["--pred_heads", width // 32]

            # how long, and how it is judged
            flags += ["--epochs", PARTS, "--ipe", ipe, "--lr", args.lr, "--seed", args.seed]
            flags += ["--batch_size", args.batch_size, "--num_workers", args.num_workers]
            flags += ["--val_clips", args.val_clips, "--keep_last", 1, "--save_every_freq", 0]
            flags += [*FIXED, "--out_dir", folder, "--resume"]
            run(folder + ".txt", "train_ac.py", *flags)

        # where it ended, and on the way there
        parameters, flops = size_of[width]
        point = {
            "minutes": minutes,
            "width": width,
            "parameters": parameters,
            "FLOPs a step": flops,
        }
        rows += points_of(folder, point, ipe)
    report(rows, args.json, torch.device("cpu"))

    # --- the law ---
    x, y = terms_of(rows)
    scale = x.max(0)
    x = x / scale
    law = fit(x, y)
    off = np.abs(predicted(law, x) - y).mean()

    # runs drawn again: the points of a run stay together
    generator = np.random.default_rng(args.seed)
    refits = []
    for _ in tqdm(range(REFITS), desc="refits", unit="fit"):
        drawn = generator.integers(len(cells), size=len(cells))
        points = drawn[:, None] * len(READ) + np.arange(len(READ))
        points = points.flatten()
        refits.append(fit(x[points], y[points]))

    # what doubling gains is in the units of the error, which an exponent alone is not
    exponents = law["exponents"]
    doubled = gains(law)
    low, high = interval([gains(refit) for refit in refits])
    exponents_low, exponents_high = interval([refit["exponents"] for refit in refits])
    print(f"floor {law['floor']:.4f}; the law is off by {off:.4f} on average")
    for i, name in enumerate(AXES):
        print(
            f"{name}: exponent {exponents[i]:.2f}"
            f" [{exponents_low[i]:.2f}, {exponents_high[i]:.2f}];"
            f" doubled, the error falls by {doubled[i]:.4f} [{low[i]:.4f}, {high[i]:.4f}]"
        )

    # --- the compute-optimal line ---
    # a little beyond the runs, to show where they point
    least = min(row["FLOPs"] for row in rows)
    most = max(row["FLOPs"] for row in rows)
    budgets = np.geomspace(least, 4 * most, 8)
    best = best_sizes(law, scale, list(size_of), budgets, size_of.get)
    report(best, args.json, torch.device("cpu"))

    # --- files ---
    plot_path = os.path.join(args.out, "laws.png")
    plot(rows, best, doubled, low, high, plot_path)
    numbers = {
        "rows": rows,
        "floor": law["floor"],
        "off": off,
        "units": scale.tolist(),
        "weights": law["weights"].tolist(),
        "exponents": law["exponents"].tolist(),
        "doubled": doubled.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
    text = json.dumps(numbers, indent=1)
    write_atomically(os.path.join(args.out, "laws.json"), text.encode())
    print(f"the plot is {plot_path}")
