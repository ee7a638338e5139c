"""Shards read from front to back: URLs and commands that continue after a failure, and the clips of
shards that cannot be sought."""

import io
import itertools
import os
import tarfile
import urllib.request

import fsspec
import numpy as np
import torch

from files.disk import READ_ERRORS, Unreachable, is_storage_error, storage_sentence, with_retries
from files.video import WrongDecoder, mp4_times, video_rate
from files.vpt import parse_ticks

# --- bytes ---


class Stream(io.RawIOBase):
    """A URL or pipe:, read from front to back. After a failure a URL is opened again at the byte
    that was reached; a pipe: is not."""

    def __init__(self, url):
        self.url = url
        self.at = 0  # bytes read so far
        self.size = None
        self.source = None

    def readable(self):
        return True

    def start(self):
        """Open the URL at byte `at`. Unreachable if its size changed meanwhile."""
        if self.url.startswith("http"):
            headers = {"Range": f"bytes={self.at}-"} if self.at else {}
            request = urllib.request.Request(self.url, headers=headers)
            self.source = urllib.request.urlopen(request, timeout=60)

            # a server that ignores ranges starts at byte 0 again: read up to `at`
            skip = 0 if self.source.status == 206 else self.at
            length = self.source.headers["Content-Length"]
            size = int(length) + self.at - skip if length else None
            while skip:
                passed = len(self.source.read(min(skip, 1 << 20)))
                if not passed:
                    break
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
        """The next bytes, at most as many as the buffer holds. OSError if the transfer breaks."""
        if self.source is None:
            self.start()
        source = self.source
        self.source = None  # stays None if this read fails: the next try opens the URL again
        data = source.read(len(buffer))
        if not data and self.at < (self.size or 0):
            raise OSError(f"the transfer ended at byte {self.at} of {self.size}")
        self.source = source
        return data

    def readinto(self, buffer):
        if self.url.startswith("pipe:"):
            if self.source is None:
                import webdataset  # needed for commands alone

                self.source = webdataset.gopen(self.url)
            data = self.source.read(len(buffer))
        else:
            data = with_retries(self.url, lambda: self.more(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self):
        if self.source is not None and not self.closed:
            self.source.close()  # OSError if a command failed
        super().close()


# --- recordings ---


class Rest:
    """The rest of a stream, with the block that was read before it. It has what tarfile needs of a
    file that it reads from front to back."""

    def __init__(self, block, source):
        self.block = block
        self.source = source

    def tell(self):
        return self.source.tell() - len(self.block)

    def read(self, size):
        data = self.block[:size]
        self.block = self.block[size:]
        return data + self.source.read(size - len(data))

    def seek(self, place):
        while self.tell() < place:
            if not self.read(min(place - self.tell(), 1 << 20)):
                break


def member_kind(name):
    """("KEY", "mp4") of KEY.mp4, and of KEY.MP4: cameras write their names in capitals."""
    stem, extension = os.path.splitext(name)
    return stem, extension[1:].lower()


def stream_members(source):
    """(key, "mp4" or "jsonl", bytes) of the members of a tar that belong to recordings. Where
    several archives follow one another, all are read; tarfile reads the first alone."""
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
    """(key, {extension: bytes}) of each recording of a shard that cannot be sought. At the end,
    whatever is wrong with the shard is raised (OSError, ValueError, tarfile.TarError). Keys keep
    their dots; other members are skipped."""
    source = Stream(url)
    waiting = {}  # members without their partner
    pairs = 0
    for stem, kind, data in stream_members(source):
        members = waiting.setdefault(stem, {})
        members[kind] = data
        if len(members) == 2:
            pairs += 1
            yield stem, waiting.pop(stem)

    # a command that is still writing would fail if its pipe were closed
    while source.read(1 << 20):
        pass
    source.close()  # raises OSError if the command failed
    if waiting or not pairs:
        where = f"for {', '.join(waiting)}" if waiting else "in it"
        raise ValueError(f"no mp4 and jsonl beside each other {where}")


def is_apple_double(name, head):
    """Whether a file is what macOS packs beside NAME as ._NAME: attributes, not a recording. head:
    its first bytes."""
    magic = head[:4] in (b"\0\5\x16\7", b"\0\5\x16\0")
    return os.path.basename(name).startswith("._") and magic


# --- clips ---


class StreamedClips(torch.utils.data.IterableDataset):
    """Endless clips from shards that cannot be sought: several clips of each recording, mixed by a
    small shuffle buffer.

    Shards are dealt to readers (ranks x workers). Where there are fewer shards than readers, each
    reader reads every shard and takes its share of the clips, so nothing is seen twice and no
    reader waits. The order depends on ranks and workers, and a resumed run starts a new epoch: copy
    the shards to local files for exact resume."""

    def __init__(
        self, urls, reader, seed=0, epoch=0, rank=0, world=1, clips_per_recording=8, shuffle=64
    ):
        self.urls = urls
        self.reader = reader
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world = world
        self.clips = clips_per_recording
        self.shuffle = shuffle

    def __iter__(self):
        # this reader's number among all
        worker = torch.utils.data.get_worker_info()
        units = self.world * (worker.num_workers if worker else 1)
        unit = self.rank + self.world * (worker.id if worker else 0)

        buffer = []
        room = self.shuffle
        # of the shards read since the last clip was given
        bad = []
        size = 0
        for epoch in itertools.count(self.epoch):
            rng = np.random.default_rng([self.seed, epoch, unit])
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.urls))
            urls = [self.urls[i] for i in order]
            shared = len(urls) < units
            seen = 0  # clips of all readers of the shards
            dealt = 0  # clips of this reader
            used = 0  # clips of this reader that could be cut
            for url in urls if shared else urls[unit::units]:
                try:
                    for key, members in stream_recordings(url):
                        size += sum(map(len, members.values()))
                        places = []
                        for i in range(self.clips):
                            if not shared or (seen + i) % units == unit:
                                places.append(i)
                        seen += self.clips
                        dealt += len(places)
                        try:
                            for clip in self.cut(key, members, places, rng):
                                used += 1
                                buffer.append(clip)
                                if len(buffer) >= room:
                                    chosen = buffer.pop(rng.integers(len(buffer)))
                                    yield chosen | {"bad": bad, "bytes": size}
                                    bad = []
                                    size = 0
                        except WrongDecoder:
                            raise
                        except READ_ERRORS as e:
                            if is_storage_error(e):
                                raise
                            bad.append((url, key, f"{type(e).__name__}: {e}"))
                except WrongDecoder as e:
                    raise ValueError(f"{url} {key}: {e}") from e
                except (*READ_ERRORS, tarfile.TarError) as e:
                    if is_storage_error(e):
                        raise ValueError(storage_sentence(url, e)) from e
                    bad.append((url, "", f"{type(e).__name__}: {e}"))

            # an epoch without a clip would repeat for ever
            if not used:
                is_spare = not bad and not dealt and unit >= self.world
                if is_spare:
                    return  # fewer clips than workers: this one is not needed
                if bad:
                    reason = bad[-1]
                elif dealt:
                    reason = "--gui drop leaves out everything"
                else:
                    reason = f"{seen} clips for {self.world} ranks"
                raise ValueError(f"no clip could be read from {urls[0]} and the others: {reason}")

            # with few clips, do not read everything many times over before the first batch
            room = min(room, len(buffer) + 1)

    def cut(self, key, members, places, rng):
        """The clips of a recording at these places, of self.clips equal parts of its starts."""
        f = io.BytesIO(members["mp4"])
        times = mp4_times(f)
        ticks = parse_ticks(members["jsonl"])
        starts = self.reader.starts(ticks, len(times), video_rate(f, times))
        for i in places:
            start = int((i + rng.random()) / self.clips * starts)
            clip = self.reader(f, times, ticks, start, rng, key)
            if clip is not None:
                yield clip
