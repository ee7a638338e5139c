"""What do frozen features, and a predictor's predictions, say about actions? Probes, and labels for
gameplay that has none.

    python probe.py --checkpoint out/demo --data 'demo/features/train/*.tar' \\
        --val_data 'demo/features/val/*.tar'
    python probe.py --encoder vit_tiny doom_tiny --crop_size 48 --fps 10 \\
        --data 'demo/train/*.tar' --val_data 'demo/val/*.tar' --label_field hotbar
    python probe.py --encoder vit_tiny out/vjepa --task order --data videos/ --val_data other/
    python probe.py --checkpoint out/demo --encoder doom_tiny --task inverse \\
        --label new.tar --out labelled.tar

A linear and an attentive head for each --task: inverse (steps t, t+1 -> action t, with a checkpoint
on predicted steps too), anticipation (steps t-1, t -> the actions that follow), motion (two steps
-> how far the player has turned and walked), order (two steps of a clip -> which is earlier, how
far apart; needs no actions, so plain video will do) and classify (clip -> label). Without a
checkpoint several encoders are compared, in one table at the end.

Fitted on --data, tested on --val_data, which are other recordings; a tenth of the fitting
recordings chooses ridge penalties and thresholds. Prints tables, writes probe.json. --label writes
a shard of videos and the JSONL lines that the attentive inverse probe gives them."""

import argparse

from evaluation.flags import Help

# what can be read from features: the action between two steps, the actions that follow, how far the
# player moves, which of two steps is earlier, a label
TASKS = ["inverse", "anticipation", "motion", "order", "classify"]

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]

# what the encoder sees at once
MODES = ["tubelet", "frame", "clip"]


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that are too small or do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )
    repeated = {"nargs": "+", "action": "append"}

    # whose features, on which play; what is fitted on must not be tested on
    flag = parser.add_argument_group("run and data").add_argument
    flag("--checkpoint", help="a run of train_ac.py: its predictions are probed too")
    flag("--data", "--data_path", **repeated, help="shards to fit on (default: the run's)")
    flag("--val_data", **repeated, help="shards to test on (default: the run's)")
    flag(
        "--encoder", nargs="+", help="weights for video; several are compared (default: the run's)"
    )
    flag("--out", help="folder of probe.json (default: the checkpoint's); with --label the shard")

    # what to read from them
    flag = parser.add_argument_group("tasks").add_argument
    flag(
        "--task",
        nargs="+",
        choices=TASKS,
        help="(default: all but order; motion only without a run)",
    )
    flag("--horizon", type=int, default=3, help="anticipation and motion: steps ahead")
    flag("--label_field", help="classify: a field of the JSONL lines, at a clip's middle tick")
    flag("--lines", nargs="+", help="features: the shards they are from, for --label_field, motion")
    flag("--labels", metavar="FILE.csv", help="classify: labels of recordings, columns key,label")
    flag("--label", metavar="IN.tar", help="write lines for this shard's videos; needs the encoder")

    # how long that takes
    flag = parser.add_argument_group("how").add_argument
    flag("--steps", type=int, default=600, help="AdamW steps of an attentive head")
    flag("--side", type=int, default=4, help="tokens are averaged over this many cells a side")
    flag("--clips", type=int, default=4000, help="windows to fit on at most")
    flag("--val_clips", type=int, default=1000, help="windows to test on at most")
    flag("--batch_size", type=int, default=32, help="windows encoded at once")
    flag("--num_workers", type=int, default=2, help="loader processes")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")

    # what a run's checkpoint says otherwise; the defaults are those of train_ac.py, but for the
    # actions: all of VPT's
    flag = parser.add_argument_group("without a checkpoint (see train_ac.py)").add_argument
    flag("--frames_per_clip", type=int, default=16, help="sampled frames of a clip")
    flag("--fps", type=float, default=5.0, help="sampled frames a second")
    flag("--frames_per_step", type=int, default=2, help="sampled frames a step")
    flag("--crop_size", type=int, default=256, help="pixels of the square crop")
    flag("--encode", default="tubelet", choices=MODES, help="what the encoder sees at once")
    flag("--action_space", type=int, default=36, help="actions to probe: 13, 18, 36 or 38")

    # one check, one message. Without a run nothing says which recordings it was trained on
    args = parser.parse_args()
    if not (args.checkpoint or args.data and args.val_data):
        parser.error("name a --checkpoint, or --data to fit on and --val_data to test on")
    for name in ("steps", "horizon", "side", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least 1")
    # one clip can be fitted, but not be fitted and chosen on
    for name in ("clips", "val_clips"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least 2")

    # what is probed unless --task says so: classify needs to know what to classify
    if not args.task:
        args.task = ["inverse", "anticipation"]
        if not args.checkpoint:
            args.task.append("motion")
        if args.label_field or args.labels:
            args.task.append("classify")
    if "classify" in args.task and bool(args.label_field) == bool(args.labels):
        parser.error(
            "--task classify needs one label: --label_field FIELD of the lines, or --labels"
            " FILE.csv"
        )
    # a shard is labelled by the inverse head
    if args.label and "inverse" not in args.task:
        parser.error("--label needs --task inverse, which fits what it labels with")
    if len(args.encoder or []) > 1 and (args.checkpoint or args.label):
        parser.error("--encoder: a run has one encoder, and so has --label; name only one")
    if args.label and not (args.out or "").endswith(".tar"):
        parser.error("--label needs the shard to write: --out OUT.tar")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import csv
import io
import json
import math
import os
import sys
import tarfile

import numpy as np
import torch

import checkpoint
from data import holds_play, open_films, open_records, split_records
from evaluation.heads import (
    anticipation,
    anticipation_table,
    classify,
    classify_table,
    comparison_table,
    inverse,
    inverse_table,
    load,
    motion,
    motion_table,
    order,
    order_table,
    pool,
)
from evaluation.held_out import precision_of, precision_text
from evaluation.ranks import join, leave, print0, rank_and_world
from evaluation.runs import (
    decoder_for,
    features_of_records,
    load_run,
    pick_device,
    play_reader,
    print_left_out,
    split_of_run,
    warn_of_training_data,
)
from files.disk import READ_ERRORS, is_storage_error, storage_sentence, write_atomically
from files.films import FilmReader, film_paths
from files.logs import count_text, to_json
from files.progress import tqdm
from files.shards import Slice, archive_members, member_place, read_start, read_ticks
from files.streams import is_apple_double, member_kind
from files.video import WrongDecoder, mp4_times, open_video, read_frames
from files.vpt import ACTION_SPACES, BOM, CONTINUOUS, SLOTS, step_size, wrap
from kernels import describe_kernels

# --- labels of clips ---


def lines_of(record):
    """The text of the lines of a recording's ticks, and its ticks."""
    # ticks say which of the lines are usable: a recorder may repeat some or cut the last one
    ticks = read_ticks(record)
    with Slice(record.shard, *record.members["jsonl"]) as f:
        text = f.read().splitlines()
    return [text[i].removeprefix(BOM) for i in ticks.line], ticks


def line_labels(clips, field, shards, reader):
    """The value of a field of the JSONL lines, as text, at the middle tick of each clip; shards:
    records with lines, by recording."""
    # lines are read once a recording, of which many clips may come
    labels = []
    cached = {}
    for record, window in clips["place"]:
        # features have no lines of their own: those of the shards that they were made from serve
        source = shards.get(record.recording)
        if source is None:
            raise ValueError(
                f"{record.shard} holds features, which have no lines, and no --lines shard holds"
                f" {record.recording}"
            )
        if record.recording not in cached:
            text, ticks = lines_of(source)
            cached[record.recording] = (text, step_size(ticks.rate, reader.fps))
        text, stride = cached[record.recording]

        # features of a later phase start at a later tick, which their key names
        start = 0
        if "safetensors" in record.members:
            start = int(record.key.rpartition("@")[2])

        # the label of a clip is that of its middle, where the most of it is seen
        middle = start + round((window + 0.5) * reader.frames * stride)
        # as text: true, 3 and "stone" are classes alike
        line = json.loads(text[middle])
        if field not in line:
            raise ValueError(
                f"--label_field {field} is not in the lines of {record.recording}, which have"
                f" {', '.join(line)}"
            )
        labels.append(json.dumps(line[field]))
    return np.array(labels)


def csv_labels(path, recordings):
    """{recording: label} of a CSV with columns key,label."""
    # as it is read by a person: one label a recording, in any order
    with open(path, newline="") as f:
        rows = csv.DictReader(f)
        if not {"key", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"--labels {path} has columns {rows.fieldnames}, not key and label")
        labels = {row["key"]: row["label"] for row in rows}

    # a misspelt recording would silently go without its label
    strange = sorted(labels.keys() - recordings)
    if strange:
        raise ValueError(
            f"--labels {path} names {len(strange)} recordings that the shards do not hold,"
            f" {strange[0]} among them"
        )
    return labels


def labels_from_csv(path, clips, records):
    """The label of each clip's recording from a CSV, "" for none; prints how many have none."""
    # recordings without a label are left out, not counted as a class
    recordings = {r.recording for r in records}
    label_of = csv_labels(path, recordings)
    unlabelled = sorted(recordings - label_of.keys())
    if unlabelled:
        print(
            f"left out: {len(unlabelled)} recordings without a label in {path}, {unlabelled[0]}"
            " among them"
        )
    return [np.array([label_of.get(r.recording, "") for r, _ in c["place"]]) for c in clips]


def shards_with_lines(records, lines):
    """{recording: record with lines}; lines: shards that features were made from, or None."""
    # features name the recording; the shards that they were made from have its lines
    if lines:
        records, _ = open_records(lines)
    return {r.recording: r for r in records if "jsonl" in r.members}


# --- how far the player moves ---


def paths_of(record):
    """Where the player of a recording looks and stands at each tick: yaw, pitch in radians, x, z in
    blocks (ticks, 4); nan where the lines do not say where."""
    text, ticks = lines_of(record)
    path = np.full((len(text), 4), math.nan)
    path[:, :2] = ticks.motion[:, 2:]
    for i, line in enumerate(text):
        fields = json.loads(line)
        if "xpos" in fields and "zpos" in fields:
            path[i, 2:] = fields["xpos"], fields["zpos"]
    return path


def motion_labels(clips, shards, reader, ahead):
    """How far the player turns and walks from each step t to step t + ahead, (n, T - ahead, 4), in
    the order of heads.MOVES: yaw and pitch in radians, forward and to the right in blocks, as seen
    from step t. shards: records with lines, by recording."""
    # the tick of each step, from the start of its clip
    each = reader.frames_per_step
    shown = each * np.arange(reader.frames // each)
    if reader.encode == "tubelet":
        shown += each - 1

    labels = []
    cached = {}
    for record, window in clips["place"]:
        # lines are read once a recording
        source = shards.get(record.recording)
        if source is None:
            raise ValueError(
                f"{record.shard} holds features, which have no lines, and no --lines shard holds"
                f" {record.recording}: name it, or leave motion out of --task"
            )
        if record.recording not in cached:
            rate = read_ticks(source).rate
            cached[record.recording] = paths_of(source), step_size(rate, reader.fps)
        path, stride = cached[record.recording]

        # features may start at a later tick
        start = 0
        if "safetensors" in record.members:
            start = int(record.key.rpartition("@")[2])
        ticks = start + (window * reader.frames + shown) * stride
        before = path[ticks[:-ahead]]
        moved = path[ticks[ahead:]] - before

        # a turn over the half circle is a small one the other way; yaw 0 looks along z, as in
        # Minecraft, and grows to the right
        sine, cosine = np.sin(before[:, 0]), np.cos(before[:, 0])
        x, z = moved[:, 2], moved[:, 3]
        forward = cosine * z - sine * x
        right = -cosine * x - sine * z
        labels.append(np.stack([wrap(moved[:, 0]), moved[:, 1], forward, right], axis=1))
    return np.array(labels)


# --- labels for gameplay that has none ---


def guide_lines(actions, names, ends, frames, rate):
    """Unscaled actions (S-1, A) between frames `ends` (S,) -> `frames` lines as dicts, in the
    guides' format: motion spread evenly over a step's ticks, keys pressed on all of them, yaw and
    pitch summed from 0 (pitch stops at straight up and down), no input before the first end and
    after the last. With slots among the names the keys 1-9 are left out: vpt.parse_ticks adds them
    where the slot changes."""
    # the step of each tick; those before the first end belong to no step
    tick = np.arange(frames)
    step = np.clip(np.searchsorted(ends, tick, side="right") - 1, 0, len(actions) - 1)
    inside = (tick >= ends[0]) & (tick < ends[-1])

    # its motion in equal parts, because the head knows its sum only. A line holds where the camera
    # was before it moved, so the sum leaves out its own motion
    motion = actions[step, :4] * (inside / np.diff(ends)[step])[:, None]
    yaw, pitch = (np.cumsum(motion[:, 2:], axis=0) - motion[:, 2:]).T

    # dimensions of slots, buttons and keys, by the names that the guides' lines have
    slots = [i for i, n in enumerate(names) if n in SLOTS]

    # the likeliest slot is the one that is open: exactly one always is
    hotbar = actions[:, slots].argmax(1)[step] if slots else np.zeros(frames, int)
    gui = names.index("gui_open") if "gui_open" in names else None
    buttons, keys = [], []
    for i, name in enumerate(names):
        if name.startswith("mouse.") and name[6:].isdigit():
            buttons.append((i, int(name[6:])))
        elif name.startswith("key.") and not (slots and name[4:].isdigit()):
            keys.append((i, f"key.keyboard.{name[4:]}"))

    # one line a tick, with what the guides' recorder writes
    for t in range(frames):
        pressed = actions[step[t]] * inside[t]
        turned = float(wrap(yaw[t]))
        tilted = float(np.clip(pitch[t], -math.pi / 2, math.pi / 2))
        yield {
            "timestamp": round(t / rate, 6),
            "mouse": {
                "dx": round(float(motion[t, 0]), 6),
                "dy": round(float(motion[t, 1]), 6),
                "buttons": [button for i, button in buttons if pressed[i]],
            },
            "keyboard": {"keys": [key for i, key in keys if pressed[i]]},
            "camera": [round(turned, 7), round(tilted, 7)],
            "hotbar": int(hotbar[t]),
            "isGuiOpen": bool(gui is not None and pressed[gui]),
        }


def steps_of_video(file, times, reader):
    """Frames that the steps of a video show (S, frames a step), and its frames a second. times: of
    all frames. ValueError with fewer than two steps."""
    # the rate of most frames: a recording may have a few gaps, which the mean would feel
    with open_video(file) as container:
        rate = 1 / float(np.median(np.diff(times)) * container.streams.video[0].time_base)

    # frames that are sampled, by step; a rest that fills no step is left out, as in training
    each = reader.frames_per_step
    shown = step_size(rate, reader.fps) * np.arange(len(times))
    shown = shown[shown < len(times)]
    shown = shown[: len(shown) // each * each].reshape(-1, each)
    if len(shown) < 2:
        raise ValueError(
            f"too short: {len(times)} frames at {rate:g} a second are {len(shown)} steps"
        )
    return shown, rate


def cropped(file, times, frames, reader):
    """Frames of a video, centre-cropped as in training, (1, T, 3, H, W) uint8."""
    # the reader resizes the short side, the rest is cut evenly: (1, T, 3, H, W)
    video = read_frames(file, times, frames, reader.crop, reader.decoder)
    y, x = (np.array(video.shape[1:3]) - reader.crop) // 2
    square = video[:, y : y + reader.crop, x : x + reader.crop]
    return torch.from_numpy(square.transpose(0, 3, 1, 2).copy())[None]


@torch.no_grad()
def label_video(data, head, names, columns, reader, features_of, side):
    """Bytes of an mp4 -> (lines, actions (S-1, A), ends (S,)): what a fitted head says about its
    steps."""
    # which frames the steps show: those at the times that training would sample
    f = io.BytesIO(data)
    times = mp4_times(f)
    f.seek(0)
    shown, rate = steps_of_video(f, times, reader)

    # clips as in training, each from the last step of the one before; the last one ends with the
    # video
    T = reader.frames // reader.frames_per_step
    scores = np.zeros((len(shown) - 1, len(columns)))
    for start in range(0, len(shown) - 1, T - 1):
        # the head sees one clip, encoded as those that it was fitted on: with --encode clip a
        # step's features depend on where in the clip it is
        start = max(min(start, len(shown) - T), 0)
        part = shown[start : start + T]
        video = cropped(f, times, part.ravel(), reader)
        batch = {"video": video, "actions": torch.zeros(0), "states": torch.zeros(0)}
        z = pool(features_of(batch)[0], side)[0]
        scores[start : start + len(part) - 1] = head.predict(z[:-1], z[1:])

    # motion and slots as they are, keys by their threshold: pressed as often as in the dev clips
    actions = np.zeros((len(scores), len(names)))
    for i, column in enumerate(columns):
        soft = names[column] in [*CONTINUOUS, *SLOTS]
        # a threshold would make motion all or nothing
        actions[:, column] = scores[:, i] if soft else scores[:, i] > head.threshold[i]

    # a step ends with the last frame that it shows
    ends = shown[:, -1] if reader.encode == "tubelet" else shown[:, 0]
    return list(guide_lines(actions, names, ends, len(times), rate)), actions, ends


def video_members(path):
    """{KEY.mp4: its place in the shard}; ValueError if there is none, or if it is no tar."""
    # the video is not read, only its place: shards have gigabytes
    places, end = {}, os.path.getsize(path)
    try:
        for m, offset in archive_members(path, end):
            if not m.isfile() or member_kind(m.name)[1] != "mp4":
                continue
            # macOS writes a twin beside each file, with the same name but for two characters
            place = member_place(m, offset, end)
            if not is_apple_double(m.name, read_start(path, place)):
                places[m.name] = place
    except tarfile.TarError as e:
        raise ValueError(f"--label {path} is no tar, or damaged: {e}") from e
    if not places:
        raise ValueError(f"--label {path} holds no KEY.mp4: there is nothing to label")
    return places


def add_member(packed, name, content):
    """A file of these bytes into an open tar."""
    # no times and no owner: the same input gives the same bytes
    member = tarfile.TarInfo(name)
    member.size = len(content)
    packed.addfile(member, io.BytesIO(content))


def label_shard(source, out, label):
    """KEY.mp4 of a shard -> a shard of KEY.mp4 and KEY.jsonl; label(bytes) -> lines. Returns how
    many, and [(file, key, reason)] of videos that cannot be labelled. ValueError if none can."""
    # the shard appears when it is whole, so a killed run leaves none. The tar is written in the
    # order of the one that was read
    bad, done = [], []

    def write(file):
        places = video_members(source)
        with tarfile.open(fileobj=file, mode="w") as packed:
            for name in tqdm(places, desc="label", unit="recording", delay=10):
                # one video after the other is in memory
                with Slice(source, *places[name]) as f:
                    data = f.read()
                try:
                    text = "".join(json.dumps(line) + "\n" for line in label(data)).encode()
                # a fault of the machine ends the program, one of the video leaves it out
                except WrongDecoder as e:
                    raise ValueError(f"--label {source} {name}: {e}") from e
                except READ_ERRORS as e:
                    if is_storage_error(e):
                        raise OSError(storage_sentence(f"{source} {name}", e)) from e
                    bad.append((source, name, f"{type(e).__name__}: {e}"))
                    continue

                # the pair that training reads
                add_member(packed, name, data)
                add_member(packed, name[:-3] + "jsonl", text)
                done.append(name)
        if not done:
            raise ValueError(f"--label {source}: no video can be used: {bad[0][1]}: {bad[0][2]}")

    write_atomically(out, write)
    return len(done), bad


# --- which clips choose ---


def dev_clips(train, records):
    """Which clips (n,) choose penalties and thresholds: those of a tenth of the recordings, or a
    tenth of the clips where there are too few recordings."""
    # other recordings than those fitted on, or what is chosen would favour learning by heart. The
    # split is that of train_ac.py, by the hash of a name
    to_fit = {r.recording for r in split_records(records, 0.1)[0]}
    dev = np.array([r.recording not in to_fit for r, _ in train["place"]])
    if dev.all() or not dev.any():
        print(
            "note: too few recordings to fit on: a tenth of the clips chooses penalties and"
            " thresholds"
        )
        dev = np.arange(len(dev)) % 10 == 0
    return dev


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook
    if args.action_space not in ACTION_SPACES:
        sizes = ", ".join(map(str, ACTION_SPACES))
        raise ValueError(f"--action_space {args.action_space} is none of {sizes}")

    # the shard to label shows its faults before anything takes time
    tasks = args.task
    if args.label:
        video_members(args.label)
        if os.path.realpath(args.label) == os.path.realpath(args.out):
            raise ValueError(
                f"--out {args.out} is the shard of --label itself: what its lines say would be lost"
            )

    # --- run ---
    # with torchrun each rank reads and encodes a share; the first one fits the heads
    join()

    # without one, flags say how clips are cut, and there are no predictions to probe
    run = load_run(args.checkpoint, args.dtype) if args.checkpoint else None
    if run is not None:
        settings = run.settings
        if run.state["dataset"] != "vpt":
            raise ValueError(
                f"{run.path} was trained on robot episodes, and probe.py reads gameplay: a run of"
                " train_lewm.py has the probe of its actions in val.csv; judge others with eval.py"
            )
        names = ACTION_SPACES.get(settings.get("action_space"), [])
        if run.state["action_names"] != names:
            raise ValueError(
                f"{run.path} has actions {run.state['action_names'][:4]}..., gameplay shards none"
                " such: probe a run of train_ac.py"
            )

        # as the run was trained: its precision, its scale, its frames
        predictor = run.predictor
        state = run.state
        scaler = run.scaler
        device = run.device
        dtype = run.dtype
        autocast = run.autocast
        folder = os.path.dirname(run.path)
    else:
        settings = {
            "data": args.data,
            "val_data": args.val_data,
            "val_fraction": 0.0,
            "cache_dir": None,
            "encoder": None,
            "frames_per_clip": args.frames_per_clip,
            "fps": args.fps,
            "frames_per_step": args.frames_per_step,
            "crop_size": args.crop_size,
            "encode": args.encode,
            "action_space": args.action_space,
            "decoder": "pyav",
            "gui": "keep",
        }
        predictor, state = None, None
        scaler = None
        device = pick_device()
        dtype, autocast = precision_of(args.dtype, None, device)
        folder = "."

    # what computes it: numbers of two machines differ in their last digits
    steps = settings["frames_per_clip"] // settings["frames_per_step"]
    if predictor is not None:
        print0(precision_text(dtype, device, predictor, steps - 1))
    else:
        kernels = describe_kernels(device, getattr(torch, dtype))
        print0(f"{dtype} on {device.type}; {kernels}")

    # the actions to anticipate must lie inside of a clip, after the two steps that are seen
    if {"anticipation", "motion"} & set(tasks) and steps < args.horizon + 2:
        raise ValueError(
            f"--horizon {args.horizon} needs clips of {args.horizon + 2} steps, these have {steps}:"
            " lower it, or name the --task"
        )

    # --- data ---
    # the order of steps needs no actions: any video will do
    plain_video = run is None and tasks == ["order"]
    if plain_video:
        plain_video = not holds_play(film_paths([*args.data, *args.val_data]))
    if plain_video:
        reader = FilmReader(args.frames_per_clip, args.fps, args.frames_per_step, args.crop_size)
        train_records, _, val_records, bad = open_films(args.data, reader, val_data=args.val_data)
    else:
        train_records, _, val_records, bad = split_of_run(settings, args.data, args.val_data)

    # both are needed: heads learn recordings by heart, and a score on those says nothing
    if not (train_records and val_records):
        raise ValueError(
            f"{len(train_records)} recordings to fit on and {len(val_records)} to test on: name"
            " local --data and --val_data"
        )
    if run is not None:
        warn_of_training_data(val_records, state, scaler, print0)

    # features need the encoder only where new videos are labelled; a run may know its own
    records = train_records + val_records
    has_video = "safetensors" not in records[0].members
    encoders = args.encoder or [settings["encoder"] if has_video else None]
    if encoders == [None] and (args.label or has_video):
        raise ValueError("encoding video needs the weights: name the --encoder")

    # how far the player moves is in the lines, which features do not have
    shards = shards_with_lines(records, args.lines)
    if "motion" in tasks and not shards:
        remedy = "name the shards that the features were made from with --lines"
        if tasks == ["motion"]:
            raise ValueError(f"--task motion: features have no lines; {remedy}")
        print0(f"note: no motion, because features have no lines; {remedy}")
        tasks.remove("motion")

    # frames are cut as the run was trained on them
    if not plain_video:
        decoder = decoder_for(records, None, settings, print0)
        reader = play_reader(settings, None, decoder)

    # --- the same clips for each encoder ---
    reports = {}
    for encoder in encoders:
        if len(encoders) > 1:
            print0(f"\nencoder {encoder}")

        # cut, decoded and encoded as the run was trained on them, but with actions as recorded
        features_of = features_of_records(records, encoder, settings, device, dtype, state)

        def load_clips(of_records, limit, features_of=features_of):
            """Tokens and actions of at most `limit` windows."""
            return load(
                of_records,
                reader,
                features_of,
                predictor,
                scaler,
                limit,
                side=args.side,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                autocast=autocast,
            )

        train, bad_train = load_clips(train_records, args.clips)
        val, bad_val = load_clips(val_records, args.val_clips)
        if rank_and_world()[0] > 0:
            continue
        print_left_out(bad + bad_train + bad_val)

        # which of them choose penalties and thresholds; the held-out ones must not
        dev = dev_clips(train, train_records)
        report = {
            "checkpoint": run and run.path,
            "dtype": dtype,
            "clips": [len(c["place"]) for c in (train, val)],
            "recordings": [len({r.recording for r, _ in c["place"]}) for c in (train, val)],
        }
        reports[encoder] = report

        # in words: how much the numbers below stand on
        fitted, tested = (
            f"{count_text(n, 'clip')} of {count_text(m, 'recording')}"
            for n, m in zip(report["clips"], report["recordings"])
        )
        print(f"fitted on {fitted}, tested on {tested}; {train['z'].shape[2]} tokens a step")
        if settings["encode"] == "clip" and "anticipation" in tasks:
            print(
                "WARNING: with --encode clip every step has seen the whole clip: anticipation is no"
                " forecast"
            )

        # --- classify: labels of whole recordings, or of the middle of each clip ---
        if "classify" in tasks:
            if args.labels:
                labels = labels_from_csv(args.labels, (train, val), records)
            else:
                field = args.label_field
                labels = [line_labels(c, field, shards, reader) for c in (train, val)]

            # from mean and std over the steps of a clip: a label is of all of it
            what = args.label_field or args.labels
            report["classify"] = classify(train, val, *labels, what, args.steps)
            print(*classify_table(report["classify"], what), sep="\n")

        # --- order: of two steps, without any actions ---
        if "order" in tasks:
            report["order"] = order(train, val, dev, args.steps)
            print(*order_table(report["order"]), sep="\n")

        # --- inverse dynamics, anticipation: of the actions that vary ---
        names = ACTION_SPACES[settings["action_space"]]
        varies_train, varies_val = (c["actions"].std((0, 1)) > 0 for c in (train, val))
        columns = np.flatnonzero(varies_train & varies_val)

        # nothing can be learned about what never changes: such keys would look perfectly predicted
        constant = [n for i, n in enumerate(names) if i not in columns]
        asks_for_actions = bool({"inverse", "anticipation"} & set(tasks))
        if constant and asks_for_actions:
            print(f"left out, since they do not vary in both splits: {', '.join(constant)}")
        if not len(columns) and asks_for_actions:
            raise ValueError("no action varies in both splits: name other shards")

        # which action was it, and which ones follow? The first is in the pictures, the second is
        # not
        if "inverse" in tasks:
            report["inverse"], heads = inverse(train, val, dev, names, columns, args.steps)
            print(*inverse_table(report["inverse"]), sep="\n")
        step_seconds = settings["frames_per_step"] / settings["fps"]
        if "anticipation" in tasks:
            report["anticipation"] = anticipation(
                train, val, dev, names, columns, args.steps, args.horizon
            )
            print(*anticipation_table(report["anticipation"], step_seconds), sep="\n")

        # --- motion: of the player, over several steps ---
        if "motion" in tasks:
            y, y_val = (motion_labels(c, shards, reader, args.horizon) for c in (train, val))
            report["motion"] = motion(train, val, dev, y, y_val, args.steps, args.horizon)
            print(*motion_table(report["motion"], args.horizon * step_seconds), sep="\n")

    # --- the first rank has the heads ---
    if not leave():
        sys.exit()

    # several encoders, side by side
    if len(reports) > 1:
        print()
        print(*comparison_table(reports), sep="\n")
        report = {"encoders": reports}

    # --- probe.json ---
    # beside the run, unless --out or --label name another place
    if args.label:
        folder = os.path.dirname(args.out)
    elif args.out:
        folder = args.out
    file = os.path.join(folder, "probe.json")
    write_atomically(file, to_json(report).encode())

    # --- labels ---
    if args.label:
        # the attentive head, which was fitted on pairs of true steps
        head = heads["attentive"]

        def label(data):
            """The lines of a video, given as bytes."""
            return label_video(data, head, names, columns, reader, features_of, args.side)[0]

        done, bad = label_shard(args.label, args.out, label)
        print_left_out(bad)
        print(f"labelled {count_text(done, 'recording')} of {args.label} in {args.out}")

    print(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    print(f"written to {file}")
