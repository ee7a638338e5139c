"""Forward + backward of our LoRA against the same predictor wrapped by Hugging Face PEFT: time, and
bytes kept for the backward pass.

    python -m bench.lora                             # CPU: a 6-layer 384-wide predictor, 8 x 8 patches, T=8, 2 clips, fp32
    python -m bench.lora --pred_dim 1024 --pred_depth 24 --pred_heads 16 --embed_dim 1408 --grid 16 --dtype bfloat16     # a GPU

PEFT gets the adapter that we write, so both compute the same; losses and gradients are compared
before anything is timed. A LoRA layer of PEFT adds scale B A x to the output of the frozen layer in
further passes, and under autocast keeps 16-bit copies of the frozen weights."""

import argparse
import contextlib
import copy
import tempfile

import peft
import torch

import bench
from evaluation.memory import activation_bytes
from model import ACModel, Predictor, add_lora, lora_layers
from weights import save_adapter

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--embed_dim", type=int, default=192, help="width of the encoder's features")
    flag("--grid", type=int, default=8, help="patches along a side of a frame")
    flag("--steps", type=int, default=8, help="steps T of a clip")
    flag("--batch_size", type=int, default=2, help="clips of a step")
    flag("--pred_dim", type=int, default=384, help="width of the predictor")
    flag("--pred_depth", type=int, default=6, help="blocks of the predictor")
    flag("--pred_heads", type=int, default=6, help="attention heads of the predictor")
    flag("--r", type=int, default=16, help="rank of the adapters")
    flag(
        "--dropout", type=float, default=0.05, help="dropout before the adapters, in what is timed"
    )
    flag(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="autocast precision of both",
    )
    flag("--repeats", type=int, default=10, help="timed calls of each")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    base = Predictor(args.embed_dim, 7, 7, (args.grid, args.grid), **size).to(device)
    shapes = ((args.steps, args.grid**2, args.embed_dim), (args.steps - 1, 7), (args.steps, 7))
    inputs, rows = [torch.randn(args.batch_size, *s, device=device) for s in shapes], []

    def autocast():
        return (
            torch.autocast(device.type, torch.bfloat16)
            if args.dtype == "bfloat16"
            else contextlib.nullcontext()
        )

    for form, fused in (("split", False), ("fused qkv", True)):
        ours = copy.deepcopy(base)
        add_lora(ours, r=args.r, fused_qkv=fused)
        for m in lora_layers(ours).values():
            m.lora_B.data.normal_(std=0.01)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(ours, folder)
            theirs = peft.PeftModel.from_pretrained(
                copy.deepcopy(base), folder, is_trainable=True
            ).base_model.model
        models = {"PEFT": ACModel(theirs), "ours": ACModel(ours)}
        calls = {}
        wanted = None
        for name, model in models.items():

            def step(model=model, exact=False):
                with contextlib.nullcontext() if exact else autocast():
                    loss = sum(model(*inputs))
                loss.backward()
                return loss.detach()

            loss = step(
                exact=True
            ).item()  # in 16 bits the sign in the gradient of L1 flips wherever the error is small
            sizes = {
                n: p.grad for n, p in model.named_parameters() if "lora_A" in n
            }  # B is block-diagonal here and three blocks there
            found = loss, torch.cat([g.flatten() for g in sizes.values()])
            wanted = wanted or found
            off = (
                abs(loss / wanted[0] - 1),
                ((found[1] - wanted[1]).norm() / wanted[1].norm()).item(),
            )
            print(
                f"{form}, {name}: loss {loss:.6f}, off by {off[0]:.1e}, gradients of A by"
                f" {off[1]:.1e}"
            )
            if max(off) > 1e-3:
                raise SystemExit(f"{name} computes something else than PEFT")
            model.zero_grad(set_to_none=True)
            calls[name] = step
        for module in (m for model in models.values() for m in model.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = args.dropout
            elif hasattr(module, "lora_dropout"):  # PEFT puts an Identity where there is none
                module.lora_dropout["default"] = torch.nn.Dropout(args.dropout)
            elif hasattr(module, "lora_A"):
                module.dropout = args.dropout
        kept = {}
        for name, model in models.items():
            with autocast():
                kept[name] = activation_bytes(model, *inputs) / 2**20
        seconds = bench.medians(calls, device, args.repeats)
        for name, s in seconds.items():
            ratios = {
                "PEFT / it": seconds["PEFT"] / s,
                "memory / PEFT's": kept[name] / kept["PEFT"],
            }
            rows.append(
                {"adapters": form, "by": name, "ms": 1e3 * s, "kept MiB": kept[name]} | ratios
            )
    bench.report(rows, args.json, device)
