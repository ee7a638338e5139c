"""files/lerobot.py: LeRobot data sets of both versions -> the episodes and clips of droid.py."""

import http.server
import io
import json
import shutil
import threading

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import droid
from droid import DroidReader, find_episodes, open_droid
from files import lerobot
from files.episodes import read_pictures
from prepare.lerobot import column, join_mp4s, table_of, write_tables
from tests.harness import HEIGHT, WIDTH, Run, needs_mujoco, picture, read_number, run, run_bench

pytestmark = pytest.mark.usefixtures("deadline", "forkserver")

FPS = 15
LENGTHS = (30, 37, 43, 34)
# what is added to the number of a picture of each camera
CAMERAS = {"observation.images.exterior_1_left": 0, "observation.images.wrist_left": 300}
SMALL = {"crop_size": 64, "crop": "square"}


def quiet(line):
    pass


# --- a data set as lerobot's writer lays it out ---


def rows_of(seed, steps):
    """Fields of an episode in DROID's layout; the gripper tells the row: row / 1000."""
    rng = np.random.default_rng(seed)
    pose = np.cumsum(rng.normal(0, 0.02, (steps, 6)), axis=0)
    rows = {
        "observation.state.cartesian_position": pose,
        "observation.state.gripper_position": np.arange(steps) / 1000,
        "observation.state": rng.normal(0, 1, (steps, 8)),
        "action": rng.normal(0, 1, (steps, 8)),
        "action.joint_velocity": rng.normal(0, 0.3, (steps, 7)),
    }
    rows = {name: np.float32(x) for name, x in rows.items()}
    return rows | {"is_episode_successful": np.full(steps, seed % 2 == 0)}


def numbered(numbers, codec="libx264", rate=FPS):
    """An mp4 of pictures with these numbers."""
    f = io.BytesIO()
    with av.open(f, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate, pix_fmt="yuv420p")
        stream.width = WIDTH
        stream.height = HEIGHT
        if codec == "libx264":
            stream.options = {"g": "8", "bf": "2", "preset": "ultrafast"}
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if codec == "libsvtav1":
            stream.options = {"g": "2", "crf": "30", "preset": "12"}
        stream.codec_context.thread_count = 1
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(int(number)))))
        container.mux(stream.encode())
    return f.getvalue()


def shown(episode, name, steps):
    """Numbers of the pictures of an episode: each only once in a camera."""
    return CAMERAS[name] + 45 * episode + np.arange(steps)


def write_bytes(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def features_of(rows, dtype):
    """ "features" of info.json."""
    features = {}
    for name in CAMERAS:
        # not what the file is: codecs are often wrong there
        about = {"video.codec": "h264", "video.fps": FPS}
        features[name] = {"dtype": dtype, "shape": [HEIGHT, WIDTH, 3], "info": about}
    for name, x in rows.items():
        size = x.shape[1] if x.ndim > 1 else 1
        features[name] = {"dtype": str(x.dtype), "shape": [size], "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def write_info(root, version, rows, dtype="video", **change):
    # totals are often wrong
    info = {
        "codebase_version": f"v{version}",
        "robot_type": "arm",
        "fps": FPS,
        "chunks_size": 1000,
        "total_episodes": 999,
        "total_frames": 1,
        "data_path": lerobot.DATA[version],
        "video_path": lerobot.VIDEO[version],
        "features": features_of(rows, dtype),
    }
    write_bytes(root / "meta/info.json", json.dumps(info | change).encode())


def write_3(root, groups, splits, codec="libx264", images=False, drift=0.0, change=None):
    """A data set of version 3.0. groups: episodes of each data file; splits: episodes of each mp4,
    for each camera; drift: seconds that from_timestamp is off more with each episode; change:
    function of (episode, its rows), to break them."""
    table = {}
    for number, group in enumerate(groups):
        tables = []
        for e in group:
            rows = rows_of(e, LENGTHS[e])
            if change:
                rows = change(e, rows)
            of_data = table_of(rows, e, sum(LENGTHS[:e]), 0, FPS)
            for name in CAMERAS if images else ():
                pngs = []
                for i in shown(e, name, LENGTHS[e]):
                    f = io.BytesIO()
                    Image.fromarray(picture(int(i))).save(f, "PNG")
                    pngs.append({"bytes": f.getvalue(), "path": None})
                of_data = of_data.append_column(name, pa.array(pngs))
            tables.append(of_data)
            table[e] = {
                "episode_index": e,
                "tasks": ["pick"],
                "length": LENGTHS[e],
                "data/chunk_index": 0,
                "data/file_index": number,
                "stats/action/min": [0.0],
            }
        write_tables(root / f"data/chunk-000/file-{number:03d}.parquet", tables)

    for name, split in {} if images else splits.items():
        for number, group in enumerate(split):
            films = [numbered(shown(e, name, LENGTHS[e]), codec) for e in group]
            path = root / f"videos/{name}/chunk-000/file-{number:03d}.mp4"
            write_bytes(path, join_mp4s(films))
            start = 0
            for k, e in enumerate(group):
                table[e][f"videos/{name}/chunk_index"] = 0
                table[e][f"videos/{name}/file_index"] = number
                table[e][f"videos/{name}/from_timestamp"] = start / FPS + k * drift
                # one frame less than it is, as some writers have it
                table[e][f"videos/{name}/to_timestamp"] = (start + LENGTHS[e] - 1) / FPS
                start += LENGTHS[e]
    rows = [table[e] for e in sorted(table)]
    tables = [pa.Table.from_pylist(rows[:2]), pa.Table.from_pylist(rows[2:])]
    write_tables(root / "meta/episodes/chunk-000/file-000.parquet", [t for t in tables if len(t)])
    write_info(root, "3.0", rows_of(0, 2), "image" if images else "video")
    return root


def write_2(root, codec="libx264", lengths=LENGTHS):
    """The same of version 2.1."""
    lines = []
    for e, steps in enumerate(lengths):
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        write_tables(path, [table_of(rows_of(e, steps), e, sum(LENGTHS[:e]), 0, FPS)])
        lines.append(json.dumps({"episode_index": e, "tasks": ["pick"], "length": steps}))
        for name in CAMERAS:
            film = numbered(shown(e, name, steps), codec)
            write_bytes(root / f"videos/chunk-000/{name}/episode_{e:06d}.mp4", film)
    write_bytes(root / "meta/episodes.jsonl", "\n".join(lines).encode())
    write_info(root, "2.1", rows_of(0, 2))
    return root


GROUPS = [[0, 1], [2, 3]]
# the cameras do not begin a new mp4 at the same episodes
SPLITS = dict(zip(CAMERAS, ([[0, 1, 2], [3]], [[0], [1, 2, 3]])))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A data set of each kind."""
    folder = tmp_path_factory.mktemp("lerobot")
    write_3(folder / "three", GROUPS, SPLITS)
    write_3(folder / "images", GROUPS, SPLITS, images=True)
    write_2(folder / "two", "mpeg4")
    return folder


def copy(sets, name, to):
    return shutil.copytree(sets / name, to / name)


def opened(data, reader=None, **options):
    reader = reader or DroidReader(4, 5, **SMALL)
    options = {"idle_filter": "off"} | options
    return open_droid(str(data), reader=reader, log=quiet, **options)


def number_of(record):
    return int(record.key[len("episode_") :][:6])


def check_pictures(records, cameras=("exterior_1", "wrist")):
    """The pictures of all rows of all episodes are those that were written."""
    of_camera = dict(zip(("exterior_1", "wrist"), CAMERAS))
    for r in records:
        for camera in cameras:
            rows = np.arange(0, r.steps, 3)
            numbers = [read_number(x[:, 8:72]) for x in read_pictures(r, camera, rows)]
            expected = shown(number_of(r), of_camera[camera], r.steps)[rows]
            assert numbers == expected.tolist(), (r.key, camera)


BOTH = {"camera": ("exterior_1", "wrist")} | SMALL


@pytest.mark.parametrize("name", ["three", "images", "two"])
def test_pictures_and_states_are_of_the_same_rows(sets, name):
    """Bug: frames are found by time, from the end of the episode before, or from the offset of
    another camera; the codec is taken from info.json; totals are believed."""
    reader = DroidReader(4, 5, **BOTH)
    train, _, bad = opened(sets / name, reader)
    assert bad == []
    assert [r.steps for r in sorted(train, key=number_of)] == list(LENGTHS)
    check_pictures(train)
    for r in train:
        states = reader.motion(r, np.arange(r.steps))[1]
        rows = rows_of(number_of(r), r.steps)
        np.testing.assert_array_equal(states[:, 6], rows["observation.state.gripper_position"])
        np.testing.assert_array_equal(states[:, :6], rows["observation.state.cartesian_position"])


def test_a_clip_has_pictures_states_and_actions_of_its_rows(sets):
    """Bug: a batch pairs pictures with the states of other rows."""
    reader = DroidReader(4, 5, **BOTH)
    train = opened(sets / "three", reader)[0]
    batch = next(iter(droid.droid_clips(train, 8, reader=reader, num_workers=0)))
    assert not batch["bad"]
    for key, video, states in zip(batch["key"], batch["video"], batch["states"]):
        rows = np.round(states[:, 6].numpy() * 1000).astype(int)
        assert np.diff(rows).tolist() == [3, 3, 3]
        base = 45 * int(key[len("episode_") :][:6])
        first = [read_number(x) - r for x, r in zip(video, rows)]
        assert first in ([base] * 4, [base + 300] * 4)


@pytest.mark.parametrize("codec", ["libsvtav1", "mpeg4", "libvpx-vp9"])
def test_any_codec(tmp_path, codec):
    """Bug: only the codec that info.json names is read, or that of our own tests."""
    try:
        numbered([0], codec)
    except (av.FFmpegError, ValueError) as e:
        pytest.skip(f"this PyAV has no {codec}: {e}")
    split = dict.fromkeys(CAMERAS, [[0, 1]])
    check_pictures(opened(write_3(tmp_path / "set", [[0, 1]], split, codec))[0], ["exterior_1"])


def test_times_that_drift_do_not_matter_while_frames_are_as_many_as_rows(tmp_path):
    """Bug: the library's own failure: start times add up to the wrong frame (lerobot #3177)."""
    split = dict.fromkeys(CAMERAS, [[0, 1, 2, 3]])
    root = write_3(tmp_path / "set", [[0, 1, 2, 3]], split, drift=0.9 / FPS)
    check_pictures(opened(root)[0], ["exterior_1"])


def test_in_a_video_with_other_frames_the_clock_decides(tmp_path):
    """Bug: after episodes were deleted (lerobot #2447) or a video was written at another rate, rows
    get the pictures of others without a word; a frame that is not there is replaced by any."""
    root = write_3(tmp_path / "set", GROUPS, SPLITS)
    wrist = "observation.images.wrist_left"

    # the mp4 of episodes 1 to 3 keeps those of one that is no longer listed, between 1 and 2
    path = root / f"videos/{wrist}/chunk-000/file-001.mp4"
    films = [numbered(shown(e, wrist, LENGTHS[e])) for e in (1, 2, 3)]
    path.write_bytes(join_mp4s([films[0], numbered(range(900, 910)), *films[1:]]))
    table = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(table).to_pylist()
    for e in (2, 3):
        rows[e][f"videos/{wrist}/from_timestamp"] += 10 / FPS
    write_tables(table, [pa.Table.from_pylist(rows)])
    reader = DroidReader(4, 5, **BOTH)
    check_pictures(opened(root, reader)[0])

    # every frame twice, at twice the rate
    path.write_bytes(join_mp4s(films))
    one = root / f"videos/{wrist}/chunk-000/file-000.mp4"
    one.write_bytes(numbered(np.repeat(shown(0, wrist, LENGTHS[0]), 2), rate=2 * FPS))
    first = next(r for r in opened(root, reader)[0] if number_of(r) == 0)
    check_pictures([first])

    # ten frames too few
    one.write_bytes(numbered(shown(0, wrist, LENGTHS[0] - 10)))
    assert read_number(read_pictures(first, "wrist", [19])[0][:, 8:72]) == 319
    with pytest.raises(ValueError, match="nearest frame is .* away: it has 20 frames"):
        read_pictures(first, "wrist", [19, 25])


@pytest.mark.parametrize("name", ["three", "two"])
def test_a_missing_video_costs_its_episodes_only(sets, tmp_path, name):
    """Bug: an mp4 that was not downloaded ends the run, or costs the data set, or nobody is told
    which; a camera that nobody asked for costs an episode."""
    root = copy(sets, name, tmp_path)
    video = "observation.images.exterior_1_left"
    if name == "three":
        lost = f"videos/{video}/chunk-000/file-001.mp4"
    else:
        lost = f"videos/chunk-000/{video}/episode_000003.mp4"
    (root / lost).unlink()
    train, _, bad = opened(root)
    assert sorted(map(number_of, train)) == [0, 1, 2]
    [(file, key, reason)] = bad
    assert key.startswith("episode_000003-")
    assert f"{lost} is not there" in reason
    assert len(opened(root, DroidReader(4, 5, camera="wrist", **SMALL))[0]) == 4

    # where the template says videos/, some have video/
    (root / "videos").rename(root / "video")
    train, _, bad = opened(root)
    assert len(train) == 3
    check_pictures(train, ["exterior_1"])


def test_opening_reads_no_video(sets, tmp_path):
    """Bug: 30,000 mp4s are opened before the first step; or a damaged one ends the run."""
    root = copy(sets, "two", tmp_path)
    for path in (root / "videos").glob("*/*exterior*/*.mp4"):
        if "000002" not in path.name:
            path.write_bytes(b"nonsense")
    reader = DroidReader(4, 5, **SMALL)
    train, _, bad = opened(root, reader)
    assert (len(train), bad) == (4, [])
    batch = next(iter(droid.droid_clips(train, 8, reader=reader, num_workers=0, seed=1)))
    assert {key[:14] for key in batch["key"]} == {"episode_000002"}
    assert batch["bad"]
    assert all("mp4" in reason for _, _, reason in batch["bad"])


def test_rows_are_counted_and_grouped(tmp_path):
    """Bug: an episode whose rows are not those of the metadata gets the frames of another; one bad
    episode costs its file."""

    def change(episode, rows):
        steps = LENGTHS[episode] - (episode == 1)
        return {name: x[:steps] for name, x in rows.items()}

    root = write_3(tmp_path / "set", GROUPS, SPLITS, change=change)
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    frames = table.column("frame_index").to_numpy().copy()
    frames[50:] += 1
    place = table.column_names.index("frame_index")
    write_tables(path, [table.set_column(place, "frame_index", column(frames))])

    train, _, bad = opened(root)
    assert sorted(map(number_of, train)) == [0, 2]
    assert sorted((key, reason) for _, key, reason in bad) == [
        ("episode_000001", "the metadata say 37 rows, and its data file has 36"),
        ("episode_000003", "its frame_index is not 0 to 33, one more a row"),
    ]


def test_data_files_that_are_missing_or_cut_cost_their_episodes(sets, tmp_path):
    """Bug: a part of a download, or a recording without finalize(), ends the run or is read as
    something else."""
    root = copy(sets, "three", tmp_path)
    path = root / "data/chunk-000/file-001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    train, _, [(file, _, reason)] = opened(root)
    assert len(train) == 2
    assert (file, "no parquet file, or only a part of it" in reason) == (str(path), True)
    path.unlink()
    assert "the metadata list 2 episodes in it" in opened(root)[2][0][2]


def test_an_episode_has_one_name_wherever_it_lies(sets, tmp_path):
    """Bug: another folder, another version or a merged copy of a data set is split otherwise, so
    that a continued run trains on what was held out; or copies are trained on and held out."""
    here = opened(sets / "three", val_fraction=0.5)
    moved = opened(copy(sets, "three", tmp_path).rename(tmp_path / "x"), val_fraction=0.5)
    other = opened(sets / "two", val_fraction=0.5)
    names = [{r.key for r in found[1]} for found in (here, moved, other)]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 2

    said = []
    reader = DroidReader(4, 5, **SMALL)
    both = [str(sets / "three"), str(sets / "two")]
    train = open_droid(both, reader=reader, idle_filter="off", log=said.append)[0]
    assert len(train) == 4
    assert "4 episodes that are copies" in said[0]
    with pytest.raises(ValueError, match="share 4 episodes"):
        opened(sets / "three", val_data=str(sets / "two"))


def test_idle_rows_follow_from_the_states(tmp_path):
    """Bug: nothing is known to be idle in a data set that has no joint velocities; slow joints are
    idle because their numbers are small, or noise is motion."""

    def change(episode, rows):
        steps = LENGTHS[episode]
        rng = np.random.default_rng(episode)
        state = np.zeros((steps, 2))
        state[:, 0] = 0.001 * np.arange(steps)
        state[:, 1] = rng.normal(0, 0.05, steps) + 100 * (np.arange(steps) > 25)
        state[10:20, 0] = state[10, 0]
        return {"observation.state": np.float32(state), "action": np.float32(state)}

    split = dict.fromkeys(CAMERAS, [[0, 1]])
    root = write_3(tmp_path / "set", [[0, 1]], split, change=change)
    write_info(root, "3.0", {"observation.state": np.zeros((1, 2)), "action": np.zeros((1, 2))})
    index = lerobot.index_data_file(find_episodes(str(root))[0])[0]
    assert [e["still"] for e in index] == [[[11, 20]], [[11, 20]]]

    # DROID's columns: the commanded velocity, as in its TFRecords
    def still(episode, rows):
        velocity = rows["action.joint_velocity"].copy()
        pose = rows["observation.state.cartesian_position"].copy()
        velocity[5:15] = 0.1
        pose[9:20] = pose[9]
        return rows | {
            "action.joint_velocity": velocity,
            "observation.state.cartesian_position": pose,
        }

    root = write_3(tmp_path / "droid", [[0]], dict.fromkeys(CAMERAS, [[0]]), change=still)
    [entry] = lerobot.index_data_file(find_episodes(str(root))[0])[0]
    assert (entry["idle"], entry["still"]) == ([[6, 15]], [[10, 15]])


def test_success_of_an_episode(sets):
    """Bug: --success only keeps failures."""
    train = opened(sets / "three", success="only")[0]
    assert sorted(map(number_of, train)) == [0, 2]


def test_other_robots_name_their_fields(sets, tmp_path):
    """Bug: a key that is there is not found, since it has dots; actions of another row; an error
    that does not list what could be named."""
    reader = DroidReader(
        3,
        5,
        camera="observation.images.wrist_left",
        state_keys=["observation.state"],
        action_keys=["action"],
        **SMALL,
    )
    train = opened(sets / "three", reader)[0]
    rows = rows_of(number_of(train[0]), train[0].steps)
    actions, states = reader.motion(train[0], np.array([4, 7, 10]))
    np.testing.assert_array_equal(states, rows["observation.state"][[4, 7, 10]])
    means = [rows["action"][a:b].mean(0, dtype=np.float64) for a, b in ((4, 7), (7, 10))]
    np.testing.assert_allclose(actions, means)
    assert reader.views(train[0]) == ["wrist"]

    for options, said in (
        ({"state_keys": ["states"]}, "no states in it, but observation.state.cartesian_position"),
        ({"action_keys": ["act"]}, "no act in it, but .*action \\(8\\), .*--action_keys"),
        ({"camera": "top"}, "no camera top in it, but exterior_1, wrist \\(--camera\\)"),
        ({"state_keys": ["observation.state"]}, "is not taken for a pose"),
    ):
        with pytest.raises(ValueError, match=said):
            opened(sets / "three", DroidReader(4, 5, **(SMALL | options)))

    # the metadata say another shape
    root = copy(sets, "three", tmp_path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.state.cartesian_position"]["shape"] = [7]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has 6 numbers a row, and meta/info.json says 7"):
        opened(root)


def test_damaged_metadata_are_named(sets, tmp_path):
    """Bug: a version that is laid out otherwise is read as nonsense; an error that names no file or
    no remedy."""
    root = copy(sets, "three", tmp_path)
    info = json.loads((root / "meta/info.json").read_text())
    for change, said in (
        ({"codebase_version": "v2.0"}, "says codebase_version 'v2.0', .*convert"),
        ({"codebase_version": None}, "codebase_version None"),
        ({"fps": 0}, "says fps 0"),
        ({"features": []}, "lists no features"),
        (
            {"features": {"action": {"dtype": "float32", "shape": "8"}}},
            "the shape of action is '8'",
        ),
        ({"data_path": "data/{chunk}.parquet"}, "is no template"),
        ({"codebase_version": "v2.1"}, "no .*episodes.jsonl, which lists"),
    ):
        (root / "meta/info.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=said):
            opened(root)
    (root / "meta/info.json").write_text('{"fps": ')
    with pytest.raises(ValueError, match="info.json is no JSON"):
        opened(root)
    (root / "meta/info.json").write_text(json.dumps(info))
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(ValueError, match="no parquet file in .*meta/episodes"):
        opened(root)
    (root / "meta/info.json").unlink()
    with pytest.raises(FileNotFoundError, match="the folder of a LeRobot data set"):
        opened(root)


@pytest.fixture
def server(sets):
    """The data sets at a web server, which lists no folder."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(sets))

        def list_directory(self, path):
            self.send_error(404)

        def send_head(self):
            # one range, as fsspec asks for it
            f = super().send_head()
            if f is None or "Range" not in self.headers:
                return f
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            f.seek(int(first))
            return io.BytesIO(f.read(int(last) - int(first) + 1))

        def send_response(self, code, message=None):
            super().send_response(206 if "Range" in self.headers and code == 200 else code)

        def send_header(self, name, value):
            if name == "Content-Length" and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                value = str(min(int(last), int(value) - 1) - int(first) + 1)
            super().send_header(name, value)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


@pytest.mark.parametrize("name", ["three", "two"])
def test_a_url_gives_what_the_folder_gives(sets, server, name):
    """Bug: only a disk can be read; a URL gives other episodes or pictures."""
    fs = fsspec.filesystem("memory")
    fs.put(str(sets / name), f"/{name}", recursive=True)
    local = opened(sets / name)[0]
    for url in (f"memory://{name}", f"{server}/{name}"):
        train, _, bad = opened(url)
        assert bad == []
        assert [(r.key, r.steps) for r in train] == [(r.key, r.steps) for r in local]
        pictures = [read_pictures(r[2], "exterior_1", [3, 9]) for r in (train, local)]
        np.testing.assert_array_equal(*pictures)


def test_folders_of_data_sets_and_globs_are_found(sets, tmp_path):
    """Bug: a folder of data sets, a glob of them or one of their files is no data set."""
    for data in (sets, sets / "t*", [sets / "three", sets / "two"]):
        found = find_episodes([*map(str, data)] if isinstance(data, list) else str(data))
        assert {p.split("/data/")[0] for p in found} >= {str(sets / "three"), str(sets / "two")}
    [path] = find_episodes(str(sets / "three/data/chunk-000/file-000.parquet"))
    assert sorted(map(number_of, opened(path)[0])) == [0, 1]


def test_inspect_tells_what_is_there_and_what_would_be_left_out(sets, tmp_path):
    """Bug: what is wrong with a data set shows after a day of training; a user without DROID's
    fields learns nothing about those that are there."""
    root = copy(sets, "three", tmp_path)
    wrist = "observation.images.wrist_left"
    path = root / f"videos/{wrist}/chunk-000/file-000.mp4"
    path.write_bytes(numbered(shown(0, wrist, 20)))
    text = run(tmp_path, "droid.py", "--inspect", root, "--batch_size 2")
    assert "LeRobot 3.0, robot arm, 4 episodes, 144 rows at 15 a second" in text
    assert "success: 2 of 4 episodes; 30 to 43 rows an episode" in text
    assert f"80x64     h264        15      2  {wrist}" in text
    assert "observation.state.gripper_position               1          0      0.042" in text
    [line] = [line for line in text.splitlines() if line.startswith("would be left out")]
    assert "episode_000000-" in line
    assert "it has 20 frames, and its episodes 30 rows" in line

    # fields of another robot: the description comes before the error
    flags = "--state_keys states --batch_size 2"
    code, text = Run(tmp_path, "droid.py", "--inspect", sets / "two", flags).wait()
    assert code == 1
    assert "LeRobot 2.1" in text
    assert "mpeg4" in text
    assert "error: no usable episode" in text.splitlines()[-1]


@pytest.mark.slow
def test_the_simulated_arm_goes_through_all_commands(tmp_path):
    """Bug: prepare.robot writes what our reader takes and nobody else does, or other episodes than
    as TFRecords; a command that does not know the kind of episodes."""
    needs_mujoco()
    size = "--episodes 4 --steps 40 60 --shards 2 --workers 1"
    text = run(tmp_path, "prepare/robot.py", size, "--format lerobot --out", tmp_path / "set")
    assert "in 2 files, 0 there already" in text
    run(tmp_path, "prepare/robot.py", size, "--out", tmp_path / "rlds")

    # the same motion and pictures as TFRecords, but for their compression
    reader = DroidReader(4, 5, 64, camera=("exterior_1", "wrist"))
    train, _, bad = opened(tmp_path / "set", reader)
    others = opened(tmp_path / "rlds", reader)[0]
    assert (len(train), bad) == (4, [])
    for r in train:
        other = sorted(others, key=lambda x: x.key)[number_of(r)]
        rows = np.array([0, 7, r.steps - 1])
        for a, b in zip(reader.motion(r, rows), reader.motion(other, rows)):
            np.testing.assert_allclose(a, b, atol=1e-6)
        for camera in ("exterior_1", "wrist"):
            both = [np.float32(read_pictures(x, camera, rows)) for x in (r, other)]
            assert np.abs(both[0] - both[1]).mean() < 4

    # a part that is there is kept, one that is not is made again, to the byte
    lost = tmp_path / "set/meta/episodes/chunk-000/file-001.parquet"
    before = lost.read_bytes()
    lost.unlink()
    text = run(tmp_path, "prepare/robot.py", size, "--format lerobot --out", tmp_path / "set")
    assert "in 2 files, 1 there already" in text
    assert lost.read_bytes() == before

    data = ["--data", tmp_path / "set", "--val_fraction 0.5"]
    scaler = tmp_path / "scaler.pkl"
    run(tmp_path, "fit_scaler.py", "--dataset droid", *data, "--output", scaler)
    clips = "--crop_size 32 --crop square --frames_per_clip 4 --num_workers 0 --batch_size 4"
    small = "--base none --full --pred_dim 48 --pred_depth 2 --pred_heads 3 --grad_accum 1"
    flags = [*data, "--scaler", scaler, clips, small, "--val_clips 8 --warmup_steps 1"]
    video = ["--encoder vit_tiny --out_dir", tmp_path / "run"]
    run(tmp_path, "train_lora.py", *flags, *video, "--max_steps 3")
    run(tmp_path, "train_lora.py", *flags, *video, "--max_steps 5 --resume")
    judged = ["--checkpoint", tmp_path / "run"]
    text = run(tmp_path, "eval.py", *judged, "--samples 4 --batch_size 4 --num_workers 0")
    assert "skill" in text
    run(tmp_path, "plan.py", *judged, "--num_samples 8 --num_elites 2 --iterations 1")

    settings = "--encoder vit_tiny --crop_size 32 --crop square --phases 2 --out"
    run(tmp_path, "encode.py", "--dataset droid", *data[:2], settings, tmp_path / "f")
    names = sorted(p.name for p in (tmp_path / "f").glob("*.tar"))
    assert names == [f"set--data--chunk-000--file-{i:03d}.parquet.tar" for i in range(2)]
    features = ["--data", tmp_path / "f/*.tar", *flags[2:], "--max_steps 3 --out_dir"]
    run(tmp_path, "train_lora.py", *features, tmp_path / "of-features")


@pytest.mark.slow
def test_the_benchmark_reads_all_that_it_made(tmp_path):
    """Bug: the speed of our reader is that of reading something else, or of leaving it out."""
    size = "--episodes 2 --steps 40 --clips 2 --many 120"
    rows, text = run_bench(tmp_path, "lerobot", size)
    by_reader = {row["reader"]: row for row in rows if "reader" in row}
    assert "lerobot" in by_reader or "lerobot: left out" in text
    assert all(row.get("clips that differ", 0) == 0 for row in by_reader.values())
    opened = [(row["opening"], row["usable"], row["bad"]) for row in rows if "opening" in row]
    assert opened == [("first time", 120, 0), ("again", 120, 0)]
