"""What encode.py saves: training from features against training on video, decoding ahead of the
encoder, bytes on disk, the cost of int8.

    python -m bench.features                            # the shards of make demo, both cores; 10 minutes
    python -m bench.features --of speed encode          # one or some of: speed encode storage flops int8
    python -m bench.features --of flops --device A100

speed: train_ac.py as a process, in turns on video and on features of the same recordings, at the
demo's sizes (T = 8, 32 pixels, batch 32, a predictor of 4 layers, 192 wide); clips/s and data wait
are train.csv's, after the first --log_every steps. encode: encode.py in turns with no thread that
decodes ahead and with --num_workers. storage: bytes of the shards just written, beside
estimate's, and an hour of play at 256 pixels, 5 frames a second, 2 a step. flops: 2 a weight
and token forward, 4 backward, attention by what its mask lets through; clips/s at 40 % of the data
sheet's dense bf16 peak, an assumption; a clip on video decodes the 64 frames it spans, and what
lies between it and the keyframe before. int8: the same training, seed by seed, on bf16 and on int8.
"""

import argparse
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

from bench import report
from bench.step import useful_flops
from files.features import PLAY, estimate, play_runs
from files.logs import read_csv
from files.shards import expand, index_shards
from model import Predictor
from weights import build_encoder

PARTS = ["speed", "encode", "storage", "flops", "int8"]
PEAKS = {"H100": 989e12, "A100": 312e12}  # FLOP/s of dense bf16, from the data sheets
SIZES = "--encoder vit_tiny --crop_size 32 --fps 10".split()
TRAIN = (
    "--action_space 36 --crop_size 32 --fps 10 --feature_norm standardize --pred_dim 192"
    " --pred_depth 4 --pred_heads 4 --batch_size 32 --lr 2e-3 --warmup 1"
).split()


def run(*words):
    """One of our scripts as a process of its own; seconds it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def features(args, scratch, part, store, workers):
    """Encode demo/PART into scratch; (folder, seconds)."""
    out = os.path.join(scratch, f"{store}-{workers}", part)
    phases = ["--phases", 4 if part == "train" else 1]
    flags = [*SIZES, *phases, "--store", store, "--num_workers", workers]
    return out, run("encode.py", "--data", f"{args.data}/{part}/*.tar", "--out", out, *flags)


def speed_rows(args, scratch, folder):
    """Rows of clips/s and data wait on video, decoded in the process or by loaders beside it, and
    from features, run in turns."""
    video = [f"{args.data}/train/*.tar", "--encoder", "vit_tiny"]
    kinds = {
        "video": (video, 0, 3),
        f"video, {args.num_workers} loaders": (video, args.num_workers, 5),
        "features": ([f"{folder}/*.tar"], 0, 9),
    }
    found = {k: [] for k in kinds}
    for turn in tqdm(range(args.turns), desc="speed", unit="turn"):
        for kind, (data, workers, lines) in kinds.items():
            steps, out = args.log_every * lines, os.path.join(scratch, f"{kind}-{turn}")
            plan = [
                "--epochs",
                2,
                "--ipe",
                steps,
                "--anneal",
                0,
                "--max_steps",
                steps,
                "--val_clips",
                0,
                "--num_workers",
                workers,
            ]
            run(
                "train_ac.py",
                "--data",
                *data,
                "--scaler",
                f"{args.data}/scaler.pkl",
                "--out_dir",
                out,
                *TRAIN,
                *plan,
                "--log_every",
                args.log_every,
            )
            log = {
                k: v[args.log_every :] for k, v in read_csv(os.path.join(out, "train.csv")).items()
            }
            seconds = 1 / log["clips_per_s"]  # a clip, of each step
            found[kind].append(
                (len(seconds) / seconds.sum(), (log["data_wait"] * seconds).sum() / seconds.sum())
            )
    rows = []
    for kind, turns in found.items():
        ratios = [ours / rate for (rate, _), (ours, _) in zip(turns, found["features"])]
        rate, wait = (statistics.median(x) for x in zip(*turns))
        rows.append(
            {
                "training on": kind,
                "clips/s": rate,
                "data wait %": 100 * wait,
                "features / it": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def encode_rows(args, scratch):
    """Seconds of encode.py over the held-out shards, without and with threads that decode ahead."""
    seconds = {0: [], args.num_workers: []}
    for turn in tqdm(range(args.turns), desc="encode", unit="turn"):
        for workers, found in seconds.items():
            found.append(
                features(args, os.path.join(scratch, f"turn-{turn}"), "val", "bf16", workers)[1]
            )
    base = statistics.median(seconds[0])
    return [
        {
            "--num_workers": n,
            "s with start-up": statistics.median(s),
            "0 / it": base / statistics.median(s),
        }
        for n, s in seconds.items()
    ]


def expected(records, tokens, width, store, fps=5.0, phases=1):
    """(steps, bytes) that encode.py expects of play."""
    runs = play_runs(
        records, fps=fps, encode="tubelet", frames_per_clip=16, frames_per_step=2, phases=phases
    )
    return estimate(runs, tokens, width, store, **PLAY)


def storage_rows(args, folders):
    """Bytes written for the demo against the estimate, and what an hour of play takes at 256
    pixels."""
    rows = []
    records, _ = index_shards(expand(f"{args.data}/train/*.tar"))
    for store, folder in folders.items():
        steps, size = expected(records, 4, 192, store, fps=10.0, phases=4)
        written = sum(os.path.getsize(p) for p in glob.glob(f"{folder}/*.tar"))
        made = sum(r.length for r in index_shards(expand(f"{folder}/*.tar"))[0])
        row = {
            "store": store,
            "demo MB": written / 1e6,
            "written / estimate": written / size,
            "steps / estimate": made / steps,
        }
        hour = [records[0]._replace(length=20 * 300)] * 12  # VPT's recordings are of 5 minutes
        for name, width in (("ViT-L", 1024), ("ViT-g", 1408)):
            row[f"{name} GB an hour"] = expected(hour, 256, width, store)[1] / 1e9
        rows.append(row)
    return rows


def flops_rows(args):
    """The arithmetic for released encoders at 256 pixels, T = 8, under the predictor of V-JEPA 2-AC
    (24 layers, 1024 wide)."""
    rows, rate = [], 0.4 * PEAKS[args.device]
    for name, arch in (("ViT-L", "vit_large_16"), ("ViT-g", "vit_giant_xformers")):
        with torch.device("meta"):
            encoder = build_encoder(arch)
            predictor = Predictor(
                encoder.embed_dim, 13, 2, (16, 16), pred_dim=1024, depth=24, num_heads=16
            )
        frozen, trained = useful_flops(encoder, predictor, 1, 8)
        live, cached = frozen + trained, trained
        size = 8 * 256 * 2 * encoder.embed_dim
        rows.append(
            {
                "encoder": name,
                "its TFLOP a clip": frozen / 1e12,
                "predictor's": trained / 1e12,
                "gain": live / cached,
                "clips/s, video": rate / live,
                "features": rate / cached,
                "reads GB/s": size * rate / cached / 1e9,
                "video decodes frames/s": 64 * rate / live,
            }
        )
    return rows


def int8_rows(args, scratch, folders, held):
    """Validation after the same training on bf16 and on int8, seed by seed."""
    found = {}
    for seed in tqdm(range(args.seeds), desc="int8", unit="seed"):
        for store, folder in folders.items():
            out = os.path.join(scratch, f"{store}-seed-{seed}")
            plan = [
                "--epochs",
                3,
                "--ipe",
                args.steps // 3,
                "--anneal",
                1,
                "--val_every",
                3,
                "--num_workers",
                args.num_workers,
            ]
            run(
                "train_ac.py",
                "--data",
                f"{folder}/*.tar",
                "--val_data",
                f"{held[store]}/*.tar",
                "--scaler",
                f"{args.data}/scaler.pkl",
                "--out_dir",
                out,
                *TRAIN,
                *plan,
                "--seed",
                seed,
                "--log_every",
                50,
            )
            log = read_csv(os.path.join(out, "val.csv"))
            found[store, seed] = [log[k][-1] for k in ("jloss", "sloss", "tf_skill")]
    rows = []
    for (store, seed), (jloss, sloss, skill) in sorted(found.items(), key=lambda x: x[0][::-1]):
        rows.append(
            {
                "seed": seed,
                "store": store,
                "jloss": f"{jloss:.5f}",
                "sloss": f"{sloss:.5f}",
                "skill": f"{skill:.4f}",
                "jloss against bf16": f"{jloss / found['bf16', seed][0] - 1:+.3%}",
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--data", default="demo", help="folder of prepare.demo, with train/, val/ and scaler.pkl")
    flag("--of", nargs="+", default=PARTS, choices=PARTS, help="which tables")
    flag("--turns", type=int, default=3, help="times that speed and encode are measured in turns")
    flag(
        "--log_every",
        type=int,
        default=10,
        help="steps between log lines; speed takes 3 to 9 times as many steps",
    )
    flag(
        "--num_workers",
        type=int,
        default=2,
        help="loader processes of train_ac.py on video, threads of encode.py",
    )
    flag("--steps", type=int, default=300, help="steps of the int8 runs")
    flag("--seeds", type=int, default=3, help="seeds of the int8 runs")
    flag("--device", default="H100", choices=PEAKS, help="whose peak the arithmetic takes")
    flag("--json", action="store_true", help="rows as JSON lines")
    args = parser.parse_args()
    if {"speed", "encode", "storage", "int8"} & set(args.of) and not os.path.exists(
        os.path.join(args.data, "scaler.pkl")
    ):
        raise SystemExit(
            f"{args.data} holds no demo: make one with make demo, or name its folder with --data"
        )
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="nanojepa-bench-") as scratch:
        folders = {}
        if {"speed", "storage", "int8"} & set(args.of):
            folders = {
                s: features(args, scratch, "train", s, args.num_workers)[0]
                for s in tqdm(["bf16", "int8"], desc="encode the demo")
            }
        if "speed" in args.of:
            report(speed_rows(args, scratch, folders["bf16"]), args.json, cpu)
        if "encode" in args.of:
            report(encode_rows(args, scratch), args.json, cpu)
        if "storage" in args.of:
            report(storage_rows(args, folders), args.json, cpu)
        if "flops" in args.of:
            report(flops_rows(args), args.json, cpu)
        if "int8" in args.of:
            held = {s: features(args, scratch, "val", s, args.num_workers)[0] for s in folders}
            report(int8_rows(args, scratch, folders, held), args.json, cpu)
