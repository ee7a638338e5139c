"""What share of a device's peak a training step reaches (MFU): its FLOPs, counted once, and the
peak in the data sheet."""

import math
import re

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# FLOP/s of dense bf16 and fp16, from the data sheets; the longer name comes first
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def cpu_attention(
    q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None, out_val=None
):
    """FLOPs of PyTorch's own attention on a CPU, which its counter does not know. attn_mask: -inf
    where a token does not attend; that does not count."""
    flops = sdpa_flop_count(q.shape, k.shape, v.shape)
    if attn_mask is None:
        return flops
    return round(flops * (attn_mask > -math.inf).double().mean().item())


cpu_attention._get_raw = True  # the counter then gives it tensors, not their shapes
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}


def peak_of(device, dtype=torch.bfloat16):
    """FLOP/s of dense matmuls in the data sheet of this GPU, or None for a CPU, a part of a GPU
    (MIG), and a GPU that is not in PEAKS. In float32 that is TF32, at half the rate."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model, flops in PEAKS.items():
        if re.search(rf"\b{model}\b", name) and "MIG" not in name:
            return flops / 2 if dtype == torch.float32 else flops
    return None


def peak_to_assume(device, dtype, peak_tflops, print0):
    """FLOP/s of which MFU is a share: what --peak_tflops says, otherwise `peak_of`; None if neither
    is known. Prints once what is assumed; nothing on a CPU. dtype: a name."""
    if peak_tflops is not None and not 0 < peak_tflops < math.inf:
        raise ValueError(f"--peak_tflops {peak_tflops} is no speed: use a number above 0")
    if peak_tflops:
        print0(f"MFU is the share of {peak_tflops:g} TFLOP/s (--peak_tflops)")
        return 1e12 * peak_tflops
    if device.type != "cuda":
        return None

    name = torch.cuda.get_device_name(device)
    peak = peak_of(device, getattr(torch, dtype))
    if peak:
        print0(f"MFU is the share of {peak / 1e12:g} TFLOP/s (data sheet, {name} in {dtype})")
    else:
        print0(f"no MFU in the log: {name} is not in our table; --peak_tflops says its peak")
    return peak


def forward_flops(call, *inputs):
    """FLOPs of the matmuls, convolutions and attentions of call(*inputs), a module or a
    function: it runs once, eagerly and without gradients, under torch's FlopCounterMode.

    A backward pass takes twice as many: one product for the gradient of the weight, one for that of
    the input. So a trained module takes 3 x this, which is the usual 6 x weights x tokens + 12 x
    width x pairs of tokens that attend (arXiv 2204.02311, appendix B), and a frozen one whose input
    needs a gradient 2 x this. What --activation_checkpointing computes again does not count."""
    # a module counts as in validation: no statistics, no dropout
    modules = list(call.modules()) if isinstance(call, nn.Module) else []
    were_training = [module.training for module in modules]
    for module in modules:
        module.training = False

    # compiled code hides its products, and a compiled module that first runs here would stay eager
    eager = torch.compiler.set_stance("force_eager")
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    try:
        with torch.no_grad(), eager, counter:
            call(*inputs)
    finally:
        for module, was_training in zip(modules, were_training):
            module.training = was_training
    return counter.get_total_flops()
