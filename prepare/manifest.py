"""Check a folder of video-VAE latents (*.h5) and split it by file at random: what train_lam.py
trains from.

    python -m prepare.manifest latents --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1 --seed 42
    python -m prepare.manifest latents-play --size 16 --test_files 'map2[5-9]*' 'map30*'            # hold out maps of the demo's play

Reads every value once. Each file must hold one dataset (chunks, 16, T, 64, 64) of finite numbers, T
1 or 2, and enough steps for a window; what does not is left out and listed. Writes
DIR/manifest.json: {"metadata": ratios, seed, counts, mean and std of the training latents (of all
values, and by channel), fingerprint, skipped files with the reason, "splits": {"train",
"validation", "test": [{path, shape, dtype, bytes}]}}, paths relative to DIR."""

import argparse
import collections
import fnmatch
import functools
import glob
import hashlib
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from checkpoint import one_sentence, write_atomically
from files.latents import open_dataset, read_labels
from kernels import merge_moments


def check(path, shape, sequence_length):
    """(entry, (n, mean, M2) by channel, hash of the values) of a file. Raises ValueError or OSError
    saying what is wrong with it."""
    data = open_dataset(path)
    C, H, W = shape
    if data.ndim != 5 or (data.shape[1], *data.shape[3:]) != shape or data.shape[2] not in (1, 2):
        raise ValueError(f"shape {list(data.shape)}, not [chunks, {C}, 1 or 2, {H}, {W}]")
    if data.dtype.kind != "f":
        raise ValueError(f"dtype {data.dtype}, not a float")
    if data.shape[0] * data.shape[2] < sequence_length:
        raise ValueError(
            f"{data.shape[0]} chunks of {data.shape[2]} steps are fewer than the {sequence_length}"
            " steps of a window"
        )
    parts, digest, rows = [], hashlib.sha256(), max(2**22 // data[0].nbytes, 1)
    for first in range(0, len(data), rows):
        values = np.ascontiguousarray(data[first : first + rows])
        if not np.isfinite(values).all():
            n = first + int(np.argmax(~np.isfinite(values).all(axis=(1, 2, 3, 4))))
            raise ValueError(f"chunk {n} holds values that are not finite")
        digest.update(values)
        x = values.astype(np.float64).swapaxes(0, 1).reshape(C, -1)
        mean = x.mean(1)
        parts.append((x.shape[1], mean, np.square(x - mean[:, None]).sum(1)))
    read_labels(path, data.shape[0] * data.shape[2])
    entry = {"shape": list(data.shape), "dtype": str(data.dtype), "bytes": os.path.getsize(path)}
    return entry, functools.reduce(merge_moments, parts), digest.hexdigest()


def split_counts(n, ratios):
    """How many of n files each split gets: ratios rounded, but one at least where the ratio is not
    zero and n allows."""
    counts = [max(round(n * r), 1) if r else 0 for r in ratios[1:]]
    while n - sum(counts) < 1 and sum(counts):
        counts[max((1, 0), key=lambda i: counts[i])] -= (
            1  # rather the test files than the validation files
        )
    return [n - sum(counts), *counts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dir", help="folder of the *.h5 files")
    parser.add_argument(
        "--train_ratio", type=float, default=0.8, help="share of the files to train on"
    )
    parser.add_argument(
        "--val_ratio", type=float, default=0.1, help="share of the files to validate on"
    )
    parser.add_argument(
        "--test_ratio", type=float, default=0.1, help="share of the files left for the end"
    )
    parser.add_argument(
        "--test_files",
        nargs="+",
        help="patterns of the names of the test files; the others are split train : val",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the split")
    parser.add_argument(
        "--sequence_length", type=int, default=8, help="steps that a file must have"
    )
    parser.add_argument("--channels", type=int, default=16, help="channels of the latents")
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--output", help="where to write it (default DIR/manifest.json)")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    ratios = (args.train_ratio, args.val_ratio, args.test_ratio)
    if abs(sum(ratios) - 1) > 1e-6 or min(ratios) < 0 or not args.train_ratio:
        given = " + ".join(f"{r:g}" for r in ratios)
        raise ValueError(
            "--train_ratio, --val_ratio and --test_ratio must be shares that sum to 1, not"
            f" {given}, the first above 0"
        )
    paths = sorted(glob.glob(os.path.join(glob.escape(args.dir), "*.h5")))
    if not paths:
        raise ValueError(f"no *.h5 file in {args.dir}")
    good, skipped = {}, {}
    for path in tqdm(paths, unit="file", desc="check"):
        name = os.path.basename(path)
        try:
            good[name] = check(path, (args.channels, args.size, args.size), args.sequence_length)
        except (ValueError, OSError) as e:
            skipped[name] = str(e).splitlines()[0]
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    if len(good) < 1:
        raise ValueError(
            f"none of the {len(paths)} files in {args.dir} can be used; the first:"
            f" {min(skipped.items())}"
        )
    if shapes := collections.Counter(e["shape"][2] for e, _, _ in good.values()):
        steps = shapes.most_common(1)[0][0]
        if len(shapes) > 1:
            raise ValueError(
                f"files of 1 and of 2 steps a chunk ({dict(shapes)}) are at different rates: keep"
                " them in different folders"
            )
    test = sorted(
        name for name in good if any(fnmatch.fnmatchcase(name, p) for p in args.test_files or [])
    )
    names = np.random.default_rng(args.seed).permutation(sorted(good.keys() - test)).tolist()
    if args.test_files and not (test and names):
        raise ValueError(
            f"--test_files {' '.join(args.test_files)} takes {len(test)} of {len(good)} files: give"
            " patterns that take some"
        )
    if test:
        ratios = (ratios[0] / sum(ratios[:2]), ratios[1] / sum(ratios[:2]), 0.0)
    counts = dict(zip(("train", "validation", "test"), split_counts(len(names), ratios)))
    ends = np.cumsum([0, *counts.values()])
    splits = {k: sorted(names[i:j]) for k, i, j in zip(counts, ends, ends[1:])} | (
        {"test": test} if test else {}
    )
    counts = {k: len(v) for k, v in splits.items()}
    n, mean, m2 = functools.reduce(merge_moments, (good[name][1] for name in splits["train"]))
    every = functools.reduce(merge_moments, ((n, m, v) for m, v in zip(mean, m2)))
    digest = hashlib.sha256(
        json.dumps(
            [[name, good[name][0]["shape"], good[name][2]] for name in sorted(good)]
        ).encode()
    )
    metadata = {
        "ratios": ratios,
        "seed": args.seed,
        "files": counts,
        "steps": {
            k: sum(good[name][0]["shape"][0] * steps for name in v) for k, v in splits.items()
        },
        "steps_per_chunk": steps,
        "channels": args.channels,
        "size": [args.size, args.size],
        "mean": float(every[1]),
        "std": float(np.sqrt(every[2] / every[0])),
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(m2 / n).tolist(),
        "fingerprint": digest.hexdigest(),
        "skipped": skipped,
    }
    entries = {k: [{"path": name} | good[name][0] for name in v] for k, v in splits.items()}
    out = args.output or os.path.join(args.dir, "manifest.json")
    write_atomically(out, json.dumps({"metadata": metadata, "splits": entries}, indent=1).encode())
    print(
        f"{out}: "
        + ", ".join(f"{counts[k]} files of {metadata['steps'][k]} steps in {k}" for k in counts)
        + f"; {len(skipped)} left out"
    )
    print(
        f"training latents: mean {metadata['mean']:.4f}, std {metadata['std']:.4f}, {steps} steps a"
        " chunk"
    )
    if empty := [k for k, v in counts.items() if not v and ratios[list(counts).index(k)]]:
        print(f"WARNING: too few files: nothing in {' and '.join(empty)}")
