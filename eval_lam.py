"""Do latent actions mean something? What the codes of a train_lam.py run say about the true
actions, and what they do to the picture.

    python eval_lam.py --checkpoint out/lam --split test

Reads a run folder or checkpoint of train_lam.py and the H5 files of its manifest (KEY.actions.npz
beside them holds the truth, where there is one). Prints a table, writes report.json and codes.png
(what each of the most used codes moves, and how codes and actions go together) beside the
checkpoint, then adds to the report what takes longer: probes, decoded frames, and the ceiling (a
network trained with the labels; --no-ceiling leaves it out)."""

import argparse
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm import tqdm

import checkpoint
from data import Latents, latent_sequences
from evaluation.codes import (
    MEANINGS,
    code_summary,
    complaints,
    has_truth,
    held_out_codes,
    joint,
    quantises,
    truth_notes,
)
from evaluation.held_out import precision_of
from files.disk import write_atomically
from files.latents import (
    check_metrics,
    decoded_scores,
    open_manifest,
    open_vae,
    pack_codes,
    unpack_codes,
)
from model import LatentActionModel


def find_manifest(state, data_dir, manifest_path):
    """(manifest, folder of its files) to judge a run on: the run's own, unless flags name
    others."""
    folder = data_dir or state.get("data_dir") or os.path.dirname(state["manifest"])
    if manifest_path:
        return manifest_path, folder
    same = state.get("data_dir") and os.path.realpath(folder) == os.path.realpath(state["data_dir"])
    beside = os.path.join(folder, "manifest.json")
    if data_dir and os.path.exists(beside) and not (same and os.path.exists(state["manifest"])):
        return beside, folder
    if not os.path.exists(state["manifest"]):
        raise FileNotFoundError(
            f"{state['manifest']}, which the run was trained from, is gone: name the folder of the"
            " latents with --data_dir, or the split with --manifest_path"
        )
    return state["manifest"], folder


def write_report(out, report):
    """report.json; JSON has no word for nan: null."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return x

    text = json.dumps(plain(report), indent=1)
    write_atomically(os.path.join(out, "report.json"), text.encode())


def open_lam(path):
    """A run folder or checkpoint of train_lam.py -> (LatentActionModel in eval mode, its checkpoint
    dictionary, file path)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"--checkpoint {path}: no such run folder or file")
    folder = os.path.isdir(path)
    given = path
    state, path = checkpoint.load_latest(path) if folder else (checkpoint.load(path), path)
    if state is None:
        raise ValueError(f"--checkpoint {given}: no checkpoint in it")
    if "lam" not in state:
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
    of at most `clips` windows, those whose file has its truth."""
    rows, device = [], next(model.parameters()).device
    for batch in latent_sequences(dataset, batch_size, items=dataset.windows(batch_size, clips)):
        indices, z_e, _ = model.encode(batch["z"].to(device))
        size = [min(16, length) for length in batch["z"].shape[-2:]]
        small = F.adaptive_avg_pool2d(batch["z"].flatten(0, 1), size)
        small = small.unflatten(0, batch["z"].shape[:2])
        pairs = torch.cat([small[:, :-1], small[:, 1:]], dim=2)
        rows.append([x.flatten(0, 1).cpu() for x in (indices, z_e, batch["labels"], pairs)])
    found = [torch.cat(x).numpy() for x in zip(*rows)]
    known = has_truth(found[2])
    return dict(zip(("codes", "z_e", "labels", "pairs"), (x[known] for x in found)))


def linear_probe(x, y, x_test, y_test):
    """Balanced accuracy of a logistic regression fitted on (x, y)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    found = LogisticRegression(max_iter=3000, class_weight="balanced").fit((x - mean) / std, y)
    return balanced_accuracy(y_test, found.predict((x_test - mean) / std))


def balanced_accuracy(y, guess):
    """Mean over the true classes of the share that is recognised. (scikit-learn's warns of classes
    that only the guess has.)"""
    return float(np.mean([np.mean(guess[y == value] == value) for value in np.unique(y)]))


def ceiling(x, y, x_test, y_test, name=""):
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
        nn.LazyLinear(len(names)),
    )
    net(x[:1])  # the size of the last layer
    steps = min(max(40 * len(x) // 64, 300), 2400)  # few transitions are learned by heart early
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), unit="step", desc=f"ceiling {name}"):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(net(x[rows]), y[rows], weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        guess = torch.cat([net.eval()(part).argmax(1) for part in x_test.split(256)])
    return balanced_accuracy(y_test, names[guess.numpy()])


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
    goes with it. actions (n,): -1 where it is not known."""
    values = np.unique(actions[actions >= 0])
    table = np.zeros((len(moves), len(values)))
    for row, code in enumerate(moves):
        known = actions[(ids == code) & (actions >= 0)]
        if len(known):
            table[row] = [np.mean(known == value) for value in values]
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
    write_atomically(path, lambda f: fig.savefig(f, dpi=100, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="run folder of train_lam.py, or one of its checkpoints"
    )
    parser.add_argument("--data_dir", help="folder of the H5 files (default: the run's)")
    parser.add_argument(
        "--manifest_path",
        help="split of prepare.manifest (default: the run's, or that of another --data_dir)",
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
        choices=["psnr", "ssim", "lpips"],
        help="of frames, with --vae (default: psnr ssim)",
    )
    parser.add_argument(
        "--ceiling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train a small network with the labels on raw latents: what they give away (minutes)",
    )
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    for name in ("val_clips", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small")

    # what is missing for the frames is said before anything takes time
    vae = None
    if args.vae:
        args.metrics = args.metrics or ["psnr", "ssim"]
        check_metrics(args.metrics)
        vae = open_vae(args.vae, torch.float32)
    elif args.metrics:
        parser.error("--metrics is for decoded frames: name the video VAE with --vae")

    # the run and the files to judge it on
    model, state, path = open_lam(args.checkpoint)
    manifest, folder = find_manifest(state, args.data_dir, args.manifest_path)
    meta, splits = open_manifest(manifest, folder)
    if not splits.get(args.split):
        filled = [k for k, files in splits.items() if files and k != "train"]
        raise ValueError(
            f"{manifest} has no {args.split} files: "
            + (f"pass --split {filled[0]}" if filled else "make it again with other ratios")
        )
    for name in ("channels", "size"):
        if list(np.ravel(meta[name])) != list(np.ravel(state["lam"][name])):
            raise ValueError(
                f"{manifest} lists latents of {name} {meta[name]}, {path} was trained on {name}"
                f" {state['lam'][name]}: judge it on latents of its own kind"
            )
    if meta["fingerprint"] != state["fingerprint"]:
        print("note: these are not the files that the run was trained on")
    else:
        trained_on = set(state.get("train_files", ()))
        names = [os.path.relpath(f.path, folder) for f in splits[args.split]]
        both = sorted(trained_on & set(names))
        if both:
            print(
                f"WARNING: {len(both)} of {len(names)} {args.split} files of {manifest} were"
                f" trained on, {both[0]} for one: judge with the run's own --manifest_path"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    dtype, autocast = precision_of(args.dtype, state, device)
    test = Latents(splits[args.split], state["sequence_length"])
    out = os.path.dirname(os.path.abspath(path))

    # errors and codes
    K = state["lam"]["num_embeddings"] if quantises(model) else None
    found = held_out_codes(model, test, args.batch_size, args.val_clips, args.num_workers, autocast)
    summary = code_summary(found, K)
    print(
        f"{path}: {len(found['own'])} transitions of {len(test.files)} files ({args.split});"
        f" {dtype} on {device.type}"
    )
    for name, value in summary.items():
        if not math.isnan(value):
            print(f"  {name:20} {value:10.4g}  {MEANINGS[name]}")
    if model.quantizer is not None and not K:
        steps, warmup = int(model.quantizer.seen[0]), model.quantizer.warmup
        print(
            f"WARNING: the run stopped in its warm-up, after {steps} of {warmup} steps"
            " (--vq_warmup_steps): its decoder does not use codes yet, so nothing is said of them"
        )
    for sentence in complaints(summary, K is not None):
        print(f"WARNING: {sentence}")
    for sentence in truth_notes(test, found, args.split):
        print(f"note: {sentence}")
    report = {"checkpoint": path, "split": args.split, "transitions": len(found["own"])} | summary
    report["quantises"] = K is not None
    write_report(out, report)
    if K:
        ids = pack_codes(found["codes"], K)
        values, counts = np.unique(ids, return_counts=True)
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
        actions = np.zeros(len(ids), int)
        if test.labels:
            known = has_truth(found["labels"])
            actions = np.full(len(ids), -1)
            actions[known] = joint(found["labels"][known])
        plot_codes(os.path.join(out, "codes.png"), ids, actions, names, moves)
        share = dict(zip(values, (counts / counts.sum()).tolist()))
        report["codes"] = [{"code": names[c], "share": share[c], "moves": moves[c]} for c in moves]
        write_report(out, report)

    # what a classifier reads from codes and vectors
    train = Latents(splits["train"], state["sequence_length"]) if splits["train"] else None
    labels = [k for k in test.labels if train is not None and k in train.labels]
    for name in test.labels:
        if name not in labels:
            print(f"note: no probe of {name}: the training files do not have it (KEY.actions.npz)")
    probed = []
    if labels:
        with autocast():
            fit = encode_all(model, train, args.batch_size, args.val_clips)
            held = encode_all(model, test, args.batch_size, args.val_clips)
        ids_fit, ids = (pack_codes(x["codes"], K or 1) for x in (fit, held))
        one_hot = [np.float64(x[:, None] == np.unique(ids_fit)) for x in (ids_fit, ids)]
        print("balanced accuracy of a probe      chance   codes     z_e")
    for name in labels:
        y, y_test = (
            fit["labels"][:, train.labels.index(name)],
            held["labels"][:, test.labels.index(name)],
        )
        if not len(y) or not len(y_test):
            print(f"note: no probe of {name}: no transition of these windows has its truth")
            continue
        if len(np.unique(y)) < 2:
            print(f"note: no probe of {name}: it is {y[0]} in all training transitions")
            continue
        if unseen := sorted(set(y_test.tolist()) - set(y.tolist())):
            print(f"note: {name} {unseen} never occurs in training: no probe can name it")
        row = {"chance": 1 / len(np.unique(y)), "codes": math.nan}
        if K:
            row["codes"] = linear_probe(one_hot[0], y, one_hot[1], y_test)
        z_fit, z_held = fit["z_e"].reshape(len(y), -1), held["z_e"].reshape(len(y_test), -1)
        row["z_e"] = linear_probe(z_fit, y, z_held, y_test)
        print(f"  {name:30} " + " ".join(f"{v:7.3f}" for v in row.values()), flush=True)
        report[f"probe_{name}"] = row
        probed.append((name, y, y_test))
        write_report(out, report)

    # frames
    if vae is not None:
        vae.to(model.scale.device)
        sample = (batch["z"] for batch in latent_sequences(test, 4, items=test.windows(4, 32)))
        report["decoded"] = decoded_scores(model, sample, vae, args.metrics)
        for name, pair in report["decoded"].items():
            print(
                "  {:5} of decoded frames: {:.3f}, of copying the step before {:.3f}".format(
                    name, *pair
                )
            )
        write_report(out, report)

    # the upper bound
    if probed and args.ceiling:
        print("balanced accuracy of a network trained with the labels on raw latents:")
    for name, y, y_test in probed if args.ceiling else []:
        report[f"probe_{name}"]["ceiling"] = ceiling(fit["pairs"], y, held["pairs"], y_test, name)
        print(f"  {name:30} {report[f'probe_{name}']['ceiling']:7.3f}")
        write_report(out, report)
    peak = checkpoint.peak_memory(model.scale.device)
    print(f"written to {out}: report.json{', codes.png' if K else ''}; peak memory {peak:.0f} MiB")
