"""What every stage of train_ac.py costs on this machine, and from that what 8, 64 and 512 GPUs
would need: a scaling model.

    python -m bench.scale                                   # ViT-L at 256 px; a minute of CPU
    python -m bench.scale --encoder vit_giant_xformers --storage 100

Measured here: CPU seconds to decode a clip (of a recording made here: 640x360, 20 fps, 1.7 Mbit/s,
a keyframe every 250), to parse the JSON of a minute and to read a clip of features; FLOP/s of two
blocks of the encoder and of the predictor beside a large matmul; what they keep for backward; an
all-reduce between two processes over loopback. NOT measured: anything of a GPU or a cluster. There
a step takes useful FLOPs (bench.step) / (--share of --tflops); fp32 gradients go around a ring, 2
(n-1)/n of their bytes a GPU, over --nvlink inside a node of 8 and else over --net; backward is two
thirds of the predictor's time. `load` is what is asked for over what there is: cores, storage, and
all-reduce over backward; `first` names the largest, above 1 it is what a step waits for."""

import argparse
import io
import os
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
from evaluation.memory import activation_bytes
from files.features import pack_features
from files.shards import Slice, index_shards
from files.vpt import ClipReader, parse_ticks
from kernels import linear
from model import ACModel, Encoder, Predictor, encode_steps
from weights import ARCHITECTURES

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


def cpu_seconds(dataset, count):
    """(CPU seconds, bytes) a clip, this process alone, after two clips that open the recording."""
    for i in range(count + 2):
        if i == 2:
            began, before = time.process_time(), Slice.total
        clip = dataset[(0, i, *dataset.locate((i * 0.618) % 1))]
        assert not clip["bad"], clip["bad"]
    return (time.process_time() - began) / count, (Slice.total - before) / count


def small(width, depth, heads, mlp_dim, device="cpu"):
    with torch.device(device):
        return Encoder(width, depth, heads, mlp_dim=mlp_dim, img_size=PIXELS, num_frames=2 * STEPS)


def kept(depth, width, dtype):
    """Bytes that a forward of ACModel keeps for backward, one clip, apart from weights."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return activation_bytes(predictor_of(depth, width), *clip_of(width))


def predictor_of(depth, width, device="cpu"):
    with torch.device(device):
        return ACModel(Predictor(width, 13, 2, (GRID, GRID), depth=depth))


def clip_of(width):
    return (
        torch.randn(1, STEPS, GRID**2, width),
        torch.randn(1, STEPS - 1, 13),
        torch.randn(1, STEPS, 2),
    )


def all_reduce(rank, file, count, out):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, times = torch.ones(count), []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - began)
    out[rank] = sorted(times)[2]
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


def measure(args, shape):
    """{stage: (value, unit, what it is)} on this machine."""
    out = {}
    folder = bench.data.SCRATCH
    device = torch.device("cpu")
    video = os.path.join(folder, "scale.tar")
    features = os.path.join(folder, "features.tar")
    bench.data.make_recording(video, 1200, (640, 360), 250)
    write_features(features, 64, GRID**2, shape[0])
    reader = ClipReader(crop_size=PIXELS)
    records = index_shards([video])[0]
    out["decode"] = cpu_seconds(Clips(records, [1.0], reader), args.clips)
    with Slice(video, *records[0].members["jsonl"]) as f:
        raw, began = f.read(), time.process_time()
    parse_ticks(raw)
    out["json"] = time.process_time() - began
    out["features"] = cpu_seconds(Clips(index_shards([features])[0], [1.0], reader), 8 * args.clips)
    torch.manual_seed(0)
    encoder, model = small(shape[0], 2, *shape[2:]), predictor_of(2, shape[0])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    picture, inputs = (
        torch.randint(256, (1, 2, 3, PIXELS, PIXELS), dtype=torch.uint8),
        clip_of(shape[0]),
    )

    def step():
        sum(model(*inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def encode():
        encode_steps(encoder, picture, "tubelet", 2)

    a, b = torch.randn(2, 2048, 2048)
    calls = {"matmul": lambda: linear(a, b, None), "encoder": encode, "predictor": step}
    seconds = bench.medians(
        calls, device, args.repeats, warmup=1
    )  # in turn, so that other load on the machine meets all
    work, speed = flops(encoder, model.predictor), 2 * 2048**3 / seconds["matmul"]
    for k, share in (("encoder", STEPS), ("predictor", 1)):  # one step of the clip's is encoded
        out[k] = work[k] / share / seconds[k], work[k] / share / seconds[k] / speed
    one, two = (kept(depth, shape[0], torch.bfloat16) for depth in (1, 2))
    out["kept"] = (2 * one - two, two - one)  # outside the blocks, a block
    with torch.multiprocessing.Manager() as manager:
        times = manager.dict()
        torch.multiprocessing.spawn(
            all_reduce, (os.path.join(folder, "meet"), 25_000_000, times), nprocs=2
        )
        out["all-reduce"] = 1e8 / max(times.values())
    return out


def flops(encoder, predictor):
    """{"encoder", "predictor"}: useful FLOPs of one clip in one training step."""
    return dict(zip(("encoder", "predictor"), useful_flops(encoder, predictor, 1, STEPS)))


def cluster(gpus, source, found, work, grads, args):
    """A row of the table: what this many GPUs ask for, reading `source` (video or features)."""
    speed = args.share * args.tflops * 1e12
    seconds = args.batch_size * (work["predictor"] + work["encoder"] * (source == "video")) / speed
    rate = args.batch_size / seconds  # clips/s a GPU
    cpu, size = found["decode" if source == "video" else "features"]
    link = args.nvlink * 1e9 if gpus <= NODE else args.net * 1e9 / 8
    ring, backward = (
        2 * (gpus - 1) / gpus * grads / link,
        args.batch_size * work["predictor"] * 2 / 3 / speed,
    )
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--encoder",
        default="vit_large_16",
        choices=ARCHITECTURES,
        help="architecture of the frozen encoder",
    )
    flag("--clips", type=int, default=24, help="clips decoded")
    flag("--repeats", type=int, default=3, help="times the encoder and the predictor run")
    flag("--gpus", type=int, nargs="+", default=[8, 64, 512], help="rows of the table")
    flag("--batch_size", type=int, default=8, help="clips a GPU")
    flag("--tflops", type=float, default=989.0, help="dense bf16 peak of a GPU (H100 SXM)")
    flag(
        "--share",
        type=float,
        default=0.4,
        help="share of it that useful FLOPs reach (an assumption)",
    )
    flag("--nvlink", type=float, default=450.0, help="GB/s a GPU sends inside a node")
    flag(
        "--net", type=float, default=400.0, help="Gbit/s that a node's ring sends to the next node"
    )
    flag("--cores", type=float, default=16.0, help="cores a GPU")
    flag(
        "--storage", type=float, default=20.0, help="GB/s of the shared storage, all nodes together"
    )
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    shape = ARCHITECTURES[args.encoder]
    found = measure(args, shape)
    full = small(*shape, "meta"), predictor_of(24, shape[0], "meta").predictor
    work, count = flops(*full), sum(p.numel() for p in full[1].parameters())
    decode, video = found["decode"]
    load, features = found["features"]
    here = torch.device("cpu")
    rows = [
        ("decode a clip of video", decode, "CPU s"),
        ("its bytes read", video / 1e6, "MB"),
        ("parse the JSON of a minute", found["json"], "CPU s, once"),
        ("read a clip of features", load, "CPU s"),
        ("its bytes read", features / 1e6, "MB"),
        ("features of an hour of play", 3600 * 2.5 / STEPS * features / 1e9, "GB"),
        ("encoder, FLOPs a clip", work["encoder"] / 1e12, "TFLOP"),
        ("encoder here", found["encoder"][0] / 1e9, "GFLOP/s"),
        ("  of a large matmul", found["encoder"][1], ""),
        ("predictor, FLOPs a clip and step", work["predictor"] / 1e12, "TFLOP"),
        ("predictor here", found["predictor"][0] / 1e9, "GFLOP/s"),
        ("  of a large matmul", found["predictor"][1], ""),
        ("all-reduce over loopback", found["all-reduce"] / 1e9, "GB/s"),
    ]
    outside, block = found["kept"]
    tokens = (
        (STEPS - 1 + 2) * (GRID**2 + 2) * 1024 * 4
    )  # what checkpointing keeps of a block: its input, fp32, of both passes
    frozen = 2 * sum(p.numel() for p in full[0].parameters())
    memory = [
        ("trained parameters", count, "numbers"),
        ("weights, gradients, Adam's moments", 16 * count / 1e9, "GB"),
        ("frozen encoder, bf16", frozen / 1e9, "GB"),
        ("kept for backward, a clip", (outside + 24 * block) / 1e9, "GB"),
        ("with --activation_checkpointing", (outside + 24 * tokens + block) / 1e9, "GB"),
    ]
    for table in (rows, memory):
        bench.report([dict(zip(("stage", "value", "unit"), row)) for row in table], args.json, here)
    table = [
        cluster(n, source, found, work, 4 * count, args)
        for n in args.gpus
        for source in ("video", "features")
    ]
    assumed = (
        f"--{k} {getattr(args, k):g}"
        for k in ("tflops", "share", "nvlink", "net", "cores", "storage")
    )
    print("arithmetic, not measured:", ", ".join(assumed))
    bench.report(table, args.json, here)
