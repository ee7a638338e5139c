"""Feature shards of encode.py, of play and of robots: how recordings are cut into them, what they
contain and what training must know of them.

A member KEY@TICK.safetensors is a run of steps of play: see docs/data.md. A member
KEY@CAMERA-ROW.safetensors is a segment of a robot episode: a frame of one camera every `stride`
rows of episode KEY, from row ROW on. It contains z (S, N, D), actions (S-1, A) that are not scaled,
and states (S, state_dim) in float32. Its metadata are encode.py's settings, "names" and "units" of
the actions, "state_dim", and "episode", which --success and --idle_filter need: a dict of "rows",
"stride", "rate", "success", and "idle" and "still" as [[row, row after]] of the whole episode."""

import functools
import json
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from files.disk import DAMAGE, is_storage_error, storage_sentence
from files.remote import Shard
from files.shards import Slice, feature_header, index_shards, read_ticks, shard_index
from files.video import mp4_times, read_frames, video_rate
from files.vpt import step_actions, step_size

# --- reading features ---


def feature_settings(records):
    """How the shards of feature records were made: the metadata that encode.py writes, and
    embed_dim, but nothing about single robot episodes. ValueError if shards disagree."""
    settings_of_first = None
    for r in {r.shard: r for r in records}.values():
        if not r.is_features:
            raise ValueError(
                f"{r.shard} holds video, other shards of this run hold features: pass one kind"
            )
        if isinstance(r.shard, Shard):
            r = r._replace(shard=r.shard.peek())  # a header is no reason to copy the shard
        header_settings = feature_header(r)[1]
        header_settings.pop("episode", None)
        settings_of_first = settings_of_first or header_settings
        if header_settings != settings_of_first:
            raise ValueError(
                f"{r.shard} was encoded with other settings than {records[0].shard}:"
                f" {header_settings} and {settings_of_first}"
            )
    return settings_of_first


def feature_rows(record, first, last, motion_only=False):
    """Steps first..last of a feature member, and no others: z (S, N, D), actions (S-1, A), states
    (S, state_dim). Features of VPT have A = 38 and state_dim = 2.

    z is bfloat16, or float32 if it is stored as int8. With motion_only it is not read, and None."""
    tensors = {}
    for name, (dtype, shape, offset) in feature_header(record)[0].items():
        if motion_only and name not in ("actions", "states"):
            continue
        if name == "actions":
            start, stop = first, last - 1
        elif name == "z_channels":
            start, stop = 0, 2
        else:
            start, stop = first, last
        row = math.prod(shape[1:])
        row_bytes = row * dtype.itemsize
        with Slice(record.shard, offset + start * row_bytes, (stop - start) * row_bytes) as f:
            data = bytearray(f.read())
        flat = torch.frombuffer(data, dtype=dtype, count=(stop - start) * row)
        tensors[name] = flat.reshape(-1, *shape[1:])

    # int8: z = q * z_scale * std + mean (see pack_features)
    if "z_scale" in tensors:
        mean, std = tensors["z_channels"]
        z = tensors["z"] * tensors["z_scale"].float()
        tensors["z"] = z.mul_(std).add_(mean)
    return tensors.get("z"), tensors["actions"], tensors["states"]


# --- packing features ---


def pack_features(z, store):
    """How features z (S, N, D) are stored -> {name: tensor}. ValueError if they are not finite.

    store "bf16": "z" in bfloat16. store "int8": "z" is q in int8, with z = q * z_scale * std +
    mean. "z_channels" (2, D) float32 is the mean and std of the channels; "z_scale" (S, N, 1)
    float16 is the largest scaled channel of a token / 127. Scaling the channels first keeps a few
    large ones from taking all bits of the others."""
    if not z.isfinite().all():
        raise ValueError("its features are not finite: encode it with --dtype float32")
    if store == "bf16":
        return {"z": z.to(torch.bfloat16)}

    # of a constant channel, only rounding is left
    std, mean = torch.std_mean(z.float(), dim=(0, 1), correction=0)
    std = std.maximum(1e-6 * mean.abs()).clamp_min(1e-12)

    q = []
    scales = []
    for x in z.split(64):
        x = (x - mean) / std
        # below 2**-14 float16 loses digits
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(2**-14).half()
        q.append((x / scale).round().clamp(-127, 127).to(torch.int8))
        scales.append(scale)
    return {
        "z": torch.cat(q),
        "z_scale": torch.cat(scales),
        "z_channels": torch.stack([mean, std]),
    }


# --- cutting recordings of play ---


def index_play(paths):
    """index_shards for shards of video alone; ValueError for others."""
    records, bad = index_shards(paths)
    for r in records:
        if "mp4" not in r.members:
            raise ValueError(f"{r.shard} holds features already: name the shards of video")
    return records, bad


def segments(lines, stride, encode, frames_per_clip, frames_per_step, phases):
    """(first tick, steps) of the runs of steps that a recording is cut into: one for each phase, or
    with --encode clip one for each clip."""
    span = stride * frames_per_step  # ticks of a step
    clip = frames_per_clip // frames_per_step  # steps of a clip
    period = span * clip if encode == "clip" else span
    for first in sorted({p * period // phases for p in range(phases)}):
        steps = (lines - first - stride * (frames_per_step - 1) - 1) // span + 1
        size = clip if encode == "clip" else max(steps, 1)
        for window in range(steps // size):
            yield first + window * size * span, size


def plan_recording(record, reader, phases, size):
    """Functions that decode a part of a recording each -> [(first tick, {"actions", "states"}, {})]
    of all its segments, and [(number of a segment, uint8 video (frames, 3, H, W))], with at most
    `size` steps of each segment. Raises what is wrong with the recording."""
    with Slice(record.shard, *record.members["mp4"]) as f:
        times = mp4_times(f)
        frame_rate = video_rate(f, times)
    ticks = read_ticks(record)
    reader.starts(ticks, len(times), frame_rate)  # raises what is wrong with the pair
    ratio = reader.frames_per_line(ticks, len(times), frame_rate)
    stride = step_size(ticks.rate, reader.fps)
    lines = min(len(ticks.motion), len(times) // ratio)

    # shown: of each segment, the ticks of its frames (steps, frames of a step)
    cut = segments(lines, stride, reader.encode, reader.frames, reader.frames_per_step, phases)
    runs = [(first, steps) for first, steps in cut if steps >= 2]
    shown = []
    for first, steps in runs:
        frames = stride * np.arange(steps * reader.frames_per_step)
        shown.append(first + frames.reshape(steps, -1))

    # a part: [(number of a segment, ticks)]; phases side by side, so each frame is decoded once
    if reader.encode == "clip":
        parts = [[(i, s)] for i, s in enumerate(shown)]
    else:
        parts = []
        for k in range(0, max(len(s) for s in shown), size):
            parts.append([(i, s[k : k + size]) for i, s in enumerate(shown) if len(s) > k])

    labels = []
    for (first, _), s in zip(runs, shown):
        ends = s[:, -1] if reader.encode == "tubelet" else s[:, 0]
        actions = torch.from_numpy(step_actions(ticks, ends, 38)[0]).float()
        states = torch.from_numpy(ticks.motion[ends, 2:].copy())
        labels.append((f"{first:05d}", {"actions": actions, "states": states}, {}))

    def decode(part):
        wanted = np.unique(np.concatenate([s.ravel() for _, s in part])) * ratio
        with Slice(record.shard, *record.members["mp4"]) as f:
            frames = read_frames(f, times, wanted, reader.crop, reader.decoder)

        # the centre, with channels first
        y = (frames.shape[1] - reader.crop) // 2
        x = (frames.shape[2] - reader.crop) // 2
        frames = frames[:, y : y + reader.crop, x : x + reader.crop].transpose(0, 3, 1, 2)

        video = []
        for i, s in part:
            places = np.searchsorted(wanted, s.ravel() * ratio)
            video.append((i, torch.from_numpy(frames[places])))
        return labels, video

    return [functools.partial(decode, part) for part in parts]


# --- cutting episodes of robots ---


class Source(NamedTuple):
    """An episode to encode, with the attributes of a Record that encode.py uses."""

    episode: tuple  # files.episodes.Episode
    runs: list  # (camera, first row, steps) of each segment
    about: dict  # "episode" of their metadata

    @property
    def shard(self):
        return self.episode.shard

    @property
    def key(self):
        return self.episode.key

    @property
    def duration(self):
        """In twentieths of a second, as in Record."""
        return self.about["rows"] / self.about["rate"] * 20


def tar_names(paths):
    """Files of episodes -> ({file: name of its tar}, the folder that the names are relative to).
    For TFRecords the folder is "": their own names are enough. Those of LeRobot data sets begin
    with the name of the data set."""
    from files.lerobot import root_of  # it imports files/episodes.py, which imports this file

    single = [os.path.abspath(p) for p in paths if p.endswith((".h5", ".npz"))]
    top = os.path.commonpath([os.path.dirname(p) for p in single]) if single else ""
    names = {}
    for p in paths:
        if p.endswith((".h5", ".npz")):
            name = os.path.relpath(p, top).replace(os.sep, "--")
        elif p.endswith(".parquet"):
            root = root_of(p).rstrip("/")
            name = (os.path.basename(root) + p[len(root) :]).replace("/", "--")
        else:
            name = os.path.basename(p)
        names[p] = name + ".tar"
    return names, os.path.basename(top)


def reader_settings(reader):
    """What a DroidReader takes from an episode, as text. Features must have been made with the same
    settings. Without a camera (actions alone) there are none of pictures."""
    texts = {"fps": str(float(reader.fps)), "stride": str(reader.stride or 0)}
    for name in ("state_keys", "action_keys"):
        texts[name] = " ".join(getattr(reader, name) or ["default"])
    if reader.camera:
        texts["crop_size"] = str(reader.crop_size)
        texts["crop"] = reader.crop
        texts["camera"] = " ".join(reader.camera)
    return texts


def encodable_episodes(found, bad, reader, phases):
    """What droid.index_episodes gives -> ([Source], [bad]). Each camera is cut `phases` times, from
    first rows that are spread over the stride."""
    out = []
    seen = set()
    for episode, entry in found:
        stride = reader.stride_of(episode)
        views = reader.views(episode)
        runs = []
        for camera in views:
            for first in sorted({p * stride // phases for p in range(phases)}):
                steps = (episode.last - first - 1) // stride + 1
                if steps >= 2:
                    runs.append((camera, first, steps))

        flaw = ""
        if episode.kind == "features":
            flaw = "features already"
        elif not runs:
            flaw = f"{episode.last} rows make no two steps of {stride} rows"
        elif not "".join([episode.key, *views]).isprintable() or "@" in "".join(views):
            flaw = "its key or camera cannot be in a file name"
        elif (episode.shard, episode.key) in seen:
            flaw = "an earlier episode of this file has the same key"
        if flaw:
            bad.append((episode.shard, episode.key, flaw))
            continue

        seen.add((episode.shard, episode.key))
        about = {
            "rows": episode.last,
            "stride": stride,
            "rate": episode.rate,
            "success": bool(entry["success"]),
            "idle": entry["idle"],
            "still": entry["still"],
        }
        out.append(Source(episode, runs, about))
    return out, bad


def plan_episode(source, reader, size):
    """plan_recording for an episode: functions that read a part of one camera each -> [(name of a
    segment, {"actions", "states"}, its own metadata)] of all segments, and [(number of a segment,
    uint8 video)], with at most `size` steps of each segment."""
    r = source.episode
    stride = source.about["stride"]
    shown = [first + stride * np.arange(steps) for _, first, steps in source.runs]

    labels = []
    for (camera, first, _), rows in zip(source.runs, shown):
        moved = [torch.from_numpy(np.float32(x)) for x in guarded(r, reader.motion, r, rows)]
        # reader.motion sets the names and units of the actions
        about = {
            "names": json.dumps(reader.names),
            "units": json.dumps(reader.units),
            "state_dim": str(reader.state_dim),
            "episode": json.dumps(source.about),
        }
        tensors = dict(zip(("actions", "states"), moved))
        labels.append((f"{camera}-{first:05d}", tensors, about))

    def read(camera, part):
        wanted = np.unique(np.concatenate([s for _, s in part]))
        video = guarded(r, reader.pictures, r, camera, wanted)
        return labels, [(i, video[np.searchsorted(wanted, s)]) for i, s in part]

    parts = []
    for camera in dict.fromkeys(c for c, _, _ in source.runs):
        of_camera = [(i, s) for i, s in enumerate(shown) if source.runs[i][0] == camera]
        for k in range(0, max(len(s) for _, s in of_camera), size):
            part = [(i, s[k : k + size]) for i, s in of_camera if len(s) > k]
            parts.append(functools.partial(read, camera, part))
    return parts


def guarded(r, call, *arguments):
    """call(*arguments). What is wrong with the episode becomes a ValueError, an error of the disk
    or of a server an OSError."""
    try:
        return call(*arguments)
    except DAMAGE as e:
        if is_storage_error(e):
            raise OSError(storage_sentence(f"{r.shard} {r.key}", e)) from e
        raise ValueError(f"{type(e).__name__}: {e}") from e


# --- features of robots, for training ---


def index_tar(path):
    """A tar -> ([segment], [bad]), in the form in which files.episodes.index_file gives episodes.
    Each segment has "rows": (first, stride, rows of the episode)."""
    records, bad = shard_index(path)
    segments = []
    for r in records:
        try:
            segments.append(robot_segment(r))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            reason = "not features (its metadata are damaged)"
            if isinstance(e, ValueError) and str(e):
                reason = str(e)
            bad.append((path, r.key, reason))

    # a damaged name may be no text
    return segments, [tuple(text.encode(errors="replace").decode() for text in b) for b in bad]


def robot_segment(r):
    """A feature member of a robot episode -> its entry for index_tar. Raises KeyError, TypeError,
    ValueError, OverflowError or RecursionError for anything else."""
    if not r.is_features:
        raise ValueError("gameplay: train_ac.py reads it")
    header, meta = feature_header(r)
    if meta.get("dataset") != "droid":
        raise ValueError("features of gameplay: train_ac.py reads it")

    about = json.loads(meta["episode"])
    first = int(r.key.rpartition("-")[2])
    steps = header["z"][1][0]
    rows = int(about["rows"])
    stride = int(about["stride"])
    rate = float(about["rate"])
    names = json.loads(meta["names"])
    words = [*names, *json.loads(meta["units"]), meta["encoder"], str(int(meta["grid"]))]

    # runs of rows in which the arm is idle; features of older versions lack "still"
    runs = {}
    in_order = True
    for name in ("idle", "still"):
        pairs = about[name] if name == "idle" else about.get(name)
        runs[name] = pairs and [(int(a), int(b)) for a, b in pairs]
        edges = [0, *(x for pair in runs[name] or () for x in pair), 2**31]
        in_order = in_order and edges == sorted(edges)

    rows_agree = 0 < rate < math.inf and 0 <= first < stride and in_order
    rows_agree = rows_agree and 2 <= steps == (rows - first - 1) // stride + 1
    are_words = len(words) == 2 * header["actions"][1][1] + 2
    are_words = are_words and all(isinstance(w, str) for w in words) and r.key.isprintable()
    if not rows_agree or not are_words:
        raise ValueError("its metadata and its tensors disagree")
    return {
        "key": r.key,
        "members": {"safetensors": r.members["safetensors"]},
        "steps": steps,
        **runs,
        "success": bool(about["success"]),
        "rows": (first, stride, rows),
        "rate": rate / stride,
    }


def keep_ranges(idle, steps, rule, span):
    """Idle runs of an episode -> [(first, last)] that clips of `span` steps may be cut from.

    rule "off": everything. "openpi": what is left without idle runs of 7 steps or more, if it is 16
    steps long, less its last 10. "light" (of still runs): leaves out only clips in which nothing
    moves."""
    if rule == "off":
        return [(0, steps)]
    shortest = 7 if rule == "openpi" else span - 1
    edges = [0]
    for a, b in idle:
        if b - a >= shortest:
            edges += [a, b]
    edges.append(steps)

    pieces = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]
    if rule == "openpi":
        return [(a, b - 10) for a, b in pieces if b - a >= 16]
    return [(max(a - span + 1, 0), min(b + span - 2, steps)) for a, b in pieces]


def to_steps(ranges, first, stride):
    """[(row, row after)] -> the same in steps; step k lies at row first + k * stride."""
    return [(max(-((first - a) // stride), 0), (b - 1 - first) // stride + 1) for a, b in ranges]


def check_features(records, reader):
    """Refuse features that were made with other settings than a DroidReader has (ValueError). Tell
    the reader what their actions and states are."""
    made_with = feature_settings(records)
    for name, value in reader_settings(reader).items():
        if made_with.get(name) != value:
            raise ValueError(
                f"{records[0].shard} was made with --{name} {made_with.get(name)}, this run has"
                f" {value}: change one of them"
            )
    reader.names = json.loads(made_with["names"])
    reader.units = json.loads(made_with["units"])
    reader.state_dim = int(made_with["state_dim"])


# float32 numbers of actions and states a step, and bytes that a segment takes beside its steps
PLAY = {"motion": 38 + 2, "header": 1500}


ROBOTS = {"motion": 7 + 7, "header": 3500}


def play_runs(records, *, fps, encode, frames_per_clip, frames_per_step, phases):
    """Steps of each segment that recordings will give: by the clock of each, and as if no line were
    bad."""
    runs = []
    for r in records:
        try:
            stride = step_size(r.rate, fps)
        except ValueError:
            continue  # it is left out, with the reason, when its turn comes
        cut = segments(r.lines, stride, encode, frames_per_clip, frames_per_step, phases)
        runs += [steps for _, steps in cut if steps >= 2]
    return runs


def estimate(runs, tokens, width, store, *, motion, header):
    """(steps, bytes) of features of segments of these steps, within a percent. motion, header: of
    PLAY or ROBOTS."""
    steps = sum(runs)
    row = 4 * motion
    if store == "bf16":
        row += tokens * 2 * width
    else:
        row += tokens * (width + 2)  # a scale a token
        header += 8 * width  # and one a channel
    return steps, steps * row + len(runs) * header
