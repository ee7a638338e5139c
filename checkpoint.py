"""Atomic, checksummed, rotated save and load of a training run.

A checkpoint is `checkpoint-epochNNN.pth.tar` (N whole epochs done) or `checkpoint-epochNNN-itrNNNNN.pth.tar` (stopped inside one), and
`checkpoint-latest.pth.tar` is a symlink to the newest. It is a zip whose every record carries a CRC-32, so a cut or flipped file is known.
"""

import csv
import io
import json
import os
import re
import sys
import zipfile

import torch

LATEST = "checkpoint-latest.pth.tar"


def one_sentence(kind, error, traceback):
    """For sys.excepthook: what a user can mend is one sentence, anything else (or NANOJEPA_DEBUG=1) a traceback."""
    if issubclass(kind, (ValueError, OSError)) and not os.environ.get("NANOJEPA_DEBUG"):
        print(f"error: {error} (NANOJEPA_DEBUG=1 shows where)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


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
    """A log as a function that appends a row (dict). With `keep`, rows before (epoch, itr) of an earlier run stay; else it starts empty."""
    rows = []
    if keep and os.path.exists(path):
        with open(path, newline="") as f:
            rows = [r for r in csv.DictReader(f) if (int(r["epoch"]), int(r.get("itr") or -1)) < (epoch, itr)]
    text = io.StringIO()
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    f = open(path, "a", buffering=1)
    return lambda row: f.write(",".join(f"{row[k]:.9g}" for k in header) + "\n")


def append_jsonl(path, rows):
    """Dicts as lines at the end of a file; several processes may write to it."""
    if rows:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a") as f:
            f.write("".join(json.dumps(r) + "\n" for r in rows))
