"""What a robot's episode is in files: RLDS TFRecords as DROID released them (without TensorFlow),
raw DROID, and a form for one's own. files/lerobot.py reads LeRobot data sets.

An episode has rows ("steps") at `rate` Hz, and a picture of each camera a step.

A TFRecord is its length (u64), the checksum of those 8 bytes, the data, the data's checksum. The
data is protobuf: Example{1: Features{1: entry{1: name, 2: Feature{1: BytesList, 2: FloatList or
3: Int64List}} ...}}, each list {1: value ...} with its numbers packed into one. The heads of some
30 features tell where everything is. After that only a few kB of numbers and the JPEGs of a clip
are read."""

import collections
import hashlib
import io
import os
import re
import struct
import zipfile
from typing import NamedTuple

import fsspec
import h5py
import numpy as np
import orjson
from google_crc32c import value as crc32c
from PIL import Image

from files.disk import (
    CACHE,
    DAMAGE,
    Npz,
    Unreachable,
    is_storage_error,
    read_cache,
    storage_sentence,
    with_retries,
    write_cache,
)
from files.features import index_tar
from files.latents import check_stored
from files.shards import Slice, files_below, list_folder
from files.video import mp4_times, open_video, read_frames

CAMERAS = {
    "exterior_1": "exterior_image_1_left",
    "exterior_2": "exterior_image_2_left",
    "wrist": "wrist_image_left",
}
# Meta's loader takes left
RAW_CAMERAS = {
    "exterior_1": "ext1",
    "exterior_2": "ext2",
    "wrist": "wrist",
    "left": "left",
    "right": "right",
}
STATES = {
    "rlds": ["observation/cartesian_position", "observation/gripper_position"],
    "raw": [
        "observation/robot_state/cartesian_position",
        "observation/robot_state/gripper_position",
    ],
    "robot": ["cartesian_position", "gripper_position"],
    "lerobot": ["observation.state.cartesian_position", "observation.state.gripper_position"],
}
# DROID's cameras as LeRobot data sets call them
LEROBOT_CAMERAS = {
    "exterior_1_left": "exterior_1",
    "exterior_2_left": "exterior_2",
    "wrist_left": "wrist",
    "exterior_image_1_left": "exterior_1",
    "exterior_image_2_left": "exterior_2",
    "wrist_image_left": "wrist",
}
VELOCITY = {
    "rlds": "action_dict/joint_velocity",
    "raw": "action/joint_velocity",
    "robot": "joint_velocity",
    "lerobot": "action.joint_velocity",
}
# how far a pose may drift while "nothing moves": more than sensors make up, less than one sees.
# range: of a number without a known unit, as a share of its range
DRIFT = {"m": 0.002, "rad": 0.01, "closed": 0.05, "range": 0.005}
POSE_UNITS = ["m"] * 3 + ["rad"] * 3
# what shows that an arm moves, and the units of its numbers
PLACES = {
    "rlds": {
        "observation/cartesian_position": POSE_UNITS,
        "observation/gripper_position": ["closed"],
        "observation/joint_position": ["rad"],
    },
    "raw": {
        "observation/robot_state/cartesian_position": POSE_UNITS,
        "observation/robot_state/gripper_position": ["closed"],
        "observation/robot_state/joint_positions": ["rad"],
    },
    "robot": {
        "cartesian_position": POSE_UNITS,
        "gripper_position": ["closed"],
        "joint_position": ["rad"],
    },
    "lerobot": {
        "observation.state.cartesian_position": POSE_UNITS,
        "observation.state.gripper_position": ["closed"],
        "observation.state.joint_position": ["rad"],
    },
}
# the first bytes of a TFRecord that was written with compression, or of an archive
COMPRESSED = {
    b"\x1f\x8b": "GZIP",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "ZIP",
}
KINDS = {0x0A: "bytes", 0x12: "floats", 0x1A: "integers"}  # of the list in a Feature, by its tag


class Episode(NamedTuple):
    """A stretch of an episode (a Record to data.py): all of it, or one of the ranges that the
    idle filter keeps."""

    shard: str  # the file that holds it
    # RLDS: recording_folderpath--file_path, as in openpi's list of ranges; features: KEY@CAMERA-ROW
    key: str
    kind: str  # rlds, raw, robot, lerobot or features
    # RLDS: camera -> (offset, size, sizes of its JPEGs or None), other feature -> (offset, size,
    # one of KINDS); features: of a Record; LeRobot: camera -> ("video", mp4, ...), ("image",
    # column) or ("missing", mp4); else camera -> file
    members: dict
    steps: int  # of the whole episode
    rate: float  # steps a second
    first: int
    last: int  # the step after the stretch
    # of the stretch, as data.windows counts: in ticks of 1/20 s as --fps samples it, of features in
    # steps
    length: int
    # equal for two copies of an episode, different for others; "": not known
    identity: str = ""
    place: tuple = ()  # LeRobot: (folder of the data set, first row in its data file)

    @property
    def is_features(self):
        return "safetensors" in self.members

    @property
    def recording(self):
        """Name of the episode; several members of features are of one."""
        return self.key.rpartition("@")[0] if self.kind == "features" else self.key

    @property
    def source(self):
        """Name of the file that it was recorded in."""
        name = os.path.basename(self.shard)
        return name.removesuffix(".tar").rpartition("--")[2] if self.kind == "features" else name

    @property
    def name(self):
        return f"{self.source} {self.recording}"


# --- bytes ---


def filesystem(url):
    """URL or path -> (fsspec filesystem, path in it). Google's public bucket needs no account."""
    options = {"token": "anon"} if re.match("gc?s://gresearch/", url) else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as e:
        raise ValueError(
            f"{url} cannot be read: {e} (pip install gcsfs for gs://, s3fs for s3://,"
            " huggingface_hub for hf://), or copy it to a disk"
        ) from e


def fetch(path, ranges):
    """[(offset, size)] of a file or of a URL (all at once) -> buffers.

    What does not come is an error of the disk or the server (Unreachable, OSError with an errno). A
    file that is too short is an error of the file (ValueError)."""
    if "://" in path:
        return fetch_url(path, ranges)
    # the file is not mapped: where a disk fails a mapped page ends the process
    with open(path, "rb", buffering=0) as f:
        end = os.fstat(f.fileno()).st_size
        for at, size in ranges:
            if at + size > end:
                raise ValueError(f"{size} bytes at {at} are past the end of the file, at {end}")
        return [read_range(f, at, size) for at, size in ranges]


def fetch_url(url, ranges):
    """`fetch` of a URL."""
    fs, name = filesystem(url)  # fsspec caches them, and makes new ones after a fork
    firsts = [at for at, _ in ranges]
    ends = [at + size for at, size in ranges]

    def ask():
        parts = fs.cat_ranges([name] * len(ranges), firsts, ends, on_error="return")
        for part, (at, size) in zip(parts, ranges):
            if isinstance(part, Exception):
                raise part
            if len(part) > size:
                raise Unreachable(
                    f"{url} cannot be read: {len(part)} bytes came, {size} were asked for at"
                    f" {at}: the server does not serve ranges, so copy it to a disk"
                )
            if len(part) < size:
                raise OSError(f"only {len(part)} of the {size} bytes at {at} came")
        return parts

    return with_retries(url, ask)


def read_range(f, at, size):
    """`size` bytes at `at` of an open file; a read may give fewer than it was asked for."""
    data = b""
    while len(data) < size:
        part = os.pread(f.fileno(), size - len(data), at + len(data))
        if not part:
            raise ValueError(f"the file ends at byte {at + len(data)}, inside a value")
        data = data + part if data else part
    return memoryview(data)


def ahead(path, end):
    """A function (offset, size) -> bytes of a file of `end` bytes, cut at its end. It reads 64 kB
    at a time, since an index is made of little pieces."""
    first = 0
    buffer = b""

    def read(at, size):
        nonlocal first, buffer
        size = max(min(size, end - at), 0)
        if not first <= at <= at + size <= first + len(buffer):
            first = at
            buffer = b""
            if size:
                wanted = min(max(size, 1 << 16), end - at)
                buffer = fetch(path, [(at, wanted)])[0]
        return buffer[at - first : at - first + size]

    return read


def masked_crc(data):
    """The checksum of TFRecord: CRC-32C, rotated, plus a constant."""
    crc = crc32c(bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def compression(head):
    """The first bytes of a file -> what it is compressed with, or ''."""
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return name
    is_zlib = head[0] & 0x0F == 8 and (head[0] << 8 | head[1]) % 31 == 0
    return "ZLIB" if is_zlib else ""


def records(read, end, check):
    """A TFRecord file of `end` bytes -> (offset, size, flaw or "") of each record's data; check:
    look at the checksums of the data, which reads it all. Raises ValueError where the rest cannot
    be read."""
    at = 0
    while at < end:
        head = bytes(read(at, 12))
        size, crc = struct.unpack("<QI", head.ljust(12, b"\0"))
        packed = compression(head) if at == 0 and len(head) == 12 else ""
        if packed and masked_crc(head[:8]) != crc:
            raise ValueError(
                f"compressed with {packed}, so not a TFRecord as it is: in a compressed file no"
                " record can be found without reading all before it; unpack it first"
            )
        if len(head) == 12 and masked_crc(head[:8]) != crc:
            raise ValueError(
                f"the length at byte {at} has a wrong checksum: not a TFRecord, or damaged; what"
                " follows is lost"
            )
        if at + 16 + size > end:
            raise ValueError(
                f"the file ends inside the record at byte {at}: truncated, or not a TFRecord"
            )
        body = read(at + 12, size + 4) if check else None
        wrong = check and masked_crc(body[:-4]) != struct.unpack("<I", body[-4:])[0]
        yield at + 12, size, "wrong checksum: its bytes have changed" if wrong else ""
        at += 16 + size


def varint(b, i):
    """Protobuf's integer at b[i] -> (value, index after it)."""
    value = 0
    shift = 0
    while b[i] > 127:
        value |= (b[i] & 127) << shift
        shift += 7
        i += 1
    return value | b[i] << shift, i + 1


def features(read, at, size):
    """The Example of `size` bytes at `at` -> {name: (offset, size, one of KINDS) of its list}.
    read(offset, size) is asked for the heads of features only. ValueError if there is something
    else."""
    found = {}
    last = "none"
    end = at + size
    try:
        # Example{1: Features}, to the end of the record
        b = read(at, min(11, size))
        size, i = varint(b, 1)
        good = b[0] == 0x0A and at + i + size == end
        at += i

        while good and at < end:
            # entry{1: name
            b = read(at, min(320, end - at))
            size, i = varint(b, 1)
            after = at + i + size
            size, start = varint(b, i + 1)
            i = start + size
            name = bytes(b[start:i]).decode()
            # 2: Feature{one of KINDS: list}}
            size, value = varint(b, i + 1)
            good = b[0] == 0x0A and b[i] == 0x12 and after <= end and at + value + size == after
            kind = "bytes"
            if size:
                kind = KINDS.get(b[value], "")
                size, value = varint(b, value + 1)
            good = good and kind != ""
            found[name] = (at + value, size, kind)
            last = name
            at = after
    except (IndexError, UnicodeDecodeError):
        good = False
    if not good:
        raise ValueError(f"not a tf.train.Example after feature {last}")
    return found


def values(raw):
    """A BytesList -> [(offset, size)] of its values."""
    out = []
    i = 0
    try:
        while i < len(raw) and raw[i] == 0x0A:
            size, i = varint(raw, i + 1)
            out.append((i, size))
            i += size
    except IndexError:
        i = -1
    if i != len(raw):
        raise ValueError("a list of bytes is damaged")
    return out


def places(sizes):
    """Sizes of the values of a BytesList -> [(offset, size)], what `values` gives without the
    bytes."""
    sizes = np.asarray(sizes, dtype=np.int64)
    # a head is a tag and the size, seven bits a byte
    heads = 2 + (sizes[:, None] >= [1 << 7, 1 << 14, 1 << 21, 1 << 28]).sum(1)
    offsets = np.cumsum(heads + sizes) - sizes
    return list(zip(offsets.tolist(), sizes.tolist()))


def numbers(raw):
    """A FloatList -> float32 array. Numbers are packed into one value, or have a tag each."""
    if len(raw) and raw[0] == 0x0D:
        rows = np.frombuffer(raw, np.uint8)
        if len(rows) % 5 or (rows[::5] != 0x0D).any():
            raise ValueError("a list of floats is damaged")
        return rows.reshape(-1, 5)[:, 1:].copy().view("<f4")[:, 0]
    try:
        size, i = varint(raw, 1) if len(raw) else (0, 0)
    except IndexError:
        size, i = -1, 0
    if i + size != len(raw) or size % 4 or (len(raw) and raw[0] != 0x0A):
        raise ValueError("a list of floats is damaged, or holds something else")
    return np.frombuffer(raw[i:], "<f4")


def integers(raw):
    """An Int64List -> int64 array. Numbers are packed into one value, or have a tag each."""
    data = np.frombuffer(raw, np.uint8)
    if len(data) and data[0] == 0x0A:
        try:
            size, i = varint(raw, 1)
        except IndexError:
            size, i = -1, 0
        if i + size != len(data):
            raise ValueError("a list of integers is damaged")
        data = data[i:]
        tagged = False
    else:
        tagged = len(data) > 0
    if len(data) == 0:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(data < 128)
    if tagged:
        # a tag is a byte of its own, so it is every second of the varints
        tags, ends = ends[::2], ends[1::2]
        starts = tags + 1
        if len(tags) != len(ends) or (data[tags] != 0x08).any():
            raise ValueError("a list of integers is damaged")
    else:
        starts = np.concatenate([[0], ends[:-1] + 1])
    if not len(ends) or ends[-1] != len(data) - 1 or (ends - starts).max() > 9:
        raise ValueError("a list of integers is damaged")
    out = np.zeros(len(ends), np.uint64)
    for k in range(int((ends - starts).max()) + 1):
        inside = starts + k <= ends
        part = data[(starts + k)[inside]].astype(np.uint64) & np.uint64(127)
        out[inside] |= part << np.uint64(7 * k)
    return out.view(np.int64)


def field_rows(raw, kind, steps, name):
    """The list of a TFRecord's field -> (steps, d) float64. ValueError, with the field's name, for
    what is not d numbers a step."""
    if kind not in ("floats", "integers"):
        raise ValueError(f"steps/{name} holds {kind} (text or pictures), not numbers")
    try:
        x = numbers(raw) if kind == "floats" else integers(raw)
    except ValueError as e:
        raise ValueError(f"steps/{name}: {e}") from e
    if steps < 1 or x.size == 0 or x.size % steps:
        raise ValueError(f"steps/{name} holds {x.size} numbers, and the episode has {steps} steps")
    return x.astype(np.float64).reshape(steps, -1)


def array_rows(x, steps, name):
    """An array of an npz or HDF5 file -> (steps, d) float64. ValueError, with its name, for what is
    not numbers for each of these steps."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} is a group of fields: name one of them")
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype}, not numbers")
    if x.ndim == 0 or x.shape[0] != steps:
        rows = f"{x.shape[0]} rows" if x.ndim else "a single number"
        raise ValueError(f"{name} has {rows}, and the episode {steps}")
    return np.asarray(x[:], dtype=np.float64).reshape(steps, -1)


def truth(value, name):
    """Success as a file writes it, in any spelling -> bool. ValueError for anything else."""
    x = np.asarray(value)
    word = x.reshape(-1)[0] if x.size == 1 else None
    if isinstance(word, bytes):
        word = word.decode(errors="replace")
    if isinstance(word, str):
        known = {"true": True, "yes": True, "success": True, "1": True, "1.0": True}
        known |= {"false": False, "no": False, "failure": False, "fail": False, "0": False}
        word = (known | {"0.0": False, "failed": False}).get(word.strip().lower())
    if word is None or word not in (0, 1):
        raise ValueError(f"{name} is {value!r}: true or false, 1 or 0 is expected")
    return bool(word)


def path_success(text):
    """Whether the path that an episode was recorded at says success, as DROID's paths do."""
    named = re.search(r"(?:^|/)(success|failure)(?:/|$)", text)
    if named:
        return named[1] == "success"
    return re.search(r"(?<![a-z])(?<!no[_-])(?<!not[_-])success", text) is not None


def camera_name(feature):
    """The feature of a camera in a LeRobot data set -> the short name that --camera takes."""
    name = feature
    for start in ("observation.images.", "observation."):
        name = name.removeprefix(start)
    return LEROBOT_CAMERAS.get(name, name)


# --- the index ---


def idle_runs(velocity):
    """Joint velocities (steps, joints) -> [[start, end)] of idle steps: no joint's command is 1e-3
    off that of the step before (openpi)."""
    same = (np.abs(velocity[1:] - velocity[:-1]) < 1e-3).all(1)  # steps 1, 2, ...
    idle = np.zeros(len(same) + 3, dtype=bool)
    idle[2:-1] = same
    return np.flatnonzero(idle[1:] != idle[:-1]).reshape(-1, 2).tolist()


def still_runs(velocity, places):
    """Joint velocities (steps, joints), [(positions (steps, d), their units)] -> [[start, end)] of
    those idle steps in which nothing moves either: a constant command moves the arm. Where no
    position is known, the command must be zero."""
    runs = idle_runs(velocity)
    if not runs:
        return []

    # the columns that must not move, and how far each may drift
    columns = []
    limits = []
    for x, units in places:
        units = units if len(units) == x.shape[1] else units[:1] * x.shape[1]
        angles = [unit == "rad" for unit in units]
        if any(angles):
            x = x.copy()
            x[:, angles] = np.unwrap(x[:, angles], axis=0)
        columns.append(x)
        limits += [DRIFT[unit] for unit in units]
    if columns:
        where = np.concatenate(columns, axis=1)
        limits = np.array(limits)
    else:
        where = np.abs(velocity)
        limits = np.full(velocity.shape[1], 1e-3)
        where[where >= 1e-3] = np.nan

    # a row that is far from the one before ends a run, whatever came earlier
    near = np.zeros(len(where), dtype=bool)
    near[1:] = (np.abs(np.diff(where, axis=0)) <= limits).all(1)

    out = []
    for first, last in runs:
        # step t leads from row t - 1 to row t, so a run of steps covers one row more
        edges = np.diff(near[first:last].astype(int), prepend=0, append=0)
        starts = first + np.flatnonzero(edges == 1)
        ends = first + np.flatnonzero(edges == -1)
        for start, end in zip(starts.tolist(), ends.tolist()):
            while start < end:
                moved = first_moved(where, start, end, limits)
                if moved > start:
                    out.append([start, moved])
                start = moved + 1
    return out


def first_moved(where, start, end, limits):
    """The first of the steps start..end at which positions (rows, d) have drifted further than
    their limits since row start - 1; `end` if none has."""
    low = high = where[start - 1]
    for at in range(start, end, 64):
        rows = where[at : min(at + 64, end)]
        lows = np.minimum(np.minimum.accumulate(rows), low)
        highs = np.maximum(np.maximum.accumulate(rows), high)
        still = (highs - lows <= limits).all(1)  # never where a number is missing
        if not still.all():
            return at + int(still.argmin())
        low = lows[-1]
        high = highs[-1]
    return end


def stillness(velocity, places):
    """The "idle" and "still" runs of an episode, None where it has no joint velocities."""
    if velocity is None:
        return {"idle": None, "still": None}
    return {"idle": idle_runs(velocity), "still": still_runs(velocity, places)}


def index_rlds(path, end, deep):
    """A TFRecord shard of `end` bytes -> ([episode], [bad]). deep: check every checksum and note
    the sizes of JPEGs, which reads it all."""
    read = ahead(path, end)
    episodes = []
    bad = []
    try:
        for start, size, flaw in records(read, end, deep):
            place = f"@{start - 12}"
            key = os.path.basename(path) + place
            try:
                if flaw:
                    raise ValueError(flaw)
                found = features(read, start, size)
                texts = recorded_at(read, found)
                if any(texts):
                    key = "--".join(texts)
                entry = {"key": key, "place": place} | rlds_entry(read, found, texts, deep)
                # read last: the next record begins there
                checksum = bytes(read(start + size, 4)).hex()
                episodes.append(entry | {"identity": f"{size} {checksum}"})
            except (ValueError, IndexError) as e:
                bad.append((path, key, str(e)))
    except ValueError as e:
        bad.append((path, "", str(e)))

    # other writers name the file that many episodes were taken from: each is one of its own
    named = collections.Counter(key for key, _ in {(e["key"], e["identity"]) for e in episodes})
    for e in episodes:
        place = e.pop("place")
        if named[e["key"]] > 1:
            e["key"] += place
    if not episodes and not bad:
        bad.append((path, "", "no episode in it"))
    return episodes, bad


def recorded_at(read, found):
    """The paths that an episode was recorded at, taken out of its features."""
    texts = []
    for name in ("recording_folderpath", "file_path"):
        at, size, _ = found.pop(f"episode_metadata/{name}", (0, 0, "bytes"))
        raw = read(at, size)
        texts += [bytes(raw[i : i + n]).decode() for i, n in values(raw)]
    return texts


def rlds_entry(read, found, texts, deep):
    """The features of an episode of a TFRecord -> {"members", "steps", "success", "idle", "still"}.
    ValueError, which says what, for those that make no episode."""
    found = {k.removeprefix("steps/"): m for k, m in found.items() if "language" not in k}
    cameras = {}
    for camera, name in CAMERAS.items():
        if f"observation/{name}" in found:
            cameras[camera] = found.pop(f"observation/{name}")
    success_place = found.pop("episode_metadata/success", None)

    # the number of steps
    if "is_first" not in found:
        raise ValueError("no steps/is_first in it, which says how many there are")
    size, kind = found["is_first"][1:]
    if kind != "integers" and size:
        raise ValueError(f"steps/is_first holds {kind}, not a truth value a step")
    steps = len(integers(read(*found["is_first"][:2])))

    # a picture a step
    members = {}
    for camera, (_, size, kind) in cameras.items():
        if kind != "bytes" and size:
            raise ValueError(f"steps/observation/{CAMERAS[camera]} holds {kind}, no pictures")
    for camera, (at, size, _) in cameras.items():
        sizes = [n for _, n in values(read(at, size))] if deep else None
        members[camera] = (at, size, sizes)
    wrong = [f"{c} {len(m[2])}" for c, m in members.items() if deep and len(m[2]) != steps]
    if wrong:
        raise ValueError(f"{steps} steps, but pictures of {', '.join(wrong)}")

    # what moves
    def field(name):
        at, size, kind = found.get(name, (0, 0, ""))
        return field_rows(read(at, size), kind, steps, name)

    velocity = None
    if steps and found.get(VELOCITY["rlds"], (0, 0, ""))[1]:
        velocity = field(VELOCITY["rlds"])
    places = []
    for name, units in PLACES["rlds"].items():
        try:
            places.append((field(name), units))
        except ValueError:
            pass  # not there, or not what it is elsewhere: motion() tells who asks for it

    if success_place:
        raw = read(*success_place[:2])
        success = truth(metadata_value(raw, success_place[2]), "success")
    else:
        success = path_success(texts[-1] if texts else "")
    entry = {"members": members | found, "steps": steps, "success": success}
    return entry | stillness(velocity, places)


def metadata_value(raw, kind):
    """The one value of a feature of an episode; a list if it has not exactly one."""
    if kind == "bytes":
        found = [bytes(raw[i : i + n]) for i, n in values(raw)]
    elif kind == "floats":
        found = numbers(raw).tolist()
    else:
        found = integers(raw).tolist()
    return found[0] if len(found) == 1 else found


def open_npz(path):
    """The Npz of a file; ValueError for what is none."""
    try:
        return Npz(path)
    except TypeError as e:
        raise ValueError(str(e)) from e
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"no npz file, or only a part of it ({e})") from e


def npz_identity(path, files):
    """A hash of an npz and its videos: of all bytes of the npz, and of size, head and tail of a
    video, where an mp4 lists its frames. Two files of one motion with other videos are two views,
    not copies."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256")
    for video in files:
        if video == path:
            continue
        size = os.path.getsize(video)
        with open(video, "rb") as f:
            digest.update(b"%d" % size + f.read(1 << 16))
            f.seek(max(size - (1 << 16), 0))
            digest.update(f.read(1 << 16))
    return digest.hexdigest()[:32]


def one_number(f, name, usual):
    """A number of an npz, also as an array of one; ValueError for anything but a positive one."""
    if name not in f:
        return usual
    x = np.asarray(f[name])
    try:
        value = float(x.reshape(-1)[0]) if x.size == 1 else np.nan
    except (ValueError, TypeError):
        value = np.nan
    if not 0 < value < np.inf:
        raise ValueError(f"{name} is {x.tolist()!r:.60}: one positive number is expected")
    return value


def raw_metadata(jsons):
    """The metadata of a raw DROID episode from the .json files in its folder."""
    named = [x for x in jsons if os.path.basename(x).startswith("metadata")]
    path = (named or jsons)[0]
    with open(path, "rb") as f:
        text = f.read().removeprefix(b"\xef\xbb\xbf")
    try:
        meta = orjson.loads(text)
    except ValueError as e:
        raise ValueError(f"{os.path.basename(path)} is no JSON, or only a part of it: {e}") from e
    if not isinstance(meta, dict):
        raise ValueError(f"{os.path.basename(path)} holds a {type(meta).__name__}, no names")
    return meta


def raw_dataset(f, name, path):
    """A dataset of an HDF5 file. ValueError where HDF5 would read zeros: chunks never written,
    parts in files that are gone."""
    try:
        x = f[name]
    except KeyError as e:  # a link to a file that is gone
        raise ValueError(f"{name}: {e}") from e
    if isinstance(x, h5py.Dataset):
        try:
            check_stored(x, path, set())
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
    return x


def assumed_rate(f, videos):
    """An npz without `rate` -> (its rows a second: DROID's 15, a sentence if its videos have
    another rate). ValueError if it has them under another name."""
    for name in f:
        if name.lower() in ("rate", "fps", "hz", "freq", "frequency", "control_frequency"):
            raise ValueError(f"no rate in it, but {name}: `rate` is its rows a second")
    for video in videos:
        with open_video(video) as container:
            shown = float(container.streams.video[0].average_rate or 15)
        if not 0.9 < shown / 15 < 1.1:
            name = os.path.basename(video)
            return 15.0, (
                f"no rate in it, so 15 rows a second are taken, and {name} has {shown:.3g} frames a"
                " second: write `rate`, its rows a second, into it"
            )
    return 15.0, ""


def npz_rows(f, frames):
    """Rows of the episode in an npz: those of the fields that have a fixed meaning, else the length
    that fits to the number of frames. ValueError where the arrays leave it open."""
    lengths = {}
    for name in f:
        try:
            x = f[name]
        except ValueError:
            continue  # Python objects, which are not read: read_fields tells who asks for them
        if x.ndim:
            lengths[name] = len(x)

    # fields that have a fixed meaning
    fixed = {k: lengths[k] for k in [*STATES["robot"], VELOCITY["robot"]] if k in lengths}
    if len({*fixed.values()}) > 1:
        listed = ", ".join(f"{k} {n}" for k, n in fixed.items())
        raise ValueError(f"its fields have different numbers of rows: {listed}")
    if fixed:
        return next(iter(fixed.values()))

    # the only length that fits to the videos
    fitting = {n for n in lengths.values() if frames and max(abs(n - x) for x in frames) <= 5}
    if len(fitting) > 1:
        exact = fitting & {*frames}
        fitting = exact if len(exact) == 1 else fitting
    if len(fitting) > 1:
        listed = ", ".join(f"{k} {n}" for k, n in lengths.items() if n in fitting)
        raise ValueError(
            f"its fields have different numbers of rows ({listed}), and {frames} frames in its"
            " videos: which are the episode's is unknown"
        )
    return fitting.pop() if fitting else max(lengths.values(), default=0)


def index_files(path, files, kind):
    """trajectory.h5 of raw DROID, or NAME.npz of one's own, and the files beside it -> ([episode],
    []). Row i goes with frame i. ValueError if they make no episode."""
    with h5py.File(path) if kind == "raw" else open_npz(path) as f:
        entry = raw_entry(f, path, files) if kind == "raw" else robot_entry(f, path, files)
        frames = []
        for video in entry["members"].values():
            with Slice(video, 0, os.path.getsize(video)) as v:
                frames.append(len(mp4_times(v)))
        steps = len(f[STATES["raw"][0]]) if kind == "raw" else npz_rows(f, frames)

        # what moves
        velocity = None
        if VELOCITY[kind] in f:
            x = raw_dataset(f, VELOCITY[kind], path) if kind == "raw" else f[VELOCITY[kind]]
            velocity = array_rows(x, steps, VELOCITY[kind])
        places = []
        for name, units in PLACES[kind].items():
            try:
                if name in f:
                    places.append((array_rows(f[name], steps, name), units))
            except ValueError:
                pass  # not what it is elsewhere: motion() tells who asks for it

    if not frames:
        stem = os.path.basename(os.path.splitext(path)[0])
        where = f"{stem}.mp4 or {stem}.CAMERA.mp4" if kind == "robot" else "mp4 of its cameras"
        raise ValueError(f"no {where} beside it: a step has a picture")
    if max(abs(n - steps) for n in frames) > 5:
        raise ValueError(
            f"{steps} rows, and {frames} frames in its videos: which row goes with which"
            " frame is unknown"
        )
    entry |= {"steps": steps, "last": min(steps, *frames)}
    return [entry | stillness(velocity, places)], []


def raw_entry(f, path, files):
    """What index_files knows of an open trajectory.h5 but for its rows."""
    jsons = [x for x in files if x.endswith(".json")]
    if not jsons:
        raise ValueError(
            "no metadata_*.json beside it: the upload of this episode was not finished"
        )
    meta = raw_metadata(jsons)
    pose = STATES["raw"][0]
    if pose not in f:
        raise ValueError(f"no {pose} in it")
    if not getattr(f[pose], "shape", None):
        raise ValueError(f"{pose} is a group, empty or a single number: rows are expected")
    for name in STATES["raw"]:
        if isinstance(f.get(name), h5py.Dataset):
            raw_dataset(f, name, path)  # one with holes would read as zeros

    # the metadata names the video of each camera, by its serial number
    videos = {os.path.basename(x)[:-4]: x for x in files if x.endswith(".mp4")}
    members = {}
    for camera, name in RAW_CAMERAS.items():
        recorded = str(meta.get(f"{name}_mp4_path") or "")
        serial = os.path.basename(recorded.replace("\\", "/"))[:-4]
        if serial in videos:
            members[camera] = videos[serial]

    stored = meta.get("success")
    return {
        "key": str(meta.get("uuid") or os.path.basename(os.path.dirname(path))),
        "members": members,
        "success": "/success/" in path if stored is None else truth(stored, "success of its json"),
        "rate": 15.0,
        "identity": "",
        "note": "",
    }


def robot_entry(f, path, files):
    """The same of an open NAME.npz."""
    stem = path[: -len(".npz")]
    videos = [x for x in files if x != path]
    rate = one_number(f, "rate", 0.0)
    note = ""
    if not rate:
        rate, note = assumed_rate(f, videos)
    success = truth(f["success"], "success") if "success" in f else True
    members = {}
    for video in videos:
        camera = video[len(stem) + 1 : -len(".mp4")] or "video"
        members[camera] = video
    return {
        "key": "/".join(os.path.abspath(stem).split("/")[-2:]),
        "members": members,
        "success": success,
        "rate": rate,
        "identity": npz_identity(path, files),
        "note": note,
    }


def files_beside(path, kind):
    """The videos and metadata that belong to a trajectory.h5 or a NAME.npz, sorted. glob would take
    a folder that cannot be listed for an empty one."""
    folder = os.path.dirname(path) or "."
    if kind == "raw":
        below = [x for x in files_below(folder) if not os.path.basename(x).startswith(".")]
        here = [x for x in below if os.path.dirname(x) == folder and x.endswith(".json")]
        return sorted(here + [x for x in below if x.endswith(".mp4")])
    if kind == "robot":  # NAME.mp4 and NAME.CAMERA.mp4, not NAME2.mp4
        start = os.path.basename(os.path.splitext(path)[0]) + "."
        names = [e.name for e in list_folder(folder)]
        # NAME.1.npz beside NAME.npz is an episode too, and NAME.1.mp4 is its video
        others = [n[: -len("npz")] for n in names if n.startswith(start) and n.endswith(".npz")]
        others = tuple(n for n in others if n != start)
        videos = [n for n in names if n.startswith(start) and n.endswith(".mp4")]
        videos = [n for n in videos if not n.startswith(others)]
        return [os.path.join(os.path.dirname(path), n) for n in videos]
    return []


def index_file(path, verify):
    """One file -> (kind, [episode], [(file, key, reason)]), cached until one of its files changes.
    verify: of index_rlds; None does so for what is on a disk. A URL that cannot be reached is an
    OSError: it says nothing about the episodes."""
    kinds = {".h5": "raw", ".npz": "robot", ".tar": "features", ".parquet": "lerobot"}
    kind = kinds.get(os.path.splitext(path)[1], "rlds")
    remote = "://" in path
    deep = not remote if verify is None else verify
    try:
        if kind == "lerobot":
            return kind, *index_data_file(path)
        if remote:
            files = []
            end, stamp = url_stamp(path, kind)
        else:
            files = files_beside(path, kind)
            end = os.path.getsize(path)
            stamp = []
            for x in [path, *files]:
                stat = os.stat(x)
                stamp.append((os.path.abspath(x), stat.st_size, stat.st_mtime_ns))
        name = hashlib.sha256(f"{path} {stamp} {deep} v3".encode()).hexdigest()[:32]
        cache = os.path.join(CACHE, "droid", name)
        raw = read_cache(cache)
        if raw is not None:
            return kind, *orjson.loads(raw)
        if kind == "rlds":
            found = index_rlds(path, end, deep)
        elif kind == "features":
            found = index_tar(path)
        else:
            found = index_files(path, files, kind)
    except (*DAMAGE, MemoryError) as e:
        if is_storage_error(e):
            raise OSError(storage_sentence(path, e)) from e
        if remote and isinstance(e, OSError):
            raise OSError(f"{path} cannot be read: {e or 'not found'}") from e
        return kind, [], [(path, "", str(e) or type(e).__name__)]
    raw = orjson.dumps(found)
    write_cache(cache, raw, "the index of episodes is")
    return kind, *orjson.loads(raw)


def index_data_file(path):
    """lerobot.index_data_file: that file imports this one."""
    from files import lerobot

    return lerobot.index_data_file(path)


def url_stamp(url, kind):
    """(bytes of a TFRecord on a server, what changes when it does)."""
    fs, _ = filesystem(url)
    info = with_retries(url, lambda: fs.info(url))
    if kind != "rlds" or info.get("size") is None:
        raise OSError(
            "only LeRobot data sets, and TFRecords on a server that says how long they are, can be"
            " read from a URL; copy it to a disk"
        )
    stamp = {}
    for name, value in info.items():
        if name in ("size", "mtime", "created", "generation", "ETag", "etag"):
            stamp[name] = str(value)
    return info["size"], stamp


# --- reading ---


def read_fields(r, names):
    """Low-dimensional fields of an Episode by name -> [(steps, d) float64]. ValueError, with its
    name, for one that is not there or not numbers."""
    if r.kind == "lerobot":
        from files import lerobot

        return lerobot.read_fields(r, names)
    if r.kind == "rlds":
        lists = fetch(r.shard, [r.members[k][:2] for k in names])
        return [field_rows(x, r.members[k][2], r.steps, k) for k, x in zip(names, lists)]
    with h5py.File(r.shard) if r.kind == "raw" else open_npz(r.shard) as f:
        missing = [k for k in names if k not in f]
        if missing:
            raise ValueError(f"no {missing[0]} in it, but {', '.join(f)}")
        out = []
        for k in names:
            try:
                x = raw_dataset(f, k, r.shard) if r.kind == "raw" else f[k]
            except (ValueError, KeyError) as e:
                reason = str(e).removeprefix(f"{k}: ")
                raise ValueError(f"{k} cannot be read: {reason}") from e
            out.append(array_rows(x, r.steps, k))
        return out


def read_pictures(r, camera, wanted):
    """Pictures by increasing number -> [(H, W, 3) uint8]. Other JPEGs are not touched (at a URL: if
    the index knows their sizes)."""
    if r.kind == "lerobot":
        from files import lerobot

        return lerobot.read_pictures(r, camera, wanted)
    if r.kind != "rlds":
        video = r.members[camera]
        with Slice(video, 0, os.path.getsize(video)) as f:
            with open_video(f) as container:
                stream = container.streams.video[0]
                short_side = min(stream.width, stream.height)
            return read_frames(f, mp4_times(f), wanted, short_side)
    at = r.members[camera][0]
    size, sizes = r.members[camera][1:]
    table = values(fetch(r.shard, [(at, size)])[0]) if sizes is None else places(sizes)
    if wanted[-1] >= len(table):
        raise ValueError(f"it has {len(table)} pictures, and step {wanted[-1]} is asked for")
    jpegs = fetch(r.shard, [(at + table[i][0], table[i][1]) for i in wanted])
    try:
        return [rgb(Image.open(io.BytesIO(x))) for x in jpegs]
    except Image.DecompressionBombError as e:
        raise ValueError(f"a picture of {camera}: {e}") from e


def rgb(image):
    """A PIL image -> (H, W, 3) uint8. PIL cuts grey levels of 16 bits at 255; here they are
    scaled."""
    if image.mode == "F":
        raise ValueError("a picture of floating-point numbers: only 8 and 16 bits are read")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("a picture of 32 bits: only 8 and 16 bits are read")
        grey = ((levels + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
