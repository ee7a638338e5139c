"""Robot episodes in DROID's form: a simulated arm (MuJoCo) picks up blocks, in TFRecords with every
field of DROID 1.0.1.

    python -m prepare.robot --episodes 60 --world a --out robot/a              # half a minute on two cores
    python -m prepare.robot --episodes 30 --world b --seed 1 --out robot/b     # another arm, seen from the other side

Writes OUT/droid_101-train.tfrecord-00000-of-00008 and so on, one tf.train.Example an episode (15
Hz, three cameras of 320x180 as JPEG), or with --form npz one's own robot as droid.py reads it:
NAME.npz and NAME.CAMERA.mp4 (H.264, a frame a row). In the npz, T rows each:
  cartesian_position (T, 6)  xyz in metres, then extrinsic xyz Euler angles in radians      gripper_position (T,)  0 open to 1 closed
  joint_velocity (T, 7)      commanded, rad/s; the idle filter needs it      rate, success  one number each (if absent: 15, true)
and whatever else --state_keys and --action_keys should find. OUT/robot.json holds the arguments;
finished files are kept on a re-run.

prepare/arm.py says what the worlds are. Some episodes fail, and in all of them the operator rests.
Episode i is a function of --seed, --world and i, on one machine with one driver to the bit."""

import argparse
import concurrent.futures
import functools
import glob
import io
import json
import os
import struct
import sys
import time

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import one_sentence
from files.disk import write_atomically
from files.episodes import CAMERAS, masked_crc
from prepare.arm import HEIGHT, RATE, WIDTH, WORLDS, play

X264 = {"preset": "veryfast", "crf": "20", "g": "15", "x264-params": "mbtree=0"}


# --- files ---


def varint(n):
    """Protobuf's integer; a negative one is its 64 bits."""
    n &= 2**64 - 1
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def example(fields):
    """{name: list of bytes, or array of floats, or of integers} -> tf.train.Example, numbers packed
    as TensorFlow packs them."""

    def part(number, data):
        return varint(number << 3 | 2) + varint(len(data)) + data

    def feature(values):
        if isinstance(values, list):
            return part(1, b"".join(part(1, v) for v in values))
        if values.dtype.kind == "f":
            return part(2, part(1, values.astype("<f4").tobytes()))
        return part(3, part(1, b"".join(map(varint, values.ravel().tolist()))))

    return part(
        1,
        b"".join(
            part(1, part(1, k.encode()) + part(2, feature(v))) for k, v in sorted(fields.items())
        ),
    )


def record(data):
    """Bytes as TFRecord has them: length, its checksum, the bytes, theirs."""
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))


def droid_example(rows, jpegs, folder, file, texts, success):
    """rows {field: (T, d)}, jpegs {camera: [bytes]} -> the Example of an episode with every field
    of DROID 1.0.1."""
    steps = len(rows["action"])
    last = np.arange(steps) == steps - 1
    fields = {f"steps/{k}": x for k, x in rows.items()}
    fields |= {f"steps/observation/{CAMERAS[c]}": x for c, x in jpegs.items()}
    fields |= {
        f"steps/language_instruction{n}": [text.encode()] * steps
        for n, text in zip(("", "_2", "_3"), texts)
    }
    fields |= {
        "steps/is_first": 1 * (np.arange(steps) == 0),
        "steps/is_last": 1 * last,
        "steps/is_terminal": 1 * last,
    }
    fields |= {
        "steps/reward": np.float32(last * success),
        "steps/discount": np.ones(steps, np.float32),
    }
    return example(
        fields
        | {
            "episode_metadata/recording_folderpath": [folder.encode()],
            "episode_metadata/file_path": [file.encode()],
        }
    )


def make_episode(world, seed, number, steps, out):
    """Plays an episode -> its record for a TFRecord; out: None, or the folder for NAME.npz and its
    videos."""
    rows, pictures, colour, success = play(world, seed, number, steps)
    if out is None:
        jpegs = {camera: [] for camera in pictures}
        for camera, x in ((c, x) for c, frames in pictures.items() for x in frames):
            f = io.BytesIO()
            Image.fromarray(x).save(f, "JPEG", quality=90)
            jpegs[camera].append(f.getvalue())
        name = f"r2d2/{'success' if success else 'failure'}/2023-01-01/world-{world}-seed-{seed}-episode-{number:05d}"
        texts = (
            f"pick up the {colour} block and put it elsewhere",
            f"move the {colour} block",
            f"Put the {colour} cube in another place.",
        )
        return record(
            droid_example(
                rows, jpegs, f"{name}/recordings/MP4", f"{name}/trajectory.h5", texts, success
            )
        )
    stem = os.path.join(out, f"episode-{number:05d}")
    for camera, frames in pictures.items():
        f = io.BytesIO()
        with av.open(f, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=RATE, pix_fmt="yuv420p", options=X264)
            stream.width, stream.height, stream.codec_context.thread_count = WIDTH, HEIGHT, 1
            for x in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
            container.mux(stream.encode())
        write_atomically(f"{stem}.{camera}.mp4", f.getvalue())
    keys = (
        "observation/cartesian_position",
        "observation/gripper_position",
        "action_dict/joint_velocity",
        "action",
    )
    arrays = {k.rpartition("/")[2]: rows[k] for k in keys} | {
        "rate": float(RATE),
        "success": success,
    }
    write_atomically(
        stem + ".npz", lambda f: np.savez(f, **arrays)
    )  # last: where it is, the rest is too


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        default="robot",
        help="folder; its finished files are kept if the arguments are the same",
    )
    parser.add_argument("--episodes", type=int, default=60, help="how many")
    parser.add_argument("--world", choices=WORLDS, default="a", help="which arm and cameras")
    parser.add_argument(
        "--form",
        choices=["rlds", "npz"],
        default="rlds",
        help="TFRecords as DROID's, or one's own robot's files",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=[100, 150],
        help="least and most of an episode, at 15 a second",
    )
    parser.add_argument(
        "--shards", type=int, default=8, help="TFRecords that the episodes are spread over"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    if args.episodes < 1 or not 2 <= args.steps[0] <= args.steps[1] or args.shards < 1:
        raise ValueError(
            f"--episodes {args.episodes} --steps {args.steps} --shards {args.shards} make nothing"
        )

    # --- resume ---
    made = {k: v for k, v in vars(args).items() if k not in ("out", "workers")}
    note, found = os.path.join(args.out, "robot.json"), "something else"
    if os.path.exists(note):
        with open(note) as f:
            found = json.load(f)
    if found != made and os.path.isdir(args.out) and os.listdir(args.out):
        raise ValueError(
            f"{args.out} holds {found}, not what is made with {made}: give another --out or remove"
            " that folder"
        )
    write_atomically(note, json.dumps(made).encode() + b"\n")
    for rest in glob.glob(os.path.join(glob.escape(args.out), "*.tmp")):  # of a run that was killed
        os.unlink(rest)

    # --- play ---
    lengths = np.random.default_rng([args.seed, ord(args.world)]).integers(
        args.steps[0], args.steps[1] + 1, args.episodes
    )
    n = min(args.shards, args.episodes) if args.form == "rlds" else args.episodes
    name = (
        "droid_101-train.tfrecord-{0:05d}-of-{1:05d}"
        if args.form == "rlds"
        else "episode-{0:05d}.npz"
    )
    parts = {
        os.path.join(args.out, name.format(i, n)): part
        for i, part in enumerate(np.array_split(range(args.episodes), n))
    }
    todo = {
        path: part for path, part in parts.items() if not os.path.exists(path)
    }  # files appear by renaming, whole or not at all
    jobs, out = (
        [int(i) for part in todo.values() for i in part],
        None if args.form == "rlds" else args.out,
    )
    pool, began = concurrent.futures.ProcessPoolExecutor(args.workers), time.time()
    with (
        pool,
        tqdm(
            total=int(lengths[jobs].sum()),
            unit=" steps",
            mininterval=0.1 if sys.stderr.isatty() else 5,
        ) as bar,
    ):
        made = pool.map(
            functools.partial(make_episode, args.world, args.seed, out=out),
            jobs,
            map(int, lengths[jobs]),
        )
        for path, part in todo.items():
            records = []
            for i in part:
                records.append(next(made))
                bar.update(int(lengths[i]))
            if args.form == "rlds":
                write_atomically(path, b"".join(records))
    size = (
        sum(os.path.getsize(x) for x in glob.glob(os.path.join(glob.escape(args.out), "*"))) / 2**20
    )
    print(
        f"{args.out}: {args.episodes} episodes of world {args.world} in {n} files, {n - len(todo)}"
        f" there already; {int(lengths.sum())} steps, {size:.0f} MiB, {time.time() - began:.0f} s"
    )
