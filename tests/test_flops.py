"""kernels/flops.py: what a step computes, and the peak that MFU is a share of."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import ATTENTION
from kernels.flops import forward_flops, peak_of, peak_to_assume
from model import ACModel, LatentActionModel, Predictor


def weights_of(*modules):
    """Weights that every token of a module meets."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.ndim > 1)


def test_a_step_has_the_flops_of_the_formula():
    """Bug: the rollout, the condition tokens or the attention on a CPU are not counted; scores that
    the mask hides are."""
    B, T = 2, 4
    N = 9
    width, depth = 48, 2
    predictor = Predictor(32, 13, 2, (3, 3), pred_dim=width, depth=depth, num_heads=3)
    z = torch.randn(B, T, N, 32)
    actions = torch.randn(B, T - 1, 13)
    states = torch.randn(B, T, 2)

    # three steps of teacher forcing and one of rollout, which is T: two FLOPs a weight and token
    in_blocks = (N + 2) * weights_of(predictor.predictor_blocks)
    on_patches = N * weights_of(predictor.predictor_embed, predictor.predictor_proj)
    conditions = weights_of(predictor.action_encoder, predictor.state_encoder)
    products = 2 * B * T * (in_blocks + on_patches + conditions)

    # and four for each channel of a pair of tokens. Steps see 1, 2 and 3 steps, the rollout's 2
    pairs = (N + 2) ** 2 * (1 + 2 + 3 + 2)
    scores = 4 * B * depth * width * pairs
    assert forward_flops(ACModel(predictor), z, actions, states) == products + scores


@pytest.mark.parametrize("length, block", [(23, 5), (12, 4), (7, 9)])
def test_all_attentions_count_the_same(length, block):
    """Bug: the Triton kernel counts as nothing, or pairs that the mask hides count."""
    q = torch.randn(2, 3, length, 16)
    last_seen = [min(i // block * block + block, length) for i in range(length)]
    expected = 4 * 2 * 3 * 16 * sum(last_seen)
    assert forward_flops(ATTENTION["prefix"], q, q, q, block) == expected
    assert forward_flops(ATTENTION["reference"], q, q, q, block) == expected
    if "triton" in ATTENTION:
        with FakeTensorMode():
            fake = torch.empty(2, 3, length, 16)
            fused = forward_flops(torch.ops.nanojepa.attention, fake, fake, fake, block)
        assert fused == expected


def test_counting_leaves_the_model_and_the_dice_alone():
    """Bug: codes are counted as chosen, a frozen part trains from then on, gradients appear, or the
    next random number is another one."""
    size = {"embed_dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
    model = LatentActionModel(**size, patch_dim=16, codebook_dim=8, size=(8, 12))
    model.train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    dice = torch.get_rng_state()

    z = torch.zeros(2, 4, 16, 8, 12)
    assert forward_flops(model, z) > 2 * weights_of(model.decoder)
    assert [module.training for module in model.modules()] == modes
    assert all((before[name] == x).all() for name, x in model.state_dict().items())
    assert (torch.get_rng_state() == dice).all()
    assert not model.quantizer.pending
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_the_peak_is_that_of_this_gpu(name, tflops, monkeypatch):
    """Bug: a smaller GPU, or a seventh of one, is measured against the peak of a large one; TF32
    against that of bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    peak = tflops and tflops * 1e12
    assert peak_of(gpu) == peak
    assert peak_of(gpu, torch.float32) == (peak and peak / 2)

    lines = []
    assert peak_to_assume(gpu, "bfloat16", None, lines.append) == peak
    assert (f"{tflops} TFLOP/s" if peak else "--peak_tflops") in lines[0] and name in lines[0]


def test_a_cpu_has_no_peak_unless_a_flag_says_one():
    """Bug: MFU of an invented peak."""
    lines = []
    cpu = torch.device("cpu")
    assert peak_to_assume(cpu, "float32", None, lines.append) is None and not lines
    assert peak_to_assume(cpu, "float32", 0.25, lines.append) == 2.5e11
    assert "0.25 TFLOP/s (--peak_tflops)" in lines[0]
    for tflops in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"--peak_tflops {tflops} is no speed"):
            peak_to_assume(cpu, "float32", tflops, lines.append)
