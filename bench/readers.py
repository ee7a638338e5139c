"""Rows of bench.data on files that hold no video: DROID's TFRecords, by our reader, the package
tfrecord and TensorFlow, and H5 latents.

The TFRecords have DROID's schema and 320x180 JPEGs of a noisy texture. A reader gives, of each
episode, pose, gripper, commanded joint velocities and the undecoded JPEGs of one camera; what it
gave is checked against the others' by a checksum, outside of the time. TensorFlow checks every CRC;
ours does so while it indexes, which is a row of its own and happens once; tfrecord does not."""

import concurrent.futures
import hashlib
import io
import itertools
import multiprocessing
import os
import time

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from data import Latents, latent_sequences
from droid import DroidReader, open_droid
from files import latents
from files.episodes import Episode, fetch, index_rlds, places, read_fields, values
from prepare.robot import droid_example, record

FIELDS = {
    "observation/cartesian_position": 6,
    "observation/gripper_position": 1,
    "action_dict/joint_velocity": 7,
}


def make_tfrecord(path, episodes, steps):
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(64):
        f = io.BytesIO()
        texture = rng.integers(0, 128, (12, 20, 3), dtype=np.uint8).repeat(15, 0).repeat(16, 1)
        Image.fromarray(texture + rng.integers(0, 40, texture.shape, dtype=np.uint8)).save(
            f, "JPEG", quality=90
        )
        jpegs.append(f.getvalue())
    with open(path, "wb") as f:
        for i in tqdm(range(episodes), desc="robot", unit=" episodes"):
            rows = {
                k: np.float32(rng.normal(size=(steps, d)))
                for k, d in {**FIELDS, "action": 7}.items()
            }
            pictures = {
                c: [jpegs[j] for j in rng.integers(0, 64, steps)]
                for c in ("exterior_1", "exterior_2", "wrist")
            }
            f.write(
                record(
                    droid_example(rows, pictures, f"lab/{i}", f"success/{i}", ("a", "b", "c"), True)
                )
            )


def of_example(example):
    """What both protobuf readers do with an Example, once it is parsed."""
    f = example.features.feature
    numbers = [np.float32(f["steps/" + k].float_list.value) for k in FIELDS]
    return numbers, list(f["steps/observation/exterior_image_1_left"].bytes_list.value)


def with_tfrecord(path):
    from tfrecord import example_pb2
    from tfrecord.reader import tfrecord_iterator

    return (
        of_example(example_pb2.Example.FromString(bytes(raw))) for raw in tfrecord_iterator(path)
    )


def with_tensorflow(path):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    return (
        of_example(tf.train.Example.FromString(raw))
        for raw in tf.data.TFRecordDataset(path).as_numpy_iterator()
    )


def indexed(path):
    return open_droid(
        path,
        reader=DroidReader(action_keys=list(FIELDS)[2:]),
        idle_filter="off",
        verify=True,
        log=str,
    )[0]


def ours(path, found=None):
    plain = index_rlds(path, os.path.getsize(path), False)[0] if found is None else []
    for r in found or [
        Episode(path, "", "rlds", e["members"], e["steps"], 15.0, 0, 0, 0) for e in plain
    ]:
        at, size, sizes = tuple(r.members["exterior_1"])
        raw = fetch(r.shard, [(at, size)])[0]
        yield (
            read_fields(r, FIELDS),
            [bytes(raw[a : a + n]) for a, n in (values(raw) if sizes is None else places(sizes))],
        )


READERS = {
    "ours, index with checksums": lambda path: (
        ([], []) for _ in index_rlds(path, os.path.getsize(path), True)[0]
    ),
    "ours, indexed, numbers only": lambda path: (
        (read_fields(r, FIELDS), []) for r in indexed(path)
    ),
    "ours, indexed": lambda path: ours(path, indexed(path)),
    "ours": ours,
    "tfrecord": with_tfrecord,
    "TensorFlow": with_tensorflow,
}


def time_reader(name, path):
    """(episodes, CPU-seconds, checksum of what was read) of the second pass, in a process of its
    own: two protobufs do not go together. The first pass imports, indexes and fills the page
    cache."""
    for last in (False, True):
        digest = hashlib.sha256()
        n = 0
        seconds = 0.0
        began = time.process_time()
        for fields, jpegs in READERS[name](path):
            seconds += time.process_time() - began
            n += 1
            for x in (*(np.float32(y).tobytes() for y in fields), *jpegs) if last else ():
                digest.update(x)
            began = time.process_time()
        seconds += time.process_time() - began
    return n, seconds, digest.hexdigest()[:16]


def droid_rows(path, steps):
    rows = []
    for name in READERS:
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            try:
                n, seconds, checksum = pool.submit(time_reader, name, path).result()
            except ImportError as e:
                print(f"{name}: left out, {e}")
                continue
        row = {
            "reader": name,
            "episodes/CPU-s": n / seconds,
            "steps/CPU-s": n * steps / seconds,
            "checksum": checksum,
        }
        rows.append(row | {"episodes": n, "MB": round(os.path.getsize(path) / 1e6)})
    if len({row["checksum"] for row in rows[2:]}) > 1:
        raise SystemExit(f"the readers disagree: {rows}")
    return rows


def latent_rows(folder, windows=256):
    """Windows of 8 float16 steps a second, one process, of the loader and of bare reads of the same
    chunks, by HDF5 layout."""
    rng, rows = np.random.default_rng(0), []
    for name, options in (
        ("contiguous", {}),
        ("a chunk each", {"chunks": (1, 16, 2, 64, 64)}),
        ("gzip", {"compression": "gzip"}),
    ):
        path = os.path.join(folder, f"{name}.h5")
        with h5py.File(path, "w") as f:
            f.create_dataset(
                "latents",
                data=rng.standard_normal((400, 16, 2, 64, 64)).astype(np.float16),
                **options,
            )
        dataset = Latents([latents.LatentFile(path, 800, (400, 16, 2, 64, 64))], 8)
        loader = latent_sequences(dataset, 8)
        items = list(itertools.islice(loader.batch_sampler, windows // 8))
        ours = iter(loader)
        seconds = {"bare": 0.0, "loader": 0.0}
        with h5py.File(path) as f:
            for k, batch in enumerate(items):
                t0 = time.perf_counter()
                for _, _, _, first in batch:
                    f["latents"][first // 2 : -(-(first + 8) // 2)].astype(np.float32)
                t1 = time.perf_counter()
                next(ours)
                if k:  # the first opens files
                    seconds = {
                        "bare": seconds["bare"] + t1 - t0,
                        "loader": seconds["loader"] + time.perf_counter() - t1,
                    }
        n = (len(items) - 1) * 8
        rates = {"bare windows/s": n / seconds["bare"], "loader windows/s": n / seconds["loader"]}
        rows.append(
            {"H5 layout": name} | rates | {"loader / bare": seconds["bare"] / seconds["loader"]}
        )
    return rows
