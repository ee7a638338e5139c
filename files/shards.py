"""Shards of recordings: paths and patterns, slices of tar files, the index, copies of a recording,
and the lines of a recording."""

import concurrent.futures
import errno
import functools
import glob
import hashlib
import io
import json
import math
import operator
import os
import tarfile
from typing import NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand

from files.disk import (
    CACHE,
    READ_ERRORS,
    Npz,
    Unreachable,
    is_storage_error,
    read_cache,
    storage_sentence,
    write_cache,
)
from files.kinds import KINDS, kind_of
from files.progress import tqdm
from files.remote import Shard
from files.streams import is_apple_double, member_kind
from files.video import mp4_times, video_rate
from files.vpt import KEY_BIT, ClipReader, Ticks, name_warnings, parse_ticks, peek_rate

ANY_KEY = functools.reduce(operator.or_, KEY_BIT.values())
HEAD = 1 << 14  # bytes of lines that an index looks at

# --- paths and patterns ---


def is_stream(path):
    """True for what can only be read from front to back."""
    return (path.startswith("pipe:") or "://" in path) and not isinstance(path, Shard)


def stamp(path):
    """Size and time of a file. When they have changed, an index of the file is out of date."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def braces(pattern, escape):
    """A pattern -> the patterns that its {a,b} and {0..9} stand for. With escape, \\{ is a brace of
    the name."""
    if "{" not in pattern:
        return [pattern]
    try:
        return list(braceexpand(pattern, escape))
    except ValueError:  # a brace that is never closed is part of a name
        return [pattern]


def exists(path):
    """os.path.exists, but an error (OSError) where the disk fails or a folder on the way may not be
    entered: such a path is not a pattern that matches nothing."""
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

    A path that exists is taken as it is, whatever braces, brackets or backslashes are in its name.
    Likewise the longest folder that exists is taken as it is, and only the rest is a pattern.
    FileNotFoundError for a link to nothing."""
    if exists(pattern):
        return [(pattern, [pattern])]
    if os.path.islink(pattern):
        raise FileNotFoundError(
            f"{pattern} is a link to {os.readlink(pattern)}, which leads nowhere: fix the link"
        )
    folder, rest = os.path.split(pattern)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)

    # backslashes before braces escape them, or are part of the name, or the whole is a pattern
    readings = []
    for start, names, escape in ((folder, rest, True), (folder, rest, False), ("", pattern, True)):
        found = []
        for name in braces(names, escape):
            path = os.path.join(start, name)
            if exists(path):
                found.append((path, [path]))
            else:
                found.append((path, glob_or_raise(start, name)))
        if all(files for _, files in found):
            return found
        readings.append(found)
    return readings[0]


def glob_or_raise(folder, pattern):
    """Paths below FOLDER that match a pattern, sorted. ** stands for any number of folders, or
    none.

    glob.glob skips a folder that cannot be listed, and a part of the data would be missing without
    a message. Here that is an error (see list_folder)."""
    head, name = os.path.split(pattern)
    parents = [os.path.join(folder, head)]
    if glob.has_magic(head):
        parents = glob_or_raise(folder, head)
    paths = []
    for parent in parents:
        path = os.path.join(parent, name)
        if not glob.has_magic(name):
            paths += [path] if exists(path) else []
        elif exists(parent or os.curdir) and name == "**":
            paths += folders_below(parent)
        elif exists(parent or os.curdir):
            list_folder(parent or os.curdir)
            paths += glob.glob(os.path.join(glob.escape(parent), name))
    return sorted(paths)


def folders_below(folder):
    """Paths of a folder and all folders below it, without hidden ones. Links are followed, but each
    folder is given once, since one that is linked into itself has no end."""
    paths = []
    waiting = [folder]
    seen = set()
    while waiting:
        path = waiting.pop(0)
        about = os.stat(path or os.curdir)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        paths.append(path)
        for entry in list_folder(path or os.curdir):
            if entry.is_dir() and not entry.name.startswith("."):
                waiting.append(os.path.join(path, entry.name))
    return paths


def list_folder(path):
    """[os.DirEntry] of a path, by name; [] if it is no folder. A folder that this user may not list
    (lost+found, another user's) is printed; other errors of the disk are raised."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=operator.attrgetter("name"))
    except NotADirectoryError:
        return []
    except PermissionError as e:
        print(f"{path} cannot be listed ({e.strerror}): nothing in it is taken")
        return []


def files_below(folder):
    """Paths of all files below a folder. Links to folders are followed, but each folder is read
    once, since one that is linked into itself has no end. Files of the folder itself come before
    those that links lead to."""
    folders = [folder]
    links = []
    seen = set()
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
    it). Its recordings would be held out under one name and trained on under the other. The name
    that is no link stays."""
    kept = {}
    for path in paths:
        try:
            about = None if isinstance(path, Shard) or is_stream(path) else os.stat(path)
        except OSError:
            about = None
        if about is None or not about.st_ino:
            kept.setdefault(path, path)
            continue

        # size and time too: some network file systems give one number to several files
        identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        replaces_link = identity in kept and os.path.islink(kept[identity])
        if identity not in kept or (replaces_link and not os.path.islink(path)):
            kept[identity] = path
    return list(kept.values())


def expand(patterns):
    """Paths, globs, {a..b} ranges and URLs (or lists of lists of them) -> files, sorted within each
    pattern, each once. Raises FileNotFoundError that names the pattern without a match, and
    IsADirectoryError."""
    if isinstance(patterns, Shard):
        return [patterns]
    if not isinstance(patterns, str):
        return without_links([path for p in patterns for path in expand(p)])
    if is_stream(patterns):
        return braces(patterns, True)
    files = []
    for pattern, found in matches(patterns):
        if not found:
            raise FileNotFoundError(
                f"no shard matches {pattern}; make some with: python -m prepare.demo --out demo (or"
                " prepare.shards)"
            )
        folders = [p for p in found if os.path.isdir(p)]
        if folders:
            raise IsADirectoryError(
                f"{folders[0]} is a folder: name the shards in it, such as"
                f" {os.path.join(folders[0], '*.tar')}"
            )
        files += found
    return without_links(files)


# --- slices of a file ---


class Slice(io.RawIOBase):
    """A seekable read-only view of bytes offset..offset+size of a file or Shard: the member of a
    tar that a decoder needs, without the rest.

    pieces: for a sparse member, the (first byte, bytes) that lie in the file one after another from
    `offset` on; between them are zeros. Used as a context it raises the disk error that a decoder
    hid: FFmpeg takes such an error for the end of the file."""

    total = 0  # bytes that this process has read through all slices

    def __init__(self, path, offset, size, pieces=None):
        self.fd = path.open() if isinstance(path, Shard) else os.open(path, os.O_RDONLY)
        self.offset = offset
        self.size = size
        self.pieces = pieces
        self.at = 0
        self.bytes_read = 0
        self.failed = None

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
        """Fill the buffer: a reader of 16 bytes must not get 7 at the end of a piece."""
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
        if isinstance(self.fd, int):
            n = os.preadv(self.fd, [buffer], place)
        else:
            n = self.fd.preadv([buffer], place)
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


# --- records and their members ---


class Record(NamedTuple):
    """A recording in a shard: where its members are, its length, and the clock of its lines (see
    clock_of). Of a film (files/films.py) `shard` may be the video file itself, `rate` is its frames
    a second."""

    shard: str
    key: str
    members: dict  # extension -> (offset, size), of a sparse member with its pieces
    length: int = 0  # frames of video, or steps of features
    rate: float = 20.0  # lines a second
    frames_per_line: int = 1
    stretches: tuple = ()  # of a film: seconds of each part without a pause

    @property
    def is_features(self):
        """Whether it is features of encode.py, not video and lines."""
        return "safetensors" in self.members

    @property
    def is_film(self):
        """Whether it is plain video, without lines."""
        return "film" in self.members

    @property
    def lines(self):
        """Lines that have a frame of their own."""
        return self.length // self.frames_per_line

    @property
    def duration(self):
        """Twentieths of a second of play or film; steps of features."""
        if self.is_film:
            return 20 * sum(self.stretches)
        return self.length if self.is_features else self.lines * 20 / self.rate

    @property
    def recording(self):
        """The key without the @TICK that encode.py adds: one recording gives several members of
        features."""
        return self.key.rpartition("@")[0] if self.is_features else self.key

    @property
    def name(self):
        """Shard and recording: what scalers and checkpoints remember of it."""
        return f"{os.path.basename(self.shard)} {self.recording}"


def archive_members(path, end):
    """(TarInfo, offset of its bytes in the file) of each member of a tar of `end` bytes. Where
    several archives follow one another (cat, tar -A), all are read; tarfile reads the first alone.
    Raises tarfile.ReadError where the tar is cut or damaged."""
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
            while True:
                part = f.read(1 << 20)
                rest = part.lstrip(b"\0")
                zeros += len(part) - len(rest)
                if rest or not part:
                    break
        first += zeros // 512 * 512 if zeros < end - first else end - first


def member_place(m, offset, end):
    """(offset, size) for Slice to read a member, and the pieces of a sparse one (tar --sparse): its
    bytes do not lie in the file as they do in the member."""
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
    with Slice(path, *place) as f:
        return f.read(8)


def tar_flaw(path, error):
    """What is wrong with a tar that raised tarfile.TarError."""
    head = read_start(path, (0, 8))
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"compressed ({name}), and a clip must be sought: unpack it to a .tar"

    # what else it is; a Shard is a copy of a URL
    kind = "unknown" if isinstance(path, Shard) else kind_of(path)
    if kind == "film" and str(path).endswith(".tar"):
        return "plain video, and no tar: rename it"
    if kind in ("film", "latents", "robot", "lines", "parquet", "weights"):
        what, advice = KINDS[kind]
        return f"no tar but {what}: {advice.format(path=path)}"
    return f"truncated or damaged tar: {error}"


def shard_index(path):
    """Members of a tar -> ([Record], [(file, key, reason)] of what cannot be used). Reads headers
    only: 54 ms for 10 GB."""
    members_of = {}
    bad = []
    end = path.size if isinstance(path, Shard) else os.path.getsize(path)
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

            members = members_of.setdefault(stem, {})
            before = members.get(kind)
            if before and member_digest(path, before) != member_digest(path, place):
                bad.append((path, stem, f"{m.name} is twice in the tar: only the last is read"))
            members[kind] = place
    except tarfile.TarError as e:
        bad.append((path, "", tar_flaw(path, e)))

    # a recording is video and lines, or features
    records = []
    for key, members in members_of.items():
        if len(members) == 1 and "safetensors" not in members:
            missing = "mp4" if "jsonl" in members else "jsonl"
            bad.append((path, key, f"no {missing} beside it"))
        else:
            records.append(Record(path, key, members))
    if not members_of and not bad:
        bad.append((path, "", "no recording (KEY.mp4 + KEY.jsonl) in it"))
    return records, bad


# --- the same recording twice ---


def member_digest(path, place):
    """What distinguishes a member from others, without reading all of it: its size, and its first
    and last 64 kB. The tables of sizes and times of an mp4 are at one of its ends."""
    size = place[1]
    source = path.peek() if isinstance(path, Shard) and path.blocks is None else path
    with Slice(source, *place) as f:
        digest = hashlib.sha256(f.read(1 << 16))
        f.seek(max(size - (1 << 16), 0))
        digest.update(f.read())
    return size, digest.hexdigest()


def find_twins(records):
    """[Record] -> {number of a record: number of the first one that is the same recording}. These
    have the same key and the same bytes, in a copy of a shard. Only members of equal keys and sizes
    are compared; a key alone may be 000001 in every shard. A copy of a film may have any name."""
    groups = {}
    for number, r in enumerate(records):
        sizes = tuple(sorted((name, place[1]) for name, place in r.members.items()))
        name = "" if r.is_film else os.path.normpath(r.key)
        groups.setdefault((name, sizes), []).append(number)
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
    """[Record] without copies of recordings among them (a message says how many): one copy might be
    held out and the other trained on."""
    twins = find_twins(records)
    if twins and os.environ.get("RANK", "0") == "0":
        number, first = min(twins.items())
        print(
            f"{len(twins)} recordings are there more than once ({records[number].key} in"
            f" {records[first].shard} and {records[number].shard}): each is taken once"
        )
    return [r for number, r in enumerate(records) if number not in twins]


# --- the index ---


def clock_of(record, frames, frame_rate):
    """(lines a second, frames a line) of a recording: windows, epochs, shares and estimates follow
    from it. Reads the first lines, or all of them where these do not tell or where the video runs
    at another rate. What is wrong with the lines is found when a clip is read."""
    size = record.members["jsonl"][1]
    with Slice(record.shard, *record.members["jsonl"]) as f:
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
    indices and feature headers only; of shards at URLs once, then notes in the cache."""
    records = []
    bad = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        not_rank_0 = os.environ.get("RANK", "0") != "0"
        indexed = pool.map(index_shard, paths)
        bar = tqdm(indexed, desc="index", total=len(paths), delay=10, disable=not_rank_0)
        for records_of_shard, flaws in bar:
            records += records_of_shard
            bad += flaws

        # shards at URLs are measured already
        measured = list(pool.map(measure_or_explain, records))
    return [r for r, _ in measured if r], bad + [flaw for _, flaw in measured if flaw]


def index_shard(path):
    """shard_index; a shard at a URL also with the lengths, from the cache if they are there."""
    if not isinstance(path, Shard):
        return shard_index(path)
    rows, flaws = path.index(measured_index)
    records = [Record(path, *row[1:]) for row in rows]
    return records, [(path, *flaw[1:]) for flaw in flaws]


def measured_index(path):
    """shard_index with the lengths of the records, for the cache of a shard at a URL."""
    records, bad = shard_index(path)
    measured = [measure_or_explain(r) for r in records]
    return [r for r, _ in measured if r], bad + [flaw for _, flaw in measured if flaw]


def measure_or_explain(record):
    """(Record with its length and clock, None), or (None, (file, key, reason)) if it is damaged.
    OSError if the disk fails: to leave the recording out would be another run."""
    if record.length:
        return record, None
    try:
        return measure(record), None
    except Unreachable:
        raise
    except READ_ERRORS as e:
        if is_storage_error(e):
            raise OSError(storage_sentence(f"{record.shard} {record.key}", e)) from e
        return None, (record.shard, record.key, str(e))


def measure(record):
    """A Record with its length and clock. Raises READ_ERRORS for what is wrong with it."""
    if record.is_features:
        header, meta = feature_header(record)
        if meta.get("dataset") == "droid":
            raise ValueError("features of robot episodes: train_lora.py reads them")
        steps = header["z"][1][0]
        return record._replace(length=steps)
    with Slice(record.shard, *record.members["mp4"]) as f:
        times = mp4_times(f)
        frame_rate = video_rate(f, times)
    rate, frames_per_line = clock_of(record, len(times), frame_rate)
    return record._replace(length=len(times), rate=rate, frames_per_line=frames_per_line)


# --- lines ---


def read_ticks(record):
    """Ticks of a recording, parsed once and cached under NANOJEPA_CACHE (default
    ~/.cache/nanojepa): a clip must not read 15 MB of JSON."""
    shard = record.shard
    if isinstance(shard, Shard):
        name = f"{shard} {shard.size} {shard.version}"
    else:
        stat = os.stat(shard)
        name = f"{os.path.abspath(shard)} {stat.st_size} {stat.st_mtime_ns}"
    name += f" {tuple(record.members['jsonl'])} v4"
    path = os.path.join(CACHE, "ticks", hashlib.sha256(name.encode()).hexdigest()[:32])
    raw = read_cache(path)
    if raw is not None:
        with Npz(io.BytesIO(raw)) as z:
            return Ticks.of(z)

    with Slice(record.shard, *record.members["jsonl"]) as f:
        ticks = parse_ticks(f.read())
    buffer = io.BytesIO()
    np.savez(buffer, **ticks.arrays())
    write_cache(path, buffer.getvalue(), "parsed actions are")
    return ticks


def line_warnings(records, limit=32):
    """What is odd in the lines of recordings though they can be read, a sentence each.

    Looks at `limit` recordings, spread over all. Recordings at URLs are not looked at, since that
    would copy them (vpt.parse_ticks prints what it finds in them)."""
    local = [r for r in records if "jsonl" in r.members and not isinstance(r.shard, Shard)]
    looked = 0
    pressed = 0  # bits of all keys that are ever pressed
    unknown = {}  # name of a key -> lines
    other_rate = []  # (key, frames a second) of recordings without a clock of their own
    for record in spread(local, min(limit, len(local))):
        try:
            ticks = read_ticks(record)
            with Slice(record.shard, *record.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ratio = ClipReader().frames_per_line(ticks, len(times), frame_rate)
        except READ_ERRORS as e:
            if is_storage_error(e):
                raise
            continue  # it is left out, with its reason, when a clip of it is read
        looked += 1
        pressed |= int(np.bitwise_or.reduce(ticks.keys))
        for name, lines in ticks.unknown.items():
            unknown[name] = unknown.get(name, 0) + lines
        if frame_rate and not ticks.stamped and abs(frame_rate / ratio / ticks.rate - 1) > 0.2:
            other_rate.append((record.key, frame_rate))

    warnings = name_warnings(unknown)
    if other_rate:
        key, frame_rate = other_rate[0]
        warnings.append(
            f"{len(other_rate)} recordings, such as {key}, have a video of {frame_rate:.4g} frames"
            " a second and lines without timestamp, which are taken for 20 a second: add timestamps"
            " if that is wrong"
        )
    if looked and not pressed & ANY_KEY:
        warnings.append('no key is held on any line; keys are spelt like "key.keyboard.w"')
    where = f" (in {looked} of {len(records)} recordings)" if looked < len(records) else ""
    return [line + where for line in warnings]


def spread(items, count):
    """At most `count` of the items, uniformly over the list; all of them if count is None or 0."""
    if not count:
        return items
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[i] for i in np.unique(places)]


# --- headers of features ---

FEATURE_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
}


def feature_header(record):
    """({name: (dtype, shape, file offset)}, metadata and embed_dim) of a feature member: the
    safetensors format, with all sizes checked. ValueError if it is damaged."""
    offset, size = record.members["safetensors"]
    try:
        # eight bytes with the length of the header, then the header in JSON
        with Slice(record.shard, offset, size) as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            header = dict(json.loads(f.read(start - 8) if start <= min(size, 1 << 20) else b""))
        meta = dict(header.pop("__metadata__", {}))
        S, N, D = map(int, header["z"]["shape"])
        action_dim = 38
        state_dim = 2
        if meta.get("dataset") == "droid":
            action_dim = len(json.loads(meta["names"]))
            state_dim = int(meta["state_dim"])
        shapes = {"z": (S, N, D), "actions": (S - 1, action_dim), "states": (S, state_dim)}
        if header["z"]["dtype"] == "I8":
            shapes |= {"z_scale": (S, N, 1), "z_channels": (2, D)}

        # each tensor must fill its bytes and lie in the file
        tensors = {}
        whole = state_dim >= 0
        for name, shape in shapes.items():
            dtype = FEATURE_DTYPES[header[name]["dtype"]]
            first, last = map(int, header[name]["data_offsets"])
            tensors[name] = (dtype, shape, offset + start + first)
            size_fits = last == first + math.prod(shape) * dtype.itemsize
            whole = whole and 0 <= first <= last <= size - start and size_fits
            whole = whole and header[name].get("shape") == [*shape]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError("not a feature file (its header is damaged)") from e
    if not whole:
        raise ValueError("not a feature file, or cut")
    return tensors, meta | {"embed_dim": D}
