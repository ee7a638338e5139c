"""eval.py, its pictures and how evaluation/runs.py opens a finished run: numbers against plain
ones, hand-made predictors, the page."""

import base64
import glob
import html
import json
import math
import os
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student

import checkpoint
import eval as report
from data import ActionScaler, windows
from evaluation import pictures
from evaluation.comparable import clip_set, training_records
from evaluation.held_out import (
    action_meter,
    another_recording,
    compare_with_base,
    encoder_dtype,
    from_other_recordings,
    gap_text,
    held_out,
    hold_state,
    meter_summary,
    moves_gap,
    precision_of,
    precision_text,
    ratio_interval,
)
from evaluation.runs import open_held_out, open_run, split_of_run
from files import logs
from files.shards import index_shards
from files.vpt import ACTION_SPACES, HOTBAR, SLOTS, ClipReader
from model import Predictor, add_lora, lora_layers, predict
from tests import intervals
from tests.harness import (
    Moved,
    Pushed,
    contractor,
    fails,
    jsonl,
    numbers,
    read_number,
    run,
    start_ranks,
    step_flops,
    write_tar,
)

VPT = "--encoder vit_tiny --crop_size 32"
SIZE = "--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0"
pytestmark = pytest.mark.usefixtures("forkserver")


def clips_of(path, data=None, batch_size=4):
    """What eval.py works on: predictor, scaler, [(z, actions, states)] of the batches of the run's
    held-out clips."""
    predictor, state, scaler, _ = open_run(str(path))
    dataset, inputs, _, _ = open_held_out(state, scaler, data, None, torch.device("cpu"))
    batches = []
    for items in windows(dataset, batch_size, 512):
        clips = [dataset[i] for i in items]
        batch = {k: torch.stack([c[k] for c in clips]) for k in ("z", "actions", "states")}
        batches.append(inputs(batch))
    return predictor, scaler, batches


def names_of(path, batch_size=4):
    """The recordings of the batches of clips_of."""
    _, state, scaler, _ = open_run(str(path))
    dataset = open_held_out(state, scaler, None, None, torch.device("cpu"))[0]
    return [
        [dataset.records[item[2]].recording for item in items]
        for items in windows(dataset, batch_size, 512)
    ]


# --- opening ---


@pytest.mark.parametrize("name", ["base", "lora", "command"])
def test_a_robot_run_opens_as_it_was_trained(arm, name):
    """Bug: adapters on another base, with another scale, or not loaded; the action encoder of
    another scaler; states of other actions; other held-out clips: any of them, and the errors are
    not those that validation logged."""
    predictor, state, scaler, _ = open_run(str(arm / name))
    assert bool(lora_layers(predictor)) == (name != "base")
    assert not predictor.training
    assert state["dataset"] == "droid"

    dataset, inputs, compose, bad = open_held_out(state, scaler, None, None, torch.device("cpu"))
    assert (compose is hold_state) == (name == "command")
    assert state["state_dim"] == 7
    assert not bad

    errors, recordings, _ = held_out(predictor, dataset, inputs, 4, 256, 0, 2, 1.0, compose=compose)
    logged = numbers(arm / name, "tf_true", "tf_shuffled", "ro_true", "ro_shuffled", log="val.csv")[
        -1
    ]
    found = [errors[k].mean().item() for k in ("tf_true", "tf_shuffled", "ro_true", "ro_shuffled")]
    np.testing.assert_allclose(found, logged, rtol=1e-5)
    assert len(set(recordings)) == 2

    # the adapters do something. In MFU every weight of the base counts twice: forward, and backward
    # to its input
    if name == "lora":
        in_matrices = sum(p.numel() for p in predictor.parameters() if p.ndim > 1)
        assert step_flops(arm / name, 4) > 2 * 2 * 4 * in_matrices
        base = open_run(str(arm / "base"))[0]
        z = torch.randn(1, 8, 192)
        given = z, torch.randn(1, 2, 7), torch.randn(1, 2, 7)
        assert not torch.allclose(base(*given), predictor(*given), atol=1e-3)


def test_what_does_not_belong_to_a_run_is_refused(arm, game, tmp_path, shards):
    """Bug: a changed or missing base, data of other actions, fps or length, or a file without a
    scaler end in a traceback or in numbers."""
    shutil.copytree(arm / "lora", tmp_path / "lora", symlinks=True)
    state, path = checkpoint.load_latest(tmp_path / "lora")

    def rewritten(**change):
        checkpoint.save(str(tmp_path / "changed"), state | change, 0)
        return str(tmp_path / "changed")

    with pytest.raises(ValueError, match="has changed: its weights hash to"):
        open_run(rewritten(base_hash="0" * 16))
    with pytest.raises(FileNotFoundError, match="base of this run is not at nowhere.pt"):
        open_run(rewritten(settings=state["settings"] | {"base": "nowhere.pt"}))

    checkpoint.save(
        str(tmp_path / "bare"), {k: v for k, v in state.items() if k != "action_scaler"}, 0
    )
    with pytest.raises(ValueError, match="no predictor, or no action_scaler"):
        open_run(str(tmp_path / "bare"))

    predictor, state, scaler, _ = open_run(str(arm / "lora"))
    state["settings"] |= {"action_keys": ["command"]}
    with pytest.raises(ValueError, match="this run needs"):
        open_held_out(state, scaler, None, None, torch.device("cpu"))

    _, state, scaler, _ = open_run(str(game.out))
    with pytest.raises(ValueError, match=r"was made with --fps 5.0, this run has 4.0"):
        open_held_out(
            state | {"fps": 4.0},
            scaler._replace(meta=scaler.meta | {"fps": 4.0}),
            [str(game.held)],
            None,
            torch.device("cpu"),
        )
    with pytest.raises(ValueError, match="this run has 4"):
        open_held_out(state | {"fps": 4.0}, scaler, [str(game.held)], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="fewer than two clips of 128 frames at 5 fps"):
        open_held_out(
            state | {"frames_per_clip": 128}, scaler, [str(game.held)], None, torch.device("cpu")
        )


def test_another_decoder_is_warned_of(game, capsys):
    """Bug: a run is judged on pictures of another decoder than it was trained on, without a
    word."""
    _, state, scaler, _ = open_run(str(game.out))
    assert state["decoder"] == "pyav"
    data = [str(game.held)], None, torch.device("cpu")
    open_held_out(state, scaler, *data)
    assert "WARNING" not in capsys.readouterr().out
    open_held_out(state | {"decoder": "decord"}, scaler, *data)
    said = "WARNING: the run was trained on video that decord decoded, this is decoded by pyav"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="--video_decoder decord: .* were made with pyav"):
        open_held_out(state, scaler, *data, decoder="decord")


def test_bad_flags_are_one_sentence(game, arm, tmp_path, shards):
    """Bug: a misspelt dimension or head is noticed after minutes, or ignored; a video of other play
    is shown as if it were the clip's."""
    other = {}
    for r in index_shards([str(game.video)])[0]:
        with open(game.video, "rb") as f:
            f.seek(r.members["mp4"][0])
            other |= {
                r.key + ".mp4": f.read(r.members["mp4"][1]),
                r.key + ".jsonl": jsonl(contractor(seed=77)),
            }

    base = ["--checkpoint", game.out, "--num_workers 0 --samples 4 --out", tmp_path]
    for flags, sentence in [
        (["--landscape mouse_dx yaw"], "--landscape yaw: no such action; the run has mouse_dx,"),
        (["--landscape key.escape mouse_dx"], "one of two never differs from 0"),
        (["--heads 1:0 2:0"], "--heads 2:0: write BLOCK:HEAD, from 0:0 to 1:2"),
        (["--heads 1"], "--heads 1: write BLOCK:HEAD"),
        (["--samples 0"], "--samples 0 is too small: at least 1"),
        (["--val_clips 1"], "--val_clips 1 is too small: at least 2"),
        (["--landscape mouse_dx mouse_dx"], "mouse_dx mouse_dx: name two different dimensions"),
        (["--video", shards / "shard-000001.tar"], "--video holds no recording 6.10_player-0"),
        (
            ["--video", write_tar(tmp_path / "other.tar", other)],
            "has other actions than the features of that name",
        ),
        (
            ["--data", game.video, "--encoder vit_tiny --video", game.video],
            "--video is for data that are features",
        ),
    ]:
        assert sentence in fails(tmp_path, "eval.py", *base, *flags), flags
    assert not os.path.exists(tmp_path / "report.html")


# --- numbers ---


def test_the_interval_is_the_jackknifes():
    """Bug: clips are resampled, not recordings; a long recording weighs as much as a short one; the
    interval is of the mean of ratios, not of the ratio of means."""
    g = torch.Generator().manual_seed(1)
    recordings = ["b", "a", "a", "c", "a", "b", "d"]
    x, y = (0.5 + torch.rand(7, 3, generator=g).double() for _ in range(2))
    low, high = ratio_interval(x, y, recordings)
    for k in range(3):
        without = []
        for name in "abcd":
            rest = [i for i, r in enumerate(recordings) if r != name]
            without.append(math.log(x[rest, k].sum() / y[rest, k].sum()))
        whole = math.log(x[:, k].sum() / y[:, k].sum())
        error = math.sqrt(3 / 4 * sum((v - whole) ** 2 for v in without))
        share = [y[[r == n for r in recordings], k].sum() / y[:, k].sum() for n in "abcd"]
        effective = 1 / sum(float(v) ** 2 for v in share)
        t = 1.06 * student.ppf(0.975, (4 + effective) / 2 - 1)
        expected = [math.exp(whole - t * error), math.exp(whole + t * error)]
        np.testing.assert_allclose([low[k], high[k]], expected, rtol=1e-10)

    gap = report.gap_of(x, y, recordings)
    assert gap[0] == pytest.approx(x.mean().item() / y.mean().item() - 1)
    assert gap[1] < gap[0] < gap[2]


def test_a_gap_of_the_hotbar_alone_is_no_use_of_the_action():
    """Bug: a model that looks at the hotbar and at nothing else passes for one that uses the
    action."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, 2, 8, generator=g)
    actions = torch.randint(1, 4, (6, 3, 3), generator=g).float()
    others = actions.roll(1, 0) + 1
    names = ["a", "b", "c"] * 2

    def errors(hotbar):
        states = torch.zeros(6, 4, 2)

        def compose(state0, actions):
            return states

        return action_meter(Moved(), z, actions, states, others, compose, hotbar)

    # this model moves channels by the first action, and knows no other
    blind = errors(hotbar=[0, 1])
    whole = meter_summary(blind, names)["tf_gap"]
    assert moves_gap(blind, names)["moves_gap"] == 0 and whole != 0
    seeing = errors(hotbar=[1, 2])
    assert moves_gap(seeing, names)["moves_gap"] == whole

    # without a hotbar it is the whole gap
    plain = errors(hotbar=())
    assert "tf_moves" not in plain and moves_gap(plain, names)["moves_gap"] == whole


def test_the_same_clips_have_the_same_mark(game):
    """Bug: two reports are compared that were made on other clips, or are taken for reports on
    other clips because one run reads features and the other one video."""
    settings = {"frames_per_clip": 16, "fps": 5.0, "frames_per_step": 2}
    video = index_shards([str(game.video)])[0]
    features = index_shards(glob.glob(str(game.held)))[0]
    assert features[0].is_features and not video[0].is_features
    places = [[(r, w) for r in records for w in range(2)] for records in (video, features)]
    of_video, of_features = (clip_set(place, settings) for place in places)
    assert of_video == of_features and of_video[:2] == (4, 2)

    # fewer clips, other windows, other lengths
    others = [places[0][1:], [(video[0], 2)], [(video[0], 0)]]
    marks = {clip_set(place, settings).mark for place in others}
    marks.add(clip_set(places[0], settings | {"frames_per_clip": 8}).mark)
    assert len(marks | {of_video.mark}) == 5


def test_a_probe_without_training_data(game, tmp_path):
    """Bug: a report needs the training shards, which may be gone; a probe is fitted on the very
    recordings that it is tested on."""
    held = index_shards(glob.glob(str(game.held)))[0]
    gone = {"data": [[str(tmp_path / "gone.tar")]], "cache_dir": None, "val_data": None}
    gone["val_fraction"] = 0.0
    run_of = types.SimpleNamespace(state={"dataset": "vpt"}, settings=gone)
    judged = types.SimpleNamespace(run=run_of)
    dataset = types.SimpleNamespace(records=held)
    options = {"clips": 12, "val_clips": 4, "batch_size": 4, "num_workers": 0}
    probed, why, bad = report.probe_section(judged, dataset, None, None, None, options)
    assert probed is None and "gone.tar" in why and "--train_data" in why and not bad
    with pytest.raises(FileNotFoundError, match="gone.tar"):
        missing = [str(tmp_path / "gone.tar")]
        report.probe_section(judged, dataset, None, missing, None, options)
    with pytest.raises(ValueError, match="no recording is left to fit the probe on"):
        training_records(gone, [str(game.video)], held)
    run_of.state["dataset"] = "droid"
    assert "gameplay" in report.probe_section(judged, dataset, None, None, None, options)[1]


def test_a_run_is_judged_on_the_recordings_that_it_picked(shards):
    """Bug: what a run with --recordings held out is split from all recordings: it was trained on
    some of them; names of its own data are looked for in other data."""
    path = str(shards / "shard-*.tar")
    settings = {"data": [[path]], "val_data": None, "val_fraction": 0.5, "cache_dir": None}
    names = sorted(record.recording for record in index_shards(sorted(glob.glob(path)))[0])
    picked = [names[0], names[-1]]
    train, _, val, _ = split_of_run(settings | {"recordings": picked})
    assert sorted(record.recording for record in train + val) == picked
    other, held = ([[str(shards / f"shard-00000{i}.tar")]] for i in (1, 2))
    train, _, val, _ = split_of_run(settings | {"recordings": picked}, other, held)
    assert (len(train), len(val)) == (2, 2)


@pytest.mark.parametrize("recordings", [3, 5, 12])
def test_intervals_cover(recordings):
    """Bug: a 95 % interval that contains the truth half of the time (two recordings) or in 79 % of
    cases (three), which the bootstrap's did; 89.7 % where the action tells much in a few recordings
    only, which jackknife and t did."""
    for effect, spread in (("normal", "uniform"), ("skewed", "uniform"), ("alike", "lognormal")):
        share, width = intervals.coverage(effect, spread, recordings, 60, 60)
        assert 0.90 <= share <= 0.97 and width > 0
    share, _ = intervals.coverage("normal", "uniform", recordings, 20, 60, intervals.bootstrap)
    assert share < 0.92


def test_recordings_that_all_give_the_same_have_no_interval():
    """Bug: where nobody moves, other actions are the true ones: the gap was +0.00% [+0.00%,
    +0.00%], which reads as certainty."""
    names = ["a", "b", "c", "d"] * 3
    true = 1 + torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    errors = {f"{p}_{k}": true for p in ("tf", "ro") for k in ("true", "shuffled", "zero")}
    errors |= {f"{p}_copy": 2 + true.flip(0) for p in ("tf", "ro")}
    summary = meter_summary(errors, names)
    assert summary["tf_gap"] == 0 and math.isnan(summary["tf_gap_low"])
    text = gap_text(0.0, summary["tf_gap_low"], summary["tf_gap_high"], names)
    assert "no interval: all recordings give exactly the same" in text
    bands = report.bands_of(errors, names)
    assert math.isnan(bands["gap"][0][0])
    assert bands["skill"][0][0] < bands["skill"][1][0]


def test_too_few_recordings_give_no_interval(tmp_path):
    """Bug: one recording gave [x, x], which reads as certainty; a nan in the report, which is no
    JSON; a log that cannot be read back."""
    g = torch.Generator().manual_seed(0)
    errors = {
        f"{p}_{k}": 1 + torch.rand(6, 4, generator=g)
        for p in ("tf", "ro")
        for k in ("true", "shuffled", "zero", "copy")
    }
    for names in (["a"] * 6, ["a", "b"] * 3):
        summary = meter_summary(errors, names)
        assert math.isnan(summary["tf_gap_low"])
        assert math.isnan(summary["ro_gap_high"])
        text = gap_text(summary["tf_gap"], summary["tf_gap_low"], math.nan, names)
        assert text.endswith(f"needs at least 3 recordings, here {len(set(names))})")
        assert all(
            math.isnan(x) for low_high in report.bands_of(errors, names)["gap"] for x in low_high
        )

    row, text = compare_with_base(
        errors | {"jloss": torch.ones(6, 1), "sloss": torch.ones(6, 1)},
        ["a", "b"] * 3,
        {k: 1.1 * x for k, x in errors.items()},
    )
    assert text.count("no interval: that needs at least 3 recordings, here 2") == 2
    assert row["help"] == pytest.approx(0.1, abs=1e-6) and row["help_low"] is None

    header = [k for k in row if not k.endswith(("_1", "_2", "_3", "_4"))]
    logs.open_csv(str(tmp_path / "val.csv"), header, 0, 0, False)(row)
    cells = dict(zip(header, open(tmp_path / "val.csv").read().split("\n")[1].split(",")))
    assert cells["help_high"] == cells["tf_gap_low"] == ""
    assert cells["tf_gap"] != ""
    assert np.isnan(logs.read_csv(str(tmp_path / "val.csv"))["help_low"]).all()
    assert json.loads(logs.to_json({"x": [1.0, math.nan, (math.nan,)]})) == {"x": [1, None, [None]]}

    three = meter_summary(errors, ["a", "b", "c"] * 2)
    assert three["tf_gap_low"] < three["tf_gap"] < three["tf_gap_high"]


def test_shuffled_actions_are_of_another_recording():
    """Bug: actions of the same recording, which are alike, serve as shuffled ones (in 40 % of the
    clips of three recordings), so that the gap is too small; one clip serves all."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = [str(x) for x in rng.integers(0, rng.integers(2, 5), rng.integers(2, 12))]
        partner = another_recording(names)
        largest = max(names.count(n) for n in names)
        if len(set(names)) == 1:
            assert set(partner) == {None}
            continue
        assert all(names[j] != n for j, n in zip(partner, names))
        if 2 * largest <= len(names):
            assert sorted(partner) == list(range(len(names)))
        else:
            assert len({j for n, j in zip(names, partner) if names.count(n) == largest}) == (
                len(names) - largest
            )

    class Two:
        def __init__(self, names):
            self.records = [types.SimpleNamespace(recording=n) for n in names]

        def windows_in(self, record):
            return 3

        def __getitem__(self, item):
            return {"actions": torch.full((3, 2), item[3]), "key": "ab"[item[2]]}

    items = [(0, 0, 0, 1), (0, 1, 0, 2), (0, 2, 1, 7)]
    others = from_other_recordings(Two("ab"), items)
    given = torch.zeros(2, 3, 2)
    assert (others(["a", "a"], given) == 7).all()
    assert (others(["b", "b"], given) < 3).all()

    few = from_other_recordings(Two("ab"), items[:2])(["a", "a"], given)

    # --val_clips 2, both of one recording
    assert few.isfinite().all()
    assert few.shape == given.shape

    alone = from_other_recordings(Two("aa"), items[:2])(["a", "a"], given)
    assert alone.isnan().all() and alone.shape == given.shape

    text = gap_text(math.nan, math.nan, math.nan, ["a", "a"])
    assert text.startswith("not given: shuffled actions must come from another recording")


def test_a_run_is_judged_in_its_own_precision():
    """Bug: a run trained in bf16 is judged in fp32, by other kernels than those that it ran."""
    cpu = torch.device("cpu")
    state = {"args": {"dtype": "bfloat16"}}
    dtype, autocast = precision_of(None, state, cpu)
    predictor = Predictor(24, 5, 2, (2, 2), pred_dim=48, depth=1, num_heads=3)
    with autocast():
        assert predictor.predictor_embed(torch.zeros(1, 24)).dtype == torch.bfloat16
    assert dtype == "bfloat16"
    assert precision_of("float32", state, cpu)[0] == "float32"
    assert precision_of(None, None, cpu)[0] == precision_of(None, {"args": {}}, cpu)[0] == "float32"
    assert encoder_dtype("bfloat16", {}) == torch.bfloat16
    assert encoder_dtype("bfloat16", {"save_encoder": True}) == torch.float32

    text = precision_text("bfloat16", cpu, predictor, 3)
    assert text.startswith("bfloat16 on cpu; kernels: attention reference, rope")


def test_gaps_of_groups_are_those_of_a_plain_loop(game):
    """Bug: a group with the wrong dimensions; the rest is shuffled too; rolled out, the states
    still tell the true camera, or tell another one although the camera is true; other clips than
    the meter's."""
    predictor, scaler, batches = clips_of(game.out)
    names = ACTION_SPACES[36]
    keys = [n for n in names if n.startswith(("key.", "mouse.")) and not n[4:].isdigit()]
    groups = {
        "camera": names[:4],
        "keys": keys,
        "hotbar": [f"{p}.{i}" for p in ("key", "slot") for i in range(1, 10)],
    }

    def next_step(past, actions, states):
        """The prediction of the step after `past` (k, 4, 192), normed."""
        k = len(past)
        tokens = past.flatten(0, 1)[None]
        out = predictor(tokens, actions[None, :k], states[None, :k])
        return F.layer_norm(out[0, -4:], (192,)).detach()

    def turned_by(first, actions):
        """The states (yaw, pitch) that the actions lead to."""
        turns = actions[:, 2:4].double().numpy() * scaler.scale[2:] + scaler.mean[2:]
        states = first.double().numpy() + np.r_[[[0, 0]], np.cumsum(turns, 0)[:-1]]
        states[:, 0] = [math.atan2(math.sin(x), math.cos(x)) for x in states[:, 0]]
        return torch.tensor(states).float()

    def errors_of(z, actions, states, out):
        rolled = z[:1]
        turned = turned_by(states[0], actions)
        for k in range(1, len(z)):
            seen = next_step(z[:k], actions, states)
            rolled = torch.cat([rolled, next_step(rolled, actions, turned)[None]])
            out["tf"].append((seen - z[k]).abs().mean().item())
            out["ro"].append((rolled[-1] - z[k]).abs().mean().item())

    for group, members in groups.items():
        columns = sorted({names.index(n) for n in members})
        true = {"tf": [], "ro": []}
        wrong = {"tf": [], "ro": []}
        for (z, actions, states), recordings in zip(batches, names_of(game.out)):
            for b, other in enumerate(another_recording(recordings)):
                mixed = actions[b].clone()
                mixed[:, columns] = actions[other][:, columns]
                errors_of(z[b], actions[b], states[b], true)
                errors_of(z[b], mixed, states[b], wrong)

        for p in ("tf", "ro"):
            gap = np.mean(wrong[p]) / np.mean(true[p]) - 1
            assert game.report["groups"][group][p][0] == pytest.approx(gap, abs=2e-6), (group, p)
    assert game.report["groups"].keys() == groups.keys()

    # an untrained predictor
    assert abs(game.report["groups"]["camera"]["ro"][0]) > 1e-5


def test_one_robot_recording_has_no_gaps(arm, tmp_path):
    """Bug: without another recording the shuffled actions are nan, and the poses that follow from
    them are no rotations: a traceback in place of a report."""
    flags = "--num_workers 0 --samples 4 --batch_size 4 --out"
    (tmp_path / "one").mkdir()
    for path in (arm / "a").glob("e0*"):
        os.symlink(path, tmp_path / "one" / path.name)
    data = ["--data", tmp_path / "one", "--checkpoint", arm / "lora"]
    text = run(tmp_path, "eval.py", *data, flags, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["recordings"] == 1 and found["tf_gap"] is None
    assert found["groups"]["rotation"]["ro"] == [None, None, None]
    assert "gap of one group of actions: one step ahead, rolled out: not given" in text
    assert "WARNING: the action gap is not given" in (tmp_path / "report.html").read_text()


def test_groups_of_other_actions():
    """Bug: dimensions of a space that is not the demo's are lost or end in one heap."""
    assert report.action_groups(ACTION_SPACES[38])["gui"] == [37]
    assert {k: len(v) for k, v in report.action_groups(ACTION_SPACES[13]).items()} == {
        "camera": 4,
        "hotbar": 9,
    }
    assert report.action_groups(["command.0", "command.1", "grip.0", "gripper"]) == {
        "command": [0, 1],
        "grip": [2],
        "gripper": [3],
    }


@pytest.mark.parametrize("steps, state_dim", [(5, 2), (2, 2), (4, 0)])
def test_energies_are_those_of_whole_passes(steps, state_dim):
    """Bug: what came before an action is wrong in the cached pass, the states are of another step,
    or chunks are mixed up."""
    torch.manual_seed(0)
    predictor = Predictor(24, 5, state_dim, (2, 2), pred_dim=48, depth=2, num_heads=3).eval()
    z = F.layer_norm(torch.randn(steps, 4, 24), (24,))
    actions = torch.randn(steps - 1, 5)
    states = torch.randn(steps, state_dim)
    candidates = torch.randn(7, 5)
    found = report.energies(predictor, z, actions, states, candidates)
    for a, e in zip(candidates, found):
        given = torch.cat([actions[:-1], a[None]])
        whole = predict(predictor, z[None, :-1], given[None], states[None])[0, -1]
        assert e.item() == pytest.approx((whole - z[-1]).abs().mean().item(), abs=1e-5)


def test_the_minimum_and_the_rank_of_a_predictor_that_is_known():
    """Bug: axes in the wrong order or units, ties not shared, the true action ranked from the wrong
    end."""
    g = torch.Generator().manual_seed(0)
    names = ["x", "y", "grip"]
    scaler = ActionScaler(np.array([0.1, -0.2]), np.array([4.0, 9.0]), np.array([2.0, 3.0]), 9, {})
    axes = [np.linspace(-1, 1, 5), np.linspace(-4, 4, 9)]
    z = F.layer_norm(torch.randn(3, 4, 24, generator=g), (24,))
    actions = torch.randn(2, 3, generator=g)
    actions[-1, :2] = torch.from_numpy(scaler.transform(np.array([0.5, -3.0])))
    z[2] = predict(Pushed(), z[None, :2], actions[None], torch.zeros(1, 3, 2))[0, -1]
    land = report.swept(actions[-1], names, scaler, [0, 1], axes)
    e = report.energies(Pushed(), z, actions, torch.zeros(3, 2), land).view(5, 9)
    assert np.unravel_index(int(e.argmin()), e.shape) == (3, 1)
    assert e.min() < 1e-6 < e.sort().values.flatten()[1]
    assert torch.equal(land[:, 2], actions[-1:, 2].expand(45))

    others = torch.randn(50, 3, generator=g)
    e = report.energies(Pushed(), z, actions, torch.zeros(3, 2), torch.cat([actions[-1:], others]))
    assert report.rank_of(e[0], e[1:]) == 0
    assert report.rank_of(e[1:].max(), e[1:]) == pytest.approx(0.99)

    e = report.energies(
        Moved(deaf=True), z, actions, torch.zeros(3, 2), torch.cat([actions[-1:], others])
    )
    assert report.rank_of(e[0], e[1:]) == 0.5


def test_mouse_and_camera_turn_together():
    """Bug: the mouse is swept and the camera stays, an action that no player makes; degrees for
    radians; keys lost on the way."""
    scaler = ActionScaler(
        np.array([5.0, 0.0, 0.1, 0.0]), np.ones(4), np.array([50.0, 20.0, 0.2, 0.1]), 9, {}
    )
    names = ACTION_SPACES[36]
    true = torch.zeros(36)
    true[[0, 3, 13]] = torch.tensor([0.3, 0.7, 1.0])
    by_mouse = report.to_units(
        report.swept(true, names, scaler, [0, 1], [np.array([-100.0, 100.0]), np.array([40.0])]),
        scaler,
    )
    np.testing.assert_allclose(
        by_mouse[:, :4],
        [[-100, 40, -np.radians(15), np.radians(6)], [100, 40, np.radians(15), np.radians(6)]],
        atol=1e-5,
    )
    assert (by_mouse[:, 13] == 1).all() and not by_mouse[:, 14:].any()

    by_camera = report.to_units(
        report.swept(true, names, scaler, [2, 13], [np.array([np.radians(30)]), np.array([0.0])]),
        scaler,
    )
    np.testing.assert_allclose(
        by_camera[0, [0, 2, 3, 13]], [200, np.radians(30), 0.07, 0], atol=1e-4
    )

    both = report.to_units(
        report.swept(true, names, scaler, [0, 2], [np.array([7.0]), np.array([0.5])]), scaler
    )
    np.testing.assert_allclose(both[0, [0, 2]], [7, 0.5], atol=1e-5)


def test_sampled_actions_are_of_other_recordings():
    """Bug: a recording's own actions are among those that its true one is ranked among; some clips
    or steps never are."""
    actions = torch.arange(12).view(4, 3, 1).float()
    for i in range(4):
        drawn = report.drawn_from_others(
            actions, i, "aabc", 500, torch.Generator().manual_seed(i)
        ).flatten()
        own = range(6) if i < 2 else range(3 * i, 3 * i + 3)
        assert set(drawn.tolist()) == set(range(12)) - set(own)
        alone = report.drawn_from_others(actions, i, "aaaa", 500, torch.Generator().manual_seed(i))
        assert set(alone.flatten().tolist()) == set(range(12)) - set(range(3 * i, 3 * i + 3))


# prints what the ranks make of lists that do not divide evenly
RANKS = """
from evaluation.ranks import gathered, join, leave, print0, share

join()
for count in (1, 4, 5):
    print0(gathered([10 * i for i in share(range(count))]))
own = gathered([share(range(5))])
print0([list(items) for items in own])
if leave():
    print(gathered([7]))
"""


def test_ranks_share_all_items_and_keep_their_order(tmp_path):
    """Bug: an item is computed twice or by nobody, or results come back in the order of ranks: they
    are then of other clips; a rank that has left still waits for the others."""
    (tmp_path / "ranks.py").write_text(RANKS)
    results = [rank.wait() for rank in start_ranks(tmp_path, tmp_path / "ranks.py")]
    assert [code for code, _ in results] == [0, 0]
    lines = [json.loads(line) for line in results[0][1].splitlines() if line.startswith("[")]
    assert lines[:3] == [[10 * i for i in range(count)] for count in (1, 4, 5)]
    assert lines[3:] == [[[0, 2, 4], [1, 3]], [7]]
    assert "[" not in results[1][1].replace("[Gloo]", "")


def test_two_ranks_give_the_report_of_one(game, tmp_path):
    """Bug: ranks judge the same clips, or what they found comes back in another order: errors,
    intervals, ranks and nearest steps are then of other clips. Lines are printed twice."""
    flags = ["--checkpoint", game.out, "--video", game.video, "--out", tmp_path / "report"]
    flags += ["--samples 8 --batch_size 4 --num_workers 0"]
    results = [rank.wait() for rank in start_ranks(tmp_path, "eval.py", *flags)]
    assert [code for code, _ in results] == [0, 0], results
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == game.report

    # what one rank prints, but for memory and the folder
    def printed(text):
        return [line for line in text.splitlines() if line.startswith(("  ", "The ", "WARNING"))]

    assert printed(results[0][1]) == printed(game.text) and printed(results[1][1]) == []


def test_rank_and_landscape_in_the_report(game):
    """Bug: the numbers on the page are of other clips, of other dimensions or steps than their
    caption says."""
    predictor, scaler, batches = clips_of(game.out)
    z = torch.cat([batch[0] for batch in batches])
    actions = torch.cat([batch[1] for batch in batches])
    states = torch.cat([batch[2] for batch in batches])
    recordings = sum(names_of(game.out), [])

    # the landscape's axes reach to what 99 % of the clips do
    plain = actions.double().numpy()[..., :2] * scaler.scale[:2] + scaler.mean[:2]
    reach = np.quantile(np.abs(plain.reshape(-1, 2)), 0.99, axis=0)
    axes = [np.linspace(-m, m, report.GRID) for m in reach]

    # each clip's true action among those of others, and on the landscape
    generator = torch.Generator().manual_seed(0)
    ranks = []
    misses = []
    for i in range(len(z)):
        others = report.drawn_from_others(actions, i, recordings, 8, generator)

        # the hotbar, which is in every picture, is the true one
        for k, name in enumerate(ACTION_SPACES[36]):
            if name in HOTBAR + SLOTS:
                others[:, k] = actions[i, -1, k]
        both = torch.cat([actions[i, -1:], others])
        e = report.energies(predictor, z[i], actions[i], states[i], both)
        ranks.append((e[1:] < e[0]).float().mean().item())
        tried = report.swept(actions[i, -1], ACTION_SPACES[36], scaler, [0, 1], axes)
        at = report.energies(predictor, z[i], actions[i], states[i], tried).argmin().item()
        misses.append(abs(axes[0][at // report.GRID] - plain[i, -1, 0]))
    assert game.report["rank"] == pytest.approx(np.mean(ranks), abs=1e-6)
    assert game.report["ranked_clips"] == len(z) == 8
    argmin = game.report["landscape"]["mouse_dx"]["argmin"]
    assert argmin == pytest.approx(np.mean(misses), rel=1e-6)
    assert game.report["landscape"]["mouse_dy"]["unit"] == "pixels"
    assert f"among 8 of other recordings: {np.mean(ranks):.3f}" in game.text


def one_hots(first, T):
    """Steps (T, 1, 40), layer-normed: the first has its one at `first`, each later one a place
    on."""
    return F.layer_norm(torch.eye(40)[first : first + T, None], (40,))


def test_retrieval_of_a_predictor_that_is_known():
    """Bug: steps of another recording are found, neighbouring clips are not searched, offsets in
    clips instead of steps or with windows of the wrong length, hits of the copy counted as the
    model's."""
    z = torch.stack([one_hots(0, 4), one_hots(4, 4), one_hots(0, 4), one_hots(12, 4)])
    actions = torch.tensor([1.0, 2.0, 1.0, 0.0])[:, None, None].expand(4, 3, 1)

    # window 2 of record 7 was not evaluated
    places = {0: (7, 0), 1: (7, 1), 2: (9, 0), 3: (7, 3)}

    def load(rows):
        return z[rows], actions[rows], torch.zeros(len(rows), 4, 2)

    def no_states(state0, actions):
        return torch.zeros(len(actions), 3, 2)

    found, rows = report.retrieval(Moved(), places, 4, 2, no_states, load)
    assert found[0] == [(0, 1), (0, 2), (0, 3)]

    # not clip 0, which is alike
    assert found[2] == [(2, 1), (2, 2), (2, 3)]

    # twice as far
    assert found[1][0] == (1, 2)
    assert found[3] == [(3, 0)] * 3
    np.testing.assert_allclose(rows["hit"], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(rows["copy_hit"], [0, 0, 0])
    np.testing.assert_allclose(rows["copy_offset"], [1, 2, 3])
    assert rows["offset"][0] == 0
    assert rows["chance"] == pytest.approx((3 / 12 + 1 / 4) / 4)

    # of the eleven other steps of its recording none, one or six are nearer; a copy has one nearer,
    # the first step, and all others are as far as the true one
    assert rows["rank"][0] >= 0 and rows["rank"][0] < rows["copy_rank"][0]

    # from one window into the other
    actions = torch.tensor([0.0, 8.0, 0.0, -5.0])[:, None, None].expand(4, 3, 1)
    found, rows = report.retrieval(Moved(), {1: (7, 1), 3: (7, 3)}, 4, 2, no_states, load)
    assert found[1][0] == (3, 0) and found[3][0] == (1, 3)

    # 7 and 6: the lower median
    assert rows["offset"][0] == 6

    still, rows = report.retrieval(Moved(deaf=True), places, 4, 2, no_states, load)
    assert rows["hit"] == [0, 0, 0] and rows["offset"] == rows["copy_offset"]
    assert still[1] == [(1, 0)] * 3


# --- pictures ---


@pytest.mark.parametrize("adapted, state_dim", [(False, 2), (True, 2), (False, 0)])
def test_attention_is_what_the_model_does(adapted, state_dim):
    """Bug: weights without RoPE, mask or scale, of the wrong block, or without the adapters:
    pictures of another model."""
    torch.manual_seed(0)
    predictor = Predictor(24, 5, state_dim, (2, 3), pred_dim=48, depth=3, num_heads=4).eval()
    predictor.predictor_blocks.requires_grad_(False)
    for blk in predictor.predictor_blocks:
        # else all weights are alike
        blk.attn.qkv.weight.mul_(10)
    if adapted:
        add_lora(predictor, r=4)
        for m in lora_layers(predictor).values():
            m.lora_B.data.normal_(std=0.1)

    # what goes into each attention and what comes out
    caught = {}
    for b, blk in enumerate(predictor.predictor_blocks):
        blk.attn.register_forward_hook(lambda m, i, out, b=b: caught.update({b: (i[0], out[0])}))
    T = 4
    C = 1 + bool(state_dim)
    z = torch.randn(T, 6, 24)
    actions = torch.randn(T, 5)
    states = torch.randn(T, state_dim)
    heads = [(1, 3), (0, 0), (2, 2)]
    maps = pictures.attention_maps(predictor, z, actions, states, heads)

    # the same again, from the definition
    rope = pictures.rope_tables(predictor.positions(T, C), predictor.head_dim)
    for (b, h), m in zip(heads, maps):
        attn = predictor.predictor_blocks[b].attn
        x, out = caught[b]
        weights, v = pictures.attention_of(attn, attn.qkv(x), rope, C + 6)
        again = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, out, rtol=0, atol=1e-5)
        torch.testing.assert_close(m.flatten(1), weights[0, h, -(C + 6) :], rtol=0, atol=1e-6)
        assert m.shape == (C + 6, T, C + 6)
        assert weights[0, :, 0, C + 6 :].abs().max() == 0


def test_frames_are_those_of_the_features(game):
    """Bug: the strip shows frames of another tick, window or recording than the features beside
    it."""
    records = sorted(index_shards([str(p) for p in (game.folder / "held").glob("*.tar")])[0])
    videos = pictures.find_videos([str(game.video)], records)
    _, state, scaler, _ = open_run(str(game.out))
    dataset, *_ = open_held_out(state, scaler, None, None, torch.device("cpu"))
    reader = ClipReader(16, 5.0, 2, 128, 36, scaler)
    for number, place in ((0, 0), (1, 3)):
        r = dataset.records[number]
        shown = pictures.look_up(dataset[0, 0, number, place], r, place, videos, reader)
        first = int(r.key.rpartition("@")[2]) + 64 * place
        assert [read_number(x[::2, ::2]) for x in shown] == [first + 8 * t + 4 for t in range(8)]


def test_colours_are_fitted_on_both():
    """Bug: recorded and predicted tokens get colours of their own, so that alike looks unlike; one
    outlier makes all others grey."""
    torch.manual_seed(0)
    a = torch.randn(5, 4, 24)
    b = a.clone()
    b[2, 1] = 1000
    one, two = pictures.pca_colors(a, b)
    assert one.shape == (5, 4, 3) and (one >= 0).all() and (one <= 1).all()
    same = np.ones((5, 4), bool)
    same[2, 1] = False
    np.testing.assert_allclose(one[same], two[same], atol=1e-9)
    assert np.ptp(pictures.pca_colors(a, a)[0].reshape(-1, 3), axis=0).min() > 0.99


def test_the_page_is_whole_and_offline(game, arm, tmp_path):
    """Bug: a figure that is missing, empty or a link; scripts or fonts from the net; a strip
    promised without pixels."""
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)">', game.page)
    assert len(images) == 10
    assert all(base64.b64decode(x)[:8] == b"\x89PNG\r\n\x1a\n" and len(x) > 4000 for x in images)

    rest = re.sub(r"base64,[^\"]+", "", game.page)
    assert not re.search(r"https?:|<script|<link|url\(|@import", rest)
    assert rest.count("src=") == 10

    headings = re.findall(r"<h2>(.*?)</h2>", game.page)
    of_a_decoder = ("Predicted as pictures", "Error in pixels")
    assert headings == [h for h in pictures.CAPTIONS if h not in of_a_decoder]
    assert pictures.NO_PIXELS not in game.page

    shown = re.search(r"<pre>(.*?)</pre>", game.page, re.S)[1]
    assert all(f"  {g} " in shown and f"  {g} " in game.text for g in ("camera", "keys", "hotbar"))
    assert "median steps off" in shown

    run(
        tmp_path,
        "eval.py",
        "--checkpoint",
        game.out,
        "--num_workers 0 --samples 2 --heads 0:1 --landscape mouse_dy key.w --out",
        tmp_path,
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 7
    assert "Left out: these data are features without pixels" in page
    assert list(json.loads((tmp_path / "report.json").read_text())["landscape"]) == [
        "mouse_dy",
        "key.w",
    ]


def test_the_page_begins_with_a_verdict(game):
    """Bug: the terminal warns that the action is ignored, and the page that is sent round does
    not."""
    head = game.page.partition("<pre>")[0]
    verdict = re.findall(r'<p class="verdict">(.*?)</p>', head)
    assert len(verdict) == 3
    assert "Comparable between encoders" in verdict[0]
    assert "uses the action" in verdict[1]
    assert "last step" in verdict[2]
    printed = re.findall(r"^WARNING: .*$", game.text, re.M)
    assert [html.unescape(x) for x in re.findall(r'class="warning">(.*?)</p>', head)] == printed
    assert printed


def test_verdicts():
    """Bug: an action gap that is not told from 0 counts as use of the action, or one that is not
    known as none."""
    names = ["a", "b", "c"]
    meter = {"moves_gap": 0.3, "moves_gap_low": 0.2, "moves_gap_high": 0.4}
    meter |= {"tf_gap": 0.3, "tf_skill": 0.7}
    verdict, warnings = report.verdict_of(meter, names)
    assert verdict[0].startswith("The model uses the action: shuffled actions cost +30.00%")
    assert "better than repeating the last step: skill 0.700" in verdict[1]
    assert not warnings

    doubts = [
        ({"moves_gap": 0.01}, "The model hardly uses the action", "cost less than 2 %"),
        ({"moves_gap_low": -0.1}, "It is not shown", "no interval above 0"),
        ({"moves_gap_low": math.nan, "moves_gap_high": math.nan}, "It is not shown", "no interval"),
        (
            {"moves_gap": math.nan},
            "Whether the model uses the action is not known",
            "action gap is",
        ),
    ]
    for change, begin, warning in doubts:
        verdict, warnings = report.verdict_of(meter | change, names)
        assert verdict[0].startswith(begin) and warning in warnings[0], change
    hotbar = report.verdict_of(meter | {"moves_gap": 0.01, "tf_gap": 0.6}, names)[0][0]
    assert "hardly uses the action" in hotbar and "(with the hotbar +60.00%)" in hotbar
    assert "skill is not below 1" in report.verdict_of(meter | {"tf_skill": 1.2}, names)[1][0]


def test_noise_does_not_look_like_an_effect():
    """Bug: an axis from 0 to 0.007 % makes a gap of nothing look like one; colours of a landscape
    span its last digit."""
    means = {k: np.full(3, 0.5) for k in ("true", "shuffled", "zero", "copy")}
    bands = {k: (v, v) for k, v in (means | {"gap": np.zeros(3), "skill": np.ones(3)}).items()}
    for gap in (0.0, 1e-5):
        bands["gap"] = (np.zeros(3), np.full(3, gap))
        low, high = pictures.plot_horizons(means, bands, 0.2).axes[1].get_ylim()
        assert low <= -1 and high >= 5
    tiny = {"camera": {"tf": (1e-5, 0, 2e-5), "ro": (1e-5, 0, 2e-5)}}
    assert pictures.plot_groups(tiny).axes[0].get_ylim()[1] >= 5
    energy = 0.3 + 1e-6 * np.arange(9.0).reshape(3, 3)
    axes = [np.linspace(-1, 1, 3)] * 2
    figure = pictures.plot_landscapes([("r", energy, (0, 0))], axes, [("x", "m"), ("y", "m")])
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_a_lora_run_is_reported_on(arm, tmp_path):
    """Bug: eval.py is for gameplay only: robot actions have no groups, no units, their frames no
    strip, or the numbers are the base's."""
    flags = ["--checkpoint", arm / "lora"]
    flags += ["--num_workers 0 --batch_size 4 --samples 16", "--out", tmp_path]
    text = run(tmp_path, "eval.py", *flags)
    found = json.loads((tmp_path / "report.json").read_text())
    np.testing.assert_allclose(
        [found["tf_true"], found["ro_gap"]],
        numbers(arm / "lora", "tf_true", "ro_gap", log="val.csv")[-1],
        rtol=1e-4,
    )
    assert list(found["groups"]) == ["position", "rotation", "gripper"]
    assert found["landscape"]["y"]["unit"] == "m"
    assert (tmp_path / "report.html").read_text().count("<img") == 10
    assert "rotation" in text

    data = [
        "--data",
        arm / "a",
        "--checkpoint",
        arm / "command",
        "--num_workers 0 --samples 4 --out",
        tmp_path / "c",
    ]
    run(tmp_path, "eval.py", *data)
    found = json.loads((tmp_path / "c" / "report.json").read_text())
    assert list(found["groups"]) == ["command"]
    assert list(found["landscape"]) == ["command.0", "command.1"]
    assert found["recordings"] == 5
