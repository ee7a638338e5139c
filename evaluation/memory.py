"""Memory of a training step by part: estimated from shapes, and measured on a model that trains."""

import gc
import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
from model import ACModel, Predictor, add_lora, lora_layers, size_of

# Python, PyTorch and the other libraries of a process on a CPU: the peak of a run whose model takes
# 2 MiB
LIBRARIES = 435 * 2**20

# the part that is held twice where the backward pass works: as gradients, and with checkpointing as
# what is computed again
BLOCK = "activations of a block"


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, without its
    parameters."""
    # parameters are counted elsewhere
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}  # storage -> (its bytes, a tensor on it)

    # views of one storage count once. Without detach a tensor would hold the graph that holds it,
    # and neither would ever be freed
    def keep(tensor):
        tensor = tensor.detach()
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

    "activations" and "activations, checkpointed" are of two ways to train, without and with
    --activation_checkpointing.

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
        block = activations(2, checkpointing) - one
        parts[name] = batch_size * (one + (size["depth"] - 1) * block)
        if not checkpointing:
            whole_block = batch_size * block
    parts[BLOCK] = whole_block
    return parts


def fullest_moment(parts, checkpointing, accumulates, device):
    """Bytes at the fullest moment of a step, from the parts of `estimate`. The backward pass frees
    activations block by block and makes gradients, so it is fullest where it starts or where it
    ends.

    Gaps in the heap of a CPU process are not in it: glibc seldom reuses a block that was freed for
    an aligned one of the same size. MALLOC_MMAP_THRESHOLD_=1048576 leaves none.

    accumulates: whether a step has several micro-batches; then the gradients of the earlier ones
    are there at the start, too."""
    lasting = sum(parts[name] for name in ("encoder", "predictor", "adapters", "optimizer"))
    if device.type == "cpu":
        lasting += LIBRARIES

    # what the backward pass works on: the gradients of a block's activations, and with
    # checkpointing these activations
    lasting += parts[BLOCK]
    at_start = parts["activations"]
    at_end = parts["gradients"]
    if checkpointing:
        at_start = parts["activations, checkpointed"] + parts[BLOCK]
        at_end += parts[BLOCK]
    if accumulates:
        at_start += parts["gradients"]
    return lasting + max(at_start, at_end)


def measure(encoder, model, optimizer, inputs, autocast):
    """{part: bytes} of a model after some steps, and the bytes at the fullest moment of a step (nan
    where the system does not say). For them one more forward and backward on inputs (z, actions,
    states) are made, whose gradients are not stepped on."""
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

    # what is kept for the backward pass
    name = "activations"
    if predictor.activation_checkpointing:
        name = "activations, checkpointed"
    with autocast():
        parts[name] = activation_bytes(model, *inputs)

    # one more forward and backward
    gc.collect()
    can_measure = restart_peak(inputs[0].device)
    with autocast():
        sum(model(*inputs)).backward()
    peak = math.nan
    if can_measure:
        peak = checkpoint.peak_memory(inputs[0].device) * 2**20
    parts["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    optimizer.zero_grad(set_to_none=True)
    return parts, peak


def restart_peak(device):
    """Forget the peak so far of what checkpoint.peak_memory tells. Whether that was possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        # on Linux: man 5 proc, /proc/pid/clear_refs
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


def compare(encoder, model, optimizer, inputs, options, dtype, autocast, grad_accum):
    """Print the estimate for a run of train_lora.py beside what its parts take after some steps.
    inputs (z, actions, states); options: of add_lora, or None; dtype: a name; grad_accum:
    micro-batches of a step."""
    # measured first: the estimate uses what the optimizer really keeps for a parameter
    device = inputs[0].device
    peak_so_far = checkpoint.peak_memory(device)
    measured, peak = measure(encoder, model, optimizer, inputs, autocast)
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

    # the fullest moment: one micro-batch is measured, and more of them keep their gradients
    checkpointing = predictor.activation_checkpointing
    expected = fullest_moment(estimated, checkpointing, False, device)
    print(f"{'peak of a step':26} {expected / 2**20:14.1f} {peak / 2**20:13.1f}")
    if grad_accum > 1:
        expected = fullest_moment(estimated, checkpointing, True, device)
        print(f"{f'with --grad_accum {grad_accum}':26} {expected / 2**20:14.1f} {math.nan:13.1f}")
    if device.type == "cpu":
        print(
            f"{LIBRARIES / 2**20:.0f} MiB of the estimated peak are Python and its libraries; gaps"
            " in glibc's heap come on top, unless MALLOC_MMAP_THRESHOLD_=1048576 is set"
        )
    print(f"peak of the run before that: {peak_so_far:.0f} MiB")
