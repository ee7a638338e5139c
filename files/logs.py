"""Files of a run, and what the training scripts write into them: the names of checkpoints, CSV
files that a resumed run continues, lines of JSON, the log line, the curves."""

import datetime
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from files.disk import write_atomically

CHECKPOINT = re.compile(r"checkpoint-epoch(\d+)(?:-itr(\d+))?\.pth\.tar")


def list_checkpoints(out_dir):
    """{path: (epoch, itr)} of the checkpoints of a run, oldest first."""
    checkpoints = {}
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else []:
        match = CHECKPOINT.fullmatch(name)
        if match:
            checkpoints[os.path.join(out_dir, name)] = (int(match[1]), int(match[2] or 0))
    return dict(sorted(checkpoints.items(), key=lambda item: item[1]))


# --- one training step ---


class StepRow(NamedTuple):
    """What a training step leaves for the log. Losses stay on their device until the next log line,
    because reading them back makes the GPU wait."""

    epoch: int  # whole epochs before this step
    itr: int  # steps of its epoch before this step
    lr: float
    losses: torch.Tensor  # (n,), averaged over micro-batches
    grad_norm: torch.Tensor  # (), before clipping
    keys: list  # names of the clips of this rank
    bytes_read: int = 0  # by this rank


def mean_over_ranks(rows, world, dtype=torch.float32):
    """StepRows of this rank -> the same rows with plain numbers: `losses` (a list) and `grad_norm`
    are means over ranks, `bytes_read` is the sum. With several ranks a collective. dtype: the
    precision of the means; sums of bytes need float64."""
    values = torch.stack([torch.cat([row.losses, row.grad_norm.reshape(1)]) for row in rows])
    means = values.cpu().to(dtype) / world
    bytes_read = torch.tensor([[row.bytes_read] for row in rows], dtype=dtype)
    table = torch.cat([means, bytes_read], dim=1)
    if world > 1:
        dist.all_reduce(table)

    averaged = []
    for row, numbers in zip(rows, table.tolist()):
        averaged.append(
            row._replace(losses=numbers[:-2], grad_norm=numbers[-2], bytes_read=numbers[-1])
        )
    return averaged


def check_finite(row, loss, place, out_dir, dtype):
    """ValueError if the loss or the gradient of a step (a row of mean_over_ranks) is not finite.
    place: where in the run it is, for a person."""
    # float16 overflows now and then, and GradScaler skips those steps
    norm = 0.0 if dtype == "float16" else row.grad_norm
    if math.isfinite(loss + norm):
        return
    last_good = next(reversed(list_checkpoints(out_dir)), "none")
    raise ValueError(
        f"the loss ({loss:.4g}) or its gradient ({row.grad_norm:.4g}) is not finite at {place},"
        f" clips {', '.join(row.keys)}; last good checkpoint: {last_good}; lower --lr or set"
        " --grad_clip 1"
    )


def train_row(row, names, seconds, data_wait, world, memory, mfu=None):
    """Columns of train.csv that all scripts have. seconds and data_wait: of one step; names: of the
    losses; memory: MiB; mfu: the share of the device's peak FLOP/s, None where that is unknown."""
    columns = {
        "epoch": row.epoch,
        "itr": row.itr,
        "lr": row.lr,
        "grad_norm": row.grad_norm,
        "clips_per_s": len(row.keys) * world / seconds,
        "data_wait": data_wait / seconds,
        "memory_mib": memory,
        "mfu": mfu,
    }
    return columns | dict(zip(names, row.losses))


# --- what a person reads ---


def log_line(place, losses, columns, seconds_left, device):
    """The line of a training step. place: how far the run is; losses: a text; columns: what
    train_row gives. On a GPU its memory at the peak is shown, and MFU where it is known."""
    speed = f"{columns['clips_per_s']:6.1f} clips/s  data wait {columns['data_wait']:4.0%}"
    if columns["mfu"] is not None:
        speed += f"  MFU {columns['mfu']:5.1%}"
    if device.type == "cuda":
        speed += f"  GPU {columns['memory_mib'] / 1024:.1f} GiB"
    return f"{place}  {losses}  lr {columns['lr']:.2e}  {speed}  ETA {eta(seconds_left)}"


def eta(seconds):
    """Seconds as "1 day, 2:03:04"."""
    return str(datetime.timedelta(seconds=round(seconds)))


def count_text(n, noun):
    """A number with its noun: 1 recording, 2 recordings."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def bytes_text(n):
    """A number of bytes in the largest unit that it fills: "3.1 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} bytes" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def changed_flags(old, new):
    """What a resumed run does otherwise than before: a sentence about two {flag: value}."""

    def text(value):
        """Lists of lists (--data) as they are typed."""
        if isinstance(value, list | tuple):
            return " ".join(text(v) for v in value)
        return str(value)

    changes = []
    for flag, value in new.items():
        if flag == "resume" or flag not in old or text(value) == text(old[flag]):
            continue
        changes.append(f"--{flag} {text(value)} (was {text(old[flag])})")
    return "changed flags: " + ", ".join(changes) if changes else "the same flags as before"


# --- logs ---


def open_csv(path, header, epoch, itr, keep):
    """A log as a function that appends a row (dict); None is an empty cell. With `keep`, rows
    before (epoch, itr) of an earlier run stay; else it starts empty."""
    with open(path if keep and os.path.exists(path) else os.devnull) as f:
        lines = f.read().split("\n")[1:-1]  # what follows the last newline was torn by a kill

    kept = []
    for line in lines:
        row = dict(zip(header, line.split(",")))
        if (int(row["epoch"]), int(row.get("itr", -1))) < (epoch, itr):
            missing = len(header) - 1 - line.count(",")  # an earlier version had fewer columns
            kept.append(line + ",nan" * missing)
    text = "".join(line + "\n" for line in (",".join(header), *kept))
    write_atomically(path, text.encode())
    f = open(path, "a", buffering=1)

    def log(row):
        cells = ["" if row[name] is None else f"{row[name]:.9g}" for name in header]
        try:
            f.write(",".join(cells) + "\n")
        except OSError as e:
            e.filename = path
            raise

    return log


def read_csv(path):
    """A log of `open_csv` as {column: (n,) float64}; an empty cell is nan."""
    with open(path) as f:
        names = f.readline().strip().split(",")
        lines = f.readlines()
    if not lines:
        return {name: np.zeros(0) for name in names}
    table = np.loadtxt(lines, delimiter=",", ndmin=2, converters=cell_value)
    return dict(zip(names, table.T))


def cell_value(text):
    return float(text or "nan")


def to_json(report):
    """A report as JSON text. What could not be given (nan) is null: JSON has no nan."""

    def known(x):
        if isinstance(x, dict):
            return {k: known(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [known(v) for v in x]
        return None if isinstance(x, float) and math.isnan(x) else x

    return json.dumps(known(report), indent=1)


def append_jsonl(path, rows):
    """Dicts as lines at the end of a file; several processes may write to it."""
    if rows:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))


def open_logs(out_dir, headers, flags, keep, wandb_project=None, wandb_id=None):
    """args.json and the CSVs of a run as a function log(name, row, step). headers: {name: (columns,
    epoch, itr)}; with `keep`, rows before (epoch, itr) stay. With a W&B project rows also go into
    its run wandb_id, which a resumed run continues."""
    write_atomically(os.path.join(out_dir, "args.json"), json.dumps(flags, indent=1).encode())
    logs = {}
    for name, (columns, epoch, itr) in headers.items():
        logs[name] = open_csv(os.path.join(out_dir, name + ".csv"), columns, epoch, itr, keep)
    if wandb_project:
        import wandb

        wandb.init(project=wandb_project, id=wandb_id, resume="allow", config=flags)

    def log(name, row, step):
        logs[name](row)
        if wandb_project:
            wandb.log({f"{name}/{k}": v for k, v in row.items()}, step=step)

    return log


# --- curves ---


def plot_curves(out_dir, ipe):
    """curves.png of a run, from train.csv and val.csv: losses, held-out errors (beside a base's if
    there is one) and the action gap over epochs of `ipe` steps."""
    from matplotlib.figure import Figure  # takes a second to import

    train = read_csv(os.path.join(out_dir, "train.csv"))
    val = read_csv(os.path.join(out_dir, "val.csv"))
    fig = Figure(figsize=(13, 4.6), layout="constrained")
    loss_ax, error_ax, gap_ax = fig.subplots(1, 3)

    # more points than the picture has pixels would take time and memory at each save
    every = slice(None, None, len(train["itr"]) // 4000 + 1)
    train_epochs = (train["epoch"] + train["itr"] / ipe)[every]
    for name in ("jloss", "sloss"):
        loss_ax.plot(train_epochs, train[name][every], lw=0.5, label=name + ", training")

    if len(val["epoch"]):
        val_epochs = val["epoch"] + (val["itr"] / ipe if "itr" in val else 0)
        loss_ax.plot(val_epochs, val["jloss"], "o-", label="jloss, held out")
        plot_errors(error_ax, val_epochs, val)
        plot_gap(gap_ax, val_epochs, val)

    loss_ax.set(title="loss", ylabel="mean |error|, layer-normed features")
    error_ax.set(title="held-out error one step ahead", ylabel="mean |error|, same units")
    gap_ax.set(title="action gap (shuffled / true - 1)", ylabel="%")
    for ax in (loss_ax, error_ax, gap_ax):
        ax.set_xlabel(f"epochs of {ipe} steps")
        ax.set_xlim(loss_ax.get_xlim())
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        else:
            ax.text(0.5, 0.5, "no validation yet", ha="center", transform=ax.transAxes)
            ax.set_yticks([])
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))


def plot_errors(ax, epochs, val):
    """Held-out errors one step ahead under true and other actions."""
    # other markers and widths: where actions are ignored, the lines lie on each other
    lines = {
        "tf_copy": ("copy of the last step", "o-", 1.5),
        "tf_zero": ("zero actions", "s-", 4.5),
        "tf_shuffled": ("shuffled actions", "o--", 3.0),
        "tf_true": ("true actions", "o-", 1.5),
    }
    for name, (label, style, width) in lines.items():
        ax.plot(epochs, val[name], style, lw=width, label=label)
    if "base_tf" in val and np.isfinite(val["base_tf"]).any():
        ax.plot(epochs, val["base_tf"], "ks--", label="the base, true actions")


def plot_gap(ax, epochs, val):
    """The action gap with its interval. The axis always shows -1 to 1 %, because a gap of 0.01 %
    is no effect."""
    if np.isfinite(val["tf_gap_low"]).any():
        low = 100 * val["tf_gap_low"]
        high = 100 * val["tf_gap_high"]
        ax.fill_between(epochs, low, high, alpha=0.3, label="95 % over recordings")
    ax.plot(epochs, 100 * val["tf_gap"], "o-", label="one step ahead")
    ax.plot(epochs, 100 * val["ro_gap"], "o--", label="rolled out")
    ax.axhline(0, color="grey", lw=0.5)
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, -1.0), max(top, 1.0))
