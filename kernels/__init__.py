"""Operations that have more than one implementation. reference.py says what they compute;
`impl="auto"` picks by what was measured."""

import importlib.util

import torch

from .linear import ONEDNN, linear_blas, linear_onednn
from .low_rank import low_rank_fused
from .reference import (
    attention_dense,
    attention_prefix,
    check_finite,
    low_rank_plain,
    merge_moments,
    merge_over_ranks,
    moments_two_pass,
    rope_plain,
    standard_errors,
)

__all__ = [
    "apply_rope",
    "attention_impl",
    "block_causal_attention",
    "chosen",
    "linear",
    "low_rank",
    "merge_moments",
    "merge_over_ranks",
    "moments",
    "standard_errors",
]

ATTENTION = {"reference": attention_dense, "prefix": attention_prefix}
MOMENTS = {"two_pass": moments_two_pass}
ROPE = {"plain": rope_plain}
LINEAR = {"blas": linear_blas, "onednn": linear_onednn}
LOW_RANK = {"plain": low_rank_plain, "fused": low_rank_fused}
if importlib.util.find_spec("triton"):  # not on macOS
    from .attention import attention_triton, runs_triton, served
    from .rope import TYPES, rope_triton
    from .stats import moments_triton

    ATTENTION["triton"], MOMENTS["triton"], ROPE["triton"] = (
        attention_triton,
        moments_triton,
        rope_triton,
    )


def attention_impl(device, dtype, head_dim, block, length):
    """What impl="auto" means for (B, nh, length, head_dim) tensors."""
    # fp32 is multiplied without tensor cores: PyTorch's kernels until a GPU has said otherwise
    if (
        device.type == "cuda"
        and "triton" in ATTENTION
        and dtype != torch.float32
        and served(device, dtype, head_dim)
    ):
        return "triton"
    # time of reference over prefix, forward + backward on one CPU thread: 0.95 at 7 x 18 tokens
    # (bf16 0.62), 1.32 at 7 x 66 (0.92), 1.70 at 7 x 258 (1.32); forward alone 1.3 to 1.8.
    return "reference" if device.type == "cpu" and block < length <= 256 else "prefix"


def moments_impl(device):
    return "triton" if "triton" in MOMENTS and runs_triton(device) else "two_pass"


def rope_impl(device, dtype):
    """Of a call that torch.compile does not see; it makes one loop of "plain"."""
    return "triton" if "triton" in ROPE and runs_triton(device) and dtype in TYPES else "plain"


def chosen(device, dtype, head_dim=0, block=0, length=0):
    """What "auto" means to a script, for it to print; attention for those that give its sizes, as
    to `attention_impl`."""
    found = {"attention": attention_impl(device, dtype, head_dim, block, length)} if length else {}
    found |= {"rope": rope_impl(device, dtype), "moments": moments_impl(device)}
    return "kernels: " + ", ".join(" ".join(pair) for pair in found.items())


def block_causal_attention(q, k, v, block, impl="auto"):
    """Attention over (B, nh, L, hd) where token i sees the keys j < (i // block + 1) * block: full
    inside a step, causal across steps.

    impl: "triton" (fused, CUDA), "prefix" (one unmasked call a step, any device), "reference"
    (dense mask), "auto" (`attention_impl`)."""
    if impl == "auto":
        impl = attention_impl(q.device, q.dtype, q.shape[3], block, q.shape[2])
    return pick(ATTENTION, impl)(q, k, v, block)


def moments(x, impl="auto"):
    """Count, mean and sum of squared deviations (float64) of the columns of x (n, d); merge parts
    with `merge_moments`. Raises ValueError that says how many values are nan or inf, and in which
    columns."""
    if impl == "auto":
        impl = moments_impl(x.device)
    return check_finite(x, pick(MOMENTS, impl)(x))


def apply_rope(qk, cos, sin, impl="auto"):
    """Rotated (q, k), in their dtype, of a pair or stack `qk` of two (B, nh, L, hd), by tables of
    model.rope_tables, (L, hd) or (masked) what broadcasts against q. impl: "triton" (one launch,
    CUDA, (L, hd)), "plain" (any device; torch.compile makes one loop of it)."""
    if impl == "auto":
        impl = (
            rope_impl(qk[0].device, qk[0].dtype)
            if cos.dim() == 2 and not torch.compiler.is_compiling()
            else "plain"
        )
    return pick(ROPE, impl)(qk, cos, sin)


def linear(x, weight, bias, impl="auto"):
    """x (..., K) times weight (N, K) transposed plus bias (N,) -> (..., N)."""
    if impl == "auto":
        # below 2**26 products (rows x K x N) a convolution costs more to set up than it gains
        large = (
            ONEDNN
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.numel() * len(weight) > 2**26
        )
        impl = "onednn" if large and not torch.is_autocast_enabled("cpu") else "blas"
    return pick(LINEAR, impl)(x, weight, bias)


def low_rank(x, drop, weight, bias, A, B, scale, impl="auto"):
    """x (n, K), frozen weight (N, K) and bias (N,), A (r, K), B (N, r) -> x W' + b + scale drop A'
    B', (n, N) in x's dtype; `drop` is x after dropout, or None for x itself. impl: "fused" (one
    autograd node), "plain"."""
    return pick(LOW_RANK, "fused" if impl == "auto" else impl)(x, drop, weight, bias, A, B, scale)


def pick(table, impl):
    if impl not in table:
        raise ValueError(f"impl={impl!r} is unknown, choose from: auto, {', '.join(table)}")
    return table[impl]
