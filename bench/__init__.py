"""What the kernel and step benchmarks share: interleaved medians, the machine's ceilings, and rows for people or as JSON lines."""

import json
import platform
import statistics
import time

import torch


def medians(calls, device, repeats=10, warmup=2):
    """Median seconds of each of {name: function}, called in turn, round after round, so that a slow minute hits all of them alike."""
    times = {name: [] for name in calls}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for i in range(warmup + repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                flush.zero_()  # what the last call left in the L2 cache
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                call()
                seconds = time.perf_counter() - began
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings(device, dtype):
    """FLOP/s of a large square matmul and bytes/s (read + write) of a large copy, measured now: what a share of the hardware means."""
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = medians({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device)
    return 2 * n**3 / found["matmul"], 2 * size / found["copy"]


def machine(device):
    """Device and versions, for every row."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


def report(rows, as_json, device):
    """Rows (dicts with the same keys) as one JSON object a line, or as an aligned table headed by the machine and what all rows share."""
    if as_json:
        for row in rows:
            print(json.dumps(machine(device) | row))
        return
    same = {k: v for k, v in rows[0].items() if all(row[k] == v for row in rows) and len(rows) > 1}
    print(", ".join(f"{k} {v}" for k, v in (machine(device) | same).items()))
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k not in same] for row in rows]
    heads = [k for k in rows[0] if k not in same]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    for line in [heads, *cells]:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths)))
