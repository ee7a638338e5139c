"""droid.py and files/episodes.py: TFRecords (one by TensorFlow itself), raw DROID and one's own
episodes -> batches and statistics."""

import collections
import errno
import functools
import gc
import gzip
import http.server
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import fsspec
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

import droid
from data import ActionScaler, windows
from droid import (
    DroidClips,
    DroidReader,
    DroidSteps,
    compose_poses,
    crop_resize,
    droid_clips,
    find_episodes,
    keep_ranges,
    open_droid,
    pose_actions,
)
from files import episodes
from files.disk import Npz
from prepare.robot import droid_example, example, record, varint
from tests.harness import (
    CAMERAS,
    FIXTURES,
    ROOT,
    Run,
    film,
    jpeg,
    needs_mujoco,
    read_number,
    run,
    tfrecord,
    tfrecord_rows,
    tfrecord_without_names,
    write_file,
)

# the pictures are 80x64: the crop shows their numbers
SMALL = {"crop_size": 64, "crop": "square"}


pytestmark = pytest.mark.usefixtures("deadline", "forkserver")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three TFRecords of three episodes of 60 to 100 rows."""
    folder = tmp_path_factory.mktemp("droid")
    for s in range(3):
        write_file(
            folder / f"d.tfrecord-{s:05d}-of-00003",
            *(tfrecord(3 * s + k, 60 + 20 * k) for k in range(3)),
        )
    return folder


def quiet(line):
    pass


def opened(data, reader=None, **options):
    return open_droid(data, reader=reader or DroidReader(4, 5, **SMALL), log=quiet, **options)


def test_checksums_of_very_much_data_are_not_read_first(tmp_path, monkeypatch):
    """Bug: a start on all of DROID reads 1.7 TB before its first step, or leaves checksums out
    without a word."""
    data = tfrecord(3)
    said = []
    path = write_file(tmp_path / "a", tfrecord(4), data[:-1] + bytes([data[-1] ^ 1]))
    assert "checksum" in opened(path)[2][0][2]
    monkeypatch.setattr(droid, "VERIFY", os.path.getsize(path) - 1)
    train, _, bad = open_droid(path, reader=DroidReader(4, 5, **SMALL), log=said.append)
    assert len({r.key for r in train}) == 2
    assert not bad
    assert "checksums are not checked" in said[0]


def loader_of(data, batch_size=4, reader=None, **options):
    options = {"num_workers": 0, "batches_per_epoch": 3, "seed": 5} | options
    return droid_clips(data, batch_size, reader=reader or DroidReader(4, 5, **SMALL), **options)


def take(loader, n):
    return [
        [
            (k, read_number(v[0]), a.numpy().tobytes())
            for k, v, a in zip(b["key"], b["video"], b["actions"])
        ]
        for b in itertools.islice(loader, n)
    ]


def expected_actions(states):
    """Differences of poses, said again a row at a time."""
    out = []
    for a, b in itertools.pairwise(np.asarray(states, dtype=np.float64)):
        turn = (
            Rotation.from_euler("xyz", b[3:6]).as_matrix()
            @ Rotation.from_euler("xyz", a[3:6]).as_matrix().T
        )
        out.append([*(b[:3] - a[:3]), *Rotation.from_matrix(turn).as_euler("xyz"), b[6] - a[6]])
    return np.array(out)


# --- numbers against the reference ---


def test_poses_are_those_of_the_reference():
    """Bug: intrinsic angles, R[t]^T R[t+1], plain differences of angles, degrees: wrong actions
    that train all the same."""
    t = load_file(f"{FIXTURES}/poses.safetensors")
    np.testing.assert_allclose(
        pose_actions(t["in/poses/states"].numpy()), t["out/poses/actions"], atol=1e-9
    )

    pose, action = t["in/newpose/pose"], t["in/newpose/action"]
    both = compose_poses(
        pose[:, 0], action.repeat(1, 2, 1), torch.zeros(7).double(), torch.ones(7).double()
    )
    torch.testing.assert_close(both[:, 1:], t["out/newpose/pose"], rtol=0, atol=1e-9)

    states = t["in/poses/states"][None].clone()
    states[..., 6] = states[..., 6].clamp(0, 1)
    moves = torch.from_numpy(pose_actions(states[0].numpy()))[None]
    mean = torch.randn(7).double()
    scale = torch.rand(7).double() + 0.5
    again = compose_poses(states[:, 0], (moves - mean) / scale, mean, scale)
    torch.testing.assert_close(again[..., :3], states[:, :-1, :3])

    turns = [Rotation.from_euler("xyz", x[0, :, 3:6].numpy()) for x in (again, states[:, :-1])]
    assert (turns[0] * turns[1].inv()).magnitude().max() < 1e-9


def test_strides_are_those_of_the_reference():
    """Bug: 4 fps of 15 Hz rounded down to stride 3, or 29.97 fps cut to 7."""
    found = load_file(f"{FIXTURES}/poses.safetensors")
    for name in (k for k in found if k.startswith("out/indices")):
        rate, fps = re.match(r".*vfps([\d.]+)_fps(\d+)", name).groups()
        r = episodes.Episode("", "", "raw", {}, 900, float(rate), 0, 900, 0)
        assert DroidReader(fps=float(fps)).stride_of(r) == found[name].diff().unique().item(), name
    r = episodes.Episode("", "", "raw", {}, 900, 15.0, 0, 900, 0)
    assert [DroidReader(fps=f).stride_of(r) for f in (4, 5, 15, 30, 7.5)] == [4, 3, 1, 1, 2]
    assert DroidReader(stride=15).stride_of(r) == 15


def test_crop_is_that_of_the_reference():
    """Bug: an antialiased or uncentred crop, or a squeezed whole picture: the encoder sees an arm
    of another shape than Meta's did."""
    t = load_file(f"{FIXTURES}/transform.safetensors")
    mean, std = (
        255 * torch.tensor(x)[:, None, None, None]
        for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    for name, aspect in (
        ("droid_config_16x9", (0.75, 1.35)),
        ("droid_config_4x3", (0.75, 1.35)),
        ("jepa_wms_square", (1.0, 1.0)),
        ("notebook_identity", (0.75, 1.35)),
    ):
        ours = crop_resize(list(t[f"in/{name}/frames"].numpy()), 64, *aspect).transpose(0, 1)
        theirs = t[f"out/{name}/clip"] * std + mean
        assert ours.dtype == torch.uint8, name
        assert (ours - theirs).abs().max() < 0.51, name
    assert DroidReader().aspect == (0.75, 1.35)
    assert DroidReader(crop="square").aspect == (1.0, 1.0)


def test_a_file_that_tensorflow_wrote():
    """Bug: our reader and our writer agree on something that is no TFRecord or Example. This one
    TensorFlow 2.21 wrote: two episodes of 40 steps; field k is sin(t / 10 + column + k + episode),
    picture n of camera c of episode e shows 100 (3 e + c) + n."""
    path = f"{FIXTURES}/droid_tf.tfrecord"
    lines = []
    t = np.arange(40)
    reader = DroidReader(
        8, 4, **SMALL, camera=("wrist",), action_keys=["action_dict/joint_velocity", "action"]
    )
    train, val, bad = open_droid(path, reader=reader, idle_filter="off", log=lines.append)
    assert [r.key for r in train] == [
        f"gs://x/{e}/recordings/MP4--gs://x/{s}/{e}/trajectory.h5"
        for e, s in enumerate(("success", "failure"))
    ]
    assert not val
    assert not bad
    assert lines[0].startswith("2 episodes, 0.0% of their rows idle: 0 without")
    assert reader.names[7] == "action.0"

    for e, r in enumerate(train):
        assert r.steps == 40

        names = {
            "observation/cartesian_position": (0, 6),
            "action_dict/joint_velocity": (25, 7),
            "action": (40, 7),
        }
        for (k, d), x in zip(names.values(), episodes.read_fields(r, names)):
            np.testing.assert_allclose(
                x, np.sin(0.1 * t[:, None] + np.arange(d) + k + e), atol=1e-6
            )

        clip = reader(r, 5, np.random.default_rng(0))
        assert [read_number(f) for f in clip["video"]] == [
            100 * (3 * e + 2) + 5 + 4 * i for i in range(8)
        ]

        mean = np.sin(0.1 * t[5:33, None] + np.arange(7) + 40 + e).reshape(7, 4, 7).mean(1)
        np.testing.assert_allclose(clip["actions"][:, 7:], mean, atol=1e-6)
    assert [r.key[:6] for r in opened(path, success="only")[0]] == ["gs://x"]
    assert len(opened(path, success="only")[0]) == 1


def test_frames_states_and_actions_are_of_the_same_rows(shards):
    """Bug: pictures a step off the poses, actions of neighbouring rows in place of the sampled
    ones."""
    train, _, _ = opened([str(shards)])
    batch = next(iter(loader_of(train, 16)))
    assert batch["video"].shape == (16, 4, 3, 64, 64)
    assert batch["actions"].shape == (16, 3, 7)
    assert not batch["bad"]

    for video, states, actions, key in zip(
        batch["video"], batch["states"], batch["actions"], batch["key"]
    ):
        numbers = [read_number(f) for f in video]
        assert np.diff(numbers).tolist() == [3, 3, 3]
        assert numbers == (1000 * states[:, 6]).round().int().tolist()

        seed = int(key.split("/")[2])
        fields = tfrecord_rows(seed, 60 + 20 * (seed % 3))
        pose = fields["observation/cartesian_position"]
        grip = fields["observation/gripper_position"]
        true = np.float32(np.hstack([pose, grip]))[numbers]
        np.testing.assert_allclose(states, true, atol=1e-6)
        np.testing.assert_allclose(actions, expected_actions(true), atol=1e-5)

        # though roll wraps
        assert actions[:, 3:6].abs().max() < 1


# --- filters and splits ---


def openpi_ranges(velocity):
    """openpi's compute_droid_nonidle_ranges.py, a step at a time."""
    n = len(velocity)
    idle = [
        t > 0
        and all(abs(velocity[t][j] - velocity[t - 1][j]) < 1e-3 for j in range(len(velocity[t])))
        for t in range(n)
    ]
    keep = [True] * n
    t = 0
    while t < n:
        end = t
        while end < n and idle[end]:
            end += 1
        if end - t >= 7:
            keep[t:end] = [False] * (end - t)
        t = max(end, t + 1)
    out = []
    t = 0
    while t < n:
        end = t
        while end < n and keep[end]:
            end += 1
        if end - t >= 16:
            out.append((t, end - 10))
        t = max(end, t + 1)
    return out


def random_velocity(rng):
    """Motion, with stretches where the command stays."""
    v = rng.normal(0, 0.3, (int(rng.integers(1, 120)), 7))
    for _ in range(rng.integers(0, 5)):
        a = rng.integers(0, len(v))
        n = int(rng.integers(2, 40))
        v[a : a + n] = v[a]
    return v


def test_idle_filter_is_openpis_rule():
    """Bug: off by one at the ends of an idle run; idle from small commands rather than from
    commands that stay the same."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(400):
        v = random_velocity(rng)
        found = keep_ranges(episodes.idle_runs(v), len(v), "openpi", 29)
        assert found == openpi_ranges(v)
        kept += len(found)
    assert kept > 300
    edge = np.zeros((40, 7)) + 0.0005 * np.arange(40)[:, None]
    assert keep_ranges(episodes.idle_runs(edge), 40, "openpi", 29) == []
    assert keep_ranges(episodes.idle_runs(3 * edge), 40, "openpi", 29) == [(0, 30)]


def test_light_filter_leaves_out_exactly_the_clips_in_which_nothing_moves():
    """Bug: pauses, which a world model must predict too, are lost with the idle clips; or a start
    is in two ranges and drawn twice."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        v = random_velocity(rng)
        span = int(rng.integers(2, 20))
        still = [
            all(np.abs(np.diff(v[s : s + span], axis=0)).max(1) < 1e-3)
            for s in range(len(v) - span + 1)
        ]
        found = [
            s
            for a, b in keep_ranges(episodes.idle_runs(v), len(v), "light", span)
            for s in range(a, b - span + 1)
        ]
        assert found == [s for s, x in enumerate(still) if not x]


def test_filters_are_counted_and_clips_stay_inside_the_ranges(tmp_path):
    """Bug: a filter that drops most of the data without a word; clips that run over into an idle
    stretch."""
    velocity = np.random.default_rng(0).normal(0, 0.3, (120, 7))
    velocity[40:70] = 0.1
    pose = tfrecord_rows(1, 120)["observation/cartesian_position"]
    pose[40:70] = pose[40]
    change = {"action_dict/joint_velocity": velocity, "observation/cartesian_position": pose}
    path = write_file(
        tmp_path / "a.tfrecord",
        tfrecord(1, 120, **change),
        tfrecord(2, 120, success=False),
        tfrecord(3, 8),
        tfrecord(4, 120, **{"action_dict/joint_velocity": None}),
    )
    reader = DroidReader(4, 5, **SMALL)
    lines = []
    assert episodes.idle_runs(velocity) == [[41, 70]]

    train, _, bad = open_droid(
        path, reader=reader, idle_filter="openpi", success="only", log=lines.append
    )
    assert [(r.first, r.last) for r in train] == [(0, 31), (70, 110), (0, 120)]
    assert not bad

    share = (31 - 9 + 40 - 9 + 111) / 222
    left = (
        "1 without success left out, 1 shorter than a clip, of the others --idle_filter openpi"
        f" keeps {share:.1%} of 222 starts of clips"
    )
    assert lines == [
        f"4 episodes, 7.9% of their rows idle: {left} (1 of which it is not known what is"
        " idle: all), in 3"
        " stretches"
    ]

    numbers = [
        [read_number(f) for f in v]
        for b in itertools.islice(loader_of(train[:2], 16), 3)
        for v in b["video"]
    ]
    assert {n for clip in numbers for n in clip} >= {0, 30, 70, 109}
    assert all(max(c) < 31 or min(c) >= 70 and max(c) < 110 for c in numbers)
    assert [len(opened(path, idle_filter=f)[0]) for f in ("off", "light")] == [3, 4]

    velocity[:], pose[:] = 0, 0
    change["observation/gripper_position"] = np.zeros((120, 1))
    with pytest.raises(
        ValueError,
        match="no usable episode in .*b.tfrecord: the filters leave nothing .--idle_filter off",
    ):
        opened(write_file(tmp_path / "b.tfrecord", tfrecord(1, 120, **change)))


def test_the_split_goes_by_episode_wherever_it_lies(shards, tmp_path):
    """Bug: two stretches of one episode on both sides; another split once the shards are merged, so
    that held-out clips are trained on."""
    train, val, _ = opened(str(shards / "*"), val_fraction=0.3)
    keys = [{r.key for r in side} for side in (train, val)]
    assert len(keys[0]) == 6 and len(keys[1]) == 3 and not keys[0] & keys[1]
    merged = write_file(
        tmp_path / "all.tfrecord", *(tfrecord(s, 60 + 20 * (s % 3)) for s in reversed(range(9)))
    )
    assert {r.key for r in opened(merged, val_fraction=0.3)[1]} == keys[1]
    with pytest.raises(ValueError, match="--val_data and --data share 9 episodes"):
        opened(str(shards), val_data=merged)
    alone = write_file(tmp_path / "one.tfrecord", tfrecord(1))

    # nothing to hold out
    assert len(opened(alone, val_fraction=0.5)[0]) == 1
    assert opened(alone, val_fraction=0.5)[1] == []


# --- order ---


def test_order_does_not_depend_on_workers_and_resumes_anywhere(shards):
    """Bug: the same run with other workers or after a resume sees other clips, other cameras, or
    the same ones twice."""
    reader = DroidReader(4, 5, **SMALL, camera=tuple(CAMERAS))
    train, _, _ = opened(str(shards), reader)
    plain = take(loader_of(train, reader=reader), 7)
    assert plain[:3] != plain[3:6]
    assert take(loader_of(train, reader=reader), 7) == plain
    for workers in (1, 3):
        assert take(loader_of(train, reader=reader, num_workers=workers), 5) == plain[:5]
    assert take(loader_of(train, reader=reader, epoch=1, itr=2), 2) == plain[5:7]
    assert take(loader_of(train, reader=reader, epoch=0, itr=1, num_workers=1), 2) == plain[1:3]
    assert take(loader_of(train, reader=reader, seed=6), 1) != plain[:1]

    two = [take(loader_of(train, 2, reader, rank=r, world=2), 4) for r in range(2)]
    assert [a + b for a, b in zip(*two)] == plain[:4]

    seen = collections.Counter(number // 300 for batch in plain for _, number, _ in batch)

    # a view of each camera
    assert set(seen) == {0, 1, 2}


def test_validation_windows_can_all_be_read_and_cover_the_episodes(shards):
    """Bug: a window past the end of a stretch fails in every validation; half of the held-out
    frames are never looked at."""
    for frames, fps in ((4, 5), (8, 4), (3, 15)):
        reader = DroidReader(frames, fps, **SMALL)
        train, _, _ = opened(str(shards), reader, idle_filter="openpi")
        items = [i for b in windows(DroidClips(train, reader), 4, 10**6) for i in b]
        clips = DroidClips(train, reader)
        got = [clips[i] for i in items]
        assert not any(c["bad"] for c in got)
        stride = reader.stride_of(train[0])
        assert len(items) == sum(((r.last - r.first - 1) // stride + 1) // frames for r in train)

        # no frame twice
        assert len({(c["key"], read_number(f)) for c in got for f in c["video"]}) == frames * len(
            items
        )


def test_an_epoch_spreads_over_all_starts(shards):
    """Bug: short episodes drawn as often as long ones; the last start is never drawn."""
    train, _, _ = opened(str(shards))
    starts = sum(DroidReader(4, 5).starts(r) for r in train)
    batches = loader_of(train, 8, batches_per_epoch=starts // 8).batch_sampler
    numbers = collections.Counter(
        n for b in itertools.islice(batches, starts // 8) for _, _, n, _ in b
    )
    assert all(abs(numbers[i] - DroidReader(4, 5).starts(r)) <= 2 for i, r in enumerate(train))


# --- damage ---


def test_features_may_be_missing_or_laid_out_otherwise(tmp_path):
    """Bug: a subset without some fields stops the run; floats or flags that are not packed are read
    as garbage."""

    def unpack(record_bytes):
        """The same Example with a tag before each number, as other writers have it."""
        read = lambda at, n: record_bytes[at : at + n]  # noqa: E731
        out = {}
        for name, (at, n, _) in episodes.features(read, 12, len(record_bytes) - 16).items():
            raw = read(at, n)
            if name.endswith("is_first"):
                out[name] = ("3", b"".join(b"\x08" + bytes([x]) for x in raw[-(len(raw) - 2) :]))
            elif name.endswith(("position", "velocity", "action")):
                out[name] = ("2", b"".join(b"\x0d" + x.tobytes() for x in episodes.numbers(raw)))
            else:
                out[name] = ("1", raw)
        part = lambda n, data: bytes([n << 3 | 2]) + varint(len(data)) + data  # noqa: E731
        return record(
            part(
                1,
                b"".join(
                    part(1, part(1, k.encode()) + part(2, part(int(n), x)))
                    for k, (n, x) in out.items()
                ),
            )
        )

    plain = tfrecord(7)
    a, b = (
        opened(write_file(tmp_path / name, data))[0][0]
        for name, data in (("a", plain), ("b", unpack(plain)))
    )
    assert unpack(plain) != plain and (a.steps, a.key) == (b.steps, b.key)
    for x, y in zip(*(episodes.read_fields(r, episodes.STATES["rlds"]) for r in (a, b))):
        assert np.array_equal(x, y) and len(x) == 60

    cases = {
        "no steps/is_first": {"gone": "steps/is_first"},
        "no steps/observation/cartesian_position": {"observation/cartesian_position": None},
        "no camera exterior_1": {"cameras": ["wrist"]},
        "no steps in it": {"steps": 0},
    }
    records = [plain]
    for change in cases.values():
        data = tfrecord(len(records), **{k: v for k, v in change.items() if k != "gone"})
        records.append(
            data.replace(b"steps/is_first", b"steps/no_first") if "gone" in change else data
        )
    train, _, bad = opened(write_file(tmp_path / "c", *records), verify=False)
    assert [r.key for r in train] == [a.key] and len(bad) == 4
    for reason, (_, _, found) in zip(cases, bad):
        assert reason in found

    lost = tfrecord(5).replace(
        b"\x0a" + varint(len(jpeg(659))) + jpeg(659), b"\x12" + varint(len(jpeg(659))) + jpeg(659)
    )
    assert (
        "a list of bytes is damaged"
        in opened(write_file(tmp_path / "f", record(lost[12:-4]), plain))[2][0][2]
    )

    pictures = {c: [jpeg(i) for i in range(60 - (c == "wrist"))] for c in CAMERAS}
    fewer = record(
        droid_example(
            {k: np.float32(x) for k, x in tfrecord_rows(1, 60).items()},
            pictures,
            "a",
            "b",
            "abc",
            True,
        )
    )
    assert (
        opened(write_file(tmp_path / "g", fewer, plain))[2][0][2]
        == "60 steps, but pictures of wrist 59"
    )

    only_wrist = opened(
        write_file(tmp_path / "d", tfrecord(1, cameras=["wrist"])),
        DroidReader(4, 5, **SMALL, camera=("exterior_1", "wrist")),
    )[0]
    assert (
        take(
            loader_of(only_wrist, 1, DroidReader(4, 5, **SMALL, camera=("exterior_1", "wrist"))), 1
        )[0][0][1]
        >= 600
    )

    few = write_file(
        tmp_path / "e",
        record(example({"steps/is_first": np.ones(3, int)})),
        record(b""),
        record(b"\x0a\x05hello"),
        plain,
    )
    reasons = [reason for *_, reason in opened(few)[2]]
    assert len(reasons) == 3
    assert all("not a tf.train.Example" in r for r in reasons[:2])
    assert "no steps/observation/c" in reasons[2]


def test_places_of_pictures_follow_from_their_sizes():
    """Bug: the length of a JPEG takes one, two or three bytes, and an error in that gives the
    neighbour's bytes."""
    sizes = [0, 1, 127, 128, 129, 16383, 16384, 20000, (1 << 21) - 1, 1 << 21, 5]
    raw = b"".join(b"\x0a" + varint(n) + bytes(n) for n in sizes)
    assert episodes.places(sizes) == episodes.values(raw)
    assert episodes.places([]) == []


@pytest.mark.parametrize(
    "how", ["cut", "cut_head", "cut_tail", "length", "data", "crc", "text", "gzip", "empty", "huge"]
)
def test_damaged_files_keep_what_is_whole_and_say_so(tmp_path, how):
    """Bug: a truncated download or a flipped bit gives other numbers or a traceback, or silently
    ends the data."""
    whole = [tfrecord(s) for s in range(3)]
    raw = b"".join(whole)
    at = len(whole[0])
    flip = lambda i: raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :]  # noqa: E731
    damaged = {
        "cut": raw[: at + 5000],
        "cut_head": raw[: at + 5],
        "cut_tail": raw[:-2],
        "length": flip(at + 2),
        "data": flip(at + 900),
        "crc": flip(2 * at - 1),
        "text": b"not a record\n" * 500,
        "gzip": b"\x1f\x8b" + raw[5:],
        "empty": b"",
        "huge": b"\xff" * 4096,
    }[how]
    path = write_file(tmp_path / "x.tfrecord", damaged)
    kept = {
        "data": "02",
        "crc": "02",
        "cut": "0",
        "cut_head": "0",
        "cut_tail": "01",
        "length": "0",
    }.get(how, "")
    reason = {
        "cut": "the file ends inside the record at byte",
        "cut_head": "the file ends inside",
        "cut_tail": "truncated",
        "data": "wrong checksum",
        "crc": "wrong checksum",
        "empty": "no episode in it",
    }.get(how, "not a TFRecord")
    if not kept:
        with pytest.raises(ValueError, match=f"no usable episode in .*x.tfrecord.*{reason}"):
            opened(path)
        return
    train, _, bad = opened(path)
    assert [r.key.split("/")[2] for r in train] == [*kept]
    assert len(bad) == 1
    assert bad[0][0] == path
    assert reason in bad[0][2]


def test_flipped_bytes_never_end_a_run_without_checksums(tmp_path):
    """Bug: some flipped byte of the protobuf gives an exception that nobody catches, an endless
    loop, or gigabytes of memory."""
    raw = tfrecord(1, 30)
    rng = np.random.default_rng(0)
    start = raw.index(b"steps/observation/cartesian_position") - 40
    places = [*range(12, 60), *range(start, start + 90), *rng.integers(12, len(raw) - 4, 100)]
    reader = DroidReader(4, 5, **SMALL)
    ends = collections.Counter()
    for i, at in enumerate(places):
        data = raw[:at] + bytes([raw[at] ^ 1 << i % 8]) + raw[at + 1 :]
        found, bad = episodes.index_rlds(write_file(tmp_path / f"{i}", data), len(data), False)
        assert len(found) + len(bad) == 1

        for e in found:
            r = episodes.Episode(
                str(tmp_path / f"{i}"),
                e["key"],
                "rlds",
                e["members"],
                e["steps"],
                15.0,
                0,
                e["steps"],
                0,
            )
            try:
                if flaw := reader.flaw(r):
                    raise ValueError(flaw)
                reader(r, 2, rng)
                ends["read"] += 1
            except episodes.DAMAGE:
                ends["refused"] += 1

        ends["listed"] += len(bad)
    assert min(ends.values()) > 5, ends


def test_a_clip_that_cannot_be_read_is_replaced_and_reported(tmp_path):
    """Bug: one bad JPEG or NaN in a thousand hours ends the training, or is trained on."""
    nan = tfrecord_rows(2, 60)["observation/cartesian_position"]
    nan[30:] = np.nan
    broken = tfrecord(3)
    for i in range(60):
        broken = broken.replace(jpeg(i), b"\xff\xd8" + bytes(len(jpeg(i)) - 2))
    path = write_file(
        tmp_path / "a.tfrecord",
        tfrecord(2, **{"observation/cartesian_position": nan}),
        tfrecord(1),
        broken,
    )
    train, _, bad = opened(path, verify=False)
    assert len(train) == 3 and not bad

    batches = list(itertools.islice(loader_of(train, 8), 6))
    reasons = collections.Counter(
        (key.split("/")[2], reason) for b in batches for _, key, reason in b["bad"]
    )
    assert {k for k, _ in reasons} == {"2", "3"}
    assert any("not finite" in r for _, r in reasons)
    assert all(len(b["video"]) == 8 for b in batches)
    assert all(torch.isfinite(b["states"]).all() for b in batches)

    # while the run goes on
    os.truncate(path, 4000)
    with pytest.raises(
        ValueError, match="20 clips in a row.*damaged or changed since it was indexed"
    ):
        next(iter(loader_of(train)))


def test_bad_episodes_are_bounded(tmp_path):
    """Bug: half of a download is damaged, and the run goes on with the other half."""
    good = [tfrecord(s, 30) for s in range(95)]
    wrong = [record(b"nonsense")] * 6
    path = write_file(tmp_path / "a.tfrecord", *good, *wrong)
    assert len(opened(path, max_bad_fraction=0.1)[2]) == 6
    with pytest.raises(
        ValueError, match="6 of 101 episodes cannot be read, .*a.tfrecord.*raise --max_bad_fraction"
    ):
        opened(path, max_bad_fraction=0.05)


# --- the index ---


def test_the_index_is_built_once_and_rebuilt_when_damaged_or_outdated(
    tmp_path, monkeypatch, capsys
):
    """Bug: every start reads every shard again; a half-written or old index gives pictures of other
    episodes."""
    monkeypatch.setattr(episodes, "CACHE", str(tmp_path / "cache"))
    calls = []
    index = episodes.index_rlds
    monkeypatch.setattr(episodes, "index_rlds", lambda *a: calls.append(a) or index(*a))
    path = write_file(tmp_path / "a.tfrecord", tfrecord(1), tfrecord(2))
    first = opened(path)[0]

    def places(members):
        return {k: (*m[:2], list(m[2] if m[2] is not None else [])) for k, m in members.items()}

    def show(found):
        return [(r.key, places(r.members)) for r in found]

    assert show(opened(path)[0]) == show(first) and len(calls) == 1

    (cache,) = (tmp_path / "cache" / "droid").iterdir()
    raw = cache.read_bytes()
    for i, damage in enumerate(
        [b"", raw[:20], raw[:-1], raw + b"x", raw[:100] + b"9" + raw[101:], b"{}" * 50]
    ):
        cache.write_bytes(damage)
        assert show(opened(path)[0]) == show(first)
        assert len(calls) == 2 + i
        assert cache.read_bytes() == raw

    write_file(path, tfrecord(3), tfrecord(4))
    os.utime(path, ns=(1, 1))
    assert [r.key.split("/")[2] for r in opened(path)[0]] == ["3", "4"]

    (tmp_path / "file").touch()
    monkeypatch.setattr(episodes, "CACHE", str(tmp_path / "file"))
    assert len(opened(path)[0]) == 2
    assert "NANOJEPA_CACHE" in capsys.readouterr().out


def test_only_sampled_pictures_are_decoded(shards, monkeypatch):
    """Bug: a clip decodes all of an episode's 300 JPEGs."""
    train, _, _ = opened(str(shards))
    calls = []
    read = Image.open
    monkeypatch.setattr(episodes.Image, "open", lambda f: calls.append(1) or read(f))
    next(iter(loader_of(train, 8)))
    assert len(calls) == 8 * 4


# --- URLs ---


class Ranges(http.server.BaseHTTPRequestHandler):
    """Files of `folder`, parts of them if asked; `fail` answers of 503 first; counts what it
    sends."""

    folder = ""
    sent = 0
    fail = 0
    serve_ranges = True

    def do_GET(self, body=True):
        path = os.path.join(self.folder, os.path.basename(self.path))
        if type(self).fail > 0 and body:
            type(self).fail -= 1
            return self.send_error(503)
        if not os.path.exists(path):
            return self.send_error(404)
        data = open(path, "rb").read()
        code = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response_only(206 if wanted and self.serve_ranges else code)
        if self.serve_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if wanted and self.serve_ranges:
            a = int(wanted[1])
            b = min(int(wanted[2]), len(data) - 1)
            self.send_header("Content-Range", f"bytes {a}-{b}/{len(data)}")
            data = data[a : b + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
            type(self).sent += len(data)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *a):
        pass


@pytest.fixture
def server(tmp_path):
    handler = type("Handler", (Ranges,), {"folder": str(tmp_path)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}", handler
        s.shutdown()


def test_any_fsspec_url_gives_the_same_batches(shards):
    """Bug: a bucket is read by other rules than a disk: other clips, other order."""
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/droid", recursive=True)
    try:
        local = take(loader_of(opened(str(shards / "*.tfrecord*"))[0]), 3)
        for pattern in ("memory://droid/*.tfrecord*", "memory://droid/"):
            assert take(loader_of(opened(pattern)[0]), 3) == local
        with pytest.raises(FileNotFoundError, match="no episode at memory://nothing/"):
            opened("memory://nothing/*.tfrecord*")
        with pytest.raises(OSError, match="memory://droid/none"):
            opened("memory://droid/none.tfrecord")
    finally:
        memory.rm("/droid", recursive=True)


def test_http_reads_ranges_only(tmp_path, server):
    """Bug: a shard of 0.85 GB is fetched to train on eight pictures of it; or a busy server ends
    the run."""
    url, handler = server

    # what follows a JPEG's end mark is not looked at
    big = [jpeg(0) + bytes(60000)] * 60
    r = {k: np.float32(x) for k, x in tfrecord_rows(1, 60).items()}
    path = write_file(
        tmp_path / "a.tfrecord",
        *(
            record(droid_example(r, dict.fromkeys(CAMERAS, big), f"e{i}", "success", "abc", True))
            for i in range(3)
        ),
    )
    train, _, bad = opened(url + "/a.tfrecord")
    assert len(train) == 3
    assert not bad
    assert handler.sent < 0.2 * os.path.getsize(path)

    opened(url + "/a.tfrecord", verify=True)
    assert handler.sent > os.path.getsize(path)

    # which knows where each picture is
    train = opened(url + "/a.tfrecord", verify=True)[0]
    handler.sent, handler.fail = 0, 2
    batch = next(iter(loader_of(train, 2)))
    assert handler.sent < 2 * (4 * 66000 + 20000)

    # in processes that inherited the connection
    assert take(loader_of(train, 2, num_workers=2), 2) == take(loader_of(train, 2), 2)
    assert batch["video"].shape[0] == 2 and handler.fail == 0 and not batch["bad"]

    handler.serve_ranges = False
    write_file(tmp_path / "b.tfrecord", tfrecord(1))
    with pytest.raises(OSError, match="b.tfrecord cannot be read"):
        opened(url + "/b.tfrecord")
    with pytest.raises(OSError, match="none.tfrecord"):
        opened(url + "/none.tfrecord")


@pytest.mark.parametrize("fail", [4, 10**9])
def test_an_outage_replaces_no_clip(tmp_path, server, fail):
    """Bug: while a server does not answer for some seconds, its episodes are called damaged, and
    clips of others are trained on."""
    url, handler = server
    write_file(tmp_path / "a.tfrecord", *(tfrecord(i) for i in range(3)))
    train = opened(url + "/a.tfrecord")[0]
    clips = DroidClips(train, DroidReader(4, 5, **SMALL))
    want = clips[0, 0, 0, 0.5]
    handler.fail = fail

    # of five tries
    if fail == 4:
        got = clips[0, 0, 0, 0.5]
        assert got["key"] == want["key"] and not got["bad"]
        assert torch.equal(got["video"], want["video"])
        return
    with pytest.raises(ValueError, match="a.tfrecord cannot be read: .*503.*5 times") as e:
        clips[0, 0, 0, 0.5]
    assert "damaged" not in str(e.value)
    with pytest.raises(OSError, match="a.tfrecord cannot be read: .*503"):
        opened(url + "/a.tfrecord", verify=True)


@pytest.mark.parametrize("kind", ["rlds", "raw", "robot"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_disk_that_fails_in_a_run_replaces_no_clip(tmp_path, monkeypatch, kind, code):
    """Bug: an error of the disk, or too many open files, makes good episodes damaged ones."""
    reader = DroidReader(4, 5, **SMALL)
    if kind == "rlds":
        path = write_file(tmp_path / "a.tfrecord", *(tfrecord(i) for i in range(3)))
    elif kind == "raw":
        raw_droid(tmp_path / "a")
        path = tmp_path / "a" / "trajectory.h5"
    else:
        pose = tfrecord_rows(1, 60)["observation/cartesian_position"]
        np.savez(tmp_path / "a.npz", cartesian_position=pose, gripper_position=pose[:, :1])
        write_file(tmp_path / "a.mp4", film(60))
        path = tmp_path / "a.npz"

    train = opened(str(path), reader)[0]
    clips = DroidClips(train, reader)
    want = clips[0, 0, 0, 0.5]
    for times in (1, 10**9):
        left = iter(range(times))

        def failing(left, real, *given):
            if next(left, None) is not None:
                raise OSError(code, os.strerror(code))
            return real(*given)

        with monkeypatch.context() as patch:
            for name in ("pread", "preadv"):
                patch.setattr(os, name, functools.partial(failing, left, getattr(os, name)))
            if times == 1:
                got = clips[0, 0, 0, 0.5]
                assert torch.equal(got["video"], want["video"]) and not got["bad"]
                continue
            with pytest.raises(ValueError, match=f"{path} .* cannot be read: .*then start") as e:
                clips[0, 0, 0, 0.5]
            assert os.strerror(code) in str(e.value)
            assert "damaged" not in str(e.value)

            if kind == "rlds":
                sampled = DroidSteps(5, None, None, None)
                with pytest.raises(OSError, match="says nothing about the recording"):
                    sampled(train[0])
            monkeypatch.setattr(episodes, "CACHE", str(tmp_path / f"cache-{code}"))
            with pytest.raises(OSError, match="says nothing about the recording"):
                opened(str(path), reader)


def test_too_many_open_files_are_not_a_missing_video(tmp_path, monkeypatch):
    """Bug: a folder that cannot be listed is taken for an empty one: "no metadata beside it"."""
    raw_droid(tmp_path / "a")
    monkeypatch.setattr(episodes, "CACHE", str(tmp_path / "cache"))

    def failing(path="."):
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Too many open files"):
        opened(str(tmp_path / "a" / "trajectory.h5"))


def test_an_episode_is_found_once_and_by_its_own_name(tmp_path):
    """Bug: a folder that is linked into itself gives its episodes 41 times; a link to a shard is
    trained on twice; ._NAME of macOS is an episode; braces and brackets are patterns."""
    folder = tmp_path / "run{a,b}[1]"
    (folder / "in").mkdir(parents=True)
    path = write_file(folder / "in" / "a.tfrecord", tfrecord(0))
    write_file(folder / "in" / "._b.npz", b"\0\5\x16\7")
    os.symlink(folder, folder / "in" / "self")
    os.symlink("a.tfrecord", folder / "in" / "0.tfrecord")
    os.link(path, folder / "in" / "z.tfrecord")
    for pattern in (folder, f"{folder}/in/*.tfrecord", [f"{folder}/in/0.tfrecord", path]):
        pattern = pattern if isinstance(pattern, list) else str(pattern)
        assert find_episodes(pattern) == [path]


# --- raw DROID, own episodes ---


def raw_droid(folder, seed=1, steps=60, frames=None, metadata=True, uuid="lab+1"):
    """trajectory.h5, two mp4s of numbered frames and metadata, as DROID's raw release lays them
    out."""
    os.makedirs(folder / "recordings" / "MP4")
    r = tfrecord_rows(seed, steps)
    with h5py.File(folder / "trajectory.h5", "w") as f:
        f["observation/robot_state/cartesian_position"] = r["observation/cartesian_position"]
        f["observation/robot_state/gripper_position"] = r["observation/gripper_position"][:, 0]
        f["action/joint_velocity"] = r["action_dict/joint_velocity"]
        f["observation/camera_extrinsics/111_left"] = r["observation/cartesian_position"] + 1
    for serial in ("111", "222"):
        write_file(folder / "recordings" / "MP4" / f"{serial}.mp4", film(frames or steps))
    meta = {
        "uuid": uuid,
        "success": True,
        "ext1_mp4_path": "x/recordings/MP4/111.mp4",
        "ext2_mp4_path": "x/222.mp4",
        "wrist_mp4_path": None,
    }
    if metadata:
        (folder / "metadata_1.json").write_text(
            json.dumps(meta | {"left_mp4_path": "a/111.mp4", "right_mp4_path": "a/222.mp4"})
        )
    return r


def test_raw_droid_as_metas_loader_reads_it(tmp_path):
    """Bug: rows and frames drift apart; Meta's setting (left camera, every 15th row) cannot be
    repeated."""
    r = raw_droid(tmp_path / "a")
    raw_droid(tmp_path / "b", seed=2, uuid="lab+2")
    (tmp_path / "list.csv").write_text(f"{tmp_path / 'a'} 0\n{tmp_path / 'b'} 0\n")
    reader = DroidReader(4, stride=15, **SMALL, camera="left")
    train, val, bad = opened(str(tmp_path / "list.csv"), reader, val_fraction=0.5)
    assert {x.key for x in train + val} == {"lab+1", "lab+2"} and not bad

    train = opened(str(tmp_path / "a"), reader)[0]
    clip = DroidClips(train, reader)[0, 0, 0, 0.999]
    assert [read_number(f) for f in clip["video"]] == [14, 29, 44, 59]

    pose = r["observation/cartesian_position"][[14, 29, 44, 59]]
    np.testing.assert_allclose(clip["states"][:, :6], pose, atol=1e-6)
    np.testing.assert_allclose(
        clip["actions"],
        expected_actions(np.column_stack([pose, [0.014, 0.029, 0.044, 0.059]])),
        atol=1e-6,
    )

    raw_droid(tmp_path / "c", metadata=False)
    raw_droid(tmp_path / "d", frames=40)
    (tmp_path / "e").mkdir()
    write_file(tmp_path / "e" / "trajectory.h5", b"no HDF5")
    reasons = {
        os.path.basename(os.path.dirname(file)): reason
        for file, _, reason in opened(str(tmp_path), reader)[2]
    }
    assert "no metadata_*.json" in reasons["c"]
    assert "60 rows, and [40, 40" in reasons["d"]
    assert reasons["e"]
    assert set(reasons) == {"c", "d", "e"}


def test_ones_own_episodes_of_any_dimension(tmp_path):
    """Bug: a robot that is no 7-D arm cannot be used; demo-1 takes the videos of demo-10; actions
    of the last row only."""
    rng = np.random.default_rng(0)
    for name, cameras, steps in (
        ("demo-1", ["front", "side"], 50),
        ("demo-10", [""], 50),
        ("short", ["front"], 3),
    ):
        fields = {
            "joints": rng.normal(size=(steps, 5)),
            "torque": rng.normal(size=(steps, 2)),
            "grip": rng.random(steps),
        }
        np.savez(tmp_path / f"{name}.npz", rate=10.0, success=name != "demo-10", **fields)
        for c in cameras:
            write_file(tmp_path / f"{name}{c and '.' + c}.mp4", film(steps))

    reader = DroidReader(
        4, 5, **SMALL, camera=("front",), state_keys=["joints", "grip"], action_keys=["torque"]
    )
    train, _, bad = opened(str(tmp_path), reader)
    assert [r.key.split("/")[1] for r in train] == ["demo-1", "demo-10"]
    assert not bad
    assert list(train[0].members) == ["front", "side"]
    assert (reader.names, reader.state_dim, reader.stride_of(train[0])) == (
        ["torque.0", "torque.1"],
        6,
        2,
    )

    # a lone NAME.mp4 is taken for any camera
    for r in train:
        with np.load(r.shard) as f:
            clip = reader(r, 7, rng)
            assert [read_number(x) for x in clip["video"]] == [7, 9, 11, 13]
            np.testing.assert_allclose(
                clip["states"], np.column_stack([f["joints"], f["grip"]])[7:14:2], atol=1e-6
            )
            np.testing.assert_allclose(
                clip["actions"], f["torque"][7:13].reshape(3, 2, 2).mean(1), atol=1e-6
            )
    assert [r.key.split("/")[1] for r in opened(str(tmp_path), reader, success="only")[0]] == [
        "demo-1"
    ]
    with pytest.raises(
        ValueError, match="--state_keys joints grip is not taken for a pose.*name --action_keys"
    ):
        opened(str(tmp_path), DroidReader(4, 5, camera="front", state_keys=["joints", "grip"]))

    with pytest.raises(ValueError, match="no wheel in it, but .*torque"):
        opened(
            str(tmp_path),
            DroidReader(4, 5, camera="front", state_keys=["joints"], action_keys=["wheel"]),
        )


def test_many_threads_read_arrays(tmp_path):
    """Bug: Python before 3.11.8 raises SystemError where two threads parse headers of arrays, which
    happens when garbage is collected in the middle (cpython issue 106905)."""
    path = tmp_path / "arrays.npz"
    np.savez(path, **{f"field{i}": np.arange(3.0) for i in range(50)})

    def read(_):
        with Npz(path) as f:
            return sum(len(f[name]) for name in f)

    def look(*_):  # Python code in the middle of a collection lets other threads run
        pass

    # garbage is collected often, and threads change often
    usual = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(look)
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, range(60))) == [150] * 60
    finally:
        gc.callbacks.remove(look)
        gc.set_threshold(*usual[0])
        sys.setswitchinterval(usual[1])


# --- fields by what they are ---


def of_fields(seed=0, steps=60, **fields):
    """A record of an episode of 60 steps with these fields too, of any type."""
    r = {k: np.float32(x) for k, x in tfrecord_rows(seed, steps).items()}
    pictures = {"exterior_1": [jpeg(i) for i in range(steps)]}
    return record(droid_example(r | fields, pictures, f"e{seed}", "success/t.h5", "abc", True))


@pytest.mark.parametrize("tagged", [False, True])
def test_integers_are_read_as_integers(tmp_path, tagged):
    """Bug: the varints of an Int64List (buttons, a gripper that is open or closed) are taken for
    the bits of floats."""
    values = np.array([0, 1, 127, 128, -1, -(2**63), 2**63 - 1, 300] * 30)
    packed = b"".join(varint(int(v) & (2**64 - 1)) for v in values)
    if tagged:
        packed = b"".join(b"\x08" + varint(int(v) & (2**64 - 1)) for v in values)
        raw = packed
    else:
        raw = b"\x0a" + varint(len(packed)) + packed
    assert (episodes.integers(raw) == values).all()
    assert episodes.integers(raw).dtype == np.int64
    for damaged in (raw + b"\x80", raw[:-1] + b"\xff", b"\x0a" + raw):
        with pytest.raises(ValueError, match="damaged"):
            episodes.integers(damaged)


def test_fields_are_read_by_their_type_or_refused_by_name(tmp_path):
    """Bug: an integer field is reinterpreted, a text field is read as numbers, a field with another
    number of values is cut into other rows."""
    buttons = np.tile([[1, 0, -3, 300]], (60, 1))
    path = write_file(
        tmp_path / "a.tfrecord",
        of_fields(
            **{
                "action_dict/buttons": buttons,
                "action_dict/text": [b"go"] * 60,
                "action_dict/odd": np.zeros(61, np.float32),
                "action_dict/none": np.zeros(0, np.float32),
            }
        ),
    )
    reader = DroidReader(4, 5, **SMALL, action_keys=["action_dict/buttons"])
    train = opened(path, reader)[0]
    actions, states = reader.motion(train[0], np.arange(0, 20, 4))
    assert actions.tolist() == [[1, 0, -3, 300]] * 4 and states.shape == (5, 7)

    for name, message in (
        ("text", "steps/action_dict/text holds bytes"),
        ("odd", "steps/action_dict/odd holds 61 numbers, and the episode has 60 steps"),
        ("none", "steps/action_dict/none holds 0 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, DroidReader(4, 5, **SMALL, action_keys=[f"action_dict/{name}"]))


def test_only_a_pose_is_taken_for_a_pose(tmp_path):
    """Bug: seven joints are taken for xyz, Euler angles and a gripper; so is a pose of quaternions,
    or one in degrees."""
    joints = np.float32(np.random.default_rng(0).normal(1, 0.3, (60, 7)))
    path = write_file(tmp_path / "a.tfrecord", of_fields(**{"observation/joint_position": joints}))
    wrong = {
        "observation/joint_position": "is not taken for a pose.*name --action_keys too",
        "observation/gripper_position observation/cartesian_position": "is not taken for a pose",
    }
    for keys, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            opened(path, DroidReader(4, 5, **SMALL, state_keys=keys.split()))

    named = DroidReader(4, 5, **SMALL, state_keys=episodes.STATES["rlds"])
    opened(path, named)
    assert named.names == droid.POSE

    with_actions = DroidReader(
        4, 5, **SMALL, state_keys=["observation/joint_position"], action_keys=["action"]
    )
    train = opened(path, with_actions)[0]
    assert np.array_equal(with_actions.motion(train[0], np.arange(9))[1], joints[:9])

    pose = tfrecord_rows(0, 60)["observation/cartesian_position"]
    pose[:, 3:] *= 180 / np.pi
    for change, message in (
        (pose, "degrees"),
        (np.zeros((60, 7)), "are 7 and 1 numbers"),
        (np.zeros((60, 3)), "are 3 and 1 numbers"),
    ):
        other = write_file(
            tmp_path / "b.tfrecord", tfrecord(0, **{"observation/cartesian_position": change})
        )
        with pytest.raises(ValueError, match=message):
            opened(other)


def own(path, steps=50, frames=None, **fields):
    """NAME.npz of a pose that stands still, with these fields instead or too (None: without), and
    its video."""
    usual = {"cartesian_position": np.zeros((steps, 6)), "gripper_position": np.zeros(steps)}
    fields = {k: x for k, x in (usual | {"rate": 15.0} | fields).items() if x is not None}
    np.savez(f"{path}.npz", **fields)
    write_file(f"{path}.mp4", film(frames or steps))
    return f"{path}.npz"


def test_rows_of_an_npz_are_those_of_the_episode(tmp_path):
    """Bug: the longest array of the npz (an embedding, a log) is taken for the rows; a field of
    twice as many rows is folded into them."""
    path = own(tmp_path / "a", embedding=np.zeros(512), matrix=np.eye(3), twice=np.zeros((100, 2)))
    train, _, bad = opened(path, DroidReader(4, 5, **SMALL))
    assert not bad and train[0].steps == 50
    with pytest.raises(ValueError, match="twice has 100 rows, and the episode 50"):
        opened(path, DroidReader(4, 5, **SMALL, action_keys=["twice"]))
    with pytest.raises(ValueError, match="rate has a single number, and the episode 50"):
        opened(path, DroidReader(4, 5, **SMALL, action_keys=["rate"]))

    none = dict.fromkeys(("cartesian_position", "gripper_position"))
    path = own(tmp_path / "b", joints=np.zeros((50, 4)), embedding=np.zeros(512), **none)
    keys = {"state_keys": ["joints"], "action_keys": ["joints"]}
    assert opened(path, DroidReader(4, 5, **SMALL, **keys))[0][0].steps == 50

    path = own(tmp_path / "c", gripper_position=np.zeros(49))
    with pytest.raises(ValueError, match="cartesian_position 50, gripper_position 49"):
        opened(path)

    path = own(tmp_path / "d", frames=49, joints=np.zeros((50, 4)), log=np.zeros(48), **none)
    with pytest.raises(ValueError, match="which are the episode's is unknown"):
        opened(path, DroidReader(4, 5, **SMALL, **keys))

    path = own(tmp_path / "e", action=np.full((50, 2), 1j))
    with pytest.raises(ValueError, match="action holds complex128, not numbers"):
        opened(path, DroidReader(4, 5, **SMALL, action_keys=["action"]))


@pytest.mark.parametrize("rate", [np.nan, 0.0, -15.0, np.inf, [15.0, 15.0], "fast"])
def test_a_rate_is_one_positive_number(tmp_path, rate):
    """Bug: a rate that is no rate ends in a ValueError of math.ceil, or in stride 1."""
    with pytest.raises(ValueError, match="rate is .*one positive number is expected"):
        opened(own(tmp_path / "a", rate=rate))
    assert opened(own(tmp_path / "b", rate=[10.0]))[0][0].rate == 10


def test_a_robot_slower_than_fps_is_said(tmp_path):
    """Bug: a robot at 2 Hz is taken at 2 frames a second under --fps 4, without a word; DROID's
    3.75 is Meta's own, and no reason to warn."""

    def said(rates, **options):
        lines = []
        paths = []
        for rate in rates:
            paths.append(own(tmp_path / f"r{rate}", rate=rate))
        options = {"fps": 4.0} | options
        open_droid(paths, reader=DroidReader(4, **SMALL, **options), log=lines.append)
        return [line for line in lines if line.startswith("WARNING")]

    (line,) = said([2.0])
    assert "1 of 1 episodes give 2 frames a second, not --fps 4" in line
    assert "r2.0.npz" in line
    assert "2 of 3 episodes give 2.5 to 3 frames" in said([5.0, 6.0, 8.0])[0]
    assert not said([15.0]) and not said([4.0, 30.0])
    assert "--stride 3 gives 2 to 5 frames a second" in said([6.0, 15.0], stride=3)[0]
    assert not said([2.0], stride=3)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("true", True),
        ("False", False),
        ("failure", False),
        (b"success", True),
        (0, False),
        (1.0, True),
        ([True], True),
        ("maybe", None),
        (2, None),
        (np.nan, None),
        ([True, False], None),
    ],
)
def test_success_in_all_spellings(tmp_path, value, expected):
    """Bug: the text "false" is true."""
    path = own(tmp_path / "a", success=value)
    entry = episodes.index_file(path, None)
    if expected is None:
        assert not entry[1]
        assert "true or false, 1 or 0 is expected" in entry[2][0][2]
    else:
        assert entry[1][0]["success"] is expected


def test_success_of_a_path_and_of_metadata():
    """Bug: "unsuccessful", or a failure whose operator is called success, counts as one."""
    cases = {
        "lab/success/2023/t.h5": True,
        "lab/failure/success-run/t.h5": False,
        "lab/unsuccessful/t.h5": False,
        "not_success.h5": False,
        "success": True,
        "": False,
    }
    assert {k: episodes.path_success(k) for k in cases} == cases


def test_what_moves_is_not_idle():
    """Bug: steady motion, a constant commanded velocity, is left out as idle, and so is a gripper
    that closes while the arm rests."""
    v = np.full((60, 7), 0.4)
    pose = np.zeros((60, 6))
    grip = np.zeros((60, 1))
    places = [(pose, episodes.POSE_UNITS), (grip, ["closed"])]
    assert episodes.idle_runs(v) == episodes.still_runs(v, places) == [[1, 60]]

    # one angle, that wraps
    pose[:, 3] = np.pi * np.where(np.arange(60) % 2, 1, -1)

    # a sensor's noise
    pose[:, 0] = np.random.default_rng(0).normal(0, 1e-4, 60)
    assert episodes.still_runs(v, places) == [[1, 60]]

    for moved, step in ((pose[:, 0], 0.02), (pose[:, 5], 0.05), (grip[:, 0], 0.1)):
        saved = moved.copy()
        moved[:] = step * np.arange(60)
        assert episodes.still_runs(v, places) == [], step
        moved[:] = step * np.clip(np.arange(60) - 30, 0, 5)
        assert episodes.still_runs(v, places) == [[1, 31], [36, 60]], step
        moved[:] = saved

    # 6 mm a second is seen over a clip, not over a row
    pose[:, 1] = 0.0004 * np.arange(60)
    runs = episodes.still_runs(v, places)
    assert keep_ranges(runs, 60, "light", 29) == [(0, 60)]

    pose[10] = np.nan
    assert all(b <= 10 or a > 11 for a, b in episodes.still_runs(v, places))

    # without any position the command must be zero
    assert episodes.still_runs(v, []) == []
    assert episodes.still_runs(0 * v, []) == [[1, 60]]


def test_compressed_tfrecords_are_named(tmp_path):
    """Bug: a TFRecord of GZIP or ZLIB, as TensorFlow writes on request, is called damaged."""
    raw = tfrecord(1)
    for name, data in (
        ("GZIP", gzip.compress(raw)),
        ("ZLIB", zlib.compress(raw)),
        ("xz", lzma.compress(raw)),
    ):
        with pytest.raises(ValueError, match=f"compressed with {name}.*unpack it first"):
            opened(write_file(tmp_path / name, data))


def test_pictures_of_16_bits_are_scaled(tmp_path):
    """Bug: PIL cuts the grey levels of a 16-bit PNG at 255, so that all of it is white."""
    levels = np.linspace(0, 65535, 64 * 80).astype(np.uint16).reshape(64, 80)
    f = io.BytesIO()
    Image.fromarray(levels).save(f, "PNG")
    found = episodes.rgb(Image.open(f))
    assert found.shape == (64, 80, 3) and found.dtype == np.uint8
    assert np.abs(found[..., 1] - levels / 257).max() <= 0.51
    with pytest.raises(ValueError, match="floating-point"):
        episodes.rgb(Image.fromarray(np.float32(levels)))


def test_what_unchecked_checksums_let_through_is_said(tmp_path, monkeypatch, server):
    """Bug: the log promises that damaged pictures are left out when they are decoded; most of them
    are decoded to something else."""
    path = write_file(tmp_path / "a.tfrecord", tfrecord(1))
    lines = []
    monkeypatch.setattr(droid, "VERIFY", 0)
    open_droid(path, reader=DroidReader(4, 5, **SMALL), log=lines.append)
    assert "noticed only where they cannot be decoded (--verify checks" in lines[0]

    open_droid(path, reader=DroidReader(4, 5, **SMALL), log=lines.append, verify=True)
    assert not [x for x in lines[1:] if "checksums" in x]

    url = server[0] + "/a.tfrecord"
    lines = []
    open_droid(url, reader=DroidReader(4, 5, **SMALL), log=lines.append)
    assert "URLs: checksums are not checked" in lines[0]

    data = tfrecord(1)
    write_file(tmp_path / "b.tfrecord", data[:-1] + bytes([data[-1] ^ 1]), tfrecord(2))
    bad = opened(server[0] + "/b.tfrecord", verify=True)[2]
    assert len(bad) == 1 and "wrong checksum" in bad[0][2]


def test_equal_names_are_not_equal_episodes(tmp_path):
    """Bug: train/ and val/ with shards of one name, or npz files of one name, are refused as
    shared; or a copy of a file under another folder is not."""
    for side, seed in (("train", 0), ("val", 10)):
        (tmp_path / side / "x").mkdir(parents=True)
        write_file(
            tmp_path / side / "x.tfrecord", *(tfrecord_without_names(seed + i) for i in range(2))
        )
        pose = np.random.default_rng(seed).normal(0, 0.1, (50, 6))
        own(tmp_path / side / "x" / "e0", cartesian_position=pose)

    for name in ("x.tfrecord", "x/e0.npz"):
        a = str(tmp_path / "train" / name)
        b = str(tmp_path / "val" / name)
        train, val, _ = opened(a, val_data=b)
        assert train and val
        with pytest.raises(ValueError, match="share [12] episodes"):
            opened(a, val_data=a)

    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "train", copy)
    for name in ("x.tfrecord", "x/e0.npz"):
        with pytest.raises(ValueError, match="share [12] episodes"):
            opened(str(tmp_path / "train" / name), val_data=str(copy / name))


# --- the scaler ---


def fit(folder, *flags, output="s.safetensors"):
    dataset = "--dataset droid --num_workers 0 --output"
    text = run(folder, "fit_scaler.py", dataset, folder / output, *flags)
    return ActionScaler.load(folder / output), text


def test_the_scaler_holds_out_what_training_does(tmp_path):
    """Bug: episodes that fill a clip of training, but not one of 8 frames, change who is held
    out."""
    # at 4 rows a frame 8 frames take 29 rows, and 4 take 13
    lengths = [20, 60, 20, 60, 20, 60, 20, 60]
    for seed, rows in enumerate(lengths):
        write_file(tmp_path / f"{seed}.tfrecord", tfrecord(seed, rows))
    data = str(tmp_path / "*.tfrecord")
    train, val, _ = opened(data, val_fraction=0.3, reader=DroidReader(4), idle_filter="off")

    # half of the episodes are short
    assert len({r.recording for r in train + val}) == len(lengths)
    same = ["--data", data, "--val_fraction", 0.3, "--frames_per_clip", 4]
    scaler, _ = fit(tmp_path, *same)
    assert set(scaler.meta["recordings"]) == {r.name for r in train}
    with pytest.raises(ValueError, match="make no clip of two frames"):
        DroidSteps(5, None, None, None, 1)


def test_statistics_of_poses_without_a_picture(tmp_path):
    """Bug: actions go in unscaled (they are some 55 times too small); rows between episodes count
    as motion; a picture is decoded."""
    records = []
    every = []
    for s in range(6):
        r = tfrecord_rows(s, 60 + s)
        data = tfrecord(s, 60 + s)
        for i in range(60 + s):
            # no picture can be decoded
            data = data.replace(jpeg(i), bytes(len(jpeg(i))))
        states = np.float32(
            np.hstack([r["observation/cartesian_position"], r["observation/gripper_position"]])
        ).astype(float)
        records.append(data)
        every.append(expected_actions(states[::4]))

    path = write_file(tmp_path / "a.tfrecord", *records)
    x = np.concatenate(every)
    scaler, out = fit(tmp_path, "--data", path)
    assert scaler.n == len(x)
    assert f"Total samples: {len(x):,}" in out
    assert "gripper" in out
    np.testing.assert_allclose(scaler.mean, x.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scaler.var, x.var(0), rtol=1e-9)
    np.testing.assert_allclose(scaler.scale, x.std(0), rtol=1e-9)

    meta = scaler.meta
    assert (meta["names"], meta["fps"], meta["frames_per_step"], meta["stride"]) == (
        droid.POSE,
        4.0,
        1,
        0,
    )
    assert "action_space" not in meta

    scaler.check(path, droid.POSE, 4.0, 1)
    with pytest.raises(ValueError, match="--fps 4, this run has 5"):
        scaler.check(path, droid.POSE, 5.0, 1)
    with pytest.raises(ValueError, match="--stride 0, this run has 15"):
        scaler.check(path, droid.POSE, 4.0, 1, 15)

    held = {r.key for r in opened(path, val_fraction=0.3, idle_filter="off", verify=False)[1]}
    part, _ = fit(
        tmp_path,
        "--data",
        path,
        "--val_fraction",
        0.3,
        "--stride",
        6,
        "--action_keys",
        "action",
        output="p.pkl",
    )
    used = {name.partition(" ")[2] for name in part.meta["recordings"]}
    assert len(held) == 2
    assert len(used) == 4
    assert not held & used
    assert part.meta["names"] == [f"action.{i}" for i in range(7)]


def test_scaled_actions_come_out_of_the_reader(shards):
    """Bug: the scaler is fitted, loaded and never applied."""
    mean = np.arange(7.0)
    scale = np.arange(1.0, 8.0)
    scaler = ActionScaler(mean, scale**2, scale, 1, {})
    train = opened(str(shards))[0]
    plain, scaled = (
        next(iter(loader_of(train, reader=DroidReader(4, 5, **SMALL, scaler=s))))["actions"]
        for s in (None, scaler)
    )
    torch.testing.assert_close(
        scaled * torch.tensor(scale).float() + torch.tensor(mean).float(), plain, atol=1e-5, rtol=0
    )


# --- augmentation ---


def test_augmentation_is_off_unless_it_is_asked_for(shards):
    """Bug: a new draw changes the clips of all earlier runs; a value that makes no picture."""
    train = opened(str(shards))[0]
    reader = DroidReader(4, 5, **SMALL)
    plain = take(loader_of(train, reader=reader), 2)
    assert take(loader_of(train, reader=reader.augmented(1.0, 0.0, 0, 0.0)), 2) == plain
    for values, message in [
        ((0.0, 0.0, 0, 0.0), "--random_resize_scale 0.0: give above 0, at most 1"),
        ((1.0, 1.0, 0, 0.0), "--color_jitter 1.0: give from 0 to below 1"),
        ((1.0, 0.0, -1, 0.0), "--temporal_jitter -1: give 0 or more rows"),
        ((1.0, 0.0, 0, math.nan), "--action_noise nan: give 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            reader.augmented(*values)


def test_moved_rows_keep_pictures_states_and_actions_together(shards):
    """Bug: pictures move and actions do not; rows twice, out of order or out of the episode."""
    train = opened(str(shards))[0]
    reader = DroidReader(4, 5, **SMALL).augmented(1.0, 0.0, 2, 0.0)
    steps = set()
    for batch in itertools.islice(loader_of(train, 16, reader), 3):
        assert not batch["bad"]
        for video, states, actions in zip(batch["video"], batch["states"], batch["actions"]):
            numbers = [read_number(f) for f in video]
            assert numbers == (1000 * states[:, 6]).round().int().tolist()
            np.testing.assert_allclose(actions, expected_actions(states), atol=1e-4)
            steps |= set(np.diff(numbers).tolist())
    assert min(steps) >= 1 and max(steps) <= 7 and len(steps) > 3

    # at the ends of an episode there is less room
    for last, start in ((3, 0), (40, 37)):
        rows = droid.jittered(np.arange(start, start + 4), 9, last, np.random.default_rng(0))
        assert rows[0] >= 0 and rows[-1] <= last and (np.diff(rows) > 0).all()


def test_a_part_of_the_crop_is_one_window():
    """Bug: a window of another shape, outside the crop, or another one in each frame."""
    # red grows downwards, green to the right
    frame = np.zeros((100, 140, 3), np.uint8)
    frame[..., 0] = np.arange(100)[:, None]
    frame[..., 1] = np.arange(140)
    whole = droid.crop_resize([frame], 100, 1, 1)
    assert torch.equal(droid.crop_resize([frame], 100, 1, 1, 1.0, (0, 1)), whole)
    for place, top, left in (((0, 0), 0, 20), ((1, 1), 50, 70), ((0, 1), 0, 70)):
        part = droid.crop_resize([frame, frame], 50, 1, 1, 0.5, place)
        assert torch.equal(part[0], part[1])
        assert part[0, 0, :, 0].tolist() == list(range(top, top + 50))
        assert part[0, 1, 0].tolist() == list(range(left, left + 50))


def test_colours_of_a_clip_change_alike():
    """Bug: channels or frames get other changes, grey pictures get a colour, 255 wraps to 0."""
    video = torch.randint(60, 190, (3, 3, 8, 8), dtype=torch.uint8)
    video[2] = video[0]
    grey = video[:, :1].expand(-1, 3, -1, -1)
    means = []
    for seed in range(20):
        changed = droid.recoloured(video, 0.5, np.random.default_rng(seed))
        assert torch.equal(changed[0], changed[2]) and not torch.equal(changed, video)
        still_grey = droid.recoloured(grey, 0.5, np.random.default_rng(seed)).int()
        assert (still_grey - still_grey[:, :1]).abs().max() <= 1
        means.append(changed.float().mean() / video.float().mean())
    assert min(means) < 0.8 and max(means) > 1.2
    assert torch.equal(droid.recoloured(video, 0.0, np.random.default_rng(0)), video)
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert droid.recoloured(white, 0.9, np.random.default_rng(2)).min() > 20


def test_action_noise_is_in_scaled_units(shards):
    """Bug: noise of metres, or before the scaling; the states get it too."""
    train = opened(str(shards))[0]
    scale = np.full(7, 1e-3)
    scaler = ActionScaler(np.zeros(7), scale**2, scale, 1, {})
    reader = DroidReader(4, 5, **SMALL, scaler=scaler)
    noisy = next(iter(loader_of(train, 64, reader.augmented(1.0, 0.0, 0, 0.5))))
    plain = next(iter(loader_of(train, 64, reader)))
    assert torch.equal(noisy["states"], plain["states"])
    noise = noisy["actions"] - plain["actions"]
    assert 0.45 < noise.std() < 0.55 and noise.mean().abs() < 0.05


# --- scripts ---


def test_inspect_prints_what_is_in_a_file(tmp_path):
    """Bug: the first thing a user tries prints a traceback or nothing of use."""
    velocity = np.random.default_rng(0).normal(0, 0.3, (90, 7))
    velocity[20:70] = 0.1
    path = write_file(
        tmp_path / "a.tfrecord",
        tfrecord(1, 90, **{"action_dict/joint_velocity": velocity}),
        record(b"nonsense"),
    )
    text = run(tmp_path, "droid.py", "--inspect", path, "--batch_size 4")
    assert "video    (4, 8, 3, 256, 256)" in text
    assert "54.4% of their rows idle" in text
    assert "left out:" in text
    assert re.search(r"gripper +-?[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+\n", text)
    assert max(map(len, text.splitlines())) < 200

    code, text = Run(tmp_path, "droid.py", "--inspect", tmp_path / "none*").wait()
    assert code == 1
    assert text.startswith("error: no episode at")
    assert len(text.splitlines()) == 1


@pytest.fixture(scope="module")
def robot(tmp_path_factory, forkserver):
    """Two episodes of the simulated arm in each form, and the same again by another number of
    processes."""
    needs_mujoco()
    folder = tmp_path_factory.mktemp("robot")
    for name, flags in (
        ("a", ""),
        ("again", "--workers 1 --shards 1"),
        ("b", "--world b --form npz"),
    ):
        size = "--episodes 2 --steps 40 60 --shards 2 --workers 2 --out"
        code, text = Run(folder, "prepare/robot.py", size, folder / name, flags).wait()
        if "cannot draw" in text:
            pytest.skip(text)
        assert code == 0, text
    return folder


def test_the_simulated_arm_writes_droids_schema(robot):
    """Bug: the demo trains on files that are unlike those it stands for, or that change with the
    number of processes."""
    names = sorted(os.listdir(robot / "a"))
    assert names == [
        "droid_101-train.tfrecord-00000-of-00002",
        "droid_101-train.tfrecord-00001-of-00002",
        "robot.json",
    ]

    raw = b"".join((robot / "a" / n).read_bytes() for n in names[:2])
    assert raw == (robot / "again" / "droid_101-train.tfrecord-00000-of-00001").read_bytes()

    found = episodes.features(lambda at, n: raw[at : at + n], 12, int.from_bytes(raw[:8], "little"))
    observed = (
        "cartesian_position gripper_position joint_position exterior_image_1_left"
        " exterior_image_2_left wrist_image_left".split()
    )
    commanded = [
        f"{k}_{x}" for k in ("cartesian", "joint", "gripper") for x in ("position", "velocity")
    ]
    steps = (
        "action discount reward is_first is_last is_terminal language_instruction"
        " language_instruction_2 language_instruction_3".split()
    )
    assert set(found) == {f"steps/observation/{k}" for k in observed} | {
        f"steps/action_dict/{k}" for k in commanded
    } | {f"steps/{k}" for k in steps} | {
        "episode_metadata/file_path",
        "episode_metadata/recording_folderpath",
    }

    train = opened(str(robot / "a"), DroidReader(4, 5), idle_filter="off")[0]
    fields = episodes.read_fields(
        train[0], ["observation/cartesian_position", "observation/gripper_position"]
    )
    assert 40 <= train[0].steps <= 60
    assert fields[0].shape == (train[0].steps, 6)
    assert np.ptp(fields[0][:, :3], axis=0).max() > 0.05

    frames = episodes.read_pictures(train[0], "exterior_1", [0, train[0].steps - 1])
    assert frames[0].shape == (180, 320, 3)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 2
    assert any(
        b - a >= 3
        for a, b in json.loads(json.dumps(episodes.index_file(train[0].shard, None)[1]))[0]["idle"]
    )


def test_the_own_robot_form_of_the_simulated_arm_is_read(robot):
    """Bug: the documented npz form is not what the reader takes."""
    reader = DroidReader(4, 5, 64, camera=("exterior_1", "wrist"))
    train, _, bad = opened(str(robot / "b"), reader)
    assert len({r.key for r in train}) == 2
    assert not bad
    assert sorted(train[0].members) == ["exterior_1", "exterior_2", "wrist"]
    batch = next(iter(loader_of(train, 4, reader)))
    assert batch["video"].shape == (4, 4, 3, 64, 64)
    assert batch["states"].shape == (4, 4, 7)
    assert not batch["bad"]


@pytest.mark.slow
def test_the_readers_of_the_benchmark_agree():
    """Bug: the speed of our reader is that of reading something else."""
    command = [
        sys.executable,
        "-m",
        "bench.data",
        *"--of droid --episodes 2 --steps 40 --json".split(),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = {
        x["reader"]: x
        for x in map(
            json.loads, (line for line in done.stdout.splitlines() if line.startswith("{"))
        )
    }
    assert (
        found["ours"]["checksum"]
        == found["ours, indexed"]["checksum"]
        != found["ours, indexed, numbers only"]["checksum"]
    )
    assert all(
        name in found or f"{name}: left out" in done.stdout for name in ("tfrecord", "TensorFlow")
    )


def test_many_episodes_of_one_named_file_are_episodes_each(tmp_path):
    """Bug: writers that name the file which many episodes were taken from (or leave the names
    empty) give all one key: nothing is held out, and encode.py keeps the first alone."""
    for name, folder in (("libero/demo.hdf5", None), ("", "")):
        records = []
        for seed in range(6):
            fields = {f"steps/{k}": np.float32(x) for k, x in tfrecord_rows(seed, 60).items()}
            fields |= {"steps/is_first": 1 * (np.arange(60) == 0)}
            fields |= {"steps/observation/exterior_image_1_left": [jpeg(i) for i in range(60)]}
            fields |= {"episode_metadata/file_path": [name.encode()]}
            if folder is not None:
                fields |= {"episode_metadata/recording_folderpath": [folder.encode()]}
            records.append(record(example(fields)))

        path = write_file(tmp_path / "x.tfrecord", *records)
        train, val, bad = opened(path, val_fraction=0.34)
        assert not bad and len({r.recording for r in train}) == 4
        assert len({r.recording for r in val}) == 2


def test_copies_under_other_names_are_taken_once(tmp_path):
    """Bug: a copy of a file under another name is held out and trained on."""
    records = [tfrecord_without_names(seed) for seed in range(3)]
    write_file(tmp_path / "a.tfrecord", *records)
    write_file(tmp_path / "b.tfrecord", *records[1:])
    own(tmp_path / "c", pose=np.arange(50.0))
    for ending in ("npz", "mp4"):
        shutil.copy(tmp_path / f"c.{ending}", tmp_path / f"d.{ending}")

    # the same motion in another picture
    own(tmp_path / "e", pose=np.arange(50.0))
    write_file(tmp_path / "e.mp4", film(50, gop=5))
    lines = []
    train, _, bad = open_droid(
        str(tmp_path), reader=DroidReader(4, 5, **SMALL), idle_filter="off", log=lines.append
    )
    assert not bad
    assert sorted(os.path.basename(r.shard) for r in train) == ["a.tfrecord"] * 3 + [
        "c.npz",
        "e.npz",
    ]
    assert "left out: 3 episodes that are copies of others" in lines[0]
    with pytest.raises(ValueError, match="share 2 episodes"):
        opened(str(tmp_path / "a.tfrecord"), val_data=str(tmp_path / "b.tfrecord"))


def test_an_npz_without_rate_is_asked_for_it(tmp_path):
    """Bug: an npz that calls its rate `fps`, or whose video has another one, is taken for 15 rows a
    second without a word."""
    bad = opened([own(tmp_path / "a", rate=None, fps=30.0), own(tmp_path / "b")], idle_filter="off")
    assert [b[2] for b in bad[2]] == ["no rate in it, but fps: `rate` is its rows a second"]
    lines = []
    path = own(tmp_path / "c", rate=None)
    open_droid(path, reader=DroidReader(4, 5, **SMALL), idle_filter="off", log=lines.append)
    assert "c.npz" in lines[0]
    assert "c.mp4 has 20 frames a second: write `rate`" in lines[0]


def test_own_files_beside_each_other_and_odd_ones_are_said_for_what_they_are(tmp_path):
    """Bug: run.1.mp4 is taken for a camera of run.npz, whose rows it does not fit; a .npy that is
    called .npz and text in a field of numbers are said in Python's words."""
    paths = [own(tmp_path / "run", 50), own(tmp_path / "run.1", 70)]
    found, _, bad = opened(paths, idle_filter="off")
    assert not bad and [r.steps for r in found] == [50, 70]
    assert all(list(r.members) == ["video"] for r in found)

    with open(tmp_path / "array.npz", "wb") as f:
        np.save(f, np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(open(paths[0], "rb").read()[:200])
    np.savez(tmp_path / "blind.npz", cartesian_position=np.zeros((50, 6)))
    odd = own(tmp_path / "odd", gripper_position=np.array([0.5, None] * 25, dtype=object))
    bad = opened(str(tmp_path), idle_filter="off")[2]
    reasons = {os.path.basename(file): reason for file, _, reason in bad}
    assert "an array of numpy.save" in reasons["array.npz"]
    assert "no npz file, or only a part of it" in reasons["cut.npz"]
    assert "no blind.mp4 or blind.CAMERA.mp4 beside it" in reasons["blind.npz"]
    with pytest.raises(ValueError, match="gripper_position cannot be read: Object arrays"):
        opened(odd, idle_filter="off")

    text = example(
        {"steps/is_first": np.ones(60, int)}
        | {f"steps/{k}": [b"0.5"] * 60 for k in episodes.STATES["rlds"]}
        | {"steps/observation/exterior_image_1_left": [jpeg(i) for i in range(60)]}
    )
    bad = opened(write_file(tmp_path / "t.tfrecord", record(text), tfrecord(1)))[2]
    sentence = "steps/observation/cartesian_position holds bytes (text or pictures), not numbers"
    assert [b[2] for b in bad] == [sentence]


def raw_episode(folder, seed=0, steps=50, metadata=None, **change):
    """A folder as raw DROID has them; metadata: the bytes of its json; change: field -> array."""
    videos = folder / "recordings" / "MP4"
    videos.mkdir(parents=True)
    write_file(videos / "111.mp4", film(steps))
    usual = {"uuid": f"lab+{folder.name}", "ext1_mp4_path": "x/MP4/111.mp4", "success": True}
    (folder / "metadata_x.json").write_bytes(metadata or json.dumps(usual).encode())
    found = tfrecord_rows(seed, steps)
    with h5py.File(folder / "trajectory.h5", "w") as f:
        for name in ("cartesian_position", "gripper_position"):
            f[f"observation/robot_state/{name}"] = found[f"observation/{name}"]
        for name, x in change.items():
            del f[f"observation/robot_state/{name}"]
            f[f"observation/robot_state/{name}"] = x
    return folder


def test_metadata_and_holes_of_raw_episodes(tmp_path):
    """Bug: one json that is a list, or a uuid that is a number, ends the index of all with a
    traceback; another json in the folder or a BOM drops a good episode; rows that were never
    written are read as a pose of zeros."""
    path = {"ext1_mp4_path": "x\\MP4\\111.mp4"}
    raw_episode(tmp_path / "list", metadata=b"[1]")
    raw_episode(tmp_path / "cut", metadata=b'{"uuid": "a')
    raw_episode(tmp_path / "scalar", cartesian_position=3.0)
    good = [
        raw_episode(tmp_path / "number", metadata=json.dumps(path | {"uuid": 7}).encode()),
        raw_episode(tmp_path / "bom", metadata=b"\xef\xbb\xbf" + json.dumps(path).encode()),
        raw_episode(tmp_path / "other"),
    ]
    (tmp_path / "other" / "config.json").write_text("{}")
    holes = raw_episode(tmp_path / "holes")
    with h5py.File(holes / "trajectory.h5", "r+") as f:
        state = f["observation/robot_state"]
        pose = state["cartesian_position"][:]
        del state["cartesian_position"]
        x = state.create_dataset("cartesian_position", pose.shape, "f8", chunks=(10, 6))
        x[:30] = pose[:30]

    found, _, bad = opened(str(tmp_path), idle_filter="off")
    assert {r.shard for r in found} == {str(folder / "trajectory.h5") for folder in good}
    assert {r.key for r in found} == {"7", "bom", "lab+other"}

    reasons = {file.split("/")[-2]: reason for file, _, reason in bad}
    assert "metadata_x.json holds a list" in reasons["list"]
    assert "metadata_x.json is no JSON, or only a part" in reasons["cut"]
    assert "rows are expected" in reasons["scalar"]
    assert "cartesian_position: 2 of 5 chunks" in reasons["holes"]
