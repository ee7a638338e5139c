"""What do adapters cost, and what do they recover? Our LoRA against Hugging Face PEFT, or a table
of finished runs.

    python -m bench.lora                 # CPU: a 6-layer 384-wide predictor, fp32, 2 clips of T=8
    python -m bench.lora --pred_dim 1024 --pred_depth 24 --pred_heads 16 --embed_dim 1408 \\
        --grid 16 --dtype bfloat16       # a GPU: the released predictor's size
    python -m bench.lora --runs out/robot/full out/robot/r16    # `make demo-lora` makes the runs

Without --runs it times forward + backward of the same predictor with our adapters and wrapped by
PEFT, and counts the bytes kept for the backward pass. PEFT reads the adapter that we write, so both
compute the same; losses and gradients are compared before anything is timed. A LoRA layer of PEFT
adds scale B A x to the output of the frozen layer in further passes, and under autocast it keeps
16-bit copies of the frozen weights.

With --runs it prints, for each finished run of train_lora.py on the same data, its errors at the
last validation (one step ahead, and rolled out), how much of full fine-tuning's gain over the base
it recovered, and its speed, memory and size. The first run is the one with --full."""

import argparse
import contextlib
import copy
import csv
import functools
import os
import statistics
import sys
import tempfile
import time

import torch

import bench
import checkpoint
from evaluation.memory import activation_bytes
from model import ACModel, Predictor, add_lora, lora_layers
from weights import save_adapter

# --- against PEFT ---


def wrap_both(base, rank, fused_qkv):
    """{"PEFT", "ours": ACModel}: the same base with the same adapter."""
    import peft  # a development package

    ours = copy.deepcopy(base)
    add_lora(ours, r=rank, fused_qkv=fused_qkv)
    for layer in lora_layers(ours).values():
        layer.lora_B.data.normal_(std=0.01)  # at zero, as it starts, it would add nothing

    # PEFT reads the file that we write
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    return {"PEFT": ACModel(wrapped.base_model.model), "ours": ACModel(ours)}


def loss_and_gradient(model, inputs):
    """(loss, gradients of all lora_A). B is left out: it is block-diagonal in ours and three blocks
    in PEFT's."""
    loss = sum(model(*inputs))
    loss.backward()
    gradients = [p.grad.flatten() for n, p in model.named_parameters() if "lora_A" in n]
    model.zero_grad(set_to_none=True)
    return loss.item(), torch.cat(gradients)


def check_equal(form, models, inputs):
    """End the program if ours computes something else than PEFT.

    In fp32 whatever --dtype says: in 16 bits the sign in the gradient of L1 flips wherever the
    error is small."""
    wanted_loss, wanted_gradient = loss_and_gradient(models["PEFT"], inputs)
    for name, model in models.items():
        loss, gradient = loss_and_gradient(model, inputs)
        loss_off = abs(loss / wanted_loss - 1)
        gradient_off = ((gradient - wanted_gradient).norm() / wanted_gradient.norm()).item()
        print(
            f"{form}, {name}: loss {loss:.6f}, off by {loss_off:.1e}, gradients of A by"
            f" {gradient_off:.1e}"
        )
        if max(loss_off, gradient_off) > 1e-3:
            raise SystemExit(f"{name} computes something else than PEFT")


def set_dropout(models, dropout):
    """Dropout before the adapters of both, which was off while they were compared."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
            elif hasattr(module, "lora_dropout"):  # PEFT puts an Identity where there is none
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
            elif hasattr(module, "lora_A"):
                module.dropout = dropout


def peft_rows(base, inputs, rank, dropout, dtype, repeats, clock=time.perf_counter):
    """Rows of ours and PEFT's, with adapters of q, k, v apart and of the fused qkv. clock: as in
    bench.medians."""
    device = inputs[0].device

    def autocast():
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype)

    def step(model):
        with autocast():
            loss = sum(model(*inputs))
        loss.backward()

    rows = []
    for form, fused_qkv in (("split", False), ("fused qkv", True)):
        models = wrap_both(base, rank, fused_qkv)
        check_equal(form, models, inputs)
        set_dropout(models, dropout)

        # bytes first: a timed step leaves gradients behind
        kept = {}
        for name, model in models.items():
            with autocast():
                kept[name] = activation_bytes(model, *inputs) / 2**20
        calls = {name: functools.partial(step, model) for name, model in models.items()}
        seconds = bench.medians(calls, device, repeats, clock=clock)

        for name, s in seconds.items():
            row = {"adapters": form, "by": name, "ms": 1e3 * s, "kept MiB": kept[name]}
            row["PEFT / it"] = seconds["PEFT"] / s
            row["memory / PEFT's"] = kept[name] / kept["PEFT"]
            rows.append(row)
    return rows


# --- finished runs ---


def read_csv(folder, name):
    """Rows of a log as dicts of numbers."""
    with open(os.path.join(folder, name)) as f:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(f)]


def read_run(folder):
    """Of a finished run: {"val": last row of val.csv, "trained": parameters trained, "steps/s",
    "peak MiB", "file": bytes of the adapter, 0 for a run with --full}."""
    train = read_csv(folder, "train.csv")
    val = read_csv(folder, "val.csv")
    state, _ = checkpoint.load_latest(folder)
    if state is None or not val:
        raise ValueError(f"{folder} holds no finished run of train_lora.py: train it first")
    clips = state["args"]["batch_size"] * state["args"]["grad_accum"] * state["world_size"]
    weights = state.get("adapter", state.get("predictor"))
    file = os.path.join(folder, "adapter", "adapter_model.safetensors")
    return {
        "val": val[-1],
        "trained": sum(v.numel() for v in weights.values()),
        "steps/s": statistics.median(row["clips_per_s"] for row in train) / clips,
        "peak MiB": max(row["memory_mib"] for row in train),
        "file": os.path.getsize(file) if "adapter" in state else 0,
    }


def gain(val, kind):
    """How much lower the error is than the base's. kind: tf (one step ahead), ro (rolled out)."""
    return val[f"base_{kind}"] - val[f"{kind}_true"]


def run_rows(folders):
    """Rows of finished runs. The first is that of full fine-tuning, whose gain is the whole."""
    full = read_run(folders[0])
    if full["file"]:
        raise ValueError(f"{folders[0]} is a LoRA run: name the run with --full first")
    rows = []
    for folder in folders:
        run = read_run(folder)
        val = run["val"]
        if abs(val["base_tf"] / full["val"]["base_tf"] - 1) > 1e-4:
            raise ValueError(
                f"{folder} has another base or other held-out clips than {folders[0]}: its gain"
                " cannot be compared"
            )
        row = {"run": os.path.basename(folder), "trained": run["trained"]}
        row["share"] = run["trained"] / full["trained"]
        row |= {"base": val["base_tf"], "error": val["tf_true"]}
        row |= {"base rolled out": val["base_ro"], "rolled out": val["ro_true"]}
        row["recovered, one step"] = gain(val, "tf") / gain(full["val"], "tf")
        row["recovered, rolled out"] = gain(val, "ro") / gain(full["val"], "ro")
        row |= {
            "steps/s": run["steps/s"],
            "peak MiB": run["peak MiB"],
            "file MB": run["file"] / 1e6,
        }
        rows.append(row)
    return rows


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--runs", nargs="+", help="folders of finished runs; the first is that with --full")
    flag("--json", action="store_true", help="print rows as JSON lines")

    flag = parser.add_argument_group("against PEFT").add_argument
    flag("--embed_dim", type=int, default=192, help="width of the features (default 192)")
    flag("--grid", type=int, default=8, help="patches along a side of a frame (default 8)")
    flag("--steps", type=int, default=8, help="steps T of a clip (default 8)")
    flag("--batch_size", type=int, default=2, help="clips of a step (default 2)")
    flag("--pred_dim", type=int, default=384, help="width of the predictor (default 384)")
    flag("--pred_depth", type=int, default=6, help="blocks of the predictor (default 6)")
    flag("--pred_heads", type=int, default=6, help="attention heads (default 6)")
    flag("--r", type=int, default=16, help="rank of the adapters (default 16)")
    flag("--dropout", type=float, default=0.05, help="before the adapters, timed (default 0.05)")
    dtypes = ["float32", "bfloat16"]
    flag("--dtype", default="float32", choices=dtypes, help="autocast of both (default float32)")
    flag("--repeats", type=int, default=10, help="timed calls of each (default 10)")
    args = parser.parse_args()
    sys.excepthook = checkpoint.short_excepthook

    # --- a table of finished runs ---
    if args.runs:
        bench.report(run_rows(args.runs), args.json, torch.device("cpu"))
        sys.exit()

    # --- or one predictor with adapters, twice ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    base = Predictor(args.embed_dim, 7, 7, (args.grid, args.grid), **size).to(device)
    B = args.batch_size
    T = args.steps
    shapes = ((B, T, args.grid**2, args.embed_dim), (B, T - 1, 7), (B, T, 7))
    inputs = [torch.randn(*shape, device=device) for shape in shapes]
    dtype = getattr(torch, args.dtype)
    rows = peft_rows(base, inputs, args.r, args.dropout, dtype, args.repeats)
    bench.report(rows, args.json, device)
