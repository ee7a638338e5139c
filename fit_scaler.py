"""Fit the standardiser of the continuous actions (mouse_dx, mouse_dy, yaw_diff, pitch_diff) on VPT
shards, without decoding video.

    python fit_scaler.py --data VPT/*.tar --output vpt_action_scaler.pkl
    torchrun --nproc_per_node=8 fit_scaler.py --data VPT/*.tar --max_samples 1000000
    python fit_scaler.py --dataset droid --data droid/*.tfrecord* --output droid_action_scaler.pkl

Reads the JSONL members of the shards and skips the video (pipe: and http:// shards cannot skip). A
sample is one step: at 20 fps, --fps 5 and --frames_per_step 2 it sums lines 8t to 8t+7 of a
recording. Recordings are taken in an order that depends on --seed alone, until there are
--max_samples steps, or the estimates have converged. With --dataset droid a sample is an action
between two sampled frames of a robot episode (droid.py), idle or not. Writes a joblib
StandardScaler (.pkl) or .safetensors."""

import argparse

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
# lists of fields can be given at once or flag by flag; each --data stays a list of its own
several = {"nargs": "+", "action": "extend"}
repeated = {"nargs": "+", "action": "append"}

flag = parser.add_argument_group("data").add_argument
# what is read, and where the result goes
flag("--dataset", default="vpt", choices=["vpt", "droid"], help="gameplay shards or robot episodes")
flag("--data", "--data_path", **repeated, help="paths, globs, {a..b}, URLs (VPT/*.tar)")
flag("--output", default="vpt_action_scaler.pkl", help=".pkl or .safetensors file (%(default)s)")
flag("--max_shards", type=int, help="use this many shards, spread evenly over --data (all)")
flag("--val_fraction", type=float, default=0.0, help="leave out what this holds out in training")
flag("--recordings", metavar="FILE", help="take only these: a file of names, one a line (all)")

flag = parser.add_argument_group("what a step is").add_argument
# must be those of the training run: the actions of a longer step are larger sums
flag("--fps", type=float, default=5.0, help="sampled frames a second (%(default)g; droid: 4)")
frames = "sampled frames a step (%(default)s; droid: 1)"
flag("--frames_per_step", "--tubelet_size", type=int, default=2, help=frames)
flag("--action_space", type=int, default=13, help="recorded for training, unused in the fit (13)")
# robots: as in train_lora.py
flag("--stride", type=int, help="droid: rows between sampled frames instead of --fps")
clip = "droid: leave out episodes shorter than this many sampled frames, as training does (8)"
flag("--frames_per_clip", type=int, help=clip)
flag("--state_keys", **several, help="droid: fields of the state (the pose)")
flag("--action_keys", **several, help="droid: fields of the action (differences of the pose)")

flag = parser.add_argument_group("when to stop").add_argument
# it stops at --max_samples, or as soon as more data would change little
flag("--max_samples", type=int, default=100_000, help="steps to use at most (%(default)s)")
flag("--no_convergence_check", action="store_true", help="do not stop before --max_samples")
tolerance = "converged: all standard errors are within this share of the std (%(default)s)"
flag("--tolerance", type=float, default=0.01, help=tolerance)
between = "new steps between two checks (%(default)s, and at least 5 %% of all so far)"
flag("--batch_size", type=int, default=128, help=between)
# the same seed gives the same file, on any number of processes
flag("--seed", type=int, default=0, help="order of the recordings (%(default)s)")

flag = parser.add_argument_group("speed").add_argument
# reading JSONL is all that takes time
flag("--num_workers", type=int, default=8, help="processes of a rank that parse (%(default)s)")


def read_flags():
    """The flags, with the defaults of their dataset. Ends the program for those that do not fit."""
    # the robots' defaults are set first, then the flags are read again over them
    args = parser.parse_args()
    if args.dataset == "droid":
        parser.set_defaults(output="droid_action_scaler.pkl", fps=4.0, frames_per_step=1)
        args = parser.parse_args()

    if args.recordings is not None and args.dataset == "droid":
        raise SystemExit("--recordings picks recordings of play: it does not go with droid")
    if args.frames_per_clip is not None and args.dataset == "vpt":
        raise SystemExit("--frames_per_clip chooses robot episodes: it needs --dataset droid")

    # the ending decides the format
    if not args.output.endswith((".pkl", ".safetensors")):
        raise SystemExit(f"--output {args.output} must end in .pkl or .safetensors")

    # each message names one flag
    for name in ("max_samples", "max_shards", "frames_per_step", "batch_size", "fps", "tolerance"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise SystemExit(f"--{name} {value:g} must be positive")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = read_flags()

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import sys
import tarfile
import time

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import peak_memory, short_excepthook
from data import STD_RANGE, ActionScaler, open_lines, read_names
from droid import DroidSteps
from files.disk import READ_ERRORS, is_storage_error, make_folder, storage_sentence
from files.progress import tqdm
from files.shards import Slice, is_stream
from files.streams import stream_recordings
from files.vpt import (
    ACTION_SPACES,
    CONTINUOUS,
    DEGREES_PER_PIXEL,
    UNITS,
    name_warnings,
    parse_ticks,
    step_actions,
    step_size,
)
from kernels import merge_moments, moments, standard_errors

# Converged: no standard error is above --tolerance of its std. The guide's 1 % at 10,000 samples
# holds for independent ones. The steps of one recording are not: its own std is some 30 % off the
# average.
MIN_SAMPLES = 10_000
MIN_RECORDINGS = 20

# where the fitted actions and the GUI flag stand in the table of 38
COLUMNS = [ACTION_SPACES[38].index(name) for name in [*CONTINUOUS, "gui_open"]]

# --- reading ---


def read_steps(jsonl, fps, frames_per_step):
    """JSONL bytes of a recording -> steps (n, 5), the continuous actions and whether a GUI was
    open; why its tail was dropped, or ""; {name that nobody knows: lines}. ValueError if it has no
    whole step."""
    # steps follow each other without a gap; `ends` are the lines between them
    ticks = parse_ticks(jsonl)
    span = step_size(ticks.rate, fps) * frames_per_step
    ends = np.arange(0, len(ticks.motion), span)

    # a recording without a whole step has no sample
    if len(ends) < 2:
        lines = f"{len(ticks.motion)} usable lines, a step needs {span + 1}"
        raise ValueError(f"too short: {lines} {ticks.flaw}".rstrip())

    # summed as in training: same function, same order of ticks
    actions, _ = step_actions(ticks, ends, 38)
    return actions[:, COLUMNS], ticks.flaw, ticks.unknown


def read_job(job, fps, frames_per_step, limit):
    """A Record, or the URL of a stream until it has given `limit` steps -> [(file, key, bytes of
    JSONL, steps or None, flaw)], with {name that nobody knows: lines} as a sixth where there are
    any. An error of the disk is raised: it says nothing about the recording."""
    # a URL is read as one stream, a local recording on its own
    if isinstance(job, str):
        return read_stream(job, fps, frames_per_step, limit)

    # read_row catches the errors, so it also does the reading
    size = job.members["jsonl"][1]
    read = functools.partial(read_member, job)
    return [read_row(job.shard, job.key, size, read, fps, frames_per_step)]


def read_stream(url, fps, frames_per_step, limit):
    """read_job of a stream, which cannot skip the video."""
    # a stream has no index: recordings come one after the other, with their video
    rows = []
    steps = 0
    try:
        for key, members in stream_recordings(url):
            # the member is in memory already; read_row expects a function
            jsonl = members["jsonl"]
            read = functools.partial(bytes, jsonl)
            rows.append(read_row(url, key, len(jsonl), read, fps, frames_per_step))
            if rows[-1][3] is not None:
                steps += len(rows[-1][3])

            # a stream may be far longer than needed: stop when there is enough
            if steps >= limit:
                break
    # a damaged tar ends this stream only; a disk or network error ends the run
    except (*READ_ERRORS, tarfile.TarError) as e:
        if is_storage_error(e):
            raise OSError(storage_sentence(url, e)) from e
        rows.append((url, "", 0, None, f"{type(e).__name__}: {e}"))
    return rows


def read_member(record):
    """The JSONL bytes of a recording in a local shard."""
    # only this member: the video before and after it is skipped
    with Slice(record.shard, *record.members["jsonl"]) as f:
        # without this the kernel reads ahead into the video, up to 8 MB a member
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fd, 0, 0, os.POSIX_FADV_RANDOM)
        return f.read(f.size)


def read_row(file, key, size, read, fps, frames_per_step):
    """What read_job gives of one recording; read: a function that returns its JSONL bytes."""
    # a recording that cannot be read becomes a row with its reason
    try:
        steps, flaw, unknown = read_steps(read(), fps, frames_per_step)
    except READ_ERRORS as e:
        # a disk that fails says nothing about the recording
        if is_storage_error(e):
            raise OSError(storage_sentence(f"{file} {key}", e)) from e
        return file, key, size, None, f"{type(e).__name__}: {e}"

    # the sixth value is rare, and rows travel between processes
    row = (file, key, size, steps, flaw)
    return (*row, unknown) if unknown else row


# --- fitting ---


class Turning:
    """How far the camera turns a pixel of mouse motion, outside the GUI: the slope of a line
    through the origin."""

    def __init__(self):
        # dx * yaw, dx * dx, steps with motion
        self.sums = np.zeros(3)

    def add(self, steps):
        # 600 pixels are a quarter turn, so yaw_diff has not wrapped
        seen = steps[(steps[:, 4] == 0) & (np.abs(steps[:, 0]) < 600)]

        # the slope needs three sums, whatever the number of steps
        dx = seen[:, 0]
        yaw = seen[:, 2]
        self.sums += (dx @ yaw, dx @ dx, np.count_nonzero(dx))

    def slope(self):
        """Radians a pixel; None if too little moved."""
        # below 100 moves the slope is mostly noise
        return self.sums[0] / self.sums[1] if self.sums[2] >= 100 else None


def has_converged(parts, tolerance):
    """Whether the estimates are good enough. parts: (count, mean, M2) of each recording."""
    # few samples or few recordings can agree by chance
    count = sum(part[0] for part in parts)
    if count < MIN_SAMPLES or len(parts) < MIN_RECORDINGS:
        return False

    # the worst action decides
    of_mean, of_std = standard_errors(parts)
    return max(np.max(of_mean), np.max(of_std)) <= tolerance


def warnings_for(scaler, slope):
    """What in the numbers suggests broken data, one line each. slope: radians a pixel outside the
    GUI, None if too little moved."""
    # each action by itself: constant, or out of the range of real play
    out = []
    for name, unit, std in zip(scaler.meta["names"], scaler.meta["units"], np.sqrt(scaler.var)):
        low, high = STD_RANGE.get(unit, (0, np.inf))
        if std < 1e-6:
            out.append(
                f"{name} never changes (std {std:.1g}): the data may be corrupted; it is left"
                " unscaled if it is constant"
            )
        elif not low <= std <= high:
            out.append(
                f"{name} has std {std:.4g} {unit} a step; real data has {low:g} to {high:g}. Check"
                " for wrong units, outliers or little movement"
            )

    # with few samples every number above is rough
    if scaler.n < MIN_SAMPLES:
        out.append(
            f"{scaler.n:,} samples are few: below {MIN_SAMPLES:,} the estimates are rough; use more"
            " data"
        )

    # mouse and camera measure the same motion: they must agree on its size
    if slope is not None and abs(np.degrees(slope) / DEGREES_PER_PIXEL - 1) > 0.2:
        out.append(
            f"yaw turns {np.degrees(slope):.3f} degrees a pixel of mouse_dx outside the GUI,"
            f" in Minecraft {DEGREES_PER_PIXEL}: angles or pixels are in other units, or mouse and"
            " camera are out of step"
        )
    return out


def verify(path, parts):
    """Reload the file and put the samples through it: they must come out at mean 0 and std 1 (0 if
    constant). The transform is affine, so a recording's mean and mean + std tell what happens to
    all of its samples. Returns how far off they are; RuntimeError above 1e-6."""
    # what training will read, not what is in memory
    scaler = ActionScaler.load(path)
    zeros = 0 * scaler.mean
    total = (0, zeros, zeros)
    # each recording through the transform, then merged as in the fit
    for n, mean, m2 in parts:
        centre = scaler.transform(mean)
        spread = scaler.transform(mean + np.sqrt(m2 / n)) - centre
        total = merge_moments(total, (n, centre, n * spread**2))

    # a constant action stays at std 0: there is nothing to divide by
    off_mean = np.abs(total[1]).max()
    std = np.sqrt(total[2] / total[0])
    off_std = np.abs(std - (scaler.var > 0)).max()
    off = max(off_mean, off_std)
    if not off < 1e-6:
        raise RuntimeError(
            f"{path} does not standardise the samples it was fitted on: off by {off:.2g}"
        )
    return off


# --- the report ---


def print_left_out(title, rows):
    """The first five of [(file, key, reason)], and how many more."""
    # thousands of lines would hide the result below them
    for file, key, reason in rows[:5]:
        print(f"{title}: {file} {key}: {reason}")
    if len(rows) > 5:
        print(f"{title}: {len(rows) - 5} more, {len(rows)} in all")


def print_statistics(scaler, mean, parts, digits):
    """A line an action: mean and std with their standard errors, in numbers of `digits` digits."""
    # how far these numbers would move with other recordings
    of_mean, of_std = standard_errors(parts)
    title = "Continuous Actions; a step's sum, and standard errors in % of the std"
    print(f"\nAction Statistics ({title}):")

    # robots move by centimetres and radians, so they need more digits
    std = np.sqrt(scaler.var)
    for i, (name, unit) in enumerate(zip(scaler.meta["names"], scaler.meta["units"])):
        print(
            f"  {name:10} - Mean: {mean[i]:9.{digits}f} (se {of_mean[i]:6.2%}), Std:"
            f" {std[i]:9.{digits}f} (se {of_std[i]:6.2%}) {unit}"
        )


if __name__ == "__main__":
    # what the user can fix is printed as one line, everything else as a traceback
    sys.excepthook = short_excepthook

    # it is only recorded, but a wrong one would mislead whoever opens the file later
    if args.action_space not in ACTION_SPACES:
        spaces = ", ".join(map(str, ACTION_SPACES))
        parser.error(f"--action_space {args.action_space} is unknown, choose from: {spaces}")

    # the report says how long all of it took
    began = time.time()

    # --- distributed ---
    # processes share the parsing, which takes all the time; they exchange rows, not tensors
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")

    # --- data ---
    # a folder that cannot be written is an error now, not after the fit
    if rank == 0:
        make_folder("--output in", os.path.dirname(os.path.abspath(args.output)))

    # a job is what one worker reads at once: a recording, a stream, or a robot file
    data = args.data or [["VPT/*.tar"]]
    robots = None
    names = CONTINUOUS
    units = UNITS
    if args.dataset == "droid":
        frames = 8 if args.frames_per_clip is None else args.frames_per_clip
        robots = DroidSteps(args.fps, args.stride, args.state_keys, args.action_keys, frames)
        patterns = [p for group in data for p in group]
        print0 = print if rank == 0 else str
        jobs, bad, names, units = robots.open(patterns, args.max_shards, args.val_fraction, print0)
    else:
        only = None if args.recordings is None else read_names(args.recordings)
        jobs, bad = open_lines(data, args.max_shards, args.val_fraction, only)

    # in random order, so the first samples are from all over the data
    jobs = [jobs[i] for i in np.random.default_rng(args.seed).permutation(len(jobs))]

    # sums are computed on a GPU if there is one, in float64 there too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        kind = "recordings"
        if any(is_stream(str(job)) for job in jobs):
            kind = "streams: these cannot skip the video, so all of their bytes are read"
        print(f"{len(jobs)} {kind}; statistics on the {device}")

    # --- fit ---
    # count, mean and M2 (sum of squared deviations) of all samples
    zeros = torch.zeros(len(names), dtype=torch.float64)
    total = (0, zeros, zeros)

    # for each recording, in the order of jobs: its count, mean and M2; its (file, key, bytes)
    parts = []
    used = []

    # what the report warns of: recordings that lost their tail (file, key, reason), unknown names
    # of keys (and on how many lines), a camera that turns too much or too little
    cut = []
    unknown = collections.Counter()
    turning = Turning()

    # where the loop is: the first job not read yet, the count at which to look for convergence
    position = 0
    next_check = MIN_SAMPLES

    # why it ends; early: before --max_samples
    done = False
    early = False

    # one worker needs no other process
    pool = None
    if args.num_workers > 1:
        # workers only parse; fork is quick, but not safe outside of Linux
        start = "fork" if sys.platform == "linux" else None
        context = multiprocessing.get_context(start)
        pool = concurrent.futures.ProcessPoolExecutor(args.num_workers, context)

    # in a log file a bar every 10 seconds is enough
    progress = tqdm(total=args.max_samples, unit=" samples", desc="fit", disable=rank > 0)
    with pool or contextlib.nullcontext(), progress:
        while position < len(jobs) and not done:
            # A round reads little more than what will be used. What is used follows from the order
            # of jobs alone, whoever reads them.
            left = args.max_samples - total[0]
            needed = math.ceil(left * position / total[0]) if total[0] else len(jobs)
            at_once = max(max(args.num_workers, 1) * world, position // 4)
            turn = jobs[position : position + max(min(needed, at_once), 1)]
            position += len(turn)

            # every rank reads its share and gets all
            read = robots
            if robots is None:
                step = {"fps": args.fps, "frames_per_step": args.frames_per_step}
                read = functools.partial(read_job, **step, limit=left)
            results = list((pool.map if pool else map)(read, turn[rank::world]))
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, results)
                results = [gathered[i % world][i // world] for i in range(len(turn))]

            # in the order of jobs, so any number of workers and ranks gives the same result
            rows = [row for of_job in results for row in of_job]
            for file, key, nbytes, steps, flaw, *unknown_names in rows:
                if done:
                    break
                for lines in unknown_names:
                    unknown.update(lines)

                # a recording without steps is left out; one that lost its tail still counts
                if flaw:
                    (bad if steps is None else cut).append((file, key, flaw))
                if steps is None:
                    continue

                # add the recording; its moments are merged, so no sample is kept
                steps = steps[: args.max_samples - total[0]]
                samples = torch.from_numpy(steps[:, : len(names)].copy()).to(device)
                n, mean, m2 = moments(samples)
                mean = mean.cpu()
                m2 = m2.cpu()
                total = merge_moments(total, (n, mean, m2))
                parts.append((n, mean.numpy(), m2.numpy()))
                used.append((os.path.basename(file), key, nbytes))
                if robots is None:
                    turning.add(steps)
                progress.update(len(steps))

                # once in a while: is it enough?
                done = total[0] == args.max_samples
                if total[0] >= next_check and not args.no_convergence_check:
                    next_check = max(total[0] + args.batch_size, 1.05 * total[0])
                    early = not done and has_converged(parts, args.tolerance)
                    done = done or early

            # the bar ends where the data will, if that is before --max_samples
            expected = round(total[0] / position * len(jobs))
            progress.total = max(min(args.max_samples, expected), total[0])

    # three reasons are enough: they are mostly the same
    if not parts:
        reasons = "; ".join(" ".join(b) for b in bad[:3]) or "all recordings are held out"
        names = " ".join(sum(data, []))
        raise ValueError(f"no usable recording in {names}: {reasons}")

    # --- save, verify, report ---
    if rank == 0:
        # training compares names, fps and frames a step with its own, and warns if the scaler has
        # seen held-out recordings. The fingerprint tells whether two files are of the same data
        count, mean, m2 = map(np.asarray, total)
        listing = "\n".join(f"{file} {key} {nbytes}" for file, key, nbytes in sorted(used))
        meta = {
            "names": names,
            "units": units,
            "fps": args.fps,
            "frames_per_step": args.frames_per_step,
            "seed": args.seed,
            "val_fraction": args.val_fraction,
            "shards": sorted({file for file, _, _ in used}),
            "fingerprint": hashlib.sha256(listing.encode()).hexdigest()[:16],
        }

        # the rest depends on the data set; a long list of recordings is not worth its size
        if robots:
            meta["stride"] = args.stride or 0
        else:
            meta["action_space"] = args.action_space
        if len(used) <= 1000:
            meta["recordings"] = sorted(f"{file} {key}" for file, key, _ in used)

        # the file is checked as it lies on the disk
        scaler = ActionScaler.from_moments(count, mean, m2, meta)
        scaler.save(args.output)
        try:
            off = verify(args.output, parts)
        except RuntimeError:
            os.unlink(args.output)  # training would take it
            raise

        # the report: what is missing first, then the numbers
        print_left_out("left out", bad)
        print_left_out("tail left out", cut)

        # the layout of the guide's report
        rule = "=" * 60
        converged = has_converged(parts, args.tolerance)
        print(f"{rule}\nSCALER FITTING COMPLETE\n{rule}")
        print(f"Saved to: {args.output}")
        print(f"Total samples: {scaler.n:,}")
        print(f"Converged: {converged}")
        if early:
            print(
                f"Stopped before --max_samples {args.max_samples:,}: all standard errors are within"
                f" {args.tolerance:.3g} of the std (--tolerance); --no_convergence_check takes all"
            )

        # what would help: more samples, or more data?
        if not converged:
            remedy = "all the data is used"
            if position < len(jobs) or done:
                remedy = "raise --max_samples"
            print(
                f"  (asks for standard errors within {args.tolerance:.3g} of the std,"
                f" {MIN_SAMPLES:,} samples, {MIN_RECORDINGS} recordings: {remedy})"
            )
        print_statistics(scaler, mean, parts, 5 if robots else 3)

        # how much was read, and whether the file does what it should
        megabytes = sum(nbytes for _, _, nbytes in used) / 2**20
        print(
            f"{rule}\n{len(used)} recordings, {megabytes:.1f} MiB of actions in"
            f" {time.time() - began:.1f} s"
        )
        print(
            "Reloaded and verified: the samples come out at mean 0 and std 1 within"
            f" {max(off, 1e-16):.0e}; peak memory {peak_memory(torch.device(device)):.0f} MiB"
        )

        # warnings stand at the end, where they are seen
        for line in name_warnings(unknown) + warnings_for(scaler, turning.slope()):
            print(f"WARNING: {line}")

        # the next command
        script = "train_lora.py" if robots else "train_ac.py"
        print(f"next: python {script} --scaler {args.output}, with the same --data and --fps")
    if world > 1:
        dist.destroy_process_group()
