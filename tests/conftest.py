"""Recordings for the tests: real mp4 whose frames carry their own number, real JSONL, real tar
shards; and a cache of their own."""

import io
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import tarfile
import tempfile
from fractions import Fraction

from files import disk

os.environ["NANOJEPA_CACHE"] = tempfile.mkdtemp(
    prefix="nanojepa-cache-"
)  # before data.py is imported: it reads this once

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

disk.WAIT = 0.01  # seconds between tries, which are 1 to 30; programs started by tests keep them
disk.PAUSES = (0.01, 0.01)  # and those before a disk is asked again

WIDTH, HEIGHT, BLOCK, LEFT = 80, 64, 16, 8  # a 64-pixel centre crop shows all blocks


def picture(number):
    """A frame (64, 80, 3) with its number in ten black or white blocks, then one white and one
    black one: a mirrored frame reads wrong."""
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    for bit in range(12):
        y, x = bit // 4 * BLOCK, LEFT + bit % 4 * BLOCK
        image[y : y + BLOCK, x : x + BLOCK] = 255 if (number | 1 << 10) >> bit & 1 else 0
    return image


def read_number(image):
    """The number in a 64 x 64 centre crop, (H, W, 3) or (3, H, W); -1 if it is mirrored or no such
    picture."""
    image = np.asarray(image)
    image = image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    image = image[:, (image.shape[1] - HEIGHT) // 2 :]
    bits = [image[bit // 4 * BLOCK + 8, bit % 4 * BLOCK + 8, 0] > 127 for bit in range(12)]
    return sum(int(b) << i for i, b in enumerate(bits[:10])) if bits[10:] == [True, False] else -1


def film(frames=300, gop=60, bframes=3, times=None, container=None, x264="", size=None):
    """Bytes of an mp4 of numbered frames at 20 fps, or at `times` in milliseconds; size: (width,
    height) of plain noise instead."""
    path = os.path.join(
        tempfile.mkdtemp(), "film.mp4"
    )  # a file, since faststart reads back what it wrote
    with av.open(path, "w", options=container or {}) as c:
        stream = c.add_stream("libx264", rate=20)
        stream.width, stream.height = size or (WIDTH, HEIGHT)
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "g": str(gop),
            "bf": str(bframes),
            "threads": "1",
            "preset": "veryfast",
            "crf": "18",
            "x264-params": x264,
        }
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                picture(i) if size is None else np.full((size[1], size[0], 3), i % 256, np.uint8)
            )
            frame.pts, frame.time_base = (
                int(50 * i if times is None else times[i]),
                Fraction(1, 1000),
            )
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    with open(path, "rb") as f:
        data = f.read()
    shutil.rmtree(os.path.dirname(path))
    return data


def contractor(lines=300, seed=0, **change):
    """Contractor lines as dicts: the camera follows the mouse at 0.15 degrees a pixel; change:
    field -> value or function of the line."""
    rng = np.random.default_rng(seed)
    dx, dy = rng.normal(0, 30, lines).round(1), rng.normal(0, 10, lines).round(1)
    yaw, pitch = 0.15 * (np.cumsum(dx) - dx), np.clip(0.15 * (np.cumsum(dy) - dy), -90, 90)
    out = []
    for i in range(lines):
        mouse = {
            "x": 640.0,
            "y": 360.0,
            "dx": dx[i],
            "dy": dy[i],
            "dwheel": 0.0,
            "buttons": [],
            "newButtons": [],
        }
        keys = [
            f"key.keyboard.{k}" for k, p in (("w", 0.5), ("a", 0.2), ("d", 0.1)) if rng.random() < p
        ]
        line = {
            "mouse": mouse,
            "keyboard": {"keys": keys, "newKeys": [], "chars": ""},
            "isGuiOpen": False,
            "isGuiInventory": False,
            "hotbar": 0,
            "yaw": yaw[i],
            "pitch": pitch[i],
            "xpos": 1.5,
            "tick": i,
            "milli": 50 * i,
            "inventory": [{"type": "oak_planks", "quantity": 3}],
            "stats": {"minecraft.custom:minecraft.jump": i},
        }
        out.append(line | {k: v(i) if callable(v) else v for k, v in change.items()})
    return out


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def write_tar(path, members):
    """members: {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(folder, count, mp4):
    """Shards of two recordings each, whose lines differ."""
    for s in range(count):
        members = {}
        for k in range(2):
            members |= {
                f"6.1{s}_player-{k}.mp4": mp4,
                f"6.1{s}_player-{k}.jsonl": jsonl(contractor(seed=2 * s + k)),
            }
        write_tar(folder / f"shard-{s:06d}.tar", members)
    return folder


def pytest_sessionfinish():
    shutil.rmtree(os.environ["NANOJEPA_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def mp4():
    """300 numbered frames, closed GOP of 60, B-frames."""
    return film()


@pytest.fixture(scope="session")
def shards(tmp_path_factory, mp4):
    """Three shards of two recordings each, of 300 frames; keys have dots."""
    return write_shards(tmp_path_factory.mktemp("shards"), 3, mp4)


@pytest.fixture
def deadline():
    """A loader that hangs is a failure, not a test run that never ends."""
    signal.signal(signal.SIGALRM, lambda *a: pytest.fail("hangs: 60 s without an end"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def forkserver():
    """Processes of our scripts start from a server that has imported them already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(
            os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        )  # it finds what it imports from here
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            [
                "train_ac",
                "encode",
                "eval",
                "fit_scaler",
                "train_lam",
                "eval_lam",
                "prepare.manifest",
                "train_lora",
            ]
        )
        multiprocessing.forkserver.ensure_running()
        yield
