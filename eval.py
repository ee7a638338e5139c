"""Does the model use the action? A report on a run of train_ac.py or train_lora.py, on held-out
gameplay or robot episodes.

    python eval.py --checkpoint out/demo --data 'demo/features/val/*.tar' --video 'demo/val/*.tar'
    python eval.py --checkpoint out/robot/r16 --landscape x z

Reads a run folder or checkpoint and held-out data (VPT video or features of the run's encoder,
robot episodes; default: what the run held out). Prints a table and writes report.json and
report.html, one page with all figures in it, beside the checkpoint or to --out."""

import argparse
import functools
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from data import windows
from evaluation import pictures
from evaluation.held_out import (
    bands_of,
    from_other_recordings,
    gap_of,
    gap_text,
    held_out,
    interval_text,
    meter_summary,
    precision_of,
    precision_text,
)
from evaluation.runs import open_held_out, open_run
from files.disk import write_atomically
from files.logs import to_json
from files.vpt import CONTINUOUS, DEGREES_PER_PIXEL, HOTBAR, SLOTS, ClipReader
from model import predict, predict_on

# clips whose actions are ranked and swept
SAMPLED = 96

# points along an axis of a landscape; odd, because no motion must be one of them
GRID = 17

# below this share of error, shuffled actions hardly cost anything (as in train_ac.py)
LEAST_GAP = 0.02

DTYPES = ["float32", "bfloat16", "float16"]

# the end of help texts
DEFAULT = "(default: %(default)s)"


# --- flags ---


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument_group("run and data").add_argument
    flag("--checkpoint", required=True, help="a run folder, or one of its checkpoints")
    flag(
        "--data",
        "--data_path",
        nargs="+",
        action="append",
        help="held-out data (default: the run's)",
    )
    flag("--encoder", help="weights of the encoder, for pixels (default: what the run used)")
    flag("--video", nargs="+", help="shards that features were made from, to show their frames")
    flag("--out", help="folder for report.json and report.html (default: beside the checkpoint)")

    flag = parser.add_argument_group("what to evaluate").add_argument
    flag("--val_clips", type=int, default=512, help=f"clips, kept in memory {DEFAULT}")
    flag("--samples", type=int, default=256, help=f"actions to rank among {DEFAULT}")
    flag("--landscape", nargs=2, metavar="NAME", help="two action dimensions to sweep, such as x z")
    flag("--heads", nargs="+", metavar="BLOCK:HEAD", help="attention (default: of the last block)")

    flag = parser.add_argument_group("how").add_argument
    flag("--batch_size", type=int, default=32, help=f"clips at once {DEFAULT}")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")
    flag("--decoder", choices=["pyav", "decord"], help="video decoder (default: the run's)")
    flag("--num_workers", type=int, default=2, help=f"loader processes {DEFAULT}")

    args = parser.parse_args()
    for name, least in (("samples", 1), ("batch_size", 1), ("val_clips", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least {least}")
    if args.landscape and args.landscape[0] == args.landscape[1]:
        parser.error(f"--landscape {' '.join(args.landscape)}: name two different dimensions")
    return args


# --- groups of actions ---


def action_groups(names):
    """{group: indices of its dimensions} of action names: camera, keys, hotbar, gui; position,
    rotation, gripper; else by field."""
    known = {"camera": CONTINUOUS, "hotbar": HOTBAR + SLOTS, "gui": ["gui_open"]}
    known |= {
        "position": ["x", "y", "z"],
        "rotation": ["roll", "pitch", "yaw"],
        "gripper": ["gripper"],
    }
    out = {}
    for i, name in enumerate(names):
        group = name.rpartition(".")[0] or name
        if name.startswith(("key.", "mouse.")):
            group = "keys"
        for known_group, members in known.items():
            if name in members:
                group = known_group
                break
        out.setdefault(group, []).append(i)
    return out


@torch.no_grad()
def group_errors(predictor, z, actions, states, others, compose, groups):
    """Mean |error| (B, K) as in held_out.action_meter, {"tf_GROUP", "ro_GROUP"}, when only the
    dimensions of one group are those of `others` (B, K, A): of another recording."""
    out = {}
    target = z[:, 1:]
    for name, columns in groups.items():
        # nan where there is no other recording to take actions of
        if torch.isnan(others).any():
            out[f"tf_{name}"] = out[f"ro_{name}"] = torch.full_like(target[..., 0, 0], math.nan)
            continue
        a = actions.clone()
        a[..., columns] = others[..., columns]
        one_step = predict(predictor, z[:, :-1], a, states)
        rolled_out = predictor.rollout(z[:, :1], a, compose(states[:, 0], a))
        out[f"tf_{name}"] = (one_step - target).abs().mean((2, 3))
        out[f"ro_{name}"] = (rolled_out - target).abs().mean((2, 3))
    return out


def gaps_of_groups(predictor, kept, others_of, recordings, states_of, groups, errors, autocast):
    """{group: {"tf": [gap, low, high], "ro": ...}} of all clips, in the batches of the meter."""
    rows = []
    first = 0
    for size in tqdm(kept.sizes, "groups of actions", delay=10, unit=" batches"):
        z, actions, states = kept.load(range(first, first + size))
        others = others_of(recordings[first : first + size], actions)  # those of held_out
        with autocast():
            found = group_errors(predictor, z, actions, states, others, states_of, groups)
        rows.append({k: v.cpu() for k, v in found.items()})
        first += size
    found = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    gaps = {}
    for group in groups:
        gaps[group] = {
            p: gap_of(found[f"{p}_{group}"], errors[f"{p}_true"], recordings) for p in ("tf", "ro")
        }
    return gaps


def group_lines(gaps, summary, gap, recordings):
    """The gaps of groups for a person; gap: the text of the whole one, in place of all gaps where
    there is no other recording."""
    title = "gap of one group of actions: one step ahead, rolled out"
    if math.isnan(summary["tf_gap"]):
        return [f"{title}: {gap}"]
    lines = [title]
    for group, both in gaps.items():
        cells = ""
        for value, low, high in both.values():
            cells += f"{value:+9.2%} {interval_text(low, high, recordings)}"
        lines.append(f"  {group:22}" + cells)
    return lines


# --- rank, energy landscape ---


@torch.no_grad()
def energies(predictor, z, actions, states, candidates):
    """e(a) = mean |P_1(z_t, a) - z_t+1| (N,) of candidates (N, A) at the last transition of one
    clip: z (T, N, E), actions (T-1, A), states (T, S). What comes before is computed once, and its
    keys and values serve all candidates."""
    c = len(z) - 1
    past = None
    if c > 1:
        _, past = predict_on(predictor, z[None, : c - 1], actions[None], states[None])

    # a chunk's copies of keys take 0.5 GB at most
    numbers = c * (z.shape[1] + 2) * predictor.predictor_embed.out_features
    chunk = max(2**27 // numbers, 1)

    out = []
    for part in candidates.split(chunk):
        n = len(part)
        a = torch.cat([actions[: c - 1].expand(n, -1, -1), part[:, None]], dim=1)
        steps = z[None, :c].expand(n, -1, -1, -1)
        step = predictor.rollout(steps, a, states[None, :c].expand(n, -1, -1), cache=past)
        out.append((step[:, 0] - z[c]).abs().mean((1, 2)))
    return torch.cat(out)


def drawn_from_others(actions, i, recordings, count, generator):
    """Whole actions (count, A) drawn from all steps of all clips of other recordings than the i-th
    clip's; of all other clips where there is only one recording. actions (n, K, A)."""
    clips = [j for j, name in enumerate(recordings) if name != recordings[i]]
    if not clips:
        clips = [j for j in range(len(recordings)) if j != i]
    K = actions.shape[1]
    drawn = torch.randint(len(clips) * K, (count,), generator=generator)
    return actions[torch.tensor(clips)[drawn // K], drawn % K]


def rank_of(energy, others):
    """Share of the sampled actions (N,) that explain the step better than the true one; ties count
    half."""
    return ((others < energy).double() + 0.5 * (others == energy).double()).mean().item()


def to_units(actions, scaler):
    """Scaled actions (..., A) -> what was recorded, float64."""
    out = actions.double().clone().numpy()
    out[..., : len(scaler.mean)] = out[..., : len(scaler.mean)] * scaler.scale + scaler.mean
    return out


def swept(action, names, scaler, dims, axes):
    """The true scaled action (A,) with two dimensions (indices) taken through axes (in units) -> (G
    * G, A), the first one slowest. A mouse that moves also turns the camera, by
    vpt.DEGREES_PER_PIXEL, and the other way round."""
    out = np.repeat(to_units(action, scaler)[None], len(axes[0]) * len(axes[1]), axis=0)
    radians_per_pixel = np.radians(DEGREES_PER_PIXEL)
    tied = {}  # mouse_dx with yaw, mouse_dy with pitch
    if names[:4] == CONTINUOUS:
        tied = {0: 2, 1: 3, 2: 0, 3: 1}
    for i, values in zip(dims, np.meshgrid(*axes, indexing="ij")):
        out[:, i] = values.ravel()
        other = tied.get(i)
        if other is not None and other not in dims:
            factor = radians_per_pixel if i < 2 else radians_per_pixel**-1
            out[:, other] = values.ravel() * factor
    return torch.from_numpy(scaler.transform(out)).float()


def dims_to_sweep(asked, names, actions, scaler):
    """The two dimensions of the landscape, `asked` or those that move a camera or an arm first, and
    the values (G,) along each, in units: up to what 99 % of the actions stay below. ValueError if
    one never differs from 0."""
    sizes = np.abs(to_units(actions, scaler))
    spans = dict(zip(names, np.quantile(sizes, 0.99, axis=(0, 1))))
    dims = asked
    if not dims:
        order = dict.fromkeys(["mouse_dx", "mouse_dy", "x", "z", *names])
        dims = [d for d in order if spans.get(d)][:2]
    if len(dims) < 2 or not all(spans[d] for d in dims):
        raise ValueError(
            f"--landscape {' '.join(dims)}: one of two never differs from 0 in these data, choose"
            " others"
        )
    return dims, [np.linspace(-spans[d], spans[d], GRID) for d in dims]


class Landscapes(NamedTuple):
    """What `explore` found, of the first SAMPLED clips."""

    # rank of the true last action among those of other recordings, 0 (best) to 1
    ranks: list

    # energies (GRID, GRID) of the last step, the first dimension by the second
    energies: list

    # mean distance of the least energy's action from the truth, (2,), in units
    argmin: np.ndarray

    # that of actions of other recordings
    random: np.ndarray


def explore(predictor, kept, actions, recordings, names, scaler, dims, axes, samples, autocast):
    """Rank and landscape of the last action of each of the first SAMPLED clips -> Landscapes.
    actions (n, K, A); dims: indices of the two dimensions; samples: actions to rank among."""
    plain = to_units(actions, scaler)[..., dims]  # (n, K, 2)
    device = next(predictor.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ranks, lands = [], []
    misses = []
    count = min(len(actions), SAMPLED)
    for i in tqdm(range(count), "rank, landscape", delay=10, unit=" clips"):
        z, a, s = one_clip(kept, i)
        true = actions[i, -1]
        others = drawn_from_others(actions, i, recordings, samples, generator)
        grid = swept(true, names, scaler, dims, axes)
        candidates = torch.cat([true[None], others, grid])
        with autocast():
            e = energies(predictor, z, a, s, candidates.to(device)).float().cpu()
        ranks.append(rank_of(e[0], e[1 : len(others) + 1]))
        land = e[len(others) + 1 :].view(GRID, GRID).numpy()
        lands.append(land)

        # how far the least energy is from the truth, and how far a random action is
        least = np.unravel_index(land.argmin(), land.shape)
        best = np.array([[axis[k] for axis, k in zip(axes, least)]])
        drawn = to_units(others, scaler)[:, dims]
        misses.append([np.abs(x - plain[i, -1]).mean(0) for x in (best, drawn)])
    argmin, random = np.mean(misses, axis=0)
    return Landscapes(ranks, lands, argmin, random)


def landscape_lines(found, dims, units, samples, recordings):
    """Rank and landscape for a person."""
    source = "other recordings" if len(set(recordings)) > 1 else "the same recording"
    lines = [
        f"rank of the true action among {samples} of {source}: {np.mean(found.ranks):.3f} (0 best,"
        f" 0.5 chance; {len(found.ranks)} clips)"
    ]
    for d, best, random in zip(dims, found.argmin, found.random):
        unit = units.get(d, "")
        lines.append(
            f"  {d:22} minimum of the error is {best:.3g} {unit} off the truth, a random action"
            f" {random:.3g}"
        )
    return lines


# --- retrieval ---


@torch.no_grad()
def retrieve(predictions, pool):
    """Index of the nearest pool step (P, N, E) for each prediction (..., N, E), by mean
    |difference|, and that distance."""
    rows = predictions.flatten(0, -3).flatten(1)
    distance = torch.cdist(rows, pool.flatten(1), p=1) / pool[0].numel()
    least, index = distance.min(1)
    return index.view(predictions.shape[:-2]), least.view(predictions.shape[:-2])


@torch.no_grad()
def retrieval(predictor, places, T, batch_size, compose, load):
    """For each predicted step of a rollout, find the recorded step of the same recording whose
    features are nearest, among all evaluated ones. places: clip -> (record, window); load: clips
    -> (z, actions, states). -> {clip: K (clip, step) found}; share of hits, median steps off by
    horizon [K], also of copying; chance of a hit."""
    groups = {}  # the clips of each recording
    for i, (number, _) in places.items():
        groups.setdefault(number, []).append(i)

    found = {}
    rows = {k: [] for k in ("hit", "offset", "copy_hit", "copy_offset", "chance")}
    for group in tqdm(groups.values(), "retrieval", delay=10, unit=" recordings"):
        parts = [load(group[k : k + batch_size]) for k in range(0, len(group), batch_size)]
        rolled_out = [predictor.rollout(h[:, :1], a, compose(s[:, 0], a)) for h, a, s in parts]
        ahead = torch.cat(rolled_out)
        z = torch.cat([h for h, _, _ in parts])
        pool = z.flatten(0, 1)

        # the time of each step of the pool; the clips of a recording may leave gaps
        time = torch.tensor([places[i][1] * T + t for i in group for t in range(T)])
        true = torch.arange(len(time)).view(-1, T)[:, 1:]
        copied = retrieve(z[:, :1].expand_as(ahead), pool)[0].cpu()
        nearest = retrieve(ahead, pool)[0].cpu()
        for i, row in zip(group, nearest.tolist()):
            found[i] = [(group[j // T], j % T) for j in row]
        for name, index in (("", nearest), ("copy_", copied)):
            rows[name + "hit"].append((index == true).double())
            rows[name + "offset"].append((time[index] - time[true]).abs())
        rows["chance"].append(torch.full((len(group),), 1 / len(time)))

    means = {}
    for name, parts in rows.items():
        values = torch.cat(parts)
        mean = values.median(0).values if "offset" in name else values.mean(0)
        means[name] = mean.tolist()
    return found, means


def retrieval_lines(rows, T, seconds):
    """Retrieval for a person, a column for each horizon."""
    header = "".join(f"{f'+{k * seconds:.3g} s':>9}" for k in range(1, T))
    lines = ["retrieval: nearest step " + header]
    labels = {
        "hit": "is the true one",
        "copy_hit": "same, copying",
        "offset": "median steps off",
        "copy_offset": "same, copying",
    }
    for name, label in labels.items():
        form = "9.0f" if "offset" in name else "9.1%"
        lines.append(f"  {label:22}" + "".join(f"{x:{form}}" for x in rows[name]))
    return lines


# --- the report ---


class KeptClips:
    """Every clip that the meter has seen, as it was read, for what comes after it. keep and load
    return (z, actions, states) on the device."""

    def __init__(self, features_of):
        self.features_of = features_of
        self.clips = []
        self.sizes = []  # of the meter's batches

    def keep(self, batch):
        size = len(batch["key"])
        self.sizes.append(size)
        for i in range(size):
            clip = {}
            for name, values in batch.items():
                if name in ("bad", "bytes"):
                    continue
                # a copy, because loader processes use their memory again
                clip[name] = values[i].clone() if torch.is_tensor(values) else values[i]
            self.clips.append(clip)
        return self.features_of(batch)

    def load(self, numbers):
        batch = {}
        for name, value in self.clips[0].items():
            if torch.is_tensor(value):
                batch[name] = torch.stack([self.clips[i][name] for i in numbers])
        return self.features_of(batch)


def one_clip(kept, i):
    """z (T, N, E), actions (K, A) and states (T, S) of a clip of KeptClips."""
    return tuple(x[0] for x in kept.load([i]))


def verdict_of(summary, recordings):
    """What the action meter says, in sentences: (verdict, warnings)."""
    verdict, warnings = [], []
    gap = summary["tf_gap"]
    low = summary["tf_gap_low"]
    cost = gap_text(gap, low, summary["tf_gap_high"], recordings)
    if math.isnan(gap):
        verdict.append("Whether the model uses the action is not known.")
        warnings.append(f"WARNING: the action gap is {cost}")
    elif gap < LEAST_GAP:
        verdict.append(f"The model hardly uses the action: shuffled actions cost {cost}.")
        warnings.append(
            f"WARNING: shuffled actions cost less than {100 * LEAST_GAP:.0f} %: the predictor"
            " hardly uses the action"
        )
    elif low > 0:
        verdict.append(f"The model uses the action: shuffled actions cost {cost}.")
    else:
        verdict.append(f"It is not shown that the model uses the action: the gap is {cost}.")
        warnings.append("WARNING: the action gap has no interval above 0: evaluate more recordings")

    skill = summary["tf_skill"]
    if skill < 1:
        verdict.append(f"It predicts better than repeating the last step: skill {skill:.3f}.")
    else:
        verdict.append(f"It does not predict better than repeating the last step: {skill:.3f}.")
        warnings.append("WARNING: skill is not below 1: repeating the last step is as good")
    return verdict, warnings


if __name__ == "__main__":
    args = parse_flags()
    sys.excepthook = checkpoint.short_excepthook

    # --- run ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, state, scaler, path = open_run(args.checkpoint)
    dtype, autocast = precision_of(args.dtype, state, device)
    run = state["args"]
    names = state["action_names"]
    seconds = state["frames_per_step"] / state["fps"]
    for name in args.landscape or []:
        if name not in names:
            raise ValueError(f"--landscape {name}: no such action; the run has {', '.join(names)}")
    heads = pictures.check_heads(predictor, args.heads)

    # --- data ---
    warnings = []  # the page shows what the terminal shows

    def warn(line):
        print(line)
        warnings.append(line)

    dataset, features_of, compose, bad = open_held_out(
        state, scaler, args.data, args.encoder, device, dtype, args.decoder, warn
    )
    has_pixels = "safetensors" not in dataset.records[0].members
    videos = pictures.find_videos(args.video, dataset.records) if args.video else None
    predictor.to(device)
    states_of = functools.partial(
        compose,
        mean=torch.tensor(scaler.mean, device=device).float(),
        scale=torch.tensor(scaler.scale, device=device).float(),
    )

    # --- action meter ---
    kept = KeptClips(features_of)
    errors, recordings, also_bad = held_out(
        predictor,
        dataset,
        kept.keep,
        args.batch_size,
        args.val_clips,
        args.num_workers,
        run["auto_steps"],
        run.get("loss_exp", 1.0),
        autocast,
        compose=compose,
    )
    errors = {k: v for k, v in errors.items() if k.startswith(("tf_", "ro_"))}
    summary = meter_summary(errors, recordings)
    for file, key, reason in bad + also_bad:
        print(f"left out: {file} {key}: {reason}")

    # what it says, first of all
    clips = kept.clips
    T = state["frames_per_clip"] // state["frames_per_step"]
    K = errors["ro_true"].shape[1]
    gap = gap_text(summary["tf_gap"], summary["tf_gap_low"], summary["tf_gap_high"], recordings)
    about = (
        f"{path}: {len(recordings)} clips of {len(set(recordings))} recordings;"
        f" {precision_text(dtype, device, predictor, K)}"
    )
    print(about)
    facts = [pictures.table(errors, summary, seconds, gap)]
    print(facts[0])
    verdict, from_meter = verdict_of(summary, recordings)
    for line in from_meter:
        warn(line)

    bands = bands_of(errors, recordings)
    report = {
        "checkpoint": path,
        "dtype": dtype,
        "clips": len(recordings),
        "recordings": len(set(recordings)),
    }
    report |= summary
    report["by_horizon"] = {k: v.mean(0).tolist() for k, v in errors.items() if k[:3] == "ro_"}
    report["intervals"] = bands

    # --- groups of actions ---
    groups = action_groups(names)
    actions = torch.stack([clip["actions"] for clip in clips])
    items = sum(windows(dataset, max(args.batch_size, 2), args.val_clips), [])
    others_of = from_other_recordings(dataset, items)
    gaps = gaps_of_groups(
        predictor, kept, others_of, recordings, states_of, groups, errors, autocast
    )
    facts += group_lines(gaps, summary, gap, recordings)
    report["groups"] = gaps

    # --- rank, energy landscape ---
    dims, axes = dims_to_sweep(args.landscape, names, actions, scaler)
    index = [names.index(d) for d in dims]
    units = dict(zip(names, scaler.meta.get("units", [])))
    found = explore(
        predictor, kept, actions, recordings, names, scaler, index, axes, args.samples, autocast
    )
    facts += landscape_lines(found, dims, units, args.samples, recordings)
    report["rank"] = float(np.mean(found.ranks))
    report["ranked_clips"] = len(found.ranks)
    report["landscape"] = {}
    for d, best, random in zip(dims, found.argmin.tolist(), found.random.tolist()):
        report["landscape"][d] = {"unit": units.get(d, ""), "argmin": best, "random": random}

    # --- retrieval ---
    places = {}  # clip -> (record, window), where the clip drawn is the one asked for
    for i, item in enumerate(items):
        if clips[i]["key"] == dataset.records[item[2]].key:
            places[i] = item[2:]
    with autocast():
        nearest, rows = retrieval(predictor, places, T, args.batch_size, states_of, kept.load)
    facts += retrieval_lines(rows, T, seconds)
    report["retrieval"] = rows
    print(*facts[1:], sep="\n")

    # --- frames ---
    reader = dataset.reader
    if videos:
        reader = ClipReader(
            reader.frames,
            reader.fps,
            reader.frames_per_step,
            128,
            reader.action_space,
            scaler,
            reader.encode,
        )
    can_show = has_pixels or videos is not None

    @functools.cache
    def frames(i):
        """The pictures that the steps of a clip end with (T, H, W, 3)."""
        record, window = places[i]
        return pictures.look_up(clips[i], dataset.records[record], window, videos, reader)

    # clips in which much changes: the first one for colours and attention, three for strips
    by_change = errors["ro_copy"][:, -1].argsort(descending=True).tolist()
    shown = pictures.spread_over([i for i in by_change if i in places], recordings, 3)
    titles = ["start", *(f"+{k * seconds:.3g} s" for k in range(1, T))]
    strips = []
    for i in shown if can_show else []:
        offsets = [""]
        for k, (j, t) in enumerate(nearest[i], 1):
            steps_off = (places[j][1] - places[i][1]) * T + t - k
            offsets.append(f"{steps_off:+d} steps" if steps_off else "the same")
        strip = {
            "recorded": frames(i),
            "nearest to\nprediction": [None, *(frames(j)[t] for j, t in nearest[i])],
        }
        strips.append(pictures.plot_rows(strip, titles, offsets))

    # --- patches ---
    z, a, s = one_clip(kept, shown[0])
    with autocast(), torch.no_grad():
        ahead = predictor.rollout(z[None, :1], a[None], states_of(s[None, 0], a[None]))[0]
    steps = sorted({1, (K + 2) // 3, (2 * K + 2) // 3, K})
    colors = pictures.pca_colors(z[1:].cpu(), ahead.cpu())
    tokens = {}
    if can_show:
        tokens["frame"] = [frames(shown[0])[k] for k in steps]
    for name, of_steps in zip(("recorded", "predicted"), colors):
        grids = of_steps.reshape(-1, state["grid"], state["grid"], 3)
        tokens[name] = [grids[k - 1] for k in steps]

    # from the patch that changed most, in float32
    patch = int((z[-2] - z[-3]).abs().mean(1).argmax()) if T > 2 else 0
    maps = pictures.attention_maps(predictor, z[:-1], a, s[:-1], heads)
    now = frames(shown[0])[:-1] if can_show else None

    # landscapes of the largest motions
    plain = to_units(actions, scaler)[: len(found.energies), -1, index]
    motion = np.linalg.norm(plain / [axis[-1] for axis in axes], axis=1)
    largest = pictures.spread_over((-motion).argsort().tolist(), recordings, 4)
    panels = [(recordings[i], found.energies[i], plain[i]) for i in largest]

    # --- the page ---
    means = {k: errors[f"ro_{k}"].mean(0).numpy() for k in pictures.COLORS}
    labels = [(d, units.get(d, "")) for d in dims]
    figures = {
        "Error by horizon": [pictures.plot_horizons(means, bands, seconds)],
        "Which actions it uses": [pictures.plot_groups(gaps)],
        "Rank of the true action": [pictures.plot_ranks(found.ranks, args.samples)],
        "Energy landscape": [pictures.plot_landscapes(panels, axes, labels)],
        "Nearest step": [pictures.plot_retrieval(rows, seconds)],
        "Rollout as frames": strips,
        "Patch tokens as colours": [pictures.plot_rows(tokens, [titles[k] for k in steps])],
        "Attention": [pictures.plot_attention(maps, heads, predictor.grid, patch, now, seconds)],
    }
    out = args.out or os.path.dirname(path) or "."
    write_atomically(os.path.join(out, "report.json"), to_json(report).encode())
    pictures.write_page(
        os.path.join(out, "report.html"),
        "Does the model use the action?",
        verdict,
        warnings,
        about,
        "\n".join(facts),
        figures,
    )
    print(*verdict)
    print(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    print(f"written to {out}: report.json, report.html")
