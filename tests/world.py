"""A small world of recordings, shards and features, runs in it, and how a run is compared with one
that nothing disturbed: what tests.faults and tests.leak start processes in, and
tests/test_faults.py too."""

import contextlib
import csv
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import time

import torch

import checkpoint
from tests.seeds import film, lines

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FORK = multiprocessing.get_context("forkserver")
IPE = 12
TRAIN = (
    "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0 --crop_size 32"
    f" --log_every 1 --epochs 3 --ipe {IPE} --warmup 1 --anneal 1 --lr 2e-3 --val_clips 8"
    " --val_every 3 --resume"
).split()


def start_server():
    """Processes start from a server that has imported our scripts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    FORK.set_forkserver_preload(["train_ac", "encode", "fit_scaler", "tests.world"])


# --- processes ---


def child(script, flags, log, limit):
    """In the forked process: become `python SCRIPT FLAGS > LOG 2>&1`; limit: bytes of the largest
    file it may write."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for its loader, as where it is started by hand
    os.setsid()
    os.chdir(ROOT)
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *flags]
    with contextlib.ExitStack() as stack:
        stack.push(end)
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


def end(kind, error, trace):
    """What the interpreter would do, which is not there to do it."""
    if isinstance(error, Exception):
        sys.excepthook(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, Exception):
        sys.exit(1)


class Run:
    """A script that was started; flags are strings or paths."""

    count = 0

    def __init__(self, folder, script, *flags, limit=None):
        Run.count += 1
        self.log = os.path.join(folder, f"log-{os.getpid()}-{Run.count}.txt")
        self.process = FORK.Process(
            target=child, args=(script, [*map(str, flags)], self.log, limit)
        )
        self.process.start()
        self.began = time.monotonic()

    def wait(self, timeout=600):  # other work on the machine, or a pause of it, is no fault
        """(exit code, what was printed)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"hangs: {timeout} s without an end: {self.text()}")
        return self.process.exitcode, self.text()

    def text(self):
        return read(self.log)

    def until(self, ready):
        """Wait for ready(), looking often; False if the process ended before."""
        while not (done := ready()) and self.process.is_alive():
            assert time.monotonic() < self.began + 600, f"never came: {self.text()}"
            time.sleep(0.0005)
        return bool(done)

    def kill(self):
        self.process.kill()
        self.process.join()


def read(path):
    if not os.path.exists(path):
        return ""
    with open(path) as f:
        return f.read()


def run(folder, script, *flags):
    code, text = Run(folder, script, *flags).wait()
    assert code == 0, text
    return text


def sentence(code, text, *parts):
    """What a user must read: an exit code, one line with "error: " and these parts, no
    traceback."""
    errors = [line for line in text.splitlines() if "error: " in line]
    assert (
        code and len(errors) == 1 and "Traceback" not in text and all(p in errors[0] for p in parts)
    ), (code, parts, text)


# --- a world, a run in it ---


class World:
    """Recordings, their shards, scaler and features, and undisturbed runs: what the rounds are
    compared with."""

    def __init__(self, folder):
        self.folder, self.loose = folder, os.path.join(folder, "loose")
        os.makedirs(self.loose)
        for i in range(6):
            recording = {"mp4": film(folder, 260 + 20 * i), "jsonl": lines(260 + 20 * i)}
            for extension, data in recording.items():
                with open(f"{self.loose}/play-{i}.{extension}", "wb") as f:
                    f.write(data)
        self.shards, self.pack = (
            f"{folder}/shards",
            [self.loose, "--shard_size", "30000", "--jobs", "1", "--out"],
        )
        run(folder, "prepare/shards.py", *self.pack, self.shards)
        run(
            folder,
            "fit_scaler.py",
            "--data",
            f"{self.shards}/*.tar",
            "--output",
            f"{folder}/scaler.pkl",
            "--num_workers",
            "0",
        )
        self.encode = [
            "--data",
            f"{self.shards}/*.tar",
            "--encoder",
            "vit_tiny",
            "--crop_size",
            "32",
            "--phases",
            "4",
            "--out",
        ]
        began = time.monotonic()
        run(folder, "encode.py", *self.encode, f"{folder}/features")
        self.encode_seconds, self.features = time.monotonic() - began, f"{folder}/features"
        self.flags = [*TRAIN, "--scaler", f"{folder}/scaler.pkl", "--val_fraction", "0.3"]
        began = time.monotonic()
        run(folder, "train_ac.py", *self.flags, *self.data(), "--out_dir", f"{folder}/alone")
        self.seconds = time.monotonic() - began

    def data(self, folder=None):
        return ["--data", f"{folder or self.features}/*.tar"]

    def torchrun(self, out):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "train_ac.py",
            *self.flags,
        ]
        with open(out + ".log", "a") as log:
            return subprocess.Popen(
                [*command, *self.data(), "--batch_size", "2", "--out_dir", out],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def pair(self):
        """The folder of an undisturbed run of two ranks."""
        if not os.path.exists(f"{self.folder}/pair"):
            assert self.torchrun(f"{self.folder}/pair").wait(120) == 0, read(
                f"{self.folder}/pair.log"
            )
        return f"{self.folder}/pair"


def rows(out):
    """Complete rows of train.csv."""
    return max(read(f"{out}/train.csv").count("\n") - 1, 0)


def lost(out, spared=()):
    """Sentences about checkpoints that were promised and are not there, or are there and cannot be
    read; spared: those we damaged."""
    said, best = [], 0
    for path, (epoch, itr) in checkpoint.list_checkpoints(out).items():
        if path not in spared:
            try:
                checkpoint.load(path)
                best = max(best, epoch * IPE + itr)
            except ValueError as e:
                said.append(str(e))
    promised = (rows(out) - 1) // IPE * IPE - IPE * len(spared)
    return said + [f"step {promised} was saved, {best} is the newest"] * (best < promised)


def differs(out, whole):
    """What of a finished run is not as in the undisturbed one, or ''."""
    logs = []
    for folder in (out, whole):
        with open(f"{folder}/train.csv") as f:
            logs.append(
                [
                    [r[k] for k in ("epoch", "itr", "jloss", "sloss", "lr", "grad_norm")]
                    for r in csv.DictReader(f)
                ]
            )
    if logs[0] != logs[1]:
        return (
            f"train.csv: {len(logs[0])} and {len(logs[1])} rows, first other one"
            f" {next((x for x in zip(*logs) if x[0] != x[1]), '')}"
        )
    one, two = (checkpoint.load_latest(folder)[0] for folder in (out, whole))
    return (
        ""
        if all(torch.equal(one["predictor"][k], v) for k, v in two["predictor"].items())
        else "weights"
    )


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def read_or_nothing(path):
    with contextlib.suppress(OSError):  # it ended meanwhile
        return read(path)
    return ""


def same_features(one, two):
    """Are the feature shards of two folders equal, byte for byte?"""
    a, b = (
        {p.name: p.read_bytes() for p in pathlib.Path(folder).glob("*.tar")}
        for folder in (one, two)
    )
    return a == b
