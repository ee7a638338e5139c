"""Plain video: which files are taken, clips by time stamps, splits, what is wrong with a film."""

import http.server
import itertools
import os
import shutil
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from data import Clips, one_pass, open_films, open_split, vpt_loader, windows
from files import films
from files.films import FilmReader, film_paths
from files.remote import cached
from files.vpt import ClipReader
from tests.harness import (
    FIXTURES,
    HEIGHT,
    WIDTH,
    contractor,
    film,
    jsonl,
    picture,
    read_number,
    write_tar,
)

READER = FilmReader(8, 5.0, 2, HEIGHT)  # 8 frames, 1.4 s from the first to the last


def write_film(path, codec="libx264", frames=120, rate=20, times=None, size=None, **options):
    """A video of numbered frames, at `rate` or at `times` in milliseconds; the ending of the path
    says which container. size: (width, height) of plain grey instead."""
    with av.open(str(path), "w") as c:
        stream = c.add_stream(codec, rate=rate)
        stream.width, stream.height = size or (WIDTH, HEIGHT)
        stream.pix_fmt = "yuv420p"
        stream.options = {"threads": "1", "preset": "veryfast", "crf": "18", "g": "30"} | options
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            image = picture(i) if size is None else np.full((*size[::-1], 3), i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts = i if times is None else int(times[i])
            frame.time_base = Fraction(1, rate if times is None else 1000)
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    return str(path)


def numbers(clip):
    return [read_number(x[:, :, (x.shape[2] - HEIGHT) // 2 :]) for x in clip["video"]]


def clip_at(records, place, number=0, reader=READER):
    clips = Clips(records, [1.0] * len(records), reader)
    return clips.read(number, place, np.random.default_rng(0))


def take(loader, count):
    """[[key and frame numbers of each clip] of each batch]."""
    batches = []
    for batch in itertools.islice(loader, count):
        clips = zip(batch["key"], batch["video"])
        batches.append([(key, *(read_number(x) for x in v)) for key, v in clips])
    return batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve videos in folders and in a tar, of three kinds."""
    folder = tmp_path_factory.mktemp("films")
    os.makedirs(folder / "a" / "deep")
    os.makedirs(folder / "b")
    for n in range(6):
        write_film(folder / "a" / f"walk-{n}.mp4", frames=90 + n)
    write_film(folder / "a" / "deep" / "run.MKV", frames=140, bf="3")
    write_film(folder / "b" / "swim.webm", "libvpx", frames=70, b="1M")
    write_film(folder / "b" / "dive.avi", "mpeg4", frames=75)
    members = {f"tar/fly-{n}.mp4": film(100 + n) for n in range(3)}
    write_tar(folder / "more.tar", members | {"tar/notes.txt": b"nothing"})
    (folder / "a" / "notes.txt").write_text("no video, and not called one")
    return folder


# --- frames ---


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("x.mp4", "libx264", {"bf": "3"}),
        ("x.mp4", "libx264", {"bf": "2", "g": "500"}),
        ("x.mov", "libx264", {}),
        ("x.mkv", "libx264", {"bf": "3"}),
        ("x.mkv", "ffv1", {}),
        ("x.webm", "libvpx", {"b": "1M"}),
        ("x.webm", "libvpx-vp9", {"b": "1M", "cpu-used": "8", "lag-in-frames": "16"}),
        ("x.avi", "mpeg4", {"bf": "2", "b": "1M"}),
    ],
)
def test_every_container_gives_the_frames_of_a_clip(tmp_path, name, codec, options):
    """Bug: frames in the order of decoding, or off by a few after a seek, in a container that has
    no table of its frames."""
    train, shares, val, bad = open_films(write_film(tmp_path / name, codec, **options), READER)
    assert not bad and not val and train[0].length == 120
    assert abs(train[0].duration - 120) < 1 and shares == [train[0].duration]
    assert numbers(clip_at(train, 0)) == list(range(0, 32, 4))
    assert numbers(clip_at(train, 2)) == list(range(64, 96, 4))
    # 92 frames can be the first of a clip
    assert numbers(clip_at(train, 50.5 / 92)) == list(range(50, 79, 4))
    assert numbers(clip_at(train, 1 - 1e-12))[-1] == 119


def test_play_as_plain_video_is_the_same_video(tmp_path):
    """Bug: pretraining on plain video sees other frames, or another order, than the run on actions
    of the same recordings."""
    members = {}
    for n in range(3):
        members |= {f"rec{n}.mp4": film(100 + 40 * n)}
        members |= {f"rec{n}.jsonl": jsonl(contractor(100 + 40 * n, seed=n))}
    path = write_tar(tmp_path / "play.tar", members)
    play = open_split(path)
    plain = open_films(path, READER)
    assert [r.key for r in plain[0]] == [r.key for r in play[0]] and not plain[3]
    assert plain[1] == pytest.approx(play[1])

    reader = ClipReader(8, 5.0, 2, HEIGHT)
    a = Clips(play[0], play[1], reader, 3)
    b = Clips(plain[0], plain[1], READER, 3)
    assert windows(a, 2, 100) == windows(b, 2, 100)
    assert one_pass(play[0], reader) == one_pass(plain[0], READER)
    options = {"batch_size": 4, "batches_per_epoch": 3, "num_workers": 0, "seed": 3}
    loaders = (
        vpt_loader(play[:2], reader=reader, **options),
        vpt_loader(plain[:2], reader=READER, **options),
    )
    for x, y in itertools.islice(zip(*loaders), 4):
        assert (x["video"] == y["video"]).all() and x["key"] == y["key"]
        assert set(x) - set(y) == {"actions", "states"} and y["video"].dtype == torch.uint8


@pytest.mark.parametrize("rate", [10, 24, 30, 60])
@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_any_frame_rate_is_sampled_by_time(tmp_path, rate, name):
    """Bug: every fourth frame is taken whatever the rate, so clips of a 60 fps camera last a third
    as long; rounded stamps (milliseconds of mkv) shift frames by one."""
    train = open_films(write_film(tmp_path / name, frames=4 * rate, rate=rate), READER)[0]
    assert train[0].rate == pytest.approx(rate, rel=1e-2)
    for place in (0, 0.3, 0.9):
        got = np.array(numbers(clip_at(train, place)))
        exact = got[0] + np.arange(8) * rate / 5
        assert np.abs(got - exact).max() <= 0.5
    assert sum(map(len, windows(Clips(train, [1.0], READER), 2, 99))) == 2


def test_a_varying_rate_is_sampled_by_time(tmp_path):
    """Bug: the mean rate is taken for the rate: in a screen recording, clips would run at another
    speed wherever something moves."""
    steps = np.random.default_rng(0).integers(15, 120, 240)
    times = np.cumsum(steps) - steps[0]
    for name in ("x.mp4", "x.mkv"):
        train = open_films(write_film(tmp_path / name, frames=240, times=times), READER)[0]
        interval = 1000 / train[0].rate
        for place in (0.1, 0.5, 0.8):
            got = numbers(clip_at(train, place))
            for k, number in enumerate(got):
                late = times[got[0]] + 200 * k - times[number]
                until = times[number + 1] - times[number]
                assert -interval / 2 <= late < until
            assert got[0] > 10 and len(set(np.diff(got))) > 2


def test_no_clip_goes_over_a_pause(tmp_path):
    """Bug: a recording that was paused, or a clock that jumps by an hour, gives clips that stand
    still, or most clips start in the pause."""
    times = 50 * np.arange(180)
    times[60:] += 3_600_000
    times[120:] += 30_000
    train, shares, _, bad = open_films(
        write_film(tmp_path / "x.mkv", frames=180, times=times), READER
    )
    assert not bad and shares == [pytest.approx(180)] and len(train[0].stretches) == 3
    clips = Clips(train, shares, READER)
    assert clips.windows_in(train[0]) == 3  # one each, two would need 64 frames
    first = [numbers(clip_at(train, k))[0] for k in range(3)]
    assert first == [0, 60, 120]
    starts = set()
    for place in np.linspace(0, 0.999, 12):
        got = numbers(clip_at(train, float(place)))
        assert np.diff(got).tolist() == [4] * 7 and got[0] // 60 == got[-1] // 60
        starts.add(got[0] // 60)
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("size", [(36, 130), (130, 36), (98, 50)])
def test_odd_sizes_are_cropped_to_squares(tmp_path, size):
    """Bug: pictures that are taller than wide, or of any size, break the crop."""
    train = open_films(write_film(tmp_path / "x.mkv", size=size), READER)[0]
    for reader in (READER, FilmReader(8, 5.0, 2, 48, True, 0.5, 0.1)):
        clip = clip_at(train, 0.5, reader=reader)
        assert clip["video"].shape == (8, 3, reader.crop, reader.crop)
        grey = clip["video"].float().mean((1, 2, 3))
        assert ((grey.diff() > 2) & (grey.diff() < 6)).all()  # 4 a step


def test_a_turned_video_is_shown_upright(tmp_path):
    """Bug: what a phone has filmed is read lying on its side."""
    mp4 = film(60)
    place = mp4.index(b"tkhd") + 44
    matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], dtype=">i4")
    (tmp_path / "x.mp4").write_bytes(mp4[:place] + matrix.tobytes() + mp4[place + 36 :])
    (tmp_path / "y.mp4").write_bytes(mp4)
    upright = clip_at(open_films(str(tmp_path / "y.mp4"), READER)[0], 0)["video"]
    turned = clip_at(open_films(str(tmp_path / "x.mp4"), READER)[0], 0)["video"]
    assert (turned == upright.rot90(-1, (2, 3))).all()


def test_pictures_that_are_never_shown_are_not_counted(tmp_path):
    """Bug: VP8 has packets that are no picture (alternate references): frames are looked for that
    no decoder gives, and every clip around them is called damaged."""
    path = write_film(tmp_path / "x.webm", "libvpx", b="1M")
    hidden = str(tmp_path / "y.webm")
    with av.open(path) as a, av.open(hidden, "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.size:
                raw = bytearray(bytes(packet))
                if packet.pts == 1000:
                    raw[0] &= ~16
                copy = av.Packet(bytes(raw))
                copy.pts = packet.pts
                copy.dts = packet.dts
                copy.time_base = packet.time_base
                copy.is_keyframe = packet.is_keyframe
                copy.stream = stream
                b.mux(copy)
    train = open_films(hidden, READER)[0]
    assert train[0].length == 119
    assert numbers(clip_at(train, 0)) == [0, 4, 8, 12, 16, 19, 24, 28]


# --- files ---


def test_a_folder_is_searched_to_the_bottom(folder, capsys):
    """Bug: videos below a folder, in capitals, or in a tar are not found; or what lies there beside
    them is opened as video, or left without a word."""
    train, _, _, bad = open_films(str(folder), READER)
    names = [f"a/walk-{n}" for n in range(6)] + ["b/dive", "b/swim", "deep/run"]
    assert sorted(r.key for r in train) == sorted(names + [f"tar/fly-{n}" for n in range(3)])
    assert not bad and "10 videos and tars are taken" in capsys.readouterr().out
    by_glob = open_films([str(folder / "*")], READER)[0]  # folders that a glob matches
    assert sorted(r.key for r in by_glob) == sorted(r.key for r in train)
    assert {r.length for r in train if r.key == "b/swim"} == {70}


def test_what_lies_beside_videos_is_left_alone(tmp_path, capsys):
    """Bug: a JSONL, a hidden folder or what macOS packs beside a file is taken for a bad video."""
    write_film(tmp_path / "x.mp4")
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "._x.mp4").write_bytes(b"\0\5\x16\7" + bytes(100))
    os.makedirs(tmp_path / ".trash")
    shutil.copy(tmp_path / "x.mp4", tmp_path / ".trash" / "y.mp4")
    train, _, _, bad = open_films(str(tmp_path), READER)
    assert [r.key for r in train] == [f"{tmp_path.name}/x"] and not bad
    assert "files of other kinds are not (1 .jsonl)" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path, folder):
    """Bug: a folder without a video, or a pattern without a match, trains on nothing."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no video in it or below it .* 1 .txt"):
        open_films(str(tmp_path), READER)
    with pytest.raises(FileNotFoundError, match="no video matches .*nothing"):
        open_films(str(tmp_path / "nothing*.mp4"), READER)
    with pytest.raises(ValueError, match="x.mp4 is read at any place.* --cache_dir"):
        open_films("https://example.org/x.mp4", READER)


def sound_only(path):
    with av.open(str(path), "w") as c:
        stream = c.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.rate = 8000
        c.mux(stream.encode(frame))
        c.mux(stream.encode())


def test_a_file_that_is_no_video_is_named(tmp_path, monkeypatch):
    """Bug: a download that is an error page, a cut or an empty file ends the run, or is left out
    without a word."""
    good = write_film(tmp_path / "good.mp4")
    with open(good, "rb") as f:
        raw = f.read()
    (tmp_path / "page.mp4").write_text("<html>404</html>" * 20)
    (tmp_path / "empty.mkv").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "packed.mkv").write_bytes(b"\x1f\x8b" + raw)
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + raw)
    sound_only(tmp_path / "sound.mkv")
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
    (tmp_path / "session.mp4").write_text(session)  # FFmpeg would wait for packets at port 5004
    os.symlink("nowhere", tmp_path / "link.mp4")
    write_tar(tmp_path / "texts.tar", {"a.txt": b"a", "zero.mp4": b""})
    write_tar(tmp_path / "text.tar", {"a.txt": b"a"})
    write_film(tmp_path / "slow.mp4", frames=40, rate=2)
    write_film(tmp_path / "order.avi", bf="2")
    train, _, _, bad = open_films(str(tmp_path), READER)
    assert [r.shard for r in train] == [good]
    reasons = {os.path.basename(file): reason for file, _, reason in bad}
    assert len(bad) == len(reasons) == 12
    assert "no video, or damaged" in reasons["page.mp4"]
    assert reasons["empty.mkv"] == "the video has zero bytes" == reasons["texts.tar"]
    assert "moov" in reasons["cut.mp4"] or "truncated" in reasons["cut.mp4"]
    assert "compressed (gzip)" in reasons["packed.mkv"] and "gzip" in reasons["packed.tar"]
    assert reasons["sound.mkv"] == "no video track in it"
    assert "no video in it" in reasons["text.tar"] and ".txt" in reasons["text.tar"]
    assert reasons["slow.mp4"].startswith("2 frames a second: --fps 5 would show frames twice")
    assert "AVI" in reasons["order.avi"]
    assert reasons["link.mp4"] == "a link to nowhere, which is not there"

    # of a hundred videos, more than the share that may be bad
    for n in range(90):
        (tmp_path / f"page-{n}.mp4").write_text(f"<html>404</html> {n}")
    with pytest.raises(
        ValueError, match="102 of 103 recordings cannot be read.*--max_bad_fraction"
    ):
        open_films(str(tmp_path), READER, max_bad_fraction=0.5)
    with pytest.raises(ValueError, match="no usable video in .*page-0.mp4"):
        open_films(str(tmp_path / "page-?.mp4"), READER)


def test_robot_episodes_are_no_video(tmp_path):
    """Bug: FFmpeg finds the pictures in a TFRecord, and an encoder is trained on them as a film; a
    rate of nan is said to be too short a video."""
    pack = os.path.join(FIXTURES, "droid_tf.tfrecord")
    records, bad = films.index_films([pack])
    assert not records and "no video but robot episodes: look into them" in bad[0][2]
    with pytest.raises(ValueError, match="--fps nan: sampled frames"):
        FilmReader(fps=float("nan"))


def test_videos_that_are_shorter_than_a_clip_are_counted(tmp_path, capsys):
    """Bug: short videos are called damaged and end the run, or fail later, clip by clip."""
    write_film(tmp_path / "fits.mkv", frames=29)  # of which a clip takes all
    write_film(tmp_path / "short.mp4", frames=28)
    write_film(tmp_path / "one.mp4", frames=1)
    train, _, _, bad = open_films(str(tmp_path), READER)
    assert [os.path.basename(r.shard) for r in train] == ["fits.mkv"] and not bad
    assert "2 of 3 videos are shorter than a clip" in capsys.readouterr().out
    for place in (0, 0.0, 0.99):
        assert numbers(clip_at(train, place)) == list(range(0, 29, 4))
    with pytest.raises(ValueError, match="1 of 1 videos are shorter .*lower --frames_per_clip"):
        open_films(str(tmp_path / "short.mp4"), READER)


def test_a_title_in_an_old_encoding_is_no_fault(tmp_path):
    """Bug: PyAV takes a title that is no UTF-8 for an error, and the video for a damaged one."""
    path = tmp_path / "x.avi"
    with av.open(str(path), "w") as c:
        c.metadata["title"] = "cafe au lait"
        stream = c.add_stream("mpeg4", rate=20)
        stream.width, stream.height = WIDTH, HEIGHT
        for i in range(60):
            c.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i))))
        c.mux(stream.encode())
    raw = path.read_bytes()
    assert raw.count(b"cafe au") == 1
    path.write_bytes(raw.replace(b"cafe au", b"caf\xe9 au"))
    train, _, _, bad = open_films(str(path), READER)
    assert not bad and numbers(clip_at(train, 0.0)) == list(range(0, 29, 4))


def test_a_url_is_read_through_the_cache(folder, tmp_path):
    """Bug: a video at a URL is streamed, or refused though there is a cache."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        names = [f"{url}/b/swim.webm", f"{url}/a/walk-{{0..1}}.mp4", f"{url}/more.tar"]
        groups = cached([film_paths(names)], str(tmp_path), 1.0, lambda text: None)
        train, _, _, bad = open_films(groups, READER)
    finally:
        server.shutdown()
    assert [r.key for r in train][:3] == ["b/swim", "a/walk-0", "a/walk-1"] and not bad
    assert len(train) == 6
    assert numbers(clip_at(train, 0.5, 1)) == numbers(
        clip_at(open_films(str(folder / "a" / "walk-0.mp4"), READER)[0], 0.5)
    )


# --- split ---


def test_the_split_is_by_name_however_files_are_named(folder, monkeypatch):
    """Bug: the last folder is held out as a whole; or another spelling of --data, or one more file,
    moves videos between the sides."""
    one = open_films(str(folder), READER, val_fraction=0.3)
    held_out = {r.key for r in one[2]}
    assert len(one[2]) == 4 and len({os.path.dirname(key) for key in held_out}) > 1
    monkeypatch.chdir(folder)
    two = open_films([["a", "b/*", "more.tar"]], READER, val_fraction=0.3)
    assert {r.key for r in two[2]} == held_out
    assert {r.key for r in two[0]}.isdisjoint(held_out)
    for value in (1.5, -0.1):
        with pytest.raises(ValueError, match="--val_fraction"):
            open_films(str(folder), READER, val_fraction=value)

    # of those that are picked
    keys = sorted(r.key for r in one[0])[:3]
    three = open_films(str(folder), READER, val_fraction=0.3, only=keys)
    assert sorted(r.key for r in three[0] + three[2]) == keys and len(three[2]) == 1
    with pytest.raises(ValueError, match="1 of the 2 .*none among them"):
        open_films(str(folder), READER, only=[keys[0], "none"])


@pytest.mark.parametrize("again", [os.symlink, os.link, shutil.copy, "tar"])
def test_the_same_video_twice_is_taken_once(tmp_path, again):
    """Bug: a link or a copy of a video, under whatever name, is held out under one name and trained
    on under the other."""
    os.makedirs(tmp_path / "new")
    paths = [write_film(tmp_path / f"x{n}.mp4", frames=60 + n) for n in range(4)]
    other = str(tmp_path / "new" / "other.mp4")
    if again == "tar":
        with open(paths[1], "rb") as f:
            other = write_tar(tmp_path / "new" / "other.tar", {"y.mp4": f.read()})
    else:
        again(paths[1], other)
    for fraction in (0.25, 0.5):
        train, _, val, bad = open_films(str(tmp_path), READER, val_fraction=fraction)
        assert sorted(r.length for r in train + val) == [60, 61, 62, 63] and not bad
    with pytest.raises(ValueError, match="share 1 recordings"):
        open_films(paths, READER, val_data=[[other]])
    with pytest.raises(ValueError, match="number 2 and an earlier one share 1 recordings"):
        open_films([paths, [other]], READER, [1, 2])
    with pytest.raises(ValueError, match="--data_weights 0 is no share"):
        open_films([paths], READER, [0])


def test_two_files_of_one_name_are_on_one_side(tmp_path):
    """Bug: a film as mp4 and again as webm is trained on and held out."""
    for n in range(4):
        write_film(tmp_path / f"x{n}.mp4", frames=60)
        write_film(tmp_path / f"x{n}.mkv", frames=70)
    train, _, val, _ = open_films(str(tmp_path), READER, val_fraction=0.25)
    assert len(val) == 2 and {r.key for r in val}.isdisjoint({r.key for r in train})


# --- order, quarantine, resume ---


def test_order_resumes_and_does_not_depend_on_workers_or_ranks(folder):
    """Bug: a resumed run, other workers or another number of ranks see other clips."""
    opened = open_films(str(folder), READER)[:2]

    def batches(count, batch_size=4, **options):
        options = {"num_workers": 0, "batches_per_epoch": 3, "seed": 5} | options
        return take(vpt_loader(opened, batch_size, reader=READER, **options), count)

    plain = batches(5)
    assert plain[:2] != plain[3:5] and all(-1 not in clip for b in plain for clip in b)
    assert batches(5, num_workers=2) == plain
    assert batches(2, epoch=1) == plain[3:5]
    assert batches(1, itr=2) == plain[2:3]
    ranks = [batches(3, batch_size=2, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks)] == plain[:3]


def test_a_broken_end_costs_its_clips(tmp_path):
    """Bug: a video whose end cannot be decoded ends the run, or all of it is thrown away, or a clip
    of torn pictures is trained on."""
    path = write_film(tmp_path / "torn.mkv", "ffv1", frames=120)
    write_film(tmp_path / "whole.mkv", "ffv1", frames=100)
    raw = bytearray((tmp_path / "torn.mkv").read_bytes())
    with av.open(path) as c:
        places = [p.pos for p in c.demux(video=0) if p.size]
    for place in places[80:]:
        raw[place + 30 : place + 90] = bytes(60)
    (tmp_path / "torn.mkv").write_bytes(bytes(raw))
    train, shares, _, bad = open_films(str(tmp_path), READER)
    assert not bad and len(train) == 2
    loader = vpt_loader((train, shares), 8, reader=READER, batches_per_epoch=2, num_workers=0)
    for batch in itertools.islice(loader, 2):
        assert all(numbers({"video": v})[0] >= 0 for v in batch["video"])
        bad += batch["bad"]
    assert bad and {(file, key) for file, key, _ in bad} == {(path, f"{tmp_path.name}/torn")}

    # cut: only what is there is used
    (tmp_path / "torn.mkv").write_bytes(bytes(raw[: places[70]]))
    train, _, _, bad = open_films(str(tmp_path), READER)
    assert not bad and {r.length for r in train} == {70, 100}


# --- index ---


def test_lengths_are_read_once(tmp_path, monkeypatch):
    """Bug: each start of a run, on each rank, reads every video from end to end again; or a video
    that was replaced keeps its old length."""
    folder = tmp_path / "films"
    os.makedirs(folder)
    for n in range(3):
        write_film(folder / f"x{n}.mkv", frames=60 + n)
    calls = []
    read = films.film_times
    monkeypatch.setattr(films, "film_times", lambda f: calls.append(f) or read(f))
    first = open_films(str(folder), READER)[0]
    assert len(calls) == 3 and open_films(str(folder), READER)[0] == first and len(calls) == 3
    write_film(folder / "x1.mkv", frames=90)
    assert [r.length for r in open_films(str(folder), READER)[0]] == [60, 90, 62]
    assert len(calls) == 4

    # another machine, on which this is the last of three ranks
    monkeypatch.setattr(films, "CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert [r.length for r in open_films(str(folder), READER)[0]] == [60, 90, 62]
    assert len(calls) == 7

    # a long scan is kept too, for the workers
    monkeypatch.setattr(films, "COSTLY", 100)
    record = open_films(str(folder), READER)[0][0]
    before = films.read_clock(record)
    count = len(calls)
    after = films.read_clock(record)
    assert len(calls) == count and np.array_equal(before.times, after.times)
    assert before[1:] == after[1:]


def test_a_disk_that_fails_leaves_no_video_out(tmp_path, monkeypatch):
    """Bug: while a disk fails, videos are called damaged, and the run trains on the others."""
    write_film(tmp_path / "x.mkv")
    write_film(tmp_path / "y.mp4")
    real = os.preadv

    def preadv(fd, buffers, place):
        if place > 3000:
            raise OSError(5, os.strerror(5))
        return real(fd, buffers, place)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="cannot be read: .*says nothing about the recording"):
        open_films(str(tmp_path), READER)
