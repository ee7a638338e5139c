"""Memory of a LoRA (or full) training step by part, from shapes alone, for the released sizes or
any other: nothing is allocated.

    python -m bench.memory                          # LoRA r=16 on V-JEPA 2-AC: ViT-g and a 24 x 1024 predictor, 2 clips of 8 frames
    python -m bench.memory --r 0 --batch_size 8     # all of the predictor trained
    python -m bench.memory --leak                   # 10,000 steps of train_ac.py on a CPU: does memory grow? and what loaders hold

`train_lora.py --memory_report` prints the same rows for its own flags, and beside them what its
parts took after three steps."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import bench
import checkpoint
from lora import add_lora, lora_layers, size_of
from model import ACModel, Encoder, Predictor
from weights import ARCHITECTURES


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, parameters not
    counted."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage.nbytes(),
                t,
            )  # holding t, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = model(*inputs)  # noqa: F841, the graph must live while it is counted
    return sum(n for n, _ in kept.values())


def estimate(
    encoder_bytes,
    embed_dim,
    grid,
    size,
    options,
    batch_size,
    steps,
    dtype,
    optimizer_bytes=8,
    action_dim=7,
    state_dim=7,
):
    """{part: bytes}. size: of the Predictor; options: of add_lora, or None to train all of it;
    optimizer_bytes: a trained parameter."""
    kept = {}
    for depth in (1, 2, size["depth"]):  # each further block, and clip, keeps the same
        for checkpointing in (False, True):
            with torch.device("meta"):
                model = ACModel(
                    Predictor(
                        embed_dim, action_dim, state_dim, (grid, grid), **size | {"depth": depth}
                    )
                )
            base = sum(p.numel() for p in model.parameters())
            trained = add_lora(model.predictor, **options) if options else base
            model.predictor.activation_checkpointing = checkpointing
            if depth <= 2:
                with (
                    FakeTensorMode(allow_non_fake_inputs=True),
                    torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
                ):
                    shapes = (
                        (steps, grid * grid, embed_dim),
                        (steps - 1, action_dim),
                        (steps, state_dim),
                    )
                    kept[depth, checkpointing] = activation_bytes(
                        model.to_empty(device="cpu"), *(torch.zeros(1, *s) for s in shapes)
                    )
    rows = {
        "encoder": encoder_bytes,
        "predictor": 4 * base,
        "adapters": 4 * trained * bool(options),
        "gradients": 4 * trained,
    }
    rows["optimizer"] = round(optimizer_bytes * trained)
    for checkpointing, name in ((False, "activations"), (True, "activations, checkpointed")):
        one, two = kept[1, checkpointing], kept[2, checkpointing]
        rows[name] = batch_size * (one + (size["depth"] - 1) * (two - one))
    return rows


def compare(encoder, model, optimizer, inputs, options, dtype, autocast):
    """Print the estimate for a run of train_lora.py beside what its parts take after some steps;
    inputs (z, actions, states)."""
    predictor, (z, actions, states) = model.predictor, inputs
    size = size_of(predictor)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [
        v
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor) and v.numel() > 1
    ]
    adapters = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in lora_layers(predictor).values())
    measured = {
        "encoder": sum(p.nbytes for p in encoder.parameters()) if encoder else 0,
        "adapters": adapters,
        "optimizer": sum(v.nbytes for v in moments),
    }
    measured["predictor"] = sum(p.nbytes for p in predictor.parameters()) - adapters
    with autocast():
        kept = activation_bytes(model, *inputs)
        sum(model(*inputs)).backward()
    measured[
        "activations, checkpointed" if predictor.activation_checkpointing else "activations"
    ] = kept
    measured["gradients"] = sum(p.grad.nbytes for p in trained)
    optimizer.zero_grad(set_to_none=True)
    each = measured["optimizer"] / sum(p.numel() for p in trained)
    rows = estimate(
        measured["encoder"],
        z.shape[-1],
        predictor.grid[0],
        size,
        options,
        len(z),
        z.shape[1],
        getattr(torch, dtype),
        each,
        actions.shape[-1],
        states.shape[-1],
    )
    table = [
        {
            "part": k,
            "estimated MiB": v / 2**20,
            "measured MiB": measured.get(k, float("nan")) / 2**20,
        }
        for k, v in rows.items()
    ]
    bench.report(table, False, z.device)
    what = "the GPU" if z.device.type == "cuda" else "the process, Python and loader included"
    print(f"peak of {what}: {checkpoint.peak_memory(z.device):.0f} MiB")


def resident(pid):
    """(processes, MB of memory that they hold now) of a process and those it has started; what they
    share counts for each."""
    try:
        with open(f"/proc/{pid}/statm") as f, open(f"/proc/{pid}/task/{pid}/children") as g:
            own, children = (
                int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6,
                [resident(child) for child in g.read().split()],
            )
    except FileNotFoundError:  # it has just ended
        return 0, 0.0
    return 1 + sum(n for n, _ in children), own + sum(size for _, size in children)


def leak(world, reads, steps, workers):
    """Train for `steps` steps in a process of its own, with logs, checkpoints, curves and
    validation -> a row: memory over steps. reads: "features", or "video", decoded and encoded on
    the fly."""
    from bench.world import (
        ROOT,
        rows,
    )  # not above: train_lora.py, which imports this file, must not need what they need

    out, ipe = f"{world.folder}/leak-{reads}-{workers}", max(steps // 20, 1)
    data = (
        world.data()
        if reads == "features"
        else [*world.data(world.shards), "--encoder", "vit_tiny"]
    )
    command = [
        sys.executable,
        "train_ac.py",
        *world.flags,
        *data,
        "--out_dir",
        out,
        "--num_workers",
        workers,
        "--epochs",
        20,
        "--ipe",
        ipe,
        "--val_every",
        2,
        "--keep_last",
        2,
    ]
    with open(out + ".log", "w") as log:
        p = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    found, every = [], 0.5 if sys.stderr.isatty() else 30
    with tqdm(
        total=20 * ipe, unit="step", desc=f"{reads}, {workers} workers", mininterval=every
    ) as progress:
        while p.poll() is None:
            if os.path.exists(f"{out}/train.csv"):
                done = rows(out)
                found.append((done, *resident(p.pid)))
                progress.update(done - progress.n)
            time.sleep(0.2)
    assert p.returncode == 0, open(out + ".log").read()[-2000:]
    at, processes, memory = np.array(found).T
    usual = (
        processes == np.bincount(processes.astype(int)).argmax()
    )  # validation has loaders of its own for a while
    late = usual & (at > 0.2 * at.max())  # caches fill first
    slope = np.polyfit(at[late] / 1000, memory[late], 1)[0]
    row = {
        "reads": reads,
        "steps": int(at.max()),
        "workers": workers,
        "MB after a fifth": np.median(memory[late][:10]),
    }
    return row | {"MB at the end": np.median(memory[late][-10:]), "MB per 1000 steps": slope}


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
            for line in (x.split() for x in f if "/torch_" in x):
                first, last = (int(x, 16) for x in line[0].split("-"))
                held.setdefault(int(line[4]), last - first)
    return sum(held.values()) / 1e6


def loader_rows(folder, batch_size=8):
    """What loader processes hold at most while the model is busy, on features of ViT-L at 256 px:
    rows by number of workers."""
    from bench.seeds import features, tar_of
    from data import vpt_loader
    from files.vpt import ClipReader

    path, out = os.path.join(folder, "wide.tar"), []
    with open(path, "wb") as f:
        f.write(tar_of({"a@00000.safetensors": features(40, 256, 1024)}))
    for workers in (1, 2, 4):
        batches = iter(
            vpt_loader(
                path, batch_size, reader=ClipReader(), batches_per_epoch=100, num_workers=workers
            )
        )
        batch = next(batches)
        clip = (
            sum(v.nbytes for v in batch.values() if isinstance(v, torch.Tensor)) / batch_size / 1e6
        )
        pids, most = [os.getpid(), *(w.pid for w in batches._workers)], 0
        for _ in range(20):  # a slow model: the loader fills up
            time.sleep(0.3)
            most = max(most, shared(pids))
            batch = next(batches)
        bound = (workers * 2 + 1) * batch_size * clip  # and the batch that the model has
        out.append({"workers": workers, "prefetch": 2, "clips": batch_size, "MB a clip": clip})
        out[-1] |= {"(workers x prefetch + 1) x clips, MB": bound, "held MB": most}
        del batches, batch
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--encoder",
        default="vit_giant_xformers",
        choices=ARCHITECTURES,
        help="architecture of the frozen encoder",
    )
    flag("--crop_size", type=int, default=256, help="pixels of a frame")
    flag("--frames_per_clip", type=int, default=8, help="frames of a clip, one a step")
    flag("--batch_size", type=int, default=2, help="clips of a micro-batch")
    flag("--pred_dim", type=int, default=1024, help="width of the predictor")
    flag("--pred_depth", type=int, default=24, help="blocks of the predictor")
    flag("--pred_heads", type=int, default=16, help="attention heads of the predictor")
    flag("--r", type=int, default=16, help="rank of the adapters; 0: train all of the predictor")
    flag("--dropout", type=float, default=0.05, help="dropout before the adapters")
    flag(
        "--dtype",
        default="bfloat16",
        choices=["float32", "bfloat16"],
        help="autocast precision, and the encoder's weights",
    )
    flag("--optim", default="adamw", choices=["adamw", "adamw8bit"], help="moments in 32 or 8 bits")
    flag(
        "--leak",
        action="store_true",
        help="train --steps steps for real, and let loaders fill up, in place of the estimate",
    )
    flag("--steps", type=int, default=10_000, help="of --leak")
    flag(
        "--reads",
        nargs="+",
        default=["features", "video"],
        choices=["features", "video"],
        help="of --leak; video takes 25 minutes",
    )
    flag(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 2],
        help="of --leak: loader processes of the runs",
    )
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    if args.leak:
        from bench.world import World, start_server

        folder = tempfile.mkdtemp(prefix="nanojepa-memory-")
        os.environ["NANOJEPA_CACHE"] = os.path.join(folder, "cache")
        start_server()
        world = World(folder)
        table = [
            leak(world, reads, args.steps, workers)
            for reads in args.reads
            for workers in args.workers
        ]
        bench.report(table, args.json, torch.device("cpu"))
        bench.report(loaders := loader_rows(folder), args.json, torch.device("cpu"))
        shutil.rmtree(folder)
        full = any(
            row["held MB"] > 1.02 * row["(workers x prefetch + 1) x clips, MB"] for row in loaders
        )
        sys.exit(full or any(row["MB per 1000 steps"] >= 1 for row in table))
    width, depth, heads, mlp_dim = ARCHITECTURES[args.encoder]
    with torch.device("meta"):
        encoder = Encoder(width, depth, heads, mlp_dim=mlp_dim)
    dtype = getattr(torch, args.dtype)
    encoder_bytes = sum(p.numel() for p in encoder.parameters()) * dtype.itemsize
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    options = {"r": args.r, "dropout": args.dropout} if args.r else None
    found = estimate(
        encoder_bytes,
        width,
        args.crop_size // 16,
        size,
        options,
        args.batch_size,
        args.frames_per_clip,
        dtype,
        {"adamw": 8, "adamw8bit": 2.06}[args.optim],
    )
    total = {
        f"total{c}": sum(v for k, v in found.items() if "activ" not in k) + found[f"activations{c}"]
        for c in ("", ", checkpointed")
    }
    bench.report(
        [{"part": k, "GB": v / 1e9, "GiB": v / 2**30} for k, v in (found | total).items()],
        args.json,
        torch.device("cpu"),
    )
