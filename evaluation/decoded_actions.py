"""Do decoded predictions show what the player did?

An inverse model looks at pictures only: the encoder sees them again, and a ridge regression tells
the action between two of them. It is fitted on training clips whose true features were decoded, so
that it knows what decoded pictures look like, and tested on held-out clips."""

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.heads import load, pool
from evaluation.pretraining import PROBE, inverse_probe
from evaluation.runs import play_reader
from files.progress import tqdm
from model import encode_steps, normalize_features

# training clips that are decoded to fit the inverse model
FITTED = 400

# tokens of a step are averaged over this many cells a side, as in probe.py
SIDE = 4

# more cells a side than any patch grid has: tokens stay as they are
EVERY_TOKEN = 1 << 20


@torch.no_grad()
def see_again(run, encoder, film):
    """Tokens (T, N, D) of a film (T, 3, size, size) uint8 by the encoder of a Run, each step alone:
    its picture stands for all frames of the step."""
    # pictures as large as those that the encoder knows
    crop = run.settings["crop_size"]
    video = film.to(run.device)
    if film.shape[-1] != crop:
        small = F.interpolate(
            video.float() / 255, size=(crop, crop), mode="bilinear", antialias=True
        )
        video = (small.clamp(0, 1) * 255).round().byte()

    # still steps
    frames_per_step = run.state["frames_per_step"]
    video = video.repeat_interleave(frames_per_step, dim=0)[None]
    h = encode_steps(encoder, video, run.settings["encode"], frames_per_step)
    return normalize_features(h)[0].float().cpu()


def decoded_training(run, networks, train, features_of, options):
    """What the inverse model is fitted on: true features of training clips, decoded and seen again.
    A dict of z (n, T, M, D), actions (n, T-1, A) as recorded, and recording (n,).

    networks: of films.open_networks; train: Records, features_of: of
    comparable.features_of_training; options: batch_size and num_workers."""
    windows, _ = load(
        train,
        play_reader(run.settings, None, None),
        features_of,
        None,
        None,
        FITTED,
        side=EVERY_TOKEN,
        autocast=run.autocast,
        **options,
    )
    tokens = []
    for z in tqdm(windows["z"], "decoded training clips", delay=10, unit=" clips"):
        film = networks.decoder(z.to(run.device, torch.float32))
        film = (film * 255).round().byte()
        tokens.append(pool(see_again(run, networks.encoder, film), SIDE))
    recordings = [record.recording for record, _ in windows["place"]]
    return {
        "z": torch.stack(tokens),
        "actions": windows["actions"],
        "recording": np.array(recordings),
    }


def action_scores(run, encoder, training, films, actions, recordings):
    """{name of a set of films: {one of PROBE: R² or AUROC}} of the inverse model.

    training: of decoded_training; films: {name: (n, T, 3, size, size) uint8} of held-out clips,
    with their actions (n, T-1, A) as recorded."""
    scores = {}
    for name, films_of_set in films.items():
        tokens = [pool(see_again(run, encoder, film), SIDE) for film in films_of_set]
        clips = {
            "z": torch.stack(tokens),
            "actions": actions,
            "recording": np.array(recordings),
        }
        scores[name] = inverse_probe(training, clips, run.state["action_names"])
    return scores


def action_lines(scores, fitted, tested):
    """The scores for a person."""
    titles = {
        "decoded": "true features, decoded",
        "predicted": "predictions, decoded",
        "others": "predictions under actions of other recordings",
    }
    yield (
        f"actions that an inverse model reads from decoded pictures (fitted on {fitted} training"
        f" clips, tested on {tested}): yaw R2, pitch R2, keys AUROC"
    )
    for name, of_set in scores.items():
        values = "  ".join(f"{of_set[column]:6.3f}" for column in PROBE if "camera" not in column)
        yield f"  {titles[name]:46} {values}"
