"""probe.py as a program on recordings whose picture shows what was done, its labels read back by our reader, the README's Gymnasium wrapper."""

import io
import json
import os
import re
import shutil
import tarfile
import types

import av
import numpy as np
import pytest
import torch
from conftest import contractor, jsonl, write_tar
from sklearn.metrics import r2_score
from test_train import ROOT, fails, run

import checkpoint
import heads
import probe
from data import open_records, read_ticks
from vpt import ACTION_SPACES, parse_ticks, step_actions

pytestmark = pytest.mark.usefixtures("forkserver")
LINES = 400


def play(seed):
    """A recording (mp4 bytes, lines): the view pans over a texture by dx / 10 pixels a tick, `w` lights the lower half of the next frame, the
    hotbar slot is the grey of the upper left corner; nothing shows `a`."""
    rng = np.random.default_rng(seed)
    noise = np.kron(np.random.default_rng(seed).uniform(0, 170, (8, 128)), np.ones((8, 8)))
    texture = sum(np.roll(noise, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)) / 49
    pan, w = (np.repeat(rng.integers(low, high, LINES), rng.integers(4, 12, LINES))[:LINES] for low, high in ((-4, 5), (0, 2)))
    slot, at = np.repeat(rng.integers(0, 3, LINES), 60)[:LINES], np.cumsum(pan) - pan
    lines = contractor(LINES, seed)
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as c:
        stream = c.add_stream("libx264", rate=20, pix_fmt="yuv420p", options={"crf": "18", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height = 96, 64
        for t in range(LINES):
            image = np.roll(texture, -at[t], axis=1)[:, :96].copy()
            image[32:] += 80 * (w[t - 1] if t else 0)
            image[:16, 16:32] = 120 * slot[t]
            c.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(image[..., None], 3, 2).astype(np.uint8))))
            keys = [f"key.keyboard.{k}" for k, held in (("w", w[t]), ("a", rng.random() < 0.1)) if held]
            lines[t] |= {"mouse": lines[t]["mouse"] | {"dx": float(10 * pan[t]), "dy": 0.0}, "keyboard": {"keys": keys}, "hotbar": int(slot[t]),
                         "yaw": 1.5 * float(at[t]), "pitch": 0.0}  # fmt: skip
        c.mux(stream.encode())
    return video.getvalue(), lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Recordings of `play`, their features and a short run of train_ac.py; .flags probe it."""
    folder = tmp_path_factory.mktemp("probe")
    for name, seeds in (("train", range(12)), ("val", range(12, 15))):
        (folder / name).mkdir()
        for shard, part in enumerate(np.array_split(list(seeds), 3)):
            members = {}
            for seed in part:
                video, lines = play(seed)
                members |= {f"play.{seed}.mp4": video, f"play.{seed}.jsonl": jsonl(lines)}
            write_tar(folder / name / f"shard-{name}-{shard}.tar", members)
        run(folder, "encode.py", "--data", folder / name / "*.tar", "--out", folder / "features" / name, "--encoder vit_tiny --crop_size 32",
            "--fps 10 --phases", 4 if name == "train" else 1)  # fmt: skip
    run(folder, "fit_scaler.py", "--data", folder / "train" / "*.tar", "--output", folder / "scaler.pkl", "--num_workers 0 --fps 10")
    data = ["--data", folder / "features" / "train" / "*.tar", "--val_data", folder / "features" / "val" / "*.tar"]
    run(folder, "train_ac.py", *data, "--scaler", folder / "scaler.pkl", "--out_dir", folder / "run", "--encode tubelet --crop_size 32 --fps 10",
        "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 8 --num_workers 0 --epochs 2 --warmup 1 --anneal 1 --ipe 60 --lr 2e-3",
        "--action_space 36 --feature_norm standardize")  # fmt: skip
    return types.SimpleNamespace(folder=folder, data=data, flags=["--checkpoint", folder / "run", "--num_workers 0"])
