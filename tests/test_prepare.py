"""prepare/demo.py and prepare/shards.py: recorded play is what it says, and packing loses, cuts and
mixes up nothing."""

import collections
import errno
import glob
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time

import av
import numpy as np
import pytest
import webdataset as wds

from files.vpt import CONTINUOUS, KEY_BIT, parse_ticks
from prepare import shards

# six recordings of five seconds
PLAY = ["--minutes", "0.5", "--size", "160x120", "--seed", "3"]


def demo(out, *flags, **how):
    return subprocess.run(
        [sys.executable, "-m", "prepare.demo", "--out", str(out), *flags],
        capture_output=True,
        text=True,
        **how,
    )


def files(folder, pattern="*/*.tar"):
    """{path below folder: bytes}"""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, pattern))):
        with open(path, "rb") as f:
            found[os.path.relpath(path, folder)] = f.read()
    return found


def recordings(folder, pattern="*/*.tar"):
    """{(shard, key): {"mp4": bytes, "jsonl": bytes}}"""
    found = collections.defaultdict(dict)
    for shard, data in files(folder, pattern).items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                found[shard, key][extension] = tar.extractfile(member).read()
    return dict(found)


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    out = tmp_path_factory.mktemp("play") / "demo"
    done = demo(out, *PLAY, "--workers", "2")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def lines(play):
    return {
        name: [json.loads(line) for line in r["jsonl"].splitlines()]
        for name, r in recordings(play).items()
    }


def motion(recording):
    """Lines -> (n, 4) dx, dy, yaw, pitch."""
    return np.array([[d["mouse"]["dx"], d["mouse"]["dy"], d["yaw"], d["pitch"]] for d in recording])


# --- demo: what the lines say ---


@pytest.mark.parametrize("axis", [0, 1], ids=["yaw", "pitch"])
def test_mouse_turns_the_view_on_its_own_line(lines, axis):
    """Catches lines shifted against the game by one tick, a wrong sign, radians for degrees, and
    motion applied once per engine tic."""
    rows = [motion(r) for r in lines.values()]
    for lag in (-1, 0, 1):
        mouse = np.concatenate([r[1 + lag : len(r) - 2 + lag, axis] for r in rows])
        angle = np.concatenate([np.diff(r[:, 2 + axis])[1:-1] for r in rows])
        r = np.corrcoef(mouse, angle)[0, 1]
        if lag:
            assert r < 0.95
        else:
            assert r > 0.98
            assert np.polyfit(mouse, angle, 1)[0] == pytest.approx(0.150, abs=0.001)


@pytest.mark.parametrize("axis", [0, 1], ids=["yaw", "pitch"])
def test_the_picture_moves_from_frame_t_to_t_plus_1_as_line_t_says(play, axis):
    """Catches frames shifted against the lines (an encoder's delay, a frame taken after the
    action): the lines alone cannot show that."""
    past = []
    shift = []
    for r in recordings(play).values():
        with av.open(io.BytesIO(r["mp4"])) as container:
            gray = [f.to_ndarray(format="gray") for f in container.decode(video=0)]

        # above the weapon
        frames = np.stack(gray)[:, 8:76].astype(float)
        h, w = frames.shape[1:]
        frames -= frames.mean((1, 2), keepdims=True)
        frames *= np.hanning(h)[:, None] * np.hanning(w)

        # phase correlation
        spectrum = np.fft.rfft2(frames)
        cross = spectrum[:-1].conj() * spectrum[1:]
        correlation = np.fft.irfft2(cross / (np.abs(cross) + 1e-6))
        peak = correlation.reshape(len(cross), -1).argmax(1)
        moved = ((peak % w + w // 2) % w - w // 2, (peak // w + h // 2) % h - h // 2)[axis]
        mouse = motion(map(json.loads, r["jsonl"].splitlines()))[:, axis]
        past.append(np.stack([mouse[:-3], mouse[1:-2], mouse[2:-1]], axis=1))
        shift.append(moved[1:-1])

    past = np.concatenate(past)
    shift = np.concatenate(shift)
    small = (np.abs(past).max(1) < 60) & (np.abs(shift) < 40)
    assert small.sum() > 100

    weights = np.linalg.lstsq(past[small], shift[small], rcond=None)[0]
    before, now, after = weights.tolist()

    # looking right moves the picture left, looking down moves it up
    assert now < 0
    assert abs(now) > 3 * max(abs(before), abs(after))


def test_contractor_fields(lines):
    """Catches a field that loaders of real recordings rely on being absent or of another type, and
    what looks like a recorder's fault."""
    mouse = dict.fromkeys(["x", "y", "dx", "dy", "scaledX", "scaledY", "dwheel"], float) | {
        "buttons": list,
        "newButtons": list,
    }
    top = {
        "mouse": dict,
        "keyboard": dict,
        "isGuiOpen": bool,
        "isGuiInventory": bool,
        "hotbar": int,
        "yaw": float,
        "pitch": float,
        "xpos": float,
        "ypos": float,
        "zpos": float,
        "tick": int,
        "milli": int,
        "inventory": list,
        "serverTick": int,
        "serverTickDurationMs": float,
        "stats": dict,
    }
    held = set()
    for recording in lines.values():
        # newButtons == [0] on line 0 reads as a stuck attack
        assert not recording[0]["mouse"]["buttons"]

        for t, line in enumerate(recording):
            assert {k: type(v) for k, v in line.items()} == top
            assert {k: type(v) for k, v in line["mouse"].items()} == mouse
            assert list(line["keyboard"]) == ["keys", "newKeys", "chars"]
            assert line["tick"] == t
            assert line["milli"] == recording[0]["milli"] + 50 * t
            assert 0 <= line["hotbar"] <= 8 and -35 < line["pitch"] < 35
            held.update(line["keyboard"]["keys"], line["mouse"]["buttons"])

        # a button is new only on the line that it goes down
        for before, line in zip(recording, recording[1:]):
            assert not set(before["mouse"]["buttons"]) & set(line["mouse"]["newButtons"])

    keys = ["w", "a", "s", "d", "space", "left.shift", "left.control"]
    assert held >= {f"key.keyboard.{k}" for k in keys} | {0, 1}


def test_actions_vary_as_in_real_play(lines):
    """Catches a camera that stays level or barely moves (nothing to learn from), angles in radians,
    and a hotbar that only keys change."""
    steps = [motion(r)[::8, 2:] for r in lines.values()]
    yaw, pitch = np.radians(np.concatenate([np.diff(s, axis=0) for s in steps])).std(0)
    assert 0.3 < yaw < 0.6 and 0.08 < pitch < 0.25

    by_wheel = by_key = 0
    for recording in lines.values():
        ticks = parse_ticks("".join(json.dumps(d) + "\n" for d in recording).encode())
        for t in range(1, len(recording)):
            line, slot = recording[t], recording[t]["hotbar"]
            if slot != recording[t - 1]["hotbar"]:
                key = f"key.keyboard.{slot + 1}"
                by_key += key in line["keyboard"]["keys"]
                by_wheel += key not in line["keyboard"]["keys"] and line["mouse"]["dwheel"] != 0
                assert ticks.keys[t] & KEY_BIT[key]
    assert by_key and by_wheel

    still = []
    for recording in lines.values():
        for d in recording:
            pressed = d["keyboard"]["keys"] or d["mouse"]["buttons"]
            still.append(not pressed and not any(motion([d])[0, :2]))

    # null ticks exist
    assert 0.01 < np.mean(still) < 0.3


def test_shards_are_pairs_and_held_out_maps_are_held_out(play):
    """Catches a map in both splits, a key with a dot (WebDataset cuts there), partners apart, and
    frames that do not match the lines."""
    maps = collections.defaultdict(set)
    names = collections.Counter()
    for shard, data in files(play).items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getnames()
        assert [n.split(".", 1)[1] for n in members] == ["mp4", "jsonl"] * (len(members) // 2)
        assert [n.split(".")[0] for n in members[::2]] == [n.split(".")[0] for n in members[1::2]]
        for key in {n.split(".")[0] for n in members}:
            maps[shard.split("/")[0]].add(re.fullmatch(r"map(\d\d)-\d{6}", key)[1])
            names[key] += 1
    assert maps["train"] and maps["val"] and not maps["train"] & maps["val"]
    assert max(names.values()) == 1
    assert collections.Counter(s.split("/")[0] for s in files(play)) == {"train": 4, "val": 2}

    for name, r in recordings(play).items():
        with av.open(io.BytesIO(r["mp4"])) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p"), name
            assert stream.average_rate == 20, name
            assert sum(1 for _ in container.decode(video=0)) == len(r["jsonl"].splitlines())


# --- demo: the run ---


def test_play_is_a_function_of_the_seed_however_many_workers_and_kills(play, tmp_path):
    """Catches play that depends on the worker it ran in, half a shard trusted after a kill, and
    games that outlive their player."""
    reference = files(play)
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "prepare.demo", "--out", str(out), *PLAY, "--workers", "1"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not files(out) and killed.poll() is None:
        time.sleep(0.01)
    family = descendants(killed.pid)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL

    some = files(out)
    assert 0 < len(some) < len(reference)

    (out / "train" / "shard-000003.tar.1.tmp").write_bytes(b"half a shard")
    before = {name: os.stat(out / name).st_mtime_ns for name in some}
    done = demo(out, *PLAY, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert files(out) == reference

    # finished shards are kept
    assert {name: os.stat(out / name).st_mtime_ns for name in before} == before
    assert not glob.glob(f"{out}/**/*.tmp", recursive=True)

    deadline = time.time() + 10
    while any(map(alive, family)) and time.time() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in family if alive(pid)]


def descendants(pid):
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with open(path) as f:
            for child in f.read().split():
                found += [int(child), *descendants(child)]
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_folder_of_another_demo_is_refused(play, tmp_path):
    """Catches shards of two seeds mixed in one folder, and a folder of the user's own
    overwritten."""
    done = demo(play, *PLAY[:-1], "4")
    assert done.returncode != 0
    assert "--seed 3" in done.stderr and "this is --minutes 0.5" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "thesis.txt").write_text("mine")
    done = demo(tmp_path, *PLAY)
    assert done.returncode != 0 and "contains other files" in done.stderr

    # a note that is damaged
    (tmp_path / "thesis.txt").rename(tmp_path / "demo.json")
    done = demo(tmp_path, *PLAY)
    assert done.returncode != 0 and "demo.json is damaged" in done.stderr
    (tmp_path / "demo.json").rename(tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_guide_lines_say_the_same_in_radians(play, lines, tmp_path):
    """Catches the guides' variant drifting from the contractors': degrees, unwrapped yaw, camera as
    [pitch, yaw] or as a difference."""
    done = demo(tmp_path / "demo", *PLAY, "--lines", "guide")
    assert done.returncode == 0, done.stderr

    for (name, r), ours in zip(recordings(tmp_path / "demo").items(), recordings(play).values()):
        assert r["mp4"] == ours["mp4"]

        guide = [json.loads(line) for line in r["jsonl"].splitlines()]
        assert list(guide[0]) == ["timestamp", "mouse", "keyboard", "camera", "hotbar"]
        assert [d["timestamp"] for d in guide] == pytest.approx(np.arange(len(guide)) / 20)

        keys = [d["keyboard"]["keys"] for d in lines[name]]
        assert [d["keyboard"]["keys"] for d in guide] == keys

        a = parse_ticks(r["jsonl"])
        b = parse_ticks(ours["jsonl"])
        assert not a.flaw
        assert a.rate == pytest.approx(20)
        assert len(CONTINUOUS) == a.motion.shape[1]
        assert np.abs(a.motion[:, 2:]).max() <= np.pi

        circle = np.exp(1j * b.motion[:, 2:])
        np.testing.assert_allclose(np.exp(1j * a.motion[:, 2:]), circle, atol=1e-9)
        np.testing.assert_array_equal(a.motion[:, :2], b.motion[:, :2])


# --- shards ---


@pytest.fixture(scope="module")
def pair(play):
    """One good recording."""
    return min(recordings(play).values(), key=lambda r: len(r["mp4"]))


def put(folder, stem, mp4, jsonl):
    os.makedirs(os.path.dirname(os.path.join(folder, stem)), exist_ok=True)
    for extension, data in (("mp4", mp4), ("jsonl", jsonl)):
        if data is not None:
            with open(os.path.join(folder, f"{stem}.{extension}"), "wb") as f:
                f.write(data)


def test_each_bad_pair_is_left_out_with_its_reason(pair, tmp_path):
    """Catches a damaged recording that reaches training, and a good one thrown out for a few lines
    more or less."""
    mp4, jsonl = pair["mp4"], pair["jsonl"]
    rows = jsonl.splitlines(keepends=True)

    # the index in front, as in files cut while uploading
    front = tmp_path / "front.mp4"
    faststart = {"movflags": "faststart"}
    with (
        av.open(io.BytesIO(mp4)) as source,
        av.open(str(front), "w", format="mp4", options=faststart) as sink,
    ):
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)

    front = front.read_bytes()
    hole = bytearray(mp4)
    start = hole.index(b"mdat") + 4
    hole[start : start + 4000] = bytes(4000)
    bad = {
        "alone": (mp4, None, "no .jsonl beside it"),
        "blind": (None, jsonl, "no .mp4 beside it"),
        "zero_video": (b"", jsonl, "zero bytes"),
        "zero_lines": (mp4, b"", "the file is empty"),
        "text": (b"<html>404</html>", jsonl, "mp4"),
        "cut": (mp4[: len(mp4) // 2], jsonl, "truncated|no moov"),
        "cut_faststart": (front[: len(front) * 19 // 20], jsonl, "truncated"),
        "first_frame": (bytes(hole), jsonl, "[Ii]nvalid|decode"),
        "torn": (mp4, jsonl[:-100], "jsonl: line 99"),
        "not_json": (mp4, b"".join(rows[:40]) + b"oops\n" + b"".join(rows[41:]), "jsonl: line 40"),
        "nan": (
            mp4,
            jsonl.replace(b'"yaw": ', b'"yaw": NaN, "was": ', 1),
            "jsonl: line 0|no usable line",
        ),
        "six_short": (mp4, b"".join(rows[:-6]), "94 lines but 100 frames"),
        "six_long": (mp4, jsonl + rows[-1] * 6, "106 lines but 100 frames"),
    }
    few = b"".join(rows[:-5])
    many = jsonl + rows[-1] * 5
    good = {
        "fine": (mp4, jsonl),
        "five_short": (mp4, few),
        "five_long": (mp4, many),
        "front": (front, jsonl),
    }
    for stem, (video, text, *_) in {**bad, **good}.items():
        put(tmp_path / "in", stem, video, text)
    shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 2)
    assert {key for _, key in recordings(tmp_path / "out", "*.tar")} == set(good)

    with open(tmp_path / "out" / "skipped.jsonl") as f:
        reasons = {os.path.splitext(d["file"])[0]: d["reason"] for d in map(json.loads, f)}
    assert reasons.keys() == bad.keys()
    for stem, (_, _, words) in bad.items():
        assert re.search(words, reasons[stem]), (stem, reasons[stem])


def test_blank_lines_odd_names_and_other_rates_are_packed(pair, tmp_path, capsys):
    """Bug: a blank line at the end leaves a recording out, a name that nobody knows goes unsaid,
    and hours are counted as if every video had 20 frames a second."""
    lines = [json.loads(line) for line in pair["jsonl"].splitlines()]
    for i, line in enumerate(lines):
        line |= {"keyboard": {"keys": ["jumpp"]}, "timestamp": i * 36.0 / 1000}
    odd = "".join(json.dumps(line) + "\n" for line in lines).encode() + b"\n"
    put(tmp_path / "in", "odd", pair["mp4"], odd)
    packed, skipped = shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 1)
    out = capsys.readouterr().out
    assert packed == 1
    assert not skipped
    assert f"({len(lines) * 0.036 / 3600:.2f} hours)" in out
    assert f'WARNING: key "jumpp" on {len(lines)} lines' in out


def test_keys_survive_webdataset(pair, tmp_path):
    """Catches `6.10_a` and `6.13_b` becoming one sample of key `6`, and same names in two folders
    overwriting each other."""
    stems = ["6.10_a", "6.13_a", "6_10_a", "6.10/a", "6.10-a", "7/a", "8/a"]
    stems += ["plain-name_1", "a b", "a+b"]
    last = pair["jsonl"].splitlines(keepends=True)[-1]
    for i, stem in enumerate(stems):
        put(tmp_path / "in", stem, pair["mp4"], pair["jsonl"] + last * (i % 5))
    shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 2)
    paths = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(wds.WebDataset(paths, shardshuffle=False))
    assert len({s["__key__"] for s in samples}) == len(stems)
    assert all({"mp4", "jsonl"} <= s.keys() and s["mp4"] == pair["mp4"] for s in samples)

    lengths = collections.Counter(len(s["jsonl"].splitlines()) for s in samples)
    assert lengths == dict.fromkeys(range(100, 105), 2)

    # a safe name stays as it is
    assert "plain-name_1" in {s["__key__"] for s in samples}


def packed(folder):
    """Keys of all shards in a folder."""
    keys = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".tar"):
            with tarfile.open(folder / name) as tar:
                keys += {os.path.splitext(member)[0] for member in tar.getnames()}
    return sorted(keys)


def test_links_give_no_recording_twice(pair, tmp_path, capsys):
    """Bug: a link to its own folder is followed 41 times, and a link to a recording is packed as
    another one: the same play is held out and trained on."""
    folder, out = tmp_path / "in", tmp_path / "out[1]"
    put(folder, "a", **pair)
    put(tmp_path / "elsewhere", "b", **pair)
    os.symlink(".", folder / "self")
    os.symlink("../elsewhere", folder / "sub")
    os.symlink(tmp_path, folder / "up")
    os.symlink("a.mp4", folder / "0.mp4")
    os.symlink("a.jsonl", folder / "0.jsonl")
    os.symlink("nowhere.mp4", folder / "dead.mp4")
    assert shards.pack(str(folder), str(out), 1e9, 2)[0] == 2

    keys = packed(out)
    assert len(keys) == 2 and "a" in keys

    rows = [json.loads(line) for line in open(out / "skipped.jsonl")]
    assert {(row["file"], row["reason"]) for row in rows} == {
        ("0.mp4", "the same file as a.mp4"),
        ("dead.mp4", "a link to nothing"),
    }

    # what is packed already keeps its name, whatever links arrive
    os.link(folder / "a.mp4", folder / "00.mp4")
    os.link(folder / "a.jsonl", folder / "00.jsonl")
    assert shards.pack(str(folder), str(out), 1e9, 2)[0] == 0
    assert packed(out) == keys


def test_extensions_in_capitals_are_packed(pair, tmp_path):
    """Bug: NAME.MP4, as cameras write it, is left out without a word, or written as another file
    when both spellings are there."""
    mp4, jsonl = pair["mp4"], pair["jsonl"]
    folder = tmp_path / "in"
    out = tmp_path / "out"
    folder.mkdir()
    names = {"a.MP4": mp4, "a.JSONL": jsonl, "b.Mp4": mp4, "b.jsonl": jsonl}
    names |= {"c.mp4": mp4, "c.MP4": b"other", "c.jsonl": jsonl, "d.MP4": mp4}
    for name, data in names.items():
        (folder / name).write_bytes(data)
    packed, skipped = shards.pack(str(folder), str(out), 1e9, 2)
    assert packed == 3
    assert sorted((s["file"], s["reason"]) for s in skipped) == [
        ("c.MP4", "c.mp4 is there too, in other capitals"),
        ("d.MP4", "no .jsonl beside it"),
    ]

    expected = {("shard-000000.tar", key): {"mp4": mp4, "jsonl": jsonl} for key in "abc"}
    assert recordings(out, "*.tar") == expected


def test_what_macos_leaves_in_folders_is_no_recording(pair, tmp_path):
    """Bug: ._a.mp4 is reported as a damaged recording for each one copied from a Mac."""
    put(tmp_path / "in", "a", **pair)
    put(tmp_path / "in", "__MACOSX/._a", b"\0\5\x16\7junk", b"\0\5\x16\7junk")
    count, skipped = shards.pack(str(tmp_path / "in"), str(tmp_path / "out"), 1e9, 1)
    assert count == 1 and not skipped


@pytest.mark.parametrize(
    "name, member",
    [
        ("shard-000000.tar", "6.13_a.mp4"),
        ("shard-000000.tar", "./a.mp4"),
        ("shard-000003.tar", "folder/a.mp4"),
        ("shard-000003.tar", "._a.mp4"),
        ("shard-000000.tar", "a.options.json"),
        ("shard-old.tar", "a.mp4"),
    ],
)
def test_a_foreign_shard_in_out_is_refused_by_name(pair, tmp_path, name, member):
    """Bug: "too many values to unpack" for a name with a dot; or recordings that are there under
    other keys are packed a second time."""
    put(tmp_path / "in", "a", **pair)
    out = tmp_path / "out"
    out.mkdir()
    with tarfile.open(out / name, "w") as tar:
        tar.addfile(tarfile.TarInfo(member))
    before = (out / name).read_bytes()
    with pytest.raises(ValueError, match=f"{name} was not written by prepare.shards.*--out"):
        shards.pack(str(tmp_path / "in"), str(out), 1e9, 1)
    assert (out / name).read_bytes() == before and os.listdir(out) == [name]


def test_a_disk_that_fails_does_not_leave_recordings_out(pair, tmp_path, monkeypatch):
    """Bug: an I/O error while a recording is checked puts it into skipped.jsonl as a bad one."""
    put(tmp_path / "in", "a", **pair)

    def failing(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="in/a cannot be read: .*Input/output error: fix the disk"):
        shards.pack(str(tmp_path / "in"), str(tmp_path / "out"), 1e9, 1)
    assert not os.listdir(tmp_path / "out")


def test_killed_packing_resumes_to_the_same_shards(pair, tmp_path):
    """Catches a half-written shard that is trusted, recordings packed twice or never after a kill,
    and order that depends on threads."""
    for i in range(60):
        put(tmp_path / "in", f"r{i:02d}", pair["mp4"], pair["jsonl"])
    put(tmp_path / "in", "r07", b"", pair["jsonl"])
    size = 3.5 * (len(pair["mp4"]) + len(pair["jsonl"]))
    shards.pack(tmp_path / "in", tmp_path / "whole", size, 1)
    reference = files(tmp_path / "whole", "*")
    assert len(reference) == 21
    assert max(map(len, reference.values())) <= size + 10240

    out = tmp_path / "out"
    command = [sys.executable, "-m", "prepare.shards", str(tmp_path / "in"), "--out", str(out)]
    command += ["--shard_size", str(size), "--jobs", "3"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not glob.glob(f"{out}/*.tar") and killed.poll() is None:
        time.sleep(0.0005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL

    some = files(out, "*.tar")
    assert 0 < len(some) < 20
    assert all(reference[name] == data for name, data in some.items())

    (out / "shard-000019.tar.1.tmp").write_bytes(b"half a shard")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(out, "*") == reference
    assert f"{3 * len(some)} were packed before" in done.stdout


def test_recordings_that_arrive_later_join(pair, tmp_path):
    """Catches new files that sort before packed ones being forgotten, and a changed recording
    passing for the one packed earlier."""
    put(tmp_path / "in", "m", pair["mp4"], pair["jsonl"])
    shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 1)
    first = files(tmp_path / "out", "*.tar")
    put(tmp_path / "in", "a", pair["mp4"], pair["jsonl"])
    packed, _ = shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 1)
    assert packed == 1
    assert recordings(tmp_path / "out", "*.tar").keys() == {
        ("shard-000000.tar", "m"),
        ("shard-000001.tar", "a"),
    }
    assert files(tmp_path / "out", "*.tar").items() > first.items()

    put(tmp_path / "in", "a", pair["mp4"], pair["jsonl"] * 2)
    with pytest.raises(ValueError, match="another recording as a"):
        shards.pack(tmp_path / "in", tmp_path / "out", 1e9, 1)


# --- download ---


@pytest.fixture
def server(pair):
    """A server of five recordings. `broken` maps a path to what befalls its next requests: a
    status, or bytes sent before it hangs up."""
    state = {"broken": {}, "requests": []}
    content = {
        f"/vpt/data/6.{i}/r{i}.{e}": d
        for i in range(5)
        for e, d in pair.items()
        if (i, e) not in ((1, "mp4"), (2, "jsonl"))
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = state["broken"].get(self.path)
            fault = fault.pop(0) if fault else None
            span = self.headers.get("Range")
            state["requests"].append((self.path, span))
            if self.path not in content or (fault and fault < 600):
                return self.send_error(fault or 404)
            start = int(span[len("bytes=") : -1]) if span else 0
            data = content[self.path]
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + fault] if fault else data[start:])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    state["index"] = {
        "basedir": f"http://127.0.0.1:{httpd.server_port}/vpt/",
        "relpaths": [f"data/6.{i}/r{i}.mp4" for i in range(5)],
    }
    yield state
    httpd.shutdown()
    httpd.server_close()


def test_index_download_survives_missing_files_and_broken_transfers(server, pair, tmp_path):
    """Catches a short file taken for a whole one, a restart from zero, a 404 that ends the run, and
    a passing error that is not retried."""
    server["broken"] = {"/vpt/data/6.0/r0.mp4": [20_000, 700], "/vpt/data/6.3/r3.jsonl": [503, 429]}
    index = tmp_path / "index.json"
    index.write_text(json.dumps(server["index"]))
    command = [sys.executable, "-m", "prepare.shards", str(tmp_path / "in")]
    command += ["--out", str(tmp_path / "out"), "--index", str(index)]
    flags = ["--retry_wait", "0.01", "--max_files", "4"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 fetched" in done.stdout and "2 missing" in done.stdout
    assert [span for path, span in server["requests"] if path.endswith("r0.mp4")] == [
        None,
        "bytes=20000-",
        "bytes=20700-",
    ]

    packed = recordings(tmp_path / "out", "*.tar")
    assert len(packed) == 2 and all(r == pair for r in packed.values())

    with open(tmp_path / "out" / "skipped.jsonl") as f:
        assert [(d["file"], d["reason"]) for d in map(json.loads, f)] == [
            ("data/6.1/r1.jsonl", "no .mp4 beside it")
        ]
    server["requests"].clear()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "1 fetched" in done.stdout
    assert "2 were there" in done.stdout

    # what has arrived is not fetched again
    assert not [path for path, _ in server["requests"] if "r0" in path or "r3" in path]
    assert len(recordings(tmp_path / "out", "*.tar")) == 3


def test_a_download_that_stays_broken_stops_before_packing_and_can_go_on(server, tmp_path):
    """Catches endless retries, packing around a hole that a second run would fill in another order,
    and a part thrown away."""
    server["broken"] = {"/vpt/data/6.4/r4.mp4": [20_000, 500, 500]}
    index = tmp_path / "index.json"
    index.write_text(json.dumps(server["index"]))
    sentence = r"1 downloads broke off, such as .*r4.mp4: HTTP 500 .*\(3 attempts\)"
    with pytest.raises(OSError, match=sentence):
        shards.download(index, tmp_path / "in", 2, None, retries=2, wait=0.01)
    assert os.path.getsize(tmp_path / "in/data/6.4/r4.mp4.part") == 20_000

    counts = shards.download(index, tmp_path / "in", 2, None, retries=2, wait=0.01)
    assert (counts["new"], counts["there"], counts["missing"]) == (1, 2, 2)

    ranges = [span for path, span in server["requests"] if path.endswith("r4.mp4")]
    assert ranges[-1] == "bytes=20000-"

    index.write_text(json.dumps({**server["index"], "relpaths": ["../../etc/passwd.mp4"]}))
    with pytest.raises(ValueError, match="outside"):
        shards.download(index, tmp_path / "in", 2, None, retries=0, wait=0)
