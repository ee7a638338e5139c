"""The specification: what every faster kernel in this folder must compute, in plain PyTorch."""

import functools
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


def attention_dense(q, k, v, block):
    """Softmax attention under the boolean mask of the definition. Builds L x L scores: for short
    sequences."""
    step = torch.arange(q.shape[2], device=q.device) // block
    return F.scaled_dot_product_attention(q, k, v, attn_mask=step[None, :] <= step[:, None])


def attention_prefix(q, k, v, block):
    """One unmasked attention per step over the keys up to its end: no mask, no wasted score, any
    backend."""
    length = q.shape[2]
    steps = []
    for start in range(0, length, block):
        end = min(start + block, length)
        steps.append(
            F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        )
    return torch.cat(steps, dim=2)


def low_rank_plain(x, drop, weight, bias, A, B, scale):
    """LoRA by its definition (arXiv 2106.09685): the layer, plus scale B A on (dropped out) x."""
    low_in = x if drop is None else drop
    low = F.linear(F.linear(low_in, A.to(x.dtype)), B.to(x.dtype))
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + scale * low


def rotate_pairs(x, cos, sin):
    """RoPE by its definition: y0 = x0 cos0 + x1 sin0 and y1 = x1 cos1 + x0 sin1 for each pair of
    adjacent dims. The sign is folded into sin (model.rope_tables).

    x (..., L, hd) keeps its dtype; the arithmetic is done in that of the tables. torch.compile
    makes one loop of it."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    x0, x1 = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos0, cos1 = cos.unflatten(-1, (-1, 2)).unbind(-1)
    sin0, sin1 = sin.unflatten(-1, (-1, 2)).unbind(-1)

    # addcmul rounds once, as in rotate_chunks
    y0 = torch.addcmul(x0 * cos0, x1, sin0)
    y1 = torch.addcmul(x1 * cos1, x0, sin1)
    return torch.stack([y0, y1], dim=-1).flatten(-2).to(x.dtype)


def rotate_chunks(x, cos, sin, numel=2**18):
    """`rotate_pairs` for eager mode. The other dim of each pair comes from a shifted view, not from
    a copy. On a CPU, few enough tokens are rotated at a time to stay in cache."""
    tokens = x.shape[-2]
    chunk = max(tokens, 1)
    if x.device.type == "cpu":
        chunk = max(1, numel * tokens // max(x.numel(), 1))

    # the even dims of a pair take their right neighbour, the odd ones their left
    from_right = sin.clone()
    from_right[..., 1::2] = 0
    from_right = from_right[..., :-1]
    from_left = sin.clone()
    from_left[..., ::2] = 0
    from_left = from_left[..., 1:]

    out = torch.empty_like(x)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        part = x[..., rows, :].to(torch.promote_types(x.dtype, cos.dtype))
        y = part * cos[..., rows, :]
        y[..., :-1].addcmul_(part[..., 1:], from_right[..., rows, :])
        y[..., 1:].addcmul_(part[..., :-1], from_left[..., rows, :])
        out[..., rows, :] = y
    return out


class Rotate(torch.autograd.Function):
    """Keeps nothing but the tables for the backward pass.

    Paired dims have different angles (Meta's quirk), so backward is not the rotation back, but the
    transpose: dx0 = g0 cos0 + g1 sin1 and dx1 = g1 cos1 + g0 sin0, the same map with the two sines
    exchanged. The tables get no gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        rotate = rotate_pairs if torch.compiler.is_compiling() else rotate_chunks
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        exchanged = sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return Rotate.apply(grad, cos, exchanged), None, None


def rope_plain(qk, cos, sin):
    """Rotated (q, k). `qk` is a pair, or a stack of two (B, nh, L, hd), of any strides; the tables
    are (L, hd), or what broadcasts against q."""
    q, k = qk
    return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)


def merge_moments(a, b):
    """(count, mean, M2) of the union of two disjoint sets of rows (Chan, Golub, LeVeque 1983)."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if n == 0:
        return a
    delta = mean_b - mean_a
    return n, mean_a + delta * (n_b / n), m2_a + m2_b + delta**2 * (n_a * n_b / n)


def moments_two_pass(x):
    """Chunk by chunk: subtract the chunk's mean first, then square. E[x^2] - E[x]^2 would cancel
    where the mean is large."""
    zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    total = (0, zeros, zeros)

    # a chunk stays in a core's cache: 10 times as fast as chunks of 65536 rows at d = 1408
    values = 2**17 if x.device.type == "cpu" else 2**25
    for rows in x.split(max(values // max(x.shape[1], 1), 16)):
        rows = rows.double()
        n = len(rows)
        mean = rows.mean(0)
        rows = rows - mean
        slip = rows.sum(0) / n  # the rounding error of the mean: zero in exact arithmetic
        m2 = (rows**2).sum(0) - n * slip**2
        total = merge_moments(total, (n, mean + slip, m2))
    return total


def check_finite(x, part):
    """Returns `part`, the moments of x (n, d), or raises ValueError if x contains nan or inf."""
    # nan and inf make M2 nan, so x is read again only for an error
    if part[2].isfinite().all():
        return part
    bad = (~x.isfinite()).sum(0)
    if not bad.any():
        raise ValueError(
            f"the squares of the values overflow float64: they reach {x.abs().max():.3g}"
        )

    columns = bad.nonzero().flatten().tolist()
    named = ", ".join(map(str, columns[:8]))
    if len(columns) > 8:
        named += f" and {len(columns) - 8} more"
    raise ValueError(
        f"{bad.sum()} of {x.numel():,} values are nan or inf, in columns {named} of {x.shape[1]}"
    )


def merge_over_ranks(part):
    """(n, mean, M2) of all ranks' rows together, or `part` itself where there are no ranks. Every
    rank gathers all parts and merges them in rank order, so all get the same bits."""
    if not dist.is_initialized():
        return part

    # a count is exact in float64 up to 2**53
    count = torch.full_like(part[1], part[0])
    packed = torch.stack([count, part[1], part[2]])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, packed)
    return functools.reduce(merge_moments, [(int(p[0, 0]), p[1], p[2]) for p in gathered])


def standard_errors(parts):
    """[(n, mean, M2)] of k recordings -> standard errors of the mean and of the std, both relative
    to the std, each (4,).

    They compare recordings, not steps, because steps of one recording resemble each other. Ratio
    estimators over clusters, linearised."""
    n = np.array([p[0] for p in parts], dtype=np.float64)[:, None]
    mean = np.stack([p[1] for p in parts])
    m2 = np.stack([p[2] for p in parts])

    # squares around the common mean; a constant is known exactly
    centre = (n * mean).sum(0) / n.sum()
    squares = m2 + n * (mean - centre) ** 2
    var = squares.sum(0) / n.sum()
    scale = np.where(var > 0, var, 1.0)

    # one recording says nothing about how recordings differ
    factor = math.inf
    if len(n) > 1:
        factor = np.sqrt(len(n) / (len(n) - 1)) / n.sum()
    with np.errstate(invalid="ignore"):
        of_mean = factor * np.sqrt(((n * (mean - centre)) ** 2).sum(0) / scale)
        of_std = factor * np.sqrt(((squares - n * var) ** 2).sum(0)) / (2 * scale)
    return np.nan_to_num(of_mean, nan=math.inf), np.nan_to_num(of_std, nan=math.inf)
