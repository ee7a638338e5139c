"""How the cost of one training step grows with steps T, batch, predictor width and depth: seconds
and peak memory, a table and a plot.

    python -m bench.scaling --out docs/scaling.png        # CPU: sizes around bench.step's, 2 minutes on two cores

Every row is one change from the centre (T=8, batch 4, width 384, depth 6; frozen vit_tiny at
--crop_size, fp32 on a CPU, bf16 on a GPU), in a process of its own so that memory is its own.
`growth` is the time over that of the row before, where the size doubled."""

import argparse
import multiprocessing
import resource

import torch
from matplotlib.figure import Figure

import bench
from files.disk import write_atomically
from model import ACModel, Predictor, make_features_of
from weights import ARCHITECTURES, build_encoder

SWEEPS = {
    "T": (2, 4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "depth": (3, 6, 12, 24),
}
CENTRE = {"T": 8, "batch": 4, "width": 384, "depth": 6}


def measure(encoder_name, crop_size, repeats, T, batch, width, depth):
    """(seconds, peak bytes) of a training step of these sizes; bytes on a CPU above what was there
    before the first step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    encoder, grid = build_encoder(encoder_name).to(device, dtype), crop_size // 16
    model = ACModel(
        Predictor(
            encoder.embed_dim,
            13,
            2,
            (grid, grid),
            pred_dim=width,
            depth=depth,
            num_heads=width // 64,
        ).to(device)
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    video = torch.randint(256, (batch, 2 * T, 3, crop_size, crop_size), dtype=torch.uint8)
    data = {
        "video": video,
        "actions": torch.randn(batch, T - 1, 13),
        "states": torch.randn(batch, T, 2),
    }
    inputs = make_features_of(encoder, "tubelet", 2, {"mean": None, "std": None}, device)
    model.auto_steps = min(2, T - 1)

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
        return (
            seconds,
            torch.cuda.max_memory_allocated() - 2**28,
        )  # less what bench.medians flushes the cache with
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def plot(rows, path):
    fig = Figure(figsize=(13, 3.6), layout="constrained")
    names = list(dict.fromkeys(r["sweep"] for r in rows))
    for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names):
        sizes, times, memory = zip(
            *[(r["size"], r["ms"], r["MiB"]) for r in rows if r["sweep"] == name]
        )
        ax.loglog(sizes, times, "o-", base=2, label="time, ms")
        ax.loglog(sizes, memory, "s--", base=2, label="peak memory, MiB")
        ax.loglog(
            sizes,
            [times[0] * s / sizes[0] for s in sizes],
            ":",
            color="grey",
            base=2,
            label="proportional",
        )
        ax.set(
            xlabel={
                "T": "steps T",
                "batch": "clips a batch",
                "width": "predictor width",
                "depth": "predictor blocks",
            }[name]
        )
        ax.set_xticks(sizes, [str(s) for s in sizes])
        ax.yaxis.set_major_formatter("{x:g}")
    fig.axes[0].set_ylabel("of one training step")
    fig.axes[0].legend(fontsize=9)
    write_atomically(path, lambda f: fig.savefig(f, dpi=110))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--encoder",
        default="vit_tiny",
        choices=ARCHITECTURES,
        help="architecture of the frozen encoder, random weights",
    )
    parser.add_argument("--crop_size", type=int, default=128, help="pixels of a frame")
    parser.add_argument(
        "--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS, help="what to vary"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps timed of each row")
    parser.add_argument("--out", help="write the plot here (PNG)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    rows = []
    for name in args.sweeps:
        for i, size in enumerate(SWEEPS[name]):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak = pool.apply(
                    measure, (args.encoder, args.crop_size, args.repeats), CENTRE | {name: size}
                )
            growth = 1e3 * seconds / rows[-1]["ms"] if i else ""
            rows.append(
                {
                    "sweep": name,
                    "size": size,
                    "ms": 1e3 * seconds,
                    "growth": growth,
                    "MiB": peak / 2**20,
                }
            )
    bench.report(rows, args.json, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.out:
        plot(rows, args.out)
