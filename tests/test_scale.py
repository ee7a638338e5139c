"""Shards at URLs through a server that fails, the cache's limit, ranks that die under torchrun,
runs that change their number of ranks."""

import collections
import http.server
import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import fsspec
import numpy as np
import pytest

import checkpoint
from data import Clips, Order, open_split, vpt_loader
from files import disk, remote
from files.disk import Unreachable
from files.remote import cached
from files.shards import Slice, index_shards, read_ticks
from files.streams import Stream, StreamedClips, stream_recordings
from files.vpt import ClipReader
from tests.harness import (
    HEIGHT,
    PLAN,
    ROOT,
    TINY,
    Run,
    fails,
    numbers,
    rows_of,
    run,
    same_run,
    start_ranks,
    words,
)

pytestmark = pytest.mark.usefixtures("forkserver")
READER = ClipReader(crop_size=HEIGHT)


class Ranged(http.server.BaseHTTPRequestHandler):
    """Files of `folder`, parts of them if asked and if `ranges`; faults: {name: what the next GETs
    of it meet}; counts what it sends."""

    folder = ""
    ranges = True
    faults = {}
    sent = {}
    gets = {}
    slow = 0.0

    def do_GET(self, body=True):
        name = os.path.basename(self.path.split("?")[0])
        path = os.path.join(self.folder, name)
        fault = self.faults[name].pop(0) if body and self.faults.get(name) else None
        if fault in (403, 503):
            return self.send_error(fault)
        if not os.path.exists(path):
            return self.send_error(404)
        data = open(path, "rb").read()
        version = f'"{len(data)}-{os.stat(path).st_mtime_ns}"'
        wanted = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if self.ranges
            else None
        )
        self.send_response_only(206 if wanted else 200)
        if wanted:
            a = int(wanted[1])
            b = min(int(wanted[2] or len(data)), len(data) - 1)
            self.send_header("Content-Range", f"bytes {a}-{b}/{len(data)}")
            data = data[a : b + 1]
        data = data + b"more" if fault == "long" else data
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", version)
        self.end_headers()
        if body:
            self.gets[name] = self.gets.get(name, 0) + (len(data) > 1)
            data = data[: len(data) // 2] if fault == "cut" else data
            for i in range(0, len(data), 1 << 14):
                time.sleep(self.slow)
                self.wfile.write(data[i : i + (1 << 14)])
            self.sent[name] = self.sent.get(name, 0) + len(data)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *a):
        pass


@pytest.fixture
def server(shards):
    handler = type(
        "Handler", (Ranged,), {"folder": str(shards), "faults": {}, "sent": {}, "gets": {}}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(
            url=f"http://127.0.0.1:{s.server_port}", handler=handler, port=s.server_port
        )
        s.shutdown()


def shard(url, folder, gigabytes=1.0):
    return cached([[url]], str(folder), gigabytes, str)[0][0]


def take(loader, count):
    """Batches as what can be compared."""
    return [
        (b["key"], b["video"].numpy().tobytes(), b["actions"].numpy().tobytes())
        for b in itertools.islice(loader, count)
    ]


def copies(folder):
    return sorted(os.listdir(os.path.join(folder, "shards")))


# --- URLs through the cache ---


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_shards_in_the_cache_are_local_shards(shards, server, tmp_path, monkeypatch, scheme):
    """Bug: other clips or another order than from the files; a shard that is copied by each worker,
    or again by the next run."""
    url = server.url
    local = vpt_loader(str(shards / "*.tar"), 2, reader=READER, num_workers=0)
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(shards), "/scale", recursive=True)
        url = "memory://scale"
    remote_data = url + "/shard-{000000..000002}.tar"
    expected = take(local, 12)
    options = {"reader": READER, "cache_dir": str(tmp_path / "cache")}
    assert take(vpt_loader(remote_data, 2, num_workers=2, **options), 12) == expected
    assert len(copies(tmp_path / "cache")) == 3

    bodies = {n: os.path.getsize(shards / n) for n in server.handler.sent}

    # once, and what the index looked at
    assert all(
        size <= server.handler.sent[n] < 2 * size + remote.BLOCK for n, size in bodies.items()
    )

    server.handler.sent.clear()
    data = open_split(
        [
            [p]
            for p in cached(
                [[remote_data.replace("{000000..000002}", f"00000{i}") for i in range(3)]],
                **{"folder": str(tmp_path / "cache"), "gigabytes": 1.0, "print0": str},
            )[0]
        ]
    )
    assert take(vpt_loader(data[:2], 2, reader=READER, num_workers=0), 12) == expected
    assert not server.handler.sent

    ticks = [read_ticks(r) for r in data[0][:2]]
    assert not np.array_equal(ticks[0].motion, ticks[1].motion)


def test_an_index_reads_ranges_only(server, shards, tmp_path, monkeypatch):
    """Bug: every shard is copied before the first step; the index is made again by each rank and
    run."""
    monkeypatch.setattr(remote, "BLOCK", 1 << 12)
    path = shard(f"{server.url}/shard-000001.tar", tmp_path)
    folder = tmp_path
    found, bad = index_shards([path])
    local, _ = index_shards([str(shards / "shard-000001.tar")])
    assert [(r.key, {k: tuple(v) for k, v in r.members.items()}, r.length) for r in found] == [
        (r.key, r.members, r.length) for r in local
    ]
    assert not bad
    assert not copies(folder)
    assert found[0].shard.size == os.path.getsize(shards / "shard-000001.tar")
    assert 0 < server.handler.sent["shard-000001.tar"] < 0.5 * found[0].shard.size

    server.handler.sent.clear()
    assert index_shards([shard(f"{server.url}/shard-000001.tar", folder)])[0] == found
    assert not server.handler.sent

    # then it is copied for its index, once
    server.handler.ranges = False
    path = shard(f"{server.url}/shard-000002.tar", folder)
    found, bad = index_shards([path])
    assert len(found) == 2
    assert not bad
    assert len(copies(folder)) == 1
    assert found[0].shard == path

    os.close(path.open())

    # the question whether it serves ranges, and the copy
    assert server.handler.gets["shard-000002.tar"] == 2


def test_damaged_notes_are_made_again(server, tmp_path):
    """Bug: a cache that a crash of the machine damaged ends every later run in a JSON error."""
    path = shard(f"{server.url}/shard-000001.tar", tmp_path)
    found = index_shards([path])
    (notes,) = [n for n in (tmp_path / "notes").iterdir() if n.suffix == ""]
    whole = notes.read_bytes()
    for damage in (b"", whole[:-7], b"\0" * len(whole)):
        notes.write_bytes(damage)
        assert index_shards([path]) == found and notes.read_bytes() == whole


def test_faults_are_tried_again_up_to_a_bound(server, shards, tmp_path):
    """Bug: a busy server or a cut connection ends the run; bytes are lost where a transfer goes on;
    tries without end, or an error that does not say what failed."""
    name = "shard-000000.tar"
    raw = (shards / name).read_bytes()
    server.handler.faults[name] = [503, "cut", 503, "cut", 503]
    path = shard(f"{server.url}/{name}", tmp_path)
    fd = path.open()
    assert os.pread(fd, len(raw) + 1, 0) == raw and not server.handler.faults[name]

    os.close(fd)
    os.unlink(path.copy)
    for faults, text in (
        ([503] * 99, r"shard-000000.tar cannot be read: HTTPError: HTTP Error 503: .* \(5 times\)"),
        ([403], r"HTTP Error 403: .* \(at once, so not tried again\)"),
        (["long"] * 99, rf"{len(raw) + 4} bytes came, the server had said {len(raw)} \(5 times\)"),
    ):
        server.handler.faults[name] = list(faults)
        with pytest.raises(Unreachable, match=text):
            path.open()
        assert len(server.handler.faults[name]) == max(len(faults) - 5, 0)
        assert not copies(tmp_path)

    server.handler.faults[name] = [503] * 99
    with pytest.raises(Unreachable, match="5 times"):
        index_shards([path])

    server.handler.faults[name] = []
    with pytest.raises(Unreachable, match="nothing.tar cannot be read: .*404.*not tried again"):
        shard(f"{server.url}/nothing.tar", tmp_path)
    with pytest.raises(Unreachable, match="no.tar cannot be read.*not tried again"):
        shard("memory://scale/no.tar", tmp_path)
    with pytest.raises(ValueError, match="pipe:cat x: a command has no size"):
        shard("pipe:cat x", tmp_path)


def test_the_waits_grow_and_are_bounded(monkeypatch):
    """Bug: a server that restarts is hammered, or given up after a second; a wait of hours."""
    waits = []
    calls = []
    monkeypatch.setattr(disk, "WAIT", 1.0)
    monkeypatch.setattr(disk.time, "sleep", waits.append)
    with pytest.raises(Unreachable, match=r"x cannot be read: KeyError: 'a' \(5 times\)"):
        disk.with_retries("x", lambda: calls.append(1) or {}["a"])
    assert len(calls) == 5
    assert waits[0] == 0
    assert np.allclose(waits[1:], [1, 3, 9, 27], rtol=0.2)

    monkeypatch.setattr(disk, "WAIT", 20.0)
    with pytest.raises(Unreachable):
        disk.with_retries("x", lambda: {}["a"])
    assert max(waits[5:]) <= 36


def test_a_shard_that_changes_is_not_mixed(server, shards, tmp_path):
    """Bug: half of a copy is of the old version, or a copy of the old one serves a run that means
    the new one."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    server.handler.folder = str(folder)
    old = shard(f"{server.url}/a.tar", tmp_path / "cache")
    os.close(old.open())
    (folder / "a.tar").write_bytes((shards / "shard-000001.tar").read_bytes())
    new = shard(f"{server.url}/a.tar", tmp_path / "cache")
    fd = new.open()
    assert os.pread(fd, new.size + 1, 0) == (shards / "shard-000001.tar").read_bytes()
    assert new.copy != old.copy

    os.close(fd)
    os.unlink(new.copy)

    # as long, and another
    (folder / "a.tar").write_bytes(bytes(new.size))
    with pytest.raises(Unreachable, match="a.tar has changed since this run began: start it again"):
        new.open()

    stream = Stream(f"{server.url}/a.tar")
    first = stream.read(1000)
    (folder / "a.tar").write_bytes(b"x" * 5000)
    stream.source.close()

    # as after a failure
    stream.source = None
    with pytest.raises(Unreachable, match="changed while it was read"):
        stream.read(1000)
    assert len(first) == 1000


# --- the limit ---


def test_the_oldest_copy_goes_and_none_in_use(server, shards, tmp_path, monkeypatch):
    """Bug: the cache grows over its limit, evicts what was just used, or takes a file away from who
    reads it."""
    size = max(os.path.getsize(p) for p in shards.glob("*.tar"))
    names = [f"{server.url}/shard-00000{i}.tar" for i in range(3)]
    said = []
    paths = cached([names], str(tmp_path), 2.2e-9 * size, said.append)[0]
    a, b, c = tuple(paths)
    assert "3 shards at URLs" in said[0]
    assert re.search(r"WARNING: only .* about 2\d% of the clips", said[1])

    # b was used longest ago
    for path in (a, b, a):
        os.close(path.open())
    os.close(c.open())
    assert copies(tmp_path) == sorted(os.path.basename(p.copy) for p in (a, c))

    fd = a.open()
    os.close(c.open())

    # c goes, though a was used before it
    os.close(b.open())
    assert copies(tmp_path) == sorted(os.path.basename(p.copy) for p in (a, b))

    other = b.open()
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with pytest.raises(Unreachable, match="no room in .* all of it is in use: raise --cache_size"):
        c.open()
    assert os.pread(fd, 512, 0) == open(shards / "shard-000000.tar", "rb").read(512)

    threading.Timer(0.3, os.close, [other]).start()
    monkeypatch.setattr(remote, "PATIENCE", 20.0)

    # as soon as b is not in use
    os.close(c.open())
    os.close(fd)
    assert copies(tmp_path) == sorted(os.path.basename(p.copy) for p in (a, c))
    with pytest.raises(ValueError, match="--cache_size is .* raise it"):
        shard(names[0], tmp_path, 1e-6)


def open_and_say(path, out):
    fd = path.open()
    out.put(len(os.pread(fd, path.size + 1, 0)))


def test_processes_share_one_transfer_and_survive_a_kill(server, shards, tmp_path):
    """Bug: each rank of a node copies the shard for itself; a killed copier leaves a lock, or half
    a shard that counts as whole."""
    name = "shard-000001.tar"
    fork = multiprocessing.get_context("fork")
    path = shard(f"{server.url}/{name}", tmp_path)
    out = fork.Queue()
    server.handler.slow = 0.02
    first = fork.Process(target=open_and_say, args=(path, out))
    first.start()
    while name not in server.handler.gets:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert copies(tmp_path) == [os.path.basename(path.copy) + ".part"]

    server.handler.gets.clear()
    others = [fork.Process(target=open_and_say, args=(path, out)) for _ in range(4)]
    for p in others:
        p.start()
    assert [out.get(timeout=30) for _ in others] == [path.size] * 4

    for p in others:
        p.join()
    assert server.handler.gets == {name: 1}
    assert copies(tmp_path) == [os.path.basename(path.copy)]

    # a crash of the machine
    os.truncate(path.copy, path.size - 1)
    os.close(path.open())
    assert server.handler.gets == {name: 2}
    assert os.path.getsize(path.copy) == path.size


def test_shards_in_a_bucket(shards, tmp_path, monkeypatch):
    """Bug: what works with a web server does not with S3: other names of size and version, other
    errors."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")

    # another test's has another address
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    bucket = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    bucket.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "a",
    }
    for k, v in (
        settings
        | {"AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}
    ).items():
        monkeypatch.setenv(k, v)
    client = boto3.client("s3")
    client.create_bucket(Bucket="scale")
    for p in shards.glob("*.tar"):
        client.upload_file(str(p), "scale", p.name)
    data = "s3://scale/shard-{000000..000002}.tar"
    options = {"reader": READER, "cache_dir": str(tmp_path)}
    expected = take(vpt_loader(str(shards / "*.tar"), 2, reader=READER, num_workers=0), 6)
    assert take(vpt_loader(data, 2, num_workers=1, **options), 6) == expected

    streamed = StreamedClips(["s3://scale/shard-000000.tar"], READER, shuffle=1)
    assert {c["key"] for c in itertools.islice(streamed, 16)} == {"6.10_player-0", "6.10_player-1"}
    with pytest.raises(Unreachable, match="s3://scale/none.tar cannot be read.*not tried again"):
        shard("s3://scale/none.tar", tmp_path)

    bucket.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory, shards):
    """A folder with scaler.pkl, features/ of two shards and held/ of the third; .features are flags
    to train on them."""
    folder = tmp_path_factory.mktemp("world")
    flags = ["--data", shards / "shard-{000000..000001}.tar"]
    flags += ["--output", folder / "scaler.pkl", "--num_workers 0"]
    run(folder, "fit_scaler.py", *flags)
    for name, data in (("features", "shard-{000000..000001}.tar"), ("held", "shard-000002.tar")):
        flags = ["--data", shards / data, "--out", folder / name]
        flags += ["--encoder vit_tiny --crop_size 32"]
        run(folder, "encode.py", *flags)
    features = ["--data", folder / "features" / "*.tar", "--val_data", folder / "held" / "*.tar"]
    return types.SimpleNamespace(
        folder=folder, features=["--scaler", folder / "scaler.pkl", TINY, *features]
    )


# --- streams, counters ---


def test_a_stream_goes_on_where_it_was_cut(server, shards):
    """Bug: a transfer that breaks costs the rest of the shard, or its first bytes come twice."""
    name = "shard-000001.tar"
    expected = list(stream_recordings(f"pipe:cat {shards / name}"))
    for ranges in (True, False):
        server.handler.ranges = ranges
        server.handler.faults[name] = [503, "cut", 503, "cut"] if ranges else [503, "cut"]
        assert list(stream_recordings(f"{server.url}/{name}")) == expected
        assert not server.handler.faults[name]


def test_bytes_are_those_that_were_read(shards):
    """Bug: a counter of bytes that counts bad clips not at all, or what other clips read."""
    records, _ = index_shards([str(p) for p in sorted(shards.glob("*.tar"))])
    dataset = Clips(records, [1.0] * 6, READER)
    before = Slice.total
    clips = [dataset[(0, i, *dataset.locate(u))] for i, u in enumerate(np.linspace(0, 0.99, 12))]
    assert sum(c["bytes"] for c in clips) == Slice.total - before
    assert min(c["bytes"] for c in clips) > 0
    path = str(shards / "shard-000000.tar")
    size = sum(n for r in records if r.shard == path for _, n in r.members.values())
    stream = list(itertools.islice(StreamedClips([f"pipe:cat {path}"], READER, shuffle=1), 16))
    assert sum(c["bytes"] for c in stream) == size


def test_train_ac_reads_urls_through_the_cache(world, server, tmp_path):
    """Bug: a run from URLs is not the run from files, does not resume exactly, or leaves out what
    it cannot reach without a word."""
    server.handler.folder = str(world.folder / "features")
    flags = [
        TINY,
        "--scaler",
        world.folder / "scaler.pkl",
        "--epochs 2 --warmup 0 --anneal 0 --ipe 4 --val_data",
        world.folder / "held" / "*.tar",
    ]
    options = [*flags, "--out_dir", tmp_path / "local"]
    options += ["--data", world.folder / "features" / "*.tar"]
    run(tmp_path, "train_ac.py", *options)
    flags += [
        "--data",
        server.url + "/shard-{000000..000001}.tar",
        "--cache_size 1 --cache_dir",
        tmp_path / "cache",
    ]
    text = run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "url", "--max_steps 6")
    assert "2 shards at URLs" in text and len(copies(tmp_path / "cache")) == 2

    run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "url", "--num_workers 1 --resume")
    same_run(tmp_path / "local", tmp_path / "url")

    rates = [numbers(tmp_path / f, "bytes_per_s", "clips_per_s") for f in ("local", "url")]

    # 8 steps of 16 patches x 192 x 2 bytes, actions and states, and headers
    for r in rates:
        per_clip = r[:, 0] / r[:, 1]
        assert (per_clip > 8 * 4 * 192 * 2).all()
        assert np.allclose(per_clip, per_clip[0])
    server.handler.faults["shard-000001.tar"] = [403] * 99
    for p in (tmp_path / "cache" / "shards").iterdir():
        p.unlink()
    line = fails(
        tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "refused", "--num_workers 1"
    )
    assert line.startswith(
        f"error: {server.url}/shard-000001.tar cannot be read: ClientResponseError: 403,"
        " message='Forbidden'"
    ), line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_a_server(world, server, tmp_path, workers):
    """Bug: a run whose shard is being tried again hears of SIGTERM a minute later, when SLURM has
    killed it, or takes the signal for a failure and tries on; or the steps since the last
    checkpoint are lost."""
    # every recording of a shard gives eight clips: the loader asks for a shard again and again
    flags = [TINY, f"--val_clips 0 --batch_size 2 --log_every 1 --num_workers {workers}"]
    flags += ["--encoder vit_tiny --epochs 2 --ipe 999 --warmup 0 --anneal 0 --scaler"]
    flags += [world.folder / "scaler.pkl", "--data", server.url + "/shard-{000000..000001}.tar"]
    waiting = Run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "run")
    csv = tmp_path / "run" / "train.csv"
    assert waiting.until(lambda: csv.exists() and len(rows_of(csv)) >= 2), waiting.text()

    # the server is down from now on: every GET fails
    down = [503] * 999
    faults = {f"shard-{i:06}.tar": down for i in range(2)}
    server.handler.faults.update(faults)
    assert waiting.until(lambda: len(down) < 999), waiting.text()
    os.kill(waiting.process.pid, signal.SIGTERM)
    code, text = waiting.wait()
    assert code == 0 and "Traceback" not in text, text
    assert "stopped at epoch 0" in text and "continue with --resume" in text

    # five tries would be an error, and the run would end with that
    assert len(down) > 999 - 5
    state, _ = checkpoint.load_latest(tmp_path / "run")
    assert state["itr"] == len(rows_of(csv)) > 1


def test_encode_reads_urls_through_the_cache(world, shards, server, tmp_path):
    """Bug: features of shards at URLs are not those of the files, or a second run copies them
    again."""
    flags = [
        "--data",
        server.url + "/shard-{000000..000001}.tar",
        "--encoder vit_tiny --crop_size 32 --out",
        tmp_path / "f",
        "--cache_dir",
        tmp_path / "cache",
    ]
    run(tmp_path, "encode.py", *flags)
    for path in (world.folder / "features").glob("*.tar"):
        assert (tmp_path / "f" / path.name).read_bytes() == path.read_bytes()

    gets = dict(server.handler.gets)
    assert "encoded 0 of 2 shards" in run(tmp_path, "encode.py", *flags)
    assert server.handler.gets == gets and len(copies(tmp_path / "cache")) == 2


# --- ranks ---


def test_ranks_times_micro_batches_can_change_between_runs(world, tmp_path):
    """Bug: another number of ranks with the same global batch takes other clips, at the end of an
    epoch or inside one; a changed global batch is not said."""
    flags = [*world.features, PLAN, "--ipe 4 --batch_size 2 --val_clips 0 --out_dir"]

    def both(*more):
        for rank in (ranks := start_ranks(tmp_path, "train_ac.py", *flags, *more)):
            assert rank.wait()[0] == 0, rank.text()
        return ranks[0].text()

    both(tmp_path / "two", "--max_steps 11")
    both(tmp_path / "changed", "--max_steps 4")
    options = [*flags, tmp_path / "changed", "--resume --grad_accum 2 --max_steps 6"]
    text = run(tmp_path, "train_ac.py", *options)
    assert "1 ranks, not 2: the same 4 clips in each step as before" in text
    assert "2 ranks, not 1: the same 4 clips" in both(
        tmp_path / "changed", "--resume --max_steps 9"
    )

    whole = numbers(tmp_path / "two", "jloss", "sloss")
    np.testing.assert_allclose(
        numbers(tmp_path / "changed", "jloss", "sloss"), whole[:9], rtol=1e-5
    )

    text = run(tmp_path, "train_ac.py", *flags, tmp_path / "changed", "--resume --max_steps 11")
    assert (
        "a step now takes 2 clips, not 4: other clips from here on; in epoch 2 some clips come"
        " twice and others not at all" in text
    )

    other = numbers(tmp_path / "changed", "jloss", "sloss")
    assert len(other) == 11 and np.abs(other[9:] / whole[9:] - 1).max() > 1e-3

    # and it ends well
    assert "nothing left to do: 11 steps are done" in both(
        tmp_path / "two", "--resume --max_steps 11"
    )


def test_ranks_that_find_different_checkpoints_end(world, tmp_path):
    """Bug: --out_dir is a disk of each node's own: after a restart one rank goes on at step 4, the
    other, with no moments, at 0."""
    flags = [*world.features, PLAN, "--ipe 4 --batch_size 2 --val_clips 0"]
    run(tmp_path, "train_ac.py", *flags, "--max_steps 4 --out_dir", tmp_path / "a")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1]),
        }

    ranks = [
        Run(
            tmp_path,
            "train_ac.py",
            *flags,
            "--resume --out_dir",
            tmp_path / out,
            env=env | {"RANK": str(r), "LOCAL_RANK": "0"},
        )
        for r, out in enumerate("ab")
    ]
    for rank in ranks:
        code, text = rank.wait()
        assert code
        assert "ranks find different checkpoints in" in text
        assert "(None, checkpoint-epoch001.pth.tar): it must be one folder" in text


def test_the_order_is_dealt_by_global_batch():
    """Bug: the clips of a step depend on how many ranks, clips a rank and micro-batches make its
    global batch."""
    dataset = types.SimpleNamespace(seed=3, locate=lambda u: (u,))
    steps = collections.defaultdict(set)
    for world_size, size, accum in ((1, 8, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4)):
        parts = [
            iter(Order(dataset, size, 5 * accum, 2, 3 * accum, r, world_size))
            for r in range(world_size)
        ]

        # over the end of the epoch
        for step in range(6):
            clips = [item for part in parts for _ in range(accum) for item in next(part)]
            assert len(set(clips)) == 8
            steps[step].add(frozenset(clips))
    assert all(len(found) == 1 for found in steps.values())
    assert len(set.union(*steps.values())) == 6


def agent(port, log, flags):
    """One node's torchrun, in a session of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--max_restarts=3",
        "--rdzv_backend=c10d",
        "--rdzv_id=test",
        f"--rdzv_endpoint=localhost:{port}",
        "train_ac.py",
        *words(flags),
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=open(log, "a"),
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )


def holds(pid, port):
    """Whether a process listens on a port."""
    with open("/proc/net/tcp6") as f, open("/proc/net/tcp") as g:
        inodes = {
            x[9] for x in map(str.split, [*f, *g]) if x[1].endswith(f":{port:04X}") and x[3] == "0A"
        }
    links = (f"/proc/{pid}/fd/{n}" for n in os.listdir(f"/proc/{pid}/fd"))
    return bool(
        {f"socket:[{i}]" for i in inodes}
        & {os.readlink(x) for x in links if os.path.exists(x) or os.path.islink(x)}
    )


def worker_of(process):
    """Process id of the training process under an agent."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        for child in f.read().split():
            with open(f"/proc/{child}/cmdline") as g:
                if "train_ac.py" in g.read():
                    return int(child)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/task"), reason="finds the agents' workers in /proc"
)
def test_two_nodes_survive_a_dead_rank_and_a_dead_node(world, tmp_path):
    """Bug: a rank that dies hangs the others or ends the job; those started again begin anew, or go
    on with other clips or moments."""
    flags = [*world.features, PLAN, "--ipe 60 --batch_size 2 --val_clips 0 --out_dir"]
    whole = start_ranks(tmp_path, "train_ac.py", *flags, tmp_path / "whole")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    logs = [tmp_path / "node0.txt", tmp_path / "node1.txt"]
    nodes = [agent(port, log, [*flags, tmp_path / "run", "--resume"]) for log in logs]

    def until(rows, saved="train.csv"):
        # a checkpoint is written while the next steps are made
        path = tmp_path / "run" / "train.csv"
        end = time.monotonic() + 100
        while not (
            os.path.exists(path.with_name(saved))
            and os.path.exists(path)
            and len(rows_of(path)) >= rows
        ):
            assert time.monotonic() < end, said()
            assert None in [n.poll() for n in nodes], said()
            time.sleep(0.002)

    def said():
        return logs[0].read_text() + logs[1].read_text()

    # of 180, saved at 60
    until(80, "checkpoint-epoch001.pth.tar")
    os.kill(worker_of(nodes[1]), signal.SIGKILL)
    while said().count("resumed from") < 1:
        until(1)

    # saved at 120
    until(130, "checkpoint-epoch002.pth.tar")

    # the agent that keeps the store cannot be spared
    hosts = [p for p in nodes if holds(p.pid, port)]
    lost = nodes[0] if hosts == [nodes[1]] else nodes[1]

    # the node is gone
    for pid in (lost.pid, worker_of(lost)):
        os.kill(pid, signal.SIGKILL)
    lost.wait()

    # the same line again, as a scheduler does
    nodes[nodes.index(lost)] = agent(port, logs[1], [*flags, tmp_path / "run", "--resume"])
    for node in nodes:
        assert node.wait(timeout=100) == 0, said()
    assert re.findall(r"resumed from \S+ at epoch (\d), itr (\d+)", said()) == [
        ("1", "0"),
        ("2", "0"),
    ], said()
    for rank in whole:
        assert rank.wait()[0] == 0, rank.text()
    same_run(tmp_path / "whole", tmp_path / "run")


# --- the model ---


def test_the_scaling_model_does_its_sums(monkeypatch):
    """Bug: what one GPU needs is taken for what all need, bits for bytes, or the encoder's work for
    that of runs on features."""

    # bench.data sets its own
    monkeypatch.setenv("NANOJEPA_CACHE", os.environ["NANOJEPA_CACHE"])
    from bench.scaling import cluster, flops, predictor_of, small

    args = types.SimpleNamespace(
        share=0.4, tflops=1000, batch_size=8, nvlink=450, net=400, cores=20, storage=5
    )
    found = {"decode": (0.2, 2e6), "features": (0.001, 4e6)}
    work = {"encoder": 1e12, "predictor": 4e12}
    video, features = (
        cluster(64, source, found, work, 1.2e9, args) for source in ("video", "features")
    )
    wanted = {
        "step ms": 100,
        "clips/s": 64 * 80,
        "cores/GPU": 16,
        "GB/s a node": 1.28,
        "GB/s in all": 10.24,
        "all-reduce ms": 47.25,
    }
    assert all(np.isclose(video[k], v) for k, v in wanted.items())
    assert np.isclose(video["of backward"], 47.25e-3 / (64 / 3 * 2.5e-3))
    assert (video["first"], video["answer"]) == ("storage", "--cache_dir")
    assert np.isclose(video["load"], 10.24 / 5)
    assert np.isclose(features["step ms"], 80)
    assert np.isclose(features["GB/s a node"], 3.2)
    assert np.isclose(features["cores/GPU"], 0.1)

    few = cluster(8, "video", found, work, 1.2e9, args)
    assert (few["first"], few["answer"]) == ("decode", "-")
    assert np.isclose(few["all-reduce ms"], 1e3 * 1.75 * 1.2e9 / 450e9)

    full = flops(small(1024, 24, 16, 4096, "meta"), predictor_of(24, 1024, "meta").predictor)

    # 2 x 303 M x 2,048 tokens; 6 x 302 M x 2,064 at least
    assert 1.2e12 < full["encoder"] < 1.4e12
    assert 4.2e12 < full["predictor"] < 4.7e12
