"""Video-VAE latents with known actions in the guide's format: a synthetic world, or ViZDoom play
through a small autoencoder.

    python -m prepare.latents --out latents                                    # sprite world, (16, 2, 64, 64) a chunk
    python -m prepare.latents --out latents-play --data 'demo/*/*.tar'         # recordings of prepare.demo, or any VPT shards

Writes OUT/KEY.h5, dataset `latents` [chunks, 16, 2, size, size] float16, and OUT/KEY.actions.npz,
the truth between steps t and t+1.

Sprite world: on a torus, noise and a patterned square that each step moves by one of nine moves
(patches of 4 down and right, each -1, 0 or 1), `move` in the npz. --distractor adds another
pattern: `steady` keeps one velocity a file, `random` moves as the first does, independently, which
no model without labels can tell from it.

Play: --fps frames a second; 4 of them (half a second) at 8 times the size make one step of 16
channels, alone, so no step knows the next (a video VAE's second step of a chunk may). The
autoencoder, three strided convolutions and back, is trained here on those frames: it stands in for
a video VAE at the same shapes, no more. The npz has `yaw` (-1 left, 0, 1 right; 0 within 3 degrees)
and `forward` (key w)."""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import one_sentence
from files.disk import READ_ERRORS, disk_failed
from files.latents import VAE_FRAMES, find_files, latent_frames, write_latents
from files.shards import expand, index_shards

PATCH, CHANNELS = 4, 16


# --- sprite world ---


def pattern(number, size):
    """What moves: (16, size/4, size/4), unit variance times four, smooth over pixels so that it has
    structure; always the same."""
    noise = torch.from_numpy(
        np.random.default_rng([77, number]).standard_normal((1, CHANNELS, 4, 4)).astype(np.float32)
    )
    return 2 * F.interpolate(noise, size=(size // 4, size // 4), mode="nearest")[0].numpy()


def sprite_file(rng, steps, size, noise, distractor):
    """(z (steps, 16, size, size), moves (steps - 1,) 0..8: 3 * (down + 1) + right + 1)."""
    z = noise * rng.standard_normal((steps, CHANNELS, size, size), dtype=np.float32)
    walks = [rng.integers(-1, 2, (steps - 1, 2))]
    if distractor != "none":
        walks.append(
            rng.integers(-1, 2, (steps - 1, 2))
            if distractor == "random"
            else np.tile(rng.integers(-1, 2, 2), (steps - 1, 1))
        )
    for number, walk in enumerate(walks):
        at = rng.integers(0, size // PATCH, 2) + np.concatenate(
            [np.zeros((1, 2), int), walk.cumsum(0)]
        )
        canvas = np.zeros((CHANNELS, size, size), np.float32)
        canvas[:, : size // 4, : size // 4] = pattern(number, size)
        for t, (y, x) in enumerate(PATCH * at):
            z[t] += np.roll(canvas, (y, x), (1, 2))
    return z, 3 * (walks[0][:, 0] + 1) + walks[0][:, 1] + 1


# --- play ---


class Autoencoder(nn.Module):
    """Four frames (B, 12, 8s, 8s) in [-1, 1] <-> one latent step (B, 16, s, s) of unit variance
    (after `fit`)."""

    def __init__(self, width=48):
        super().__init__()
        w, frames = width, 3 * VAE_FRAMES
        down = [nn.Conv2d(a, b, 4, 2, 1) for a, b in ((frames, w), (w, 2 * w), (2 * w, 2 * w))]
        up = [
            nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in ((2 * w, 2 * w), (2 * w, w), (w, frames))
        ]
        layers = [*down, nn.Conv2d(2 * w, CHANNELS, 1)], [nn.Conv2d(CHANNELS, 2 * w, 3, 1, 1), *up]
        self.down, self.up = (
            nn.Sequential(*sum(([x, nn.GELU()] for x in part), [])[:-1]) for part in layers
        )

    def forward(self, x):
        return self.up(self.down(x))


def fit(model, frames, steps, batch, seed):
    """Train the autoencoder on uint8 frames (S, 12, H, W); returns its mean squared error on pixels
    in [-1, 1]."""
    rng, optimizer = (
        np.random.default_rng(seed),
        torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), unit="step", desc="autoencoder")):
        x = (
            torch.from_numpy(
                frames[np.sort(rng.choice(len(frames), min(batch, len(frames)), replace=False))]
            ).float()
            / 127.5
            - 1
        )
        z = model.down(x)
        error = F.mse_loss(model.up(z), x)
        (
            error + 1e-3 * (z.square().mean() - 1).square()
        ).backward()  # keeps the latents near unit scale
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(mse=f"{error.item():.4f}")
    return error.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder for the H5 files")
    parser.add_argument(
        "--size", type=int, default=64, help="height and width of the latents, a multiple of 16"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the synthetic world, or of the autoencoder"
    )
    parser.add_argument("--files", type=int, default=20, help="sprite world: files")
    parser.add_argument(
        "--chunks", type=int, default=64, help="sprite world: chunks of two steps a file"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="sprite world: std of the noise (the sprite's is 2)",
    )
    parser.add_argument(
        "--distractor",
        default="none",
        choices=["none", "steady", "random"],
        help="sprite world: something else that moves",
    )
    parser.add_argument("--data", nargs="+", help="play: VPT shards")
    parser.add_argument(
        "--fps", type=float, default=8.0, help="play: frames a second, four of which make a step"
    )
    parser.add_argument(
        "--ae_steps", type=int, default=1500, help="play: training steps of the autoencoder"
    )
    parser.add_argument("--ae_batch", type=int, default=16, help="play: latent steps in a batch")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    if args.size % 16 or args.size < 16:
        raise ValueError(f"--size {args.size} is no multiple of 16")
    for name in ("files", "chunks", "fps", "ae_steps", "ae_batch"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name):g} is too small")
    if args.noise < 0:
        parser.error(f"--noise {args.noise:g} is below 0")
    if os.path.isdir(args.out) and find_files(args.out)[0]:
        raise ValueError(f"{args.out} holds H5 files already: give another --out, or remove them")
    torch.manual_seed(args.seed)
    if not args.data:
        for i in tqdm(range(args.files), unit="file", desc="sprite world"):
            rng = np.random.default_rng([args.seed, i])
            z, moves = sprite_file(rng, 2 * args.chunks, args.size, args.noise, args.distractor)
            write_latents(args.out, f"sprite-{i:04d}", z, {"move": moves})
        print(
            f"{args.out}: {args.files} files of {2 * args.chunks} steps of (16, {args.size},"
            f" {args.size}); truth: move, 9 values"
        )
    else:
        records, bad = index_shards(expand(args.data))
        for file, key, reason in bad:
            print(f"left out: {file} {key}: {reason}")
        made = {}
        for r in tqdm(records, unit="recording", desc="frames"):
            if r.key in made:
                raise ValueError(
                    f"two shards hold a recording {r.key}: make latents of them in different --out"
                    " folders"
                )
            try:
                frames, labels = latent_frames(r, args.fps, 8 * args.size)
                steps = np.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in frames])
            except READ_ERRORS as e:
                if disk_failed(e):
                    raise
                print(f"left out: {r.shard} {r.key}: {type(e).__name__}: {e}")
                continue
            made[r.key] = steps, labels
        if not made:
            raise ValueError(f"no usable recording in {' '.join(args.data)}")
        model = Autoencoder()
        error = fit(
            model,
            np.concatenate([x for x, _ in made.values()]),
            args.ae_steps,
            args.ae_batch,
            args.seed,
        )
        with torch.inference_mode():
            for key, (frames, labels) in tqdm(made.items(), unit="recording", desc="latents"):
                z = [
                    model.down(torch.from_numpy(x).float() / 127.5 - 1)
                    for x in np.array_split(frames, max(len(frames) // 16, 1))
                ]
                write_latents(args.out, key, torch.cat(z).numpy(), labels)
        shares = {
            k: np.unique(np.concatenate([v[k] for _, v in made.values()]), return_counts=True)
            for k in ("yaw", "forward")
        }
        print(
            f"{args.out}: {len(made)} recordings, {sum(len(x) for x, _ in made.values())} steps;"
            f" pixel MSE of the autoencoder {error:.4f}"
        )
        print(
            "truth:",
            "; ".join(
                f"{k} " + ", ".join(f"{v:g}: {c / n.sum():.0%}" for v, c in zip(x, n))
                for k, (x, n) in shares.items()
            ),
        )
