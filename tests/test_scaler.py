"""fit_scaler.py: shards on disk -> statistics, by the commands of its docstring."""

import contextlib
import functools
import http.server
import io
import json
import os
import pickle
import runpy
import sys
import tarfile
import threading

import joblib
import numpy as np
import pytest
import torch
from sklearn.preprocessing import RobustScaler, StandardScaler

import fit_scaler
from data import ActionScaler
from files.shards import Record
from files.vpt import CONTINUOUS
from tests.harness import ROOT, start_ranks


def play(seed, lines, offset=0.0, spread=10.0):
    """(motion (lines, 4): dx, dy, yaw, pitch in degrees, contractor lines as bytes); yaw is
    unbounded and crosses +-180."""
    rng = np.random.default_rng(seed)
    dx = rng.normal(2, rng.uniform(30 - spread, 30 + spread), lines) + offset
    dy = rng.normal(0, 15, lines)
    yaw = rng.uniform(-720, 720) + np.concatenate([[0], np.cumsum(0.15 * (dx - offset))[:-1]])
    pitch = 40 * np.sin(np.arange(lines) / 9 + seed)
    out = [
        {
            "mouse": {"dx": a, "dy": b, "buttons": [], "newButtons": []},
            "keyboard": {"keys": ["key.keyboard.w"]},
            "isGuiOpen": False,
            "hotbar": 0,
            "yaw": c,
            "pitch": d,
            "inventory": [],
        }
        for a, b, c, d in np.stack([dx, dy, yaw, pitch], 1).tolist()
    ]
    return np.stack([dx, dy, yaw, pitch], 1), "\n".join(map(json.dumps, out)).encode()


def expected(motion, span=8):
    """Steps (n, 4) of a recording, computed again in plain numpy: sums over 8 lines; of yaw the
    differences from line to line, each wrapped to (-pi, pi]."""
    n = (len(motion) - 1) // span
    sums = motion[: n * span, :2].reshape(n, span, 2).sum(1)
    yaw, pitch = np.radians(motion[: n * span + 1, 2:]).T
    turned = np.angle(np.exp(1j * np.diff(yaw))).reshape(n, span).sum(1)
    return np.column_stack([sums, turned, np.diff(pitch[::span])])


def write_shard(path, recordings, video=b"never read"):
    """recordings: {key: JSONL bytes}; a video given by its size is a hole."""
    with open(path, "wb") as f:
        for key, jsonl in recordings.items():
            for extension, content in (("mp4", video), ("jsonl", jsonl)):
                hole = isinstance(content, int)
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = content if hole else len(content)
                f.write(member.tobuf())
                if hole:
                    f.seek(member.size, 1)
                else:
                    f.write(content)
                f.seek(-member.size % 512, 1)
        f.truncate(f.tell() + 1024)
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(folder, motions): three shards of ten recordings of 300 to 590 lines."""
    folder = tmp_path_factory.mktemp("vpt")
    motions = {}
    for s in range(3):
        recordings = {}
        for k in range(10 * s, 10 * s + 10):
            motions[f"v7/player-{k}"], recordings[f"v7/player-{k}"] = play(k, 300 + 10 * k)
        write_shard(folder / f"shard-{s:06d}.tar", recordings)
    return folder, motions


def run(*flags):
    """fit_scaler.py with these flags, as `python fit_scaler.py` runs it but without importing torch
    again; what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["fit_scaler.py", *map(str, flags)])
        runpy.run_path(os.path.join(ROOT, "fit_scaler.py"), run_name="__main__")
    return out.getvalue()


def fit(folder, *flags, output="scaler.safetensors"):
    path = folder / output
    out = run("--data", *flags, "--output", path, "--num_workers", 0)
    return ActionScaler.load(path), out


def test_the_rounding_of_large_angles_is_no_variance():
    """Bug: a constant turn, whose differences differ in their last bits, is scaled by 1e15."""
    scaler = ActionScaler.from_moments(100, np.array([0.05]), np.array([1.29e-28]), {})
    assert scaler.var[0] == 0 and scaler.scale[0] == 1


def test_statistics_are_those_of_numpy(shards, tmp_path):
    """Bug: lines lost when striding, a step shifted by a line, an unwrapped yaw difference, sample
    (n - 1) variance, degrees."""
    folder, motions = shards
    scaler, out = fit(tmp_path, folder / "*.tar")
    x = np.concatenate([expected(m) for m in motions.values()])
    assert scaler.n == len(x)
    np.testing.assert_allclose(scaler.mean, x.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(scaler.scale, x.std(0), rtol=1e-10)
    assert "SCALER FITTING COMPLETE" in out
    assert f"Total samples: {len(x):,}" in out
    assert f"Saved to: {tmp_path}" in out
    assert f"Std: {x[:, 0].std():9.3f}" in out
    assert "Converged: False" in out and "samples are few" in out
    assert out.splitlines()[-1].startswith("next: python train_ac.py --scaler ")
    assert scaler.meta["names"] == ["mouse_dx", "mouse_dy", "yaw_diff", "pitch_diff"]
    assert scaler.meta["shards"][2] == "shard-000002.tar"
    assert len(scaler.meta["recordings"]) == 30
    assert "shard-000001.tar v7/player-10" in scaler.meta["recordings"]

    # 0.15 is right
    assert "degrees a pixel" not in out


def test_budget_seed_and_workers(shards, tmp_path):
    """Bug: the samples used depend on which worker is done first; the budget is overshot; pickles
    differ by object identity."""
    folder, motions = shards
    files = []
    for i, (workers, seed) in enumerate([(0, 0), (0, 0), (2, 0), (3, 0), (0, 1)]):
        flags = [
            "--max_samples",
            500,
            "--seed",
            seed,
            "--num_workers",
            workers,
            "--output",
            tmp_path / f"{i}.pkl",
        ]
        out = run("--data", folder / "*.tar", *flags)
        assert "Total samples: 500" in out

        files.append((tmp_path / f"{i}.pkl").read_bytes())
    assert files[0] == files[1] == files[2] == files[3] != files[4]

    scaler = ActionScaler.load(tmp_path / "0.pkl")
    order = np.random.default_rng(0).permutation(30)
    x = np.concatenate([expected(motions[f"v7/player-{k}"]) for k in order])[:500]
    np.testing.assert_allclose(scaler.mean, x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(scaler.var, x.var(0), rtol=1e-9)
    assert ActionScaler.load(tmp_path / "4.pkl").meta["fingerprint"] != scaler.meta["fingerprint"]


def test_two_ranks_are_one_process(shards, tmp_path, forkserver):
    """Bug: ranks merge in the order they finish, a rank counts a recording twice, every rank
    writes, the budget is per rank."""
    folder, _ = shards
    flags = ["--data", folder / "*.tar", "--max_samples", 1500, "--num_workers", 0, "--output"]
    run(*flags, tmp_path / "one.safetensors")
    ranks = start_ranks(tmp_path, "fit_scaler.py", *flags, tmp_path / "two.safetensors")
    for rank in ranks:
        assert rank.wait()[0] == 0, rank.text()
    one = ActionScaler.load(tmp_path / "one.safetensors")
    two = ActionScaler.load(tmp_path / "two.safetensors")
    assert sum(rank.text().count("SCALER FITTING COMPLETE") for rank in ranks) == 1
    assert two.n == one.n == 1500 and two.meta == one.meta
    for a, b in ((one.mean, two.mean), (one.var, two.var), (one.scale, two.scale)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_large_offset_keeps_the_variance(tmp_path):
    """Bug: E[x^2] - E[x]^2, or float32 anywhere: at a mean of 8e6 they leave no digit of a variance
    of 1e4."""
    motion, jsonl = play(0, 4001, offset=1e6)
    scaler, out = fit(
        tmp_path,
        write_shard(
            tmp_path / "a.tar",
            {f"r{i}": play(i, 4001, offset=1e6)[1] for i in range(3)} | {"z": jsonl},
        ),
    )
    x = np.concatenate([expected(play(i, 4001, offset=1e6)[0]) for i in (0, 1, 2, 0)])
    assert x[:, 0].mean() > 7.9e6
    np.testing.assert_allclose(scaler.var, ((x - x.mean(0)) ** 2).mean(0), rtol=1e-9)


def test_constant_dimension(tmp_path):
    """Bug: rounding leaves a variance of 1e-33 and a scale of 1e-17, which blows the actions up; or
    a division by zero."""
    lines = [
        json.dumps({"mouse": {"dx": 0.1, "dy": float(i % 7)}, "yaw": 30.0, "pitch": 0.1 * i})
        for i in range(800)
    ]
    recordings = {f"r{k}": "\n".join(lines[37 * k :]).encode() for k in range(20)}
    parts = [
        fit_scaler.moments(torch.from_numpy(fit_scaler.read_steps(r, 5, 2)[0][:, :4]))
        for r in recordings.values()
    ]

    # rounding leaves something of a steady turn
    assert functools.reduce(fit_scaler.merge_moments, parts)[2][3] > 0
    scaler, out = fit(tmp_path, write_shard(tmp_path / "a.tar", recordings))
    constant = [0, 2, 3]
    assert scaler.var[1] > 0 and (scaler.var[constant] == 0).all()
    assert (scaler.scale[constant] == 1).all()
    assert np.isfinite(scaler.transform(np.ones(4))).all()
    for name in ("mouse_dx", "yaw_diff", "pitch_diff"):
        assert f"{name} never changes" in out
    assert "mouse_dy never" not in out


def test_warnings_on_wrong_units(tmp_path):
    """Bug: yaw in units that are not degrees, or out-of-range motion, passes in silence; motion in
    a GUI counts as a broken camera."""
    _, jsonl = play(1, 2000)
    rows = [json.loads(line) for line in jsonl.splitlines()]
    doubled = "\n".join(json.dumps(r | {"yaw": 2 * r["yaw"]}) for r in rows)
    _, out = fit(tmp_path, write_shard(tmp_path / "a.tar", {"r": doubled.encode()}))
    assert "yaw turns 0.3" in out and "0.15" in out

    still = "\n".join(json.dumps(r | {"yaw": 0.0, "isGuiOpen": True}) for r in rows).encode()
    _, out = fit(tmp_path, write_shard(tmp_path / "b.tar", {"gui": still, "play": jsonl}))
    assert "degrees a pixel" not in out

    big = "\n".join(
        json.dumps(r | {"mouse": {"dx": 100 * r["mouse"]["dx"], "dy": 0}}) for r in rows
    ).encode()
    _, out = fit(tmp_path, write_shard(tmp_path / "c.tar", {"r": big}))
    assert "mouse_dx has std" in out
    assert "5 to 500" in out
    assert "mouse_dy never changes" in out


def test_early_stop_and_its_switch(tmp_path):
    """Bug: a mean near zero never converges when its error is taken relative to itself;
    --no_convergence_check is not read."""
    data = write_shard(
        tmp_path / "a.tar", {f"r{k}": play(k, 4001, spread=1.5)[1] for k in range(30)}
    )
    early, out = fit(tmp_path, data, "--tolerance", 0.03)
    assert early.n == 10_000 and "Converged: True" in out
    assert "Stopped before --max_samples 100,000" in out
    assert "--no_convergence_check takes all" in out

    strict, out = fit(tmp_path, data)
    assert strict.n > 12_000
    assert "(asks for standard errors within 0.01 of the std" not in out

    late, out = fit(tmp_path, data, "--no_convergence_check")
    assert late.n == 15_000
    assert "Converged: True" in out
    assert "Stopped before" not in out

    few, out = fit(tmp_path, data, "--max_samples", 9500)
    assert few.n == 9500
    assert "Converged: False" in out
    assert "raise --max_samples" in out


def test_batch_size_spaces_the_checks(tmp_path):
    """Bug: --batch_size is not read: these recordings have converged at the second look, whenever
    that is."""
    data = write_shard(
        tmp_path / "a.tar", {f"r{k}": play(k, 4801, spread=1.5)[1] for k in range(30)}
    )
    loose = ["--tolerance", 0.03, "--batch_size"]
    counts = [fit(tmp_path, data, *loose, n)[0].n for n in (128, 4000)]

    # 17 recordings are too few at the first look (10,200): the second comes 600 or 4,000 later
    assert counts == [12_000, 14_400]


def test_standard_errors_see_that_steps_of_a_recording_are_alike():
    """Bug: 1/sqrt(n) over steps claims ten times the precision that recordings with different means
    and spreads allow."""
    rng = np.random.default_rng(0)
    errors = []
    means = []
    stds = []
    for _ in range(400):
        level = rng.normal(0, 1, (40, 1, 4))
        spread = rng.uniform(0.5, 1.5, (40, 1, 4))
        x = level + spread * rng.normal(size=(40, 100, 4))
        errors.append(
            np.array(fit_scaler.standard_errors([(100, p.mean(0), 100 * p.var(0)) for p in x]))
            * x.reshape(-1, 4).std(0)
        )
        means.append(x.mean((0, 1)))
        stds.append(x.reshape(-1, 4).std(0))

    of_mean, of_std = np.mean(errors, 0)
    np.testing.assert_allclose(of_mean, np.std(means, 0), rtol=0.15)
    np.testing.assert_allclose(of_std, np.std(stds, 0), rtol=0.15)


def test_joblib_and_the_guides_comparison(shards, tmp_path):
    """Bug: a .pkl that joblib cannot load, or attributes the guide's snippet needs are missing; a
    formula apart from StandardScaler's."""
    folder, motions = shards
    data = folder / "shard-{000000..000002}.tar"
    for name, samples in (("10k", 200), ("100k", 800), ("1m", 100_000)):
        size = ["--max_samples", samples, "--num_workers", 0]
        run("--data_path", data, *size, "--output", tmp_path / f"scaler_{name}.pkl")
    s10k = joblib.load(tmp_path / "scaler_10k.pkl")
    s100k = joblib.load(tmp_path / "scaler_100k.pkl")
    s1m = joblib.load(tmp_path / "scaler_1m.pkl")
    for a, b in ((s10k, s100k), (s100k, s1m)):
        assert (abs(a.mean_ - b.mean_) > 0).all()
        assert (abs(a.scale_ - b.scale_) > 0).all()
    assert (abs(s100k.scale_ - s1m.scale_) / s1m.scale_ < 0.2).all()

    x = np.concatenate([expected(m) for m in motions.values()])
    y = s1m.transform(x)
    np.testing.assert_allclose(np.stack([y.mean(0), y.std(0)]), [[0] * 4, [1] * 4], atol=1e-9)

    safe, _ = fit(tmp_path, folder / "*.tar")
    plain = ActionScaler.load(tmp_path / "scaler_1m.pkl")
    assert safe.hash == plain.hash
    assert safe.meta == plain.meta
    assert safe.n == plain.n


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("compress", [0, 3, "gzip", "bz2", "xz", "lzma"])
def test_numbers_of_every_kind_of_standard_scaler(tmp_path, with_mean, with_std, compress):
    """Bug: the mean is taken off although with_mean=False; compressed files, and those fitted on a
    DataFrame, are no scalers."""
    x = np.random.default_rng(0).normal([5, -3, 0.1, 0.0], [100, 60, 0.3, 0.2], (500, 4))
    scaler = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    expected = scaler.transform(x)

    # as of a DataFrame
    scaler.feature_names_in_ = np.array(CONTINUOUS, dtype=object)
    how = compress if isinstance(compress, int) else (compress, 3)
    joblib.dump(scaler, tmp_path / "s.pkl", compress=how)
    ours = ActionScaler.load(tmp_path / "s.pkl")
    np.testing.assert_array_equal(ours.transform(x), expected)
    ours.check("s.pkl", CONTINUOUS, 5.0, 2)


def test_scalers_of_other_columns_and_kinds_are_refused_by_name(tmp_path):
    """Bug: columns in another order standardise the wrong dimension; what is no StandardScaler, or
    a cut file, ends in a traceback."""
    x = np.random.default_rng(0).normal(size=(50, 4))
    scaler = StandardScaler().fit(x)
    scaler.feature_names_in_ = np.array(CONTINUOUS[::-1], dtype=object)
    path = tmp_path / "s.pkl"
    joblib.dump(scaler, path)
    with pytest.raises(ValueError, match=r"scales \['pitch_diff'.*this run needs \['mouse_dx'"):
        ActionScaler.load(path).check(path, CONTINUOUS, 5.0, 2)

    for other, reason in ((StandardScaler(), "never fitted"), (RobustScaler(), "RobustScaler")):
        joblib.dump(other, path)
        with pytest.raises(ValueError, match=f"s.pkl is not an action scaler .*{reason}"):
            ActionScaler.load(path)
    joblib.dump(StandardScaler().fit(x), path, compress=3)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="compressed bytes that are cut"):
        ActionScaler.load(path)


def test_other_pickles_and_numbers_of_scalers(tmp_path):
    """Bug: pickle.dump(..., pickle.HIGHEST_PROTOCOL) is refused with "it holds or lacks: 150"; an
    infinite scale makes an action vanish; the sentence does not say how to write the file."""
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    path = tmp_path / "s.pkl"
    scaler = StandardScaler().fit(x)
    for protocol in (3, 4, 5):
        path.write_bytes(pickle.dumps(scaler, protocol=protocol))
        np.testing.assert_array_equal(ActionScaler.load(path).transform(x), scaler.transform(x))
    path.write_bytes(pickle.dumps(scaler, protocol=2))
    with pytest.raises(ValueError, match=r"write a StandardScaler with joblib.dump"):
        ActionScaler.load(path)

    scaler.scale_[0] = np.inf
    joblib.dump(scaler, path)
    with pytest.raises(ValueError, match="broken numbers"):
        ActionScaler.load(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    """Bug: loading a scaler from elsewhere executes what it says."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not an action scaler"):
        ActionScaler.load(tmp_path / "evil.pkl")
    assert not (tmp_path / "owned").exists()
    scaler = StandardScaler().fit(np.eye(4))
    scaler.feature_names_in_ = np.array([Evil()], dtype=object)
    joblib.dump(scaler, tmp_path / "evil.pkl")
    with pytest.raises(ValueError, match="not an action scaler"):
        ActionScaler.load(tmp_path / "evil.pkl")
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="bytes read are counted by Linux")
def test_only_jsonl_bytes_are_read(tmp_path):
    """Bug: video bytes are read, or recordings far beyond the budget: 100 holes of 64 MB stand
    where the videos would be."""
    folder = tmp_path / "vpt"
    folder.mkdir()
    size = 0
    for s in range(5):
        recordings = {f"r{s}-{k}": play(k, 1001)[1] for k in range(20)}
        size += sum(map(len, recordings.values()))
        write_shard(folder / f"{s}.tar", recordings, video=64_000_000)

    def asked():
        with open("/proc/self/io") as f:
            return int(f.readline().split()[1])

    for budget, used in ((12_500, 1.0), (5000, 0.4)):
        before = asked()
        _, out = fit(tmp_path, folder / "*.tar", "--no_convergence_check", "--max_samples", budget)
        assert 0.95 < (asked() - before) / (size * used) < 1.3
        assert f"Total samples: {budget:,}" in out


def test_names_that_nobody_knows_are_counted_over_all_recordings(tmp_path):
    """Bug: every key of own data is misspelt, and the scaler's report looks as always."""
    lines = play(3, 400)[1].replace(b"key.keyboard.w", b"key.keyboard.ww")
    data = write_shard(tmp_path / "a.tar", {"a": lines, "b": lines, "c": play(4, 400)[1]})
    _, out = fit(tmp_path, data)
    assert (
        'WARNING: key "key.keyboard.ww" (nearest known name: "key.keyboard.w") on 800 lines' in out
    )


def test_damaged_recordings(shards, tmp_path):
    """Bug: one torn line ends the run, or the good lines before it are lost, or what was left out
    is not printed."""
    _, good = play(3, 400)
    motion, torn = play(4, 400)
    cut = torn[: torn.index(b"\n", 30_000) + 40]
    recordings = {
        "good": good,
        "torn": cut,
        "empty": b"",
        "short": good.split(b"\n")[0],
        "text": b"hello\nworld",
    }
    data = write_shard(tmp_path / "a.tar", recordings)
    scaler, out = fit(tmp_path, data)
    kept = cut.count(b"\n")
    x = np.concatenate([expected(play(3, 400)[0]), expected(motion[:kept])])
    assert scaler.n == len(x)
    np.testing.assert_allclose(scaler.mean, x.mean(0), rtol=1e-9, atol=1e-12)
    assert f"tail left out: {data} torn: line {kept}" in out
    assert "short: ValueError: too short: 1 usable lines" in out
    for key in ("empty", "text"):
        assert f"left out: {data} {key}: ValueError: no usable line" in out
    with pytest.raises(ValueError, match="no usable recording.*the file is empty"):
        fit(tmp_path, write_shard(tmp_path / "b.tar", {"only": b""}), output="no.pkl")
    with pytest.raises(ValueError, match="--fps 7 does not divide"):
        fit(tmp_path, data, "--fps", 7, output="no.pkl")
    assert not (tmp_path / "no.pkl").exists()


def test_guide_lines_and_step_flags(tmp_path):
    """Bug: camera radians taken for degrees; 5 Hz lines summed as if at 20; --frames_per_step or
    --fps not read."""
    rng = np.random.default_rng(0)
    dx = rng.integers(-60, 60, 900)
    dy = rng.integers(-9, 9, 900)
    yaw = rng.uniform(-3, 3, 900)
    lines = [
        {
            "timestamp": 0.2 * i,
            "mouse": {"dx": int(dx[i]), "dy": int(dy[i])},
            "keyboard": {"keys": []},
            "camera": [yaw[i], 0.5],
            "hotbar": 0,
        }
        for i in range(900)
    ]
    data = write_shard(tmp_path / "a.tar", {"r": "\n".join(map(json.dumps, lines)).encode()})
    motion = np.stack([dx, dy, np.degrees(yaw), np.full(900, 30.0)], 1)
    for flags, span in (
        (["--fps", 5], 2),
        (["--fps", 5, "--tubelet_size", 1], 1),
        (["--fps", 2.5, "--frames_per_step", 3], 6),
    ):
        scaler, _ = fit(tmp_path, data, *flags, "--action_space", 36)
        x = expected(motion, span)
        assert scaler.n == len(x)
        assert scaler.meta["frames_per_step"] == span // (1 if flags[1] == 5 else 2)
        np.testing.assert_allclose(scaler.var[:3], x.var(0)[:3], rtol=1e-9)
        assert scaler.meta["fps"] == flags[1] and scaler.meta["action_space"] == 36


def test_nothing_there(tmp_path, monkeypatch):
    """Bug: an empty glob trains on nothing, or the message does not say what to do; a typo in
    --output is found after the work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"VPT/\*\.tar.*prepare\.demo"):
        run()
    with pytest.raises(SystemExit, match="must end in .pkl or .safetensors"):
        run("--output", tmp_path / "scaler.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--output in .*file: File exists; name a folder"):
        run("--output", tmp_path / "file" / "scaler.pkl")
    with pytest.raises(SystemExit, match="--max_samples 0 must be positive"):
        run("--max_samples", 0)


def test_shards_chosen_and_held_out(tmp_path):
    """Bug: --max_shards takes the first ones; validation shards leak into the scaler when the
    choice comes before the split."""
    for s in range(12):
        write_shard(tmp_path / f"{s:02d}.tar", {f"r{s}": play(s, 100)[1]})

    def pick(max_shards, val_fraction):
        patterns = [[str(tmp_path / "*.tar")]]
        records, _ = fit_scaler.open_lines(patterns, max_shards, val_fraction)
        return sorted({os.path.basename(r.shard) for r in records})

    middle = ("05.tar", "06.tar")
    assert pick(3, 0.0) in [["00.tar", m, "11.tar"] for m in middle]
    assert pick(None, 0.25) == [f"{s:02d}.tar" for s in range(9)]
    assert pick(2, 0.25) == ["00.tar", "08.tar"]
    scaler, _ = fit(tmp_path, tmp_path / "*.tar", "--val_fraction", 0.25, "--max_shards", 2)
    assert scaler.meta["shards"] == ["00.tar", "08.tar"]
    assert scaler.meta["val_fraction"] == 0.25


def test_streams_give_the_same_scaler(shards, tmp_path):
    """Bug: shards over http or a pipe give other samples, stop at the first, or hang; or are mixed
    with local ones in silence."""
    folder, _ = shards
    local, _ = fit(tmp_path, folder / "*.tar")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shard-{{000000..000002}}.tar"
        remote, out = fit(tmp_path, url, output="remote.safetensors")
        part, _ = fit(tmp_path, url, "--max_samples", 150, output="part.safetensors")
        server.shutdown()

    piped, _ = fit(
        tmp_path,
        *(f"pipe:cat {folder}/shard-{s:06d}.tar" for s in range(3)),
        output="piped.safetensors",
    )
    assert "these cannot skip the video, so all of their bytes are read" in out
    assert part.n == 150
    for scaler in (remote, piped):
        assert scaler.n == local.n
        np.testing.assert_allclose(scaler.mean, local.mean, rtol=1e-12)
        np.testing.assert_allclose(scaler.var, local.var, rtol=1e-12)
    assert remote.meta["fingerprint"] == local.meta["fingerprint"]
    with pytest.raises(ValueError, match="cannot be sought"):
        fit_scaler.open_lines([[str(folder / "*.tar")], ["pipe:cat x.tar"]], None, 0.0)


def test_file_that_does_not_standardise_is_refused(tmp_path):
    """Bug: the verification would pass whatever was written."""
    parts = [(50, np.arange(4.0), np.full(4, 200.0)), (50, np.zeros(4), np.full(4, 100.0))]
    var = (300 + 25 * np.arange(4.0) ** 2) / 100
    ActionScaler(np.arange(4) / 2, var, np.sqrt(var), 100, {}).save(tmp_path / "right.pkl")
    ActionScaler(np.arange(4) / 2, var, np.sqrt(var) * 1.01, 100, {}).save(tmp_path / "wrong.pkl")
    assert fit_scaler.verify(tmp_path / "right.pkl", parts) < 1e-12
    with pytest.raises(RuntimeError, match="does not standardise"):
        fit_scaler.verify(tmp_path / "wrong.pkl", parts)


def test_a_vanished_shard_is_reported():
    """Bug: a shard that disappears after indexing is left out, and the scaler is another one."""
    job = Record("/nowhere.tar", "k", {"jsonl": (0, 10)})
    with pytest.raises(OSError, match="/nowhere.tar k cannot be read: .*put the file back"):
        fit_scaler.read_job(job, 5.0, 2, 10)
