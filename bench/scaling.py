"""What would training need at another size: of the clip, of the predictor, of the cluster?

    python -m bench.scaling --of sizes --out docs/scaling.png   # measured; 2 minutes on two cores
    python -m bench.scaling --of gpus                   # measured parts + arithmetic; a minute
    python -m bench.scaling --of gpus --encoder vit_giant_xformers --storage 100
    python -m bench.scaling --of memory                 # arithmetic, nothing is allocated
    python -m bench.scaling --of memory --r 0 --batch_size 8

sizes   Seconds and peak memory of one training step as steps T, batch, width and depth grow. Every
        row changes one thing of T=8, batch 4, width 384, depth 6 (frozen vit_tiny at 128 pixels;
        fp32 on a CPU, bf16 on a GPU) and has a process of its own, so its memory is its own.
        `growth` is the time over that of the row before, where the size doubled.
gpus    What every stage of train_ac.py costs on this machine, and what --gpus GPUs would ask for.
        Measured here: CPU seconds to decode a clip (of a recording made here: 640x360, 20 fps, 1.7
        Mbit/s, a keyframe every 250 frames), to parse the JSON of a minute and to read a clip of
        features; FLOP/s of two blocks of the encoder and of the predictor beside a large matmul;
        what they keep for backward; an all-reduce between two processes over loopback.
        NOT measured: anything of a GPU or a cluster. There a step takes its useful FLOPs
        (bench.step) / (--share of --tflops). The fp32 gradients go around a ring, 2 (n-1)/n of
        their bytes a GPU, over --nvlink inside a node of 8 GPUs and over --net beyond. Backward is
        two thirds of the predictor's time. `load` is what is asked for over what there is: cores,
        storage, and all-reduce over backward. `first` names the largest load; above 1, it is what
        a step waits for.
memory  Memory of a LoRA (or full) training step by part, from shapes alone, for V-JEPA 2-AC or any
        other size. `train_lora.py --memory_report` prints the same rows for its own flags, beside
        what its parts took after three steps."""

import argparse
import io
import multiprocessing
import os
import resource
import tarfile
import time

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing

import bench
import bench.data  # sets a cache of its own before data.py is imported, and makes recordings
from bench.step import useful_flops
from data import Clips
from evaluation.memory import BLOCK, activation_bytes, estimate
from files.disk import write_atomically
from files.features import pack_features
from files.shards import Slice, index_shards
from files.vpt import ClipReader, parse_ticks
from kernels import linear
from model import ACModel, Encoder, Predictor, encode_steps, make_features_of
from weights import ARCHITECTURES, build_encoder

CPU = torch.device("cpu")

# --of sizes: what is varied, around the centre
SWEEPS = {
    "T": (2, 4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "depth": (3, 6, 12, 24),
}
CENTRE = {"T": 8, "batch": 4, "width": 384, "depth": 6}
AXES = {  # title and label of each panel of the picture
    "T": ("longer clips", "steps T"),
    "batch": ("more clips", "clips a batch"),
    "width": ("wider predictor", "width"),
    "depth": ("deeper predictor", "blocks"),
}

# --of gpus
STEPS = 8  # of a clip
PIXELS = 256
GRID = 16  # patches a side
NODE = 8  # GPUs of a node
ANSWER = {
    "decode": "encode.py, then --data features",
    "storage": "--cache_dir",
    "all-reduce": "--grad_accum, --batch_size",
    "GPUs": "-",
}


# --- sizes: one training step, measured ---


def measure_step(encoder_name, crop_size, repeats, T, batch, width, depth):
    """(seconds, peak bytes) of a training step of these sizes. On a CPU, the bytes are those above
    what the process had before the first step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)

    # the model
    encoder = build_encoder(encoder_name).to(device, dtype)
    grid = (crop_size // 16, crop_size // 16)
    size = {"pred_dim": width, "depth": depth, "num_heads": width // 64}
    model = ACModel(Predictor(encoder.embed_dim, 13, 2, grid, **size).to(device))
    model.auto_steps = min(2, T - 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = make_features_of(encoder, "tubelet", 2, {"mean": None, "std": None}, device)

    # a batch of noise
    data = {
        "video": torch.randint(256, (batch, 2 * T, 3, crop_size, crop_size), dtype=torch.uint8),
        "actions": torch.randn(batch, T - 1, 13),
        "states": torch.randn(batch, T, 2),
    }

    def step():
        z, actions, states = inputs(data)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = sum(model(z, actions, states))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = bench.medians({"step": step}, device, repeats, warmup=1)["step"]
    if device.type == "cuda":
        # less what bench.medians flushes the cache with
        return seconds, torch.cuda.max_memory_allocated() - 2**28
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def size_rows(sweeps, encoder_name, crop_size, repeats):
    """Rows of the table of sizes, each measured in a new process."""
    rows = []
    for name in sweeps:
        for i, size in enumerate(SWEEPS[name]):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = (encoder_name, crop_size, repeats)
                seconds, peak = pool.apply(measure_step, arguments, CENTRE | {name: size})
            row = {"sweep": name, "size": size, "ms": 1e3 * seconds}
            row["growth"] = row["ms"] / rows[-1]["ms"] if i else ""
            row["MiB"] = peak / 2**20
            rows.append(row)
    return rows


def plot_sizes(rows, path):
    """A panel for each sweep: time on the left axis of the figure, memory on the right one."""
    from matplotlib.figure import Figure  # takes a second to import

    names = list(dict.fromkeys(row["sweep"] for row in rows))
    fig = Figure(figsize=(3.4 * len(names), 6), layout="constrained")
    panels = fig.subplots(2, len(names), squeeze=False, sharex="col", sharey="row")
    for (upper, lower), name in zip(panels.T, names):
        title, label = AXES[name]
        sweep = [row for row in rows if row["sweep"] == name]
        sizes = [row["size"] for row in sweep]
        for ax, unit, scale in ((upper, "ms", 1e3), (lower, "MiB", 2**10)):
            values = [row[unit] / scale for row in sweep]
            proportional = [values[0] * size / sizes[0] for size in sizes]
            ax.plot(sizes, values, "o-", label="measured")
            ax.plot(sizes, proportional, ":", color="grey", label="if it doubled with the size")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(sizes, [str(size) for size in sizes])
            ax.grid(alpha=0.3)

        upper.set_title(title)
        lower.set_xlabel(label)

    # ticks that can be read: 0.2, 0.5, 1, 2, 5
    for ax, label in ((panels[0, 0], "time, seconds"), (panels[1, 0], "peak memory, GiB")):
        ax.set_ylabel(label)
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
        low, high = ax.get_ylim()
        shown = [tick for tick in ticks if low <= tick <= high]
        ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
        ax.minorticks_off()
    panels[0, 0].legend(fontsize=9)
    centre = "T = {T}, batch {batch}, width {width}, depth {depth}".format_map(CENTRE)
    fig.suptitle(f"One training step as one size grows; the others stay at {centre}")
    write_atomically(path, lambda f: fig.savefig(f, dpi=110))


# --- gpus: the stages of a step, measured here ---


def cpu_seconds(dataset, count):
    """(CPU seconds, bytes) a clip, in this process alone. Two clips before that open the
    recording."""
    for i in range(count + 2):
        if i == 2:
            began = time.process_time()
            before = Slice.total
        clip = dataset[(0, i, *dataset.locate((i * 0.618) % 1))]
        assert not clip["bad"], clip["bad"]
    return (time.process_time() - began) / count, (Slice.total - before) / count


def small(width, depth, heads, mlp_dim, device="cpu"):
    """An encoder of these sizes."""
    with torch.device(device):
        return Encoder(width, depth, heads, mlp_dim=mlp_dim, img_size=PIXELS, num_frames=2 * STEPS)


def predictor_of(depth, width, device="cpu"):
    """A predictor, 1024 wide, on features of this width."""
    with torch.device(device):
        return ACModel(Predictor(width, 13, 2, (GRID, GRID), depth=depth))


def clip_of(width):
    """Features, actions and states of one clip of noise."""
    return (
        torch.randn(1, STEPS, GRID**2, width),
        torch.randn(1, STEPS - 1, 13),
        torch.randn(1, STEPS, 2),
    )


def kept_bytes(depth, width, dtype):
    """Bytes that a forward of ACModel keeps for backward, one clip, apart from weights."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return activation_bytes(predictor_of(depth, width), *clip_of(width))


def all_reduce(rank, file, count, seconds):
    """One of two processes that sum so many numbers. Writes its median into seconds[rank]."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.ones(count)
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - began)
    seconds[rank] = sorted(times)[2]
    dist.destroy_process_group()


def write_features(path, steps, tokens, width):
    """A feature shard of one recording, of noise."""
    tensors = pack_features(torch.randn(steps, tokens, width), "bf16")
    tensors["actions"] = torch.zeros(steps - 1, 38)
    tensors["states"] = torch.zeros(steps, 2, dtype=torch.float64)
    data = safetensors.torch.save(tensors, metadata={"fps": "5.0", "encode": "tubelet"})
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("recording@00000.safetensors")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def measure_stages(shape, clips, repeats):
    """{stage: what it costs on this machine}. shape: (width, depth, heads, mlp_dim) of the
    encoder."""
    width = shape[0]
    folder = bench.data.SCRATCH
    costs = {}

    # reading: video, JSON, features
    video = os.path.join(folder, "scale.tar")
    bench.data.make_recording(video, 1200, (640, 360), 250)
    records = index_shards([video])[0]
    costs["decode"] = cpu_seconds(Clips(records, [1.0], ClipReader(crop_size=PIXELS)), clips)
    with Slice(video, *records[0].members["jsonl"]) as f:
        raw = f.read()
    began = time.process_time()
    parse_ticks(raw)
    costs["json"] = time.process_time() - began
    features = os.path.join(folder, "features.tar")
    write_features(features, 64, GRID**2, width)
    feature_clips = Clips(index_shards([features])[0], [1.0], ClipReader(crop_size=PIXELS))
    costs["features"] = cpu_seconds(feature_clips, 8 * clips)

    # computing: two blocks of the encoder and of the predictor, and a matmul, in turn
    torch.manual_seed(0)
    encoder = small(width, 2, *shape[2:])
    model = predictor_of(2, width)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    picture = torch.randint(256, (1, 2, 3, PIXELS, PIXELS), dtype=torch.uint8)
    inputs = clip_of(width)
    a, b = torch.randn(2, 2048, 2048)

    def matmul():
        linear(a, b, None)

    def train_step():
        sum(model(*inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def encode():
        encode_steps(encoder, picture, "tubelet", 2)

    calls = {"matmul": matmul, "encoder": encode, "predictor": train_step}
    seconds = bench.medians(calls, CPU, repeats, warmup=1)
    work = flops(encoder, model.predictor)
    matmul_speed = 2 * 2048**3 / seconds["matmul"]
    for stage, share in (("encoder", STEPS), ("predictor", 1)):  # one step of the clip is encoded
        speed = work[stage] / share / seconds[stage]
        costs[stage] = speed, speed / matmul_speed

    # memory: (bytes outside of the blocks, bytes of a block)
    one = kept_bytes(1, width, torch.bfloat16)
    two = kept_bytes(2, width, torch.bfloat16)
    costs["kept"] = (2 * one - two, two - one)

    # gradients: bytes/s of an all-reduce
    with torch.multiprocessing.Manager() as manager:
        times = manager.dict()
        meeting = os.path.join(folder, "meet")
        torch.multiprocessing.spawn(all_reduce, (meeting, 25_000_000, times), nprocs=2)
        costs["all-reduce"] = 1e8 / max(times.values())
    return costs


def flops(encoder, predictor):
    """{"encoder", "predictor"}: useful FLOPs of one clip in one training step."""
    return dict(zip(("encoder", "predictor"), useful_flops(encoder, predictor, 1, STEPS)))


# --- gpus: arithmetic ---


def cluster(gpus, source, costs, work, grads, args):
    """A row of the table: what this many GPUs ask for when they read `source`, video or features.

    costs: of measure_stages; work: of flops; grads: bytes of the gradients; args: the assumed
    sizes of the machines, named as their flags."""
    # a step of a GPU
    speed = args.share * args.tflops * 1e12
    clip_flops = work["predictor"]
    if source == "video":
        clip_flops += work["encoder"]
    seconds = args.batch_size * clip_flops / speed
    rate = args.batch_size / seconds  # clips/s a GPU

    # what it asks for, over what there is
    cpu, size = costs["decode" if source == "video" else "features"]
    link = args.nvlink * 1e9 if gpus <= NODE else args.net * 1e9 / 8
    ring = 2 * (gpus - 1) / gpus * grads / link
    backward = args.batch_size * work["predictor"] * 2 / 3 / speed
    load = {
        "decode": rate * cpu / args.cores,
        "storage": gpus * rate * size / args.storage / 1e9,
        "all-reduce": ring / backward,
    }
    first = max(load, key=load.get)
    return {
        "GPUs": gpus,
        "from": source,
        "batch": gpus * args.batch_size,
        "clips/s": gpus * rate,
        "step ms": 1e3 * seconds,
        "cores/GPU": rate * cpu,
        "GB/s a node": NODE * rate * size / 1e9,
        "GB/s in all": gpus * rate * size / 1e9,
        "all-reduce ms": 1e3 * ring,
        "of backward": load["all-reduce"],
        "first": first,
        "load": load[first],
        "answer": ANSWER[first if load[first] > 1 else "GPUs"],
    }


def stage_rows(costs, work):
    """(stage, value, unit) of what was measured."""
    decode, video = costs["decode"]
    load, features = costs["features"]
    return [
        ("decode a clip of video", decode, "CPU s"),
        ("its bytes read", video / 1e6, "MB"),
        ("parse the JSON of a minute", costs["json"], "CPU s, once"),
        ("read a clip of features", load, "CPU s"),
        ("its bytes read", features / 1e6, "MB"),
        ("features of an hour of play", 3600 * 2.5 / STEPS * features / 1e9, "GB"),
        ("encoder, FLOPs a clip", work["encoder"] / 1e12, "TFLOP"),
        ("encoder here", costs["encoder"][0] / 1e9, "GFLOP/s"),
        ("  of a large matmul", costs["encoder"][1], ""),
        ("predictor, FLOPs a clip and step", work["predictor"] / 1e12, "TFLOP"),
        ("predictor here", costs["predictor"][0] / 1e9, "GFLOP/s"),
        ("  of a large matmul", costs["predictor"][1], ""),
        ("all-reduce over loopback", costs["all-reduce"] / 1e9, "GB/s"),
    ]


def memory_of_a_gpu(costs, encoder, predictor):
    """(part, value, unit) of the memory of one GPU."""
    count = sum(p.numel() for p in predictor.parameters())
    frozen = 2 * sum(p.numel() for p in encoder.parameters())
    outside, block = costs["kept"]

    # checkpointing keeps the input of a block alone: fp32, of both passes
    block_input = (STEPS - 1 + 2) * (GRID**2 + 2) * 1024 * 4
    return [
        ("trained parameters", count, "numbers"),
        ("weights, gradients, Adam's moments", 16 * count / 1e9, "GB"),
        ("frozen encoder, bf16", frozen / 1e9, "GB"),
        ("kept for backward, a clip", (outside + 24 * block) / 1e9, "GB"),
        ("with --activation_checkpointing", (outside + 24 * block_input + block) / 1e9, "GB"),
    ]


# --- memory: LoRA by part, arithmetic ---


def lora_memory_rows(encoder_shape, crop_size, size, options, batch_size, steps, dtype, optim):
    """Rows of the memory of a LoRA step, and their sums without and with checkpointing.

    encoder_shape: (width, depth, heads, mlp_dim); size and options: of the predictor and of
    add_lora (None: train the whole predictor)."""
    width, depth, heads, mlp_dim = tuple(encoder_shape)
    with torch.device("meta"):
        encoder = Encoder(width, depth, heads, mlp_dim=mlp_dim)
    encoder_bytes = sum(p.numel() for p in encoder.parameters()) * dtype.itemsize
    moment_bytes = {"adamw": 8, "adamw8bit": 2.06}[optim]
    parts = estimate(
        encoder_bytes, width, crop_size // 16, size, options, batch_size, steps, dtype, moment_bytes
    )

    # activations appear twice, kept whole or checkpointed
    rest = sum(v for k, v in parts.items() if "activ" not in k)
    parts["total"] = rest + parts["activations"]
    parts["total, checkpointed"] = rest + parts["activations, checkpointed"] + parts[BLOCK]
    return [{"part": k, "GB": v / 1e9, "GiB": v / 2**30} for k, v in parts.items()]


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--of", required=True, choices=["sizes", "gpus", "memory"], help="which question")
    encoder_help = "frozen encoder (default vit_tiny, vit_large_16, vit_giant_xformers)"
    flag("--encoder", choices=ARCHITECTURES, help=encoder_help)
    flag("--batch_size", type=int, help="gpus: clips a GPU (8); memory: of a micro-batch (2)")
    flag("--crop_size", type=int, help="pixels; sizes (128) and memory (256); gpus takes 256")
    flag("--json", action="store_true", help="print rows as JSON lines")

    flag = parser.add_argument_group("measurements").add_argument
    flag("--repeats", type=int, default=3, help="timed steps, or runs of each stage (default 3)")
    flag("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS, help="sizes: what to vary")
    flag("--out", help="sizes: write the picture here (PNG)")
    flag("--clips", type=int, default=24, help="gpus: clips decoded (default 24)")

    flag = parser.add_argument_group("assumed for --of gpus").add_argument
    flag("--gpus", type=int, nargs="+", default=[8, 64, 512], help="rows (default 8 64 512)")
    flag("--tflops", type=float, default=989.0, help="dense bf16 peak (default 989, H100 SXM)")
    flag("--share", type=float, default=0.4, help="of the peak for useful FLOPs (default 0.4)")
    flag("--nvlink", type=float, default=450.0, help="GB/s a GPU sends in a node (default 450)")
    flag("--net", type=float, default=400.0, help="Gbit/s from node to node (default 400)")
    flag("--cores", type=float, default=16.0, help="CPU cores a GPU (default 16)")
    flag("--storage", type=float, default=20.0, help="GB/s, shared by all nodes (default 20)")

    flag = parser.add_argument_group("sizes for --of memory").add_argument
    flag("--frames_per_clip", type=int, default=8, help="frames, one a step (default 8)")
    flag("--pred_dim", type=int, default=1024, help="width of the predictor (default 1024)")
    flag("--pred_depth", type=int, default=24, help="blocks of the predictor (default 24)")
    flag("--pred_heads", type=int, default=16, help="attention heads (default 16)")
    flag("--r", type=int, default=16, help="rank; 0: train the whole predictor (default 16)")
    flag("--dropout", type=float, default=0.05, help="before the adapters (default 0.05)")
    dtypes = ["bfloat16", "float32"]
    flag("--dtype", default="bfloat16", choices=dtypes, help="autocast, and of the encoder")
    flag("--optim", default="adamw", choices=["adamw", "adamw8bit"], help="moments, 32 or 8 bits")
    args = parser.parse_args()

    if args.of == "sizes":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = args.encoder or "vit_tiny"
        rows = size_rows(args.sweeps, name, args.crop_size or 128, args.repeats)
        bench.report(rows, args.json, device)
        if args.out:
            plot_sizes(rows, args.out)

    if args.of == "memory":
        shape = ARCHITECTURES[args.encoder or "vit_giant_xformers"]
        size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
        options = {"r": args.r, "dropout": args.dropout} if args.r else None
        rows = lora_memory_rows(
            shape,
            args.crop_size or 256,
            size,
            options,
            args.batch_size or 2,
            args.frames_per_clip,
            getattr(torch, args.dtype),
            args.optim,
        )
        bench.report(rows, args.json, CPU)

    if args.of == "gpus":
        args.batch_size = args.batch_size or 8
        shape = ARCHITECTURES[args.encoder or "vit_large_16"]
        costs = measure_stages(shape, args.clips, args.repeats)

        # the whole models, as shapes
        encoder = small(*shape, "meta")
        predictor = predictor_of(24, shape[0], "meta").predictor
        work = flops(encoder, predictor)
        for table in (stage_rows(costs, work), memory_of_a_gpu(costs, encoder, predictor)):
            rows = [dict(zip(("stage", "value", "unit"), row)) for row in table]
            bench.report(rows, args.json, CPU)

        # what clusters would ask for
        grads = 4 * sum(p.numel() for p in predictor.parameters())
        rows = []
        for gpus in args.gpus:
            for source in ("video", "features"):
                rows.append(cluster(gpus, source, costs, work, grads, args))
        assumed = []
        for name in ("tflops", "share", "nvlink", "net", "cores", "storage"):
            assumed.append(f"--{name} {getattr(args, name):g}")
        print("arithmetic, not measured:", ", ".join(assumed))
        bench.report(rows, args.json, CPU)
