"""A run's files, copied to a bucket (any fsspec URL: gs://, s3://, file://, memory://) in the
background, and back again to resume."""

import contextlib
import functools
import json
import os
import shutil
import threading
import time

import fsspec

from files.disk import write_atomically
from files.logs import CHECKPOINT, list_checkpoints

ID = "run_id"  # a file that tells runs apart, here and at the URL
SENT = "sync.json"  # a file of this folder alone: what is at which URL
NAMES = [
    ID,
    "args.json",
    "train.csv",
    "val.csv",
    "curves.png",
    "bad_clips.jsonl",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]
LOCAL = fsspec.filesystem("file")


def when(name):
    """(epoch, itr) of a checkpoint's name; () of any other, which is less."""
    match = CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


def listing(fs, root):
    """{name: [size, time]} of a run's files: the id, then logs, then checkpoints from old to new. A
    copy that is cut off has no checkpoint without its logs."""
    fs.invalidate_cache()
    stamps = {}
    for part in ("", "adapter/"):
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(f"{root}/{part}".rstrip("/"), detail=True):
                name = part + info["name"].rpartition("/")[2]
                if name in NAMES or when(name):
                    stamps[name] = [info["size"], info.get("mtime")]

    def place_in_order(name):
        return (when(name), name != ID, name)

    return {name: stamps[name] for name in sorted(stamps, key=place_in_order)}


def read(folder, name):
    """Bytes of a file of a local folder; b"" if there is none."""
    path = os.path.join(folder, name)
    return LOCAL.cat_file(path) if LOCAL.exists(path) else b""


def as_sentence(error):
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def noting(errors, name):
    """Record an exception in `errors` (finish() reports it) and continue."""
    try:
        yield
    except Exception as e:  # storage libraries raise what they like
        errors[name] = e


class Mirror:
    """Copies what is new of the run in `folder` to `url` every few `minutes` and at the end, in a
    thread. It overwrites and deletes nothing there but this run's files.

    What fails is printed and tried again after `retry` seconds, then 2 * retry, and so on; nothing
    of it stops training. A copy that does not move for `patience` seconds (and one more for each
    MB) is given up: at the end at once, in training `minutes` later."""

    print0 = print
    retry = 60.0
    patience = 60.0

    def __init__(self, folder, url, minutes):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise ValueError(
                f"--sync_to {url}: {e} (gs:// needs pip install gcsfs, s3:// pip install s3fs, a"
                " folder nothing)"
            ) from e
        self.fs.auto_mkdir = True  # of local folders; buckets have none
        self.folder = folder
        self.url = url
        self.minutes = minutes
        self.place = self.fs.unstrip_protocol(self.root)

        # what is known of another place is not about this one
        self.sent = json.loads(read(folder, SENT) or "{}").get(self.place)

        # the round under way: its thread, what failed, the file it copies and when that last moved
        self.worker = None
        self.errors = {}
        self.fails = 0
        self.due = time.monotonic() + 60 * minutes

    @classmethod
    def open(cls, folder, url, minutes, resume):
        """A Mirror, after fetching what is ahead of the folder. ValueError: the URL has another
        run, or is ahead without `resume`."""
        self = cls(folder, url, minutes)
        with noting(self.errors, "all"):
            self.meet(resume)
        error = self.errors.get("all")
        if isinstance(error, ValueError):
            raise error
        if error:
            raise OSError(f"--sync_to {url} cannot be read ({as_sentence(error)}): fix that first")
        return self

    def meet(self, resume):
        """Compare the folder with what is at the URL, and fetch from there what is ahead."""
        there = listing(self.fs, self.root)
        newest_here = max(list_checkpoints(self.folder).values(), default=())
        newest_there = max(map(when, there), default=())
        foreign = bool(there) and not self.own(there)
        is_a_run = bool(newest_there) or ID in there
        ahead = foreign or newest_there > newest_here

        if foreign and (newest_here or not is_a_run):
            raise ValueError(
                f"{self.url} holds another run than {self.folder}: pass another --sync_to, or"
                " continue it in a new --out_dir"
            )
        if ahead and not resume:
            raise ValueError(
                f"{self.url} holds an earlier run: pass --resume to continue it, or another"
                " --sync_to"
            )
        if ID not in there and not (newest_here and read(self.folder, ID)):
            run_id = os.urandom(8).hex().encode()
            write_atomically(os.path.join(self.folder, ID), run_id)

        # from now on that run is this one, even if fetching it is cut off
        self.note({} if foreign else self.sent or {})
        if ahead:
            self.fetch(there)
            which = f", which is ahead of {self.folder}" if newest_here else ""
            self.print0(f"fetched {len(there)} files from {self.url}{which}")

    def fetch(self, there):
        """Files whole or not at all, the newest checkpoint last: until then the next start comes
        here again."""
        for name in there:
            with self.fs.open(f"{self.root}/{name}", "rb") as source:
                path = os.path.join(self.folder, name)
                copy = functools.partial(shutil.copyfileobj, source, length=1 << 24)
                write_atomically(path, copy)
        here = listing(LOCAL, self.folder)
        self.note(self.sent | {name: here[name] for name in here if name in there})

    def own(self, there):
        """Whether what is at the URL is this run. One without an id is if it was fetched into this
        folder."""
        if ID in there:
            return self.fs.cat_file(f"{self.root}/{ID}") == read(self.folder, ID)
        return self.sent is not None

    def note(self, sent):
        """Remember what is at the URL, here and on disk."""
        self.sent = sent
        text = json.dumps({self.place: sent}).encode()
        write_atomically(os.path.join(self.folder, SENT), text)

    def start(self, name, size=0):
        """A file is on its way from now on."""
        self.busy = name
        self.size = size
        self.moved = time.monotonic()

    def progressed(self):
        self.moved = time.monotonic()

    def round(self, errors):
        """In a thread: copy what is new and, once all is there, remove what rotation has removed
        here. Ends early if it was given up."""
        me = threading.current_thread()
        callback = fsspec.callbacks.Callback(
            hooks={"moved": lambda *size, **more: self.progressed()}
        )
        with noting(errors, "all"):
            here = listing(LOCAL, self.folder)
            there = listing(self.fs, self.root)
            newest = max(map(when, here), default=())
            foreign = bool(there) and not self.own(there)
            ahead = any(newest < when(name) and name not in self.sent for name in there)
            if foreign or ahead:
                raise ValueError("another process has begun a run there, or continued this one")

            # copy what differs from what was sent, or from what is there
            for name, stamp in here.items():
                size_there = there.get(name, [None])[0]
                if self.sent.get(name) == stamp and size_there == stamp[0]:
                    continue
                if self.worker is not me:
                    return
                path = os.path.join(self.folder, name)
                self.start(name, stamp[0])
                with noting(errors, name):
                    self.fs.put_file(path, f"{self.root}/{name}", callback=callback)
                    self.note(self.sent | {name: stamp})
                if isinstance(errors.get(name), FileNotFoundError) and not os.path.exists(path):
                    del errors[name]  # rotated away meanwhile

            # remove old checkpoints there once everything of ours is there
            for name in list(self.sent):
                gone_here = name not in here and () < when(name) < newest
                all_there = all(self.sent.get(n) == stamp for n, stamp in here.items())
                if gone_here and all_there and not errors and self.worker is me:
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.rm_file(f"{self.root}/{name}")
                    self.note({n: stamp for n, stamp in self.sent.items() if n != name})

    def finish(self, extra=0.0):
        """Whether no round is under way (any more). Prints what the last one failed to do, and
        gives it up if it has not moved for too long."""
        self.hung = bool(self.worker and self.worker.is_alive())
        errors = dict(self.errors)
        if self.hung:
            # s3fs has up to 500 MB under way before it reports any
            still = time.monotonic() - self.moved - min(self.size, 5e8) / 1e6
            if still < self.patience + extra:
                return False
            errors[self.busy] = TimeoutError(f"no progress for {still:.0f} s")
        if self.worker:
            self.worker = None
            self.fails = self.fails + 1 if errors else 0
            if errors:
                wait = self.retry * self.fails
                self.due = min(self.due, time.monotonic() + wait)
                reasons = "; ".join({as_sentence(e) for e in errors.values()})
                self.print0(
                    f"WARNING: not copied to {self.url}: {', '.join(errors)} ({reasons}); again in"
                    f" {wait:.0f} s"
                )
        return True

    def tick(self, now=False):
        """To be called often: reports what is done and starts what is due."""
        if self.finish(60 * self.minutes) and (now or time.monotonic() >= self.due):
            self.errors = {}
            self.start("all")
            self.due = time.monotonic() + 60 * self.minutes

            # a daemon: one that hangs must not hold up the exit
            self.worker = threading.Thread(target=self.round, args=(self.errors,), daemon=True)
            self.worker.start()

    def close(self):
        """Send the rest, in up to three rounds."""
        for attempt in range(4):
            while not self.finish():
                self.worker.join(0.1)
            in_vain = self.hung or not self.fails
            if attempt == 3 or (attempt and in_vain):
                break
            time.sleep(min(self.retry, 5.0) if self.fails else 0)
            self.tick(now=True)
        here = listing(LOCAL, self.folder)
        left = [name for name, stamp in here.items() if self.sent.get(name) != stamp]
        if left:
            self.print0(f"WARNING: not at {self.url}: {', '.join(left)}; copy them by hand")
        else:
            self.print0(f"all of this run is at {self.url}")
