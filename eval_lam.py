"""Do latent actions mean something? What the codes of a train_lam.py run say about the true
actions, and what they do to the picture.

    python eval_lam.py --checkpoint out/lam --split test

Reads a run folder or checkpoint of train_lam.py and the H5 files of its manifest (KEY.actions.npz
beside them holds the truth, where there is one). Prints a table, writes report.json and codes.png
(what each of the most used codes moves, and how codes and actions go together) beside the
checkpoint."""

import argparse
import contextlib
import json
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_mutual_info_score,
    balanced_accuracy_score,
    normalized_mutual_info_score,
)
from torch import nn

import checkpoint
from evaluation.runs import precision_of
from files.latents import (
    Latents,
    decoded_scores,
    latent_sequences,
    open_manifest,
    open_vae,
    pack_codes,
    unpack_codes,
)
from files.logs import read_csv
from model import LatentActionModel

ERRORS = (
    "own",
    "copy",
    "zero",
    "marginal",
    "random",
    "same",
    "rollout_4",
    "copy_4",
)  # see held_out_codes
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
CODES = (
    "joint_codes",
    "joint_perplexity",
    "slot_perplexity",
    "codebook_usage",
    "purity",
    "nmi",
    "ami",
)


@torch.no_grad()
def held_out_codes(
    model, dataset, batch_size, clips, num_workers=0, autocast=contextlib.nullcontext
):
    """What a model does with at most `clips` windows of a Latents dataset, shared among ranks (all
    get everyone's): a dict of arrays over n transitions. codes (n, slots), labels (n, L), and mean
    squared errors of the step after, in standardised units: own (its code), copy (of the step
    before), zero (zeroed codes), marginal (mean prediction under the codes of four other clips:
    what can be known without the action), random (uniform codes: Genie's measure), same (the code
    of another clip of the batch with the same labels, nan without); by clip rollout_4 and copy_4
    (four steps ahead), the loss terms of forward, and var, the variance of z."""
    device, rank, world = (
        next(model.parameters()).device,
        *((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)),
    )
    items, rows = dataset.windows(max(batch_size, 2), clips, rank, world), []
    for batch in latent_sequences(dataset, batch_size, num_workers=num_workers, items=items):
        raw = batch["z"].to(device, non_blocking=True)
        with autocast():
            losses = model(raw)
            indices, _, z_q = model.encode(raw)
            z, (B, T) = model.normalize(raw), z_q.shape[:2]

            def error(codes, z=z):
                return (
                    (model.predict(z[:, :-1], codes) - z[:, 1:]).square().mean((2, 3, 4)).flatten()
                )

            others = [torch.roll(z_q, k, 0) for k in range(1, max(min(B, 5), 2))]
            marginal = torch.stack([model.predict(z[:, :-1], c) for c in others]).mean(0)
            uniform = others[0]
            if (
                model.quantizer is not None
            ):  # seeded by the number of a window: the same for any number of ranks
                generator = torch.Generator().manual_seed(items[len(rows)][0][1])
                uniform = model.codes(
                    torch.randint(model.quantizer.K, indices.shape, generator=generator).to(device)
                )
            row = {"own": error(z_q), "zero": error(0 * z_q), "random": error(uniform)}
            row |= {
                k: (x - z[:, 1:]).square().mean((2, 3, 4)).flatten()
                for k, x in (("copy", z[:, :-1]), ("marginal", marginal))
            }
            ahead = model.normalize(model.rollout(raw[:, 0], z_q[:, :4]))[:, -1]
            row |= {
                k: (x - z[:, min(4, T)]).square().mean((1, 2, 3))
                for k, x in (("rollout_4", ahead), ("copy_4", z[:, 0]))
            }
            row["same"] = torch.full_like(row["own"], math.nan)
            labels = batch.get("labels", torch.zeros(B, T, 0, dtype=torch.long)).flatten(0, 1)
            if dataset.labels:
                number = torch.arange(B * T)
                fits = (labels[:, None] == labels).all(-1) & (number[:, None] // T != number // T)
                later = torch.where(
                    fits, B * T - (number - number[:, None]) % (B * T), 0
                )  # the next one, so that all are used alike
                found = error(z_q.flatten(0, 1)[later.argmax(1).to(device)].view_as(z_q))
                row["same"] = torch.where(fits.any(1).to(device), found, row["same"])
        row |= {
            "codes": indices.flatten(0, 1),
            "labels": labels,
            "var": z.var((0, 1, 3, 4)).mean().expand(B),
        }
        row |= {k: v.expand(B) for k, v in losses.items() if k != "indices"}
        rows.append(
            {
                k: v.cpu().float().numpy() if v.is_floating_point() else v.cpu().numpy()
                for k, v in row.items()
            }
        )
    if dist.is_initialized():
        dist.all_gather_object(everyone := [None] * world, rows)
        rows = [
            r
            for group in zip(*(p + [None] * (max(map(len, everyone)) - len(p)) for p in everyone))
            for r in group
            if r is not None
        ]
    return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def purity(codes, actions):
    """Share of the second half of the transitions whose action is the commonest one of their code
    in the first half; codes (n,) that the first half lacks count as wrong, so that many codes buy
    nothing."""
    half, names = len(codes) // 2, {}
    for code in np.unique(codes[:half]):
        values, counts = np.unique(actions[:half][codes[:half] == code], return_counts=True)
        names[code] = values[counts.argmax()]
    return float(np.mean([names.get(c) == a for c, a in zip(codes[half:], actions[half:])]))


def joint(labels):
    """Labels (n, L) as one class (n,)."""
    return np.unique(labels, axis=0, return_inverse=True)[1].ravel()


def perplexity(values):
    p = np.unique(values, return_counts=True, axis=0)[1] / len(values)
    return float(np.exp(-(p * np.log(p)).sum()))


def code_summary(found, K):
    """What `held_out_codes` found -> {RATIOS, CODES}: errors against the baselines, delta PSNR in
    dB (positive: its own are better), codes in use, with labels purity, NMI and AMI of codes and
    actions (nan without). K: codes a slot, None for a continuous model."""
    mean = {
        k: float(np.nanmean(found[k])) if np.isfinite(found[k]).any() else math.nan for k in ERRORS
    }
    out = {f"mse_over_{k}": mean["own"] / mean[k] for k in ("copy", "zero", "marginal")}
    out |= {f"psnr_{k}": 10 * math.log10(mean[k] / mean["own"]) for k in ("random", "same")}
    out |= {
        "nmse": mean["own"] / float(found["var"].mean()),
        "same_over_own": mean["same"] / mean["own"],
    }
    out |= {"rollout_over_copy": mean["rollout_4"] / mean["copy_4"]} | dict.fromkeys(
        CODES, math.nan
    )
    if K:
        ids = pack_codes(found["codes"], K)
        out |= {"joint_codes": len(np.unique(ids)), "joint_perplexity": perplexity(ids)}
        out["slot_perplexity"] = float(np.mean([perplexity(c) for c in found["codes"].T]))
        out["codebook_usage"] = float(np.mean([len(np.unique(c)) for c in found["codes"].T]))
        if found["labels"].shape[1]:
            actions = joint(found["labels"])
            out |= {
                "purity": purity(ids, actions),
                "nmi": normalized_mutual_info_score(actions, ids),
            }
            out["ami"] = adjusted_mutual_info_score(actions, ids)
    return out


def complaints(summary, quantised):
    """Sentences about what is wrong with a model, worst first."""
    if quantised and summary["joint_codes"] < 3:
        yield (
            f"{summary['joint_codes']} joint codes are alive: the codebook has collapsed (a longer"
            " --vq_warmup_steps, --kmeans)"
        )
    if min(summary["mse_over_zero"], summary["mse_over_marginal"]) > 0.9:
        yield "the decoder ignores the code: other codes cost it less than 10 %"
    if summary["same_over_own"] > 2:
        cost = f"{summary['same_over_own']:.1f} times the error"
        yield (
            f"the code of another clip with the same action costs {cost}: the codes are no actions"
            " (--encoder_shift)"
        )


def plot_curves(out_dir):
    """curves.png of a run, from train.csv and val.csv."""
    train, val = (read_csv(os.path.join(out_dir, n)) for n in ("train.csv", "val.csv"))
    fig = Figure(figsize=(13, 4), layout="constrained")
    axes = fig.subplots(1, 3)
    at = train["epoch"] + train["itr"] / max(train["itr"].max() + 1, 1)
    for name in ("mse_loss", "rollout_loss"):
        axes[0].plot(at, train[name], lw=0.5, label=name.replace("_loss", ", training"))
    if len(val["epoch"]):
        axes[0].plot(val["epoch"], val["mse_loss"], "o-", label="mse, held out")
        for name, label in zip(
            RATIOS[:3],
            ("copying the step before", "zeroed codes", "codes of other clips, averaged"),
        ):
            axes[1].plot(val["epoch"], val[name], "o-", label=label)
        for name in ("purity", "ami", "nmi"):
            axes[2].plot(val["epoch"], val[name], "o-", label=name)
    titles = ("loss", "held-out error over that of", "codes and true actions, held out")
    for ax, title, unit in zip(axes, titles, ("squared error, standardised latents", "ratio", "")):
        ax.set(title=title, xlabel="epoch", ylabel=unit)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9)
    axes[0].set_yscale("log")
    axes[2].set_ylim(-0.05, 1.05)
    checkpoint.write_atomically(
        os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110)
    )


def open_lam(path):
    """A run folder or checkpoint of train_lam.py -> (LatentActionModel in eval mode, its checkpoint
    dictionary, file path)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"--checkpoint {path}: no such run folder or file")
    folder = os.path.isdir(path)
    state, path = checkpoint.load_latest(path) if folder else (checkpoint.load(path), path)
    if state is None or "lam" not in state:
        raise ValueError(
            f"{path}: no checkpoint of train_lam.py"
            + (" (eval.py judges those of train_ac.py)" if state else "")
        )
    model = LatentActionModel(**state["lam"])
    model.load_state_dict(state["model"])
    return model.eval(), state, path


@torch.no_grad()
def encode_all(model, dataset, batch_size, clips):
    """codes, z_e, labels and raw pairs (n, 2C, h, w) (pooled to at most 16 x 16) of the transitions
    of at most `clips` windows."""
    rows, device = [], next(model.parameters()).device
    for batch in latent_sequences(dataset, batch_size, items=dataset.windows(batch_size, clips)):
        indices, z_e, _ = model.encode(batch["z"].to(device))
        small = F.adaptive_avg_pool2d(
            batch["z"].flatten(0, 1), min(16, batch["z"].shape[-1])
        ).unflatten(0, batch["z"].shape[:2])
        pairs = torch.cat([small[:, :-1], small[:, 1:]], dim=2)
        rows.append([x.flatten(0, 1).cpu() for x in (indices, z_e, batch["labels"], pairs)])
    return dict(
        zip(("codes", "z_e", "labels", "pairs"), (torch.cat(x).numpy() for x in zip(*rows)))
    )


def linear_probe(x, y, x_test, y_test):
    """Balanced accuracy of a logistic regression fitted on (x, y)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    found = LogisticRegression(max_iter=3000, class_weight="balanced").fit((x - mean) / std, y)
    return balanced_accuracy_score(y_test, found.predict((x_test - mean) / std))


def ceiling(x, y, x_test, y_test, steps=2400):
    """Balanced accuracy of a small convolutional network trained with the labels on raw pairs of
    steps: what they give away."""
    torch.manual_seed(0)
    names, y = np.unique(y, return_inverse=True)
    x, x_test, y = torch.from_numpy(x), torch.from_numpy(x_test), torch.from_numpy(y)
    weight = len(y) / (len(names) * torch.bincount(y)).float()
    net = nn.Sequential(
        nn.Conv2d(x.shape[1], 48, 3, 1, 1),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, 2, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48 * (x.shape[2] // 4) ** 2, len(names)),
    )
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(net(x[rows]), y[rows], weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return balanced_accuracy_score(y_test, names[net.eval()(x_test).argmax(1).numpy()])


@torch.no_grad()
def displacement(model, z, code):
    """Median motion (down, right) in latent pixels that a code (slots,) causes in steps z (B, C, H,
    W): the peak of the circular cross-correlation of each step and the one decoded after it."""
    after = model.decode(z, code.expand(len(z), -1))
    a, b = (torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)) for x in (z, after))
    peak = torch.fft.irfft2((b * a.conj()).sum(1), s=z.shape[2:]).flatten(1).argmax(1)
    (H, W), (down, right) = z.shape[2:], (peak // z.shape[3], peak % z.shape[3])
    return ((down + H // 2) % H - H // 2).median().item(), (
        (right + W // 2) % W - W // 2
    ).median().item()


def plot_codes(path, ids, actions, names, moves):
    """codes.png: the motion that each of the most used codes causes, and how often each true action
    goes with it."""
    values = np.unique(actions)
    table = np.array([[np.mean(actions[ids == code] == v) for v in values] for code in moves])
    share = [np.mean(ids == code) for code in moves]
    order = np.lexsort((-np.array(share), table.argmax(1)))
    codes = [list(moves)[i] for i in order]
    fig = Figure(figsize=(13, 1.6 + 0.32 * len(codes)), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 2])
    reach = max(1, max(max(map(abs, m)) for m in moves.values()))
    down, across = np.array([moves[code] for code in codes], dtype=float).T
    left.quiver(
        0 * down,
        range(len(codes)),
        across,
        -down,
        angles="uv",
        scale_units="inches",
        scale=5 * reach,
        width=0.012,
        color="tab:blue",
    )
    for row, code in enumerate(codes):
        left.text(
            0.6, row, "{:+.0f} down, {:+.0f} right".format(*moves[code]), va="center", fontsize=11
        )
    left.set(
        xlim=(-0.6, 2.2),
        ylim=(len(codes) - 0.4, -0.6),
        xticks=[],
        title="motion it causes, latent pixels a step",
    )
    left.set_ylabel("code (share of steps)")
    labels = [
        f"{'-'.join(map(str, names[code]))}  ({share[i]:.0%})" for code, i in zip(codes, order)
    ]
    left.set_yticks(range(len(codes)), labels, fontsize=11)
    image = right.imshow(table[order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.set(yticks=[], title="true actions of the steps that get this code", xlabel="true action")
    right.set_xticks(range(len(values)), values, fontsize=11)
    fig.colorbar(image, ax=right, label="share of the code's steps")
    checkpoint.write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="run folder of train_lam.py, or one of its checkpoints"
    )
    parser.add_argument(
        "--data_dir", help="folder of the H5 files, with manifest.json (default: the run's)"
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "validation"],
        help="which files of the manifest to judge on",
    )
    parser.add_argument(
        "--val_clips", type=int, default=512, help="windows to evaluate, and to fit probes on"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="windows at once")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="autocast precision (default: what the run was trained in)",
    )
    parser.add_argument(
        "--vae",
        metavar="diffusers:FOLDER",
        help="decode predicted steps with the video VAE that made the latents",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim"],
        choices=["psnr", "ssim", "lpips"],
        help="of frames, with --vae",
    )
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    model, state, path = open_lam(args.checkpoint)
    manifest = os.path.join(args.data_dir, "manifest.json") if args.data_dir else state["manifest"]
    meta, splits = open_manifest(manifest)
    if meta["fingerprint"] != state["fingerprint"]:
        print("note: these are not the files that the run was trained on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    dtype, autocast = precision_of(args.dtype, state, device)
    test = Latents(splits[args.split], state["sequence_length"])
    K = state["lam"]["num_embeddings"] if model.quantizer is not None else None
    found = held_out_codes(model, test, args.batch_size, args.val_clips, args.num_workers, autocast)
    summary = code_summary(found, K)
    print(
        f"{path}: {len(found['own'])} transitions of {len(test.files)} files ({args.split});"
        f" {dtype} on {device.type}"
    )
    print("\n".join(f"  {k:20} {v:10.4g}" for k, v in summary.items() if not math.isnan(v)))
    for sentence in complaints(summary, K is not None):
        print(f"WARNING: {sentence}")
    report = {"checkpoint": path, "split": args.split, "transitions": len(found["own"])} | summary
    out = os.path.dirname(os.path.abspath(path))
    train = Latents(splits["train"], state["sequence_length"])
    if test.labels and train.labels != test.labels:
        print(
            f"note: no probes: training and {args.split} files do not all have the same labels"
            " (KEY.actions.npz)"
        )
    elif test.labels:
        with autocast():
            fit, held = (
                encode_all(model, d, args.batch_size, args.val_clips) for d in (train, test)
            )
        ids, ids_fit = (pack_codes(x["codes"], K or 1) for x in (held, fit))
        print("balanced accuracy      chance   codes    z_e   labels on raw latents")
        for i, name in enumerate(test.labels):
            y, y_test = fit["labels"][:, i], held["labels"][:, i]
            one_hot = [np.float64(x[:, None] == np.unique(ids_fit)) for x in (ids_fit, ids)]
            row = {
                "chance": 1 / len(np.unique(y)),
                "codes": linear_probe(one_hot[0], y, one_hot[1], y_test) if K else math.nan,
            }
            row["z_e"] = linear_probe(
                fit["z_e"].reshape(len(y), -1), y, held["z_e"].reshape(len(y_test), -1), y_test
            )
            row["ceiling"] = ceiling(fit["pairs"], y, held["pairs"], y_test)
            print(f"  {name:20} " + " ".join(f"{v:7.3f}" for v in row.values()))
            report[f"probe_{name}"] = row
    if args.vae:
        vae = open_vae(args.vae, torch.float32).to(model.scale.device)
        sample = (batch["z"] for batch in latent_sequences(test, 4, items=test.windows(4, 32)))
        # in float32: the VAE was not trained with the run, and is no part of its precision
        report["decoded"] = decoded_scores(model, sample, vae, args.metrics)
        for name, pair in report["decoded"].items():
            print(
                "  {:5} of decoded frames: {:.3f}, of copying the step before {:.3f}".format(
                    name, *pair
                )
            )
    if K:
        values, counts = np.unique(pack_codes(found["codes"], K), return_counts=True)
        top = values[np.argsort(-counts)[:16]].tolist()
        z = torch.stack(
            [test[0, 0, n, k]["z"][0] for _, _, n, k in sum(test.windows(8, 32), [])]
        ).to(model.scale.device)
        names = {
            code: unpack_codes(torch.tensor(code), K, model.num_codes).tolist() for code in top
        }
        with autocast():
            moves = {
                code: displacement(model, z, torch.tensor(names[code], device=z.device))
                for code in top
            }
        actions = joint(found["labels"]) if test.labels else np.zeros(len(found["own"]), int)
        plot_codes(
            os.path.join(out, "codes.png"), pack_codes(found["codes"], K), actions, names, moves
        )
        share = dict(zip(values, (counts / counts.sum()).tolist()))
        report["codes"] = [{"code": names[c], "share": share[c], "moves": moves[c]} for c in moves]
    checkpoint.write_atomically(
        os.path.join(out, "report.json"), json.dumps(report, indent=1).encode()
    )
    peak = checkpoint.peak_memory(model.scale.device)
    print(f"written to {out}: report.json{', codes.png' if K else ''}; peak memory {peak:.0f} MiB")
