"""Films of what latent actions do, made visible by the latents' VAE: a code is applied to some
steps again and again."""

import os

import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.decoded import as_image
from evaluation.films import mp4_bytes
from evaluation.pictures import plot_rows
from files.disk import write_atomically
from files.latents import vae_frames

# starts that a film shows side by side, and how often a code is applied to them
STARTS = 4
REPEATS = 6

# pages of a film a second, and the least side of a picture on them
RATE = 4
LEAST_SIDE = 160

# rows of the sheet: more could not be read
SHEET_ROWS = 10


@torch.no_grad()
def repeated(model, z, code):
    """Steps z (n, C, H, W), and what a code (slots,) makes of them again and again -> (n, 1 +
    REPEATS, C, H, W)."""
    steps = [z]
    for _ in range(REPEATS):
        steps.append(model.decode(steps[-1], code.expand(len(z), -1)))
    return torch.stack(steps, dim=1)


@torch.no_grad()
def frames_of(vae, steps):
    """Steps (n, T, C, H, W) as a VAE draws them, one at a time -> (n, T, 3, H', W') in [0, 1]."""
    # a VAE takes two steps at once: each is put there twice, and its last frame is kept
    n, T = steps.shape[:2]
    twice = steps.flatten(0, 1)[:, None].expand(-1, 2, -1, -1, -1)
    frames = torch.cat([vae_frames(vae, part)[:, -1] for part in twice.split(16)])
    return frames.unflatten(0, (n, T)).cpu()


def page_of(images, text):
    """Pictures (H, W, 3) side by side, enlarged, under a line of text."""
    # whole multiples: what the VAE drew, and nothing smoothed
    height, width = images[0].shape[:2]
    scale = -(-LEAST_SIDE // min(height, width))
    width, height = scale * width, scale * height
    gap = 4

    # H.264 takes even sides only
    across = len(images) * (width + gap) + gap
    down = height + 28 + gap
    page = Image.new("RGB", (across + across % 2, down + down % 2), "white")
    for i, image in enumerate(images):
        large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        page.paste(large, (gap + i * (width + gap), 28))
    ImageDraw.Draw(page).text((6, 6), text, fill="black", font=ImageFont.load_default(14))
    return page


def write_films(folder, model, vae, z, codes):
    """A film of each code, FOLDER/codes/1-2-3.mp4, and a sheet of their pictures,
    FOLDER/codes_decoded.png.

    z (n, C, H, W): the steps that each code is applied to, STARTS of which are shown; codes
    {(number, ...): share of the transitions}, the most used first."""
    os.makedirs(os.path.join(folder, "codes"), exist_ok=True)
    z = z[:: max(len(z) // STARTS, 1)][:STARTS]
    rows = {}
    for code, share in codes.items():
        steps = repeated(model, z, torch.tensor(code, device=z.device))
        frames = frames_of(vae, steps)

        # the first and the last page stay for a moment
        name = "-".join(map(str, code))
        pages = []
        for t in range(1 + REPEATS):
            images = [as_image(picture) for picture in frames[:, t]]
            text = f"code {name}, {share:.0%} of all steps: applied {t} times"
            pages += [page_of(images, text)] * (3 if t in (0, REPEATS) else 1)
        write_atomically(os.path.join(folder, "codes", f"{name}.mp4"), mp4_bytes(pages, RATE))

        # two starts on the sheet: before, after one and after half of the times
        if len(rows) < SHEET_ROWS:
            shown = [frames[i, t] for i in range(min(2, len(z))) for t in (0, 1, REPEATS // 2)]
            rows[f"{name}\n{share:.0%}"] = [as_image(picture) for picture in shown]

    titles = ["start", "code once", f"{REPEATS // 2} times"] * min(2, len(z))
    fig = plot_rows(rows, titles)
    path = os.path.join(folder, "codes_decoded.png")
    write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png"))
