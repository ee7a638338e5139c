"""A video encoder judged while it is trained: its loss on held-out clips, whether its features have
collapsed, and a probe of what they say about actions (the loss says nothing about that)."""

import contextlib
import math
import os

import numpy as np
import torch
from sklearn.metrics import r2_score
from torch.utils.data import DataLoader

from data import collate, ignore_signals_in_worker, windows
from evaluation.heads import RidgeHead, group_means, pool, score
from evaluation.ranks import gathered, rank_and_world
from files.disk import write_atomically
from files.logs import plot_errors, plot_gap, read_csv
from files.vpt import CONTINUOUS, hotbar_columns
from model import (
    encode_steps,
    pixels_to_video,
)

# columns of val.csv: the effective rank and the smallest std of the teacher's features; of play
# R² of yaw, pitch and all camera motion, mean AUROC of keys and buttons
SPREAD = ["effective_rank", "smallest_std"]
PROBE = ["probe_yaw", "probe_pitch", "probe_camera", "probe_keys"]

# of train_lewm.py, for collapse_sentence, from the rows default and idm_alone of bench.lewm: its
# features begin with a rank of 5 to 17 by chance, and healthy ones go down to 2.5 before they rise.
# So a rank tells little, unless one direction is all that is left. The std of their weakest channel
# is 0.16 at the least; without regularisers it stays between 0.02 and 0.09
OF_WORLDS = {"least_rank": 1.2, "least_share": 0.0, "least_std": 0.1}

# tokens of each step that are enough to see a collapse
TOKENS = 512


# --- collapse ---


def some_tokens(targets):
    """About TOKENS of the features (B, L, D) of a batch, spread over it: (n, D)."""
    # neighbouring tokens are alike: take them far apart
    tokens = targets.flatten(0, 1)
    return tokens[:: math.ceil(len(tokens) / TOKENS)]


def collapse_sentence(
    rank, smallest_std, first_rank, least_rank=2.0, least_share=0.25, least_std=0.01
):
    """A warning where features have collapsed, else None. first_rank: the effective rank at the
    start of the run, of which least_share must be left."""
    least_rank = max(least_rank, least_share * first_rank)
    if rank >= least_rank and smallest_std >= least_std:
        return None
    return (
        f"THE FEATURES COLLAPSE: effective rank {rank:.1f} ({first_rank:.1f} at the start),"
        f" smallest std {smallest_std:.3f}; a falling loss means nothing now. Use a lower --lr, a"
        " longer --warmup, or --variance, --covariance and --idm"
    )


def context_sentence(total_steps, weight, start, end):
    """What becomes of V-JEPA 2.1's context loss in a run; loud where it never gets its weight."""
    # it gets its weight
    if end == 0:
        return f"context loss: its weight is {weight:g} from the first step on"
    if total_steps >= end:
        return f"context loss: its weight is 0 for {start:,} steps and {weight:g} after {end:,}"

    # it does not, and whoever expects it must read so
    remedy = f"give --context_warmup 0 {max(total_steps // 3, 1)}, or --context_loss 0"
    if total_steps <= start:
        return (
            f"WARNING: THE CONTEXT LOSS NEVER STARTS: this run has {total_steps:,} steps, and"
            f" --context_warmup {start} {end} waits for {start:,} of them; {remedy}"
        )
    return (
        f"WARNING: THE CONTEXT LOSS NEVER GETS ITS WHOLE WEIGHT: this run has {total_steps:,}"
        f" steps, and --context_warmup {start} {end} lasts for {end:,} of them; {remedy}"
    )


# --- held-out clips ---


def share_of_rank(batches):
    """[(number of the batch, items, whether they count)] for this rank. Every rank gets as many, so
    that ranks that share a model call it equally often; what fills up does not count."""
    rank, world = rank_and_world()

    # every world-th batch; where there is none left, the first one again
    share = []
    for first in range(0, len(batches), world):
        number = first + rank
        counts = number < len(batches)
        share.append((number, batches[number if counts else 0], counts))
    return share


@torch.no_grad()
def read_windows(
    dataset,
    limit,
    encoder,
    device,
    *,
    batch_size,
    num_workers,
    loss_of=None,
    with_actions=True,
    side=4,
    encode="tubelet",
    frames_per_step=None,
    autocast=contextlib.nullcontext,
):
    """What an encoder makes of at most `limit` windows of Clips, over all ranks: a dict of

    z (n, T, M, D) float16, every step encoded alone, on at most side x side cells; actions (n, T-1,
    A) and recording (n,); loss, a mean over clips of loss_of(video, number of the batch); bad clips
    of this rank. encode and frames_per_step are those of encode_steps, by default tubelets."""
    # every rank reads a share of the windows
    share = share_of_rank(windows(dataset, batch_size, limit))
    loader = DataLoader(
        dataset,
        batch_sampler=[items for _, items, _ in share],
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals_in_worker,
    )
    rows = []
    bad = []
    for (number, _, counts), batch in zip(share, loader):
        bad += batch["bad"]
        frames = batch["video"].to(device)

        # the loss on whole clips, tokens of every step alone
        loss = math.nan
        with autocast():
            if loss_of is not None:
                loss = loss_of(pixels_to_video(frames), number).item()
            tokens = None
            if with_actions:
                frames_of_step = frames_per_step or encoder.tubelet_size
                tokens = encode_steps(encoder, frames, encode, frames_of_step)
                tokens = pool(tokens.float(), side)
        actions = batch["actions"].numpy() if with_actions else None
        if counts:
            rows.append((batch["key"], loss, tokens, actions))

    # all ranks know all rows; the last batch may be smaller, so a loss counts by its clips
    rows = gathered(rows)
    recordings = np.concatenate([row[0] for row in rows])
    losses = [row[1] * len(row[0]) for row in rows]
    clips = {"recording": recordings, "bad": bad}
    clips["loss"] = sum(losses) / len(recordings)
    if with_actions:
        clips["z"] = torch.cat([row[2] for row in rows])
        clips["actions"] = np.concatenate([row[3] for row in rows])
    return clips


def probe_columns(names):
    """Columns of val.csv for a probe of these actions: PROBE for play; for a robot their mean, and
    one for each action."""
    if names[: len(CONTINUOUS)] == CONTINUOUS:
        return PROBE
    return ["probe_mean", *(f"probe_{name}" for name in names)]


def inverse_probe(fit, test, names):
    """How well a ridge regression tells the action between two steps from their features: {one of
    probe_columns: R² or AUROC}, nan for what does not vary. fit, test: clips of `read_windows`, of
    different recordings; names of the actions. Keys of the hotbar are left out: an encoder that
    reads the bottom of the picture and nothing else could tell those."""
    # rows are pairs of steps, and the action between them
    rows = []
    for clips in (fit, test):
        before = clips["z"][:, :-1].flatten(0, 1)
        after = clips["z"][:, 1:].flatten(0, 1)
        rows.append((before, after, clips["actions"].reshape(-1, len(names))))
    (a, b, y), (a_test, b_test, y_test) = rows

    # what does not vary can be told from nothing; differences of a constant are rounding errors
    varies = (y.std(0) > 1e-6) & (y_test.std(0) > 1e-6)
    varies[hotbar_columns(names)] = False
    columns = np.flatnonzero(varies)
    result = dict.fromkeys(probe_columns(names), math.nan)
    if not len(columns):
        return result

    # the clips of every tenth recording choose the penalties; of few recordings every tenth clip
    recordings = np.unique(fit["recording"])
    dev = np.isin(fit["recording"], recordings[::10])
    if dev.all() or len(recordings) < 10:
        dev = np.arange(len(dev)) % 10 == 0
    dev = np.repeat(dev, fit["actions"].shape[1])

    # judged on recordings that the head has not seen
    labels = [names[i] for i in columns]
    head = RidgeHead().fit(a, b, y[:, columns], dev)
    guesses = head.predict(a_test, b_test)

    # all actions of a robot are numbers
    if "probe_mean" in result:
        r2 = {}
        for i, label in enumerate(labels):
            r2[f"probe_{label}"] = float(r2_score(y_test[:, columns[i]], guesses[:, i]))
        return result | r2 | {"probe_mean": float(np.mean(list(r2.values())))}

    scores = score(y_test[:, columns], guesses, labels, np.full(len(labels), 0.5))

    # single angles, and means over actions of a kind
    groups = group_means(scores)
    for column, name in (("probe_yaw", "yaw_diff"), ("probe_pitch", "pitch_diff")):
        if name in scores:
            result[column] = scores[name]["r2"]
    result["probe_camera"] = groups.get("camera", math.nan)
    result["probe_keys"] = groups.get("keys", math.nan)
    return result


def probe_text(result):
    """The probe's result for a person."""
    # what does not vary in the recordings has no score
    parts = []
    for name, value in result.items():
        if not math.isnan(value):
            metric = "AUROC" if name == "probe_keys" else "R2"
            parts.append(f"{name.removeprefix('probe_')} {metric} {value:.3f}")
    return "inverse dynamics " + (", ".join(parts) or "not given: no action varies")


# --- curves ---


def plot_curves(out_dir, ipe):
    """curves.png of a run of train_vjepa.py, from train.csv and val.csv."""
    from matplotlib.figure import Figure  # takes a second to import

    train = read_csv(os.path.join(out_dir, "train.csv"))
    val = read_csv(os.path.join(out_dir, "val.csv"))
    fig = Figure(figsize=(13, 4.6), layout="constrained")
    loss_ax, spread_ax, probe_ax = fig.subplots(1, 3)

    # more points than the picture has pixels would take time and memory at each save
    every = slice(None, None, len(train["itr"]) // 4000 + 1)
    epochs = (train["epoch"] + train["itr"] / ipe)[every]

    # training as a thin line, held-out clips as points
    loss_ax.plot(epochs, train["masked_loss"][every], lw=0.5, label="masked loss, training")
    spread_ax.plot(epochs, train["effective_rank"][every], label="effective rank")
    if len(val["epoch"]):
        loss_ax.plot(val["epoch"], val["masked_loss"], "o-", label="held out")
        for name in PROBE:
            if np.isfinite(val[name]).any():
                probe_ax.plot(val["epoch"], val[name], "o-", label=name.removeprefix("probe_"))

    # what each picture shows
    loss_ax.set(title="masked loss (falls when features collapse, too)", ylabel="mean |error|")
    spread_ax.set(title="effective rank of the targets", yscale="log")
    probe_ax.set(title="inverse dynamics, held out", ylabel="R² (keys: AUROC)", ylim=(-0.1, 1.0))
    for ax in (loss_ax, spread_ax, probe_ax):
        ax.set_xlabel(f"epochs of {ipe} steps")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))


def plot_world_curves(out_dir, ipe):
    """curves.png of a run of train_lewm.py: losses, held-out errors, the action gap, and what tells
    of a collapse and of what the features say about actions."""
    from matplotlib.figure import Figure  # takes a second to import

    train = read_csv(os.path.join(out_dir, "train.csv"))
    val = read_csv(os.path.join(out_dir, "val.csv"))
    fig = Figure(figsize=(13, 9.2), layout="constrained")
    axes = fig.subplots(2, 3)
    loss_ax, error_ax, gap_ax = list(axes[0])
    spread_ax, std_ax, probe_ax = list(axes[1])

    # more points than the picture has pixels would take time and memory at each save
    every = slice(None, None, len(train["itr"]) // 4000 + 1)
    epochs = (train["epoch"] + train["itr"] / ipe)[every]

    # training as a thin line; terms that are off are 0 everywhere
    for name in ("jloss", "inverse_loss", "variance_loss", "covariance_loss", "sigreg_loss"):
        if train[name].any():
            loss_ax.plot(epochs, train[name][every], lw=0.5, label=name)
    spread_ax.plot(epochs, train["effective_rank"][every], lw=0.5, label="training")
    std_ax.plot(epochs, train["smallest_std"][every], lw=0.5, label="training")

    # held-out clips as points
    if len(val["epoch"]):
        loss_ax.plot(val["epoch"], val["jloss"], "o-", label="jloss, held out")
        plot_errors(error_ax, val["epoch"], val)
        plot_gap(gap_ax, val["epoch"], val)
        spread_ax.plot(val["epoch"], val["effective_rank"], "o-", label="held out")
        std_ax.plot(val["epoch"], val["smallest_std"], "o-", label="held out")
        for name in val:
            if name.startswith("probe_") and np.isfinite(val[name]).any():
                probe_ax.plot(val["epoch"], val[name], "o-", label=name.removeprefix("probe_"))

    # what each picture shows
    loss_ax.set(title="losses", yscale="log")
    error_ax.set(title="held-out error one step ahead", ylabel="mean |error|, own features")
    gap_ax.set(title="action gap (shuffled / true - 1)", ylabel="%")
    spread_ax.set(title="effective rank of the features", yscale="log")
    std_ax.set(title="std of the channel that varies least", ylim=(0, None))
    probe_ax.set(title="inverse dynamics, held out", ylabel="R² (keys: AUROC)", ylim=(-0.1, 1.0))
    for ax in axes.flatten():
        ax.set_xlabel(f"epochs of {ipe} steps")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))
