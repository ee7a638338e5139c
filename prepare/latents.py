"""Makes video-VAE latents with known actions, in the guide's format: a synthetic world, or ViZDoom
play through a small autoencoder.

    # sprite world, chunks of (16, 2, 64, 64)
    python -m prepare.latents --out latents
    # a room that a turning camera sees, as 8 channels of 32 x 48
    python -m prepare.latents --out latents --world camera --size 32 48 --channels 8
    # recordings of prepare.demo, or any VPT shards
    python -m prepare.latents --out latents-play --data 'demo/*/*.tar'

Writes OUT/KEY.h5 with the dataset `latents` [chunks, channels, 2, height, width] in float16, and
OUT/KEY.actions.npz with the true action between steps t and t+1.

Worlds, all with noise on top. In the first four the npz calls the action `move`: one of nine, down
and right, each -1, 0 or 1 times the length of a move, around the edges:
  grid      a patterned square moves by whole patches of 4
  half      it moves by half a patch
  together  two squares make the same moves, from places of their own
  roll      the whole picture moves by whole patches; each file has a picture of its own
  zoom      the picture of a file grows by a quarter, stays, or shrinks: `zoom` 1, 0, -1
  camera    a textured room, another one in each file, seen by a camera that turns 0, 10 or 20
            degrees to the left (negative) or right: `yaw` -2 to 2

--distractor adds another pattern to the squares. With `steady` it keeps one velocity in a file.
With `random` it moves as the first does, independently: no model without labels can tell which of
the two the labels mean.

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
CHANNELS = 16  # of play
WORLDS = ["grid", "half", "together", "roll", "zoom", "camera"]
VALUES = {"move": 9, "zoom": 3, "yaw": 5}  # of the true actions
ROOM = np.array([1.0, 0.6, 1.0])  # half of its width, height and length


# --- squares that move ---


def pattern(number, channels, size):
    """What moves: (channels, height/4, width/4), always the same. Its values are normal with std
    2, and blocks of pixels have the same value, so it has structure."""
    # 4x4 random vectors, each enlarged to a block
    rng = np.random.default_rng([77, number])
    noise = torch.from_numpy(rng.standard_normal((1, channels, 4, 4)).astype(np.float32))
    quarter = (size[0] // 4, size[1] // 4)
    return 2 * F.interpolate(noise, size=quarter, mode="nearest")[0].numpy()


def random_moves(rng, steps):
    """(moves (steps - 1, 2): down and right, each -1, 0 or 1; their labels {"move": 0..8})."""
    moves = rng.integers(-1, 2, (steps - 1, 2))
    return moves, {"move": 3 * (moves[:, 0] + 1) + moves[:, 1] + 1}


def path_of(start, moves, length):
    """Places (steps, 2) in pixels: moves (steps - 1, 2) of `length` pixels, from start (2,)."""
    return start + length * np.concatenate([np.zeros((1, 2), int), moves.cumsum(0)])


def squares(rng, steps, channels, size, length, together, distractor):
    """Squares that move by `length` pixels. Returns (z (steps, channels, height, width) without
    noise, labels)."""
    moves, labels = random_moves(rng, steps)

    # how other patterns move, if there are any
    walks = [moves]
    if together:
        walks.append(moves)
    if distractor == "random":
        walks.append(rng.integers(-1, 2, (steps - 1, 2)))
    elif distractor == "steady":
        walks.append(np.tile(rng.integers(-1, 2, 2), (steps - 1, 1)))

    # draw: a pattern starts anywhere and is rolled around the torus
    z = np.zeros((steps, channels, *size), np.float32)
    for number, walk in enumerate(walks):
        start = length * rng.integers(0, np.array(size) // length)
        canvas = np.zeros((channels, *size), np.float32)
        canvas[:, : size[0] // 4, : size[1] // 4] = pattern(number, channels, size)
        for t, place in enumerate(path_of(start, walk, length)):
            z[t] += np.roll(canvas, place, (1, 2))
    return z, labels


# --- pictures that move as a whole ---


def bilinear(picture, y, x):
    """Values (channels, ...) of a picture (channels, h, w) at places y, x in pixels, which may be
    fractions. Beyond its edges the picture begins again."""
    # the four pixels around each place
    top = np.floor(y).astype(int)
    left = np.floor(x).astype(int)
    h, w = picture.shape[1:]
    rows = top % h, (top + 1) % h
    columns = left % w, (left + 1) % w

    # nearer pixels count more
    down = y - top
    right = x - left
    upper = (1 - right) * picture[:, rows[0], columns[0]] + right * picture[:, rows[0], columns[1]]
    lower = (1 - right) * picture[:, rows[1], columns[0]] + right * picture[:, rows[1], columns[1]]
    return ((1 - down) * upper + down * lower).astype(np.float32)


def rolling(rng, steps, channels, size):
    """A picture that moves as a whole, by whole patches: (z, labels)."""
    moves, labels = random_moves(rng, steps)

    # blocks of 2 x 2 pixels have the same value
    blocks = 2 * rng.standard_normal((channels, size[0] // 2, size[1] // 2), dtype=np.float32)
    picture = blocks.repeat(2, axis=1).repeat(2, axis=2)
    places = path_of(rng.integers(0, size), moves, PATCH)
    return np.stack([np.roll(picture, place, (1, 2)) for place in places]), labels


def zooming(rng, steps, channels, size):
    """A picture that grows and shrinks around its middle: (z, labels). It has seven sizes, and at
    the largest and the smallest it cannot go further."""
    level = int(rng.integers(-3, 4))
    levels = [level]
    for change in rng.integers(-1, 2, steps - 1):
        level = int(np.clip(level + change, -3, 3))
        levels.append(level)

    # the larger a pixel's step in the picture, the smaller things look
    picture = 2 * rng.standard_normal((channels, 24, 24), dtype=np.float32)
    rows, columns = np.mgrid[: size[0], : size[1]]
    z = []
    for level in levels:
        scale = 0.5 * 1.25**-level
        y = scale * (rows - (size[0] - 1) / 2) + 12
        x = scale * (columns - (size[1] - 1) / 2) + 12
        z.append(bilinear(picture, y, x))
    return np.stack(z), {"zoom": np.diff(levels)}


def room_picture(walls, place, yaw, size):
    """What a camera at place (3,) in a room sees: (channels, height, width). walls (6, channels, n,
    n) are the textures of a box of half sides ROOM; the camera looks `yaw` radians to the right of
    the z axis and sees 90 degrees from left to right."""
    # a ray for each pixel: x right, y down, z ahead, then turned by yaw
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    right = (2 * columns + 1 - width) / width
    down = (2 * rows + 1 - height) / width
    x = right * np.cos(yaw) + np.sin(yaw)
    z = np.cos(yaw) - right * np.sin(yaw)
    rays = np.stack([x, down, z])

    # how far along the ray each of three walls is; the nearest is seen
    toward = np.where(rays < 0, -1, 1)
    axes = (3, 1, 1)
    distances = (toward * ROOM.reshape(axes) - place.reshape(axes)) / np.where(rays, rays, 1e-9)
    axis = distances.argmin(0)
    points = place.reshape(axes) + distances.min(0) * rays

    # where on the wall: the two coordinates along it, five cells of texture a unit
    picture = np.zeros((walls.shape[1], height, width), np.float32)
    for number in range(6):
        seen = (axis == number // 2) & (toward[number // 2] == 2 * (number % 2) - 1)
        along = [k for k in range(3) if k != number // 2]
        u, v = 5 * points[along][:, seen]
        picture[:, seen] = bilinear(walls[number], u, v)
    return picture


def turning(rng, steps, channels, size):
    """A room seen by a camera that turns: (z, labels)."""
    walls = 2 * rng.standard_normal((6, channels, 24, 24), dtype=np.float32)
    place = rng.uniform(-0.5, 0.5, 3) * ROOM
    turns = rng.integers(-2, 3, steps - 1)
    yaws = rng.uniform(0, 2 * np.pi) + np.radians(10) * np.concatenate([[0], turns.cumsum()])
    return np.stack([room_picture(walls, place, yaw, size) for yaw in yaws]), {"yaw": turns}


# --- worlds ---


def world_file(world, rng, steps, channels, size, noise, distractor):
    """A file of a world: (z (steps, channels, height, width), labels {name: (steps - 1,)})."""
    # noise first, so that it is the same whatever moves
    z = noise * rng.standard_normal((steps, channels, *size), dtype=np.float32)
    if world == "roll":
        moving, labels = rolling(rng, steps, channels, size)
    elif world == "zoom":
        moving, labels = zooming(rng, steps, channels, size)
    elif world == "camera":
        moving, labels = turning(rng, steps, channels, size)
    else:
        length = PATCH // 2 if world == "half" else PATCH
        together = world == "together"
        moving, labels = squares(rng, steps, channels, size, length, together, distractor)
    return z + moving, labels


def write_world(out, world, files, steps, channels, size, noise, distractor, seed):
    """Write files of a world and print a summary."""
    # the squares' files keep the name that they have always had
    name = "sprite" if world == "grid" else world
    for i in tqdm(range(files), unit="file", desc=f"world {world}"):
        rng = np.random.default_rng([seed, i])
        z, labels = world_file(world, rng, steps, channels, size, noise, distractor)
        write_latents(out, f"{name}-{i:04d}", z, labels)
    (truth,) = labels
    shape = (channels, *size)
    print(
        f"{out}: {files} files of {steps} steps of {shape}; truth: {truth}, {VALUES[truth]} values"
    )


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
    size_help = "height and width, or one for both, multiples of 16 (default 64)"
    parser.add_argument("--size", type=int, nargs="+", default=[64], metavar="N", help=size_help)
    parser.add_argument("--seed", type=int, default=0, help="of the world, or of the autoencoder")
    group = parser.add_argument_group("worlds")
    world_help = "what moves, see above (default grid)"
    group.add_argument("--world", default="grid", choices=WORLDS, help=world_help)
    group.add_argument("--files", type=int, default=20, help="number of files")
    group.add_argument("--chunks", type=int, default=64, help="chunks of two steps a file")
    group.add_argument("--channels", type=int, default=16, help="channels (default 16)")
    group.add_argument("--noise", type=float, default=0.05, help="its std (what moves has 2)")
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
    # patches of the worlds and of train_lam.py must fit
    if len(args.size) > 2:
        parser.error(
            f"--size {' '.join(map(str, args.size))}: give height and width, or one number"
        )
    for length in args.size:
        if length % 16 or length < 16:
            raise ValueError(f"--size {length} is no multiple of 16")
    size = (args.size[0], args.size[-1])

    # numbers that must be above 0; the noise may be 0
    for name in ("files", "chunks", "channels", "fps", "ae_steps", "ae_batch"):
        value = getattr(args, name)
        if value <= 0:
            parser.error(f"--{name} {value:g} is too small: give more than 0")
    if args.noise < 0:
        parser.error(f"--noise {args.noise:g} is below 0")

    # flags that the chosen world does not have
    if args.distractor != "none" and args.world not in ("grid", "half", "together"):
        parser.error(f"--distractor is for squares, --world {args.world} has none")
    if args.data and (size[0] != size[1] or args.channels != CHANNELS):
        parser.error(f"play is square and has {CHANNELS} channels: give one --size, no --channels")

    # files of an earlier run would be mixed with those of this one
    if os.path.isdir(args.out) and find_files(args.out)[0]:
        raise ValueError(f"{args.out} holds H5 files already: give another --out, or remove them")

    # --- make ---
    # the seed of the autoencoder; the worlds have generators of their own
    torch.manual_seed(args.seed)
    if args.data:
        write_play(args.out, args.data, args.fps, size[0], args.ae_steps, args.ae_batch, args.seed)
    else:
        write_world(
            args.out,
            args.world,
            args.files,
            2 * args.chunks,
            args.channels,
            size,
            args.noise,
            args.distractor,
            args.seed,
        )
