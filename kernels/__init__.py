"""Two operations that have more than one implementation. reference.py says what they compute; `impl="auto"` picks by what was measured."""

from .reference import attention_dense, attention_prefix, merge_moments, moments_two_pass, standard_errors

__all__ = ["block_causal_attention", "merge_moments", "moments", "standard_errors"]

ATTENTION = {"dense": attention_dense, "prefix": attention_prefix}
MOMENTS = {"two_pass": moments_two_pass}


def block_causal_attention(q, k, v, block, impl="auto"):
    """Attention over (B, nh, L, hd) where token i sees the keys j < (i // block + 1) * block: full inside a step, causal across steps."""
    if impl == "auto":
        # time of dense over prefix, forward + backward on one CPU thread: 0.95 at 7 x 18 tokens (bf16 0.62), 1.32 at 7 x 66 (0.92),
        # 1.70 at 7 x 258 (1.32); forward alone 1.3 to 1.8. CUDA is not measured.
        impl = "dense" if q.device.type == "cpu" and block < q.shape[2] <= 256 else "prefix"
    return pick(ATTENTION, impl)(q, k, v, block)


def moments(x, impl="auto"):
    """Count, mean and sum of squared deviations (float64) of the columns of x (n, d); merge parts with `merge_moments`."""
    return pick(MOMENTS, "two_pass" if impl == "auto" else impl)(x)


def pick(table, impl):
    if impl not in table:
        raise ValueError(f"impl={impl!r} is unknown, choose from: auto, {', '.join(table)}")
    return table[impl]
