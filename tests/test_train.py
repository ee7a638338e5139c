"""train_ac.py, encode.py and eval.py as programs: what they compute, how they stop, what they
refuse.

Every run is a process of its own, forked from a server that has imported torch already
(multiprocessing's forkserver), since importing it takes longer than these runs. tests.spread starts
train_ac.py through the interpreter, and tests/test_scale.py through torchrun."""

import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import time
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

import checkpoint
import weights
from bench.step import useful_flops
from data import ActionScaler, Clips, split_records
from evaluation.held_out import METERS, held_out, meter_summary
from evaluation.runs import open_run
from files import vpt
from files.features import feature_rows
from files.shards import Slice, index_shards
from files.video import mp4_times, read_frames
from model import Predictor, encode_steps, make_features_of
from tests.harness import (
    FIXTURES,
    PEAK,
    PLAN,
    ROOT,
    TINY,
    TORCHRUN,
    Run,
    column,
    contractor,
    error_line,
    fails,
    jsonl,
    numbers,
    rows_of,
    run,
    same_run,
    start_ranks,
    step_flops,
    words,
    write_tar,
)

# --- running ---


pytestmark = pytest.mark.usefixtures("forkserver")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shards):
    """A folder with scaler.pkl, features/ of two shards and held/ of the third; .features and
    .video are flags to train on them."""
    folder = tmp_path_factory.mktemp("world")
    video = shards / "shard-{000000..000001}.tar"
    video_held = shards / "shard-000002.tar"
    flags = ["--data", video, "--output", folder / "scaler.pkl", "--num_workers 0"]
    run(folder, "fit_scaler.py", *flags)
    flags = ["--data", video, "--out", folder / "features", "--encoder vit_tiny --crop_size 32"]
    run(folder, "encode.py", *flags)
    flags = ["--data", video_held, "--out", folder / "held", "--encoder vit_tiny --crop_size 32"]
    run(folder, "encode.py", *flags)
    base = ["--scaler", folder / "scaler.pkl", TINY]
    features = [
        *base,
        "--data",
        folder / "features" / "*.tar",
        "--val_data",
        folder / "held" / "*.tar",
    ]
    on_video = [*base, "--data", video, "--val_data", video_held, "--encoder vit_tiny"]
    return types.SimpleNamespace(
        folder=folder, features=features, video=on_video, base=base, shards=shards
    )


@pytest.fixture(scope="module")
def trained(world):
    """A finished run on features, saved after epochs 1, 2 and 3 of 25 steps; .flags are what makes
    it."""
    flags = [*world.features, PLAN, "--ipe 25 --keep_last 9"]
    run(world.folder, "train_ac.py", *flags, PEAK, "--out_dir", world.folder / "trained")
    return types.SimpleNamespace(out=world.folder / "trained", flags=flags)


def rewrite(source, target, change, prefix=""):
    """Copy a feature shard; change(key, tensors) gives the tensors to write, or None to leave them
    as they are. prefix: before each key, so that the copies are recordings of their own."""
    records, _ = index_shards([str(source)])
    members = {}
    with tarfile.open(source) as tar:
        for r in records:
            data = tar.extractfile(r.key + ".safetensors").read()
            if tensors := change(
                r.key, dict(zip(("z", "actions", "states"), feature_rows(r, 0, r.length)))
            ):
                meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
                data = safetensors_bytes(tensors, metadata=meta)
            members[prefix + r.key + ".safetensors"] = data
    return write_tar(target, members)


# --- schedule ---


@pytest.mark.parametrize(
    "name, ipe, flags",
    [
        (
            "droid_config",
            300,
            {
                "start_lr": 7.5e-5,
                "lr": 4.25e-4,
                "final_lr": 0.0,
                "warmup": 15,
                "anneal": 15,
                "epochs": 315,
            },
        ),
        (
            "tiny",
            5,
            {"start_lr": 1e-4, "lr": 1e-3, "final_lr": 1e-5, "warmup": 2, "anneal": 3, "epochs": 8},
        ),
    ],
)
def test_the_schedule_is_the_reference(name, ipe, flags):
    """Bug: a step off by one (the reference steps its schedule before the optimizer), an anneal
    that does not end at the last step."""
    import train_ac

    t = load_file(os.path.join(FIXTURES, "schedules.safetensors"))
    total = flags["epochs"] * ipe
    warmup, anneal = flags["warmup"] * ipe, flags["anneal"] * ipe
    rates = flags["start_lr"], flags["lr"], flags["final_lr"]
    mine = [
        train_ac.lr_at(k + 1, total, warmup, anneal, *rates) for k in t[f"in/{name}/step"].tolist()
    ]
    np.testing.assert_allclose(mine, t[f"out/{name}/lr"].numpy(), rtol=1e-12, atol=1e-18)


def test_the_learning_rate_of_a_run_is_the_schedule(trained):
    """Bug: lr_at is right and the loop calls it with the wrong step, or logs another one than the
    optimizer used."""
    lr = numbers(trained.out, "lr")[:, 0]
    expected = np.interp(np.arange(1, 76), [0, 25, 50, 75], [1e-4, 2e-3, 2e-3, 0])
    np.testing.assert_allclose(lr, expected, rtol=1e-6, atol=1e-12)
    assert checkpoint.load_latest(trained.out)[0]["optimizer"]["param_groups"][0]["lr"] == 0


# --- ranks, micro-batches ---


def test_ranks_and_micro_batches_are_one_batch(world):
    """Bug: the gradient depends on how a global batch is dealt to ranks or micro-batches. (The
    environment of torchrun itself: tests/test_scale.py.)"""
    flags = [*world.features, "--epochs 2 --warmup 1 --anneal 1 --ipe 4"]
    out = world.folder
    run(out, "train_ac.py", *flags, "--out_dir", out / "one")
    run(out, "train_ac.py", *flags, "--batch_size 2 --grad_accum 2 --out_dir", out / "accumulated")
    two = start_ranks(out, "train_ac.py", *flags, "--batch_size 2 --out_dir", out / "two")
    both = "--batch_size 1 --grad_accum 2 --out_dir"
    ranks = two + start_ranks(out, "train_ac.py", *flags, both, out / "both")
    for rank in ranks:
        assert rank.wait()[0] == 0, rank.text()

    # rank 0 alone speaks
    assert [rank.text().count("held out after epoch 2") for rank in ranks] == [1, 0, 1, 0]

    one = numbers(out / "one", "jloss", "sloss", "grad_norm")
    assert len(one) == 8 and one[:, 0].std() > 1e-3

    held = numbers(out / "one", "jloss", "sloss", "tf_true", "ro_copy", log="val.csv")
    for name in ("accumulated", "two", "both"):
        np.testing.assert_allclose(
            numbers(out / name, "jloss", "sloss"), one[:, :2], rtol=1e-5, err_msg=name
        )
        np.testing.assert_allclose(
            numbers(out / name, "grad_norm"), one[:, 2:], rtol=1e-3, err_msg=name
        )
        np.testing.assert_allclose(
            numbers(out / name, "jloss", "sloss", "tf_true", "ro_copy", log="val.csv"),
            held,
            rtol=1e-5,
        )


# --- stopping and going on ---


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_resume_after_kill_is_exact(world, tmp_path, trained, dtype):
    """Bug: clip order, Adam's state, schedule or logs do not survive a kill in the middle of an
    epoch, or depend on --num_workers."""
    flags = [*trained.flags, "--dtype", dtype, "--out_dir"]
    whole = trained.out
    if dtype != "float32":
        whole = tmp_path / "whole"
        run(tmp_path, "train_ac.py", *flags, whole)
    cut = tmp_path / "cut"
    killed = Run(tmp_path, "train_ac.py", *flags, cut)
    saved = cut / checkpoint.LATEST  # written while the next steps are made
    killed.signal_when(
        cut / "train.csv", lambda rows: len(rows) >= 29 and saved.exists(), signal.SIGKILL
    )
    assert killed.wait()[0] == -signal.SIGKILL
    assert os.readlink(cut / checkpoint.LATEST) == "checkpoint-epoch001.pth.tar"
    assert 29 <= len(rows_of(cut / "train.csv")) < 50

    text = run(tmp_path, "train_ac.py", *flags, cut, "--resume --num_workers 2")
    assert f"resumed from {cut}/checkpoint-epoch001.pth.tar at epoch 1, itr 0" in text
    assert "--num_workers 2 (was 0)" in text
    same_run(whole, cut)


def test_resume_is_exact_on_video_with_augmentation(world, tmp_path):
    """Bug: augmentations draw from a generator that a resumed run or another number of workers has
    in another state."""
    augment = (
        "--horizontal_flip --random_resize_scale 0.8 --motion_shift 0.1 --temporal_jitter 1"
        " --action_noise 0.1"
    )
    flags = [
        *world.video,
        augment,
        (
            "--epochs 2 --warmup 0 --anneal 0 --ipe 3 --batch_size 2 --val_clips 4 --dtype bfloat16"
            " --out_dir"
        ),
    ]
    run(tmp_path, "train_ac.py", *flags, tmp_path / "whole")
    run(tmp_path, "train_ac.py", *flags, tmp_path / "cut", "--max_steps 4 --num_workers 2")
    run(tmp_path, "train_ac.py", *flags, tmp_path / "cut", "--resume")
    same_run(tmp_path / "whole", tmp_path / "cut")

    run(tmp_path, "train_ac.py", *[f for f in flags if f != augment], tmp_path / "plain")
    assert column(tmp_path / "plain", "jloss") != column(tmp_path / "whole", "jloss")


@pytest.mark.parametrize(
    "number, group",
    [
        (signal.SIGTERM, True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((signal.SIGINT, True), (signal.SIGTERM, False))
        ),
    ],
)
def test_a_signal_stops_saves_and_resumes_exactly(tmp_path, trained, number, group):
    """Bug: the step's work is lost or counted twice; a signal to the whole group (Ctrl-C, scancel)
    kills the loader processes first."""
    flags = [*trained.flags, "--out_dir", tmp_path / "run"]
    stopped = Run(tmp_path, "train_ac.py", *flags, "--num_workers 2")
    stopped.signal_when(tmp_path / "run" / "train.csv", lambda rows: len(rows) >= 28, number, group)
    code, text = stopped.wait()
    latest = os.readlink(tmp_path / "run" / checkpoint.LATEST)
    assert code == 0 and "Traceback" not in text, text
    assert "-itr" in latest
    assert f"saved {tmp_path / 'run' / latest}; continue with --resume" in text
    run(tmp_path, "train_ac.py", *flags, "--resume")
    same_run(trained.out, tmp_path / "run")
    assert not [n for n in os.listdir(tmp_path / "run") if n.endswith(".tmp")]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(world, tmp_path):
    """Bug: the rank that got the signal stops, the other waits for it for ever."""
    flags = [*world.features, PLAN, "--ipe 25 --batch_size 2"]
    ranks = start_ranks(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "cut")
    ranks[1].signal_when(
        tmp_path / "cut" / "train.csv", lambda rows: len(rows) >= 28, signal.SIGTERM
    )
    for rank in ranks:
        assert rank.wait()[0] == 0, rank.text()
    assert "-itr" in os.readlink(tmp_path / "cut" / checkpoint.LATEST)
    for more in (["--out_dir", tmp_path / "cut", "--resume"], ["--out_dir", tmp_path / "whole"]):
        for rank in start_ranks(tmp_path, "train_ac.py", *flags, *more):
            assert rank.wait()[0] == 0, rank.text()
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(world, tmp_path):
    """Bug: torchrun kills its ranks before they have saved."""
    command = [
        *TORCHRUN,
        "train_ac.py",
        *words([*world.features, PLAN, "--ipe 200 --out_dir", tmp_path / "run"]),
    ]
    p = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    while not (
        os.path.exists(tmp_path / "run" / "train.csv")
        and len(rows_of(tmp_path / "run" / "train.csv")) > 5
    ):
        assert p.poll() is None and time.monotonic() < end
        time.sleep(0.01)

    p.send_signal(signal.SIGTERM)
    text = p.communicate(timeout=120)[0]
    state, path = checkpoint.load_latest(tmp_path / "run")
    assert f"saved {path}; continue with --resume" in text
    assert state["itr"] == len(rows_of(tmp_path / "run" / "train.csv"))


# --- refusals ---


def test_what_does_not_fit_is_refused_in_one_sentence(world, trained, tmp_path):
    """Bug: a run goes on with another scaler, size, action space or encode mode than it began with,
    or the refusal is a traceback."""
    mean = np.zeros(4)
    var = np.ones(4)
    meta = {"names": vpt.CONTINUOUS, "fps": 10.0, "frames_per_step": 2}
    ActionScaler(mean, var, var, 9, meta).save(tmp_path / "fps.pkl")
    ActionScaler(mean[:3], var[:3], var[:3], 9, {}).save(tmp_path / "dims.pkl")
    ActionScaler(mean, var * 2, var, 9, {}).save(tmp_path / "other.pkl")
    shutil.copytree(trained.out, tmp_path / "run", symlinks=True)
    bad = tmp_path / "bad.pth.tar"
    bad.write_bytes(b"<html>not found</html>")
    new = ["--out_dir", tmp_path / "new"]
    resume = ["--out_dir", tmp_path / "run", "--resume"]
    features, plan = world.features, trained.flags
    features_only = world.folder / "features" / "*.tar"
    video = [w for w in world.video if w != "--encoder vit_tiny"]
    cases = [
        (
            [*plan, "--out_dir", tmp_path / "run"],
            "run holds checkpoints of an earlier run: pass --resume to continue it, or another",
        ),
        (
            [*features, *new, PLAN, "--scaler", tmp_path / "none.pkl"],
            "none.pkl; fit one with: python fit_scaler.py",
        ),
        (
            [*features, *new, PLAN, "--scaler", tmp_path / "fps.pkl"],
            "fitted with --fps 10, this run has 5: give the run --fps 10, or fit it again",
        ),
        (
            [*features, *new, PLAN, "--scaler", tmp_path / "dims.pkl"],
            "dims.pkl scales 3, this run needs ['mouse_dx'",
        ),
        ([*features, *new, PLAN, "--scaler", bad], "bad.pth.tar is not an action scaler"),
        ([*plan, *resume, "--scaler", tmp_path / "other.pkl"], "scaler_hash"),
        (
            [*plan, *resume, "--pred_dim 96"],
            "checkpoint-epoch003.pth.tar was trained with pred_dim 48, this run has 96",
        ),
        ([*plan, *resume, "--pred_heads 6"], "was trained with num_heads 3, this run has 6"),
        ([*plan, *resume, "--action_space 36"], "action_names"),
        ([*plan, *resume, "--encode frame"], "was made with --encode tubelet, this run has frame"),
        (
            [*world.video, PLAN, *resume, "--encode frame"],
            "was trained with encode tubelet, this run has frame",
        ),
        (
            [*world.video, PLAN, *resume, "--crop_size 64"],
            "was trained with grid 2, this run has 4",
        ),
        (
            [*world.video, PLAN, *resume, "--decoder decord"],
            "was trained with decoder pyav, this run has decord",
        ),
        (
            [*plan, *new, "--decoder decord"],
            "features that were made with pyav; leave the flag out",
        ),
        ([*plan, *new, "--crop_size 64"], "was made with --crop_size 32, this run has 64"),
        (
            [*features, *new, "--epochs 1 --warmup 1 --anneal 1"],
            "--warmup 1 and --anneal 1 do not fit into --epochs 1",
        ),
        ([*features, *new, "--grad_accum 0"], "--grad_accum 0 is too small"),
        ([*features, *new, PLAN, "--horizontal_flip"], "--horizontal_flip needs pixels"),
        ([*features, *new, PLAN, "--save_encoder"], "name the --encoder that made them"),
        ([*features, *new, PLAN, "--init_from", bad], "a web page: fetch it again"),
        (
            [*features, *new, PLAN, "--out_dir", tmp_path / "late", "--auto_steps 8"],
            "auto_steps=8 needs 1 <= auto_steps < T",
        ),
        ([*world.base, *new, PLAN, "--data", tmp_path / "none-*.tar"], "no shard matches"),
        (
            [*world.base, *new, PLAN, "--data", features_only, "--val_data", features_only],
            "--val_data and --data share 4 recordings",
        ),
        (
            [*video, *new, PLAN, "--encoder", tmp_path / "encoder.pt"],
            "no such file, and none of the names vjepa2_vitl",
        ),
        (
            [*world.video, *new, PLAN, "--tubelet_size 1"],
            "--tubelet_size 1, but this encoder merges 2 frames",
        ),
    ]
    for flags, sentence in cases:
        assert sentence in fails(tmp_path, "train_ac.py", *flags)
    assert not (tmp_path / "new").exists() or os.listdir(tmp_path / "new") == ["lock"]
    assert (tmp_path / "run" / "train.csv").read_bytes() == (trained.out / "train.csv").read_bytes()
    assert "nothing left to do: 75 steps are done" in run(tmp_path, "train_ac.py", *plan, *resume)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(trained, tmp_path, damage):
    """Bug: a damaged checkpoint ends the run, or worse is used; the repeated epoch is not the one
    that was lost."""
    shutil.copytree(trained.out, tmp_path / "run", symlinks=True)
    paths = [*checkpoint.list_checkpoints(tmp_path / "run")]
    for n, path in enumerate(reversed(paths)):
        raw = bytearray(open(path, "rb").read())
        raw[len(raw) // 2] ^= 0x10
        with open(path, "wb") as f:
            f.write(raw if damage == "flip" else raw[: len(raw) // 2])
        if not n:
            text = run(
                tmp_path, "train_ac.py", *trained.flags, "--out_dir", tmp_path / "run", "--resume"
            )
            assert f"{paths[2]} is damaged" in text
            assert f"resumed from {paths[1]} at epoch 2, itr 0" in text
            same_run(trained.out, tmp_path / "run")
            with open(path, "wb") as f:
                f.write(raw[: len(raw) // 2])

    error = fails(
        tmp_path, "train_ac.py", *trained.flags, "--out_dir", tmp_path / "run", "--resume"
    )
    assert "all 3 checkpoints" in error and "damaged" in error


@pytest.mark.parametrize("how", ["limit", "disk"])
def test_a_full_disk_spares_the_checkpoint_before(trained, tmp_path, how):
    """Bug: the last good checkpoint is overwritten or rotated away before the new one is whole, or
    half a file stays behind."""
    out = tmp_path / "run"
    out.mkdir()
    if (
        how == "disk"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", out], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")

    try:
        flags = [*trained.flags, "--out_dir", out]
        run(tmp_path, "train_ac.py", *flags, "--max_steps 25")
        if how == "disk":
            (out / "other").write_bytes(bytes(700_000))
        limit = 500_000 if how == "limit" else None
        error = fails(tmp_path, "train_ac.py", *flags, "--resume", file_limit=limit)
        assert f"could not write {out}/checkpoint-epoch002.pth.tar" in error
        assert "checkpoint-epoch001.pth.tar" in error
        assert checkpoint.load_latest(out)[0]["epoch"] == 1
        assert not [n for n in os.listdir(out) if n.endswith(".tmp")]
        if how == "disk":
            (out / "other").unlink()
        if how == "limit":
            run(tmp_path, "train_ac.py", *flags, "--resume")
            same_run(trained.out, out)
    finally:
        if how == "disk":
            subprocess.run(["umount", out])


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks(world, tmp_path):
    """Bug: the rank that writes learns of a full disk from its thread, and the other trains on or
    waits for ever; or the run ends only where the next checkpoint is due."""
    out = tmp_path / "run"
    flags = [*world.features, PLAN, "--ipe 60 --batch_size 2 --val_clips 0 --out_dir", out]
    run(tmp_path, "train_ac.py", *flags, "--max_steps 2 --batch_size 4")
    flags += ["--resume --max_steps 122"]
    ranks = start_ranks(tmp_path, "train_ac.py", *flags, file_limit=500_000)
    code, text = ranks[0].wait()
    sentence = error_line(code, text)
    assert f"could not write {out}/checkpoint-epoch001.pth.tar" in sentence
    assert f"last good checkpoint: {out}/checkpoint-epoch000-itr00002.pth.tar" in sentence
    assert ranks[1].wait()[0] not in (0, None), ranks[1].text()
    assert 60 <= len(rows_of(out / "train.csv")) < 120


def test_a_loss_that_is_not_finite_stops_the_run(world, trained, tmp_path):
    """Bug: NaN goes into the weights and the next checkpoint, and nobody learns which clip it came
    from."""
    source = world.folder / "features" / "shard-000001.tar"
    poison = rewrite(
        source,
        tmp_path / "nan.tar",
        lambda key, t: t | {"z": t["z"] * float("nan")} if "player-1@" in key else None,
        prefix="nan-",
    )
    out, flags = tmp_path / "run", trained.flags
    run(tmp_path, "train_ac.py", *flags, "--out_dir", out, "--max_steps 25")
    options = [*flags, "--data", poison, "--out_dir", out, "--resume --log_every 50"]
    error = fails(tmp_path, "train_ac.py", *options)
    assert "the loss (nan) or its gradient (nan) is not finite at epoch 1, itr " in error
    assert "6.11_player-1@00000" in error
    assert f"last good checkpoint: {out}/checkpoint-epoch001.pth.tar" in error

    itr = int(error.split("itr ")[1].split(",")[0])
    bad = [r for r in rows_of(out / "train.csv") if not np.isfinite(r[2])]
    assert not bad
    assert rows_of(out / "train.csv")[-1][:2] == ([1, itr - 1] if itr else [0, 24])

    (kept,) = checkpoint.list_checkpoints(out)
    assert all(torch.isfinite(v).all() for v in checkpoint.load(kept)["predictor"].values())


def test_bad_clips_are_skipped_listed_and_limited(world, tmp_path):
    """Bug: a clip that cannot be read ends the run, leaves a hole in the batch, is not written
    down, or half the data is lost unnoticed."""
    shard = rewrite(
        world.folder / "features" / "shard-000000.tar",
        tmp_path / "short.tar",
        lambda key, t: (
            {k: v[: 4 - (k == "actions")] for k, v in t.items()} if "player-0" in key else None
        ),
        prefix="short-",
    )
    flags = [*world.features, PLAN, "--ipe 20 --data", shard, "--out_dir"]
    run(tmp_path, "train_ac.py", *flags, tmp_path / "some", "--max_bad_fraction 0.3")
    listed = [json.loads(line) for line in open(tmp_path / "some" / "bad_clips.jsonl")]
    assert 2 <= len(listed) <= 40
    assert {(b["file"], b["key"]) for b in listed} == {(shard, "short-6.10_player-0@00000")}
    assert "too short: 4 steps" in listed[0]["reason"]
    assert len(rows_of(tmp_path / "some" / "train.csv")) == 60

    error = fails(tmp_path, "train_ac.py", *flags, tmp_path / "many", "--max_bad_fraction 0.005")
    assert "clips cannot be read" in error
    assert f"{shard} short-6.10_player-0@00000" in error
    assert "bad_clips.jsonl" in error

    # judged after 100 clips
    assert 25 <= len(rows_of(tmp_path / "many" / "train.csv")) + 1 < 60


def test_recordings_that_cannot_be_opened_are_said(world, tmp_path, mp4):
    """Bug: a truncated video or an empty JSONL is left out without a word."""
    ok = {"ok.mp4": mp4, "ok.jsonl": jsonl(contractor())}
    lines = jsonl(contractor(seed=7))
    bad = {
        "cut.mp4": mp4[: len(mp4) // 2],
        "cut.jsonl": lines,
        "empty.mp4": mp4,
        "empty.jsonl": b"",
        "lone.mp4": mp4,
    }
    shard = write_tar(tmp_path / "a.tar", ok | bad)
    flags = [
        *world.video,
        "--data",
        shard,
        "--epochs 1 --warmup 0 --anneal 0 --ipe 6 --batch_size 2 --val_clips 4",
    ]
    text = run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "run")
    assert "2 recordings cannot be used" in text and f"{shard} " in text

    reasons = {
        b["key"]: b["reason"] for b in map(json.loads, open(tmp_path / "run" / "bad_clips.jsonl"))
    }
    assert reasons.keys() >= {"cut", "lone", "empty"}
    assert "truncated" in reasons["cut"]
    assert "the file is empty" in reasons["empty"]
    assert len([1 for line in open(tmp_path / "run" / "bad_clips.jsonl") if '"cut"' in line]) == 1


# --- validation and the action meter ---


def test_validation_shares_no_recording_with_training(world, tmp_path):
    """Bug: held-out recordings are trained on. Here they hold NaN, which would end the run."""
    records, _ = index_shards(
        [str(world.folder / "features" / f"shard-00000{i}.tar") for i in range(2)]
    )
    held = {r.key for r in split_records(records, 0.5)[1]}
    assert len(held) == 2

    for i in range(2):
        name = f"shard-00000{i}.tar"
        rewrite(
            world.folder / "features" / name,
            tmp_path / name,
            lambda k, t: t | {"z": t["z"] * float("nan")} if k in held else None,
        )

    flags = [
        *world.base,
        PLAN,
        "--ipe 20 --val_fraction 0.5 --data",
        tmp_path / "*.tar",
        "--out_dir",
        tmp_path / "run",
    ]
    text = run(tmp_path, "train_ac.py", *flags)
    assert np.isfinite(numbers(tmp_path / "run", "jloss")).all()
    assert len(numbers(tmp_path / "run", "jloss")) == 60
    assert np.isnan(numbers(tmp_path / "run", "jloss", log="val.csv")).all()

    # as it was: on all of these
    assert "the scaler was fitted on recordings held out here" in text


def test_the_scaler_is_not_blamed_for_shards_of_the_same_name(world, tmp_path):
    """Bug: train/shard-000000.tar and val/shard-000000.tar are taken for one, and every run on the
    demo warns."""
    (tmp_path / "val").mkdir()
    shutil.copy(world.folder / "held" / "shard-000002.tar", tmp_path / "val" / "shard-000000.tar")
    data = ["--data", world.folder / "features" / "*.tar", "--val_data", tmp_path / "val" / "*.tar"]
    flags = [*world.base, *data, PLAN, "--ipe 2 --max_steps 1", "--out_dir", tmp_path / "run"]
    text = run(tmp_path, "train_ac.py", *flags)
    assert "the scaler was fitted" not in text and "cannot be used" not in text


def synthetic(path, key, clips=40, seed=0, steps=8):
    """Feature shard whose next step depends on the action and on nothing else: z_t+1 = W a_t, the
    same in each of 4 patches."""
    rng = np.random.default_rng(seed)
    W = np.random.default_rng(99).normal(size=(4, 16))
    meta = {
        "encode": "tubelet",
        "fps": "5.0",
        "frames_per_step": "2",
        "crop_size": "32",
        "frames_per_clip": "16",
        "encoder": "synthetic",
        "grid": "2",
        "action_space": "38",
    }
    members = {}
    for i in range(clips):
        actions = np.zeros((steps - 1, 38), dtype=np.float32)
        actions[:, :4] = rng.normal(size=(steps - 1, 4))
        z = np.concatenate([rng.normal(size=(1, 16)), actions[:, :4] @ W])[:, None].repeat(4, 1)
        tensors = {
            "z": torch.tensor(z).bfloat16(),
            "actions": torch.tensor(actions),
            "states": torch.zeros(steps, 2, dtype=torch.float64),
        }
        members[f"{key}-{i}@00000.safetensors"] = safetensors_bytes(tensors, metadata=meta)
    return write_tar(path, members)


def test_the_meter_tells_a_model_that_uses_actions_from_one_that_cannot(tmp_path):
    """Bug: actions are not shuffled, or shuffled in training too; the gap is of the wrong sign;
    true states give the action away."""
    ActionScaler(np.zeros(4), np.ones(4), np.ones(4), 9, {}).save(tmp_path / "unit.pkl")
    train, held = (
        synthetic(tmp_path / f"{n}.tar", n, 60 - 40 * i, i) for i, n in enumerate(("train", "held"))
    )
    flags = [
        "--data",
        train,
        "--val_data",
        held,
        "--scaler",
        tmp_path / "unit.pkl",
        TINY,
        "--epochs 2 --warmup 0 --anneal 1 --ipe 100",
    ]
    options = [*flags, "--batch_size 8 --lr 3e-3 --grad_clip 1 --log_every 100"]
    options += ["--out_dir", tmp_path / "run"]
    run(tmp_path, "train_ac.py", *options)
    names = ("tf_gap", "tf_gap_low", "ro_gap", "tf_skill")
    last = numbers(tmp_path / "run", *names, log="val.csv")[-1]
    gap, low, rolled, skill = tuple(last)
    assert gap > 0.3
    assert 0.2 < low < gap
    assert rolled > 0.2
    assert skill < 0.7

    predictor, state, scaler, _ = open_run(str(tmp_path / "run"))
    dataset = Clips(
        index_shards([held])[0], [1.0] * 20, vpt.ClipReader(scaler=scaler, crop_size=32)
    )
    inputs = make_features_of(None, "tubelet", 2, {"mean": None, "std": None}, "cpu")
    with torch.no_grad():
        # rolled out, states are composed from the actions
        for layer in (predictor.action_encoder, predictor.state_encoder):
            layer.weight.zero_()
    errors, recordings, bad = held_out(predictor, dataset, inputs, 8, 99, 0, 2, 1.0)
    blind = meter_summary({k: v for k, v in errors.items() if k[2] == "_"}, recordings)
    assert len(set(recordings)) == 20 and not bad
    assert blind["tf_true"] == blind["tf_zero"]
    assert [blind["tf_gap"], blind["ro_gap"]] == [0.0, 0.0]

    # all recordings give exactly the same, which says nothing of others
    assert all(math.isnan(blind[k]) for k in METERS if k.endswith(("_low", "_high")))


def test_a_batch_of_one_still_shuffles_actions(world, trained, tmp_path):
    """Bug: with --batch_size 1 every clip got its own actions back as the shuffled ones: a gap of
    exactly zero, and a loud warning."""
    flags = [
        *trained.flags,
        "--init_from",
        trained.out / checkpoint.LATEST,
        "--start_lr 0 --max_steps 1 --ipe 1 --epochs 3",
    ]
    for size in (1, 2):
        options = [*flags, "--batch_size", size, "--lr 0", "--out_dir", tmp_path / str(size)]
        run(tmp_path, "train_ac.py", *options)

    one, two = (
        numbers(tmp_path / str(size), "tf_gap", "tf_true", log="val.csv") for size in (1, 2)
    )
    assert len(one) == 1 and (one == two).all() and abs(one[0, 0]) > 1e-7


def test_streams_train_with_local_validation(world, tmp_path):
    """Bug: a pipe: cannot be trained on, or validates on nothing without saying so."""
    shard = world.shards / "shard-000000.tar"
    flags = [
        "--scaler",
        world.folder / "scaler.pkl",
        TINY,
        "--encoder vit_tiny --epochs 1 --warmup 0 --anneal 0 --ipe 3 --val_clips 4",
    ]
    options = [*flags, "--out_dir", tmp_path / "run"]
    options += ["--val_data", world.shards / "shard-000002.tar", "--data", f"pipe:cat {shard}"]
    process = Run(tmp_path, "train_ac.py", *options)
    code, text = process.wait()
    assert code == 0, text
    assert len(rows_of(tmp_path / "run" / "train.csv")) == 3, text
    assert len(rows_of(tmp_path / "run" / "val.csv")) == 1, text

    options = [*flags, "--out_dir", tmp_path / "blind", "--data", f"pipe:cat {shard}"]
    text = run(tmp_path, "train_ac.py", *options)
    assert "WARNING: nothing to validate on" in text
    assert not rows_of(tmp_path / "blind" / "val.csv")


# --- starting, dry runs, weights ---


def test_a_dry_run_checks_everything_and_writes_nothing(world, tmp_path):
    """Bug: the doctor leaves files behind, takes a folder for used, or says nothing about memory,
    disk and time."""
    flags = [
        *world.video,
        "--epochs 9 --warmup 1 --anneal 1 --ipe 50 --save_every_freq 0 --out_dir",
        tmp_path / "new" / "run",
        "--dry_run",
    ]
    text = run(tmp_path, "train_ac.py", *flags)
    assert "4 recordings to train on, 2 held out, 0 unusable" in text
    assert "video (4, 16, 3, 32, 32)" in text
    assert "450 steps x" in text
    assert "GiB of disk free: enough" in text
    assert "held out after" in text
    assert not (tmp_path / "new").exists()


def test_names_that_nobody_knows_are_said_at_the_start(world, tmp_path, mp4):
    """Bug: a night of training on keys that are misspelt, and so never pressed."""
    lines = jsonl(contractor(keyboard={"keys": ["spacce"]}))
    members = {f"{k}.{x}": y for k in "ab" for x, y in (("mp4", mp4), ("jsonl", lines))}
    shard = write_tar(tmp_path / "odd.tar", members)
    flags = [*world.video, "--data", shard, "--epochs 3 --warmup 1 --anneal 1 --dry_run --out_dir"]
    text = run(tmp_path, "train_ac.py", *flags, tmp_path / "run")
    assert 'WARNING: key "spacce" (nearest known name: "key.keyboard.space") on 600 lines' in text


def test_init_from_takes_what_fits_and_lists_the_rest(world, trained, tmp_path):
    """Bug: --init_from loads nothing, silently; or a misshapen layer ends the run instead of being
    made anew."""
    flags = [*world.features, PLAN, "--ipe 2 --max_steps 1 --lr 0 --start_lr 0 --out_dir"]
    options = [*flags, tmp_path / "own", "--init_from", trained.out / checkpoint.LATEST]
    text = run(tmp_path, "train_ac.py", *options)
    assert "initialised again: nothing; left over: nothing" in text

    own, old = (checkpoint.load_latest(f)[0]["predictor"] for f in (tmp_path / "own", trained.out))
    assert all(torch.equal(own[k], v) for k, v in old.items())

    meta = Predictor(192, 7, 7, (2, 2), pred_dim=48, depth=2, num_heads=3)
    torch.save(
        weights.meta_state(weights.build_encoder("vit_tiny"), meta) | {"opt": {}, "epoch": 3},
        tmp_path / "meta.pt",
    )
    text = run(
        tmp_path, "train_ac.py", *flags, tmp_path / "meta", "--init_from", tmp_path / "meta.pt"
    )
    assert (
        "initialised again: action_encoder.weight, state_encoder.weight; left over:"
        " action_encoder.weight, extrinsics_encoder.bias" in text
    )

    taken = checkpoint.load_latest(tmp_path / "meta")[0]["predictor"]
    assert all(
        torch.equal(taken[k], v) for k, v in meta.state_dict().items() if "_encoder.weight" not in k
    )


def test_a_run_that_predicts_changes(world, trained, tmp_path):
    """Bug: --predict change is forgotten by the checkpoint, so that eval judges the change as if it
    were the features; a run resumes or starts from weights that predict something else; Meta's
    layout holds what Meta's code would misread; a run from before the flag no longer resumes."""
    out = tmp_path / "run"
    flags = [*world.features, PLAN, "--ipe 4 --predict change --out_dir"]
    run(tmp_path, "train_ac.py", *flags, tmp_path / "whole")
    run(tmp_path, "train_ac.py", *flags, out, "--max_steps 5")
    run(tmp_path, "train_ac.py", *flags, out, "--resume")
    same_run(tmp_path / "whole", out)

    state = checkpoint.load_latest(out)[0]
    assert state["predict"] == "change"
    assert open_run(str(out))[0].predict == "change"
    assert "predict" in checkpoint.load_latest(trained.out)[0]
    assert open_run(str(trained.out))[0].predict == "features"

    said = dict(zip(METERS, numbers(out, *METERS, log="val.csv")[-1]))
    held = ["--data", world.folder / "held" / "*.tar", "--batch_size 4"]
    run(tmp_path, "eval.py", "--checkpoint", out, *held)
    report = json.loads((out / "report.json").read_text())

    # null is nan
    found = np.array([report[k] for k in METERS], dtype=float)
    np.testing.assert_allclose(found, [said[k] for k in METERS], rtol=1e-6)

    plain = [*world.features, PLAN, "--ipe 4 --out_dir"]
    cases = [
        ([*plain, out, "--resume"], "was trained with predict change, this run has features"),
        (
            [*plain, tmp_path / "new", "--init_from", out],
            "those weights predict change, this predictor features: pass --predict change",
        ),
        (
            [*flags, tmp_path / "new", "--init_from", trained.out],
            "those weights predict features, this predictor change: pass --predict features",
        ),
        (
            [*world.video, PLAN, "--predict change --save_encoder --out_dir", tmp_path / "new"],
            "--save_encoder writes Meta's layout",
        ),
    ]
    for case, sentence in cases:
        assert sentence in fails(tmp_path, "train_ac.py", *case)

    old = checkpoint.load_latest(trained.out)[0]
    del old["predict"], old["args"]["predict"]
    checkpoint.save(tmp_path / "old", old, old["epoch"])
    text = run(tmp_path, "train_ac.py", *trained.flags, "--resume --out_dir", tmp_path / "old")
    assert "resumed from" in text and "nothing left to do" in text


@pytest.mark.slow
def test_the_spread_is_that_of_the_runs(world, tmp_path):
    """Bug: tests.spread trains every run with one seed or one number of threads, reports another
    row than the last, counts a failed run, or trains finished runs again."""
    flags = words([*world.features, PLAN, "--ipe 2 --epochs 2 --warmup 0 --anneal 0"])
    command = ["tests/spread.py", "--json --out", tmp_path / "runs"]

    def spread(pairs):
        text = run(tmp_path, *command, pairs, "--", *flags)
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for row in rows:
            folder = tmp_path / "runs" / f"{row['seed']}-{row['threads']}"
            last = numbers(folder, "epoch", "tf_skill", "tf_gap", log="val.csv")[-1]
            assert [row["epoch"], row["tf_skill"], row["tf_gap"]] == last.tolist()
            assert json.loads((folder / "args.json").read_text())["seed"] == row["seed"]
        skills = [row["tf_skill"] for row in rows]
        assert f"from {min(skills):.4f} to {max(skills):.4f}" in text
        return rows

    seeds = spread("--seeds 3 4 --threads 1")
    assert [(r["seed"], r["threads"]) for r in seeds] == [(3, 1), (4, 1)]
    assert seeds[0]["tf_skill"] != seeds[1]["tf_skill"]

    # the run that is finished is taken as it is
    threads = spread("--seeds 4 --threads 1 2")
    assert [(r["seed"], r["threads"]) for r in threads] == [(4, 1), (4, 2)]
    assert threads[0] == seeds[1]
    log = tmp_path / "runs" / "4-1" / "log.txt"
    assert log.read_text().count("nothing left to do") == 1

    # a run that fails is not counted
    failed = [*command, "--seeds 3 --threads 1 --", *flags, "--pred_dim 96"]
    code, text = Run(tmp_path, *failed).wait()
    assert code == 1
    assert "read its log.txt" in text


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_save_encoder_writes_what_others_load(world, tmp_path, dtype):
    """Bug: the encoder in the file is rounded to the training precision; or such a run neither
    resumes, nor evaluates, since its predictor is in Meta's layout."""
    flags = [
        *world.video,
        "--ipe 2 --epochs 2 --warmup 0 --anneal 0 --val_clips 4 --dtype",
        dtype,
        "--out_dir",
        tmp_path / "run",
    ]
    run(tmp_path, "train_ac.py", *flags, "--max_steps 2 --save_encoder")
    path = str(tmp_path / "run" / checkpoint.LATEST)
    encoder = weights.load_encoder(path)
    expected = weights.build_encoder("vit_tiny").state_dict()
    assert encoder.num_heads == 3
    assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items())

    predictor = weights.load_predictor(path, num_heads=3, grid=(2, 2))
    mine = open_run(path)[0]
    assert all(torch.equal(v, predictor.state_dict()[k]) for k, v in mine.state_dict().items())

    run(tmp_path, "train_ac.py", *flags, "--resume")
    assert len(rows_of(tmp_path / "run" / "train.csv")) == 4


# --- features ---


@pytest.mark.slow
def test_features_are_what_training_on_video_sees(world, trained, tmp_path):
    """Bug: encode.py resizes, crops, pairs frames or aligns actions otherwise than the loader;
    encode modes are mixed up."""

    # the same predictor on the same windows
    flags = "--epochs 1 --warmup 0 --anneal 0 --ipe 1 --lr 0 --start_lr 0 --out_dir"
    for encode in ("tubelet", "frame"):
        out = tmp_path / encode
        where = [world.folder / "features", world.folder / "held"]
        if encode != "tubelet":
            where = [tmp_path / "f", tmp_path / "h"]
            how = ["--encoder vit_tiny --crop_size 32 --encode", encode]
            for shards, folder in zip(("shard-{000000..000001}.tar", "shard-000002.tar"), where):
                run(tmp_path, "encode.py", "--data", world.shards / shards, "--out", folder, *how)
        data = ["--data", where[0] / "*.tar", "--val_data", where[1] / "*.tar"]
        run(tmp_path, "train_ac.py", *world.base, *data, "--encode", encode, flags, out / "cached")
        run(tmp_path, "train_ac.py", *world.video, "--encode", encode, flags, out / "live")
        cached, live = (
            numbers(out / n, "jloss", "sloss", *METERS[:4], log="val.csv")
            for n in ("cached", "live")
        )
        np.testing.assert_allclose(cached, live, rtol=2e-3)
    assert (
        abs(numbers(tmp_path / "frame" / "live", "tf_copy", log="val.csv") / live[0, 5] - 1) < 1e-3
    )
    assert not np.allclose(
        numbers(tmp_path / "tubelet" / "live", "tf_copy", log="val.csv"), live[0, 5], rtol=1e-2
    )


def test_phases_step_through_a_recording_from_other_ticks(world, tmp_path):
    """Bug: the phases of a recording are mixed up: frames of one, actions of another, or a start
    that is not the first frame's tick."""
    shard = world.shards / "shard-000000.tar"
    flags = ["--data", shard, "--out", tmp_path / "f"]
    flags += ["--encoder vit_tiny --crop_size 32 --phases 3 --batch_size 5"]
    run(tmp_path, "encode.py", *flags)
    features = {r.key: r for r in index_shards([str(tmp_path / "f" / "shard-000000.tar")])[0]}
    video = {r.key: r for r in index_shards([str(shard)])[0]}

    # 8 ticks a step
    assert sorted(features) == [f"6.10_player-{k}@0000{s}" for k in (0, 1) for s in (0, 2, 5)]

    encoder = weights.build_encoder("vit_tiny", 32)
    for key, first in (("6.10_player-1", 2), ("6.10_player-0", 5)):
        r, source = features[f"{key}@0000{first}"], video[key]
        z, actions, states = feature_rows(r, 0, r.length)
        assert r.length == (300 - first - 5) // 8 + 1

        with Slice(source.shard, *source.members["mp4"]) as f:
            frames = read_frames(f, mp4_times(f), np.arange(first, first + 48, 4), 32)
        with Slice(source.shard, *source.members["jsonl"]) as f:
            ticks = vpt.parse_ticks(f.read())
        with torch.no_grad():
            wanted = encode_steps(
                encoder,
                torch.from_numpy(frames[:, :, 4:36].transpose(0, 3, 1, 2).copy())[None],
                "tubelet",
                2,
            )[0]
        torch.testing.assert_close(z[:6].float(), wanted, rtol=2e-2, atol=2e-2)

        ends = first + 4 + 8 * np.arange(r.length)
        np.testing.assert_allclose(
            actions.numpy(), vpt.step_actions(ticks, ends, 38)[0], rtol=1e-6, atol=1e-6
        )
        np.testing.assert_array_equal(states.numpy(), ticks.motion[ends, 2:])


@pytest.mark.slow
def test_encode_killed_and_run_again_is_whole(world, tmp_path):
    """Bug: a half-written shard is taken for a finished one, or finished ones for those of other
    settings or recordings."""
    flags = ["--data", world.shards / "*.tar", "--encoder vit_tiny --crop_size 32 --phases 4 --out"]
    run(tmp_path, "encode.py", *flags, tmp_path / "whole")
    killed = Run(tmp_path, "encode.py", *flags, tmp_path / "cut")
    end = time.monotonic() + 60
    while not (tmp_path / "cut" / "shard-000000.tar").exists():
        assert killed.process.is_alive() and time.monotonic() < end, killed.text()
        time.sleep(0.001)
    killed.process.kill()
    assert killed.wait()[0] == -signal.SIGKILL

    done = {n for n in os.listdir(tmp_path / "cut") if n.endswith(".tar")}
    assert done and "shard-000002.tar" not in done
    assert f"encoded {3 - len(done)} of 3 shards" in run(
        tmp_path, "encode.py", *flags, tmp_path / "cut"
    )

    for i in range(3):
        name = f"shard-00000{i}.tar"
        cut, whole = (index_shards([str(tmp_path / f / name)])[0] for f in ("cut", "whole"))
        assert [r.key for r in cut] == [r.key for r in whole] and len(cut) == 8
        for a, b in zip(cut, whole):
            assert all(
                torch.equal(x, y)
                for x, y in zip(feature_rows(a, 0, a.length), feature_rows(b, 0, b.length))
            )
    for other in ("--fps 10", "--encode frame", "--dtype bfloat16", "--phases 2"):
        assert "what other settings made" in fails(
            tmp_path, "encode.py", *flags, tmp_path / "cut", other
        )

    (tmp_path / "other").mkdir()
    shutil.copy(world.shards / "shard-000001.tar", tmp_path / "other" / "shard-000000.tar")
    options = [*flags, tmp_path / "cut", "--data", tmp_path / "other" / "shard-000000.tar"]
    error = fails(tmp_path, "encode.py", *options)
    assert "the same file name" in error

    options = [*flags[2:], tmp_path / "cut", "--data", tmp_path / "other" / "shard-000000.tar"]
    error = fails(tmp_path, "encode.py", *options)
    assert "shard-000000.tar of other recordings (6.10_player-0)" in error


# --- eval.py ---


def test_eval_says_what_validation_said(world, trained, tmp_path):
    """Bug: eval.py judges other windows, another checkpoint, or unscaled actions; the table and
    report.json differ; video gives other numbers than its features."""
    shutil.copytree(trained.out, tmp_path / "run", symlinks=True)
    said = dict(zip(METERS, numbers(trained.out, *METERS, log="val.csv")[-1]))
    data = {"features": world.folder / "held" / "*.tar", "video": world.shards / "shard-000002.tar"}
    judged = ["--checkpoint", tmp_path / "run", "--data", data["features"], "--batch_size 4"]
    text = run(tmp_path, "eval.py", *judged)
    report = json.loads((tmp_path / "run" / "report.json").read_text())

    # null is nan
    found = np.array([report[k] for k in METERS], dtype=float)
    np.testing.assert_allclose(found, [said[k] for k in METERS], rtol=1e-6, atol=1e-8)
    assert report["checkpoint"].endswith("checkpoint-epoch003.pth.tar")
    assert report["recordings"] == 2
    assert report["clips"] == 8
    assert f"copying the last step)  {said['tf_skill']:.3f}" in text
    assert f"{said['tf_gap']:+.2%} (no interval: that needs at least 3" in text
    np.testing.assert_allclose(np.mean(report["by_horizon"]["ro_true"]), said["ro_true"], rtol=1e-6)
    assert all(f"{x:9.4f}" in text for x in report["by_horizon"]["ro_shuffled"])

    flags = ["--checkpoint", tmp_path / "run", "--data", data["video"]]
    flags += ["--encoder vit_tiny --batch_size 4 --num_workers 0"]
    run(tmp_path, "eval.py", *flags)
    live = json.loads((tmp_path / "run" / "report.json").read_text())
    errors = [k for k in METERS if "gap" not in k]
    np.testing.assert_allclose([live[k] for k in errors], [said[k] for k in errors], rtol=3e-3)


def test_eval_refuses_what_does_not_belong(world, trained, tmp_path):
    """Bug: a predictor is judged on features of another encoder, or a missing run is a
    traceback."""
    (tmp_path / "empty").mkdir()
    other = "--encoder vit_base_16"
    cases = [
        (
            tmp_path / "empty",
            world.folder / "held" / "*.tar",
            "",
            f"no checkpoint in {tmp_path / 'empty'}",
        ),
        (tmp_path / "none.pth.tar", world.folder / "held" / "*.tar", "", "none.pth.tar"),
        (trained.out, tmp_path / "none*.tar", "", "no shard matches"),
        (
            trained.out,
            world.shards / "shard-000002.tar",
            other,
            "was trained on features of encoder",
        ),
    ]
    for path, data, flags, sentence in cases:
        assert sentence in fails(
            tmp_path, "eval.py", "--checkpoint", path, "--data", data, flags, "--num_workers 0"
        )


def test_pictures_and_arguments_of_a_run(trained):
    """Bug: a run cannot be read afterwards: no flags, no curves, or a log whose columns moved."""
    args = json.loads((trained.out / "args.json").read_text())
    assert args["pred_dim"] == 48
    assert args["ipe"] == 25
    assert args["dtype"] == "float32"

    state = checkpoint.load_latest(trained.out)[0]
    settings = state["settings"]
    assert state["format"] == checkpoint.FORMAT == 2 and settings["stage"] == "ac"
    for name in settings.keys() & args.keys():
        assert settings[name] == args[name] == state["args"][name], name
    assert settings.keys() - args.keys() == {"stage"}
    assert (trained.out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    rows = numbers(
        trained.out,
        "epoch",
        "itr",
        "jloss",
        "sloss",
        "total_loss",
        "clips_per_s",
        "data_wait",
        "memory_mib",
    )
    assert (rows[:, 0] * 25 + rows[:, 1] == np.arange(75)).all()
    assert (rows[:, 5] > 0).all()
    assert (rows[:, 7] > 50).all()
    np.testing.assert_allclose(rows[:, 4], rows[:, 2] + rows[:, 3], rtol=1e-6)
    assert (rows[:, 6] >= 0).all()
    assert (rows[:, 6] <= 1).all()
    assert rows[-10:, 2].mean() < 0.9 * rows[:5, 2].mean()

    # MFU: the FLOPs are those that bench/step.py writes down. It leaves out the condition encoders,
    # and counts what a fused attention computes again
    predictor = open_run(str(trained.out))[0]
    encoder = weights.build_encoder("vit_tiny", 32)
    _, expected = useful_flops(encoder, predictor, args["batch_size"], 8)
    assert step_flops(trained.out, args["batch_size"]) == pytest.approx(expected, rel=0.03)
    assert numbers(trained.out, "epoch", log="val.csv")[:, 0].tolist() == [1, 2, 3]


def test_a_resumed_run_continues_its_wandb_run(world, tmp_path):
    """Bug: each resume begins another W&B run, so that one training is many curves. wandb itself
    is not installed here: a module of that name writes down what it is told."""
    calls = tmp_path / "calls.jsonl"
    (tmp_path / "wandb.py").write_text(
        "import json\n"
        "def tell(**what):\n"
        f"    open({str(calls)!r}, 'a').write(json.dumps(what) + chr(10))\n"
        "def init(project, id, resume, config):\n"
        "    tell(project=project, id=id, resume=resume, lr=config['lr'])\n"
        "def log(row, step):\n"
        "    tell(step=step, columns=sorted(row))\n"
    )
    flags = [*world.features, PLAN, "--ipe 2 --val_clips 0 --wandb_project play"]
    flags += ["--out_dir", tmp_path / "run"]
    env = {"PYTHONPATH": str(tmp_path)}
    for more in ("--max_steps 1", "--max_steps 3 --resume"):
        run(tmp_path, "train_ac.py", *flags, more, env=env)
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    first, again = [row for row in told if "id" in row]
    assert first == again
    assert first["project"] == "play"
    assert first["resume"] == "allow"
    assert checkpoint.load_latest(tmp_path / "run")[0]["wandb_id"] == first["id"]
    assert [row["step"] for row in told if "step" in row] == [0, 1, 2]
    assert "train/jloss" in told[1]["columns"]
