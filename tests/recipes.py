"""Do latent actions recover known ones? The recipe of train_lam.py, controls that must fail, and
each remedy taken away.

    python -m tests.recipes               # all rows, three seeds: under an hour on two cores
    python -m tests.recipes --rows default guide plain no_shift --seeds 0

Makes the sprite world (nine moves) with prepare.latents and prepare.manifest, then starts
train_lam.py for each row and seed, and prints the last line of its val.csv:

purity      share of held-out transitions whose code names the true action; the names are learned on
            some recordings and scored on the others
AMI         adjusted mutual information of codes and actions
/copy       error over that of copying the last step
/zeroed     over that of zeroed codes
/others     over that of the same decoder under other clips' codes, averaged
same/own    error under the code of another clip with the same action, over its own
perplexity  of the joint codes; `in use` counts the codes of a slot
CPU s       and wall-clock seconds of the whole command

A row passes with purity >= 0.95, AMI >= 0.80, same/own <= 1.5, error <= 0.1 of zeroed codes and
perplexity >= 8. What --folder holds already is not run again."""

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
# patches alone: an encoder that is not told where things were, a decoder that draws all it shows
NO_WARP = "--warp none --reach 0"
ROWS = {  # name -> (world, flags of train_lam.py)
    "default": ("sprite", RUN),
    # all as the guide has it, then its quantizer alone
    "guide": ("sprite", f"{PLAIN} --shared_codebook --no-encoder_shift {NO_WARP}"),
    "plain": ("sprite", f"{PLAIN} --shared_codebook"),
    "plain_apart": ("sprite", PLAIN),
    "no_shift": ("sprite", f"{RUN} --no-encoder_shift {NO_WARP}"),
    "before": ("sprite", f"{RUN} {NO_WARP} --shift_kind patches"),
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
WORLDS = {  # name -> (flags of prepare.latents, size)
    "sprite": ("--size 16 --files 20 --chunks 256", 16),
    "steady": ("--size 16 --files 20 --chunks 256 --distractor steady", 16),
    "random": ("--size 16 --files 20 --chunks 256 --distractor random", 16),
    "guide": ("--size 64 --files 20 --chunks 64", 64),
}
COLUMNS = {  # heading -> column of val.csv
    "purity": "purity",
    "AMI": "ami",
    "/copy": "mse_over_copy",
    "/zeroed": "mse_over_zero",
    "/others": "mse_over_marginal",
    "same/own": "same_over_own",
    "perplexity": "joint_perplexity",
    "in use": "codebook_usage",
}


def call(*words):
    """Run one of our programs to a good end; its output is shown only where it fails."""
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


def make_world(folder, name):
    """The folder of a world, made if it is not there."""
    out = os.path.join(folder, name)
    flags, size = WORLDS[name]
    if not os.path.exists(os.path.join(out, "manifest.json")):
        call("-m", "prepare.latents", "--out", out, *flags.split())
        call("-m", "prepare.manifest", out, "--size", str(size))
    return out


def measure(folder, row, seed):
    """The last line of val.csv of a run (dict), with its seconds. The run is trained if it is not
    there."""
    out = os.path.join(folder, f"{row}-{seed}")
    note = os.path.join(out, "seconds.json")
    if not os.path.exists(note):
        world, flags = ROWS[row]
        data = make_world(folder, world)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        options = [*flags.split(), "--seed", str(seed), "--out_dir", out]
        call("train_lam.py", "--data_dir", data, *options)

        # a run that has this file is finished
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with open(note, "w") as f:
            json.dump({"cpu": cpu, "wall": time.perf_counter() - began}, f)

    with open(os.path.join(out, "val.csv")) as f:
        last = list(csv.DictReader(f))[-1]
    with open(note) as f:
        seconds = json.load(f)
    return {name: float(value) for name, value in last.items()} | seconds


def passes(v):
    """Whether the numbers of a run meet the bar."""
    is_known = v["purity"] >= 0.95 and v["ami"] >= 0.8 and v["joint_perplexity"] >= 8
    return is_known and v["same_over_own"] <= 1.5 and v["mse_over_zero"] <= 0.1


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    names = list(ROWS)
    flag("--rows", nargs="+", default=names, choices=names, help="which rows (default: all)")
    seeds_help = "seeds of each row (default 0 1 2)"
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help=seeds_help)
    folder_help = "where worlds and runs are kept (default out/recipes)"
    flag("--folder", default="out/recipes", help=folder_help)
    args = parser.parse_args()

    # --- run: a line at once for each run, and the table at the end ---
    lines = []
    for row, seed in tqdm([(r, s) for r in args.rows for s in args.seeds], unit="run"):
        v = measure(os.path.abspath(args.folder), row, seed)
        numbers = " ".join(f"{v[column]:>10.3f}" for column in COLUMNS.values())
        verdict = "yes" if passes(v) else "no"
        lines.append(f"{row:12} {seed:>4} {numbers} {v['cpu']:>7.0f} {v['wall']:>7.0f}  {verdict}")
        tqdm.write(lines[-1])
    headings = " ".join(f"{heading:>10}" for heading in COLUMNS)
    print(f"{'row':12} {'seed':>4} {headings} {'CPU s':>7} {'wall s':>7}  passes")
    print("\n".join(lines))
