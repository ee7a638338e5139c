"""Atomic, checksummed, rotated save and load of a training run.

A checkpoint is `checkpoint-epochNNN.pth.tar` (N whole epochs done) or `checkpoint-epochNNN-itrNNNNN.pth.tar` (stopped inside one), and
`checkpoint-latest.pth.tar` is a symlink to the newest. It is a zip whose every record carries a CRC-32, so a cut or flipped file is known.
"""

import csv
import io
import os
import re
import zipfile

import numpy as np
import torch
from matplotlib.figure import Figure

LATEST = "checkpoint-latest.pth.tar"


def write_atomically(path, data):
    """Bytes (or a function that writes to an open file) to a file that is either the old one or the new one, whatever happens."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)  # the rename itself must survive a power cut
        os.close(folder)
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)


def _position(name):
    """(epoch, itr) of a checkpoint's file name, None for other files."""
    m = re.fullmatch(r"checkpoint-epoch(\d+)(?:-itr(\d+))?\.pth\.tar", name)
    return m and (int(m[1]), int(m[2] or 0))


def list_checkpoints(out_dir):
    """Paths of the checkpoints of a run, oldest first."""
    names = [n for n in os.listdir(out_dir) if _position(n)] if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, n) for n in sorted(names, key=_position)]


def save(out_dir, state, epoch, itr=0, keep_last=2, keep_every=25):
    """Write a checkpoint, point `latest` at it, then delete older ones except the last `keep_last` and each `keep_every`-th epoch.

    Raises OSError naming the last good checkpoint when it cannot be written (disk full); that one is then untouched."""
    path = os.path.join(out_dir, f"checkpoint-epoch{epoch:03d}" + (f"-itr{itr:05d}" if itr else "") + ".pth.tar")
    before = list_checkpoints(out_dir)
    try:
        write_atomically(path, lambda f: torch.save(state, f))
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        free = os.statvfs(out_dir)
        last = f"the last good checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
        space = f"{free.f_bavail * free.f_frsize / 2**20:.0f} MiB are free"
        raise OSError(f"could not write {path} ({str(e).splitlines()[0]}; {space}): {last}") from e
    link = os.path.join(out_dir, f"{LATEST}.{os.getpid()}.tmp")
    os.symlink(os.path.basename(path), link)
    os.replace(link, os.path.join(out_dir, LATEST))
    for old in list_checkpoints(out_dir)[:-keep_last]:
        e, i = _position(os.path.basename(old))
        if old != path and (i or e % keep_every):
            os.unlink(old)
    return path


def load(path, map_location="cpu"):
    """A checkpoint's dictionary, after checking every CRC. Raises ValueError for a cut, damaged or foreign file; runs no pickled code."""
    try:
        with zipfile.ZipFile(path) as z:
            if record := z.testzip():
                raise ValueError(f"the checksum of {record} is wrong")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, KeyError, NotImplementedError) as e:
        raise ValueError(f"{path} is damaged or no checkpoint of ours: {str(e).splitlines()[0]}") from e


def load_latest(out_dir):
    """(dictionary, path) of the newest good checkpoint of a run, saying which newer ones are damaged; (None, None) if there is none.

    Raises ValueError when there are checkpoints and all of them are damaged."""
    paths = list_checkpoints(out_dir)
    for path in reversed(paths):
        try:
            return load(path), path
        except ValueError as e:
            print(f"{e}; trying the one before")
    if paths:
        raise ValueError(f"all {len(paths)} checkpoints in {out_dir} are damaged: restore one, or start again in another --out_dir")
    return None, None


def open_csv(path, header, epoch, itr, keep):
    """A log opened for appending, line-buffered. With `keep`, rows before (epoch, itr) of an earlier run stay; else it starts empty."""
    rows = []
    if keep and os.path.exists(path):
        with open(path, newline="") as f:
            old = list(csv.DictReader(f))
        rows = [r for r in old if (int(r["epoch"]), int(r.get("itr") or -1)) < (epoch, itr)]
    text = io.StringIO()
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    return open(path, "a", buffering=1)


def plot_curves(out_dir):
    """curves.png of a run: losses and the action meter over epochs, from train.csv and val.csv."""
    train, val = (np.genfromtxt(os.path.join(out_dir, n), delimiter=",", names=True, ndmin=1) for n in ("train.csv", "val.csv"))
    fig = Figure(figsize=(13, 4), layout="constrained")
    axes = fig.subplots(1, 3)
    ipe = max(train["itr"].max() + 1, 1)
    axes[0].plot(train["epoch"] + train["itr"] / ipe, train["jloss"], lw=0.5, label="jloss, training")
    axes[0].plot(train["epoch"] + train["itr"] / ipe, train["sloss"], lw=0.5, label="sloss, training")
    if len(val):
        axes[0].plot(val["epoch"], val["jloss"], "o-", label="jloss, held out")
        for name in ("tf_true", "tf_shuffled", "tf_zero", "tf_copy"):
            axes[1].plot(val["epoch"], val[name], "o-", label=name[3:] + (" actions" if name != "tf_copy" else " last step"))
        axes[2].fill_between(val["epoch"], 100 * val["tf_gap_low"], 100 * val["tf_gap_high"], alpha=0.3, label="95 % over recordings")
        axes[2].plot(val["epoch"], 100 * val["tf_gap"], "o-", label="one step ahead")
        axes[2].plot(val["epoch"], 100 * val["ro_gap"], "o--", label="rolled out")
        axes[2].axhline(0, color="grey", lw=0.5)
    titles = ("loss", "held-out error one step ahead", "action gap (shuffled / true - 1)")
    for ax, title, unit in zip(axes, titles, ("mean |error|, layer-normed features", "mean |error|", "%")):
        ax.set(title=title, xlabel="epoch", ylabel=unit)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9)
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))
