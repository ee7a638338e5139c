"""Features of recordings of play: how encode.py cuts recordings into them (files/robot_features.py
is the same for robot episodes)."""

import functools

import numpy as np
import torch

from data import Slice, index_shards, read_ticks
from files.vpt import mp4_times, read_frames, step_actions, step_size, video_rate


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
