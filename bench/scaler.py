"""What fitting the scaler costs against reading and parsing the same JSONL bytes and nothing else,
and against decoding clips.

    python -m bench.scaler                                       # makes 2 GB of shards in --tmp and deletes them; 8 minutes on two cores
    python -m bench.scaler --data VPT/*.tar --samples 100000     # your own

Made shards: contractor lines of 2.5 KB (inventory and stats grow as in long sessions), 6000 a
recording, 134 different recordings = 100,000 steps; more samples read the same files again under
other names. Video members are 300 s of 640x360 H.264 (moving blocks, a keyframe every 60 frames):
real in the first shard, which the clips come from, and holes of the same size in the others, since
nothing reads them."""

import argparse
import concurrent.futures
import functools
import io
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time

import av
import numpy as np
import orjson
import torch

import bench

PER_SHARD, LINES = 12, 6000
STEPS, CLIP_ACTIONS = 749, 7  # in a recording of 6000 lines; in a clip of 16 frames


def film(frames=LINES, size=(640, 360)):
    """Bytes of an mp4: a blocky texture that pans, 20 fps."""
    w, h = size
    blocks = (
        np.random.default_rng(0)
        .integers(0, 256, (h // 8 + 1, w // 4, 3), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)[:h]
    )
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=20, options={"preset": "ultrafast", "g": "60", "crf": "30"}
        )
        stream.width = w
        stream.height = h
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            x = int((np.sin(i / 40) + 1) * w / 2)
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(blocks[:, x : x + w]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def contractor_lines(seed, lines=LINES):
    """JSONL bytes with every field of a contractor line; the camera follows the mouse at 0.15
    degrees a pixel."""
    rng = random.Random(seed)
    items = [
        "oak_planks",
        "cobblestone",
        "stone_pickaxe",
        "iron_ingot",
        "torch",
        "bread",
        "dirt",
        "wheat_seeds",
    ]
    counters = [
        f"minecraft.{a}:minecraft.{b}"
        for a in ("use_item", "mine_block", "pickup", "custom")
        for b in items
    ]
    inventory = json.dumps(
        [{"type": rng.choice(items), "quantity": rng.randint(1, 64)} for _ in range(20)]
    )
    scale = rng.uniform(15, 45)
    yaw = rng.uniform(-720, 720)
    pitch = 0.0
    dx = 0.0
    x = 841.364694513396
    out = []
    for i in range(lines):
        dx = 0.7 * dx + rng.gauss(0, scale) * (rng.random() < 0.6)
        dy = rng.gauss(0, scale / 2) - pitch * 0.3
        stats = ", ".join(
            f'"{name}": {(i + 1) * (k + 1)}'
            for k, name in enumerate(counters[: 10 + 22 * i // lines])
        )
        keys = ", ".join(f'"key.keyboard.{k}"' for k in "wasd" if rng.random() < 0.3)
        out.append(
            f'{{"mouse": {{"x": 640.0, "y": 360.0, "dx": {dx!r}, "dy": {dy!r}, "scaledX": 0.0,'
            ' "scaledY": 0.0, "dwheel": 0.0, "buttons": [0], "newButtons": []}, "keyboard":'
            f' {{"keys": [{keys}], "newKeys": [], "chars": ""}}, "isGuiOpen": false,'
            f' "isGuiInventory": false, "hotbar": {i // 500 % 9}, "yaw": {yaw!r}, "pitch":'
            f' {pitch!r}, "xpos": {x + i / 7!r}, "ypos": 63.0, "zpos": 24.956354839537802, "tick":'
            f' {i}, "milli": {1649575088006 + 50 * i}, "inventory": {inventory}, "serverTick":'
            f' {6001 + i}, "serverTickDurationMs": 36.3466, "stats": {{{stats}}}}}'
        )
        yaw, pitch = yaw + 0.15 * dx, max(-90.0, min(90.0, pitch + 0.15 * dy))
    return "\n".join(out).encode()


def write_shard(number, folder, recordings, video):
    """A tar of recordings; a video given by its size alone is a hole."""
    path = os.path.join(folder, f"shard-{number:06d}.tar")
    with open(path, "wb") as f:
        for k in range(number * PER_SHARD, min((number + 1) * PER_SHARD, recordings)):
            for extension, content in (("mp4", video), ("jsonl", contractor_lines(k))):
                member = tarfile.TarInfo(f"contractor-{k:05d}.{extension}")
                member.size = content if isinstance(content, int) else len(content)
                f.write(member.tobuf())
                if isinstance(content, int):
                    f.seek(member.size, 1)
                else:
                    f.write(content)
                f.seek(-member.size % 512, 1)
        f.truncate(f.tell() + 1024)
    return path


def read_and_parse(record, loads):
    """Read the JSONL member of a recording and parse each of its lines whole; its size."""
    offset, size = record.members["jsonl"]
    with open(record.shard, "rb", buffering=0) as f:
        lines = os.pread(f.fileno(), size, offset).splitlines()
    for line in lines:
        loads(line)
    return size


def bare(records, loads, num_workers):
    """Total bytes of JSONL, read and parsed in num_workers processes and thrown away."""
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork")
    ) as pool:
        return sum(pool.map(read_and_parse, records, [loads] * len(records)))


def evict(paths):
    """Drop the page cache of these files, so that the next reader reads the disk."""
    for path in paths:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read():
    """(asked for, fetched from the disk) by this process and its finished children, in bytes."""
    counts = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return np.array([int(counts["rchar"]), int(counts["read_bytes"])])


def measured(work, paths):
    """Result, and (seconds, CPU seconds, bytes asked for, bytes from the disk) of work(), which
    starts with a cold page cache."""
    evict(paths)
    before = bytes_read()
    cpu = sum(os.times()[:4])
    began = time.perf_counter()
    result = work()
    return result, np.array(
        [time.perf_counter() - began, sum(os.times()[:4]) - cpu, *(bytes_read() - before)]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", nargs="+", help="shards to use instead of made ones")
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[100_000, 1_000_000],
        help="how many samples to fit on",
    )
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="processes, the same for every row"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="runs of each row up to 200,000 samples; the fastest counts",
    )
    parser.add_argument("--clips", type=int, default=300, help="clips to decode for the comparison")
    parser.add_argument(
        "--tmp", default=tempfile.gettempdir(), help="folder for the made shards (2.1 GB)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print rows as JSON lines, and the rest on stderr"
    )
    args = parser.parse_args()
    rows, say = [], functools.partial(print, file=sys.stderr if args.json else sys.stdout)
    with tempfile.TemporaryDirectory(dir=args.tmp, prefix="bench-scaler-") as folder:
        os.environ["NANOJEPA_CACHE"] = os.path.join(
            folder, "cache"
        )  # before data is imported: no parsed actions from earlier runs
        from data import open_lines, vpt_loader
        from kernels import merge_moments, moments

        if not args.data:
            began = time.time()
            video = film()
            unique = min(-(-max(args.samples) // STEPS), 134)
            shards = -(-unique // PER_SHARD)
            with concurrent.futures.ProcessPoolExecutor(
                args.num_workers, multiprocessing.get_context("fork")
            ) as pool:
                videos = [video] + [len(video)] * (shards - 1)
                made = list(
                    pool.map(
                        write_shard, range(shards), [folder] * shards, [unique] * shards, videos
                    )
                )
            used = sum(os.stat(p).st_blocks for p in made) * 512 / 1e9
            say(
                f"made {unique} recordings, videos of {len(video) / 1e6:.0f} MB in"
                f" {time.time() - began:.0f} s, {used:.2f} GB on disk"
            )
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        output = os.path.join(folder, "scaler.pkl")
        workers = str(args.num_workers)
        commands = {}
        for samples in args.samples:
            data, repeats = list(args.data or made), args.repeats if samples <= 200_000 else 1
            while (
                not args.data and (unique + (len(data) - len(made)) * PER_SHARD) * STEPS < samples
            ):
                data.append(os.path.join(folder, f"again-{len(data):06d}.tar"))
                if not os.path.exists(data[-1]):
                    os.symlink(
                        made[len(data) % (len(made) - 1)], data[-1]
                    )  # not the last: it may be short
            command = [
                sys.executable,
                "fit_scaler.py",
                "--output",
                output,
                "--num_workers",
                workers,
                "--no_convergence_check",
            ]
            command += ["--max_samples", str(samples), "--data", *data]
            _, imports = measured(functools.partial(run, [*command, "--help"]), [])
            jobs = open_lines([data], None, 0.0)[0]
            jobs = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))]
            best = {}
            for _ in range(
                repeats
            ):  # the rows take turns, so that a busy neighbour hits all of them
                done, cost = measured(functools.partial(run, command), data)
                jobs = jobs[: int(re.search(r"^(\d+) recordings, ", done.stdout, re.M)[1])]
                inner = float(re.search(r"actions in ([\d.]+) s", done.stdout)[1])
                turn = {
                    "fit_scaler.py, from shards to scaler": np.array([inner, *(cost - imports)[1:]])
                }
                turn["fit_scaler.py, the whole command"] = cost
                for name, loads in (
                    ("read + orjson, whole lines", orjson.loads),
                    ("read + json, whole lines", json.loads),
                ):
                    total, turn[name] = measured(
                        functools.partial(bare, jobs, loads, args.num_workers), data
                    )
                best = {
                    k: min(v, best.get(k, v), key=lambda cost: cost[0]) for k, v in turn.items()
                }
            commands[samples] = best["fit_scaler.py, the whole command"][0]
            say(
                f"{samples:,} samples: {len(jobs)} recordings, {total / 1e6:,.0f} MB of JSONL,"
                f" {args.num_workers} processes, best of {repeats}, page cache dropped before each;"
                f" {imports[0]:.1f} s of the command are imports"
            )
            fast, slow = best["read + orjson, whole lines"], best["read + json, whole lines"]
            rows += [
                {
                    "samples": samples,
                    "row": name,
                    "seconds": s,
                    "/ orjson": s / fast[0],
                    "/ json": s / slow[0],
                    "CPU s": cpu,
                    "CPU / orjson": cpu / fast[1],
                    "MB asked": asked / 1e6,
                    "asked / JSONL": asked / total,
                    "MB disk": disk / 1e6,
                    "disk / JSONL": disk / total,
                }
                for name, (s, cpu, asked, disk) in best.items()
            ]
        first_shard = (args.data or made)[:1]
        batches = iter(vpt_loader([first_shard], 10, num_workers=args.num_workers))
        part = None
        clips = 0

        # workers start, the queue fills, and the actions of the shard are parsed and cached
        for _ in range(3 * args.num_workers):
            next(batches)
        began = time.perf_counter()
        while clips < args.clips:
            actions = next(batches)["actions"][..., :4].flatten(0, 1)
            part = moments(actions) if part is None else merge_moments(part, moments(actions))
            clips += 10
        each = (time.perf_counter() - began) / clips
        say(
            f"through decoded clips: {clips} clips of 16 frames at 256 px in {each * clips:.1f} s,"
            f" {args.num_workers} workers"
        )
        for samples, seconds in commands.items():
            clips, decoding = samples / CLIP_ACTIONS, each * samples / CLIP_ACTIONS
            say(
                f"{samples:,} samples = {clips:,.0f} clips: {decoding:,.0f} s (extrapolated),"
                f" {decoding / seconds:.0f} x the command"
            )
            rows.append(
                dict.fromkeys(rows[0], "")
                | {
                    "samples": samples,
                    "row": "through decoded clips, extrapolated",
                    "seconds": decoding,
                }
            )
        bench.report(rows, args.json, torch.device("cpu"))
        del batches
