"""Makes video-VAE latents with known actions, in the guide's format: a synthetic world, or ViZDoom
play through a small autoencoder.

    # sprite world, chunks of (16, 2, 64, 64)
    python -m prepare.latents --out latents
    # recordings of prepare.demo, or any VPT shards
    python -m prepare.latents --out latents-play --data 'demo/*/*.tar'

Writes OUT/KEY.h5 with the dataset `latents` [chunks, 16, 2, size, size] in float16, and
OUT/KEY.actions.npz with the true action between steps t and t+1.

Sprite world: noise, and a patterned square on a torus. In each step the square makes one of nine
moves (down and right, each -1, 0 or 1 patches of 4), which the npz calls `move`. --distractor adds
another pattern. With `steady` it keeps one velocity in a file. With `random` it moves as the first
does, independently: no model without labels can tell which of the two the labels mean.

Play: frames at --fps and 8 times the size. Four of them (half a second) make one step of 16
channels, without the frames of other steps. So no step knows the next one, as the second step of a
chunk of a video VAE may. The autoencoder, three strided convolutions and back, is trained here on
those frames. It only stands in for a video VAE of the same shapes. The npz contains `yaw` (-1 left,
0, 1 right; 0 within 3 degrees) and `forward` (key w)."""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import short_excepthook
from files.disk import READ_ERRORS, is_storage_error
from files.latents import VAE_FRAMES, find_files, latent_frames, write_latents
from files.progress import tqdm
from files.shards import expand, index_shards

PATCH = 4  # latent pixels of a move
CHANNELS = 16


# --- sprite world ---


def pattern(number, size):
    """What moves: (16, size/4, size/4), always the same. Its values are normal with std 2, and
    blocks of pixels have the same value, so it has structure."""
    # 4x4 random vectors, each enlarged to a block
    rng = np.random.default_rng([77, number])
    noise = torch.from_numpy(rng.standard_normal((1, CHANNELS, 4, 4)).astype(np.float32))
    return 2 * F.interpolate(noise, size=(size // 4, size // 4), mode="nearest")[0].numpy()


def sprite_file(rng, steps, size, noise, distractor):
    """(z (steps, 16, size, size), moves (steps - 1,) 0..8: 3 * (down + 1) + right + 1)."""
    # noise everywhere, and the moves of the square
    z = noise * rng.standard_normal((steps, CHANNELS, size, size), dtype=np.float32)
    moves = rng.integers(-1, 2, (steps - 1, 2))  # down, right

    # how the other pattern moves, if there is one
    walks = [moves]
    if distractor == "random":
        walks.append(rng.integers(-1, 2, (steps - 1, 2)))
    elif distractor == "steady":
        walks.append(np.tile(rng.integers(-1, 2, 2), (steps - 1, 1)))

    # draw: a pattern starts anywhere and is rolled around the torus
    for number, walk in enumerate(walks):
        start = rng.integers(0, size // PATCH, 2)
        path = start + np.concatenate([np.zeros((1, 2), int), walk.cumsum(0)])
        canvas = np.zeros((CHANNELS, size, size), np.float32)
        canvas[:, : size // 4, : size // 4] = pattern(number, size)
        for t, (y, x) in enumerate(PATCH * path):
            z[t] += np.roll(canvas, (y, x), (1, 2))
    return z, 3 * (moves[:, 0] + 1) + moves[:, 1] + 1


def write_sprites(out, files, steps, size, noise, distractor, seed):
    """Write files of the sprite world and print a summary."""
    for i in tqdm(range(files), unit="file", desc="sprite world"):
        rng = np.random.default_rng([seed, i])
        z, moves = sprite_file(rng, steps, size, noise, distractor)
        write_latents(out, f"sprite-{i:04d}", z, {"move": moves})
    print(f"{out}: {files} files of {steps} steps of (16, {size}, {size}); truth: move, 9 values")


# --- play ---


class Autoencoder(nn.Module):
    """Four frames (B, 12, 8s, 8s) in [-1, 1] <-> one latent step (B, 16, s, s), of unit variance
    after `fit`."""

    def __init__(self, width=48):
        super().__init__()
        frames = 3 * VAE_FRAMES
        wide = 2 * width

        # in this order, because a seed gives a layer its weights by its turn
        down1 = nn.Conv2d(frames, width, 4, 2, 1)
        down2 = nn.Conv2d(width, wide, 4, 2, 1)
        down3 = nn.Conv2d(wide, wide, 4, 2, 1)
        up3 = nn.ConvTranspose2d(wide, wide, 4, 2, 1)
        up2 = nn.ConvTranspose2d(wide, width, 4, 2, 1)
        up1 = nn.ConvTranspose2d(width, frames, 4, 2, 1)
        to_latent = nn.Conv2d(wide, CHANNELS, 1)
        from_latent = nn.Conv2d(CHANNELS, wide, 3, 1, 1)

        # 8 times smaller, then 16 channels, and back
        gelu = nn.GELU()
        self.down = nn.Sequential(down1, gelu, down2, gelu, down3, gelu, to_latent)
        self.up = nn.Sequential(from_latent, gelu, up3, gelu, up2, gelu, up1)

    def forward(self, x):
        return self.up(self.down(x))


def normalised(frames):
    """uint8 frames -> float in [-1, 1]."""
    return torch.from_numpy(frames).float() / 127.5 - 1


def fit(model, frames, steps, batch, seed):
    """Train the autoencoder on uint8 frames (S, 12, H, W). Returns its mean squared error on pixels
    in [-1, 1]."""
    # one cycle of the learning rate
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)

    # a small data set may be smaller than a batch
    batch = min(batch, len(frames))
    bar = tqdm(range(steps), unit="step", desc="autoencoder")
    for _ in bar:
        # random steps of all recordings
        rows = np.sort(rng.choice(len(frames), batch, replace=False))
        x = normalised(frames[rows])
        z = model.down(x)
        error = F.mse_loss(model.up(z), x)

        # the second term keeps the latents near unit variance
        unit_scale = (z.square().mean() - 1).square()
        (error + 1e-3 * unit_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(mse=f"{error.item():.4f}")
    return error.item()


def read_play(data, fps, size):
    """{key: (uint8 frames (steps, 12, size, size), labels)} of VPT shards. Prints what is left
    out."""
    records, bad = index_shards(expand(data))
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")

    # frames and labels of every recording; one that cannot be read is left out and printed
    recordings = {}
    for r in tqdm(records, unit="recording", desc="frames"):
        # files are named by their key: the second would overwrite the first
        if r.key in recordings:
            raise ValueError(
                f"two shards hold a recording {r.key}: make latents of them in different --out"
                " folders"
            )
        try:
            frames, labels = latent_frames(r, fps, size)
            steps = np.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in frames])
        except READ_ERRORS as e:
            # a damaged recording is left out; a disk that fails ends the run
            if is_storage_error(e):
                raise
            print(f"left out: {r.shard} {r.key}: {type(e).__name__}: {e}")
            continue
        recordings[r.key] = steps, labels
    if not recordings:
        raise ValueError(f"no usable recording in {' '.join(data)}")
    return recordings


def label_shares(name, recordings):
    """How often each value of a label occurs: "yaw -1: 30%, 0: 41%, 1: 29%"."""
    # over all recordings together
    values = np.concatenate([labels[name] for _, labels in recordings.values()])
    numbers, counts = np.unique(values, return_counts=True)
    shares = [f"{number:g}: {count / len(values):.0%}" for number, count in zip(numbers, counts)]
    return f"{name} " + ", ".join(shares)


def write_play(out, data, fps, size, ae_steps, ae_batch, seed):
    """Train an autoencoder on the frames of VPT shards, write their latents, print a summary."""
    # one autoencoder for all recordings
    recordings = read_play(data, fps, 8 * size)
    model = Autoencoder()
    every = np.concatenate([frames for frames, _ in recordings.values()])
    error = fit(model, every, ae_steps, ae_batch, seed)

    # latents, about sixteen steps at a time
    with torch.inference_mode():
        for key, (frames, labels) in tqdm(recordings.items(), unit="recording", desc="latents"):
            parts = np.array_split(frames, max(len(frames) // 16, 1))
            z = torch.cat([model.down(normalised(part)) for part in parts])
            write_latents(out, key, z.numpy(), labels)

    # what was made, and how often each label occurs
    print(
        f"{out}: {len(recordings)} recordings, {len(every)} steps; pixel MSE of the autoencoder"
        f" {error:.4f}"
    )
    print("truth:", "; ".join(label_shares(name, recordings) for name in ("yaw", "forward")))


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder for the H5 files")
    parser.add_argument("--size", type=int, default=64, help="height and width, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0, help="of the world, or of the autoencoder")
    group = parser.add_argument_group("sprite world")
    group.add_argument("--files", type=int, default=20, help="number of files")
    group.add_argument("--chunks", type=int, default=64, help="chunks of two steps a file")
    group.add_argument("--noise", type=float, default=0.05, help="its std (the sprite's is 2)")
    kinds = ["none", "steady", "random"]
    group.add_argument("--distractor", default="none", choices=kinds, help="what else moves")
    group = parser.add_argument_group("play")
    group.add_argument("--data", nargs="+", help="VPT shards")
    group.add_argument("--fps", type=float, default=8.0, help="frames a second, four a step")
    group.add_argument("--ae_steps", type=int, default=1500, help="autoencoder: training steps")
    group.add_argument("--ae_batch", type=int, default=16, help="autoencoder: steps in a batch")
    args = parser.parse_args()
    sys.excepthook = short_excepthook

    # --- checks: before anything is made ---
    # patches of the sprite world and of train_lam.py must fit
    if args.size % 16 or args.size < 16:
        raise ValueError(f"--size {args.size} is no multiple of 16")
    # numbers that must be above 0; the noise may be 0
    for name in ("files", "chunks", "fps", "ae_steps", "ae_batch"):
        value = getattr(args, name)
        if value <= 0:
            parser.error(f"--{name} {value:g} is too small: give more than 0")
    if args.noise < 0:
        parser.error(f"--noise {args.noise:g} is below 0")

    # files of an earlier run would be mixed with those of this one
    if os.path.isdir(args.out) and find_files(args.out)[0]:
        raise ValueError(f"{args.out} holds H5 files already: give another --out, or remove them")

    # --- make ---
    # the seed of the autoencoder; the sprite world has generators of its own
    torch.manual_seed(args.seed)
    if args.data:
        write_play(
            args.out, args.data, args.fps, args.size, args.ae_steps, args.ae_batch, args.seed
        )
    else:
        steps = 2 * args.chunks
        write_sprites(
            args.out, args.files, steps, args.size, args.noise, args.distractor, args.seed
        )
