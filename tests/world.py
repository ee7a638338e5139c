"""A small world of recordings, shards and features, runs in it, and how a run is compared with one
that nothing disturbed: what tests.faults, tests.leak and tests/test_faults.py start from."""

import contextlib
import csv
import os
import pathlib
import subprocess
import time

import torch

import checkpoint
from tests.harness import FORK, ROOT, TORCHRUN, error_line, run, words
from tests.seeds import film, lines

IPE = 12
TRAIN = (
    "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0 --crop_size 32"
    f" --log_every 1 --epochs 3 --ipe {IPE} --warmup 1 --anneal 1 --lr 2e-3 --val_clips 8"
    " --val_every 3 --resume"
)


def start_server():
    """Processes start from a server that has imported our scripts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    FORK.set_forkserver_preload(
        ["tests.harness", "torch._dynamo", "train_ac", "encode", "fit_scaler"]
    )


def read(path):
    if not os.path.exists(path):
        return ""
    with open(path) as f:
        return f.read()


def sentence(code, text, *parts):
    """The line that tells the user what was wrong must have these parts."""
    line = error_line(code, text)
    missing = [part for part in parts if part not in line]
    assert not missing, (missing, text)


# --- a world, a run in it ---


class World:
    """Recordings, their shards, scaler and features, and undisturbed runs: what the rounds are
    compared with."""

    def __init__(self, folder):
        self.folder = folder
        self.loose = os.path.join(folder, "loose")
        os.makedirs(self.loose)
        for i in range(6):
            frames = 260 + 20 * i
            with open(f"{self.loose}/play-{i}.mp4", "wb") as f:
                f.write(film(folder, frames))
            with open(f"{self.loose}/play-{i}.jsonl", "wb") as f:
                f.write(lines(frames))

        self.shards = f"{folder}/shards"
        self.pack = [self.loose, "--shard_size 30000 --jobs 1 --out"]
        run(folder, "prepare/shards.py", *self.pack, self.shards)
        scaler = f"{folder}/scaler.pkl"
        shards = ["--data", f"{self.shards}/*.tar"]
        run(folder, "fit_scaler.py", *shards, "--output", scaler, "--num_workers 0")

        self.features = f"{folder}/features"
        self.encode = [*shards, "--encoder vit_tiny --crop_size 32 --phases 4 --out"]
        began = time.monotonic()
        run(folder, "encode.py", *self.encode, self.features)
        self.encode_seconds = time.monotonic() - began

        self.flags = [TRAIN, "--scaler", scaler, "--val_fraction 0.3"]
        began = time.monotonic()
        run(folder, "train_ac.py", *self.flags, *self.data(), "--out_dir", f"{folder}/alone")
        self.seconds = time.monotonic() - began

    def data(self, folder=None):
        return ["--data", f"{folder or self.features}/*.tar"]

    def torchrun(self, out):
        flags = [*self.flags, *self.data(), "--batch_size 2 --out_dir", out]
        command = [*TORCHRUN, "train_ac.py", *words(flags)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(out + ".log", "a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)

    def pair(self):
        """The folder of an undisturbed run of two ranks."""
        pair = f"{self.folder}/pair"
        if not os.path.exists(pair):
            assert self.torchrun(pair).wait(120) == 0, read(f"{pair}.log")
        return pair


def rows(out):
    """Complete rows of train.csv."""
    return max(read(f"{out}/train.csv").count("\n") - 1, 0)


def lost(out, spared=()):
    """Sentences about checkpoints that were promised and are not there, or are there and cannot be
    read; spared: those we damaged."""
    complaints = []
    best = 0
    for path, (epoch, itr) in checkpoint.list_checkpoints(out).items():
        if path in spared:
            continue
        try:
            checkpoint.load(path)
            best = max(best, epoch * IPE + itr)
        except ValueError as e:
            complaints.append(str(e))
    # that of the last whole epoch may still be being written when a kill comes
    promised = (rows(out) - 1) // IPE * IPE - IPE - IPE * len(spared)
    if best < promised:
        complaints.append(f"step {promised} was saved, {best} is the newest")
    return complaints


def differs(out, whole):
    """What of a finished run is not as in the undisturbed one, or ''."""
    logs = []
    names = ("epoch", "itr", "jloss", "sloss", "lr", "grad_norm")
    for folder in (out, whole):
        with open(f"{folder}/train.csv") as f:
            logs.append([[row[k] for k in names] for row in csv.DictReader(f)])
    if logs[0] != logs[1]:
        first = next((pair for pair in zip(*logs) if pair[0] != pair[1]), "")
        return f"train.csv: {len(logs[0])} and {len(logs[1])} rows, first other one {first}"

    one, two = (checkpoint.load_latest(folder)[0]["predictor"] for folder in (out, whole))
    return "" if all(torch.equal(one[k], v) for k, v in two.items()) else "weights"


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def read_or_nothing(path):
    # it ended meanwhile
    with contextlib.suppress(OSError):
        return read(path)
    return ""


def same_features(one, two):
    """Are the feature shards of two folders equal, byte for byte?"""
    files = []
    for folder in (one, two):
        files.append({p.name: p.read_bytes() for p in pathlib.Path(folder).glob("*.tar")})
    return files[0] == files[1]
