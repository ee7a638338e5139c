"""Logs of a run: CSV files that a resumed run goes on with, lines of JSON, the curves drawn from
them."""

import json
import math
import os

import numpy as np
from matplotlib.figure import Figure

from files.disk import write_atomically


def open_csv(path, header, epoch, itr, keep):
    """A log as a function that appends a row (dict); None is an empty cell. With `keep`, rows
    before (epoch, itr) of an earlier run stay; else it starts empty."""
    with open(path if keep and os.path.exists(path) else os.devnull) as f:
        lines = f.read().split("\n")[1:-1]  # what follows the last newline was torn by a kill
    rows = [dict(zip(header, line.split(","))) for line in lines]
    kept = [
        x
        for x, row in zip(lines, rows)
        if (int(row["epoch"]), int(row.get("itr", -1))) < (epoch, itr)
    ]
    kept = [
        line + ",nan" * (len(header) - 1 - line.count(",")) for line in kept
    ]  # of a version that had fewer columns
    write_atomically(path, "".join(line + "\n" for line in (",".join(header), *kept)).encode())
    f = open(path, "a", buffering=1)

    def log(row):
        try:
            cells = ["" if row[k] is None else f"{row[k]:.9g}" for k in header]
            f.write(",".join(cells) + "\n")
        except OSError as e:
            e.filename = path
            raise

    return log


def read_csv(path):
    """A log of `open_csv` as {column: (n,) float64}; an empty cell is nan."""
    with open(path) as f:
        names, first = f.readline().strip().split(","), f.tell()
        rows = f.read(1) != ""
        f.seek(first)
        return dict(
            zip(
                names,
                np.loadtxt(f, delimiter=",", ndmin=2, converters=cell_value).T
                if rows
                else np.zeros((len(names), 0)),
            )
        )


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
            f.write("".join(json.dumps(r) + "\n" for r in rows))


def open_logs(out_dir, headers, settings, keep, wandb_project):
    """args.json and the CSVs of a run as a function log(name, row, step). headers: {name: (columns,
    epoch, itr)}; with `keep`, rows before (epoch, itr) stay."""
    write_atomically(os.path.join(out_dir, "args.json"), json.dumps(settings, indent=1).encode())
    logs = {
        k: open_csv(os.path.join(out_dir, k + ".csv"), *header, keep)
        for k, header in headers.items()
    }
    if wandb_project:
        import wandb

        wandb.init(project=wandb_project, config=settings)

    def log(name, row, step):
        logs[name](row)
        if wandb_project:
            wandb.log({f"{name}/{k}": v for k, v in row.items()}, step=step)

    return log


def plot_curves(out_dir):
    """curves.png of a run: losses and the action meter over epochs, from train.csv and val.csv;
    beside a base if there is one."""
    train, val = (read_csv(os.path.join(out_dir, n)) for n in ("train.csv", "val.csv"))
    axes = (fig := Figure(figsize=(13, 4), layout="constrained")).subplots(1, 3)
    ipe = max(train["itr"].max() + 1, 1)
    every = slice(
        None, None, len(train["itr"]) // 4000 + 1
    )  # more points than the picture has pixels take time and memory at each save
    for name in ("jloss", "sloss"):
        axes[0].plot(
            (train["epoch"] + train["itr"] / ipe)[every],
            train[name][every],
            lw=0.5,
            label=name + ", training",
        )
    if len(val["epoch"]):
        at = val["epoch"] + (val["itr"] / ipe if "itr" in val else 0)
        axes[0].plot(at, val["jloss"], "o-", label="jloss, held out")
        for name in ("tf_true", "tf_shuffled", "tf_zero", "tf_copy"):
            axes[1].plot(
                at,
                val[name],
                "o-",
                label=name[3:] + (" actions" if name != "tf_copy" else " last step"),
            )
        if "base_tf" in val and np.isfinite(val["base_tf"]).any():
            axes[1].plot(at, val["base_tf"], "ks--", label="the base, true actions")
        if np.isfinite(val["tf_gap_low"]).any():
            axes[2].fill_between(
                at,
                100 * val["tf_gap_low"],
                100 * val["tf_gap_high"],
                alpha=0.3,
                label="95 % over recordings",
            )
        axes[2].plot(at, 100 * val["tf_gap"], "o-", label="one step ahead")
        axes[2].plot(at, 100 * val["ro_gap"], "o--", label="rolled out")
        axes[2].axhline(0, color="grey", lw=0.5)
    titles = ("loss", "held-out error one step ahead", "action gap (shuffled / true - 1)")
    for ax, title, unit in zip(
        axes, titles, ("mean |error|, layer-normed features", "mean |error|", "%")
    ):
        ax.set(title=title, xlabel="epoch", ylabel=unit)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=9)
    write_atomically(os.path.join(out_dir, "curves.png"), lambda f: fig.savefig(f, dpi=110))
