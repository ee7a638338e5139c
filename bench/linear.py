"""The affine map of the transformer layers: BLAS (MKL on x86) against oneDNN, forward + backward in
fp32.

    python -m bench.linear

`kernels.linear` takes oneDNN for large fp32 products on CPUs with AVX-512; on a GPU there is
nothing to choose."""

import argparse

import torch

import bench
from kernels import LINEAR, linear

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--width",
        type=int,
        default=384,
        help="of the model; layers of 1, 3 and 4 times the width are timed",
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[66, 528, 1848], help="tokens of a batch"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for rows in args.rows:
        for width in (args.width, 3 * args.width, 4 * args.width):
            x = torch.randn(rows, args.width, requires_grad=True)
            weight = torch.randn(width, args.width, requires_grad=True)
            bias = torch.randn(width, requires_grad=True)
            grad = torch.randn(rows, width)
            call = {
                n: lambda n=n, p=(x, weight, bias), g=grad: torch.autograd.grad(linear(*p, n), p, g)
                for n in LINEAR
            }
            seconds = bench.medians(call, torch.device("cpu"), args.repeats)
            flops = {
                f"{n} GFLOP/s": 6e-9 * rows * width * args.width / s for n, s in seconds.items()
            }
            found.append(
                {"rows": rows, "K": args.width, "N": width}
                | flops
                | {"blas / onednn": seconds["blas"] / seconds["onednn"]}
            )
    bench.report(found, args.json, torch.device("cpu"))
