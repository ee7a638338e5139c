"""The operations of kernels/ against their definitions (the Triton ones: test_attention.py,
test_stats.py)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kernels import (
    ATTENTION,
    attention_impl,
    block_causal_attention,
    linear,
    merge_moments,
    moments,
)

FIXTURES = Path(__file__).parent / "fixtures"


def qkv(B, nh, L, hd, dtype=torch.float32):
    """Random queries, keys and values, always the same."""
    torch.manual_seed(0)
    return [torch.randn(B, nh, L, hd, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("impl", ["reference", "prefix", "auto"])
@pytest.mark.parametrize(
    "name, block", [("T1_H2_W2_K2", 6), ("T3_H2_W3_K3", 9), ("T4_H4_W4_K2", 18)]
)
def test_mask_is_the_references(impl, name, block):
    """Catches an off-by-one at a step's edge: with v = identity the output is the attention matrix,
    zero exactly where the mask is."""
    with safe_open(FIXTURES / "ac_mask_and_shapes.safetensors", "pt") as f:
        mask = f.get_tensor(f"out/{name}")
    q, k, _ = qkv(1, 1, len(mask), 8)
    weights = block_causal_attention(q, k, torch.eye(len(mask))[None, None], block, impl=impl)
    assert torch.equal(weights[0, 0] > 0, mask)


@pytest.mark.parametrize(
    "B, nh, L, hd, block",
    [
        (2, 3, 7 * 18, 32, 18),
        (1, 2, 3 * 17, 6, 17),
        (2, 1, 5, 4, 1),
        (1, 2, 41, 10, 9),
        (1, 1, 7, 8, 50),
    ],
)
def test_prefix_equals_dense_with_gradients(B, nh, L, hd, block):
    """Catches lost gradient terms of shared prefixes, and lengths that are no multiple of anything,
    the last step cut short included."""
    inputs = qkv(B, nh, L, hd, torch.float64)
    grad = torch.randn(B, nh, L, hd, dtype=torch.float64)
    results = []
    for impl in ("reference", "prefix", "auto"):
        out = block_causal_attention(*inputs, block, impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "prefix"])
def test_later_steps_cannot_be_seen(impl):
    """Catches a leak that is too small for a tolerance: later keys are replaced by huge values,
    earlier outputs stay equal bit by bit."""
    q, k, v = qkv(1, 2, 4 * 9, 16)
    k = k.detach()
    v = v.detach()
    before = block_causal_attention(q, k, v, 9, impl=impl)
    k[:, :, 18:] = 100.0
    v[:, :, 18:] = 1e6
    after = block_causal_attention(q, k, v, 9, impl=impl)
    assert torch.equal(before[:, :, :18], after[:, :, :18])
    assert not torch.equal(before[:, :, 18:], after[:, :, 18:])


def test_unknown_impl_is_refused():
    """Catches a misspelt impl that silently runs another one."""
    q, k, v = qkv(1, 1, 4, 4)
    with pytest.raises(ValueError, match="'tritn'.*auto, " + ", ".join(ATTENTION)):
        block_causal_attention(q, k, v, 2, impl="tritn")
    with pytest.raises(ValueError, match="'welford'.*auto, two_pass"):
        moments(q[0, 0], impl="welford")


def test_auto_attention_on_a_cpu():
    """Catches short sequences paying for a loop over steps, long ones for an L x L mask, and Triton
    chosen where there is no GPU."""
    cpu = torch.device("cpu")
    assert attention_impl(cpu, torch.float32, 64, 6, 42) == "reference"
    assert attention_impl(cpu, torch.float32, 64, 258, 7 * 258) == "prefix"

    # a single step needs no mask
    assert attention_impl(cpu, torch.bfloat16, 64, 258, 258) == "prefix"


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (1, 1, 5)])
def test_linear_by_onednn_is_linear(shape):
    """Catches rows and columns mixed up in the convolution, forward or in any of the three
    gradients, and input that is not contiguous."""
    torch.manual_seed(0)
    x = torch.randn(*shape).transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [x, torch.randn(6, 5), torch.randn(6)]
    grad = torch.randn(*shape[:-1], 6)
    results = []
    for impl in ("blas", "onednn"):
        live = [x.clone().requires_grad_() for x in inputs]
        out = linear(*live, impl=impl)
        results.append([out, *torch.autograd.grad(out, live, grad)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, T, K, N", [(2, 4, 48, 48), (4, 18, 384, 192), (4, 130, 384, 1152)])
def test_linear_does_not_ask_whether_the_weight_is_trained(B, T, K, N, dtype):
    """Bug: the same layer gives other bits once it is frozen. F.linear does that on slices of
    longer clips, in fp32 with any instruction set; a base in training and the frozen base under
    adapters then differ."""
    torch.manual_seed(0)
    clip = torch.randn(B, T + 1, K, dtype=dtype)
    views = (clip[:, :-1], clip[:, 1:], clip.transpose(0, 1)[:-1], clip[..., : K // 2], clip[0])
    for x in views:
        weight = torch.randn(N, x.shape[-1], dtype=dtype)
        bias = torch.randn(N, dtype=dtype)
        rows = x.reshape(-1, x.shape[-1])

        expected = linear(x, weight, bias)
        assert torch.equal(linear(x.clone(), weight, bias), expected)
        assert torch.equal(linear(rows, weight, bias).view_as(expected), expected)

        trained = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        assert torch.equal(linear(x, *trained), expected)
        assert torch.equal(linear(x.clone().requires_grad_(), weight, bias), expected)
        assert torch.equal(linear(x.clone().requires_grad_(), *trained), expected)


def test_linear_of_no_rows_and_of_one():
    """Bug: an empty batch or a plain vector breaks the reshape to rows."""
    weight = torch.randn(6, 5)
    bias = torch.randn(6)
    for shape in ((0, 4, 5), (3, 0, 5), (5,), (1, 5)):
        out = linear(torch.ones(*shape), weight, bias)
        assert out.shape == (*shape[:-1], 6)
        torch.testing.assert_close(out, (weight.sum(1) + bias).expand(out.shape))


@pytest.mark.parametrize("mean, rtol", [(0.0, 1e-14), (1e4, 1e-13), (1e9, 2e-9)])
def test_moments_survive_a_large_mean(mean, rtol):
    """Catches E[x^2] - E[x]^2, which at mean 1e9 loses every digit of a variance of 1, and chunks
    merged with wrong weights."""
    torch.manual_seed(0)

    # three full chunks and a rest
    x = torch.randn(200_001, 3, dtype=torch.float64) + mean

    # the noise as x holds it, after rounding; its sums cancel nothing
    exact = x - mean
    n, got_mean, m2 = moments(x)
    assert n == len(x)
    atol = 2.3e-16 * max(1.0, mean)
    torch.testing.assert_close(got_mean - mean, exact.mean(0), rtol=0, atol=atol)
    torch.testing.assert_close(m2, ((exact - exact.mean(0)) ** 2).sum(0), rtol=rtol, atol=0)


def test_second_pass_is_corrected():
    """Catches the mean's own rounding left in M2: at 1e9 it is half a unit of 1.2e-7, no longer
    small beside a spread of 1e-6."""
    torch.manual_seed(0)
    exact = (torch.randn(50_000, 2, dtype=torch.float64) * 1e-6 + 5e-8 + 1e9) - 1e9
    _, _, m2 = moments(exact + 1e9)
    torch.testing.assert_close(m2, ((exact - exact.mean(0)) ** 2).sum(0), rtol=1e-9, atol=0)


def test_moments_of_float32_are_float64():
    """Catches sums in the dtype of the data: in float32 the mean of 300,000 values near 1000 is off
    in the fourth digit."""
    x = (torch.arange(300_000) % 7 + 1000.0)[:, None]
    n, mean, m2 = moments(x)
    assert mean.dtype == m2.dtype == torch.float64
    total = sum(i % 7 for i in range(n))
    assert mean.item() == pytest.approx(1000 + total / n, rel=1e-15)
    squares = sum((i % 7) ** 2 for i in range(n)) - total**2 / n
    assert m2.item() == pytest.approx(squares, rel=1e-12)


def test_merging_any_split_is_the_whole():
    """Catches Chan's formula with the counts swapped, and an empty part (a rank without shards)
    turning everything into nan."""
    torch.manual_seed(0)
    x = torch.randn(1000, 2) * 3 + 50
    whole = moments(x)
    for cut in (0, 1, 10, 999, 1000):
        for a, b in ((x[:cut], x[cut:]), (x[cut:], x[:cut])):
            n, mean, m2 = merge_moments(moments(a), moments(b))
            assert n == 1000
            torch.testing.assert_close(mean, whole[1], rtol=1e-12, atol=0)
            torch.testing.assert_close(m2, whole[2], rtol=1e-12, atol=0)

    n, mean, m2 = merge_moments(moments(x[:0]), moments(x[:0]))
    assert n == 0
    assert not mean.isnan().any()
    assert not m2.isnan().any()
