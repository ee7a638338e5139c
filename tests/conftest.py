"""Fixtures that several files need; how they are made is in harness.py. The tests have a cache of
their own."""

import json
import multiprocessing.forkserver
import os
import shutil
import signal
import tempfile
import types

from files import disk

# before data.py is imported: it reads this once
os.environ["NANOJEPA_CACHE"] = tempfile.mkdtemp(prefix="nanojepa-cache-")

import pytest  # noqa: E402

from tests.harness import (  # noqa: E402
    PEAK,
    ROOT,
    film,
    fit_robot_scaler,
    run,
    write_episode,
    write_shards,
)

# seconds between tries of a download (1 to 30 in the product), and before a disk is asked again;
# programs that tests start keep the product's
disk.WAIT = 0.01
disk.PAUSES = (0.01, 0.01)


def pytest_sessionfinish():
    shutil.rmtree(os.environ["NANOJEPA_CACHE"], ignore_errors=True)


@pytest.fixture
def deadline():
    """A loader that hangs is a failure, not a test run that never ends."""
    signal.signal(signal.SIGALRM, lambda *a: pytest.fail("hangs: 60 s without an end"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="session")
def forkserver():
    """Processes of our scripts start from a server that has imported them already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")

        # it finds what it imports from here
        patch.chdir(ROOT)
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            [
                "tests.harness",
                "torch._dynamo",  # which every optimizer imports, in a second and a half
                "matplotlib.backends.backend_agg",
                "av",
                "probe",
                "plan",
                "play",
                "train_ac",
                "encode",
                "eval",
                "fit_scaler",
                "train_lam",
                "eval_lam",
                "prepare.manifest",
                "train_lewm",
                "train_lora",
                "train_decoder",
                "train_vjepa",
            ]
        )
        multiprocessing.forkserver.ensure_running()
        yield


# --- play ---


@pytest.fixture(scope="session")
def mp4():
    """300 numbered frames, closed GOP of 60, B-frames."""
    return film()


@pytest.fixture(scope="session")
def shards(tmp_path_factory, mp4):
    """Three shards of two recordings each, of 300 frames; keys have dots."""
    return write_shards(tmp_path_factory.mktemp("shards"), 3, mp4)


# --- trained runs, which tests read and copy and never change ---


@pytest.fixture(scope="session")
def game(tmp_path_factory, shards, forkserver):
    """A run of train_ac.py on features with 36-D actions, .out; .held are features it held out,
    .video the shard they are of."""
    folder = tmp_path_factory.mktemp("game")
    training = shards / "shard-000001.tar"
    video = shards / "shard-000000.tar"
    held = folder / "held" / "*.tar"
    scaler = folder / "scaler.pkl"

    run(folder, "fit_scaler.py", "--data", training, "--output", scaler, "--num_workers 0")
    for name, shard in (("train", training), ("held", video)):
        encoder = "--encoder vit_tiny --crop_size 32"
        run(folder, "encode.py", "--data", shard, "--out", folder / name, encoder)

    data = ["--data", folder / "train" / "*.tar", "--val_data", held, "--scaler", scaler]
    size = "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0"
    plan = "--crop_size 32 --action_space 36 --epochs 1 --warmup 0 --anneal 0 --ipe 30 --lr 3e-3"
    run(folder, "train_ac.py", *data, size, plan, "--out_dir", folder / "run")

    judged = ["--checkpoint", folder / "run", "--video", video, "--out", folder / "report"]
    text = run(folder, "eval.py", *judged, "--samples 8 --batch_size 4 --num_workers 0")
    return types.SimpleNamespace(
        folder=folder,
        out=folder / "run",
        held=held,
        video=video,
        text=text,
        report=json.loads((folder / "report" / "report.json").read_text()),
        page=(folder / "report" / "report.html").read_text(),
    )


@pytest.fixture(scope="session")
def arm(tmp_path_factory, forkserver):
    """Runs on robot episodes: .base (--full), .lora on it, .command (LoRA, actions of another
    size)."""
    folder = tmp_path_factory.mktemp("arm")
    episodes = folder / "a"
    episodes.mkdir()
    for i in range(5):
        write_episode(episodes / f"e{i}", i, 1.0, action_dim=3)
    fit_robot_scaler(episodes, folder / "pose.safetensors")
    fit_robot_scaler(episodes, folder / "wide.safetensors", wider=4)
    fit_robot_scaler(episodes, folder / "command.safetensors", action_keys=["command"])

    clips = "--val_fraction 0.4 --grad_accum 1 --frames_per_clip 5 --warmup_steps 1"
    short = "--encoder vit_tiny --crop_size 32 --num_workers 0 --batch_size 4"
    flags = ["--data", episodes, clips, short]
    pose = ["--scaler", folder / "pose.safetensors"]
    whole = (
        "--base none --full --max_steps 12 --lr 3e-3 --pred_dim 48 --pred_depth 2 --pred_heads 3"
    )
    run(folder, "train_lora.py", *flags, *pose, whole, "--out_dir", folder / "base")

    # this scaler is not the base's: it must be folded in
    adapt = ["--base", folder / "base", "--max_steps 6 --lr 1e-2"]
    wide = ["--scaler", folder / "wide.safetensors"]
    run(folder, "train_lora.py", *flags, *wide, *adapt, PEAK, "--out_dir", folder / "lora")

    command = ["--scaler", folder / "command.safetensors", "--action_keys command"]
    adapt.append("--train_condition_encoders")
    run(folder, "train_lora.py", *flags, *command, *adapt, "--out_dir", folder / "command")
    return folder
