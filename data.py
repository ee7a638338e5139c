"""What a batch of play is: the action scaler, clips of recordings, windows of latents, their order,
the split into training and validation, and the loaders.

    python -m data --inspect demo/train/shard-000000.tar  # shapes, ranges, mean and std of a batch
    python -m data --inspect latents/a.h5                 # any file: what it is, and what reads it

Local shards (tar files of KEY.mp4 + KEY.jsonl) are indexed, not streamed. The order of clips
depends only on (seed, epoch), and clips are dealt to ranks by index. A run therefore resumes
exactly with any number of workers, and a clip costs one seek instead of a read of 64 MB. Shards at
URLs (http://, s3://, gs://) are either streamed or copied into a local cache (files/remote.py);
commands (pipe:) are always streamed. All of them end in the same ClipReader (files/vpt.py).

Plain video (files, folders, tars; no JSONL) goes the same way: open_films in place of open_split,
and a FilmReader (files/films.py) in place of a ClipReader. Its clips have no actions."""

import argparse
import bz2
import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from checkpoint import remove_leftovers, short_excepthook
from files.disk import (
    DAMAGE,
    READ_ERRORS,
    Unreachable,
    is_storage_error,
    make_folder,
    storage_sentence,
    with_storage_retries,
    write_atomically,
)
from files.features import feature_rows, feature_settings
from files.films import film_paths, index_films, is_tar, read_clock
from files.kinds import kind_of, sentence_of
from files.latents import NO_LABEL, open_dataset, read_labels, read_steps
from files.pixels import open_pixels, pixels_path, store_pixels
from files.progress import tqdm
from files.remote import cached
from files.shards import (
    Slice,
    each_once,
    expand,
    find_twins,
    index_shards,
    is_stream,
    line_warnings,
    read_ticks,
    shard_index,
    spread,
    stamp,
)
from files.streams import StreamedClips
from files.video import WrongDecoder, mp4_times, read_frames, video_rate
from files.vpt import ACTION_SPACES, ClipReader, step_actions, step_size, wrap

# --- action scaler ---

# The std that is plausible for each unit. Pixels and radians are sums over all ticks of a step of
# real play; m, rad and closed are differences of an arm's poses at 4 steps a second.
STD_RANGE = {
    "pixels": (5.0, 500.0),
    "radians": (0.01, 1.0),
    "m": (1e-3, 0.3),
    "rad": (1e-3, 1.0),
    "closed": (1e-3, 1.0),
}


class ActionScaler(NamedTuple):
    """Standardises the continuous action dimensions, which come first in an action.

    mean, var, scale: (A_c,) float64. scale is sqrt(var), or 1 where var is 0, as in scikit-learn's
    StandardScaler. n: number of samples. meta: a dict of plain values (names, units, fps,
    frames_per_step, action_space or stride, fingerprint)."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    n: int
    meta: dict

    @classmethod
    def from_moments(cls, count, mean, m2, meta):
        """count samples with mean (A_c,) and sum of squared deviations m2 (A_c,) -> scaler."""
        var = np.asarray(m2, dtype=np.float64) / count
        # a variance this small is rounding alone. The bound is scikit-learn's; differences of large
        # angles round more than it allows
        rounding = np.maximum((count * np.finfo(np.float64).eps * mean) ** 2, 1e-20)
        var = np.where(var <= rounding, 0.0, var)
        scale = np.where(var > 0, np.sqrt(var), 1.0)
        return cls(np.asarray(mean, dtype=np.float64), var, scale, int(count), meta)

    @property
    def hash(self):
        return hashlib.sha256(self.mean.tobytes() + self.scale.tobytes()).hexdigest()[:16]

    def transform(self, actions):
        """actions (..., A), not scaled -> a float64 copy whose leading continuous dimensions have
        mean 0 and variance 1."""
        scaled = np.array(actions, dtype=np.float64)
        c = len(self.mean)
        scaled[..., :c] = (scaled[..., :c] - self.mean) / self.scale
        return scaled

    def save(self, path):
        """Write `.pkl` (a joblib StandardScaler) or `.safetensors`, atomically. The same numbers
        always give the same bytes."""
        if str(path).endswith(".safetensors"):
            tensors = {
                "mean": self.mean,
                "var": self.var,
                "scale": self.scale,
                "count": np.array([self.n], dtype=np.int64),
            }
            metadata = {"nanojepa": json.dumps(self.meta, sort_keys=True)}
            data = safetensors_bytes(tensors, metadata=metadata)
        else:
            from sklearn.preprocessing import StandardScaler  # takes two seconds to import

            scaler = StandardScaler()
            scaler.mean_ = self.mean
            scaler.var_ = self.var
            scaler.scale_ = self.scale
            scaler.n_samples_seen_ = self.n
            scaler.n_features_in_ = len(self.mean)
            scaler.nanojepa = self.meta
            data = pickle.dumps(scaler, protocol=4)  # joblib.load reads this too
        write_atomically(path, data)

    @classmethod
    def load(cls, path, flags="--data SHARDS"):
        """Read what `save` wrote, or any joblib StandardScaler.

        flags: what fit_scaler.py would need, for the message. Raises FileNotFoundError, or
        ValueError for anything that is not a scaler."""
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"no action scaler at {path}; fit one with: python fit_scaler.py {flags} --output"
                f" {path}"
            )

        try:
            if str(path).endswith(".safetensors"):
                fitted = read_safetensors_scaler(path)
            else:
                fitted = read_pickled_scaler(path)
            scaler = cls(
                mean=np.array(fitted.mean, dtype=np.float64),
                var=np.array(fitted.var, dtype=np.float64),
                scale=np.array(fitted.scale, dtype=np.float64),
                n=int(np.max(fitted.samples)),
                meta=fitted.meta,
            )
        except NOT_A_SCALER as e:
            raise ValueError(
                f"{path} is not an action scaler ({type(e).__name__}: {e}); fit one with"
                " fit_scaler.py, or write a StandardScaler with joblib.dump(scaler, path)"
            ) from e

        same_width = scaler.mean.ndim == 1 and scaler.mean.shape == scaler.scale.shape
        is_finite = np.isfinite(scaler.mean).all() and np.isfinite(scaler.scale).all()
        if not same_width or not is_finite or not (scaler.scale > 0).all():
            raise ValueError(
                f"{path} is a scaler with broken numbers; fit it again with fit_scaler.py"
            )
        return scaler

    def check(self, path, names, fps, frames_per_step, stride=0):
        """Refuse a scaler that was fitted for other continuous dimensions, fps, frames per step or
        --stride (ValueError)."""
        if len(self.mean) != len(names) or self.meta.get("names", names) != names:
            raise ValueError(
                f"{path} scales {self.meta.get('names', len(self.mean))}, this run needs {names};"
                " fit it with fit_scaler.py"
            )
        for key, value in (("fps", fps), ("frames_per_step", frames_per_step), ("stride", stride)):
            if key in self.meta and float(self.meta[key]) != float(value):
                raise ValueError(
                    f"{path} was fitted with --{key} {self.meta[key]:g}, this run has {value:g}:"
                    f" give the run --{key} {self.meta[key]:g}, or fit it again"
                )


# --- scaler files ---

LARGEST = 1 << 26  # bytes of an unpacked scaler file; a scaler has about a thousand

# the first bytes of what joblib compresses (compress=3, .gz, .bz2, .xz) -> its decompressor
PACKED = {
    b"x": zlib.decompressobj,
    b"\x1f\x8b": functools.partial(zlib.decompressobj, 31),
    b"BZ": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\0": lzma.LZMADecompressor,
}

# everything that a file which is no scaler may raise while it is read
NOT_A_SCALER = (
    *DAMAGE,
    pickle.UnpicklingError,
    SafetensorError,
    AttributeError,
    ImportError,
    ArithmeticError,
    SystemError,
)


class Fitted(NamedTuple):
    """What a StandardScaler does to its columns, in numbers."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    samples: np.ndarray
    meta: dict


def read_safetensors_scaler(path):
    with safe_open(path, "numpy") as f:
        mean = f.get_tensor("mean")
        var = f.get_tensor("var")
        scale = f.get_tensor("scale")
        samples = f.get_tensor("count")
        meta = json.loads((f.metadata() or {}).get("nanojepa", "{}"))
    return Fitted(mean, var, scale, samples, meta)


def read_pickled_scaler(path):
    data = unpacked(np.fromfile(path, np.uint8).tobytes())
    return fitted(_ScalerUnpickler(str(path), io.BytesIO(data), True).load())


def unpacked(data):
    """The bytes of a joblib file, decompressed if joblib compressed them."""
    for magic, new_decompressor in PACKED.items():
        if data.startswith(magic):
            decompressor = new_decompressor()
            try:
                data = decompressor.decompress(data, LARGEST)
            except lzma.LZMAError as e:
                raise ValueError(f"damaged xz bytes: {e}") from e
            if not decompressor.eof:
                raise ValueError(f"compressed bytes that are cut, or more than {LARGEST:,}")
            return data
    if data.startswith(b"\x04\x22\x4d\x18"):
        raise ValueError("lz4 bytes: write it again with joblib.dump(scaler, path)")
    return data


def fitted(scaler):
    """A StandardScaler -> the numbers with which ActionScaler does the same. Without with_mean the
    mean is 0, without with_std the scale is 1."""
    from sklearn.preprocessing import StandardScaler  # takes two seconds to import

    if not isinstance(scaler, StandardScaler):
        raise ValueError(f"a {type(scaler).__name__}, not a StandardScaler")
    if not hasattr(scaler, "n_samples_seen_"):
        raise ValueError("a StandardScaler that was never fitted")

    # vars(): a damaged file may lack any of these attributes
    with_mean = vars(scaler).get("with_mean", True)
    with_std = vars(scaler).get("with_std", True)
    width = len(scaler.mean_) if scaler.mean_ is not None else scaler.n_features_in_
    mean = scaler.mean_ if with_mean else np.zeros(width)
    scale = scaler.scale_ if with_std else np.ones(width)
    if scaler.var_ is None or not with_std:
        var = np.square(scale)
    else:
        var = scaler.var_

    meta = dict(vars(scaler).get("nanojepa", {}))
    columns = vars(scaler).get("feature_names_in_")
    if columns is not None:
        meta.setdefault("names", [str(name) for name in columns])
    return Fitted(mean, var, scale, scaler.n_samples_seen_, meta)


# The unpicklers below allow StandardScaler and numpy arrays and nothing else: a file from elsewhere
# runs no code and claims no memory that it does not fill.


def load_bytearray(unpickler):
    """Read an array as protocol 5 writes it. pickle itself would allocate as many bytes as the file
    claims before it looks whether they are there."""
    size = int.from_bytes(unpickler.read(8), "little")
    if size > LARGEST:
        raise pickle.UnpicklingError(f"an array that claims {size:,} bytes")
    unpickler.append(bytearray(unpickler.read(size)))


def safe_class(unpickler, module, name):
    """A class that an array of numbers or names needs; UnpicklingError for any other."""
    allowed = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
    if module.split(".")[0] == "numpy" and name in allowed:
        return pickle._Unpickler.find_class(unpickler, module, name)
    raise pickle.UnpicklingError(f"{module}.{name}")


class _NamesUnpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}
    find_class = safe_class


class _ScalarsOnly(NumpyArrayWrapper):
    """joblib reads arrays of objects with a bare pickle.load, which can run code. A StandardScaler
    has at most one such array, the names of its columns: our own unpickler reads that one."""

    def read_array(self, unpickler, ensure_native_byte_order):
        if not self.dtype.hasobject:
            return super().read_array(unpickler, ensure_native_byte_order)
        names = _NamesUnpickler(unpickler.file_handle).load()
        if not isinstance(names, np.ndarray) or not all(isinstance(n, str) for n in names.flat):
            raise pickle.UnpicklingError("an array of objects that are not names")
        return names


class _ScalerUnpickler(NumpyUnpickler):
    dispatch = NumpyUnpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}

    def find_class(self, module, name):
        if f"{module}.{name}" == "sklearn.preprocessing._data.StandardScaler":
            from sklearn.preprocessing import StandardScaler  # takes two seconds to import

            return StandardScaler
        if f"{module}.{name}" == "joblib.numpy_pickle.NumpyArrayWrapper":
            return _ScalarsOnly
        return safe_class(self, module, name)


# --- clips of recordings ---


class Clips(torch.utils.data.Dataset):
    """Clips of indexed recordings: of play, of features, or of plain video with a FilmReader.

    An item is (epoch, index, record number, place). `place` says where the clip starts: a float in
    [0, 1) is a position in the recording (a share of its valid starts), an int is the number of a
    window (see `windows`).

    A clip that cannot be read is replaced by the next draw of that index, at most 20 times, and is
    reported in "bad" as (file, key, reason). An error of the disk or of the network says nothing
    about the recording: reading is tried again, then the run ends with ValueError.

    pixels_cache: a folder of decoded recordings (`fill_pixels_cache`), cut in the centre, so that
    the reader may not move or shrink its crop. What is not there is decoded."""

    def __init__(self, records, shares, reader, seed=0, pixels_cache=None):
        self.records = records
        self.reader = reader
        self.seed = seed
        self.pixels_cache = pixels_cache
        shards = {r.shard for r in records}
        self.stamps = {path: stamp(path) for path in shards if os.path.exists(path)}
        self.cumulative = np.cumsum(np.asarray(shares, dtype=np.float64))
        self.opened = {}  # not an lru_cache: macOS starts workers by pickling the dataset

    def _open(self, number):
        """Frame times, ticks, number of valid starts and stored frames (or None) of a recording,
        kept for 256 of them."""
        if number not in self.opened:
            record = self.records[number]
            with Slice(record.shard, *record.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ticks = read_ticks(record)
            if len(self.opened) == 256:
                self.opened.popitem()
            starts = self.reader.starts(ticks, len(times), frame_rate)
            pixels = None
            if self.pixels_cache:
                path = pixels_path(self.pixels_cache, record, self.reader.crop, self.reader.decoder)
                pixels = open_pixels(path, len(times), self.reader.crop)
            self.opened[number] = (times, ticks, starts, pixels)
        return self.opened[number]

    def locate(self, u):
        """u in [0, 1) -> (record number, place in [0, 1)). The recordings lie end to end, each as
        long as its share."""
        position = u * self.cumulative[-1]
        number = int(np.searchsorted(self.cumulative, position, side="right"))
        number = min(number, len(self.records) - 1)
        start = self.cumulative[number - 1] if number else 0.0
        place = (position - start) / (self.cumulative[number] - start)
        return number, min(place, 1 - 1e-12)

    def _open_film(self, number):
        """Clock of a film, kept for 32 of them, since films may be hours long."""
        if number not in self.opened:
            clock = read_clock(self.records[number])
            if len(self.opened) == 32:
                self.opened.popitem()
            self.opened[number] = clock
        return self.opened[number]

    def windows_in(self, record):
        """How many non-overlapping clips the step grid of a recording has. If --fps does not divide
        the recording's rate this is 1: reading that window then reports the fault."""
        if record.is_film:
            return self.reader.windows(record)
        if record.is_features:
            return record.length // (self.reader.frames // self.reader.frames_per_step)
        try:
            stride = step_size(record.rate, self.reader.fps)
        except ValueError:
            return 1
        return (record.lines - 1 + stride) // (self.reader.frames * stride)

    def read(self, number, place, rng):
        """A clip as a dict: "video" (or "z"), "actions", "states" (neither of plain video), "key";
        None if --gui drop leaves it out. Raises READ_ERRORS for what is wrong with the
        recording."""
        if self.records[number].is_film:
            return self._read_film(number, place, rng)
        if self.records[number].is_features:
            return self._read_features(number, place, rng)
        return self._read_video(number, place, rng)

    def _read_film(self, number, place, rng):
        record = self.records[number]
        clock = self._open_film(number)
        with Slice(record.shard, *record.members["film"]) as f:
            return self.reader(f, clock, place, rng, record.key)

    def _read_video(self, number, place, rng):
        record = self.records[number]
        times, ticks, starts, pixels = self._open(number)
        if isinstance(place, float):
            start = int(place * starts)
        else:
            start = place * self.reader.frames * step_size(ticks.rate, self.reader.fps)
        if start >= starts:
            raise ValueError(
                f"window {place} starts at tick {start}, the last clip at {starts - 1}"
            )
        with Slice(record.shard, *record.members["mp4"]) as f:
            return self.reader(f, times, ticks, start, rng, record.key, pixels)

    def first_step(self, number, place):
        """The step of a member of features at which a clip starts. ValueError if it is too
        short."""
        record = self.records[number]
        steps = self.reader.frames // self.reader.frames_per_step
        starts = record.length - steps + 1
        if starts < 1:
            raise ValueError(f"too short: {record.length} steps of features, a clip needs {steps}")
        return int(place * starts) if isinstance(place, float) else place * steps

    def _read_features(self, number, place, rng):
        record = self.records[number]
        reader = self.reader
        steps = reader.frames // reader.frames_per_step
        start = self.first_step(number, place)
        z, actions, states = feature_rows(record, start, start + steps)
        actions = actions.numpy()
        states = states.double().numpy()

        # features contain all 38 actions
        names = ACTION_SPACES[38]
        if reader.gui == "drop" and actions[:, names.index("gui_open")].any():
            return None
        actions = actions[:, [names.index(n) for n in ACTION_SPACES[reader.action_space]]]

        # yaw is relative to the first step, as in clips of video
        states = np.stack([wrap(states[:, 0] - states[0, 0]), states[:, 1]], axis=1)
        if reader.scaler is not None:
            actions = reader.scaler.transform(actions)
        actions[:, :4] += reader.noise * rng.standard_normal(actions[:, :4].shape)
        return {
            "z": z,
            "actions": torch.from_numpy(np.float32(actions)),
            "states": torch.from_numpy(np.float32(states)),
            "key": record.key,
        }

    def read_seeded(self, number, place, seed, located):
        """`read` with a new generator from `seed`: a second try after a disk error gives the same
        clip. located: `locate` has already used the generator's first number."""
        rng = np.random.default_rng(seed)
        if located:
            rng.random()
        return self.read(number, place, rng)

    def _check_unchanged(self, shard):
        """A shard that changed would be read at the offsets of the old one (ValueError)."""
        if os.path.exists(shard) and stamp(shard) != self.stamps.get(shard):
            raise ValueError(
                f"{shard} has changed since this run opened it: put the old file back, or start a"
                " new run"
            )

    def __getitem__(self, item):
        epoch, index = item[:2]
        number, place = item[2:]
        bad = []
        bytes_before = Slice.total
        for attempt in range(20):
            seed = [self.seed, epoch, index, attempt]
            if attempt:
                number, place = self.locate(np.random.default_rng(seed).random())
            record = self.records[number]
            self._check_unchanged(record.shard)

            read = functools.partial(self.read_seeded, number, place, seed, attempt > 0)
            try:
                clip = with_storage_retries(f"{record.shard} {record.key}", read)
            except Unreachable as e:
                raise ValueError(str(e)) from e
            except WrongDecoder as e:
                raise ValueError(f"{record.shard} {record.key}: {e}") from e
            except READ_ERRORS as e:
                bad.append((record.shard, record.key, f"{type(e).__name__}: {e}"))
                continue
            if clip is not None:
                return clip | {"bad": bad, "bytes": Slice.total - bytes_before}

        reason = bad[-1][2] if bad else "--gui drop leaves out nearly everything"
        raise ValueError(
            f"20 clips in a row cannot be used, the last from {record.shard}: {reason}"
        )


# --- features and the pictures they were made from ---


def shown_frames(frames, encode, every_frame):
    """Places of the frames of a step that are its pictures: the last one of `frames`, the first
    where the encoder has seen no other (--encode frame), or with `every_frame` all of them."""
    if every_frame:
        return list(range(frames))
    return [frames - 1 if encode == "tubelet" else 0]


class PicturedClips(Clips):
    """Clips of features of play, with the frames that they were made from: "pictures" (T, frames,
    3, size, size) uint8 of each step (`shown_frames`).

    videos: {recording: Record with an mp4}. The reader has no scaler and no noise: the actions of
    features and video are compared, since another recording of the same name would be learned as
    well. pixels_cache as in Clips, of frames of this size."""

    def __init__(
        self, records, shares, reader, videos, size, every_frame=False, seed=0, pixels_cache=None
    ):
        super().__init__(records, shares, reader, seed, pixels_cache)
        self.videos = videos
        self.size = size
        self.shown = shown_frames(reader.frames_per_step, reader.encode, every_frame)
        shards = {v.shard for v in videos.values()}
        self.stamps |= {path: stamp(path) for path in shards if os.path.exists(path)}
        self.sources = {}

    def _open_source(self, name):
        """Frame times, ticks, frames of a line and stored frames (or None) of the recording that
        features were made from, kept for 256 of them."""
        if name not in self.sources:
            record = self.videos[name]
            self._check_unchanged(record.shard)
            with Slice(record.shard, *record.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ticks = read_ticks(record)
            ratio = self.reader.frames_per_line(ticks, len(times), frame_rate)
            pixels = None
            if self.pixels_cache:
                path = pixels_path(self.pixels_cache, record, self.size, self.reader.decoder)
                pixels = open_pixels(path, len(times), self.size)
            if len(self.sources) == 256:
                self.sources.popitem()
            self.sources[name] = (times, ticks, ratio, pixels)
        return self.sources[name]

    def _read_features(self, number, place, rng):
        clip = super()._read_features(number, place, rng)
        if clip is None:
            return None

        # the key of features names the tick that they start from
        record = self.records[number]
        reader = self.reader
        times, ticks, ratio, pixels = self._open_source(record.recording)
        stride = step_size(ticks.rate, reader.fps)
        first_tick = int(record.key.rpartition("@")[2])
        first_tick += self.first_step(number, place) * reader.frames_per_step * stride
        sampled = first_tick + stride * np.arange(reader.frames)
        steps = sampled.reshape(-1, reader.frames_per_step)

        # the same actions, or it is another recording of that name
        ends = steps[:, -1] if reader.encode == "tubelet" else steps[:, 0]
        actions, _ = step_actions(ticks, ends, reader.action_space)
        if not np.allclose(actions, clip["actions"].numpy(), atol=1e-4):
            video = self.videos[record.recording]
            raise ValueError(
                f"--video: {video.shard} {video.key} has other actions than the features of that"
                " name: it is not what they show"
            )

        # only the frames that are shown are decoded
        wanted = steps[:, self.shown].ravel() * ratio
        if pixels is not None:
            frames = np.asarray(pixels[wanted])
        else:
            video = self.videos[record.recording]
            with Slice(video.shard, *video.members["mp4"]) as f:
                frames = read_frames(f, times, wanted, self.size, reader.decoder)
            top = (frames.shape[1] - self.size) // 2
            left = (frames.shape[2] - self.size) // 2
            frames = frames[:, top : top + self.size, left : left + self.size]
        pictures = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
        return clip | {"pictures": pictures.unflatten(0, (len(steps), len(self.shown)))}


# --- windows of latents ---


class Latents(torch.utils.data.Dataset):
    """Windows of `length` steps of video-VAE latents.

    An item is (epoch, index, file number, first step). It gives a dict of z (T, C, H, W), shift
    (T-1, 2) uniform in [0, 1) by (seed, epoch, index), key, and labels (T-1, L) int64 if there are
    any.

    `.labels` are the label names that most files with labels have. A file that lacks one of them
    gets NO_LABEL there and is listed in `.unlabelled`. Names that only other files have are in
    `.unused`."""

    def __init__(self, files, length, seed=0):
        self.files = files
        self.length = length
        self.seed = seed
        if not files:
            raise ValueError(
                "the manifest has no files in this split: choose another, or make the manifest"
                " again with other ratios"
            )
        self.starts = np.array([max(f.steps - length + 1, 0) for f in files])
        if not self.starts.sum():
            raise ValueError(f"no file has the {length} steps of a window: lower --sequence_length")
        self.folder = os.path.commonpath([os.path.dirname(os.path.abspath(f.path)) for f in files])

        labels_of_files = [read_labels(f.path, f.steps) for f in files]
        self.labels = common_labels(labels_of_files)
        every_name = {name for labels in labels_of_files for name in labels}
        self.unused = sorted(every_name - set(self.labels))

        self.truth = []
        self.unlabelled = []
        for f, labels in zip(files, labels_of_files):
            values = np.full((f.steps - 1, len(self.labels)), NO_LABEL)
            if self.labels and labels.keys() >= set(self.labels):
                values = np.stack([labels[name] for name in self.labels], axis=1)
            elif self.labels:
                self.unlabelled.append(os.path.relpath(f.path, self.folder))
            self.truth.append(values)

    def locate(self, u):
        """u in [0, 1) -> (file number, first step). All possible windows lie end to end, in the
        order of the files."""
        ends = self.starts.cumsum()
        position = min(int(u * ends[-1]), int(ends[-1]) - 1)
        number = int(np.searchsorted(ends, position, side="right"))
        return number, position - int(ends[number] - self.starts[number])

    def __getitem__(self, item):
        epoch, index = item[:2]
        number, first = item[2:]
        path = self.files[number].path
        stop = first + self.length
        rng = np.random.default_rng([self.seed, epoch, index])
        clip = {
            "z": torch.from_numpy(read_steps(path, first, stop)),
            "key": f"{os.path.relpath(path, self.folder)}@{first}",
            "bad": [],
            "shift": torch.from_numpy(rng.random((self.length - 1, 2), dtype=np.float32)),
        }
        if self.labels:
            clip["labels"] = torch.from_numpy(self.truth[number][first : stop - 1].copy())
        return clip

    def windows(self, batch_size, limit, rank=0, world=1):
        """Batches of items for validation: windows that do not overlap, at most `limit`, from all
        files, in a fixed random order. The batches do not depend on the number of ranks that share
        them, and none has a single window unless there is only one."""
        every_window = []
        for number, f in enumerate(self.files):
            for first in range(0, f.steps - self.length + 1, self.length):
                every_window.append((number, first))
        chosen = np.random.default_rng(0).permutation(len(every_window))[:limit]
        items = [(0, i, *every_window[j]) for i, j in enumerate(chosen)]

        count = min(round(len(items) / batch_size), len(items) // 2)
        parts = np.array_split(np.arange(len(items)), max(count, 1))
        batches = [[items[i] for i in part] for part in parts if len(part)]
        return batches[rank::world]


def common_labels(labels_of_files):
    """The label names that most files with labels have, sorted. Of two sets that are equally
    frequent, the one that more files contain."""
    frequency = collections.Counter(tuple(sorted(labels)) for labels in labels_of_files if labels)
    if not frequency:
        return []
    contained = {}
    for names in frequency:
        contained[names] = sum(labels.keys() >= set(names) for labels in labels_of_files)
    return list(max(frequency, key=lambda names: (frequency[names], contained[names])))


# --- order and windows ---


class Order(torch.utils.data.Sampler):
    """Endless batches of items, from batch `itr` of `epoch` on.

    The clips of an epoch are spread evenly over the timeline of all recordings, in random order.
    They depend only on (seed, epoch) and on the number of clips an epoch has. Rank r takes the r-th
    part of each global batch."""

    def __init__(self, dataset, batch_size, batches_per_epoch, epoch=0, itr=0, rank=0, world=1):
        self.dataset = dataset
        self.batch_size = batch_size
        self.batches = batches_per_epoch
        self.epoch = epoch
        self.itr = itr
        self.rank = rank
        self.world = world

    def __iter__(self):
        for epoch in itertools.count(self.epoch):
            first_batch = self.itr if epoch == self.epoch else 0
            yield from self.of_epoch(epoch, self.batches, first_batch)

    def of_epoch(self, epoch, batches, first_batch):
        """Batches of an epoch that has `batches` of them, from `first_batch` on."""
        # one random place in each n-th of the timeline
        n = batches * self.batch_size * self.world
        rng = np.random.default_rng([self.dataset.seed, epoch])
        u = (rng.permutation(n) + rng.random(n)) / n

        for batch in range(first_batch, batches):
            first = (batch * self.world + self.rank) * self.batch_size
            indices = range(first, first + self.batch_size)
            yield [(epoch, i, *self.dataset.locate(u[i])) for i in indices]


class MixedClips(torch.utils.data.Dataset):
    """Clips of several data sets, each with its own frames and fps: Meta's dataset_fpcs.

    parts: a Clips for each, with one seed; shares: how many of all clips are of each. Clips of
    different lengths do not fit into one batch, so every batch is of one data set. An item is the
    number of a part and an item of that part."""

    def __init__(self, parts, shares):
        self.parts = parts
        self.shares = np.asarray(shares, dtype=np.float64)
        self.seed = parts[0].seed

    @property
    def records(self):
        return [record for part in self.parts for record in part.records]

    def __getitem__(self, item):
        part, *item_of_part = item
        return self.parts[part][item_of_part]


class MixedOrder(Order):
    """The Order of MixedClips: each data set has its share of the global batches of an epoch, up to
    one batch, and all ranks are at the same data set."""

    def turns(self, epoch):
        """The data set of each global batch of an epoch: (batches,)."""
        # places at equal distances along the shares, in random order
        rng = np.random.default_rng([self.dataset.seed, epoch])
        places = (np.arange(self.batches) + rng.random()) / self.batches
        ends = np.cumsum(self.dataset.shares) / self.dataset.shares.sum()
        turns = np.searchsorted(ends[:-1], places, side="right")
        return rng.permutation(turns)

    def of_epoch(self, epoch, batches, first_batch):
        turns = self.turns(epoch)
        parts = self.dataset.parts
        in_all = np.bincount(turns, minlength=len(parts))
        before = np.bincount(turns[:first_batch], minlength=len(parts))
        streams = []
        for part, count, first in zip(parts, in_all, before):
            order = Order(part, self.batch_size, count, epoch, rank=self.rank, world=self.world)
            streams.append(order.of_epoch(epoch, count, first))

        for part in turns[first_batch:]:
            yield [(part, *item) for item in next(streams[part])]


def clips_by_data(records, shares, groups, readers, seed=0, pixels_cache=None):
    """MixedClips of records: those of a file in groups[i] are read by readers[i], and those of
    other files (--val_data) by the first reader.

    groups: the paths of each --data. A group without a record has no part."""
    group_of = {}
    for number, paths in enumerate(groups):
        for path in paths:
            group_of[path] = number

    parts = []
    shares_of_parts = []
    for number, reader in enumerate(readers):
        records_of_part = []
        shares_of_records = []
        for record, share in zip(records, shares):
            if group_of.get(record.shard, 0) == number:
                records_of_part.append(record)
                shares_of_records.append(share)
        if records_of_part:
            parts.append(Clips(records_of_part, shares_of_records, reader, seed, pixels_cache))
            shares_of_parts.append(sum(shares_of_records))
    return MixedClips(parts, shares_of_parts)


def windows(dataset, batch_size, limit, rank=0, world=1, seed=0):
    """Batches of items for validation: non-overlapping windows on the step grid, at most `limit`,
    spread over all recordings.

    The batches do not depend on the number of ranks that share them. With a batch_size above 1 no
    batch has a single clip unless there is only one: the action gap shuffles clips of a batch.

    Each data set of MixedClips gives the same number of windows, if it has as many."""
    if isinstance(dataset, MixedClips):
        batches = []
        for i, part in enumerate(dataset.parts):
            limit_of_part = math.ceil(limit / len(dataset.parts))
            for items in windows(part, batch_size, limit_of_part, seed=seed):
                batches.append([(i, *item) for item in items])
        return batches[rank::world]

    every_window = []
    for number, record in enumerate(dataset.records):
        for k in range(dataset.windows_in(record)):
            every_window.append((number, k))
    chosen = np.random.default_rng(seed).permutation(len(every_window))[:limit]
    items = [(0, i, *every_window[j]) for i, j in enumerate(chosen)]

    # the parts of array_split differ by one at most; rounding up, parts of 2 would become 2 and 1
    if batch_size == 2:
        count = len(items) // 2
    else:
        count = math.ceil(len(items) / batch_size)
    parts = np.array_split(np.arange(len(items)), max(count, 1))
    batches = [[items[i] for i in part] for part in parts if len(part)]
    return batches[rank::world]


# --- split into training and validation ---


def check_fraction(val_fraction):
    """ValueError for what is no share: nan and -0.1 would hold out nothing, 1.5 all but one."""
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"--val_fraction {val_fraction:g} is no share of the recordings: give 0 (hold out none)"
            " or more, below 1"
        )


def split_records(records, val_fraction):
    """[Record] -> (train, val). Windows of one recording are never on both sides, nor is a key.

    The last shards are held out. Recordings, chosen by a hash of their key, are held out instead
    where there are fewer than ten shards, where a key of the last shards is in an earlier one too
    (another copy of the same play), and always of plain video."""
    check_fraction(val_fraction)
    shards = [r.shard for r in records]
    keys = [r.recording for r in records]  # several members of features may be of one recording

    names = sorted(set(shards), reverse=True)
    by_shard = len(names) >= 10 and not any(r.is_film for r in records)
    if by_shard and val_fraction > 0:
        held_out = set(names[: held_count(names, val_fraction)])
        held_out_keys = {key for key, shard in zip(keys, shards) if shard in held_out}
        other_keys = {key for key, shard in zip(keys, shards) if shard not in held_out}
        by_shard = held_out_keys.isdisjoint(other_keys)

    group = shards
    if not by_shard:
        group = keys
        names = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if val_fraction > 0 and len(names) == 1 and len(set(shards)) > 1:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"WARNING: --val_fraction holds out none of {len(records)} recordings: all have the"
                f" key {names[0]}, and no key is on both sides; give them other names, or name"
                " held-out shards (--val_data)"
            )
    if val_fraction <= 0 or len(names) < 2:
        return records, []
    held_out = set(names[: held_count(names, val_fraction)])
    train = [r for r, g in zip(records, group) if g not in held_out]
    val = [r for r, g in zip(records, group) if g in held_out]
    return train, val


def held_count(names, val_fraction):
    """How many of the shards or recordings are held out: at least one, and one is left."""
    return min(max(round(len(names) * val_fraction), 1), len(names) - 1)


def read_names(path):
    """The file of --recordings: names of recordings, one a line; what follows a # at the beginning
    or after a blank is a comment. ValueError if it names none, FileNotFoundError if it is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--recordings {path}: no such file")

    # editors on Windows write a mark in front (sig), or UTF-16
    names = []
    with open(path, encoding="utf-8-sig") as f:
        try:
            lines = f.readlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"--recordings {path} is no text in UTF-8: save it as UTF-8") from e
    for line in lines:
        name = re.split(r"(?:^|\s)#", line)[0].strip()
        if name:
            names.append(name)
    if not names:
        raise ValueError(f"--recordings {path} names no recording: write one a line")
    return names


def pick(records, only):
    """Those of the [Record] of one --data whose names are in `only`. ValueError if there are
    none."""
    wanted = set(only)
    picked = [r for r in records if r.recording in wanted]
    if records and not picked:
        raise ValueError(
            f"--recordings ({only[0]} ...) picks none of the {len(records)} recordings of a --data,"
            f" such as {records[0].recording} in {records[0].shard}: leave that --data out, or"
            " check the names"
        )
    return picked


def refuse_unknown(only, names):
    """ValueError if a name in `only` (--recordings) is none of `names`, those in all --data."""
    missing = sorted(set(only) - set(names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(set(only))} names in --recordings are in no --data,"
            f" {missing[0]} among them: python -m data --inspect SHARD prints names; a file of"
            " plain video is called FOLDER/NAME, without its ending"
        )


def open_records(data):
    """Shards -> ([Record], [(file, key, reason)] of what cannot be used). Raises ValueError if
    nothing can be used."""
    paths = expand(data)
    streams = [p for p in paths if is_stream(p)]
    if streams:
        raise ValueError(
            f"{streams[0]} is a stream, and here files are read at any place: copy it to a file"
        )
    records, bad = index_shards(paths)
    if not records:
        reasons = "; ".join(" ".join(b) for b in bad[:3])
        raise ValueError(f"no usable recording in {data}: {reasons}")
    return each_once(records), bad


def open_lines(data, max_shards, val_fraction, only=None):
    """--data for what needs only the JSONL members -> ([Record or URL], [(file, key, reason)] of
    what cannot be read). Reads tar headers. only: names of the recordings to take.

    The split comes before max_shards, so nothing held out is used whatever max_shards is. Below ten
    shards the split counts recordings, so videos that cannot be read must be known."""
    paths = expand([p for group in data for p in group])
    streams = [p for p in paths if is_stream(p)]
    if streams:
        if len(streams) < len(paths) or val_fraction or only:
            raise ValueError(
                f"{streams[0]} cannot be sought: it goes neither with local shards nor with"
                " --val_fraction or --recordings; copy it to a file"
            )
        return spread(streams, max_shards), []

    records = []
    all_records = []
    bad = []
    wanted = set(paths if val_fraction else spread(paths, max_shards))
    for group in data:
        files = [p for p in expand(group) if p in wanted]
        if val_fraction and len(files) < 10:
            indexed = [index_shards(files)]
        else:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                indexed = list(pool.map(shard_index, files))
        for _, flaws in indexed:
            bad += flaws
        with_lines = []
        for r in each_once([r for members, _ in indexed for r in members]):
            if "jsonl" in r.members:
                with_lines.append(r)
            else:
                bad.append((r.shard, r.key, "features: fit on the recordings they were made from"))
        all_records += with_lines
        if only:
            with_lines = pick(with_lines, only)
        records += split_records(with_lines, val_fraction)[0]
    if only:
        refuse_unknown(only, [r.recording for r in all_records])
    kept_shards = set(spread(sorted({r.shard for r in records}), max_shards))
    return [r for r in records if r.shard in kept_shards], bad


def twins_between(records, others):
    """Those of the others that are among the records too: from the same shard, a link to it, or a
    copy."""
    twins = find_twins(records + others)
    n = len(records)
    return [others[number - n] for number, first in twins.items() if first < n <= number]


def refuse_shared(sources):
    """Refuse [[Record] of each --data] that have a recording in common (ValueError). Each --data is
    split by itself, so one might hold out what the other trains on."""
    before = []
    for number, records in enumerate(sources, start=1):
        shared = twins_between(before, records)
        if shared:
            raise ValueError(
                f"--data number {number} and an earlier one share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: name each once; --data_weights"
                " sets how often it is taken"
            )
        before = before + records


def open_split(
    data, data_weights=None, val_data=None, val_fraction=0.0, max_bad_fraction=1.0, only=None
):
    """--data as given ([[pattern, ...], ...], or simpler) and --val_data, or a val_fraction of each
    --data -> (train [Record], [share of the clips], val [Record], [bad]). only: names of the
    recordings to take of --data.

    Shares follow length and data_weights. train is empty for streams, which their loader opens.
    Raises ValueError if train and val share a recording, if a --data gives none to train on, or if
    too many are bad."""
    groups = [data] if isinstance(data, str) else data
    check_weights(data_weights, groups)
    streams = [path for path in expand(data) if is_stream(path)]
    if streams and only:
        raise ValueError(
            f"--recordings does not go with streams, {streams[0]} is one: name a --cache_dir to"
            " copy it to, or copy it to a file"
        )
    if streams:
        groups = []

    def open_group(group, number=0):
        return open_records(group)

    return split_groups(
        groups, open_group, data_weights, val_data, val_fraction, max_bad_fraction, only
    )


def open_film_group(data, reader):
    """One --data of plain video -> ([Record], [(file, key, reason)] of what cannot be used).

    Videos that are shorter than a clip of the reader are left out too, and their number is printed.
    Raises ValueError if nothing can be used."""
    paths = film_paths(data)
    urls = [p for p in paths if is_stream(p)]
    if urls:
        raise ValueError(
            f"{urls[0]} is read at any place, and a URL is not: name a --cache_dir to copy it to,"
            " or copy it to a file"
        )
    indexed, bad = index_films(paths)
    records = []
    short = []
    for record in indexed:
        flaw = reader.flaw(record)
        if flaw:
            bad.append((record.shard, record.key, flaw))
        elif reader.is_too_short(record):
            short.append(record)
        else:
            records.append(record)

    if short:
        too_short = (
            f"{len(short)} of {len(indexed)} videos are shorter than a clip, {short[0].shard}"
            f" {short[0].key} among them ({short[0].duration / 20:.3g} s; a clip takes"
            f" {reader.seconds:.3g} s)"
        )
        if not records:
            raise ValueError(
                f"no usable video: {too_short}: lower --frames_per_clip, or raise --fps"
            )
        if os.environ.get("RANK", "0") == "0":
            print(f"{too_short}: they are not used")
    if not records:
        reasons = "; ".join(" ".join(b) for b in bad[:3])
        raise ValueError(f"no usable video in {data}: {reasons}")
    return each_once(records), bad


def holds_play(paths):
    """Whether these files are shards of play: tars, the first with lines (or features) beside its
    videos. What is streamed must be play. Anything else is plain video."""
    if any(map(is_stream, paths)):
        return True
    for path in paths:
        if not is_tar(path):
            return False
    records, _ = shard_index(paths[0])
    return any({"jsonl", "safetensors"} & set(r.members) for r in records)


def open_films(
    data,
    reader,
    data_weights=None,
    val_data=None,
    val_fraction=0.0,
    max_bad_fraction=1.0,
    only=None,
):
    """open_split for plain video: files, folders (searched to the bottom), globs, and tars of
    videos -> (train [Record], [share of the clips], val [Record], [bad]).

    reader: the FilmReader of the run, which says how long a clip is, or one for each --data (the
    first is that of --val_data). A shard of play is taken as plain video: its lines are not read.
    Held-out videos are chosen by a hash of their names (files/films.py, key_of), which `only` lists
    too. Copies of a video are found under any name. Raises as open_split."""
    groups = [data] if isinstance(data, str) else data
    check_weights(data_weights, groups)
    readers = reader if isinstance(reader, list) else [reader] * len(groups)

    def open_group(group, number=0):
        return open_film_group(group, readers[number])

    return split_groups(
        groups, open_group, data_weights, val_data, val_fraction, max_bad_fraction, only
    )


def check_weights(data_weights, groups):
    """ValueError for --data_weights that do not fit the --data."""
    if data_weights and len(data_weights) != len(groups):
        raise ValueError(f"--data_weights has {len(data_weights)} numbers for {len(groups)} --data")
    for weight in data_weights or ():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"--data_weights {weight:g} is no share of the clips: give numbers above 0, and"
                " leave out a --data that is not to be trained on"
            )


def split_groups(
    groups, open_group, data_weights, val_data, val_fraction, max_bad_fraction, only=None
):
    """open_split and open_films, after their checks. open_group: one --data and its number ->
    ([Record], [bad])."""
    # each --data is split and weighed by itself
    train = []
    shares = []
    val = []
    bad = []
    sources = []
    for i, group in enumerate(groups):
        records, flaws = open_group(group, i)
        sources.append(records)
        if only:
            records = pick(records, only)
        kept, held_out = split_records(records, 0 if val_data else val_fraction)
        total = sum(r.duration for r in kept)
        weight = data_weights[i] / total if data_weights else 1.0
        shares += [r.duration * weight for r in kept]
        train += kept
        val += held_out
        bad += flaws
    refuse_shared(sources)
    if only and groups:
        refuse_unknown(only, [r.recording for records in sources for r in records])

    if val_data:
        val, flaws = open_group(val_data)
        bad += flaws
        shared = twins_between(train, val)
        if shared:
            raise ValueError(
                f"--val_data and --data share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: hold them out of --data"
            )

    # clips of both cannot be in one batch
    of_kind = {r.is_features: r.shard for r in train + val}
    if len(of_kind) > 1:
        raise ValueError(
            f"{of_kind[True]} holds features, and {of_kind[False]} video: pass one kind"
        )

    # a few bad recordings of a small set are a large fraction, and are listed anyway
    total = len(train) + len(val) + len(bad)
    if total >= 100 and len(bad) > max_bad_fraction * total:
        example = " ".join(bad[0])
        raise ValueError(
            f"{len(bad)} of {total} recordings cannot be read, {example} among them: fix them, or"
            " raise --max_bad_fraction"
        )
    return train, shares, val, bad


# --- loaders ---


def ignore_signals_in_worker(worker):
    """Worker init function: a loader process ignores a Ctrl-C or SIGTERM that everybody gets (from
    scancel, timeout or a terminal), since the run needs its clips to finish the step and save. It
    obeys a SIGTERM of its parent, which is how loader processes are ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS

        def obey():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def collate(clips):
    """Clips -> a batch: tensors are stacked, keys and bad clips are listed, "bytes" (read for the
    clips) are summed up."""
    batch = {}
    for name, value in clips[0].items():
        if isinstance(value, torch.Tensor):
            batch[name] = torch.stack([clip[name] for clip in clips])
    batch["key"] = [clip["key"] for clip in clips]
    batch["bad"] = [flaw for clip in clips for flaw in clip["bad"]]
    batch["bytes"] = sum(clip.get("bytes", 0) for clip in clips)
    return batch


class PixelsToStore(torch.utils.data.Dataset):
    """Recordings to decode into a folder (files/pixels.py). An item is what is wrong with a
    recording, or None."""

    def __init__(self, records, folder, crop, decoder):
        self.records = records
        self.folder = folder
        self.crop = crop
        self.decoder = decoder

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        record = self.records[number]
        path = pixels_path(self.folder, record, self.crop, self.decoder)
        try:
            store_pixels(path, record, self.crop, self.decoder)
        except READ_ERRORS as e:
            # a full disk or a lost file server is no fault of the recording
            if is_storage_error(e):
                raise ValueError(storage_sentence(f"{record.shard} {record.key}", e)) from e
            return (record.shard, record.key, f"{type(e).__name__}: {e}")
        return None


def fill_pixels_cache(records, folder, crop, decoder, num_workers, rank=0, world=1):
    """Decode recordings of play into a folder, a share on each rank, except those that are there
    already. What cannot be decoded is left to Clips, which reports it. With several ranks a
    collective; they must all see the folder."""
    make_folder("--pixels_cache", folder)
    if rank == 0:
        remove_leftovers(folder, "*.tmp")
    missing = []
    for record in records:
        path = pixels_path(folder, record, crop, decoder)
        if open_pixels(path, record.length, crop) is None:
            missing.append(record)
    if dist.is_initialized():
        dist.barrier()  # all have looked before one writes
    share = missing[rank::world]
    loader = torch.utils.data.DataLoader(
        PixelsToStore(share, folder, crop, decoder),
        batch_size=None,
        num_workers=min(num_workers, len(share)),
        worker_init_fn=ignore_signals_in_worker,
        generator=torch.Generator(),  # else it would draw from the one that initialises the weights
    )
    for _ in tqdm(loader, "decode", len(share), unit=" recordings", disable=rank > 0, delay=2):
        pass
    if dist.is_initialized():
        dist.barrier()


def one_pass(records, reader):
    """How many non-overlapping clips the recordings hold, about."""
    steps = reader.frames // reader.frames_per_step
    ticks = reader.frames * 20 / reader.fps
    return int(sum(r.duration / (steps if r.is_features else ticks) for r in records))


def vpt_loader(
    data,
    batch_size,
    *,
    reader=None,
    data_weights=None,
    batches_per_epoch=None,
    num_workers=4,
    seed=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    pin_memory=False,
    cache_dir=None,
    cache_size=100.0,
    pixels_cache=None,
):
    """Endless DataLoader over shards of VPT recordings or of their features, or over plain video.

    A batch: "video" (B, T·frames_per_step, 3, H, W) uint8, or "z" (B, T, N, D) of features;
    "actions" (B, T-1, A), "states" (B, T, 2), "key", "bad", "bytes". Plain video has no actions and
    no states.

    data: patterns, (records, shares) of open_split or open_films, or Clips or MixedClips, which
    have their own readers and seed (MixedClips also need batches_per_epoch). cache_dir: URLs among
    the patterns are copied there, at most cache_size GB. reader: a ClipReader, default
    ClipReader(), or a FilmReader for plain video. batches_per_epoch: by default one pass of
    non-overlapping clips. loader.bad lists the recordings that were left out while indexing."""
    reader = reader or ClipReader()
    if cache_dir:
        groups = [data] if isinstance(data, str) else data
        data = cached([expand(group) for group in groups], cache_dir, cache_size)
    options = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": collate,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": ignore_signals_in_worker,
    }

    is_opened = isinstance(data, tuple | Clips | MixedClips)
    urls = [] if is_opened else expand(data)
    if any(map(is_stream, urls)):
        if data_weights or not all(map(is_stream, urls)):
            raise ValueError(
                "streamed shards cannot be mixed with local ones or weighted; copy them to local"
                " files first"
            )
        bad = []
        dataset = StreamedClips(urls, reader, seed, epoch, rank, world)
        options |= {"batch_size": batch_size, "drop_last": True}
    else:
        bad = []
        if isinstance(data, Clips | MixedClips):
            dataset = data
        elif is_opened:
            dataset = Clips(*data, reader, seed, pixels_cache)
        else:
            records, shares, _, bad = open_split(data, data_weights)
            dataset = Clips(records, shares, reader, seed, pixels_cache)
        if batches_per_epoch is None:
            clips = one_pass(dataset.records, dataset.reader)
            batches_per_epoch = max(clips // (batch_size * world), 1)
        kind_of_order = MixedOrder if isinstance(dataset, MixedClips) else Order
        order = kind_of_order(dataset, batch_size, batches_per_epoch, epoch, itr, rank, world)
        options["batch_sampler"] = order

    loader = torch.utils.data.DataLoader(dataset, **options)
    loader.bad = bad
    return loader


def latent_sequences(
    dataset,
    batch_size,
    *,
    batches_per_epoch=None,
    num_workers=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    items=None,
    pin_memory=False,
):
    """Endless DataLoader over Latents, from batch `itr` of `epoch` on: batches {"z" (B, T, C, H, W)
    float32, "shift", "labels" if there are any, "key"}. With `items` (batches of items) a loader
    over these alone.

    The order depends only on (seed, epoch) and the size of an epoch. By default an epoch is one
    pass of windows that do not overlap."""
    if items is not None:
        batches = items
    else:
        if not batches_per_epoch:
            every_window = sum(f.steps // dataset.length for f in dataset.files)
            batches_per_epoch = max(every_window // (batch_size * world), 1)
        batches = Order(dataset, batch_size, batches_per_epoch, epoch, itr, rank, world)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0 and items is None,
        worker_init_fn=ignore_signals_in_worker,
        pin_memory=pin_memory,
    )


# --- prefetch ---


def prefetch(batches, device):
    """The same batches, on the device. On a GPU each batch is copied (from pinned memory, on a
    stream of its own) while the one before is computed on."""
    if device.type != "cuda":
        yield from batches
        return

    stream = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = on_device(batch, device)
        if ready is not None:
            yield ready

        # the copy must be complete before it is used, and its memory kept until the use ends
        torch.cuda.current_stream(device).wait_stream(stream)
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(torch.cuda.current_stream(device))
        ready = batch
    if ready is not None:
        yield ready


class Stopped(BaseException):
    """A signal came while a batch was awaited. No Exception, or what tries again would take it for
    a failure of the network."""


class StopSignal:
    """SIGTERM (SLURM's) and Ctrl-C: the loop ends its step and saves. A wait for clips ends at
    once, since a server that is down would be asked for a minute."""

    def __init__(self):
        # on the CPU, where reading it never waits for the GPU
        self.flag = torch.zeros(1)
        self.is_waiting = False

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.flag.fill_(1)
        if self.is_waiting:
            raise Stopped

    def agreed(self, world):
        """Whether any rank has been asked to stop. A signal may reach the ranks in different
        steps."""
        flag = self.flag.clone()
        if world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def next_batch(self, batches, world):
        """(the next batch, or None if there is none; whether all ranks are to stop without it)."""
        batch = None
        try:
            self.is_waiting = True
            batch = next(batches, None)
        except Stopped:
            # loaders that try again need not be waited for, and their end is no error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for process in multiprocessing.active_children():
                process.terminate()
        finally:
            self.is_waiting = False
        return batch, self.agreed(world)


def on_device(batch, device):
    """A batch with its tensors on the device; the copies may still be under way."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved


# --- a look into a file ---


def inspect_latents(path):
    """Print what is in a file of latents. ValueError for what train_lam.py would refuse."""
    try:
        latents = open_dataset(path)
    except ValueError as e:
        raise ValueError(f"{path}: {e}: latents are one dataset, see docs/latent_actions.md") from e
    is_usable = latents.ndim == 5 and latents.size and latents.dtype.kind == "f"
    if not is_usable:
        raise ValueError(
            f"{path}: its dataset {latents.name} is {latents.shape} {latents.dtype}: latents are"
            " floats (chunks, channels, steps, height, width)"
        )
    steps = latents.shape[0] * latents.shape[2]
    layout = f"chunks of {latents.chunks}" if latents.chunks else "contiguous"
    first = latents[0].astype(np.float32)
    if not np.isfinite(first).all():
        raise ValueError(f"{path}: the first chunk is not finite: make the latents again")
    print(f"latents  {latents.shape} {latents.dtype}, {layout}: {steps} steps")
    print(f"first    from {first.min():.3f} to {first.max():.3f}, std {first.std():.3f}")
    for name, values in read_labels(path, steps).items():
        print(f"labels   {name}: {len(np.unique(values))} values, {values.min()} to {values.max()}")


def inspect_films(path):
    """Print how much plain video is in a file. ValueError if none of it can be read."""
    records, bad = index_films([path])
    if not records:
        raise ValueError(f"{path}: no usable video: {bad[0][2]}")
    for r in records[:8]:
        print(f"video    {r.key}: {sum(r.stretches):.1f} s, {r.rate:.4g} frames a second")
    if len(records) > 8:
        print(f"         and {len(records) - 8} more")
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="look into a file: what it is; of a shard shapes, ranges, mean and std of one"
        " batch",
        allow_abbrev=False,
    )
    spaces = tuple(ACTION_SPACES)
    parser.add_argument("--inspect", metavar="SHARD", required=True, help="a shard, glob or URL")
    parser.add_argument("--action_space", type=int, default=13, choices=spaces, help="what to show")
    parser.add_argument("--batch_size", type=int, default=8, help="clips to read")
    args = parser.parse_args()
    sys.excepthook = short_excepthook
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size} is too small: at least 1")

    # a file that holds no play: what it is, and what reads it
    if os.path.exists(os.path.join(args.inspect, "meta", "info.json")):
        raise ValueError(sentence_of(args.inspect, "lerobot"))
    path = expand(args.inspect)[0]
    kind = "play" if is_stream(path) else kind_of(path)
    if kind not in ("play", "features", "latents", "film", "films"):
        raise ValueError(sentence_of(path, kind))
    if not is_stream(path):
        print(sentence_of(path, kind))
    if kind == "latents":
        inspect_latents(path)
        sys.exit()
    if kind in ("film", "films"):
        inspect_films(path)
        sys.exit()

    # features are cut as they were made
    reader = ClipReader(action_space=args.action_space)
    if kind == "features":
        settings = feature_settings(open_records(path)[0])
        if settings.get("dataset") == "droid":
            raise ValueError(sentence_of(path, "robot"))
        print("made     " + ", ".join(f"{name} {value}" for name, value in settings.items()))
        reader = ClipReader(
            frames_per_clip=int(settings["frames_per_clip"]),
            fps=float(settings["fps"]),
            frames_per_step=int(settings["frames_per_step"]),
            crop_size=int(settings["crop_size"]),
            encode=settings["encode"],
            action_space=args.action_space,
        )
    loader = vpt_loader(args.inspect, args.batch_size, num_workers=0, reader=reader)

    # what is odd in the lines, and their clocks (streams have no records)
    records = getattr(loader.dataset, "records", [])
    for line in line_warnings(records, 64):
        print(f"WARNING: {line}")
    clocks = collections.Counter((r.rate, r.frames_per_line) for r in records if "mp4" in r.members)
    for (rate, frames_per_line), count in clocks.most_common(4):
        recordings = "recording" if count == 1 else "recordings"
        frames = "frame" if frames_per_line == 1 else "frames"
        print(
            f"clock    {count} {recordings} of {rate:.4g} lines a second, {frames_per_line}"
            f" {frames} a line"
        )

    batch = next(iter(loader))
    for file, key, reason in loader.bad + batch["bad"]:
        print(f"left out: {file} {key}: {reason}")

    # one line a tensor, then one line an action
    for name in ("video", "z", "actions", "states"):
        if name in batch:
            shape = str(tuple(batch[name].shape))
            dtype = str(batch[name].dtype).removeprefix("torch.")
            x = batch[name].float()
            print(f"{name:8} {shape:24} {dtype:8} from {x.min():.3f} to {x.max():.3f}")
    print(f"keys     {', '.join(batch['key'][:4])}")
    print(f"{'action':18} {'min':>9} {'max':>9} {'mean':>9} {'std':>9}")
    for name, x in zip(ACTION_SPACES[args.action_space], batch["actions"].flatten(0, 1).T):
        print(f"{name:18} {x.min():9.3f} {x.max():9.3f} {x.mean():9.3f} {x.std():9.3f}")
