"""Operations that have more than one implementation. reference.py says what they compute; `impl="auto"` picks by what was measured."""

import importlib.util

import torch
import torch.nn.functional as F

from .linear import ONEDNN, linear_onednn
from .reference import attention_dense, attention_prefix, merge_moments, moments_two_pass, standard_errors

__all__ = ["attention_impl", "block_causal_attention", "linear", "merge_moments", "moments", "standard_errors"]

ATTENTION = {"reference": attention_dense, "prefix": attention_prefix}
MOMENTS = {"two_pass": moments_two_pass}
LINEAR = {"blas": F.linear, "onednn": linear_onednn}
if importlib.util.find_spec("triton"):  # not on macOS
    from .attention import attention_triton, served

    ATTENTION["triton"] = attention_triton


def attention_impl(device, dtype, head_dim, block, length):
    """What impl="auto" means for (B, nh, length, head_dim) tensors."""
    if device.type == "cuda" and "triton" in ATTENTION and served(device, dtype, head_dim):
        return "triton"
    # time of reference over prefix, forward + backward on one CPU thread: 0.95 at 7 x 18 tokens (bf16 0.62), 1.32 at 7 x 66 (0.92),
    # 1.70 at 7 x 258 (1.32); forward alone 1.3 to 1.8.
    return "reference" if device.type == "cpu" and block < length <= 256 else "prefix"


def block_causal_attention(q, k, v, block, impl="auto"):
    """Attention over (B, nh, L, hd) where token i sees the keys j < (i // block + 1) * block: full inside a step, causal across steps.

    impl: "triton" (fused, CUDA), "prefix" (one unmasked call a step, any device), "reference" (dense mask), "auto" (`attention_impl`)."""
    if impl == "auto":
        impl = attention_impl(q.device, q.dtype, q.shape[3], block, q.shape[2])
    return pick(ATTENTION, impl)(q, k, v, block)


def moments(x, impl="auto"):
    """Count, mean and sum of squared deviations (float64) of the columns of x (n, d); merge parts with `merge_moments`."""
    return pick(MOMENTS, "two_pass" if impl == "auto" else impl)(x)


def linear(x, weight, bias, impl="auto"):
    """x (..., K) times weight (N, K) transposed plus bias (N,) -> (..., N)."""
    if impl == "auto":
        # below 2**26 products (rows x K x N) a convolution costs more to set up than it gains
        large = ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * len(weight) > 2**26
        impl = "onednn" if large and not torch.is_autocast_enabled("cpu") else "blas"
    return pick(LINEAR, impl)(x, weight, bias)


def pick(table, impl):
    if impl not in table:
        raise ValueError(f"impl={impl!r} is unknown, choose from: auto, {', '.join(table)}")
    return table[impl]
