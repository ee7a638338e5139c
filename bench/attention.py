"""Block-causal attention: our implementations against each other and against FlexAttention, forward
and forward + backward, in one run.

    python -m bench.attention                                              # CPU: 1 x 16 heads x 8 steps x 258 tokens, fp32
    python -m bench.attention --dtype bfloat16 --batch_size 8 --steps 2 7 8 16       # a GPU

Useful FLOPs are those of the scores that the mask lets through: 4 hd a score forward, 2.5 times
that backward. The share is of a large matmul measured in the same run. FlexAttention has no
backward on a CPU; it is compared with here and used nowhere."""

import argparse

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bench
from kernels import ATTENTION, attention_impl, block_causal_attention

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--batch_size", type=int, default=1, help="clips")
    flag("--heads", type=int, default=16, help="attention heads")
    flag("--head_dim", type=int, default=64, help="dims of a head")
    flag("--block", type=int, default=258, help="tokens a step")
    flag("--steps", type=int, nargs="+", default=[2, 7, 8], help="steps T of a clip")
    flag(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="of q, k and v",
    )
    flag(
        "--flex",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with FlexAttention too (compiling takes seconds)",
    )
    flag("--repeats", type=int, default=10, help="timed calls of each")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype)
    hd = args.head_dim
    torch.manual_seed(0)
    ceiling, _ = bench.ceilings(device, dtype)
    flex = torch.compile(flex_attention, dynamic=False)
    rows = []
    for T in args.steps:
        L = T * args.block
        qkv = torch.randn(args.batch_size, L, 3, args.heads, hd, device=device).to(dtype)
        qkv = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # strided as a fused projection leaves them
        live = [x.detach().requires_grad_() for x in qkv]
        grad = torch.randn(args.batch_size, args.heads, L, hd, device=device).to(dtype)
        forward = {
            n: lambda x, impl=n: block_causal_attention(*x, args.block, impl)
            for n in ATTENTION
            if n != "triton" or cuda
        }
        if args.flex:
            sees = create_block_mask(
                lambda b, h, i, j: j // args.block <= i // args.block,
                None,
                None,
                L,
                L,
                device=device,
            )
            forward["flex"] = lambda x, mask=sees: flex(*x, block_mask=mask)

        wanted = forward["reference"](qkv)
        for name, call in forward.items():
            off = ((call(qkv) - wanted).norm() / wanted.norm()).item()
            if off > (1e-5 if args.dtype == "float32" else 2e-2):
                raise SystemExit(f"{name} is off by {off:.1e} at T={T}")
        seconds = bench.medians(
            {k: lambda f=f, x=qkv: f(x) for k, f in forward.items()}, device, args.repeats
        )
        both = {
            k: lambda f=f, x=live, g=grad: torch.autograd.grad(f(x), x, g)
            for k, f in forward.items()
            if k != "flex" or cuda
        }
        two = bench.medians(both, device, args.repeats)
        useful = 4 * hd * args.batch_size * args.heads * args.block**2 * T * (T + 1) / 2
        for name in forward:
            row = {
                "T": T,
                "L": L,
                "impl": name,
                "auto": attention_impl(device, dtype, hd, args.block, L) == name,
                "fwd ms": 1e3 * seconds[name],
            }
            row |= {
                f"{other} / it": seconds[other] / seconds[name]
                for other in ("reference", "prefix", "flex")
                if other in seconds
            }
            row |= {"of matmul": useful / seconds[name] / ceiling}
            if name in two:
                row |= {"fwd+bwd ms": 1e3 * two[name]}
                row |= {
                    f"{other} / it, both": two[other] / two[name]
                    for other in ("reference", "prefix", "flex")
                    if other in two
                }
                row |= {
                    "bwd of matmul": 2.5 * useful / (two[name] - seconds[name]) / ceiling,
                    "TFLOP/s, both": 3.5 * useful / two[name] / 1e12,
                }
                row |= bench.peak_memory(both[name], device)
            rows.append(
                {
                    "dtype": args.dtype,
                    "B": args.batch_size,
                    "nh": args.heads,
                    "hd": hd,
                    "block": args.block,
                }
                | row
            )
    heads = list(dict.fromkeys(k for row in rows for k in row))
    rows = [{k: row.get(k, "no backward") for k in heads} for row in rows]
    if not cuda:
        print("triton: needs a GPU")
    bench.report(rows, args.json, device)
