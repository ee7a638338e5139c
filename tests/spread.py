"""Does the same training succeed with another seed and another number of threads? One run of
train_ac.py for each pair, and how far apart they end.

    make demo-spread                                    # of the demo's recipe
    python -m tests.spread --seeds 0 1 --threads 1 2    # then `--`, then flags of train_ac.py

Everything after `--` goes to train_ac.py as it is. The number of threads changes the order in which
numbers are added, thus the rounding of sums, and nothing else. The folders of the runs are
--out/SEED-THREADS. A run that is finished is read; one that was stopped continues. The numbers are
those of the last validation, as train_ac.py prints them."""

import argparse
import csv
import os
import statistics
import subprocess
import sys

import torch

import bench
import checkpoint

SHOWN = ("tf_skill", "tf_gap", "ro_skill", "ro_gap")


def last_validation(folder):
    """{name: number} of the last row of a run's val.csv."""
    path = os.path.join(folder, "val.csv")
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: train with --val_data, and without --max_steps")
    with open(path) as f:
        rows = list(csv.DictReader(f))
    if not rows:
        raise ValueError(f"{path} has no row: train for at least --val_every epochs")
    return {name: float(rows[-1][name]) for name in ("epoch", *SHOWN)}


def train(folder, seed, threads, flags):
    """A run of train_ac.py with this seed on so many threads, to its end."""
    command = [sys.executable, "train_ac.py", *flags, "--out_dir", folder, "--seed", str(seed)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.txt"), "a") as log:
        done = subprocess.run([*command, "--resume"], env=env, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(
            f"train_ac.py ended with exit code {done.returncode} in {folder}: read its log.txt"
        )


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="OMP_NUM_THREADS")
    parser.add_argument("--out", default="out/spread", help="folder of the runs' folders")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("flags", nargs="+", help="flags of train_ac.py, after --")
    args = parser.parse_args()

    # the flags that this program gives itself
    sys.excepthook = checkpoint.short_excepthook
    for own in ("--seed", "--out_dir", "--max_steps"):
        if own in args.flags:
            raise ValueError(f"{own} cannot stand after --: tests.spread decides it")

    # --- train ---
    rows = []
    for seed in args.seeds:
        for threads in args.threads:
            folder = os.path.join(args.out, f"{seed}-{threads}")
            train(folder, seed, threads, args.flags)
            rows.append({"seed": seed, "threads": threads} | last_validation(folder))
            print(f"{len(rows)} of {len(args.seeds) * len(args.threads)} runs", file=sys.stderr)

    # --- report ---
    bench.report(rows, args.json, torch.device("cpu"))
    for name in SHOWN:
        values = [row[name] for row in rows]
        print(
            f"{name}: mean {statistics.mean(values):.4f}, median {statistics.median(values):.4f},"
            f" from {min(values):.4f} to {max(values):.4f}"
        )
