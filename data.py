"""Everything between a VPT or feature file and a batch: shards, the action scaler, the order of
clips, loaders.

    python -m data --inspect demo/train/shard-000000.tar      # shapes, ranges, mean and std of one batch

Local shards (tar files of KEY.mp4 + KEY.jsonl) are indexed, not streamed: the order of clips is a
pure function of (seed, epoch), dealt to ranks by index, so a run resumes exactly under any number
of workers, and a clip costs a seek instead of a 64 MB read. What cannot be sought (pipe:, http://,
s3://, gs://) is streamed, or copied into a local cache (files/remote.py). All end in the same
ClipReader."""

import argparse
import collections
import concurrent.futures
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import operator
import os
import signal
import sys
import tarfile
import threading
from typing import NamedTuple

import braceexpand
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import one_sentence, write_atomically
from files.remote import Shard, cached
from files.streams import (
    READ_ERRORS,
    StreamedClips,
    Unreachable,
    disk_failed,
    disk_sentence,
    is_apple_double,
    member_kind,
    persistently,
)
from files.vpt import (
    ACTION_SPACES,
    KEY_BIT,
    ClipReader,
    Ticks,
    WrongDecoder,
    mp4_times,
    name_warnings,
    parse_ticks,
    peek_rate,
    step_size,
    video_rate,
    wrap,
)

ANY_KEY = functools.reduce(operator.or_, KEY_BIT.values())
HEAD = 1 << 14  # bytes of lines that an index looks at
CACHE = os.path.expanduser(os.environ.get("NANOJEPA_CACHE", "~/.cache/nanojepa"))
FEATURE_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
}


# --- files ---


def is_stream(path):
    """True for what can only be read from front to back."""
    return (path.startswith("pipe:") or "://" in path) and not isinstance(path, Shard)


def stamp(path):
    """Size and time of a file: when they have changed, an index of it tells nothing."""
    return (stat := os.stat(path)).st_size, stat.st_mtime_ns


def braces(pattern, escape):
    """A pattern -> the patterns that its {a,b} and {0..9} stand for; escape: \\{ is a brace."""
    if "{" not in pattern:
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern, escape))
    except ValueError:  # a brace that is never closed is part of a name
        return [pattern]


def there(path):
    """os.path.exists, but where the disk fails, or a folder on the way may not be entered, that is
    an error: such a path is not a pattern that matches nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise
    return True


def matches(pattern):
    """Path, glob or {a..b} range -> [(pattern without braces, [path])].

    What exists under that very name is taken, whatever braces, brackets or backslashes are in it.
    So is the longest folder that exists: only what follows it is a pattern."""
    if there(pattern):
        return [(pattern, [pattern])]
    folder, rest = os.path.split(pattern)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)

    readings = []
    for start, names, escape in ((folder, rest, True), (folder, rest, False), ("", pattern, True)):
        found = []
        for name in braces(names, escape):
            path = os.path.join(start, name)
            if there(path):
                found.append((path, [path]))
            else:
                found.append((path, glob_or_raise(start, name)))
        if all(files for _, files in found):
            return found
        readings.append(found)
    return readings[0]


def glob_or_raise(folder, pattern):
    """Paths below FOLDER that match a pattern, sorted; ** stands for any number of folders, none
    among them. glob passes over a folder that cannot be listed, and a part of the data would be
    missing without a word: here that is an error."""
    head, name = os.path.split(pattern)
    parents = [os.path.join(folder, head)]
    if glob.has_magic(head):
        parents = glob_or_raise(folder, head)
    out = []
    for parent in parents:
        path = os.path.join(parent, name)
        if not glob.has_magic(name):
            out += [path] if there(path) else []
        elif there(parent or os.curdir) and name == "**":
            out += folders_below(parent)
        elif there(parent or os.curdir):
            list_folder(parent or os.curdir)
            out += glob.glob(os.path.join(glob.escape(parent), name))
    return sorted(out)


def folders_below(folder):
    """Paths of a folder and all folders below it, hidden ones left out, links followed, every folder
    once: one that is linked into itself has no end."""
    out, todo, seen = [], [folder], set()
    while todo:
        path = todo.pop(0)
        about = os.stat(path or os.curdir)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        out.append(path)
        for entry in list_folder(path or os.curdir):
            if entry.is_dir() and not entry.name.startswith("."):
                todo.append(os.path.join(path, entry.name))
    return out


def list_folder(path):
    """[os.DirEntry] by name of what may be a folder. One that this user may not list is said
    (lost+found, another user's); other errors of the disk are raised."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=operator.attrgetter("name"))
    except NotADirectoryError:
        return []
    except PermissionError as e:
        print(f"{path} cannot be listed ({e.strerror}): nothing in it is taken")
        return []


def files_below(folder):
    """Paths of all files below a folder, links to folders followed, but every folder once: one that
    is linked into itself has no end. What lies there itself comes before what links lead to."""
    folders, links, seen = [folder], [], set()
    while folders or links:
        path = folders.pop(0) if folders else links.pop(0)
        about = os.stat(path)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in list_folder(path):
            if entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                yield entry.path


def without_links(paths):
    """Paths less those that are another name of a file among them (a link, a hard link, ./ before
    it): its recordings would be held out under one name and trained on under the other. The name
    that is no link stays."""
    out = {}
    for path in paths:
        try:
            about = None if isinstance(path, Shard) or is_stream(path) else os.stat(path)
        except OSError:
            about = None
        if about is None or not about.st_ino:
            out.setdefault(path, path)
            continue
        # some network file systems give one number to several files
        same = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if same not in out or (os.path.islink(out[same]) and not os.path.islink(path)):
            out[same] = path
    return list(out.values())


def expand(patterns):
    """Paths, globs, {a..b} ranges and URLs (or lists of lists of them) -> files, sorted within each
    pattern, each once. Raises FileNotFoundError naming what matches nothing."""
    if isinstance(patterns, Shard):
        return [patterns]
    if not isinstance(patterns, str):
        return without_links([path for p in patterns for path in expand(p)])
    if is_stream(patterns):
        return braces(patterns, True)
    out = []
    for pattern, found in matches(patterns):
        if not found:
            raise FileNotFoundError(
                f"no shard matches {pattern}; make some with: python -m prepare.demo --out demo (or"
                " prepare.shards)"
            )
        if folders := [p for p in found if os.path.isdir(p)]:
            raise IsADirectoryError(
                f"{folders[0]} is a folder: name the shards in it, such as"
                f" {os.path.join(folders[0], '*.tar')}"
            )
        out += found
    return without_links(out)


class Slice(io.RawIOBase):
    """A seekable read-only view of bytes offset..offset+size of a file or Shard: what a decoder
    needs of a tar, without the rest.

    pieces: of a sparse member, the (first byte, bytes) that lie in the file one after another from
    `offset` on; between them are zeros. As a context it raises an error of the disk that a decoder
    kept to itself: FFmpeg takes it for the end of the file."""

    total = 0  # bytes that this process has read through all of them

    def __init__(self, path, offset, size, pieces=None):
        self.fd = path.open() if isinstance(path, Shard) else os.open(path, os.O_RDONLY)
        self.offset, self.size, self.at, self.bytes_read = offset, size, 0, 0
        self.pieces, self.failed = pieces, None

    def readable(self):
        return True

    seekable = readable

    def place(self):
        """(offset in the file or None for zeros, bytes) of what follows `at`."""
        left = max(self.size - self.at, 0)
        if self.pieces is None:
            return self.offset + self.at, left
        stored = self.offset
        for first, size in self.pieces:
            if self.at < first:
                return None, min(first - self.at, left)
            if self.at < first + size:
                return stored + self.at - first, min(first + size - self.at, left)
            stored += size
        return None, left

    def readinto(self, buffer):
        """As much as there is room for: what reads 16 bytes must not get 7 at the end of a piece."""
        left = memoryview(buffer)[: max(self.size - self.at, 0)]
        done = 0
        while len(left):
            place, size = self.place()
            try:
                n = self.read_at(place, left[:size])
            except OSError as e:
                self.failed = e
                raise
            if not n:
                break
            self.at += n
            done += n
            left = left[n:]
        return done

    def read_at(self, place, buffer):
        if place is None:
            buffer[:] = bytes(len(buffer))
            return len(buffer)
        read = functools.partial(os.preadv, self.fd) if isinstance(self.fd, int) else self.fd.preadv
        n = read([buffer], place)
        self.bytes_read += n
        Slice.total += n
        return n

    def readall(self):  # the default reads 8 KB at a time
        return self.read(max(self.size - self.at, 0))

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def close(self):
        if not self.closed and isinstance(self.fd, int):
            os.close(self.fd)
        super().close()

    def __exit__(self, kind, error, trace):
        self.close()
        if self.failed is not None and error is not self.failed:
            raise self.failed


class Record(NamedTuple):
    """A recording in a local shard: member offsets and sizes, its length (frames of video, or steps
    of features), and the clock of its lines (see clock_of)."""

    shard: str
    key: str
    members: dict  # extension -> (offset, size)
    length: int = 0
    rate: float = 20.0  # lines a second
    frames_per_line: int = 1

    @property
    def lines(self):
        """Lines that have a frame of their own."""
        return self.length // self.frames_per_line

    @property
    def duration(self):
        """Twentieths of a second of play; steps of features."""
        return self.length if "safetensors" in self.members else self.lines * 20 / self.rate

    @property
    def recording(self):
        """The key without the @TICK that encode.py adds: one recording gives several members of
        features."""
        return self.key.rpartition("@")[0] if "safetensors" in self.members else self.key

    @property
    def name(self):
        """Shard and recording: what scalers and checkpoints remember of it."""
        return f"{os.path.basename(self.shard)} {self.recording}"


def archive_members(path, end):
    """(TarInfo, offset of its bytes in the file) of each member of a tar of `end` bytes; of all
    archives where several were put one after another (cat, tar -A), of which tarfile reads the
    first alone. Raises tarfile.ReadError where it is cut or damaged."""
    first = 0
    while first < end:
        with Slice(path, first, end - first) as f:
            try:
                tar = tarfile.open(str(path), "r:", fileobj=f)
            except tarfile.ReadError as e:
                if not first:
                    raise
                raise tarfile.ReadError(
                    f"what follows the end of the tar at byte {first} is no tar ({e})"
                ) from e
            for m in tar:
                yield m, first + m.offset_data

            # tarfile takes a cut or damaged header for the end and says nothing
            f.seek(tar.offset)
            if f.read(512) != bytes(512):
                raise tarfile.ReadError(
                    f"no tar header and no end mark at byte {first + tar.offset}"
                )

            # zeros fill the last block of a tape; anything else is another archive
            zeros = f.at
            while part := f.read(1 << 20):
                text = part.lstrip(b"\0")
                zeros += len(part) - len(text)
                if text:
                    break
        first += zeros // 512 * 512 if zeros < end - first else end - first


def member_place(m, offset, end):
    """What Slice takes to read a member: its bytes from `offset` on, and their pieces where it is
    sparse (tar --sparse), since these do not lie in the file as they do in the member."""
    place = (offset, m.size)
    stored = m.size
    if m.issparse():
        pieces = tuple((start, size) for start, size in m.sparse if size)
        place = (offset, m.size, pieces)
        stored = sum(size for _, size in pieces)
    if offset + stored > end:
        raise tarfile.ReadError(f"the shard ends inside {m.name}")
    return place


COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}


def read_start(path, place):
    """The first bytes of a member."""
    offset, size, *pieces = place
    with Slice(path, offset, size, *pieces) as f:
        return f.read(8)


def shard_index(path):
    """Members of a tar -> ([Record], [(file, key, reason)] of what cannot be used). Reads headers
    only: 54 ms for 10 GB."""
    found, bad, end = {}, [], path.size if isinstance(path, Shard) else os.path.getsize(path)
    try:
        for m, offset in archive_members(path, end):
            stem, kind = member_kind(m.name)
            if kind not in ("mp4", "jsonl", "safetensors"):
                continue
            if m.islnk() or m.issym():
                reason = f"{m.name} is a link in the tar, to {m.linkname}: pack the file itself"
                bad.append((path, stem, reason))
                continue
            if not m.isfile():
                continue

            place = member_place(m, offset, end)
            if m.issparse() and kind == "safetensors":
                bad.append((path, stem, "a sparse member: pack it again without tar --sparse"))
                continue
            hidden = os.path.basename(m.name).startswith("._")
            if hidden and is_apple_double(m.name, read_start(path, place)):
                continue

            members = found.setdefault(stem, {})
            before = members.get(kind)
            if before and member_digest(path, before) != member_digest(path, place):
                bad.append((path, stem, f"{m.name} is twice in the tar: only the last is read"))
            members[kind] = place
    except tarfile.TarError as e:
        with Slice(path, 0, end) as f:
            head = f.read(8)
        packed = [name for magic, name in COMPRESSED.items() if head.startswith(magic)]
        reason = f"truncated or damaged tar: {e}"
        if packed:
            reason = f"compressed ({packed[0]}), and a clip must be sought: unpack it to a .tar"
        bad.append((path, "", reason))
    lone = {key: m for key, m in found.items() if len(m) == 1 and "safetensors" not in m}
    bad += [
        (path, key, "no " + ("mp4" if "jsonl" in m else "jsonl") + " beside it")
        for key, m in lone.items()
    ]
    if not found and not bad:
        bad.append((path, "", "no recording (KEY.mp4 + KEY.jsonl) in it"))
    return [Record(path, key, m) for key, m in found.items() if key not in lone], bad


# --- the same recording twice ---


def member_digest(path, place):
    """What tells a member from any other of its size, without reading it: its first and last 64
    kB. An mp4's tables of sizes and times are at one of its ends."""
    offset, size, *pieces = place
    source = path.peek() if isinstance(path, Shard) and path.blocks is None else path
    with Slice(source, offset, size, *pieces) as f:
        digest = hashlib.sha256(f.read(1 << 16))
        f.seek(max(size - (1 << 16), 0))
        digest.update(f.read())
    return size, digest.hexdigest()


def find_twins(records):
    """[Record] -> {number of a record: number of the first one that is the same recording}: the
    same key and the same bytes, in a copy of its shard. Only members of equal keys and sizes are
    looked into; keys alone may be 000001 in every shard."""
    groups = {}
    for number, r in enumerate(records):
        sizes = tuple(sorted((name, place[1]) for name, place in r.members.items()))
        groups.setdefault((os.path.normpath(r.key), sizes), []).append(number)
    twins = {}
    for numbers in groups.values():
        if len(numbers) == 1:
            continue
        firsts = {}
        for number in numbers:
            r = records[number]
            same = tuple(member_digest(r.shard, place) for _, place in sorted(r.members.items()))
            first = firsts.setdefault(same, number)
            if first != number:
                twins[number] = first
    return twins


def each_once(records):
    """[Record] less copies of recordings among them, which is said: else one copy is held out and
    the other trained on."""
    twins = find_twins(records)
    if twins and os.environ.get("RANK", "0") == "0":
        number, first = min(twins.items())
        print(
            f"{len(twins)} recordings are there more than once ({records[number].key} in"
            f" {records[first].shard} and {records[number].shard}): each is taken once"
        )
    return [r for number, r in enumerate(records) if number not in twins]


# --- indexed shards ---


def clock_of(record, frames, frame_rate):
    """(lines a second, frames a line) of a recording: windows, epochs, shares and estimates follow
    from it. Reads the first lines; all of them only where these do not tell, or where the video
    runs at another rate. What is wrong with the lines is found when a clip is read."""
    offset, size = record.members["jsonl"]
    with Slice(record.shard, offset, size) as f:
        rate = peek_rate(f.read(min(size, HEAD)), size <= HEAD)
    if rate and frame_rate and 2 / 3 < frame_rate / rate < 1.5:
        return rate, 1
    try:
        ticks = read_ticks(record)
        return ticks.rate, ClipReader().frames_per_line(ticks, frames, frame_rate)
    except ValueError:
        return 20.0, 1


def index_shards(paths, workers=16):
    """Shards -> ([Record] with their lengths, [(file, key, reason)]). Reads tar headers, mp4
    indices and feature headers only; of those at URLs once, then their notes in the cache."""

    def measure(r):
        try:
            if "safetensors" in r.members:
                header, meta = feature_header(r)
                if meta.get("dataset") == "droid":
                    raise ValueError("features of robot episodes: train_lora.py reads them")
                return r._replace(length=header["z"][1][0])
            with Slice(r.shard, *r.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            rate, frames_per_line = clock_of(r, len(times), frame_rate)
            return r._replace(length=len(times), rate=rate, frames_per_line=frames_per_line)
        except READ_ERRORS as e:
            if isinstance(e, Unreachable):
                raise
            if disk_failed(e):  # to leave the recording out would be another run
                raise OSError(disk_sentence(f"{r.shard} {r.key}", e)) from e
            return r.shard, r.key, str(e)

    def sorted_out(found, bad):
        return [r for r in found if isinstance(r, Record)], bad + [
            r for r in found if not isinstance(r, Record)
        ]

    def look(source):
        records, bad = shard_index(source)
        return sorted_out([measure(r) for r in records], bad)

    def index(path):
        if not isinstance(path, Shard):
            return shard_index(path)
        rows, bad = path.index(look)
        return [Record(path, *row[1:]) for row in rows], [(path, *flaw[1:]) for flaw in bad]

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        indexed = list(
            tqdm(
                pool.map(index, paths),
                desc="index",
                total=len(paths),
                delay=10,
                disable=os.environ.get("RANK", "0") != "0",
            )
        )
        found = list(
            pool.map(
                lambda r: r if r.length else measure(r),
                [r for records, _ in indexed for r in records],
            )
        )
    return sorted_out(found, [b for _, bad in indexed for b in bad])


def read_ticks(record):
    """Ticks of a recording, parsed once and cached under NANOJEPA_CACHE (default
    ~/.cache/nanojepa): a clip must not read 15 MB of JSON."""
    shard, stat = record.shard, None if isinstance(record.shard, Shard) else os.stat(record.shard)
    name = (
        f"{os.path.abspath(shard)} {stat.st_size} {stat.st_mtime_ns}"
        if stat
        else f"{shard} {shard.size} {shard.version}"
    )
    name += f" {tuple(record.members['jsonl'])} v4"
    path = os.path.join(CACHE, "ticks", hashlib.sha256(name.encode()).hexdigest()[:32])
    raw = read_cache(path)
    if raw is not None:
        with np.load(io.BytesIO(raw)) as z:
            return Ticks.of(z)
    with Slice(record.shard, *record.members["jsonl"]) as f:
        ticks = parse_ticks(f.read())
    buffer = io.BytesIO()
    np.savez(buffer, **ticks.arrays())
    write_cache(path, buffer.getvalue(), "parsed actions are")
    return ticks


def line_warnings(records, limit=32):
    """What is odd in the lines of recordings though they can be read, a sentence each. Looks at
    `limit` of them, spread over all; at URLs at none, which would copy them (vpt.parse_ticks
    says what it meets)."""
    local = [r for r in records if "jsonl" in r.members and not isinstance(r.shard, Shard)]
    looked, held, unknown, other_rate = 0, 0, {}, []
    for record in spread(local, min(limit, len(local))):
        try:
            ticks = read_ticks(record)
            with Slice(record.shard, *record.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ratio = ClipReader().frames_per_line(ticks, len(times), frame_rate)
        except READ_ERRORS as e:
            if disk_failed(e):
                raise
            continue  # left out, with its reason, when a clip of it is asked for
        looked += 1
        held |= int(np.bitwise_or.reduce(ticks.keys))
        for name, lines in ticks.unknown.items():
            unknown[name] = unknown.get(name, 0) + lines
        if frame_rate and not ticks.stamped and abs(frame_rate / ratio / ticks.rate - 1) > 0.2:
            other_rate.append((record.key, frame_rate))
    out = name_warnings(unknown)
    if other_rate:
        key, frame_rate = other_rate[0]
        out.append(
            f"{len(other_rate)} recordings, such as {key}, have a video of {frame_rate:.4g} frames a"
            " second and lines without timestamp, which are taken for 20 a second: add timestamps"
            " if that is wrong"
        )
    if looked and not held & ANY_KEY:
        out.append('no key is held on any line; keys are spelt like "key.keyboard.w"')
    where = f" (in {looked} of {len(records)} recordings)" if looked < len(records) else ""
    return [line + where for line in out]


def read_cache(path):
    """What write_cache put there; None where that is missing, damaged or not for this user to read:
    the recording is the truth, and a cache that cannot be used only costs time."""
    try:
        with open(path, "rb") as f:
            digest, raw = f.read(32), f.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        complain(path, f"a cache entry cannot be read: {e}")
        return None
    return raw if hashlib.sha256(raw).digest() == digest else None


def write_cache(path, raw, what):
    try:
        write_atomically(path, hashlib.sha256(raw).digest() + raw)
    except OSError as e:
        complain(path, f"{what} not cached: {e}")


def complain(path, text):
    """Says what is wrong with a cache, once a process of each folder and kind of complaint."""
    kind = (os.path.dirname(path), text[:12])
    if kind not in complained:
        complained.add(kind)
        print(f"{text} (set NANOJEPA_CACHE to a folder of yours with room)")


complained = set()


def feature_header(record):
    """({name: (dtype, shape, file offset)}, metadata and embed_dim) of a feature member: the
    safetensors format, all sizes checked."""
    offset, size = record.members["safetensors"]
    try:
        with Slice(record.shard, offset, size) as f:
            at = 8 + int.from_bytes(f.read(8), "little")
            header = dict(json.loads(f.read(at - 8) if at <= min(size, 1 << 20) else b""))
        meta, (S, N, D) = dict(header.pop("__metadata__", {})), map(int, header["z"]["shape"])
        A, dim = (
            (len(json.loads(meta["names"])), int(meta["state_dim"]))
            if meta.get("dataset") == "droid"
            else (38, 2)
        )
        shapes = {"z": (S, N, D), "actions": (S - 1, A), "states": (S, dim)}
        shapes |= (
            {"z_scale": (S, N, 1), "z_channels": (2, D)} if header["z"]["dtype"] == "I8" else {}
        )
        x = {
            k: (FEATURE_DTYPES[header[k]["dtype"]], s, *map(int, header[k]["data_offsets"]))
            for k, s in shapes.items()
        }
        bad = [
            k
            for k, (dtype, s, a, b) in x.items()
            if not 0 <= a <= b == a + math.prod(s) * dtype.itemsize <= size - at
        ]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError("not a feature file (its header is damaged)") from e
    if bad or dim < 0 or any([*s] != header[k].get("shape") for k, s in shapes.items()):
        raise ValueError("not a feature file, or cut")
    return {
        k: (dtype, shape, offset + at + begin) for k, (dtype, shape, begin, _) in x.items()
    }, meta | {"embed_dim": D}


def feature_settings(records):
    """How the shards of feature records were made (the metadata encode.py writes, and embed_dim),
    but for what tells of one robot episode. ValueError if shards disagree."""
    out = None
    for r in {r.shard: r for r in records}.values():
        if "safetensors" not in r.members:
            raise ValueError(
                f"{r.shard} holds video, other shards of this run hold features: pass one kind"
            )
        found = feature_header(
            r._replace(shard=r.shard.peek()) if isinstance(r.shard, Shard) else r
        )[1]
        found.pop("episode", None)
        if found != (out := out or found):
            raise ValueError(
                f"{r.shard} was encoded with other settings than {records[0].shard}: {found} and"
                f" {out}"
            )
    return out


def feature_rows(record, first, last, motion_only=False):
    """Steps first..last of a feature member, no others: z (S, N, D) bfloat16 (float32 of int8;
    None, unread, with motion_only), actions (S-1, A), states (S, state_dim): of VPT A is 38 and
    state_dim 2."""
    x = {}
    for name, (dtype, shape, at) in feature_header(record)[0].items():
        if motion_only and name not in ("actions", "states"):
            continue
        start, stop = {"actions": (first, last - 1), "z_channels": (0, 2)}.get(name, (first, last))
        row = math.prod(shape[1:])
        with Slice(
            record.shard, at + start * row * dtype.itemsize, (stop - start) * row * dtype.itemsize
        ) as f:
            x[name] = torch.frombuffer(
                bytearray(f.read()), dtype=dtype, count=(stop - start) * row
            ).reshape(-1, *shape[1:])
    if "z_scale" in x:
        x["z"] = (x["z"] * x["z_scale"].float()).mul_(x["z_channels"][1]).add_(x["z_channels"][0])
    return x.get("z"), x["actions"], x["states"]


class Clips(torch.utils.data.Dataset):
    """Map-style dataset over indexed recordings. An item is (epoch, index, record number, place):
    place in [0, 1) is a share of the recording's valid starts, an int the number of a window (see
    windows). A clip that cannot be read is replaced by the next draw of that index, at most 20
    times (never the same again), and reported in "bad" as (file, key, reason). An error of the disk
    or the network says nothing about the recording: it is tried again, then the run ends."""

    def __init__(self, records, shares, reader, seed=0):
        self.records, self.reader, self.seed = records, reader, seed
        self.stamps = {
            path: stamp(path) for path in {r.shard for r in records} if os.path.exists(path)
        }
        self.cumulative = np.cumsum(np.asarray(shares, dtype=np.float64))
        self.opened = {}  # a plain dict, since macOS starts workers by pickling

    def _open(self, number):
        if number not in self.opened:
            r = self.records[number]
            with Slice(r.shard, *r.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ticks = read_ticks(r)
            if len(self.opened) == 256:
                self.opened.popitem()
            starts = self.reader.starts(ticks, len(times), frame_rate)
            self.opened[number] = times, ticks, starts
        return self.opened[number]

    def locate(self, u):
        """u in [0, 1) -> (record number, place in [0, 1)): the recordings laid end to end, each as
        long as its share."""
        at = u * self.cumulative[-1]
        number = min(int(np.searchsorted(self.cumulative, at, side="right")), len(self.records) - 1)
        left = self.cumulative[number - 1] if number else 0.0
        return number, min((at - left) / (self.cumulative[number] - left), 1 - 1e-12)

    def windows_in(self, record):
        """Non-overlapping clips on the step grid of a recording. One at a rate that --fps does not
        divide counts as one, so that its window is read and its fault reported."""
        if "safetensors" in record.members:
            return record.length // (self.reader.frames // self.reader.frames_per_step)
        try:
            stride = step_size(record.rate, self.reader.fps)
        except ValueError:
            return 1
        return (record.lines - 1 + stride) // (self.reader.frames * stride)

    def read(self, number, place, rng):
        r = self.records[number]
        if "safetensors" in r.members:
            steps = self.reader.frames // self.reader.frames_per_step
            starts = r.length - steps + 1
            if starts < 1:
                raise ValueError(f"too short: {r.length} steps of features, a clip needs {steps}")
            start = int(place * starts) if isinstance(place, float) else place * steps
            z, actions, states = feature_rows(r, start, start + steps)
            names, actions, states = ACTION_SPACES[38], actions.numpy(), states.double().numpy()
            if self.reader.gui == "drop" and actions[:, names.index("gui_open")].any():
                return None
            actions = actions[:, [names.index(n) for n in ACTION_SPACES[self.reader.action_space]]]
            states = np.stack([wrap(states[:, 0] - states[0, 0]), states[:, 1]], axis=1)
            if self.reader.scaler is not None:
                actions = self.reader.scaler.transform(actions)
            actions[:, :4] += self.reader.noise * rng.standard_normal(actions[:, :4].shape)
            return {
                "z": z,
                "actions": torch.from_numpy(np.float32(actions)),
                "states": torch.from_numpy(np.float32(states)),
                "key": r.key,
            }
        times, ticks, starts = self._open(number)
        start = (
            int(place * starts)
            if isinstance(place, float)
            else place * self.reader.frames * step_size(ticks.rate, self.reader.fps)
        )
        if start >= starts:
            raise ValueError(
                f"window {place} starts at tick {start}, the last clip at {starts - 1}"
            )
        with Slice(r.shard, *r.members["mp4"]) as f:
            return self.reader(f, times, ticks, start, rng, r.key)

    def read_seeded(self, number, place, seed, located):
        """read with a generator of its own, from which `locate` may have drawn before: a second try
        after a fault of the disk gives the same clip."""
        rng = np.random.default_rng(seed)
        if located:
            rng.random()
        return self.read(number, place, rng)

    def __getitem__(self, item):
        epoch, index, number, place = item
        bad, before = [], Slice.total
        for attempt in range(20):
            seed = [self.seed, epoch, index, attempt]
            if attempt:
                number, place = self.locate(np.random.default_rng(seed).random())
            r = self.records[number]
            if os.path.exists(r.shard) and stamp(r.shard) != self.stamps.get(
                r.shard
            ):  # it would be read at the places of the old one
                raise ValueError(
                    f"{r.shard} has changed since this run opened it: put the old one back, or"
                    " start anew on what it is"
                )
            again = functools.partial(self.read_seeded, number, place, seed, attempt > 0)
            try:
                clip = persistently(f"{r.shard} {r.key}", again)
                if clip is not None:
                    return clip | {"bad": bad, "bytes": Slice.total - before}
            except Unreachable as e:  # says nothing about the recording
                raise ValueError(str(e)) from e
            except WrongDecoder as e:
                raise ValueError(f"{r.shard} {r.key}: {e}") from e
            except READ_ERRORS as e:
                bad.append((r.shard, r.key, f"{type(e).__name__}: {e}"))
        reason = bad[-1][2] if bad else "--gui drop leaves out nearly everything"
        raise ValueError(f"20 clips in a row cannot be used, the last from {r.shard}: {reason}")


class Order(torch.utils.data.Sampler):
    """Endless batches of items from batch `itr` of `epoch` on: clips spread evenly over the
    timeline of all recordings, in random order, a pure function of (seed, epoch) and the number of
    clips an epoch has; rank r takes the r-th part of each global batch."""

    def __init__(self, dataset, batch_size, batches_per_epoch, epoch=0, itr=0, rank=0, world=1):
        self.dataset, self.batch_size, self.batches = dataset, batch_size, batches_per_epoch
        self.epoch, self.itr, self.rank, self.world = epoch, itr, rank, world

    def __iter__(self):
        n = self.batches * self.batch_size * self.world
        for epoch in itertools.count(self.epoch):
            rng = np.random.default_rng([self.dataset.seed, epoch])
            u = (rng.permutation(n) + rng.random(n)) / n
            for batch in range(self.itr if epoch == self.epoch else 0, self.batches):
                first = (batch * self.world + self.rank) * self.batch_size
                yield [
                    (epoch, i, *self.dataset.locate(u[i]))
                    for i in range(first, first + self.batch_size)
                ]


def windows(dataset, batch_size, limit, rank=0, world=1, seed=0):
    """Batches of items for validation: non-overlapping windows on the step grid, at most `limit`,
    spread over all recordings; the batches do not depend on the number of ranks that share them;
    with a batch_size above 1 none has a single clip unless there is only one."""
    counts = [dataset.windows_in(record) for record in dataset.records]
    every = [(number, k) for number, count in enumerate(counts) for k in range(count)]
    chosen = np.random.default_rng(seed).permutation(len(every))[:limit]
    items = [(0, i, *every[j]) for i, j in enumerate(chosen)]
    parts = -(-len(items) // batch_size) if batch_size != 2 else len(items) // 2
    batches = np.array_split(np.arange(len(items)), max(parts, 1))
    return [[items[i] for i in b] for b in batches if len(b)][rank::world]


def check_fraction(val_fraction):
    """ValueError for what is no share: nan and -0.1 would hold out nothing, 1.5 all but one."""
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"--val_fraction {val_fraction:g} is no share of the recordings: give 0 (hold out none)"
            " or more, below 1"
        )


def split_records(records, val_fraction):
    """(train, val): the last shards are held out; recordings chosen by a hash of their key where
    there are fewer than ten shards, or where a key of the last ones is in others too (another copy
    of the same play). Never windows, and no key on both sides."""
    check_fraction(val_fraction)
    shards = [r.shard for r in records]
    keys = [r.recording for r in records]  # feature members of one recording (KEY@START) together
    names = sorted(set(shards), reverse=True)
    group = shards
    if len(names) >= 10 and val_fraction > 0:
        held = set(names[: held_count(names, val_fraction)])
        held_keys = {key for key, shard in zip(keys, shards) if shard in held}
        if any(key in held_keys for key, shard in zip(keys, shards) if shard not in held):
            group = keys
    if len(names) < 10:
        group = keys
    if group is keys:
        names = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if val_fraction > 0 and len(names) == 1 and len(set(shards)) > 1:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"WARNING: --val_fraction holds out none of {len(records)} recordings: all have the"
                f" key {names[0]}, and no key is on both sides; give them other names, or name"
                " held-out shards (--val_data)"
            )
    if val_fraction <= 0 or len(names) < 2:
        return records, []
    held = set(names[: held_count(names, val_fraction)])
    train = [r for r, g in zip(records, group) if g not in held]
    val = [r for r, g in zip(records, group) if g in held]
    return train, val


def held_count(names, val_fraction):
    """How many of the shards or recordings are held out: one at least, and one is left."""
    return min(max(round(len(names) * val_fraction), 1), len(names) - 1)


# --- loaders ---


def leave_signals(worker):
    """A loader process must not die of a SIGTERM or Ctrl-C to everybody (scancel, timeout, a
    terminal): the run needs its clips to finish the step and save. A SIGTERM of its parent it
    obeys: so are loader processes ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS

        def obey():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def collate(clips):
    """Clips -> a batch: tensors stacked, keys and bad clips listed, "bytes" read for them summed
    up."""
    out = {
        k: torch.stack([c[k] for c in clips])
        for k in clips[0]
        if isinstance(clips[0][k], torch.Tensor)
    }
    lists = {"key": [c["key"] for c in clips], "bad": [b for c in clips for b in c["bad"]]}
    return out | lists | {"bytes": sum(c.get("bytes", 0) for c in clips)}


def open_records(data):
    """Shards -> ([Record], [(file, key, reason)] of what cannot be used). Raises ValueError if
    nothing can."""
    if streams := [p for p in expand(data) if is_stream(p)]:
        raise ValueError(f"{streams[0]} cannot be sought, which is needed here: copy it to a file")
    records, bad = index_shards(expand(data))
    if not records:
        raise ValueError(
            f"no usable recording in {data}: {'; '.join(f'{b[0]} {b[1]} {b[2]}' for b in bad[:3])}"
        )
    return each_once(records), bad


def spread(items, count):
    """At most `count` of the items, uniformly over the list."""
    return (
        [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]
        if count
        else items
    )


def open_lines(data, max_shards, val_fraction):
    """--data, for who needs JSONL members only -> ([Record or URL], [(file, key, reason)] that
    cannot be read). Reads tar headers. Splits before it thins out, so that nothing held out is used
    whatever max_shards is; below ten shards the split counts recordings, so videos that cannot be
    read must be known."""
    paths, records, bad = expand([p for group in data for p in group]), [], []
    if streams := [p for p in paths if is_stream(p)]:
        if len(streams) < len(paths) or val_fraction:
            raise ValueError(
                f"{streams[0]} cannot be sought: it goes neither with local shards nor with"
                " --val_fraction; copy it to a file"
            )
        return spread(streams, max_shards), []
    wanted = set(paths if val_fraction else spread(paths, max_shards))
    for group in data:
        files = [p for p in expand(group) if p in wanted]
        if val_fraction and len(files) < 10:
            indexed = [index_shards(files)]
        else:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                indexed = list(pool.map(shard_index, files))
        found = each_once([r for more, _ in indexed for r in more])
        bad += [b for _, more in indexed for b in more]
        bad += [
            (r.shard, r.key, "features; fit on the recordings they were made from")
            for r in found
            if "jsonl" not in r.members
        ]
        records += split_records([r for r in found if "jsonl" in r.members], val_fraction)[0]
    keep = set(spread(sorted({r.shard for r in records}), max_shards))
    return [r for r in records if r.shard in keep], bad


def twins_between(records, others):
    """Those of the others that are among the records too: of the same shard, of a link to it, or
    of a copy."""
    twins = find_twins(records + others)
    return [others[n - len(records)] for n, first in twins.items() if first < len(records) <= n]


def refuse_shared(sources):
    """The [Record] of each --data must be others: each --data is split by itself, so that one might
    hold out what the other trains on (ValueError)."""
    before = []
    for number, records in enumerate(sources):
        shared = twins_between(before, records)
        if shared:
            raise ValueError(
                f"--data number {number + 1} and an earlier one share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: name each once; --data_weights"
                " says how often it is taken"
            )
        before = before + records


def open_split(data, data_weights=None, val_data=None, val_fraction=0.0, max_bad_fraction=1.0):
    """--data as given ([[pattern, ...], ...], or simpler) and --val_data, or a val_fraction of each
    --data -> (train [Record], [share of the clips], val [Record], [bad]). Shares follow length and
    data_weights; train is empty for streams, which their loader opens. Raises ValueError when train
    and val share a recording, a --data gives none to train on, or too many are bad."""
    groups = [data] if isinstance(data, str) else data
    if data_weights and len(data_weights) != len(groups):
        raise ValueError(f"--data_weights has {len(data_weights)} numbers for {len(groups)} --data")
    for weight in data_weights or ():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"--data_weights {weight:g} is no share of the clips: give numbers above 0, and"
                " leave out a --data that is not to be trained on"
            )
    train, shares, val, bad, sources = [], [], [], [], []
    for i, group in enumerate([] if any(map(is_stream, expand(data))) else groups):
        records, more = open_records(group)
        kept, held = split_records(records, 0 if val_data else val_fraction)
        total = sum(r.duration for r in kept)
        shares += [r.duration * (data_weights[i] / total if data_weights else 1.0) for r in kept]
        train, val, bad = train + kept, val + held, bad + more
        sources.append(records)
    refuse_shared(sources)
    if val_data:
        val, more = open_records(val_data)
        bad = bad + more
        shared = twins_between(train, val)
        if shared:
            raise ValueError(
                f"--val_data and --data share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: hold them out of --data"
            )
    if len(bad) > max_bad_fraction * (n := len(train) + len(val) + len(bad)) and n >= 100:
        worst = " ".join(bad[0])
        raise ValueError(
            f"{len(bad)} of {n} recordings cannot be read, {worst} among them: mend them, or raise"
            " --max_bad_fraction"
        )
    return train, shares, val, bad


def vpt_loader(
    data,
    batch_size,
    *,
    reader=None,
    data_weights=None,
    batches_per_epoch=None,
    num_workers=4,
    seed=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    pin_memory=False,
    cache_dir=None,
    cache_size=100.0,
):
    """Endless DataLoader over VPT (or feature) shards: batches {"video" (B, T·frames_per_step, 3,
    H, W) uint8, "actions" (B, T-1, A), "states" (B, T, 2), "key", "bad", "bytes"} (features: "z"
    (B, T, N, D) in place of video). data: patterns, or (records, shares) of open_split; with
    cache_dir, URLs among the patterns are copied there, at most cache_size GB. reader: a
    ClipReader, default ClipReader(). Without batches_per_epoch an epoch is one pass of
    non-overlapping clips. loader.bad lists recordings left out while indexing."""
    reader = reader or ClipReader()
    if cache_dir:
        data = cached(
            [expand(group) for group in ([data] if isinstance(data, str) else data)],
            cache_dir,
            cache_size,
        )
    options = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": collate,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": leave_signals,
    }
    urls = [] if isinstance(data, tuple) else expand(data)
    if any(map(is_stream, urls)):
        if data_weights or not all(map(is_stream, urls)):
            raise ValueError(
                "streamed shards cannot be mixed with local ones or weighted; copy them to local"
                " files first"
            )
        bad, options = [], options | {"batch_size": batch_size, "drop_last": True}
        dataset = StreamedClips(urls, reader, seed, epoch, rank, world)
    else:
        records, shares, _, bad = (
            (*data, [], []) if isinstance(data, tuple) else open_split(data, data_weights)
        )
        dataset = Clips(records, shares, reader, seed)
        if batches_per_epoch is None:
            steps, ticks = reader.frames // reader.frames_per_step, reader.frames * 20 / reader.fps
            clips = sum(
                r.duration / (steps if "safetensors" in r.members else ticks) for r in records
            )
            batches_per_epoch = max(int(clips) // (batch_size * world), 1)
        options["batch_sampler"] = Order(
            dataset, batch_size, batches_per_epoch, epoch, itr, rank, world
        )
    loader = torch.utils.data.DataLoader(dataset, **options)
    loader.bad = bad
    return loader


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="look into a shard: shapes, ranges, mean and std of one batch",
        allow_abbrev=False,
    )
    parser.add_argument("--inspect", metavar="SHARD", required=True, help="a shard, glob or URL")
    parser.add_argument(
        "--action_space", type=int, default=13, choices=ACTION_SPACES, help="which actions to show"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="clips to read")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    loader = vpt_loader(
        args.inspect,
        args.batch_size,
        num_workers=0,
        reader=ClipReader(action_space=args.action_space),
    )
    records = getattr(loader.dataset, "records", [])
    for line in line_warnings(records, 64):
        print(f"WARNING: {line}")
    clocks = collections.Counter((r.rate, r.frames_per_line) for r in records if "mp4" in r.members)
    for (rate, frames_per_line), count in clocks.most_common(4):
        print(
            f"clock    {count} recording{'s' if count > 1 else ''} of {rate:.4g} lines a second,"
            f" {frames_per_line} frame{'s' if frames_per_line > 1 else ''} a line"
        )
    batch = next(iter(loader))
    for file, key, reason in loader.bad + batch["bad"]:
        print(f"left out: {file} {key}: {reason}")
    for name in [k for k in ("video", "z", "actions", "states") if k in batch]:
        x = batch[name].float()
        print(
            f"{name:8} {str(tuple(x.shape)):24} {str(batch[name].dtype)[6:]:8} from {x.min():.3f}"
            f" to {x.max():.3f}"
        )
    print(f"keys     {', '.join(batch['key'][:4])}")
    print(f"{'action':18} {'min':>9} {'max':>9} {'mean':>9} {'std':>9}")
    for name, x in zip(ACTION_SPACES[args.action_space], batch["actions"].flatten(0, 1).T):
        print(f"{name:18} {x.min():9.3f} {x.max():9.3f} {x.mean():9.3f} {x.std():9.3f}")
