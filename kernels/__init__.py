"""Operations that have more than one implementation.

reference.py says what they compute, `impl` names an implementation, and `impl="auto"` picks the one
that was fastest where it was measured."""

import importlib.util

import torch

from .linear import linear_blas, linear_impl, linear_onednn
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
    "describe_kernels",
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

# there is no Triton on macOS
if importlib.util.find_spec("triton"):
    from .attention import attention_triton, runs_triton, supports
    from .rope import TYPES, rope_triton
    from .stats import moments_triton

    ATTENTION["triton"] = attention_triton
    MOMENTS["triton"] = moments_triton
    ROPE["triton"] = rope_triton


def attention_impl(device, dtype, head_dim, block, length):
    """What impl="auto" means for (B, nh, length, head_dim) tensors."""
    # fp32 is multiplied without tensor cores, so it is left to PyTorch's kernels until a
    # measurement on a GPU shows that ours are faster
    has_triton = device.type == "cuda" and "triton" in ATTENTION
    if has_triton and dtype != torch.float32 and supports(device, dtype, head_dim):
        return "triton"

    # time of reference over prefix, forward + backward on one CPU thread: 0.95 at 7 x 18 tokens
    # (bf16 0.62), 1.32 at 7 x 66 (0.92), 1.70 at 7 x 258 (1.32); forward alone 1.3 to 1.8.
    # A single step needs no mask.
    if device.type == "cpu" and block < length <= 256:
        return "reference"
    return "prefix"


def moments_impl(device):
    """What impl="auto" means for a tensor on this device."""
    return "triton" if "triton" in MOMENTS and runs_triton(device) else "two_pass"


def rope_impl(device, dtype):
    """What impl="auto" means outside of torch.compile, which makes one loop of "plain"."""
    has_triton = "triton" in ROPE and runs_triton(device)
    return "triton" if has_triton and dtype in TYPES else "plain"


def describe_kernels(device, dtype, head_dim=0, block=0, length=0):
    """A line for scripts to print: what "auto" means for them. Attention is included if its sizes
    are given, as to `attention_impl`."""
    impls = {}
    if length:
        impls["attention"] = attention_impl(device, dtype, head_dim, block, length)
    impls["rope"] = rope_impl(device, dtype)
    impls["moments"] = moments_impl(device)
    return "kernels: " + ", ".join(f"{name} {impl}" for name, impl in impls.items())


def block_causal_attention(q, k, v, block, impl="auto"):
    """Attention over (B, nh, L, hd): full inside a step of `block` tokens, causal across steps.
    Token i sees the keys j < (i // block + 1) * block.

    impl: "triton" (fused, CUDA), "prefix" (one unmasked call a step, any device), "reference"
    (dense mask), "auto" (`attention_impl`)."""
    if impl == "auto":
        impl = attention_impl(q.device, q.dtype, q.shape[3], block, q.shape[2])
    return pick(ATTENTION, impl)(q, k, v, block)


def moments(x, impl="auto"):
    """Count, mean and sum of squared deviations of the columns of x (n, d), in float64. Merge parts
    with `merge_moments`. Raises ValueError if values are nan or inf, with their number and their
    columns."""
    if impl == "auto":
        impl = moments_impl(x.device)
    return check_finite(x, pick(MOMENTS, impl)(x))


def apply_rope(qk, cos, sin, impl="auto"):
    """Rotated (q, k), in their dtype. `qk` is a pair, or a stack of two (B, nh, L, hd); the tables
    are those of model.rope_tables: (L, hd), or for masked tokens what broadcasts against q.

    impl: "triton" (one launch, CUDA, tables (L, hd)), "plain" (any device; torch.compile makes one
    loop of it), "auto" (`rope_impl`)."""
    if impl == "auto":
        q = qk[0]
        can_choose = cos.dim() == 2 and not torch.compiler.is_compiling()
        impl = rope_impl(q.device, q.dtype) if can_choose else "plain"
    return pick(ROPE, impl)(qk, cos, sin)


def linear(x, weight, bias, impl="auto"):
    """x (..., K) times weight (N, K) transposed, plus bias (N,) -> (..., N). impl: "blas", "onednn"
    (a CPU in fp32), "auto" (`linear_impl`)."""
    if impl == "auto":
        impl = linear_impl(x, weight)
    return pick(LINEAR, impl)(x, weight, bias)


def low_rank(x, drop, weight, bias, A, B, scale, impl="auto"):
    """x (n, K), frozen weight (N, K) and bias (N,), A (r, K), B (N, r) -> (n, N) in x's dtype:
    x W' + b + scale drop A' B'. `drop` is x after dropout, or None for x itself.

    impl: "fused" (one autograd node, also "auto"), "plain"."""
    if impl == "auto":
        impl = "fused"
    return pick(LOW_RANK, impl)(x, drop, weight, bias, A, B, scale)


def pick(table, impl):
    """The implementation of this name."""
    if impl not in table:
        raise ValueError(f"impl={impl!r} is unknown, choose from: auto, {', '.join(table)}")
    return table[impl]
