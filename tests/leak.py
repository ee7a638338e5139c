"""Does memory grow? 10,000 steps of train_ac.py on a CPU, from features and from video, with the
slope of the memory of its processes; and what loaders hold at most while the model is busy.

    python -m tests.leak
    python -m tests.leak --reads features --steps 2000
    python -m tests.leak --reads video --workers 0 --steps 50000 --heap heap.csv

--heap runs training under tests.heap, which says whether it is the program that grows, or free
memory that malloc keeps.

Exit code 1 when a run grows by 1 MB or more per 1,000 steps, or loaders hold more than computed."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tqdm import tqdm

import bench
from data import vpt_loader
from files.vpt import ClipReader
from tests.harness import ROOT, words
from tests.seeds import features, tar_of
from tests.world import World, read, rows, start_server


def resident(pid):
    """(processes, MB of memory that they hold now) of a process and those it has started; what they
    share counts for each."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            own = int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            children = [resident(child) for child in f.read().split()]
    except FileNotFoundError:  # it has just ended
        return 0, 0.0
    return 1 + sum(n for n, _ in children), own + sum(size for _, size in children)


def leak(world, reads, steps, workers, heap=None):
    """Train for `steps` steps in a process of its own, with logs, checkpoints, curves and
    validation -> a row: memory over steps. reads: "features", or "video", decoded and encoded on
    the fly. heap: a CSV file for what tests.heap sees."""
    out = f"{world.folder}/leak-{reads}-{workers}"
    ipe = max(steps // 20, 1)
    data = world.data()
    if reads == "video":
        data = [*world.data(world.shards), "--encoder vit_tiny"]
    plan = f"--num_workers {workers} --epochs 20 --ipe {ipe} --val_every 2 --keep_last 2"
    command = ["train_ac.py", *words([*world.flags, *data, plan, "--out_dir", out])]
    if heap:
        command = ["-m", "tests.heap", os.path.abspath(heap), *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out + ".log", "w") as log:
        p = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=env)

    # how much it holds, five times a second
    found = []
    every = 0.5 if sys.stderr.isatty() else 30
    title = f"{reads}, {workers} workers"
    with tqdm(total=20 * ipe, unit="step", desc=title, mininterval=every) as progress:
        while p.poll() is None:
            if os.path.exists(f"{out}/train.csv"):
                done = rows(out)
                found.append((done, *resident(p.pid)))
                progress.update(done - progress.n)
            time.sleep(0.2)
    assert p.returncode == 0, read(out + ".log")[-2000:]
    steps_done, processes, memory = tuple(np.array(found).T)

    # validation has loaders of its own for a while; caches fill in the first fifth
    usual = processes == np.bincount(processes.astype(int)).argmax()
    late = usual & (steps_done > 0.2 * steps_done.max())
    slope = np.polyfit(steps_done[late] / 1000, memory[late], 1)[0]
    return {
        "reads": reads,
        "steps": int(steps_done.max()),
        "workers": workers,
        "MB after a fifth": np.median(memory[late][:10]),
        "MB at the end": np.median(memory[late][-10:]),
        "MB per 1000 steps": slope,
    }


def shared(pids):
    """MB of torch's shared memory that processes hold, mapped or waiting as open files: batches on
    their way."""
    held = {}
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if "/torch_" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                    stat = os.stat(f"/proc/{pid}/fd/{fd}")
                    held[stat.st_ino] = stat.st_blocks * 512
            except FileNotFoundError:  # closed meanwhile
                pass
        with open(f"/proc/{pid}/maps") as f:
            for line in f:
                if "/torch_" in line:
                    fields = line.split()
                    first, last = (int(x, 16) for x in fields[0].split("-"))
                    held.setdefault(int(fields[4]), last - first)
    return sum(held.values()) / 1e6


def loader_rows(folder, batch_size=8):
    """What loader processes hold at most while the model is busy, on features of ViT-L at 256 px:
    rows by number of workers."""
    path = os.path.join(folder, "wide.tar")
    with open(path, "wb") as f:
        f.write(tar_of({"a@00000.safetensors": features(40, 256, 1024)}))

    out = []
    for workers in (1, 2, 4):
        loader = vpt_loader(
            path, batch_size, reader=ClipReader(), batches_per_epoch=100, num_workers=workers
        )
        batches = iter(loader)
        batch = next(batches)
        size = sum(v.nbytes for v in batch.values() if isinstance(v, torch.Tensor))
        clip = size / batch_size / 1e6
        pids = [os.getpid(), *(w.pid for w in batches._workers)]
        most = 0

        # a slow model: the loader fills up
        for _ in range(20):
            time.sleep(0.3)
            most = max(most, shared(pids))
            batch = next(batches)

        # one more batch: that which the model has
        bound = (workers * 2 + 1) * batch_size * clip
        row = {"workers": workers, "prefetch": 2, "clips": batch_size, "MB a clip": clip}
        out.append(row | {"(workers x prefetch + 1) x clips, MB": bound, "held MB": most})
        del loader, batches, batch
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--steps", type=int, default=10_000, help="training steps")
    flag(
        "--reads",
        nargs="+",
        default=["features", "video"],
        choices=["features", "video"],
        help="what training reads; video takes 25 minutes",
    )
    flag("--workers", type=int, nargs="+", default=[0, 2], help="loader processes of the runs")
    flag("--heap", help="a CSV file for what tests.heap sees of the only run")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    if args.heap and len(args.reads) * len(args.workers) > 1:
        parser.error("--heap is of one run: name one of --reads and one of --workers")
    folder = tempfile.mkdtemp(prefix="nanojepa-memory-")
    os.environ["NANOJEPA_CACHE"] = os.path.join(folder, "cache")
    start_server()
    world = World(folder)
    table = []
    for reads in args.reads:
        table += [leak(world, reads, args.steps, workers, args.heap) for workers in args.workers]
    bench.report(table, args.json, torch.device("cpu"))
    loaders = loader_rows(folder)
    bench.report(loaders, args.json, torch.device("cpu"))
    shutil.rmtree(folder)

    bound = "(workers x prefetch + 1) x clips, MB"
    full = any(row["held MB"] > 1.02 * row[bound] for row in loaders)
    growing = any(row["MB per 1000 steps"] >= 1 for row in table)
    sys.exit(full or growing)
