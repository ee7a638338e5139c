"""Faults on real runs: each round starts one, breaks something at a random moment, goes on with
--resume, and compares the end bitwise.

    python -m tests.faults --rounds 50                     # 10 minutes on two cores; folders to mount need root, else files stand in
    python -m tests.faults --kinds kill_saving two_runs --rounds 10 --seed 3

A run is train_ac.py on features of vit_tiny, deterministic on the CPU: what it logs and its last
weights must be those of a run that nothing disturbed. Lost: a checkpoint that the log promises (a
row of the next epoch is there, or "saved" was printed) is gone or cannot be read. Diverging: a
number in train.csv or a weight differs. Wrong: the fault went unsaid or was said in a traceback, or
something was left behind. Late: the run was over before the fault came, and it is tried again.
Processes start from a server that has imported torch already (multiprocessing's forkserver);
torchrun is torchrun."""

import argparse
import contextlib
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

import bench
import checkpoint
from tests.harness import Run, run
from tests.seeds import tar_of
from tests.world import (
    IPE,
    World,
    differs,
    lost,
    read,
    read_bytes,
    read_or_nothing,
    rows,
    same_features,
    sentence,
    start_server,
)

# --- faults: each breaks a run in `out` and returns (flags of the resumed run, checkpoints it
# damaged), or None if it came too late ---


def kill_training(world, out, rng):
    """kill -9 at any moment, start-up and end included."""
    p = Run(out, "train_ac.py", *world.flags, *world.data(), "--out_dir", out)
    time.sleep(rng.uniform(0, world.seconds))
    p.kill()
    return world.data(), ()


def kill_saving(world, out, rng):
    """kill -9 while a checkpoint's temporary file is there."""
    p = Run(out, "train_ac.py", *world.flags, *world.data(), "--out_dir", out)
    number = rng.randint(1, 3)
    found = p.until(lambda: glob.glob(f"{out}/checkpoint-epoch{number:03d}*.tmp"))
    time.sleep(rng.uniform(0, 0.004))
    p.kill()
    return (world.data(), ()) if found else None


def sigterm_torchrun(world, out, rng):
    """SIGTERM to torchrun: one checkpoint, no process left."""
    p = world.torchrun(out)
    enough = rng.randint(1, 2 * IPE)
    while rows(out) < enough:
        assert p.poll() is None, read(out + ".log")
        time.sleep(0.002)
    p.send_signal(signal.SIGTERM)
    p.wait(120)
    text = read(out + ".log")
    left = [c for c in glob.glob("/proc/[0-9]*/cmdline") if out in read_or_nothing(c)]
    assert text.count("; continue with --resume") == 1 and not left, (left, text)
    path = text.split("saved ")[1].split(";")[0]
    checkpoint.load(path)
    assert world.torchrun(out).wait(120) == 0, read(out + ".log")
    return "pair", ()


def mounted(out, *how):
    """Mount something on the folder; False where we may not."""
    if os.getuid() != 0:
        return False
    return subprocess.run(["mount", *how, out], capture_output=True).returncode == 0


def disk_full(world, out, rng):
    """A file system with no room left, or a limit on the size of a file, before some checkpoint."""
    size = os.path.getsize(next(iter(checkpoint.list_checkpoints(f"{world.folder}/alone"))))
    disk = rng.random() < 0.5 and mounted(out, "-t", "tmpfs", "-o", f"size={6 * size}", "tmpfs")
    limit = None if disk else rng.randint(size // 8, size - 1)
    try:
        flags = [*world.flags, *world.data(), "--out_dir", out]
        p = Run(world.folder, "train_ac.py", *flags, file_limit=limit)
        enough = rng.randint(1, 2 * IPE)
        if disk and p.until(lambda: rows(out) >= enough):
            with contextlib.suppress(OSError), open(f"{out}/filler", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(4096))
        sentence(*p.wait(), *([] if disk else ["could not write"]))
        if disk:
            os.unlink(f"{out}/filler")
            shutil.copytree(out, out + "-saved", symlinks=True)
    finally:
        if disk:
            subprocess.run(["umount", out], check=True)
    if disk:
        shutil.copytree(out + "-saved", out, symlinks=True, dirs_exist_ok=True)
    return world.data(), ()


def read_only(world, out, rng):
    """A killed run is resumed while its folder is read-only (without root: while a file stands in
    its place)."""
    kill_training(world, out, rng)
    flags = [*world.flags, *world.data()]
    if mounted(out, "--bind", out):
        subprocess.run(["mount", "-o", "remount,ro,bind", out], check=True)
        try:
            p = Run(world.folder, "train_ac.py", *flags, "--out_dir", out)
            sentence(*p.wait(), "Read-only", out)
        finally:
            subprocess.run(["umount", out], check=True)
    with open(out + "-file", "w"):
        p = Run(out, "train_ac.py", *flags, "--out_dir", out + "-file")
        sentence(*p.wait(), out + "-file")
    return world.data(), ()


def damaged(world, out, rng):
    """The newest of several checkpoints is cut, has a bit flipped, or is full of zeros."""
    p = Run(out, "train_ac.py", *world.flags, *world.data(), "--out_dir", out)
    p.until(lambda: rows(out) > 2 * IPE)
    time.sleep(rng.uniform(0, world.seconds / 4))
    p.kill()
    newest = list(checkpoint.list_checkpoints(out))[-1]
    with open(newest, "r+b") as f:
        size = os.path.getsize(newest)
        kind = rng.choice(("cut", "flip", "zeros"))
        if kind == "cut":
            f.truncate(rng.randrange(size))
        else:
            place = rng.randrange(size - 64)
            f.seek(place)
            changed = bytes(64)
            if kind == "flip":
                changed = bytes([f.read(1)[0] ^ 1 << rng.randrange(8)])
            f.seek(place)
            f.write(changed)
    return world.data(), (newest,)


def shard_replaced(world, out, rng):
    """A shard is replaced, overwritten or cut while it is trained on."""
    folder = shutil.copytree(world.features, out + "-data")
    enough = rng.randint(1, 2 * IPE)
    one, other = rng.sample(sorted(glob.glob(f"{folder}/*.tar"))[:-1], 2)
    p = Run(out, "train_ac.py", *world.flags, *world.data(folder), "--out_dir", out)
    found = p.until(lambda: rows(out) >= enough)
    how = rng.choice(("replace", "overwrite", "cut"))
    if how == "replace":
        os.replace(shutil.copy(other, one + ".new"), one)
    else:
        with open(one, "r+b") as f:
            if how == "cut":
                f.truncate(rng.randrange(os.path.getsize(one)))
            else:
                f.write(read_bytes(other))
    code, text = p.wait()
    if found and code:
        sentence(code, text, "has changed since this run opened it")
    return (world.data(), ()) if found and code else None


def worker_killed(world, out, rng):
    """kill -9 of a loader process, as by the kernel when memory runs out."""
    flags = [*world.flags, *world.data(), "--num_workers 2 --out_dir", out]
    p = Run(out, "train_ac.py", *flags)
    enough = rng.randint(1, 2 * IPE)
    if not p.until(lambda: rows(out) >= enough):
        return None
    workers = read(f"/proc/{p.process.pid}/task/{p.process.pid}/children").split()
    os.kill(int(rng.choice(workers)), signal.SIGKILL)
    code, text = p.wait()
    if code:
        sentence(code, text, "a loader process was killed", "--resume")
    return (world.data(), ()) if code else None


def nan_clip(world, out, rng):
    """One step of one recording is NaN."""
    folder = shutil.copytree(world.features, out + "-data")
    shard = sorted(glob.glob(f"{folder}/*.tar"))[rng.randrange(2)]
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    name = rng.choice(sorted(members))
    header = members[name][8 : 8 + int.from_bytes(members[name][:8], "little")]
    tensors = safetensors_load(members[name])
    tensors["z"][rng.randrange(len(tensors["z"]))] = float("nan")
    meta = json.loads(header)["__metadata__"]
    with open(shard, "wb") as f:
        f.write(tar_of(members | {name: safetensors_bytes(tensors, metadata=meta)}))
    code, text = Run(out, "train_ac.py", *world.flags, *world.data(folder), "--out_dir", out).wait()
    if code:
        key = name.removesuffix(".safetensors")
        sentence(code, text, "is not finite", key, "last good checkpoint")
    for path in checkpoint.list_checkpoints(out):
        assert all(torch.isfinite(v).all() for v in checkpoint.load(path)["predictor"].values())
    return (world.data(), ()) if code else None


def two_runs(world, out, rng):
    """A second run in the same folder is refused; the first is killed -9, and the third starts at
    once."""
    command = ["train_ac.py", *world.flags, *world.data(), "--out_dir", out]
    first = Run(out, *command, "--num_workers", rng.choice((0, 2)))
    enough = rng.randint(1, 2 * IPE)
    if not first.until(lambda: rows(out) >= enough):
        return None

    # stopped, or it may be done before the second looks
    os.kill(first.process.pid, signal.SIGSTOP)
    sentence(*Run(out, *command).wait(), f"{out} is in use by process {first.process.pid} ")
    os.kill(first.process.pid, signal.SIGCONT)
    time.sleep(rng.uniform(0, 0.3))
    first.kill()
    return world.data(), ()


def kill_encode(world, out, rng):
    """encode.py is killed -9 at any moment, twice; its shards are then what they are without."""
    for _ in range(2):
        p = Run(out, "encode.py", *world.encode, f"{out}/features")
        time.sleep(rng.uniform(0, world.encode_seconds))
        p.kill()
    run(out, "encode.py", *world.encode, f"{out}/features")
    return None if same_features(f"{out}/features", world.features) else "other features"


def kill_shards(world, out, rng):
    """prepare.shards is killed -9 at any moment, twice; every recording is then in one shard."""

    def writing():
        if rng.random() < 0.01:
            return glob.glob(f"{out}/shards/*.tmp")
        return os.path.exists(f"{out}/shards/shard-000001.tar")

    for _ in range(2):
        p = Run(out, "prepare/shards.py", *world.pack, f"{out}/shards")
        p.until(writing)
        time.sleep(rng.uniform(0, 0.01))
        p.kill()
    run(out, "prepare/shards.py", *world.pack, f"{out}/shards")
    found = [m.name for path in glob.glob(f"{out}/shards/*.tar") for m in tarfile.open(path)]
    if sorted(found) == sorted(os.listdir(world.loose)):
        return None
    return f"other members: {sorted(found)}"


TRAINING = {
    f.__name__: f
    for f in (
        kill_training,
        kill_saving,
        sigterm_torchrun,
        disk_full,
        read_only,
        damaged,
        shard_replaced,
        worker_killed,
        nan_clip,
        two_runs,
    )
}
WRITING = {f.__name__: f for f in (kill_encode, kill_shards)}


def one_round(world, kind, rng):
    """{"lost", "diverging", "wrong"}: sentences about what went wrong in a round, '' where nothing
    did."""
    out = tempfile.mkdtemp(prefix=kind + "-", dir=world.folder)
    found = dict.fromkeys(("late", "lost", "diverging", "wrong"), "")
    try:
        if kind in WRITING:
            return found | {"wrong": WRITING[kind](world, out, rng) or ""}
        hit = TRAINING[kind](world, out, rng)
        if hit is None:
            return found | {"late": "the run was over"}
        flags, spared = hit
        found["lost"] = "; ".join(lost(out, spared))
        whole = f"{world.folder}/alone"
        if flags == "pair":
            whole = world.pair()
        else:
            had = [*checkpoint.list_checkpoints(out)]
            flags = [*world.flags, *flags, "--out_dir", out]
            code, text = Run(world.folder, "train_ac.py", *flags).wait()
            assert code == 0, text
            assert not had or "resumed from" in text or "nothing left" in text, text
            assert all(f"{path} is damaged" in text for path in spared), text
        left = glob.glob(f"{out}/*.tmp")
        assert not left, left
        found["diverging"] = differs(out, whole)
        shutil.rmtree(out)
        return found
    except AssertionError as e:
        return found | {"wrong": str(e)[-2000:] or "assertion"}


def round_in_time(world, kind, rng, counts):
    """A round; a fault that came after the end of the run is no fault, and is tried again."""
    for _ in range(5):
        found = one_round(world, kind, rng)
        if not found["late"]:
            return found
        counts["late"] += 1
    wrong = "five faults in a row went unnoticed, or came after the end of the run"
    return found | {"wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    kinds = [*TRAINING, *WRITING]
    flag("--rounds", type=int, default=50, help="how many faults, dealt evenly to the kinds")
    flag("--kinds", nargs="+", default=kinds, choices=kinds, help="which faults")
    flag("--seed", type=int, default=0, help="of moments and choices")
    flag("--json", action="store_true", help="rows as JSON lines")
    args = parser.parse_args()

    # an undisturbed run, to compare with
    rng = random.Random(args.seed)
    folder = tempfile.mkdtemp(prefix="nanojepa-faults-")
    began = time.monotonic()
    os.environ["NANOJEPA_CACHE"] = os.path.join(folder, "cache")
    start_server()
    world = World(folder)

    # the rounds
    findings = ("lost", "diverging", "wrong")
    counts = {kind: dict.fromkeys(("rounds", "late", *findings), 0) for kind in args.kinds}
    every = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=args.rounds, unit="round", mininterval=every) as progress:
        for number in range(args.rounds):
            kind = args.kinds[number % len(args.kinds)]
            progress.set_description(kind)
            found = round_in_time(world, kind, rng, counts[kind])
            counts[kind]["rounds"] += 1
            for what in findings:
                if found[what]:
                    counts[kind][what] += 1
                    tqdm.write(f"round {number}, {kind}, {what}: {found[what]}")
            progress.update()

    # the table
    table = [{"fault": kind} | row for kind, row in counts.items() if row["rounds"]]
    total = {"fault": "all"}
    for what in ("rounds", "late", *findings):
        total[what] = sum(row[what] for row in counts.values())
    bench.report([*table, total], args.json, torch.device("cpu"))
    bad = sum(total[what] for what in findings)
    print(
        f"rounds {total['rounds']}, lost checkpoints {total['lost']}, diverging losses"
        f" {total['diverging']}, wrong {total['wrong']}; {time.monotonic() - began:.0f} s"
    )
    if bad:
        print(f"folders kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)
