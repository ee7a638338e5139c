"""Memory of a LoRA (or full) training step by part, from shapes alone, for the released sizes or any other: nothing is allocated.

    python -m bench.memory                          # LoRA r=16 on V-JEPA 2-AC: ViT-g and a 24 x 1024 predictor, 2 clips of 8 frames
    python -m bench.memory --r 0 --batch_size 8     # all of the predictor trained

`train_lora.py --memory_report` prints the same rows for its own flags, and beside them what its parts took after three steps.
"""

import argparse
import resource
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
from lora import add_lora, lora_layers, size_of
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


def estimate(encoder_bytes, embed_dim, grid, size, options, batch_size, steps, dtype, optimizer_bytes=8, action_dim=7, state_dim=7):
    """{part: bytes}. size: of the Predictor; options: of add_lora, or None to train all of it; optimizer_bytes: a trained parameter."""
    kept = {}
    for depth in (1, 2, size["depth"]):  # each further block, and clip, keeps the same
        for checkpointing in (False, True):
            with torch.device("meta"):
                model = ACModel(Predictor(embed_dim, action_dim, state_dim, (grid, grid), **size | {"depth": depth}))
            base = sum(p.numel() for p in model.parameters())
            trained = add_lora(model.predictor, **options) if options else base
            model.predictor.activation_checkpointing = checkpointing
            if depth <= 2:
                with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    shapes = ((steps, grid * grid, embed_dim), (steps - 1, action_dim), (steps, state_dim))
                    kept[depth, checkpointing] = activation_bytes(model.to_empty(device="cpu"), *(torch.zeros(1, *s) for s in shapes))
    rows = {"encoder": encoder_bytes, "predictor": 4 * base, "adapters": 4 * trained * bool(options), "gradients": 4 * trained}
    rows["optimizer"] = round(optimizer_bytes * trained)
    for checkpointing, name in ((False, "activations"), (True, "activations, checkpointed")):
        one, two = kept[1, checkpointing], kept[2, checkpointing]
        rows[name] = batch_size * (one + (size["depth"] - 1) * (two - one))
    return rows


def compare(encoder, model, optimizer, inputs, options, dtype, autocast):
    """Print the estimate for a run of train_lora.py beside what its parts take after some steps; inputs (z, actions, states)."""
    predictor, (z, actions, states) = model.predictor, inputs
    size = size_of(predictor)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    adapters = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in lora_layers(predictor).values())
    measured = {"encoder": sum(p.nbytes for p in encoder.parameters()), "adapters": adapters, "optimizer": sum(v.nbytes for v in moments)}
    measured["predictor"] = sum(p.nbytes for p in predictor.parameters()) - adapters
    with autocast():
        kept = activation_bytes(model, *inputs)
        sum(model(*inputs)).backward()
    measured["activations, checkpointed" if predictor.activation_checkpointing else "activations"] = kept
    measured["gradients"] = sum(p.grad.nbytes for p in trained)
    optimizer.zero_grad(set_to_none=True)
    each = measured["optimizer"] / sum(p.numel() for p in trained)
    rows = estimate(measured["encoder"], z.shape[-1], predictor.grid[0], size, options, len(z), z.shape[1], getattr(torch, dtype), each,
                    actions.shape[-1], states.shape[-1])  # fmt: skip
    table = [{"part": k, "estimated MiB": v / 2**20, "measured MiB": measured.get(k, float("nan")) / 2**20} for k, v in rows.items()]
    bench.report(table, False, z.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak, what = (
        (torch.cuda.max_memory_allocated(), "the GPU") if z.device.type == "cuda" else (peak, "the process, Python and loader included")
    )
    print(f"peak of {what}: {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--encoder", default="vit_giant_xformers", choices=ARCHITECTURES, help="architecture of the frozen encoder")
    flag("--crop_size", type=int, default=256, help="pixels of a frame")
    flag("--frames_per_clip", type=int, default=8, help="frames of a clip, one a step")
    flag("--batch_size", type=int, default=2, help="clips of a micro-batch")
    flag("--pred_dim", type=int, default=1024, help="width of the predictor")
    flag("--pred_depth", type=int, default=24, help="blocks of the predictor")
    flag("--pred_heads", type=int, default=16, help="attention heads of the predictor")
    flag("--r", type=int, default=16, help="rank of the adapters; 0: train all of the predictor")
    flag("--dropout", type=float, default=0.05, help="dropout before the adapters")
    flag("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="autocast precision, and the encoder's weights")
    flag("--optim", default="adamw", choices=["adamw", "adamw8bit"], help="moments in 32 or 8 bits")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    width, depth, heads, mlp_dim = ARCHITECTURES[args.encoder]
    with torch.device("meta"):
        encoder = Encoder(width, depth, heads, mlp_dim=mlp_dim)
    dtype = getattr(torch, args.dtype)
    encoder_bytes = sum(p.numel() for p in encoder.parameters()) * dtype.itemsize
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    options = {"r": args.r, "dropout": args.dropout} if args.r else None
    found = estimate(encoder_bytes, width, args.crop_size // 16, size, options, args.batch_size, args.frames_per_clip, dtype,
                     {"adamw": 8, "adamw8bit": 2.06}[args.optim])  # fmt: skip
    total = {f"total{c}": sum(v for k, v in found.items() if "activ" not in k) + found[f"activations{c}"] for c in ("", ", checkpointed")}
    bench.report([{"part": k, "GB": v / 1e9, "GiB": v / 2**30} for k, v in (found | total).items()], args.json, torch.device("cpu"))
