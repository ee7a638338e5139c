"""Check a folder of video-VAE latents (*.h5) and split it by file at random: what train_lam.py
trains from.

    python -m prepare.manifest latents --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1 --seed 42
    python -m prepare.manifest latents-play --size 16 --test_files 'map2[5-9]*' 'map30*'            # hold out maps of the demo's play

Reads every value of DIR and its folders once. Each file must hold one dataset (chunks, 16, T, 64,
64) of finite numbers, T 1 or 2, and enough steps for a window; --size 16 or --size 60 104 is for
latents of another size. What does not fit is left out and listed, and so are constant steps, parts
that were never written, and a second copy of the same latents. Writes DIR/manifest.json:
{"metadata": ratios, seed, counts, mean and std of the training latents (of all values, and by
channel), fingerprint, skipped files with the reason, "splits": {"train", "validation", "test":
[{path, shape, dtype, bytes}]}}, paths relative to DIR."""

import argparse
import collections
import fnmatch
import functools
import hashlib
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from checkpoint import one_sentence
from files.disk import write_atomically
from files.latents import (
    SUFFIX,
    find_files,
    of_the_disk,
    open_dataset,
    read_labels,
    read_rows,
)
from kernels import merge_moments


def wrong_shape(shape, C, H, W):
    """What is wrong with the shape of a dataset, and which flags would fit it; "" if nothing is."""
    if len(shape) == 5 and (shape[1], *shape[3:]) == (C, H, W) and shape[2] in (1, 2):
        return ""
    text = f"shape {list(shape)}, not [chunks, {C}, 1 or 2, {H}, {W}]"
    if len(shape) != 5 or shape[2] not in (1, 2):
        return text
    flags = []
    if shape[1] != C:
        flags.append(f"--channels {shape[1]}")
    if shape[3] != shape[4]:
        flags.append(f"--size {shape[3]} {shape[4]}")
    elif shape[3:] != (H, W):
        flags.append(f"--size {shape[3]}")
    return f"{text}: for latents of this shape pass {' '.join(flags)}"


def check(path, shape, sequence_length):
    """(entry, (n, mean, M2) by channel, hash of the values, names of the labels, hash of the values
    in 16 bits) of a file. Raises ValueError or OSError saying what is wrong with it."""
    data = open_dataset(path)
    C, H, W = shape
    if reason := wrong_shape(data.shape, C, H, W):
        raise ValueError(reason)
    if data.dtype.kind != "f":
        raise ValueError(f"dtype {data.dtype}, not a float")
    if data.shape[0] * data.shape[2] < sequence_length:
        raise ValueError(
            f"{data.shape[0]} chunks of {data.shape[2]} steps are fewer than the {sequence_length}"
            " steps of a window"
        )
    chunk_bytes = C * data.shape[2] * H * W * data.dtype.itemsize
    rows = max(2**22 // chunk_bytes, 1)  # at once
    parts, digest, rounded = [], hashlib.sha256(), hashlib.sha256()
    first_step, moves = None, False
    for first in range(0, len(data), rows):
        values = np.ascontiguousarray(read_rows(data, first, first + rows))
        if not np.isfinite(values).all():
            n = first + int(np.argmax(~np.isfinite(values).all(axis=(1, 2, 3, 4))))
            raise ValueError(f"chunk {n} holds values that are not finite")
        # no VAE gives the same number everywhere: a writer that died does, or a wrong array
        flat = values.max(axis=(1, 3, 4)) == values.min(axis=(1, 3, 4))  # (rows, T)
        if flat.any():
            n, t = np.argwhere(flat)[0]
            raise ValueError(
                f"all values of chunk {first + n}, step {t} are {values[n, 0, t, 0, 0]:g}: they"
                " are no latents"
            )
        if first_step is None:
            first_step = values[:1, :, :1].copy()
        moves = moves or bool((values != first_step).any())
        digest.update(values)
        with np.errstate(over="ignore"):
            rounded.update(np.ascontiguousarray(values, dtype="<f2"))
        x = values.astype(np.float64).swapaxes(0, 1).reshape(C, -1)
        mean = x.mean(1)
        parts.append((x.shape[1], mean, np.square(x - mean[:, None]).sum(1)))
    if not moves:
        raise ValueError("all its steps are the same: nothing happens in it")
    labels = tuple(read_labels(path, data.shape[0] * data.shape[2]))
    entry = {"shape": list(data.shape), "dtype": str(data.dtype), "bytes": os.path.getsize(path)}
    moments = functools.reduce(merge_moments, parts)
    return entry, moments, digest.hexdigest(), labels, rounded.hexdigest()


def leave_out_copies(good, skipped):
    """Of files with the same values, in 16 bits or more, keep the first: the others could be held
    out and trained on."""
    first = {}
    for name in sorted(good):
        entry, digest = good[name][0], good[name][4]
        same = first.setdefault((tuple(entry["shape"]), digest), name)
        if same != name:
            skipped[name] = f"the same latents as {same}"
            del good[name]


def leave_out_other_scales(good, skipped):
    """Leave out files whose values are of another order than those of most: one of them would be
    all of the mean and std that the training latents are standardised by. Yields a line about
    those that are only somewhat off."""
    spread = {}
    for name, found in good.items():
        n, _, m2 = found[1]
        spread[name] = float(np.sqrt(m2.mean() / n))
    usual = sorted(spread.values())[(len(spread) - 1) // 2]
    off = []
    for name in sorted(good):
        mean = float(np.abs(good[name][1][1]).max())
        if not usual / 100 < spread[name] < usual * 100 or mean > usual * 1000:
            skipped[name] = (
                f"its values have std {spread[name]:.3g} and channel means up to {mean:.3g}, the"
                f" median std of all files is {usual:.3g}: another VAE, other units, or damage"
            )
            del good[name]
        elif not usual / 3 < spread[name] < usual * 3:
            off.append(name)
    if off:
        yield (
            f"WARNING: {len(off)} files have a std more than three times off the median {usual:.3g}"
            f" (another VAE or scaling_factor?): {off[0]} has {spread[off[0]]:.3g}"
        )


def leave_out_other_rates(good, skipped):
    """Keep the files with as many steps a chunk as most have: others are at another rate. Returns
    that number."""
    counts = collections.Counter(found[0]["shape"][2] for found in good.values())
    steps, most = counts.most_common(1)[0]
    if 2 * most <= len(good) and len(counts) > 1:
        raise ValueError(
            f"files of 1 and of 2 steps a chunk ({dict(counts)}) are at different rates: keep them"
            " in different folders"
        )
    for name in sorted(good):
        other = good[name][0]["shape"][2]
        if other != steps:
            skipped[name] = (
                f"steps a chunk: {other}, most files have {steps}; files of another rate belong in"
                " a folder of their own"
            )
            del good[name]
    return steps


def truth_table(labels):
    """Lines about which files say what happened in them. labels: {file: names}."""
    counts = collections.Counter(labels.values())
    if list(counts) in ([], [()]):
        return
    for names, count in counts.most_common():
        files = [name for name in sorted(labels) if labels[name] == names]
        which = f", {', '.join(files[:5])}{', ...' if count > 5 else ''}" if len(counts) > 1 else ""
        what = f"labels {', '.join(names)}" if names else f"no labels (KEY{SUFFIX} beside KEY.h5)"
        yield f"{count} of {len(labels)} files have {what}{which}"


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
    parser.add_argument("dir", nargs="?", help="folder of the *.h5 files")
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
    parser.add_argument(
        "--size",
        nargs="+",
        default=["64"],
        help="height and width of the latents, or one number for both (default 64)",
    )
    parser.add_argument("--output", help="where to write it (default DIR/manifest.json)")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    if args.dir is None and len(args.size) > 1:
        args.dir = args.size.pop()  # --size 16 DIR
    if args.dir is None:
        parser.error("name the folder of the *.h5 files")
    if len(args.size) > 2 or not all(x.isdecimal() and int(x) for x in args.size):
        parser.error(f"--size {' '.join(args.size)}: give one or two whole numbers above 0")
    if args.channels < 1 or args.sequence_length < 2:
        parser.error("--channels must be at least 1, --sequence_length at least 2")
    height, width = int(args.size[0]), int(args.size[-1])
    ratios = (args.train_ratio, args.val_ratio, args.test_ratio)
    if abs(sum(ratios) - 1) > 1e-6 or min(ratios) < 0 or not args.train_ratio:
        given = " + ".join(f"{r:g}" for r in ratios)
        raise ValueError(
            "--train_ratio, --val_ratio and --test_ratio must be shares that sum to 1, not"
            f" {given}, the first above 0"
        )
    if not os.path.isdir(args.dir):
        raise ValueError(f"{args.dir} is no folder: name the one that holds the *.h5 files")
    every, unused = find_files(args.dir)
    for note in unused:
        print(f"not used: {note}")
    if not every:
        raise ValueError(f"no *.h5 file in {args.dir}")
    good, skipped = {}, {}
    for name in tqdm(every, unit="file", desc="check"):
        path = os.path.join(args.dir, name)
        try:
            good[name] = check(path, (args.channels, height, width), args.sequence_length)
        except (ValueError, OSError) as e:
            if of_the_disk(e):  # to leave the file out would be another split
                raise OSError(f"{path}: {e}: mend the disk, then run this again") from e
            skipped[name] = str(e).splitlines()[0]
    if not good and len(set(skipped.values())) == 1:
        raise ValueError(
            f"none of the {len(every)} files in {args.dir} can be used, all for one reason:"
            f" {skipped[every[0]]}"
        )
    leave_out_copies(good, skipped)
    notes = list(leave_out_other_scales(good, skipped)) if good else []
    steps = leave_out_other_rates(good, skipped) if good else None
    for name, reason in sorted(skipped.items()):
        print(f"left out: {name}: {reason}")
    if not good:
        raise ValueError(
            f"none of the {len(every)} files in {args.dir} can be used; the first,"
            f" {min(skipped)}: {skipped[min(skipped)]}"
        )
    for note in notes:
        print(note)
    for note in truth_table({name: found[3] for name, found in good.items()}):
        print(note)
    test = []
    for name in sorted(good):
        spellings = name, os.path.basename(name)
        if any(fnmatch.fnmatchcase(x, p) for x in spellings for p in args.test_files or []):
            test.append(name)
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
        "size": [height, width],
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
