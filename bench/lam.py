"""Do latent actions name true ones? The worlds of prepare.latents, methods and seeds, in one table.

    python -m bench.lam
    python -m bench.lam --worlds roll camera --methods default no_warp flow --seeds 0

Makes each world, trains each method for the same number of steps, judges it with eval_lam.py on
recordings that no run has seen, and prints one table at the end. --methods says which rows:

default      train_lam.py as it is
no_shift     the encoder sees the picture where it is
guide        as the guide has it: one table for all codes, a codebook loss, no warm-up, no shift, no
             warp, an encoder that sees patches alone
before       our recipe until the warp: a shift by whole patches, no warp, patches alone
no_warp      the encoder looks for where things were, the decoder has only patches to draw with
flow         each pixel is read at one place, and is no mixture of its neighbours
reflect      the shift continues pictures as in a mirror, not around their edges
by_patches   the shift is by whole patches
continuous   no codes: the upper bound of the errors

Columns of the table. Purity, NMI and AMI are of what codes are named by on other recordings, see
eval_lam.py; `probe` is fitted on training recordings.

purity       share of transitions whose code names their action; `one code` is that of a single code
             for everything
AMI          adjusted mutual information of names and actions: 0 by chance, 1 if all are right
probe        balanced accuracy of a linear probe of the code
same/own     error with another clip's code of the same action over that with the own one
/copy        error over that of copying the step before
codes        actions (all codes of a transition together) in use
CPU s        of the training command with its validation; nan where it was interrupted

A row that is finished is not run again, and one that was interrupted is continued: give the same
command again. What follows `--` goes to train_lam.py in every row."""

import argparse
import json
import math
import os
import sys

import torch

from bench import report
from bench.trainings import check_flags, run
from files.disk import write_atomically
from files.progress import tqdm

# of prepare.latents: many files, for a purity that is learned on some and scored on others
WORLDS = ["grid", "half", "together", "roll", "zoom", "camera"]
WORLD = "--size 16 --files 40 --chunks 64".split()

# a model that a laptop trains in a minute
SIZE = "--embed_dim 48 --encoder_depth 2 --decoder_depth 2 --num_heads 4 --patch_dim 64".split()
PLAN = "--batch_size 8 --lr 2e-3 --log_every 50 --num_workers 0".split()
EPOCHS = 3

# flags of train_lam.py, beside its defaults. The first rows are run unless --methods names others
GUIDE_VQ = "--codebook loss --shared_codebook --vq_warmup_steps 0 --no-kmeans --no-revive"
METHODS = {
    "default": "",
    "no_shift": "--no-encoder_shift",
    "guide": f"{GUIDE_VQ} --no-encoder_shift --warp none --reach 0",
    "before": "--shift_kind patches --warp none --reach 0",
}
DEFAULT_METHODS = list(METHODS)
METHODS |= {
    "no_warp": "--warp none",
    "flow": "--warp flow",
    "reflect": "--shift_kind reflect",
    "by_patches": "--shift_kind patches",
    "continuous": "--quantizer none",
}


class Bench:
    """The worlds and runs in a folder."""

    def __init__(self, folder, steps, val_clips, extra):
        self.folder = folder
        self.steps = steps
        self.val_clips = val_clips
        self.extra = extra  # flags for train_lam.py
        os.makedirs(folder, exist_ok=True)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def run_folder(self, world, method, seed):
        return self.path(f"{world}-{method}-{seed}")

    def is_finished(self, world, method, seed):
        """Whether a row is trained and judged."""
        return os.path.exists(self.run_folder(world, method, seed) + ".json")

    def world(self, name):
        """The folder of a world, made if it is not there."""
        out = self.path("worlds", name)
        log = self.path(f"{name}.txt")
        if not os.path.exists(os.path.join(out, "manifest.json")):
            # files without a manifest are those of an interrupted run
            for file in os.listdir(out) if os.path.exists(out) else ():
                os.remove(os.path.join(out, file))
            run(log, "-m", "prepare.latents", "--out", out, "--world", name, *WORLD)
            run(log, "-m", "prepare.manifest", out, *WORLD[:2])
        return out

    def row(self, world, method, seed):
        """Train and judge a row, unless that is done; the table's row."""
        run_folder = self.run_folder(world, method, seed)
        log = run_folder + ".txt"
        flags = [*SIZE, *PLAN, "--epochs", EPOCHS, "--ipe", max(self.steps // EPOCHS, 1)]
        flags += ["--val_every", EPOCHS, "--seed", seed, *METHODS[method].split(), *self.extra]
        check_flags(run_folder, [self.val_clips, *flags])
        if not self.is_finished(world, method, seed):
            # how long an interrupted run had taken before is not known
            was_interrupted = os.path.exists(os.path.join(run_folder, "train.csv"))
            data = ["--data_dir", self.world(world), "--out_dir", run_folder, "--resume"]
            _, cpu = run(log, "train_lam.py", *data, *flags)
            limit = ["--val_clips", self.val_clips, "--no-ceiling"]
            run(log, "eval_lam.py", "--checkpoint", run_folder, *limit)

            # last: a row that has this file is finished
            note = json.dumps(math.nan if was_interrupted else cpu)
            write_atomically(run_folder + ".json", note.encode())
        return self.row_of(world, method, seed)

    def row_of(self, world, method, seed):
        """The table's row of a finished run."""
        run_folder = self.run_folder(world, method, seed)
        with open(os.path.join(run_folder, "report.json")) as f:
            judged = json.load(f)
        with open(run_folder + ".json") as f:
            cpu = json.load(f)

        # a world has one label; what does not apply is null: a continuous model has no codes
        (probe,) = [value for name, value in judged.items() if name.startswith("probe_")]
        row = {"world": world, "method": method, "seed": seed, "purity": judged["purity"]}
        row["one code"] = judged["purity_one_code"]
        row["AMI"] = judged["ami"]
        row["probe"] = probe["codes"]
        row["same/own"] = judged["same_over_own"]
        row["/copy"] = judged["mse_over_copy"]
        row["codes"] = judged["joint_codes"]
        row["CPU s"] = cpu
        return {name: math.nan if value is None else value for name, value in row.items()}


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--worlds", nargs="+", default=WORLDS, choices=WORLDS, help="which (default: all)")
    methods_help = f"of {', '.join(METHODS)} (default: the first {len(DEFAULT_METHODS)})"
    flag("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, help=methods_help)
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each row (default 0 1 2)")
    flag("--steps", type=int, default=600, help="training steps of a row (default 600)")
    flag("--val_clips", type=int, default=256, help="windows to judge a row on (default 256)")
    flag("--out", default="out/bench-lam", help="folder of the runs (default out/bench-lam)")
    flag("--json", action="store_true", help="rows as JSON lines")
    flag("extra", nargs="*", metavar="-- FLAGS", help="further flags for train_lam.py")
    args = parser.parse_args()
    if args.steps < EPOCHS:
        parser.error(f"--steps {args.steps} is too small: at least {EPOCHS}")

    # --- train and judge, one after the other: the first seed of everything comes first ---
    bench = Bench(args.out, args.steps, args.val_clips, args.extra)
    runs = []
    for seed in args.seeds:
        for world in args.worlds:
            runs += [(world, method, seed) for method in args.methods]

    # the bar counts rows that are not finished yet: its ETA is that of the rest
    waiting = [names for names in runs if not bench.is_finished(*names)]
    bar = tqdm(total=len(waiting), desc="lam", unit="row", smoothing=0)
    rows = []
    for names in runs:
        is_new = names in waiting
        if is_new:
            place = f"row {bar.n + 1} of {len(waiting)}"
            bar.write(f"{place}: see {bench.run_folder(*names)}.txt", sys.stderr)
        rows.append(bench.row(*names))
        if is_new:
            bar.update()
    bar.close()

    # --- the table ---
    rows.sort(key=lambda row: (WORLDS.index(row["world"]), list(METHODS).index(row["method"])))
    report(rows, as_json=args.json, device=torch.device("cpu"))
