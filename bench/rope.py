"""RoPE of q and k from a fused qkv, forward and forward + backward down to the gradient of qkv:
what the model runs against other ways.

    python -m bench.rope
    python -m bench.rope --shapes 8,16,2064,64 --dtypes bfloat16 --json

Prints milliseconds (medians of interleaved repeats), times "stack" (rotate the stacked q and k by
its definition, as nanojepa first did and upstream does) over each, and the share of a copy's
bandwidth, measured in the same run, for q and k read and written once each way."""

import argparse
import functools
import sys

import torch

from bench import ceilings, medians, report
from kernels.reference import rope_plain, rotate_pairs
from model import rope_tables


def stack(qkv, cos, sin):
    """(B, L, 3, nh, hd) -> q, k, v; partners by a copy, intermediate results of every operator in
    the tables' fp32."""
    qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, nh, L, hd)
    partners = torch.stack((qk[..., 1::2], qk[..., ::2]), dim=-1).flatten(-2)
    return *(qk * cos + partners * sin).to(v.dtype).unbind(0), v[0]


def pair(rope):
    """What model.Attention does: q and k apart, so that no gradient is copied into a larger one."""

    def rotated(qkv, cos, sin):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return *rope((q, k), cos, sin), v

    return rotated


def by_definition(qk, cos, sin):
    return [rotate_pairs(x, cos, sin) for x in qk]


def both_ways(function, qkv, tables, grads):
    """Forward and backward, as a function without arguments."""
    return lambda: torch.autograd.grad(function(qkv, *tables), qkv, grads)


def shape(text):
    return tuple(map(int, text.split(",")))


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
        "--shapes",
        type=shape,
        nargs="+",
        help="B,nh,L,hd (default 4,6,528,64 1,16,2064,64; 8,16,2064,64 too on a GPU)",
    )
    p.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
        help="of q and k",
    )
    p.add_argument("--repeats", type=int, default=20, help="timed rounds")
    p.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = p.parse_args()

    device = torch.device(args.device)
    functions = {"stack": stack, "definition": pair(by_definition), "plain": pair(rope_plain)}
    compiled = {
        f"{name}, compiled": torch.compile(functions[name], fullgraph=True, dynamic=False)
        for name in functions
    }
    functions |= compiled
    if device.type == "cuda":
        from kernels.rope import rope_triton

        functions["triton"] = pair(rope_triton)
    else:
        print("triton: needs a GPU", file=sys.stderr)
    shapes = args.shapes or [
        (4, 6, 528, 64),
        (1, 16, 2064, 64),
        *([(8, 16, 2064, 64)] if device.type == "cuda" else []),
    ]
    _, bandwidth = ceilings(device, torch.float32)
    rows = []
    for B, nh, L, hd in shapes:
        tables = rope_tables(torch.randint(16, (L, 3), device=device).float(), hd)
        for dtype in args.dtypes:
            qkv = (
                torch.randn(B, L, 3, nh, hd, device=device)
                .to(getattr(torch, dtype))
                .requires_grad_()
            )
            grads = [torch.randn(B, nh, L, hd, device=device).to(qkv.dtype) for _ in range(3)]
            exact = stack(qkv.detach().double(), *(t.double() for t in tables))
            for name, function in functions.items():
                for got, expected in zip(function(qkv, *tables), exact):
                    error = ((got.double() - expected).norm() / expected.norm()).item()
                    if not error < (1e-6 if dtype == "float32" else 5e-3):
                        raise RuntimeError(f"{name} is off by {error:.2g}")
            with torch.no_grad():
                forward = medians(
                    {k: functools.partial(f, qkv, *tables) for k, f in functions.items()},
                    device,
                    args.repeats,
                )
            total = medians(
                {k: both_ways(f, qkv, tables, grads) for k, f in functions.items()},
                device,
                args.repeats,
            )
            moved = (
                4 * B * nh * L * hd * qkv.element_size() / bandwidth
            )  # seconds of a copy of q and k
            for name in functions:
                row = {
                    "shape": f"{B},{nh},{L},{hd}",
                    "dtype": dtype,
                    "impl": name,
                    "forward_ms": 1e3 * forward[name],
                }
                row |= {
                    "forward_speedup": forward["stack"] / forward[name],
                    "forward_of_copy": moved / forward[name],
                }
                row |= {
                    "both_ms": 1e3 * total[name],
                    "both_speedup": total["stack"] / total[name],
                    "both_of_copy": 2 * moved / total[name],
                }
                rows.append(row)
        torch.compiler.reset()
    report(rows, args.json, device)
