"""The Triton attention kernels against float64: in Triton's interpreter on a CPU, or on a GPU.

TRITON_INTERPRET=1 pytest tests/test_attention.py      # Triton reads the variable when a kernel is
imported: a process of its own"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 pytest tests/test_attention.py", allow_module_level=True
    )

import kernels  # noqa: E402
from kernels import attention  # noqa: E402
from kernels.attention import HEAD_DIMS, INTERPRET, TILES, attention_triton  # noqa: E402
from kernels.reference import attention_dense, attention_prefix  # noqa: E402
from model import ACModel, Predictor  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRET else "cuda")


def fused(B, nh, L, hd, dtype=torch.float32, seed=0):
    """What nn.Linear(dim, 3 * dim) gives: (B, L, 3, nh, hd)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, 3, nh, hd, generator=generator).to(DEVICE, dtype).requires_grad_()


def run(attend, qkv, block, seed=1):
    """(output, gradient of the fused qkv) for a random output gradient."""
    out = attend(*qkv.permute(2, 0, 3, 1, 4), block)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(
        DEVICE, out.dtype
    )
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def errors(got, exact):
    """Relative errors of the output and of dq, dk, dv. A gradient that is zero but for rounding
    (one key: its weight is always 1) is measured against dv."""
    (o, d), (o_exact, d_exact) = ([x.double() for x in pair] for pair in (got, exact))
    size = [d_exact[:, :, i].norm() for i in range(3)]
    size = [s if s > 1e-6 * size[2] else size[2] for s in size]
    return [((o - o_exact).norm() / o_exact.norm()).item()] + [
        ((d - d_exact)[:, :, i].norm() / size[i]).item() for i in range(3)
    ]


def check(B, nh, L, hd, block, dtype):
    qkv = fused(B, nh, L, hd, dtype)
    exact = run(attention_dense, qkv.detach().double().requires_grad_(), block)
    worst = max(errors(run(attention_triton, qkv, block), exact))
    if dtype == torch.float32:
        assert worst <= 1e-6
    elif INTERPRET:  # whose cast to bf16 cuts off instead of rounding
        assert worst <= {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    else:
        assert worst <= 2 * max(errors(run(attention_prefix, qkv, block), exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "T, block, hd, cut",
    [
        (1, 1, 32, 0),
        (1, 41, 64, 0),
        (2, 70, 64, 0),
        (7, 18, 80, 0),
        (8, 20, 128, 7),
        (16, 9, 32, 4),
        (37, 1, 64, 0),
    ],
)
def test_forward_and_gradients(T, block, hd, cut, dtype):
    """Catches a wrong limit at a step's edge, a lost tail of L, a missing scale of dQ or dK."""
    check(2, 1, T * block - cut, hd, block, dtype)


@pytest.mark.parametrize("hd", [hd for hd in HEAD_DIMS if hd not in (32, 64, 80, 128)])
def test_other_head_dims(hd):
    """Catches columns of the padding that are read or written: heads of no power of two."""
    check(1, 2, 3 * 13, hd, 13, torch.float32 if hd != 88 else torch.bfloat16)


def test_heads_of_88_with_odd_strides():
    """Catches strides that the kernels take for multiples of eight where they are none."""
    wide = torch.randn(3, 1, 2, 21, 91, device=DEVICE)
    apart = [x[..., :88] for x in wide]
    expected = attention_triton(*(x.contiguous() for x in apart), 7)
    assert torch.equal(attention_triton(*apart, 7), expected)


@pytest.mark.parametrize("kind, width", TILES)
def test_every_tile(kind, width, monkeypatch):
    """Catches a tile whose loops miss the keys between the unmasked and the masked range, where
    block, L and tile share no divisor."""
    dtype = torch.float32 if INTERPRET or kind == "fp32" else torch.bfloat16
    monkeypatch.setattr(attention, "tiles", lambda *_: TILES[kind, width])
    shapes = ((201, 67), (150, 31), (3, 2))
    if width == 256:
        shapes = ((70 if kind == "fp32" else 150, 31),)
    for L, block in shapes:
        check(1, 1, L, width, block, dtype)
    if width == 128:
        check(1, 1, 140, 80, 45, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "T, block, hd",
    [(2, 258, 64), (7, 258, 64), (8, 198, 80), (4, 259, 32), (3, 578, 128), (16, 130, 64)],
)
def test_real_sizes(T, block, hd, dtype):
    """Catches what small shapes hide: many tiles, head groups, log-sum-exps of thousands of
    keys."""
    check(1, 1 if INTERPRET else 40, T * block, hd, block, dtype)


def test_more_heads_than_a_group():
    """Catches a program that is given the head or the tile of another one: 35 heads are a group of
    32 and one of 3."""
    check(5, 7, 70, 32, 35, torch.float32)


def test_any_strides():
    """Catches kernels that assume contiguous rows, batch-major heads, or that the output gradient
    has the output's layout."""
    q = torch.randn(2, 3, 72, 80, device=DEVICE)
    k = torch.randn(2, 3, 72, 80, device=DEVICE)
    v = torch.randn(2, 3, 72, 80, device=DEVICE)
    plain = attention_triton(q, k, v, 24)

    # last stride 72
    columns = q.mT.contiguous().mT

    # hd = 80 is computed as 128: what lies behind must not be read
    wide = torch.full((2, 3, 72, 240), float("nan"), device=DEVICE)
    wide[..., 80:160] = k

    # stride 0 over heads
    repeated = v[:, :1].expand(2, 3, 72, 80)
    assert torch.equal(attention_triton(columns, wide[..., 80:160], v, 24), plain)
    assert torch.equal(attention_triton(q, k, repeated, 24)[:, 0], plain[:, 0])
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    # a gradient of stride 0
    of_sum = torch.autograd.grad(attention_triton(*inputs, 24).sum(), inputs)
    of_ones = torch.autograd.grad(attention_triton(*inputs, 24), inputs, torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(of_sum, of_ones))

    # no copy before the projection
    assert plain.transpose(1, 2).flatten(2).data_ptr() == plain.data_ptr()


@pytest.mark.skipif(not INTERPRET, reason="9 GB of a sparse file")
def test_offsets_beyond_32_bits(tmp_path):
    """Catches offsets in 32 bits: rows 10 million elements apart, three batches 2 billion apart."""
    base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32, dtype=torch.float16)
    for B, L, strides in ((1, 300, (0, 0, 10_737_408, 1)), (3, 4, (2**31 - 64, 0, 32, 1))):
        k = base.as_strided((B, 1, L, 32), strides)
        k.copy_(torch.randn(B, 1, L, 32, generator=torch.Generator().manual_seed(0)))
        q, v = torch.randn(2, B, 1, L, 32).half()
        assert torch.equal(
            attention_triton(q, k, v, 150), attention_triton(q, k.contiguous(), v, 150)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_steps_cannot_be_seen(dtype):
    """Catches a leak too small for a tolerance: later tokens become huge, earlier outputs and dq
    stay equal bit by bit."""
    block, L = 23, 161
    before = fused(1, 2, L, 64, dtype)
    for t in (1, 3, 6):
        after = before.detach().clone()
        after[:, t * block :, 1:] = torch.tensor([1e3, 1e4], dtype=dtype, device=DEVICE)[
            :, None, None
        ]
        (o1, d1), (o2, d2) = (
            run(attention_triton, x.requires_grad_(), block) for x in (before, after)
        )
        assert torch.equal(o1[:, :, : t * block], o2[:, :, : t * block])
        assert not torch.equal(o1, o2)
        assert torch.equal(d1[:, : t * block, 0], d2[:, : t * block, 0])


def test_later_rows_give_no_gradient_upwards():
    """Catches dK/dV that sum over rows which cannot see the key: an output gradient of step t
    reaches the keys of steps <= t only."""
    q, k, v = fused(1, 1, 150, 32).detach().permute(2, 0, 3, 1, 4).unbind()
    k.requires_grad_()
    v.requires_grad_()
    out = attention_triton(q, k, v, 30)

    # of step 2 alone
    grad = torch.zeros_like(out)
    grad[:, :, 60:90] = 1
    for d in torch.autograd.grad(out, (k, v), grad):
        assert torch.count_nonzero(d[:, :, 90:]) == 0
        assert bool((d[:, :, :90] != 0).any(-1).all())


def test_two_runs_are_equal_bit_by_bit():
    """Catches atomics, whose order of addition changes from run to run on a GPU."""
    qkv = fused(2, 2, 130, 64, torch.bfloat16)
    first = run(attention_triton, qkv, 26)
    assert all(torch.equal(a, b) for a, b in zip(first, run(attention_triton, qkv, 26)))


def test_outputs_are_written_everywhere(monkeypatch):
    """Catches rows that no program writes, and padding that is read: every buffer starts as nan."""
    qkv = fused(1, 2, 77, 80)
    expected = run(attention_triton, qkv, 19)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan"))
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, run(attention_triton, qkv, 19)))


def test_opcheck():
    """Catches a fake tensor of another layout than the real one, a mutated input, and gradients
    that differ under AOTAutograd."""
    q = torch.randn(1, 2, 20, 32, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 2, 20, 32, device=DEVICE, requires_grad=True)
    v = torch.randn(1, 2, 20, 32, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.nanojepa.attention, (q, k, v, 6))
    o, lse = torch.ops.nanojepa.attention(q.detach(), k.detach(), v.detach(), 6)
    torch.library.opcheck(
        torch.ops.nanojepa.attention_backward,
        (torch.ones_like(o), q.detach(), k.detach(), v.detach(), o, lse, 6),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    """Catches a graph break, and a compiled step that differs from the eager one."""
    weight = torch.randn(64, 64, device=DEVICE)

    def layer(q, k, v, block):
        return attention_triton(q, k, v, block).transpose(1, 2).flatten(2) @ weight

    qkv = fused(1, 2, 24, 32)
    eager = run(layer, qkv, 8)
    compiled = run(torch.compile(layer, fullgraph=True, backend=backend), qkv, 8)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(
            a,
            b,
            rtol=0 if backend == "aot_eager" else 1e-5,
            atol=0 if backend == "aot_eager" else 1e-5,
        )


def test_autocast_computes_in_its_dtype():
    """Catches fp32 inputs that stay fp32 under autocast (no tensor cores), and gradients that come
    back in 16 bits."""
    qkv = fused(1, 1, 30, 32)
    by_hand = run(
        lambda q, k, v, block: attention_triton(q.bfloat16(), k.bfloat16(), v.bfloat16(), block),
        qkv,
        10,
    )
    with torch.autocast(DEVICE.type, torch.bfloat16):
        automatic = run(attention_triton, qkv, 10)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attention_triton(q.bfloat16(), k, v.bfloat16(), 10)
    assert automatic[0].dtype == torch.bfloat16
    assert automatic[1].dtype == torch.float32
    assert torch.equal(mixed, automatic[0])
    assert all(torch.equal(a, b) for a, b in zip(by_hand, automatic))


def test_activation_checkpointing():
    """Catches a backward that needs something which the recomputation does not save."""
    qkv = fused(1, 2, 30, 32)
    plain = run(attention_triton, qkv, 10)
    again = run(lambda *a: checkpoint(attention_triton, *a, use_reentrant=False), qkv, 10)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("dtype, checkpointing", [(torch.float32, False), (torch.bfloat16, True)])
def test_the_losses_are_one_graph(monkeypatch, dtype, checkpointing):
    """Catches a graph break or other numbers where compiling, autocast, checkpointing and the
    rollout's kept keys and values meet."""
    monkeypatch.setattr(kernels, "attention_impl", lambda *a: "triton")
    torch.manual_seed(0)
    ac = ACModel(Predictor(24, 3, 2, (2, 3), pred_dim=64, depth=2, num_heads=2)).to(DEVICE)
    data = [torch.randn(*shape, device=DEVICE) for shape in ((1, 4, 6, 24), (1, 3, 3), (1, 4, 2))]

    def step(module):
        ac.zero_grad()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            losses = module(*data)
        sum(losses).backward()
        return torch.stack([x.detach().float() for x in losses]), torch.cat(
            [p.grad.flatten() for p in ac.parameters()]
        )

    plain = step(ac)
    ac.predictor.activation_checkpointing = checkpointing
    for a, b in zip(
        plain, step(torch.compile(ac, fullgraph=True, dynamic=False, backend="aot_eager"))
    ):
        assert ((a - b).norm() / a.norm()).item() < (1e-6 if dtype == torch.float32 else 1e-2)


DDP = """
import gc, os, sys, torch, torch.distributed as dist
import kernels
from model import ACModel, Predictor
kernels.attention_impl = lambda *a: "triton"
dist.init_process_group("gloo")
torch.manual_seed(0)
ac = ACModel(Predictor(24, 3, 2, (2, 3), pred_dim=64, depth=2, num_heads=2))
data = torch.load(sys.argv[1])
whole = torch.autograd.grad(sum(ac(*data)), list(ac.parameters()))
ddp = torch.nn.parallel.DistributedDataParallel(ac, gradient_as_bucket_view=True)
sum(ddp(*(x[dist.get_rank() :: 2] for x in data))).backward()
for a, p in zip(whole, ac.parameters()):
    torch.testing.assert_close(p.grad, a, rtol=1e-5, atol=1e-6)
# the threads of DDP must end before Python does (pytorch/pytorch#190489)
del ddp
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="two processes on CPUs")
def test_two_ranks_are_one(tmp_path):
    """Catches a custom op whose gradients DDP does not see."""
    (tmp_path / "ranks.py").write_text(DDP)
    torch.save(
        [torch.randn(*shape) for shape in ((2, 3, 6, 24), (2, 2, 3), (2, 3, 2))],
        tmp_path / "data.pt",
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "ranks.py",
        tmp_path / "data.pt",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_start_on_the_gpu_of_their_tensors(monkeypatch):
    """Catches a launch on GPU 0 of pointers of GPU 3: Triton takes the current device, whatever
    holds the tensors."""
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device_of", lambda x: entered.append(x.shape) or contextlib.nullcontext()
    )
    q = torch.randn(1, 2, 12, 32, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 2, 12, 32, device=DEVICE, requires_grad=True)
    v = torch.randn(1, 2, 12, 32, device=DEVICE, requires_grad=True)
    kernels.block_causal_attention(q, k, v, 4, impl="triton").sum().backward()
    assert len(entered) == 2

    sum(
        x.sum()
        for x in kernels.apply_rope(
            (q, k), torch.ones(12, 32, device=DEVICE), torch.ones(12, 32, device=DEVICE), "triton"
        )
    ).backward()
    assert len(entered) == 4

    kernels.moments(q[0, 0].detach(), "triton")
    assert len(entered) == 5


def test_gradients_of_gradients_are_refused():
    """Catches second derivatives that are silently zero."""
    qkv = fused(1, 1, 6, 32)
    (grad,) = torch.autograd.grad(
        attention_triton(*qkv.permute(2, 0, 3, 1, 4), 2).pow(2).sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match="attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 2, 12, 48)}, r"shapes .*48.*one shape"),
        ({"k": (1, 2, 6, 32)}, r"\(1, 2, 6, 32\).*one shape"),
        ({"q": (2, 12, 32)}, r"\(B, nh, L, hd\)"),
        ({"q": (1, 2, 0, 32), "k": (1, 2, 0, 32), "v": (1, 2, 0, 32)}, "non-empty"),
        (
            {name: (1, 2, 12, 40) for name in "qkv"},
            r"head dim 40 is not one of \(32, 48, 64, 80, .*256\).*prefix",
        ),
        ({"dtype": torch.float64}, "torch.float64.*cast all three"),
        ({"v_dtype": torch.bfloat16}, "torch.float32, torch.float32, torch.bfloat16"),
        ({"block": 0}, "block=0"),
        ({"device": "meta"}, r"on meta, .*prefix"),
    ],
)
def test_wrong_inputs_say_what_to_do(change, message):
    """Catches shapes and dtypes that would read out of bounds, or be cast in silence."""
    dtype = change.get("dtype", torch.float32)
    shape = (1, 2, 12, 32)
    q = torch.zeros(change.get("q", shape), dtype=dtype, device=DEVICE)
    k = torch.zeros(change.get("k", shape), dtype=dtype, device=DEVICE)
    v = torch.zeros(change.get("v", shape), dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        attention_triton(
            q.to(change.get("device", DEVICE)),
            k,
            v.to(change.get("v_dtype", v.dtype)),
            change.get("block", 4),
        )


def test_served_is_what_runs():
    """Catches a dispatcher that sends here what attention_triton refuses."""
    assert all(
        attention.supports(DEVICE, dtype, hd) for dtype in attention.DTYPES for hd in HEAD_DIMS
    )
    assert not attention.supports(DEVICE, torch.float64, 64)
    assert not attention.supports(DEVICE, torch.float32, 40)

    # the guides' predictor on ViT-g features
    assert attention.supports(DEVICE, torch.bfloat16, 1408 // 16)
