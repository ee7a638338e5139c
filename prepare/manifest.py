"""Checks a folder of video-VAE latents (*.h5) and splits its files at random. train_lam.py trains
from the manifest that it writes.

    python -m prepare.manifest latents --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1 --seed 42
    # hold out maps of the demo's play
    python -m prepare.manifest latents-play --size 16 --test_files 'map2[5-9]*' 'map30*'

Reads every value of DIR and its folders once. Each file must contain one dataset (chunks, 16, T,
64, 64) of finite numbers, with T 1 or 2, and enough steps for a window. --size 16 or --size 60 104
is for latents of another size. A file that does not fit is left out and listed. So are files whose
steps are constant or all the same, parts that were never written, a second copy of the same
latents, and files whose values are of another scale than most.

Writes DIR/manifest.json: {"metadata": ratios, seed, counts, mean and std of the training latents
(of all values, and by channel), fingerprint, skipped files with the reason, "splits": {"train",
"validation", "test": [{path, shape, dtype, bytes}]}}, paths relative to DIR."""

import argparse
import collections
import fnmatch
import functools
import hashlib
import json
import os
import sys
from typing import NamedTuple

import numpy as np

from checkpoint import short_excepthook
from files.disk import write_atomically
from files.latents import (
    SUFFIX,
    find_files,
    of_the_disk,
    open_dataset,
    read_labels,
    read_rows,
)
from files.progress import tqdm
from kernels import merge_moments


class Checked(NamedTuple):
    """A file that can be used."""

    entry: dict  # of the manifest: shape, dtype, bytes
    moments: tuple  # (n, mean, M2) by channel
    digest: str  # hash of the values
    labels: tuple  # names of what its labels say
    rounded_digest: str  # hash of the values in 16 bits: the same for a copy in another dtype


def wrong_shape(shape, C, H, W):
    """What is wrong with the shape of a dataset, and which flags would fit it; "" if nothing is."""
    # no flag helps: this is another kind of array
    text = f"shape {list(shape)}, not [chunks, {C}, 1 or 2, {H}, {W}]"
    if len(shape) != 5 or shape[2] not in (1, 2):
        return text

    # latents of another VAE: name the flags that would read them
    flags = []
    if shape[1] != C:
        flags.append(f"--channels {shape[1]}")
    if shape[3:] != (H, W):
        size = shape[3:4] if shape[3] == shape[4] else shape[3:]
        flags.append(f"--size {' '.join(map(str, size))}")
    if not flags:
        return ""
    return f"{text}: for latents of this shape pass {' '.join(flags)}"


def check(path, shape, sequence_length):
    """Read a file -> Checked. shape: (channels, height, width); sequence_length: steps of a window.
    Raises ValueError or OSError if something is wrong with it."""
    # shape, dtype and length, before any value is read
    data = open_dataset(path)
    reason = wrong_shape(data.shape, *shape)
    if reason:
        raise ValueError(reason)
    if data.dtype.kind != "f":
        raise ValueError(f"dtype {data.dtype}, not a float")
    chunks = data.shape[0]
    channels = data.shape[1]
    steps_per_chunk = data.shape[2]
    steps = chunks * steps_per_chunk
    if steps < sequence_length:
        raise ValueError(
            f"{chunks} chunks of {steps_per_chunk} steps are fewer than the {sequence_length}"
            " steps of a window"
        )

    # the values, a few MiB at a time
    chunk_bytes = int(np.prod(data.shape[1:])) * data.dtype.itemsize
    rows = max(2**22 // chunk_bytes, 1)
    moments = []
    digest = hashlib.sha256()
    rounded_digest = hashlib.sha256()
    first_step = None
    moves = False
    for first in range(0, chunks, rows):
        values = np.ascontiguousarray(read_rows(data, first, first + rows))
        check_values(values, first)

        # does anything happen in it? every step is compared with the first
        if first_step is None:
            first_step = values[:1, :, :1].copy()
        moves = moves or bool((values != first_step).any())

        # hashes, and the sums that mean and variance come from
        digest.update(values)
        # in 16 bits large values become inf, which is no matter in a hash
        with np.errstate(over="ignore"):
            rounded_digest.update(np.ascontiguousarray(values, dtype="<f2"))
        x = values.astype(np.float64).swapaxes(0, 1).reshape(channels, -1)
        mean = x.mean(1)
        moments.append((x.shape[1], mean, np.square(x - mean[:, None]).sum(1)))
    if not moves:
        raise ValueError("all its steps are the same: nothing happens in it")

    # labels are read now too: a damaged file should show before training
    labels = tuple(read_labels(path, steps))
    entry = {"shape": list(data.shape), "dtype": str(data.dtype), "bytes": os.path.getsize(path)}
    return Checked(
        entry,
        functools.reduce(merge_moments, moments),
        digest.hexdigest(),
        labels,
        rounded_digest.hexdigest(),
    )


def check_values(values, first):
    """Raises ValueError for chunks (rows, C, T, H, W), from number `first` on, that are not finite,
    or have a step of one number everywhere. No VAE makes such a step: it comes from a writer that
    died, or is another array."""
    # not finite
    finite = np.isfinite(values).all(axis=(1, 2, 3, 4))
    if not finite.all():
        raise ValueError(f"chunk {first + int(np.argmin(finite))} holds values that are not finite")

    # constant over a step
    constant = values.max(axis=(1, 3, 4)) == values.min(axis=(1, 3, 4))  # (rows, T)
    if constant.any():
        row, t = np.argwhere(constant)[0]
        raise ValueError(
            f"all values of chunk {first + row}, step {t} are {values[row, 0, t, 0, 0]:g}: they"
            " are no latents"
        )


def leave_out_copies(good, skipped):
    """Keep the first of several files with the same values in 16 bits: otherwise a copy could be
    held out while another is trained on. Moves names from good {name: Checked} to skipped {name:
    reason}."""
    first = {}
    for name in sorted(good):
        values = tuple(good[name].entry["shape"]), good[name].rounded_digest
        same = first.setdefault(values, name)
        if same != name:
            skipped[name] = f"the same latents as {same}"
            del good[name]


def leave_out_other_scales(good, skipped):
    """Leave out files whose values are of another order than those of most: one of them would
    decide the mean and std that the training latents are standardised by. Moves names from good to
    skipped; returns warnings about files that are only somewhat off."""
    # the std of each file, and the median of them all
    stds = {}
    for name, file in good.items():
        n = file.moments[0]
        m2 = file.moments[2]
        stds[name] = float(np.sqrt(m2.mean() / n))
    usual = sorted(stds.values())[(len(stds) - 1) // 2]

    # a hundred times off is left out, three times off is only warned about
    somewhat_off = []
    for name, std in sorted(stds.items()):
        mean = float(np.abs(good[name].moments[1]).max())
        if not usual / 100 < std < usual * 100 or mean > usual * 1000:
            skipped[name] = (
                f"its values have std {std:.3g} and channel means up to {mean:.3g}, the median std"
                f" of all files is {usual:.3g}: another VAE, other units, or damage"
            )
            del good[name]
        elif not usual / 3 < std < usual * 3:
            somewhat_off.append(name)

    # one line for all of them, with an example
    if not somewhat_off:
        return []
    example = somewhat_off[0]
    return [
        f"WARNING: {len(somewhat_off)} files have a std more than three times off the median"
        f" {usual:.3g} (another VAE or scaling_factor?): {example} has {stds[example]:.3g}"
    ]


def leave_out_other_rates(good, skipped):
    """Keep the files with as many steps a chunk as most have: others are at another rate. Moves the
    others' names from good to skipped; returns that number."""
    # without a clear majority nobody can say which files are the odd ones
    counts = collections.Counter(file.entry["shape"][2] for file in good.values())
    steps, most = counts.most_common(1)[0]
    if 2 * most <= len(good) and len(counts) > 1:
        raise ValueError(
            f"files of 1 and of 2 steps a chunk ({dict(counts)}) are at different rates: keep them"
            " in different folders"
        )
    for name in sorted(good):
        other = good[name].entry["shape"][2]
        if other != steps:
            skipped[name] = (
                f"steps a chunk: {other}, most files have {steps}; files of another rate belong in"
                " a folder of their own"
            )
            del good[name]
    return steps


def truth_table(labels):
    """Lines that say how many files have which labels. labels: {file: names of its labels}."""
    # nothing to say where no file has labels
    counts = collections.Counter(labels.values())
    if not any(counts):
        return
    for names, count in counts.most_common():
        what = f"labels {', '.join(names)}" if names else f"no labels (KEY{SUFFIX} beside KEY.h5)"
        # name files only where they differ, and only a few
        which = ""
        if len(counts) > 1:
            files = [name for name in sorted(labels) if labels[name] == names]
            which = f", {', '.join(files[:5])}" + (", ..." if count > 5 else "")
        yield f"{count} of {len(labels)} files have {what}{which}"


def matching(names, patterns):
    """The names that match one of the patterns, with their folders or without."""
    matches = []
    for name in sorted(names):
        spellings = name, os.path.basename(name)
        if any(fnmatch.fnmatchcase(x, pattern) for x in spellings for pattern in patterns):
            matches.append(name)
    return matches


def split_counts(n, ratios):
    """How many of n files each split gets: the ratios rounded, but at least one where the ratio is
    not zero and there are enough files."""
    # a split that was asked for gets a file, however few there are
    validation = max(round(n * ratios[1]), 1) if ratios[1] else 0
    test = max(round(n * ratios[2]), 1) if ratios[2] else 0

    # training needs a file: take it from the larger one, from the test files if they are equal
    while n - validation - test < 1 and validation + test:
        if test >= validation:
            test -= 1
        else:
            validation -= 1
    return [n - validation - test, validation, test]


def split(names, ratios):
    """Shuffled names -> {"train", "validation", "test": sorted names}."""
    # three stretches of the shuffled names
    counts = split_counts(len(names), ratios)
    ends = np.cumsum(counts)
    return {
        "train": sorted(names[: ends[0]]),
        "validation": sorted(names[ends[0] : ends[1]]),
        "test": sorted(names[ends[1] :]),
    }


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dir", nargs="?", help="folder of the *.h5 files")
    parser.add_argument("--output", help="where to write the manifest (default DIR/manifest.json)")
    group = parser.add_argument_group("split")
    group.add_argument("--train_ratio", type=float, default=0.8, help="share to train on")
    group.add_argument("--val_ratio", type=float, default=0.1, help="share to validate on")
    group.add_argument("--test_ratio", type=float, default=0.1, help="share kept for the end")
    group.add_argument(
        "--test_files", nargs="+", help="patterns of names of the test files instead"
    )
    group.add_argument("--seed", type=int, default=42, help="seed of the split")
    group = parser.add_argument_group("what a file must contain")
    group.add_argument("--sequence_length", type=int, default=8, help="steps at least")
    group.add_argument("--channels", type=int, default=16, help="channels of the latents")
    group.add_argument(
        "--size", nargs="+", default=["64"], help="height and width, or one for both"
    )
    args = parser.parse_args()
    sys.excepthook = short_excepthook

    # the flags
    if args.dir is None and len(args.size) > 1:
        args.dir = args.size.pop()  # --size 16 DIR
    if args.dir is None:
        parser.error("name the folder of the *.h5 files")
    if len(args.size) > 2 or not all(x.isdecimal() and int(x) for x in args.size):
        parser.error(f"--size {' '.join(args.size)}: give one or two whole numbers above 0")
    if args.channels < 1:
        parser.error(f"--channels {args.channels}: give 1 or more")
    if args.sequence_length < 2:
        parser.error(f"--sequence_length {args.sequence_length}: a window has 2 steps or more")
    height = int(args.size[0])
    width = int(args.size[-1])

    # the ratios
    ratios = (args.train_ratio, args.val_ratio, args.test_ratio)
    text = " + ".join(f"{r:g}" for r in ratios)
    if abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(
            f"--train_ratio, --val_ratio and --test_ratio must be shares that sum to 1, not {text}"
        )
    if min(ratios) < 0:
        raise ValueError(
            "--train_ratio, --val_ratio and --test_ratio must be shares that sum to 1, none below"
            f" 0, not {text}"
        )
    if not args.train_ratio:
        raise ValueError("--train_ratio 0 leaves nothing to train on: give more than 0")
    if not os.path.isdir(args.dir):
        raise ValueError(f"{args.dir} is no folder: name the one that holds the *.h5 files")

    # --- check every file ---
    every, unused = find_files(args.dir)
    for note in unused:
        print(f"not used: {note}")
    if not every:
        raise ValueError(f"no *.h5 file in {args.dir}")

    # a file is good, or left out with its reason
    good = {}  # name: Checked
    skipped = {}  # name: reason
    for name in tqdm(every, unit="file", desc="check"):
        path = os.path.join(args.dir, name)
        try:
            good[name] = check(path, (args.channels, height, width), args.sequence_length)
        except (ValueError, OSError) as e:
            if of_the_disk(e):  # leaving the file out would change the split
                raise OSError(f"{path}: {e}: fix the disk, then run this again") from e
            skipped[name] = str(e).splitlines()[0]

    # one message where every file has the same flaw: it is probably a flag
    none = f"none of the {len(every)} files in {args.dir} can be used"
    if not good and len(set(skipped.values())) == 1:
        raise ValueError(f"{none}, all for one reason: {skipped[every[0]]}")

    # what only shows when files are compared with each other
    steps_per_chunk = None
    warnings = []
    if good:
        leave_out_copies(good, skipped)
        warnings = leave_out_other_scales(good, skipped)
    if good:
        steps_per_chunk = leave_out_other_rates(good, skipped)

    # say what was left out, then what is odd
    for name, reason in sorted(skipped.items()):
        print(f"left out: {name}: {reason}")
    if not good:
        raise ValueError(f"{none}; the first, {min(skipped)}: {skipped[min(skipped)]}")
    for warning in warnings:
        print(warning)
    for note in truth_table({name: file.labels for name, file in good.items()}):
        print(note)

    # --- split ---
    # test files by pattern, or all splits by the ratios
    test = matching(good, args.test_files or [])
    others = sorted(good.keys() - test)
    if args.test_files and not (test and others):
        raise ValueError(
            f"--test_files {' '.join(args.test_files)} takes {len(test)} of {len(good)} files: give"
            " patterns that take some"
        )
    if test:
        # the others are split in the proportion of train and validation
        rest = sum(ratios[:2])
        ratios = (ratios[0] / rest, ratios[1] / rest, 0.0)
    splits = split(np.random.default_rng(args.seed).permutation(others).tolist(), ratios)
    if test:
        splits["test"] = test

    # files and steps of each split
    files = {k: len(names) for k, names in splits.items()}
    steps = {}
    for k, names in splits.items():
        steps[k] = sum(good[name].entry["shape"][0] * steps_per_chunk for name in names)

    # --- statistics of the training latents: by channel, then of all values ---
    training = (good[name].moments for name in splits["train"])
    n, mean, m2 = functools.reduce(merge_moments, training)
    channels = ((n, mean[i], m2[i]) for i in range(len(mean)))
    all_n, all_mean, all_m2 = functools.reduce(merge_moments, channels)

    # the fingerprint changes when any value of any file does
    contents = [[name, good[name].entry["shape"], good[name].digest] for name in sorted(good)]
    metadata = {
        "ratios": ratios,
        "seed": args.seed,
        "files": files,
        "steps": steps,
        "steps_per_chunk": steps_per_chunk,
        "channels": args.channels,
        "size": [height, width],
        "mean": float(all_mean),
        "std": float(np.sqrt(all_m2 / all_n)),
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(m2 / n).tolist(),
        "fingerprint": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        "skipped": skipped,
    }

    # --- write ---
    entries = {}
    for k, names in splits.items():
        entries[k] = [{"path": name} | good[name].entry for name in names]
    out = args.output or os.path.join(args.dir, "manifest.json")
    write_atomically(out, json.dumps({"metadata": metadata, "splits": entries}, indent=1).encode())

    # --- report ---
    sizes = ", ".join(f"{files[k]} files of {steps[k]} steps in {k}" for k in splits)
    print(f"{out}: {sizes}; {len(skipped)} left out")
    print(
        f"training latents: mean {metadata['mean']:.4f}, std {metadata['std']:.4f},"
        f" {steps_per_chunk} steps a chunk"
    )

    # a ratio that got no file
    empty = [k for k, ratio in zip(splits, ratios) if ratio and not splits[k]]
    if empty:
        print(f"WARNING: too few files: nothing in {' and '.join(empty)}")
