"""Shards at URLs (http, s3, gs, any of fsspec's), read by ranges and copied into a local cache.

A Shard is a URL that opens as a file: the first open copies it into the cache folder, later ones
find it there. The folder stays under its limit: the least recently used copy is deleted first,
but never one that is open. Processes agree through file locks. The kernel drops the locks of a
process that dies, so a kill -9 leaves nothing locked and at most a .part, which is overwritten."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import fsspec

from files.disk import Unreachable, make_folder, with_retries, write_atomically
from files.streams import Stream

BLOCK = 1 << 18  # what an index asks for at once
PATIENCE = 600.0  # seconds to wait for room in a cache whose files are all in use

# the names under which http, s3, gs and others give the version of a file
VERSIONS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")


@contextlib.contextmanager
def locked(path):
    """A lock among processes and threads, on a file that stays. Unreachable if this user may not
    write it: that says nothing about the shard."""
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
    """A URL with its `size` and `version` (ETag or the like), and the `folder` and `limit` (bytes)
    of the cache through which it is read."""

    blocks = None  # of a Shard that peek() gave: {number: bytes}

    @classmethod
    def of(cls, url, folder, limit):
        """A Shard of a URL, after asking the server. Raises Unreachable, and ValueError for what
        cannot be cached."""
        if url.startswith("pipe:"):
            raise ValueError(
                f"{url}: a command has no size and no version, so it is not cached: name the URL,"
                " or drop --cache_dir"
            )
        shard = cls(url)
        shard.size, shard.version = shard.ask()
        if shard.size is None:
            raise ValueError(
                f"{url}: the server does not say how large it is, so it is not cached: drop"
                " --cache_dir"
            )
        if shard.size > limit:
            raise ValueError(
                f"{url} has {shard.size / 1e9:.3g} GB, --cache_size is {limit / 1e9:.3g}: raise it"
            )

        # what follows a ? may be a signature, which changes
        identity = f"{url.split('?')[0]} {shard.size} {shard.version}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        shard.folder = folder
        shard.limit = limit
        shard.copy = os.path.join(folder, "shards", name)
        shard.notes = os.path.join(folder, "notes", name)
        return shard

    def ask(self):
        """(bytes or None, version) as the server has them now."""

        def info():
            fs, name = fsspec.core.url_to_fs(self)
            fs.invalidate_cache()
            return fs.info(name)

        about = with_retries(self, info)
        for name in VERSIONS:
            if about.get(name):
                return about["size"], str(about[name])
        return about["size"], ""

    def peek(self):
        """The same shard, to be read by ranges without making a copy."""
        other = Shard(self)
        vars(other).update(vars(self))
        other.blocks = None if os.path.exists(self.copy) else {}
        return other

    def index(self, read):
        """read(a Shard that is read by ranges) -> something for JSON. Done once, then kept in the
        cache as notes. If the server ignores ranges the shard is copied first: read(path)."""
        notes = self.read_notes()
        if notes is not None:
            return notes
        with locked(self.notes + ".index"):
            # another process may have been faster
            notes = self.read_notes()
            if notes is not None:
                return notes

            fd = None  # open: a copy in use is not deleted
            source = self.peek()
            if self.startswith("http") and not with_retries(self, self.serves_ranges):
                fd = self.open()
                source = self.copy
            notes = json.dumps(read(source))
            write_atomically(self.notes, notes.encode())
            if fd is not None:
                os.close(fd)
        return json.loads(notes)

    def read_notes(self):
        """The notes; None if there are none or a crash of the machine damaged them."""
        try:
            with open(self.notes) as f:
                return json.load(f)
        except (FileNotFoundError, PermissionError, ValueError):
            return None

    def serves_ranges(self):
        request = urllib.request.Request(self, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status == 206

    def preadv(self, buffers, at):
        """os.preadv by ranges, to the end of a block at most."""
        number = at // BLOCK
        first = at % BLOCK
        if number not in self.blocks:
            fs, name = fsspec.core.url_to_fs(self)
            start = number * BLOCK
            end = min(start + BLOCK, self.size)
            data = with_retries(self, lambda: fs.cat_file(name, start=start, end=end))
            if len(data) != end - start:
                raise Unreachable(
                    f"{self} gave {len(data)} of the {end - start} bytes at {start}: has it"
                    " changed?"
                )
            self.blocks[number] = data
        data = self.blocks[number][first : first + len(buffers[0])]
        buffers[0][: len(data)] = data
        return len(data)

    def open(self):
        """A file descriptor of the copy, which is made now if there is none. While the descriptor
        is open the copy is in use. A Shard of peek() gives itself, for preadv."""
        while self.blocks is None:
            try:
                fd = os.open(self.copy, os.O_RDONLY)
            except FileNotFoundError:
                fd = self.fetch()
            fcntl.flock(fd, fcntl.LOCK_SH)
            stat = os.fstat(fd)
            is_there = stat.st_nlink > 0  # else deleted before it was locked
            if is_there and stat.st_size == self.size:
                # note the time of use, unless the copy is another user's
                with contextlib.suppress(PermissionError):
                    os.utime(fd, ns=(time.time_ns(), stat.st_mtime_ns))
                return fd
            if is_there:
                os.unlink(self.copy)  # a crash of the machine cut it
            os.close(fd)
        return self

    def fetch(self):
        """Copy the shard, once however many processes ask -> file descriptor."""
        with locked(self.notes + ".copy"):
            # the process that had the lock before may have copied it
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.copy, os.O_RDONLY)

            part = self.copy + ".part"
            began = time.monotonic()
            fd = self.reserve(part)
            try:
                with_retries(self, lambda: self.transfer(fd))
                os.fsync(fd)
                os.replace(part, self.copy)
                seconds = time.monotonic() - began
                if seconds > 10:
                    print(f"copied {self}, {self.size / 1e9:.3g} GB in {seconds:.0f} s", flush=True)
                return fd
            finally:
                if os.path.exists(part):
                    os.unlink(part)
                    os.close(fd)

    def transfer(self, fd):
        """Write all bytes of the shard to the file. OSError unless they are as many as the server
        said; Unreachable if the shard has changed meanwhile."""
        at = 0
        with Stream(self) as source:
            while True:
                data = source.read(1 << 20)
                if not data:
                    break
                if at + len(data) <= self.size:
                    os.pwrite(fd, data, at)
                at += len(data)
        if at != self.size:
            raise OSError(f"{at} bytes came, the server had said {self.size}")
        if self.ask() != (self.size, self.version):
            raise Unreachable(f"{self} has changed since this run began: start it again")

    def reserve(self, part):
        """An open file of the shard's size, after deleting copies that are not in use, the least
        recently used first. Waits PATIENCE seconds for room, then raises Unreachable."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            # FileNotFoundError: a .part was renamed while the folder was listed
            with (
                locked(os.path.join(self.folder, "lock")),
                contextlib.suppress(FileNotFoundError),
            ):
                if self.make_room(part) >= self.size:
                    return self.allocate(part)
            time.sleep(0.2)
        raise Unreachable(
            f"{self}: no room in {self.folder} for {PATIENCE:.0f} s, all of it is in use: raise"
            " --cache_size"
        )

    def make_room(self, part):
        """Delete copies that are not in use until the shard fits -> bytes of room in the cache."""
        copies = []
        for entry in os.scandir(os.path.dirname(part)):
            stat = entry.stat()
            copies.append((stat.st_atime_ns, stat.st_size, entry.path))
        copies.sort()
        room = self.limit - sum(size for _, size, _ in copies)
        for _, size, path in copies:
            # a .part with our name was left by a process that was killed
            if room < self.size or path == part:
                fd = os.open(path, os.O_RDONLY)
                with contextlib.suppress(BlockingIOError):  # it is in use
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    room += size
                os.close(fd)
        return room

    def allocate(self, part):
        """A new locked file of the shard's size. Unreachable if the disk is full."""
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, self.size)
            else:  # macOS
                os.truncate(fd, self.size)
        except OSError as e:
            os.unlink(part)
            raise Unreachable(
                f"{part}: {e.strerror}: free {self.size / 1e9:.3g} GB, or name another --cache_dir"
            ) from e
        return fd


def cached(groups, folder, gigabytes, print0=print):
    """[[path or URL]] -> the same with a Shard for each URL. Prints how much will be copied, and
    warns if it does not fit into the cache."""
    for kind in ("shards", "notes"):
        make_folder("--cache_dir", os.path.join(folder, kind))
    urls = []
    for group in groups:
        urls += [path for path in group if "://" in path or path.startswith("pipe:")]
    urls = list(dict.fromkeys(urls))  # each once
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(lambda url: Shard.of(url, folder, 1e9 * gigabytes), urls))

    total = sum(shard.size for shard in shards) / 1e9
    copied = sum(shard.size for shard in shards if os.path.exists(shard.copy)) / 1e9
    print0(
        f"{len(shards)} shards at URLs, {total:.3g} GB, {copied:.3g} GB in {folder}; the others are"
        " copied when a clip first needs them"
    )
    if total > gigabytes:
        share = 1 - gigabytes / total
        megabytes = 1e3 * total / len(shards)
        print0(
            f"WARNING: only {gigabytes:.3g} GB may stay: about {share:.0%} of the clips will each"
            f" copy a shard of {megabytes:.3g} MB; raise --cache_size, take fewer shards, or stream"
            " them (no --cache_dir)"
        )
    shard_of = dict(zip(urls, shards))
    return [[shard_of.get(p, p) for p in group] for group in groups]
