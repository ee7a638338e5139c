"""Feature shards of encode.py, of play and of robots: how recordings are cut into them, what they
contain and what training must know of them.

Of play, a member KEY@TICK.safetensors: see docs/data.md. Of robots, a member
KEY@CAMERA-ROW.safetensors is a segment: a frame of one camera every `stride` rows of episode KEY,
from row ROW on: z (S, N, D), actions (S-1, A) unscaled, states (S, state_dim) in float32. Its
metadata: encode.py's settings, "names" and "units" of actions, "state_dim", and what --success
and --idle_filter ask: "episode" {"rows", "stride", "rate", "success", "idle" and "still": [[row,
row after]]}, of the whole one."""

import functools
import json
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from files.disk import DAMAGE, disk_failed, disk_sentence
from files.remote import Shard
from files.shards import Slice, feature_header, index_shards, read_ticks, shard_index
from files.video import mp4_times, read_frames, video_rate
from files.vpt import step_actions, step_size


def feature_settings(records):
    """How the shards of feature records were made (the metadata encode.py writes, and embed_dim),
    but for what tells of one robot episode. ValueError if shards disagree."""
    out = None
    for r in {r.shard: r for r in records}.values():
        if "safetensors" not in r.members:
            raise ValueError(
                f"{r.shard} holds video, other shards of this run hold features: pass one kind"
            )
        found = feature_header(
            r._replace(shard=r.shard.peek()) if isinstance(r.shard, Shard) else r
        )[1]
        found.pop("episode", None)
        if found != (out := out or found):
            raise ValueError(
                f"{r.shard} was encoded with other settings than {records[0].shard}: {found} and"
                f" {out}"
            )
    return out


def feature_rows(record, first, last, motion_only=False):
    """Steps first..last of a feature member, no others: z (S, N, D) bfloat16 (float32 of int8;
    None, unread, with motion_only), actions (S-1, A), states (S, state_dim): of VPT A is 38 and
    state_dim 2."""
    x = {}
    for name, (dtype, shape, at) in feature_header(record)[0].items():
        if motion_only and name not in ("actions", "states"):
            continue
        start, stop = {"actions": (first, last - 1), "z_channels": (0, 2)}.get(name, (first, last))
        row = math.prod(shape[1:])
        with Slice(
            record.shard, at + start * row * dtype.itemsize, (stop - start) * row * dtype.itemsize
        ) as f:
            x[name] = torch.frombuffer(
                bytearray(f.read()), dtype=dtype, count=(stop - start) * row
            ).reshape(-1, *shape[1:])
    if "z_scale" in x:
        x["z"] = (x["z"] * x["z_scale"].float()).mul_(x["z_channels"][1]).add_(x["z_channels"][0])
    return x.get("z"), x["actions"], x["states"]


def index_play(paths):
    """data.index_shards for shards of video alone; ValueError for others."""
    records, bad = index_shards(paths)
    if made := [r for r in records if "mp4" not in r.members]:
        raise ValueError(f"{made[0].shard} holds features already: name the shards of video")
    return records, bad


def segments(lines, stride, encode, frames_per_clip, frames_per_step, phases):
    """(first tick, steps) of the runs of steps a recording is cut into: one per phase; for --encode
    clip one per clip."""
    span, clip = stride * frames_per_step, frames_per_clip // frames_per_step
    for first in sorted(
        {p * span * (clip if encode == "clip" else 1) // phases for p in range(phases)}
    ):
        steps = (lines - first - stride * (frames_per_step - 1) - 1) // span + 1
        size = clip if encode == "clip" else max(steps, 1)
        yield from ((first + w * size * span, size) for w in range(steps // size))


def plan_recording(record, reader, phases, size):
    """Functions that decode a recording, a part each: -> [(first tick, {"actions", "states"}, {})]
    of all its segments, [(which of them, uint8 video (frames, 3, H, W))], at most `size` steps of
    each. Raises what is wrong with the recording."""
    with Slice(record.shard, *record.members["mp4"]) as f:
        times = mp4_times(f)
        frame_rate = video_rate(f, times)
    ticks = read_ticks(record)
    reader.starts(ticks, len(times), frame_rate)
    ratio = reader.frames_per_line(ticks, len(times), frame_rate)
    stride = step_size(ticks.rate, reader.fps)
    cut = reader.encode, reader.frames, reader.frames_per_step, phases
    runs = [
        s for s in segments(min(len(ticks.motion), len(times) // ratio), stride, *cut) if s[1] >= 2
    ]
    shown = [
        first + stride * np.arange(steps * reader.frames_per_step).reshape(steps, -1)
        for first, steps in runs
    ]
    if reader.encode == "clip":
        parts = [[(i, s)] for i, s in enumerate(shown)]
    else:  # phases side by side, so that each frame is decoded once
        chunks = range(0, max(len(s) for s in shown), size)
        parts = [[(i, s[k : k + size]) for i, s in enumerate(shown) if len(s) > k] for k in chunks]

    ends = [s[:, -1] if reader.encode == "tubelet" else s[:, 0] for s in shown]
    actions = [torch.from_numpy(step_actions(ticks, e, 38)[0]).float() for e in ends]
    states = [torch.from_numpy(ticks.motion[e, 2:].copy()) for e in ends]
    labels = [
        (f"{first:05d}", {"actions": a, "states": s}, {})
        for (first, _), a, s in zip(runs, actions, states)
    ]

    def decode(part):
        wanted = np.unique(np.concatenate([s.ravel() for _, s in part])) * ratio
        with Slice(record.shard, *record.members["mp4"]) as f:
            frames = read_frames(f, times, wanted, reader.crop, reader.decoder)
        y, x = (frames.shape[1] - reader.crop) // 2, (frames.shape[2] - reader.crop) // 2
        frames = frames[:, y : y + reader.crop, x : x + reader.crop].transpose(0, 3, 1, 2)
        return labels, [
            (i, torch.from_numpy(frames[np.searchsorted(wanted, s.ravel() * ratio)]))
            for i, s in part
        ]

    return [functools.partial(decode, part) for part in parts]


class Source(NamedTuple):
    """An episode to encode: what encode.py asks of a Record."""

    episode: tuple  # files.episodes.Episode
    runs: list  # (camera, first row, steps) of each segment
    about: dict  # "episode" of their metadata
    shard = property(lambda self: self.episode.shard)
    key = property(lambda self: self.episode.key)
    duration = property(
        lambda self: self.about["rows"] / self.about["rate"] * 20
    )  # in twentieths of a second, as Record has it


def tar_names(paths):
    """Files of episodes -> ({file: name of its tar}, the folder that it is relative to: of
    TFRecords "", the name alone will do)."""
    single = [os.path.abspath(p) for p in paths if p.endswith((".h5", ".npz"))]
    top = os.path.commonpath([os.path.dirname(p) for p in single]) if single else ""
    names = {
        p: (
            os.path.relpath(p, top).replace(os.sep, "--")
            if p.endswith((".h5", ".npz"))
            else os.path.basename(p)
        )
        for p in paths
    }
    return {p: name + ".tar" for p, name in names.items()}, os.path.basename(top)


def settings(reader):
    """What a DroidReader takes from an episode, as text: features must have been made with the same
    (without a camera, actions alone)."""
    made = {"fps": str(float(reader.fps)), "stride": str(reader.stride or 0)}
    made |= {k: " ".join(getattr(reader, k) or ["default"]) for k in ("state_keys", "action_keys")}
    return made | (
        {"crop_size": str(reader.crop_size), "crop": reader.crop, "camera": " ".join(reader.camera)}
        if reader.camera
        else {}
    )


def sources(found, bad, reader, phases):
    """What droid.index_episodes gives -> ([Source], [bad]); each camera `phases` times, from first
    rows spread over the stride."""
    out, seen = [], set()
    for r, entry in found:
        stride, views = reader.stride_of(r), reader.views(r)
        firsts = sorted({p * stride // phases for p in range(phases)})
        runs = [
            (c, first, steps)
            for c in views
            for first in firsts
            if (steps := (r.last - first - 1) // stride + 1) >= 2
        ]
        if flaw := (
            "features already"
            if r.kind == "features"
            else (
                f"{r.last} rows make no two steps of {stride} rows"
                if not runs
                else (
                    "its key or camera cannot be in a file name"
                    if not "".join([r.key, *views]).isprintable() or "@" in "".join(views)
                    else (
                        "an earlier episode of this file has the same key"
                        if (r.shard, r.key) in seen
                        else ""
                    )
                )
            )
        ):
            bad.append((r.shard, r.key, flaw))
            continue
        seen.add((r.shard, r.key))
        about = {
            "rows": r.last,
            "stride": stride,
            "rate": r.rate,
            "success": bool(entry["success"]),
            "idle": entry["idle"],
            "still": entry["still"],
        }
        out.append(Source(r, runs, about))
    return out, bad


def plan_episode(source, reader, size):
    """play_features.plan_recording for an episode: functions that read a part each, at most `size`
    steps of each segment of one camera: -> [(name of the segment, {"actions", "states"}, its own
    metadata)] of all segments, [(which of them, uint8 video)]."""
    r, stride = source.episode, source.about["stride"]
    shown, labels = [first + stride * np.arange(steps) for _, first, steps in source.runs], []
    for (camera, first, _), rows in zip(source.runs, shown):
        moved = [torch.from_numpy(np.float32(x)) for x in guarded(r, reader.motion, r, rows)]
        more = {
            "names": json.dumps(reader.names),
            "units": json.dumps(reader.units),
            "state_dim": str(reader.state_dim),
        }
        labels.append(
            (
                f"{camera}-{first:05d}",
                dict(zip(("actions", "states"), moved)),
                more | {"episode": json.dumps(source.about)},
            )
        )

    def read(camera, part):
        wanted = np.unique(np.concatenate([s for _, s in part]))
        video = guarded(r, reader.pictures, r, camera, wanted)
        return labels, [(i, video[np.searchsorted(wanted, s)]) for i, s in part]

    parts = []
    for camera in dict.fromkeys(c for c, _, _ in source.runs):
        mine = [(i, s) for i, (s, run) in enumerate(zip(shown, source.runs)) if run[0] == camera]
        for k in range(0, max(len(s) for _, s in mine), size):
            parts.append(
                functools.partial(
                    read, camera, [(i, s[k : k + size]) for i, s in mine if len(s) > k]
                )
            )
    return parts


def guarded(r, call, *given):
    """call(*given), where what is wrong with the episode is a ValueError; an error of the disk or a
    server stays an OSError."""
    try:
        return call(*given)
    except DAMAGE as e:
        if disk_failed(e):
            raise OSError(disk_sentence(f"{r.shard} {r.key}", e)) from e
        raise ValueError(f"{type(e).__name__}: {e}") from e


def index_tar(path):
    """A tar -> ([segment], [bad]) as files.episodes.index_file tells of episodes, each with its
    "rows": (first, stride, the episode's)."""
    found, bad = shard_index(path)
    segments = []
    for r in found:
        try:
            header, meta = feature_header(r) if "safetensors" in r.members else (None, {})
            if meta.get("dataset") != "droid":
                raise ValueError(f"{'features of ' * bool(meta)}gameplay: train_ac.py reads it")
            about, first, steps = (
                json.loads(meta["episode"]),
                int(r.key.rpartition("-")[2]),
                header["z"][1][0],
            )
            rows, stride, rate = int(about["rows"]), int(about["stride"]), float(about["rate"])
            words = [
                *json.loads(meta["names"]),
                *json.loads(meta["units"]),
                meta["encoder"],
                str(int(meta["grid"])),
            ]
            runs = {}
            ordered = True
            for name in ("idle", "still"):  # features of older versions do not say what was still
                said = about[name] if name == "idle" else about.get(name)
                runs[name] = said and [(int(a), int(b)) for a, b in said]
                edges = [0, *(x for pair in runs[name] or () for x in pair), 2**31]
                ordered = ordered and edges == sorted(edges)
            whole = (
                0 < rate < math.inf
                and 0 <= first < stride
                and 2 <= steps == (rows - first - 1) // stride + 1
                and ordered
            )
            whole &= (
                len(words) == 2 * header["actions"][1][1] + 2
                and all(isinstance(w, str) for w in words)
                and r.key.isprintable()
            )
            if not whole:
                raise ValueError("its metadata and its tensors disagree")
            about = runs | {
                "success": bool(about["success"]),
                "rows": (first, stride, rows),
                "rate": rate / stride,
            }
            segments.append(
                {"key": r.key, "members": {"safetensors": r.members["safetensors"]}, "steps": steps}
                | about
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            bad.append(
                (
                    path,
                    r.key,
                    (
                        str(e)
                        if isinstance(e, ValueError) and str(e)
                        else "not features (its metadata are damaged)"
                    ),
                )
            )
    return segments, [
        tuple(text.encode(errors="replace").decode() for text in b) for b in bad
    ]  # a damaged name may be no text


def keep_ranges(idle, steps, rule, span):
    """Idle runs of an episode -> [(first, last)] that clips of `span` steps may be cut from. off:
    everything. openpi: what is left without idle runs of 7 steps or more, if 16 steps long, less
    its last 10. light, of still runs: only clips in which nothing moves are left out."""
    if rule == "off":
        return [(0, steps)]
    edges = [
        0,
        *(x for a, b in idle if b - a >= (7 if rule == "openpi" else span - 1) for x in (a, b)),
        steps,
    ]
    pieces = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]
    if rule == "openpi":
        return [(a, b - 10) for a, b in pieces if b - a >= 16]
    return [(max(a - span + 1, 0), min(b + span - 2, steps)) for a, b in pieces]


def to_steps(ranges, first, stride):
    """[(row, row after)] -> the same in steps, of which step k lies at row first + k stride."""
    return [(max(-((first - a) // stride), 0), (b - 1 - first) // stride + 1) for a, b in ranges]


def check_features(records, reader):
    """Refuse features made with other settings than a DroidReader has (ValueError), and tell it
    what their actions and states are."""
    made = feature_settings(records)
    for k, v in settings(reader).items():
        if made.get(k) != v:
            raise ValueError(
                f"{records[0].shard} was made with --{k} {made.get(k)}, this run has {v}: change"
                " one of them"
            )
    reader.names, reader.units, reader.state_dim = (
        json.loads(made["names"]),
        json.loads(made["units"]),
        int(made["state_dim"]),
    )


def pack_features(z, store):
    """What is stored of features z (S, N, D): {"z"} in bf16, or int8 q with z = q * z_scale * std +
    mean; z_channels (2, D) float32 holds mean and std of the channels, z_scale (S, N, 1) float16
    the largest of a token's scaled channels / 127. Scaling the channels first keeps a few large
    ones from taking all bits of the others. ValueError for what is not finite."""
    if not z.isfinite().all():
        raise ValueError("its features are not finite: encode it with --dtype float32")
    if store == "bf16":
        return {"z": z.to(torch.bfloat16)}
    std, mean = torch.std_mean(z.float(), dim=(0, 1), correction=0)
    std, rows = (
        std.maximum(1e-6 * mean.abs()).clamp_min(1e-12),
        [],
    )  # of a constant channel, what is left is rounding
    for x in z.split(64):
        x = (x - mean) / std
        scale = (
            (x.abs().amax(-1, keepdim=True) / 127).clamp_min(2**-14).half()
        )  # below that float16 loses digits
        rows.append(((x / scale).round().clamp(-127, 127).to(torch.int8), scale))
    q, scale = (torch.cat(x) for x in zip(*rows))
    return {"z": q, "z_scale": scale, "z_channels": torch.stack([mean, std])}
