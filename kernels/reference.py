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
    ends = [min(start + block, q.shape[2]) for start in range(0, q.shape[2], block)]
    starts = [0, *ends[:-1]]
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j])
            for i, j in zip(starts, ends)
        ],
        dim=2,
    )


def low_rank_plain(x, drop, weight, bias, A, B, scale):
    """LoRA by its definition (arXiv 2106.09685): the layer, plus scale B A on (dropped out) x."""
    low_in = x if drop is None else drop
    low = F.linear(F.linear(low_in, A.to(x.dtype)), B.to(x.dtype))
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + scale * low


def rotate_pairs(x, cos, sin):
    """RoPE by its definition: y0 = x0 cos0 + x1 sin0, y1 = x1 cos1 + x0 sin1 for each pair of
    adjacent dims, the sign folded into sin (model.rope_tables). x (..., L, hd) keeps its dtype, the
    arithmetic is that of the tables. torch.compile makes one loop of it."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    (x0, x1), (cos0, cos1), (sin0, sin1) = (
        t.unflatten(-1, (-1, 2)).unbind(-1) for t in (wide, cos, sin)
    )
    y = (
        torch.addcmul(x0 * cos0, x1, sin0),
        torch.addcmul(x1 * cos1, x0, sin1),
    )  # rounded once, as in rotate_chunks
    return torch.stack(y, dim=-1).flatten(-2).to(x.dtype)


def rotate_chunks(x, cos, sin, numel=2**18):
    """`rotate_pairs` for eager mode: partners by shifted views, not by a copy; on a CPU so few
    tokens at a time that they stay in cache."""
    tokens = x.shape[-2]
    at_once = (
        max(1, numel * tokens // max(x.numel(), 1)) if x.device.type == "cpu" else max(tokens, 1)
    )
    from_right, from_left = sin.clone(), sin.clone()
    from_right[..., 1::2], from_left[..., ::2] = 0, 0
    from_right, from_left = from_right[..., :-1], from_left[..., 1:]
    out = torch.empty_like(x)
    for start in range(0, tokens, at_once):
        rows = slice(start, start + at_once)
        part = x[..., rows, :].to(torch.promote_types(x.dtype, cos.dtype))
        y = part * cos[..., rows, :]
        y[..., :-1].addcmul_(part[..., 1:], from_right[..., rows, :])
        y[..., 1:].addcmul_(part[..., :-1], from_left[..., rows, :])
        out[..., rows, :] = y
    return out


class Rotate(torch.autograd.Function):
    """Keeps the tables alone. Paired dims have different angles (Meta's quirk), so that backward is
    no rotation back but the transpose: dx0 = g0 cos0 + g1 sin1, dx1 = g1 cos1 + g0 sin0, the same
    map with the two sines exchanged. The tables get no gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (rotate_pairs if torch.compiler.is_compiling() else rotate_chunks)(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad, cos, sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)), None, None


def rope_plain(qk, cos, sin):
    """Rotated (q, k) of a pair or stack `qk` of two (B, nh, L, hd) of any strides; tables (L, hd),
    or what broadcasts against q."""
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
    values = (
        2**17 if x.device.type == "cpu" else 2**25
    )  # that stay in a core's cache: 10 times as fast as chunks of 65536 rows at d = 1408
    for rows in x.split(max(values // max(x.shape[1], 1), 16)):
        rows = rows.double()
        n, mean = len(rows), rows.mean(0)
        rows = rows - mean
        slip = rows.sum(0) / n  # what rounding left in the mean: zero in exact arithmetic
        total = merge_moments(total, (n, mean + slip, (rows**2).sum(0) - n * slip**2))
    return total


def check_finite(x, part):
    """part, the moments of x (n, d); raises ValueError where x has a nan or inf. They make M2 nan,
    so that only an error reads x again."""
    if part[2].isfinite().all():
        return part
    bad = (~x.isfinite()).sum(0)
    if not bad.any():
        raise ValueError(
            f"the squares of the values overflow float64: they reach {x.abs().max():.3g}"
        )
    columns = bad.nonzero().flatten().tolist()
    named = ", ".join(map(str, columns[:8])) + (
        f" and {len(columns) - 8} more" if len(columns) > 8 else ""
    )
    raise ValueError(
        f"{bad.sum()} of {x.numel():,} values are nan or inf, in columns {named} of {x.shape[1]}"
    )


def merge_over_ranks(part):
    """(n, mean, M2) of all ranks' rows together: gathered, then merged in rank order by every rank,
    so that all get the same bits."""
    n, mean, m2 = part

    # a count is exact in float64 up to 2**53
    mine = torch.stack([torch.full_like(mean, n), mean, m2])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return functools.reduce(merge_moments, [(int(p[0, 0]), p[1], p[2]) for p in parts])


def standard_errors(parts):
    """[(n, mean, M2)] of k recordings -> standard errors of the mean and of the std, both relative
    to the std, each (4,).

    Between recordings, not between steps: those of one recording resemble each other. Ratio
    estimators over clusters, linearised."""
    n = np.array([p[0] for p in parts], dtype=np.float64)[:, None]
    mean, m2 = (np.stack([p[i] for p in parts]) for i in (1, 2))
    centre = (n * mean).sum(0) / n.sum()
    squares = m2 + n * (mean - centre) ** 2  # around the common mean
    var = squares.sum(0) / n.sum()
    scale = np.where(var > 0, var, 1.0)  # a constant is known exactly
    factor = np.sqrt(len(n) / (len(n) - 1)) / n.sum() if len(n) > 1 else math.inf
    with np.errstate(invalid="ignore"):
        of_mean = factor * np.sqrt(((n * (mean - centre)) ** 2).sum(0) / scale)
        of_std = factor * np.sqrt(((squares - n * var) ** 2).sum(0)) / (2 * scale)
    return np.nan_to_num(of_mean, nan=math.inf), np.nan_to_num(of_std, nan=math.inf)
