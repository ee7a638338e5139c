"""What grows when a program's memory grows: runs a script with its flags, and every few seconds
writes what is resident, what malloc has given out and what it keeps, and Python's objects.

    python -m tests.heap heap.csv train_ac.py --data demo/train/*.tar --num_workers 0 ...

The last two rows are taken after a garbage collection and after malloc_trim(0). What the trim gives
back was free memory in the C heap, which glibc keeps between blocks in use: no leak. Linux only."""

import ctypes
import gc
import os
import runpy
import sys
import threading
import time

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
COLUMNS = ["seconds", "resident_mb", "given_out_mb", "kept_mb", "python_blocks"]
MB = 1e6


class Mallinfo2(ctypes.Structure):
    """What glibc's malloc says about itself (man mallinfo2)."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def open_libc():
    """The C library, whose mallinfo2 can be called; None where it has none (glibc before 2.33, and
    others)."""
    libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = Mallinfo2
    return libc


def given_out(libc):
    """Bytes that malloc has given out and not got back."""
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd


def sample(libc, began):
    """A row: COLUMNS."""
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    kept = libc.mallinfo2().fordblks
    seconds = time.monotonic() - began
    blocks = sys.getallocatedblocks()
    return [seconds, resident / MB, given_out(libc) / MB, kept / MB, blocks]


def profile(path, script, every=4):
    """Run a script, whose flags are in sys.argv, and write the samples to a CSV file."""
    libc = open_libc()
    if libc is None:
        raise SystemExit("tests.heap needs the mallinfo2 of glibc 2.33 or newer")
    began = time.monotonic()
    ended = threading.Event()
    with open(path, "w", buffering=1) as f:
        print(*COLUMNS, sep=",", file=f)

        def write():
            print(*(round(x, 1) for x in sample(libc, began)), sep=",", file=f)

        def watch():
            while not ended.wait(every):
                write()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            ended.set()
            watcher.join()
            gc.collect()
            write()
            libc.malloc_trim(0)
            write()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    csv_path = sys.argv[1]
    sys.argv = sys.argv[2:]
    profile(csv_path, sys.argv[0])
