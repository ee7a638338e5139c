"""Triton RoPE of q and k in one launch, forward and backward: the tables are read once for all
heads, nothing but them is kept."""

import torch
import triton
import triton.language as tl

TILE = 2048  # values of a tile
WARPS = 4
PROGRAMS = 1024  # programs wanted before one takes several heads
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def rotated(x, cos0, cos1, sin0, sin1, rows: tl.constexpr, width: tl.constexpr):
    x0, x1 = tl.split(tl.reshape(x.to(tl.float32), (rows, width // 2, 2)))
    return tl.reshape(tl.join(x0 * cos0 + x1 * sin0, x1 * cos1 + x0 * sin1), (rows, width))


@triton.jit(do_not_specialize=["nh", "L", "groups"])
def rope_kernel(
    q, k, cos, sin, q_out, k_out, q_b, q_h, q_l, k_b, k_h, k_l, nh, L, groups,
    hd: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, transpose: tl.constexpr,
):  # fmt: skip
    """`rows` tokens of one clip, every `groups`-th head: q, k (B, nh, L, hd) by strides -> q_out,
    k_out, contiguous."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    dim = tl.arange(0, width)[None, :]
    inside = (row < L) & (dim < hd)
    table = row * hd + dim
    cos0, cos1 = tl.split(
        tl.reshape(tl.load(cos + table, mask=inside, other=0.0), (rows, width // 2, 2))
    )
    sin0, sin1 = tl.split(
        tl.reshape(tl.load(sin + table, mask=inside, other=0.0), (rows, width // 2, 2))
    )
    if transpose:
        sin0, sin1 = sin1, sin0
    b = (tl.program_id(1) // groups).to(tl.int64)
    row = row.to(tl.int64)
    for h in range(tl.program_id(1) % groups, nh, groups):
        out = (b * nh + h) * L * hd + table
        x = tl.load(
            q + b * q_b + tl.cast(h, tl.int64) * q_h + row * q_l + dim, mask=inside, other=0.0
        )
        tl.store(
            q_out + out,
            rotated(x, cos0, cos1, sin0, sin1, rows, width).to(q_out.dtype.element_ty),
            mask=inside,
        )
        x = tl.load(
            k + b * k_b + tl.cast(h, tl.int64) * k_h + row * k_l + dim, mask=inside, other=0.0
        )
        tl.store(
            k_out + out,
            rotated(x, cos0, cos1, sin0, sin1, rows, width).to(k_out.dtype.element_ty),
            mask=inside,
        )


@torch.library.custom_op("nanojepa::rope", mutates_args=())
def rope_op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    B, nh, L, hd = q.size()
    if (
        q.shape != k.shape
        or q.dtype != k.dtype
        or q.dtype not in TYPES
        or cos.shape != (L, hd)
        or sin.shape != (L, hd)
        or hd % 2
    ):
        raise ValueError(f"q {q.shape} {q.dtype} and k {k.shape} {k.dtype} must be alike, in {[*TYPES]}, and have cos and sin tables of "
                         f"({L}, {hd}), hd even: these are {cos.shape} and {sin.shape}")  # fmt: skip
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if q.numel():
        width = triton.next_power_of_2(hd)
        blocks = triton.cdiv(L, TILE // width)
        groups = min(nh, triton.cdiv(PROGRAMS, blocks * B))
        with torch.cuda.device_of(
            q
        ):  # Triton launches on the current GPU, whatever holds the tensors
            rope_kernel[(blocks, B * groups)](
                q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], nh, L, groups,
                hd=hd, rows=TILE // width, width=width, transpose=transpose, num_warps=WARPS,
            )  # fmt: skip
    return q_out, k_out


@rope_op.register_fake
def _(q, k, cos, sin, transpose):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def keep_tables(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.transpose = inputs[4]


def backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    return *rope_op(dq, dk, cos, sin, not ctx.transpose), None, None, None


rope_op.register_autograd(backward, setup_context=keep_tables)


def rope_triton(qk, cos, sin):
    """Rotated (q, k), contiguous and in their dtype, of a pair or a stack `qk` of two (B, nh, L,
    hd) of any strides; tables (L, hd) as model.rope_tables makes them. y0 = x0 cos0 + x1 sin0, y1 =
    x1 cos1 + x0 sin1 for each pair of dims, computed in fp32.

    Paired dims have different angles (Meta's quirk), so that the map is not orthogonal and its
    gradient is no rotation back but the transpose: dx0 = g0 cos0 + g1 sin1, dx1 = g1 cos1 + g0
    sin0, the same map with the two sines exchanged. The tables get no gradient."""
    q, k = qk
    return rope_op(q, k, cos, sin, False)


def compile_rows(arch):
    """For bench/compile.py: (name, kernel, signature, constexprs, arguments divisible by 16, warps,
    stages, needs a tensor-core op). `arch` changes nothing: one tile serves all."""
    strides = ["q_b", "q_h", "q_l", "k_b", "k_h", "k_l"]
    for dtype in TYPES.values():
        pointers = {
            "q": f"*{dtype}",
            "k": f"*{dtype}",
            "cos": "*fp32",
            "sin": "*fp32",
            "q_out": f"*{dtype}",
            "k_out": f"*{dtype}",
        }
        signature = pointers | dict.fromkeys([*strides, "nh", "L", "groups"], "i32")
        for hd, transpose in ((64, False), (64, True), (80, True), (128, True)):
            width = triton.next_power_of_2(hd)
            fixed = {"hd": hd, "rows": TILE // width, "width": width, "transpose": transpose}
            yield "rope", rope_kernel, signature, fixed, [*pointers, *strides], WARPS, 3, False
