"""Do latent actions mean something? What the codes of a train_lam.py run say about the true
actions, and what they do to the picture.

    python eval_lam.py --checkpoint out/lam --split test

Reads a run folder or checkpoint of train_lam.py and the H5 files of its manifest (KEY.actions.npz
beside them holds the truth, where there is one). Prints a table, writes report.json and codes.png
(what each of the most used codes moves, and how codes and actions go together) beside the
checkpoint, then adds to the report what takes longer: probes, decoded frames, and the ceiling (a
network trained with the labels; --no-ceiling leaves it out). With --vae also codes/CODE.mp4, what
a code does to four held-out steps, again and again, and codes_decoded.png, a sheet of them."""

import argparse

from evaluation.flags import Help

# of decoded frames; LPIPS needs a package of its own
METRICS = ["psnr", "ssim", "lpips"]

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that are too small or do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )
    switch = argparse.BooleanOptionalAction

    # what to judge, and on what: files that the run has not seen
    flag = parser.add_argument_group("run and data").add_argument
    flag("--checkpoint", required=True, help="run folder of train_lam.py, or a checkpoint")
    flag("--data_dir", help="folder of the H5 files (default: the run's)")
    flag("--manifest_path", help="split of prepare.manifest (default: the run's, or --data_dir's)")
    flag("--split", default="test", choices=["test", "validation"], help="files to judge on")

    # how much of it; what takes long can be left out
    flag = parser.add_argument_group("what to evaluate").add_argument
    flag("--val_clips", type=int, default=512, help="windows to judge on, and to fit probes on")
    flag("--vae", metavar="diffusers:FOLDER", help="decode frames with the latents' VAE")
    flag("--metrics", nargs="+", choices=METRICS, help="of frames, with --vae (default: psnr ssim)")
    ceiling = "train a small network with the labels on raw latents: what they give away (minutes)"
    flag("--ceiling", action=switch, default=True, help=ceiling)

    # what changes speed and memory, but no number beyond rounding
    flag = parser.add_argument_group("how").add_argument
    flag("--batch_size", type=int, default=32, help="windows at once")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")
    flag("--num_workers", type=int, default=0, help="loader processes")

    # one check, one message
    args = parser.parse_args()
    for name in ("val_clips", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least 1")
    # without a decoder there are no frames to compare
    if args.metrics and not args.vae:
        parser.error("--metrics is for decoded frames: name the video VAE with --vae")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import nn

import checkpoint
from data import Latents, latent_sequences
from evaluation.code_films import write_films
from evaluation.codes import (
    MEANINGS,
    code_summary,
    complaints,
    has_truth,
    held_out_codes,
    joint,
    quantises,
    truth_notes,
)
from evaluation.held_out import precision_of
from evaluation.runs import open_lam, pick_device
from files.disk import write_atomically
from files.latents import (
    check_metrics,
    decoded_scores,
    open_manifest,
    pack_codes,
    unpack_codes,
)
from files.progress import tqdm
from weights import open_latent_vae

# codes that codes.png shows: more rows could not be read
SHOWN_CODES = 16

# transitions whose label is known where labels are few, and how often they are drawn
FEW_LABELS = 100
DRAWS = 10


# --- run and data ---


def find_manifest(state, data_dir, manifest_path):
    """(manifest, folder of its files) to judge a run on: the run's own, unless flags name
    others."""
    # a split that is named counts, whatever the run was trained on
    folder = data_dir or state.get("data_dir") or os.path.dirname(state["manifest"])
    if manifest_path:
        return manifest_path, folder

    # another folder has its own split, unless it is the run's own folder: then the run's split
    # counts, which knows what was trained on
    same = state.get("data_dir") and os.path.realpath(folder) == os.path.realpath(state["data_dir"])
    beside = os.path.join(folder, "manifest.json")
    if data_dir and os.path.exists(beside) and not (same and os.path.exists(state["manifest"])):
        return beside, folder

    # else the run's, if it is still there
    if not os.path.exists(state["manifest"]):
        raise FileNotFoundError(
            f"{state['manifest']}, which the run was trained from, is gone: name the folder of the"
            " latents with --data_dir, or the split with --manifest_path"
        )
    return state["manifest"], folder


def write_report(out, report):
    """report.json; JSON has no nan and no infinity: null."""

    # the json module would write NaN, which other programs refuse
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return x

    text = json.dumps(plain(report), indent=1)
    write_atomically(os.path.join(out, "report.json"), text.encode())


def open_split_of(state, path, split, manifest, folder):
    """The files of a manifest to judge a run on -> ({split: files}). ValueError if there are none,
    or if they are latents of another kind; a warning if the run was trained on them."""
    # are there files, and of the kind that the model takes? Channels and size are those of a VAE
    meta, splits = open_manifest(manifest, folder)
    if not splits.get(split):
        filled = [k for k, files in splits.items() if files and k != "train"]
        remedy = f"pass --split {filled[0]}" if filled else "make it again with other ratios"
        raise ValueError(f"{manifest} has no {split} files: {remedy}")
    for name in ("channels", "size"):
        if list(np.ravel(meta[name])) != list(np.ravel(state["lam"][name])):
            raise ValueError(
                f"{manifest} lists latents of {name} {meta[name]}, {path} was trained on {name}"
                f" {state['lam'][name]}: judge it on latents of its own kind"
            )

    # was it trained on them? Files are the same if their fingerprint is
    if meta["fingerprint"] != state["fingerprint"]:
        print("note: these are not the files that the run was trained on")
        return splits
    trained_on = set(state.get("train_files", ()))
    names = [os.path.relpath(f.path, folder) for f in splits[split]]
    both = sorted(trained_on & set(names))
    if both:
        print(
            f"WARNING: {len(both)} of {len(names)} {split} files of {manifest} were trained on,"
            f" {both[0]} for one: judge with the run's own --manifest_path"
        )
    return splits


# --- probes ---


@torch.no_grad()
def encode_all(model, dataset, batch_size, clips):
    """codes, z_e, labels and raw pairs (n, 2C, h, w) (pooled to at most 16 x 16) of the transitions
    of at most `clips` windows, those whose file has its truth."""
    # codes and vectors as the model sees the windows; labels as they were recorded. The same
    # windows serve the probes and the ceiling
    device = next(model.parameters()).device
    rows = {"codes": [], "z_e": [], "labels": [], "pairs": []}
    for batch in latent_sequences(dataset, batch_size, items=dataset.windows(batch_size, clips)):
        z = batch["z"]
        indices, z_e, _ = model.encode(z.to(device))

        # raw latents for the ceiling, small enough to keep them all: pairs of steps side by side
        size = [min(16, length) for length in z.shape[-2:]]
        small = F.adaptive_avg_pool2d(z.flatten(0, 1), size).unflatten(0, z.shape[:2])

        # a row for each transition
        rows["codes"].append(indices.flatten(0, 1).cpu())
        rows["z_e"].append(z_e.flatten(0, 1).cpu())
        rows["labels"].append(batch["labels"].flatten(0, 1).cpu())
        rows["pairs"].append(torch.cat([small[:, :-1], small[:, 1:]], dim=2).flatten(0, 1).cpu())

    # a transition without its truth can neither teach nor test, and is left out of both
    arrays = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    with_truth = has_truth(arrays["labels"])
    return {name: x[with_truth] for name, x in arrays.items()}


def linear_probe(x, y, x_test, y_test):
    """Balanced accuracy of a logistic regression fitted on (x, y)."""
    # inputs in the same units, those of the fitting files; a constant one stays 0
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    probe = LogisticRegression(max_iter=3000, class_weight="balanced")
    probe.fit((x - mean) / std, y)
    return balanced_accuracy(y_test, probe.predict((x_test - mean) / std))


def few_labels(inputs, y, y_test):
    """Mean balanced accuracy of a probe that saw FEW_LABELS labelled transitions, over DRAWS draws
    of them: {name: accuracy}. inputs: {name: (x, x_test)}; y, y_test: the labels of the rows."""
    scores = {name: [] for name in inputs}
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        chosen = rng.choice(len(y), min(FEW_LABELS, len(y)), replace=False)

        # of a rare action a draw may have no example
        if len(np.unique(y[chosen])) < 2:
            continue
        for name, (x, x_test) in inputs.items():
            scores[name].append(linear_probe(x[chosen], y[chosen], x_test, y_test))
    return {name: float(np.mean(values)) if values else math.nan for name, values in scores.items()}


def balanced_accuracy(y, guess):
    """Mean over the true classes of the share that is recognised. (scikit-learn's warns of classes
    that only the guess has.)"""
    # rare actions count as much as common ones
    shares = [np.mean(guess[y == value] == value) for value in np.unique(y)]
    return float(np.mean(shares))


def ceiling(x, y, x_test, y_test, name=""):
    """Balanced accuracy of a small convolutional network trained with the labels on raw pairs of
    steps: what they give away."""
    # classes as numbers, weighted by how rare they are: what counts is balanced accuracy
    torch.manual_seed(0)
    names, y = np.unique(y, return_inverse=True)
    x = torch.from_numpy(x)
    x_test = torch.from_numpy(x_test)
    y = torch.from_numpy(y)
    weight = len(y) / (len(names) * torch.bincount(y)).float()

    # three convolutions: enough to see a shift of the picture, which is what most actions do
    net = nn.Sequential(
        nn.Conv2d(x.shape[1], 48, 3, 1, 1),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, 2, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.LazyLinear(len(names)),
    )
    net(x[:1])  # the size of the last layer

    # few transitions are learned by heart early, so the number of steps follows theirs
    steps = min(max(40 * len(x) // 64, 300), 2400)

    # plain training on random batches
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), unit=" steps", desc=f"ceiling {name}"):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(net(x[rows]), y[rows], weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    # what it says about files that it has not seen
    with torch.no_grad():
        guess = torch.cat([net.eval()(part).argmax(1) for part in x_test.split(256)])
    return balanced_accuracy(y_test, names[guess.numpy()])


@torch.no_grad()
def displacement(model, z, code):
    """Median motion (down, right) in latent pixels that a code (slots,) causes in steps z (B, C, H,
    W): the peak of the circular cross-correlation of each step and the one decoded after it."""
    # steps and what the code makes of them, without their mean, which would outshine the shift
    H, W = z.shape[2:]
    after = model.decode(z, code.expand(len(z), -1))
    spectrum = torch.fft.rfft2(z - z.mean((2, 3), keepdim=True))
    after_spectrum = torch.fft.rfft2(after - after.mean((2, 3), keepdim=True))

    # the shift at which they agree most, over all channels: a correlation in the frequencies
    correlation = torch.fft.irfft2((after_spectrum * spectrum.conj()).sum(1), s=(H, W))
    peak = correlation.flatten(1).argmax(1)

    # beyond half of the picture a motion is one the other way
    down = (peak // W + H // 2) % H - H // 2
    right = (peak % W + W // 2) % W - W // 2
    return down.median().item(), right.median().item()


# --- codes.png ---


def motion_text(down, right):
    """A motion in words: "4 up, 4 left"."""
    parts = []
    if down:
        parts.append(f"{abs(down):.0f} {'down' if down > 0 else 'up'}")
    if right:
        parts.append(f"{abs(right):.0f} {'right' if right > 0 else 'left'}")
    return ", ".join(parts) or "no motion"


def action_texts(labels, names):
    """(ticks, axis label) of a plot over true actions. labels (n, L): the labels of each known
    transition; names: of the L labels."""
    rows = np.unique(labels, axis=0)
    if len(names) == 1:
        return [f"{value:g}" for (value,) in rows], f"true action: {names[0]}"
    ticks = []
    for row in rows:
        ticks.append("\n".join(f"{name} {value:g}" for name, value in zip(names, row)))
    return ticks, "true action"


def plot_codes(path, ids, actions, names, moves, texts):
    """codes.png: the motion that each of the most used codes causes, and how often each true action
    goes with it. ids (n,): the code of each transition; actions (n,): -1 where it is not known;
    names: {code: its numbers}; moves: {code: (down, right)}; texts: of `action_texts`."""
    # the share of each true action among the transitions of a code; a row of zeros where no truth
    # is known
    values = np.unique(actions[actions >= 0])
    table = np.zeros((len(moves), len(values)))
    for row, code in enumerate(moves):
        of_code = actions[(ids == code) & (actions >= 0)]
        if len(of_code):
            table[row] = [np.mean(of_code == value) for value in values]

    # codes of one action together, the most used first: the picture at the right is then a stair
    share = [np.mean(ids == code) for code in moves]
    order = np.lexsort((-np.array(share), table.argmax(1)))
    codes = [list(moves)[i] for i in order]

    # a row for each code, and room for the titles
    rows = range(len(codes))
    fig = Figure(figsize=(13, 1.6 + 0.32 * len(codes)), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 2])

    # left: arrows, the longest of which fills its column
    longest = max(max(map(abs, move)) for move in moves.values())
    down, across = np.array([moves[code] for code in codes], dtype=float).T
    left.quiver(
        0 * down,
        rows,
        across,
        -down,
        angles="uv",
        scale_units="inches",
        scale=5 * max(1, longest),
        width=0.012,
        color="tab:blue",
    )
    for row, code in enumerate(codes):
        left.text(0.6, row, motion_text(*moves[code]), va="center", fontsize=11)
    left.set(
        xlim=(-0.6, 2.2),
        ylim=(len(codes) - 0.4, -0.6),
        xticks=[],
        title="motion it causes, latent pixels a step",
    )

    # the code's numbers and how often it is used
    labels = []
    for code, i in zip(codes, order):
        numbers = "-".join(map(str, names[code]))
        labels.append(f"{numbers}  ({share[i]:.0%})")
    left.set_yticks(rows, labels, fontsize=11)
    left.set_ylabel(f"code: {len(names[codes[0]])} numbers (share of all steps)")

    # right: true actions. One dark cell in each row means that codes name actions
    image = right.imshow(table[order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ticks, label = texts
    right.set(yticks=[], title="true actions of the steps that get this code", xlabel=label)
    right.set_xticks(range(len(values)), ticks[: len(values)], fontsize=11)
    fig.colorbar(image, ax=right, label="share of the code's steps")
    write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png"))


def most_used(ids):
    """{code: its share} of the SHOWN_CODES most used ones, the most used first."""
    # ties stay in the order of their numbers, so that a second report shows the same
    values, counts = np.unique(ids, return_counts=True)
    order = np.argsort(-counts)[:SHOWN_CODES]
    return dict(zip(values[order].tolist(), (counts / counts.sum())[order].tolist()))


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # what is missing for the frames shows before anything takes time: a package, or the VAE
    vae = None
    if args.vae:
        args.metrics = args.metrics or ["psnr", "ssim"]
        check_metrics(args.metrics)
        vae = open_latent_vae(args.vae, torch.float32)

    # --- run and data ---
    model, state, path = open_lam(args.checkpoint)
    manifest, folder = find_manifest(state, args.data_dir, args.manifest_path)
    splits = open_split_of(state, path, args.split, manifest, folder)
    device = pick_device()
    model.to(device)
    if vae is not None:
        vae.to(device)
        # a VAE of pictures says how many channels its latents have
        channels = getattr(vae, "channels", state["lam"]["channels"])
        if channels != state["lam"]["channels"]:
            raise ValueError(
                f"--vae {args.vae} has latents of {channels} channels, {path} was trained on"
                f" {state['lam']['channels']}: name the VAE that made them"
            )
    dtype, autocast = precision_of(args.dtype, state, device)

    # windows of the files to judge on, as long as those of training
    test = Latents(splits[args.split], state["sequence_length"])
    out_dir = os.path.dirname(os.path.abspath(path))

    # --- errors and codes ---
    # a continuous model has no codes to count
    K = state["lam"]["num_embeddings"] if quantises(model) else None
    measured = held_out_codes(
        model, test, args.batch_size, args.val_clips, args.num_workers, autocast
    )
    summary = code_summary(measured, K)

    # the table: every number with what it means
    print(
        f"{path}: {len(measured['own'])} transitions of {len(test.files)} files ({args.split});"
        f" {dtype} on {device.type}"
    )
    for name, value in summary.items():
        if not math.isnan(value):
            print(f"  {name:20} {value:10.4g}  {MEANINGS[name]}")

    # what is wrong with it
    if model.quantizer is not None and not K:
        print(
            f"WARNING: the run stopped in its warm-up, after {int(model.quantizer.seen[0])} of"
            f" {model.quantizer.warmup} steps (--vq_warmup_steps): its decoder does not use codes"
            " yet, and no number describes them"
        )
    # and what to do about it
    for sentence in complaints(summary, K is not None):
        print(f"WARNING: {sentence}")
    for sentence in truth_notes(test, measured, args.split):
        print(f"note: {sentence}")

    # written now, and again after each part that takes longer: a run that is stopped leaves what
    # it has
    report = {
        "checkpoint": path,
        "split": args.split,
        "transitions": len(measured["own"]),
    } | summary
    report["quantises"] = K is not None
    write_report(out_dir, report)

    # --- codes.png: what the most used codes move, and which actions go with them ---
    if K:
        ids = pack_codes(measured["codes"], K)
        shares = most_used(ids)

        # each code is put to the same 32 steps, of all files, so that moves can be compared
        items = sum(test.windows(8, 32), [])
        z = torch.stack([test[0, 0, number, k]["z"][0] for _, _, number, k in items]).to(device)
        names, moves = {}, {}
        for code in shares:
            names[code] = unpack_codes(torch.tensor(code), K, model.num_codes).tolist()
            with autocast():
                moves[code] = displacement(model, z, torch.tensor(names[code], device=device))

        # true actions as numbers, -1 where one is not known; all labels together make one
        actions = np.zeros(len(ids), int)
        texts = ["all steps"], "the true actions are not known"
        if test.labels:
            with_truth = has_truth(measured["labels"])
            actions = np.full(len(ids), -1)
            actions[with_truth] = joint(measured["labels"][with_truth])
            texts = action_texts(measured["labels"][with_truth], test.labels)
        plot_codes(os.path.join(out_dir, "codes.png"), ids, actions, names, moves, texts)
        report["codes"] = [
            {"code": names[code], "share": share, "moves": moves[code]}
            for code, share in shares.items()
        ]
        write_report(out_dir, report)

    # --- films: what the most used codes do, again and again ---
    if K and vae is not None:
        by_numbers = {tuple(names[code]): share for code, share in shares.items()}
        with autocast():
            write_films(out_dir, model, vae, z, by_numbers)

    # --- probes: what a classifier reads from codes and vectors ---
    train = Latents(splits["train"], state["sequence_length"]) if splits["train"] else None

    # labels that both splits have: a probe is fitted on training files
    labels = [k for k in test.labels if train is not None and k in train.labels]
    for name in test.labels:
        if name not in labels:
            print(f"note: no probe of {name}: the training files do not have it (KEY.actions.npz)")
    if labels:
        with autocast():
            fit = encode_all(model, train, args.batch_size, args.val_clips)
            judged = encode_all(model, test, args.batch_size, args.val_clips)

        # a code is a category: its numbers have no order, so each gets a column of its own
        ids_fit = pack_codes(fit["codes"], K or 1)
        ids_test = pack_codes(judged["codes"], K or 1)
        one_hot_fit = np.float64(ids_fit[:, None] == np.unique(ids_fit))
        one_hot_test = np.float64(ids_test[:, None] == np.unique(ids_fit))

        # where labels are few, most codes have none: each number of a code gets a column instead.
        # Raw latents need no run: they are the bar
        numbers = np.arange(K or 1)
        few = {"codes": [], "z_e": [], "raw latents": []}
        for rows in (fit, judged):
            columns = np.float64(rows["codes"][:, :, None] == numbers)
            few["codes"].append(columns.reshape(len(columns), -1))
            few["z_e"].append(rows["z_e"].reshape(len(columns), -1))
            few["raw latents"].append(rows["pairs"].reshape(len(columns), -1))
        if not K:
            del few["codes"]
        print("balanced accuracy of a probe      chance   codes     z_e")

    # one probe for each label
    probed = []
    for name in labels:
        y = fit["labels"][:, train.labels.index(name)]
        y_test = judged["labels"][:, test.labels.index(name)]
        if not len(y) or not len(y_test):
            print(f"note: no probe of {name}: no transition of these windows has its truth")
            continue
        if len(np.unique(y)) < 2:
            print(f"note: no probe of {name}: it is {y[0]} in all training transitions")
            continue

        # an action that training does not have cannot be recognised
        unseen = sorted(set(y_test.tolist()) - set(y.tolist()))
        if unseen:
            print(f"note: {name} {unseen} never occurs in training: no probe can name it")

        # from the code alone, and from the vector before it was quantised
        row = {"chance": 1 / len(np.unique(y)), "codes": math.nan}
        if K:
            row["codes"] = linear_probe(one_hot_fit, y, one_hot_test, y_test)
        z_fit = fit["z_e"].reshape(len(y), -1)
        z_test = judged["z_e"].reshape(len(y_test), -1)
        row["z_e"] = linear_probe(z_fit, y, z_test, y_test)
        print(f"  {name:30} " + " ".join(f"{v:7.3f}" for v in row.values()), flush=True)

        # and from few labels: what latent actions are for
        row["few labels"] = few_labels(few, y, y_test)
        text = ", ".join(f"{source} {value:.3f}" for source, value in row["few labels"].items())
        print(f"    from {min(FEW_LABELS, len(y))} labelled transitions: {text}", flush=True)
        report[f"probe_{name}"] = row
        probed.append((name, y, y_test))
        write_report(out_dir, report)

    # --- frames ---
    # what the errors mean to the eye, where the video VAE is at hand
    if vae is not None:
        sample = (batch["z"] for batch in latent_sequences(test, 4, items=test.windows(4, 32)))
        report["decoded"] = decoded_scores(model, sample, vae, args.metrics)
        for name, (decoded, copied) in report["decoded"].items():
            print(
                f"  {name:5} of decoded frames: {decoded:.3f}, of copying the step before"
                f" {copied:.3f}"
            )
        write_report(out_dir, report)

    # --- the ceiling: what the labels can be read from at best ---
    # last, because it takes minutes: a probe near it could hardly be better
    if probed and args.ceiling:
        print("balanced accuracy of a network trained with the labels on raw latents:")
        for name, y, y_test in probed:
            accuracy = ceiling(fit["pairs"], y, judged["pairs"], y_test, name)
            report[f"probe_{name}"]["ceiling"] = accuracy
            print(f"  {name:30} {accuracy:7.3f}")
            write_report(out_dir, report)

    print(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    pictures = ", codes.png" if K else ""
    films = ", codes_decoded.png, codes/*.mp4" if K and vae is not None else ""
    print(f"written to {out_dir}: report.json{pictures}{films}")
