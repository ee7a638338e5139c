"""Faults that other tests do not have (those have kills, signals, full disks, damaged files and
NaN): a round of tests.faults of each kind, on real runs that must end as if nothing had happened;
and the lock of a run's folder."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch

import checkpoint
import tests.faults as faults
from data import Clips
from files.disk import make_folder
from files.shards import index_shards
from files.vpt import ClipReader
from tests.world import ROOT, World

pytestmark = pytest.mark.usefixtures("forkserver")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(str(tmp_path_factory.mktemp("world") / "w"))


def round_of(world, kind, seed):
    """A round that must find nothing wrong; one that came too late is tried again."""
    rng = random.Random(seed)
    for _ in range(5):
        found = faults.one_round(world, kind, rng)
        if not found["late"]:
            break
    assert found == dict.fromkeys(found, ""), found


@pytest.mark.parametrize("kind", ["worker_killed", "two_runs"])
def test_a_fault_costs_nothing(world, kind):
    """Bug: a folder that cannot be written is a traceback, one in use is shared by two runs; a
    loader process that the kernel killed leaves a riddle; what a killed run was writing lies about
    for ever."""
    round_of(world, kind, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [*faults.TRAINING, *faults.WRITING])
def test_faults_at_other_moments(world, kind, seed):
    """Bug: what holds at one moment does not at another: start-up, the end, between a log line and
    the checkpoint."""
    round_of(world, kind, seed + 1)


def test_the_battery_finds_what_is_wrong(world, tmp_path):
    """Bug: a battery that passes whatever it sees: a lost checkpoint, other losses, other weights
    must be told."""
    out = tmp_path / "run"
    subprocess.run(["cp", "-a", f"{world.folder}/alone", out], check=True)
    assert not faults.lost(out)
    assert not faults.differs(out, f"{world.folder}/alone")

    text = (out / "train.csv").read_text()
    lines = text.splitlines(keepends=True)
    lines[20] = lines[20].replace(",0.", ",1.", 1)
    (out / "train.csv").write_text("".join(lines))
    assert faults.differs(out, f"{world.folder}/alone").startswith("train.csv: 36 and 36 rows")

    (out / "train.csv").write_text(text)
    newest = list(checkpoint.list_checkpoints(out))[-1]
    state = checkpoint.load(newest)
    state["predictor"]["predictor_embed.bias"][0] += 1e-6
    checkpoint.save(out, state, 3)
    assert faults.differs(out, f"{world.folder}/alone") == "weights"

    os.unlink(newest)

    # 36 rows promise one epoch: a kill may come between the last row and its checkpoint, and while
    # the one before is written
    assert not faults.lost(out)

    for path in checkpoint.list_checkpoints(out):
        os.unlink(path)
    assert faults.lost(out) == ["step 12 was saved, 0 is the newest"]


HOLDER = """
import os, sys, time, checkpoint
checkpoint.lock(sys.argv[1])
if os.fork() == 0:  # as a loader process, which sees only after seconds that its parent is gone
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    """Bug: after a kill -9 the folder stays locked by a file, or by loader processes that inherited
    the lock; two runs both get it."""
    p = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert int(p.stdout.readline()) == p.pid
        with pytest.raises(
            ValueError,
            match=(
                f"{tmp_path} is in use by process {p.pid} on .*: wait for it, stop it, or choose"
                " another"
            ),
        ):
            checkpoint.lock(tmp_path)
        p.kill()
        p.wait()
        checkpoint.lock(tmp_path)
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.killpg(p.pid, signal.SIGKILL)


def test_a_changed_shard_is_not_a_bad_clip(world, tmp_path):
    """Bug: a shard that was replaced is taken for a clip that cannot be read, and another clip is
    drawn for it."""
    path = str(tmp_path / "shard-000000.tar")
    one, other = (open(f"{world.features}/shard-00000{i}.tar", "rb").read() for i in (0, 1))
    with open(path, "wb") as f:
        f.write(one)
    clips = Clips(index_shards([path])[0], [1.0] * 4, ClipReader())
    assert torch.isfinite(clips[0, 0, 0, 0.5]["z"]).all()
    with open(path, "wb") as f:
        f.write(one[:-10] + other[-10:])
    with pytest.raises(ValueError, match="shard-000000.tar has changed since this run opened it"):
        clips[0, 0, 0, 0.5]
    os.unlink(path)

    # gone: that says nothing about the recording, so no other clip is drawn
    gone = "shard-000000.tar.*cannot be read.*No such file"
    with pytest.raises((ValueError, OSError), match=gone):
        clips[0, 0, 0, 0.5]


def test_peak_memory_is_a_peak():
    """Bug: kilobytes taken for bytes, or what is held now for the most that was held."""
    code = (
        "import torch, checkpoint; x = torch.ones(100 << 20); del x;"
        " print(checkpoint.peak_memory(torch.device('cpu')))"
    )
    plain = code.replace("100 << 20", "1")
    most, least = (
        float(
            subprocess.run(
                [sys.executable, "-c", c], cwd=ROOT, capture_output=True, text=True
            ).stdout
        )
        for c in (code, plain)
    )
    assert 390 < most - least < 460


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    """Bug: `[Errno 17] File exists`, without the flag that it is about."""
    (tmp_path / "here").write_text("a file")
    for folder in (tmp_path / "here", "/proc/nobody/can/write/here"):
        with pytest.raises(
            OSError, match=f"--out_dir {folder}: .*name a folder that can be written"
        ):
            make_folder("--out_dir", folder)
