"""LeRobot data sets, versions 3.0 and 2.1, as files: no lerobot package is needed.

A data set is the folder that contains meta/info.json:

  meta/info.json        version, rows a second, the name, type and shape of every feature, and
                        where files are: templates such as data/chunk-{chunk_index:03d}/...
  meta/episodes/        3.0: parquet, a row an episode: its length, its data file, and for each
                        camera the mp4 and the second at which the episode begins in it
  meta/episodes.jsonl   2.1: a line an episode; each has a data file and mp4s of its own
  data/                 parquet, a row a step: numbers, and pictures of type "image" as PNG
  videos/               mp4

What is written about them is often wrong: totals, codecs, ends of episodes, times that drift. So
rows are counted, videos are opened, and a frame is found by its number: where an mp4 contains
exactly the frames of its episodes they are counted, otherwise the frame nearest in time is taken.

pyarrow is imported by the functions that need it: other forms of episodes are read without it."""

import bisect
import contextlib
import functools
import hashlib
import io
import os
import re
from typing import NamedTuple

import numpy as np
import orjson
from PIL import Image

from files.disk import CACHE, DAMAGE, is_storage_error, read_cache, with_retries, write_cache
from files.episodes import (
    PLACES,
    VELOCITY,
    Episode,
    camera_name,
    fetch,
    filesystem,
    rgb,
    stillness,
    truth,
)
from files.progress import tqdm
from files.shards import Slice, spread, stamp
from files.video import film_times, open_video, read_frames

DATA = {
    "3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
}
VIDEO = {
    "3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
# what most data sets call the state and the action: they tell one episode from another
MOTION = ("observation.state", "state", "states", "action", "actions")
NUMBERS = re.compile(r"(float|int|uint)\d+|bool")


class DataSet(NamedTuple):
    """What the metadata of a data set say."""

    root: str
    version: str  # "3.0" or "2.1"
    info: dict  # of meta/info.json
    fps: float
    # data file: [(episode index, its length, {camera: (mp4, seconds, first frame, frames)})]. The
    # episode begins at that second of the mp4, which has that many frames in all its episodes
    files: dict
    numbers: dict  # {name: numbers a row} of the features that are numbers
    cameras: dict  # {name of a camera: its feature}

    @property
    def features(self):
        return self.info["features"]


def number_features(features):
    """{name: numbers a row} of the features that are numbers, less LeRobot's counters."""
    counters = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    out = {}
    for name, feature in features.items():
        if name not in counters and NUMBERS.fullmatch(str(feature.get("dtype"))):
            out[name] = int(np.prod(feature.get("shape") or [1]))
    return out


def camera_features(features):
    """{name of a camera: its feature}."""
    found = {}
    for name, feature in features.items():
        if feature.get("dtype") in ("video", "image"):
            found[camera_name(name)] = name
    return found


# --- files, on a disk or at a URL ---


class UrlFile(io.RawIOBase):
    """A file at a URL that can be seeked. `failed` is the error of a read: FFmpeg would take it for
    the end of the file."""

    def __init__(self, url):
        fs, _ = filesystem(url)
        self.url = url
        self.size = with_retries(url, lambda: fs.info(url))["size"]
        self.at = 0
        self.failed = None
        if self.size is None:
            raise OSError(f"{url}: the server does not say how long it is: copy it to a disk")

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        size = max(min(len(buffer), self.size - self.at), 0)
        if size:
            try:
                buffer[:size] = bytes(fetch(self.url, [(self.at, size)])[0])
            except (OSError, ValueError) as e:
                self.failed = e
                raise
        self.at += size
        return size


@contextlib.contextmanager
def open_file(path):
    """A seekable file of a path or URL, for reading."""
    if "://" not in path:
        with Slice(path, 0, os.path.getsize(path)) as f:
            yield f
        return
    raw = UrlFile(path)
    with io.BufferedReader(raw, 1 << 18) as f:
        try:
            yield f
        finally:
            if raw.failed is not None:
                raise raw.failed


def version_of(path):
    """What changes when a file does; of a URL nothing: a run takes it as it is at the start."""
    return stamp(path) if "://" not in path else None


def read_whole(path):
    """All bytes of a path or URL."""
    if "://" not in path:
        with open(path, "rb") as f:
            return f.read()
    fs, name = filesystem(path)
    return with_retries(path, lambda: fs.cat_file(name))


@functools.lru_cache(256)
def listed_at(folder):
    """Names of the files of a folder at a URL; None where the server lists none."""
    if folder.startswith("http"):
        return None
    fs, name = filesystem(folder)

    def ask():
        try:
            return fs.ls(name, False)
        except FileNotFoundError:
            return []  # many stores have no folders, only names with slashes

    return {os.path.basename(x) for x in with_retries(folder, ask)}


@functools.lru_cache(1 << 16)
def there_at(url):
    """Whether a URL is there."""
    names = listed_at(os.path.dirname(url))
    if names is not None:
        return os.path.basename(url) in names
    fs, name = filesystem(url)
    return with_retries(url, lambda: fs.exists(name))


def there(path):
    """Whether there is a file at a path or URL."""
    return there_at(path) if "://" in path else os.path.exists(path)


# --- parquet ---


def parquet():
    """pyarrow.parquet; ValueError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(
            f"LeRobot data sets are read with pyarrow, and it is not there ({e}): pip install"
            " pyarrow"
        ) from e
    return pyarrow.parquet


@contextlib.contextmanager
def open_parquet(path, metadata=None):
    """A pyarrow ParquetFile. ValueError for what is none; errors of the disk pass."""
    pq = parquet()
    try:
        if "://" in path:
            with open_file(path) as f:
                yield pq.ParquetFile(f, metadata=metadata)
        else:
            with pq.ParquetFile(path, metadata=metadata) as file:
                yield file
    except (*DAMAGE, NotImplementedError) as e:
        if is_storage_error(e) or "://" in path and isinstance(e, OSError):
            raise
        if isinstance(e, ValueError) and not isinstance(e, parquet_errors()):
            raise
        raise ValueError(
            f"{path} is no parquet file, or only a part of it ({first_line(e)}): copy it again; a"
            " recording that ended without finalize() has no end"
        ) from e


def parquet_errors():
    import pyarrow

    return pyarrow.ArrowException


def first_line(error):
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def leaves(schema_paths, names):
    """Paths of the leaves of each column. A name may have dots, so `observation.state` is the start
    of other names: the longest that fits owns a leaf."""
    owners = sorted(names, key=len, reverse=True)
    found = {name: [] for name in names}
    for path in schema_paths:
        for name in owners:
            if path == name or path.startswith(name + "."):
                found[name].append(path)
                break
    return found


class Footer(NamedTuple):
    """What the end of a parquet file says."""

    metadata: object  # pyarrow's
    starts: list  # first row of each row group, and the number of rows
    leaves: dict  # column: paths of its leaves


@functools.lru_cache(64)
def footer_of_version(path, version):
    with open_parquet(path) as file:
        metadata = file.metadata
        starts = [0]
        for i in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(i).num_rows)
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        return Footer(metadata, starts, leaves(paths, file.schema_arrow.names))


def footer(path):
    """The Footer of a parquet file; those of 64 files are kept."""
    return footer_of_version(path, version_of(path))


def read_groups(path, names, groups):
    """Columns of some row groups, as pyarrow reads them. ValueError for a name that is not there.

    One thread: the loader's processes are forked, and threads do not come along."""
    end = footer(path)
    missing = [name for name in names if name not in end.leaves]
    if missing:
        raise ValueError(f"no column {missing[0]} in {path}, but {', '.join(end.leaves)}")
    columns = [leaf for name in names for leaf in end.leaves[name]]
    with open_parquet(path, end.metadata) as file:
        return file.read_row_groups(groups, columns=columns, use_threads=False)


def groups_of(starts, first, after):
    """Row groups of the rows first..after, and the first row of those."""
    low = bisect.bisect_right(starts, first) - 1
    high = bisect.bisect_left(starts, after)
    return list(range(low, max(high, low + 1))), starts[low]


def flat_numbers(column, name):
    """A column -> (rows, d) array. ValueError for what is not d numbers in every row."""
    import pyarrow as pa

    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    rows = len(array)
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        kind = array.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list and not pa.types.is_fixed_size_list(kind):
            break
        if array.null_count:
            raise ValueError(f"{name} is empty in {array.null_count} rows")
        if is_list and len(array):
            sizes = np.diff(array.offsets.to_numpy(zero_copy_only=False))
            if sizes.min() != sizes.max():
                raise ValueError(
                    f"{name} has {sizes.min()} to {sizes.max()} numbers a row: each row must have"
                    " as many"
                )
        array = array.flatten()
    types = pa.types
    if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
        raise ValueError(f"{name} holds {kind}, not numbers")
    return array.to_numpy(zero_copy_only=False).reshape(rows, -1)


def decode(path, names, groups):
    """Columns of numbers of some row groups -> [(rows, d)]. ValueError for what is none."""
    table = read_groups(path, names, list(groups))
    return [flat_numbers(table.column(name), name) for name in names]


@functools.lru_cache(8)
def numbers_of_version(path, version, names, groups):
    return decode(path, names, groups)


def numbers(path, names, first=0, after=None):
    """Columns of numbers of a data file -> [(rows, d)], of the rows first..after.

    What was decoded is kept for the last 8 calls: older writers put all rows of a file into one
    group, which cannot be decoded in part."""
    starts = footer(path).starts
    after = starts[-1] if after is None else after
    if after > starts[-1]:
        raise ValueError(f"{path} has {starts[-1]} rows, and row {after - 1} is asked for")
    if after <= first:
        groups, start = [], first
    else:
        groups, start = groups_of(starts, first, after)
    arrays = numbers_of_version(path, version_of(path), tuple(names), tuple(groups))
    return [x[first - start : after - start] for x in arrays]


# --- the metadata of a data set ---


def is_set(folder):
    """Whether a folder or URL is a LeRobot data set."""
    return there(os.path.join(folder, "meta/info.json"))


def data_files(root):
    """The parquet files of a data set, as its metadata list them."""
    return list(open_set(root).files)


@functools.lru_cache(1 << 16)
def root_of(path):
    """The data set that a data file belongs to. ValueError if it is of none."""
    folder = os.path.dirname(path)
    while folder and folder != os.path.dirname(folder) and not folder.endswith(":/"):
        if is_set(folder):
            return folder
        folder = os.path.dirname(folder)
    raise ValueError(
        f"{path}: no meta/info.json in a folder above it, so it is no part of a LeRobot data set"
    )


def open_set(root):
    """The DataSet in a folder or at a URL, read once. ValueError, which names the file, for what is
    wrong with its metadata."""
    if "://" in root:
        return open_set_of_version(root, None)
    version = []
    for name in ("meta/info.json", "meta/episodes.jsonl"):
        path = os.path.join(root, name)
        version.append(stamp(path) if os.path.exists(path) else None)
    version += [(path, stamp(path)) for path in episode_tables(root)]
    return open_set_of_version(root, tuple(version))


@functools.lru_cache(64)
def open_set_of_version(root, version):
    info = read_info(root)
    number = info["codebase_version"].removeprefix("v")
    if number == "2.1":
        files = files_of_2(root, info)
        layout = "2.1"
    else:
        files = files_of_3(root, info)
        layout = "3.0"
    if not files:
        raise ValueError(
            f"{root}/meta lists no episode: nothing was recorded, or meta/ is not whole"
        )
    features = info["features"]
    kinds = (number_features(features), camera_features(features))
    return DataSet(root, layout, info, float(info["fps"]), files, *kinds)


def read_info(root):
    """meta/info.json, checked."""
    path = os.path.join(root, "meta/info.json")
    try:
        info = orjson.loads(read_whole(path))
    except orjson.JSONDecodeError as e:
        raise ValueError(f"{path} is no JSON, or only a part of it: {e}") from e
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}, no names")

    version = info.get("codebase_version")
    if not isinstance(version, str) or not re.fullmatch(r"v?(2\.1|3\.\d+)", version):
        raise ValueError(
            f"{path} says codebase_version {version!r}, and 2.1 and 3.0 are read: convert it with"
            " lerobot's scripts (convert_dataset_v20_to_v21, then v21_to_v30)"
        )
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise ValueError(f"{path} says fps {fps!r}: a number of rows a second is expected")
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise ValueError(f"{path} lists no features, each with a dtype and a shape")
    for name, feature in features.items():
        shape = feature.get("shape", [1])
        if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
            raise ValueError(f"{path}: the shape of {name} is {shape!r}, not a list of numbers")
    return info


def fill(template, root, values):
    """The path that a template of meta/info.json makes of an episode's numbers."""
    try:
        return os.path.join(root, template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as e:
        raise ValueError(
            f"{root}/meta/info.json: {template!r} is no template of a path ({e!r}): it may name"
            f" {', '.join(values)}"
        ) from e


def episode_tables(root):
    """The parquet files of meta/episodes, in order."""
    folder = os.path.join(root, "meta/episodes")
    if "://" not in root:
        if not os.path.isdir(folder):
            return []
        found = []
        for chunk in sorted(os.listdir(folder)):
            inside = os.path.join(folder, chunk)
            if os.path.isdir(inside):
                names = sorted(x for x in os.listdir(inside) if x.endswith(".parquet"))
                found += [os.path.join(inside, name) for name in names]
        return found
    if not root.startswith("http"):
        fs, name = filesystem(folder)
        found = with_retries(folder, lambda: fs.glob(f"{name}/*/*.parquet"))
        return sorted(map(fs.unstrip_protocol, found))

    # a web server lists nothing: files are numbered from 0 on
    found = []
    chunk = number = 0
    while number or not chunk:
        path = f"{folder}/chunk-{chunk:03d}/file-{number:03d}.parquet"
        if there(path):
            found.append(path)
            number += 1
        elif number:
            chunk += 1
            number = 0
            if not there(f"{folder}/chunk-{chunk:03d}/file-000.parquet"):
                break
        else:
            break
    return found


def files_of_3(root, info):
    """The episodes of a 3.0 data set by data file, as DataSet.files."""
    columns = episode_columns(root)
    template = info.get("data_path") or DATA["3.0"]
    lengths = columns["length"].astype(int)
    indices = columns["episode_index"].astype(int)

    # of each camera, the mp4 of every episode, and where in it the episode begins
    cameras = {}
    for name, feature in info["features"].items():
        if feature.get("dtype") == "video" and f"videos/{name}/from_timestamp" in columns:
            places = video_places(root, info, name, columns, lengths)
            cameras[camera_name(name)] = places

    files = {}
    chunks = columns["data/chunk_index"].astype(int).tolist()
    numbers_in_chunk = columns["data/file_index"].astype(int).tolist()
    for i, (chunk, number) in enumerate(zip(chunks, numbers_in_chunk)):
        path = fill(template, root, {"chunk_index": chunk, "file_index": number})
        videos = {camera: places[i] for camera, places in cameras.items()}
        files.setdefault(path, []).append((int(indices[i]), int(lengths[i]), videos))
    return files


def episode_columns(root):
    """The columns of meta/episodes that are needed: {name: (episodes,)}. Statistics, of which there
    are hundreds, are not read."""
    paths = episode_tables(root)
    if not paths:
        raise ValueError(
            f"no parquet file in {root}/meta/episodes, which lists the episodes of a 3.0 data set:"
            " copy it, too"
        )
    parts = {}
    for path in paths:
        names = list(footer(path).leaves)
        needed = [n for n in ("episode_index", "length") if n in names]
        needed += [n for n in names if re.fullmatch(r"data/(chunk|file)_index", n)]
        needed += [n for n in names if re.fullmatch(r"videos/.*/(\w+_index|from_timestamp)", n)]
        for name, values in zip(needed, numbers(path, needed)):
            parts.setdefault(name, []).append(values[:, 0])
    rows = {len(p) for p in parts.values()}
    for name in ("episode_index", "length", "data/chunk_index", "data/file_index"):
        if name not in parts or len(rows) > 1:
            raise ValueError(f"no column {name} in {paths[0]}: meta/episodes is not of version 3.0")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def video_places(root, info, name, columns, lengths):
    """For each episode (mp4, seconds, first frame, frames of all its episodes) of one camera; None
    where there is no mp4."""
    template = info.get("video_path") or VIDEO["3.0"]
    seconds = columns[f"videos/{name}/from_timestamp"].astype(float)
    chunk = columns[f"videos/{name}/chunk_index"].astype(float)
    number = columns[f"videos/{name}/file_index"].astype(float)

    # episodes of one mp4 lie one after another
    order = np.lexsort((columns["episode_index"], seconds, number, chunk))
    out = [None] * len(order)
    for group in split_where(order, chunk[order], number[order]):
        first_of = group[0]
        if not np.isfinite(chunk[first_of] + number[first_of]):
            continue
        file = {"chunk_index": int(chunk[first_of]), "file_index": int(number[first_of])}
        path = fill(template, root, {"video_key": name} | file)
        ends = np.cumsum(lengths[group])
        for i, end in zip(group.tolist(), ends.tolist()):
            out[i] = (path, float(seconds[i]), end - int(lengths[i]), int(ends[-1]))
    return out


def split_where(order, *keys):
    """Parts of an array within which the keys do not change."""
    change = np.zeros(len(order) - 1, dtype=bool)
    for key in keys:
        change |= key[1:] != key[:-1]
    return np.split(order, np.flatnonzero(change) + 1)


def files_of_2(root, info):
    """The episodes of a 2.1 data set by data file, as DataSet.files."""
    path = os.path.join(root, "meta/episodes.jsonl")
    if not there(path):
        raise ValueError(f"no {path}, which lists the episodes of a 2.1 data set: copy it, too")
    data_path = info.get("data_path") or DATA["2.1"]
    video_path = info.get("video_path") or VIDEO["2.1"]
    videos = [n for n, feature in info["features"].items() if feature.get("dtype") == "video"]

    files = {}
    for number, line in enumerate(read_whole(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            index = int(row["episode_index"])
            length = int(row["length"])
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(
                f"{path}: line {number} has no episode_index and length ({first_line(e)})"
            ) from e
        chunk = index // (info.get("chunks_size") or 1000)
        numbers_of = {"episode_chunk": chunk, "episode_index": index}
        cameras = {}
        for name in videos:
            mp4 = fill(video_path, root, {"video_key": name} | numbers_of)
            cameras[camera_name(name)] = (mp4, 0.0, 0, length)
        data = fill(data_path, root, numbers_of)
        files.setdefault(data, []).append((index, length, cameras))
    return files


@functools.lru_cache(16)
def recorded_ranges(root):
    """{feature: max - min of each of its numbers} from the statistics of a data set; {} without
    them."""
    low = {}
    high = {}
    for name in ("meta/stats.json", "meta/episodes_stats.jsonl"):
        path = os.path.join(root, name)
        if not there(path):
            continue
        for line in [read_whole(path)] if name.endswith("json") else read_whole(path).splitlines():
            try:
                stats = orjson.loads(line)
                stats = stats.get("stats", stats)
                for feature, values in stats.items():
                    if feature not in MOTION:
                        continue
                    least = np.asarray(values["min"], float)
                    most = np.asarray(values["max"], float)
                    low[feature] = np.minimum(low.get(feature, least), least)
                    high[feature] = np.maximum(high.get(feature, most), most)
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # statistics are a help: without them ranges are those of a file
        break
    return {feature: (high[feature] - low[feature]).reshape(-1) for feature in low}


# --- the index of a data file ---


def index_data_file(path):
    """A data file -> ([episode], [(file, key, reason)]) in the form of files.episodes.index_file.
    Videos that are not there are "missing" members."""
    dataset = open_set(root_of(path))
    listed = dataset.files.get(path)
    if listed is None:
        raise ValueError(f"the metadata of {dataset.root} do not name it")
    if not there(path):
        raise ValueError(
            f"not there, and the metadata list {len(listed)} episodes in it: copy it, or they are"
            " left out"
        )

    rows = {row["index"]: row for row in rows_of_episodes(dataset, path)}
    episodes = []
    bad = []
    for index, length, videos in listed:
        row = rows.pop(index, None)
        key = f"episode_{index:06d}"
        if row is None:
            flaw = "the metadata list it, and its data file has no row of it"
        elif row["flaw"]:
            flaw = row["flaw"]
        elif row["rows"] != length:
            flaw = f"the metadata say {length} rows, and its data file has {row['rows']}"
        else:
            episodes.append(entry_of(dataset, row, videos))
            continue
        bad.append((path, key, flaw))
    for index in rows:
        bad.append((path, f"episode_{index:06d}", "in the data file, and not in the metadata"))
    return episodes, bad


def entry_of(dataset, row, videos):
    """What index_file tells about an episode. Its key does not depend on where the data set lies or
    in which version it is: the number, and a hash of how it moves."""
    members = {}
    for camera, place in videos.items():
        members[camera] = ["missing", f"no mp4 of {camera} in the metadata"]
        if place is not None:
            found = find_video(dataset.root, place[0])
            members[camera] = ["video", found, *place[1:]] if found else ["missing", place[0]]
    for camera, name in dataset.cameras.items():
        if dataset.features[name]["dtype"] == "image":
            members[camera] = ["image", name]
    name = row["identity"][:8] or os.path.basename(dataset.root.rstrip("/"))
    return {
        "key": f"episode_{row['index']:06d}-{name}",
        "members": members,
        "steps": row["rows"],
        "rate": dataset.fps,
        "success": row["success"],
        "identity": row["identity"],
        "idle": row["idle"],
        "still": row["still"],
        "place": (dataset.root, row["first"]),
    }


def find_video(root, path):
    """Where a video of a data set is: some have their videos in `video/`, whatever their metadata
    say. None if it is nowhere."""
    inside = os.path.relpath(path, root) if "://" not in path else path[len(root) :].lstrip("/")
    for candidate in (path, os.path.join(root, re.sub("^videos/", "video/", inside))):
        if there(candidate):
            return candidate
    return None


def rows_of_episodes(dataset, path):
    """For each episode in a data file a dict of "index", "first" (row), "rows", "flaw", "success",
    "identity", "idle", "still". Cached until the file or the list of features changes."""
    ranges = {k: v.tolist() for k, v in recorded_ranges(dataset.root).items()}
    about = orjson.dumps([dataset.features, ranges], option=orjson.OPT_SORT_KEYS)
    where = path if "://" in path else os.path.abspath(path)
    version = version_of(path) or url_version(path)
    name = hashlib.sha256(f"{where} {version} v1 ".encode() + about).hexdigest()[:32]
    cache = os.path.join(CACHE, "lerobot", name)
    raw = read_cache(cache)
    if raw is None:
        raw = orjson.dumps(read_episodes(dataset, path, ranges))
        write_cache(cache, raw, "the index of episodes is")
    return orjson.loads(raw)


def url_version(url):
    """What a server says that changes when a file does."""
    fs, _ = filesystem(url)
    info = with_retries(url, lambda: fs.info(url))
    names = ("size", "mtime", "created", "generation", "ETag", "etag")
    return [f"{name} {info[name]}" for name in names if name in info]


def read_episodes(dataset, path, ranges):
    """rows_of_episodes, read from the data file: the columns that say what moves, each once."""
    columns = list(footer(path).leaves)
    for needed in ("episode_index", "frame_index"):
        if needed not in columns:
            raise ValueError(f"no column {needed} in it, but {', '.join(columns)}")
    motion = [n for n in MOTION if n in columns and n in dataset.numbers]
    if not motion:
        motion = [
            n for n in columns if n in dataset.numbers and re.match(r"observation\.|action", n)
        ]
    positions = [n for n in PLACES["lerobot"] if n in columns]
    success = [n for n in ("is_episode_successful", "next.success") if n in columns][:1]
    velocity = [n for n in [VELOCITY["lerobot"]] if n in columns]

    groups = range(len(footer(path).starts) - 1)
    index, frame = (x[:, 0] for x in decode(path, ["episode_index", "frame_index"], groups))
    names = list(dict.fromkeys([*motion, *positions, *velocity]))
    values = {}
    flaw = ""
    try:
        # all columns at once: an episode is often a row group, and each has its price
        values = dict(zip(names, decode(path, names, groups)))
    except ValueError:
        # one of them holds no numbers: which?
        for name in names:
            try:
                values[name] = decode(path, [name], groups)[0]
            except ValueError as e:
                flaw = flaw or (str(e) if name in motion else "")
    succeeded = None
    if success:
        succeeded = success_column(path, success[0])

    found = []
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1)) if len(index) else []
    seen = set()
    for first, after in zip(starts, [*starts[1:], len(index)]):
        first, after = int(first), int(after)
        row = {
            "index": int(index[first]),
            "first": first,
            "rows": after - first,
            "flaw": flaw,
            "success": True,
            "identity": "",
            "idle": None,
            "still": None,
        }
        if row["index"] in seen:
            row["flaw"] = "its rows lie in two places of the data file"
        elif not np.array_equal(frame[first:after], np.arange(after - first)):
            row["flaw"] = f"its frame_index is not 0 to {after - first - 1}, one more a row"
        seen.add(row["index"])
        if succeeded is not None:
            row["success"] = bool(succeeded[first:after].any())
        if not row["flaw"]:
            of_episode = {name: x[first:after] for name, x in values.items()}
            row["identity"] = identity(dataset, {n: of_episode[n] for n in motion})
            row |= still_rows(of_episode, motion, ranges, values)
        found.append(row)
    return sorted(found, key=lambda row: row["flaw"] != "")


def success_column(path, name):
    """Whether each row says success, in any spelling."""
    groups = list(range(len(footer(path).starts) - 1))
    column = read_groups(path, [name], groups).column(name).to_pylist()
    known = {}
    out = []
    for value in column:
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value not in known:
            known[value] = truth(value, name)
        out.append(known[value])
    return np.array(out)


def identity(dataset, motion):
    """A hash of how an episode moves, equal for its copies wherever they lie; "" where nothing says
    how it moves."""
    if not motion:
        return ""
    digest = hashlib.sha256(" ".join(sorted(dataset.cameras)).encode())
    for name, x in sorted(motion.items()):
        digest.update(f"{name} {x.shape[1]} ".encode())
        digest.update(np.ascontiguousarray(x, dtype="<f4").tobytes())
    return digest.hexdigest()[:32]


def still_rows(of_episode, motion, ranges, of_file):
    """The "idle" and "still" runs of an episode: from commanded joint velocities and positions
    where they have DROID's names, else rows in which no number of the state moves by more than a
    share of its range (files.episodes.DRIFT)."""
    velocity = of_episode.get(VELOCITY["lerobot"])
    if velocity is not None:
        places = []
        for name, units in PLACES["lerobot"].items():
            if name in of_episode:
                places.append((of_episode[name].astype(np.float64), units))
        return stillness(velocity.astype(np.float64), places)
    states = [name for name in motion if "state" in name]
    if not states:
        return {"idle": None, "still": None}
    state = of_episode[states[0]].astype(np.float64)
    width = np.asarray(ranges.get(states[0], ()), float)
    if width.shape != state.shape[1:] or not np.isfinite(width).all():
        width = np.ptp(of_file[states[0]].astype(np.float64), axis=0)
    state = state / np.where(width > 0, width, 1)
    runs = stillness(np.zeros((len(state), 1)), [(state, ["range"])])["still"]
    return {"idle": runs, "still": runs}


# --- reading episodes ---


def read_fields(r, names):
    """Fields of an Episode by name -> [(steps, d) float64]. ValueError for one that is not there,
    is not numbers or has another shape than the metadata say."""
    root, first = r.place
    sizes = open_set(root).numbers
    out = []
    for name, x in zip(names, numbers(r.shard, names, first, first + r.steps)):
        if name in sizes and x.shape[1] != sizes[name]:
            raise ValueError(
                f"{name} has {x.shape[1]} numbers a row, and meta/info.json says {sizes[name]}"
            )
        out.append(x.astype(np.float64))
    return out


def read_pictures(r, camera, wanted):
    """Pictures of a camera by increasing row -> [(H, W, 3) uint8]."""
    kind, *place = r.members[camera]
    if kind == "image":
        return read_images(r, place[0], wanted)
    path = place[0]
    clock = video_clock(path)
    frame_numbers = frames_of_rows(r, place, clock, np.asarray(wanted))
    with open_file(path) as f:
        return read_frames(f, clock.times, frame_numbers, clock.short_side)


class Clock(NamedTuple):
    """When the frames of a video are shown."""

    times: np.ndarray  # (frames,) int64, increasing
    unit: float  # seconds
    short_side: int  # of its pictures
    codec: str
    size: tuple  # (width, height)


@functools.lru_cache(64)
def clock_of_version(path, version):
    try:
        with open_file(path) as f:
            times, unit = film_times(f)
            f.seek(0)
            with open_video(f) as container:
                stream = container.streams.video[0]
                size = (stream.width, stream.height)
                return Clock(times, unit, min(size), stream.codec_context.name, size)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def video_clock(path):
    """The Clock of a video; those of 64 videos are kept."""
    return clock_of_version(path, version_of(path))


def frames_of_rows(r, place, clock, rows):
    """Numbers of the frames that rows of an episode show, in the order of display. place: (mp4,
    second at which the episode begins, its first frame, frames of all episodes in the mp4).

    ValueError where the nearest frame is more than half a frame away: the video lacks it."""
    path, seconds = place[:2]
    first, frames = place[2:]
    if len(clock.times) == frames:
        return first + rows

    # frames were cut, doubled or shown at another rate: the clock decides
    timestamp = rows / r.rate
    if "timestamp" in footer(r.shard).leaves:
        timestamp = read_fields(r, ["timestamp"])[0][rows, 0]
    wanted = seconds + timestamp
    times = clock.times * clock.unit
    after = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    before = after - 1
    if len(times) > 1:
        nearer = np.abs(times[after] - wanted) < np.abs(times[before] - wanted)
        numbers_of = np.where(nearer, after, before)
        interval = max(float(np.median(np.diff(times))), 1 / r.rate)
    else:
        numbers_of = before
        interval = 1 / r.rate
    off = np.abs(times[numbers_of] - wanted)
    worst = int(off.argmax())
    if off[worst] > 0.5 * interval + 1e-3:
        raise ValueError(
            f"row {rows[worst]} is shown at {wanted[worst]:.3f} s of {path}, and its nearest frame"
            f" is {off[worst]:.3f} s away: it has {len(times)} frames, and its episodes {frames}"
            " rows"
        )
    return numbers_of


def read_images(r, name, wanted):
    """Pictures that are stored in the data file -> [(H, W, 3) uint8]."""
    first = r.place[1]
    starts = footer(r.shard).starts
    groups, start = groups_of(starts, first + int(wanted[0]), first + int(wanted[-1]) + 1)
    column = read_groups(r.shard, [name], groups).column(name)
    pictures = []
    for row in wanted:
        value = column[first + int(row) - start].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"row {row} of {name} has no picture in it")
        try:
            pictures.append(rgb(Image.open(io.BytesIO(data))))
        except Image.DecompressionBombError as e:
            raise ValueError(f"a picture of {name}: {e}") from e
    return pictures


# --- what is in a data set ---


class Look(NamedTuple):
    """What `look` found in a data set."""

    dataset: DataSet
    episodes: list  # of files.episodes.Episode, whole
    success: int  # how many of them succeeded
    idle: int  # rows in which nothing moves, of the episodes of which it is known
    known: int  # rows of those episodes
    bad: list  # (file, key, reason) of what would be left out, whatever the camera


def look(root):
    """Index a data set and open each of its videos."""
    dataset = open_set(root)
    episodes = []
    bad = []
    success = idle = known = 0
    for path in tqdm(dataset.files, "index", unit=" files", delay=10):
        try:
            entries, of_file = index_data_file(path)
        except (*DAMAGE, MemoryError) as e:
            if is_storage_error(e):
                raise
            bad.append((path, "", str(e)))
            continue
        bad += of_file
        for entry in entries:
            steps = entry["steps"]
            success += entry["success"]
            if entry["still"] is not None:
                known += steps
                idle += sum(b - a for a, b in entry["still"])
            about = (entry["key"], "lerobot", entry["members"], steps, entry["rate"])
            episodes.append(Episode(path, *about, 0, steps, steps, place=entry["place"]))
    for r in tqdm(episodes, "videos", unit=" episodes", delay=10):
        bad += video_flaws(r)
    return Look(dataset, episodes, success, idle, known, bad)


def video_flaws(r):
    """[(file, key, reason)] of the videos of an episode that lack some of its frames."""
    bad = []
    for kind, path, *place in r.members.values():
        try:
            if kind == "missing":
                raise ValueError(f"{path} is not there")
            if kind == "video":
                frames_of_rows(r, [path, *place], video_clock(path), np.arange(r.steps))
        except ValueError as e:
            bad.append((r.shard, r.key, str(e)))
    return bad


def describe(found):
    """What `look` found, as lines of text."""
    dataset = found.dataset
    rows = sum(r.steps for r in found.episodes)
    hours = rows / dataset.fps / 3600
    robot = dataset.info.get("robot_type") or "unknown"
    yield (
        f"{dataset.root}: LeRobot {dataset.version}, robot {robot}, {len(found.episodes)} episodes,"
        f" {rows} rows at {dataset.fps:g} a second, {hours:.2f} h"
    )
    idle = f"{found.idle / found.known:.1%} of rows" if found.known else "not known"
    lengths = [r.steps for r in found.episodes] or [0]
    yield (
        f"idle: {idle}; success: {found.success} of {len(found.episodes)} episodes;"
        f" {min(lengths)} to {max(lengths)} rows an episode"
    )

    # cameras: as the files are, not as the metadata say
    yield f"{'camera':24} {'picture':>10} {'kind':>8} {'frames/s':>9} {'files':>6}  feature"
    for camera, feature in dataset.cameras.items():
        members = [r.members[camera] for r in found.episodes if camera in r.members]
        videos = list(dict.fromkeys(m[1] for m in members if m[0] == "video"))
        size, kind, rate = picture_of(found, camera, videos)
        line = f"{camera:24} {size:>10} {kind:>8} {rate:>9} {len(videos):6}"
        yield f"{line}  {feature}"

    # numbers: of at most 20 data files, spread over all
    paths = list(dict.fromkeys(r.shard for r in found.episodes))
    if paths:
        paths = spread(paths, 20)
    yield f"{'numbers':44} {'a row':>5} {'least':>10} {'largest':>10}  of {len(paths)} data files"
    for name, size in dataset.numbers.items():
        try:
            values = [numbers(path, [name])[0] for path in paths]
        except ValueError as e:
            yield f"{name:44} {size:5} cannot be read: {e}"
            continue
        if values:
            low = min(x.min() for x in values if len(x))
            high = max(x.max() for x in values if len(x))
            yield f"{name:44} {size:5} {low:10.4g} {high:10.4g}"


def picture_of(found, camera, videos):
    """Texts about the pictures of a camera: their size, codec or "image", frames a second."""
    for path in videos:
        try:
            clock = video_clock(path)
        except ValueError:
            continue  # it is among what would be left out
        rate = "?"
        if len(clock.times) > 1:
            rate = f"{1 / (np.median(np.diff(clock.times)) * clock.unit):.4g}"
        return "{}x{}".format(*clock.size), clock.codec, rate
    for r in found.episodes:
        if r.members.get(camera, [""])[0] == "image":
            [picture] = read_pictures(r, camera, [0])
            return f"{picture.shape[1]}x{picture.shape[0]}", "image", f"{r.rate:g}"
    return "?", "missing", "?"
