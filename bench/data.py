"""How fast do the loaders read, against reading the same data and nothing else?

    python -m bench.data                       # all three kinds; 4 minutes on two cores
    python -m bench.data --of vpt --minutes 1 --clips 16 --gop 60
    python -m bench.data --of droid --json     # pip install tfrecord tensorflow-cpu to compare
    python -m bench.data --of latents          # 20 seconds

vpt      Clips of video: the loader against a bare loop, by PyAV and by decord. The recording is
         made here: a texture that pans as under a moving camera, 20 fps, H.264 High with B-frames,
         1.7 Mbit/s, one keyframe every --gop frames (GOP and bitrate of real VPT files are
         assumptions). The bare loop opens the mp4 as a plain file in the page cache, seeks, decodes
         with one thread and resizes the sixteen frames it wants. The loader reads the same frames
         out of a tar, with actions, crop and batches of 8. Both run in turns, a batch each, so
         other load on the machine meets both.
droid    Episodes of TFRecords with DROID's schema and 320x180 JPEGs of a noisy texture: our reader,
         the package tfrecord and TensorFlow. A reader gives, of each episode, pose, gripper,
         commanded joint velocities and the undecoded JPEGs of one camera. A checksum, outside of
         the time, shows that all gave the same. TensorFlow checks every CRC. Ours does so while it
         indexes, which happens once and is a row of its own; tfrecord does not.
latents  Windows of 8 float16 steps of H5 latents: the loader against bare reads of the same chunks,
         by HDF5 layout, in one process."""

import argparse
import atexit
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time

# A cache of its own. It must be named before our modules are imported, which read the variable
# once. Child processes import this file too, and use their parent's folder.
if multiprocessing.parent_process() is None:
    made_here = tempfile.mkdtemp(prefix="nanojepa-bench-")
    atexit.register(shutil.rmtree, made_here)
    os.environ["NANOJEPA_CACHE"] = os.path.join(made_here, "cache")
SCRATCH = os.path.dirname(os.environ["NANOJEPA_CACHE"])

import av
import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import droid
from bench import report
from files import latents
from files.episodes import Episode, fetch, index_rlds, places, read_fields, values
from files.shards import Slice, index_shards, read_ticks
from files.video import mp4_times
from files.vpt import ClipReader
from prepare.robot import droid_example, record

BATCH = 8
WINDOW = 8  # steps of a window of latents
FIELDS = {
    "observation/cartesian_position": 6,
    "observation/gripper_position": 1,
    "action_dict/joint_velocity": 7,
}


# --- vpt: make a recording ---


def texture_of(w, h, rng):
    """A picture (4h, 4w, 3) of random blocks of three sizes, four times as large as a frame."""
    layers = []
    for size in (2, 8, 32):
        blocks = rng.integers(0, 90, (4 * h // size + 1, 4 * w // size + 1, 3))
        layers.append(blocks.repeat(size, 0).repeat(size, 1)[: 4 * h, : 4 * w])
    return sum(layers).clip(0, 255).astype(np.uint8)


def write_video(path, frames, size, gop, rng):
    """An mp4: a window of the texture that wanders."""
    w, h = size
    texture = texture_of(w, h, rng)
    options = {"preset": "veryfast", "profile": "high", "bf": "3", "sc_threshold": "0"}
    options |= {"g": str(gop), "keyint_min": str(gop)}
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=20, options=options)
        stream.width = w
        stream.height = h
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_700_000
        centre = np.array([1.5 * w, 1.5 * h])
        corner = centre
        speed = np.zeros(2)
        for _ in tqdm(range(frames), desc=f"recording, GOP {gop}", unit="frame"):
            # a random walk that is pulled back to the centre
            speed = 0.9 * speed + rng.normal(0, 2, 2) - 0.002 * (corner - centre)
            corner = np.clip(corner + speed, 0, (3 * w - 1, 3 * h - 1))
            x, y = corner.astype(int)
            picture = np.ascontiguousarray(texture[y : y + h, x : x + w])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_lines(path, frames, rng):
    """JSONL of contractors' lines of 2.5 KB, as real ones are."""
    dx = rng.normal(0, 30, frames).round(1)
    yaw = 0.15 * (np.cumsum(dx) - dx)
    stats = {f"minecraft.custom:minecraft.counter_{i}": i for i in range(40)}
    with open(path, "w") as f:
        for i in range(frames):
            mouse = {"x": 640.0, "y": 360.0, "dx": dx[i], "dy": 0.0}
            line = {
                "mouse": mouse | {"buttons": [], "newButtons": []},
                "keyboard": {"keys": ["key.keyboard.w"]},
                "isGuiOpen": False,
                "hotbar": 0,
                "yaw": yaw[i],
                "pitch": 0.0,
                "inventory": [{"type": "oak_planks", "quantity": 3}] * 10,
                "stats": stats,
            }
            f.write(json.dumps(line) + "\n")


def make_recording(path, frames, size, gop):
    """A shard with one recording at `path`, and its video as a plain file beside it."""
    rng = np.random.default_rng(0)
    stem = path.removesuffix(".tar")
    write_video(stem + ".mp4", frames, size, gop, rng)
    write_lines(stem + ".jsonl", frames, rng)
    with tarfile.open(path, "w") as tar:
        for extension in (".mp4", ".jsonl"):
            tar.add(stem + extension, arcname="recording" + extension)


# --- vpt: read it ---


def bare_pyav(path, times, wanted, size):
    """One clip, by number: open, seek, decode, resize the wanted frames."""
    frames = []
    left = set(wanted.tolist())
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(times[wanted[0]]), stream=stream, backward=True)
        for frame in container.decode(stream):
            number = int(np.searchsorted(times, frame.pts))
            if number not in left:
                continue
            resize = {"width": size[0], "height": size[1], "interpolation": "BILINEAR"}
            frames.append(frame.to_ndarray(format="rgb24", **resize))
            left.discard(number)
            if not left:
                return np.stack(frames)


def bare_decord(path, times, wanted, size):
    """The same with decord. Like the loader's, it is given a file object: it cannot be given a part
    of a tar."""
    import decord  # optional

    with open(path, "rb") as f:
        reader = decord.VideoReader(f, width=size[0], height=size[1], num_threads=1)
        return reader.get_batch(wanted.tolist()).asnumpy()


def rates_of(path, decoder, count, crop_size, video_size):
    """Time one decoder on one shard: {column: value}. count: clips, at least."""
    # the video, in the page cache
    video = path.removesuffix(".tar") + ".mp4"
    with open(video, "rb") as f:
        times = mp4_times(f)
        f.seek(0)
        while f.read(1 << 24):
            pass

    # the loader, and the clips that it will give
    records, _ = data.open_records(path)
    reader = ClipReader(crop_size=crop_size, decoder=decoder)
    batches = -(-count // BATCH)
    options = {"reader": reader, "batches_per_epoch": batches + 1}
    loader = data.vpt_loader((records, [1.0]), BATCH, num_workers=0, **options)
    items = list(itertools.islice(loader.batch_sampler, batches + 1))
    loaded = iter(loader)

    # the bare loop scales the shorter side to the crop
    starts = len(times) - 4 * (reader.frames - 1)
    scale = crop_size / min(video_size)
    size = tuple(max(round(x * scale), crop_size) for x in video_size)
    bare = bare_pyav if decoder == "pyav" else bare_decord

    # in turns; the first batch also reads the index and fills the caches, and is not counted
    bare_seconds = 0.0
    loader_seconds = 0.0
    bytes_before = 0
    bar = tqdm(items, desc=f"{os.path.basename(path)} {decoder}", unit="batch")
    for k, batch in enumerate(bar):
        wanted = [int(place * starts) + 4 * np.arange(reader.frames) for _, _, _, place in batch]
        t0 = time.perf_counter()
        clips = [bare(video, times, numbers, size) for numbers in wanted]
        t1 = time.perf_counter()
        if k == 1:
            bytes_before = Slice.total
        batch = next(loaded)
        t2 = time.perf_counter()

        # both must have read the same
        x = (clips[0].shape[2] - crop_size) // 2
        cropped = clips[0][:, :crop_size, x : x + crop_size]
        same = batch["video"][0].permute(0, 2, 3, 1).numpy() == cropped
        if not same.all():
            raise SystemExit(f"{decoder}: the loader and the bare loop read different clips")
        if k:
            bare_seconds += t1 - t0
            loader_seconds += t2 - t1
    n = batches * BATCH
    bytes_a_clip = (Slice.total - bytes_before) / n

    # two workers; one batch of each is taken while they start
    workers = iter(data.vpt_loader((records, [1.0]), BATCH, num_workers=2, **options))
    for _ in range(2):
        next(workers)
    t0 = time.perf_counter()
    for _ in range(batches):
        next(workers)
    return {
        "decoder": decoder,
        "bare clips/s": n / bare_seconds,
        "loader": n / loader_seconds,
        "loader / bare": bare_seconds / loader_seconds,
        "2 workers": n / (time.perf_counter() - t0),
        "MB a clip": bytes_a_clip / 1e6,
        "% of video": 100 * bytes_a_clip / os.path.getsize(video),
    }


def vpt_rows(folder, minutes, size, gops, decoders, clips, crop_size):
    """Rows of the loader of video, for a recording of each GOP and each decoder."""
    rows = []
    name = "x".join(map(str, size))
    for gop in gops:
        path = os.path.join(folder, f"{name}-{minutes:g}min-gop{gop}.tar")
        if not os.path.exists(path):
            make_recording(path, round(minutes * 1200), size, gop)

        # the index, and the actions: parsed once, then from the cache
        times = [time.perf_counter()]
        records = index_shards([path])[0]
        for _ in range(2):
            times.append(time.perf_counter())
            read_ticks(records[0])
        times.append(time.perf_counter())
        index, parsed, cached = tuple(1e3 * np.diff(times))

        row = {"video": name, "frames": records[0].length, "GOP": gop}
        row["MB"] = os.path.getsize(path.removesuffix(".tar") + ".mp4") / 1e6
        row |= {"index ms": index, "actions ms": parsed, "from cache": cached}
        row |= {"px": crop_size, "clips": clips}
        for decoder in decoders:
            rows.append(row | rates_of(path, decoder, clips, crop_size, size))
    return rows


# --- droid: make TFRecords ---


def noisy_jpegs(rng, count=64):
    """Bytes of JPEGs of 320x180: random blocks under noise."""
    jpegs = []
    for _ in range(count):
        blocks = rng.integers(0, 128, (12, 20, 3), dtype=np.uint8).repeat(15, 0).repeat(16, 1)
        picture = blocks + rng.integers(0, 40, blocks.shape, dtype=np.uint8)
        f = io.BytesIO()
        Image.fromarray(picture).save(f, "JPEG", quality=90)
        jpegs.append(f.getvalue())
    return jpegs


def make_tfrecord(path, episodes, steps):
    """A TFRecord of episodes with every field of DROID."""
    rng = np.random.default_rng(0)
    jpegs = noisy_jpegs(rng)
    with open(path, "wb") as f:
        for i in tqdm(range(episodes), desc="robot", unit=" episodes"):
            rows = {}
            for name, width in {**FIELDS, "action": 7}.items():
                rows[name] = np.float32(rng.normal(size=(steps, width)))
            pictures = {}
            for camera in ("exterior_1", "exterior_2", "wrist"):
                pictures[camera] = [jpegs[j] for j in rng.integers(0, 64, steps)]
            texts = ("a", "b", "c")
            f.write(record(droid_example(rows, pictures, f"lab/{i}", f"success/{i}", texts, True)))


# --- droid: read them; a reader gives, for each episode, its arrays and its JPEGs ---


def of_example(example):
    """What both protobuf readers do with an Example once it is parsed."""
    f = example.features.feature
    numbers = [np.float32(f["steps/" + k].float_list.value) for k in FIELDS]
    return numbers, list(f["steps/observation/exterior_image_1_left"].bytes_list.value)


def with_tfrecord(path):
    from tfrecord import example_pb2
    from tfrecord.reader import tfrecord_iterator

    for raw in tfrecord_iterator(path):
        yield of_example(example_pb2.Example.FromString(bytes(raw)))


def with_tensorflow(path):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    for raw in tf.data.TFRecordDataset(path).as_numpy_iterator():
        yield of_example(tf.train.Example.FromString(raw))


def index_with_checksums(path):
    """Nothing but the index, with every CRC."""
    for _ in index_rlds(path, os.path.getsize(path), True)[0]:
        yield [], []


def open_indexed(path):
    """Episodes of an index that was made before and is kept."""
    reader = droid.DroidReader(action_keys=list(FIELDS)[2:])
    return droid.open_droid(path, reader=reader, idle_filter="off", verify=True, log=str)[0]


def numbers_only(path):
    for episode in open_indexed(path):
        yield read_fields(episode, FIELDS), []


def read_episodes(episodes):
    for episode in episodes:
        offset, size, sizes = tuple(episode.members["exterior_1"])
        raw = fetch(episode.shard, [(offset, size)])[0]
        parts = values(raw) if sizes is None else places(sizes)
        yield read_fields(episode, FIELDS), [bytes(raw[a : a + n]) for a, n in parts]


def ours_indexed(path):
    return read_episodes(open_indexed(path))


def ours(path):
    """Without an index that was kept."""
    entries = index_rlds(path, os.path.getsize(path), False)[0]
    return read_episodes(
        Episode(path, "", "rlds", entry["members"], entry["steps"], 15.0, 0, 0, 0)
        for entry in entries
    )


READERS = {
    "ours, index with checksums": index_with_checksums,
    "ours, indexed, numbers only": numbers_only,
    "ours, indexed": ours_indexed,
    "ours": ours,
    "tfrecord": with_tfrecord,
    "TensorFlow": with_tensorflow,
}


def time_reader(name, path):
    """(episodes, CPU seconds, checksum of what was read) of the second pass. The first pass
    imports, indexes and fills the page cache."""
    for is_second_pass in (False, True):
        digest = hashlib.sha256()
        episodes = 0
        seconds = 0.0
        began = time.process_time()
        for fields, jpegs in READERS[name](path):
            seconds += time.process_time() - began
            episodes += 1
            if is_second_pass:
                for array in fields:
                    digest.update(np.float32(array).tobytes())
                for jpeg in jpegs:
                    digest.update(jpeg)
            began = time.process_time()
        seconds += time.process_time() - began
    return episodes, seconds, digest.hexdigest()[:16]


def droid_rows(path, steps):
    """Rows of the readers of TFRecords. Each has a process of its own: two protobufs do not go
    together."""
    rows = []
    for name in READERS:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            try:
                episodes, seconds, checksum = pool.submit(time_reader, name, path).result()
            except ImportError as e:
                print(f"{name}: left out, {e}")
                continue
        row = {"reader": name, "episodes/CPU-s": episodes / seconds}
        row |= {"steps/CPU-s": episodes * steps / seconds, "checksum": checksum}
        rows.append(row | {"episodes": episodes, "MB": round(os.path.getsize(path) / 1e6)})

    # the first two rows leave the pictures out
    if len({row["checksum"] for row in rows[2:]}) > 1:
        raise SystemExit(f"the readers disagree: {rows}")
    return rows


# --- latents ---


def latent_rows(folder, windows=256):
    """Rows of the loader of H5 latents, by layout of the file."""
    shape = (400, 16, 2, 64, 64)
    layouts = {
        "contiguous": {},
        "a chunk each": {"chunks": (1, *shape[1:])},
        "gzip": {"compression": "gzip"},
    }
    rng = np.random.default_rng(0)
    rows = []
    for name, options in layouts.items():
        path = os.path.join(folder, f"{name}.h5")
        with h5py.File(path, "w") as f:
            noise = rng.standard_normal(shape).astype(np.float16)
            f.create_dataset("latents", data=noise, **options)
        dataset = data.Latents([latents.LatentFile(path, 800, shape)], WINDOW)
        loader = data.latent_sequences(dataset, BATCH)
        items = list(itertools.islice(loader.batch_sampler, windows // BATCH))
        loaded = iter(loader)

        # in turns; the first batch opens files, and is not counted
        bare_seconds = 0.0
        loader_seconds = 0.0
        with h5py.File(path) as f:
            for k, batch in enumerate(items):
                t0 = time.perf_counter()
                for _, _, _, first in batch:
                    f["latents"][first // 2 : -(-(first + WINDOW) // 2)].astype(np.float32)
                t1 = time.perf_counter()
                next(loaded)
                t2 = time.perf_counter()
                if k:
                    bare_seconds += t1 - t0
                    loader_seconds += t2 - t1
        n = (len(items) - 1) * BATCH
        row = {"H5 layout": name, "bare windows/s": n / bare_seconds}
        row |= {"loader windows/s": n / loader_seconds}
        rows.append(row | {"loader / bare": bare_seconds / loader_seconds})
    return rows


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = ["latents", "droid", "vpt"]
    flag = parser.add_argument
    flag("--of", nargs="+", default=kinds, choices=kinds, help="which data (default: all)")
    keep_help = "keep the recordings there, and use those that are there"
    flag("--keep", metavar="FOLDER", help=keep_help)
    flag("--json", action="store_true", help="rows as JSON lines")

    flag = parser.add_argument_group("vpt").add_argument
    flag("--minutes", type=float, default=5.0, help="length of the recording (default 5)")
    flag("--size", default="640x360", help="its width x height (default 640x360)")
    gop_help = "frames from keyframe to keyframe, a recording each (default 250 60)"
    flag("--gop", type=int, nargs="+", default=[250, 60], help=gop_help)
    flag("--clips", type=int, default=48, help="clips timed for each row (default 48)")
    flag("--crop_size", type=int, default=256, help="pixels of the square crop (default 256)")
    decoders = ["pyav", "decord"]
    flag("--decoder", nargs="+", default=decoders, choices=decoders, help="default both")

    flag = parser.add_argument_group("droid").add_argument
    flag("--episodes", type=int, default=30, help="robot episodes (default 30)")
    flag("--steps", type=int, default=240, help="rows of an episode (default 240)")
    args = parser.parse_args()

    # --- measure ---
    folder = args.keep or SCRATCH
    os.makedirs(folder, exist_ok=True)
    show = functools.partial(report, as_json=args.json, device=torch.device("cpu"))
    if "latents" in args.of:
        show(latent_rows(SCRATCH))
    if "droid" in args.of:
        path = os.path.join(folder, f"{args.episodes}x{args.steps}.tfrecord")
        if not os.path.exists(path):
            make_tfrecord(path, args.episodes, args.steps)
        show(droid_rows(path, args.steps))
    if "vpt" in args.of:
        size = tuple(map(int, args.size.split("x")))
        sizes = args.clips, args.crop_size
        show(vpt_rows(folder, args.minutes, size, args.gop, args.decoder, *sizes))
