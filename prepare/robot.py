"""Makes robot episodes in DROID's form: a simulated arm (MuJoCo) picks up blocks, in TFRecords with
every field of DROID 1.0.1.

    # half a minute on two cores
    python -m prepare.robot --episodes 60 --world a --out robot/a
    # another arm, seen from the other side
    python -m prepare.robot --episodes 30 --world b --seed 1 --out robot/b

Writes OUT/droid_101-train.tfrecord-00000-of-00008 and so on, one tf.train.Example an episode (15
Hz, three cameras of 320x180 as JPEG).

With --format npz it writes the form in which droid.py reads one's own robot: NAME.npz and
NAME.CAMERA.mp4 (H.264, a frame a row). The npz contains, in T rows each:
  cartesian_position (T, 6)  xyz in metres, then extrinsic xyz Euler angles in radians
  gripper_position (T,)      0 open to 1 closed
  joint_velocity (T, 7)      commanded, rad/s; the idle filter needs it
  rate, success              one number each (if absent: 15, true)
and whatever else --state_keys and --action_keys should find.

With --format lerobot it writes a LeRobot data set (3.0) with the columns of lerobot/droid_1.0.1, in
--shards parts: an mp4 contains all episodes of its part.

OUT/robot.json contains the arguments. Run it again after a kill: finished files are kept.
evaluation/arm.py describes the worlds. Some episodes fail, and in all of them the operator rests.
Episode i depends on --seed, --world and i alone, to the bit on one machine with one driver."""

import argparse
import concurrent.futures
import functools
import glob
import io
import os
import struct
import sys
import time

import av
import numpy as np
from PIL import Image

from checkpoint import short_excepthook
from evaluation.arm import COLOURS, HEIGHT, RATE, WIDTH, WORLDS, play
from files.disk import continue_folder, write_atomically
from files.episodes import CAMERAS, masked_crc
from files.progress import tqdm
from prepare import lerobot

# DROID's cameras and fields as lerobot/droid_1.0.1 calls them
VIEWS = {
    "exterior_1": "observation.images.exterior_1_left",
    "exterior_2": "observation.images.exterior_2_left",
    "wrist": "observation.images.wrist_left",
}
COLUMNS = {
    "observation/cartesian_position": "observation.state.cartesian_position",
    "observation/gripper_position": "observation.state.gripper_position",
    "observation/joint_position": "observation.state.joint_position",
    "action_dict/cartesian_position": "action.cartesian_position",
    "action_dict/cartesian_velocity": "action.cartesian_velocity",
    "action_dict/joint_position": "action.joint_position",
    "action_dict/joint_velocity": "action.joint_velocity",
    "action_dict/gripper_position": "action.gripper_position",
    "action_dict/gripper_velocity": "action.gripper_velocity",
    "action": "action.original",
}
X264 = {"preset": "veryfast", "crf": "20", "g": "15", "x264-params": "mbtree=0"}


# --- files ---


def varint(n):
    """Protobuf's integer; a negative one is its 64 bits."""
    # seven bits a byte, the lowest first; the eighth says that more follow
    n &= 2**64 - 1
    if n < 128:
        return bytes([n])
    return bytes([n & 127 | 128]) + varint(n >> 7)


def example(fields):
    """{name: list of bytes, or array of floats, or of integers} -> tf.train.Example, numbers packed
    as TensorFlow packs them."""

    # a field of bytes: its number and kind, its length, the bytes
    def part(number, data):
        return varint(number << 3 | 2) + varint(len(data)) + data

    # a Feature is a list of bytes (1), of floats (2) or of integers (3)
    def feature(values):
        if isinstance(values, list):
            return part(1, b"".join(part(1, v) for v in values))
        if values.dtype.kind == "f":
            return part(2, part(1, values.astype("<f4").tobytes()))
        return part(3, part(1, b"".join(map(varint, values.ravel().tolist()))))

    # Features are a map: an entry has a name (1) and a Feature (2)
    entries = b""
    for name, values in sorted(fields.items()):
        entries += part(1, part(1, name.encode()) + part(2, feature(values)))
    return part(1, entries)


def record(data):
    """Bytes as a TFRecord stores them: length, checksum of the length, the bytes, their
    checksum."""
    # the length has a checksum of its own: a reader can trust it before it reads on
    length = struct.pack("<Q", len(data))
    length_crc = struct.pack("<I", masked_crc(length))
    return length + length_crc + data + struct.pack("<I", masked_crc(data))


def droid_example(rows, jpegs, folder, file, texts, success):
    """rows {field: (T, d)}, jpegs {camera: [bytes]} -> the Example of an episode with every field
    of DROID 1.0.1."""
    # which steps are first and last
    steps = len(rows["action"])
    numbers = np.arange(steps)
    last = numbers == steps - 1

    # what the arm did and saw, and what it was told to do, repeated on every step
    fields = {}
    for name, values in rows.items():
        fields[f"steps/{name}"] = values
    for camera, pictures in jpegs.items():
        fields[f"steps/observation/{CAMERAS[camera]}"] = pictures
    for ending, text in zip(("", "_2", "_3"), texts):
        fields[f"steps/language_instruction{ending}"] = [text.encode()] * steps

    # what RLDS adds to every step; a success is rewarded at its end
    fields["steps/is_first"] = 1 * (numbers == 0)
    fields["steps/is_last"] = 1 * last
    fields["steps/is_terminal"] = 1 * last
    fields["steps/reward"] = np.float32(last * success)
    fields["steps/discount"] = np.ones(steps, np.float32)
    fields["episode_metadata/recording_folderpath"] = [folder.encode()]
    fields["episode_metadata/file_path"] = [file.encode()]
    return example(fields)


def jpeg(picture):
    f = io.BytesIO()
    Image.fromarray(picture).save(f, "JPEG", quality=90)
    return f.getvalue()


def mp4(pictures):
    f = io.BytesIO()
    with av.open(f, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, pix_fmt="yuv420p", options=X264)
        stream.width = WIDTH
        stream.height = HEIGHT

        # one thread: the same bytes on every machine
        stream.codec_context.thread_count = 1
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return f.getvalue()


# --- an episode ---


def make_episode(world, seed, number, steps, form, folder):
    """Play an episode. form "npz": write it to the folder as NAME.npz and its videos, return None;
    "rlds": return its record for a TFRecord; "lerobot": return it as lerobot.Recorded."""
    rows, pictures, colour, success = play(world, seed, number, steps)
    if form == "rlds":
        return tfrecord(rows, pictures, colour, success, f"world-{world}-seed-{seed}", number)
    if form == "lerobot":
        return recorded(rows, pictures, colour, success)
    write_npz(os.path.join(folder, f"episode-{number:05d}"), rows, pictures, success)


def tfrecord(rows, pictures, colour, success, name, number):
    """The record of an episode."""
    # a path as DROID's: droid.py reads the outcome from it
    outcome = "success" if success else "failure"
    place = f"r2d2/{outcome}/2023-01-01/{name}-episode-{number:05d}"
    texts = (
        f"pick up the {colour} block and put it elsewhere",
        f"move the {colour} block",
        f"Put the {colour} cube in another place.",
    )

    # pictures as JPEG, all in one Example
    jpegs = {camera: [jpeg(x) for x in frames] for camera, frames in pictures.items()}
    folder = f"{place}/recordings/MP4"
    return record(droid_example(rows, jpegs, folder, f"{place}/trajectory.h5", texts, success))


def recorded(rows, pictures, colour, success):
    """An episode of a LeRobot data set."""
    # the state is joints and gripper, the action their commanded positions
    steps = len(rows["action"])
    fields = {}
    for kind, group in (("observation.state", "observation"), ("action", "action_dict")):
        parts = [rows[f"{group}/{name}"] for name in ("joint_position", "gripper_position")]
        fields[kind] = np.concatenate([x.reshape(steps, -1) for x in parts], axis=1)
    for name, column in COLUMNS.items():
        fields[column] = rows[name]
    fields["is_episode_successful"] = np.full(steps, success)
    videos = {VIEWS[camera]: mp4(frames) for camera, frames in pictures.items()}
    return lerobot.Recorded(fields, videos, list(COLOURS).index(colour))


def write_npz(stem, rows, pictures, success):
    """Write an episode as stem.CAMERA.mp4 and stem.npz."""
    # a video for each camera
    for camera, frames in pictures.items():
        write_atomically(f"{stem}.{camera}.mp4", mp4(frames))

    # the names by which droid.py knows one's own robot
    arrays = {
        "cartesian_position": rows["observation/cartesian_position"],
        "gripper_position": rows["observation/gripper_position"],
        "joint_velocity": rows["action_dict/joint_velocity"],
        "action": rows["action"],
        "rate": float(RATE),
        "success": success,
    }
    # the npz is written last: an episode that has one is complete
    write_atomically(stem + ".npz", lambda f: np.savez(f, **arrays))


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="robot", help="folder; its finished files are kept")
    parser.add_argument("--episodes", type=int, default=60, help="how many")
    parser.add_argument("--world", choices=WORLDS, default="a", help="which arm and cameras")
    forms = ["rlds", "npz", "lerobot"]
    parser.add_argument("--form", "--format", choices=forms, default="rlds", help="kind of files")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[100, 150], help="least and most rows"
    )
    parser.add_argument("--shards", type=int, default=8, help="number of TFRecords, or parts")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    sys.excepthook = short_excepthook

    # --- checks: before anything is played ---
    least, most = args.steps
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes} makes nothing: give 1 or more")
    if args.shards < 1:
        raise ValueError(f"--shards {args.shards} makes nothing: give 1 or more")
    if least < 2:
        raise ValueError(f"--steps {least} {most}: an episode has 2 rows or more")
    if least > most:
        raise ValueError(f"--steps {least} {most}: give the smaller number first")

    # --- resume ---
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "workers")}
    continue_folder(args.out, "robot.json", arguments)

    # what a run that was killed left behind
    for path in glob.glob(os.path.join(glob.escape(args.out), "**/*.tmp"), recursive=True):
        os.unlink(path)

    # --- which episodes go into which file ---
    # lengths depend on the seed, not on what is there already
    rng = np.random.default_rng([args.seed, ord(args.world)])
    lengths = rng.integers(least, most + 1, args.episodes)

    # rlds and lerobot: episodes share files; npz: each has files of its own
    files = min(args.shards, args.episodes)
    if args.form == "rlds":
        names = [f"droid_101-train.tfrecord-{i:05d}-of-{files:05d}" for i in range(files)]
    elif args.form == "lerobot":
        names = [lerobot.part_name(i) for i in range(files)]
    else:
        files = args.episodes
        names = [f"episode-{i:05d}.npz" for i in range(files)]

    # files appear by renaming: one that exists is complete
    todo = {}
    for name, episodes in zip(names, np.array_split(range(args.episodes), files)):
        path = os.path.join(args.out, name)
        if not os.path.exists(path):
            todo[path] = [int(i) for i in episodes]

    # --- play ---
    # npz: a worker writes its episode; others return it, and files are written in order
    started = time.time()
    numbers = [i for episodes in todo.values() for i in episodes]
    make = functools.partial(make_episode, args.world, args.seed, form=args.form, folder=args.out)
    tasks = [f"pick up the {colour} block and put it elsewhere" for colour in COLOURS]
    bar = tqdm(total=int(lengths[numbers].sum()), unit=" steps")
    with concurrent.futures.ProcessPoolExecutor(args.workers) as pool, bar:
        results = pool.map(make, numbers, map(int, lengths[numbers]))  # in the order of `numbers`

        # a file is written when the last of its episodes is there
        for path, episodes in todo.items():
            records = []
            for i in episodes:
                records.append(next(results))
                bar.update(int(lengths[i]))
            if args.form == "rlds":
                write_atomically(path, b"".join(records))
            if args.form == "lerobot":
                first = episodes[0]
                part = names.index(os.path.relpath(path, args.out))
                first_row = int(lengths[:first].sum())
                lerobot.write_part(args.out, part, first, first_row, records, tasks, RATE)

    # what says that the data set is whole comes last
    if args.form == "lerobot":
        lerobot.finish(args.out, files, tasks, RATE, "Franka")

    # --- report ---
    paths = glob.glob(os.path.join(glob.escape(args.out), "**"), recursive=True)
    size = sum(map(os.path.getsize, filter(os.path.isfile, paths))) / 2**20
    print(
        f"{args.out}: {args.episodes} episodes of world {args.world} in {files} files,"
        f" {files - len(todo)} there already; {int(lengths.sum())} steps, {size:.0f} MiB,"
        f" {time.time() - started:.0f} s"
    )
