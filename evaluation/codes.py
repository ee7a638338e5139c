"""What latent actions are worth on held-out recordings: errors, codes, purity, curves."""

import contextlib
import math
import os

import numpy as np
import torch

from data import latent_sequences
from evaluation.ranks import gathered, rank_and_world
from files.disk import write_atomically
from files.latents import NO_LABEL, pack_codes
from files.logs import read_csv
from model import VectorQuantizer

# errors of held_out_codes
ERRORS = ("own", "copy", "zero", "marginal", "random", "same", "rollout_4", "copy_4")

# numbers of code_summary that compare errors
RATIOS = (
    "mse_over_copy",
    "mse_over_zero",
    "mse_over_marginal",
    "nmse",
    "psnr_random",
    "psnr_same",
    "same_over_own",
    "rollout_over_copy",
)

# numbers of code_summary that describe the codes
CODES = (
    "joint_codes",
    "joint_perplexity",
    "slot_perplexity",
    "codebook_usage",
    "purity",
    "nmi",
    "ami",
    "purity_one_code",
)

# what the table of eval_lam.py prints beside a number
MEANINGS = {
    "mse_over_copy": "error over that of copying the step before",
    "mse_over_zero": "error over that with zeroed codes",
    "mse_over_marginal": "error over that of the mean prediction under codes of other clips",
    "nmse": "error over the variance of the latents",
    "psnr_random": "dB that the own code is better than a random one",
    "psnr_same": "dB that it is better than another clip's code of the same action",
    "same_over_own": "error with another clip's code of the same action over that with the own"
    " code, both of the transitions that have such a clip in their batch",
    "rollout_over_copy": "error four steps ahead over that of copying",
    "joint_codes": "actions (all codes of a transition together) in use",
    "joint_perplexity": "as many equally frequent actions would be as uncertain",
    "slot_perplexity": "the same of a single code",
    "codebook_usage": "entries of a table in use",
    "purity": "share of transitions whose true action is the commonest one of their code, learned"
    " on the other recordings (a code that those lack counts as wrong)",
    "nmi": "normalised mutual information of the true actions and those that codes are named by, as"
    " for purity",
    "ami": "the same above chance",
    "purity_one_code": "the purity of a single code for everything: the bar for purity",
}


# --- held-out clips ---


def quantises(model):
    """Whether the decoder works from codes: that of a continuous model does not, nor that of a VQ
    run that stopped before the end of its warm-up."""
    if isinstance(model.quantizer, VectorQuantizer):
        return model.quantizer.active()
    return model.quantizer is not None


@torch.no_grad()
def held_out_codes(
    model, dataset, batch_size, clips, num_workers=0, autocast=contextlib.nullcontext
):
    """What a model does with at most `clips` windows of a Latents dataset: a dict of arrays over n
    transitions. Each rank evaluates a share; every rank returns the results of all.

    codes (n, slots), labels (n, L; NO_LABEL where a file has none), recording (n,), and mean
    squared errors of the next step, in standardised units, (n,):
      own       under the transition's own code
      copy      of the step before
      zero      under zeroed codes
      marginal  of the mean prediction under the codes of four other clips: what can be known
                without the action (nan without other clips)
      random    under uniformly drawn codes: Genie's measure
      same      under the code of another clip of the batch with the same labels (nan without)
    By clip: rollout_4 and copy_4 (four steps ahead), the loss terms of forward, and var, the
    variance of z."""
    # each rank takes every world-th batch
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    items = dataset.windows(max(batch_size, 2), clips, rank, world)
    rows = []
    for batch in latent_sequences(dataset, batch_size, num_workers=num_workers, items=items):
        # labels are missing where no file has any
        item = items[len(rows)]
        raw = batch["z"].to(device, non_blocking=True)
        B, T = raw.shape[0], raw.shape[1] - 1
        labels = batch.get("labels", torch.zeros(B, T, 0, dtype=torch.long)).flatten(0, 1)

        # losses and codes, then what other codes would have cost
        with autocast():
            losses = model(raw)
            indices, _, z_q = model.encode(raw)
            z = model.normalize(raw)
            # seeded by the number of a window: the same for any number of ranks
            row = code_errors(model, z, z_q, indices, seed=item[0][1])

            # four steps ahead, or to the end of a shorter window
            ahead = model.normalize(model.rollout(raw[:, 0], z_q[:, :4]))[:, -1]
            target = z[:, min(4, T)]
            row["rollout_4"] = (ahead - target).square().mean((1, 2, 3))
            row["copy_4"] = (z[:, 0] - target).square().mean((1, 2, 3))
            row["same"] = same_action_error(model, z, z_q, labels, dataset.labels, row["own"])

        # a row for each transition
        row["codes"] = indices.flatten(0, 1)
        row["labels"] = labels
        row["recording"] = torch.tensor([x[2] for x in item]).repeat_interleave(T)
        row["var"] = z.var((0, 1, 3, 4)).mean().expand(B)
        row |= {k: v.expand(B) for k, v in losses.items() if k != "indices"}
        rows.append({k: to_numpy(v) for k, v in row.items()})

    # all ranks know all rows, in the order of one process
    rows = gathered(rows)
    return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def error_of(prediction, z):
    """Mean squared error (B * T,) of a prediction (B, T, C, h, w) of the steps of z after the
    first, (B, T+1, C, h, w)."""
    return (prediction - z[:, 1:]).square().mean((2, 3, 4)).flatten()


def code_errors(model, z, z_q, indices, seed):
    """Errors of held_out_codes (B * T,) that need no labels: own, zero, random, copy, marginal.
    z (B, T+1, C, h, w), z_q (B, T, slots, dim), indices (B, T, slots)."""
    # a lone clip has no others: its own codes must not pass for theirs
    others = [torch.roll(z_q, k, 0) for k in range(1, min(len(z_q), 5))]
    marginal = torch.full_like(z[:, 1:], math.nan)
    uniform = torch.full_like(z_q, math.nan)
    if others:
        marginal = torch.stack([model.predict(z[:, :-1], c) for c in others]).mean(0)
        uniform = others[0]

    # codes can be drawn uniformly; vectors cannot, those of another clip stand for them
    if quantises(model):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(model.quantizer.K, indices.shape, generator=generator)
        uniform = model.codes(drawn.to(z.device))
    return {
        "own": error_of(model.predict(z[:, :-1], z_q), z),
        "zero": error_of(model.predict(z[:, :-1], 0 * z_q), z),
        "random": error_of(model.predict(z[:, :-1], uniform), z),
        "copy": error_of(z[:, :-1], z),
        "marginal": error_of(marginal, z),
    }


def same_action_error(model, z, z_q, labels, names, own):
    """Error (B * T,) under the code of another clip of the batch with the same labels (B * T, L),
    nan where there is none. names: of the labels; own: the error under the own code."""
    none = torch.full_like(own, math.nan)
    if not names:
        return none

    # pairs of transitions of different clips with the same, known labels
    B, T = z_q.shape[:2]
    number = torch.arange(B * T)
    fits = (labels[:, None] == labels).all(-1)
    fits &= number[:, None] // T != number // T
    fits &= (labels != NO_LABEL).all(-1)

    # of several the next one: all are used equally often
    later = torch.where(fits, B * T - (number - number[:, None]) % (B * T), 0)
    chosen = later.argmax(1).to(z.device)
    codes = z_q.flatten(0, 1)[chosen].view_as(z_q)
    error = error_of(model.predict(z[:, :-1], codes), z)
    return torch.where(fits.any(1).to(z.device), error, none)


def to_numpy(x):
    """A tensor as an array; half precision becomes float32."""
    return x.cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()


# --- numbers ---


def named_by_others(codes, actions, recordings):
    """(the commonest action of each transition's code (n,) in the other recordings (n,), the true
    actions), both as numbers from 0: what codes say, learned where it is not scored. -1 where the
    others lack the code, or there are no others."""
    # how often each code goes with each action
    code = np.unique(codes, return_inverse=True)[1].ravel()
    action = np.unique(actions, return_inverse=True)[1].ravel()
    total = np.zeros((code.max() + 1, action.max() + 1), dtype=int)
    np.add.at(total, (code, action), 1)

    # name a recording's transitions by what the others say about their codes
    named = np.empty(len(code), dtype=int)
    for name in np.unique(recordings):
        rows = recordings == name
        others = total.copy()
        np.subtract.at(others, (code[rows], action[rows]), 1)
        commonest = np.where(others.max(1) > 0, others.argmax(1), -1)
        named[rows] = commonest[code[rows]]
    return named, action


def purity(codes, actions, recordings):
    """Share of the transitions whose action is the commonest one of their code (n,) in the other
    recordings (n,): what the literature calls purity, but learned on some recordings and scored on
    others, each in its turn. A code that the others lack counts as wrong: many codes gain nothing.
    nan with fewer than two recordings."""
    if len(np.unique(recordings)) < 2:
        return math.nan
    named, action = named_by_others(codes, actions, recordings)
    return float((named == action).mean())


def joint(labels):
    """Labels (n, L) as one class (n,)."""
    return np.unique(labels, axis=0, return_inverse=True)[1].ravel()


def perplexity(values):
    """exp(entropy) of values (n,) or rows (n, slots): as many equally frequent ones would be as
    uncertain."""
    p = np.unique(values, return_counts=True, axis=0)[1] / len(values)
    return float(np.exp(-(p * np.log(p)).sum()))


def over(measured, above, below):
    """Mean of one error over that of another, both of the same transitions: where an error needs
    another clip, those that have one (nan without any). An error that is nan for another reason
    makes the result nan."""
    # transitions for which both errors are known
    rows = np.ones(len(measured[above]), bool)
    for name in (above, below):
        if name in ("marginal", "random", "same"):
            rows &= ~np.isnan(measured[name])
    if not rows.any():
        return math.nan
    return quotient(measured[above][rows].mean(), measured[below][rows].mean())


def quotient(above, below):
    """above / below; inf or nan, no error, for a baseline that is 0 because nothing moves."""
    if below == 0:
        return math.inf if above else math.nan
    return float(above / below)


def decibels(ratio):
    """A ratio of squared errors in dB; nan stays nan."""
    if ratio == 0:
        return -math.inf
    return 10 * math.log10(ratio) if ratio > 0 else math.nan


def code_summary(measured, K):
    """What `held_out_codes` returns -> {RATIOS, CODES}: errors against the baselines, delta PSNR in
    dB (positive: its own are better), codes in use, with labels purity, NMI and AMI of what codes
    are named by and true actions (nan without, and where there is only one action). K: codes a
    slot, None for a model whose decoder does not use codes."""
    # errors
    summary = {f"mse_over_{k}": over(measured, "own", k) for k in ("copy", "zero", "marginal")}
    summary["nmse"] = quotient(measured["own"].mean(), measured["var"].mean())
    summary |= {f"psnr_{k}": decibels(over(measured, k, "own")) for k in ("random", "same")}
    summary["same_over_own"] = over(measured, "same", "own")
    summary["rollout_over_copy"] = over(measured, "rollout_4", "copy_4")
    summary |= dict.fromkeys(CODES, math.nan)
    if not K:
        return summary

    # codes in use
    ids = pack_codes(measured["codes"], K)
    summary["joint_codes"] = len(np.unique(ids))

    # perplexity of whole actions, and of each of their codes
    summary["joint_perplexity"] = perplexity(ids)
    summary["slot_perplexity"] = float(np.mean([perplexity(c) for c in measured["codes"].T]))
    summary["codebook_usage"] = float(np.mean([len(np.unique(c)) for c in measured["codes"].T]))

    # codes and true actions
    with_truth = has_truth(measured["labels"])
    if with_truth.any():
        actions = joint(measured["labels"][with_truth])

        # only transitions whose action is known
        ids = ids[with_truth]
        recordings = measured["recording"][with_truth]
        if len(np.unique(actions)) > 1:
            summary["purity"] = purity(ids, actions, recordings)
            summary["purity_one_code"] = purity(0 * ids, actions, recordings)
            # here, because sklearn takes a second to import and training does not need it
            from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

            # of codes and actions alone these could be bought: a code for each place of each
            # recording says much about the action there, and nothing elsewhere
            if len(np.unique(recordings)) > 1:
                named, true = named_by_others(ids, actions, recordings)
                summary["nmi"] = float(normalized_mutual_info_score(true, named))
                summary["ami"] = float(adjusted_mutual_info_score(true, named))
    return summary


def has_truth(labels):
    """Which rows of labels (n, L) say what happened."""
    if not labels.shape[1]:
        return np.zeros(len(labels), bool)
    return (labels != NO_LABEL).all(1)


# --- sentences, curves ---


def truth_notes(dataset, measured, split):
    """Sentences that say which true actions are missing, and which numbers are left out for it."""
    if not dataset.labels:
        yield f"no truth beside the {split} files (KEY.actions.npz): no purity, no AMI"
        return

    # files without truth, and labels that only some files have
    if dataset.unlabelled:
        names = ", ".join(dataset.unlabelled[:5])
        rest = ", ..." if len(dataset.unlabelled) > 5 else ""
        yield (
            f"{len(dataset.unlabelled)} of {len(dataset.files)} {split} files have no"
            f" {' and '.join(dataset.labels)} in a KEY.actions.npz and count for errors only:"
            f" {names}{rest}"
        )
    if dataset.unused:
        yield (
            f"{', '.join(dataset.unused)}: only some {split} files have this label, the others"
            f" {' and '.join(dataset.labels)} alone; it is not used"
        )

    # what purity needs: two recordings and two actions
    with_truth = has_truth(measured["labels"])
    if len(np.unique(measured["recording"][with_truth])) < 2:
        yield f"purity is learned on other recordings: the {split} files with truth are under two"
    if with_truth.any() and len(np.unique(joint(measured["labels"][with_truth]))) < 2:
        yield f"all {split} transitions have the same true action: purity and AMI would say nothing"


def complaints(summary, quantised):
    """Sentences about what is wrong with a model, worst first."""
    # fewer than three codes cannot name three actions
    if quantised and summary["joint_codes"] < 3:
        yield (
            f"joint codes in use: {summary['joint_codes']}. The codebook has collapsed (try a"
            " longer --vq_warmup_steps, or --kmeans)"
        )
    # fmin ignores a nan, which is a number that is not known
    if np.fmin(summary["mse_over_zero"], summary["mse_over_marginal"]) > 0.9:
        yield "the decoder ignores the code: other codes cost it less than 10 %"
    if summary["same_over_own"] > 2:
        cost = f"{summary['same_over_own']:.1f} times the error"
        yield (
            f"the code of another clip with the same action costs {cost}: the codes are no actions"
            " (--encoder_shift)"
        )


def plot_curves(out_dir, ipe):
    """curves.png of a run, from train.csv and val.csv, over epochs of `ipe` steps."""
    from matplotlib.figure import Figure  # takes a second to import

    # three plots: losses, baselines, truth
    train = read_csv(os.path.join(out_dir, "train.csv"))
    val = read_csv(os.path.join(out_dir, "val.csv"))
    fig = Figure(figsize=(13, 4), layout="constrained")
    losses, ratios, agreement = fig.subplots(1, 3)

    # training
    epochs = train["epoch"] + train["itr"] / ipe
    for name in ("mse_loss", "rollout_loss"):
        losses.plot(epochs, train[name], lw=0.5, label=name.replace("_loss", ", training"))
    losses.set(title="loss", ylabel="squared error, standardised latents")
    losses.set_yscale("log")

    # held out
    baselines = {
        "mse_over_copy": "copying the step before",
        "mse_over_zero": "zeroed codes",
        "mse_over_marginal": "codes of other clips, averaged",
    }
    if len(val["epoch"]):
        losses.plot(val["epoch"], val["mse_loss"], "o-", label="mse, held out")
        for name, label in baselines.items():
            ratios.plot(val["epoch"], val[name], "o-", label=label)
        for name, label in (("purity", "purity"), ("ami", "AMI"), ("nmi", "NMI")):
            agreement.plot(val["epoch"], val[name], "o-", label=label)

    # what is not validated yet has titles only
    ratios.set(title="held-out error over that of a baseline", ylabel="ratio; below 1 is better")
    agreement.set(title="codes and true actions, held out", ylim=(-0.05, 1.05))

    for ax in (losses, ratios, agreement):
        ax.set_xlabel(f"epochs of {ipe} steps")
        ax.set_xlim(losses.get_xlim())
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9)
        else:
            ax.text(0.5, 0.5, "no validation yet", ha="center", transform=ax.transAxes)
            ax.set_yticks([])
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))
