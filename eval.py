"""Does the model use the action? A report on a run of train_ac.py, train_lewm.py or train_lora.py,
on held-out gameplay or robot episodes.

    python eval.py --checkpoint out/demo --data 'demo/features/val/*.tar' --video 'demo/val/*.tar'
    python eval.py --checkpoint out/lewm --train_data 'demo/train/*.tar' --data 'demo/val/*.tar'
    python eval.py --checkpoint out/robot/r16 --landscape x z
    torchrun --nproc_per_node=8 eval.py --checkpoint out/ac         # shared by 8 GPUs

Reads a run folder or checkpoint and held-out data (VPT video or features of the run's encoder,
robot episodes; default: what the run held out). Of gameplay it also reads training clips, to fit a
probe of actions. Prints a table and writes report.json and report.html, one page with all figures
in it, beside the checkpoint or to --out.

The first lines can be compared with those of runs on other encoders; errors, skill and gaps
cannot."""

import argparse

from evaluation.flags import Help

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that are too small or do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )
    repeated = {"nargs": "+", "action": "append"}

    # what to judge, and on what
    flag = parser.add_argument_group("run and data").add_argument
    flag("--checkpoint", required=True, help="a run folder, or one of its checkpoints")
    flag("--data", "--data_path", **repeated, help="held-out data (default: the run's)")
    flag("--train_data", **repeated, help="play to fit the probe on (default: the run's)")
    flag("--encoder", help="weights of the encoder, for video (default: what the run used)")
    flag("--video", nargs="+", help="shards that features were made from, to show their frames")
    flag("--out", help="folder for report.json and report.html (default: beside the checkpoint)")

    # how much of it, and what to look at
    flag = parser.add_argument_group("what to evaluate").add_argument
    flag("--val_clips", type=int, default=512, help="clips to evaluate, all kept in memory")
    flag("--probe_clips", type=int, default=512, help="training clips for the probe; 0 is off")
    flag("--samples", type=int, default=256, help="actions that the true one is ranked among")
    flag("--ranked_clips", type=int, default=96, help="clips to rank in: the slowest part")
    flag("--landscape", nargs=2, metavar="NAME", help="two action dimensions to sweep, such as x z")
    flag("--heads", nargs="+", metavar="BLOCK:HEAD", help="attention (default: of the last block)")

    # features as pictures
    flag = parser.add_argument_group("films").add_argument
    flag("--decoder", help="a run of train_decoder.py: predictions as pictures and as a film")
    flag("--lpips", help="also measure LPIPS: NVIDIA's vgg16.pt, a TorchScript file")
    flag("--i3d", help="also measure FVD: an I3D in a TorchScript file")

    # what changes speed and memory, but no number beyond rounding
    flag = parser.add_argument_group("how").add_argument
    flag("--batch_size", type=int, default=32, help="clips at once")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")
    flag(
        "--video_decoder", choices=["pyav", "decord"], help="what reads video (default: the run's)"
    )
    flag("--num_workers", type=int, default=2, help="loader processes")

    # one check, one message
    args = parser.parse_args()
    for name, least in (("samples", 1), ("ranked_clips", 1), ("batch_size", 1), ("val_clips", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least {least}")
    # fewer could not also choose a penalty
    if args.probe_clips and args.probe_clips < 10:
        parser.error(f"--probe_clips {args.probe_clips} is too small: 0, or at least 10")
    if args.train_data and not args.probe_clips:
        parser.error("--probe_clips 0 fits no probe: drop --train_data")
    # one dimension swept twice would be a diagonal, not a landscape
    if args.landscape and args.landscape[0] == args.landscape[1]:
        parser.error(f"--landscape {' '.join(args.landscape)}: name two different dimensions")
    # what reads video had this name once
    if args.decoder in ("pyav", "decord"):
        parser.error(f"--decoder {args.decoder} is now --video_decoder {args.decoder}")
    for name in ("lpips", "i3d"):
        if getattr(args, name) and not args.decoder:
            parser.error(f"--{name} judges pictures: name a run of train_decoder.py with --decoder")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import itertools
import math
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
from data import windows
from evaluation import pictures
from evaluation.comparable import (
    comparable_lines,
    features_of_training,
    own_space,
    probe_run,
    training_records,
)
from evaluation.decoded_actions import decoded_training
from evaluation.films import film_report, open_networks
from evaluation.held_out import (
    bands_of,
    from_other_recordings,
    gap_of,
    gap_text,
    held_out,
    interval_text,
    meter_summary,
    moves_gap,
    precision_text,
    signed,
    states_from,
)
from evaluation.ranks import gathered, join, leave, print0, rank_and_world, share
from evaluation.runs import Run, load_run, open_held_out, print_left_out
from files.disk import write_atomically
from files.logs import count_text, to_json
from files.progress import tqdm
from files.vpt import CONTINUOUS, DEGREES_PER_PIXEL, HOTBAR, SLOTS, ClipReader, hotbar_columns
from model import predict, predict_on

# points along an axis of a landscape; odd, because no motion must be one of them
GRID = 17

# below this share of error, shuffled actions hardly cost anything (as in train_ac.py)
LEAST_GAP = 0.02

# pixels of the short side of frames that are shown beside features
FRAME_SIZE = 128


# --- groups of actions ---


def action_groups(names):
    """{group: indices of its dimensions} of action names: camera, keys, hotbar, gui; position,
    rotation, gripper; else by field."""
    # dimensions of VPT, then of a robot's pose: groups that a person would name
    named_groups = {"camera": CONTINUOUS, "hotbar": HOTBAR + SLOTS, "gui": ["gui_open"]}
    named_groups |= {
        "position": ["x", "y", "z"],
        "rotation": ["roll", "pitch", "yaw"],
        "gripper": ["gripper"],
    }

    groups = {}
    for i, name in enumerate(names):
        # unknown dimensions are grouped by the field that they come from
        group = name.rpartition(".")[0] or name
        if name.startswith(("key.", "mouse.")):
            group = "keys"

        # hotbar keys are keys too, so the known groups come last and win
        for known_group, members in named_groups.items():
            if name in members:
                group = known_group
                break
        groups.setdefault(group, []).append(i)
    return groups


@torch.no_grad()
def group_errors(predictor, z, actions, states, others, compose, groups):
    """Mean |error| (B, K) as in held_out.action_meter, {"tf_GROUP", "ro_GROUP"}, when only the
    dimensions of one group are those of `others` (B, K, A): of another recording."""
    # predicted are the steps after the first
    errors = {}
    target = z[:, 1:]
    for name, columns in groups.items():
        # nan where there is no other recording to take actions of
        if torch.isnan(others).any():
            errors[f"tf_{name}"] = errors[f"ro_{name}"] = torch.full_like(
                target[..., 0, 0], math.nan
            )
            continue

        # this group from elsewhere, the rest is true
        mixed = actions.clone()
        mixed[..., columns] = others[..., columns]

        # rolled out, the states follow from the mixed actions: true ones would tell the true action
        one_step = predict(predictor, z[:, :-1], mixed, states)
        rolled_out = predictor.rollout(z[:, :1], mixed, compose(states[:, 0], mixed))

        # the mean over patches and channels, by clip and horizon
        errors[f"tf_{name}"] = (one_step - target).abs().mean((2, 3))
        errors[f"ro_{name}"] = (rolled_out - target).abs().mean((2, 3))
    return errors


# --- rank, energy landscape ---


@torch.no_grad()
def energies(predictor, z, actions, states, candidates):
    """e(a) = mean |P_1(z_t, a) - z_t+1| (N,) of candidates (N, A) at the last transition of one
    clip: z (T, N, E), actions (T-1, A), states (T, S)."""
    # what comes before is computed once: its keys and values serve all candidates, which are some
    # hundreds for a clip
    c = len(z) - 1
    past = None
    if c > 1:
        _, past = predict_on(predictor, z[None, : c - 1], actions[None], states[None])

    # a chunk's copies of keys take 0.5 GB at most
    numbers = c * (z.shape[1] + 2) * predictor.predictor_embed.out_features
    chunk = max(2**27 // numbers, 1)

    # true actions first, then one candidate each: only the last transition differs
    of_parts = []
    for part in candidates.split(chunk):
        n = len(part)
        a = torch.cat([actions[: c - 1].expand(n, -1, -1), part[:, None]], dim=1)
        steps = z[None, :c].expand(n, -1, -1, -1)
        step = predictor.rollout(steps, a, states[None, :c].expand(n, -1, -1), cache=past)
        of_parts.append((step[:, 0] - z[c]).abs().mean((1, 2)))
    return torch.cat(of_parts)


def drawn_from_others(actions, i, recordings, count, generator):
    """Whole actions (count, A) drawn from all steps of all clips of other recordings than the i-th
    clip's; of all other clips where there is only one recording. actions (n, K, A)."""
    # actions of the same recording are alike: the true one would look no better than they, or they
    # would look as good as it
    clips = [j for j, name in enumerate(recordings) if name != recordings[i]]
    if not clips:
        clips = [j for j in range(len(recordings)) if j != i]

    # whole actions: dimensions drawn apart would be combinations that nobody does
    K = actions.shape[1]
    drawn = torch.randint(len(clips) * K, (count,), generator=generator)
    return actions[torch.tensor(clips)[drawn // K], drawn % K]


def rank_of(energy, others):
    """Share of the sampled actions (N,) that explain the step better than the true one; ties count
    half."""
    return ((others < energy).double() + 0.5 * (others == energy).double()).mean().item()


def to_units(actions, scaler):
    """Scaled actions (..., A) -> what was recorded, float64."""
    # only the first dimensions are scaled: the scaler knows those, keys are 0 or 1
    plain = actions.double().clone().numpy()
    scaled = len(scaler.mean)
    plain[..., :scaled] = plain[..., :scaled] * scaler.scale + scaler.mean
    return plain


def swept(action, names, scaler, dims, axes):
    """The true scaled action (A,) with two dimensions (indices) taken through axes (in units) -> (G
    * G, A), the first one slowest. A mouse that moves also turns the camera, by
    vpt.DEGREES_PER_PIXEL, and the other way round."""
    # a row for each point of the grid; all other dimensions stay as they were recorded
    grid = np.repeat(to_units(action, scaler)[None], len(axes[0]) * len(axes[1]), axis=0)
    radians_per_pixel = np.radians(DEGREES_PER_PIXEL)

    # mouse_dx with yaw, mouse_dy with pitch: in play one never moves without the other
    tied = {}
    if names[:4] == CONTINUOUS:
        tied = {0: 2, 1: 3, 2: 0, 3: 1}

    # the two dimensions, and what is tied to them
    for i, values in zip(dims, np.meshgrid(*axes, indexing="ij")):
        grid[:, i] = values.ravel()
        other = tied.get(i)
        # unless both of a pair are swept: then they are told apart
        if other is not None and other not in dims:
            factor = radians_per_pixel if i < 2 else radians_per_pixel**-1
            grid[:, other] = values.ravel() * factor
    return torch.from_numpy(scaler.transform(grid)).float()


def dims_to_sweep(asked, names, actions, scaler):
    """The two dimensions of the landscape, `asked` or those that move a camera or an arm first, and
    the values (G,) along each, in units: up to what 99 % of the actions stay below. ValueError if
    one never differs from 0."""
    # a few wild motions must not decide how far the axes reach
    sizes = np.abs(to_units(actions, scaler))
    spans = dict(zip(names, np.quantile(sizes, 0.99, axis=(0, 1))))

    # without a wish: the first two that move in these data
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
    """What `explore` measured on the first clips."""

    # rank of the true last action among those of other recordings, 0 (best) to 1; all with the
    # true hotbar
    ranks: list

    # energies (GRID, GRID) of the last step, the first dimension by the second
    energies: list

    # mean distance of the least energy's action from the truth, (2,), in units
    argmin: np.ndarray

    # that of actions of other recordings
    random: np.ndarray


def explore(judged, dims, axes, samples, clips):
    """Rank and landscape of the last action of each of the first `clips` clips -> Landscapes. dims:
    indices of the two dimensions; axes: values of each; samples: actions to rank among. Each clip
    costs GRID x GRID + samples predictions."""
    # seeded: a second report ranks among the same actions, and differs by the model alone
    run = judged.run
    names = run.state["action_names"]
    plain = to_units(judged.actions, run.scaler)[..., dims]  # (n, K, 2)
    generator = torch.Generator().manual_seed(0)
    hotbar = hotbar_columns(names)
    count = min(len(judged.actions), clips)
    drawn = []
    for i in range(count):
        others = drawn_from_others(judged.actions, i, judged.recordings, samples, generator)
        drawn.append(others)

    results = []
    for i in tqdm(share(range(count)), "rank, landscape", delay=10, unit=" clips"):
        # the truth, actions of other recordings and the grid, all at once
        z, a, s = one_clip(judged.clips, i)
        true = judged.actions[i, -1]
        others = drawn[i]
        grid = swept(true, names, run.scaler, dims, axes)

        # the hotbar is in every picture: with another one an action would be told too easily
        same_hotbar = others.clone()
        same_hotbar[:, hotbar] = true[hotbar]
        candidates = torch.cat([true[None], same_hotbar, grid]).to(run.device)
        with run.autocast():
            e = energies(run.predictor, z, a, s, candidates).float().cpu()

        # the true action's place among the others, and the grid as a picture
        rank = rank_of(e[0], e[1 : len(others) + 1])
        land = e[len(others) + 1 :].view(GRID, GRID).numpy()

        # how far the least energy is from the truth, and how far a random action is
        least = np.unravel_index(land.argmin(), land.shape)
        best = np.array([[axis[k] for axis, k in zip(axes, least)]])
        random = to_units(others, run.scaler)[:, dims]
        misses = [np.abs(x - plain[i, -1]).mean(0) for x in (best, random)]
        results.append((rank, land, misses))

    # over all clips, for each dimension
    ranks, lands, misses = zip(*gathered(results))
    argmin, random = np.mean(misses, axis=0)
    return Landscapes(list(ranks), list(lands), argmin, random)


def landscape_lines(landscapes, dims, units, samples, recordings):
    """Rank and landscape for a person."""
    # the rank says whether the action matters, the distance whether it is the right one
    source = "other recordings" if len(set(recordings)) > 1 else "the same recording"
    lines = [
        f"rank of the true action among {samples} of {source}: {np.mean(landscapes.ranks):.3f}"
        f" (0 best, 0.5 chance; {count_text(len(landscapes.ranks), 'clip')})"
    ]
    for d, best, random in zip(dims, landscapes.argmin, landscapes.random):
        unit = units.get(d, "")
        lines.append(
            f"  {d:22} minimum of the error is {best:.3g} {unit} off the truth, a random action"
            f" {random:.3g}"
        )
    return lines


# --- retrieval ---


@torch.no_grad()
def retrieve(predictions, pool, true):
    """Index of the nearest pool step (P, N, E) for each prediction (..., N, E), by mean
    |difference|, and the rank of the true step (its index in the pool, (...)): the share of other
    steps that are nearer, 0 (best) to 1. Ties count half."""
    # all patches and channels of a step are one long row, so that one call compares all pairs
    rows = predictions.flatten(0, -3).flatten(1)
    distance = torch.cdist(rows, pool.flatten(1), p=1)

    # its distance to itself is a tie
    of_true = distance.gather(1, true.to(distance.device).flatten()[:, None])
    nearer = (distance < of_true).double().sum(1)
    ties = (distance == of_true).double().sum(1) - 1
    rank = (nearer + 0.5 * ties) / max(len(pool) - 1, 1)
    shape = predictions.shape[:-2]
    return distance.argmin(1).view(shape).cpu(), rank.view(shape).cpu()


@torch.no_grad()
def retrieval(predictor, places, T, batch_size, compose, load):
    """For each predicted step of a rollout, find the recorded step of the same recording whose
    features are nearest, among all evaluated ones. places: clip -> (record, window); load: clips
    -> (z, actions, states). -> {clip: K (clip, step) found}; share of hits, median steps off and
    rank of the true step by horizon [K], also of copying; chance of a hit."""
    # a pool holds the clips of one recording: steps of others would be easy to tell apart
    groups = {}
    for i, (number, _) in places.items():
        groups.setdefault(number, []).append(i)

    results = []
    for group in tqdm(share(list(groups.values())), "retrieval", delay=10, unit=" recordings"):
        # roll out, a batch at a time: a recording may hold more clips than fit at once
        parts = [load(group[k : k + batch_size]) for k in range(0, len(group), batch_size)]
        rolled_out = [predictor.rollout(h[:, :1], a, compose(s[:, 0], a)) for h, a, s in parts]
        ahead = torch.cat(rolled_out)
        z = torch.cat([h for h, _, _ in parts])
        pool = z.flatten(0, 1)

        # the time of each step of the pool; the clips of a recording may leave gaps
        time = torch.tensor([places[i][1] * T + t for i in group for t in range(T)])
        true = torch.arange(len(time)).view(-1, T)[:, 1:]

        # nearest to the prediction, and to the first step: a model that stands still is a copy
        copied, copy_rank = retrieve(z[:, :1].expand_as(ahead), pool, true)
        nearest, rank = retrieve(ahead, pool, true)
        of_group = {}
        for who, index, ranks in (("", nearest, rank), ("copy_", copied, copy_rank)):
            of_group[who + "hit"] = (index == true).double()
            of_group[who + "offset"] = (time[index] - time[true]).abs()
            of_group[who + "rank"] = ranks

        # a step drawn blindly from the pool: how hard a hit is depends on its size
        of_group["chance"] = torch.full((len(group),), 1 / len(time))

        # places in the pool as (clip, step)
        found = {}
        for i, row in zip(group, nearest.tolist()):
            found[i] = [(group[j // T], j % T) for j in row]
        results.append((found, of_group))

    # of all recordings
    results = gathered(results)
    nearest_of = {}
    for found, _ in results:
        nearest_of |= found

    # offsets have long tails, so a median; hits are 0 or 1, so a mean
    means = {}
    for name in results[0][1]:
        values = torch.cat([of_group[name] for _, of_group in results])
        mean = values.median(0).values if "offset" in name else values.mean(0)
        means[name] = mean.tolist()
    return nearest_of, means


def retrieval_lines(rows, T, seconds):
    """Retrieval for a person, a column for each horizon."""
    # one column for each step ahead, as in the table of errors
    header = "".join(f"{f'+{k * seconds:.3g} s':>9}" for k in range(1, T))
    lines = ["retrieval: nearest step " + header]
    labels = {
        "hit": "is the true one",
        "copy_hit": "same, copying",
        "offset": "median steps off",
        "copy_offset": "same, copying",
        "rank": "rank of the true one",
        "copy_rank": "same, copying",
    }

    # shares in percent, offsets in steps, ranks from 0 (best) to 1
    for name, label in labels.items():
        form = "9.1%"
        if "offset" in name:
            form = "9.0f"
        elif "rank" in name:
            form = "9.3f"
        lines.append(f"  {label:22}" + "".join(f"{x:{form}}" for x in rows[name]))
    return lines


# --- what the sections of the report share ---


class StoredClips:
    """Every clip that the meter has seen, as it was read, for what comes after it. keep and load
    return (z, actions, states) on the device."""

    def __init__(self, features_of):
        self.features_of = features_of
        self.as_read = []
        self.sizes = []  # of the meter's batches

    def keep(self, batch):
        """In place of features_of: the same, and the clips of the batch are kept."""
        # later sections go through the same batches, and the last one may be smaller
        size = len(batch["key"])
        self.sizes.append(size)
        for i in range(size):
            clip = {}
            for name, values in batch.items():
                # of the batch, not of a clip
                if name in ("bad", "bytes"):
                    continue
                # a copy, because loader processes use their memory again
                clip[name] = values[i].clone() if torch.is_tensor(values) else values[i]
            self.as_read.append(clip)
        return self.features_of(batch)

    def gather(self):
        """Add the clips that other ranks have read, in the order of one rank."""
        batches = []
        first = 0
        for size in self.sizes:
            batches.append(self.as_read[first : first + size])
            first += size
        batches = gathered(batches)
        self.as_read = sum(batches, [])
        self.sizes = [len(batch) for batch in batches]

    def load(self, numbers):
        """The clips with these numbers, as one batch."""
        # what a clip holds beside tensors, such as its key, is not needed for features. Frames are
        # encoded again: to keep features of all clips would take more memory
        batch = {}
        for name, value in self.as_read[0].items():
            if torch.is_tensor(value):
                batch[name] = torch.stack([self.as_read[i][name] for i in numbers])
        return self.features_of(batch)


def one_clip(clips, i):
    """z (T, N, E), actions (K, A) and states (T, S) of a clip of StoredClips."""
    return tuple(x[0] for x in clips.load([i]))


class Judged(NamedTuple):
    """A run and the n held-out clips that all sections look at."""

    run: Run
    clips: StoredClips

    # state0, actions -> states
    states_of: Callable

    # of the meter: {"tf_true": (n, K), ...}, the recording of each clip, and meter_summary
    errors: dict
    recordings: list
    summary: dict

    # scaled (n, K, A), and a function from a batch's to those of other recordings
    actions: torch.Tensor
    others_of: Callable

    # clip -> (record, window), where the clip that was read is the one asked for
    places: dict

    # length of a step
    seconds: float

    def gap_text(self):
        """The gap one step ahead for a person, or why there is none."""
        s = self.summary
        return gap_text(s["tf_gap"], s["tf_gap_low"], s["tf_gap_high"], self.recordings)


class Section(NamedTuple):
    """What a part of the report says."""

    # lines for a person
    facts: list

    # entries of report.json
    report: dict

    # {heading of pictures.CAPTIONS: [Figure]}
    figures: dict


def meet(run, dataset, features_of, compose, batch_size, val_clips, num_workers):
    """Read the held-out clips once and measure their errors -> (Judged, [bad clip])."""
    # the meter reads each clip once, and all later sections take it from memory
    stored = StoredClips(features_of)
    errors, recordings, bad = held_out(
        run.predictor,
        dataset,
        stored.keep,
        batch_size,
        val_clips,
        num_workers,
        run.settings["auto_steps"],
        run.settings["loss_exp"],
        run.autocast,
        compose=compose,
        hotbar=hotbar_columns(run.state["action_names"]),
    )

    # every rank has read a share; what comes later looks at any clip
    stored.gather()
    bad = sum(gathered([bad]), [])

    # the losses are of training; here errors count, which all models have in common
    errors = {k: v for k, v in errors.items() if k.startswith(("tf_", "ro_"))}

    # where a recording is damaged, another one was read in its place: such a clip counts for the
    # meter, but its time in the recording is not known
    items = sum(windows(dataset, max(batch_size, 2), val_clips), [])
    places = {}
    for i, item in enumerate(items):
        if stored.as_read[i]["key"] == dataset.records[item[2]].key:
            places[i] = item[2:]

    # together, for the sections: each gets this and nothing else of the run
    judged = Judged(
        run=run,
        clips=stored,
        states_of=states_from(compose, run.scaler, run.device),
        errors=errors,
        recordings=recordings,
        summary=meter_summary(errors, recordings) | moves_gap(errors, recordings),
        actions=torch.stack([clip["actions"] for clip in stored.as_read]),
        others_of=from_other_recordings(dataset, items),
        places=places,
        seconds=run.state["frames_per_step"] / run.state["fps"],
    )
    return judged, bad


# --- the sections of the report ---


def verdict_of(summary, recordings):
    """What the action meter says, in sentences: (verdict, warnings)."""
    verdict, warnings = [], []

    # does it use the action? The hotbar does not count, because a model can read it in the picture.
    # A gap without an interval above 0 is no gap
    gap = summary["moves_gap"]
    low = summary["moves_gap_low"]
    cost = gap_text(gap, low, summary["moves_gap_high"], recordings)
    if gap != summary["tf_gap"] and not math.isnan(gap):
        cost += f" (with the hotbar {signed(summary['tf_gap'])})"
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

    # is it better than doing nothing? Where little moves, a still picture is hard to beat
    skill = summary["tf_skill"]
    if skill < 1:
        verdict.append(f"It predicts better than repeating the last step: skill {skill:.3f}.")
    else:
        verdict.append(f"It does not predict better than repeating the last step: {skill:.3f}.")
        warnings.append("WARNING: skill is not below 1: repeating the last step is as good")
    return verdict, warnings


def probe_section(judged, dataset, features_of, train_data, encoder, options):
    """Fit the probe of comparable.py on training clips, if there are any -> (Probed or None, why
    there is none, [bad]). options: clips, val_clips, batch_size, num_workers of probe_run."""
    # what a robot's features say about its pose is no question of this probe
    run = judged.run
    if run.state["dataset"] != "vpt":
        return None, "the probe is for gameplay; train_lewm.py writes a robot's into val.csv", []
    if not options["clips"]:
        return None, "--probe_clips is 0", []

    # the report can be made without the training data, or without the encoder that would see them,
    # but not with wrong ones
    why = ""
    try:
        train, bad = training_records(run.settings, train_data, dataset.records)
        features_of_train = features_of_training(run, dataset, features_of, train, encoder)
    except FileNotFoundError as e:
        if train_data:
            raise
        why = f"{e}; name shards to fit on with --train_data"
    except ValueError as e:
        if train_data:
            raise
        why = str(e)

    # ranks go on together: what one of them lacks, none reads
    reasons = [reason for reason in gathered([why]) if reason]
    if reasons:
        return None, reasons[0], []
    try:
        probed, failed = probe_run(run, dataset, features_of, train, features_of_train, **options)
    except ValueError as e:
        # clips that nobody can read. Where ranks share them an error ends all, since the others
        # wait for what this one has read
        if train_data or rank_and_world()[1] > 1:
            raise
        return None, str(e), []
    return probed, "", bad + failed


def comparable_section(judged, probed, why, rank, rows):
    """What can be compared with runs on other encoders. probed, why: of probe_section; rank: of the
    true action; rows: of retrieval."""
    numbers = {"action_rank": rank}
    numbers |= {"next_step_rank": rows["rank"], "copy_rank": rows["copy_rank"]}
    report = dict(numbers)
    if probed is not None:
        numbers |= probed.scores | probed.spread
        report |= probed.scores | probed.spread
        report["fitted_on"] = probed.fitted._asdict()
        report["tested_on"] = probed.tested._asdict()

    facts = comparable_lines(numbers, probed, why, judged.seconds)

    # the game plays what was trained on play, step by step
    state = judged.run.state
    if state["dataset"] == "vpt" and state["encode"] == "tubelet":
        play = f"python -m evaluation.benchmark --checkpoint {judged.run.path}"
        if "key.w" not in state["action_names"]:
            play += " --tasks turn"
        facts.append(f"  can it plan? {play}")
    facts.append(own_space(judged.run.state, judged.run.settings))
    return Section(facts, {"comparable": report}, {})


def comparable_sentence(numbers):
    """The comparable numbers (of report.json) as one sentence of the verdict."""
    parts = []
    for name, label in (("yaw", "yaw R2"), ("pitch", "pitch R2"), ("keys", "keys AUROC")):
        value = numbers.get(f"probe_{name}", math.nan)
        if not math.isnan(value):
            parts.append(f"{label} {value:.3f}")
    parts.append(f"rank of the true action {numbers['action_rank']:.3f}")
    parts.append(f"of the true next step {numbers['next_step_rank'][0]:.3f}")
    return f"Comparable between encoders: {', '.join(parts)}."


def errors_section(judged):
    """Error, gap and skill, one step ahead and rolled out."""
    # intervals over recordings, by horizon: clips of one recording are alike
    errors = judged.errors
    bands = bands_of(errors, judged.recordings)

    # for a person
    facts = [pictures.table(errors, judged.summary, judged.seconds, judged.gap_text())]

    # for a program
    report = dict(judged.summary)
    report["by_horizon"] = {k: v.mean(0).tolist() for k, v in errors.items() if k[:3] == "ro_"}
    report["intervals"] = bands

    # for the eye
    means = {k: errors[f"ro_{k}"].mean(0).numpy() for k in pictures.COLORS}
    figure = pictures.plot_horizons(means, bands, judged.seconds)
    return Section(facts, report, {"Error by horizon": [figure]})


def groups_section(judged):
    """The gap of each group of actions, with all others true."""
    run = judged.run
    recordings = judged.recordings
    groups = action_groups(run.state["action_names"])

    # in the batches of the meter, because those decide whose actions a clip gets: the gap of all
    # groups together is then the meter's
    sizes = judged.clips.sizes
    batches = list(zip(itertools.accumulate(sizes, initial=0), sizes))
    rows = []
    for first, size in tqdm(share(batches), "groups of actions", delay=10, unit=" batches"):
        z, actions, states = judged.clips.load(range(first, first + size))
        others = judged.others_of(recordings[first : first + size], actions)
        with run.autocast():
            errors = group_errors(
                run.predictor, z, actions, states, others, judged.states_of, groups
            )
        rows.append({k: v.cpu() for k, v in errors.items()})
    rows = gathered(rows)
    shuffled = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}

    # one step ahead and rolled out: [gap, low, high]
    gaps = {}
    for group in groups:
        gaps[group] = {
            p: gap_of(shuffled[f"{p}_{group}"], judged.errors[f"{p}_true"], recordings)
            for p in ("tf", "ro")
        }
    facts = group_lines(gaps, judged.summary, judged.gap_text(), recordings)
    figures = {"Which actions it uses": [pictures.plot_groups(gaps)]}
    return Section(facts, {"groups": gaps}, figures)


def group_lines(gaps, summary, gap, recordings):
    """The gaps of groups for a person; gap: the text of the whole one, in place of all gaps where
    there is no other recording."""
    # with one recording there is no other to take actions from: one line says why
    title = "gap of one group of actions: one step ahead, rolled out"
    if math.isnan(summary["tf_gap"]):
        return [f"{title}: {gap}"]

    # a row for each group
    lines = [title]
    for group, both in gaps.items():
        cells = ""
        for value, low, high in both.values():
            cells += f"{signed(value):>9} {interval_text(low, high, recordings)}"
        lines.append(f"  {group:22}" + cells)
    return lines


def landscape_section(judged, dims, axes, samples, clips):
    """Is the true action told from others? Its rank, and the error around it, in so many clips.
    dims: names of the two dimensions that are swept through axes."""
    # dimensions by name for the reader, by index for the model
    scaler = judged.run.scaler
    names = judged.run.state["action_names"]
    index = [names.index(d) for d in dims]
    units = dict(zip(names, scaler.meta.get("units", [])))
    landscapes = explore(judged, index, axes, samples, clips)

    # what was found, for a person and for a program. The rank is over clips, so their number is
    # given beside it
    facts = landscape_lines(landscapes, dims, units, samples, judged.recordings)
    report = {"rank": float(np.mean(landscapes.ranks)), "ranked_clips": len(landscapes.ranks)}
    report["landscape"] = {}
    for d, best, random in zip(dims, landscapes.argmin.tolist(), landscapes.random.tolist()):
        report["landscape"][d] = {"unit": units.get(d, ""), "argmin": best, "random": random}

    # landscapes of the largest motions, where most depends on the action; of different recordings
    # where there are any
    plain = to_units(judged.actions, scaler)[: len(landscapes.energies), -1, index]
    motion = np.linalg.norm(plain / [axis[-1] for axis in axes], axis=1)
    largest = pictures.spread_over((-motion).argsort().tolist(), judged.recordings, 4)
    panels = [(judged.recordings[i], landscapes.energies[i], plain[i]) for i in largest]

    # both figures
    labels = [(d, units.get(d, "")) for d in dims]
    source = "of other recordings" if len(set(judged.recordings)) > 1 else "of this recording"
    figures = {
        "Rank of the true action": [pictures.plot_ranks(landscapes.ranks, samples, source)],
        "Energy landscape": [pictures.plot_landscapes(panels, axes, labels)],
    }
    return Section(facts, report, figures)


def retrieval_section(judged, batch_size):
    """Which recorded step is nearest to each predicted one? -> (Section, {clip: K (clip, step)})"""
    # steps of a clip: those that are predicted, and the first
    run = judged.run
    T = judged.errors["ro_true"].shape[1] + 1
    with run.autocast():
        nearest, rows = retrieval(
            run.predictor, judged.places, T, batch_size, judged.states_of, judged.clips.load
        )
    facts = retrieval_lines(rows, T, judged.seconds)
    figures = {"Nearest step": [pictures.plot_retrieval(rows, judged.seconds)]}
    return Section(facts, {"retrieval": rows}, figures), nearest


def reader_of_frames(reader, size):
    """A ClipReader of the same clips as another one, in frames of another size: those for the eye
    are larger than those for a small encoder."""
    return ClipReader(
        reader.frames,
        reader.fps,
        reader.frames_per_step,
        size,
        reader.action_space,
        reader.scaler,
        reader.encode,
    )


def check_videos(dataset, videos):
    """ValueError if videos (of pictures.find_videos) show other play than the features of that
    name. Looks at one clip, before anything slow."""
    item = windows(dataset, 1, 1)[0][0]
    clip = dataset[item]
    record = dataset.records[item[2]]

    # in place of a damaged clip another one was read, whose time is not known
    if clip["key"] == record.key:
        reader = reader_of_frames(dataset.reader, FRAME_SIZE)
        pictures.look_up(clip, record, item[3], videos, reader)


class Frames:
    """The pictures that the steps of a clip end with: of the clips themselves, or with `videos`
    (of pictures.find_videos) those that features were made from."""

    def __init__(self, judged, dataset, videos, size=FRAME_SIZE):
        # where clips and their recordings are
        self.judged = judged
        self.records = dataset.records
        self.videos = videos

        self.reader = reader_of_frames(dataset.reader, size) if videos else dataset.reader

        # several figures show the same clip
        self.cache = {}

    def of(self, i):
        """Frames (T, H, W, 3) uint8 of a clip."""
        if i not in self.cache:
            record, window = self.judged.places[i]
            clip = self.judged.clips.as_read[i]
            self.cache[i] = pictures.look_up(
                clip, self.records[record], window, self.videos, self.reader
            )
        return self.cache[i]


def clips_to_show(judged, count):
    """Clips in which much changes, of different recordings where there are any."""
    # the copy's error at the end says how much has changed by then: a still clip shows nothing
    change = judged.errors["ro_copy"][:, -1].argsort(descending=True).tolist()
    return pictures.spread_over([i for i in change if i in judged.places], judged.recordings, count)


def strips_of(judged, shown, nearest, frames):
    """For each clip a strip of what was recorded, above the recorded frames that are nearest to
    the prediction. nearest: of retrieval_section."""
    # above each frame: how far ahead it is
    T = judged.errors["ro_true"].shape[1] + 1
    titles = ["start", *(f"+{k * judged.seconds:.3g} s" for k in range(1, T))]
    strips = []
    for i in shown:
        # below each frame: how far off in time it is
        offsets = [""]
        for k, (j, t) in enumerate(nearest[i], 1):
            steps_off = (judged.places[j][1] - judged.places[i][1]) * T + t - k
            noun = "step" if abs(steps_off) == 1 else "steps"
            offsets.append(f"{steps_off:+d} {noun}" if steps_off else "the same")

        # the start is known, so nothing is nearest to it
        strip = {
            "recorded": frames.of(i),
            "nearest to\nprediction": [None, *(frames.of(j)[t] for j, t in nearest[i])],
        }
        strips.append(pictures.plot_rows(strip, titles, offsets))
    return strips


def token_colors(judged, i, frames):
    """The patch tokens of a clip as colours, recorded and rolled out, at a few horizons. frames:
    None without pixels."""
    # a rollout from the first step under the true actions: what the model makes of them
    run = judged.run
    z, a, s = one_clip(judged.clips, i)
    with run.autocast(), torch.no_grad():
        states = judged.states_of(s[None, 0], a[None])
        ahead = run.predictor.rollout(z[None, :1], a[None], states)[0]

    # the first, two in between and the last: enough to see colours fade
    K = len(a)
    steps = sorted({1, (K + 2) // 3, (2 * K + 2) // 3, K})

    # frames, recorded tokens and predicted ones, a row each
    rows = {}
    if frames is not None:
        rows["frame"] = [frames.of(i)[k] for k in steps]
    colors = pictures.pca_colors(z[1:].cpu(), ahead.cpu())

    # colours as squares of the patch grid
    grid = run.state["grid"]
    for name, of_steps in zip(("recorded", "predicted"), colors):
        squares = of_steps.reshape(-1, grid, grid, 3)
        rows[name] = [squares[k - 1] for k in steps]
    return pictures.plot_rows(rows, [f"+{k * judged.seconds:.3g} s" for k in steps])


def attention_figure(judged, i, heads, frames):
    """What the patch of a clip that changed most attends to. frames: None without pixels."""
    # the patch that changed most from the step before the last known one to that: there the clip
    # moves, and the action should matter
    predictor = judged.run.predictor
    z, a, s = one_clip(judged.clips, i)
    patch = 0
    if len(z) > 2:
        patch = int((z[-2] - z[-3]).abs().mean(1).argmax())

    # in float32: the weights are shown as the softmax gives them, not as autocast rounds them
    maps = pictures.attention_maps(predictor, z[:-1], a, s[:-1], heads)
    now = frames.of(i)[:-1] if frames is not None else None
    return pictures.plot_attention(maps, heads, predictor.grid, patch, now, judged.seconds)


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # --- run and data ---
    # with torchrun each rank takes a share of what is slow
    join()
    run = load_run(args.checkpoint, args.dtype)
    names = run.state["action_names"]

    # a misspelt name shows before anything takes time: data and encoder take minutes
    for name in args.landscape or []:
        if name not in names:
            raise ValueError(f"--landscape {name}: no such action; the run has {', '.join(names)}")
    heads = pictures.check_heads(run.predictor, args.heads)
    networks = None
    if args.decoder:
        networks = open_networks(run, args.decoder, args.encoder, args.lpips, args.i3d)

    # the page shows the warnings that the terminal shows, because it is sent to others
    warnings = []

    def warn(line):
        print0(line)
        warnings.append(line)

    dataset, features_of, compose, bad = open_held_out(
        run.state,
        run.scaler,
        args.data,
        args.encoder,
        run.device,
        run.dtype,
        args.video_decoder,
        warn,
    )
    has_pixels = "safetensors" not in dataset.records[0].members
    videos = None
    if args.video:
        videos = pictures.find_videos(args.video, dataset.records)
        check_videos(dataset, videos)
    if args.decoder and not has_pixels and not videos:
        raise ValueError("--decoder: name the shards that features were made from with --video")

    # --- errors ---
    judged, also_bad = meet(
        run,
        dataset,
        features_of,
        compose,
        args.batch_size,
        args.val_clips,
        args.num_workers,
    )
    recordings = judged.recordings
    K = judged.errors["ro_true"].shape[1]
    about = (
        f"{run.path}: {count_text(len(recordings), 'clip')} of"
        f" {count_text(len(set(recordings)), 'recording')};"
        f" {precision_text(run.dtype, run.device, run.predictor, K)}"
    )
    print0(about)

    # --- actions, landscapes, retrieval ---
    # the same clips, seen from three more sides
    groups = groups_section(judged)
    dims, axes = dims_to_sweep(args.landscape, names, judged.actions, run.scaler)
    landscapes = landscape_section(judged, dims, axes, args.samples, args.ranked_clips)
    nearest_section, nearest = retrieval_section(judged, args.batch_size)

    # --- a probe of the features ---
    options = {
        "clips": args.probe_clips,
        "val_clips": args.val_clips,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
    }
    train_data = args.train_data and sum(args.train_data, [])
    probed, why, bad_clips = probe_section(
        judged, dataset, features_of, train_data, args.encoder, options
    )

    # --- the first rank draws and writes ---
    if not leave():
        sys.exit()
    print_left_out(dict.fromkeys(bad + also_bad + bad_clips))

    # first what can be compared with other runs, then what is of this one alone
    rows = nearest_section.report["retrieval"]
    comparable = comparable_section(judged, probed, why, landscapes.report["rank"], rows)
    sections = [comparable, errors_section(judged), groups, landscapes, nearest_section]
    for section in sections:
        print(*section.facts, sep="\n")
    verdict, from_meter = verdict_of(judged.summary, recordings)
    verdict.insert(0, comparable_sentence(comparable.report["comparable"]))
    for line in from_meter:
        warn(line)

    # --- frames, tokens, attention ---
    # frames are in the data, or in the shards that features were made from
    frames = Frames(judged, dataset, videos) if has_pixels or videos else None
    shown = clips_to_show(judged, 3)
    strips = strips_of(judged, shown, nearest, frames) if frames is not None else []

    # in the order of the page
    figures = {}
    for section in sections:
        figures |= section.figures
    figures["Rollout as frames"] = strips
    figures["Patch tokens as colours"] = [token_colors(judged, shown[0], frames)]
    figures["Attention"] = [attention_figure(judged, shown[0], heads, frames)]

    # --- films ---
    # the same rollouts as pictures, by a run of train_decoder.py
    folder = args.out or os.path.dirname(run.path) or "."
    if args.decoder:
        frames = Frames(judged, dataset, videos, networks.decoder.pictures.size)

        # pictures are shown to an inverse model, too, which needs training data and the encoder
        training = None
        if probed is not None and networks.encoder is not None:
            train, _ = training_records(run.settings, train_data, dataset.records)
            features_of_train = features_of_training(run, dataset, features_of, train, args.encoder)
            options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
            training = decoded_training(run, networks, train, features_of_train, options)

        section = Section(*film_report(judged, networks, frames, shown, folder, training))
        print(*section.facts, sep="\n")
        sections.append(section)
        figures |= section.figures

    # --- report.json, report.html ---
    # the same numbers for programs and for people
    report = {
        "checkpoint": run.path,
        "dtype": run.dtype,
        "clips": len(recordings),
        "recordings": len(set(recordings)),
    }

    # every section adds its lines and its numbers, in the order in which they were printed
    facts = []
    for section in sections:
        report |= section.report
        facts += section.facts

    # both files are whole or not there, and beside the checkpoint unless told otherwise
    write_atomically(os.path.join(folder, "report.json"), to_json(report).encode())
    pictures.write_page(
        os.path.join(folder, "report.html"),
        "Does the model use the action?",
        verdict,
        warnings,
        about,
        "\n".join(facts),
        figures,
    )

    # last on the terminal, because it is what one came for
    print(*verdict)
    print(f"peak memory {checkpoint.peak_memory(run.device):.0f} MiB")
    print(f"written to {folder}: report.json, report.html")
