"""Block-causal attention, forward and backward, fused in Triton: FlashAttention-2 (arXiv
2307.08691) with a limit per query row.

Row i sees the keys j < (i // block + 1) * block. A tile of queries therefore runs over two ranges
of keys: those that all of its rows see, without a mask, and the few up to what its last row sees,
with one. Scores never leave the chip; no atomics, so that two runs are equal bit by bit. `python -m
bench.compile` compiles every row of the tile table without a GPU, `TRITON_INTERPRET=1 pytest
tests/test_attention.py` runs the kernels on a CPU."""

import math
import os

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# those between powers of two are computed as the next one, the rest of every row masked at the load
HEAD_DIMS = (32, 48, 64, 80, 88, 96, 112, 128, 256)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRET)  # numpy has no bf16: the interpreter would multiply bit patterns
GROUP = tl.constexpr(
    32
    # heads that run side by side: their keys and values fit in the L2 cache (17 MB at L = 2064, hd
    # = 64, 16 bit)
)
# rows of the backward's lse and delta are padded to this, so that their loads are wide and unmasked
PAD = 128

# (architecture, width of a head) -> rows, keys, warps, stages of the forward, dK/dV and dQ kernel.
# Chosen by bench/compile.py, no GPU timed them: no spill anywhere; on sm_90 and sm_100 two programs
# of the forward and of dQ share a multiprocessor up to hd = 64.
TILES = {
    (80, 32): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (80, 64): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    (80, 128): ((128, 64, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2)),
    (80, 256): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    (90, 32): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
    (90, 64): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
    (90, 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (90, 256): ((128, 64, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
    (100, 32): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
    (100, 64): ((128, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 3)),
    (100, 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (100, 256): ((128, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    # any architecture: up to two steps, where tiles of 128 would compute half as many scores again
    # as are needed ...
    ("short", 32): ((64, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2)),
    ("short", 64): ((64, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2)),
    ("short", 128): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
    ("short", 256): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    # ... and fp32, multiplied without tensor cores: TF32 keeps 11 bits, three of them 22 and round
    # every sum towards zero
    ("fp32", 32): ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("fp32", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("fp32", 128): ((32, 16, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
    ("fp32", 256): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
}


def delta_rows(width):
    """Rows of a tile of the delta kernel; more would spill where heads are widest."""
    return PAD if width <= 128 else PAD // 2


def tile_key(device, dtype, head_dim, length, block):
    """Which row of the table serves these inputs. sm_86, 89 and 120 have the instructions of sm_80,
    whose rows fit their shared memory too."""
    kind = 80
    if dtype == torch.float32:
        kind = "fp32"
    elif length <= 2 * block:
        kind = "short"
    elif device.type == "cuda":
        kind = {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)
    return kind, triton.next_power_of_2(head_dim)


def tiles(device, dtype, head_dim, length, block):
    """The row of the table for these inputs."""
    return TILES[tile_key(device, dtype, head_dim, length, block)]


def runs_triton(device):
    """Whether our Triton kernels run there: NVIDIA from compute capability 8.0 (bf16)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def supports(device, dtype, head_dim):
    """Whether attention_triton runs on these inputs: such a GPU, or anything in Triton's
    interpreter."""
    return (runs_triton(device) or INTERPRET) and dtype in DTYPES and head_dim in HEAD_DIMS


@triton.jit
def _dot(a, b, acc=None):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _place(tiles, heads):
    """(tile, batch * head) of this program: tile by tile over a group of heads, so that the longest
    tiles of a group start first."""
    group = tl.program_id(0) // (GROUP * tiles)
    rest = tl.program_id(0) % (GROUP * tiles)
    size = tl.minimum(GROUP, heads - group * GROUP)
    return rest // size, group * GROUP + rest % size


@triton.jit
def _limit(rows, block, L):
    return tl.minimum((rows // block + 1) * block, L)


@triton.jit
def _eights(stride, HD: tl.constexpr):
    """A stride that the compiler knows to be a multiple of eight: for heads of 88 it is seldom one
    of sixteen, which is all that Triton looks for, and rows would be read two bytes at a time."""
    if HD % 16 != 0:
        return stride // 8 * 8
    return stride


@triton.jit
def _base(X, head, nh, stride_b, stride_h, HD: tl.constexpr):
    batch, head = (head // nh).to(tl.int64), (head % nh).to(tl.int64)
    return X + batch * _eights(stride_b, HD) + head * _eights(stride_h, HD)


@triton.jit
def _pointers(X, first, stride, ROWS: tl.constexpr, HD: tl.constexpr, BD: tl.constexpr):
    stride = _eights(stride, HD)
    offsets = (
        tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BD)[None, :]
    )  # 32 bit: half the registers
    return X + tl.cast(first, tl.int64) * stride + offsets


@triton.jit
def _load(
    X, first, stride, L, ROWS: tl.constexpr, HD: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr
):
    """Rows first .. first + ROWS of a head, (ROWS, BD): zero after column HD and, where CHECK,
    after row L."""
    inside = tl.arange(0, BD)[None, :] < HD
    if CHECK:
        inside = inside & (first + tl.arange(0, ROWS)[:, None] < L)
    if CHECK or HD != BD:
        return tl.load(_pointers(X, first, stride, ROWS, HD, BD), mask=inside, other=0.0)
    return tl.load(_pointers(X, first, stride, ROWS, HD, BD))


@triton.jit
def _store(X, value, first, stride, L, ROWS: tl.constexpr, HD: tl.constexpr, BD: tl.constexpr):
    inside = (tl.arange(0, BD)[None, :] < HD) & (first + tl.arange(0, ROWS)[:, None] < L)
    tl.store(_pointers(X, first, stride, ROWS, HD, BD), value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _forward_range(acc, top, total, q, K, V, k_l, v_l, lo, hi, limit, L, scale,
                   HD: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    for n in range(lo, hi, BN):
        k = _load(K, n, k_l, L, BN, HD, BD, MASKED)
        v = _load(V, n, v_l, L, BN, HD, BD, MASKED)
        s = _dot(q, k.T)
        if MASKED:
            s = tl.where(n + tl.arange(0, BN)[None, :] < limit[:, None], s, float("-inf"))
        new = tl.maximum(
            top, tl.max(s, 1) * scale
        )  # finite from the first tile on: every row sees key 0
        p = tl.math.exp2(s * scale - new[:, None])
        shrink = tl.math.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new
    return acc, top, total


@triton.jit(do_not_specialize=["nh", "heads", "L", "block"])
def _forward(Q, K, V, OUT, LSE, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, nh, heads, L, block, scale,
             HD: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    tile, head = _place(tl.cdiv(L, BM), heads)
    first = (tl.cdiv(L, BM) - 1 - tile) * BM  # the last rows see the most keys
    rows = first + tl.arange(0, BM)
    limit = _limit(rows, block, L)
    seen_by_all = _limit(first, block, L) // BN * BN
    q = _load(_base(Q, head, nh, q_b, q_h, HD), first, q_l, L, BM, HD, BD, True)
    K, V = _base(K, head, nh, k_b, k_h, HD), _base(V, head, nh, v_b, v_h, HD)
    acc = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc, top, total = _forward_range(
        acc, top, total, q, K, V, k_l, v_l, 0, seen_by_all, limit, L, scale, HD, BD, BN, False
    )
    last = _limit(tl.minimum(first + BM, L) - 1, block, L)
    acc, top, total = _forward_range(
        acc, top, total, q, K, V, k_l, v_l, seen_by_all, last, limit, L, scale, HD, BD, BN, True
    )
    _store(_base(OUT, head, nh, o_b, o_h, HD), acc / total[:, None], first, o_l, L, BM, HD, BD)
    tl.store(LSE + head.to(tl.int64) * L + rows, top + tl.math.log2(total), mask=rows < L)


@triton.jit(do_not_specialize=["nh", "heads", "L"])
def _delta(OUT, DO, LSE, LSE_PAD, DELTA, o_b, o_h, o_l, do_b, do_h, do_l, nh, heads, L, padded,
           HD: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Row sums of dO * O, and the log-sum-exp, both padded; infinity makes every probability of a
    row that is not there zero."""
    tile, head = _place(padded // BM, heads)
    rows = tile * BM + tl.arange(0, BM)
    o = _load(_base(OUT, head, nh, o_b, o_h, HD), tile * BM, o_l, L, BM, HD, BD, True).to(
        tl.float32
    )
    do = _load(_base(DO, head, nh, do_b, do_h, HD), tile * BM, do_l, L, BM, HD, BD, True).to(
        tl.float32
    )
    lse = tl.load(LSE + head.to(tl.int64) * L + rows, mask=rows < L, other=float("inf"))
    tl.store(LSE_PAD + head.to(tl.int64) * padded + rows, lse)
    tl.store(DELTA + head.to(tl.int64) * padded + rows, tl.sum(o * do, 1))


@triton.jit
def _dkdv_range(dk, dv, k, v, Q, DO, LSE, DELTA, q_l, do_l, lo, hi, start, L, scale,
                HD: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    for m in range(lo, hi, BM):
        q = _load(Q, m, q_l, L, BM, HD, BD, True)
        rows = m + tl.arange(0, BM)
        s = (
            _dot(k, q.T) * scale
            # scores transposed, (keys, rows): p and ds are then left operands, which stay in
            # registers
        )
        if MASKED:
            s = tl.where(start[:, None] <= rows[None, :], s, float("-inf"))
        p = tl.math.exp2(s - tl.load(LSE + rows)[None, :])
        do = _load(DO, m, do_l, L, BM, HD, BD, True)
        dv = _dot(p.to(do.dtype), do, dv)
        ds = p * (_dot(v, do.T) - tl.load(DELTA + rows)[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["nh", "heads", "L", "block"])
def _dkdv(Q, K, V, DO, DK, DV, LSE, DELTA, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, d_b, d_h, d_l,
          nh, heads, L, padded, block, scale, softmax_scale,
          HD: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    tile, head = _place(tl.cdiv(L, BN), heads)  # the first keys are seen by the most rows
    first = tile * BN
    start = (
        (first + tl.arange(0, BN)) // block * block
    )  # key j is seen by the rows from the start of its step
    all_see = tl.cdiv((tl.minimum(first + BN, L) - 1) // block * block, BM) * BM
    k = _load(_base(K, head, nh, k_b, k_h, HD), first, k_l, L, BN, HD, BD, True)
    v = _load(_base(V, head, nh, v_b, v_h, HD), first, v_l, L, BN, HD, BD, True)
    Q, DO = _base(Q, head, nh, q_b, q_h, HD), _base(DO, head, nh, do_b, do_h, HD)
    LSE += head.to(tl.int64) * padded
    DELTA += head.to(tl.int64) * padded
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    lo = first // block * block // BM * BM
    dk, dv = _dkdv_range(
        dk, dv, k, v, Q, DO, LSE, DELTA, q_l, do_l, lo, all_see, start, L, scale, HD, BD, BM, True
    )
    dk, dv = _dkdv_range(
        dk, dv, k, v, Q, DO, LSE, DELTA, q_l, do_l, all_see, L, start, L, scale, HD, BD, BM, False
    )
    _store(_base(DK, head, nh, d_b, d_h, HD), dk * softmax_scale, first, d_l, L, BN, HD, BD)
    _store(_base(DV, head, nh, d_b, d_h, HD), dv, first, d_l, L, BN, HD, BD)


@triton.jit
def _dq_range(dq, q, do, lse, delta, K, V, k_l, v_l, lo, hi, limit, L, scale,
              HD: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    for n in range(lo, hi, BN):
        k = _load(K, n, k_l, L, BN, HD, BD, MASKED)
        s = _dot(q, k.T) * scale
        if MASKED:
            s = tl.where(n + tl.arange(0, BN)[None, :] < limit[:, None], s, float("-inf"))
        p = tl.math.exp2(s - lse[:, None])
        v = _load(V, n, v_l, L, BN, HD, BD, MASKED)
        ds = p * (_dot(do, v.T) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["nh", "heads", "L", "block"])
def _dq(Q, K, V, DO, DQ, LSE, DELTA, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, d_b, d_h, d_l,
        nh, heads, L, padded, block, scale, softmax_scale,
        HD: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    tile, head = _place(tl.cdiv(L, BM), heads)
    first = (tl.cdiv(L, BM) - 1 - tile) * BM
    rows = first + tl.arange(0, BM)
    limit = _limit(rows, block, L)
    seen_by_all = _limit(first, block, L) // BN * BN
    q = _load(_base(Q, head, nh, q_b, q_h, HD), first, q_l, L, BM, HD, BD, True)
    do = _load(_base(DO, head, nh, do_b, do_h, HD), first, do_l, L, BM, HD, BD, True)
    lse = tl.load(LSE + head.to(tl.int64) * padded + rows)
    delta = tl.load(DELTA + head.to(tl.int64) * padded + rows)
    K, V = _base(K, head, nh, k_b, k_h, HD), _base(V, head, nh, v_b, v_h, HD)
    dq = tl.zeros((BM, BD), tl.float32)
    dq = _dq_range(
        dq, q, do, lse, delta, K, V, k_l, v_l, 0, seen_by_all, limit, L, scale, HD, BD, BN, False
    )
    last = _limit(tl.minimum(first + BM, L) - 1, block, L)
    dq = _dq_range(
        dq, q, do, lse, delta, K, V, k_l, v_l, seen_by_all, last, limit, L, scale, HD, BD, BN, True
    )
    _store(_base(DQ, head, nh, d_b, d_h, HD), dq * softmax_scale, first, d_l, L, BM, HD, BD)


def _empty(x):
    """Like x (B, nh, L, hd), laid out as (B, L, nh, hd): the `transpose(1, 2).flatten(2)` that
    follows attention is then a view."""
    B, nh, L, hd = x.size()
    return x.new_empty(B, L, nh, hd).transpose(1, 2)


def _dense_rows(*tensors):
    """The tensors, or copies: rows without gaps, and for heads of 88 strides that are multiples of
    eight (`_eights`)."""
    dense = []
    for x in tensors:
        unit = 1 if x.shape[-1] % 16 == 0 else 8
        fits = x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:3])
        dense.append(x if fits else x.contiguous())
    return dense


def _strides(*tensors):
    return [s for x in tensors for s in x.stride()[:3]]


@torch.library.custom_op("nanojepa::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    B, nh, L, hd = q.size()
    q, k, v = _dense_rows(q, k, v)
    o = _empty(q)
    lse = q.new_empty(B, nh, L, dtype=torch.float32)
    forward, _, _ = tiles(q.device, q.dtype, hd, L, block)
    BM, BN, warps, stages = tuple(forward)
    width = triton.next_power_of_2(hd)
    scale = hd**-0.5 * math.log2(math.e)
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(L, BM) * B * nh,)](
            q, k, v, o, lse, *_strides(q, k, v, o), nh, B * nh, L, min(block, L), scale, hd, width, BM, BN,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return o, lse


@_attention.register_fake
def _(q, k, v, block):
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_flop_formula(torch.ops.nanojepa.attention)
def flops(q_shape, k_shape, v_shape, block, out_shape=None):
    """Two products for every pair of tokens that the mask lets through."""
    L = q_shape[2]
    pairs = 0
    for start in range(0, L, block):
        end = min(start + block, L)
        pairs += (end - start) * end
    return 4 * q_shape[0] * q_shape[1] * q_shape[3] * pairs


@torch.library.custom_op("nanojepa::attention_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, nh, L, hd = q.size()
    do, q, k, v, o = _dense_rows(do, q, k, v, o)
    dq = _empty(q)
    dk = _empty(q)
    dv = _empty(q)
    padded = triton.cdiv(L, PAD) * PAD
    lse_pad, delta = lse.new_empty(2, B * nh, padded).unbind()
    _, for_dkdv, for_dq = tiles(q.device, q.dtype, hd, L, block)
    BM, BN, warps, stages = tuple(for_dkdv)
    BM_q, BN_q, warps_q, stages_q = tuple(for_dq)
    width = triton.next_power_of_2(hd)
    scale = hd**-0.5 * math.log2(math.e)
    shared = (
        *_strides(q, k, v, do, dq),
        nh,
        B * nh,
        L,
        padded,
        min(block, L),
        scale,
        hd**-0.5,
        hd,
        width,
    )
    with torch.cuda.device_of(q):
        rows = delta_rows(width)
        _delta[(padded // rows * B * nh,)](
            o, do, lse.contiguous(), lse_pad, delta, *_strides(o, do), nh, B * nh, L, padded, hd, width, rows, num_warps=8
        )  # fmt: skip
        _dkdv[(triton.cdiv(L, BN) * B * nh,)](
            q, k, v, do, dk, dv, lse_pad, delta, *shared, BM, BN, num_warps=warps, num_stages=stages
        )  # fmt: skip
        _dq[(triton.cdiv(L, BM_q) * B * nh,)](
            q, k, v, do, dq, lse_pad, delta, *shared, BM_q, BN_q, num_warps=warps_q, num_stages=stages_q
        )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, block):
    return _empty(q), _empty(q), _empty(q)


def _setup_context(ctx, inputs, output):
    *qkv, ctx.block = inputs
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx, do, dlse):
    return (*_attention_backward(do, *ctx.saved_tensors, ctx.block), None)


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention_triton(q, k, v, block):
    """Attention over (B, nh, L, hd), any strides, where token i sees the keys j < (i // block + 1)
    * block; gradients for all three.

    fp32, fp16 or bf16 (sums in fp32), hd one of HEAD_DIMS; under autocast the inputs are cast as for
    SDPA. Returns (B, nh, L, hd) in the memory order (B, L, nh, hd). Raises ValueError for
    anything that the kernels do not compute."""
    if q.dim() != 4 or q.numel() == 0 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v of shapes {[tuple(x.shape) for x in (q, k, v)]}: give three non-empty (B, nh,"
            " L, hd) of one shape"
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"head dim {q.shape[-1]} is not one of {HEAD_DIMS}: change the number of heads, or use"
            " impl='prefix'"
        )
    if not q.device == k.device == v.device or not supports(q.device, torch.float32, q.shape[-1]):
        where = ", ".join(str(x.device) for x in (q, k, v))
        raise ValueError(
            f"q, k, v on {where}: needs one NVIDIA GPU of compute capability 8.0 or more; elsewhere"
            " use impl='prefix'"
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q = q.to(dtype)
        k = k.to(dtype)
        v = v.to(dtype)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}: cast all three to one of"
            f" {', '.join(map(str, DTYPES))}"
        )
    if block < 1:
        raise ValueError(f"block={block}: tokens per step, at least 1")
    return _attention(q, k, v, block)[0]


def compile_rows(arch):
    """What bench/compile.py compiles for sm_`arch`, one tuple for every kernel, tile row, dtype and
    head dim: (name, kernel, {argument: type}, {constexpr: value}, arguments that are multiples of
    16, warps, stages, needs tensor cores). No kernel is specialised for a length: what is compiled
    here is what runs for every L and block."""
    for (kind, width), (forward, dkdv, dq) in TILES.items():
        if kind not in (arch, "short", "fp32"):
            continue
        kernels = [(_forward, forward), (_dkdv, dkdv), (_dq, dq)]
        if kind != "short":
            kernels.append((_delta, (delta_rows(width), 0, 8, 3)))
        for dtype in ("fp32",) if kind == "fp32" else ("bf16", "fp16"):
            for hd in (h for h in HEAD_DIMS if triton.next_power_of_2(h) == width):
                for kernel, (BM, BN, warps, stages) in kernels:
                    sizes = {
                        k: v
                        for k, v in {"HD": hd, "BD": width, "BM": BM, "BN": BN}.items()
                        if k in kernel.arg_names
                    }
                    types = dict.fromkeys((a for a in kernel.arg_names if a not in sizes), "i32")
                    types |= {a: f"*{dtype}" for a in types if a.isupper() and a != "L"}
                    types |= {a: "*fp32" for a in types if a in ("LSE", "LSE_PAD", "DELTA")}
                    types |= {a: "fp32" for a in types if a.endswith("scale")}
                    whole = [
                        a for a in types if types[a] != "fp32" and a not in kernel.do_not_specialize
                    ]
                    if hd % 16:
                        whole = [a for a in whole if not a.endswith("_h")]
                    needs = dtype != "fp32" and kernel is not _delta
                    yield (
                        f"attention.{kernel.__name__}",
                        kernel,
                        types,
                        sizes,
                        whole,
                        warps,
                        stages,
                        needs,
                    )
