"""Good files in every format that is read here, small ones, and ways to change them: what
tests.fuzz starts from."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zlib

import av
import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from sklearn.preprocessing import StandardScaler

from data import ActionScaler
from files.features import pack_features
from model import Encoder
from prepare.robot import droid_example, record

PIECES = [
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"true",
    b"9" * 400,
    b"[" * 3000,
    b"\xff\xfe",
    b"\0" * 8,
    b"18446744073709551615",
    b"-9223372036854775809",
    b"\xed\xa0\x80",
    b"1" * 25,
]
NUMBERS = [
    0,
    1,
    2,
    7,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def bombs(path):
    return [
        Bomb(os.mkdir, path),
        Bomb(eval, f"__import__('os').mkdir({path!r})"),
        Bomb(os.system, f"touch {path}"),
        Bomb(open, path, "w"),
    ]


def film(folder, frames, container=None):
    """Bytes of a small mp4 with B-frames."""

    # a file, since faststart reads back what it wrote
    path = os.path.join(folder, "film.mp4")
    with av.open(path, "w", options=container or {}) as c:
        stream = c.add_stream(
            "libx264", rate=20, options={"g": "8", "bf": "2", "threads": "1", "preset": "ultrafast"}
        )
        stream.width = 48
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            image = np.full((32, 48, 3), 9 * i % 256, np.uint8)
            c.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        c.mux(stream.encode())
    with open(path, "rb") as f:
        return f.read()


def lines(n, guide=False):
    """Bytes of JSONL: contractor lines, or the guides'."""
    out = []
    for i in range(n):
        mouse = {
            "x": 640.0,
            "y": 360.0,
            "dx": 3.0 * i,
            "dy": -1.0,
            "buttons": [0] * (i % 2),
            "newButtons": [],
        }
        line = {
            "mouse": mouse,
            "keyboard": {"keys": ["key.keyboard.w", "key.keyboard.2"]},
            "isGuiOpen": i > 9,
            "hotbar": i % 9,
        }
        line |= (
            {"timestamp": i / 20, "camera": [0.01 * i, 0.1]}
            if guide
            else {"yaw": 0.45 * i, "pitch": 10.0, "inventory": [{"a": 1}]}
        )
        out.append(json.dumps(line) + "\n")
    return "".join(out).encode()


def features(steps, tokens=4, width=8, store="bf16"):
    """A member of a feature shard."""
    tensors = pack_features(torch.randn(steps, tokens, width), store) | {
        "actions": torch.zeros(steps - 1, 38)
    }
    return safetensors_bytes(
        tensors | {"states": torch.zeros(steps, 2, dtype=torch.float64)},
        metadata={"fps": "5.0", "encode": "tubelet"},
    )


def robot_features(steps):
    """A member of a feature shard of robot episodes."""
    episode = {"rows": 4 * steps - 1, "stride": 4, "rate": 15.0, "success": True, "idle": [[3, 9]]}
    meta = {"dataset": "droid", "encoder": "e", "grid": "2", "state_dim": "7"}
    meta |= {"names": json.dumps([*"abcdefg"]), "units": json.dumps(["m"] * 7)}
    tensors = {
        "z": torch.zeros(steps, 4, 8, dtype=torch.bfloat16),
        "actions": torch.zeros(steps - 1, 7),
        "states": torch.zeros(steps, 7),
    }
    return safetensors_bytes(tensors, metadata=meta | {"episode": json.dumps(episode)})


def tar_of(members):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f.getvalue()


def saved(value):
    f = io.BytesIO()
    torch.save(value, f)
    return f.getvalue()


def h5_of(shape, dtype, compression=None):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    f = io.BytesIO()
    with h5py.File(f, "w") as file:
        data = file.create_dataset(
            "latents", data=values, chunks=(1, *shape[1:]), compression=compression
        )
        data.attrs["fps"], data.attrs["vae"] = 8, "wan"
    return f.getvalue()


def example(steps=6):
    f = io.BytesIO()
    Image.new("RGB", (16, 9)).save(f, "JPEG")
    fields = {
        "observation/cartesian_position": 6,
        "observation/gripper_position": 1,
        "action_dict/joint_velocity": 7,
        "action": 7,
    }
    rows = {k: np.ones((steps, d), np.float32) for k, d in fields.items()}
    pictures = {c: [f.getvalue()] * steps for c in ("exterior_1", "exterior_2", "wrist")}
    return droid_example(rows, pictures, "lab/0", "success/0", ("a", "b", "c"), True)


def scaler():
    return ActionScaler(
        np.zeros(4), np.ones(4), np.ones(4), 99, {"names": ["a", "b", "c", "d"], "fps": 5.0}
    )


def scaler_bytes(folder, extension):
    path = os.path.join(folder, "scaler" + extension)
    scaler().save(path)
    with open(path, "rb") as f:
        return f.read()


def seeds(folder, bomb_path):
    """{target: [bytes of a good (or hostile) file]}; the hostile ones would make `bomb_path`.
    folder: for scratch."""
    with torch.random.fork_rng():
        encoder = Encoder(24, 1, 3, mlp_dim=48, img_size=32, num_frames=4).state_dict()
    run = {
        "predictor": {"w": torch.ones(5, 3), "b": torch.ones(3)[1:]},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}},
    }
    run |= {
        "epoch": 3,
        "args": {"data": [["a"]], "lr": 1e-3, "encoder": None},
        "rng": torch.get_rng_state(),
    }
    sklearn = StandardScaler().fit(np.random.default_rng(0).normal(size=(9, 4)))
    hostile = []

    # a scaler that is one, and one with a bomb inside
    for bomb in bombs(bomb_path):
        sklearn.bomb = bomb
        hostile += [pickle.dumps(bomb), pickle.dumps(sklearn)]
    del sklearn.bomb
    mp4 = film(folder, 24)
    recording = {"a.b.mp4": mp4, "a.b.jsonl": lines(24)}
    return {
        "jsonl": [lines(24), lines(24, guide=True)],
        "tar": [
            tar_of(recording),
            tar_of(
                {
                    "a@00000.safetensors": features(12),
                    "b@00000.safetensors": features(12, store="int8"),
                }
            ),
        ],
        "mp4": [
            mp4,
            film(folder, 24, {"movflags": "faststart"}),
            film(folder, 24, {"movflags": "frag_keyframe+empty_moov"}),
        ],
        "h5": [
            h5_of((4, 4, 2, 4, 4), np.float16),
            h5_of((4, 4, 1, 4, 4), np.float32, compression="gzip"),
        ],
        "tfrecord": [record(example()) * 2],
        "example": [example()],
        "features": [features(12), features(12, store="int8")],
        "robot features": [tar_of({"lab--a@wrist-00001.safetensors": robot_features(12)})],
        "safetensors": [
            safetensors_bytes(encoder),
            safetensors_bytes({"target_encoder." + k: v for k, v in encoder.items()}),
        ],
        "torch": [
            saved({"target_encoder": {"module.backbone." + k: v for k, v in encoder.items()}}),
            *map(saved, bombs(bomb_path)),
        ],
        "pkl": [scaler_bytes(folder, ".pkl"), pickle.dumps(sklearn), *hostile],
        "scaler": [scaler_bytes(folder, ".safetensors")],
        "checkpoint": [saved(run) + b"%08x" % zlib.crc32(saved(run))],
        "checkpoint, right CRC": [
            saved(run),
            *(saved({"epoch": bomb}) for bomb in bombs(bomb_path)),
        ],
    }


def mutate(data, others, rng):
    """A changed copy: one to six changes of bits, integers, JSON values, or of the length; half of
    them near the start, where heads are."""
    b = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        end = max(min(len(b), 600) if rng.random() < 0.5 else len(b), 1)
        at = rng.randrange(end)
        kind = rng.randrange(9)
        if kind == 0:
            b[at : at + 1] = bytes([(b[at] if b else 0) ^ 1 << rng.randrange(8)])
        elif kind == 1:
            b[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
        elif kind == 2:
            form = rng.choice(("<Q", ">Q", "<I", ">I", "<H", ">H", "B"))
            number = (rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1, 3))) % 256 ** struct.calcsize(
                form
            )
            b[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del b[at:]
        elif kind == 4:
            del b[at : at + rng.choice((1, 4, 8, 64, 512))]
        elif kind == 5:
            b[at:at] = b[at : at + rng.choice((1, 8, 64, 512))] * rng.choice((1, 1, 40))
        elif kind == 6:
            b[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
        elif kind == 7:
            other = rng.choice(others)
            n = rng.choice((8, 64, 512))
            start = rng.randrange(max(len(other) - n, 1))
            b[at : at + n] = other[start : start + n]
        else:  # a value of JSON, or a name
            found = list(
                re.finditer(
                    rb'-?\d+(?:\.\d+)?|"[^"\\]{0,40}"|\[[^\[\]]{0,40}\]', bytes(b[: 1 << 14])
                )
            )
            if found:
                m = rng.choice(found)
                b[m.start() : m.end()] = rng.choice(PIECES)
    return bytes(b)
