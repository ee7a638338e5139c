"""Does the model use the action? Held-out error of an action-conditioned predictor by horizon, under true, shuffled and zero actions.

    python eval.py --checkpoint out/demo --data 'demo/features/val/*.tar'

Reads a run folder or checkpoint of train_ac.py and held-out shards (video, or features of the same encoder). Prints a table and writes
report.json beside the checkpoint.
"""

import argparse
import json
import os
import sys

import torch

import checkpoint
from data import Clips, open_records, open_split
from encode import open_source
from kernels import chosen
from model import meter_summary
from runs import held_out, make_inputs, open_run
from vpt import ClipReader


def table(errors, summary, seconds):
    """What the action meter says, as lines for a person; `seconds` is the length of a step."""
    interval = f"[{summary['tf_gap_low']:+.2%}, {summary['tf_gap_high']:+.2%}]"
    lines = ["one step ahead"]
    lines.append(f"  skill (error / copying the last step)  {summary['tf_skill']:.3f}")
    lines.append(f"  action gap (shuffled / true - 1)       {summary['tf_gap']:+.2%}, 95 % interval over recordings {interval}")
    lines.append("rolled out: mean |error|" + "".join(f"{f'+{(k + 1) * seconds:.1f} s':>9}" for k in range(errors["ro_true"].shape[1])))
    for name in ("true", "shuffled", "zero", "copy"):
        label = name + (" actions" if name != "copy" else " first step")
        lines.append(f"  {label:22}" + "".join(f"{x:9.4f}" for x in errors[f"ro_{name}"].mean(0).tolist()))
    gap = errors["ro_shuffled"].mean(0) / errors["ro_true"].mean(0) - 1
    skill = errors["ro_true"].mean(0) / errors["ro_copy"].mean(0)
    lines.append(f"  {'action gap':22}" + "".join(f"{x:+9.2%}" for x in gap.tolist()))
    lines.append(f"  {'skill':22}" + "".join(f"{x:9.3f}" for x in skill.tolist()))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="run folder of train_ac.py, or one of its checkpoints")
    parser.add_argument("--data", "--data_path", nargs="+", action="append", help="held-out shards (default: what the run held out)")
    parser.add_argument("--encoder", help="weights of the encoder, for video shards (default: what the run used)")
    parser.add_argument("--val_clips", type=int, default=512, help="clips to evaluate")
    parser.add_argument("--batch_size", type=int, default=32, help="clips at once")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, state, scaler, path = open_run(args.checkpoint)
    run = state["args"]
    if args.data:
        records, bad = open_records(args.data)
    else:
        _, _, records, bad = open_split(run["data"] or [["VPT/*.tar"]], None, run["val_data"], run["val_fraction"])
    unknown = {r.name for r in records} - set(state["held_out"])
    if unknown:
        print(f"WARNING: {len(unknown)} of {len(records)} recordings are not among those the run held out: was it trained on them?")
    keep = {k: run[k] for k in ("fps", "frames_per_step", "crop_size", "action_space", "encode", "decoder", "gui")}
    dataset = Clips(records, [1.0] * len(records), ClipReader(run["frames_per_clip"], scaler=scaler, **keep), run["seed"])
    source = {k: run[k] for k in ("encode", "fps", "frames_per_step", "crop_size", "frames_per_clip")}
    features = "safetensors" in records[0].members
    if not features and not (args.encoder or run["encoder"]):
        raise ValueError("these shards hold video: name the --encoder of the run (train_ac.py's default is vjepa2_vitl)")
    encoder, source = open_source(records, None if features else args.encoder or run["encoder"], **source)
    if source["encoder_hash"] != state["encoder_hash"]:
        raise ValueError(f"{path} was trained on features of encoder {state['encoder_hash']}, these are of {source['encoder_hash']}")
    predictor.to(device)
    if encoder is not None:
        encoder.to(device)
    stats = {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}
    inputs = make_inputs(encoder, run["encode"], run["frames_per_step"], stats, device)
    errors, recordings, more = held_out(
        predictor, dataset, inputs, args.batch_size, args.val_clips, args.num_workers, run["auto_steps"], run["loss_exp"]
    )
    summary = meter_summary({k: v for k, v in errors.items() if k[2:3] == "_"}, recordings)
    for file, key, reason in bad + more:
        print(f"left out: {file} {key}: {reason}")
    T, S = run["frames_per_clip"] // run["frames_per_step"], state["grid"] ** 2 + 2
    kernels = chosen(device, torch.float32, head_dim=predictor.head_dim, block=S, length=(T - 1) * S)
    print(f"{path}: {len(recordings)} clips of {len(set(recordings))} recordings; {kernels}")
    print(table(errors, summary, run["frames_per_step"] / run["fps"]))
    report = {"checkpoint": path, "clips": len(recordings), "recordings": len(set(recordings))} | summary
    report |= {"by_horizon": {k: v.mean(0).tolist() for k, v in errors.items() if k.startswith("ro_")}}
    out = os.path.join(os.path.dirname(path), "report.json")
    checkpoint.write_atomically(out, json.dumps(report, indent=1).encode())
    print(f"written to {out}")
