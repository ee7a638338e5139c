"""Shards at URLs (http, s3, gs, any of fsspec's), looked into by ranges and copied into a local
cache.

A Shard is a URL that opens as a file: the first open copies it into the cache folder, later ones
find it there. The folder stays under its limit: the copy used longest ago goes first, never one
that is open. Processes agree through file locks, which the kernel drops when one dies, so that a
kill -9 leaves nothing locked and at most a .part, which is overwritten."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import fsspec

from files.disk import Unreachable, trying, write_atomically
from files.streams import Stream

BLOCK = 1 << 18  # what an index asks for at once
PATIENCE = 600.0  # seconds to wait for room in a cache whose files are all in use
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)  # of a file, as http, s3, gs and others call it


@contextlib.contextmanager
def held(path):
    """A lock among processes and threads, by a file that stays. Unreachable where it is not ours:
    that says nothing about the shard."""
    try:
        f = open(path, "a")
    except PermissionError as e:
        raise Unreachable(
            f"{path} cannot be written ({e.strerror}): name a --cache_dir of your own"
        ) from e
    with f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


class Shard(str):
    """A URL with `size` and `version` (its ETag or the like), `folder` and `limit` (bytes) of the
    cache it is read through."""

    blocks = None  # of peek(): {number: bytes}

    @classmethod
    def of(cls, url, folder, limit):
        """Asks the server. Unreachable; ValueError for what cannot be cached."""
        if url.startswith("pipe:"):
            raise ValueError(
                f"{url}: a command has no size and no version, so it is not cached: name the URL,"
                " or drop --cache_dir"
            )
        self = cls(url)
        self.size, self.version = self.ask()
        if self.size is None:
            raise ValueError(
                f"{url}: the server does not say how large it is, so it is not cached: drop"
                " --cache_dir"
            )
        if self.size > limit:
            raise ValueError(
                f"{url} has {self.size / 1e9:.3g} GB, --cache_size is {limit / 1e9:.3g}: raise it"
            )
        self.folder, self.limit = folder, limit
        name = hashlib.sha256(
            f"{url.split('?')[0]} {self.size} {self.version}".encode()
        ).hexdigest()[:24]
        self.copy, self.notes = (os.path.join(folder, kind, name) for kind in ("shards", "notes"))
        return self

    def ask(self):
        """(bytes or None, version) as the server has them now."""

        def info():
            fs, name = fsspec.core.url_to_fs(self)
            fs.invalidate_cache()
            return fs.info(name)

        found = trying(self, info)
        return found["size"], next((str(found[k]) for k in VERSIONS if found.get(k)), "")

    def peek(self):
        """The same, to be looked into by ranges, with no copy made."""
        other = Shard(self)
        vars(other).update(vars(self) | {"blocks": None if os.path.exists(self.copy) else {}})
        return other

    def index(self, read):
        """read(a Shard that is looked into by ranges) -> something for JSON; done once, then kept.
        Where the server ignores ranges the shard is copied first: read(path)."""

        def serves_ranges():
            with urllib.request.urlopen(
                urllib.request.Request(self, headers={"Range": "bytes=0-0"}), timeout=60
            ) as response:
                return response.status == 206

        def kept():
            """The notes; None where there are none or a crash of the machine damaged them."""
            try:
                with open(self.notes) as f:
                    return json.load(f)
            except (FileNotFoundError, PermissionError, ValueError):
                return None

        notes = kept()
        if notes is not None:
            return notes
        with held(self.notes + ".index"):
            notes = kept()
            if notes is not None:
                return notes
            fd, source = None, self.peek()
            if self.startswith("http") and not trying(self, serves_ranges):
                fd, source = self.open(), self.copy
            notes = json.dumps(read(source))
            write_atomically(self.notes, notes.encode())
            if fd is not None:
                os.close(fd)
        return json.loads(notes)

    def preadv(self, buffers, at):
        """os.preadv by ranges, to the end of a block at most."""
        number, first = at // BLOCK, at % BLOCK
        if number not in self.blocks:
            fs, name = fsspec.core.url_to_fs(self)
            end = min((number + 1) * BLOCK, self.size)
            data = trying(self, lambda: fs.cat_file(name, start=number * BLOCK, end=end))
            if len(data) != end - number * BLOCK:
                raise Unreachable(
                    f"{self} gave {len(data)} of the {end - number * BLOCK} bytes at"
                    f" {number * BLOCK}: has it changed?"
                )
            self.blocks[number] = data
        data = self.blocks[number][first : first + len(buffers[0])]
        buffers[0][: len(data)] = data
        return len(data)

    def open(self):
        """A file descriptor of the copy, made now if there is none; while it is open the copy is in
        use. Looked into: this, for preadv."""
        while self.blocks is None:
            try:
                fd = os.open(self.copy, os.O_RDONLY)
            except FileNotFoundError:
                fd = self.fetch()
            fcntl.flock(fd, fcntl.LOCK_SH)
            stat = os.fstat(fd)
            if stat.st_nlink and stat.st_size == self.size:
                with contextlib.suppress(
                    PermissionError
                ):  # another user's copy: it is not known to be used again
                    os.utime(fd, ns=(time.time_ns(), stat.st_mtime_ns))
                return fd
            if stat.st_nlink:  # cut by a crash of the machine
                os.unlink(self.copy)
            os.close(fd)  # evicted before it was locked
        return self

    def fetch(self):
        """Copies the shard, once however many processes ask -> file descriptor."""
        with held(self.notes + ".copy"):
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.copy, os.O_RDONLY)  # by the one before
            part, began = self.copy + ".part", time.monotonic()
            fd = self.reserve(part)
            try:
                trying(self, lambda: self.transfer(fd))
                os.fsync(fd)
                os.replace(part, self.copy)
                if (seconds := time.monotonic() - began) > 10:
                    print(f"copied {self}, {self.size / 1e9:.3g} GB in {seconds:.0f} s", flush=True)
                return fd
            finally:
                if os.path.exists(part):
                    os.unlink(part)
                    os.close(fd)

    def transfer(self, fd):
        """All bytes into the file; OSError unless they are as many as the server said, and the
        shard is still the same."""
        at = 0
        with Stream(self) as source:
            while data := source.read(1 << 20):
                if at + len(data) <= self.size:
                    os.pwrite(fd, data, at)
                at += len(data)
        if at != self.size:
            raise OSError(f"{at} bytes came, the server had said {self.size}")
        if self.ask() != (self.size, self.version):
            raise Unreachable(f"{self} has changed since this run began: start it again")

    def reserve(self, part):
        """An open file of the shard's size, after evicting what was used longest ago and is not in
        use."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with (
                held(os.path.join(self.folder, "lock")),
                contextlib.suppress(FileNotFoundError),
            ):  # one that was finished meanwhile
                found = sorted(
                    (e.stat().st_atime_ns, e.stat().st_size, e.path)
                    for e in os.scandir(os.path.dirname(part))
                )
                room = self.limit - sum(size for _, size, _ in found)
                for _, size, path in found:
                    if room < self.size or path == part:  # a .part with our name was left by a kill
                        fd = os.open(path, os.O_RDONLY)
                        with contextlib.suppress(BlockingIOError):
                            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            os.unlink(path)
                            room += size
                        os.close(fd)
                if room >= self.size:
                    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    try:
                        getattr(os, "posix_fallocate", lambda fd, at, size: os.truncate(fd, size))(
                            fd, 0, self.size
                        )  # macOS has none
                    except OSError as e:
                        os.unlink(part)
                        raise Unreachable(
                            f"{part}: {e.strerror}: free {self.size / 1e9:.3g} GB, or name another"
                            " --cache_dir"
                        ) from e
                    return fd
            time.sleep(0.2)
        raise Unreachable(
            f"{self}: no room in {self.folder} for {PATIENCE:.0f} s, all of it is in use: raise"
            " --cache_size"
        )


def cached(groups, folder, gigabytes, say=print):
    """[[path or URL]] -> the same with a Shard for each URL; says how much will be copied, and
    warns where it does not fit."""
    for kind in ("shards", "notes"):
        os.makedirs(os.path.join(folder, kind), exist_ok=True)
    urls = list(
        dict.fromkeys(p for group in groups for p in group if "://" in p or p.startswith("pipe:"))
    )
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(urls, pool.map(lambda url: Shard.of(url, folder, 1e9 * gigabytes), urls)))
    total, have = (
        sum(s.size for s in found.values() if every or os.path.exists(s.copy)) / 1e9
        for every in (True, False)
    )
    say(
        f"{len(found)} shards at URLs, {total:.3g} GB, {have:.3g} GB in {folder}; the others are"
        " copied when a clip first needs them"
    )
    if total > gigabytes:
        share, size = 1 - gigabytes / total, 1e3 * total / len(found)
        say(
            f"WARNING: only {gigabytes:.3g} GB may stay: about {share:.0%} of the clips will each"
            f" copy a shard of {size:.3g} MB; raise --cache_size, take fewer shards, or stream them"
            " (no --cache_dir)"
        )
    return [[found.get(p, p) for p in group] for group in groups]
