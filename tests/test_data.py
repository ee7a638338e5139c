"""data.py: shards, order, windows, streams, features. Shards are real tar files of real recordings
(tests/conftest.py)."""

import bz2
import collections
import errno
import gzip
import http.server
import io
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import threading
import types

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

from data import (
    ActionScaler,
    Clips,
    MixedOrder,
    Order,
    clips_by_data,
    open_lines,
    open_records,
    open_split,
    read_names,
    split_records,
    vpt_loader,
    windows,
)
from droid import open_droid
from evaluation.heads import Windows
from files import disk, vpt
from files import features as feature_files
from files import shards as shard_files
from files.features import feature_settings
from files.kinds import kind_of
from files.shards import (
    Record,
    Slice,
    expand,
    index_shards,
    is_stream,
    line_warnings,
    read_ticks,
    shard_index,
)
from files.streams import StreamedClips, stream_recordings
from files.video import read_frames
from files.vpt import ClipReader
from tests.harness import (
    HEIGHT,
    contractor,
    fails,
    film,
    jsonl,
    read_number,
    run,
    tfrecord,
    write_tar,
)

READER = ClipReader(crop_size=HEIGHT)


pytestmark = pytest.mark.usefixtures("deadline")


def records_of(*paths):
    return index_shards([str(p) for p in paths])


def fingerprint(batch):
    """What identifies the clips of a batch: keys, first frame numbers, and every action."""
    return [
        (k, read_number(v[0]), a.numpy().tobytes())
        for k, v, a in zip(batch["key"], batch["video"], batch["actions"])
    ]


def take(loader, n):
    return [fingerprint(b) for b in itertools.islice(loader, n)]


# --- files and tars ---


def test_expand_globs_ranges_and_lists(tmp_path):
    """Bug: a range or glob that matches nothing is passed over, and the run trains on less data
    than it was given."""
    for name in ("s-000000.tar", "s-000001.tar", "s-000002.tar", "t.tar"):
        (tmp_path / name).touch()
    d = str(tmp_path)
    every = [f"{d}/s-{i:06d}.tar" for i in range(3)]
    assert (
        expand(d + "/s-*.tar")
        == expand(d + "/s-{000000..000002}.tar")
        == expand([[every[0], d + "/s-*.tar"], [every[2]]])
        == every
    )

    # the user's order between patterns
    assert expand([d + "/t.tar", d + "/s-*1.tar"]) == [d + "/t.tar", every[1]]

    for pattern, named in (
        ("/s-{000001..000004}.tar", "/s-000003.tar"),
        ("/none*.tar", "/none*.tar"),
        ("/x.tar", "/x.tar"),
    ):
        with pytest.raises(FileNotFoundError) as e:
            expand([d + "/t.tar", d + pattern])
        assert d + named in str(e.value) and "prepare" in str(e.value)
    assert expand("pipe:cat a{0..1}.tar") == ["pipe:cat a0.tar", "pipe:cat a1.tar"]
    assert is_stream("pipe:x")
    assert not is_stream(d)


ODD_NAMES = ["run{a,b}", "run{", "back\\slash", "seed[1]", "a*", "what?", "{0..2}", "d{a,b}/e[2]"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_exists_is_no_pattern(tmp_path, name):
    """Bug: braces, brackets or a backslash in the name of a folder: "no shard matches", or those of
    another folder are read."""
    folder = f"{tmp_path}/{name}"
    os.makedirs(folder)
    paths = [f"{folder}/s-{i}.tar" for i in range(3)] + [f"{folder}/{{x,y}}[0].tar"]
    for path in paths:
        open(path, "w").close()
    for path in paths:
        assert expand(path) == [path]
    assert expand(f"{folder}/*.tar") == paths
    assert expand(f"{folder}/s-{{0..2}}.tar") == expand(f"{folder}/s-[0-2].tar") == paths[:3]
    with pytest.raises(FileNotFoundError, match="no shard matches .*s-3.tar"):
        expand(f"{folder}/s-{{0..3}}.tar")
    with pytest.raises(IsADirectoryError, match="is a folder: name the shards in it"):
        expand(folder)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    """Bug: glob passes over a folder of which the disk fails, and a part of the data is missing."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.tar").touch()
    real = os.scandir

    def failing(path="."):
        if str(path).endswith("/b"):
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        expand(f"{tmp_path}/*/*.tar")


def test_a_path_that_may_not_be_entered_is_not_called_unmatched(tmp_path, monkeypatch):
    """Bug: "no shard matches" for a file that is there, in a folder of another user."""

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    long = f"{tmp_path}/{{{','.join(str(i) for i in range(200))}}}.tar"
    for i in range(200):
        (tmp_path / f"{i}.tar").touch()

    # too long for a name
    assert len(expand(long)) == 200
    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a\.tar"):
        expand("/other/a.tar")


def test_slice_is_the_member_and_nothing_else(tmp_path):
    """Bug: reads that run over into the next member, or count fewer bytes than were read."""
    path = write_tar(
        tmp_path / "a.tar",
        {"a.mp4": b"A" * 700, "a.jsonl": bytes(range(256)) * 4, "b.mp4": b"B" * 700},
    )
    members = shard_index(path)[0][0].members
    with Slice(path, *members["jsonl"]) as f:
        assert f.read() == bytes(range(256)) * 4
        assert f.read(10) == b""
        assert f.bytes_read == 1024
        assert f.seek(-4, os.SEEK_END) == 1020
        assert f.read(99) == bytes([252, 253, 254, 255])
        f.seek(2000)
        assert f.read(5) == b"" and f.tell() == 2000
        buffered = io.BufferedReader(Slice(path, *members["mp4"]))
        assert buffered.read() == b"A" * 700


def test_keys_keep_their_dots_and_folders(tmp_path, mp4):
    """Bug: WebDataset cuts keys at the first dot, so that all 6.x recordings melt into one
    sample."""
    lines = jsonl(contractor())
    names = ["6.10_a", "6.10_b", "v7/6.10_a", "6"]
    members = {f"{n}.{e}": d for n in names for e, d in (("mp4", mp4), ("jsonl", lines))}
    path = write_tar(tmp_path / "a.tar", members | {"6-options.json": b"{}", "notes.txt": b"x"})
    records, bad = records_of(path)
    assert [r.key for r in records] == names
    assert not bad
    assert {r.length for r in records} == {300}
    assert [k for k, _ in stream_recordings("pipe:cat " + path)] == names


@pytest.mark.parametrize(
    "how",
    ["inside_video", "inside_header", "at_boundary", "header_damaged", "zero", "end_only", "text"],
)
def test_cut_and_empty_tars_keep_what_is_whole_and_say_so(tmp_path, mp4, how):
    """Bug: tarfile takes a cut or damaged header for the end of the archive: half of the data is
    gone without a word."""
    whole = write_tar(
        tmp_path / "w.tar",
        {
            "a.mp4": mp4,
            "a.jsonl": jsonl(contractor()),
            "b.mp4": mp4,
            "b.jsonl": jsonl(contractor()),
        },
    )
    raw = open(whole, "rb").read()
    records = shard_index(whole)[0]
    header = records[1].members["mp4"][0] - 512
    cut = {
        "inside_video": raw[: header + 5000],
        "inside_header": raw[: header + 200],
        "at_boundary": raw[:header],
        "zero": b"",
        "header_damaged": raw[:header] + b"x" * 512 + raw[header + 512 :],
        "end_only": bytes(10240),
        "text": b"no tar\n" * 900,
    }[how]
    path = tmp_path / "cut.tar"
    path.write_bytes(cut)
    records, bad = records_of(path)
    assert [r.key for r in records] == ([] if how in ("zero", "end_only", "text") else ["a"])
    assert bad and bad[0][0] == str(path) and bad[0][2]
    if not records:
        with pytest.raises(ValueError, match="cut.tar"):
            open_records([str(path)])


def apple_double(name):
    """(name, content) of what tar packs on macOS beside a file."""
    folder, base = os.path.split(name)
    return os.path.join(folder, "._" + base), b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(139)


def test_what_macos_packs_beside_recordings_is_none(tmp_path, mp4):
    """Bug: ._KEY.mp4 and ._KEY.jsonl count as a damaged recording each: half of all are bad, and
    training refuses data in which nothing is wrong. A recording may have such a name, though."""
    lines = jsonl(contractor())
    members = {}
    for key in ("a", "folder/b", "._own"):
        for name, content in ((f"{key}.mp4", mp4), (f"{key}.jsonl", lines)):
            members |= dict([apple_double(name), (name, content)])
    path = write_tar(tmp_path / "a.tar", members)
    records, bad = records_of(path)
    assert [r.key for r in records] == ["a", "folder/b", "._own"] and not bad
    assert [key for key, _ in stream_recordings(f"pipe:cat {path}")] == ["a", "folder/b", "._own"]


def test_archives_one_after_another_are_read_to_the_end(shards, tmp_path):
    """Bug: of `cat a.tar b.tar` only the first half is read, without a word."""
    parts = [(shards / f"shard-00000{i}.tar").read_bytes() for i in range(3)]
    keys = [r.key for i in range(3) for r in records_of(shards / f"shard-00000{i}.tar")[0]]
    path = tmp_path / "all.tar"
    path.write_bytes(parts[0] + bytes(512 * 3) + parts[1] + parts[2])
    records, bad = records_of(path)
    assert [r.key for r in records] == keys and not bad

    last = records[-1]
    with (
        Slice(last.shard, *last.members["jsonl"]) as f,
        tarfile.open(shards / "shard-000002.tar") as t,
    ):
        assert f.read() == t.extractfile(f"{last.key}.jsonl").read()
    assert [key for key, _ in stream_recordings(f"pipe:cat {path}")] == keys

    for rest, reason in (
        (parts[1][:700], "no tar header|ends inside|truncated"),
        (b"x" * 4000, "what follows the end of the tar at byte .* is no tar"),
    ):
        path.write_bytes(parts[0] + rest)
        records, bad = records_of(path)
        assert [r.key for r in records] == keys[:2]
        assert re.search(reason, bad[0][2]), bad
        with pytest.raises((tarfile.ReadError, ValueError)):
            list(stream_recordings(f"pipe:cat {path}"))


def test_a_key_that_is_twice_in_a_tar_is_said(shards, tmp_path, mp4):
    """Bug: the first of two recordings of one name is gone without a word."""
    one = (shards / "shard-000001.tar").read_bytes()
    path = tmp_path / "twice.tar"

    # the same bytes: nothing is lost
    path.write_bytes(one + one)
    assert len(records_of(path)[0]) == 2 and not records_of(path)[1]
    key = records_of(path)[0][0].key
    other = write_tar(tmp_path / "o.tar", {f"{key}.mp4": mp4, f"{key}.jsonl": jsonl(contractor(9))})
    with open(other, "rb") as f:
        path.write_bytes(one + f.read())
    bad = records_of(path)[1]
    assert (str(path), key) in {b[:2] for b in bad}
    assert "twice in the tar" in bad[0][2]


def test_links_in_a_tar_and_compressed_tars_are_named(tmp_path, mp4):
    """Bug: recordings that tar packed as links are missing without a word, and a .tar.gz is called
    damaged."""
    path = write_tar(tmp_path / "a.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor())})
    with tarfile.open(path, "a") as tar:
        for name in ("b.mp4", "b.jsonl"):
            link = tarfile.TarInfo(name)
            link.type = tarfile.LNKTYPE
            link.linkname = "a" + name[1:]
            tar.addfile(link)

    records, bad = records_of(path)
    assert [r.key for r in records] == ["a"]
    assert [b[1] for b in bad] == ["b", "b"]
    assert "b.mp4 is a link in the tar, to a.mp4" in bad[0][2]

    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(open(path, "rb").read()))
    assert "compressed (gzip)" in records_of(packed)[1][0][2]


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members_are_read_as_they_were(tmp_path, mp4, version):
    """Bug: the bytes of a member that was packed with tar --sparse do not lie in one piece: good
    recordings are refused, or others' bytes are read."""
    hole = (1 << 20).to_bytes(4, "big") + b"free"
    whole = bytearray(mp4 + hole + bytes((1 << 20) - 8))
    whole[len(mp4) + 300_000 : len(mp4) + 300_007] = b"islands"
    with open(tmp_path / "a.mp4", "wb") as f:
        f.write(mp4 + hole)
        f.seek(len(mp4) + 300_000)
        f.write(b"islands")
        f.truncate(len(whole))
    (tmp_path / "a.jsonl").write_bytes(jsonl(contractor()))
    kind = ["--format=gnu"] if version == "gnu" else ["--format=posix", "--sparse-version", version]
    path = tmp_path / "sparse.tar"
    command = ["tar", "--sparse", *kind, "-cf", path, "-C", tmp_path, "a.mp4", "a.jsonl"]
    subprocess.run(command, check=True)
    if os.path.getsize(path) > 900_000:
        pytest.skip("this disk keeps no holes")
    (record,), bad = records_of(path)
    assert not bad and record.length == 300

    with Slice(record.shard, *record.members["mp4"]) as f:
        assert f.read() == whole
        for place in (0, len(mp4) - 3, len(mp4) + 200_000, len(mp4) + 299_998, len(whole) - 5):
            f.seek(place)
            assert f.read(70_000) == whole[place : place + 70_000]
    clip = Clips([record], [1.0], READER)[0, 0, 0, 0.5]
    assert clip["key"] == "a"
    assert not clip["bad"]
    assert read_number(clip["video"][0]) > 0

    ((key, members),) = stream_recordings(f"pipe:cat {path}")
    assert members["mp4"] == whole


def test_missing_partner_and_bad_videos_are_listed_by_reason(tmp_path, mp4):
    """Bug: a recording that cannot be used disappears without a trace, or takes the whole shard
    with it."""
    lines = jsonl(contractor())
    bad = {
        "lone.mp4": mp4,
        "lonely.jsonl": lines,
        "empty.mp4": b"",
        "empty.jsonl": lines,
        "text.mp4": b"hello" * 99,
        "text.jsonl": lines,
    }
    for percent in (5, 50, 95):
        bad |= {f"cut{percent}.mp4": mp4[: len(mp4) * percent // 100], f"cut{percent}.jsonl": lines}
    path = write_tar(tmp_path / "a.tar", {"ok.mp4": mp4, "ok.jsonl": lines} | bad)
    records, found = records_of(path)
    assert [r.key for r in records] == ["ok"]

    reasons = {key: reason for _, key, reason in found}
    expected = {
        "lone": "no jsonl",
        "lonely": "no mp4",
        "empty": "zero bytes",
        "text": "",
        "cut5": "",
        "cut50": "",
        "cut95": "",
    }
    assert reasons.keys() == expected.keys()
    assert all(v in reasons[k] for k, v in expected.items())


# --- the tick cache ---


def test_ticks_are_read_once_then_from_the_cache(shards, monkeypatch):
    """Bug: 15 MB of JSON parsed for every clip."""
    record = records_of(shards / "shard-000001.tar")[0][0]
    first = read_ticks(record)
    monkeypatch.setattr(
        shard_files, "parse_ticks", lambda raw: pytest.fail("the JSONL was read again")
    )
    monkeypatch.setattr(shard_files, "Slice", lambda *a: pytest.fail("the shard was opened"))
    second = read_ticks(record)
    assert all(np.array_equal(x, y) for x, y in zip(first, second))
    assert first.motion.dtype == second.motion.dtype
    assert type(second.rate) is float and type(second.flaw) is str


def test_a_damaged_cache_is_rebuilt_and_a_changed_shard_read_again(tmp_path, mp4, monkeypatch):
    """Bug: a half-written or flipped cache file gives other actions, or stops the run; or an old
    cache serves a new shard."""
    path = write_tar(tmp_path / "a.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor(seed=1))})
    record = records_of(path)[0][0]
    monkeypatch.setattr(shard_files, "CACHE", str(tmp_path / "cache"))
    good = read_ticks(record)
    (cache,) = (tmp_path / "cache" / "ticks").iterdir()
    raw = open(cache, "rb").read()
    rng = np.random.default_rng(0)
    damages = [b"", raw[:20], raw[:-1], raw[: len(raw) // 2], raw + b"x", b"x" * len(raw)]
    damages += [
        raw[:i] + bytes([raw[i] ^ 64]) + raw[i + 1 :] for i in rng.integers(0, len(raw), 60)
    ]
    damages += [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in range(0, 300, 3)]
    for damage in damages:
        with open(cache, "wb") as f:
            f.write(damage)
        ticks = read_ticks(record)
        assert np.array_equal(ticks.motion, good.motion)
        assert np.array_equal(ticks.keys, good.keys)
        assert ticks.flaw == ""
    assert open(cache, "rb").read() == raw

    size = os.path.getsize(path)

    # byte for byte as long
    write_tar(
        path, {"a.mp4": mp4, "a.jsonl": jsonl(contractor(seed=1)).replace(b'"yaw": -', b'"yaw": 1')}
    )
    os.utime(path, ns=(1, 1))
    assert os.path.getsize(path) == size
    assert not np.array_equal(read_ticks(records_of(path)[0][0]).motion, good.motion)


def test_an_unwritable_cache_only_costs_time(shards, monkeypatch, capsys, tmp_path):
    """Bug: a read-only home folder stops the run."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(shard_files, "CACHE", str(tmp_path / "file"))
    assert len(read_ticks(records_of(shards / "shard-000000.tar")[0][0]).motion) == 300
    assert "NANOJEPA_CACHE" in capsys.readouterr().out


def test_a_cache_of_another_user_only_costs_time(shards, monkeypatch, capsys, tmp_path):
    """Bug: a cache entry that may not be read makes a good recording a bad clip. (A folder in the
    place of the entry: root may read every file.)"""
    monkeypatch.setattr(shard_files, "CACHE", str(tmp_path))
    records = records_of(shards / "shard-000000.tar")[0]
    good = read_ticks(records[0])
    (entry,) = (tmp_path / "ticks").iterdir()
    entry.unlink()
    entry.mkdir()
    clip = Clips(records, [1.0] * len(records), READER)[0, 0, 0, 0.5]
    assert clip["key"] == records[0].key and not clip["bad"]
    assert np.array_equal(read_ticks(records[0]).motion, good.motion)
    said = capsys.readouterr().out
    assert said.count("a cache entry cannot be read") == 1
    assert "NANOJEPA_CACHE" in said


# --- order ---


def loader_of(shards, batch_size=4, **options):
    return vpt_loader(
        str(shards / "*.tar"),
        batch_size,
        **{"reader": READER, "num_workers": 0, "batches_per_epoch": 3, "seed": 5} | options,
    )


def test_order_does_not_depend_on_workers_and_resumes_anywhere(shards):
    """Bug: workers deal clips by their own random state, so that a run can only be resumed with the
    same number of them, or not at all."""
    plain = take(loader_of(shards), 7)
    assert plain[:3] != plain[3:6] and take(loader_of(shards), 7) == plain
    assert take(loader_of(shards, num_workers=2), 7) == plain
    assert take(loader_of(shards, epoch=1, itr=2), 2) == plain[5:7]
    assert take(loader_of(shards, epoch=0, itr=3), 1) == plain[3:4]
    assert take(loader_of(shards, seed=6), 1) != plain[:1]


def test_augmentations_follow_the_clip_not_the_worker(shards):
    """Bug: augmentation noise from a worker's own generator: the same run with other workers or
    after a resume sees other pixels."""
    reader = ClipReader(
        crop_size=HEIGHT,
        horizontal_flip=True,
        random_resize_scale=0.7,
        motion_shift=0.1,
        temporal_jitter=1,
        action_noise=0.1,
    )
    runs = [
        list(itertools.islice(loader_of(shards, reader=reader, **o), 2))
        for o in ({}, {"num_workers": 2}, {"itr": 1})
    ]
    for x, y in ((runs[0][0], runs[1][0]), (runs[0][1], runs[1][1]), (runs[0][1], runs[2][0])):
        assert all(torch.equal(x[k], y[k]) for k in ("video", "actions", "states"))
        assert x["key"] == y["key"]
    assert not torch.equal(runs[0][0]["video"], runs[0][1]["video"])


def test_resuming_decodes_nothing_that_was_seen(shards, monkeypatch):
    """Bug: the first half of an epoch is decoded again to be thrown away."""
    calls = []
    read = read_frames
    monkeypatch.setattr(vpt, "read_frames", lambda *a: calls.append(a) or read(*a))
    take(loader_of(shards, batches_per_epoch=1000, itr=998), 1)
    assert len(calls) == 4


def test_two_ranks_together_see_the_batches_of_one(shards):
    """Bug: ranks share clips or leave some out; the same global batch on other hardware is another
    run."""
    one = take(loader_of(shards, batch_size=4), 4)
    two = [take(loader_of(shards, batch_size=2, rank=r, world=2), 4) for r in range(2)]
    assert [a + b for a, b in zip(*two)] == one


def test_an_epoch_is_spread_evenly_over_the_timeline(shards):
    """Bug: independent draws: a third of the play unseen in every epoch, other parts seen
    thrice."""
    records = records_of(*sorted(shards.glob("*.tar")))[0]
    dataset = Clips(records, [r.length for r in records], READER)
    batches = list(itertools.islice(Order(dataset, 10, 24, epoch=3), 24))
    items = [i for b in batches for i in b]
    assert sorted(i[1] for i in items) == list(range(240))
    assert {i[0] for i in items} == {3}

    # tick on the timeline of 1800
    at = np.array([(i[2] + i[3]) * 300 for i in items])
    assert (np.histogram(at, np.linspace(0, 1800, 241))[0] == 1).all()

    # and in random order
    assert np.abs(np.corrcoef(at[1:], at[:-1])[0, 1]) < 0.2

    starts = [int(i[3] * 240) for i in items]
    assert min(starts) < 8 and max(starts) > 231

    again = [i for b in itertools.islice(Order(dataset, 10, 24, epoch=3), 24) for i in b]
    other = [i for b in itertools.islice(Order(dataset, 10, 24, epoch=4), 24) for i in b]
    assert items == again and items != other


def test_locate_covers_every_recording_by_its_share():
    """Bug: rounding at the borders of the timeline: a place of 1.0 is one start too far."""
    dataset = Clips([Record(f"r{i}", "", {}) for i in range(5)], [1, 0, 3, 0.5, 0], READER)
    seen = collections.Counter()
    for u in np.linspace(0, 1, 9001)[:-1]:
        number, place = dataset.locate(u)
        assert 0 <= place < 1 and int(place * 6000) < 6000
        seen[number] += 1
    assert [round(seen[i] / 2000, 2) for i in range(5)] == [1, 0, 3, 0.5, 0]
    assert dataset.locate(np.nextafter(1, 0))[0] == 3


def test_data_weights_are_shares_of_clips(shards, tmp_path, mp4):
    """Bug: weights per shard instead of per dataset, so that the larger dataset wins whatever the
    weights say."""
    members = {
        "b.mp4": mp4,
        "b.jsonl": jsonl(contractor()),
        "c.mp4": film(100),
        "c.jsonl": jsonl(contractor(100)),
    }
    write_tar(tmp_path / "b.tar", members)
    groups = [[str(shards / "*.tar")], [str(tmp_path / "b.tar")]]
    for weights, share in (([0.25, 0.75], 0.75), ([3, 1], 0.25), (None, 400 / 2200)):
        records, shares, _, _ = open_split(groups, weights)
        keys = [
            records[i[2]].key for i in next(iter(Order(Clips(records, shares, READER), 400, 1)))
        ]

        # inside a dataset by length: 300 and 100 frames
        assert keys.count("b") / 400 == pytest.approx(share * 0.75, abs=0.006)
        assert keys.count("c") / 400 == pytest.approx(share * 0.25, abs=0.006)
    with pytest.raises(ValueError, match="--data_weights has 1 numbers for 2 --data"):
        open_split(groups, [1.0])


def test_data_sets_take_turns_by_their_shares(shards):
    """Bug: clips of different lengths in one batch; ranks at different data sets; shares that are
    not kept; a stopped run that goes on elsewhere."""
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    groups = [paths[:1], paths[1:]]
    records, shares, _, _ = open_split(groups, [1, 3])
    readers = [ClipReader(frames_per_clip=8), ClipReader(frames_per_clip=4)]
    dataset = clips_by_data(records, shares, groups, readers)

    # both ranks of an epoch of 40 batches
    ranks = []
    for rank in range(2):
        order = MixedOrder(dataset, 3, 40, epoch=2, rank=rank, world=2)
        ranks.append(list(itertools.islice(order, 40)))
    turns = [{item[0] for item in one + two} for one, two in zip(*ranks)]
    assert all(len(parts) == 1 for parts in turns)
    assert sum(parts == {0} for parts in turns) == 10
    items = [tuple(item) for batches in ranks for batch in batches for item in batch]
    assert len(set(items)) == len(items)

    # resumed, and another epoch
    later = MixedOrder(dataset, 3, 40, epoch=2, itr=25, world=2)
    assert list(itertools.islice(later, 15)) == ranks[0][25:]
    other = MixedOrder(dataset, 3, 40, epoch=3, world=2)
    assert list(itertools.islice(other, 40)) != ranks[0]

    # what is read
    lengths = {batch[0][0]: len(dataset[batch[0]]["video"]) for batch in ranks[0][:12]}
    assert lengths == {0: 8, 1: 4}


def test_each_data_is_split_and_weighed_by_itself(shards, tmp_path, mp4):
    """Bug: the last shards of all --data together are held out, so that one --data is validated on
    and never trained on."""
    path = write_tar(
        tmp_path / "z.tar",
        {f"{k}.{x}": v for k in "bcde" for x, v in (("mp4", mp4), ("jsonl", jsonl(contractor())))},
    )
    train, shares, val, _ = open_split(
        [[str(shards / "*.tar")], [str(path)]], [0.7, 0.3], val_fraction=0.25
    )
    mine = [r.shard == str(path) for r in train]
    assert sum(mine) == 3
    assert sum(r.shard == str(path) for r in val) == 1
    assert len(val) > 1
    assert sum(s for s, m in zip(shares, mine) if m) == pytest.approx(0.3)
    assert sum(shares) == pytest.approx(1.0)


def test_clips_can_be_sent_to_workers_by_pickling(shards):
    """Bug: macOS starts workers by pickling the dataset, after it has been used."""
    records = records_of(shards / "shard-000000.tar")[0]
    dataset = Clips(records, [1, 1], READER)
    item = (0, 0, 1, 0.3)
    clip = dataset[item]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[item]["video"], clip["video"])

    # as after many recordings: bounded
    dataset.opened.update({i: None for i in range(100, 356)})
    dataset.opened.pop(1)
    dataset[item]
    assert len(dataset.opened) <= 257


# --- damaged recordings ---


@pytest.fixture(scope="module")
def partly_bad(tmp_path_factory, mp4):
    """Five recordings, of which two fail only when a clip is cut: pictures zeroed, and 30 lines
    short."""
    hole = bytearray(mp4)
    hole[200 : mp4.index(b"moov") - 4] = bytes(mp4.index(b"moov") - 204)
    members = {}
    for key, video, lines in (
        ("a", mp4, 300),
        ("hole", bytes(hole), 300),
        ("b", mp4, 300),
        ("short", mp4, 270),
        ("c", mp4, 297),
    ):
        members |= {f"{key}.mp4": video, f"{key}.jsonl": jsonl(contractor(lines, seed=ord(key[0])))}
    members |= {
        "none.mp4": mp4,
        "none.jsonl": b"",
        "nan.mp4": mp4,
        "nan.jsonl": b'{"yaw": NaN}\n' * 300,
    }
    return write_tar(tmp_path_factory.mktemp("bad") / "bad.tar", members)


def test_a_bad_clip_is_replaced_by_the_same_one_everywhere(partly_bad):
    """Bug: batches shrink, ranks fall out of step, or a resumed run gets another replacement; bad
    files never become known."""
    runs = []
    for options in ({}, {"num_workers": 2}, {"itr": 2}):
        loader = vpt_loader(
            partly_bad, 8, reader=READER, batches_per_epoch=4, **{"num_workers": 0} | options
        )
        runs.append(list(itertools.islice(loader, 4 - options.get("itr", 0))))
    for batch in runs[0]:
        assert len(batch["video"]) == 8 and set(batch["key"]) <= {"a", "b", "c"}
    assert [fingerprint(b) for b in runs[0]] == [fingerprint(b) for b in runs[1]]
    assert [fingerprint(b) for b in runs[0][2:]] == [fingerprint(b) for b in runs[2]]

    bad = [x for b in runs[0] for x in b["bad"]]
    assert bad == [x for b in runs[1] for x in b["bad"]]

    reasons = {key: reason for _, key, reason in bad}
    assert reasons.keys() == {"hole", "short", "none", "nan"}
    assert {x[0] for x in bad} == {partly_bad}
    assert "270 lines but 300 frames" in reasons["short"]
    assert "empty" in reasons["none"]
    assert "line 0" in reasons["nan"]

    first = [fingerprint(b) for b in runs[0]]

    # the replacements are no copies of other clips
    assert len({c for b in first for c in b}) == 32


def faulty(monkeypatch, code, count, first=1):
    """os.preadv that fails `count` times from its call number `first` on."""
    real = os.preadv
    calls = itertools.count(1)

    def preadv(fd, buffers, place):
        if first <= next(calls) < first + count:
            raise OSError(code, os.strerror(code))
        return real(fd, buffers, place)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("kind", [Clips, Windows])
@pytest.mark.parametrize("first", [1, 4, 9, 14])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_disk_that_fails_in_a_run_replaces_no_clip(shards, monkeypatch, kind, first, code):
    """Bug: an error of the disk while a clip is read counts as a damaged recording, and another
    clip is trained on. FFmpeg keeps the error to itself or takes it for the end of the video."""
    records = records_of(shards / "shard-000001.tar")[0]
    item = (0, 0, 1, 0)
    want = Clips(records, [1.0] * len(records), READER)[item]

    # for a moment: asked again, the disk answers
    with monkeypatch.context() as patch:
        faulty(patch, code, 1, first)
        got = kind(records, [1.0] * len(records), READER)[item]
        clip = got[1] if kind is Windows else got
        assert torch.equal(clip["video"], want["video"])
        assert clip["key"] == records[1].key
        assert not clip.get("bad") and (kind is Clips or got[2] is None)

    faulty(monkeypatch, code, 10**9, first)
    with pytest.raises(ValueError) as e:
        kind(records, [1.0] * len(records), READER)[item]
    assert f"{records[1].shard} {records[1].key} cannot be read" in str(e.value)
    assert os.strerror(code) in str(e.value)
    assert "says nothing about the recording" in str(e.value)


def test_a_shard_that_is_gone_ends_the_run(shards, tmp_path):
    """Bug: while a disk is not mounted, each of its recordings is called bad."""
    path = shutil.copy(shards / "shard-000000.tar", tmp_path / "a.tar")
    records = records_of(path)[0] + records_of(shards / "shard-000001.tar")[0]
    clips = Clips(records, [1.0] * len(records), READER)
    os.unlink(path)
    with pytest.raises(ValueError, match="a.tar .* cannot be read: .*No such file.*put the file"):
        clips[0, 0, 0, 0.5]


def test_only_what_the_system_says_is_the_disk():
    """Bug: HDF5 and Pillow raise OSError for damaged files; taken for the disk's, one
    damaged file would end every run. HDF5 tells of a failing disk in the text alone."""
    failed = [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        disk.Unreachable("x"),
        MemoryError(),
        OSError("Can't synchronously read data (file read failed: errno = 5, error message = 'x')"),
        KeyError("Unable to open object (file read failed: errno = 116, error message = 'x')"),
    ]
    damaged = [
        OSError("Unable to synchronously open file (truncated file: eof = 2048)"),
        OSError("image file is truncated (3 bytes not processed)"),
        ValueError("the mp4 is truncated"),
        EOFError(),
    ]
    assert all(map(disk.is_storage_error, failed))
    assert not any(map(disk.is_storage_error, damaged))


def test_nothing_but_bad_clips_is_an_error_that_names_the_file(tmp_path, mp4):
    """Bug: an endless search for a clip that can be read."""
    path = write_tar(tmp_path / "a.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor(270))})
    with pytest.raises(ValueError, match="a.tar.*270 lines"):
        next(iter(vpt_loader(path, 2, reader=READER, num_workers=0)))
    path = write_tar(
        tmp_path / "g.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor(isGuiOpen=True))}
    )
    with pytest.raises(ValueError, match="--gui drop"):
        next(
            iter(
                vpt_loader(path, 2, reader=ClipReader(crop_size=HEIGHT, gui="drop"), num_workers=0)
            )
        )


def test_our_own_bugs_are_not_taken_for_bad_clips(shards, monkeypatch):
    """Bug: a blind except turns a TypeError of ours into a million skipped clips."""
    monkeypatch.setattr(vpt, "step_actions", lambda *a: None + 1)
    with pytest.raises(TypeError):
        next(iter(loader_of(shards)))


def test_gui_drop_replaces_clips(tmp_path, mp4):
    """Bug: a dropped clip leaves a hole in the batch, or is listed as damage."""
    lines = jsonl(contractor(isGuiOpen=lambda i: i < 150))
    path = write_tar(tmp_path / "a.tar", {"a.mp4": mp4, "a.jsonl": lines})
    batch = next(
        iter(vpt_loader(path, 12, reader=ClipReader(crop_size=HEIGHT, gui="drop"), num_workers=0))
    )
    assert min(read_number(v[0]) for v in batch["video"]) >= 150
    assert not batch["bad"]
    assert len(batch["video"]) == 12


# --- splits and windows ---


def many_records(shards, recordings, suffixes=("",)):
    member = {"safetensors": (0, 1)} if suffixes != ("",) else {"mp4": (0, 1), "jsonl": (0, 1)}
    return [
        Record(f"s{s:02d}.tar", f"r{s}-{k}{x}", member, 100)
        for s in range(shards)
        for k in range(recordings)
        for x in suffixes
    ]


@pytest.mark.parametrize(
    "shards, recordings, fraction, held",
    [(20, 3, 0.1, 6), (10, 3, 0.01, 3), (3, 10, 0.2, 6), (1, 2, 0.01, 1), (1, 2, 0.99, 1)],
)
def test_split_holds_out_whole_shards_or_recordings(shards, recordings, fraction, held):
    """Bug: windows of one recording on both sides: validation measures memory."""
    records = many_records(shards, recordings)
    train, val = split_records(records, fraction)
    assert len(val) == held
    assert sorted(train + val) == sorted(records)
    assert not {r.key for r in train} & {r.key for r in val}
    if shards >= 10:
        assert not {r.shard for r in train} & {r.shard for r in val}
        assert max(r.shard for r in train) < min(r.shard for r in val)
    assert split_records(records[::-1], fraction)[1] == val[::-1]
    assert split_records(records, 0) == (records, [])
    assert split_records(records[:1], 0.5) == (records[:1], [])


def test_split_keeps_the_phases_of_a_recording_together_and_agrees_with_its_video():
    """Bug: encode.py --phases writes one recording as several members; split by member, validation
    is the training data 2 ticks later."""
    for shards, recordings in ((4, 5), (12, 2)):
        _, videos = split_records(many_records(shards, recordings), 0.2)
        train, val = split_records(many_records(shards, recordings, ("@00000", "@00004")), 0.2)
        name = lambda r: r.key.partition("@")[0]  # noqa: E731
        assert not {name(r) for r in train} & {name(r) for r in val}
        assert {name(r) for r in val} == {r.key for r in videos}


def test_open_split_refuses_a_recording_on_both_sides(shards):
    """Bug: --val_data inside --data is trained on, and the validation curve shows nothing."""
    train, shares, val, bad = open_split([[str(shards / "*.tar")]], val_fraction=0.34)
    assert len(train) == len(shares) == 4 and len(val) == 2 and not bad
    every = str(shards / "*.tar")
    last = str(shards / "shard-000002.tar")
    with pytest.raises(ValueError, match="share 2 recordings"):
        open_split([[every]], val_data=[[last]])
    train, _, val, _ = open_split([[str(shards / "shard-00000[01].tar")]], val_data=[[last]])
    assert len(train) == 4 and {r.shard for r in val} == {last}


def ten_shards(folder, mp4, count=10):
    return [
        write_tar(
            folder / f"shard-{n:06d}.tar",
            {f"rec{n}.mp4": mp4, f"rec{n}.jsonl": jsonl(contractor(seed=n))},
        )
        for n in range(count)
    ]


def symlink(source, path):
    os.symlink(os.path.basename(source), path)


def with_dot(source, path):
    """The same recording, packed again with ./ before its name and in another order."""
    with tarfile.open(source) as tar:
        members = {f"./{m.name}": tar.extractfile(m).read() for m in tar}
    write_tar(path, dict(reversed(members.items())))


@pytest.mark.parametrize("count", [4, 10])
@pytest.mark.parametrize("name", ["aa-old", "zz-newest"])
@pytest.mark.parametrize("again", [symlink, os.link, shutil.copy, with_dot])
def test_the_same_recording_twice_is_taken_once(tmp_path, mp4, again, name, count):
    """Bug: a link to a shard, or a copy of it, is held out under one name and trained on under the
    other."""
    paths = ten_shards(tmp_path, mp4, count)
    other = tmp_path / f"{name}.tar"
    again(paths[2], other)
    for held_out in (0.1, 0.4):
        train, shares, val, bad = open_split([[f"{tmp_path}/*.tar"]], val_fraction=held_out)
        keys = sorted(os.path.normpath(r.key) for r in train + val)
        assert keys == [f"rec{n}" for n in range(count)]
        assert len(shares) == len(train)
        assert not bad
        assert val and {r.shard for r in train}.isdisjoint({r.shard for r in val})
        fitted = open_lines([[f"{tmp_path}/*.tar"]], None, held_out)[0]
        assert {r.key for r in fitted} == {r.key for r in train}
    if again is symlink:
        assert paths[2] in expand(f"{tmp_path}/*.tar")
        assert str(other) not in expand(str(tmp_path / "*"))
    if again is not with_dot:
        with pytest.raises(ValueError, match="share 1 recordings, .* rec2 among them"):
            open_split([[str(paths[2])]], val_data=[[str(other)]])
        with pytest.raises(ValueError, match="number 2 and an earlier one share 1 recordings"):
            open_split([paths, [str(other)]], [1, 2], val_fraction=0.1)


def test_no_key_is_on_both_sides_of_the_split(tmp_path, mp4):
    """Bug: the last of ten shards holds another copy of a recording (packed with other lines, say),
    which is held out there and trained on in an earlier shard."""
    ten_shards(tmp_path, mp4)
    lines = jsonl(contractor(seed=77))
    write_tar(
        tmp_path / "z.tar", {"rec3.mp4": mp4, "rec3.jsonl": lines, "x.mp4": mp4, "x.jsonl": lines}
    )
    train, _, val, _ = open_split([[f"{tmp_path}/*.tar"]], val_fraction=0.2)
    assert len(train + val) == 12 and len(val) >= 2
    assert {r.key for r in train}.isdisjoint({r.key for r in val})


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_no_share_are_refused(shards, weight):
    """Bug: a negative, zero or NaN weight draws from other recordings than asked for, or none."""
    groups = [[str(shards / "shard-000000.tar")], [str(shards / "shard-000001.tar")]]
    with pytest.raises(ValueError, match=f"--data_weights {weight:g} is no share of the clips"):
        open_split(groups, [1.0, weight])


def test_windows_do_not_overlap_and_do_not_depend_on_the_world(shards):
    """Bug: the validation number changes with the number of GPUs, or counts clips twice."""
    dataset = Clips(records_of(*sorted(shards.glob("*.tar")))[0], [1] * 6, READER)
    every = windows(dataset, 4, 1000)
    items = [i for b in every for i in b]

    # 300 ticks hold 4 of 64
    assert len(items) == 6 * 4
    assert len({i[2:] for i in items}) == 24
    assert {len(b) for b in every} == {4}
    for world in (2, 3, 5):
        parts = [windows(dataset, 4, 1000, r, world) for r in range(world)]
        assert [b for group in itertools.zip_longest(*parts) for b in group if b] == every
    clips = {(number, place): dataset[(e, i, number, place)] for e, i, number, place in items}
    assert all(
        not c["bad"] and read_number(c["video"][0]) == 64 * place for (_, place), c in clips.items()
    )

    # a few windows come from many recordings
    assert len({i[2] for b in windows(dataset, 4, 12) for i in b}) >= 4


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 8])
def test_no_window_is_alone_in_its_batch(shards, batch_size):
    """Bug: the action meter shuffles actions inside the batch; a batch of one has no other clip's
    action."""
    dataset = Clips(records_of(*sorted(shards.glob("*.tar")))[0], [1] * 6, READER)
    for limit in range(2, 24):
        batches = windows(dataset, batch_size, limit)
        assert sum(map(len, batches)) == limit and min(map(len, batches)) > 1


def guide_lines(lines, rate, **change):
    """Lines in the guides' format at some rate."""
    line = {"mouse": {"dx": 1, "dy": 0}, "keyboard": {"keys": ["w"]}, "camera": [0, 0], "hotbar": 0}
    return [{"timestamp": i / rate} | line | change for i in range(lines)]


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """40 seconds of play at 20, 10 and 30 lines and frames a second, and at 5 lines beside 20
    frames, a shard each."""
    folder = tmp_path_factory.mktemp("rates")
    out = {}
    for rate, fps in ((20, 20), (10, 10), (30, 30), (5, 20)):
        video = film(40 * fps, times=np.arange(40 * fps) * 1000 // fps)
        members = {"a.mp4": video, "a.jsonl": jsonl(guide_lines(40 * rate, rate))}
        out[rate] = write_tar(folder / f"{rate}.tar", members)
    return out


def test_one_clock_for_windows_epochs_and_shares(rates):
    """Bug: 20 lines a second taken for granted: half of a 10 Hz recording is never validated, a
    third of the windows of a 30 Hz one lie past its end, and one at 30 Hz gets three times the
    clips of one at 10."""
    for rate, path in rates.items():
        records, _ = records_of(path)
        assert records[0].rate == pytest.approx(rate, rel=0.01)

        dataset = Clips(records, [1.0], READER)
        items = [i for batch in windows(dataset, 1, 100) for i in batch]

        # clips of 3.2 s in 40 s
        assert len(items) == 12

        step = records[0].frames_per_line * rate // 5
        for _, _, _, place in items:
            clip = dataset[0, 0, 0, place]
            assert not clip["bad"]
            assert [read_number(x) for x in clip["video"]] == [
                step * (16 * place + k) % 1024 for k in range(16)
            ]

    train, shares, _, _ = open_split([[path] for path in rates.values()])

    # twentieths of a second
    np.testing.assert_allclose(shares, 800, rtol=0.01)

    loader = vpt_loader((train, shares), 1, reader=READER, num_workers=0)
    assert 49 <= loader.batch_sampler.batches <= 50


def test_a_rate_that_fps_does_not_divide_is_reported(rates):
    """Bug: a recording that no window of can be cut is left out of the validation without a
    word."""
    dataset = Clips(
        records_of(rates[30], rates[20])[0], [1.0, 1.0], ClipReader(fps=4, crop_size=HEIGHT)
    )
    items = [i for batch in windows(dataset, 1, 100) for i in batch]
    assert [number for _, _, number, _ in items].count(0) == 1
    with pytest.raises(ValueError, match="--fps 4 does not divide"):
        dataset.read(0, 0, None)


def test_what_is_odd_in_lines_is_said_before_training(rates, tmp_path, mp4):
    """Bug: a key in another spelling, or no clock, is found in the results, if ever."""
    good = records_of(*rates.values())[0]
    assert line_warnings(good) == []

    strange = {
        "a.mp4": mp4,
        "a.jsonl": jsonl(guide_lines(300, 20, keyboard={"keys": ["spacce"]})),
        "b.mp4": film(300, times=np.arange(300) * 1000 // 60),
        "b.jsonl": jsonl(contractor(keyboard=None)),
    }
    records, _ = records_of(write_tar(tmp_path / "a.tar", strange))

    # from the lines, then from the cache
    for _ in range(2):
        name, clock, keys = line_warnings(records)
        assert 'key "spacce" (nearest known name: "key.keyboard.space") on 300 lines' in name
        assert "b, have a video of 60 frames a second and lines without timestamp" in clock
        assert keys.startswith("no key is held on any line")
    assert line_warnings(records + good, 2)[0].endswith("(in 2 of 6 recordings)")


def test_inspect_names_what_nobody_knows_and_the_clock(tmp_path, mp4, forkserver):
    """Bug: the first look at own data shows a column of zeros and no reason for it."""
    lines = guide_lines(75, 5, keyboard={"keys": ["w", "space_bar2"]})
    path = write_tar(tmp_path / "a.tar", {"a.mp4": mp4, "a.jsonl": jsonl(lines)})
    text = run(tmp_path, "data.py", "--inspect", path, "--batch_size 1")
    assert 'WARNING: key "space_bar2" (nearest known name: "key.keyboard.space")' in text
    assert "1 recording of 5 lines a second, 4 frames a line" in text


def test_a_file_of_another_kind_is_named(tmp_path, shards, forkserver):
    """Bug: a file that is no shard of play is an error of tarfile; a kind is told by its name."""
    with h5py.File(tmp_path / "a.tar", "w") as f:
        f["z"] = np.zeros((2, 4, 2, 8, 8), np.float16)
    with h5py.File(tmp_path / "robot.h5", "w") as f:
        f["observation/robot_state/cartesian_position"] = np.zeros((5, 6))
    (tmp_path / "b.tar").write_bytes(tfrecord(0, 20))
    np.savez(tmp_path / "c.npz", states=np.zeros((4, 7)))
    torch.save({"a": torch.zeros(2)}, tmp_path / "d.pt")
    write_tar(tmp_path / "e.tar", {"notes.txt": b"x"})
    write_tar(tmp_path / "f.tar", {"x.mp4": film(20)})
    (tmp_path / "g.mp4").write_bytes(film(20))
    (tmp_path / "h.jsonl").write_bytes(jsonl(contractor(3)))
    (tmp_path / "i.tar").write_bytes(b"")
    (tmp_path / "j.parquet").write_bytes(b"PAR1 and more")
    save_file({"a": torch.zeros(2)}, tmp_path / "k.safetensors")
    expected = "latents robot robot robot weights unknown films film lines empty parquet weights"
    files = (
        "a.tar robot.h5 b.tar c.npz d.pt e.tar f.tar g.mp4 h.jsonl i.tar j.parquet k.safetensors"
    )
    assert [kind_of(tmp_path / name) for name in files.split()] == expected.split()
    assert kind_of(shards / "shard-000000.tar") == "play"

    # of latents it prints what is inside, of others it says what to do
    text = run(tmp_path, "data.py", "--inspect", tmp_path / "a.tar")
    assert "latents  (2, 4, 2, 8, 8) float16" in text and "4 steps" in text
    assert "python -m droid --inspect" in fails(
        tmp_path, "data.py", "--inspect", tmp_path / "b.tar"
    )


def test_shards_of_another_kind_are_refused_before_training(tmp_path, shards):
    """Bug: features beside shards of video are found when a batch has both, after hours; a video
    or latents in place of a shard are a damaged tar."""
    motion = {"actions": torch.zeros(8, 38), "states": torch.zeros(9, 2, dtype=torch.float64)}
    member = safetensors_bytes(motion | {"z": torch.zeros(9, 4, 8).bfloat16()})
    features = write_tar(tmp_path / "f.tar", {"a@0.safetensors": member})
    play = str(shards / "shard-000000.tar")
    for data in ([play, features], [[features], [play]]):
        with pytest.raises(ValueError, match="f.tar holds features, and .*video: pass one kind"):
            open_split(data)

    (tmp_path / "v.mp4").write_bytes(film(20))
    (tmp_path / "v.tar").write_bytes(film(20))
    (tmp_path / "r.tar").write_bytes(tfrecord(0, 20))
    for name, reason in (("v.mp4", "prepare.shards"), ("v.tar", "rename"), ("r.tar", "droid")):
        with pytest.raises(ValueError, match=f"no usable recording in .*{name}.*{reason}"):
            open_records([str(tmp_path / name)])


def test_a_damaged_file_is_named_and_no_other_kind(tmp_path, forkserver):
    """Bug: a shard cut before its lines is plain video, a sound is video; features of which nothing
    is left, latents without values, or a batch of none end in a traceback."""
    write_tar(tmp_path / "whole.tar", {"x.mp4": film(20), "x.jsonl": jsonl(contractor(20))})
    shard = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(shard[:2000])
    with h5py.File(tmp_path / "none.h5", "w") as f:
        f["latents"] = np.zeros((0, 4, 2, 8, 8), np.float16)
    with h5py.File(tmp_path / "two.h5", "w") as f:
        f["latents"] = np.zeros((2, 4, 2, 8, 8), np.float16)
        f["actions"] = np.zeros(4, int)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "two.h5").read_bytes()[:1000])
    (tmp_path / "a.bz2").write_bytes(bz2.compress(shard))
    (tmp_path / "a.wav").write_bytes(b"RIFF1234WAVEfmt " + bytes(600))
    (tmp_path / "a.avi").write_bytes(b"RIFF1234AVI LIST" + bytes(600))
    os.mkfifo(tmp_path / "pipe")
    kinds = {"cut.tar": "cut", "none.h5": "latents", "two.h5": "latents", "cut.h5": "cut"}
    kinds |= {"a.bz2": "bzip2", "a.wav": "unknown", "a.avi": "film", "pipe": "device"}
    assert {name: kind_of(tmp_path / name) for name in kinds} == kinds

    # the sentence says what is wrong; a folder of LeRobot is no folder of shards
    write_tar(tmp_path / "features.tar", {"a@0.safetensors": b"xx"})
    (tmp_path / "v.mp4").write_bytes(film(20)[:900])
    (tmp_path / "set" / "meta").mkdir(parents=True)
    (tmp_path / "set" / "meta" / "info.json").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    sentences = {
        "none.h5": "is (0, 4, 2, 8, 8) float16: latents are",
        "features.tar": "header is damaged",
        "v.mp4": "no usable video: the mp4 is truncated",
        "set": "python -m droid --inspect",
        "loop": "leads nowhere",
    }
    for name, sentence in sentences.items():
        assert sentence in fails(tmp_path, "data.py", "--inspect", tmp_path / name)


def test_recordings_are_picked_by_name(tmp_path, shards, forkserver):
    """Bug: a name that is nowhere is no error; the scaler is fitted on recordings that training
    leaves out, or the other way round; what is held out is not among the picked ones."""
    path = str(shards / "shard-*.tar")
    keys = sorted(r.recording for r in open_records(path)[0])
    names = tmp_path / "names.txt"
    names.write_text(f"# a task\n{keys[0]}\n\n{keys[-1]}  # the best\n")
    only = read_names(names)
    train, _, val, _ = open_split(path, val_fraction=0.5, only=only)
    assert sorted(r.recording for r in train + val) == [keys[0], keys[-1]]
    assert len(train) == len(val) == 1
    lines, _ = open_lines([[path]], None, 0.5, only)
    assert [r.name for r in lines] == [r.name for r in train]

    for text, message in ((f"{keys[0]}\nnone", "1 of the 2 .*none"), ("none", "picks none")):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_split(path, only=read_names(names))
        with pytest.raises(ValueError, match=message):
            open_lines([[path]], None, 0.0, read_names(names))
    names.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no recording"):
        read_names(names)
    with pytest.raises(ValueError, match="does not go with streams"):
        open_split("http://127.0.0.1/a.tar", only=["a"])

    # as editors on Windows write it; a # inside a name is no comment
    names.write_bytes(b"\xef\xbb\xbfa b\r\nday#1 # good\r\n# end\r\n")
    assert read_names(names) == ["a b", "day#1"]
    names.write_bytes("a\n".encode("utf-16"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_names(names)

    # an empty variable of the shell is no reason to take everything
    for script in ("train_ac.py", "fit_scaler.py"):
        error = fails(tmp_path, script, "--data", path, "--recordings=")
        assert "--recordings : no such file" in error

    # the commands
    names.write_text(keys[0] + "\n")
    flags = ["--data", shards / "shard-*.tar", "--recordings", names, "--num_workers 0"]
    text = run(tmp_path, "fit_scaler.py", *flags, "--output", tmp_path / "s.pkl")
    assert "1 recordings" in text


# --- streams ---


class Server(http.server.SimpleHTTPRequestHandler):
    """A folder over HTTP; paths that start with /cut send half of the bytes they promise, /gone is
    404, /fail is 500."""

    def do_GET(self):
        if self.path.startswith("/fail"):
            return self.send_error(500)
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        with open(self.directory + self.path[4:], "rb") as f:
            raw = f.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2])
        self.close_connection = True

    def log_message(self, *a):
        pass


@pytest.fixture(scope="module")
def url(shards):
    handler = lambda *a: Server(*a, directory=str(shards))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_streams_give_the_recordings_of_the_files(shards, url):
    """Bug: keys cut at dots, members mixed up, or bytes lost on the way."""
    path = str(shards / "shard-000001.tar")
    with tarfile.open(path) as tar:
        expected = {m.name: tar.extractfile(m).read() for m in tar}
    for source in (f"pipe:cat {path}", f"{url}/shard-000001.tar", f"pipe:gzip -c {path}"):
        found = {
            f"{key}.{e}": raw
            for key, members in stream_recordings(source)
            for e, raw in members.items()
        }
        assert found == expected


def test_streamed_clips_are_the_indexed_clips(shards):
    """Bug: two paths to a clip that differ in pixels, in scaling or in where an action starts."""
    scaler = ActionScaler.from_moments(
        10, np.array([5.0, 1, 0.1, 0.2]), np.array([90.0, 40, 1, 2]), {}
    )
    reader = ClipReader(crop_size=HEIGHT, scaler=scaler, action_space=36)
    path = str(shards / "shard-000002.tar")
    records = records_of(path)[0]
    dataset = Clips(records, [1, 1], reader)
    stream = StreamedClips([f"pipe:cat {path}"], reader, shuffle=1)
    for clip in itertools.islice(stream, 16):
        number = [r.key for r in records].index(clip["key"])
        twin = dataset.read(
            number, (read_number(clip["video"][0]) + 0.5) / 240, np.random.default_rng(0)
        )
        assert all(torch.equal(clip[k], twin[k]) for k in ("video", "actions", "states"))


@pytest.mark.parametrize("world, workers", [(1, 1), (1, 2), (2, 2), (3, 3), (4, 8)])
def test_fewer_shards_than_readers_neither_repeat_nor_drop(shards, world, workers, monkeypatch):
    """Bug: readers without a shard hang or end early (ranks then wait for each other), or every
    reader gives every clip."""

    # 3 shards of 2 recordings, 8 clips each: 48 clips a pass
    urls = [f"pipe:cat {p}" for p in sorted(shards.glob("*.tar"))]
    units = world * workers
    parts = []
    for rank, worker in itertools.product(range(world), range(workers)):
        monkeypatch.setattr(
            torch.utils.data,
            "get_worker_info",
            lambda w=worker: types.SimpleNamespace(id=w, num_workers=workers),
        )
        unit = rank + world * worker
        share = len(range(unit, 48, units)) if units > 3 else 16 * len(range(unit, 3, units))
        stream = StreamedClips(urls, READER, seed=3, rank=rank, world=world, shuffle=1)
        parts.append(
            [(c["key"], read_number(c["video"][0])) for c in itertools.islice(stream, share)]
        )

    clips = [c for part in parts for c in part]
    assert all(parts) and len(clips) == 48 == len(set(clips))
    assert set(collections.Counter(k for k, _ in clips).values()) == {8}

    # eight places spread over the recording
    for key in {k for k, _ in clips}:
        starts = sorted(s for k, s in clips if k == key)
        assert all(30 * i <= s < 30 * (i + 1) for i, s in enumerate(starts))


def test_one_shard_serves_two_ranks_with_two_workers_for_ever(shards):
    """Bug: the loader of a rank ends after one pass, or waits for a worker that has nothing."""
    url = f"pipe:cat {shards / 'shard-000000.tar'}"
    for rank in range(2):
        loader = vpt_loader(url, 3, reader=READER, num_workers=2, rank=rank, world=2)
        batches = list(itertools.islice(loader, 8))
        assert all(len(b["video"]) == 3 and not b["bad"] for b in batches)

        # 16 clips a pass, 4 readers, 24 clips each rank
        assert len({c for b in batches for c in fingerprint(b)}) > 8


def test_streams_change_with_the_epoch_and_follow_the_seed(shards):
    """Bug: webdataset re-seeds its shuffle, so that every epoch has the same order."""
    urls = [f"pipe:cat {p}" for p in sorted(shards.glob("*.tar"))]

    def run(seed, epoch=0):
        clips = itertools.islice(StreamedClips(urls, READER, seed, epoch, shuffle=1), 96)
        return [c["key"] + str(read_number(c["video"][0])) for c in clips]

    one = run(seed=1)
    assert one == run(seed=1)
    assert one[48:] == run(seed=1, epoch=1)[:48]
    assert one[:48] != one[48:]
    assert one != run(seed=2)


def test_shuffle_buffer_loses_nothing(shards):
    """Bug: clips left behind in the buffer, or a wait for a buffer that so few clips can never
    fill."""
    url = f"pipe:cat {shards / 'shard-000000.tar'}"
    clips = [
        (c["key"], c["actions"].numpy().tobytes())
        for c in itertools.islice(StreamedClips([url], READER, shuffle=5), 40)
    ]
    assert len(set(clips)) == 40 and clips[:8] != sorted(clips[:8])
    first = next(iter(StreamedClips([url], READER, shuffle=10_000)))
    assert first["key"].startswith("6.10")


@pytest.mark.parametrize(
    "broken",
    [
        "pipe:head -c 90000 {}",
        "pipe:cat {} | head -c 40000; exit 3",
        "pipe:cat /nonexistent",
        "pipe:cat {}; exit 4",
    ],
)
def test_a_broken_stream_is_reported_not_looped(shards, url, broken):
    """Bug: a command that fails counts as the end of the shard, is run for ever, or stops the
    run."""
    source = broken.format(shards / "shard-000001.tar")
    stream = StreamedClips([source, f"{url}/shard-000000.tar"], READER, shuffle=1, seed=1)
    clips = list(itertools.islice(stream, 40))
    bad = [x for c in clips for x in c["bad"]]
    assert {x[0] for x in bad} == {source}
    assert 1 <= len(bad) <= 3
    assert all(x[2] for x in bad)


@pytest.mark.parametrize("broken", ["/cut/shard-000001.tar", "/gone.tar", "/fail.tar"])
def test_a_stream_whose_server_fails_ends(shards, url, broken, monkeypatch):
    """Bug: while a server does not answer, its shards count as bad ones and the run trains on
    others."""
    monkeypatch.setattr(disk, "WAIT", 0.01)
    stream = StreamedClips([url + broken, f"{url}/shard-000000.tar"], READER, shuffle=1, seed=1)
    with pytest.raises(ValueError, match=f"{broken} cannot be read: "):
        list(itertools.islice(stream, 40))


def test_a_disk_that_fails_ends_indexing(shards, monkeypatch):
    """Bug: an I/O error while mp4 indices are read counts as a damaged recording: encode.py leaves
    it out for good, training changes."""
    real = os.preadv
    path = str(shards / "shard-000001.tar")
    first = shard_index(path)[0][0].members["mp4"][0]

    def failing(fd, buffers, at):
        if at == first:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(
        OSError, match=f"{path} .* cannot be read: .*Input/output error: fix the disk"
    ):
        index_shards([path])


def test_a_stream_cut_inside_a_header_is_not_taken_for_whole(shards):
    """Bug: tarfile ends in silence there, and every later recording of the shard is lost in every
    epoch."""
    path = str(shards / "shard-000001.tar")
    header = shard_index(path)[0][1].members["mp4"][0] - 512
    for size in (header, header + 200):
        found = []
        with pytest.raises(tarfile.ReadError, match="ends before"):
            for key, _ in stream_recordings(f"pipe:head -c {size} {path}"):
                found.append(key)
        assert found == ["6.11_player-0"]


def test_a_stream_without_a_readable_clip_is_an_error(shards, url, tmp_path, mp4):
    """Bug: a loader that spins for ever over shards that give nothing."""
    empty = write_tar(tmp_path / "empty.tar", {"notes.txt": b"x"})
    short = write_tar(tmp_path / "short.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor(270))})
    gui = write_tar(
        tmp_path / "gui.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor(isGuiOpen=True))}
    )
    with pytest.raises(ValueError, match="gone.tar cannot be read.*404"):
        next(iter(vpt_loader(f"{url}/gone.tar", 1, reader=READER, num_workers=0)))

    for source, reason in (
        (f"pipe:cat {empty}", "no mp4 and jsonl"),
        (f"pipe:cat {short}", "270 lines"),
        ("pipe:cat /nonexistent", ""),
        (f"pipe:cat {gui}", "--gui drop"),
    ):
        reader = ClipReader(crop_size=HEIGHT, gui="drop")
        with pytest.raises(ValueError, match=f"no clip could be read.*{reason}"):
            next(iter(vpt_loader(source, 1, reader=reader, num_workers=0)))

    one = write_tar(tmp_path / "one.tar", {"a.mp4": mp4, "a.jsonl": jsonl(contractor())})
    stream = StreamedClips([f"pipe:cat {one}"], READER, rank=2, world=3, clips_per_recording=2)
    with pytest.raises(ValueError, match="2 clips for 3 ranks"):
        next(iter(stream))


def test_extensions_in_capitals(tmp_path, mp4):
    """Bug: KEY.MP4, as cameras write it, and KEY.JSONL are passed over without a word."""
    lines = jsonl(contractor())
    path = write_tar(tmp_path / "a.tar", {"a.MP4": mp4, "a.Jsonl": lines, "b.mp4": mp4})
    records, bad = shard_index(path)
    assert [(r.key, sorted(r.members)) for r in records] == [("a", ["jsonl", "mp4"])]
    assert bad == [(path, "b", "no jsonl beside it")]
    path = write_tar(tmp_path / "b.tar", {"a.MP4": mp4, "a.Jsonl": lines})
    assert list(stream_recordings(f"pipe:cat {path}")) == [("a", {"mp4": mp4, "jsonl": lines})]


def test_two_stars_are_any_number_of_folders(tmp_path, shards):
    """Bug: VPT/**/*.tar takes the shards one folder down, and leaves out all others without a word;
    a folder that is linked into itself is walked 41 times."""
    for folder in ("", "a", "a/b/c", ".hidden"):
        os.makedirs(tmp_path / folder, exist_ok=True)
        shutil.copy(shards / "shard-000000.tar", tmp_path / folder / "x.tar")
    os.symlink(tmp_path / "a", tmp_path / "a" / "b" / "again")
    expected = [str(tmp_path / p / "x.tar") for p in ("a/b/c", "a", "")]
    assert expand(str(tmp_path / "**" / "*.tar")) == expected
    assert expand(str(tmp_path / "**" / "x.tar")) == expected
    assert expand(str(tmp_path / "a" / "**" / "c" / "*.tar")) == expected[:1]
    assert expand(str(tmp_path / "*" / "*.tar")) == expected[1:2]


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.0, 1.5])
def test_a_fraction_that_is_none_is_refused(shards, value):
    """Bug: --val_fraction nan or -0.1 trains on everything and blames the recordings; 1.5 trains on
    one."""
    with pytest.raises(ValueError, match=f"--val_fraction {value:g} is no share"):
        open_split([[str(shards / "*.tar")]], val_fraction=value)
    with pytest.raises(ValueError, match=f"--val_fraction {value:g} is no share"):
        open_droid([str(shards)], val_fraction=value)


def test_recordings_of_one_key_that_cannot_be_held_out_are_said(tmp_path, mp4, capsys):
    """Bug: with video.mp4 in every shard --val_fraction holds out nothing, without a word; the
    scaler is then fitted on what another split holds out."""
    for i in range(3):
        lines = jsonl(contractor(seed=i))
        write_tar(tmp_path / f"{i}.tar", {"video.mp4": mp4, "video.jsonl": lines})
    records, _ = open_lines([[str(tmp_path / "*.tar")]], None, 0.3)
    assert len(records) == 3
    assert "--val_fraction holds out none of 3 recordings: all have the key video" in (
        capsys.readouterr().out
    )


def test_a_recording_without_its_partner_is_reported_in_streams(tmp_path, mp4):
    """Bug: the lone member is held in memory until the end and never mentioned."""
    path = write_tar(
        tmp_path / "a.tar", {"lone.mp4": mp4, "a.mp4": mp4, "a.jsonl": jsonl(contractor())}
    )
    clips = list(itertools.islice(StreamedClips([f"pipe:cat {path}"], READER, shuffle=1), 9))
    assert {c["key"] for c in clips} == {"a"} and "lone" in clips[8]["bad"][0][2]


def test_streams_and_files_cannot_be_mixed(shards):
    """Bug: the local half is silently left out."""
    with pytest.raises(ValueError, match="cannot be mixed"):
        vpt_loader([str(shards / "*.tar"), "pipe:cat x.tar"], 2, reader=READER)


# --- features ---

STEPS = 40


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Two feature shards as encode.py writes them; every number tells where it belongs."""
    folder = tmp_path_factory.mktemp("features")
    tensors = {}
    for s in range(2):
        members = {}
        for k in range(2):
            base = 1000 * (2 * s + k)
            z = (torch.arange(STEPS)[:, None, None] + base / 1000 * 64 + torch.zeros(1, 4, 8)).to(
                torch.bfloat16
            )
            actions = (base + torch.arange(STEPS - 1)[:, None] * 38 + torch.arange(38)).float()
            actions[:, 37] = (torch.arange(STEPS - 1) == 30).float()
            yaw = torch.arange(STEPS, dtype=torch.float64) * 0.5 + 100
            states = torch.stack(
                [yaw, torch.linspace(-1, 1, STEPS, dtype=torch.float64)], dim=1
            ).float()
            name = f"r{s}{k}@00000"
            tensors[name] = {"z": z, "actions": actions, "states": states}
            meta = {"encode": "tubelet", "fps": "5.0", "crop_size": "64"}
            members[f"{name}.safetensors"] = safetensors_bytes(tensors[name], metadata=meta)
        write_tar(folder / f"shard-{s:06d}.tar", members)
    return folder, tensors


@pytest.mark.parametrize("space", [13, 36, 38])
def test_feature_clips_are_the_right_rows(features, space):
    """Bug: a row too early or late against the actions; columns of another action space; absolute
    yaw where the model expects relative."""
    folder, tensors = features
    scaler = ActionScaler.from_moments(
        10, np.array([5.0, 1, 0.1, 0.2]), np.array([90.0, 40, 1, 2]), {}
    )
    reader = ClipReader(action_space=space, scaler=scaler)
    records, bad = records_of(*sorted(folder.glob("*.tar")))
    assert not bad and [r.length for r in records] == [STEPS] * 4

    dataset = Clips(records, [STEPS] * 4, reader)
    columns = [vpt.ACTION_SPACES[38].index(n) for n in vpt.ACTION_SPACES[space]]
    for number, record in enumerate(records):
        t = tensors[record.key]

        # a window, or a share of 33 starts
        for place, start in ((0, 0), (2, 16), (4, 32), (0.0, 0), (0.5, 16), (1 - 1e-12, 32)):
            clip = dataset[(0, 0, number, place)]
            assert clip["key"] == record.key
            assert torch.equal(clip["z"], t["z"][start : start + 8])
            assert clip["z"].dtype == torch.bfloat16

            expected = t["actions"][start : start + 7].double().numpy()[:, columns]
            expected[:, :4] = (expected[:, :4] - scaler.mean) / scaler.scale
            np.testing.assert_allclose(clip["actions"], expected, rtol=1e-6)

            yaw = 0.5 * np.arange(8)
            np.testing.assert_allclose(
                clip["states"][:, 0], np.arctan2(np.sin(yaw), np.cos(yaw)), atol=1e-5
            )
            assert torch.equal(clip["states"][:, 1], t["states"][start : start + 8, 1])


def test_feature_clips_read_their_own_rows_only(features, monkeypatch):
    """Bug: the whole member read for eight steps."""
    folder, _ = features
    records = records_of(*sorted(folder.glob("*.tar")))[0]
    opened = []

    class Counted(Slice):
        def close(self):
            opened.append(self.bytes_read)
            super().close()

    monkeypatch.setattr(feature_files, "Slice", Counted)
    Clips(records, [1] * 4, READER).read(0, 2, np.random.default_rng(0))
    header = 8 + 400
    assert sum(opened) <= 8 * 4 * 8 * 2 + 7 * 38 * 4 + 8 * 2 * 4 + header


def test_noise_and_gui_drop_work_on_features_too(features):
    """Bug: flags that only the video path obeys."""
    folder, _ = features
    plain, noisy = (
        vpt_loader(str(folder / "*.tar"), 16, reader=ClipReader(action_noise=n), num_workers=0)
        for n in (0.0, 0.5)
    )
    a = next(iter(plain))
    b = next(iter(noisy))
    diff = (b["actions"] - a["actions"]).numpy()
    assert a["key"] == b["key"]
    assert 0.3 < diff[..., :4].std() < 0.7
    assert not diff[..., 4:].any()
    assert torch.equal(a["z"], b["z"])

    reader = ClipReader(gui="drop", action_space=38)
    batch = next(iter(vpt_loader(str(folder / "*.tar"), 40, reader=reader, num_workers=0)))
    assert not batch["actions"][..., 37].any() and not batch["bad"]


def test_damaged_features_are_reported(features, tmp_path):
    """Bug: z stands last in the file: a cut there went unnoticed until a clip needed it."""
    raw = safetensors_bytes(features[1]["r00@00000"])
    cases = {
        "cut": raw[:-4],
        "half": raw[: len(raw) // 2],
        "empty": b"",
        "text": b"hello" * 9,
        "header": b"\xff" * 8 + raw[8:],
        "other": safetensors_bytes({"x": torch.zeros(3)}),
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    path = write_tar(
        tmp_path / "a.tar",
        {f"{k}@00000.safetensors": v for k, v in cases.items()} | {"ok@00000.safetensors": raw},
    )
    records, bad = records_of(path)
    assert [r.key for r in records] == ["ok@00000"]
    assert {b[1].partition("@")[0] for b in bad} == set(cases)


def test_feature_shards_that_disagree_are_refused(features, shards, tmp_path):
    """Bug: features of two encoders or crops in one run."""
    folder, tensors = features
    records = records_of(*sorted(folder.glob("*.tar")))[0]
    assert feature_settings(records) == {
        "encode": "tubelet",
        "fps": "5.0",
        "crop_size": "64",
        "embed_dim": 8,
    }

    raw = safetensors_bytes(
        tensors["r00@00000"], metadata={"encode": "tubelet", "fps": "5.0", "crop_size": "128"}
    )
    other = records_of(write_tar(tmp_path / "other.tar", {"x@00000.safetensors": raw}))[0]
    with pytest.raises(ValueError, match="other.tar.*other settings"):
        feature_settings(records + other)
    with pytest.raises(ValueError, match="holds video"):
        feature_settings(records + records_of(shards / "shard-000000.tar")[0])


def test_an_epoch_without_a_number_is_one_pass(shards, features):
    """Bug: an epoch of one batch, or of millions of overlapping clips."""
    count = lambda loader: loader.batch_sampler.batches  # noqa: E731
    assert count(loader_of(shards, batch_size=2, batches_per_epoch=None)) == 6 * 300 // 64 // 2
    assert (
        count(loader_of(shards, batch_size=1, batches_per_epoch=None, world=4))
        == 6 * 300 // 64 // 4
    )
    assert (
        count(vpt_loader(str(features[0] / "*.tar"), 2, reader=READER, num_workers=0))
        == 4 * STEPS // 8 // 2
    )
