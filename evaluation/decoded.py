"""Decoded pictures: what a decoder is asked for, how far its pictures are from those recorded, and
opening a finished run of train_decoder.py."""

import math
import os

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from checkpoint import settings_of
from data import collate, ignore_signals_in_worker, shown_frames, windows
from evaluation.held_out import recording_of
from evaluation.pictures import plot_rows
from evaluation.ranks import gathered, rank_and_world
from evaluation.runs import read_checkpoint, stats_on
from files.disk import write_atomically
from files.logs import read_csv
from model import PictureDecoder
from weights import open_picture_vae

# columns of val.csv: decoded from true features, the picture of the step before, the mean picture
PICTURES = ["psnr", "ssim", "copy_psnr", "copy_ssim", "mean_psnr", "mean_ssim"]

# recordings in pictures.png
SHOWN = 8


# --- distances between pictures ---


def psnr_of(mse):
    """PSNR in dB of pictures in [0, 1] with mean squared errors (n,): that of their mean, because
    two equal pictures have none of their own."""
    mean = float(mse.double().mean())
    return -10 * math.log10(mean) if mean > 0 else math.inf


def squared_error(a, b):
    """Mean squared errors (n,) of pictures (n, C, H, W)."""
    return (a.float() - b.float()).square().mean((1, 2, 3))


def ssim(a, b):
    """Structural similarity (n,) of pictures (n, C, H, W) in [0, 1]: Wang et al. 2004, a Gaussian
    window of 11 pixels with std 1.5, without padding, the mean over channels and places."""
    C = a.shape[1]
    a = a.float()
    b = b.float()
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs pictures of 11 pixels or more, these have {a.shape[2]}")

    # the window: rows, then columns
    x = torch.arange(-5.0, 6.0, device=a.device)
    window = (-x.square() / (2 * 1.5**2)).exp()
    window = window / window.sum()
    rows = window.view(1, 1, 11, 1).expand(C, 1, 11, 1)
    columns = window.view(1, 1, 1, 11).expand(C, 1, 1, 11)

    def local_mean(picture):
        return F.conv2d(F.conv2d(picture, rows, groups=C), columns, groups=C)

    # local means, variances and covariance
    mean_a = local_mean(a)
    mean_b = local_mean(b)
    var_a = local_mean(a * a) - mean_a.square()
    var_b = local_mean(b * b) - mean_b.square()
    both = local_mean(a * b) - mean_a * mean_b

    # the two constants keep flat places from dividing by zero
    c1 = 0.01**2
    c2 = 0.03**2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    contrast = (2 * both + c2) / (var_a + var_b + c2)
    return (brightness * contrast).mean((1, 2, 3))


# --- what a decoder is asked for ---


class Pictures:
    """Batches of data.py -> pictures, and pictures <-> what a PictureDecoder gives.

    size: their side. every_frame: all frames of a step, three channels each, and not one alone.
    vae: of weights.open_picture_vae, whose latents the decoder gives; None: it gives pixels."""

    def __init__(self, size, frames_per_step, encode, every_frame, vae, device):
        self.size = size
        self.frames_per_step = frames_per_step
        self.shown = shown_frames(frames_per_step, encode, every_frame)
        self.vae = vae
        self.device = device

    def frames(self, batch):
        """Pictures (B*T, 3*F, size, size) in [0, 1] of the steps of a batch."""
        # stored pictures are those of a step already, video has all frames of a clip
        if "pictures" in batch:
            x = batch["pictures"]  # (B, T, F, 3, H, W)
        else:
            x = batch["video"].unflatten(1, (-1, self.frames_per_step))[:, :, self.shown]
        x = x.to(self.device, non_blocking=True)

        # the frames of a step side by side, as channels
        x = x.flatten(0, 1).flatten(1, 2).float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="area")
        return x

    @torch.no_grad()
    def targets(self, batch):
        """What the decoder should give for the steps of a batch: pictures, or their latents."""
        x = self.frames(batch)
        if self.vae is None:
            return x

        # the autoencoder takes frames one by one
        latents = self.vae.encode(x.unflatten(1, (-1, 3)).flatten(0, 1))
        return latents.unflatten(0, (len(x), -1)).flatten(1, 2)

    @torch.no_grad()
    def of(self, decoded):
        """What the decoder gives (n, C, h, w) -> pictures (n, 3*F, size, size) in [0, 1]."""
        # latents become pictures, frame by frame
        x = decoded.float()
        if self.vae is not None:
            latents = x.unflatten(1, (-1, self.vae.channels)).flatten(0, 1)
            x = self.vae.decode(latents)
            x = x.unflatten(0, (len(decoded), -1)).flatten(1, 2)
        return x.clamp(0, 1)


# --- held-out pictures, while a decoder trains ---


@torch.no_grad()
def decoded_rows(model, dataset, features_of, pictures, batch_size, clips, num_workers, autocast):
    """Errors of decoded pictures on at most `clips` windows of a dataset -> ({name: (n,)},
    {recording: (recorded, decoded)} of a few, [bad clip of this rank]).

    Pictures are those after the first step of each clip, beside a copy of the step before and the
    mean picture. Each rank decodes a share of the clips; every rank returns all errors."""
    # each rank takes every world-th batch
    rank, world = rank_and_world()
    loader = DataLoader(
        dataset,
        batch_sampler=windows(dataset, batch_size, clips, rank, world),
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals_in_worker,
    )

    # errors of all clips, and a few pictures
    model.eval()
    rows, bad = [], []
    shown = {}
    for batch in loader:
        # all steps at once
        bad += batch["bad"]
        z = features_of(batch)[0]
        B, T = z.shape[:2]
        with autocast():
            output = model.decoder(z.flatten(0, 1)).float()
            losses = model.losses(output, pictures.targets(batch))

        # in pixels, without the first step: that has no step before it
        true = pictures.frames(batch).unflatten(0, (B, T))
        decoded = pictures.of(output).unflatten(0, (B, T))
        target = true[:, 1:].flatten(0, 1)

        # beside it what needs no features: the step before, and the mean picture
        mean = pictures.of(model.decoder.mean[None])
        guesses = {
            "": decoded[:, 1:].flatten(0, 1),
            "copy_": true[:, :-1].flatten(0, 1),
            "mean_": mean.expand(B * (T - 1), -1, -1, -1),
        }

        # a number for each picture
        row = {}
        for name, guess in guesses.items():
            row[name + "mse"] = squared_error(guess, target).cpu()
            row[name + "ssim"] = ssim(guess, target).cpu()
        for name, loss in zip(("l1_loss", "gradient_loss", "lpips_loss"), losses):
            row[name] = loss.cpu().expand(B)
        rows.append(row)

        # a picture of each recording, for the eye: the last frame of a step in mid clip
        for i, key in enumerate(batch["key"]):
            both = (true[i, T // 2, -3:].cpu(), decoded[i, T // 2, -3:].cpu())
            shown.setdefault(recording_of(key, batch), both)
    model.train()

    # all ranks know all rows
    rows = gathered(rows)
    errors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return errors, dict(list(shown.items())[:SHOWN]), bad


def picture_summary(errors):
    """Errors of `decoded_rows` -> (columns of val.csv, a line for a person)."""
    row = {}
    for name in ("l1_loss", "gradient_loss", "lpips_loss"):
        row[name] = errors[name].mean().item()

    # of the decoder, and of the two that need no features
    for name in ("", "copy_", "mean_"):
        row[name + "psnr"] = psnr_of(errors[name + "mse"])
        row[name + "ssim"] = errors[name + "ssim"].mean().item()
    text = (
        f"PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f} (the step before {row['copy_psnr']:.2f}"
        f" dB, {row['copy_ssim']:.3f}; the mean picture {row['mean_psnr']:.2f} dB,"
        f" {row['mean_ssim']:.3f})"
    )
    return row, text


def as_image(picture):
    """A picture (3, H, W) in [0, 1] -> (H, W, 3) uint8, as it is shown and stored."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def plot_pictures(path, shown):
    """pictures.png of a run: recorded above decoded, a column for each recording."""
    rows = {"recorded": [], "decoded": []}
    for recorded, decoded in shown.values():
        rows["recorded"].append(as_image(recorded))
        rows["decoded"].append(as_image(decoded))
    figure = plot_rows(rows, [name[-14:] for name in shown])
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=110))


def plot_decoder_curves(out_dir, ipe):
    """curves.png of a run of train_decoder.py, from train.csv and val.csv."""
    from matplotlib.figure import Figure  # takes a second to import

    train = read_csv(os.path.join(out_dir, "train.csv"))
    val = read_csv(os.path.join(out_dir, "val.csv"))
    fig = Figure(figsize=(13, 4.6), layout="constrained")
    loss_ax, psnr_ax, ssim_ax = fig.subplots(1, 3)

    # more points than the picture has pixels would take time and memory at each save
    every = slice(None, None, len(train["itr"]) // 4000 + 1)
    epochs = (train["epoch"] + train["itr"] / ipe)[every]

    # losses of training; those that are off are 0 everywhere
    for name in ("l1_loss", "gradient_loss", "lpips_loss"):
        if train[name].any():
            loss_ax.plot(epochs, train[name][every], lw=0.5, label=f"{name}, training (noise)")

    # held-out pictures, beside the two that need no features
    if len(val["epoch"]):
        loss_ax.plot(val["epoch"], val["l1_loss"], "o-", label="l1_loss, held out")
        labels = {"": "decoded", "copy_": "the step before", "mean_": "the mean picture"}
        for name, label in labels.items():
            psnr_ax.plot(val["epoch"], val[name + "psnr"], "o-", label=label)
            ssim_ax.plot(val["epoch"], val[name + "ssim"], "o-", label=label)

    loss_ax.set(title="losses", yscale="log")
    psnr_ax.set(title="held-out PSNR of true features (higher is better)", ylabel="dB")
    ssim_ax.set(title="held-out SSIM of true features (higher is better)")

    # legends stand below, where they hide no curve
    for ax in (loss_ax, psnr_ax, ssim_ax):
        ax.set_xlabel(f"epochs of {ipe} steps")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))


# --- a finished run ---


class Decoder:
    """A finished run of train_decoder.py: features -> pictures."""

    def __init__(self, path, device):
        state, self.path = read_checkpoint(path, "--decoder")
        if "picture_decoder" not in state:
            raise ValueError(f"--decoder {self.path} is no run of train_decoder.py")
        self.state = state
        self.settings = settings_of(state, self.path)

        # the network, and the autoencoder whose latents it may give
        self.network = PictureDecoder(**state["picture_decoder"])
        self.network.load_state_dict(state["picture_decoder_weights"])
        self.network.to(device).eval()
        vae = open_picture_vae(state["vae"]).to(device) if state["vae"] else None
        self.pictures = Pictures(
            state["picture_size"],
            state["frames_per_step"],
            state["encode"],
            state["every_frame"],
            vae,
            device,
        )
        self.feature_stats = stats_on(state, device)

    @torch.no_grad()
    def __call__(self, z):
        """Layer-normed features of steps (..., N, E) -> their last pictures (..., 3, size, size) in
        [0, 1], on the CPU."""
        # a part at a time, because pictures are larger than features; of a step its last frame
        parts = []
        for part in z.flatten(0, -3).split(64):
            decoded = self.pictures.of(self.network(part.float()))
            parts.append(decoded[:, -3:].cpu())
        return torch.cat(parts).unflatten(0, z.shape[:-2])

    def check(self, run):
        """ValueError unless this decoder reads the features of a Run of evaluation/runs.py: of the
        same encoder, cut and normalised in the same way."""
        names = ["encoder_hash", "encode", "fps", "frames_per_step", "feature_norm"]
        if run.state["dataset"] == "droid":
            names += ["stride", "crop"]
        for name in names:
            # runs of train_lora.py have some of them among their settings only
            trained_with = run.state.get(name, run.settings.get(name))
            if self.state.get(name) != trained_with:
                raise ValueError(
                    f"--decoder {self.path} was trained with {name} {self.state.get(name)}, the"
                    f" predictor with {trained_with}: train a decoder on the predictor's"
                    " features"
                )

        # both measured a sample of the data: means and stds of channels differ a little at most
        of_run = stats_on(run.state, self.pictures.device)
        if of_run["mean"] is None:
            return

        # how far apart the means are, in stds, and the stds, as logarithms of their ratios
        of_decoder = self.feature_stats
        shift = ((of_decoder["mean"] - of_run["mean"]) / of_run["std"]).abs().max().item()
        stretch = (of_decoder["std"] / of_run["std"]).log().abs().max().item()
        if max(shift, stretch) > 0.25:
            raise ValueError(
                f"--decoder {self.path}: its --feature_norm standardize measured other channels"
                f" than the predictor's ({max(shift, stretch):.2f} stds apart): train it on the"
                " same --data"
            )
