"""What benchmarks share whose rows are whole trainings: each a process of its own, with a log."""

import json
import os
import resource
import subprocess
import sys
import time

from files.disk import write_atomically


def run(log, *words):
    """One of our scripts as a process of its own, its output added to the file `log`; (seconds, CPU
    seconds). Ends the program with the last lines if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    words = list(map(str, words))
    with open(log, "a") as f:
        done = subprocess.run([sys.executable, *words], stdout=f, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        with open(log) as f:
            last_lines = "".join(f.readlines()[-20:])
        raise SystemExit(f"{' '.join(words)} failed, see {log}:\n{last_lines}")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu_seconds


def check_flags(run_folder, words):
    """Remember what a row is made with, beside its folder. Ends the program if it was made with
    other flags: its numbers would mean something else."""
    path = run_folder + ".flags.json"
    words = json.dumps(list(map(str, words)))
    if not os.path.exists(path):
        write_atomically(path, words.encode())
    with open(path) as f:
        before = f.read()
    if before != words:
        raise SystemExit(
            f"{run_folder} was made with {before}, now it is {words}: give another --out"
        )
