"""The Triton moments and RoPE against float64, and moments over ranks: in Triton's interpreter on a
CPU, or on a GPU.

TRITON_INTERPRET=1 pytest tests/test_stats.py      # Triton reads the variable when a kernel is
imported: a process of its own"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 pytest tests/test_stats.py", allow_module_level=True
    )

from kernels import merge_moments, moments, rope, stats  # noqa: E402
from kernels.reference import moments_two_pass, rope_plain, rotate_pairs  # noqa: E402
from kernels.rope import rope_op, rope_triton  # noqa: E402
from kernels.stats import moments_triton  # noqa: E402
from model import grid_positions, rope_tables  # noqa: E402

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
ROPES = {"plain": rope_plain, "triton": rope_triton}


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(DEVICE, dtype)


def same(got, expected, rtol):
    assert got[0] == expected[0]
    torch.testing.assert_close(
        torch.stack(got[1:]), torch.stack(expected[1:]), rtol=rtol, atol=1e-13
    )


# --- moments ---


@pytest.mark.parametrize("mean, rtol", [(0.0, 1e-14), (1e4, 1e-13), (1e9, 2e-9)])
def test_moments_survive_a_large_mean(mean, rtol, monkeypatch):
    """Catches E[x^2] - E[x]^2, a running mean that loses digits from tile to tile, tiles skipped or
    merged with wrong weights."""

    # of 29 and 30 tiles, the last one not full
    monkeypatch.setattr(stats, "PROGRAMS", 2)
    x = normal(60_001, 3) + mean

    # what the rounding of x left of the noise
    exact = x - mean
    n, got_mean, m2 = moments_triton(x)
    assert n == len(x)
    torch.testing.assert_close(
        got_mean - mean, exact.mean(0), rtol=0, atol=max(1e-15, 2.3e-16 * mean)
    )
    torch.testing.assert_close(m2, ((exact - exact.mean(0)) ** 2).sum(0), rtol=rtol, atol=0)


def test_second_pass_is_corrected():
    """Catches the rounding of a tile's mean left in M2: at 1e9 it is half a unit of 1.2e-7, no
    longer small beside a spread of 1e-6."""
    exact = (normal(20_000, 2) * 1e-6 + 5e-8 + 1e9) - 1e9
    _, _, m2 = moments_triton(exact + 1e9)
    torch.testing.assert_close(m2, ((exact - exact.mean(0)) ** 2).sum(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, d", [(1, 5), (3, 1), (517, 65), (4097, 4)])
def test_moments_of_any_shape_and_dtype(n, d, dtype):
    """Catches rows or columns beyond the end that are counted (their zeros move the mean of 5), and
    sums in the dtype of the data."""
    x = (normal(n, d) * 3 + 5).to(dtype)
    same(moments_triton(x), moments_two_pass(x), 1e-12)


def test_moments_of_views():
    """Catches an offset that takes x for contiguous: steps in rows and columns, a transpose,
    reversed memory order, one row repeated."""
    base = (normal(200, 90) + 2).float()
    for x in (
        base[::3, 1::7],
        base.T,
        base.T[5:, 10:150],
        base.unflatten(1, (3, 30))[:, 1],
        base[7].expand(1000, 90),
        base[:, :1],
    ):
        same(moments_triton(x), moments_two_pass(x.contiguous()), 1e-12)


def test_moments_of_nothing():
    """Catches 0/0 of an empty part (a rank without shards), which would turn the merged result into
    nan."""
    empty = moments_triton(torch.empty(0, 4, device=DEVICE))
    assert empty[0] == 0 and not torch.stack(empty[1:]).any()
    x = normal(100, 4)
    same(merge_moments(empty, moments_triton(x)), moments_two_pass(x), 1e-13)
    assert moments_triton(torch.empty(7, 0, device=DEVICE))[0] == 7


def test_moments_merge_to_those_of_the_whole():
    """Catches a wrong pivot: parts with means far apart, cut where no tile ends."""
    x = (
        normal(5000, 3) * 2
        + torch.linspace(1e6, 3e6, 5000, device=DEVICE, dtype=torch.float64)[:, None]
    )
    whole = moments_triton(x)
    for cut in (0, 1, 1023, 4999):
        same(merge_moments(moments_triton(x[:cut]), moments_triton(x[cut:])), whole, 1e-12)


def test_moments_are_repeatable_and_merge_many_programs(monkeypatch):
    """Catches partial results in the order in which programs end, partials that were never written,
    and merge_kernel's second round."""

    # tiles of 8 rows: 138 programs, merge_kernel takes 128 at a time
    monkeypatch.setattr(stats, "tile_shape", lambda d, along_rows: (1, 4))
    x = normal(1100, 4) + 100
    first = moments_triton(x)

    # likely what the second run's partials get
    poison = torch.full((2, 138, 4), torch.nan, dtype=torch.float64, device=DEVICE)
    del poison
    second = moments_triton(x)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    same(first, moments_two_pass(x), 1e-12)


@pytest.mark.parametrize("impl", ["two_pass", "triton"])
def test_values_that_are_not_finite_are_named(impl):
    """Catches a nan, or an infinity in the last row, that passes into a scaler, or an error that
    leaves one searching for the column."""
    x = normal(2000, 12).float()
    x[3, 2] = x[1500, 2] = torch.nan
    x[1999, 7] = -torch.inf
    with pytest.raises(
        ValueError, match="^3 of 24,000 values are nan or inf, in columns 2, 7 of 12$"
    ):
        moments(x, impl=impl)
    with pytest.raises(ValueError, match="8 more"):
        moments(torch.full((1, 16), torch.inf, device=DEVICE), impl=impl)
    with pytest.raises(ValueError, match="overflow float64: they reach 1e\\+200"):
        moments(torch.tensor([[1e200], [0.0]], device=DEVICE, dtype=torch.float64), impl=impl)


def test_moments_refuse_integers():
    """Catches integer data that Triton would read as another type."""
    with pytest.raises(TypeError, match="int64"):
        moments_triton(torch.ones(3, 3, dtype=torch.int64, device=DEVICE))


RANKS = """
import sys, torch, torch.distributed as dist
from kernels import merge_over_ranks, moments
dist.init_process_group("gloo")
x = torch.load(sys.argv[1])
rank = dist.get_rank()
rows = [x[:300], x[300:]][rank]
both, first = (merge_over_ranks(moments(part)) for part in (rows, rows[:0] if rank else rows))
torch.save([both, first], sys.argv[2] + str(rank))
dist.destroy_process_group()
"""


def test_two_processes_get_the_moments_of_all_rows(tmp_path):
    """Catches ranks that merge their own part first and so differ in the last bit, and a rank
    without rows that poisons the others."""

    # means near 0: merging them is exact far less often than at 1e6
    x = normal(1000, 64).cpu() * 7
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "ranks.py"),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [*command, str(tmp_path / "x.pt"), str(tmp_path / "out")],
        check=True,
        env=environment,
        timeout=120,
    )
    zero, one = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    for a, b, rows in zip(zero, one, (x, x[:300])):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        same(a, moments_two_pass(rows), 1e-12)


# --- RoPE ---


def tables(L, hd):
    """Angles as far apart as those of 32 steps of 16 x 16 patches."""
    pos = grid_positions(32, 16, 16).view(-1, 3)
    return [t.to(DEVICE) for t in rope_tables(pos[torch.linspace(0, len(pos) - 1, L).long()], hd)]


def fused(B, nh, L, hd, dtype=torch.float32):
    """What nn.Linear(dim, 3 * dim) gives: (B, L, 3, nh, hd)."""
    return normal(B, L, 3, nh, hd, dtype=dtype).requires_grad_()


def rotated(apply, qkv, cos, sin):
    """(q, k, gradient of qkv) for random output gradients."""
    q, k = apply([x.transpose(1, 2) for x in qkv.unbind(2)[:2]], cos, sin)
    grads = [normal(*x.shape, seed=seed).to(x.dtype) for seed, x in enumerate((q, k), start=1)]
    return q.detach(), k.detach(), *torch.autograd.grad((q, k), qkv, grads)


def definition(qk, cos, sin):
    """The formula of the paper's code, element by element: no view, no table trick, gradients by
    autograd."""
    return [
        torch.stack(
            [
                x[..., i] * cos[:, i] + (x[..., i + 1] if i % 2 == 0 else x[..., i - 1]) * sin[:, i]
                for i in range(x.shape[-1])
            ],
            -1,
        )
        for x in qk
    ]


@pytest.mark.parametrize("impl", ROPES)
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(
    "B, nh, L, hd", [(2, 3, 61, 64), (1, 2, 33, 20), (1, 1, 40, 80), (1, 2, 17, 128), (1, 1, 1, 6)]
)
def test_rope_against_float64(impl, dtype, limit, B, nh, L, hd):
    """Catches a backward that rotates back (the map is not orthogonal), a sine on the wrong side,
    bf16 arithmetic, and head dims that are no power of two reading the next head."""
    qkv = fused(B, nh, L, hd, dtype)
    (cos, sin) = tables(L, hd)
    exact = rotated(definition, qkv.detach().double().requires_grad_(), cos.double(), sin.double())
    for got, expected in zip(rotated(ROPES[impl], qkv, cos, sin), exact):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= limit * expected.norm()


def test_rope_gradient_is_the_transpose():
    """Catches a formula that is right for true rotations only: <R x, g> = <x, R' g> for tables
    whose paired angles differ."""
    cos, sin = tables(40, 64)
    assert (cos[:, ::2] - cos[:, 1::2]).abs().max() > 1
    x = normal(1, 2, 40, 64).float()
    g = normal(1, 2, 40, 64, seed=1).float()
    forward, back = (
        rope_op(a, a, cos, sin, transpose)[0].double() for a, transpose in ((x, False), (g, True))
    )
    assert (forward * g).sum().item() == pytest.approx((x * back).sum().item(), rel=1e-5)


@pytest.mark.parametrize("impl", ROPES)
def test_rope_reads_any_strides(impl):
    """Catches strides of q used for k, and gradients that arrive expanded (stride 0), as those of a
    sum do, or for q alone."""
    cos, sin = tables(19, 32)
    q = normal(2, 19, 3, 32).float().transpose(1, 2)  # (2, 3, 19, 32)
    k = normal(3, 2, 19, 40, seed=1).float().transpose(0, 1)[..., 4:36]
    dense = ROPES[impl]([q.contiguous(), k.contiguous()], cos, sin)
    for a, b in zip(ROPES[impl]([q, k], cos, sin), dense):
        assert torch.equal(a, b)

    stack = torch.stack([q, k]).requires_grad_()
    ones = torch.ones_like(q)
    expected = torch.autograd.grad(ROPES[impl](stack, cos, sin)[0], stack, ones)[0]
    assert torch.equal(
        torch.autograd.grad(ROPES[impl](stack, cos, sin)[0].sum(), stack)[0], expected
    )
    assert expected[0].any() and not expected[1].any()


@pytest.mark.parametrize("groups", [1, 8])
def test_rope_shares_out_heads(monkeypatch, groups):
    """Catches heads that no program takes, or two: from one program for all heads to one for
    each."""
    monkeypatch.setattr(rope, "PROGRAMS", groups)
    qk = normal(2, 1, 3, 20, 16).float()
    (cos, sin) = tables(20, 16)
    for a, b in zip(rope_triton(qk, cos, sin), rope_plain(qk, cos, sin)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rope_plain_takes_masked_tables():
    """Catches chunks cut along the wrong dim of tables (B, 1, n, hd), those of an encoder that sees
    some of its patches."""
    cos, sin = (torch.stack([t[:700], t[700:]])[:, None] for t in tables(1400, 64))

    # larger than one chunk
    qk = normal(2, 2, 5, 700, 64).float()
    for x, got in zip(qk, rope_plain(qk, cos, sin)):
        torch.testing.assert_close(got, rotate_pairs(x, cos, sin), rtol=0, atol=1e-6)


def test_rope_keeps_nothing_but_the_tables():
    """Catches an activation of (B, nh, L, hd) kept for backward by every layer."""
    qk = normal(2, 1, 2, 50, 32).float().requires_grad_()
    cos, sin = tables(50, 32)
    kept = []
    for apply in ROPES.values():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            apply(qk, cos, sin)
    assert kept and all(x.shape == cos.shape for x in kept)


def test_rope_is_a_proper_custom_op():
    """Catches a fake kernel whose shapes or strides differ from the real one's, and outputs that
    alias inputs."""
    q, k, _ = fused(1, 2, 9, 16).detach().transpose(1, 3).unbind(2)
    cos, sin = tables(9, 16)
    torch.library.opcheck(rope_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, False))


@pytest.mark.parametrize("impl", ROPES)
def test_rope_compiles_as_one_graph(impl):
    """Catches a graph break, and a compiled gradient that differs from the eager one."""
    qkv = fused(2, 2, 21, 32)
    (cos, sin) = tables(21, 32)
    torch._dynamo.reset()
    compiled = rotated(
        torch.compile(ROPES[impl], fullgraph=True, backend="aot_eager"), qkv, cos, sin
    )
    for a, b in zip(compiled, rotated(ROPES[impl], qkv, cos, sin)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rope_refuses_what_it_would_misread():
    """Catches tables of another length, which would be read out of bounds."""
    q = normal(1, 1, 8, 16).float()
    with pytest.raises(ValueError, match="8, 16.*7, 16"):
        rope_triton([q, q], *tables(7, 16))
