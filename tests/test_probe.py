"""probe.py as a program on recordings whose picture shows what was done, its labels read back, the
Gymnasium wrapper of docs/evaluate.md."""

import io
import json
import math
import os
import re
import tarfile
import types

import av
import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

import checkpoint
import probe
from data import open_records
from evaluation import heads
from files.features import feature_rows
from files.shards import read_ticks
from files.vpt import ACTION_SPACES, ClipReader, parse_ticks, step_actions
from model import encode_steps, normalize_features
from tests.harness import ROOT, contractor, fails, film, jsonl, run, start_ranks, write_tar
from weights import open_encoder

pytestmark = pytest.mark.usefixtures("forkserver")
LINES = 400
ENCODE = "--encoder vit_tiny --crop_size 32 --fps 10"


def play(seed):
    """A recording (mp4 bytes, lines): the view pans over a texture by dx / 10 pixels a tick, `w`
    lights the lower half of the next frame, the hotbar slot is the grey of a block in the upper
    left; nothing shows `a`, and the mouse never moves up or down."""
    rng = np.random.default_rng(seed)
    noise = np.kron(rng.uniform(0, 170, (8, 128)), np.ones((8, 8)))
    texture = sum(np.roll(noise, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)) / 49

    def held_for_a_while(low, high):
        values = rng.integers(low, high, LINES)
        return np.repeat(values, rng.integers(4, 12, LINES))[:LINES]

    pan = held_for_a_while(-4, 5)
    w = held_for_a_while(0, 2)
    slot = np.repeat(rng.integers(0, 3, LINES), 60)[:LINES]
    at = np.cumsum(pan) - pan
    video = io.BytesIO()
    lines = contractor(LINES, seed)
    with av.open(video, "w", format="mp4") as c:
        stream = c.add_stream(
            "libx264",
            rate=20,
            pix_fmt="yuv420p",
            options={"crf": "18", "preset": "ultrafast", "threads": "1"},
        )
        stream.width, stream.height = 96, 64
        for t in range(LINES):
            image = np.roll(texture, -at[t], axis=1)[:, :96].copy()
            image[32:] += 80 * (w[t - 1] if t else 0)
            image[:16, 16:32] = 120 * slot[t]
            grey = np.repeat(image[..., None], 3, 2).astype(np.uint8)
            c.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
            pressed = {"w": w[t], "a": rng.random() < 0.1}
            keys = [f"key.keyboard.{k}" for k, held in pressed.items() if held]
            lines[t]["mouse"] |= {"dx": float(10 * pan[t]), "dy": 0.0}
            lines[t] |= {
                "keyboard": {"keys": keys},
                "hotbar": int(slot[t]),
                "yaw": 1.5 * float(at[t]),
                "pitch": 0.0,
            }
        c.mux(stream.encode())
    return video.getvalue(), lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of `play`, their features and a short run of train_ac.py; .flags probe it."""
    folder = tmp_path_factory.mktemp("probe")
    for name, seeds, phases in (("train", range(12), 4), ("val", range(12, 15), 1)):
        (folder / name).mkdir()
        for shard, part in enumerate(np.array_split(list(seeds), 3)):
            members = {}
            for seed in part:
                video, lines = play(seed)
                members |= {f"play.{seed}.mp4": video, f"play.{seed}.jsonl": jsonl(lines)}
            write_tar(folder / name / f"shard-{name}-{shard}.tar", members)
        flags = ["--data", folder / name / "*.tar", "--out", folder / "features" / name, ENCODE]
        flags += ["--phases", str(phases)]
        run(folder, "encode.py", *flags)
    flags = ["--data", folder / "train" / "*.tar", "--output", folder / "scaler.pkl"]
    flags += ["--num_workers 0 --fps 10"]
    run(folder, "fit_scaler.py", *flags)
    data = [
        "--data",
        folder / "features" / "train" / "*.tar",
        "--val_data",
        folder / "features" / "val" / "*.tar",
    ]
    train = (
        "--fps 10 --crop_size 32 --action_space 36 --feature_norm standardize --pred_dim 48"
        " --pred_depth 2 --pred_heads 3 --batch_size 8"
    )
    plan = "--num_workers 0 --epochs 2 --warmup 1 --anneal 1 --ipe 60 --lr 2e-3"
    flags = [*data, "--scaler", folder / "scaler.pkl", "--out_dir", folder / "run", train, plan]
    run(folder, "train_ac.py", *flags)
    return types.SimpleNamespace(
        folder=folder, data=data, flags=["--checkpoint", folder / "run", "--num_workers 0"]
    )


@pytest.fixture(scope="module")
def probed(world):
    """Everything that probe.py does, in one run: what it printed, .report, .labelled; the shard to
    label has no lines."""
    with tarfile.open(world.folder / "val" / "shard-val-0.tar") as tar:
        video = tar.extractfile("play.12.mp4").read()
    unlabelled = write_tar(
        world.folder / "unlabelled.tar",
        {"new.mp4": video, "torn.mp4": video[:3000], "notes.txt": b""},
    )
    text = run(
        world.folder,
        "probe.py",
        *world.flags,
        "--encoder vit_tiny --steps 150 --label_field hotbar --lines",
        world.folder / "train" / "*.tar",
        world.folder / "val" / "*.tar",
        "--label",
        unlabelled,
        "--out",
        world.folder / "labels" / "out.tar",
    )
    report = json.loads((world.folder / "labels" / "probe.json").read_text())
    return types.SimpleNamespace(
        text=text, report=report, labelled=str(world.folder / "labels" / "out.tar"), video=video
    )


# --- what the probes find ---


def test_probes_find_what_the_picture_shows(probed):
    """Bug: action t is asked of the wrong pair of steps, windows of val are fitted on, or scores
    belong to other columns: what shows would not be found, or what nothing shows would be."""
    found = probed.report["inverse"]["real -> real"]
    for head, yaw in (("linear", 0.7), ("attentive", 0.85)):
        assert found[head]["yaw_diff"]["r2"] > yaw
        assert found[head]["key.w"]["auroc"] > 0.97
        assert found[head]["key.w"]["f1"] > 0.85
        assert abs(found[head]["key.a"]["auroc"] - 0.5) < 0.15

        # held on one of four ticks at a tenth each
        assert 0.2 < found[head]["key.a"]["share"] < 0.45
    assert not {"mouse_dy", "pitch_diff", "key.d", "mouse.0"} & found["linear"].keys()
    assert re.search(r"do not vary in both splits: mouse_dy, pitch_diff, .*key\.d", probed.text)
    assert probed.report["clips"] == [576, 36]
    assert probed.report["recordings"] == [12, 3]


def test_transfer_is_asked_both_ways(probed):
    """Bug: the predicted pairs are real ones, or all four cells are of one probe: then they would
    be equal."""
    cells = probed.report["inverse"]
    assert list(cells) == [
        "real -> real",
        "real -> predicted",
        "predicted -> real",
        "predicted -> predicted",
    ]
    values = [
        cells[way][head]["yaw_diff"]["r2"] for way in cells for head in ("linear", "attentive")
    ]

    # so short a run predicts badly
    assert len(set(values)) == 8
    assert max(values) in values[:2]


def test_anticipation_and_its_baseline(world, probed):
    """Bug: an action that the steps have already shown is asked for (it would be found as well as
    by `inverse`), or the repeated action is not the last one before."""
    records, _ = open_records(str(world.folder / "features" / "val" / "*.tar"))
    last = []
    after = [[], [], []]
    for r in records:
        for w in range(r.length // 8):
            # actions 0..6 of the clip
            yaw = feature_rows(r, 8 * w, 8 * w + 8)[1][:, 2].numpy()

            # three actions follow
            for t in range(1, 5):
                last.append(yaw[t - 1])
                for k in range(3):
                    after[k].append(yaw[t + k])
    for k, ahead in enumerate(probed.report["anticipation"]):
        assert ahead["repeat"]["yaw_diff"]["r2"] == pytest.approx(
            r2_score(after[k], last), abs=1e-4
        )
        assert abs(ahead["mean"]["yaw_diff"]["r2"]) < 0.1
        assert ahead["mean"]["key.w"]["auroc"] == 0.5

        # learned by heart it would be -0.6
        assert -0.3 < ahead["attentive"]["yaw_diff"]["r2"] < 0.5

    # moves last longer than a step
    assert probed.report["anticipation"][0]["linear"]["yaw_diff"]["r2"] > 0


def test_labels_are_those_of_the_middle_tick(world, probed):
    """Bug: a label is read at a feature's step number in place of its tick, or without the phase
    its features start at."""
    records, _ = open_records(str(world.folder / "features" / "train" / "*.tar"))
    lines = {r.recording: r for r in open_records(str(world.folder / "train" / "*.tar"))[0]}
    places = [(r, w) for r in records for w in range(12)]
    found = probe.line_labels({"place": places}, "tick", lines, ClipReader(16, 10.0, 2, 32))
    assert found.tolist() == [str(int(r.key.partition("@")[2]) + 32 * w + 16) for r, w in places]
    assert len({r.key.partition("@")[2] for r in records}) == 4
    scores = probed.report["classify"]
    assert scores["attentive"]["balanced"] > 0.7
    assert scores["linear"]["balanced"] > 0.7
    assert scores["chance"]["balanced"] == pytest.approx(1 / 3)
    assert scores["classes"] == ["0", "1", "2"]


def test_video_is_probed_without_a_checkpoint(world):
    """Bug: without a run the encoder's settings are not those of the flags; a CSV labels the wrong
    recordings."""
    keys = [f"play.{i}" for i in range(15)]
    (world.folder / "side.csv").write_text(
        "key,label\n" + "".join(f"{k},{'ab'[i % 2]}\n" for i, k in enumerate(keys[:-1]))
    )
    text = run(
        world.folder,
        "probe.py",
        "--steps 20 --num_workers 0 --task inverse classify --labels",
        world.folder / "side.csv",
        ENCODE,
        "--data",
        world.folder / "train" / "*.tar",
        "--val_data",
        world.folder / "val" / "*.tar",
        "--out",
        world.folder / "video",
        "--clips 140",
    )
    report = json.loads((world.folder / "video" / "probe.json").read_text())
    assert report["clips"] == [140, 36]
    assert list(report["inverse"]) == ["real -> real"]
    assert report["inverse"]["real -> real"]["linear"]["yaw_diff"]["r2"] > 0.3
    assert "1 recordings without a label" in text and "play.14" in text
    assert report["classify"]["clips"] == [140, 24]


def test_motion_is_seen_from_the_first_step(tmp_path):
    """Bug: walking is measured along the map's axes in place of the view, sideways has the wrong
    sign, a turn through 180 degrees is almost a whole one the other way, or steps lie a tick
    off."""
    heading = math.radians(30)
    walks = {
        # 0.1 blocks a tick straight ahead, looking 30 degrees to the right of z
        "ahead": {
            "yaw": 30.0,
            "xpos": lambda i: -0.1 * i * math.sin(heading),
            "zpos": lambda i: 0.1 * i * math.cos(heading),
        },
        # to the right of z, which is against x
        "aside": {"yaw": 0.0, "xpos": lambda i: -0.1 * i, "zpos": 0.0},
        # turning to the right on the spot, through 180 degrees
        "turn": {"yaw": lambda i: (170 + 1.5 * i + 180) % 360 - 180, "xpos": 0.0, "zpos": 0.0},
    }
    members = {}
    for name, change in walks.items():
        members[f"{name}.mp4"] = film(100)
        members[f"{name}.jsonl"] = jsonl(contractor(100, pitch=0.0, **change))
    records, bad = open_records(str(write_tar(tmp_path / "walks.tar", members)))
    assert not bad

    # two steps are 8 ticks apart
    shards = {r.recording: r for r in records}
    places = [(shards[name], 1) for name in walks]
    labels = probe.motion_labels({"place": places}, shards, ClipReader(16, 10.0, 2, 32), 2)
    assert labels.shape == (3, 6, 4)
    np.testing.assert_allclose(labels[0], np.tile([0, 0, 0.8, 0], (6, 1)), atol=1e-9)
    np.testing.assert_allclose(labels[1], np.tile([0, 0, 0, 0.8], (6, 1)), atol=1e-9)
    turned = np.tile([math.radians(12), 0, 0, 0], (6, 1))
    np.testing.assert_allclose(labels[2], turned, atol=1e-9)


@pytest.mark.slow
def test_two_ranks_probe_as_one(world):
    """Bug: ranks encode the same windows, or tokens come back beside other actions; the second
    encoder waits for ranks that have left."""
    flags = ["--encoder vit_tiny vit_tiny", "--crop_size 32 --fps 10 --task inverse --steps 5"]
    flags += ["--clips 50 --val_clips 30 --batch_size 8 --num_workers 0"]
    flags += ["--data", world.folder / "train" / "*.tar"]
    flags += ["--val_data", world.folder / "val" / "*.tar", "--out"]
    run(world.folder, "probe.py", *flags, world.folder / "one")
    ranks = start_ranks(world.folder, "probe.py", *flags, world.folder / "two")
    results = [rank.wait() for rank in ranks]
    assert [code for code, _ in results] == [0, 0], results
    one, two = ((world.folder / name / "probe.json").read_text() for name in ("one", "two"))
    assert json.loads(one) == json.loads(two)
    assert "fitted on 50 clips" in results[0][1] and "fitted" not in results[1][1]


def test_encoders_are_compared(world):
    """Bug: all columns are of the first encoder, or an encoder that sees nothing looks as good as
    one that does; what is not known of a walk (no zpos) is probed as if it were 0."""
    state = open_encoder("vit_tiny", 32, 16).state_dict()
    state = {k: v * 0 if "patch_embed" in k else v for k, v in state.items()}
    torch.save({"target_encoder": state}, world.folder / "blind.pt")
    text = run(
        world.folder,
        "probe.py",
        "--steps 10 --num_workers 0 --task inverse motion --clips 100 --val_clips 30",
        "--crop_size 32 --fps 10 --encoder vit_tiny",
        world.folder / "blind.pt",
        "--data",
        world.folder / "train" / "*.tar",
        "--val_data",
        world.folder / "val" / "*.tar",
        "--out",
        world.folder / "both",
    )
    report = json.loads((world.folder / "both" / "probe.json").read_text())["encoders"]
    sees, blind = report.values()
    assert list(report) == ["vit_tiny", str(world.folder / "blind.pt")]
    assert sees["inverse"]["real -> real"]["linear"]["yaw_diff"]["r2"] > 0.3
    assert blind["inverse"]["real -> real"]["linear"]["yaw_diff"]["r2"] < 0.05
    assert list(sees["motion"]["linear"]) == ["turn yaw"]
    assert sees["motion"]["linear"]["turn yaw"]["r2"] > blind["motion"]["linear"]["turn yaw"]["r2"]
    row = re.search(r"inverse: yaw R2 +(\S+) +(\S+)", text)
    assert float(row[1]) > 0.3 > float(row[2])


def test_the_hotbar_is_no_part_of_the_mean_over_keys():
    """Bug: features that show the bottom of the picture and nothing else look as if they told
    keys."""
    scores = {
        "mouse_dx": {"r2": 0.1},
        "yaw_diff": {"r2": 0.3},
        "key.w": {"auroc": 0.5},
        "mouse.0": {"auroc": 0.6},
        "key.3": {"auroc": 0.9},
        "slot.7": {"auroc": 1.0},
        "gui_open": {"auroc": 0.8},
    }
    expected = {"camera": 0.2, "keys": 0.55, "hotbar": 0.95, "gui": 0.8}
    assert heads.group_means(scores) == pytest.approx(expected)
    assert heads.group_means({"key.1": {"auroc": 0.7}}) == {"hotbar": 0.7}


def test_order_of_steps_in_plain_video(tmp_path):
    """Bug: pairs do not belong to their labels, or the order of steps that are all alike is known
    (the head sees more than two steps)."""

    def write(folder, videos, brightness):
        """Videos of 40 frames in 4 s: their brightness at each frame."""
        os.makedirs(tmp_path / folder)
        for n in videos:
            with av.open(str(tmp_path / folder / f"{n}.mp4"), "w") as video:
                stream = video.add_stream("libx264", rate=10)
                stream.width, stream.height = 64, 48
                stream.pix_fmt = "yuv420p"
                for level in brightness(n):
                    grey = np.full((48, 64, 3), level, np.uint8)
                    video.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
                video.mux(stream.encode())

    # it gets brighter, or it stays as it is
    for split, videos in (("train", range(8)), ("val", range(8, 12))):
        write(f"dawn/{split}", videos, lambda n: 20 + 4 * n + 4 * np.arange(40))
        write(f"still/{split}", videos, lambda n: np.full(40, 100 + n))
    scores = {}
    for name in ("dawn", "still"):
        run(
            tmp_path,
            "probe.py",
            f"--task order {ENCODE} --frames_per_clip 16 --steps 100 --num_workers 0",
            "--data",
            tmp_path / name / "train",
            "--val_data",
            tmp_path / name / "val",
            "--out",
            tmp_path,
        )
        scores[name] = json.loads((tmp_path / "probe.json").read_text())["order"]["attentive"]
    assert scores["dawn"]["first"]["auroc"] > 0.9
    assert scores["dawn"]["apart"]["r2"] > 0.5
    assert scores["still"]["first"]["auroc"] < 0.65


def test_large_grids_are_pooled_by_place():
    """Bug: patches are averaged with those of another row or step, or a small grid is pooled
    too."""
    z = torch.arange(2 * 3 * 64 * 5).float().view(2, 3, 64, 5) / 1000
    want = z.view(2, 3, 4, 2, 4, 2, 5).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(heads.pool(z, 4).float(), want, atol=2e-3, rtol=1e-3)
    assert torch.equal(heads.pool(z, 8).float(), z.half().float())


# --- labels ---


@pytest.mark.parametrize("space", [13, 36, 38])
def test_lines_give_back_the_actions(space):
    """Bug: motion is spread over one tick too many, keys lie a tick late, yaw jumps where it wraps,
    or a slot reads as the one before."""
    rng = np.random.default_rng(0)
    names = ACTION_SPACES[space]
    ends = np.arange(3, 160, 4)
    frames = 163
    actions = np.float64(rng.random((len(ends) - 1, len(names))) < 0.3)
    actions[:, :4] = rng.normal(0, [30, 10, 0.6, 0.05], (len(actions), 4))
    slots = [i for i, n in enumerate(names) if n.startswith("slot.")]
    hotbar = [i for i, n in enumerate(names) if n[4:].isdigit() and n[0] == "k"]
    if slots:
        actions[:, slots] = np.eye(9)[rng.integers(0, 9, len(actions))]
    ticks = parse_ticks(jsonl(probe.guide_lines(actions, names, ends, frames, 20.0)))
    assert len(ticks.motion) == frames
    assert ticks.rate == pytest.approx(20)
    assert not ticks.flaw

    found, _ = step_actions(ticks, ends, space)

    # a change of the slot is the key that makes it
    if slots:
        changed = np.flatnonzero(np.diff(actions[:, slots].argmax(1))) + 1
        actions[:, hotbar] = 0
        actions[changed, np.array(hotbar)[actions[changed][:, slots].argmax(1)]] = 1
    np.testing.assert_allclose(found, actions, atol=1e-5)
    assert not ticks.motion[:3, :2].any()
    assert not ticks.keys[: ends[0]].any()
    assert not ticks.motion[ends[-1] :, :2].any()


def test_labels_of_play_are_the_true_actions(world, probed):
    """Bug: labels are steps late, at the wrong rate, in scaled units, or a torn video ends the
    shard."""
    records, bad = open_records(probed.labelled)
    assert [r.key for r in records] == ["new"]
    assert not bad
    assert "torn.mp4" in probed.text
    assert "labelled 1 recording of" in probed.text

    with tarfile.open(probed.labelled) as tar:
        assert tar.extractfile("new.mp4").read() == probed.video
    true = next(
        r for r in open_records(str(world.folder / "val" / "*.tar"))[0] if r.key == "play.12"
    )
    ends = np.arange(2, LINES, 4)
    (found, _), (actions, _) = (step_actions(read_ticks(r), ends, 36) for r in (records[0], true))
    names = ACTION_SPACES[36]
    assert r2_score(actions[:, 2], found[:, 2]) > 0.8
    assert r2_score(actions[:, 0], found[:, 0]) > 0.8
    assert (found[:, names.index("key.w")] == actions[:, names.index("key.w")]).mean() > 0.9

    slots = [i for i, n in enumerate(names) if n.startswith("slot.")]
    assert (found[:, slots].argmax(1) == actions[:, slots].argmax(1)).mean() > 0.8

    flags = ["--data", probed.labelled, "--fps 10 --num_workers 0"]
    flags += ["--output", world.folder / "labelled.pkl"]
    run(world.folder, "fit_scaler.py", *flags)
    assert "yaw_diff" in run(world.folder, "data.py", "--inspect", probed.labelled)


# --- what it refuses ---


def test_bad_input_is_one_sentence(world):
    """Bug: a traceback, or minutes of fitting before what is wrong with a label, a shard or a
    checkpoint is said."""
    folder = world.folder
    small = ["--clips 40 --val_clips 10 --steps 5", *world.flags]
    lines = ["--lines", folder / "train" / "*.tar", folder / "val" / "*.tar"]
    error = fails(folder, "probe.py", *small, *lines, "--label_field isGuiOpen")
    assert "label isGuiOpen is false in every clip" in error
    assert "holds features, which have no lines" in fails(
        folder, "probe.py", *small, "--label_field hotbar"
    )
    assert "--label_field biome is not in the lines" in fails(
        folder, "probe.py", *small, *lines, "--label_field biome"
    )

    (folder / "columns.csv").write_text("name,label\nplay.1,a\n")
    assert "has columns ['name', 'label'], not key and label" in fails(
        folder, "probe.py", *small, "--labels", folder / "columns.csv"
    )

    (folder / "strange.csv").write_text("key,label\nplay.1,a\nplay.99,b\n")
    assert "names 1 recordings that the shards do not hold, play.99" in fails(
        folder, "probe.py", *small, "--labels", folder / "strange.csv"
    )
    assert "--horizon 7 needs clips of 9 steps, these have 8" in fails(
        folder, "probe.py", *small, "--horizon 7"
    )

    empty = write_tar(folder / "no-video.tar", {"a.jsonl": jsonl(contractor(20))})
    assert "holds no KEY.mp4" in fails(
        folder, "probe.py", *small, "--label", empty, "--out", folder / "x.tar"
    )
    assert not (folder / "x.tar").exists()

    state, _ = checkpoint.load_latest(str(folder / "run"))
    checkpoint.save(
        str(folder / "arm"),
        state | {"action_names": ["x", "y", "z", *state["action_names"][3:]]},
        1,
    )
    assert "has actions ['x', 'y', 'z'" in fails(
        folder, "probe.py", "--num_workers 0 --checkpoint", folder / "arm"
    )


# --- under a policy ---


def test_the_recipe_of_the_docs_runs(tmp_path, monkeypatch):
    """Bug: the wrapper of docs/evaluate.md does not run, crops another part of the screen than
    training does, or leaves its own observation space."""

    # ViZDoom writes its settings where it starts
    monkeypatch.chdir(tmp_path)
    import gymnasium
    import vizdoom.gymnasium_wrapper  # noqa: F401

    with open(os.path.join(ROOT, "docs", "evaluate.md")) as f:
        blocks = re.findall(r"```python\n(.*?)```", f.read(), re.S)
    code = next(block for block in blocks if "TransformObservation" in block)

    # there it is 256 patches of 256 pixels
    small = code.replace("(256, encoder", "(4, encoder").replace("encoder, 256)", "encoder, 32)")
    assert small.count("4, encoder") == small.count("encoder, 32") == 1

    torch.save({"target_encoder": open_encoder("vit_tiny", 32, 2).state_dict()}, "vitl.pt")
    scope = {"env": gymnasium.make("VizdoomBasic-v1")}
    exec(small, scope)
    env, encoder = scope["env"], scope["encoder"]
    first, _ = env.reset(seed=0)
    later = [env.step(action)[0] for action in (0, 1, 1, 3)]
    assert all(z.shape == (4, 192) and z in env.observation_space for z in [first, *later])

    # the player has moved
    assert np.abs(later[-1] - first).mean() > 0.01

    env.close()
    screen = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    small = av.VideoFrame.from_ndarray(screen, format="rgb24").to_ndarray(
        format="rgb24", width=48, height=32, interpolation="BILINEAR"
    )
    video = torch.from_numpy(small[:, 8:40].transpose(2, 0, 1).copy()).expand(1, 2, -1, -1, -1)
    want = normalize_features(encode_steps(encoder, video, "tubelet", 2))[0, 0].detach()
    np.testing.assert_allclose(env.observation({"screen": screen}), want.numpy(), atol=1e-5)
