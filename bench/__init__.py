"""What the benchmarks share: interleaved medians, the machine's ceilings, and rows as a table or as
JSON lines."""

import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time

import torch

from kernels import linear


def medians(calls, device, repeats=10, warmup=2, clock=time.perf_counter):
    """Median seconds of each of {name: function}, called in turn, round after round: a slow minute
    then hits all of them alike. clock: tells the time on a CPU; time.process_time counts the CPU
    seconds of this process alone, all its threads together."""
    times = {name: [] for name in calls}
    events = []
    if device.type == "cuda":
        # writing this empties the L2 cache of what the last call left there
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    for _ in range(warmup + repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                # the host runs ahead: events leave out what it takes to launch a short kernel
                flush.zero_()
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                events.append((name, begin, end))
            else:
                began = clock()
                call()
                times[name].append(clock() - began)

    if events:
        torch.cuda.synchronize()
    for name, begin, end in events:
        times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(t[warmup:]) for name, t in times.items()}


def peak_memory(call, device):
    """{"MiB": what a call needs beyond what is allocated before it}. {} on a CPU, where
    bench.scaling asks processes."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return {"MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def ceilings(device, dtype, sizes=None):
    """(FLOP/s of a large square matmul, bytes/s of a large copy, read and write), measured now.
    Shares of the hardware are shares of these. sizes: (side of the matrices, bytes copied), if the
    usual ones take too long."""
    usual = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    n, size = sizes or usual
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def matmul():
        linear(a, b, None)

    def copy():
        target.copy_(source)

    seconds = medians({"matmul": matmul, "copy": copy}, device)
    return 2 * n**3 / seconds["matmul"], 2 * size / seconds["copy"]


def machine(device):
    """Device and versions: every row names them."""
    triton = "none"
    if importlib.util.find_spec("triton"):
        triton = importlib.metadata.version("triton")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def report(rows, as_json, device):
    """Print rows (dicts with the same keys) as one JSON object a line, or as an aligned table. The
    table's first line names the machine and what all rows share."""
    if as_json:
        for row in rows:
            print(json.dumps(machine(device) | row))
        return

    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    # columns that are the same in every row go into the first line
    same = {}
    if len(rows) > 1:
        same = {k: v for k, v in rows[0].items() if all(row[k] == v for row in rows)}
    print(", ".join(f"{k} {shown(v)}" for k, v in (machine(device) | same).items()))

    cells = [[shown(v) for k, v in row.items() if k not in same] for row in rows]
    heads = [k for k in rows[0] if k not in same]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    for line in [heads, *cells]:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths)))
