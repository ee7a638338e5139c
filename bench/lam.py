"""Do latent actions recover known ones? The whole table of train_lam.py runs: recipe, controls that
must fail, each remedy off.

    python -m bench.lam                                    # all rows, three seeds: under an hour on two cores
    python -m bench.lam --rows default guide plain no_shift --seeds 0

Makes the sprite world (nine moves) with prepare.latents and prepare.manifest, then starts
train_lam.py for each row and seed and reads the last line of its val.csv: purity (held out, code to
action learned on some recordings and scored on the others), adjusted mutual information, error over that of
copying, of zeroed codes and of the same decoder under other clips' codes averaged, error under the
code of another clip with the same action over its own, perplexity of the joint codes, codes in use
a slot, CPU and wall-clock seconds of the whole command. A row passes with purity >= 0.95, AMI >=
0.80, same action <= 1.5, error <= 0.1 of zeroed codes, perplexity >= 8. What --folder holds already
is not run again."""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = (
    "--embed_dim 48 --encoder_depth 2 --decoder_depth 2 --num_heads 4 --patch_dim 64 --lr 2e-3"
    " --log_every 100"
)
RUN = f"{SMALL} --batch_size 8 --epochs 3 --ipe 500"
PLAIN = f"{RUN} --codebook loss --vq_warmup_steps 0 --no-kmeans --no-revive"
ROWS = {  # name -> (world, flags of train_lam.py)
    "default": ("sprite", RUN),
    "guide": ("sprite", f"{PLAIN} --shared_codebook --no-encoder_shift"),  # all as the guide has it
    "plain": ("sprite", f"{PLAIN} --shared_codebook"),  # its quantizer alone
    "plain_apart": ("sprite", PLAIN),
    "no_shift": ("sprite", f"{RUN} --no-encoder_shift"),
    "no_warmup": ("sprite", f"{RUN} --vq_warmup_steps 0"),
    "no_kmeans": ("sprite", f"{RUN} --no-kmeans"),
    "no_revive": ("sprite", f"{RUN} --no-revive"),
    "shared": ("sprite", f"{RUN} --shared_codebook"),
    "loss": ("sprite", f"{RUN} --codebook loss"),
    "fsq": ("sprite", f"{RUN} --quantizer fsq"),
    "none": ("sprite", f"{RUN} --quantizer none"),
    "steady": ("steady", RUN),
    "random": ("random", RUN),
    "guide_shape": (
        "guide",
        f"{SMALL} --batch_size 8 --sequence_length 4 --epochs 2 --ipe 500 --val_clips 64",
    ),
}
WORLDS = {
    "sprite": ("--size 16 --files 20 --chunks 256", 16),
    "steady": ("--size 16 --files 20 --chunks 256 --distractor steady", 16),
    "random": ("--size 16 --files 20 --chunks 256 --distractor random", 16),
    "guide": ("--size 64 --files 20 --chunks 64", 64),
}
SHOWN = [
    "purity",
    "ami",
    "mse_over_copy",
    "mse_over_zero",
    "mse_over_marginal",
    "same_over_own",
    "joint_perplexity",
    "codebook_usage",
]
HEADS = ["purity", "AMI", "/copy", "/zeroed", "/others", "same/own", "perplexity", "in use"]


def call(*words):
    """Run one of our programs to a good end; its output only where it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}"
        )


def world(folder, name):
    """The folder of a world, made if it is not there."""
    out, (flags, size) = os.path.join(folder, name), WORLDS[name]
    if not os.path.exists(os.path.join(out, "manifest.json")):
        call("-m", "prepare.latents", "--out", out, *flags.split())
        call("-m", "prepare.manifest", out, "--size", str(size))
    return out


def measure(folder, row, seed):
    """The last line of val.csv of a run (dict), and its seconds; trained if it is not there."""
    out, (where, flags) = os.path.join(folder, f"{row}-{seed}"), ROWS[row]
    note = os.path.join(out, "seconds.json")
    if not os.path.exists(note):
        data = world(folder, where)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        call(
            "train_lam.py",
            "--data_dir",
            data,
            *flags.split(),
            "--seed",
            str(seed),
            "--out_dir",
            out,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with open(note, "w") as f:
            json.dump({"cpu": cpu, "wall": time.perf_counter() - began}, f)
    with open(os.path.join(out, "val.csv")) as f, open(note) as g:
        return {k: float(v) for k, v in list(csv.DictReader(f))[-1].items()} | json.load(g)


def passes(v):
    known = v["purity"] >= 0.95 and v["ami"] >= 0.8 and v["joint_perplexity"] >= 8
    return known and v["same_over_own"] <= 1.5 and v["mse_over_zero"] <= 0.1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="which rows"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each row")
    parser.add_argument("--folder", default="out/bench-lam", help="where worlds and runs are kept")
    args = parser.parse_args()
    lines = []
    for row, seed in tqdm([(r, s) for r in args.rows for s in args.seeds], unit="run"):
        v = measure(os.path.abspath(args.folder), row, seed)
        numbers = " ".join(f"{v[k]:>10.3f}" for k in SHOWN)
        lines.append(
            f"{row:12} {seed:>4} {numbers} {v['cpu']:>7.0f} {v['wall']:>7.0f} "
            f" {'yes' if passes(v) else 'no'}"
        )
        tqdm.write(lines[-1])
    print(
        f"{'row':12} {'seed':>4} "
        + " ".join(f"{h:>10}" for h in HEADS)
        + f" {'CPU s':>7} {'wall s':>7}  passes",
        *lines,
        sep="\n",
    )
