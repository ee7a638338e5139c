"""A run's files, copied to a bucket (any fsspec URL: gs://, s3://, file://, memory://) in the
background, and back again to resume."""

import contextlib
import json
import os
import shutil
import threading
import time

import fsspec

import checkpoint

ID, SENT = (
    "run_id",
    "sync.json",
)  # tells runs apart, here and at the URL; says, here alone, what is at which URL
NAMES = (
    "run_id args.json train.csv val.csv curves.png bad_clips.jsonl adapter/adapter_config.json"
    " adapter/adapter_model.safetensors"
)
LOCAL = fsspec.filesystem("file")


def when(name):
    """(epoch, itr) of a checkpoint's name; () of any other, which is less."""
    return (int(m[1]), int(m[2] or 0)) if (m := checkpoint.NAME.fullmatch(name)) else ()


def listing(fs, root):
    """{name: [size, time]} of a run's files: id, logs, checkpoints from old to new; a copy cut off
    has no checkpoint without its logs."""
    fs.invalidate_cache()
    out = {}
    for part in ("", "adapter/"):
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(f"{root}/{part}".rstrip("/"), detail=True):
                out[part + info["name"].rpartition("/")[2]] = [info["size"], info.get("mtime")]
    return {
        n: out[n]
        for n in sorted(out, key=lambda n: (when(n), n != ID, n))
        if n in NAMES.split() or when(n)
    }


def read(folder, name):
    return LOCAL.cat_file(path) if LOCAL.exists(path := os.path.join(folder, name)) else b""


@contextlib.contextmanager
def noting(errors, name):
    """Puts an exception into `errors`, from where it is said, and goes on."""
    try:
        yield
    except Exception as e:  # storage libraries raise what they like
        errors[name] = e


class Mirror:
    """Copies what is new of the run in `folder` to `url` every few `minutes` and at the end, in a
    thread; it overwrites and deletes nothing there but this run's. What fails is said and tried
    again after `retry` seconds, then 2 * retry, ...; nothing of it stops training. What does not
    move for `patience` seconds (and one more per MB) is given up at the end, in training `minutes`
    later."""

    say, retry, patience = print, 60.0, 60.0

    def __init__(self, folder, url, minutes):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise ValueError(
                f"--sync_to {url}: {e} (gs:// needs pip install gcsfs, s3:// pip install s3fs, a"
                " folder nothing)"
            ) from e
        self.fs.auto_mkdir = True  # of local folders; buckets have none
        self.folder, self.url, self.minutes, self.place = (
            folder,
            url,
            minutes,
            self.fs.unstrip_protocol(self.root),
        )
        self.worker, self.errors, self.fails, self.due = (
            None,
            {},
            0,
            time.monotonic() + 60 * minutes,
        )
        self.sent = json.loads(read(folder, SENT) or "{}").get(
            self.place
        )  # what is known of another place is not about this one

    @classmethod
    def open(cls, folder, url, minutes, resume):
        """A Mirror, after fetching what is ahead of the folder. ValueError: the URL has another
        run, or is ahead without `resume`."""
        self = cls(folder, url, minutes)
        with noting(self.errors, "all"):
            there, mine = (
                listing(self.fs, self.root),
                max(checkpoint.list_checkpoints(folder).values(), default=()),
            )
            newest, other = max(map(when, there), default=()), there and not self.own(there)
            if other and (mine or not (newest or ID in there)):
                raise ValueError(
                    f"{url} holds another run than {folder}: pass another --sync_to, or go on with"
                    " it in a new --out_dir"
                )
            if (other or newest > mine) and not resume:
                raise ValueError(
                    f"{url} holds an earlier run: pass --resume to go on with it, or another"
                    " --sync_to"
                )
            if ID not in there and not (mine and read(folder, ID)):
                checkpoint.write_atomically(os.path.join(folder, ID), os.urandom(8).hex().encode())
            self.note(
                {} if other else self.sent or {}
            )  # from now on that run is this one, even if fetching it is cut off
            if (
                other or newest > mine
                # files whole or not at all, the newest checkpoint last: until then the next start
                # comes here again
            ):
                for name in there:
                    with self.fs.open(f"{self.root}/{name}", "rb") as f:
                        checkpoint.write_atomically(
                            os.path.join(folder, name),
                            lambda out, f=f: shutil.copyfileobj(f, out, 1 << 24),
                        )
                self.note(
                    self.sent
                    | {n: stamp for n, stamp in listing(LOCAL, folder).items() if n in there}
                )
                self.say(
                    f"fetched {len(there)} files from {url}"
                    + (f", which is ahead of {folder}" if mine else "")
                )
        if e := self.errors.get("all"):
            raise (
                e
                if isinstance(e, ValueError)
                else OSError(
                    f"--sync_to {url} cannot be read ({type(e).__name__}: {e}): mend that first"
                )
            )
        return self

    def own(self, there):
        """Whether what is at the URL is this run; one without an id is if it was fetched into this
        folder."""
        return (
            self.fs.cat_file(f"{self.root}/{ID}") == read(self.folder, ID)
            if ID in there
            else self.sent is not None
        )

    def note(self, sent):
        self.sent = sent
        checkpoint.write_atomically(
            os.path.join(self.folder, SENT), json.dumps({self.place: sent}).encode()
        )

    def round(self, errors):
        """In a thread: copy what is new and, once all is there, remove what rotation has removed
        here. Ends early if it was given up."""
        me, current = threading.current_thread(), lambda: self.worker is me
        moves = fsspec.callbacks.Callback(
            hooks={"moved": lambda *size, **more: setattr(self, "moved", time.monotonic())}
        )
        with noting(errors, "all"):
            have, there = listing(LOCAL, self.folder), listing(self.fs, self.root)
            newest = max(map(when, have), default=())
            if (
                there
                and not self.own(there)
                or any(newest < when(n) and n not in self.sent for n in there)
            ):
                raise ValueError("another process has begun a run there, or gone on with this one")
            for name in (
                n
                for n, stamp in have.items()
                if (self.sent.get(n), there.get(n, [None])[0]) != (stamp, stamp[0]) and current()
            ):
                path, self.busy, self.size, self.moved = (
                    os.path.join(self.folder, name),
                    name,
                    have[name][0],
                    time.monotonic(),
                )
                with noting(errors, name):
                    self.fs.put_file(path, f"{self.root}/{name}", callback=moves)
                    self.note(self.sent | {name: have[name]})
                if isinstance(errors.get(name), FileNotFoundError) and not os.path.exists(path):
                    del errors[name]  # rotated away meanwhile
            for name in [n for n in self.sent if n not in have and () < when(n) < newest]:
                if (
                    current()
                    and not errors
                    and all(self.sent.get(n) == stamp for n, stamp in have.items())
                ):
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.rm_file(f"{self.root}/{name}")
                    self.note({n: stamp for n, stamp in self.sent.items() if n != name})

    def finish(self, extra=0.0):
        """Whether no round is under way (any more): says what the last one failed to do, gives it
        up if it has not moved for too long."""
        self.hung, errors = bool(self.worker and self.worker.is_alive()), dict(self.errors)
        if self.hung:
            late = (
                time.monotonic() - self.moved - min(self.size, 5e8) / 1e6
            )  # s3fs has up to 500 MB under way before it reports any
            if late < self.patience + extra:
                return False
            errors[self.busy] = TimeoutError(f"no progress for {late:.0f} s")
        if self.worker:
            self.worker, self.fails = None, self.fails + 1 if errors else 0
            if errors:
                self.due = min(self.due, time.monotonic() + self.retry * self.fails)
                what = (
                    f"{', '.join(errors)}"
                    f" ({'; '.join({f'{type(e).__name__}: {e}' for e in errors.values()})})"
                )
                self.say(
                    f"WARNING: not copied to {self.url}: {what}; again in"
                    f" {self.retry * self.fails:.0f} s"
                )
        return True

    def tick(self, now=False):
        """To be called often: sees to what is done and to what is due."""
        if self.finish(60 * self.minutes) and (now or time.monotonic() >= self.due):
            self.errors, self.busy, self.size, self.moved, self.due = (
                {},
                "all",
                0,
                time.monotonic(),
                time.monotonic() + 60 * self.minutes,
            )
            self.worker = threading.Thread(
                target=self.round, args=(self.errors,), daemon=True
            )  # one that hangs must not hold up the exit
            self.worker.start()

    def close(self):
        """Send the rest, three times if it must be."""
        for attempt in range(4):
            while not self.finish():
                self.worker.join(0.1)
            if attempt == 3 or attempt and (self.hung or not self.fails):
                break
            time.sleep(min(self.retry, 5.0) if self.fails else 0)
            self.tick(now=True)
        left = [n for n, stamp in listing(LOCAL, self.folder).items() if self.sent.get(n) != stamp]
        self.say(
            f"WARNING: not at {self.url}: {', '.join(left)}; copy them by hand"
            if left
            else f"all of this run is at {self.url}"
        )
