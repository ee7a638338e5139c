"""A run's folder, copied to a bucket (any fsspec URL: gs://, s3://, file://, memory://) in the background, and back again to resume."""

import concurrent.futures
import json
import os
import shutil
import time

import fsspec

import checkpoint

SENT = "sync.json"  # in the run's folder: {name: [size, time]} of what is at the URL


def listing(folder):
    """{name: [size, time of change in ns]} of the files of a run that are whole: all but links, files being written and SENT."""
    out = {}
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, n) for n in names if not n.endswith(".tmp") and n != SENT):
            try:
                info = os.lstat(path)
            except FileNotFoundError:  # rotated away meanwhile
                continue
            if not os.path.islink(path):
                out[os.path.relpath(path, folder)] = [info.st_size, info.st_mtime_ns]
    return dict(sorted(out.items()))


class Mirror:
    """Copies what is new in `folder` to `url` every few `minutes` and at the end, in threads. There it removes what it wrote and rotation
    has removed here, nothing else. What fails is said and tried again after `retry` seconds; nothing that happens here stops training."""

    def __init__(self, folder, url, minutes, say=print, retry=60.0):
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.fs.auto_mkdir = True  # of local folders; buckets have none
        self.folder, self.url, self.minutes, self.say, self.retry = folder, url, minutes, say, retry
        self.pool, self.jobs, self.due, self.sent = concurrent.futures.ThreadPoolExecutor(2), {}, time.monotonic() + 60 * minutes, {}
        if os.path.exists(os.path.join(folder, SENT)):
            with open(os.path.join(folder, SENT)) as f:
                self.sent = json.load(f)

    @classmethod
    def open(cls, folder, url, minutes, resume):
        """A Mirror. A run that is at the URL and not in the folder is fetched first, or is a ValueError without `resume`."""
        mirror = cls(folder, url, minutes)
        if not checkpoint.list_checkpoints(folder) and mirror.remote():
            if not resume:
                raise ValueError(f"{url} holds an earlier run: pass --resume to go on with it, or another --sync_to")
            mirror.pull()
        return mirror

    def remote(self):
        """Names of files that a run may have written at the URL."""
        names = [p[len(self.root) :].lstrip("/") for p in (self.fs.find(self.root) if self.fs.exists(self.root) else [])]
        return [n for n in names if checkpoint.NAME.fullmatch(n) or n.endswith((".csv", ".json", ".jsonl")) or n.startswith("adapter/")]

    def pull(self):
        """Fetch the run that is at the URL into an empty folder, a file at a time, each whole or not at all."""
        for name in self.remote():
            with self.fs.open(f"{self.root}/{name}", "rb") as f:
                checkpoint.write_atomically(os.path.join(self.folder, name), lambda out, f=f: shutil.copyfileobj(f, out, 1 << 24))
        self.sent = listing(self.folder)
        self.say(f"fetched {len(self.sent)} files from {self.url}")

    def start(self):
        have = listing(self.folder)
        for name in (n for n, stamp in have.items() if self.sent.get(n) != stamp):
            self.jobs[name] = have[name], self.pool.submit(self.fs.put_file, os.path.join(self.folder, name), f"{self.root}/{name}")
        for name in self.sent.keys() - have.keys():
            self.jobs[name] = None, self.pool.submit(self.fs.rm_file, f"{self.root}/{name}")
        self.due = time.monotonic() + 60 * self.minutes

    def collect(self):
        """Note what has arrived and say what has not; the number of failures."""
        done = {name: self.jobs.pop(name) for name, (_, job) in [*self.jobs.items()] if job.done()}
        # whatever a storage library may raise ends up in its future; a file that rotation has removed meanwhile is no failure
        errors = {n: job.exception() for n, (_, job) in done.items() if job.exception()}
        gone = {n for n, e in errors.items() if isinstance(e, FileNotFoundError) and not os.path.exists(os.path.join(self.folder, n))}
        failed = {n: e for n, e in errors.items() if n not in gone}
        for name in done.keys() - failed.keys():
            if done[name][0] is None or name in gone:
                self.sent.pop(name, None)
            else:
                self.sent[name] = done[name][0]
        if done:
            checkpoint.write_atomically(os.path.join(self.folder, SENT), json.dumps(self.sent).encode())
        if failed:
            name, error = next(iter(failed.items()))
            what = f"{name} among them ({type(error).__name__}: {error})"
            self.say(f"WARNING: {len(failed)} of {len(done)} copies to {self.url} failed, {what}; again in {self.retry:.0f} s")
            self.due = min(self.due, time.monotonic() + self.retry)
        return len(failed)

    def tick(self):
        """To be called often: sees to what is done and to what is due."""
        self.collect()
        if not self.jobs and time.monotonic() >= self.due:
            self.start()

    def close(self, patience=600.0):
        """Send the rest, three times if it must be; after `patience` seconds what hangs is given up."""
        for attempt in range(4):
            concurrent.futures.wait([job for _, job in self.jobs.values()], patience)
            failed = self.collect()
            if attempt == 3 or self.jobs or (attempt and not failed):
                break
            time.sleep(min(self.retry, 5.0) if failed else 0)
            self.start()
        left = [n for n, stamp in listing(self.folder).items() if self.sent.get(n) != stamp]
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.say(f"WARNING: not at {self.url}: {', '.join(left)}; copy them by hand" if left else f"all of {self.folder} is at {self.url}")
