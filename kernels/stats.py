"""Triton sufficient statistics: one read of the data, float64 inside, no atomics, so that two runs
give the same bits.

A program walks its rows in tiles of K x R rows by BC columns. Each of the R x BC running (n, mean,
M2) takes K values at a time by the corrected two-pass sum of kernels/reference.py and merges them
(Chan, Golub, LeVeque 1983): the K lie in the registers of one thread, so that the loop has neither
shuffles nor barriers. The R of a program are merged at its end, the programs by a second, small
kernel. All means are relative to the first row until the last line: one of 1e9 has no digits to
spare for hundreds of merges."""

import torch
import triton
import triton.language as tl

K = 8
THREADS = 128
PROGRAMS = 2048  # at most; the same on every card, so that the bits are the same too
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


@triton.jit
def inverse(n):
    """1 / max(n, 1) in float64 by two Newton steps: a float64 division is a subroutine that spills
    registers."""
    n = tl.maximum(n, 1.0)
    guess = (1.0 / n.to(tl.float32)).to(tl.float64)
    guess *= 2.0 - n * guess
    return guess * (2.0 - n * guess)


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """merge_moments; two empty sets make an empty one."""
    n = n_a + n_b
    weight = n_b * inverse(n)
    delta = mean_b - mean_a
    return n, mean_a + delta * weight, m2_a + m2_b + delta * delta * (n_a * weight)


@triton.jit
def merge_rows(n, mean, m2):
    """n (R, 1), mean and M2 (R, BC) -> mean and M2 (BC,) of the union, by the same corrected two
    passes."""
    total = tl.sum(n, axis=0)  # (1,)
    middle = tl.sum(n * mean, axis=0) * inverse(total)
    mean -= middle[None]
    slip = tl.sum(n * mean, axis=0) * inverse(total)
    return middle + slip, tl.sum(m2 + n * mean * mean, axis=0) - total * slip * slip


@triton.jit
def load_float64(x, inside, BF16: tl.constexpr):
    values = tl.load(x, mask=inside, other=0.0)
    return (values.to(tl.float32) if BF16 else values).to(
        tl.float64
    )  # the interpreter knows bf16 only as a type to convert from


@triton.jit(do_not_specialize=["n", "d"])
def partial_kernel(
    x,
    means,
    squares,
    n,
    d,
    rows,
    stride_row,
    stride_column,
    K: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BF16: tl.constexpr,
):
    """mean, less x[0], and M2 of `rows` rows by BC columns -> means, squares (splits, d)."""
    columns = tl.program_id(0) * BC + tl.max_contiguous(tl.arange(0, BC), 4)
    first = tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, n)
    wanted = columns < d
    x += columns.to(tl.int64) * stride_column  # (BC,)
    pivot = load_float64(x, wanted, BF16)
    at = tl.arange(0, K)[:, None, None] * R + tl.arange(0, R)[None, :, None]  # (K, R, 1)
    x = x[None, None, :] + (first + at) * stride_row
    wanted = wanted[None, None, :]
    mean = tl.zeros((R, BC), dtype=tl.float64)
    m2 = tl.zeros((R, BC), dtype=tl.float64)
    count = tl.zeros((R, 1), dtype=tl.float64)
    tiles = ((last - first) // (K * R)).to(tl.int32)
    for _ in range(tiles):
        tile = load_float64(x, wanted, BF16)
        middle = tl.sum(tile, axis=0) * (1.0 / K)
        tile -= middle[None]
        slip = tl.sum(tile, axis=0) * (1.0 / K)  # what rounding left in the mean
        spread = tl.sum(tile * tile, axis=0) - K * slip * slip
        count, mean, m2 = merge(
            count, mean, m2, tl.full((R, 1), K, tl.float64), middle - pivot[None] + slip, spread
        )
        x += tl.full((1,), K * R, tl.int64) * stride_row
    # the rows that fill no tile: 0 to K for each of the R
    inside = at < last - first - tiles.to(tl.int64) * (K * R)  # (K, R, 1)
    here = tl.sum(inside.to(tl.float64), axis=0)  # (R, 1)
    tile = tl.where(inside, load_float64(x, inside & wanted, BF16) - pivot[None, None, :], 0.0)
    middle = tl.sum(tile, axis=0) * inverse(here)
    tile = tl.where(inside, tile - middle[None], 0.0)
    slip = tl.sum(tile, axis=0) * inverse(here)
    spread = tl.sum(tile * tile, axis=0) - here * slip * slip
    count, mean, m2 = merge(count, mean, m2, here, middle + slip, spread)
    mean, m2 = merge_rows(count, mean, m2)
    out = tl.program_id(1) * d + columns
    tl.store(means + out, mean, mask=columns < d)
    tl.store(squares + out, m2, mask=columns < d)


@triton.jit(do_not_specialize=["n", "d", "splits"])
def merge_kernel(means, squares, out, n, d, rows, splits, P: tl.constexpr, BC: tl.constexpr):
    """Partials (splits, d) of `rows` rows each, the last one of what is left -> out (2, d) = mean,
    M2."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    mean = tl.zeros((P, BC), dtype=tl.float64)
    m2 = tl.zeros((P, BC), dtype=tl.float64)
    count = tl.zeros((P, 1), dtype=tl.float64)
    for first in range(0, splits, P):
        split = first + tl.arange(0, P)[:, None]
        left = n - split.to(tl.int64) * rows
        here = tl.minimum(tl.maximum(left, 0), rows).to(tl.float64)
        at, inside = split * d + columns[None, :], (split < splits) & (columns < d)[None, :]
        part_mean, part_m2 = (
            tl.load(means + at, mask=inside, other=0.0),
            tl.load(squares + at, mask=inside, other=0.0),
        )
        count, mean, m2 = merge(count, mean, m2, here, part_mean, part_m2)
    mean, m2 = merge_rows(count, mean, m2)
    tl.store(out + columns, mean, mask=columns < d)
    tl.store(out + d + columns, m2, mask=columns < d)


def tile_shape(d, along_rows):
    """(R, BC): four values a thread and each k, the longer side along the dim whose elements are
    neighbours in memory."""
    BC = min(triton.next_power_of_2(d), 4 if along_rows else 64)
    return 4 * THREADS // BC, BC


def moments_triton(x):
    """Count, mean (d,) and sum of squared deviations (d,) in float64 of the columns of x (n, d):
    fp32, fp16, bf16 or fp64, any strides. A nan or inf in a column makes its M2 nan."""
    if x.dtype not in TYPES:
        raise TypeError(
            f"moments of {x.dtype}: convert to one of {', '.join(map(str, TYPES))} first"
        )
    n, d = x.shape
    out = torch.zeros(2, d, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return n, *out
    R, BC = tile_shape(d, x.stride(0) < x.stride(1))
    blocks = triton.cdiv(d, BC)
    rows = K * R * triton.cdiv(triton.cdiv(n, K * R), max(PROGRAMS // blocks, 1))  # whole tiles
    splits = triton.cdiv(n, rows)
    parts = [
        torch.empty(splits, d, dtype=torch.float64, device=x.device) for _ in range(2)
    ]  # mean, M2
    bf16 = x.dtype == torch.bfloat16
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, whatever holds the tensors
        partial_kernel[(blocks, splits)](
            x, *parts, n, d, rows, *x.stride(), K=K, R=R, BC=BC, BF16=bf16, num_warps=THREADS // 32
        )
        BC = min(triton.next_power_of_2(d), 8)
        merge_kernel[(triton.cdiv(d, BC),)](
            *parts, out, n, d, rows, splits, P=512 // BC, BC=BC, num_warps=THREADS // 32
        )
    return n, out[0] + x[0].double(), out[1]


def compile_rows(arch):
    """For bench/compile.py: (name, kernel, signature, constexprs, arguments divisible by 16, warps,
    stages, needs a tensor-core op). `arch` changes nothing: one tile serves all."""
    sizes = dict.fromkeys(("n", "d", "rows"), "i32")
    warps = THREADS // 32
    for dtype in TYPES.values():
        pointers = {"x": f"*{dtype}", "means": "*fp64", "squares": "*fp64"}
        for name, along_rows, d, divisible in (
            ("wide", False, 1408, ["stride_row"]),
            ("odd", False, 14, []),
            ("columns", True, 14, []),
        ):
            R, BC = tile_shape(d, along_rows)
            fixed = {
                "K": K,
                "R": R,
                "BC": BC,
                "BF16": dtype == "bf16",
                "stride_row" if along_rows else "stride_column": 1,
            }
            free = {"stride_column" if along_rows else "stride_row": "i32"}
            signature = pointers | sizes | free
            yield (
                f"stats.partial {name}",
                partial_kernel,
                signature,
                fixed,
                [*pointers, "rows", *divisible],
                warps,
                3,
                False,
            )
    signature = {"means": "*fp64", "squares": "*fp64", "out": "*fp64"} | sizes | {"splits": "i32"}
    for BC in (4, 8):
        fixed = {"P": 512 // BC, "BC": BC}
        yield (
            "stats.merge",
            merge_kernel,
            signature,
            fixed,
            ["means", "squares", "out", "rows"],
            warps,
            3,
            False,
        )
