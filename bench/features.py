"""What do saved features (encode.py) gain and cost, against training on video?

    python -m bench.features                       # the shards of make demo, two cores; 10 minutes
    python -m bench.features --of speed encode     # one or some of the tables
    python -m bench.features --of flops --device A100

Prints one table for each of --of:

speed    train_ac.py as a process, in turns on video and on features of the same recordings, at the
         demo's sizes (T = 8, 32 pixels, batch 32, a predictor of 4 layers, 192 wide). Clips/s and
         data wait are train.csv's, after the first --log_every steps.
encode   encode.py in turns without threads that decode ahead of the encoder and with --num_workers.
storage  Bytes of the shards just written, beside what encode.py estimated; and an hour of play at
         256 pixels, 5 frames a second, 2 a step.
flops    Arithmetic for released encoders: 2 FLOPs a weight and token forward, 4 backward, attention
         by what its mask lets through. Clips/s assume 40 % of the data sheet's dense bf16 peak. On
         video, a clip decodes the 64 frames it spans, and what lies between it and the keyframe
         before.
int8     The same training, seed by seed, on features in bf16 and in int8."""

import argparse
import functools
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
from kernels.flops import PEAKS
from model import Predictor
from weights import build_encoder

PARTS = ["speed", "encode", "storage", "flops", "int8"]
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


def encode(demo, scratch, part, store, workers):
    """Encode DEMO/PART into scratch; (folder, seconds)."""
    out = os.path.join(scratch, f"{store}-{workers}", part)
    phases = 4 if part == "train" else 1
    flags = [*SIZES, "--phases", phases, "--store", store, "--num_workers", workers]
    return out, run("encode.py", "--data", f"{demo}/{part}/*.tar", "--out", out, *flags)


def train_for(steps, demo, data, out, workers, log_every):
    """Columns of train.csv of a run of so many steps, after its first log_every."""
    plan = ["--epochs", 2, "--ipe", steps, "--anneal", 0, "--max_steps", steps]
    files = ["--data", *data, "--scaler", f"{demo}/scaler.pkl", "--out_dir", out]
    options = ["--val_clips", 0, "--num_workers", workers, "--log_every", log_every]
    run("train_ac.py", *files, *TRAIN, *plan, *options)
    return {k: v[log_every:] for k, v in read_csv(os.path.join(out, "train.csv")).items()}


def speed_rows(demo, scratch, folder, turns, log_every, num_workers):
    """Rows of clips/s and data wait on video, decoded in the process or by loaders beside it, and
    from features in `folder`, run in turns."""
    video = [f"{demo}/train/*.tar", "--encoder", "vit_tiny"]
    kinds = {  # name: (data, loaders, lines of the log)
        "video": (video, 0, 3),
        f"video, {num_workers} loaders": (video, num_workers, 5),
        "features": ([f"{folder}/*.tar"], 0, 9),
    }
    measured = {kind: [] for kind in kinds}
    for turn in tqdm(range(turns), desc="speed", unit="turn"):
        for kind, (data, workers, lines) in kinds.items():
            out = os.path.join(scratch, f"{kind}-{turn}")
            log = train_for(log_every * lines, demo, data, out, workers, log_every)

            # means over time: a slow step counts for as long as it took
            seconds = 1 / log["clips_per_s"]  # a clip, of each step
            rate = len(seconds) / seconds.sum()
            wait = (log["data_wait"] * seconds).sum() / seconds.sum()
            measured[kind].append((rate, wait))

    # ratios are taken within a turn, whose runs met the same load on the machine
    rows = []
    for kind, pairs in measured.items():
        ratios = []
        for (rate, _), (from_features, _) in zip(pairs, measured["features"]):
            ratios.append(from_features / rate)
        row = {"training on": kind, "clips/s": statistics.median(rate for rate, _ in pairs)}
        row["data wait %"] = 100 * statistics.median(wait for _, wait in pairs)
        row["features / it"] = statistics.median(ratios)
        rows.append(row | {"lowest": min(ratios), "highest": max(ratios)})
    return rows


def encode_rows(demo, scratch, turns, num_workers):
    """Seconds of encode.py over the held-out shards, without and with threads that decode ahead."""
    seconds = {0: [], num_workers: []}
    for turn in tqdm(range(turns), desc="encode", unit="turn"):
        folder = os.path.join(scratch, f"turn-{turn}")
        for workers, measured in seconds.items():
            measured.append(encode(demo, folder, "val", "bf16", workers)[1])
    base = statistics.median(seconds[0])
    rows = []
    for workers, measured in seconds.items():
        median = statistics.median(measured)
        rows.append({"--num_workers": workers, "s with start-up": median, "0 / it": base / median})
    return rows


def expected(records, tokens, width, store, fps=5.0, phases=1):
    """(steps, bytes) that encode.py expects of play."""
    runs = play_runs(
        records, fps=fps, encode="tubelet", frames_per_clip=16, frames_per_step=2, phases=phases
    )
    return estimate(runs, tokens, width, store, **PLAY)


def storage_rows(demo, folders):
    """Bytes written for the demo against the estimate, and what an hour of play takes at 256
    pixels. folders: {store: folder of its shards}."""
    records, _ = index_shards(expand(f"{demo}/train/*.tar"))
    hour = [records[0]._replace(length=20 * 300)] * 12  # VPT's recordings are of 5 minutes
    rows = []
    for store, folder in folders.items():
        steps, size = expected(records, 4, 192, store, fps=10.0, phases=4)
        bytes_written = sum(os.path.getsize(p) for p in glob.glob(f"{folder}/*.tar"))
        steps_written = sum(r.length for r in index_shards(expand(f"{folder}/*.tar"))[0])
        row = {"store": store, "demo MB": bytes_written / 1e6}
        row["written / estimate"] = bytes_written / size
        row["steps / estimate"] = steps_written / steps
        for name, width in (("ViT-L", 1024), ("ViT-g", 1408)):
            row[f"{name} GB an hour"] = expected(hour, 256, width, store)[1] / 1e9
        rows.append(row)
    return rows


def flops_rows(device):
    """The arithmetic for released encoders at 256 pixels, T = 8, under the predictor of V-JEPA 2-AC
    (24 layers, 1024 wide)."""
    size = {"pred_dim": 1024, "depth": 24, "num_heads": 16}
    speed = 0.4 * PEAKS[device]
    rows = []
    for name, arch in (("ViT-L", "vit_large_16"), ("ViT-g", "vit_giant_xformers")):
        with torch.device("meta"):
            encoder = build_encoder(arch)
            predictor = Predictor(encoder.embed_dim, 13, 2, (16, 16), **size)
        frozen, trained = useful_flops(encoder, predictor, 1, 8)
        on_video = frozen + trained
        clip_bytes = 8 * 256 * 2 * encoder.embed_dim
        row = {"encoder": name, "its TFLOP a clip": frozen / 1e12, "predictor's": trained / 1e12}
        row["gain"] = on_video / trained
        row["clips/s, video"] = speed / on_video
        row["features"] = speed / trained
        row["reads GB/s"] = clip_bytes * speed / trained / 1e9
        row["video decodes frames/s"] = 64 * speed / on_video
        rows.append(row)
    return rows


def int8_rows(demo, scratch, folders, val_folders, seeds, steps, num_workers):
    """Validation after the same training on bf16 and on int8, seed by seed."""
    plan = ["--epochs", 3, "--ipe", steps // 3, "--anneal", 1, "--val_every", 3]
    options = [*plan, "--num_workers", num_workers, "--log_every", 50]
    rows = []
    for seed in tqdm(range(seeds), desc="int8", unit="seed"):
        for store, folder in folders.items():
            out = os.path.join(scratch, f"{store}-seed-{seed}")
            data = ["--data", f"{folder}/*.tar", "--val_data", f"{val_folders[store]}/*.tar"]
            files = [*data, "--scaler", f"{demo}/scaler.pkl", "--out_dir", out]
            run("train_ac.py", *files, *TRAIN, *options, "--seed", seed)

            log = read_csv(os.path.join(out, "val.csv"))
            jloss = log["jloss"][-1]
            if store == "bf16":
                jloss_bf16 = jloss
            row = {"seed": seed, "store": store, "jloss": f"{jloss:.5f}"}
            row["sloss"] = f"{log['sloss'][-1]:.5f}"
            row["skill"] = f"{log['tf_skill'][-1]:.4f}"
            rows.append(row | {"jloss against bf16": f"{jloss / jloss_bf16 - 1:+.3%}"})
    return rows


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    data_help = "folder of prepare.demo, with train/, val/ and scaler.pkl (default demo)"
    flag("--data", default="demo", help=data_help)
    flag("--of", nargs="+", default=PARTS, choices=PARTS, help="which tables (default: all)")
    flag("--turns", type=int, default=3, help="turns of speed and of encode (default 3)")
    log_help = "steps between log lines; speed takes 3 to 9 times as many steps (default 10)"
    flag("--log_every", type=int, default=10, help=log_help)
    workers_help = "loaders of train_ac.py on video, threads of encode.py (default 2)"
    flag("--num_workers", type=int, default=2, help=workers_help)
    flag("--steps", type=int, default=300, help="steps of the int8 runs (default 300)")
    flag("--seeds", type=int, default=3, help="seeds of the int8 runs (default 3)")
    flag("--device", default="H100", choices=PEAKS, help="whose peak flops takes (default H100)")
    flag("--json", action="store_true", help="rows as JSON lines")
    args = parser.parse_args()
    parts = set(args.of)
    needs_demo = parts & {"speed", "encode", "storage", "int8"}
    if needs_demo and not os.path.exists(os.path.join(args.data, "scaler.pkl")):
        raise SystemExit(
            f"--data {args.data} holds no demo: make one with make demo, or name its folder"
        )

    # --- measure ---
    show = functools.partial(report, as_json=args.json, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="nanojepa-bench-") as scratch:
        # features of the demo, which three of the tables start from
        folders = {}
        if parts & {"speed", "storage", "int8"}:
            for store in tqdm(["bf16", "int8"], desc="encode the demo"):
                folders[store], _ = encode(args.data, scratch, "train", store, args.num_workers)

        if "speed" in parts:
            sizes = args.turns, args.log_every, args.num_workers
            show(speed_rows(args.data, scratch, folders["bf16"], *sizes))
        if "encode" in parts:
            show(encode_rows(args.data, scratch, args.turns, args.num_workers))
        if "storage" in parts:
            show(storage_rows(args.data, folders))
        if "flops" in parts:
            show(flops_rows(args.device))
        if "int8" in parts:
            val_folders = {}
            for store in folders:
                val_folders[store], _ = encode(args.data, scratch, "val", store, args.num_workers)
            sizes = args.seeds, args.steps, args.num_workers
            show(int8_rows(args.data, scratch, folders, val_folders, *sizes))
