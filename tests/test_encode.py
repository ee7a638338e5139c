"""encode.py: what it stores, what it says before it starts, and that neither a kill nor a full disk
costs more than the shard under way."""

import glob
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

import checkpoint
import encode
import weights
from evaluation.held_out import METERS
from files.features import feature_rows, feature_settings, index_tar, pack_features
from files.shards import index_shards, shard_index
from model import normalize_features
from prepare.robot import record
from tests.harness import (
    ROOT,
    TINY,
    TORCHRUN,
    Run,
    contractor,
    fails,
    film,
    jsonl,
    numbers,
    run,
    start_ranks,
    tfrecord,
    words,
    write_file,
    write_shards,
    write_tar,
)

HOW = "--encoder vit_tiny --crop_size 32"

pytestmark = pytest.mark.usefixtures("forkserver")


def tars(folder):
    """{name: bytes} of the feature shards in a folder."""
    out = {}
    for path in glob.glob(os.path.join(folder, "*.tar")):
        with open(path, "rb") as f:
            out[os.path.basename(path)] = f.read()
    return out


def left_over(folder):
    return [n for n in os.listdir(folder) if n.endswith(".tmp")]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, shards):
    """Folders {bf16, int8} x {train, held} of the same three shards; .log is what encode.py
    printed."""
    folder = tmp_path_factory.mktemp("encoded")
    log = {}
    for store in ("bf16", "int8"):
        for part, names in (("train", "shard-{000000..000001}.tar"), ("held", "shard-000002.tar")):
            out = folder / store / part
            log[store, part] = run(
                folder, "encode.py", "--data", shards / names, "--out", out, HOW, "--store", store
            )
    return types.SimpleNamespace(folder=folder, log=log)


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many bytes."""
    made = []

    def mount(size):
        path = tmp_path / f"disk-{len(made)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a small disk needs root: {done.stderr.strip()}")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", str(path)], check=True)


# --- int8 ---


@pytest.mark.parametrize("largest", [1, 100])
def test_int8_rounds_little_more_than_bf16(tmp_path, largest):
    """Bug: a scale for a whole token: with a few channels a hundred times as large, as trained
    encoders have, the others round to nothing; a scale or mean of another step or channel in the
    reading of a part."""
    g = torch.Generator().manual_seed(0)
    gain = torch.logspace(-1, 1, 48)
    gain[torch.randperm(48, generator=g)[:3]] *= largest
    z = (
        torch.randn(150, 4, 48, generator=g) * torch.rand(150, 4, 1, generator=g).add(0.2)
        + torch.randn(48, generator=g)
    ) * gain

    # channels that never change
    z[:, :, :3] = torch.tensor([0.0, 3.1, -700.3])
    rest = {"actions": torch.zeros(149, 38), "states": torch.zeros(150, 2)}
    off = {}
    for store in ("bf16", "int8"):
        data = safetensors_bytes(pack_features(z, store) | rest)
        record = index_shards(
            [write_tar(tmp_path / f"{store}.tar", {"a@00000.safetensors": data})]
        )[0][0]
        read = torch.cat([feature_rows(record, i, i + 30)[0] for i in range(0, 150, 30)]).float()
        for norm, stats in (
            ("layer", {}),
            ("standardize", {"mean": z.mean((0, 1)), "std": z.std((0, 1)).clamp_min(1e-6)}),
        ):
            a, b = (normalize_features(x, **stats) for x in (z, read))
            wrong, spread = ((x[..., 3:] ** 2).mean((0, 1)) for x in (a - b, a - a.mean((0, 1))))
            off[store, norm] = (
                (wrong / spread).max() if stats else wrong.sum() / spread.sum()
            ).sqrt()

        off[store, "size"] = len(data) - 4 * (149 * 38 + 300)
        assert torch.allclose(read[:, :, :3], z[:, :, :3], rtol=1e-2 if store == "bf16" else 1e-6)
    assert max(off["int8", n] for n in ("layer", "standardize")) < 0.01

    # 48 channels and 2 bytes a token; 1024 channels come to 0.501
    assert off["int8", "size"] < 0.58 * off["bf16", "size"]


def test_features_that_are_not_finite_are_not_stored():
    """Bug: int8 turns inf or NaN into a plausible number, and training never learns that the
    encoder had overflowed."""
    for bad in (math.nan, math.inf):
        z = torch.zeros(4, 2, 8)
        z[2, 1, 3] = bad
        for store in ("bf16", "int8"):
            with pytest.raises(ValueError, match="not finite.*--dtype float32"):
                pack_features(z, store)


def test_training_sees_the_same_on_video_bf16_and_int8(encoded, shards, tmp_path):
    """Bug: features read back as something else than the encoder gives on the fly: steps shifted, a
    scale of another token or step; a run that mixes two ways of storing them, or that silently
    drops an augmentation."""
    scaler = tmp_path / "scaler.pkl"
    options = ["--data", shards / "shard-{000000..000001}.tar"]
    options += ["--output", scaler, "--num_workers 0"]
    run(tmp_path, "fit_scaler.py", *options)
    base = [
        "--scaler",
        scaler,
        TINY,
        "--feature_norm standardize --epochs 1 --warmup 0 --anneal 0 --ipe 6",
    ]
    video = [
        "--data",
        shards / "shard-{000000..000001}.tar",
        "--val_data",
        shards / "shard-000002.tar",
        "--encoder vit_tiny",
    ]
    where = {s: encoded.folder / s for s in ("bf16", "int8")}
    data = {
        s: ["--data", f / "train" / "*.tar", "--val_data", f / "held" / "*.tar"]
        for s, f in where.items()
    }
    plans = {"still": "--lr 0 --start_lr 0", "moves": "--lr 1e-3 --start_lr 1e-3"}

    def losses(plan, flags, log):
        out = tmp_path / f"{plan}-{len(os.listdir(tmp_path))}"
        run(tmp_path, "train_ac.py", *base, plans[plan], *flags, "--out_dir", out)
        return numbers(out, "jloss", "sloss", *METERS[:4] if log == "val.csv" else (), log=log)

    # on video clips start between steps too
    live = losses("still", video, "val.csv")
    still = losses("still", data["int8"], "val.csv")
    np.testing.assert_allclose(still, live, rtol=4e-3)

    bf16, int8 = (losses("moves", d, "train.csv") for d in data.values())
    assert len(bf16) == 6
    assert (int8 != bf16).any()
    assert bf16[-1, 0] < 0.95 * bf16[0, 0]

    # the same clips in the same order
    np.testing.assert_allclose(int8, bf16, rtol=4e-3)

    refused = [*base, plans["still"], "--out_dir", tmp_path / "refused"]
    for flag in (
        "--horizontal_flip",
        "--random_resize_scale 0.8",
        "--motion_shift 0.1",
        "--temporal_jitter 1",
    ):
        assert f"{flag.split()[0]} needs pixels, and these shards hold features" in fails(
            tmp_path, "train_ac.py", *refused, *data["int8"], flag
        )

    mixed = [
        "--data",
        where["int8"] / "train" / "*.tar",
        "--val_data",
        where["bf16"] / "held" / "*.tar",
    ]
    error = fails(tmp_path, "train_ac.py", *refused, *mixed)
    assert "was encoded with other settings" in error and "int8" in error


def test_a_feature_header_is_checked_before_it_is_used(tmp_path):
    """Bug: a damaged or foreign header ends the run with a TypeError, or makes the reader read
    beside the member."""
    data = safetensors_bytes(
        pack_features(torch.randn(6, 2, 8), "int8")
        | {"actions": torch.zeros(5, 38), "states": torch.zeros(6, 2)}
    )
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])

    def with_header(new):
        text = json.dumps(new).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + n :]

    def changed(change):
        new = json.loads(json.dumps(header))
        change(new)
        return with_header(new)

    changes = {
        "lone": lambda h: h.pop("z_scale"),
        "offsets": lambda h: h["z"].pop("data_offsets"),
        "three": lambda h: h["z"].update(data_offsets=[0, 1, 2]),
        "behind": lambda h: h["z"].update(data_offsets=[-96, 0]),
        "far": lambda h: h["states"].update(data_offsets=[10**15, 10**15 + 48]),
        "text": lambda h: h["z"].update(data_offsets=["a", "b"]),
        "deep": lambda h: h["z"].update(shape=[6, [2], 8]),
        "rank": lambda h: h["z"].update(shape=[6, 16]),
        "steps": lambda h: h["actions"].update(shape=[6, 38]),
        "float": lambda h: h["z"].update(shape=[6.5, 2, 8]),
        "huge": lambda h: h["z"].update(shape=[1e400, 2, 8]),
        "dtype": lambda h: h["z"].update(dtype="I64"),
        "meta": lambda h: h.update(__metadata__=[1, 2]),
    }
    cases = {name: changed(change) for name, change in changes.items()}
    cases |= {"list": with_header([1]), "number": with_header(7)}
    members = {f"{name}@00000.safetensors": member for name, member in cases.items()}
    members["nested@00000.safetensors"] = (10**5).to_bytes(8, "little") + b"[" * 10**5
    members["ok@00000.safetensors"] = with_header(header)
    records, bad = index_shards([write_tar(tmp_path / "a.tar", members)])
    assert [r.key for r in records] == ["ok@00000"]
    assert {b[1].partition("@")[0] for b in bad} == {*cases, "nested"}
    assert feature_rows(records[0], 2, 5)[0].shape == (3, 2, 8)


# --- decoding ahead ---


def test_decoding_ahead_changes_nothing(tmp_path, mp4):
    """Bug: parts come back out of order or go to another recording; one that breaks in its middle
    takes the next one's parts along; the same recordings give other bytes."""
    broken = film(container={"movflags": "faststart"})
    members = {}
    for k in range(5):
        members |= {
            f"p{k}.mp4": broken[: len(broken) * 6 // 10] if k == 2 else mp4,
            f"p{k}.jsonl": jsonl(contractor(seed=k)),
        }
    shard = write_tar(tmp_path / "a.tar", members)
    found = {}
    for workers in (0, 3):
        out = tmp_path / f"w{workers}"
        flags = words(
            [
                "encode.py",
                "--data",
                shard,
                "--out",
                out,
                HOW,
                "--batch_size 6 --phases 2 --num_workers",
                workers,
            ]
        )

        # another hash seed
        text = subprocess.run(
            [sys.executable, *flags], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert text.count("left out:") == 1 and "a.tar p2" in text

        found[workers] = tars(out)["a.tar"]
    assert found[0] == found[3]

    records, _ = index_shards([str(tmp_path / "w3" / "a.tar")])
    assert [r.key for r in records] == [f"p{k}@0000{s}" for k in (0, 1, 3, 4) for s in (0, 4)]

    ours = {r.key: feature_rows(r, 0, r.length) for r in records}

    # the same film
    assert all(torch.equal(ours[f"p{k}@00004"][0], ours["p0@00004"][0]) for k in (1, 3, 4))

    # other actions
    assert not torch.equal(ours["p3@00004"][1], ours["p4@00004"][1])


# --- room ---


def estimate(records, tokens, width, flags):
    """What encode.py with these flags would say of play -> (steps, bytes)."""
    args = encode.parser.parse_args(flags)
    names = ("fps", "encode", "frames_per_clip", "frames_per_step", "phases")
    runs = encode.play_runs(records, **{k: getattr(args, k) for k in names})
    return encode.estimate(runs, tokens, width, args.store, **encode.PLAY)


def test_what_is_said_before_is_what_is_written(encoded, shards, tmp_path):
    """Bug: an estimate that forgets phases, scales or the second byte: the disk is full after a
    night."""
    records, _ = index_shards([str(shards / f"shard-00000{i}.tar") for i in range(2)])
    for store in ("bf16", "int8"):
        made = tars(encoded.folder / store / "train")
        flags = ["--data", "x", "--out", "x", *HOW.split(), "--store", store]
        steps, size = estimate(records, 4, 192, flags)

        # a tar is filled up to 10 KiB
        assert size == pytest.approx(sum(map(len, made.values())), rel=0.1)

        features, _ = index_shards([str(encoded.folder / store / "train" / n) for n in made])
        assert steps == sum(r.length for r in features)

        text = (
            f"to encode: 0.02 hours of play, {steps} steps x 4 tokens x 192 channels in {store},"
            f" take {size / 1e9:.3f} GB of the "
        )
        assert text in encoded.log[store, "train"]
    assert feature_settings(features)["store"] == "int8"

    # twice the time, the steps of 10 Hz
    halved = [r._replace(rate=r.rate / 2) for r in records]
    assert estimate(halved, 4, 192, [*flags, "--fps", "2.5"]) == (steps, size)

    of_three = estimate(records, 4, 192, [*flags, "--phases", "3"])[1]
    assert of_three == pytest.approx(3 * size, rel=0.03)

    hour = [records[0]._replace(length=20 * 3600)]
    written = estimate(hour, 256, 1408, flags[:4])[1]
    assert written == pytest.approx(9000 * 256 * 1408 * 2, rel=0.001)


def test_a_disk_that_is_too_small_is_refused(small_disk, shards, tmp_path):
    """Bug: the run begins, and fills the disk some hours later; or one that has shards already is
    asked for the room of all."""
    out = small_disk(600_000) / "features"
    flags = ["--data", shards / "*.tar", HOW, "--phases 2 --out", out]
    error = fails(tmp_path, "encode.py", *flags)
    assert "0.03 hours of play, 444 steps x 4 tokens x 192 channels in bf16, take 0.001 GB" in error
    assert f"and {out} has 0.001 GB free" in error
    assert (
        error.count(
            "make room, --store int8 for half of it, fewer --phases, or put --out on a larger disk"
        )
        == 1
    )
    assert os.listdir(out) == ["lock"]
    assert "take 0.000 GB" in run(tmp_path, "encode.py", *flags, "--store int8")

    text = run(tmp_path, "encode.py", *flags, "--store int8")
    assert "0 steps" in text and "encoded 0 of 3 shards" in text
    assert (
        "int8"
        not in fails(
            tmp_path, "encode.py", *flags[:-1], out.parent / "more", "--store int8 --phases 4"
        ).partition("has")[2]
    )


def test_a_disk_that_fills_up_costs_the_shard_under_way(small_disk, shards, tmp_path):
    """Bug: a shard without its last recordings counts as finished; a traceback; or the rest of the
    shard keeps the disk full."""
    flags = ["--data", shards / "*.tar", HOW, "--phases 2 --out"]
    run(tmp_path, "encode.py", *flags, tmp_path / "whole")
    whole = tars(tmp_path / "whole")
    disk = small_disk(2_000_000)
    going = Run(tmp_path, "encode.py", *flags, disk / "f", "--batch_size 1")
    end = time.monotonic() + 60
    while not (disk / "f" / "shard-000000.tar").exists():
        assert going.process.is_alive() and time.monotonic() < end, going.text()
        time.sleep(0.0005)

    # another program
    with open(disk / "ballast", "wb", buffering=0) as f:
        while f.tell() < 2_000_000:
            try:
                f.write(bytes(4096))
            except OSError:
                break

    code, text = going.wait()
    errors = [line for line in text.splitlines() if "error: " in line]
    assert code == 1 and len(errors) == 1 and "Traceback" not in text
    assert "No space left on device" in errors[0]
    assert "the shards that are finished stay; fix this and run the same command again" in errors[0]

    done = tars(disk / "f")
    assert 1 <= len(done) < 3
    assert done == {k: whole[k] for k in done}
    assert not left_over(disk / "f")

    os.unlink(disk / "ballast")
    run(tmp_path, "encode.py", *flags, disk / "f")
    assert tars(disk / "f") == whole


def test_a_file_that_may_not_grow_is_one_sentence(shards, tmp_path):
    """Bug: the same where only the size of a file is limited (a quota), without root."""
    flags = ["--data", shards / "*.tar", HOW, "--out"]
    run(tmp_path, "encode.py", *flags, tmp_path / "whole")
    error = fails(tmp_path, "encode.py", *flags, tmp_path / "f", file_limit=60_000)
    assert "shard-000000.tar (File too large): the shards that are finished stay" in error
    assert sorted(os.listdir(tmp_path / "f")) == ["encode.json", "lock"]
    run(tmp_path, "encode.py", *flags, tmp_path / "f")
    assert tars(tmp_path / "f") == tars(tmp_path / "whole")


def test_what_encode_cannot_do_is_refused_in_one_sentence(encoded, shards, tmp_path):
    """Bug: wrong flags, features for video, URLs or another run in the folder make empty shards
    that count as finished, or a traceback."""
    play = shards / "shard-000000.tar"
    out = ["--out", tmp_path / "f", "--encoder vit_tiny"]
    assert "tubelet needs the encoder's 2 frames" in fails(
        tmp_path, "encode.py", "--data", play, *out, "--crop_size 32 --frames_per_step 4"
    )
    assert not tars(tmp_path / "f") and not left_over(tmp_path / "f")
    assert "--crop_size 40 is no multiple of the encoder's patches of 16" in fails(
        tmp_path, "encode.py", "--data", play, *out, "--crop_size 40"
    )

    flags = ["--data", encoded.folder / "bf16" / "train" / "shard-000000.tar"]
    flags += [*out, "--crop_size 32"]
    again = fails(tmp_path, "encode.py", *flags)
    assert "shard-000000.tar holds features already: name the shards of video" in again
    for flag in ("--batch_size 0", "--phases 0"):
        assert f"{flag} is too small" in fails(tmp_path, "encode.py", "--data", play, *out, flag)

    assert "--fps nan is no number" in fails(
        tmp_path, "encode.py", "--data", play, *out, "--fps nan"
    )
    file = fails(tmp_path, "encode.py", "--data", play, HOW, "--out", play)
    assert f"--out {play}: File exists; name a folder" in file

    same = fails(tmp_path, "encode.py", "--data", play, HOW, "--out", shards)
    assert f"--out {shards} is where the recordings are" in same
    assert "lock" not in os.listdir(shards)

    (tmp_path / "torn.tar").write_bytes(play.read_bytes()[:3000])
    nothing = fails(
        tmp_path, "encode.py", "--data", tmp_path / "torn.tar", HOW, "--out", tmp_path / "n"
    )
    assert f"nothing could be encoded, see above ({tmp_path / 'torn.tar'} " in nothing
    assert not tars(tmp_path / "n")

    # plain video was a damaged tar, and what to do with it was not said
    (tmp_path / "v.mp4").write_bytes(film(20))
    write_tar(tmp_path / "v.tar", {"v.mp4": film(20)})
    for name in ("v.mp4", "v.tar"):
        video = fails(
            tmp_path, "encode.py", "--data", tmp_path / name, HOW, "--out", tmp_path / "n"
        )
        assert f"{name} is plain video" in video and "--vae" in video
    (tmp_path / "r.tar").write_bytes(tfrecord(0, 20))
    robot = fails(tmp_path, "encode.py", "--data", tmp_path / "r.tar", HOW, "--out", tmp_path / "n")
    assert "r.tar is robot episodes: add --dataset droid" in robot

    url = fails(tmp_path, "encode.py", "--data", "http://localhost:1/a.tar", *out)
    assert "http://localhost:1/a.tar: encode.py needs to seek: name a --cache_dir" in url

    checkpoint.lock(tmp_path / "mine")
    assert f"mine is in use by process {os.getpid()}" in fails(
        tmp_path, "encode.py", "--data", play, HOW, "--out", tmp_path / "mine"
    )


def test_recordings_are_encoded_by_name(shards, tmp_path):
    """Bug: an empty shard, or one with a part of its recordings, passes for finished when others
    are picked; a misspelt name is left out without a word."""
    keys = [r.key for r in index_shards([str(shards / "shard-000001.tar")])[0]]
    names = tmp_path / "names.txt"
    names.write_text(f"# the second\n{keys[1]}\n")
    flags = ["--data", shards / "shard-{000000..000001}.tar", HOW, "--recordings", names]
    run(tmp_path, "encode.py", *flags, "--out", tmp_path / "f")
    assert list(tars(tmp_path / "f")) == ["shard-000001.tar"]
    records, _ = index_shards([str(tmp_path / "f" / "shard-000001.tar")])
    assert {r.recording for r in records} == {keys[1]}

    names.write_text("\n".join(keys))
    again = fails(tmp_path, "encode.py", *flags, "--out", tmp_path / "f")
    assert "holds what other settings made" in again and "1 names, sha256" in again
    names.write_text(f"{keys[0]}\nnone\n")
    unknown = fails(tmp_path, "encode.py", *flags, "--out", tmp_path / "g")
    assert "1 of the 2 names in --recordings are in no --data, none among them" in unknown
    names.write_text("# nothing\n")
    empty = fails(tmp_path, "encode.py", *flags, "--out", tmp_path / "g")
    assert f"--recordings {names} names no recording" in empty
    assert not tars(tmp_path / "g")


def test_the_decoder_is_part_of_features(shards, tmp_path):
    """Bug: a folder holds features of two decoders, whose pixels differ, or training does not know
    which; --vae takes no notice of --decoder; a recording that decord misreads is left out."""
    pytest.importorskip("decord")
    flags = ["--data", shards / "shard-000000.tar", HOW, "--out", tmp_path / "f"]
    run(tmp_path, "encode.py", *flags, "--decoder decord")
    records, _ = index_shards([str(tmp_path / "f" / "shard-000000.tar")])
    assert feature_settings(records)["decoder"] == "decord"
    assert weights.decoder_of(records, "pyav") == "decord"
    assert weights.decoder_of(records, "decord") == "decord"
    assert "holds what other settings made" in fails(tmp_path, "encode.py", *flags)
    latents = [*flags[:2], "--vae diffusers:x --decoder decord --out", tmp_path / "v"]
    assert "latents are made of PyAV's pictures" in fails(tmp_path, "encode.py", *latents)

    cut = film(container={"movflags": "faststart"})
    place = cut.index(b"elst") + 12

    # 70 frames later
    cut = cut[: place + 4] + struct.pack(">i", 56_000) + cut[place + 8 :]
    path = write_tar(tmp_path / "cut.tar", {"k.mp4": cut, "k.jsonl": jsonl(contractor(230))})
    flags = ["--data", path, HOW, "--decoder decord --out", tmp_path / "cut"]
    assert "cut.tar k: decord would show wrong pictures" in fails(tmp_path, "encode.py", *flags)
    assert os.listdir(tmp_path / "cut") in (
        ["lock"],
        ["encode.json", "lock"],
        ["lock", "encode.json"],
    )


def test_what_is_left_out_is_listed_once(mp4, tmp_path):
    """Bug: a recording that could not be read is forgotten when the command has ended, or listed
    again when it goes on."""
    good = {"good.mp4": mp4, "good.jsonl": jsonl(contractor())}
    torn = {"torn.mp4": mp4, "torn.jsonl": b"{not json\n"}
    write_tar(tmp_path / "a.tar", good | torn)
    for _ in range(2):
        run(tmp_path, "encode.py", "--data", tmp_path / "a.tar", "--out", tmp_path / "f", HOW)
    with open(tmp_path / "f" / "left_out.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert [(r["file"], r["key"]) for r in rows] == [(str(tmp_path / "a.tar"), "torn")]
    assert "no usable line" in rows[0]["reason"]
    assert {r.recording for r in shard_index(tmp_path / "f" / "a.tar")[0]} == {"good"}


# --- kills ---


@pytest.fixture(scope="module")
def many(tmp_path_factory, mp4):
    """Eight shards of two recordings, and their features from an undisturbed run of one process."""
    folder = write_shards(tmp_path_factory.mktemp("many"), 8, mp4)
    flags = [
        "--data",
        folder / "*.tar",
        "--encoder vit_tiny --crop_size 32 --phases 4 --batch_size 4 --out",
    ]
    run(folder, "encode.py", *flags, folder / "whole")
    return types.SimpleNamespace(flags=flags, whole=tars(folder / "whole"))


def written(out):
    """Bytes of shards, those under way too."""
    total = 0
    for path in glob.glob(os.path.join(out, "*.tar*")):
        try:
            total += os.path.getsize(path)
        except FileNotFoundError:
            # renamed in between
            pass
    return total


def kill_at_random(many, out, rng, start):
    """start() -> process ids; they get a SIGKILL when a random share of the bytes is there. What is
    finished by then must be right. How many shards were under way."""
    goal = rng.uniform(0.01, 0.9) * sum(map(len, many.whole.values()))
    end = time.monotonic() + 90
    pids = start()
    while written(out) <= goal:
        assert time.monotonic() < end
        time.sleep(0.001)
    for pid in pids():
        os.kill(pid, signal.SIGKILL)
    assert all(many.whole[k] == x for k, x in tars(out).items()), (
        "a shard that looks finished is not"
    )
    return len(left_over(out))


def test_encode_killed_at_random_moments_under_two_ranks(many, tmp_path):
    """Bug: a shard written twice, cut, or left out after a kill -9; one that is half written keeps
    its place on the disk for good; a rerun with another number of ranks deals shards otherwise."""
    rng = random.Random(7)
    out = tmp_path / "f"
    out.mkdir()
    torn = 0
    ranks = []

    def start():
        ranks[:] = start_ranks(tmp_path, "encode.py", *many.flags, out)
        return lambda: [r.process.pid for r in ranks]

    for _ in range(3):
        for path in list(out.glob("*.tar"))[4:]:
            path.unlink()
        torn += kill_at_random(many, out, rng, start)
        for r in ranks:
            assert r.wait()[0] == -signal.SIGKILL
    assert torn

    # one process
    run(tmp_path, "encode.py", *many.flags, out)
    assert tars(out) == many.whole and not left_over(out)


@pytest.mark.slow
def test_encode_killed_under_torchrun(many, tmp_path):
    """Bug: the same under the real launcher, from an empty folder each time, and a run by it that
    finishes what was begun."""
    rng = random.Random(8)
    torn = 0
    started = []
    command = [*TORCHRUN, "encode.py", *words(many.flags)]

    def start():
        started.append(subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL))

        # the ranks, which torchrun puts into sessions of their own
        below = ["pgrep", "-P", str(started[-1].pid)]
        return lambda: [
            started[-1].pid,
            *map(int, subprocess.run(below, capture_output=True, text=True).stdout.split()),
        ]

    for k in range(4):
        out = tmp_path / f"f{k}"
        torn += kill_at_random(many, out, rng, start)
        started[-1].wait()
        done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert tars(out) == many.whole and not left_over(out)
    assert torn


def test_sigterm_removes_the_shard_under_way(many, tmp_path):
    """Bug: scancel or torchrun ends a rank, and gigabytes of a shard that nobody will finish stay
    on the disk."""
    out = tmp_path / "f"
    going = Run(tmp_path, "encode.py", *many.flags, out)
    end = time.monotonic() + 60
    while not (out.exists() and left_over(out) and written(out) > 300_000):
        assert going.process.is_alive() and time.monotonic() < end, going.text()
        time.sleep(0.001)
    going.process.terminate()
    code, text = going.wait()
    assert code == 143 and "Traceback" not in text and not left_over(out)
    assert all(many.whole[k] == x for k, x in tars(out).items())


# --- robot episodes ---


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    """Four TFRecords of three episodes, and features of two of their cameras from an undisturbed
    run of one process."""
    folder = tmp_path_factory.mktemp("robots")
    for s in range(4):
        write_file(
            folder / f"d.tfrecord-{s:05d}-of-00004",
            *(tfrecord(3 * s + k, 60 + 20 * k) for k in range(3)),
        )
    flags = [
        "--dataset droid --data",
        folder / "*.tfrecord*",
        HOW,
        "--camera exterior_1 wrist --phases 4 --batch_size 8 --out",
    ]
    text = run(folder, "encode.py", *flags, folder / "whole")
    return types.SimpleNamespace(
        folder=folder, flags=flags, whole=tars(folder / "whole"), text=text
    )


def test_robots_killed_at_random_moments(robots, tmp_path):
    """Bug: a shard of episodes written twice, cut, or with other bytes after a kill -9 or under
    ranks; an estimate that forgets cameras."""
    steps = sum(4 * 2 * rows // 4 for s in range(4) for rows in (60, 80, 100))
    size = sum(map(len, robots.whole.values()))
    assert (
        f"0.02 hours of episodes, {steps:,} steps x 4 tokens x 192 channels in bf16, take"
        f" 0.00{size / 1e6:.0f} GB" in robots.text
    )
    rng = random.Random(3)
    out = tmp_path / "f"
    out.mkdir()
    torn = 0
    ranks = []

    def start():
        ranks[:] = start_ranks(tmp_path, "encode.py", *robots.flags, out)
        return lambda: [r.process.pid for r in ranks]

    for _ in range(2):
        for path in list(out.glob("*.tar"))[2:]:
            path.unlink()
        torn += kill_at_random(robots, out, rng, start)
        for r in ranks:
            assert r.wait()[0] == -signal.SIGKILL
    assert torn
    run(tmp_path, "encode.py", *robots.flags, out)
    assert tars(out) == robots.whole
    assert not left_over(out)
    assert len(robots.whole) == 4


def test_other_ways_to_encode_robots_are_refused(robots, tmp_path):
    """Bug: flags of gameplay that do nothing on robots, or the other way round; two makings, or
    other episodes, in one folder."""
    done, flags = robots.folder / "whole", robots.flags[:-1]
    for more, message in (
        ("--frames_per_step 2", "--frames_per_step is for --dataset vpt"),
        ("--encode tubelet", "--encode is for --dataset vpt"),
        ("--vae diffusers:x", "--vae is for --dataset vpt"),
        ("--fps 5", "holds what other settings made"),
        ("--camera wrist", "holds what other settings made"),
        ("--crop square", "holds what other settings made"),
    ):
        assert message in fails(tmp_path, "encode.py", *flags, "--phases 4 --out", done, more)
    assert "--crop is for --dataset droid" in fails(
        tmp_path, "encode.py", "--data", done, "--out", tmp_path, "--crop square"
    )

    write_file(tmp_path / "d.tfrecord-00000-of-00004", tfrecord(77))
    other = ["--dataset droid --data", tmp_path / "d.*", *robots.flags[2:], done]
    assert "d.tfrecord-00000-of-00004 of other recordings (lab/success/0" in fails(
        tmp_path, "encode.py", *other
    )


def test_robots_that_cannot_be_encoded_are_left_out(tmp_path):
    """Bug: an episode that is damaged, too short, there twice or has no such camera ends the run,
    or takes its neighbour's frames."""

    # the heads of its JPEGs
    broken = tfrecord(5)[12:-4].replace(b"\xff\xd8\xff", bytes(3))
    records = [
        tfrecord(1),
        record(broken),
        tfrecord(2, 4),
        tfrecord(1),
        tfrecord(3, cameras=["wrist"]),
        tfrecord(4, cameras=["exterior_1"]),
    ]
    path = write_file(tmp_path / "d.tfrecord", *records)
    out = tmp_path / "out"
    flags = ["--dataset droid --data", path, HOW, "--camera exterior_1 exterior_2 wrist --out", out]
    text = run(tmp_path, "encode.py", *flags)
    left = [line for line in text.splitlines() if line.startswith("left out: ")]
    assert len(left) == 3
    assert all(
        any(why in line for line in left)
        for why in ("copies of others", "no two steps", "UnidentifiedImageError")
    )

    shard = str(out / "d.tfrecord.tar")
    found = shard_index(shard)[0]
    bad = index_tar(shard)[1]
    keys = {r.key.partition("@")[2] + r.key.partition("/")[2].partition("/")[2][:1] for r in found}
    assert not bad
    assert keys == {
        *(f"{c}-000001" for c in ("exterior_1", "exterior_2", "wrist")),
        "wrist-000003",
        "exterior_1-000004",
    }


def test_a_robots_feature_header_is_checked(robots):
    """Bug: metadata that do not fit the tensors end the run with a KeyError, or give clips and idle
    ranges beside the segment."""
    path = str(robots.folder / "whole" / "d.tfrecord-00000-of-00004.tar")
    r = shard_index(path)[0][0]
    with open(path, "rb") as f:
        f.seek(r.members["safetensors"][0])
        data = f.read(r.members["safetensors"][1])
    end = 8 + int.from_bytes(data[:8], "little")

    def told(change):
        header = json.loads(data[8:end])
        meta = header["__metadata__"]
        about = json.loads(header["__metadata__"]["episode"])
        change(meta, about)
        if meta.get("episode") == json.loads(data[8:end])["__metadata__"]["episode"]:
            meta["episode"] = json.dumps(about)
        text = json.dumps(header).encode()
        folder = robots.folder / "told"
        folder.mkdir(exist_ok=True)
        return index_tar(
            write_tar(
                folder / "a.tar",
                {r.key + ".safetensors": len(text).to_bytes(8, "little") + text + data[end:]},
            )
        )

    assert len(told(lambda m, e: None)[0]) == 1

    for change in (
        lambda m, e: m.pop("names"),
        lambda m, e: m.update(names="[1"),
        lambda m, e: m.update(names='["x"]'),
        lambda m, e: m.pop("dataset"),
        lambda m, e: m.update(state_dim="-7"),
        lambda m, e: m.update(state_dim="x"),
        lambda m, e: m.pop("episode"),
        lambda m, e: m.update(episode="[]"),
        lambda m, e: m.update(episode="[" * 10**5),
        lambda m, e: m.update(episode=7),
        lambda m, e: e.update(stride=0),
        lambda m, e: e.update(stride=5),
        lambda m, e: e.update(rows=10**30),
        lambda m, e: e.update(rate=0),
        lambda m, e: e.update(rate=float("nan")),
        lambda m, e: e.update(idle=[[9, 3]]),
        lambda m, e: e.update(idle=[[1, 10**20]]),
        lambda m, e: e.update(idle=7),
        lambda m, e: e.update(idle=[[1]]),
        lambda m, e: e.pop("success"),
    ):
        segments, bad = told(change)
        assert not segments and len(bad) == 1 and bad[0][2]
