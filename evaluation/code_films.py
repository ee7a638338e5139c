"""Films of what latent actions do, made visible by the latents' VAE: a code is applied to some
steps again and again."""

import glob
import math
import os

import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.decoded import as_image
from evaluation.films import mp4_bytes
from evaluation.pictures import plot_rows
from files.disk import write_atomically
from files.latents import vae_frames
from files.progress import tqdm

# starts that a film shows side by side, and how often a code is applied to them
STARTS = 4
REPEATS = 6

# pages of a film a second, and the least side of a picture on them
RATE = 4
LEAST_SIDE = 160

# pixels between pictures, and above them for a line of text
GAP = 4
TITLE = 28

# rows of the sheet: more could not be read
SHEET_ROWS = 10


@torch.no_grad()
def repeated(model, z, code):
    """Steps z (n, C, H, W), and what a code (slots,) makes of them again and again -> (n, 1 +
    REPEATS, C, H, W)."""
    # each is decoded from the one before, so what a code does to it adds up
    codes = code.expand(len(z), -1)
    steps = [z]
    for _ in range(REPEATS):
        steps.append(model.decode(steps[-1], codes))
    return torch.stack(steps, dim=1)


@torch.no_grad()
def frames_of(vae, steps):
    """Steps (n, T, C, H, W) as a VAE draws them, one at a time -> (n, T, 3, H', W') in [0, 1]."""
    # a VAE takes two steps at once: each is put there twice, and its last frame is kept
    n, T = steps.shape[:2]
    twice = steps.flatten(0, 1)[:, None].expand(-1, 2, -1, -1, -1)

    # few at a time, because pictures are far larger than latents
    frames = [vae_frames(vae, part)[:, -1] for part in twice.split(16)]
    return torch.cat(frames).unflatten(0, (n, T)).cpu()


def page_of(images, text):
    """Pictures (H, W, 3) side by side, enlarged, under a line of text."""
    # whole multiples: what the VAE drew, and nothing smoothed
    height, width = images[0].shape[:2]
    scale = math.ceil(LEAST_SIDE / min(height, width))
    size = (scale * width, scale * height)

    # H.264 takes even sides only
    pitch = size[0] + GAP
    across = len(images) * pitch + GAP
    down = TITLE + size[1] + GAP
    even = (across + across % 2, down + down % 2)

    # a line of text above, the pictures side by side below it
    page = Image.new("RGB", even, "white")
    for i, image in enumerate(images):
        large = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
        page.paste(large, (GAP + i * pitch, TITLE))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(page).text((6, 6), text, fill="black", font=font)
    return page


def film_of(frames, title):
    """Frames (n, T, 3, H, W) of what a code does -> the pages of its film."""
    pages = []
    last = frames.shape[1] - 1
    for t in range(1 + last):
        images = [as_image(picture) for picture in frames[:, t]]
        page = page_of(images, f"{title}: applied {t} times")

        # the first and the last page stay for a moment: a player starts again at once
        stay = 3 if t in (0, last) else 1
        pages += [page] * stay
    return pages


def write_films(folder, model, vae, z, codes):
    """A film of each code, FOLDER/codes/1-2-3.mp4, and a sheet of their pictures,
    FOLDER/codes_decoded.png.

    z (n, C, H, W): the steps that each code is applied to, STARTS of which are shown; codes
    {(number, ...): share of the transitions}, the most used first."""
    # starts that lie far apart look different
    stride = max(len(z) // STARTS, 1)
    z = z[::stride][:STARTS]

    # the sheet has room for two starts: before, after one and after half of the times
    sheet_starts = range(min(2, len(z)))
    sheet_times = (0, 1, REPEATS // 2)
    titles = ["start", "code once", f"{REPEATS // 2} times"] * len(sheet_starts)

    os.makedirs(os.path.join(folder, "codes"), exist_ok=True)

    # those of an earlier report may be of other codes
    for old in glob.glob(os.path.join(glob.escape(folder), "codes", "*.mp4")):
        os.unlink(old)
    rows = {}
    for code, share in tqdm(codes.items(), desc="films", unit=" codes"):
        steps = repeated(model, z, torch.tensor(code, device=z.device))
        frames = frames_of(vae, steps)

        # a film shows all starts, at all times
        name = "-".join(map(str, code))
        pages = film_of(frames, f"code {name}, {share:.0%} of all steps")
        path = os.path.join(folder, "codes", f"{name}.mp4")
        write_atomically(path, mp4_bytes(pages, RATE))

        # the most used codes come first, so the sheet has those
        if len(rows) < SHEET_ROWS:
            shown = [as_image(frames[i, t]) for i in sheet_starts for t in sheet_times]
            rows[f"{name}\n{share:.0%}"] = shown

    # one picture to look at before any film
    fig = plot_rows(rows, titles)
    path = os.path.join(folder, "codes_decoded.png")
    write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png"))
