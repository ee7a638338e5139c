"""Shards from front to back: URLs and commands that are read on after a failure, and the clips of
what cannot be sought."""

import io
import itertools
import os
import tarfile
import urllib.request

import fsspec
import numpy as np
import torch
import webdataset as wds

from files.disk import READ_ERRORS, Unreachable, disk_failed, disk_sentence, trying
from files.video import WrongDecoder, mp4_times, video_rate
from files.vpt import parse_ticks


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


def is_apple_double(name, head):
    """Whether a file is what macOS puts beside NAME as ._NAME: attributes, no recording. head: its
    first bytes."""
    magic = head[:4] in (b"\0\5\x16\7", b"\0\5\x16\0")
    return os.path.basename(name).startswith("._") and magic
