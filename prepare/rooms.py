"""Makes play in Two Rooms, an environment of stable-worldmodel, as shards that every stage reads.

    python -m prepare.rooms --minutes 30 --out rooms     # five minutes on one core

Writes OUT/train/shard-%06d.tar and OUT/val/shard-%06d.tar with recordings of 20 seconds, KEY.mp4
and KEY.jsonl, of which every sixth is held out. A line is a step of the environment, and the
recording plays 20 of them a second. The agent goes to a goal, by way of the door if it is in the
other room, and then to the next one; its motion is mostly noise, as in LeWM's data.

Needs two packages more: pip install --no-deps stable-worldmodel==0.1.1, pip install gymnasium
loguru. evaluation/rooms.py describes the actions.

Recording i depends on --seed and i alone. Run it again after a kill: finished shards are kept."""

import argparse
import io
import json
import math
import os
import sys
import tarfile

import av
import numpy as np

from checkpoint import short_excepthook
from evaluation.rooms import FPS, SIZE, Wanderer, open_rooms, picture, play_step, speed_of
from files.disk import continue_folder, write_atomically
from files.progress import tqdm
from files.vpt import DEGREES_PER_PIXEL

X264 = {"preset": "veryfast", "crf": "10", "g": "20", "x264-params": "mbtree=0"}

# lines of a recording, and recordings of a shard
LENGTH = 20 * FPS
RECORDINGS = 5


def play(env, seed, number, length=LENGTH):
    """One recording of so many lines -> (mp4 bytes, list of lines)."""
    rng = np.random.default_rng([seed, number])
    env.reset(seed=int(rng.integers(2**31)))
    player = Wanderer(rng)
    angles = np.zeros(2)
    lines = []
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, pix_fmt="yuv420p", options=X264)
        stream.width = SIZE
        stream.height = SIZE

        # one thread: the same bytes on every machine
        stream.codec_context.thread_count = 1
        for t in range(length):
            # the frame, and what is done now
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(env), format="rgb24")))
            motion = play_step(env, player, rng) * speed_of(env)
            lines.append(
                {
                    "timestamp": t / FPS,
                    "mouse": {"dx": motion[0], "dy": motion[1]},
                    "keyboard": {"keys": []},
                    "camera": angles.tolist(),
                    "hotbar": 0,
                }
            )
            angles = angles + np.radians(motion * DEGREES_PER_PIXEL)
        container.mux(stream.encode())
    return video.getvalue(), lines


def write_shard(path, env, seed, numbers, bar):
    """Play recordings and write them as one shard, which appears whole."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in numbers:
            video, lines = play(env, seed, number)
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            for extension, data in (("mp4", video), ("jsonl", text)):
                member = tarfile.TarInfo(f"rooms-{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            bar.update(len(lines))
    write_atomically(path, packed.getvalue())


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=30, help="of play (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of play (default 0)")
    parser.add_argument("--out", default="rooms", help="folder, continued with the same arguments")
    args = parser.parse_args()
    count = round(args.minutes * 60 * FPS / LENGTH)
    if count < 6:
        parser.error(f"--minutes {args.minutes:g} is too little: at least 2, for 6 recordings")
    sys.excepthook = short_excepthook

    # nothing is written where the package is missing
    env = open_rooms()

    # --- resume ---
    made = {"minutes": args.minutes, "seed": args.seed}
    continue_folder(args.out, "rooms.json", made)

    # --- which recordings go into which shard ---
    held_out = list(range(0, count, 6))
    train = [i for i in range(count) if i not in held_out]
    shards = {}
    for split, numbers in (("val", held_out), ("train", train)):
        parts = np.array_split(numbers, math.ceil(len(numbers) / RECORDINGS))
        for i, part in enumerate(parts):
            path = os.path.join(args.out, split, f"shard-{i:06d}.tar")
            shards[path] = [int(number) for number in part]

    # --- play ---
    todo = {path: numbers for path, numbers in shards.items() if not os.path.exists(path)}
    lines = LENGTH * sum(map(len, todo.values()))
    with tqdm(total=lines, unit=" lines") as bar:
        for path, numbers in todo.items():
            write_shard(path, env, args.seed, numbers, bar)

    # --- report ---
    print(
        f"{args.out}: {count} recordings of {LENGTH / FPS:g} s in {len(shards)} shards,"
        f" {len(shards) - len(todo)} there already\nnext: python fit_scaler.py --data"
        f" {args.out}/train/*.tar --fps 4 --frames_per_step 1 --output {args.out}/scaler.pkl"
    )
