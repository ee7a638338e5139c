"""A GPU for ten minutes: what does everything here do on it?

    python -m bench.gpu --out gpu                    # at most 8 minutes on an H100 or H200
    python -m bench.gpu --out gpu                    # the same again continues
    python -m bench.gpu --out gpu --only step --again --minutes 20

Measures, one section after the other: facts about the device and its ceilings; every Triton kernel
against float64 (checks); attention against PyTorch's and FlexAttention; training steps of the
predictor, with and without the compiler, their MFU and memory; encoders; LoRA; latent actions;
planning; the loader alone.

Each section has a process of its own, and a share of --minutes after which it is ended. Its rows
are in OUT/SECTION.json as soon as they are measured, what it printed is in OUT/SECTION.log. An
error, or the end of its time, is written beside the rows, and the next section begins. A section
that finished on the same machine is not measured again. At the end OUT/table.md has all of them.

Without a GPU everything runs in tiny sizes, the Triton kernels in their interpreter. That shows
that the command works, and no speed. No GPU has been measured yet."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

from files.disk import make_folder, write_atomically

# share of --minutes that each section may take; compiling takes most of it
SHARES = {
    "facts": 0.04,
    "checks": 0.15,
    "attention": 0.2,
    "step": 0.32,
    "encoder": 0.09,
    "lora": 0.05,
    "lam": 0.05,
    "planning": 0.04,
    "loader": 0.06,
}


# what the file of a section has, whatever became of it
PARTS = {"section", "machine", "is_finished", "error", "rows"}


def read_section(path):
    """What was written of a section; None if it was not measured, or if the file is damaged."""
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            section = json.load(f)
    except ValueError:
        section = None
    if not isinstance(section, dict) or not PARTS <= set(section):
        print(f"{path} is damaged and not used")
        return None
    return section


def write_section(path, section):
    write_atomically(path, json.dumps(section, indent=1).encode())


def end_with_parent():
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def run_section(section, path, log, device_name):
    """In a process of its own: measure a section into `path`; what is printed goes into `log`."""
    import torch

    from bench.gpu_sections import measure

    # the processes that it starts end with it, and it with the program, even if that is killed
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(log, "wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)

    def keep(rows):
        write_section(path, section | {"rows": rows})

    began = time.perf_counter()
    rows = measure(section["section"], torch.device(device_name), keep)
    section |= {"is_finished": True, "seconds": time.perf_counter() - began, "error": ""}
    keep(rows)


def error_of(process, limit, log):
    """What ended a section early, or "". process: after `limit` seconds at most."""
    if process.is_alive():
        return f"ended after {limit:.0f} s, its share of --minutes"
    if process.exitcode == 0:
        return ""
    lines = []
    if os.path.exists(log):
        with open(log, errors="replace") as f:
            lines = f.read().split("\n")
    last = [line for line in lines if line.strip()][-1:]
    return last[0] if last else f"ended with exit code {process.exitcode}"


def kill_group(process):
    """End a section and the processes that it started: loaders, compilers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # it has ended and left nobody, or has not come to os.setsid yet
        process.kill()
    process.join()


def stop(signum, frame):
    # as an exception, so that the section under way is ended
    print("stopped: the same command continues", flush=True)
    sys.exit(128 + signum)


def cell(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/")


def as_table(rows):
    """Rows as a Markdown table; rows of other columns than those before begin a new one."""
    lines = []
    columns = None
    for row in rows:
        if columns is None or not set(row) <= set(columns):
            columns = list(row)
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines.append("| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |")
    return lines


def markdown(sections):
    """All sections as a page."""
    lines = ["# What bench.gpu measured"]
    for section in sections:
        lines += ["", f"## {section['section']}", ""]
        if section["is_finished"]:
            lines.append(f"{section['seconds']:.0f} s on {section['machine']['device']}.")
        else:
            lines.append(f"NOT finished: {section['error']}")

        # errors take a table of their own, or every table would have their column
        measured = [row for row in section["rows"] if "error" not in row or "bound" in row]
        lines += as_table(measured)
        lines += as_table([row for row in section["rows"] if row not in measured])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--out", required=True, help="folder of the results")
    minutes_help = "of all sections together, at most (default 8)"
    flag("--minutes", type=float, default=8.0, help=minutes_help)
    flag("--only", nargs="+", choices=SHARES, help="these sections (default: all)")
    again_help = "measure sections again that are finished"
    flag("--again", action="store_true", help=again_help)
    args = parser.parse_args()
    if not 0 < args.minutes < 1e6:
        parser.error(f"--minutes {args.minutes:g} is no time: give a number above 0, below 1e6")

    # --- device ---
    # compilers and indices keep what they made in OUT, so that a second call takes less time
    import checkpoint

    sys.excepthook = checkpoint.short_excepthook
    make_folder("--out", args.out)
    scratch = os.path.abspath(os.path.join(args.out, "cache"))
    os.environ["NANOJEPA_CACHE"] = os.path.join(scratch, "play")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(scratch, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(scratch, "triton")

    import torch

    import bench

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # read by Triton when a kernel is imported
        os.environ["TRITON_INTERPRET"] = "1"
        print("no GPU: tiny sizes, which say nothing about speed")
    machine = bench.machine(device)

    # sections start from a process that has imported everything and has not touched the GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.gpu_sections"])

    # --- measure ---
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    names = args.only or list(SHARES)
    began = time.monotonic()
    for name in names:
        path = os.path.join(args.out, f"{name}.json")
        log = os.path.join(args.out, f"{name}.log")
        section = read_section(path)
        is_done = section and section["is_finished"] and section["machine"] == machine
        if is_done and not args.again:
            print(f"{name}: measured before")
            continue

        # the section, for its share of the time
        limit = 60 * args.minutes * SHARES[name] / sum(SHARES[other] for other in names)
        print(f"{name}: {limit:.0f} s at most ...", flush=True)
        section = {"section": name, "machine": machine, "is_finished": False}
        section["error"] = "it was interrupted"
        write_section(path, section | {"rows": []})
        process = context.Process(target=run_section, args=(section, path, log, str(device)))
        process.start()
        try:
            process.join(limit)
            error = error_of(process, limit, log)
        finally:
            kill_group(process)

        # an error stands beside the rows that were measured before it
        if error:
            section = read_section(path) or section | {"rows": []}
            write_section(path, section | {"error": error})
        print(f"{name}: {error or 'done'}, {time.monotonic() - began:.0f} s so far", flush=True)

    # --- the table ---
    sections = [read_section(os.path.join(args.out, f"{name}.json")) for name in SHARES]
    sections = [section for section in sections if section]
    page = os.path.join(args.out, "table.md")
    write_atomically(page, markdown(sections).encode())
    print(markdown(sections))
    shutil.rmtree(os.path.join(scratch, "play"), ignore_errors=True)

    # what is wrong, and what to do next
    wrong = [row for s in sections for row in s["rows"] if row.get("ok") is False]
    for row in wrong:
        print(f"WRONG: {row['check']} {row['dtype']} {row['case']}: {row['error']:.1e}")
    missing = [name for name in SHARES if name not in {s["section"] for s in sections}]
    missing += [section["section"] for section in sections if not section["is_finished"]]
    if missing:
        print(f"not finished: {', '.join(missing)}; the same command continues with them")
    print(f"the table is {page}")
    sys.exit(1 if wrong else 0)
