"""How much of what full fine-tuning gains over the base do adapters recover? A table of finished
runs of train_lora.py on the same data.

    python -m bench.adapters out/robot/full out/robot/r16       # `make demo-lora` makes the runs

Reads val.csv, train.csv and the newest checkpoint of each run. Errors are those of the last
validation: one step ahead, and rolled out."""

import argparse
import csv
import os
import statistics
import sys

import torch

import bench
import checkpoint


def read(folder):
    """(last row of val.csv, median seconds of a step, peak MiB, parameters trained, of the
    predictor or 0, bytes of the adapter)."""
    rows = {}
    for name in ("train", "val"):
        with open(os.path.join(folder, name + ".csv")) as f:
            lines = csv.DictReader(f)
            rows[name] = [{k: float(v or "nan") for k, v in row.items()} for row in lines]
    state, path = checkpoint.load_latest(folder)
    if state is None or not rows["val"]:
        raise ValueError(f"{folder} holds no finished run of train_lora.py: train it first")
    per_step = state["args"]["batch_size"] * state["args"]["grad_accum"] * state["world_size"]
    trained = sum(v.numel() for v in state.get("adapter", state.get("predictor")).values())
    file = os.path.join(folder, "adapter", "adapter_model.safetensors")
    speed = statistics.median(row["clips_per_s"] for row in rows["train"]) / per_step
    return (
        rows["val"][-1],
        speed,
        max(row["memory_mib"] for row in rows["train"]),
        trained,
        os.path.getsize(file) if "adapter" in state else 0,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", help="run folders; the first is that of full fine-tuning"
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    sys.excepthook = checkpoint.short_excepthook
    (full, *_, whole, size), table = read(args.runs[0]), []
    if size:
        raise ValueError(f"{args.runs[0]} is a LoRA run: name the run with --full first")
    for folder in args.runs:
        v, speed, memory, trained, size = read(folder)
        if abs(v["base_tf"] / full["base_tf"] - 1) > 1e-4:
            raise ValueError(
                f"{folder} has another base or other held-out clips than {args.runs[0]}: its gain"
                " cannot be compared"
            )
        gains = {
            f"recovered, {n}": (
                (v[f"base_{k}"] - v[f"{k}_true"]) / (full[f"base_{k}"] - full[f"{k}_true"])
            )
            for n, k in (("one step", "tf"), ("rolled out", "ro"))
        }
        errors = {
            "base": v["base_tf"],
            "error": v["tf_true"],
            "base rolled out": v["base_ro"],
            "rolled out": v["ro_true"],
        }
        costs = {"steps/s": speed, "peak MiB": memory, "file MB": size / 1e6}
        table.append(
            {"run": os.path.basename(folder), "trained": trained, "share": trained / whole}
            | errors
            | gains
            | costs
        )
    bench.report(table, args.json, torch.device("cpu"))
