"""The specification: what every faster kernel in this folder must compute, in plain PyTorch."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def attention_dense(q, k, v, block):
    """Softmax attention under the boolean mask of the definition. Builds L x L scores: for short sequences."""
    step = torch.arange(q.shape[2], device=q.device) // block
    return F.scaled_dot_product_attention(q, k, v, attn_mask=step[None, :] <= step[:, None])


def attention_prefix(q, k, v, block):
    """One unmasked attention per step over the keys up to its end: no mask, no wasted score, any backend."""
    ends = [min(start + block, q.shape[2]) for start in range(0, q.shape[2], block)]
    starts = [0, *ends[:-1]]
    return torch.cat([F.scaled_dot_product_attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j]) for i, j in zip(starts, ends)], dim=2)


def merge_moments(a, b):
    """(count, mean, M2) of the union of two disjoint sets of rows (Chan, Golub, LeVeque 1983)."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if n == 0:
        return a
    delta = mean_b - mean_a
    return n, mean_a + delta * (n_b / n), m2_a + m2_b + delta**2 * (n_a * n_b / n)


def moments_two_pass(x, chunk=65536):
    """Chunk by chunk: subtract the chunk's mean first, then square. E[x^2] - E[x]^2 would cancel where the mean is large."""
    zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    total = (0, zeros, zeros)
    for rows in x.split(chunk):
        rows = rows.double()
        n, mean = len(rows), rows.mean(0)
        rows = rows - mean
        slip = rows.sum(0) / n  # what rounding left in the mean: zero in exact arithmetic
        total = merge_moments(total, (n, mean + slip, (rows**2).sum(0) - n * slip**2))
    return total


def standard_errors(parts):
    """[(n, mean, M2)] of k recordings -> standard errors of the mean and of the std, both relative to the std, each (4,).

    Between recordings, not between steps: those of one recording resemble each other. Ratio estimators over clusters, linearised."""
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
