"""Damaged and hostile files for every reader: good ones are changed at random, and what the reader
then does is sorted into a table.

    python -m tests.fuzz                              # 100,000 cases, 10 minutes on two cores
    python -m tests.fuzz --cases 1000 --targets mp4 --seed 7

A case is a pure function of (seed, target, number). Refused: an exception that the reader
documents, with a message. Anything else is a finding: a crash (another exception, or a signal), a
hang (over --seconds), memory (over 1 GiB more than the process has, which its limit refuses), or
code that ran (files hold pickles that would make a file). Cases run in processes of their own, so
that one that kills its process is one row; the file of each finding is kept in --out. Pickles,
TFRecords and checkpoints are also changed before their checksums are made, so that what is behind
these is read too."""

import argparse
import atexit
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib

SCRATCH = tempfile.mkdtemp(
    prefix="nanojepa-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
)
# not of cases, which end with os._exit
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
# read by data.py once, when it is imported
os.environ["NANOJEPA_CACHE"] = os.path.join(SCRATCH, "cache")

import numpy as np
import torch
from tqdm import tqdm

import bench
import checkpoint
import weights
from data import ActionScaler, Clips
from files import episodes, latents
from files.disk import READ_ERRORS
from files.features import feature_rows, feature_settings, keep_ranges
from files.shards import Record, index_shards, read_ticks
from files.video import mp4_times, read_frames
from files.vpt import ClipReader, parse_ticks
from prepare.manifest import check
from prepare.robot import record
from tests.seeds import mutate, seeds

# what no reader may ever make
BOMB = os.path.join(SCRATCH, "code-ran")


# --- readers ---


def read_tar(path):
    """What training does with a shard: index it, then read a clip of each recording."""
    records, bad = index_shards([path], workers=1)
    for r in records:
        if "mp4" in r.members:
            ClipReader(4, crop_size=16).starts(read_ticks(r), r.length)
        else:
            Clips([r], [1.0], ClipReader(8)).read(0, 0.5, np.random.default_rng(0))
    if bad:
        raise ValueError(bad[0][2])


def read_features(path):
    r = Record(path, "a", {"safetensors": (0, os.path.getsize(path))}, 12)
    feature_settings([r])
    Clips([r], [1.0], ClipReader(8)).read(0, 0.5, np.random.default_rng(0))


def read_robot_features(path):
    _, found, bad = episodes.index_file(path, True)
    for e in found:
        r = episodes.Episode(
            path,
            e["key"],
            "features",
            e["members"],
            e["steps"],
            e["rate"],
            0,
            e["steps"],
            e["steps"],
        )
        if e["idle"]:
            keep_ranges(e["idle"], e["rows"][2], "light", 5)
        feature_rows(r, 1, e["steps"])
    if bad:
        raise ValueError(bad[0][2])


def read_mp4(path):
    with open(path, "rb") as f:
        times = mp4_times(f)
        if len(times):
            read_frames(f, times, [min(3, len(times) - 1)], 16)


def read_h5(path):
    try:
        steps = latents.open_dataset(path).shape
        check(path, (4, 4, 4), 2)
        latents.read_steps(path, 1, min(steps[0] * steps[2], 5))
    finally:
        latents._open.cache_clear()


def read_tfrecord(path):
    _, found, bad = episodes.index_file(path, True)
    for e in found:
        r = episodes.Episode(
            path, e["key"], "rlds", e["members"], e["steps"], 15.0, 0, e["steps"], e["steps"]
        )
        for names in episodes.STATES["rlds"]:
            if names in r.members:
                episodes.read_fields(r, [names])
        if "exterior_1" in r.members and r.steps > 1:
            episodes.read_pictures(r, "exterior_1", [0, 1])
    if bad:
        raise ValueError(bad[0][2])


def read_example(path):
    with open(path, "rb") as f:
        data = f.read()
    with open(path + ".tfrecord", "wb") as f:
        f.write(record(data))
    read_tfrecord(path + ".tfrecord")


def read_checkpoint(path):
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "wb") as f:
        f.write(data + b"%08x" % zlib.crc32(data))
    checkpoint.load(path)


def read_jsonl(path):
    with open(path, "rb") as f:
        ticks = parse_ticks(f.read())
    ClipReader(4, crop_size=16).starts(ticks, len(ticks.motion))


TARGETS = {  # name -> (reader of a path, how the file is called, exceptions it may raise)
    "jsonl": (read_jsonl, "x.jsonl", READ_ERRORS),
    "tar": (read_tar, "x.tar", READ_ERRORS),
    "mp4": (read_mp4, "x.mp4", READ_ERRORS),
    "h5": (read_h5, "x.h5", READ_ERRORS),
    "tfrecord": (read_tfrecord, "x.tfrecord", episodes.DAMAGE),
    "example": (read_example, "x", episodes.DAMAGE),
    "features": (read_features, "x.safetensors", READ_ERRORS),
    "robot features": (read_robot_features, "x.tar", episodes.DAMAGE),
    "safetensors": (
        lambda path: weights.load_encoder(path, num_heads=3),
        "x.safetensors",
        READ_ERRORS,
    ),
    "torch": (lambda path: weights.load_encoder(path, num_heads=3), "x.pt", READ_ERRORS),
    "pkl": (ActionScaler.load, "x.pkl", READ_ERRORS),
    "scaler": (ActionScaler.load, "x.safetensors", READ_ERRORS),
    "checkpoint": (checkpoint.load, "x.pth.tar", READ_ERRORS),
    "checkpoint, right CRC": (read_checkpoint, "x.pth.tar", READ_ERRORS),
}


# --- cases ---


def case(target, number, seed, good):
    """The bytes of a case; every fiftieth is a good or hostile file as it is."""
    rng = random.Random(f"{seed} {target} {number}")
    data = rng.choice(good)
    return data if number % 50 == 0 else mutate(data, good, rng)


def attempt(target, data, folder):
    """Read the bytes -> (outcome, what was said)."""
    reader, name, allowed = tuple(TARGETS[target])
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(data)
    outcome = "accepted"
    said = ""
    try:
        reader(path)
    except MemoryError as e:
        outcome = "memory"
        said = f"MemoryError {e} {traceback.format_exc(limit=-2)}"
    except allowed as e:
        said = f"{type(e).__name__}: {e}"
        outcome = "refused" if str(e) else "crash"
        if re.search("allocate|MemoryError", said):
            outcome = "memory"
    except Exception as e:  # what no reader documents is what is looked for
        outcome = "crash"
        said = f"{type(e).__name__}: {e} {traceback.format_exc(limit=-3)}"
    if os.path.exists(BOMB):
        outcome = "code ran"
        if os.path.isdir(BOMB):
            shutil.rmtree(BOMB, ignore_errors=True)
        else:
            os.unlink(BOMB)
    return outcome, said


OUTCOMES = ["refused", "accepted", "crash", "hang", "memory", "code ran"]


def work(target, first, last, seed, good, seconds, board, out):
    """In a process of its own: cases first..last-1. board: shared [case at hand, slowest in
    microseconds, outcomes ...]."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    warnings.simplefilter("ignore")

    # libraries that print what is wrong with a file
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    folder = tempfile.mkdtemp(dir=SCRATCH)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
    for number in range(first, last):
        board[0] = number
        data = case(target, number, seed, good)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        began = time.perf_counter()
        outcome, said = attempt(target, data, folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        board[1] = max(board[1], int(1e6 * (time.perf_counter() - began)))
        board[2 + OUTCOMES.index(outcome)] += 1
        if outcome not in OUTCOMES[:2]:
            keep(out, target, number, seed, data, f"{outcome}: {said}")
        if number % 64 == 0:
            shutil.rmtree(os.path.join(SCRATCH, "cache"), ignore_errors=True)
    shutil.rmtree(folder)
    os._exit(0)


def keep(out, target, number, seed, data, said):
    stem = os.path.join(out, f"{target.replace(', ', '-').replace(' ', '-')}-{seed}-{number}")
    os.makedirs(out, exist_ok=True)
    with open(stem, "wb") as f:
        f.write(data)
    with open(stem + ".txt", "w") as f:
        f.write(said + "\n")


def fuzz(target, cases, seed, good, seconds, out, progress=None):
    """Run the cases of a target -> a row of the table."""
    context = multiprocessing.get_context("fork")
    board = context.RawArray("q", 2 + len(OUTCOMES))
    first = 0
    while first < cases:
        board[0] = first
        p = context.Process(
            target=work, args=(target, first, cases, seed, good, seconds, board, out)
        )
        p.start()
        while p.exitcode is None:
            p.join(0.2)
            if progress is not None:
                progress.update(sum(board[2:]) - progress.mine)
                progress.mine = sum(board[2:])
        if p.exitcode == 0:
            break
        outcome = "hang" if p.exitcode == -signal.SIGALRM else "crash"
        board[2 + OUTCOMES.index(outcome)] += 1
        keep(
            out,
            target,
            board[0],
            seed,
            case(target, board[0], seed, good),
            f"{outcome}: exit code {p.exitcode}",
        )
        first = board[0] + 1
    return (
        {"target": target, "cases": sum(board[2:])}
        | dict(zip(OUTCOMES, board[2:]))
        | {"slowest s": board[1] / 1e6}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument(
        "--targets", nargs="+", default=[*TARGETS], choices=TARGETS, help="which readers"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="a case that takes longer is a hang"
    )
    parser.add_argument("--out", default="out/fuzz", help="folder for the files of findings")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = seeds(SCRATCH, BOMB)
    rows = []
    progress = tqdm(total=args.cases, unit=" cases", mininterval=0.5 if sys.stderr.isatty() else 30)
    for i, target in enumerate(args.targets):
        count = args.cases * (i + 1) // len(args.targets) - args.cases * i // len(args.targets)
        progress.mine = 0
        progress.set_description(target)
        rows.append(fuzz(target, count, args.seed, found[target], args.seconds, args.out, progress))
    progress.close()
    total = {"target": "all"} | {k: sum(r[k] for r in rows) for k in ("cases", *OUTCOMES)}
    total["slowest s"] = max(r["slowest s"] for r in rows)
    bench.report([*rows, total], args.json, torch.device("cpu"))
    sys.exit(sum(total[k] for k in OUTCOMES[2:]) > 0)
