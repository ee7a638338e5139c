"""Video-VAE latents in HDF5 files as windows of steps: what train_lam.py and eval_lam.py read.

KEY.h5 holds one dataset (chunks, C, T, H, W), any name, HDF5 chunking or compression, float16 or
float32; chunk n holds the latent steps n*T to n*T + T-1 (T = 2: 8 frames, merged 4 in time). Beside
it may lie KEY.actions.npz, what truly happened: integer arrays of length chunks*T - 1, entry t
between steps t and t+1, one or more labels by name; training never sees them. `python -m
prepare.manifest` checks and splits a folder."""

import functools
import json
import os
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_atomically
from data import READ_ERRORS, Order, Slice, collate, leave_signals, read_ticks
from files.streams import disk_failed, disk_sentence
from files.vpt import ACTION_SPACES, ClipReader, mp4_times, read_frames, step_actions

VAE_FRAMES = 4  # that a video VAE merges in time


class LatentFile(NamedTuple):
    path: str
    steps: int
    shape: tuple  # of its dataset


def open_dataset(path):
    """The one dataset of an H5 file. Raises ValueError if there is none or more than one, OSError
    if it is no H5 file."""
    found, file = [], h5py.File(path, "r")
    try:
        file.visititems(
            lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None
        )
        [file[name].dtype for name in found]  # read here, where it is known what it raises
    except (RuntimeError, LookupError, TypeError) as e:  # h5py has no exception of its own
        raise OSError(f"{path} is damaged: {str(e) or type(e).__name__}") from e
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} datasets ({', '.join(found[:4])})" if found else "no dataset"
        )
    return file[found[0]]


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
        x = (
            data[first // T : -(-stop // T)]
            .swapaxes(1, 2)
            .reshape(-1, data.shape[1], *data.shape[3:])
        )
    except OSError as e:
        where = f"{path}, steps {first} to {stop - 1}"
        raise ValueError(
            f"{where}, cannot be read ({str(e).splitlines()[0]}): run prepare.manifest again, which"
            " leaves it out"
        ) from e
    return np.ascontiguousarray(x[first % T : first % T + stop - first], dtype=np.float32)


def read_labels(path, steps):
    """{name: (steps - 1,) int64} from KEY.actions.npz beside KEY.h5; {} without one. Raises
    ValueError for another length."""
    truth = os.path.splitext(path)[0] + ".actions.npz"
    if not os.path.exists(truth):
        return {}
    with np.load(truth) as arrays:
        labels = {k: arrays[k].astype(np.int64) for k in sorted(arrays.files)}
    if wrong := [k for k, v in labels.items() if v.shape != (steps - 1,)]:
        raise ValueError(
            f"{truth}: {wrong[0]} has shape {labels[wrong[0]].shape}, {steps} steps need"
            f" ({steps - 1},)"
        )
    return labels


def open_manifest(manifest_path, data_dir=None):
    """(metadata, {"train", "validation", "test": [LatentFile]}) of prepare.manifest; paths are
    relative to data_dir, by default the manifest's folder. Raises FileNotFoundError or ValueError
    for files that are gone or no longer as they were."""
    if not os.path.exists(manifest_path):
        raise FileNotFoundError(
            f"no {manifest_path}; make it with: python -m prepare.manifest {data_dir or 'DIR'}"
        )
    with open(manifest_path) as f:
        manifest = json.load(f)
    if not isinstance(manifest, dict) or not {"metadata", "splits"} <= manifest.keys():
        raise ValueError(
            f"{manifest_path} is no manifest of ours: make it again with python -m prepare.manifest"
        )
    folder, splits = data_dir or os.path.dirname(os.path.abspath(manifest_path)), {}
    for split, entries in manifest["splits"].items():
        splits[split] = []
        for e in entries:
            path = os.path.join(folder, e["path"])
            if not os.path.exists(path) or os.path.getsize(path) != e["bytes"]:
                raise ValueError(
                    f"{path} is {'not as it was' if os.path.exists(path) else 'gone'}: run python"
                    " -m prepare.manifest again"
                )
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

    write_atomically(
        os.path.join(folder, f"{key}.actions.npz"),
        lambda f: np.savez(f, **{k: v[: S - 1] for k, v in labels.items()}),
    )
    write_atomically(os.path.join(folder, f"{key}.h5"), write)


class Latents(torch.utils.data.Dataset):
    """Windows of `length` steps. An item is (epoch, index, file number, first step); the dict has z
    (T, C, H, W), shift (T-1, 2) uniform in [0, 1) by (seed, epoch, index), labels (T-1, L) int64
    where every file has the same ones (names in `.labels`), and key."""

    def __init__(self, files, length, seed=0):
        self.files, self.length, self.seed = files, length, seed
        if not files:
            raise ValueError(
                "the manifest has no files in this split: choose another, or make the manifest"
                " again with other ratios"
            )
        self.starts = np.array([max(f.steps - length + 1, 0) for f in files])
        if not self.starts.sum():
            raise ValueError(f"no file has the {length} steps of a window: lower --sequence_length")
        self.truth = [read_labels(f.path, f.steps) for f in files]
        self.labels = (
            sorted(self.truth[0]) if len({tuple(sorted(t)) for t in self.truth}) == 1 else []
        )

    def locate(self, u):
        """(file number, first step) at place u in [0, 1) of all possible windows, in the order of
        the files."""
        ends = self.starts.cumsum()
        at = min(int(u * ends[-1]), int(ends[-1]) - 1)
        number = int(np.searchsorted(ends, at, side="right"))
        return number, at - int(ends[number] - self.starts[number])

    def __getitem__(self, item):
        epoch, index, number, first = item
        path, stop = self.files[number].path, first + self.length
        clip = {
            "z": torch.from_numpy(read_steps(path, first, stop)),
            "key": f"{os.path.basename(path)}@{first}",
            "bad": [],
        }
        clip["shift"] = torch.from_numpy(
            np.random.default_rng([self.seed, epoch, index]).random(
                (self.length - 1, 2), dtype=np.float32
            )
        )
        if self.labels:
            clip["labels"] = torch.from_numpy(
                np.stack([self.truth[number][k][first : stop - 1] for k in self.labels], axis=1)
            )
        return clip

    def windows(self, batch_size, limit, rank=0, world=1):
        """Batches of items for validation: windows that do not overlap, at most `limit`, from all
        files, in a fixed random order; the batches do not depend on the number of ranks that share
        them, and none has a single window unless there is only one."""
        every = [
            (n, k)
            for n, f in enumerate(self.files)
            for k in range(0, f.steps - self.length + 1, self.length)
        ]
        items = [
            (0, i, *every[j])
            for i, j in enumerate(np.random.default_rng(0).permutation(len(every))[:limit])
        ]
        parts = np.array_split(np.arange(len(items)), max(round(len(items) / batch_size), 1))
        return [[items[i] for i in part] for part in parts if len(part)][rank::world]


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
    """Endless DataLoader from batch `itr` of `epoch` on: {"z" (B, T, C, H, W) float32, "shift",
    "labels"?, "key"}; or of given `items`. The order is a pure function of (seed, epoch) and the
    size of an epoch, by default one pass of windows that do not overlap."""
    batches = batches_per_epoch or max(
        sum(f.steps // dataset.length for f in dataset.files) // (batch_size * world), 1
    )
    order = (
        items if items is not None else Order(dataset, batch_size, batches, epoch, itr, rank, world)
    )
    options = {
        "persistent_workers": num_workers > 0 and items is None,
        "worker_init_fn": leave_signals,
        "pin_memory": pin_memory,
    }
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=order, num_workers=num_workers, collate_fn=collate, **options
    )


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
    reader = ClipReader(frames_per_clip=2, fps=20, frames_per_step=1)
    reader.starts(ticks, len(times))
    ratio = reader.frames_per_line(ticks, len(times))
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


@torch.inference_mode()
def decoded_scores(model, batches, vae, metrics):
    """How well the frames of a predicted step match those of the true one, both decoded with the
    step before it by the user's VAE: {"psnr": (prediction, copy of the step before), ...} means
    over batches of windows z (B, T, C, H, W). metrics: psnr, ssim, lpips."""
    try:
        import torchmetrics.image as tm
    except ImportError as e:
        raise ValueError("--vae needs: pip install torchmetrics") from e
    makers = {
        "psnr": lambda: tm.PeakSignalNoiseRatio(data_range=1.0),
        "ssim": lambda: tm.StructuralSimilarityIndexMeasure(data_range=1.0),
        "lpips": lambda: tm.LearnedPerceptualImagePatchSimilarity(normalize=True),
    }
    device = model.scale.device
    found = {name: [makers[name]().to(device) for _ in range(2)] for name in metrics}
    for z in batches:
        z = z.float().to(device)
        after = model.decode(
            z[:, :-1], model.encode(z)[0 if model.quantizer is not None else 1]
        )  # a continuous model's codes are z_e
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
