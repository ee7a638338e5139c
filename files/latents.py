"""Video-VAE latents in HDF5 files as windows of steps: what train_lam.py and eval_lam.py read.

KEY.h5 holds one dataset (chunks, C, T, H, W), any name, HDF5 chunking or compression, float16 or
float32; chunk n holds the latent steps n*T to n*T + T-1 (T = 2: 8 frames, merged 4 in time). Beside
it may lie KEY.actions.npz, what truly happened: integer arrays of length chunks*T - 1, entry t
between steps t and t+1, one or more labels by name; training never sees them. `python -m
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
from tqdm import tqdm

from files.disk import READ_ERRORS, disk_failed, disk_sentence, write_atomically
from files.shards import Slice, read_ticks
from files.video import mp4_times, read_frames, video_rate
from files.vpt import ACTION_SPACES, ClipReader, step_actions

VAE_FRAMES = 4  # that a video VAE merges in time
NO_LABEL = -(2**63)  # in the place of a label: this file does not say what happened
SUFFIX = ".actions.npz"
DISK_ERRORS = errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENOMEM


def find_files(folder):
    """(names of the *.h5 files in a folder and its folders, names of what looks like H5 files or
    labels and is not used), relative to it. Hidden files are left alone; a folder that a link leads
    back to is entered once."""
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
    """The one dataset of an H5 file. Raises ValueError if there is none or more than one, or if
    parts of it were never written or are in other files that are gone (HDF5 reads zeros there);
    OSError if it is no H5 file, is damaged, or needs a filter that is not installed."""
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
        only = f", only links ({', '.join(links[:4])}), which are not followed" if links else ""
        raise ValueError(f"no dataset{only}")
    if len(names) > 1:
        raise ValueError(f"{len(names)} datasets ({', '.join(names[:4])})")
    return file[names[0]]


def check_stored(data, path, seen):
    """Whether all values of a dataset are there. HDF5 reads what was never written, and what lies
    in another file that is gone, as zeros, without an error. seen: real paths of the files that
    lead here."""
    if data.shape is None:
        raise ValueError(f"its dataset {data.name} is empty (null): it holds no values")
    for name, neutral in (("scale_factor", 1), ("add_offset", 0)):
        if name in data.attrs and not np.all(np.asarray(data.attrs[name]) == neutral):
            raise ValueError(
                f"its dataset {data.name} has a {name} of {data.attrs[name]}, which is not applied"
                " here: write the latents themselves"
            )
    if 0 in data.shape:
        return  # the shape is looked at elsewhere
    if data.is_virtual:
        return check_sources(data, path, seen)
    check_filters(data, path)
    for name, offset, size in data.external or ():
        part = os.path.join(os.path.dirname(path), name)
        if not os.path.exists(part) and not os.path.exists(name):
            raise ValueError(f"its values lie in another file, {name}, which is not there")
        held = os.path.getsize(part if os.path.exists(part) else name)
        if size < h5py.h5f.UNLIMITED and held < offset + size:
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
    """check_stored of a virtual dataset: each file that its values come from."""
    covered = 0
    for source in data.virtual_sources():
        covered += source.vspace.get_select_npoints()
        if source.file_name == ".":
            place = path
        else:
            places = [os.path.join(os.path.dirname(path), source.file_name), source.file_name]
            place = next((p for p in places if os.path.exists(p)), None)
        if place is None:
            raise ValueError(f"a virtual dataset whose source {source.file_name} is not there")
        where = f"a virtual dataset whose source {place}"
        try:
            with h5py.File(place, "r") as file:
                there = file.get(source.dset_name)
                if not isinstance(there, h5py.Dataset):
                    raise ValueError(f"has no dataset {source.dset_name}")
                if there.dtype.kind != data.dtype.kind:
                    raise ValueError(f"holds {there.dtype}, not {data.dtype}")
                key = os.path.realpath(place) + ":" + there.name
                if key in seen:
                    raise ValueError("is the dataset itself")
                check_stored(there, place, seen | {key})
                if not holds_selection(there, source):
                    raise ValueError(f"has shape {list(there.shape)}, which is less than it needs")
        except (ValueError, OSError) as e:
            raise ValueError(f"{where} {str(e).splitlines()[0]}") from e
    if covered < data.size:
        raise ValueError(
            f"a virtual dataset of which {data.size - covered} of {data.size} values come from"
            " nowhere: they would read as zeros"
        )


def holds_selection(there, source):
    """Whether a dataset is as large as what a virtual dataset takes from it."""
    if source.src_space.shape == ():  # all of it, whatever that is
        return there.size >= source.vspace.get_select_npoints()
    last = source.src_space.get_select_bounds()[1]
    return len(last) == there.ndim and all(at < n for at, n in zip(last, there.shape))


def check_filters(data, path):
    """Whether the filters (gzip, blosc, zstd ...) that stored the values are there. Those that HDF5
    does not bring along are in hdf5plugin, which registers them when it is imported."""
    settings = data.id.get_create_plist()
    for i in range(settings.get_nfilters()):
        number, _, _, title = settings.get_filter(i)
        if h5py.h5z.filter_avail(number):
            continue
        if importlib.util.find_spec("hdf5plugin"):
            importlib.import_module("hdf5plugin")
        if h5py.h5z.filter_avail(number) or not data.id.get_num_chunks():
            continue
        if (
            not data.id.get_chunk_info(0).filter_mask >> i & 1
        ):  # else a writer without it left it out
            name = title.decode(errors="replace").strip() or "no name"
            raise OSError(
                f"{path} is compressed with filter {number} ({name}), which this HDF5 lacks: pip"
                " install hdf5plugin"
            )


def of_the_disk(error):
    """Whether an error says something of the disk or the system, and nothing of the file."""
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
    """Steps first..stop-1 of a file: (stop - first, C, H, W) float32; reads the chunks they lie in
    and no others."""
    try:
        data = _open(path, os.getpid())
        T = data.shape[2]
        x = read_rows(data, first // T, -(-stop // T)).swapaxes(1, 2)
        x = x.reshape(-1, data.shape[1], *data.shape[3:])
    except (ValueError, OSError) as e:
        where = f"{path}, steps {first} to {stop - 1}"
        if of_the_disk(e):
            raise OSError(f"{where}: {e}: mend the disk, then go on with --resume") from e
        raise ValueError(
            f"{where}, cannot be read ({str(e).splitlines()[0]}): run prepare.manifest again, which"
            " leaves it out"
        ) from e
    return np.ascontiguousarray(x[first % T : first % T + stop - first], dtype=np.float32)


def read_labels(path, steps):
    """{name: (steps - 1,) int64} from KEY.actions.npz beside KEY.h5; {} without one. Raises
    ValueError for a damaged file, another length, and what are no whole numbers."""
    truth = os.path.splitext(path)[0] + SUFFIX
    if not os.path.exists(truth):
        if os.path.islink(truth):
            raise ValueError(f"{truth} is a link to {os.readlink(truth)}, which is not there")
        return {}
    damage = ValueError, EOFError, LookupError, TypeError, NotImplementedError, RuntimeError
    try:
        with np.load(truth, allow_pickle=False) as arrays:
            labels = {k: arrays[k] for k in sorted(arrays.files)}
    except AttributeError as e:  # np.load gives the array of a .npy file, which has no names
        raise ValueError(f"{truth} is no npz file: write it with numpy.savez") from e
    except (*damage, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(
            f"{truth} is damaged or no npz file of numbers ({str(e) or type(e).__name__}): write it"
            " again, or remove it"
        ) from e
    for name, values in labels.items():
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{truth}: {name} is no array: write it again with numpy.savez")
        if values.shape != (steps - 1,):
            raise ValueError(
                f"{truth}: {name} has shape {values.shape}, {steps} steps need ({steps - 1},)"
            )
        labels[name] = whole_numbers(values, f"{truth}: {name}")
    return labels


def whole_numbers(values, what):
    """Labels as int64. ValueError for all that is no class: to cut 0.9 radians to 0 would make one
    class of all."""
    remedy = "labels are whole numbers, a class each: bin what is continuous"
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} holds {values.dtype}: {remedy}")
    if values.dtype.kind == "f":
        numbers = values.astype(np.float64)
        good = (np.floor(numbers) == numbers) & (np.abs(numbers) <= 2**53)  # not nan either
    elif values.dtype.kind == "b":
        good = np.ones(len(values), bool)
    else:
        good = (values <= 2**63 - 1) & (values > NO_LABEL)
    if not good.all():
        at = int(np.argmin(good))
        raise ValueError(f"{what} is {values[at]:.10g} at entry {at}: {remedy}")
    return values.astype(np.int64)


def open_manifest(manifest_path, data_dir=None):
    """(metadata, {"train", "validation", "test": [LatentFile]}) of prepare.manifest; paths are
    relative to data_dir, by default the manifest's folder. Raises FileNotFoundError or ValueError
    for files that are gone or no longer as they were."""
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
    if reason := wrong_manifest(manifest):
        raise ValueError(f"{foreign} ({reason})")
    folder = data_dir or os.path.dirname(os.path.abspath(manifest_path))
    splits, listed = {}, {}
    for split, entries in manifest["splits"].items():
        splits[split] = []
        for e in entries:
            path = os.path.join(folder, e["path"])
            other = listed.setdefault(os.path.realpath(path), split)
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
            if os.path.getsize(path) != e["bytes"]:
                raise ValueError(f"{path} is not as it was: run python -m prepare.manifest again")
            splits[split].append(LatentFile(path, e["shape"][0] * e["shape"][2], tuple(e["shape"])))
    return manifest["metadata"], splits


def write_latents(folder, key, z, labels):
    """Steps (S, C, H, W), an even number of them used, as KEY.h5 of chunks of two; labels {name: (S
    - 1,)} as KEY.actions.npz."""
    S = len(z) // 2 * 2
    chunks = z[:S].reshape(-1, 2, *z.shape[1:]).swapaxes(1, 2).astype(np.float16)

    def write(f):
        with h5py.File(f, "w") as file:
            file.create_dataset("latents", data=chunks, chunks=(1, *chunks.shape[1:]))

    if os.path.isabs(key) or ".." in key.split("/"):
        raise ValueError(f"the name {key} leads out of {folder}: rename that recording")
    write_atomically(
        os.path.join(folder, key + SUFFIX),
        lambda f: np.savez(f, **{k: v[: S - 1] for k, v in labels.items()}),
    )
    write_atomically(os.path.join(folder, f"{key}.h5"), write)


def wrong_manifest(manifest):
    """Why a dictionary with metadata and splits is not one of prepare.manifest, or ''."""
    metadata, splits = manifest["metadata"], manifest["splits"]
    if not isinstance(metadata, dict) or not isinstance(splits, dict):
        return "its metadata or its splits have no names"
    names = ("mean", "std", "channels", "size", "steps_per_chunk", "fingerprint")
    if missing := [k for k in names if k not in metadata]:
        return f"no {missing[0]} in its metadata"
    numbers = [metadata["mean"], metadata["std"]]
    if not all(isinstance(x, (int, float)) and np.isfinite(x) for x in numbers) or numbers[1] <= 0:
        return f"mean {numbers[0]!r} and std {numbers[1]!r} standardise nothing"
    if {*splits} != {"train", "validation", "test"}:
        return f"its splits are {', '.join(splits) or 'none'}, not train, validation and test"
    for entries in splits.values():
        for e in entries:
            if not isinstance(e, dict) or not {"path", "shape", "bytes"} <= e.keys():
                return f"an entry of its splits is {str(e)[:80]}: no path, shape and bytes"
            if len(e["shape"]) != 5:
                return f"{e['path']} has shape {e['shape']}, not five numbers"
    return ""


def pack_codes(indices, K):
    """Indices (..., slots) below K -> one number (...) below K^slots, the first slot the most
    significant."""
    return sum(indices[..., i] * K ** (indices.shape[-1] - 1 - i) for i in range(indices.shape[-1]))


def unpack_codes(ids, K, slots):
    """The inverse of pack_codes."""
    return torch.stack([ids // K ** (slots - 1 - i) % K for i in range(slots)], dim=-1)


# --- from video ---


def latent_frames(record, fps, crop_size, part=64):
    """A recording for a video VAE: (frames, labels), frames a generator of uint8 (n, 4, 3, crop,
    crop), n latent steps. Labels say what happened between the steps, after the last frame of one
    up to that of the next: yaw -1 (left), 0 (under 3 degrees), 1 (right), and whether forward was
    held. Raises like read_frames, and ValueError where lines and frames do not belong together."""
    with Slice(record.shard, *record.members["mp4"]) as f:
        times, ticks = mp4_times(f), read_ticks(record)
        frame_rate = video_rate(f, times)
    reader = ClipReader(frames_per_clip=2, fps=ticks.rate, frames_per_step=1)
    reader.starts(ticks, len(times), frame_rate)
    ratio = reader.frames_per_line(ticks, len(times), frame_rate)
    lines = min(len(ticks.motion), len(times) // ratio)
    shown = np.arange(lines * fps / ticks.rate - 1e-9) * ticks.rate / fps
    shown = (
        np.floor(shown[: len(shown) // VAE_FRAMES * VAE_FRAMES]).astype(int).reshape(-1, VAE_FRAMES)
    )
    if len(shown) < 2:
        raise ValueError(f"{lines} usable lines are less than two latent steps")
    actions, _ = step_actions(ticks, shown[:, -1], 36)
    yaw, forward = (actions[:, ACTION_SPACES[36].index(k)] for k in ("yaw_diff", "key.w"))

    def frames():
        with Slice(record.shard, *record.members["mp4"]) as f:
            for rows in (shown[i : i + part] for i in range(0, len(shown), part)):
                x = read_frames(f, times, rows.ravel() * ratio, crop_size)
                top, left = (x.shape[1] - crop_size) // 2, (x.shape[2] - crop_size) // 2
                x = x[:, top : top + crop_size, left : left + crop_size].transpose(0, 3, 1, 2)
                yield x.reshape(-1, VAE_FRAMES, *x.shape[1:])

    return frames(), {
        "yaw": (np.sign(yaw) * (np.abs(yaw) > np.radians(3))).astype(int),
        "forward": forward.astype(int),
    }


def open_vae(spec, dtype):
    kind, _, folder = spec.partition(":")
    if kind != "diffusers" or not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(
            f"--vae {spec}: give diffusers:FOLDER, with config.json and weights of AutoencoderKLWan"
            " or AutoencoderKLCogVideoX"
        )
    try:
        import diffusers
    except ImportError as e:
        raise ValueError("--vae needs: pip install diffusers") from e
    with open(os.path.join(folder, "config.json")) as f:
        name = json.load(f).get("_class_name")
    if name not in ("AutoencoderKLWan", "AutoencoderKLCogVideoX"):
        raise ValueError(
            f"--vae {spec} is a {name}: AutoencoderKLWan and AutoencoderKLCogVideoX are known"
        )
    return (
        getattr(diffusers, name)
        .from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
        .eval()
    )


@torch.inference_mode()
def vae_latents(vae, frames):
    """uint8 (B, 8, 3, H, W), each chunk alone -> (B, 2, C, h, w), the means. Wan gives the first
    frame a latent of its own, which a repeated frame takes, so that 4 frames go into each."""
    x = (frames.transpose(1, 2).float() / 127.5 - 1).to(next(vae.parameters()))  # (B, 3, 8, H, W)
    wan = type(vae).__name__ == "AutoencoderKLWan"
    z = vae.encode(torch.cat([x[:, :, :1], x], dim=2) if wan else x).latent_dist.mode()
    return z[:, :, -2:].transpose(1, 2).float()


@torch.inference_mode()
def vae_frames(vae, z):
    """The inverse of vae_latents: (B, 2, C, h, w) -> frames (B, 8, 3, H, W) in [0, 1]. Wan's lone
    first frame, that vae_latents dropped, is stood in for by the first latent. A VAE that makes
    fewer frames of two latents gives its last ones."""
    x = z.transpose(1, 2).to(next(vae.parameters()))  # (B, C, 2, h, w)
    wan = type(vae).__name__ == "AutoencoderKLWan"
    frames = vae.decode(torch.cat([x[:, :, :1], x], dim=2) if wan else x).sample[
        :, :, -2 * VAE_FRAMES :
    ]
    return (frames.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def check_metrics(metrics):
    """Raises ValueError, before anything takes time, for what `decoded_scores` needs and lacks."""
    if not importlib.util.find_spec("torchmetrics"):
        raise ValueError("--vae needs: pip install torchmetrics")
    if "lpips" in metrics and not importlib.util.find_spec("torchvision"):
        raise ValueError("--metrics lpips needs: pip install torchvision (or leave lpips out)")


@torch.inference_mode()
def decoded_scores(model, batches, vae, metrics):
    """How well the frames of a predicted step match those of the true one, both decoded with the
    step before it by the user's VAE: {"psnr": (prediction, copy of the step before), ...} means
    over batches of windows z (B, T, C, H, W). metrics: psnr, ssim, lpips."""
    check_metrics(metrics)
    import torchmetrics.image as tm

    makers = {
        "psnr": lambda: tm.PeakSignalNoiseRatio(data_range=1.0),
        "ssim": lambda: tm.StructuralSimilarityIndexMeasure(data_range=1.0),
        "lpips": lambda: tm.LearnedPerceptualImagePatchSimilarity(normalize=True),
    }
    device = model.scale.device
    found = {name: [makers[name]().to(device) for _ in range(2)] for name in metrics}
    for z in batches:
        z = z.float().to(device)
        # vectors, not indices: a continuous model has none, a run in its warm-up does not use them
        after = model.decode(z[:, :-1], model.encode(z)[-1])
        for t in range(0, z.shape[1] - 1, 2):  # steps 2i and 2i + 1 were encoded together
            pairs = [torch.stack([z[:, t], x], dim=1) for x in (z[:, t + 1], after[:, t], z[:, t])]
            true, predicted, copied = (
                vae_frames(vae, p)[:, -VAE_FRAMES:].flatten(0, 1) for p in pairs
            )
            for own, copy in found.values():
                own.update(predicted, true)
                copy.update(copied, true)
    return {name: tuple(m.compute().item() for m in pair) for name, pair in found.items()}


def encode_latents(records, bad, vae, out, fps, crop_size, batch_size, device):
    """Write KEY.h5 for each recording, batch_size chunks at once; those that are there are kept.
    Prints what cannot be read, beside bad, [(file, key, reason)]; ValueError if that is
    everything."""
    done = 0
    for record in tqdm(records, unit="recording", desc="encode"):
        if os.path.exists(os.path.join(out, record.key + ".h5")):
            done += 1
            continue
        try:
            frames, labels = latent_frames(record, fps, crop_size)
            z = []
            for x in frames:
                chunks = torch.from_numpy(x[: len(x) // 2 * 2]).reshape(
                    -1, 2 * VAE_FRAMES, *x.shape[2:]
                )
                z += [
                    vae_latents(vae, c.to(device)).flatten(0, 1).cpu()
                    for c in chunks.split(batch_size)
                ]
            write_latents(out, record.key, torch.cat(z).numpy(), labels)
            done += 1
        except READ_ERRORS as e:
            if disk_failed(e):
                raise OSError(disk_sentence(f"{record.shard} {record.key}", e)) from e
            bad.append((record.shard, record.key, f"{type(e).__name__}: {e}"))
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")
    if bad and not done:
        raise ValueError(f"nothing could be encoded for {out}")
