"""Some thousand cases of tests.fuzz, and each kind of bug it has found as a file made by hand."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

import checkpoint
import weights
from data import ActionScaler
from files.latents import open_dataset
from files.shards import Record, feature_header, index_shards
from files.video import mp4_times, read_frames
from tests.harness import ROOT, film


def fuzz(folder, *flags):
    """(rows by target, exit code) of a small tests.fuzz."""
    command = [sys.executable, "-m", "tests.fuzz", "--json", "--out", str(folder), *flags]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr[-2000:]
    return {r["target"]: r for r in rows}, done.returncode


def test_damaged_and_hostile_files_are_refused_in_a_sentence(tmp_path):
    """Bug: a reader ends in an exception that nobody expects, in a dead process, hangs, asks for
    gigabytes or runs what a file holds."""
    rows, code = fuzz(tmp_path, "--cases", "2800", "--seed", "5")
    found = {p.name: p.read_text() for p in tmp_path.glob("*.txt")}
    assert code == 0 and not found, found
    assert len(rows) == 15 and rows["all"]["cases"] == 2800

    # neither all refused nor all accepted, or nothing was tried
    for target, r in rows.items():
        assert r["refused"] > 20 and r["accepted"] > 0, target
        assert r["refused"] + r["accepted"] == r["cases"], target


BAD_READERS = """
import ctypes, os, runpy, sys, time
import tests.fuzz as f

def reader(path):
    n = os.path.getsize(path) % 6
    [lambda: None, lambda: {}["key"], lambda: ctypes.string_at(8), lambda: time.sleep(60), lambda: bytearray(2 << 30),
     lambda: os.mkdir(f.BOMB)][n]()

f.TARGETS["jsonl"] = (reader, "x", (ValueError,))
print(f.fuzz("jsonl", 30, 0, [b"x" * n for n in range(1000, 1006)], 0.3, sys.argv[1]))
"""


def test_the_fuzzer_finds_what_it_looks_for(tmp_path):
    """Bug: a fuzzer that finds nothing since it looks at nothing: wrong exceptions, dead processes,
    hangs, memory, code that ran."""
    done = subprocess.run(
        [sys.executable, "-c", BAD_READERS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    row = eval(done.stdout)
    assert row["cases"] == 30, row
    assert all(row[k] > 0 for k in ("accepted", "crash", "hang", "memory", "code ran")), row

    kept = [p.read_text() for p in tmp_path.glob("*.txt")]
    assert len(kept) == row["crash"] + row["hang"] + row["memory"] + row["code ran"]
    assert any("KeyError" in t for t in kept)
    assert any("exit code -11" in t for t in kept)


# --- what was found ---


def test_a_damaged_h5_file_is_an_oserror(tmp_path):
    """Bug: h5py's RuntimeError and KeyError ended prepare.manifest for all files."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset(
            "latents", data=np.ones((4, 4, 2, 4, 4), np.float16), chunks=(1, 4, 2, 4, 4)
        )
    raw = path.read_bytes()
    for mark in (b"HEAP", b"SNOD", b"TREE"):
        path.write_bytes(raw.replace(mark, b"XXXX"))
        with pytest.raises(OSError, match="."):
            open_dataset(str(path))

    # the float type: its exponent and mantissa overlap
    tag = raw.index(bytes([0x11, 0x20, 0x0F, 0]))

    # and an exponent without a bias
    for at, bad in ((12, bytes([3])), (16, bytes(4))):
        path.write_bytes(raw[: tag + at] + bad + raw[tag + at + len(bad) :])
        with pytest.raises(OSError, match="a.h5 is damaged"):
            open_dataset(str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["z"].pop("data_offsets"),
        lambda h: h["z"].pop("shape"),
        lambda h: h["states"].pop("dtype"),
        lambda h: h.pop("actions"),
        lambda h: h["z"].update(dtype="I64"),
        lambda h: h["z"].update(shape=[3, 4]),
        lambda h: h["z"].update(shape=[10**9, 4, 8]),
        lambda h: h["z"].update(data_offsets=[0, None]),
        lambda h: h["actions"].update(data_offsets=[-8, 296]),
        lambda h: h.update(z=3),
    ],
)
def test_a_feature_header_must_fit_its_bytes(tmp_path, change):
    """Bug: a KeyError that ends the run; rows read from where another tensor is, when shape and
    bytes do not agree."""
    tensors = {
        "z": torch.zeros(3, 4, 8, dtype=torch.bfloat16),
        "actions": torch.zeros(2, 38),
        "states": torch.zeros(3, 2),
    }
    raw = safetensors_bytes(tensors)
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])

    def write():
        text = json.dumps(header).encode()
        (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
        return Record(
            str(tmp_path / "a"), "a", {"safetensors": (0, os.path.getsize(tmp_path / "a"))}
        )

    assert feature_header(write())[0]["z"][1] == (3, 4, 8)
    change(header)
    with pytest.raises(ValueError, match="not a feature file"):
        feature_header(write())
    assert not index_shards([str(tmp_path / "a")])[0]


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps([1] * 99, protocol=4)[:8],  # struct.error
        b"\x80\x05\x96"
        + (1 << 31).to_bytes(8, "little")
        + b".",  # BYTEARRAY8: 2 GiB that are not there
        pickle.dumps(np.ones(3), protocol=4).replace(b"f8", b"V8"),
        b"",
    ],
)
def test_a_damaged_scaler_is_said(tmp_path, data):
    """Bug: a traceback of struct's or numpy's; a file of 12 bytes that allocates 2 GiB."""
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="a.pkl is not an action scaler"):
        ActionScaler.load(str(tmp_path / "a.pkl"))


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b"h\x07.",
        b"(.",
        b"]s.",
        b"Kx.",
        b"X\xff\xff\xff\x7f.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    ],
)
def test_a_damaged_pickle_under_a_right_checksum_is_said(tmp_path, code):
    """Bug: KeyError, IndexError or an error without a message from torch's reader ended the run
    instead of taking the checkpoint before."""
    f = io.BytesIO()
    torch.save({"epoch": 1}, f)
    out = io.BytesIO()
    with zipfile.ZipFile(f) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + code if name.endswith("data.pkl") else old.read(name))
    path = tmp_path / "checkpoint-epoch001.pth.tar"
    path.write_bytes(out.getvalue() + b"%08x" % zlib.crc32(out.getvalue()))
    with pytest.raises(
        ValueError, match="checkpoint-epoch001.pth.tar is damaged or no checkpoint of ours: [A-Z]"
    ):
        checkpoint.load(path)

    (tmp_path / "weights.pt").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="weights.pt: "):
        weights.read_file(tmp_path / "weights.pt")


def test_an_unknown_codec_is_said():
    """Bug: AttributeError: 'NoneType' object has no attribute 'thread_count', which ends the
    loader."""
    raw = film(12).replace(b"avc1", b"xxx1")
    times = mp4_times(io.BytesIO(raw))
    with pytest.raises(ValueError, match="codec"):
        read_frames(io.BytesIO(raw), times, [3], 32)
