"""Memory of a training step by part: estimated from shapes, and measured on a model that trains."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
from model import ACModel, Predictor, add_lora, lora_layers, size_of


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, without its
    parameters."""
    # parameters are counted elsewhere
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}  # storage -> (its bytes, a tensor on it)

    # views of one storage count once
    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            # the tensor is held too, or another one could get its address
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(*inputs)  # noqa: F841, the graph must live while it is counted
    return sum(nbytes for nbytes, _ in kept.values())


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
    """{part: bytes} of a step on batch_size clips of this many steps.

    size: the Predictor's (`size_of`); options: those of add_lora, or None to train the whole
    predictor; optimizer_bytes: of one trained parameter."""
    # of z, actions and states of one clip
    shapes = (
        (1, steps, grid * grid, embed_dim),
        (1, steps - 1, action_dim),
        (1, steps, state_dim),
    )

    def build(depth):
        """A model of this depth on the meta device, its numbers of all and of trained
        parameters."""
        with torch.device("meta"):
            predictor = Predictor(
                embed_dim, action_dim, state_dim, (grid, grid), **size | {"depth": depth}
            )
        count = sum(p.numel() for p in predictor.parameters())
        trained = add_lora(predictor, **options) if options else count
        return ACModel(predictor), count, trained

    def activations(depth, checkpointing):
        """Bytes of one clip, counted on tensors without memory."""
        model, _, _ = build(depth)
        model.predictor.activation_checkpointing = checkpointing
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True), autocast:
            model = model.to_empty(device="cpu")
            return activation_bytes(model, *(torch.zeros(shape) for shape in shapes))

    # parameters in float32, whatever autocast computes in
    _, count, trained = build(size["depth"])
    parts = {
        "encoder": encoder_bytes,
        "predictor": 4 * count,
        "adapters": 4 * trained if options else 0,
        "gradients": 4 * trained,
        "optimizer": round(optimizer_bytes * trained),
    }

    # every further block, and every further clip, keeps the same
    for checkpointing, name in ((False, "activations"), (True, "activations, checkpointed")):
        one = activations(1, checkpointing)
        two = activations(2, checkpointing)
        parts[name] = batch_size * (one + (size["depth"] - 1) * (two - one))
    return parts


def measure(encoder, model, optimizer, inputs, autocast):
    """{part: bytes} of a model after some steps; one more forward and backward on inputs (z,
    actions, states) are made for activations and gradients. Those are not stepped on."""
    # adapters are parameters of the predictor, counted apart
    predictor = model.predictor
    adapters = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in lora_layers(predictor).values())
    parts = {
        "encoder": sum(p.nbytes for p in encoder.parameters()) if encoder else 0,
        "predictor": sum(p.nbytes for p in predictor.parameters()) - adapters,
        "adapters": adapters,
        "optimizer": 0,
    }

    # the optimizer's moments, not its step counts
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                parts["optimizer"] += value.nbytes

    # one more forward and backward
    name = "activations"
    if predictor.activation_checkpointing:
        name = "activations, checkpointed"
    with autocast():
        parts[name] = activation_bytes(model, *inputs)
        sum(model(*inputs)).backward()
    parts["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    optimizer.zero_grad(set_to_none=True)
    return parts


def compare(encoder, model, optimizer, inputs, options, dtype, autocast):
    """Print the estimate for a run of train_lora.py beside what its parts take after some steps.
    inputs (z, actions, states); options: of add_lora, or None; dtype: a name."""
    # measured first: the estimate uses what the optimizer really keeps for a parameter
    measured = measure(encoder, model, optimizer, inputs, autocast)
    predictor = model.predictor
    z = inputs[0]
    actions = inputs[1]
    states = inputs[2]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimated = estimate(
        measured["encoder"],
        z.shape[-1],
        predictor.grid[0],
        size_of(predictor),
        options,
        len(z),
        z.shape[1],
        getattr(torch, dtype),
        measured["optimizer"] / trained,
        actions.shape[-1],
        states.shape[-1],
    )

    # side by side
    print(f"{'part':26} {'estimated MiB':>14} {'measured MiB':>13}")
    for part, nbytes in estimated.items():
        taken = measured.get(part, math.nan)
        print(f"{part:26} {nbytes / 2**20:14.1f} {taken / 2**20:13.1f}")
    what = "the GPU" if z.device.type == "cuda" else "the process, Python and loader included"
    print(f"peak of {what}: {checkpoint.peak_memory(z.device):.0f} MiB")
