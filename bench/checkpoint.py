"""How long does training wait for a checkpoint: written in the loop, and in a thread?

    python -m bench.checkpoint                                # 103 million weights, 1.2 GB a file
    python -m bench.checkpoint --pred_dim 384 --pred_depth 6

A checkpoint holds the weights of a predictor and two moments of Adam for each. Both ways write
the same file in turns, in the folder for temporary files (TMPDIR); rows are medians. "waits" is the
time in the call; "on the disk" is when the file is whole, its checksum and its rename included."""

import argparse
import statistics
import tempfile
import time

import torch

import bench
import checkpoint
from model import Predictor


def state_of(width, depth):
    """What train_ac.py saves of a predictor after its first step."""
    predictor = Predictor(
        width, 13, 2, (16, 16), pred_dim=width, depth=depth, num_heads=width // 64
    )
    optimizer = torch.optim.AdamW(predictor.parameters())
    for p in predictor.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {"predictor": predictor.state_dict(), "optimizer": optimizer.state_dict()}


def seconds_of(write, wait, *what):
    """(seconds in the call, seconds until the file is whole)."""
    began = time.perf_counter()
    write(*what)
    waits = time.perf_counter() - began
    wait()
    return waits, time.perf_counter() - began


def rows(state, rounds):
    """A row for each way."""
    writer = checkpoint.Writer()
    ways = {"in the loop": checkpoint.save, "in a thread": writer.save}
    seconds = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="nanojepa-bench-") as folder:
        for i in range(rounds):
            # each file has a name of its own
            for epoch, (way, write) in enumerate(ways.items(), len(ways) * i + 1):
                seconds[way].append(seconds_of(write, writer.wait, folder, state, epoch))

    weights = sum(x.numel() for x in state["predictor"].values())
    for way, measured in seconds.items():
        waits, whole = (statistics.median(column) for column in zip(*measured))
        yield {"weights": weights, "written": way, "waits, s": waits, "on the disk, s": whole}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--pred_dim", type=int, default=1024, help="width of the predictor (default 1024)")
    flag("--pred_depth", type=int, default=8, help="its blocks (default 8)")
    flag("--rounds", type=int, default=3, help="files of each way (default 3)")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    state = state_of(args.pred_dim, args.pred_depth)
    bench.report(list(rows(state, args.rounds)), args.json, torch.device("cpu"))
