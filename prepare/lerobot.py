"""Writes LeRobot data sets of version 3.0, as lerobot's own writer lays them out; prepare.robot
--format lerobot uses it.

A data set is written in parts. Part K is data/chunk-000/file-K.parquet, an mp4 of each camera with
all its episodes one after another, and meta/episodes/chunk-000/file-K.parquet, which is written
last. meta/info.json is written when all parts are there, so a folder that contains it is whole."""

import io
import json
import os
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from files.disk import write_atomically

PART = "chunk-000/file-{:03d}"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

# the columns that every data set has, and their types
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


class Recorded(NamedTuple):
    """An episode to write."""

    rows: dict  # {feature: (T, d) array}
    videos: dict  # {feature: bytes of an mp4 with T frames}
    task: int  # its index in the list of tasks


# --- parquet ---


def column(x):
    """(T, d) array -> what lerobot stores: lists of d numbers, or single ones where d is 1."""
    x = np.asarray(x).reshape(len(x), -1)
    if x.shape[1] == 1:
        return pa.array(x[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


def table_of(rows, index, first_row, task, fps):
    """The data table of an episode: its rows and LeRobot's counters."""
    steps = len(next(iter(rows.values())))
    numbers = np.arange(steps)
    counters = {
        "timestamp": (numbers / fps).astype(np.float32),
        "frame_index": numbers,
        "episode_index": np.full(steps, index),
        "index": first_row + numbers,
        "task_index": np.full(steps, task),
    }
    return pa.table({name: column(x) for name, x in (rows | counters).items()})


def write_tables(path, tables):
    """Tables as a parquet file, a row group each."""

    def write(f):
        with pq.ParquetWriter(f, tables[0].schema, compression="snappy") as writer:
            for table in tables:
                writer.write_table(table)

    write_atomically(path, write)


# --- video ---


def join_mp4s(videos):
    """mp4s of one codec and size -> the bytes of one mp4 that shows them one after another. Packets
    are copied, nothing is decoded."""
    f = io.BytesIO()
    start = 0
    with av.open(f, "w", format="mp4") as joined:
        stream = None
        for video in videos:
            with av.open(io.BytesIO(video)) as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(source, opaque=True)
                    stream.time_base = source.time_base
                frame = int(1 / (source.average_rate * source.time_base))
                frames = 0
                for packet in container.demux(source):
                    if packet.dts is None:
                        continue
                    packet.pts += start
                    packet.dts += start
                    packet.stream = stream
                    joined.mux(packet)
                    frames += 1
                start += frames * frame
    return f.getvalue()


def video_feature(mp4):
    """What meta/info.json says about a camera: of the bytes of one of its mp4s."""
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        return {
            "dtype": "video",
            "shape": [stream.height, stream.width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": stream.height,
                "video.width": stream.width,
                "video.codec": stream.codec_context.name,
                "video.pix_fmt": stream.codec_context.pix_fmt,
                "video.is_depth_map": False,
                "video.fps": int(Fraction(stream.average_rate)),
                "video.channels": 3,
                "has_audio": False,
            },
        }


# --- a data set ---


def part_name(number):
    """The file of a part whose existence says that the part is complete, below the data set."""
    return f"meta/episodes/{PART.format(number)}.parquet"


def write_part(root, number, first_index, first_row, episodes, tasks, fps):
    """Write a part with consecutive episodes. first_index, first_row: the number of its first
    episode and row in the data set."""
    # videos of all episodes of the part in one file
    for name in episodes[0].videos:
        path = os.path.join(root, "videos", name, PART.format(number) + ".mp4")
        write_atomically(path, join_mp4s([e.videos[name] for e in episodes]))

    tables = []
    described = []
    start = 0
    for i, episode in enumerate(episodes):
        row = first_row + start
        table = table_of(episode.rows, first_index + i, row, episode.task, fps)
        tables.append(table)

        about = {
            "episode_index": first_index + i,
            "tasks": [tasks[episode.task]],
            "length": len(table),
            "data/chunk_index": 0,
            "data/file_index": number,
            "dataset_from_index": row,
            "dataset_to_index": row + len(table),
        }
        for name in episode.videos:
            about[f"videos/{name}/chunk_index"] = 0
            about[f"videos/{name}/file_index"] = number
            about[f"videos/{name}/from_timestamp"] = start / fps
            about[f"videos/{name}/to_timestamp"] = (start + len(table)) / fps
        for name, values in statistics(table).items():
            for what, value in values.items():
                about[f"stats/{name}/{what}"] = value
        about["meta/episodes/chunk_index"] = 0
        about["meta/episodes/file_index"] = number
        described.append(about)
        start += len(table)

    write_tables(os.path.join(root, "data", PART.format(number) + ".parquet"), tables)
    write_tables(os.path.join(root, part_name(number)), [pa.Table.from_pylist(described)])


def statistics(table):
    """{column: {"min", "max", "mean", "std", "count"}} of a data table, each a list."""
    out = {}
    for name in table.column_names:
        values = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            values = values.flatten()
        x = values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
        out[name] = {
            "min": x.min(0).tolist(),
            "max": x.max(0).tolist(),
            "mean": x.mean(0).tolist(),
            "std": x.std(0).tolist(),
            "count": [len(x)],
        }
    return out


def finish(root, parts, tasks, fps, robot_type):
    """Write what is said about the whole data set; info.json last."""
    # the index column is pandas' own, so that pandas finds the tasks by their text
    index = "__index_level_0__"
    of_tasks = pa.table({"task_index": pa.array(range(len(tasks))), index: pa.array(tasks)})
    kinds = [("task_index", "int64", "int64"), (None, "unicode", "object")]
    columns = []
    for name, kind, of_numpy in kinds:
        column_about = {"name": name, "field_name": name or index, "pandas_type": kind}
        columns.append(column_about | {"numpy_type": of_numpy, "metadata": None})
    about = {"index_columns": [index], "columns": columns, "column_indexes": []}
    of_tasks = of_tasks.replace_schema_metadata({"pandas": json.dumps(about)})
    write_tables(os.path.join(root, "meta/tasks.parquet"), [of_tasks])

    data = [os.path.join(root, "data", PART.format(i) + ".parquet") for i in range(parts)]
    whole = pa.concat_tables(pq.read_table(path) for path in data)
    stats = json.dumps(statistics(whole), indent=4).encode()
    write_atomically(os.path.join(root, "meta/stats.json"), stats)

    features = {}
    folder = os.path.join(root, "videos")
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name, PART.format(0) + ".mp4"), "rb") as f:
            features[name] = video_feature(f.read())
    for field in whole.schema:
        size = 1
        kind = field.type
        if pa.types.is_fixed_size_list(kind):
            size = kind.list_size
            kind = kind.value_type
        dtype = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
        features[field.name] = {"dtype": dtype, "shape": [size], "names": None}

    episodes = len(np.unique(whole.column("episode_index").to_numpy()))
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": episodes,
        "total_frames": len(whole),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    write_atomically(os.path.join(root, "meta/info.json"), json.dumps(info, indent=4).encode())
