"""Memory of a training step by part: estimated from shapes, and measured on a model that trains."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
from model import ACModel, Predictor, add_lora, lora_layers, size_of


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, parameters not
    counted."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage.nbytes(),
                t,
            )  # holding t, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = model(*inputs)  # noqa: F841, the graph must live while it is counted
    return sum(n for n, _ in kept.values())


def estimate(
    encoder_bytes,
    embed_dim,
    grid,
    size,
    options,
    batch_size,
    steps,
    dtype,
    optimizer_bytes=8,
    action_dim=7,
    state_dim=7,
):
    """{part: bytes}. size: of the Predictor; options: of add_lora, or None to train all of it;
    optimizer_bytes: a trained parameter."""
    kept = {}
    for depth in (1, 2, size["depth"]):  # each further block, and clip, keeps the same
        for checkpointing in (False, True):
            with torch.device("meta"):
                model = ACModel(
                    Predictor(
                        embed_dim, action_dim, state_dim, (grid, grid), **size | {"depth": depth}
                    )
                )
            base = sum(p.numel() for p in model.parameters())
            trained = add_lora(model.predictor, **options) if options else base
            model.predictor.activation_checkpointing = checkpointing
            if depth <= 2:
                with (
                    FakeTensorMode(allow_non_fake_inputs=True),
                    torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
                ):
                    shapes = (
                        (steps, grid * grid, embed_dim),
                        (steps - 1, action_dim),
                        (steps, state_dim),
                    )
                    kept[depth, checkpointing] = activation_bytes(
                        model.to_empty(device="cpu"), *(torch.zeros(1, *s) for s in shapes)
                    )
    rows = {
        "encoder": encoder_bytes,
        "predictor": 4 * base,
        "adapters": 4 * trained * bool(options),
        "gradients": 4 * trained,
    }
    rows["optimizer"] = round(optimizer_bytes * trained)
    for checkpointing, name in ((False, "activations"), (True, "activations, checkpointed")):
        one, two = kept[1, checkpointing], kept[2, checkpointing]
        rows[name] = batch_size * (one + (size["depth"] - 1) * (two - one))
    return rows


def compare(encoder, model, optimizer, inputs, options, dtype, autocast):
    """Print the estimate for a run of train_lora.py beside what its parts take after some steps;
    inputs (z, actions, states)."""
    predictor, (z, actions, states) = model.predictor, inputs
    size = size_of(predictor)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [
        v
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor) and v.numel() > 1
    ]
    adapters = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in lora_layers(predictor).values())
    measured = {
        "encoder": sum(p.nbytes for p in encoder.parameters()) if encoder else 0,
        "adapters": adapters,
        "optimizer": sum(v.nbytes for v in moments),
    }
    measured["predictor"] = sum(p.nbytes for p in predictor.parameters()) - adapters
    with autocast():
        kept = activation_bytes(model, *inputs)
        sum(model(*inputs)).backward()
    measured[
        "activations, checkpointed" if predictor.activation_checkpointing else "activations"
    ] = kept
    measured["gradients"] = sum(p.grad.nbytes for p in trained)
    optimizer.zero_grad(set_to_none=True)
    each = measured["optimizer"] / sum(p.numel() for p in trained)
    rows = estimate(
        measured["encoder"],
        z.shape[-1],
        predictor.grid[0],
        size,
        options,
        len(z),
        z.shape[1],
        getattr(torch, dtype),
        each,
        actions.shape[-1],
        states.shape[-1],
    )
    print(f"{'part':26} {'estimated MiB':>14} {'measured MiB':>13}")
    for part, estimated in rows.items():
        taken = measured.get(part, math.nan)
        print(f"{part:26} {estimated / 2**20:14.1f} {taken / 2**20:13.1f}")
    what = "the GPU" if z.device.type == "cuda" else "the process, Python and loader included"
    print(f"peak of {what}: {checkpoint.peak_memory(z.device):.0f} MiB")
