"""What do frozen features, and a predictor's predictions, say about actions? Probes, and labels for
gameplay that has none.

    python probe.py --checkpoint out/demo --data 'demo/features/train/*.tar' --val_data 'demo/features/val/*.tar'
    python probe.py --encoder vit_tiny --crop_size 32 --fps 10 --data 'demo/train/*.tar' --val_data 'demo/val/*.tar' --label_field hotbar
    python probe.py --checkpoint out/demo --encoder vit_tiny --task inverse --label new.tar --out labelled.tar

A linear and an attentive head for each --task: inverse (steps t, t+1 -> action t, with a checkpoint
on predicted steps too), anticipation (steps t-1, t -> the actions that follow) and classify (clip
-> label). Fitted on --data, tested on --val_data, which are other recordings; a tenth of the
fitting recordings chooses ridge penalties and thresholds. Prints tables, writes probe.json.
--label: see guide_lines."""

import argparse
import csv
import io
import json
import math
import os
import sys
import tarfile

import av
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from data import (
    READ_ERRORS,
    Slice,
    archive_members,
    member_place,
    open_records,
    open_split,
    read_start,
    read_ticks,
    split_records,
)
from encode import open_source
from evaluation.heads import (
    anticipation,
    anticipation_table,
    classify,
    classify_table,
    inverse,
    inverse_table,
    load,
    pool,
)
from evaluation.runs import (
    encoder_dtype,
    make_inputs,
    open_run,
    precision_of,
    precision_text,
)
from files.logs import to_json
from files.streams import disk_failed, disk_sentence, is_apple_double, member_kind
from files.vpt import (
    ACTION_SPACES,
    BOM,
    CONTINUOUS,
    SLOTS,
    ClipReader,
    WrongDecoder,
    mp4_times,
    read_frames,
    step_size,
    wrap,
)
from kernels import chosen

TASKS = ["inverse", "anticipation", "classify"]


# --- labels of clips ---


def line_labels(clips, field, shards, reader):
    """The value of a field of the JSONL lines, as text, at the middle tick of each clip; shards:
    records with lines, by recording."""
    out, lines = [], {}
    for record, window in clips["place"]:
        if (source := shards.get(record.recording)) is None:
            raise ValueError(
                f"{record.shard} holds features, which have no lines, and no --lines shard holds"
                f" {record.recording}"
            )
        if record.recording not in lines:
            ticks = read_ticks(source)
            with Slice(source.shard, *source.members["jsonl"]) as f:
                text = f.read().splitlines()
            lines[record.recording] = (
                [text[i].removeprefix(BOM) for i in ticks.line],
                step_size(ticks.rate, reader.fps),
            )
        text, stride = lines[record.recording]
        start = int(record.key.rpartition("@")[2]) if "safetensors" in record.members else 0
        line = json.loads(text[start + round((window + 0.5) * reader.frames * stride)])
        if field not in line:
            raise ValueError(
                f"--label_field {field} is not in the lines of {record.recording}, which have"
                f" {', '.join(line)}"
            )
        out.append(json.dumps(line[field]))
    return np.array(out)


def csv_labels(path, known):
    """{recording: label} of a CSV with columns key,label."""
    with open(path, newline="") as f:
        rows = csv.DictReader(f)
        if not {"key", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"--labels {path} has columns {rows.fieldnames}, not key and label")
        found = {row["key"]: row["label"] for row in rows}
    if strange := sorted(found.keys() - known):
        raise ValueError(
            f"--labels {path} names {len(strange)} recordings that the shards do not hold,"
            f" {strange[0]} among them"
        )
    return found


# --- labels for gameplay that has none ---


def guide_lines(actions, names, ends, frames, rate):
    """Unscaled actions (S-1, A) between frames `ends` (S,) -> `frames` lines as dicts, in the
    guides' format: motion spread evenly over a step's ticks, keys held on all of them, yaw and
    pitch summed from 0 (pitch stops at straight up and down), no input before the first end and
    after the last. With slots among the names the keys 1-9 are left out: vpt.parse_ticks adds them
    where the slot changes."""
    tick = np.arange(frames)
    at = np.clip(np.searchsorted(ends, tick, side="right") - 1, 0, len(actions) - 1)
    inside = (tick >= ends[0]) & (tick < ends[-1])
    motion = actions[at, :4] * (inside / np.diff(ends)[at])[:, None]
    yaw, pitch = (np.cumsum(motion[:, 2:], axis=0) - motion[:, 2:]).T
    slots = [i for i, n in enumerate(names) if n in SLOTS]
    keys = [
        (i, n[4:])
        for i, n in enumerate(names)
        if n.startswith("key.") and not (slots and n[4:].isdigit())
    ]
    hotbar = actions[:, slots].argmax(1)[at] if slots else np.zeros(frames, int)
    for t in range(frames):
        held = actions[at[t]] * inside[t]
        line = {
            "timestamp": round(t / rate, 6),
            "mouse": {"dx": round(float(motion[t, 0]), 6), "dy": round(float(motion[t, 1]), 6)},
        }
        line["mouse"]["buttons"] = [
            int(n[6:])
            for i, n in enumerate(names)
            if n.startswith("mouse.") and n[6:].isdigit() and held[i]
        ]
        line["keyboard"] = {"keys": [f"key.keyboard.{n}" for i, n in keys if held[i]]}
        line["camera"] = [
            round(float(wrap(yaw[t])), 7),
            round(float(np.clip(pitch[t], -math.pi / 2, math.pi / 2)), 7),
        ]
        yield line | {
            "hotbar": int(hotbar[t]),
            "isGuiOpen": bool("gui_open" in names and held[names.index("gui_open")]),
        }


@torch.no_grad()
def label_video(data, head, names, columns, reader, inputs, side):
    """Bytes of an mp4 -> (lines, actions (S-1, A), ends (S,)): what a fitted head says about its
    steps."""
    f = io.BytesIO(data)
    times = mp4_times(f)
    f.seek(0)
    with av.open(f) as container:
        rate = 1 / float(np.median(np.diff(times)) * container.streams.video[0].time_base)
    shown = step_size(rate, reader.fps) * np.arange(len(times))
    shown = shown[shown < len(times)]
    shown = shown[: len(shown) // reader.frames_per_step * reader.frames_per_step].reshape(
        -1, reader.frames_per_step
    )
    if len(shown) < 2:
        raise ValueError(
            f"too short: {len(times)} frames at {rate:g} a second are {len(shown)} steps"
        )
    T, found = reader.frames // reader.frames_per_step, np.zeros((len(shown) - 1, len(columns)))
    for start in range(
        0, len(shown) - 1, T - 1
    ):  # clips as in training, each going on from the last step of the one before
        part = shown[(start := max(min(start, len(shown) - T), 0)) : start + T]
        video = read_frames(f, times, part.ravel(), reader.crop, reader.decoder)
        y, x = (np.array(video.shape[1:3]) - reader.crop) // 2
        video = torch.from_numpy(
            video[:, y : y + reader.crop, x : x + reader.crop].transpose(0, 3, 1, 2).copy()
        )[None]
        z = pool(
            inputs({"video": video, "actions": torch.zeros(0), "states": torch.zeros(0)})[0], side
        )[0]
        found[start : start + len(part) - 1] = head.predict(z[:-1], z[1:])
    actions, ends = (
        np.zeros((len(found), len(names))),
        shown[:, -1] if reader.encode == "tubelet" else shown[:, 0],
    )
    for i, column in enumerate(columns):
        soft = names[column] in [*CONTINUOUS, *SLOTS]
        actions[:, column] = found[:, i] if soft else found[:, i] > head.threshold[i]
    return list(guide_lines(actions, names, ends, len(times), rate)), actions, ends


def video_members(path):
    """{KEY.mp4: its place in the shard}; ValueError if there is none, or if it is no tar."""
    found, end = {}, os.path.getsize(path)
    try:
        for m, offset in archive_members(path, end):
            if not m.isfile() or member_kind(m.name)[1] != "mp4":
                continue
            place = member_place(m, offset, end)
            if not is_apple_double(m.name, read_start(path, place)):
                found[m.name] = place
    except tarfile.TarError as e:
        raise ValueError(f"--label {path} is no tar, or damaged: {e}") from e
    if not found:
        raise ValueError(f"--label {path} holds no KEY.mp4: there is nothing to label")
    return found


def label_shard(source, out, label):
    """KEY.mp4 of a shard -> a shard of KEY.mp4 and KEY.jsonl; label(bytes) -> lines. How many,
    [(file, key, reason)] that cannot be."""
    bad, done = [], 0

    def write(file):
        nonlocal done
        places = video_members(source)
        with tarfile.open(fileobj=file, mode="w") as packed:
            for name in tqdm(places, desc="label", unit="recording", delay=10):
                with Slice(source, *places[name]) as f:
                    data = f.read()
                try:
                    text = "".join(json.dumps(line) + "\n" for line in label(data)).encode()
                except WrongDecoder as e:
                    raise ValueError(f"--label {source} {name}: {e}") from e
                except READ_ERRORS as e:
                    if disk_failed(e):
                        raise OSError(disk_sentence(f"{source} {name}", e)) from e
                    bad.append((source, name, f"{type(e).__name__}: {e}"))
                    continue
                for member, content in ((name, data), (name[:-3] + "jsonl", text)):
                    member = tarfile.TarInfo(member)
                    member.size = len(content)
                    packed.addfile(member, io.BytesIO(content))
                done += 1
        if not done:
            raise ValueError(f"--label {source}: no video can be used: {bad[0][1]}: {bad[0][2]}")

    checkpoint.write_atomically(out, write)
    return done, bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        help="run folder of train_ac.py, or one of its checkpoints: its predictions are probed too",
    )
    parser.add_argument(
        "--data",
        "--data_path",
        nargs="+",
        action="append",
        help="shards to fit on (default: the run's)",
    )
    parser.add_argument(
        "--val_data",
        nargs="+",
        action="append",
        help="shards to test on (default: what the run held out)",
    )
    parser.add_argument(
        "--encoder", help="weights of the encoder, for video (default: what the run used)"
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=TASKS,
        help="what to probe (default: all; classify with a label)",
    )
    parser.add_argument("--horizon", type=int, default=3, help="anticipation: actions ahead")
    parser.add_argument(
        "--label_field", help="classify: a field of the JSONL lines, at a clip's middle tick"
    )
    parser.add_argument(
        "--lines",
        nargs="+",
        help="classify features by --label_field: the shards that they were made from",
    )
    parser.add_argument(
        "--labels", metavar="FILE.csv", help="classify: labels of recordings, columns key,label"
    )
    parser.add_argument(
        "--label",
        metavar="IN.tar",
        help="label this shard's videos with the attentive inverse probe; needs the encoder",
    )
    parser.add_argument(
        "--out",
        help=(
            "folder of probe.json (default: the checkpoint's, or here); with --label the shard,"
            " probe.json beside it"
        ),
    )
    parser.add_argument("--steps", type=int, default=600, help="AdamW steps of an attentive head")
    parser.add_argument(
        "--side",
        type=int,
        default=4,
        help="probe the mean tokens of at most this many cells a side of the patch grid",
    )
    parser.add_argument("--clips", type=int, default=4000, help="windows to fit on at most")
    parser.add_argument("--val_clips", type=int, default=1000, help="windows to test on at most")
    parser.add_argument("--batch_size", type=int, default=32, help="windows encoded at once")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="autocast precision of encoder and predictor (default: what the run was trained in)",
    )
    parser.add_argument(
        "--frames_per_clip",
        type=int,
        default=16,
        help="without a checkpoint: sampled frames a clip",
    )
    parser.add_argument(
        "--fps", type=float, default=5.0, help="without a checkpoint: sampled frames a second"
    )
    parser.add_argument(
        "--frames_per_step", type=int, default=2, help="without a checkpoint: sampled frames a step"
    )
    parser.add_argument(
        "--crop_size", type=int, default=256, help="without a checkpoint: pixels of the square crop"
    )
    parser.add_argument(
        "--encode",
        default="tubelet",
        choices=["tubelet", "frame", "clip"],
        help="without a checkpoint: see train_ac.py",
    )
    parser.add_argument(
        "--action_space",
        type=int,
        default=36,
        choices=ACTION_SPACES,
        help="without a checkpoint: actions to probe",
    )
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    if not (args.checkpoint or args.data and args.val_data):
        raise ValueError("name a --checkpoint, or --data to fit on and --val_data to test on")
    if args.label and not (video_members(args.label) and (args.out or "").endswith(".tar")):
        raise ValueError("--label needs the shard to write: --out OUT.tar")
    if args.label and os.path.realpath(args.label) == os.path.realpath(args.out):
        raise ValueError(
            f"--out {args.out} is the shard of --label itself: what its lines say would be lost"
        )
    if (
        min(
            args.steps, args.horizon, args.side, args.clips - 1, args.val_clips - 1, args.batch_size
        )
        < 1
    ):
        raise ValueError(
            "two --clips and --val_clips, and one --steps, --horizon, --side and --batch_size are"
            " the least"
        )
    asked = args.task or ["inverse", "anticipation"] + ["classify"] * bool(
        args.label_field or args.labels
    )
    if "classify" in asked and bool(args.label_field) == bool(args.labels):
        raise ValueError(
            "--task classify needs one label: --label_field FIELD of the lines, or --labels"
            " FILE.csv"
        )
    if args.label and "inverse" not in asked:
        raise ValueError("--label needs --task inverse, which fits what it labels with")

    # --- data, encoder, predictor ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = {
        k: getattr(args, k)
        for k in (
            "frames_per_clip",
            "fps",
            "frames_per_step",
            "crop_size",
            "encode",
            "action_space",
            "encoder",
        )
    }
    settings, held, stats, folder, predictor, scaler = list(run)[:5], None, {}, ".", None, None
    state = None
    if args.checkpoint:
        predictor, state, scaler, path = open_run(args.checkpoint)
        run, held, folder = state["args"], set(state["held_out"]), os.path.dirname(path)
        if state["dataset"] != "vpt" or state["action_names"] != ACTION_SPACES[run["action_space"]]:
            raise ValueError(
                f"{path} has actions {state['action_names'][:4]}..., gameplay shards none such:"
                " probe a run of train_ac.py"
            )
        stats = {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}
        predictor.to(device)
    dtype, autocast = precision_of(args.dtype, state, device)
    steps = run["frames_per_clip"] // run["frames_per_step"]
    if predictor is not None:
        print(precision_text(dtype, device, predictor, steps - 1))
    else:
        print(f"{dtype} on {device.type}; {chosen(device, getattr(torch, dtype))}")
    if "anticipation" in asked and steps < args.horizon + 2:
        raise ValueError(
            f"--horizon {args.horizon} needs clips of {args.horizon + 2} steps, these have {steps}:"
            " lower it, or name the --task"
        )
    given = (
        args.data or run["data"] or [["VPT/*.tar"]],
        None,
        args.val_data or run.get("val_data"),
        run.get("val_fraction", 0),
    )
    train_records, _, val_records, bad = open_split(*given)
    if not (train_records and val_records):
        raise ValueError(
            f"{len(train_records)} recordings to fit on and {len(val_records)} to test on: name"
            " local --data and --val_data"
        )
    if held is not None and (strange := {r.name for r in val_records} - held):
        print(
            f"WARNING: {len(strange)} of {len(val_records)} recordings are not among those the run"
            " held out: was it trained on them?"
        )
    records = train_records + val_records
    name = args.encoder or (run["encoder"] if "safetensors" not in records[0].members else None)
    if not name and (args.label or "safetensors" not in records[0].members):
        raise ValueError("encoding video needs the weights: name the --encoder")
    encoder, source = open_source(records, name, **{k: run[k] for k in settings})
    if args.checkpoint and source["encoder_hash"] != state["encoder_hash"]:
        raise ValueError(
            f"{path} was trained on features of encoder {state['encoder_hash']}, these are of"
            f" {source['encoder_hash']}"
        )
    options = {k: run[k] for k in ("decoder", "gui") if k in run}
    reader = ClipReader(
        *(run[k] for k in settings[:4]), run["action_space"], encode=run["encode"], **options
    )
    if encoder is not None:
        encoder.to(device, encoder_dtype(dtype, run))
    inputs = make_inputs(encoder, run["encode"], run["frames_per_step"], stats, device, autocast)
    how = {"side": args.side, "batch_size": args.batch_size, "num_workers": args.num_workers}
    how["autocast"] = autocast
    (train, more), (val, also) = (
        load(r, reader, inputs, predictor, scaler, n, **how)
        for r, n in ((train_records, args.clips), (val_records, args.val_clips))
    )
    for file, key, reason in bad + more + also:
        print(f"left out: {file} {key}: {reason}")
    kept = {r.recording for r in split_records(train_records, 0.1)[0]}
    dev = np.array([r.recording not in kept for r, _ in train["place"]])
    if dev.all() or not dev.any():
        print(
            "note: too few recordings to fit on: a tenth of the clips chooses penalties and"
            " thresholds"
        )
        dev = np.arange(len(dev)) % 10 == 0
    report = {
        "checkpoint": args.checkpoint and path,
        "dtype": dtype,
        "clips": [len(train["place"]), len(val["place"])],
    }
    report["recordings"] = [len({r.recording for r, _ in c["place"]}) for c in (train, val)]
    fitted, tested = (
        f"{n} clips of {m} recordings" for n, m in zip(report["clips"], report["recordings"])
    )
    print(f"fitted on {fitted}, tested on {tested}; {train['z'].shape[2]} tokens a step")

    # --- tasks ---
    if run["encode"] == "clip" and "anticipation" in asked:
        print(
            "WARNING: with --encode clip every step has seen the whole clip: anticipation is no"
            " forecast"
        )
    if "classify" in asked:
        known = {r.recording: r for r in records}
        if args.labels:
            found = csv_labels(args.labels, known.keys())
            labels = [
                np.array([found.get(r.recording, "") for r, _ in c["place"]]) for c in (train, val)
            ]
            if unlabelled := sorted(known.keys() - found.keys()):
                print(
                    f"left out: {len(unlabelled)} recordings without a label in {args.labels},"
                    f" {unlabelled[0]} among them"
                )
        else:
            shards = {
                r.recording: r
                for r in (open_records(args.lines)[0] if args.lines else records)
                if "jsonl" in r.members
            }
            labels = [line_labels(c, args.label_field, shards, reader) for c in (train, val)]
        report["classify"] = classify(
            train, val, *labels, args.label_field or args.labels, args.steps
        )
        print("\n".join(classify_table(report["classify"], args.label_field or args.labels)))
    names, varies = (
        ACTION_SPACES[run["action_space"]],
        [c["actions"].std((0, 1)) > 0 for c in (train, val)],
    )
    columns = np.flatnonzero(varies[0] & varies[1])
    if gone := [n for i, n in enumerate(names) if i not in columns]:
        print(f"left out, since they do not vary in both splits: {', '.join(gone)}")
    if not len(columns) and {"inverse", "anticipation"} & set(asked):
        raise ValueError("no action varies in both splits: name other shards")
    if "inverse" in asked:
        report["inverse"], heads = inverse(train, val, dev, names, columns, args.steps)
        print("\n".join(inverse_table(report["inverse"])))
    if "anticipation" in asked:
        report["anticipation"] = anticipation(
            train, val, dev, names, columns, args.steps, args.horizon
        )
        print(
            "\n".join(
                anticipation_table(report["anticipation"], run["frames_per_step"] / run["fps"])
            )
        )
    out = os.path.join(
        os.path.dirname(args.out) if args.label else args.out or folder, "probe.json"
    )
    checkpoint.write_atomically(out, to_json(report).encode())
    if args.label:
        head = heads["attentive"]
        done, bad = label_shard(
            args.label,
            args.out,
            lambda data: label_video(data, head, names, columns, reader, inputs, args.side)[0],
        )
        for file, key, reason in bad:
            print(f"left out: {file} {key}: {reason}")
        print(f"labelled {done} recordings of {args.label} in {args.out}")
    print(f"written to {out}; peak memory {checkpoint.peak_memory(device):.0f} MiB")
