"""Shards from front to back: URLs and commands that are read on after a failure, and the clips of
what cannot be sought."""

import errno
import io
import itertools
import os
import random
import re
import struct
import tarfile
import time
import urllib.request
import zipfile
import zlib

import av
import fsspec
import numpy as np
import torch
import webdataset as wds
from PIL import Image

from files.vpt import WrongDecoder, mp4_times, parse_ticks, video_rate

READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    av.FFmpegError,
)  # what a damaged recording may raise; anything else is our bug
DAMAGE = (
    *READ_ERRORS,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
TRIES, WAIT, LONGEST = 5, 1.0, 30.0  # seconds: about 1, 3, 9, 27 between the tries
PAUSES = (1.0, 3.0)  # seconds before a disk is asked a second and a third time
HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this machine",
    errno.ENOMEM: "give it more memory, or lower --num_workers",
    errno.EACCES: "let this user read it",
    errno.EPERM: "let this user read it",
    errno.ENOENT: "put the file back",
}


class Unreachable(OSError):
    """What a URL or a disk did not give, after all tries: one sentence."""


def memory_is_short():
    """Whether this process cannot have another 256 MB."""
    try:
        return not bytearray(1 << 28)
    except MemoryError:
        return True


def disk_failed(error):
    """Whether an error of reading says something of the disk, of the network or of the limits of
    this process, and nothing of the recording.

    What the system says has an errno. A damaged file has none: HDF5, Pillow and FFmpeg raise their
    own kinds of OSError. HDF5 only writes the errno into its text, in errors of several kinds.
    FFmpeg's "out of memory" may also be a length in a damaged file."""
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, MemoryError):
        return not isinstance(error, av.FFmpegError) or memory_is_short()
    if isinstance(error, av.FFmpegError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return re.search(r"\berrno = [1-9]", str(error)) is not None


def disk_sentence(place, error):
    """What to say of an error of which disk_failed is true; place: the file, and the recording."""
    if isinstance(error, Unreachable):
        return str(error)
    text = re.search(r"\berrno = (\d+)", str(error))
    code = getattr(error, "errno", None) or (int(text[1]) if text else None)
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    remedy = REMEDIES.get(code, "fix the disk or its mount")
    said = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{place} cannot be read: {said}: {remedy}, then start again (this says nothing about the"
        " recording, so it is not left out)"
    )


def persistently(place, call):
    """call(), again after PAUSES where the disk failed, since a server of files may come back;
    then Unreachable: to leave the recording out would be another run. Other errors pass."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (*DAMAGE, MemoryError) as e:
            if not disk_failed(e):
                raise
            again = not isinstance(e, (Unreachable, MemoryError, *HOPELESS))
            if pause is None or not again:
                raise Unreachable(disk_sentence(place, e)) from e
        time.sleep(pause)


def trying(url, call):
    """call(), again after a while if it fails, TRIES times at most; Unreachable then. Not again
    where the server says that it will not."""
    for attempt in range(TRIES):
        time.sleep(
            random.uniform(0.8, 1.2) * min(WAIT * 3 ** (attempt - 1), LONGEST) if attempt else 0
        )  # not all nodes at once
        try:
            return call()
        except Unreachable:
            raise
        except Exception as e:  # storage libraries raise what they like; the last is raised again
            error, cause = e, e.__cause__ or e  # fsspec calls each HTTP error "not found"
        final = isinstance(error, (FileNotFoundError, PermissionError)) and (
            cause is error or not url.startswith("http")
        )
        if isinstance(status := getattr(cause, "status", None), int):
            final = 400 <= status < 500 and status not in (408, 429)
        if final or isinstance(error, ImportError):
            break
    times = f"{attempt + 1} times" if attempt else "at once, so not tried again"
    raise Unreachable(
        f"{url} cannot be read: {type(cause).__name__}: {str(cause) or 'no reason given'} ({times})"
    ) from error


class Stream(io.RawIOBase):
    """A URL or pipe: from front to back. What fails is opened again at the byte that was reached; a
    pipe: is not."""

    def __init__(self, url):
        self.url, self.at, self.size, self.source = url, 0, None, None

    def readable(self):
        return True

    def start(self):
        """Opens it at byte `at`."""
        if self.url.startswith("http"):
            request = urllib.request.Request(
                self.url, headers={"Range": f"bytes={self.at}-"} if self.at else {}
            )
            self.source = urllib.request.urlopen(request, timeout=60)
            skip = (
                0 if self.source.status == 206 else self.at
            )  # a server that ignores ranges begins anew
            length = self.source.headers["Content-Length"]
            size = int(length) + self.at - skip if length else None
            while skip and (passed := len(self.source.read(min(skip, 1 << 20)))):
                skip -= passed
        else:
            fs, name = fsspec.core.url_to_fs(self.url)
            self.source = fs.open(name, "rb", block_size=1 << 23, cache_type="readahead")
            self.source.seek(self.at)
            size = self.source.size
        if self.size not in (None, size):
            raise Unreachable(
                f"{self.url} changed while it was read: {self.size} bytes, then {size}"
            )
        self.size = size

    def more(self, buffer):
        if self.source is None:
            self.start()
        source, self.source = self.source, None  # stays None if this fails
        if not (data := source.read(len(buffer))) and self.at < (self.size or 0):
            raise OSError(f"the transfer ended at byte {self.at} of {self.size}")
        self.source = source
        return data

    def readinto(self, buffer):
        if self.url.startswith("pipe:"):
            self.source = self.source or wds.gopen(self.url)
            data = self.source.read(len(buffer))
        else:
            data = trying(self.url, lambda: self.more(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self):
        if self.source is not None and not self.closed:
            self.source.close()  # OSError if a command failed
        super().close()


class Rest:
    """What is left of a stream, with the block before it: only as much of a file as tarfile asks
    for when it reads from front to back."""

    def __init__(self, block, source):
        self.block, self.source = block, source

    def tell(self):
        return self.source.tell() - len(self.block)

    def read(self, size):
        data, self.block = self.block[:size], self.block[size:]
        return data + self.source.read(size - len(data))

    def seek(self, place):
        while self.tell() < place and self.read(min(place - self.tell(), 1 << 20)):
            pass


def member_kind(name):
    """("KEY", "mp4") of KEY.mp4, and of KEY.MP4: cameras write their names in capitals."""
    stem, extension = os.path.splitext(name)
    return stem, extension[1:].lower()


def stream_members(source):
    """(key, "mp4" or "jsonl", bytes) of the members of a tar that belong to recordings; of all
    archives where several were put one after another, of which tarfile reads the first alone."""
    tar = tarfile.open(fileobj=source, mode="r|*")
    stream = tar.fileobj
    while True:
        for m in tar:
            stem, kind = member_kind(m.name)
            if m.isfile() and kind in ("mp4", "jsonl"):
                data = tar.extractfile(m).read()
                if not is_apple_double(m.name, data):
                    yield stem, kind, data
        if tar.fileobj.tell() < tar.offset + 512:
            raise tarfile.ReadError("the stream ends before the tar does")

        # zeros fill the last block of a tape; anything else is another archive
        block = bytes(512)
        while block and not block.strip(b"\0"):
            block = stream.read(512)
        if not block:
            return
        start = stream.tell() - len(block)
        tar = tarfile.TarFile(fileobj=Rest(block, stream))
        if tar.firstmember is None:
            raise tarfile.ReadError(f"what follows the end of the tar at byte {start} is no tar")


def is_apple_double(name, head):
    """Whether a file is what macOS puts beside NAME as ._NAME: attributes, no recording. head: its
    first bytes."""
    magic = head[:4] in (b"\0\5\x16\7", b"\0\5\x16\0")
    return os.path.basename(name).startswith("._") and magic


def stream_recordings(url):
    """(key, {extension: bytes}) of each recording of a shard that cannot be sought, then whatever
    is wrong with the shard is raised (OSError, ValueError, tarfile.TarError). Keys keep their dots;
    other members are passed over."""
    source, found, whole = Stream(url), {}, 0
    for stem, kind, data in stream_members(source):
        found.setdefault(stem, {})[kind] = data
        if len(found[stem]) == 2:
            whole += 1
            yield stem, found.pop(stem)
    while source.read(1 << 20):  # a command that is still writing would fail
        pass
    source.close()  # raises OSError if the command failed
    if found or not whole:
        raise ValueError(
            "no mp4 and jsonl beside each other "
            + (f"for {', '.join(found)}" if found else "in it")
        )


class StreamedClips(torch.utils.data.IterableDataset):
    """Endless clips from shards that cannot be sought: several clips a recording, a small shuffle
    buffer. Shards are dealt to ranks x workers; when there are fewer, each of them reads every
    shard and takes its share of the clips, so nothing is seen twice or waited for. The order
    depends on ranks and workers, and a resumed run starts a fresh epoch: index local copies for
    exact resume."""

    def __init__(
        self, urls, reader, seed=0, epoch=0, rank=0, world=1, clips_per_recording=8, shuffle=64
    ):
        self.urls, self.reader, self.seed, self.epoch = urls, reader, seed, epoch
        self.rank, self.world, self.clips, self.shuffle = rank, world, clips_per_recording, shuffle

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        units, unit = (
            self.world * (info.num_workers if info else 1),
            self.rank + self.world * (info.id if info else 0),
        )
        bad, buffer, room, size = [], [], self.shuffle, 0
        for epoch in itertools.count(self.epoch):
            rng = np.random.default_rng([self.seed, epoch, unit])
            urls = [
                self.urls[i]
                for i in np.random.default_rng([self.seed, epoch]).permutation(len(self.urls))
            ]
            shared, seen, dealt, used = len(urls) < units, 0, 0, 0
            for url in urls if shared else urls[unit::units]:
                try:
                    for key, members in stream_recordings(url):
                        size += sum(map(len, members.values()))
                        mine = [
                            i for i in range(self.clips) if not shared or (seen + i) % units == unit
                        ]
                        seen, dealt = seen + self.clips, dealt + len(mine)
                        try:
                            for clip in self.cut(key, members, mine, rng):
                                used += 1
                                buffer.append(clip)
                                if len(buffer) >= room:
                                    yield buffer.pop(rng.integers(len(buffer))) | {
                                        "bad": bad,
                                        "bytes": size,
                                    }
                                    bad, size = [], 0
                        except WrongDecoder:
                            raise
                        except READ_ERRORS as e:
                            if disk_failed(e):
                                raise
                            bad.append((url, key, f"{type(e).__name__}: {e}"))
                except WrongDecoder as e:
                    raise ValueError(f"{url} {key}: {e}") from e
                except (*READ_ERRORS, tarfile.TarError) as e:
                    if disk_failed(e):
                        raise ValueError(disk_sentence(url, e)) from e
                    bad.append((url, "", f"{type(e).__name__}: {e}"))
            if not used:  # never spin
                if bad or dealt or unit < self.world:
                    reason = (
                        bad[-1]
                        if bad
                        else (
                            "--gui drop leaves out everything"
                            if dealt
                            else f"{seen} clips for {self.world} ranks"
                        )
                    )
                    raise ValueError(
                        f"no clip could be read from {urls[0]} and the others: {reason}"
                    )
                return  # fewer clips than workers: this one is not needed
            room = min(
                room, len(buffer) + 1
            )  # few clips: do not read everything many times over before the first batch

    def cut(self, key, members, places, rng):
        f = io.BytesIO(members["mp4"])
        times, ticks = mp4_times(f), parse_ticks(members["jsonl"])
        starts = self.reader.starts(ticks, len(times), video_rate(f, times))
        for i in places:
            clip = self.reader(
                f, times, ticks, int((i + rng.random()) / self.clips * starts), rng, key
            )
            if clip is not None:
                yield clip
