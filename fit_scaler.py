"""Fit the standardiser of the continuous actions (mouse_dx, mouse_dy, yaw_diff, pitch_diff) on VPT shards, without decoding video.

    python fit_scaler.py --data VPT/*.tar --output vpt_action_scaler.pkl
    torchrun --nproc_per_node=8 fit_scaler.py --data VPT/*.tar --max_samples 1000000

Reads the JSONL members of the shards and seeks over the video (pipe: and http:// shards can only be read on). A sample is one step: at
20 fps, --fps 5 and --frames_per_step 2 it sums lines 8t to 8t+7 of a recording. Recordings are taken in an order that depends on --seed
alone until there are --max_samples steps, or the estimates have converged. Writes a joblib StandardScaler (.pkl) or .safetensors.
"""

import argparse
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
from tqdm import tqdm

from data import READ_ERRORS, ActionScaler, Record, Slice, expand, index_shards, is_stream, shard_index, split_records, stream_recordings
from kernels import merge_moments, moments
from vpt import ACTION_SPACES, CONTINUOUS, DEGREES_PER_PIXEL, UNITS, parse_ticks, step_actions, step_size

# --- flags ---
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
parser.add_argument("--data", "--data_path", nargs="+", action="append", help="shards: paths, globs, {a..b}, URLs (default VPT/*.tar)")
parser.add_argument("--output", default="vpt_action_scaler.pkl", help="where to write the scaler: .pkl or .safetensors")
parser.add_argument("--max_samples", type=int, default=100_000, help="steps to use at most")
parser.add_argument("--max_shards", type=int, help="use this many shards, spread uniformly over --data (default: all)")
parser.add_argument("--val_fraction", type=float, default=0.0, help="leave out what train_ac.py holds out at the same --val_fraction")
parser.add_argument("--action_space", type=int, default=13, choices=ACTION_SPACES, help="stored with the scaler; its first 4 are the same")
parser.add_argument("--fps", type=float, default=5.0, help="sampled frames a second")
parser.add_argument("--frames_per_step", "--tubelet_size", type=int, default=2, help="sampled frames a step")
parser.add_argument("--batch_size", type=int, default=128, help="samples between two convergence checks (at least 5 %% of those in)")
parser.add_argument("--num_workers", type=int, default=8, help="processes that read and parse, per rank (0 or 1: this one)")
parser.add_argument("--no_convergence_check", action="store_true", help="do not stop before --max_samples")
parser.add_argument("--seed", type=int, default=0, help="order of the recordings")

# Converged: no standard error above 3 % of its std. A recording's own std is some 30 % off the average, 3 % no layer notices; the guide's
# 1/sqrt(2n) = 0.2 % at 100,000 holds for independent samples, and the steps of one recording are not.
TOLERANCE, MIN_SAMPLES, MIN_RECORDINGS = 0.03, 10_000, 20
STD_RANGE = {"pixels": (5.0, 500.0), "radians": (0.01, 1.0)}  # of sums over all ticks of a step of real play
COLUMNS = [ACTION_SPACES[38].index(name) for name in [*CONTINUOUS, "gui_open"]]


def spread(items, count):
    """At most `count` of the items, uniformly over the list."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))] if count else items


def open_shards(data, max_shards, val_fraction):
    """--data -> ([Record or URL] to read, [(file, key, reason)] of what cannot be). Reads tar headers. Splits before it thins out, so that
    nothing held out is used whatever --max_shards is; below ten shards the split counts recordings, so unreadable videos must be known."""
    paths = expand([p for group in data for p in group])
    streams, files = [p for p in paths if is_stream(p)], [p for p in paths if not is_stream(p)]
    if streams and (files or val_fraction):
        raise ValueError(f"{streams[0]} cannot be sought: it goes neither with local shards nor with --val_fraction; copy it to a file")
    if streams:
        return spread(streams, max_shards), []
    if val_fraction and len(files) < 10:
        records, bad = index_shards(files)
    else:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            indexed = list(pool.map(shard_index, files if val_fraction else spread(files, max_shards)))
        records, bad = ([x for part in parts for x in part] for parts in zip(*indexed))
    bad += [(r.shard, r.key, "features; fit on the recordings they were made from") for r in records if "jsonl" not in r.members]
    records = split_records([r for r in records if "jsonl" in r.members], val_fraction)[0]
    keep = set(spread(sorted({r.shard for r in records}), max_shards))
    return [r for r in records if r.shard in keep], bad


def read_steps(jsonl, fps, frames_per_step):
    """JSONL bytes of a recording -> steps (n, 5): the continuous actions and whether a GUI was open; and why its tail was dropped."""
    ticks = parse_ticks(jsonl)
    span = step_size(ticks.rate, fps) * frames_per_step
    ends = np.arange(0, len(ticks.motion), span)
    if len(ends) < 2:
        raise ValueError(f"too short: {len(ticks.motion)} usable lines, a step needs {span + 1} {ticks.flaw}".rstrip())
    return step_actions(ticks, ends, 38)[0][:, COLUMNS], ticks.flaw


def read_job(job, fps, frames_per_step, limit):
    """A recording, or a stream until it has given `limit` steps -> [(file, key, JSONL bytes, steps or None, flaw)]."""
    out, count, url = [], 0, job if isinstance(job, str) else ""

    def add(file, key, size, jsonl):
        try:
            steps, flaw = read_steps(jsonl(), fps, frames_per_step)
        except READ_ERRORS as e:
            steps, flaw = None, f"{type(e).__name__}: {e}"
        out.append((file, key, size, steps, flaw))
        return 0 if steps is None else len(steps)

    if url:
        try:
            for key, members in stream_recordings(url):
                count += add(url, key, len(members["jsonl"]), lambda raw=members["jsonl"]: raw)
                if count >= limit:
                    break
        except (*READ_ERRORS, tarfile.TarError) as e:
            out.append((url, "", 0, None, f"{type(e).__name__}: {e}"))
    else:
        def read():
            with Slice(job.shard, *job.members["jsonl"]) as f:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(f.fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead into the video: up to 8 MB a member
                return f.read(f.size)

        add(job.shard, job.key, job.members["jsonl"][1], read)
    return out


def standard_errors(parts):
    """[(n, mean, M2)] of k recordings -> standard errors of the mean and of the std, both relative to the std, each (4,).

    Between recordings, not between steps: those of one recording resemble each other. Ratio estimators over clusters, linearised."""
    n = np.array([p[0] for p in parts], dtype=np.float64)[:, None]
    mean, m2 = (np.stack([p[i] for p in parts]) for i in (1, 2))
    centre = (n * mean).sum(0) / n.sum()
    squares = m2 + n * (mean - centre) ** 2  # around the common mean
    var = squares.sum(0) / n.sum()
    scale = np.where(var > 0, var, 1.0)  # a constant is known exactly
    factor = np.sqrt(len(n) / (len(n) - 1)) / n.sum() if len(n) > 1 else math.inf
    with np.errstate(invalid="ignore"):
        of_mean = factor * np.sqrt(((n * (mean - centre)) ** 2).sum(0) / scale)
        of_std = factor * np.sqrt(((squares - n * var) ** 2).sum(0)) / (2 * scale)
    return np.nan_to_num(of_mean, nan=math.inf), np.nan_to_num(of_std, nan=math.inf)


def has_converged(parts):
    count = sum(p[0] for p in parts)
    return count >= MIN_SAMPLES and len(parts) >= MIN_RECORDINGS and max(map(np.max, standard_errors(parts))) <= TOLERANCE


def warnings_for(scaler, slope):
    """What in the numbers suggests broken data, one line each. slope: radians a pixel outside the GUI, None if too little moved."""
    out = []
    for name, unit, std in zip(CONTINUOUS, UNITS, np.sqrt(scaler.var)):
        low, high = STD_RANGE[unit]
        if std < 1e-6:
            out.append(f"{name} never changes (std {std:.1g}): the data may be corrupted; it is left unscaled if it is constant")
        elif not low <= std <= high:
            out.append(f"{name} has std {std:.4g} {unit} a step, real play {low:g} to {high:g}: wrong units, outliers or little movement")
    if scaler.n < MIN_SAMPLES:
        out.append(f"{scaler.n:,} samples are few: below {MIN_SAMPLES:,} the estimates are rough; use more data")
    if slope is not None and abs(np.degrees(slope) / DEGREES_PER_PIXEL - 1) > 0.2:
        out.append(f"yaw turns {np.degrees(slope):.3f} degrees a pixel of mouse_dx outside the GUI, Minecraft {DEGREES_PER_PIXEL}: angles "
                   "or pixels are in other units, or mouse and camera are shifted against each other")  # fmt: skip
    return out


def verify(path, parts):
    """Reload the file and transform the samples of every recording: mean 0 and std 1 (or 0, if constant) must come out.

    The transform is affine, so that a recording's mean and mean + std tell what happens to all of its samples."""
    scaler = ActionScaler.load(path)
    total = (0, np.zeros(len(CONTINUOUS)), np.zeros(len(CONTINUOUS)))
    for n, mean, m2 in parts:
        at = scaler.transform(mean)
        total = merge_moments(total, (n, at, n * (scaler.transform(mean + np.sqrt(m2 / n)) - at) ** 2))
    off = max(np.abs(total[1]).max(), np.abs(np.sqrt(total[2] / total[0]) - (scaler.var > 0)).max())
    if not off < 1e-6:
        raise RuntimeError(f"{path} does not standardise the samples it was fitted on: off by {off:.2g}")
    return off


if __name__ == "__main__":
    args = parser.parse_args()
    if not args.output.endswith((".pkl", ".safetensors")):
        raise SystemExit(f"--output {args.output} must end in .pkl or .safetensors")
    for name in ("max_samples", "max_shards", "frames_per_step", "batch_size", "fps"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise SystemExit(f"--{name} {value:g} must be positive")

    # --- distributed ---
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")  # no tensor of this stage is worth a GPU: parsing is all the time

    # --- data ---
    data, began = args.data or [["VPT/*.tar"]], time.time()
    jobs, bad = open_shards(data, args.max_shards, args.val_fraction)
    jobs = [jobs[i] for i in np.random.default_rng(args.seed).permutation(len(jobs))]
    if rank == 0:
        shards = len({j.shard if isinstance(j, Record) else j for j in jobs})
        how = "which cannot be sought: reading on through the video bytes" if any(map(is_stream, map(str, jobs))) else ""
        print(f"{shards} shards {how}" if how else f"{len(jobs)} recordings in {shards} shards, JSONL only")

    # --- fit ---
    parts, used, flawed, size = [], [], [], 0  # parts: (count, mean, M2) of each recording, in the order of jobs
    total = (0, torch.zeros(len(CONTINUOUS), dtype=torch.float64), torch.zeros(len(CONTINUOUS), dtype=torch.float64))
    slope_sums = np.zeros(3)  # dx · yaw, dx · dx, steps with motion: the slope is that of a line through the origin
    at, next_check, done = 0, MIN_SAMPLES, False
    start = "fork" if sys.platform == "linux" else None  # workers parse only; elsewhere fork is not safe
    pool = concurrent.futures.ProcessPoolExecutor(args.num_workers, multiprocessing.get_context(start)) if args.num_workers > 1 else None
    progress = tqdm(total=args.max_samples, unit=" samples", desc="fit", disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 10)
    with pool or contextlib.nullcontext(), progress:
        while at < len(jobs) and not done:
            # Rounds read little more than what will be used, and what is used follows from the order of jobs alone.
            left = args.max_samples - total[0]
            needed = math.ceil(left * at / total[0]) if total[0] else len(jobs)
            take = max(min(needed, max(max(args.num_workers, 1) * world, at // 4)), 1)
            work = functools.partial(read_job, fps=args.fps, frames_per_step=args.frames_per_step, limit=left)
            results = list((pool.map if pool else map)(work, jobs[at : at + take][rank::world]))
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, results)
                results = [gathered[i % world][i // world] for i in range(len(jobs[at : at + take]))]
            at += take
            for file, key, nbytes, steps, flaw in (x for result in results for x in result):
                if done:
                    break
                if steps is None:
                    bad.append((file, key, flaw))
                    continue
                if flaw:
                    flawed.append((file, key, flaw))
                steps = steps[: args.max_samples - total[0]]
                part = moments(torch.from_numpy(steps[:, :4].copy()))
                total = merge_moments(total, part)
                parts.append((part[0], part[1].numpy(), part[2].numpy()))
                used.append((os.path.basename(file), key, nbytes))
                size += nbytes
                seen = steps[(steps[:, 4] == 0) & (np.abs(steps[:, 0]) < 600)]  # 600 px is a quarter turn: yaw_diff has not wrapped
                slope_sums += seen[:, 0] @ seen[:, 2], seen[:, 0] @ seen[:, 0], np.count_nonzero(seen[:, 0])
                progress.update(len(steps))
                done = total[0] == args.max_samples
                if total[0] >= next_check and not args.no_convergence_check:
                    next_check = max(total[0] + args.batch_size, 1.05 * total[0])
                    done = done or has_converged(parts)
            if total[0]:
                progress.total = max(min(args.max_samples, round(total[0] / at * len(jobs))), total[0])
    if not parts:
        raise ValueError(f"no usable recording in {data}: {'; '.join(' '.join(b) for b in bad[:3]) or 'all of it is held out'}")

    # --- save, verify, report ---
    if rank == 0:
        count, mean, m2 = (np.asarray(x) for x in total)
        limit = count * np.finfo(np.float64).eps * np.abs(mean)
        m2 = np.where(m2 / count <= limit**2, 0.0, m2)  # rounding alone: a constant must not get a scale of 1e-17 (scikit-learn's bound)
        listing = "\n".join(f"{file} {key} {nbytes}" for file, key, nbytes in sorted(used))
        meta = {"names": CONTINUOUS, "units": UNITS, "fps": args.fps, "frames_per_step": args.frames_per_step, "seed": args.seed,
                "action_space": args.action_space, "val_fraction": args.val_fraction, "shards": sorted({file for file, _, _ in used}),
                "fingerprint": hashlib.sha256(listing.encode()).hexdigest()[:16]}  # fmt: skip
        if len(used) <= 1000:
            meta["recordings"] = sorted(f"{file} {key}" for file, key, _ in used)
        scaler = ActionScaler.from_moments(count, mean, m2, meta)
        scaler.save(args.output)
        off = verify(args.output, parts)
        for title, rows in (("left out", bad), ("tail left out", flawed)):
            for file, key, reason in rows[:5]:
                print(f"{title}: {file} {key}: {reason}")
            if len(rows) > 5:
                print(f"{title}: {len(rows) - 5} more, {len(rows)} in all")
        converged, (of_mean, of_std) = has_converged(parts), standard_errors(parts)
        rule = "=" * 60
        print(f"{rule}\nSCALER FITTING COMPLETE\n{rule}\nSaved to: {args.output}\nTotal samples: {scaler.n:,}\nConverged: {converged}")
        if not converged:
            print(f"  (asks for standard errors within {TOLERANCE:.0%}, {MIN_SAMPLES:,} samples, {MIN_RECORDINGS} recordings: "
                  + ("raise --max_samples)" if at < len(jobs) or done else "all the data is used)"))  # fmt: skip
        print("\nAction Statistics (Continuous Actions; a step's sum, and standard errors in % of the std):")
        for i, (name, unit) in enumerate(zip(CONTINUOUS, UNITS)):
            std = math.sqrt(scaler.var[i])
            print(f"  {name:10} - Mean: {mean[i]:9.3f} (se {of_mean[i]:6.2%}), Std: {std:9.3f} (se {of_std[i]:6.2%}) {unit}")
        print(f"{rule}\n{len(used)} recordings, {size / 2**20:.1f} MiB of JSONL in {time.time() - began:.1f} s")
        print(f"Reloaded and verified: the samples come out at mean 0 and std 1 within {max(off, 1e-16):.0e}")
        for line in warnings_for(scaler, slope_sums[0] / slope_sums[1] if slope_sums[2] >= 100 else None):
            print(f"WARNING: {line}")
    if world > 1:
        dist.destroy_process_group()
