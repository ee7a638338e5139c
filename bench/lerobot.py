"""How fast are LeRobot data sets read, beside lerobot's own loader?

    python -m bench.lerobot                    # pip install lerobot to compare
    python -m bench.lerobot --of open --many 10000

clips  A data set is made here: two cameras of 320x180, H.264 with a key frame every second picture
       as lerobot writes it, all episodes in one mp4 a camera. A clip is 8 frames of both cameras,
       every fourth row, and their states. Both readers give the same clips in turns, in one
       process, ours with PyAV; CPU seconds are counted. Frames and states must be equal.
open   Opening a data set of many episodes: metadata and rows, no video (its mp4s are empty files).
       The first time all rows of states are read; then the index is cached. Each opening is in a
       process of its own, whose start is not counted."""

import argparse
import atexit
import functools
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

# a cache of its own, named before our modules are imported; the processes started here share it
if __name__ != "__mp_main__":
    made_here = tempfile.mkdtemp(prefix="nanojepa-bench-")
    atexit.register(shutil.rmtree, made_here)
    os.environ["NANOJEPA_CACHE"] = os.path.join(made_here, "cache")
SCRATCH = os.path.dirname(os.environ["NANOJEPA_CACHE"])

import av
import numpy as np
import pyarrow as pa
import torch

from bench import report
from droid import DroidReader, open_droid
from files.episodes import read_fields, read_pictures
from files.progress import tqdm
from prepare import lerobot as writer

FPS = 15
CAMERAS = ("exterior_1", "wrist")
FEATURES = {name: f"observation.images.{name}_left" for name in CAMERAS}
POSE = ["observation.state.cartesian_position", "observation.state.gripper_position"]
FRAMES = 8
STRIDE = 4


def quiet(line):
    pass


# --- make a data set ---


def rows_of(rng, steps):
    """Fields of an episode in DROID's layout, in which the arm stands still for a fifth."""
    rows = {
        "observation.state": rng.standard_normal((steps, 8), np.float32),
        POSE[0]: rng.standard_normal((steps, 6), np.float32),
        POSE[1]: rng.random((steps, 1), np.float32),
        "action": rng.standard_normal((steps, 8), np.float32),
        "action.joint_velocity": rng.standard_normal((steps, 7), np.float32),
    }
    still = steps // 5
    for x in rows.values():
        x[still : 2 * still] = x[still]
    return rows


def panning(rng, steps):
    """An mp4 of a texture that moves under the camera."""
    coarse = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    texture = coarse.repeat(10, axis=0).repeat(10, axis=1)
    f = io.BytesIO()
    with av.open(f, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, pix_fmt="yuv420p")
        stream.width = 320
        stream.height = 180
        stream.options = {"g": "2", "crf": "30", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for t in range(steps):
            picture = np.ascontiguousarray(texture[t : t + 180, t : t + 320])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return f.getvalue()


def make_set(root, episodes, steps):
    """A data set with videos, in one part."""
    rng = np.random.default_rng(0)
    recorded = []
    for _ in tqdm(range(episodes), desc="make", unit=" episodes"):
        videos = {name: panning(rng, steps) for name in FEATURES.values()}
        recorded.append(writer.Recorded(rows_of(rng, steps), videos, 0))
    writer.write_part(root, 0, 0, 0, recorded, ["move"], FPS)
    writer.finish(root, 1, ["move"], FPS, "arm")


def make_many(root, episodes, steps, of_file=100):
    """A data set of many episodes, whose mp4s are empty."""
    rng = np.random.default_rng(0)
    described = []
    for first in tqdm(range(0, episodes, of_file), desc="make", unit=" files"):
        number = first // of_file
        tables = []
        for e in range(first, min(first + of_file, episodes)):
            tables.append(writer.table_of(rows_of(rng, steps), e, e * steps, 0, FPS))
            about = {"episode_index": e, "tasks": ["move"], "length": steps}
            about |= {"data/chunk_index": 0, "data/file_index": number}
            for name in FEATURES.values():
                about[f"videos/{name}/chunk_index"] = 0
                about[f"videos/{name}/file_index"] = number
                about[f"videos/{name}/from_timestamp"] = (e - first) * steps / FPS
            # statistics, as lerobot's writer adds them: they are not to be read
            for name in ("observation.state", "action", *POSE, *FEATURES.values()):
                for what in ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99"):
                    about[f"stats/{name}/{what}"] = [0.5] * 8
            described.append(about)
        path = os.path.join(root, "data", writer.PART.format(number) + ".parquet")
        writer.write_tables(path, tables)
        for name in FEATURES.values():
            mp4 = os.path.join(root, "videos", name, writer.PART.format(number) + ".mp4")
            os.makedirs(os.path.dirname(mp4), exist_ok=True)
            open(mp4, "wb").close()

    # a row group for every ten episodes, as lerobot's writer flushes them
    groups = [described[i : i + 10] for i in range(0, len(described), 10)]
    tables = [pa.Table.from_pylist(group) for group in groups]
    writer.write_tables(os.path.join(root, writer.part_name(0)), tables)
    features = {}
    for name in FEATURES.values():
        features[name] = {"dtype": "video", "shape": [180, 320, 3]}
    for name, x in rows_of(rng, 1).items():
        features[name] = {"dtype": "float32", "shape": [x.shape[1]]}
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features}
    with open(os.path.join(root, "meta/info.json"), "w") as f:
        json.dump(info, f)


# --- read it ---


def our_clips(root):
    """A function (episode, first row) -> ({camera: (8, H, W, 3) uint8}, (8, 7) states)."""
    reader = DroidReader(camera=CAMERAS)
    records = open_droid(root, reader=reader, idle_filter="off", log=quiet)[0]
    by_number = {int(r.key[len("episode_") :][:6]): r for r in records}

    def clip(episode, first):
        r = by_number[episode]
        rows = first + STRIDE * np.arange(FRAMES)
        pictures = {camera: np.stack(read_pictures(r, camera, rows)) for camera in CAMERAS}
        return pictures, np.concatenate(read_fields(r, POSE), axis=1)[rows]

    return clip


def lerobot_clips(root):
    """The same from lerobot's loader; ImportError without it."""
    import torchvision
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # its reader with PyAV needs a class that torchvision has dropped; its default is torchcodec
    backend = "pyav" if hasattr(torchvision.io, "VideoReader") else "torchcodec"
    print(f"lerobot decodes with {backend}", file=sys.stderr)

    seconds = [k * STRIDE / FPS for k in range(FRAMES)]
    names = [*FEATURES.values(), *POSE]
    stamps = {name: seconds for name in names}
    dataset = LeRobotDataset("bench/made", root, delta_timestamps=stamps, video_backend=backend)
    starts = [int(x) for x in dataset.meta.episodes["dataset_from_index"]]

    def clip(episode, first):
        item = dataset[starts[episode] + first]
        pictures = {}
        for camera, name in FEATURES.items():
            # pictures are floats from 0 to 1 there
            x = (item[name] * 255).round().to(torch.uint8)
            pictures[camera] = x.permute(0, 2, 3, 1).numpy()
        states = [item[name].reshape(FRAMES, -1).double().numpy() for name in POSE]
        return pictures, np.concatenate(states, axis=1)

    return clip


def clip_rows(root, episodes, steps, clips):
    """Rows of both readers, timed in turns."""
    readers = {"ours": our_clips(root)}
    try:
        readers["lerobot"] = lerobot_clips(root)
    except ImportError as e:
        print(f"lerobot: left out, {e} (pip install lerobot)")

    rng = np.random.default_rng(1)
    spent = dict.fromkeys(readers, 0.0)
    different = 0
    for k in tqdm(range(clips + 1), desc="read", unit=" clips"):
        episode = int(rng.integers(episodes))
        first = int(rng.integers(steps - (FRAMES - 1) * STRIDE))
        got = {}
        for name, clip in readers.items():
            before = time.process_time()
            got[name] = clip(episode, first)
            # the first clip opens files, and is not counted
            if k:
                spent[name] += time.process_time() - before
        if "lerobot" in got:
            ours, theirs = got["ours"], got["lerobot"]
            same = all(np.array_equal(ours[0][c], theirs[0][c]) for c in CAMERAS)
            different += not (same and np.array_equal(ours[1], theirs[1]))

    rows = []
    for name, seconds in spent.items():
        row = {"reader": name, "clips/CPU-s": clips / seconds}
        row |= {"frames/CPU-s": clips * FRAMES * len(CAMERAS) / seconds}
        if "lerobot" in spent:
            row |= {"times lerobot": spent["lerobot"] / seconds, "clips that differ": different}
        rows.append(row)
    return rows


def opening(root):
    """Open a data set once: what was found, and the seconds it took."""
    started = time.perf_counter()
    before = time.process_time()
    reader = DroidReader(camera=CAMERAS)
    train, val, bad = open_droid(root, val_fraction=0.1, reader=reader, log=quiet)
    seconds = time.perf_counter() - started
    row = {"usable": len({r.key for r in train + val}), "bad": len(bad), "seconds": seconds}
    return row | {"CPU seconds": time.process_time() - before}


def open_rows(root, episodes):
    """Openings of a data set of many episodes, without and with a cached index. A process keeps
    metadata that it has read, so each has one of its own."""
    rows = []
    for name in ("first time", "again"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(opening, root).result()
        rows.append({"opening": name, "episodes": episodes} | row)
    return rows


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = ["clips", "open"]
    flag = parser.add_argument
    flag("--of", nargs="+", default=kinds, choices=kinds, help="what to measure (default: all)")
    flag("--episodes", type=int, default=12, help="clips: episodes (default 12)")
    flag("--steps", type=int, default=200, help="rows of an episode (default 200)")
    flag("--clips", type=int, default=100, help="clips timed for each reader (default 100)")
    flag("--many", type=int, default=10000, help="open: episodes (default 10000)")
    flag("--json", action="store_true", help="rows as JSON lines")
    args = parser.parse_args()

    # --- measure ---
    show = functools.partial(report, as_json=args.json, device=torch.device("cpu"))
    if "clips" in args.of:
        root = os.path.join(SCRATCH, "set")
        make_set(root, args.episodes, args.steps)
        show(clip_rows(root, args.episodes, args.steps, args.clips))
    if "open" in args.of:
        root = os.path.join(SCRATCH, "many")
        make_many(root, args.many, args.steps)
        show(open_rows(root, args.many))
