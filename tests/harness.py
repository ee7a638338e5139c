"""What several tests need; fixtures that several files need are in conftest.py.

    made play           numbered frames, films, JSONL lines, tar shards
    made robot play     TFRecords as DROID's, episodes of one's own robot
    processes           our scripts as programs: run to the end, refused, killed, on two ranks
    logs                CSVs as strings and as numbers; are two runs one?
    models              small predictors, and ones made by hand that do something known

Programs of their own (`python -m tests.NAME`) are tests.faults, tests.fuzz and tests.leak, which
start from tests.world (a run that can be disturbed) and tests.seeds (good files to damage), and the
studies tests.intervals, tests.recipes, tests.spread and tests.page.
"""

import csv
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
from data import ActionScaler
from droid import DroidReader, open_droid
from model import Predictor, normalize_features, predict
from prepare.robot import droid_example, example, record

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")


# --- made play ---

# a 64-pixel centre crop shows all blocks
WIDTH = 80
HEIGHT = 64
BLOCK = 16
LEFT = 8


def needs_mujoco():
    """Skip a test where MuJoCo is not installed. It is not imported here: how it draws is chosen at
    its first import, by evaluation/arm.py."""
    if importlib.util.find_spec("mujoco") is None:
        pytest.skip("MuJoCo is not installed")


def picture(number):
    """A frame (64, 80, 3) with its number in ten black or white blocks, then one white and one
    black one: a mirrored frame reads wrong."""
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    marked = number | 1 << 10
    for bit in range(12):
        y = bit // 4 * BLOCK
        x = LEFT + bit % 4 * BLOCK
        image[y : y + BLOCK, x : x + BLOCK] = 255 if marked >> bit & 1 else 0
    return image


def read_number(image):
    """The number in a 64 x 64 centre crop, (H, W, 3) or (3, H, W); -1 if it is mirrored or no such
    picture."""
    image = np.asarray(image)
    if image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    image = image[:, (image.shape[1] - HEIGHT) // 2 :]
    bits = [image[bit // 4 * BLOCK + 8, bit % 4 * BLOCK + 8, 0] > 127 for bit in range(12)]
    if bits[10:] != [True, False]:
        return -1
    return sum(int(b) << i for i, b in enumerate(bits[:10]))


def film(frames=300, gop=60, bframes=3, times=None, container=None, x264="", size=None):
    """Bytes of an mp4 of numbered frames at 20 fps, or at `times` in milliseconds; size: (width,
    height) of plain noise instead."""

    # a file, since faststart reads back what it wrote
    path = os.path.join(tempfile.mkdtemp(), "film.mp4")
    width, height = size or (WIDTH, HEIGHT)
    with av.open(path, "w", options=container or {}) as c:
        stream = c.add_stream("libx264", rate=20)
        stream.width = width
        stream.height = height
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
            image = np.full((height, width, 3), i % 256, np.uint8) if size else picture(i)
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts = int(50 * i if times is None else times[i])
            frame.time_base = Fraction(1, 1000)
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
    dx = rng.normal(0, 30, lines).round(1)
    dy = rng.normal(0, 10, lines).round(1)
    yaw = 0.15 * (np.cumsum(dx) - dx)
    pitch = np.clip(0.15 * (np.cumsum(dy) - dy), -90, 90)

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
        likely = (("w", 0.5), ("a", 0.2), ("d", 0.1))
        keys = [f"key.keyboard.{k}" for k, p in likely if rng.random() < p]
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
        for field, value in change.items():
            line[field] = value(i) if callable(value) else value
        out.append(line)
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
            members[f"6.1{s}_player-{k}.mp4"] = mp4
            members[f"6.1{s}_player-{k}.jsonl"] = jsonl(contractor(seed=2 * s + k))
        write_tar(folder / f"shard-{s:06d}.tar", members)
    return folder


# --- made robot play ---

# what is added to the number of a picture of each camera
CAMERAS = {"exterior_1": 0, "exterior_2": 300, "wrist": 600}


@functools.lru_cache(None)
def jpeg(number):
    f = io.BytesIO()
    Image.fromarray(picture(number)).save(f, "JPEG", quality=75)
    return f.getvalue()


def write_file(path, *pieces):
    with open(path, "wb") as f:
        f.write(b"".join(pieces))
    return str(path)


def tfrecord_rows(seed, steps):
    """Fields of an episode: a smooth wander; the gripper tells the row: row / 1000."""
    rng = np.random.default_rng(seed)
    pose = np.cumsum(rng.normal(0, 0.02, (steps, 6)), axis=0)

    # roll about pi, as Franka's: it wraps
    pose = pose + [0.4, 0, 0.3, 3.1, 0, 0]
    pose[:, 3:] = (pose[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    return {
        "observation/cartesian_position": pose,
        "observation/gripper_position": np.arange(steps)[:, None] / 1000,
        "action_dict/joint_velocity": rng.normal(0, 0.3, (steps, 7)),
        "action": rng.normal(0, 1, (steps, 7)),
    }


def tfrecord(seed, steps=60, success=True, cameras=CAMERAS, **change):
    """A record: the Example of an episode, framed; change: field -> array, or None to leave it
    out."""
    fields = tfrecord_rows(seed, steps) | change
    fields = {k: np.float32(x) for k, x in fields.items() if x is not None}
    pictures = {c: [jpeg(CAMERAS[c] + i) for i in range(steps)] for c in cameras}
    name = f"lab/{'success' if success else 'failure'}/{seed}"
    made = droid_example(fields, pictures, f"{name}/MP4", f"{name}/trajectory.h5", "abc", success)
    return record(made)


def tfrecord_without_names(seed):
    """A record without episode_metadata, as one's own robot may have it."""
    fields = {f"steps/{k}": np.float32(x) for k, x in tfrecord_rows(seed, 60).items()}
    fields["steps/is_first"] = 1 * (np.arange(60) == 0)
    fields["steps/observation/exterior_image_1_left"] = [jpeg(i) for i in range(60)]
    return record(example(fields))


def write_episode(path, seed, gain=1.0, T=64, size=64, action_dim=None):
    """One's own robot, PATH.mp4 and PATH.npz: a disc moved by what the pose says; `gain` is how far
    the picture follows."""
    rng = np.random.default_rng(seed)
    velocity = np.zeros((T, 2))
    for t in range(1, T):
        velocity[t] = 0.9 * velocity[t - 1] + rng.normal(0, 0.015, 2)
    place = np.clip(0.5 + np.cumsum(velocity, 0), 0, 1)
    grip = (np.sin(np.arange(T) / 7 + seed) > 0).astype(float)[:, None]
    pose = np.zeros((T, 6))
    pose[:, :2] = place
    pose[:, 5] = 0.3 * np.sin(np.arange(T) / 9 + seed)

    yy, xx = np.mgrid[:size, :size] / size
    with av.open(f"{path}.mp4", "w") as c:
        stream = c.add_stream("libx264", rate=15)
        stream.width = stream.height = size
        for t in range(T):
            x, y = 0.5 + gain * (place[t] - 0.5)
            disc = (xx - x) ** 2 + (yy - y) ** 2 < 0.03
            frame = np.full((size, size, 3), 60, np.uint8)
            frame[disc] = (255, 80, 40) if grip[t] else (40, 200, 255)
            c.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        c.mux(stream.encode())

    fields = {"cartesian_position": pose, "gripper_position": grip, "rate": 15.0}
    if action_dim:
        fields["command"] = np.concatenate([velocity, np.zeros((T, action_dim - 2))], 1)
    np.savez(f"{path}.npz", **fields)


def fit_robot_scaler(data, output, action_keys=None, wider=1):
    """The scaler of a folder of episodes, as fit_scaler.py would make it of every fourth row;
    wider: a factor of its variances."""
    reader = DroidReader(5, action_keys=action_keys)
    records, _, _ = open_droid([str(data)], reader=reader, log=lambda line: None)
    moves = [reader.motion(r, np.arange(r.first, r.last, 4))[0] for r in records]
    actions = np.concatenate(moves)
    mean = actions.mean(0)
    m2 = wider * ((actions - mean) ** 2).sum(0)
    meta = {"names": reader.names, "units": reader.units, "fps": 4.0, "frames_per_step": 1}
    ActionScaler.from_moments(len(actions), mean, m2, meta).save(output)


# --- processes ---

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FORK = multiprocessing.get_context("forkserver")

# train_ac.py in seconds
TINY = (
    "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0 --crop_size 32"
    " --log_every 1 --start_lr 1e-4 --lr 2e-3"
)
PLAN = "--epochs 3 --warmup 1 --anneal 1"

# seconds after which a process hangs: other work on the machine, or a pause of it, is no fault
LIMIT = 600


def child(script, flags, log, env, file_limit):
    """In the forked process: become `python SCRIPT FLAGS > LOG 2>&1`; file_limit: bytes of the
    largest file that it may write."""

    # for its loader, as where it is started by hand
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    os.chdir(ROOT)
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ.update(env)
    if "PYTHONPATH" in env:
        sys.path.insert(0, env["PYTHONPATH"])
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    sys.argv = [script, *flags]
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def words(flags):
    """Flags as a list of words: strings are split at blanks, paths are not."""
    out = []
    for flag in map(str, flags):
        out += [flag] if os.sep in flag else flag.split()
    return out


class Run:
    """A script started with flags (strings are split at blanks, paths are not)."""

    count = 0

    def __init__(self, folder, script, *flags, env=None, file_limit=None):
        Run.count += 1
        self.log = os.path.join(folder, f"log-{os.getpid()}-{Run.count}.txt")
        self.process = FORK.Process(
            target=child, args=(script, words(flags), self.log, env or {}, file_limit)
        )
        self.process.start()

    def wait(self, timeout=LIMIT):
        """(exit code, everything printed)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"hangs: {timeout} s without an end\n{self.text()}")
        return self.process.exitcode, self.text()

    def text(self):
        if not os.path.exists(self.log):
            return ""
        with open(self.log) as f:
            return f.read()

    def until(self, ready, timeout=LIMIT):
        """Wait for ready(), looking often; False if the process ended before."""
        end = time.monotonic() + timeout
        while True:
            done = bool(ready())
            if done or not self.process.is_alive():
                return done
            assert time.monotonic() < end, f"never came: {self.text()}"
            time.sleep(0.0005)

    def signal_when(self, path, ready, number, group=False):
        """Send a signal as soon as ready(rows of the csv at path)."""
        assert self.until(lambda: os.path.exists(path) and ready(rows_of(path))), self.text()
        if group:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()


def run(folder, script, *flags, timeout=LIMIT, **options):
    """Run to the end, which must be a good one; what it printed."""
    code, text = Run(folder, script, *flags, **options).wait(timeout)
    assert code == 0, text
    return text


def error_line(code, text):
    """What a user must read where a program ends early: an exit code, no traceback and one line
    with "error: ", which is returned."""
    errors = [line for line in text.splitlines() if "error: " in line]
    assert code not in (0, None), text
    assert len(errors) == 1, text
    assert "Traceback" not in text, text
    return errors[0]


def fails(folder, script, *flags, **options):
    """Run to the end, which must be an error of one line; that line."""
    return error_line(*Run(folder, script, *flags, **options).wait())


def start_ranks(folder, script, *flags, **options):
    """Two processes as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [env | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    return [Run(folder, script, *flags, env=env, **options) for env in ranks]


def run_bench(folder, name, *flags, **options):
    """(JSON rows, everything printed) of `python -m bench.NAME --json FLAGS`."""
    text = run(folder, f"bench/{name}.py", "--json", *flags, **options)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert rows and all(row["torch"] and row["device"] for row in rows)
    return rows, text


# --- logs ---


def rows_of(path):
    """Rows of a csv as lists of numbers; a line that is being written is left out."""
    with open(path) as f:
        lines = f.read().split("\n")[1:-1]
    return [[float(x or "nan") for x in line.split(",")] for line in lines]


def column(folder, *names, log="train.csv"):
    """Columns of a log as the strings that are in it: equal strings are equal numbers."""
    with open(os.path.join(folder, log)) as f:
        return [[row[n] for n in names] for row in csv.DictReader(f)]


def numbers(folder, *names, log="train.csv"):
    """(rows, names) of a log; an empty cell is nan."""
    rows = column(folder, *names, log=log)
    return np.array([[cell or "nan" for cell in row] for row in rows], dtype=float)


# the test runs that read the FLOPs of a step from the log: MFU of this many FLOP/s
PEAK = "--peak_tflops 0.01"


def step_flops(folder, clips):
    """FLOPs of a step of `clips` clips, from the log of a run with PEAK."""
    share, clips_per_s = numbers(folder, "mfu", "clips_per_s").T
    flops = 1e10 * share * clips / clips_per_s
    np.testing.assert_allclose(flops, flops[0], rtol=1e-6)
    return flops[0]


def weight_count(folder, *parts):
    """Numbers in the matrices of parts of a checkpoint."""
    state, _ = checkpoint.load_latest(str(folder))
    return sum(x.numel() for part in parts for x in state[part].values() if x.ndim > 1)


def moments_of(state):
    """Adam's moments and step of every parameter of a checkpoint."""
    names = ("exp_avg", "exp_avg_sq", "step")
    return [s[k] for s in state["optimizer"]["state"].values() for k in names]


def same_run(a, b):
    """Two finished runs are bitwise one: losses, gradient norms, validation, weights, Adam's
    moments."""
    names = ("epoch", "itr", "jloss", "sloss", "grad_norm", "lr")
    assert column(a, *names) == column(b, *names)
    assert (a / "val.csv").read_text() == (b / "val.csv").read_text()
    one, two = (checkpoint.load_latest(f)[0] for f in (a, b))
    assert (one["epoch"], one["itr"]) == (two["epoch"], two["itr"])
    assert all(torch.equal(one["predictor"][k], v) for k, v in two["predictor"].items())
    assert all(torch.equal(x, y) for x, y in zip(moments_of(one), moments_of(two)))


# --- models ---

# sizes of the small predictor below, on 2 x 3 patches
B = 2
T = 4
N = 6
E = 24
A = 5
S = 3


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def small_predictor(seed=0, **options):
    """A tiny predictor whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    predictor = Predictor(E, A, S, (2, 3), pred_dim=24, depth=2, num_heads=2, **options)
    for p in predictor.parameters():
        nn.init.normal_(p, std=0.3)
    return predictor


def small_batch(seed=1):
    torch.manual_seed(seed)
    z = normalize_features(torch.randn(B, T, N, E))
    return z, torch.randn(B, T - 1, A), torch.randn(B, T, S)


def rollout_from_scratch(predictor, z, actions, states):
    """`Predictor.rollout` by its definition: every step runs the whole sequence again, as the
    reference code does."""
    context = z.shape[1]
    while z.shape[1] <= actions.shape[1]:
        step = predict(predictor, z, actions, states)[:, -1:]
        z = torch.cat([z, step], dim=1)
    return z[:, context:]


class Moved(nn.Module):
    """A predictor whose channels move on by as many places as the first action says (rounded), or
    by nothing if it is deaf."""

    rollout = Predictor.rollout
    predictor_embed = types.SimpleNamespace(out_features=1)

    def __init__(self, deaf=False):
        super().__init__()
        self.deaf = deaf

    def extend(self, z, actions, states, extrinsics=None, past=None):
        B, T = actions.shape[:2]
        z = z.view(B, T, -1, z.shape[-1])
        places = actions[..., 0].round().long() * (not self.deaf)
        source = (torch.arange(z.shape[-1]) - places[..., None, None]) % z.shape[-1]
        return z.gather(-1, source.expand_as(z)).flatten(1, 2), [(z, z)]


class Pushed(Moved):
    """A predictor that adds the first two actions times two fixed directions: the error is least at
    the true ones alone."""

    def extend(self, z, actions, states, extrinsics=None, past=None):
        directions = torch.randn(2, z.shape[-1], generator=torch.Generator().manual_seed(3))
        push = (actions[..., :2] @ directions)[:, :, None]
        out = z.view(*actions.shape[:2], -1, z.shape[-1]) + push
        return out.flatten(1, 2), [(z, z)]
