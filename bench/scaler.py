"""What does fitting the scaler cost, against reading and parsing the same JSONL bytes and nothing
else, and against decoding clips?

    python -m bench.scaler              # makes 2 GB of shards in --tmp; 8 minutes on two cores
    python -m bench.scaler --data VPT/*.tar --samples 100000     # your own

Prints, for each number of samples, wall-clock and CPU seconds of fit_scaler.py (without and with
its start-up) and of bare reads with orjson and with json, their ratios, and the bytes that were
asked for and read from the disk. The page cache is dropped before each row. The last rows say what
counting actions in decoded clips would take, extrapolated.

Made shards: contractor lines of 2.5 KB (inventory and stats grow as in long sessions), 6000 a
recording, 134 different recordings = 100,000 steps. More samples read the same files again under
other names. Video members are 300 s of 640x360 H.264 (moving blocks, a keyframe every 60 frames).
They are real in the first shard, which the clips come from; in the others they are holes of the
same size, since nothing reads them."""

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

PER_SHARD = 12  # recordings of a made shard
LINES = 6000  # of a recording
STEPS = 749  # in a recording of 6000 lines
CLIP_ACTIONS = 7  # in a clip of 16 frames
ITEMS = "oak_planks cobblestone stone_pickaxe iron_ingot torch bread dirt wheat_seeds".split()


# --- made shards ---


def film(frames=LINES, size=(640, 360)):
    """Bytes of an mp4: a blocky texture that pans, 20 fps."""
    w, h = size
    blocks = np.random.default_rng(0).integers(0, 256, (h // 8 + 1, w // 4, 3), dtype=np.uint8)
    texture = blocks.repeat(8, 0).repeat(8, 1)[:h]
    options = {"preset": "ultrafast", "g": "60", "crf": "30"}
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20, options=options)
        stream.width = w
        stream.height = h
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            x = int((np.sin(i / 40) + 1) * w / 2)
            picture = np.ascontiguousarray(texture[:, x : x + w])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def contractor_lines(seed, lines=LINES):
    """JSONL bytes with every field of a contractor line; the camera follows the mouse at 0.15
    degrees a pixel."""
    rng = random.Random(seed)
    counters = []
    for action in ("use_item", "mine_block", "pickup", "custom"):
        counters += [f"minecraft.{action}:minecraft.{item}" for item in ITEMS]
    inventory = []
    for _ in range(20):
        inventory.append({"type": rng.choice(ITEMS), "quantity": rng.randint(1, 64)})
    inventory = json.dumps(inventory)
    scale = rng.uniform(15, 45)
    yaw = rng.uniform(-720, 720)
    pitch = 0.0
    dx = 0.0
    x = 841.364694513396
    out = []
    for i in range(lines):
        # a hand that moves in bursts; the pitch is pulled back to level
        dx = 0.7 * dx + rng.gauss(0, scale) * (rng.random() < 0.6)
        dy = rng.gauss(0, scale / 2) - pitch * 0.3

        # more counters as the session goes on
        counted = enumerate(counters[: 10 + 22 * i // lines])
        stats = ", ".join(f'"{name}": {(i + 1) * (k + 1)}' for k, name in counted)
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
        yaw = yaw + 0.15 * dx
        pitch = max(-90.0, min(90.0, pitch + 0.15 * dy))
    return "\n".join(out).encode()


def write_shard(number, folder, recordings, video):
    """A tar of recordings. A video that is given by its size alone becomes a hole."""
    path = os.path.join(folder, f"shard-{number:06d}.tar")
    last = min((number + 1) * PER_SHARD, recordings)
    with open(path, "wb") as f:
        for k in range(number * PER_SHARD, last):
            for extension, content in (("mp4", video), ("jsonl", contractor_lines(k))):
                is_hole = isinstance(content, int)
                member = tarfile.TarInfo(f"contractor-{k:05d}.{extension}")
                member.size = content if is_hole else len(content)
                f.write(member.tobuf())
                if is_hole:
                    f.seek(member.size, 1)
                else:
                    f.write(content)
                f.seek(-member.size % 512, 1)  # members fill whole blocks
        f.truncate(f.tell() + 1024)  # the end of a tar: two empty blocks
    return path


def make_shards(folder, samples, num_workers):
    """Shards for so many samples, at most 134 recordings -> (paths, recordings, bytes of a
    video)."""
    video = film()
    recordings = min(-(-samples // STEPS), 134)
    shards = -(-recordings // PER_SHARD)
    videos = [video] + [len(video)] * (shards - 1)  # real in the first shard, then holes
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        folders = [folder] * shards
        counts = [recordings] * shards
        paths = list(pool.map(write_shard, range(shards), folders, counts, videos))
    return paths, recordings, len(video)


def enough_shards(folder, made, recordings, samples):
    """The made shards, and as many links to them as it takes for so many samples."""
    paths = list(made)
    while (recordings + (len(paths) - len(made)) * PER_SHARD) * STEPS < samples:
        link = os.path.join(folder, f"again-{len(paths):06d}.tar")
        if not os.path.exists(link):
            os.symlink(made[len(paths) % (len(made) - 1)], link)  # not the last: it may be short
        paths.append(link)
    return paths


# --- measuring ---


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
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        return sum(pool.map(read_and_parse, records, [loads] * len(records)))


def evict(paths):
    """Drop the page cache of these files: the next reader reads the disk."""
    for path in paths:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read():
    """(asked for, fetched from the disk) by this process and its finished children, in bytes."""
    with open("/proc/self/io") as f:
        counts = dict(line.split(": ") for line in f.read().splitlines())
    return np.array([int(counts["rchar"]), int(counts["read_bytes"])])


def measured(work, paths):
    """(result of work(), its cost), from a cold page cache. A cost is an array: seconds, CPU
    seconds, bytes asked for, bytes from the disk."""
    evict(paths)
    before = bytes_read()
    cpu = sum(os.times()[:4])
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    return result, np.array([seconds, sum(os.times()[:4]) - cpu, *(bytes_read() - before)])


def run(command):
    """Run one of our scripts to a good end."""
    return subprocess.run(command, check=True, capture_output=True, text=True)


INNER = "fit_scaler.py, from shards to scaler"
WHOLE = "fit_scaler.py, the whole command"
FAST = "read + orjson, whole lines"
SLOW = "read + json, whole lines"


def measure_fit(samples, data, output, num_workers, repeats):
    """Costs of fitting on so many samples: ({row: cost of the fastest run}, recordings read, bytes
    of their JSONL, seconds that the imports take)."""
    from data import open_lines  # here, because the cache's folder must be named before

    command = [sys.executable, "fit_scaler.py", "--output", output, "--no_convergence_check"]
    command += ["--num_workers", str(num_workers), "--max_samples", str(samples), "--data", *data]
    _, imports = measured(functools.partial(run, [*command, "--help"]), [])

    # the recordings in the order in which fit_scaler.py takes them
    records = open_lines([data], None, 0.0)[0]
    order = np.random.default_rng(0).permutation(len(records))
    records = [records[i] for i in order]

    # the rows take turns: a busy neighbour hits all of them
    best = {}
    for _ in range(repeats):
        done, cost = measured(functools.partial(run, command), data)
        recordings = int(re.search(r"^(\d+) recordings, ", done.stdout, re.M)[1])
        records = records[:recordings]
        inner_seconds = float(re.search(r"actions in ([\d.]+) s", done.stdout)[1])
        turn = {INNER: np.array([inner_seconds, *(cost - imports)[1:]]), WHOLE: cost}
        for row, loads in ((FAST, orjson.loads), (SLOW, json.loads)):
            work = functools.partial(bare, records, loads, num_workers)
            total_bytes, turn[row] = measured(work, data)
        for row, cost in turn.items():
            if row not in best or cost[0] < best[row][0]:
                best[row] = cost
    return best, len(records), total_bytes, imports[0]


def table_rows(samples, best, total_bytes):
    """Rows of the table for one number of samples."""
    rows = []
    for name, (seconds, cpu, asked, disk) in best.items():
        row = {"samples": samples, "row": name, "seconds": seconds}
        row |= {"/ orjson": seconds / best[FAST][0], "/ json": seconds / best[SLOW][0]}
        row |= {"CPU s": cpu, "CPU / orjson": cpu / best[FAST][1]}
        row |= {"MB asked": asked / 1e6, "asked / JSONL": asked / total_bytes}
        row |= {"MB disk": disk / 1e6, "disk / JSONL": disk / total_bytes}
        rows.append(row)
    return rows


def seconds_a_clip(shard, count, num_workers):
    """Wall-clock seconds a clip of counting actions in clips that are decoded, by the loader."""
    from data import vpt_loader
    from kernels import merge_moments, moments

    batches = iter(vpt_loader([[shard]], 10, num_workers=num_workers))

    # workers start, the queue fills, and the actions of the shard are parsed and cached
    for _ in range(3 * num_workers):
        next(batches)

    total = None
    clips = 0
    began = time.perf_counter()
    while clips < count:
        part = moments(next(batches)["actions"][..., :4].flatten(0, 1))
        total = part if total is None else merge_moments(total, part)
        clips += 10
    seconds = (time.perf_counter() - began) / clips
    del batches  # its workers end
    return seconds


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--data", nargs="+", help="shards to use instead of made ones")
    samples_help = "how many samples to fit on (default 100000 1000000)"
    flag("--samples", type=int, nargs="+", default=[100_000, 1_000_000], help=samples_help)
    flag("--num_workers", type=int, default=os.cpu_count(), help="processes of every row")
    repeats_help = "runs of each row up to 200,000 samples, the fastest counts (default 3)"
    flag("--repeats", type=int, default=3, help=repeats_help)
    flag("--clips", type=int, default=300, help="clips decoded to compare with (default 300)")
    flag("--tmp", default=tempfile.gettempdir(), help="folder for the made shards (2.1 GB)")
    flag("--json", action="store_true", help="print rows as JSON lines, the rest on stderr")
    args = parser.parse_args()
    say = functools.partial(print, file=sys.stderr if args.json else sys.stdout)

    rows = []
    commands = {}  # samples: seconds of the whole command
    with tempfile.TemporaryDirectory(dir=args.tmp, prefix="bench-scaler-") as folder:
        # no parsed actions from earlier runs; named before data is imported
        os.environ["NANOJEPA_CACHE"] = os.path.join(folder, "cache")

        # --- shards ---
        if not args.data:
            began = time.time()
            made, recordings, video = make_shards(folder, max(args.samples), args.num_workers)
            used = sum(os.stat(p).st_blocks for p in made) * 512 / 1e9
            say(
                f"made {recordings} recordings, videos of {video / 1e6:.0f} MB in"
                f" {time.time() - began:.0f} s, {used:.2f} GB on disk"
            )

        # --- fit ---
        for samples in args.samples:
            data = args.data or enough_shards(folder, made, recordings, samples)
            repeats = args.repeats if samples <= 200_000 else 1
            output = os.path.join(folder, "scaler.pkl")
            best, count, total_bytes, imports = measure_fit(
                samples, data, output, args.num_workers, repeats
            )
            say(
                f"{samples:,} samples: {count} recordings, {total_bytes / 1e6:,.0f} MB of JSONL,"
                f" {args.num_workers} processes, best of {repeats}, page cache dropped before each;"
                f" {imports:.1f} s of the command are imports"
            )
            rows += table_rows(samples, best, total_bytes)
            commands[samples] = best[WHOLE][0]

        # --- the same numbers through decoded clips ---
        seconds = seconds_a_clip((args.data or made)[0], args.clips, args.num_workers)
        say(
            f"through decoded clips: {seconds:.3f} s a clip of 16 frames at 256 px,"
            f" {args.num_workers} workers"
        )
        for samples, command_seconds in commands.items():
            clips = samples / CLIP_ACTIONS
            decoding = seconds * clips
            say(
                f"{samples:,} samples = {clips:,.0f} clips: {decoding:,.0f} s (extrapolated),"
                f" {decoding / command_seconds:.0f} x the command"
            )
            row = dict.fromkeys(rows[0], "") | {"samples": samples, "seconds": decoding}
            rows.append(row | {"row": "through decoded clips, extrapolated"})
        bench.report(rows, args.json, torch.device("cpu"))
