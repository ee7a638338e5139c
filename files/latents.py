"""Video-VAE latents in HDF5 files as windows of steps: what train_lam.py and eval_lam.py read.

KEY.h5 contains one dataset (chunks, C, T, H, W), any name, HDF5 chunking or compression, float16 or
float32. Chunk n holds the latent steps n*T to n*T + T-1 (T = 2: 8 frames, merged 4 in time). Beside
it may lie KEY.actions.npz, which says what truly happened: integer arrays of length chunks*T - 1,
one or more labels by name, entry t between steps t and t+1. Training never sees them. `python -m
prepare.manifest` checks and splits a folder."""

import errno
import functools
import importlib.util
import json
import os
import zipfile
import zlib
from typing import NamedTuple

import h5py
import numpy as np
import torch

from files.disk import READ_ERRORS, is_storage_error, storage_sentence, write_atomically
from files.films import read_clock
from files.logs import count_text
from files.progress import tqdm
from files.shards import Slice, read_ticks
from files.video import mp4_times, read_frames, video_rate
from files.vpt import ACTION_SPACES, ClipReader, step_actions

VAE_FRAMES = 4  # frames that a video VAE merges in time
NO_LABEL = -(2**63)  # in place of a label, if a file does not say what happened
SUFFIX = ".actions.npz"
DISK_ERRORS = errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENOMEM


def find_files(folder):
    """(names of the *.h5 files below a folder, notes on files that look like H5 files or labels and
    are not used). Names are relative to the folder. Hidden files are ignored; a folder that a link
    leads back to is entered once."""
    names, unused = [], []
    entered = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        for file in files:
            name = os.path.relpath(os.path.join(where, file), folder)
            stem, ending = os.path.splitext(name)
            if file.startswith("."):
                continue
            if ending == ".h5":
                names.append(name)
            elif ending.lower() in (".h5", ".hdf5", ".hdf"):
                unused.append(f"{name}: files must be named KEY.h5")
            elif ending.lower() in (".npz", ".npy"):
                key = name[: -len(SUFFIX)] if name.endswith(SUFFIX) else None
                if key is None or not os.path.exists(os.path.join(folder, key + ".h5")):
                    unused.append(f"{name}: labels are KEY{SUFFIX} beside KEY.h5")
    return sorted(names), sorted(unused)


class LatentFile(NamedTuple):
    path: str
    steps: int
    shape: tuple  # of its dataset


def open_dataset(path):
    """The one dataset of an H5 file.

    Raises ValueError if there is none or more than one, or if parts of it were never written or are
    in other files that are gone (HDF5 reads zeros there). Raises OSError if it is no H5 file, is
    damaged, or needs a filter that is not installed."""
    names = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            names.append(name)

    file = h5py.File(path, "r")
    try:
        file.visititems(visit)
        for name in names:  # a damaged type raises here
            str(file[name].dtype)
        if len(names) == 1:
            check_stored(file[names[0]], path, set())
    except (RuntimeError, LookupError, TypeError) as e:  # h5py has no exception of its own
        raise OSError(f"{path} is damaged: {str(e) or type(e).__name__}") from e
    if not names:
        links = [k for k in file if not isinstance(file.get(k, getlink=True), h5py.HardLink)]
        if links:
            raise ValueError(
                f"no dataset, only links ({', '.join(links[:4])}), which are not followed"
            )
        raise ValueError("no dataset")
    if len(names) > 1:
        raise ValueError(f"{len(names)} datasets ({', '.join(names[:4])})")
    return file[names[0]]


def check_stored(data, path, seen):
    """Raises ValueError if values of a dataset are missing. HDF5 reads as zeros, without an error,
    what was never written and what lies in another file that is gone. seen: real paths of the files
    that lead here."""
    if data.shape is None:
        raise ValueError(f"its dataset {data.name} is empty (null): it holds no values")
    for name, neutral in (("scale_factor", 1), ("add_offset", 0)):
        if name in data.attrs and not np.all(np.asarray(data.attrs[name]) == neutral):
            raise ValueError(
                f"its dataset {data.name} has a {name} of {data.attrs[name]}, which is not applied"
                " here: write the latents themselves"
            )
    if 0 in data.shape:
        return  # whoever asks for its shape finds that out
    if data.is_virtual:
        return check_sources(data, path, seen)
    check_filters(data, path)
    for name, offset, size in data.external or ():
        beside = os.path.join(os.path.dirname(path), name)
        place = beside if os.path.exists(beside) else name
        if not os.path.exists(place):
            raise ValueError(f"its values lie in another file, {name}, which is not there")
        if size < h5py.h5f.UNLIMITED and os.path.getsize(place) < offset + size:
            raise ValueError(f"its values lie in another file, {name}, which is cut short")
    if data.chunks is None:
        if not data.external and data.id.get_storage_size() == 0:
            raise ValueError("its values were never written: they would read as zeros")
        return

    total = 1
    for length, part in zip(data.shape, data.chunks):
        total *= -(-length // part)
    written = data.id.get_num_chunks()
    if written < total:
        raise ValueError(
            f"{total - written} of {total} chunks of the H5 file were never written (did its writer"
            " die?): they would read as zeros"
        )


def check_sources(data, path, seen):
    """check_stored of a virtual dataset: of each file that its values come from."""
    covered = 0
    for source in data.virtual_sources():
        covered += source.vspace.get_select_npoints()
        place = source_file(source, path)
        try:
            check_source(source, place, data.dtype, seen)
        except (ValueError, OSError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"a virtual dataset whose source {place} {reason}") from e
    if covered < data.size:
        raise ValueError(
            f"a virtual dataset: {data.size - covered} of its {data.size} values come from nowhere"
            " and would read as zeros"
        )


def source_file(source, path):
    """The file that a source of a virtual dataset of `path` lies in."""
    if source.file_name == ".":
        return path
    for place in (os.path.join(os.path.dirname(path), source.file_name), source.file_name):
        if os.path.exists(place):
            return place
    raise ValueError(f"a virtual dataset whose source {source.file_name} is not there")


def check_source(source, place, dtype, seen):
    """Raises ValueError or OSError if a source of a virtual dataset cannot give its values."""
    with h5py.File(place, "r") as file:
        data = file.get(source.dset_name)
        if not isinstance(data, h5py.Dataset):
            raise ValueError(f"has no dataset {source.dset_name}")
        if data.dtype.kind != dtype.kind:
            raise ValueError(f"holds {data.dtype}, not {dtype}")
        key = os.path.realpath(place) + ":" + data.name
        if key in seen:
            raise ValueError("is the dataset itself")
        check_stored(data, place, seen | {key})
        if not holds_selection(data, source):
            raise ValueError(f"has shape {list(data.shape)}, which is less than it needs")


def holds_selection(data, source):
    """Whether a dataset is as large as the part that a virtual dataset takes from it."""
    if source.src_space.shape == ():  # all of it, whatever that is
        return data.size >= source.vspace.get_select_npoints()
    last = source.src_space.get_select_bounds()[1]
    return len(last) == data.ndim and all(i < n for i, n in zip(last, data.shape))


def check_filters(data, path):
    """Raises OSError if a filter (gzip, blosc, zstd ...) that stored the values is missing. Those
    that HDF5 does not include are in hdf5plugin, which registers them when it is imported."""
    settings = data.id.get_create_plist()
    for i in range(settings.get_nfilters()):
        number, _, _, title = settings.get_filter(i)
        if h5py.h5z.filter_avail(number):
            continue
        if importlib.util.find_spec("hdf5plugin"):
            importlib.import_module("hdf5plugin")
        if h5py.h5z.filter_avail(number) or not data.id.get_num_chunks():
            continue
        # a writer that lacks a filter may leave it out, and sets this bit
        was_left_out = data.id.get_chunk_info(0).filter_mask >> i & 1
        if not was_left_out:
            name = title.decode(errors="replace").strip() or "no name"
            raise OSError(
                f"{path} is compressed with filter {number} ({name}), which this HDF5 lacks: pip"
                " install hdf5plugin"
            )


def of_the_disk(error):
    """Whether an error is the disk's or the system's, and says nothing about the file."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def read_rows(data, first, stop):
    """Chunks first..stop-1 of a dataset. h5py has no exception of its own for what is damaged."""
    try:
        return data[first:stop]
    except (RuntimeError, LookupError, TypeError) as e:
        raise OSError(f"damaged: {str(e) or type(e).__name__}") from e


@functools.lru_cache(maxsize=64)
def _open(path, process):
    """One handle per file and process: HDF5 does not survive a fork."""
    return open_dataset(path)


def read_steps(path, first, stop):
    """Steps first..stop-1 of a file: (stop - first, C, H, W) float32. Reads only the chunks that
    contain them."""
    try:
        data = _open(path, os.getpid())
        T = data.shape[2]
        x = read_rows(data, first // T, -(-stop // T)).swapaxes(1, 2)
        x = x.reshape(-1, data.shape[1], *data.shape[3:])
    except (ValueError, OSError) as e:
        where = f"{path}, steps {first} to {stop - 1}"
        if of_the_disk(e):
            raise OSError(f"{where}: {e}: fix the disk, then continue with --resume") from e
        raise ValueError(
            f"{where}, cannot be read ({str(e).splitlines()[0]}): run prepare.manifest again, which"
            " leaves it out"
        ) from e
    start = first % T
    return np.ascontiguousarray(x[start : start + stop - first], dtype=np.float32)


def read_labels(path, steps):
    """{name: (steps - 1,) int64} from KEY.actions.npz beside KEY.h5; {} without one. Raises
    ValueError if that is damaged, of another length, or not whole numbers."""
    labels_path = os.path.splitext(path)[0] + SUFFIX
    if os.path.islink(labels_path) and not os.path.exists(labels_path):
        target = os.readlink(labels_path)
        raise ValueError(f"{labels_path} is a link to {target}, which is not there")
    if not os.path.exists(labels_path):
        return {}
    damage = ValueError, EOFError, LookupError, TypeError, NotImplementedError, RuntimeError
    try:
        with np.load(labels_path, allow_pickle=False) as arrays:
            labels = {k: arrays[k] for k in sorted(arrays.files)}
    except AttributeError as e:  # np.load gives the array of a .npy file, which has no names
        raise ValueError(f"{labels_path} is no npz file: write it with numpy.savez") from e
    except (*damage, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(
            f"{labels_path} is damaged or no npz file of numbers ({str(e) or type(e).__name__}):"
            " write it again, or remove it"
        ) from e
    for name, values in labels.items():
        what = f"{labels_path}: {name}"
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{what} is no array: write it again with numpy.savez")
        if values.shape != (steps - 1,):
            raise ValueError(f"{what} has shape {values.shape}, {steps} steps need ({steps - 1},)")
        labels[name] = whole_numbers(values, what)
    return labels


def whole_numbers(values, what):
    """Labels as int64. Raises ValueError for values that are no classes: cutting 0.9 radians to 0
    would make all of them one class."""
    remedy = "labels are whole numbers, a class each: bin what is continuous"
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} holds {values.dtype}: {remedy}")
    if values.dtype.kind == "f":
        numbers = values.astype(np.float64)
        good = (np.floor(numbers) == numbers) & (np.abs(numbers) <= 2**53)  # false for NaN
    elif values.dtype.kind == "b":
        good = np.ones(len(values), bool)
    else:
        good = (values <= 2**63 - 1) & (values > NO_LABEL)
    if not good.all():
        entry = int(np.argmin(good))
        raise ValueError(f"{what} is {values[entry]:.10g} at entry {entry}: {remedy}")
    return values.astype(np.int64)


def open_manifest(manifest_path, data_dir=None):
    """(metadata, {"train", "validation", "test": [LatentFile]}) of a manifest by prepare.manifest.
    Its paths are relative to data_dir, by default the manifest's folder. Raises FileNotFoundError
    or ValueError if files are gone or have changed."""
    if not os.path.exists(manifest_path):
        raise FileNotFoundError(
            f"no {manifest_path}; make it with: python -m prepare.manifest {data_dir or 'DIR'}"
        )
    foreign = (
        f"{manifest_path} is no manifest of ours: make it again with python -m prepare.manifest"
    )
    try:
        with open(manifest_path) as f:
            manifest = json.load(f)
    except ValueError as e:
        raise ValueError(f"{foreign} ({e})") from e
    if not isinstance(manifest, dict) or not {"metadata", "splits"} <= manifest.keys():
        raise ValueError(foreign)
    reason = wrong_manifest(manifest)
    if reason:
        raise ValueError(f"{foreign} ({reason})")
    folder = data_dir or os.path.dirname(os.path.abspath(manifest_path))
    splits = {}
    split_of = {}  # every file
    for split, entries in manifest["splits"].items():
        splits[split] = []
        for entry in entries:
            path = os.path.join(folder, entry["path"])
            other = split_of.setdefault(os.path.realpath(path), split)
            if other != split:
                raise ValueError(
                    f"{path} is in {other} and in {split} of {manifest_path}: what is trained on"
                    " cannot be judged on; run python -m prepare.manifest again"
                )
            if not os.path.exists(path):
                raise ValueError(
                    f"{path} of {manifest_path} is gone: name the folder of the latents with"
                    " --data_dir, or run python -m prepare.manifest again"
                )
            if os.path.getsize(path) != entry["bytes"]:
                raise ValueError(f"{path} is not as it was: run python -m prepare.manifest again")
            shape = tuple(entry["shape"])
            splits[split].append(LatentFile(path, shape[0] * shape[2], shape))
    return manifest["metadata"], splits


def wrong_manifest(manifest):
    """Why a dictionary with metadata and splits is no manifest by prepare.manifest, or ""."""
    metadata = manifest["metadata"]
    splits = manifest["splits"]
    if not isinstance(metadata, dict) or not isinstance(splits, dict):
        return "its metadata or its splits have no names"
    for name in ("mean", "std", "channels", "size", "steps_per_chunk", "fingerprint"):
        if name not in metadata:
            return f"no {name} in its metadata"
    mean = metadata["mean"]
    std = metadata["std"]
    finite = all(isinstance(x, (int, float)) and np.isfinite(x) for x in (mean, std))
    if not finite or std <= 0:
        return f"mean {mean!r} and std {std!r} standardise nothing"
    if set(splits) != {"train", "validation", "test"}:
        return f"its splits are {', '.join(splits) or 'none'}, not train, validation and test"
    for entries in splits.values():
        for entry in entries:
            if not isinstance(entry, dict) or not {"path", "shape", "bytes"} <= entry.keys():
                return f"an entry of its splits is {str(entry)[:80]}: no path, shape and bytes"
            if len(entry["shape"]) != 5:
                return f"{entry['path']} has shape {entry['shape']}, not five numbers"
    return ""


def write_latents(folder, key, z, labels):
    """Write steps (S, C, H, W) as KEY.h5 of chunks of two, without the last one if S is odd, and
    labels {name: (S - 1,)}, if there are any, as KEY.actions.npz."""
    S = len(z) // 2 * 2
    chunks = z[:S].reshape(-1, 2, *z.shape[1:]).swapaxes(1, 2).astype(np.float16)
    labels = {name: values[: S - 1] for name, values in labels.items()}

    def write_h5(f):
        with h5py.File(f, "w") as file:
            file.create_dataset("latents", data=chunks, chunks=(1, *chunks.shape[1:]))

    def write_npz(f):
        np.savez(f, **labels)

    # the labels first: a recording whose KEY.h5 exists is complete
    if os.path.isabs(key) or ".." in key.split("/"):
        raise ValueError(f"the name {key} leads out of {folder}: rename that recording")
    if labels:
        write_atomically(os.path.join(folder, key + SUFFIX), write_npz)
    write_atomically(os.path.join(folder, f"{key}.h5"), write_h5)


def pack_codes(indices, K):
    """Indices (..., slots) below K -> one number (...) below K^slots. The first slot is the most
    significant digit."""
    slots = indices.shape[-1]
    return sum(indices[..., i] * K ** (slots - 1 - i) for i in range(slots))


def unpack_codes(ids, K, slots):
    """The inverse of pack_codes."""
    return torch.stack([ids // K ** (slots - 1 - i) % K for i in range(slots)], dim=-1)


# --- from video ---


def latent_frames(record, fps, crop_size, part=64, merged=VAE_FRAMES):
    """A recording of play for a VAE: (frames, labels). frames is a generator of uint8 (n, merged,
    3, crop, crop), n <= part latent steps, each of `merged` frames (a video VAE merges four, one of
    pictures none). Labels say what happened between the steps, from the last frame of one to that
    of the next: yaw -1 (left), 0 (under 3 degrees), 1 (right), and whether forward was pressed.
    Raises what read_frames raises, and ValueError if lines and frames do not belong together."""
    with Slice(record.shard, *record.members["mp4"]) as f:
        times = mp4_times(f)
        ticks = read_ticks(record)
        frame_rate = video_rate(f, times)
    reader = ClipReader(frames_per_clip=2, fps=ticks.rate, frames_per_step=1)
    reader.starts(ticks, len(times), frame_rate)
    ratio = reader.frames_per_line(ticks, len(times), frame_rate)

    # the ticks that are shown (steps, 4): whole latent steps only
    lines = min(len(ticks.motion), len(times) // ratio)
    sampled = np.arange(lines * fps / ticks.rate - 1e-9) * ticks.rate / fps
    sampled = sampled[: len(sampled) // merged * merged]
    steps = np.floor(sampled).astype(int).reshape(-1, merged)
    if len(steps) < 2:
        raise ValueError(f"{lines} usable lines are less than two latent steps")

    actions, _ = step_actions(ticks, steps[:, -1], 36)
    yaw = actions[:, ACTION_SPACES[36].index("yaw_diff")]
    forward = actions[:, ACTION_SPACES[36].index("key.w")]
    labels = {
        "yaw": (np.sign(yaw) * (np.abs(yaw) > np.radians(3))).astype(int),
        "forward": forward.astype(int),
    }

    numbers = steps * ratio
    return cropped_frames(record, record.members["mp4"], times, numbers, crop_size, part), labels


def film_latent_frames(record, fps, crop_size, part=64, merged=VAE_FRAMES):
    """latent_frames of plain video, which has no labels: ({frames}, {}). Of a film with pauses its
    longest stretch, because nothing happens between two steps around a pause. ValueError for a film
    that is too short or too slow."""
    clock = read_clock(record)
    if clock.rate < 0.98 * fps:
        raise ValueError(f"{clock.rate:.4g} frames a second: --fps {fps:g} would show frames twice")
    stretches = clock.stretches()
    first, last = max(stretches, key=lambda stretch: stretch[1] - stretch[0])
    if len(stretches) > 1:
        seconds = sum(end - begin for begin, end in stretches)
        print(
            f"{record.shard} {record.key}: it has {count_text(len(stretches) - 1, 'pause')}; the"
            f" longest stretch without one is taken, {last - first:.3g} of {seconds:.3g} s"
        )

    # whole latent steps only
    shown = clock.shown(np.arange(first, last - 0.5 * clock.interval, 1 / fps))
    steps = shown[: len(shown) // merged * merged].reshape(-1, merged)
    if len(steps) < 2:
        raise ValueError(f"{last - first:.3g} s without a pause are less than two latent steps")
    return cropped_frames(record, record.members["film"], clock.times, steps, crop_size, part), {}


def cropped_frames(record, member, times, steps, crop_size, part):
    """The middle of the frames `steps` (n, merged) of a video, `part` steps at once: uint8 (part,
    merged, 3, crop_size, crop_size). times: of its frames."""
    with Slice(record.shard, *member) as f:
        for i in range(0, len(steps), part):
            x = read_frames(f, times, steps[i : i + part].ravel(), crop_size)
            top = (x.shape[1] - crop_size) // 2
            left = (x.shape[2] - crop_size) // 2
            x = x[:, top : top + crop_size, left : left + crop_size].transpose(0, 3, 1, 2)
            yield x.reshape(-1, steps.shape[1], *x.shape[1:])


def open_vae(spec, dtype):
    """The user's video VAE. spec: "diffusers:FOLDER". Raises ValueError if that is none that we
    know."""
    kind, _, folder = spec.partition(":")
    if kind != "diffusers" or not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(
            f"--vae {spec}: give diffusers:FOLDER, with config.json and weights of"
            " AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderTiny or AutoencoderKL"
        )
    try:
        import diffusers
    except ImportError as e:
        raise ValueError("--vae needs: pip install diffusers") from e
    with open(os.path.join(folder, "config.json")) as f:
        name = json.load(f).get("_class_name")
    if name not in ("AutoencoderKLWan", "AutoencoderKLCogVideoX"):
        raise ValueError(
            f"--vae {spec} is a {name}: AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderTiny"
            " and AutoencoderKL are known"
        )
    vae_class = getattr(diffusers, name)
    return vae_class.from_pretrained(folder, local_files_only=True, torch_dtype=dtype).eval()


def merged_frames(vae):
    """How many frames a VAE merges into one latent step. One of pictures has a `factor`
    (weights.open_picture_vae)."""
    return 1 if hasattr(vae, "factor") else VAE_FRAMES


def repeat_first(x, vae):
    """(B, C, T, H, W) with the first step repeated, for Wan: it treats the first frame, or latent,
    on its own, and the repeated one takes that place. Unchanged for other VAEs."""
    if type(vae).__name__ != "AutoencoderKLWan":
        return x
    return torch.cat([x[:, :, :1], x], dim=2)


@torch.inference_mode()
def vae_latents(vae, frames):
    """uint8 (B, 8, 3, H, W), each chunk alone -> (B, 2, C, h, w), the means: 4 frames go into each.
    With a VAE of pictures it is (B, 2, 3, H, W), each picture alone."""
    if merged_frames(vae) == 1:
        pictures = (frames.flatten(0, 1).float() / 255).to(next(vae.parameters()))
        return vae.encode(pictures).unflatten(0, frames.shape[:2]).float()
    x = (frames.transpose(1, 2).float() / 127.5 - 1).to(next(vae.parameters()))  # (B, 3, 8, H, W)
    z = vae.encode(repeat_first(x, vae)).latent_dist.mode()
    return z[:, :, -2:].transpose(1, 2).float()


@torch.inference_mode()
def vae_frames(vae, z):
    """The inverse of vae_latents: (B, 2, C, h, w) -> frames (B, 8, 3, H, W), or (B, 2, 3, H, W), in
    [0, 1]. A VAE that makes fewer frames of two latents gives its last ones."""
    if merged_frames(vae) == 1:
        pictures = vae.decode(z.flatten(0, 1).to(next(vae.parameters())))
        return pictures.unflatten(0, z.shape[:2]).float().clamp(0, 1)
    x = z.transpose(1, 2).to(next(vae.parameters()))  # (B, C, 2, h, w)
    frames = vae.decode(repeat_first(x, vae)).sample
    frames = frames[:, :, -2 * VAE_FRAMES :]
    return (frames.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def check_metrics(metrics):
    """Raises ValueError if a package that `decoded_scores` needs is not installed. To be called
    before anything takes time."""
    if not importlib.util.find_spec("torchmetrics"):
        raise ValueError("--vae needs: pip install torchmetrics")
    if "lpips" in metrics and not importlib.util.find_spec("torchvision"):
        raise ValueError("--metrics lpips needs: pip install torchvision (or leave lpips out)")


@torch.inference_mode()
def decoded_scores(model, batches, vae, metrics):
    """How well the frames of a predicted step match those of the true one: {metric: (of the
    prediction, of a copy of the step before)}, means over batches of windows z (B, T, C, H, W).
    Each step is decoded together with the step before it, by the user's VAE. metrics: psnr, ssim,
    lpips."""
    check_metrics(metrics)
    import torchmetrics.image as tm

    def new_metric(name):
        if name == "psnr":
            return tm.PeakSignalNoiseRatio(data_range=1.0)
        if name == "ssim":
            return tm.StructuralSimilarityIndexMeasure(data_range=1.0)
        return tm.LearnedPerceptualImagePatchSimilarity(normalize=True)

    def last_frames(before, step):
        """Frames (B * 4, 3, H, W), or (B, 3, H, W), of a step."""
        frames = vae_frames(vae, torch.stack([before, step], dim=1))
        return frames[:, -merged_frames(vae) :].flatten(0, 1)

    device = model.scale.device
    of_predictions = {name: new_metric(name).to(device) for name in metrics}
    of_copies = {name: new_metric(name).to(device) for name in metrics}
    for z in batches:
        z = z.float().to(device)
        # vectors, not indices: a continuous model has none, a run in its warm-up does not use them
        predictions = model.decode(z[:, :-1], model.encode(z)[-1])
        for t in range(0, z.shape[1] - 1, 2):  # steps 2i and 2i + 1 were encoded together
            true = last_frames(z[:, t], z[:, t + 1])
            predicted = last_frames(z[:, t], predictions[:, t])
            copied = last_frames(z[:, t], z[:, t])
            for name in metrics:
                of_predictions[name].update(predicted, true)
                of_copies[name].update(copied, true)
    scores = {}
    for name in metrics:
        scores[name] = (of_predictions[name].compute().item(), of_copies[name].compute().item())
    return scores


def encode_latents(records, bad, vae, out, fps, crop_size, batch_size, device):
    """Write KEY.h5 for each recording, batch_size chunks at once; files that exist are kept. Prints
    `bad` [(file, key, reason)] and what else cannot be read. Raises ValueError if nothing can be
    encoded, OSError if the disk fails."""
    done = 0
    merged = merged_frames(vae)
    for record in tqdm(records, unit="recording", desc="encode"):
        if os.path.exists(os.path.join(out, record.key + ".h5")):
            done += 1
            continue
        try:
            of_record = film_latent_frames if record.is_film else latent_frames
            frames, labels = of_record(record, fps, crop_size, merged=merged)
            z = []
            for x in frames:
                x = x[: len(x) // 2 * 2]
                chunks = torch.from_numpy(x).reshape(-1, 2 * merged, *x.shape[2:])
                for batch in chunks.split(batch_size):
                    z.append(vae_latents(vae, batch.to(device)).flatten(0, 1).cpu())
            write_latents(out, record.key, torch.cat(z).numpy(), labels)
            done += 1
        except READ_ERRORS as e:
            if is_storage_error(e):
                raise OSError(storage_sentence(f"{record.shard} {record.key}", e)) from e
            bad.append((record.shard, record.key, f"{type(e).__name__}: {e}"))
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")
    if bad and not done:
        raise ValueError(f"nothing could be encoded for {out}")
