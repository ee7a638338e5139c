"""Memory of a training step by part, from shapes alone (nothing is allocated), for the released sizes or any other.

    python -m bench.memory                          # LoRA r=16 on V-JEPA 2-AC: ViT-g and a 24 x 1024 predictor, 8 frames of 256 px
    python -m bench.memory --r 0 --batch_size 8     # all of the predictor trained

`train_lora.py --memory_report` prints the same rows for its own flags, and beside them what three steps took.
"""

import argparse

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
from lora import add_lora
from model import ACModel, Encoder, Predictor
from weights import ARCHITECTURES


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, parameters not counted."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), t  # holding t, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = model(*inputs)  # noqa: F841, the graph must live while it is counted
    return sum(n for n, _ in kept.values())


def estimate_memory(encoder, size, lora, batch_size, steps, dtype, optim_bytes):
    """Rows (what, bytes) that a step will need, from shapes alone: nothing is allocated. encoder: (embed_dim, grid, parameters, bytes of
    one); size: of the Predictor; lora: arguments of add_lora, or None to train all of it."""
    embed_dim, grid, count, width = encoder
    rows = [("encoder weights", count * width)]
    for checkpointing in (False, True):
        kept = []
        for depth in (1, 2, size["depth"]):  # each further block and clip keeps the same
            with torch.device("meta"):
                model = ACModel(Predictor(embed_dim, 7, 7, (grid, grid), **size | {"depth": depth}))
            base = sum(p.numel() for p in model.parameters())
            trained = add_lora(model.predictor, **lora) if lora else base
            model.predictor.activation_checkpointing = checkpointing
            if len(kept) < 2:
                with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    z, a, s = (torch.zeros(1, *x) for x in ((steps, grid * grid, embed_dim), (steps - 1, 7), (steps, 7)))
                    kept.append(activation_bytes(model.to_empty(device="cpu"), z, a, s))
        if not checkpointing:
            rows += [("predictor weights (fp32)", 4 * base), ("adapter weights (fp32)", 4 * trained * bool(lora))]
            rows += [("gradients (fp32)", 4 * trained), ("optimizer moments", optim_bytes * trained)]
        n = batch_size * (kept[0] + (size["depth"] - 1) * (kept[1] - kept[0]))
        rows.append((f"activations{', with --activation_checkpointing' * checkpointing}", n))
    return rows
