"""Plain video: recordings without any lines. Where they are (files, folders, tars), how long they
are, and clips of them by time.

A film is a Record (files/shards.py) whose only member is "film". It needs no JSONL; one that lies
beside it is not looked at, so a shard of play gives films too. Any container and codec that FFmpeg
opens will do, and any frame rate, also one that varies: frames are chosen by their time stamps."""

import collections
import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

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
from files.kinds import KINDS as KINDS_OF_FILES
from files.kinds import kind_of
from files.progress import tqdm
from files.remote import Shard
from files.shards import (
    COMPRESSED,
    Record,
    Slice,
    archive_members,
    braces,
    files_below,
    is_stream,
    matches,
    member_place,
    read_start,
    tar_flaw,
    without_links,
)
from files.streams import is_apple_double, member_kind
from files.video import film_times, read_frames, steady_interval
from files.vpt import ClipReader

KINDS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
PAUSE = 2.0  # seconds without a new frame that end a stretch of film
COSTLY = 8 << 20  # bytes read for frame times, from which on they are kept in the cache


# --- paths ---


def film_paths(patterns):
    """Paths, folders, globs, {a..b} ranges and URLs (or lists of lists of them) -> files, each
    once.

    A folder is searched with all folders below it, without hidden ones, for videos (KINDS) and
    tars; how many other files it has is printed. A file that is named, or that a glob matches, is
    taken whatever its name. Raises FileNotFoundError that names the pattern without a match."""
    if isinstance(patterns, Shard):
        return [patterns]
    if not isinstance(patterns, str):
        return without_links([path for p in patterns for path in film_paths(p)])
    if is_stream(patterns):
        return braces(patterns, True)
    files = []
    for pattern, found in matches(patterns):
        if not found:
            raise FileNotFoundError(
                f"no video matches {pattern}: name video files, tars of them, or a folder"
            )
        for path in found:
            files += films_below(path) if os.path.isdir(path) else [path]
    return without_links(files)


def films_below(folder):
    """Sorted paths of the videos and tars in a folder and those below it, without hidden ones.
    Raises FileNotFoundError if there are none."""
    paths = []
    others = collections.Counter()
    for path in files_below(folder):
        parts = os.path.relpath(path, folder).split(os.sep)
        if any(part.startswith(".") for part in parts):
            continue
        kind = member_kind(path)[1]
        if kind in (*KINDS, "tar"):
            paths.append(path)
        else:
            others[f".{kind}" if kind else "no ending"] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no video in it or below it (files that end in .{', .'.join(KINDS)} or .tar;"
            f" there are {kinds or 'no files'})"
        )
    if others and os.environ.get("RANK", "0") == "0":
        print(
            f"{folder}: {len(paths)} videos and tars are taken, files of other kinds are not"
            f" ({kinds})"
        )
    return sorted(paths)


# --- index ---


def key_of(path):
    """The name of a loose film: its folder and its file name without the ending. It does not depend
    on how the path was spelt or on what else there is, so a split stays as it is."""
    folder, name = os.path.split(str(path) if isinstance(path, Shard) else os.path.abspath(path))
    return f"{os.path.basename(folder)}/{member_kind(name)[0]}"


def is_tar(path):
    """Whether a path or URL names a tar. What follows a ? in a URL may be a signature."""
    name = path.split("?")[0] if isinstance(path, Shard) else path
    return member_kind(name)[1] == "tar"


def film_index(path):
    """A video file, or a tar of them -> ([Record], [(file, key, reason)] of what cannot be used).
    Of a tar the headers are read, of a file what says of which kind it is. No frame is read."""
    key = key_of(path)
    if os.path.islink(path) and not os.path.exists(path):
        return [], [(path, key, f"a link to {os.readlink(path)}, which is not there")]
    size = path.size if isinstance(path, Shard) else os.path.getsize(path)
    if is_tar(path):
        return tar_index(path, size)
    if not size:
        return [], [(path, key, "the video has zero bytes")]

    # FFmpeg takes the pictures in a TFRecord for a film
    kind = "film" if isinstance(path, Shard) else kind_of(path)
    if kind in ("latents", "robot", "parquet", "weights"):
        what, advice = KINDS_OF_FILES[kind]
        return [], [(path, key, f"no video but {what}: {advice.format(path=path)}")]
    if is_apple_double(path, read_start(path, (0, 8))):
        return [], []
    return [Record(path, key, {"film": (0, size)})], []


def tar_index(path, end):
    """film_index of a tar of `end` bytes."""
    records = []
    bad = []
    names = collections.Counter()
    try:
        for m, offset in archive_members(path, end):
            stem, kind = member_kind(m.name)
            if kind not in KINDS:
                names[f".{kind}"] += 1
                continue
            if m.islnk() or m.issym():
                reason = f"{m.name} is a link in the tar, to {m.linkname}: pack the file itself"
                bad.append((path, stem, reason))
                continue
            if not m.isfile():
                continue
            place = member_place(m, offset, end)
            hidden = os.path.basename(m.name).startswith("._")
            if hidden and is_apple_double(m.name, read_start(path, place)):
                continue
            if not m.size:
                bad.append((path, stem, "the video has zero bytes"))
                continue
            records.append(Record(path, stem, {"film": place}))
    except tarfile.TarError as e:
        bad.append((path, "", tar_flaw(path, e)))
    if not records and not bad:
        kinds = ", ".join(kind for kind, _ in names.most_common(4)) or "nothing"
        bad.append((path, "", f"no video in it (.{', .'.join(KINDS)}), only {kinds}"))
    return records, bad


def index_films(paths, workers=16):
    """Video files and tars of them -> ([Record] with their lengths, [(file, key, reason)]).

    Reads the tables of an mp4. Other containers have no table of all frames and are read once from
    end to end. All lengths are kept under NANOJEPA_CACHE (default ~/.cache/nanojepa), one file for
    each folder or tar, until a video changes. Ranks begin at different places, so that together
    they read everything about once."""
    records = []
    bad = []
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    with ThreadPoolExecutor(workers) as pool:
        for records_of_file, flaws in pool.map(film_index, paths):
            records += records_of_file
            bad += flaws

        notes = Notes(records)
        measured = [notes.find(record) for record in records]
        begin = rank * len(records) // world
        numbers = [*range(begin, len(records)), *range(begin)]
        unread = [number for number in numbers if measured[number] is None]
        jobs = pool.map(measure_or_explain, [records[number] for number in unread])
        bar = tqdm(jobs, desc="index", total=len(unread), delay=10, disable=rank != 0)
        flaws = {}
        for number, (record, flaw) in zip(unread, bar):
            if flaw:
                flaws[number] = flaw
            else:
                measured[number] = record
                notes.add(record)
    notes.write()
    bad += [flaws[number] for number in sorted(flaws)]
    return [record for record in measured if record is not None], bad


def identity(record):
    """What tells a film from every other one, and from itself after a change."""
    place = tuple(record.members["film"])
    if isinstance(record.shard, Shard):
        return f"{record.shard} {record.shard.size} {record.shard.version} {place}"
    stat = os.stat(record.shard)
    name = os.path.basename(record.shard)
    return f"{name} {stat.st_size} {stat.st_mtime_ns} {place}"


def cache_path(*names):
    """Where something is kept about what these names tell from others."""
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:32]
    return os.path.join(CACHE, "films", digest)


class Notes:
    """Lengths of films in the cache: one file for each folder or tar, JSON of {identity: [length,
    rate, stretches]}."""

    def __init__(self, records):
        self.rows = {}
        self.changed = set()
        for folder in {self.folder(r) for r in records}:
            raw = read_cache(cache_path("index v1", folder))
            self.rows[folder] = {} if raw is None else json.loads(raw)

    def folder(self, record):
        """The folder of a loose film, or its tar."""
        if isinstance(record.shard, Shard) or is_tar(record.shard):
            return os.path.abspath(record.shard)
        return os.path.dirname(os.path.abspath(record.shard))

    def find(self, record):
        """The record with its length; None if nothing is noted of it."""
        row = self.rows[self.folder(record)].get(identity(record))
        if row is None:
            return None
        return record._replace(length=row[0], rate=row[1], stretches=tuple(row[2]))

    def add(self, record):
        row = [record.length, record.rate, record.stretches]
        self.rows[self.folder(record)][identity(record)] = row
        self.changed.add(self.folder(record))

    def write(self):
        for folder in self.changed:
            raw = json.dumps(self.rows[folder]).encode()
            write_cache(cache_path("index v1", folder), raw, "lengths of videos are")


def measure_or_explain(record):
    """(Record with its length, None), or (None, (file, key, reason)) if it is no video or damaged.
    OSError if the disk fails: to leave the film out would be another run."""
    try:
        clock = read_clock(record)
    except Unreachable:
        raise
    except READ_ERRORS as e:
        if is_storage_error(e):
            raise OSError(storage_sentence(f"{record.shard} {record.key}", e)) from e
        return None, (record.shard, record.key, flaw_of(record, e))
    stretches = tuple(float(last - first) for first, last in clock.stretches())
    record = record._replace(length=len(clock.times), rate=clock.rate, stretches=stretches)
    return record, None


def flaw_of(record, error):
    """Why a file cannot be used as video."""
    head = read_start(record.shard, record.members["film"])
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"no video but compressed ({name}): unpack it"
    if "Invalid data found" in str(error):
        return f"no video, or damaged ({error})"
    return str(error)


# --- time ---


class Clock(NamedTuple):
    """When the frames of a film are shown: times (frames,) int64 in units of `unit` seconds,
    increasing; rate: frames a second, pauses left out, or 0 with fewer than two frames."""

    times: np.ndarray
    unit: float
    rate: float

    @property
    def interval(self):
        """Seconds from one frame to the next."""
        return 1 / self.rate

    def stretches(self):
        """[(first second, last second + interval)] of the parts without a pause. A pause is a frame
        that stays for longer than PAUSE, or than four others."""
        if not self.rate:
            return []
        seconds = self.times * self.unit
        pauses = np.flatnonzero(np.diff(seconds) > max(PAUSE, 4 * self.interval))
        firsts = seconds[np.concatenate([[0], pauses + 1])]
        lasts = seconds[np.concatenate([pauses, [len(seconds) - 1]])]
        return list(zip(firsts, lasts + self.interval))

    def shown(self, seconds):
        """Numbers of the frames that are shown at some times. Stamps are often rounded, so the next
        frame counts where it is nearer and at most half an interval ahead."""
        ticks = np.asarray(seconds) / self.unit
        following = np.searchsorted(self.times, ticks, side="right")
        following = np.clip(following, 1, len(self.times) - 1)
        ahead = self.times[following] - ticks
        nearer = ahead < ticks - self.times[following - 1]
        return np.where(nearer & (ahead <= self.interval / 2 / self.unit), following, following - 1)


def read_clock(record):
    """The Clock of a film. Where that takes more than a look into a table it is kept in the
    cache."""
    place = record.members["film"]
    path = cache_path("clock v1", os.path.abspath(record.shard), identity(record))
    raw = read_cache(path) if place[1] > COSTLY else None
    if raw is not None:
        with Npz(io.BytesIO(raw)) as z:
            return Clock(z["times"], float(z["unit"]), float(z["rate"]))

    with Slice(record.shard, *place) as f:
        times, unit = film_times(f)
        bytes_read = f.bytes_read
    rate = 0.0
    if len(times) > 1:
        rate = 1 / (float(steady_interval(np.arange(len(times)), times)) * unit)
    clock = Clock(times, unit, rate)
    if bytes_read > COSTLY:
        buffer = io.BytesIO()
        np.savez(buffer, times=times, unit=unit, rate=rate)
        write_cache(path, buffer.getvalue(), "frame times of videos are")
    return clock


# --- one clip ---


class FilmReader(ClipReader):
    """Cuts clips out of plain video: the frames of a ClipReader, without actions and states.

    A clip is a dict: video (frames_per_clip, 3, crop, crop) uint8, key. Its frames are those that
    are shown every 1/fps seconds, whatever the frame rate of the film, so at any fps that is not
    above it. A clip never goes over a pause of the film.

    Augmentations, off at their defaults, are those of ClipReader: horizontal_flip,
    random_resize_scale, motion_shift. Raises ValueError if the settings do not fit together."""

    def __init__(
        self,
        frames_per_clip=16,
        fps=5.0,
        frames_per_step=2,
        crop_size=256,
        horizontal_flip=False,
        random_resize_scale=1.0,
        motion_shift=0.0,
    ):
        super().__init__(
            frames_per_clip,
            fps,
            frames_per_step,
            crop_size,
            horizontal_flip=horizontal_flip,
            random_resize_scale=random_resize_scale,
            motion_shift=motion_shift,
        )
        self.seconds = (frames_per_clip - 1) / fps  # from the first frame to the last

    def flaw(self, record):
        """Why no clip can be cut out of a film with its length, other than that it is too short;
        '' if nothing is wrong."""
        if record.rate < 0.98 * self.fps and record.rate:
            return (
                f"{record.rate:.4g} frames a second: --fps {self.fps:g} would show frames twice,"
                f" take at most {record.rate:.4g}"
            )
        return ""

    def is_too_short(self, record):
        """Whether no stretch of a film is as long as a clip."""
        return not any(self.room(seconds, 1 / record.rate) for seconds in record.stretches)

    def room(self, seconds, interval):
        """For how many seconds of a stretch that long a clip may start; 0 if it is too short."""
        room = seconds - self.seconds
        return room if room > interval / 2 else 0.0

    def windows(self, record):
        """How many clips the stretches of a film have that do not overlap."""
        count = 0
        for seconds in record.stretches:
            count += self.windows_in(seconds, 1 / record.rate)
        return count

    def windows_in(self, seconds, interval):
        """The same of one stretch that many seconds long."""
        return int((seconds - interval / 2 + 1 / self.fps) * self.fps / self.frames)

    def start(self, clock, place):
        """The second at which a clip starts. place: a share of all possible starts, or the number
        of a window. Raises ValueError if there is none."""
        stretches = clock.stretches()
        if not isinstance(place, float):
            before = 0
            for first, last in stretches:
                count = self.windows_in(last - first, clock.interval)
                if place < before + count:
                    return first + (place - before) * self.frames / self.fps
                before += count
            raise ValueError(f"window {place} of a film that has {before}")

        rooms = [self.room(last - first, clock.interval) for first, last in stretches]
        position = place * sum(rooms)
        for (first, _), room in zip(stretches, rooms):
            if position < room:
                # the frame that is shown then; 1e-6 undoes the rounding of the sums
                return first + position + 1e-6 * clock.interval
            position -= room
        raise ValueError(f"too short: no {self.seconds:.3g} s without a pause, as a clip needs")

    def __call__(self, f, clock, place, rng, key):
        """A clip of an open film. place: see start; rng: for the augmentations only."""
        start = self.start(clock, place)
        if isinstance(place, float):
            number = np.searchsorted(clock.times * clock.unit, start, side="right") - 1
            start = clock.times[max(number, 0)] * clock.unit
        wanted = clock.shown(start + np.arange(self.frames) / self.fps)

        # frames, larger than the crop if it is to move or to show less
        scale = rng.uniform(self.resize, 1.0) if self.resize < 1 else 1.0
        short_side = round(self.crop / scale * (1 + self.shift))
        video = read_frames(f, clock.times, wanted, short_side)
        video = self.cropped(video, scale, rng)
        if self.flip and rng.random() < 0.5:
            video = video[:, :, ::-1]
        return {
            "video": torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2))),
            "key": key,
        }
