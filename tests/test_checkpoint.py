"""checkpoint.py and files/logs.py: files that are whole or not there, damage that is known, logs
that keep the right rows."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import checkpoint
from files import disk, logs
from tests.harness import ROOT, Run, error_line


def state(step=0):
    torch.manual_seed(step)
    tensors = {f"blocks.{i}.weight": torch.randn(9, 7) for i in range(4)}
    return {
        "predictor": tensors,
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "epoch": step,
        "itr": 0,
        "args": {"data": [["a"]], "lr": 1e-3, "encoder": None},
        "rng": torch.get_rng_state(),
    }


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def names(folder):
    return [os.path.basename(p) for p in checkpoint.list_checkpoints(folder)]


def test_what_is_saved_is_what_is_loaded_and_torch_can_read_it(tmp_path):
    """Bug: our checksum makes the file unreadable for plain torch.load, which Meta's hub code and
    users call."""
    path = checkpoint.save(tmp_path, state(3), 3)
    assert equal(checkpoint.load(path), state(3))
    assert equal(torch.load(path, weights_only=True), state(3))
    assert equal(torch.load(path, weights_only=True, mmap=True), state(3))
    assert os.readlink(tmp_path / checkpoint.LATEST) == "checkpoint-epoch003.pth.tar"


def test_rotation_keeps_the_last_and_every_nth(tmp_path):
    """Bug: rotation deletes what it has just written, sorts epoch 10 before 9 or 1000 before 999,
    or keeps all when keep_last is 0."""
    for epoch, itr in ((9, 0), (9, 5), (10, 0), (25, 0), (26, 7), (999, 0), (1000, 0)):
        path = checkpoint.save(
            tmp_path, {"epoch": epoch, "itr": itr}, epoch, itr, keep_last=2, keep_every=25
        )
        assert os.path.realpath(tmp_path / checkpoint.LATEST) == os.path.realpath(path)
        assert checkpoint.load_latest(tmp_path) == ({"epoch": epoch, "itr": itr}, path)
    assert names(tmp_path) == [
        "checkpoint-epoch025.pth.tar",
        "checkpoint-epoch999.pth.tar",
        "checkpoint-epoch1000.pth.tar",
    ]

    for epoch in (1001, 1002):
        # 0: none is kept for good, and the new one must survive
        checkpoint.save(tmp_path, {}, epoch, keep_last=0, keep_every=0)
    assert names(tmp_path) == ["checkpoint-epoch1002.pth.tar"]

    (tmp_path / "checkpoint-epoch001-copy.pth.tar").write_bytes(b"a user's own")
    checkpoint.save(tmp_path, {}, 1003, keep_last=1)
    assert (tmp_path / "checkpoint-epoch001-copy.pth.tar").exists()
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize(
    "where",
    ["start", "data.pkl", "tensor", "padding", "directory", "attributes", "end", "checksum"],
)
def test_a_flipped_bit_is_known_wherever_it_is(tmp_path, where):
    """Bug: the zip's CRCs do not cover its directory: bit 4 of an entry's attributes makes
    torch.load return uninitialised memory."""
    path = checkpoint.save(tmp_path, state(), 1)
    raw = bytearray(open(path, "rb").read())

    # a record of the central directory
    entry = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 200)
    tensor = raw.index(state()["predictor"]["blocks.2.weight"].numpy().tobytes())
    place = {
        "start": 5,
        "data.pkl": raw.index(b"predictor"),
        "tensor": tensor + 9,
        "padding": tensor - 1,
        "directory": entry + 12,
        "attributes": entry + 38,
        "end": len(raw) - 12,
        "checksum": len(raw) - 3,
    }[where]
    raw[place] ^= 0x10
    open(path, "wb").write(raw)
    with pytest.raises(ValueError, match="checkpoint-epoch001.pth.tar is damaged"):
        checkpoint.load(path)


def test_a_cut_file_is_known_at_every_length(tmp_path, capsys):
    """Bug: a file cut just before its end still loads, or raises something else than ValueError,
    and the run does not fall back."""
    good = checkpoint.save(tmp_path, state(1), 1)
    path = checkpoint.save(tmp_path, state(2), 2)
    raw = open(path, "rb").read()
    for length in [0, 1, 8, 9, len(raw) // 2, len(raw) - 9, len(raw) - 8, len(raw) - 1]:
        open(path, "wb").write(raw[:length])
        loaded, used = checkpoint.load_latest(tmp_path)
        assert used == good and equal(loaded, state(1)), length
        out = capsys.readouterr().out
        assert path in out and "damaged" in out and "the one before" in out

    open(good, "wb").write(b"\0" * 300)
    with pytest.raises(ValueError, match="all 2 checkpoints"):
        checkpoint.load_latest(tmp_path)
    assert checkpoint.load_latest(tmp_path / "nothing") == (None, None)


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_loader_whose_batch_is_not_taken_prints_no_error(debug):
    """Bug: a signal stops the training while it takes a batch. The loader's thread then finds its
    pipe broken, and what it printed ended in a traceback of its own."""
    program = (
        "import socket, sys, time, checkpoint, multiprocessing.resource_sharer as sharer\n"
        "sys.excepthook = checkpoint.short_excepthook\n"
        "where = sharer.DupFd(0)._id[0]\n"
        "taker = socket.socket(socket.AF_UNIX)\n"
        "taker.connect(where)\n"
        "taker.recv(1)\n"
        "taker.close()\n"
        "time.sleep(0.5)\n"
        "print('alive')"
    )
    env = os.environ | {"NANOJEPA_DEBUG": debug}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "alive\n"

    # the thread did fail: whoever looks for faults sees where
    assert ("resource_sharer" in done.stderr) == bool(debug), done.stderr
    assert "signal only works" not in done.stderr


def test_a_restarted_rank_waits_for_the_lock_of_a_dead_node(tmp_path):
    """Bug: NFS keeps the lock of a node that died for a minute and more, and rank 0, started again
    elsewhere, uses up --max_restarts."""
    program = (
        "import sys, time, checkpoint; checkpoint.lock(sys.argv[1]); print('mine', flush=True);"
        " time.sleep(float(sys.argv[2]))"
    )

    def start(seconds, restarts):
        env = os.environ | {"TORCHELASTIC_RESTART_COUNT": restarts}
        command = [sys.executable, "-c", program, str(tmp_path), str(seconds)]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start(60, "0")
    assert first.stdout.readline() == "mine\n"
    second = start(0, "1")

    # of which Python and torch take two
    time.sleep(4)
    assert second.poll() is None
    first.kill()
    assert second.communicate(timeout=50)[0] == "mine\n"
    first.communicate()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    """Bug: a checkpoint from elsewhere runs code; or is refused by an exception that load_latest
    does not expect."""
    monkeypatch.chdir(tmp_path)

    # with a right checksum
    path = checkpoint.save("run", {"epoch": Bomb()}, 1)
    with pytest.raises(ValueError, match="checkpoint-epoch001"):
        checkpoint.load(path)
    assert os.listdir(tmp_path) == ["run"]


KILLED = """
import sys, torch, checkpoint
big = {"predictor": {"w": torch.arange(3_000_000, dtype=torch.float32)}}
write = checkpoint.save if sys.argv[2] == "save" else checkpoint.Writer().save
for epoch in range(1, 10**6):
    write(sys.argv[1], big | {"epoch": epoch}, epoch, keep_last=2)
    print(epoch, flush=True)
"""


@pytest.mark.parametrize("way", ["save", "in a thread"])
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, way):
    """Bug: a checkpoint is visible before it is whole, `latest` points at nothing, or what the
    killed saves left behind piles up."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        p = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), way],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3):
            p.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        p.send_signal(signal.SIGKILL)
        done = [int(x) for x in p.communicate()[0].split()]
        loaded, path = checkpoint.load_latest(tmp_path)
        # a thread's last one was begun, and the one before it is done
        assert loaded["epoch"] >= max(done, default=3) - (way != "save")
        assert torch.equal(loaded["predictor"]["w"], torch.arange(3_000_000.0))
        assert os.path.exists(tmp_path / checkpoint.LATEST)
        assert len(names(tmp_path)) <= 3

    (tmp_path / "checkpoint-epoch900.pth.tar.77.tmp").write_bytes(b"x")

    # killed between the two lines that move the link
    (tmp_path / (checkpoint.LATEST + ".tmp")).symlink_to("gone")
    checkpoint.save(tmp_path, {"epoch": 10**6}, 10**6)
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]
    assert checkpoint.load_latest(tmp_path)[0] == {"epoch": 10**6}


def test_what_is_written_in_a_thread_is_the_moment_of_the_call(tmp_path):
    """Bug: the next step changes weights, lists or flags that are still being written; tensors that
    share memory are written twice; the versions beside a state_dict are lost."""
    layer = torch.nn.BatchNorm1d(1000)
    flags = {"data": [["a"]], "lr": 0.1}
    weights = layer.state_dict()
    of_now = {"model": weights, "same": {"w": weights["weight"][10:]}, "args": flags}
    alone = os.path.getsize(checkpoint.save(tmp_path / "alone", of_now, 1))
    writer = checkpoint.Writer()
    path = writer.save(tmp_path / "run", of_now, 1)
    with torch.no_grad():
        layer.weight.fill_(7)
    flags["data"][0].append("b")
    flags["lr"] = 0.2
    writer.wait()

    loaded = checkpoint.load(path)
    assert (loaded["model"]["weight"] == 1).all() and len(loaded["same"]["w"]) == 990
    assert loaded["args"] == {"data": [["a"]], "lr": 0.1}
    assert loaded["model"]._metadata == weights._metadata
    assert os.path.getsize(path) == alone


def test_one_checkpoint_is_written_at_a_time(tmp_path):
    """Bug: a slow disk; two threads rotate at once, `latest` goes back, or the end of the run does
    not wait."""
    writer = checkpoint.Writer()
    big = {"w": torch.zeros(2_000_000)}
    for epoch in range(1, 6):
        path = writer.save(tmp_path, big | {"epoch": epoch}, epoch, keep_last=2, keep_every=0)
    writer.wait()
    assert names(tmp_path) == ["checkpoint-epoch004.pth.tar", "checkpoint-epoch005.pth.tar"]
    assert os.path.realpath(tmp_path / checkpoint.LATEST) == os.path.realpath(path)
    assert checkpoint.load(path)["epoch"] == 5


# without a wait between them, since a save waits for the one before
MANY = """
import sys, torch, checkpoint
cpu = torch.device("cpu")
state = {"w": [torch.ones(40, 2**18) for _ in range(3)]}
writer = checkpoint.Writer()
before = checkpoint.peak_memory(cpu)
for epoch in range(1, 4):
    writer.save(sys.argv[1], state, epoch)
writer.wait()
print(checkpoint.peak_memory(cpu) - before)
"""


def test_a_copy_is_made_once_and_freed(tmp_path):
    """Bug: 12 bytes a weight of host memory become 24: the copy before is kept by the thread, or
    by the one who waits for it, while the next is made."""
    # a process that is forked maps libraries only as it needs them: this one starts by itself
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    # 120 MiB, and one of the pieces in which a file is written and read
    assert 115 < float(done.stdout) < 200, done.stderr


FULL = """
import resource, signal, sys, time, torch, checkpoint
sys.excepthook = checkpoint.short_excepthook
writer = checkpoint.Writer()
writer.save(sys.argv[1], {"epoch": 1}, 1)
writer.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writer.save(sys.argv[1], {"w": torch.zeros(10**6)}, 2)
if sys.argv[2] == "another-error":
    raise ValueError("the loss is not finite")
if sys.argv[2] == "the-log":
    open(sys.argv[1] + "/train.csv", "w").write("1" * 200_000)
if sys.argv[2] == "next":
    writer.save(sys.argv[1], {"epoch": 3}, 3)
for step in range(6000 * (sys.argv[2] == "a-step")):
    writer.check()
    time.sleep(0.01)
if sys.argv[2] == "the-end":
    writer.wait()
print("trained")
"""


@pytest.mark.parametrize("then", ["a-step", "next", "the-end", "the-log", "another-error"])
def test_a_full_disk_is_one_sentence_in_a_thread_too(forkserver, tmp_path, then):
    """Bug: nobody learns that the thread failed: the run ends with 0, or without the sentence where
    another error ends it first; a traceback; the next checkpoint is written all the same."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    out = tmp_path / "run"
    code, text = Run(tmp_path, script, out, then).wait()
    if then == "another-error":
        text = text.replace("error: the loss is not finite (NANOJEPA_DEBUG=1 shows where)\n", "")
    line = error_line(code, text)
    last = out / "checkpoint-epoch001.pth.tar"
    assert line.startswith(f"error: could not write {out}/checkpoint-epoch002.pth.tar (")
    assert f"); last good checkpoint: {last}" in line
    assert code == 1 and text.splitlines() == [line]
    assert names(out) == [last.name] and checkpoint.load_latest(out)[0] == {"epoch": 1}
    assert not [n for n in os.listdir(out) if n.endswith(".tmp")]


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    """Bug: an error halfway through truncates what was there, or leaves its temporary file."""
    disk.write_atomically(tmp_path / "new" / "a.json", b"old")

    def half(f):
        f.write(b"half of the new")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        disk.write_atomically(tmp_path / "new" / "a.json", half)
    assert (tmp_path / "new" / "a.json").read_bytes() == b"old"
    assert os.listdir(tmp_path / "new") == ["a.json"]


def test_a_log_keeps_the_rows_before_the_checkpoint(tmp_path):
    """Bug: on resume a log repeats its header, keeps rows that are computed again, loses good ones,
    or chokes on a torn last line."""
    path = tmp_path / "train.csv"
    header = ["epoch", "itr", "jloss"]
    log = logs.open_csv(path, header, 0, 0, keep=False)
    for i in range(25):
        log({"epoch": i // 10, "itr": i % 10, "jloss": 1 / (i + 3)})
    with open(path, "a") as f:
        # the kill came in the middle of "12,0,0.1\n"
        f.write("1")
    before = open(path).read().splitlines()
    logs.open_csv(path, header, 1, 4, keep=True)({"epoch": 1, "itr": 4, "jloss": 0.123456789})
    assert open(path).read().splitlines() == before[:15] + ["1,4,0.123456789"]

    val = tmp_path / "val.csv"
    log = logs.open_csv(val, ["epoch", "skill"], 0, 0, keep=False)
    for epoch in (1, 2, 3):
        log({"epoch": epoch, "skill": epoch / 10})

    # validated after epoch 2, then saved: the row stays, that of epoch 3 goes
    logs.open_csv(val, ["epoch", "skill"], 2, 0, keep=True)
    assert open(val).read().split() == ["epoch,skill", "1,0.1", "2,0.2"]

    logs.open_csv(val, ["epoch", "skill"], 2, 0, keep=False)
    assert open(val).read() == "epoch,skill\n"


def test_a_log_of_fewer_columns_goes_on(tmp_path):
    """Bug: a run that an older version began cannot draw its curves after --resume; columns change
    places."""
    path = str(tmp_path / "train.csv")
    old = logs.open_csv(path, ["epoch", "itr", "loss"], 0, 0, False)
    for i in range(3):
        old({"epoch": 0, "itr": i, "loss": i / 4})
    new = logs.open_csv(path, ["epoch", "itr", "loss", "bytes"], 0, 2, True)
    new({"epoch": 0, "itr": 2, "loss": 9, "bytes": 5})
    found = logs.read_csv(path)
    assert found["loss"].tolist() == [0, 0.25, 9]
    assert found["itr"].tolist() == [0, 1, 2]
    assert np.isnan(found["bytes"][:2]).all() and found["bytes"][2] == 5
    empty = logs.open_csv(str(tmp_path / "val.csv"), ["epoch", "x"], 0, 0, False)
    assert len(logs.read_csv(str(tmp_path / "val.csv"))["x"]) == 0 and empty
