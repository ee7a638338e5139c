"""What the loader costs against decoding the same clips and nothing else, PyAV against decord, and
how much of a recording a clip reads; and the rows of bench/readers.py on H5 latents and on DROID's
TFRecords, beside other readers.

    python -m bench.data                       # two recordings of 5 minutes at 640x360, deleted afterwards; 4 minutes on two cores
    python -m bench.data --minutes 1 --clips 16 --gop 60
    python -m bench.data --of droid --json     # TFRecords only; pip install tfrecord, tensorflow-cpu for the rows to compare with
    python -m bench.data --of latents          # windows of H5 against bare h5py: 20 seconds

The recording is made here: a texture that pans as under a moving camera, 20 fps, H.264 High with
B-frames, 1.7 Mbit/s, one keyframe every --gop frames (GOP and bitrate of real VPT files are
assumptions). The bare loop opens the mp4 as a plain file that is in the page cache, seeks, decodes
with one thread and resizes the sixteen frames it wants; the loader reads the same frame numbers out
of a tar, with actions, crop and batches of 8. Both run in turns, a batch each, so that other load
on the machine meets both."""

import argparse
import atexit
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time

from files.shards import Slice, index_shards, read_ticks

SCRATCH = tempfile.mkdtemp(prefix="nanojepa-bench-")
atexit.register(shutil.rmtree, SCRATCH)
os.environ["NANOJEPA_CACHE"] = os.path.join(
    SCRATCH, "cache"
)  # read by data.py once, when it is imported

import av
import numpy as np
import torch
from tqdm import tqdm

import data
from bench import report
from bench.readers import droid_rows, latent_rows, make_tfrecord
from files.video import mp4_times
from files.vpt import ClipReader

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--minutes", type=float, default=5.0, help="length of the recording")
parser.add_argument("--size", default="640x360", help="width x height of the recording")
parser.add_argument(
    "--gop",
    type=int,
    nargs="+",
    default=[250, 60],
    help="frames from keyframe to keyframe, one recording each",
)
parser.add_argument("--clips", type=int, default=48, help="clips timed a row")
parser.add_argument("--crop_size", type=int, default=256, help="pixels of the square crop")
parser.add_argument(
    "--decoder",
    nargs="+",
    default=["pyav", "decord"],
    choices=["pyav", "decord"],
    help="decoders to time",
)
parser.add_argument(
    "--keep", metavar="FOLDER", help="keep the recordings there, and use the ones that are there"
)
parser.add_argument(
    "--of",
    nargs="+",
    default=["latents", "droid", "vpt"],
    choices=["latents", "droid", "vpt"],
    help="which data",
)
parser.add_argument("--episodes", type=int, default=30, help="robot episodes")
parser.add_argument("--steps", type=int, default=240, help="rows of a robot episode")
parser.add_argument("--json", action="store_true", help="rows as JSON lines")
BATCH = 8


def make_recording(path, frames, size, gop):
    """A shard with one recording at `path`, and its video as a plain file beside it."""
    w, h = size
    rng = np.random.default_rng(0)
    texture = sum(
        rng.integers(0, 90, (4 * h // s + 1, 4 * w // s + 1, 3))
        .repeat(s, 0)
        .repeat(s, 1)[: 4 * h, : 4 * w]
        for s in (2, 8, 32)
    )
    texture = texture.clip(0, 255).astype(np.uint8)
    video = path.replace(".tar", ".mp4")
    options = {
        "preset": "veryfast",
        "profile": "high",
        "g": str(gop),
        "keyint_min": str(gop),
        "sc_threshold": "0",
        "bf": "3",
    }
    with av.open(video, "w") as container:
        stream = container.add_stream("libx264", rate=20, options=options)
        stream.width = w
        stream.height = h
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_700_000
        at = np.array([1.5 * w, 1.5 * h])
        speed = np.zeros(2)
        for _ in tqdm(range(frames), desc=f"recording, GOP {gop}", unit="frame"):
            speed = 0.9 * speed + rng.normal(0, 2, 2) - 0.002 * (at - (1.5 * w, 1.5 * h))
            at = np.clip(at + speed, 0, (3 * w - 1, 3 * h - 1))
            x, y = at.astype(int)
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[y : y + h, x : x + w]))
                )
            )
        container.mux(stream.encode())
    dx = rng.normal(0, 30, frames).round(1)
    yaw = 0.15 * (np.cumsum(dx) - dx)
    stats = {
        f"minecraft.custom:minecraft.counter_{i}": i for i in range(40)
    }  # real lines are 2.5 KB
    with open(path.replace(".tar", ".jsonl"), "w") as f:
        for i in range(frames):
            mouse = {
                "x": 640.0,
                "y": 360.0,
                "dx": dx[i],
                "dy": 0.0,
                "buttons": [],
                "newButtons": [],
            }
            line = {
                "mouse": mouse,
                "keyboard": {"keys": ["key.keyboard.w"]},
                "isGuiOpen": False,
                "hotbar": 0,
                "yaw": yaw[i],
                "pitch": 0.0,
            }
            f.write(
                json.dumps(
                    line
                    | {
                        "inventory": [{"type": "oak_planks", "quantity": 3}] * 10,
                        "stats": stats,
                    }
                )
                + "\n"
            )
    with tarfile.open(path, "w") as tar:
        for extension in (".mp4", ".jsonl"):
            tar.add(path.replace(".tar", extension), arcname="recording" + extension)


def bare_pyav(path, times, wanted, size):
    """One clip, by number: open, seek, decode, resize the wanted frames."""
    out, left = [], set(wanted.tolist())
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(times[wanted[0]]), stream=stream, backward=True)
        for frame in container.decode(stream):
            number = int(np.searchsorted(times, frame.pts))
            if number in left:
                out.append(
                    frame.to_ndarray(
                        format="rgb24", width=size[0], height=size[1], interpolation="BILINEAR"
                    )
                )
                left.discard(number)
                if not left:
                    return np.stack(out)


def bare_decord(path, times, wanted, size):
    """The same with decord; like the loader it is given bytes, since it cannot be given a part of a
    tar."""
    import decord

    with open(path, "rb") as f:
        return (
            decord.VideoReader(f, width=size[0], height=size[1], num_threads=1)
            .get_batch(wanted.tolist())
            .asnumpy()
        )


class CountedSlice(Slice):
    total = 0

    def close(self):
        if not self.closed:
            CountedSlice.total += self.bytes_read
        super().close()


def row(path, decoder, args):
    """Times one decoder on one shard -> the columns of a line of the table."""
    video = path.replace(".tar", ".mp4")
    with open(video, "rb") as f:
        times = mp4_times(f)
        f.seek(0)
        while f.read(1 << 24):  # into the page cache
            pass
    records, _ = data.open_records(path)
    reader = ClipReader(crop_size=args.crop_size, decoder=decoder)
    batches = -(-args.clips // BATCH)
    options = {"reader": reader, "batches_per_epoch": batches + 1}
    loader = data.vpt_loader((records, [1.0]), BATCH, num_workers=0, **options)
    items = list(itertools.islice(loader.batch_sampler, batches + 1))
    starts = len(times) - 4 * (reader.frames - 1)
    w, h = (int(x) for x in args.size.split("x"))
    size = tuple(max(round(x * args.crop_size / min(w, h)), args.crop_size) for x in (w, h))
    bare = bare_pyav if decoder == "pyav" else bare_decord
    ours, seconds = iter(loader), {"bare": 0.0, "loader": 0.0}
    for k, batch in enumerate(
        tqdm(items, desc=f"{os.path.basename(path)} {decoder}", unit="batch")
    ):
        wanted = [int(place * starts) + 4 * np.arange(reader.frames) for _, _, _, place in batch]
        t0 = time.perf_counter()
        raw = [bare(video, times, x, size) for x in wanted]
        t1 = time.perf_counter()
        CountedSlice.total = (
            0 if k < 2 else CountedSlice.total
        )  # the first batch also reads the index and fills the caches
        clips = next(ours)
        t2 = time.perf_counter()
        x = (raw[0].shape[2] - args.crop_size) // 2
        assert (
            clips["video"][0].permute(0, 2, 3, 1).numpy()
            == raw[0][:, : args.crop_size, x : x + args.crop_size]
        ).all(), "not the same clip"
        if k:
            seconds = {"bare": seconds["bare"] + t1 - t0, "loader": seconds["loader"] + t2 - t1}
    n, per_clip = batches * BATCH, CountedSlice.total / batches / BATCH
    workers = iter(data.vpt_loader((records, [1.0]), BATCH, num_workers=2, **options))
    for _ in range(2):  # one batch of each worker, while they start
        next(workers)
    t0 = time.perf_counter()
    for _ in range(batches):
        next(workers)
    with_workers = n / (time.perf_counter() - t0)
    rates = n / seconds["bare"], n / seconds["loader"]
    return (
        *rates,
        seconds["bare"] / seconds["loader"],
        with_workers,
        per_clip / 1e6,
        100 * per_clip / os.path.getsize(video),
    )


if __name__ == "__main__":
    args = parser.parse_args()
    folder, rows = args.keep or SCRATCH, []
    os.makedirs(folder, exist_ok=True)
    if "latents" in args.of:
        report(latent_rows(SCRATCH), args.json, torch.device("cpu"))
    if "droid" in args.of:
        path = os.path.join(folder, f"{args.episodes}x{args.steps}.tfrecord")
        if not os.path.exists(path):
            make_tfrecord(path, args.episodes, args.steps)
        report(droid_rows(path, args.steps), args.json, torch.device("cpu"))
    Slice = CountedSlice
    for gop in args.gop if "vpt" in args.of else ():
        path = os.path.join(folder, f"{args.size}-{args.minutes:g}min-gop{gop}.tar")
        if not os.path.exists(path):
            make_recording(
                path, round(args.minutes * 1200), [int(x) for x in args.size.split("x")], gop
            )
        times = [time.perf_counter()]
        records = index_shards([path])[0]
        for _ in range(2):
            times.append(time.perf_counter())
            read_ticks(records[0])
        milliseconds = 1e3 * np.diff([*times, time.perf_counter()])
        index, parsed, cached = tuple(milliseconds)
        about = {
            "video": args.size,
            "frames": records[0].length,
            "MB": os.path.getsize(path.replace(".tar", ".mp4")) / 1e6,
            "GOP": gop,
        }
        about |= {
            "index ms": index,
            "actions ms": parsed,
            "from cache": cached,
            "px": args.crop_size,
            "clips": args.clips,
        }
        for decoder in args.decoder:
            names = (
                "bare clips/s",
                "loader",
                "loader / bare",
                "2 workers",
                "MB a clip",
                "% of video",
            )
            rows.append(about | {"decoder": decoder} | dict(zip(names, row(path, decoder, args))))
    if rows:
        report(rows, args.json, torch.device("cpu"))
