"""What does each part of train_lewm.py do? Seeds, ablations, and frozen encoders beside it.

    python -m bench.lewm --data demo --of seeds ablations frozen
    python -m bench.lewm --data demo --of ablations --rows no_idm nothing --steps 300

Trains each row for the same number of steps on DATA/train, judges it with eval.py on DATA/val, and
prints one table at the end. --of says which rows:

seeds      the default with each of --seeds
ablations  with the first seed: one thing left out or changed
frozen     with each of --seeds: encode.py and train_ac.py on the same play with encoders that are
           not trained here, for as many minutes (encoding included) as the first default took

Columns of the table. `yaw R2`, `pitch R2`, `keys AUROC` and both ranks compare all rows; skill and
gap are in the space of each row's own encoder and compare none.

minutes      of training (frozen: and encoding), without validation and stored frames
skill, gap   error one step ahead over that of copying; what shuffled actions cost, and its 95 %
             interval over recordings
yaw R2, ...  ridge probe of the action between two steps, fitted on DATA/train
action rank  of the true action among --samples others; 0 is first, 0.5 is chance
step rank    of the true next step among those of its recording; the same
eff. rank    effective rank of the held-out features, and the std of their weakest channel
collapsed    whether training ended with its warning THE FEATURES COLLAPSE

A row that is finished is not run again, and one that was interrupted is continued: give the same
command again. What follows `--` goes to train_lewm.py in every row."""

import argparse
import glob
import json
import os
import shutil
import statistics
import sys
import tempfile

import torch

from bench import report
from bench.trainings import check_flags, run
from evaluation.pretraining import OF_WORLDS, collapse_sentence
from files.disk import write_atomically
from files.logs import read_csv
from files.progress import tqdm

# a clip, the same for every row: marks of eval.py must agree
CLIP = "--fps 10 --frames_per_clip 8 --action_space 18".split()
SIZE = "--pred_dim 192 --pred_depth 4 --pred_heads 4".split()

# flags of train_lewm.py, beside its defaults. The first rows are run unless --rows names others:
# each leaves one thing out, or changes the weight of what spreads the features
ABLATIONS = {
    "no_idm": "--idm 0",
    "idm_alone": "--variance 0 --covariance 0",
    "nothing": "--variance 0 --covariance 0 --idm 0",
    "no_actions": "--no-actions",
    "times_3": "--variance 3 --covariance 0.03",
    "by_3": "--variance 0.333 --covariance 0.00333",
}
DEFAULT_ROWS = list(ABLATIONS)

# the same with SIGReg in place of variance and covariance, and one vector a step
ABLATIONS |= {
    "sigreg": "--sigreg 0.09 --variance 0 --covariance 0",
    "sigreg_times_3": "--sigreg 0.27 --variance 0 --covariance 0",
    "sigreg_by_3": "--sigreg 0.03 --variance 0 --covariance 0",
    "one_vector": "--pool mean --sigreg 0.09 --variance 0 --covariance 0",
    "published": "--pool mean --sigreg 0.09 --variance 0 --covariance 0 --idm 0",
}

# encoders that are not trained here, at the crop that doom_tiny was trained at
ENCODERS = ["doom_tiny", "vit_tiny"]
FROZEN = "--crop_size 48 --feature_norm standardize --predict change --lr 2e-3".split()

# epochs of a run, of which the first warms up and the last three anneal
EPOCHS = 10
PLAN = f"--epochs {EPOCHS} --warmup 1 --anneal 3 --val_every {EPOCHS}".split()


def minutes_of(run_folder, batch_size):
    """Minutes that the steps of a run took, also where it was interrupted."""
    return (batch_size / read_csv(os.path.join(run_folder, "train.csv"))["clips_per_s"]).sum() / 60


def rate_of(run_folder):
    """Median clips a second of a run, without the first half of its steps."""
    rates = read_csv(os.path.join(run_folder, "train.csv"))["clips_per_s"]
    return statistics.median(rates[len(rates) // 2 :])


def interval_of(low, high):
    """An interval as text; None, None where there are too few recordings for one."""
    if low is None or high is None:
        return "not given"
    return f"{low:.3f} to {high:.3f}"


def row_of(name, seed, run_folder, minutes):
    """The table's row of a finished and judged run."""
    with open(os.path.join(run_folder, "report.json")) as f:
        judged = json.load(f)
    same = judged["comparable"]
    row = {"row": name, "seed": seed, "minutes": minutes}
    row["skill"] = judged["tf_skill"]
    row["gap"] = judged["moves_gap"]
    row["interval"] = interval_of(judged["moves_gap_low"], judged["moves_gap_high"])
    for column in ("yaw", "pitch"):
        row[f"{column} R2"] = same[f"probe_{column}"]
    row["keys AUROC"] = same["probe_keys"]
    row["action rank"] = same["action_rank"]
    row["step rank"] = same["next_step_rank"][0]
    row["eff. rank"] = same["effective_rank"]
    row["std"] = same["smallest_std"]

    # by the rule of the warning. The spread of frozen features does not change
    log = read_csv(os.path.join(run_folder, "train.csv"))
    row["collapsed"] = "frozen"
    if "effective_rank" in log:
        ranks = log["effective_rank"]
        last = (ranks[-1], log["smallest_std"][-1])
        is_dead = collapse_sentence(*last, ranks[0], **OF_WORLDS) is not None
        row["collapsed"] = "yes" if is_dead else "no"

    # the same play in every row, or the comparable columns are not
    row["clips"] = f"{same['fitted_on']['mark']}/{same['tested_on']['mark']}"
    return row


def is_trained(run_folder):
    """Whether the last checkpoint of a run exists: it may still have to be judged."""
    return os.path.exists(os.path.join(run_folder, f"checkpoint-epoch{EPOCHS:03d}.pth.tar"))


class Bench:
    """The runs in a folder, on the play in another."""

    def __init__(self, data, folder, steps, crop_size, batch_size, limits, workers, extra):
        self.data = data
        self.folder = folder
        self.steps = steps
        self.crop_size = crop_size  # of rows that train their encoder
        self.batch_size = batch_size
        self.limits = limits  # flags for eval.py: how much it reads
        self.workers = ["--num_workers", workers]
        self.extra = extra  # flags for train_lewm.py
        os.makedirs(folder, exist_ok=True)

    def shards(self, part):
        return sorted(glob.glob(os.path.join(self.data, part, "*.tar")))

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def is_finished(self, name, seed):
        """Whether a row is trained and judged."""
        return os.path.exists(self.path(f"{name}-{seed}", "report.json"))

    def judge(self, log, run_folder, *flags):
        """eval.py, if the run has no report yet."""
        if os.path.exists(os.path.join(run_folder, "report.json")):
            return
        data = ["--data", *self.shards("val"), "--train_data", *self.shards("train")]
        run(log, "eval.py", "--checkpoint", run_folder, *data, *self.limits, *self.workers, *flags)

    def lewm(self, name, seed, flags):
        """Train and judge a row of train_lewm.py; the table's row."""
        run_folder = self.path(f"{name}-{seed}")
        log = run_folder + ".txt"
        made_with = [self.data, self.batch_size, *self.limits, self.steps, self.crop_size]
        check_flags(run_folder, [*made_with, *self.extra, *flags])
        if not is_trained(run_folder):
            data = ["--data", *self.shards("train"), "--val_data", *self.shards("val")]
            files = ["--scaler", os.path.join(self.data, "scaler.pkl"), "--out_dir", run_folder]
            files += ["--pixels_cache", self.path("pixels"), "--resume"]
            plan = [*PLAN, "--ipe", max(self.steps // EPOCHS, 1), "--seed", seed]
            plan += ["--crop_size", self.crop_size, "--batch_size", self.batch_size]
            options = [*CLIP, *SIZE, *plan, *self.workers, *self.extra]
            run(log, "train_lewm.py", *data, *files, *options, *flags)
        self.judge(log, run_folder)
        return row_of(name, seed, run_folder, minutes_of(run_folder, self.batch_size))

    def features(self, encoder):
        """Encode the play; (folder, minutes)."""
        features = self.path("features", encoder)
        note = os.path.join(features, "minutes.json")
        if not os.path.exists(note):
            flags = ["--encoder", encoder, *CLIP[:2], *FROZEN[:2], *self.workers]

            # of an encoding that was interrupted the minutes are not known: it begins again
            shutil.rmtree(features, ignore_errors=True)
            seconds = 0
            for part, phases in (("train", 4), ("val", 1)):
                shards = ["--data", *self.shards(part), "--out", os.path.join(features, part)]
                log = self.path(f"{encoder}.txt")
                seconds += run(log, "encode.py", *shards, *flags, "--phases", phases)[0]
            write_atomically(note, json.dumps(seconds / 60).encode())
        with open(note) as f:
            return features, json.load(f)

    def trial_rate(self, log, options):
        """Clips a second of train_ac.py in a short run, of which nothing is kept."""
        short = "--epochs 1 --ipe 40 --warmup 0 --anneal 0 --val_clips 0".split()
        with tempfile.TemporaryDirectory(prefix="nanojepa-bench-") as scratch:
            run(log, "train_ac.py", *options, *short, "--out_dir", os.path.join(scratch, "run"))
            return rate_of(os.path.join(scratch, "run"))

    def frozen(self, encoder, seed, minutes):
        """Train and judge a predictor on frozen features, for `minutes` with the encoding."""
        run_folder = self.path(f"{encoder}-{seed}")
        log = run_folder + ".txt"
        check_flags(run_folder, [self.data, self.batch_size, *self.limits, *FROZEN])
        features, encoding = self.features(encoder)
        data = ["--data", f"{features}/train/*.tar", "--val_data", f"{features}/val/*.tar"]
        data += ["--scaler", os.path.join(self.data, "scaler.pkl"), "--seed", seed]
        options = [*CLIP, *SIZE, *FROZEN, *self.workers, "--batch_size", self.batch_size]
        if not is_trained(run_folder):
            # how many steps is that? A run that is interrupted keeps its number
            note = run_folder + ".steps"
            if not os.path.exists(note):
                seconds = 60 * max(minutes - encoding, 0)
                rate = self.trial_rate(log, data + options)
                steps = max(int(seconds * rate / self.batch_size), EPOCHS)
                write_atomically(note, str(steps).encode())
            with open(note) as f:
                steps = int(f.read())
            plan = [*PLAN, "--ipe", steps // EPOCHS, "--out_dir", run_folder, "--resume"]
            run(log, "train_ac.py", *data, *options, *plan)
        self.judge(log, run_folder, "--encoder", encoder)
        return row_of(encoder, seed, run_folder, minutes_of(run_folder, self.batch_size) + encoding)


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    parts = ["seeds", "ablations", "frozen"]
    flag("--data", default="demo", help="folder of prepare.demo, with scaler.pkl (default demo)")
    flag("--of", nargs="+", default=parts, choices=parts, help="which rows (default: all)")
    rows_help = f"ablations, of {', '.join(ABLATIONS)} (default: the first {len(DEFAULT_ROWS)})"
    flag("--rows", nargs="+", default=DEFAULT_ROWS, choices=ABLATIONS, help=rows_help)
    flag("--encoders", nargs="+", default=ENCODERS, help="of frozen (default: doom_tiny vit_tiny)")
    seeds_help = "the first one is that of ablations (default 0 1 2)"
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help=seeds_help)
    # how long a row takes
    flag("--steps", type=int, default=2500, help="training steps of a row (default 2500)")
    flag("--batch_size", type=int, default=24, help="clips a step, in every row (default 24)")
    crop_help = "pixels of rows that train their encoder; frozen ones see 48 (default 32)"
    flag("--crop_size", type=int, default=32, help=crop_help)
    minutes_help = "budget of frozen (default: what the default took with the first seed)"
    flag("--minutes", type=float, help=minutes_help)
    # how long it takes to judge one
    flag("--val_clips", type=int, default=256, help="clips to judge a row on (default 256)")
    flag("--probe_clips", type=int, default=512, help="clips to fit the probe on (default 512)")
    flag("--samples", type=int, default=64, help="actions to rank the true one among (default 64)")
    flag("--ranked_clips", type=int, default=64, help="clips to rank it in (default 64)")
    flag("--out", default="out/bench-lewm", help="folder of the runs (default out/bench-lewm)")
    flag("--num_workers", type=int, default=0, help="loader processes (default 0)")
    flag("--json", action="store_true", help="rows as JSON lines")
    flag("extra", nargs="*", metavar="-- FLAGS", help="further flags for train_lewm.py")
    args = parser.parse_args()
    if args.steps < EPOCHS:
        parser.error(f"--steps {args.steps} is too small: at least {EPOCHS}")
    if not os.path.exists(os.path.join(args.data, "scaler.pkl")):
        raise SystemExit(
            f"--data {args.data} holds no demo: make one with make demo, or name its folder"
        )

    # minutes are counted in clips of --batch_size
    for word in args.extra:
        if word.split("=")[0] in ("--batch_size", "--crop_size"):
            parser.error(f"{word} stands behind --: it is a flag of every row, give it before")

    # --- the runs: (name, seed, flags of train_lewm.py, or None: a frozen encoder) ---
    first = args.seeds[0]
    runs = []
    if "seeds" in args.of:
        runs += [("default", seed, "") for seed in args.seeds]
    if "ablations" in args.of:
        runs += [(name, first, ABLATIONS[name]) for name in args.rows]
    if "frozen" in args.of:
        for seed in args.seeds:
            runs += [(encoder, seed, None) for encoder in args.encoders]
        default = os.path.join(args.out, f"default-{first}")
        if not (args.minutes or "seeds" in args.of or is_trained(default)):
            parser.error("--of frozen takes as long as the default: add seeds, or --minutes")

    # --- train and judge, one after the other ---
    limits = ["--val_clips", args.val_clips, "--probe_clips", args.probe_clips]
    limits += ["--samples", args.samples, "--ranked_clips", args.ranked_clips]
    bench = Bench(
        args.data,
        args.out,
        args.steps,
        args.crop_size,
        args.batch_size,
        limits,
        args.num_workers,
        args.extra,
    )

    # the bar counts rows that are not finished yet: its ETA is that of the rest
    waiting = [(name, seed) for name, seed, _ in runs if not bench.is_finished(name, seed)]
    bar = tqdm(total=len(waiting), desc="lewm", unit="row", smoothing=0)
    rows = []
    for name, seed, flags in runs:
        is_new = (name, seed) in waiting
        if is_new:
            place = f"row {bar.n + 1} of {len(waiting)}"
            bar.write(f"{place}: {name} {seed}, see {bench.path(name)}-{seed}.txt", sys.stderr)
        if flags is None:
            minutes = args.minutes or minutes_of(default, args.batch_size)
            rows.append(bench.frozen(name, seed, minutes))
        else:
            rows.append(bench.lewm(name, seed, flags.split()))
        if is_new:
            bar.update()
    bar.close()

    # --- the table ---
    marks = {row["clips"] for row in rows}
    if len(marks) > 1:
        print(f"WARNING: rows are of different clips ({', '.join(sorted(marks))})")
    report(rows, as_json=args.json, device=torch.device("cpu"))
