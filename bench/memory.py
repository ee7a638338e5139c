"""Memory of a LoRA (or full) training step by part, from shapes alone, for the released sizes or
any other: nothing is allocated.

    python -m bench.memory                          # LoRA r=16 on V-JEPA 2-AC, 2 clips of 8 frames
    python -m bench.memory --r 0 --batch_size 8     # all of the predictor trained

`train_lora.py --memory_report` prints the same rows for its own flags, and beside them what its
parts took after three steps."""

import argparse

import torch

import bench
from evaluation.memory import estimate
from model import Encoder
from weights import ARCHITECTURES

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--encoder",
        default="vit_giant_xformers",
        choices=ARCHITECTURES,
        help="architecture of the frozen encoder",
    )
    flag("--crop_size", type=int, default=256, help="pixels of a frame")
    flag("--frames_per_clip", type=int, default=8, help="frames of a clip, one a step")
    flag("--batch_size", type=int, default=2, help="clips of a micro-batch")
    flag("--pred_dim", type=int, default=1024, help="width of the predictor")
    flag("--pred_depth", type=int, default=24, help="blocks of the predictor")
    flag("--pred_heads", type=int, default=16, help="attention heads of the predictor")
    flag("--r", type=int, default=16, help="rank of the adapters; 0: train all of the predictor")
    flag("--dropout", type=float, default=0.05, help="dropout before the adapters")
    flag(
        "--dtype",
        default="bfloat16",
        choices=["float32", "bfloat16"],
        help="autocast precision, and the encoder's weights",
    )
    flag("--optim", default="adamw", choices=["adamw", "adamw8bit"], help="moments in 32 or 8 bits")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    width, depth, heads, mlp_dim = tuple(ARCHITECTURES[args.encoder])
    with torch.device("meta"):
        encoder = Encoder(width, depth, heads, mlp_dim=mlp_dim)
    dtype = getattr(torch, args.dtype)
    encoder_bytes = sum(p.numel() for p in encoder.parameters()) * dtype.itemsize
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    options = {"r": args.r, "dropout": args.dropout} if args.r else None
    found = estimate(
        encoder_bytes,
        width,
        args.crop_size // 16,
        size,
        options,
        args.batch_size,
        args.frames_per_clip,
        dtype,
        {"adamw": 8, "adamw8bit": 2.06}[args.optim],
    )
    total = {
        f"total{c}": sum(v for k, v in found.items() if "activ" not in k) + found[f"activations{c}"]
        for c in ("", ", checkpointed")
    }
    bench.report(
        [{"part": k, "GB": v / 1e9, "GiB": v / 2**30} for k, v in (found | total).items()],
        args.json,
        torch.device("cpu"),
    )
