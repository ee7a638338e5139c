"""Count, mean and M2 of the columns of a matrix by each implementation, and how that compares with
parsing the JSON such rows come from.

    python -m bench.moments
    python -m bench.moments --megabytes 64 --columns 1408 --dtype bfloat16 --json

Prints GB/s and rows/s (medians of interleaved repeats), the speed against "two_pass", the share of
a copy's bandwidth, measured in the same run, and the relative error of the first column's M2 at
mean 1000, std 1. The orjson row parses contractor lines of 2.5 KB whole, as many as the recording
has; its GB/s are those of the JSON."""

import argparse
import functools
import sys

import orjson
import torch

from bench import ceilings, medians, report
from bench.scaler import contractor_lines
from kernels.reference import moments_two_pass


def naive(x):
    """E[x^2] - E[x]^2 in float64, in one pass over a float64 copy: what cancellation costs."""
    x = x.double()
    mean = x.mean(0)
    return len(x), mean, (x * x).sum(0) - len(x) * mean * mean


def var_mean(x):
    """torch's own, in float64: Welford."""
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    return len(x), mean, var * len(x)


def parsed(lines):
    """The four numbers of every line."""
    return [
        (d["mouse"]["dx"], d["mouse"]["dy"], d["yaw"], d["pitch"]) for d in map(orjson.loads, lines)
    ]


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    p.add_argument(
        "--megabytes", type=int, help="size of the matrix (default 1000 on a GPU, 64 on a CPU)"
    )
    p.add_argument(
        "--columns",
        type=int,
        nargs="+",
        default=[4, 14, 1408],
        help="its width: 4 continuous actions, ..., ViT-g features",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of the matrix",
    )
    p.add_argument("--repeats", type=int, default=10, help="timed rounds")
    p.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = p.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    functions = {"two_pass": moments_two_pass, "var_mean": var_mean, "naive": naive}
    if device.type == "cuda":
        from kernels.stats import moments_triton

        functions["triton"] = moments_triton
    else:
        print("triton: needs a GPU", file=sys.stderr)
    _, bandwidth = ceilings(device, torch.float32)
    rows, size = [], (args.megabytes or (1000 if device.type == "cuda" else 64)) * 10**6
    for d in args.columns:
        n = size // d // dtype.itemsize
        for order in ("rows", "columns"):  # whose elements are neighbours in memory
            x = (
                torch.randn((n, d) if order == "rows" else (d, n), device=device)
                .add_(1000)
                .to(dtype)
            )
            x = x if order == "rows" else x.T
            centred = x[:, 0].double()
            centred = centred - centred.mean()
            m2 = (centred * centred).sum() - centred.sum() ** 2 / n
            seconds = medians(
                {k: functools.partial(f, x) for k, f in functions.items()}, device, args.repeats, 1
            )
            for name, function in functions.items():
                row = {
                    "impl": name,
                    "dtype": args.dtype,
                    "rows": n,
                    "columns": d,
                    "along": order,
                    "ms": 1e3 * seconds[name],
                }
                row |= {
                    "gb_s": size / seconds[name] / 1e9,
                    "rows_s": n / seconds[name],
                    "speedup": seconds["two_pass"] / seconds[name],
                }
                # a copy reads and writes: reading alone moves half of its bytes
                rows.append(
                    row
                    | {
                        "of_copy": size / seconds[name] / bandwidth,
                        "error": (function(x)[2][0] / m2 - 1).abs().item(),
                    }
                )
            del x
    lines = contractor_lines(0).splitlines()
    seconds = medians({"parse": lambda: parsed(lines)}, torch.device("cpu"), args.repeats, 1)[
        "parse"
    ]
    row = {
        "impl": "orjson",
        "dtype": "json",
        "rows": len(lines),
        "columns": 4,
        "along": "rows",
        "ms": 1e3 * seconds,
    }
    row |= {
        "gb_s": sum(map(len, lines)) / seconds / 1e9,
        "rows_s": len(lines) / seconds,
        "speedup": "",
        "of_copy": "",
        "error": "",
    }
    rows.append(row)
    report(rows, args.json, device)
    best = max(
        (r for r in rows[:-1] if r["columns"] == min(args.columns)), key=lambda r: r["rows_s"]
    )
    print(
        f"parsing a row costs {best['rows_s'] / row['rows_s']:,.0f} times its statistics"
        f" ({best['impl']})",
        file=sys.stderr,
    )
