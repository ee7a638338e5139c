"""Fit the standardiser of the continuous actions (mouse_dx, mouse_dy, yaw_diff, pitch_diff) on VPT
shards, without decoding video.

    python fit_scaler.py --data VPT/*.tar --output vpt_action_scaler.pkl
    torchrun --nproc_per_node=8 fit_scaler.py --data VPT/*.tar --max_samples 1000000
    python fit_scaler.py --dataset droid --data droid_100/*.tfrecord* --output droid_action_scaler.pkl

Reads the JSONL members of the shards and seeks over the video (pipe: and http:// shards can only be
read on). A sample is one step: at 20 fps, --fps 5 and --frames_per_step 2 it sums lines 8t to 8t+7
of a recording. Recordings are taken in an order that depends on --seed alone until there are
--max_samples steps, or the estimates have converged. Writes a joblib StandardScaler (.pkl) or
.safetensors. With --dataset droid a sample is an action between two sampled frames of a robot
episode (droid.py), idle or not."""

import argparse
import bz2
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from checkpoint import one_sentence, peak_memory, write_atomically
from data import Slice, is_stream, open_lines
from droid import DroidSteps
from files.streams import (
    DAMAGE,
    READ_ERRORS,
    disk_failed,
    disk_sentence,
    stream_recordings,
)
from files.vpt import (
    ACTION_SPACES,
    CONTINUOUS,
    DEGREES_PER_PIXEL,
    UNITS,
    name_warnings,
    parse_ticks,
    step_actions,
    step_size,
)
from kernels import merge_moments, moments, standard_errors

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument(
    "--dataset", default="vpt", choices=["vpt", "droid"], help="gameplay shards or robot episodes"
)
parser.add_argument(
    "--data",
    "--data_path",
    nargs="+",
    action="append",
    help="shards: paths, globs, {a..b}, URLs (default VPT/*.tar)",
)
parser.add_argument(
    "--output",
    default="vpt_action_scaler.pkl",
    help="where to write the scaler: .pkl or .safetensors",
)
parser.add_argument("--max_samples", type=int, default=100_000, help="steps to use at most")
parser.add_argument(
    "--max_shards",
    type=int,
    help="use this many shards, spread uniformly over --data (default: all)",
)
parser.add_argument(
    "--val_fraction",
    type=float,
    default=0.0,
    help="leave out what train_ac.py holds out at the same --val_fraction",
)
parser.add_argument(
    "--action_space",
    type=int,
    default=13,
    choices=ACTION_SPACES,
    help="stored with the scaler; its first 4 are the same",
)
parser.add_argument(
    "--fps", type=float, default=5.0, help="sampled frames a second (droid: 4 if not given)"
)
parser.add_argument(
    "--frames_per_step",
    "--tubelet_size",
    type=int,
    default=2,
    help="sampled frames a step (droid: 1)",
)
parser.add_argument(
    "--stride", type=int, help="droid: rows between sampled frames in place of --fps"
)
parser.add_argument(
    "--state_keys",
    nargs="+",
    action="extend",
    help="droid: fields of the state (default: the pose)",
)
parser.add_argument(
    "--action_keys",
    nargs="+",
    action="extend",
    help="droid: fields of the action (default: differences of the pose)",
)
parser.add_argument(
    "--batch_size",
    type=int,
    default=128,
    help="samples between two convergence checks (at least 5 %% of those in)",
)
parser.add_argument(
    "--num_workers",
    type=int,
    default=8,
    help="processes that read and parse, per rank (0 or 1: this one)",
)
parser.add_argument(
    "--no_convergence_check", action="store_true", help="do not stop before --max_samples"
)
parser.add_argument(
    "--tolerance",
    type=float,
    default=0.01,
    help="converged: all standard errors are within this share of the std",
)
parser.add_argument("--seed", type=int, default=0, help="order of the recordings")

# --- the scaler, as other stages use it ---


class _ScalarsOnly(NumpyArrayWrapper):
    """joblib reads object arrays with a bare pickle.load. The one that a StandardScaler may have,
    the names of the columns it was fitted on, is read by our own unpickler: no code is run."""

    def read_array(self, unpickler, ensure_native_byte_order):
        if not self.dtype.hasobject:
            return super().read_array(unpickler, ensure_native_byte_order)
        names = _NamesUnpickler(unpickler.file_handle).load()
        if not isinstance(names, np.ndarray) or not all(isinstance(n, str) for n in names.flat):
            raise pickle.UnpicklingError("an array of objects that are no names")
        return names


def load_bytearray(unpickler):
    """What pickle's protocol 5 writes arrays as: pickle itself would make room for as many bytes as
    the file claims, before it looks whether they are there."""
    size = int.from_bytes(unpickler.read(8), "little")
    if size > LARGEST:
        raise pickle.UnpicklingError(f"an array that claims {size:,} bytes")
    unpickler.append(bytearray(unpickler.read(size)))


def safe_class(unpickler, module, name):
    """A class that an array of numbers or names needs; UnpicklingError for any other."""
    safe = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
    if module.split(".")[0] == "numpy" and name in safe:
        return pickle._Unpickler.find_class(unpickler, module, name)
    raise pickle.UnpicklingError(f"{module}.{name}")


class _NamesUnpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}
    find_class = safe_class


# Admits StandardScaler and numpy arrays, nothing else: a file from elsewhere runs no code and
# claims no memory it does not fill.
class _ScalerUnpickler(NumpyUnpickler):
    dispatch = NumpyUnpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}

    def find_class(self, module, name):
        ours = {
            "sklearn.preprocessing._data.StandardScaler": StandardScaler,
            "joblib.numpy_pickle.NumpyArrayWrapper": _ScalarsOnly,
        }
        if f"{module}.{name}" in ours:
            return ours[f"{module}.{name}"]
        return safe_class(self, module, name)


LARGEST = 1 << 26  # bytes, unpacked; a scaler has a thousand
PACKED = {
    b"x": zlib.decompressobj,
    b"\x1f\x8b": functools.partial(zlib.decompressobj, 31),
    b"BZ": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\0": lzma.LZMADecompressor,
}


def unpacked(data):
    """The bytes of a joblib file, unpacked if joblib compressed them (compress=3, .gz, .xz)."""
    for magic, start in PACKED.items():
        if data.startswith(magic):
            unpacker = start()
            try:
                data = unpacker.decompress(data, LARGEST)
            except lzma.LZMAError as e:
                raise ValueError(f"damaged xz bytes: {e}") from e
            if not unpacker.eof:
                raise ValueError(f"compressed bytes that are cut, or more than {LARGEST:,}")
            return data
    if data.startswith(b"\x04\x22\x4d\x18"):
        raise ValueError("lz4 bytes: write it again with joblib.dump(scaler, path)")
    return data


class Fitted(NamedTuple):
    """What a StandardScaler does to its columns, in numbers."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    samples: np.ndarray
    meta: dict


def fitted(scaler):
    """A StandardScaler -> the numbers with which ActionScaler does the same. Of one without the mean
    or the std, that is 0 or 1."""
    if not isinstance(scaler, StandardScaler):
        raise ValueError(f"a {type(scaler).__name__}, not a StandardScaler")
    if not hasattr(scaler, "n_samples_seen_"):
        raise ValueError("a StandardScaler that was never fitted")
    with_mean, with_std = (vars(scaler).get(k, True) for k in ("with_mean", "with_std"))
    width = len(scaler.mean_) if scaler.mean_ is not None else scaler.n_features_in_
    mean, scale = np.zeros(width), np.ones(width)
    if with_mean:
        mean = scaler.mean_
    if with_std:
        scale = scaler.scale_
    var = np.square(scale) if scaler.var_ is None or not with_std else scaler.var_
    meta = dict(vars(scaler).get("nanojepa", {}))
    columns = vars(scaler).get("feature_names_in_")
    if columns is not None:
        meta.setdefault("names", [str(name) for name in columns])
    return Fitted(mean, var, scale, scaler.n_samples_seen_, meta)


class ActionScaler(NamedTuple):
    """Standardiser of the continuous action dimensions: mean, var, scale (A_c,) float64, n samples,
    meta (dict of plain values: names, units, fps, frames_per_step, action_space or stride,
    fingerprint). scale is sqrt(var), or 1 where var is 0, as in StandardScaler."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    n: int
    meta: dict

    @classmethod
    def from_moments(cls, count, mean, m2, meta):
        var = np.asarray(m2, dtype=np.float64) / count
        var = np.where(
            var <= (count * np.finfo(np.float64).eps * mean) ** 2, 0.0, var
        )  # rounding alone: scikit-learn's bound
        return cls(
            np.asarray(mean, dtype=np.float64),
            var,
            np.where(var > 0, np.sqrt(var), 1.0),
            int(count),
            meta,
        )

    @property
    def hash(self):
        return hashlib.sha256(self.mean.tobytes() + self.scale.tobytes()).hexdigest()[:16]

    def transform(self, actions):
        """actions (..., A) unscaled -> a copy with the leading continuous dimensions at mean 0,
        variance 1."""
        out = np.array(actions, dtype=np.float64)
        c = len(self.mean)
        out[..., :c] = (out[..., :c] - self.mean) / self.scale
        return out

    def save(self, path):
        """Write `.pkl` (a joblib StandardScaler) or `.safetensors`, atomically; the same numbers
        give the same bytes."""
        if str(path).endswith(".safetensors"):
            tensors = {
                "mean": self.mean,
                "var": self.var,
                "scale": self.scale,
                "count": np.array([self.n], dtype=np.int64),
            }
            data = safetensors_bytes(
                tensors, metadata={"nanojepa": json.dumps(self.meta, sort_keys=True)}
            )
        else:
            s = StandardScaler()
            s.mean_, s.var_, s.scale_, s.n_samples_seen_ = self.mean, self.var, self.scale, self.n
            s.n_features_in_, s.nanojepa = len(self.mean), self.meta
            data = pickle.dumps(s, protocol=4)  # what joblib.load reads too
        write_atomically(path, data)

    @classmethod
    def load(cls, path, flags="--data SHARDS"):
        """Read what `save` wrote, or any joblib StandardScaler. Raises FileNotFoundError, or
        ValueError for anything else."""
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"no action scaler at {path}; fit one with: python fit_scaler.py {flags} --output"
                f" {path}"
            )
        try:
            if str(path).endswith(".safetensors"):
                with safe_open(path, "numpy") as f:
                    mean, var, scale, n = (
                        f.get_tensor(k) for k in ("mean", "var", "scale", "count")
                    )
                    meta = json.loads((f.metadata() or {}).get("nanojepa", "{}"))
            else:
                data = unpacked(np.fromfile(path, np.uint8).tobytes())
                s = _ScalerUnpickler(str(path), io.BytesIO(data), True).load()
                mean, var, scale, n, meta = fitted(s)
            out = cls(
                *(np.array(x, dtype=np.float64) for x in (mean, var, scale)), int(np.max(n)), meta
            )
        except (
            *DAMAGE,
            pickle.UnpicklingError,
            SafetensorError,
            AttributeError,
            ImportError,
            ArithmeticError,
            SystemError,
        ) as e:
            raise ValueError(
                f"{path} is not an action scaler (it holds or lacks: {e}); fit one with"
                " fit_scaler.py, or write a StandardScaler with joblib.dump(scaler, path)"
            ) from e
        if not (
            out.mean.ndim == 1
            and out.mean.shape == out.scale.shape
            and np.isfinite(out.mean).all()
            and np.isfinite(out.scale).all()
            and (out.scale > 0).all()
        ):
            raise ValueError(
                f"{path} holds a scaler with broken numbers; fit it again with fit_scaler.py"
            )
        return out

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
                    " fit it again"
                )


# --- fitting ---

# Converged: no standard error above --tolerance of its std. The guide's 1 % at 10,000 samples holds
# for independent ones. The steps of one recording are not: its own std is some 30 % off the average.
MIN_SAMPLES, MIN_RECORDINGS = 10_000, 20
# Of sums over all ticks of a step of real play; of differences of an arm's poses, 4 a second
STD_RANGE = {
    "pixels": (5.0, 500.0),
    "radians": (0.01, 1.0),
    "m": (1e-3, 0.3),
    "rad": (1e-3, 1.0),
    "closed": (1e-3, 1.0),
}
COLUMNS = [ACTION_SPACES[38].index(name) for name in [*CONTINUOUS, "gui_open"]]


def read_steps(jsonl, fps, frames_per_step):
    """JSONL bytes of a recording -> steps (n, 5): the continuous actions and whether a GUI was
    open; why its tail was dropped; {name that nobody knows: lines}."""
    ticks = parse_ticks(jsonl)
    span = step_size(ticks.rate, fps) * frames_per_step
    ends = np.arange(0, len(ticks.motion), span)
    if len(ends) < 2:
        raise ValueError(
            f"too short: {len(ticks.motion)} usable lines, a step needs {span + 1} {ticks.flaw}".rstrip()
        )
    return step_actions(ticks, ends, 38)[0][:, COLUMNS], ticks.flaw, ticks.unknown


def read_job(job, fps, frames_per_step, limit):
    """A recording, or a stream until it has given `limit` steps -> [(file, key, JSONL bytes, steps
    or None, flaw)], and {name that nobody knows: lines} where there are any."""
    out, url = [], job if isinstance(job, str) else ""

    def add(file, key, size, jsonl):
        try:
            steps, flaw, unknown = read_steps(jsonl(), fps, frames_per_step)
        except READ_ERRORS as e:
            if disk_failed(e):  # says nothing about the recording
                raise OSError(disk_sentence(f"{file} {key}", e)) from e
            steps, flaw, unknown = None, f"{type(e).__name__}: {e}", {}
        out.append((file, key, size, steps, flaw, *([unknown] if unknown else [])))

    if url:
        try:
            for key, members in stream_recordings(url):
                add(url, key, len(members["jsonl"]), lambda raw=members["jsonl"]: raw)
                if sum(len(row[3]) for row in out if row[3] is not None) >= limit:
                    break
        except (*READ_ERRORS, tarfile.TarError) as e:
            if disk_failed(e):
                raise OSError(disk_sentence(url, e)) from e
            out.append((url, "", 0, None, f"{type(e).__name__}: {e}"))
    else:

        def read():
            with Slice(job.shard, *job.members["jsonl"]) as f:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(
                        f.fd, 0, 0, os.POSIX_FADV_RANDOM
                    )  # else the kernel reads ahead into the video: up to 8 MB a member
                return f.read(f.size)

        add(job.shard, job.key, job.members["jsonl"][1], read)
    return out


def has_converged(parts, tolerance):
    count = sum(p[0] for p in parts)
    return (
        count >= MIN_SAMPLES
        and len(parts) >= MIN_RECORDINGS
        and max(map(np.max, standard_errors(parts))) <= tolerance
    )


def warnings_for(scaler, slope):
    """What in the numbers suggests broken data, one line each. slope: radians a pixel outside the
    GUI, None if too little moved."""
    out = []
    for name, unit, std in zip(scaler.meta["names"], scaler.meta["units"], np.sqrt(scaler.var)):
        low, high = STD_RANGE.get(unit, (0, np.inf))
        if std < 1e-6:
            out.append(
                f"{name} never changes (std {std:.1g}): the data may be corrupted; it is left"
                " unscaled if it is constant"
            )
        elif not low <= std <= high:
            out.append(
                f"{name} has std {std:.4g} {unit} a step, real play {low:g} to {high:g}: wrong"
                " units, outliers or little movement"
            )
    if scaler.n < MIN_SAMPLES:
        out.append(
            f"{scaler.n:,} samples are few: below {MIN_SAMPLES:,} the estimates are rough; use more"
            " data"
        )
    if slope is not None and abs(np.degrees(slope) / DEGREES_PER_PIXEL - 1) > 0.2:
        out.append(
            f"yaw turns {np.degrees(slope):.3f} degrees a pixel of mouse_dx outside the GUI,"
            f" Minecraft {DEGREES_PER_PIXEL}: angles or pixels are in other units, or mouse and"
            " camera are shifted against each other"
        )
    return out


def verify(path, parts):
    """Reload the file; the samples must come out at mean 0 and std 1 (0 if constant). The transform
    is affine, so that a recording's mean and mean + std tell what happens to all of its samples."""
    scaler = ActionScaler.load(path)
    total = (0, 0 * scaler.mean, 0 * scaler.mean)
    for n, mean, m2 in parts:
        at = scaler.transform(mean)
        total = merge_moments(
            total, (n, at, n * (scaler.transform(mean + np.sqrt(m2 / n)) - at) ** 2)
        )
    off = max(np.abs(total[1]).max(), np.abs(np.sqrt(total[2] / total[0]) - (scaler.var > 0)).max())
    if not off < 1e-6:
        raise RuntimeError(
            f"{path} does not standardise the samples it was fitted on: off by {off:.2g}"
        )
    return off


if __name__ == "__main__":
    args = parser.parse_args()
    if args.dataset == "droid":
        parser.set_defaults(output="droid_action_scaler.pkl", fps=4.0, frames_per_step=1)
        args = parser.parse_args()
    sys.excepthook = one_sentence
    if not args.output.endswith((".pkl", ".safetensors")):
        raise SystemExit(f"--output {args.output} must end in .pkl or .safetensors")
    for name in ("max_samples", "max_shards", "frames_per_step", "batch_size", "fps", "tolerance"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise SystemExit(f"--{name} {value:g} must be positive")

    # --- distributed ---
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group(
            "gloo"
        )  # no tensor of this stage is worth a GPU: parsing is all the time

    # --- data ---
    data, began, robot, names, units = (
        args.data or [["VPT/*.tar"]],
        time.time(),
        None,
        CONTINUOUS,
        UNITS,
    )
    if args.dataset == "droid":
        robot = DroidSteps(args.fps, args.stride, args.state_keys, args.action_keys)
        jobs, bad, names, units = robot.open(
            sum(data, []), args.max_shards, args.val_fraction, print if rank == 0 else str
        )
    else:
        jobs, bad = open_lines(data, args.max_shards, args.val_fraction)
    jobs = [jobs[i] for i in np.random.default_rng(args.seed).permutation(len(jobs))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        how = (
            "shards which cannot be sought: reading on through the video bytes"
            if any(map(is_stream, map(str, jobs)))
            else "recordings"
        )
        print(f"{len(jobs)} {how}; statistics on the {device}")

    # --- fit ---
    parts, used, flawed = (
        [],
        [],
        [],
    )  # parts: (count, mean, M2) of each recording, in the order of jobs
    unknown = collections.Counter()  # names that nobody knows: lines
    total = (
        0,
        torch.zeros(len(names), dtype=torch.float64),
        torch.zeros(len(names), dtype=torch.float64),
    )
    slope_sums = np.zeros(
        3
    )  # dx · yaw, dx · dx, steps with motion: the slope is that of a line through the origin
    at, next_check, done = 0, MIN_SAMPLES, False
    early = False  # stopped before --max_samples
    start = (
        "fork" if sys.platform == "linux" else None
    )  # workers parse only; elsewhere fork is not safe
    pool = (
        concurrent.futures.ProcessPoolExecutor(args.num_workers, multiprocessing.get_context(start))
        if args.num_workers > 1
        else None
    )
    progress = tqdm(
        total=args.max_samples,
        unit=" samples",
        desc="fit",
        disable=rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with pool or contextlib.nullcontext(), progress:
        while at < len(jobs) and not done:
            # Rounds read little more than what will be used, and what is used follows from the
            # order of jobs alone.
            left = args.max_samples - total[0]
            needed = math.ceil(left * at / total[0]) if total[0] else len(jobs)
            take = max(min(needed, max(max(args.num_workers, 1) * world, at // 4)), 1)
            work = robot or functools.partial(
                read_job, fps=args.fps, frames_per_step=args.frames_per_step, limit=left
            )
            results = list((pool.map if pool else map)(work, jobs[at : at + take][rank::world]))
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, results)
                results = [
                    gathered[i % world][i // world] for i in range(len(jobs[at : at + take]))
                ]
            at += take
            for file, key, nbytes, steps, flaw, *odd_names in (x for y in results for x in y):
                if done:
                    break
                for more in odd_names:
                    unknown.update(more)
                if flaw:
                    (bad if steps is None else flawed).append((file, key, flaw))
                if steps is None:
                    continue
                steps = steps[: args.max_samples - total[0]]
                n, *rest = moments(torch.from_numpy(steps[:, : len(names)].copy()).to(device))
                part = (n, *(x.cpu() for x in rest))
                total = merge_moments(total, part)
                parts.append((part[0], part[1].numpy(), part[2].numpy()))
                used.append((os.path.basename(file), key, nbytes))
                if robot is None:  # 600 px is a quarter turn: yaw_diff has not wrapped
                    seen = steps[(steps[:, 4] == 0) & (np.abs(steps[:, 0]) < 600)]
                    slope_sums += (
                        seen[:, 0] @ seen[:, 2],
                        seen[:, 0] @ seen[:, 0],
                        np.count_nonzero(seen[:, 0]),
                    )
                progress.update(len(steps))
                done = total[0] == args.max_samples
                if total[0] >= next_check and not args.no_convergence_check:
                    next_check = max(total[0] + args.batch_size, 1.05 * total[0])
                    early = not done and has_converged(parts, args.tolerance)
                    done = done or early
            progress.total = max(min(args.max_samples, round(total[0] / at * len(jobs))), total[0])
    if not parts:
        raise ValueError(
            f"no usable recording in {data}:"
            f" {'; '.join(' '.join(b) for b in bad[:3]) or 'all of it is held out'}"
        )

    # --- save, verify, report ---
    if rank == 0:
        count, mean, m2 = (np.asarray(x) for x in total)
        listing = "\n".join(f"{file} {key} {nbytes}" for file, key, nbytes in sorted(used))
        meta = {
            "names": names,
            "units": units,
            "fps": args.fps,
            "frames_per_step": args.frames_per_step,
            "seed": args.seed,
            "val_fraction": args.val_fraction,
            "shards": sorted({file for file, _, _ in used}),
            "fingerprint": hashlib.sha256(listing.encode()).hexdigest()[:16],
        }
        meta |= {"stride": args.stride or 0} if robot else {"action_space": args.action_space}
        meta |= (
            {"recordings": sorted(f"{file} {key}" for file, key, _ in used)}
            if len(used) <= 1000
            else {}
        )
        scaler = ActionScaler.from_moments(count, mean, m2, meta)
        scaler.save(args.output)
        off, rule, peak = verify(args.output, parts), "=" * 60, peak_memory(torch.device(device))
        for title, rows in (("left out", bad), ("tail left out", flawed)):
            for file, key, reason in rows[:5]:
                print(f"{title}: {file} {key}: {reason}")
            if len(rows) > 5:
                print(f"{title}: {len(rows) - 5} more, {len(rows)} in all")
        converged, (of_mean, of_std), digits = (
            has_converged(parts, args.tolerance),
            standard_errors(parts),
            5 if robot else 3,
        )
        print(
            f"{rule}\nSCALER FITTING COMPLETE\n{rule}\nSaved to: {args.output}\nTotal samples:"
            f" {scaler.n:,}\nConverged: {converged}"
        )
        if early:
            print(
                f"Stopped before --max_samples {args.max_samples:,}: all standard errors are within"
                f" {args.tolerance:.3g} of the std (--tolerance); --no_convergence_check takes all"
            )
        if not converged:
            how = "raise --max_samples" if at < len(jobs) or done else "all the data is used"
            print(
                f"  (asks for standard errors within {args.tolerance:.3g} of the std, {MIN_SAMPLES:,} samples,"
                f" {MIN_RECORDINGS} recordings: {how})"
            )
        print(
            "\nAction Statistics (Continuous Actions; a step's sum, and standard errors in % of the"
            " std):"
        )
        for i, (name, unit, std) in enumerate(zip(names, units, np.sqrt(scaler.var))):
            print(
                f"  {name:10} - Mean: {mean[i]:9.{digits}f} (se {of_mean[i]:6.2%}), Std:"
                f" {std:9.{digits}f} (se {of_std[i]:6.2%}) {unit}"
            )
        print(
            f"{rule}\n{len(used)} recordings, {sum(u[2] for u in used) / 2**20:.1f} MiB of actions"
            f" in {time.time() - began:.1f} s"
        )
        print(
            "Reloaded and verified: the samples come out at mean 0 and std 1 within"
            f" {max(off, 1e-16):.0e}; peak memory {peak:.0f} MiB"
        )
        for line in name_warnings(unknown):
            print(f"WARNING: {line}")
        for line in warnings_for(
            scaler, slope_sums[0] / slope_sums[1] if slope_sums[2] >= 100 else None
        ):
            print(f"WARNING: {line}")
    if world > 1:
        dist.destroy_process_group()
