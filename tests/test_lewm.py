"""train_lewm.py: an encoder and a predictor trained together; stored frames; collapse and blind
spots; whole runs: resume, ranks, what later stages take from them, refusals."""

import json
import shutil
import types

import numpy as np
import pytest
import torch

import checkpoint
import weights
from data import ActionScaler, Clips, fill_pixels_cache
from droid import DroidReader, droid_clips, open_droid
from evaluation.pretraining import OF_WORLDS, collapse_sentence, inverse_probe
from evaluation.runs import open_run
from files.pixels import open_pixels, pixels_path
from files.shards import expand, index_shards
from files.vpt import ACTION_SPACES, ClipReader, hotbar_columns
from model import (
    Encoder,
    InverseDynamics,
    PooledEncoder,
    Predictor,
    RunningBatchNorm,
    WorldModel,
    encode_steps,
    feature_spread,
    normalize_features,
    predict,
    sigreg,
)
from tests.harness import (
    PEAK,
    column,
    fails,
    numbers,
    run,
    start_ranks,
    step_flops,
    tfrecord,
    weight_count,
    write_file,
)

TINY = (
    "--crop_size 32 --frames_per_clip 8 --pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4"
    " --num_workers 0 --log_every 1 --val_clips 6 --probe_clips 12 --lr 1e-3"
)
PLAN = "--epochs 2 --warmup 1 --anneal 1 --ipe 3"
LOSSES = ("jloss", "sloss", "sigreg_loss", "variance_loss", "covariance_loss", "inverse_loss")
LOSSES += ("grad_norm",)

pytestmark = pytest.mark.usefixtures("forkserver")


# --- what is trained ---


def small_world(**options):
    torch.manual_seed(0)
    encoder = Encoder(24, 1, 2, patch_size=8).requires_grad_(True)
    predictor = Predictor(24, 5, 2, (2, 2), pred_dim=24, depth=1, num_heads=2, predict="change")
    inverse = InverseDynamics(24, 5, (2, 2), width=16, num_heads=2)
    return WorldModel(encoder, predictor, inverse, **options)


def small_play():
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (3, 8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    actions = torch.rand(3, 3, 5, generator=generator).round()
    return video, actions, torch.randn(3, 4, 2, generator=generator)


def test_the_losses_are_those_of_their_names():
    """Bug: the prediction is of another step or another space than later stages use; losses change
    places, so that a weight acts on another one."""
    model = small_world(directions=16)
    video, actions, states = small_play()
    losses, features = model(video, actions, states, seed=3)
    h = encode_steps(model.encoder, video, "tubelet", 2)
    z = normalize_features(h)
    torch.testing.assert_close(features, h)
    error = predict(model.predictor, z[:, :-1], actions, states) - z[:, 1:]
    torch.testing.assert_close(losses[0], error.square().mean() / 2)
    torch.testing.assert_close(losses[1], error[:, 0].square().mean() / 2)
    torch.testing.assert_close(losses[2], sigreg(h.flatten(0, 2), 16, 3))
    std = (h.flatten(0, 2).var(0, correction=0) + 1e-4).sqrt()
    torch.testing.assert_close(losses[3], (1 - std).relu().mean())
    without = small_world()
    without.inverse = None
    losses, _ = without(video, actions, states)
    assert losses[2] == 0 and losses[5] == 0 and (losses[[0, 1, 3, 4]] > 0).all()


def test_the_hotbar_is_no_target_of_inverse_dynamics():
    """Bug: an encoder is rewarded for reading the hotbar at the bottom of the picture, or another
    action than the hotbar is left out."""
    names = ACTION_SPACES[36]
    hotbar = hotbar_columns(names)
    assert [names[i] for i in hotbar[8:10]] == ["key.9", "slot.1"] and len(hotbar) == 18
    assert hotbar_columns(ACTION_SPACES[18]) == []

    # five actions, of which the last two are the hotbar's
    model = small_world(inverse_of=[0, 1, 2])
    model.inverse = InverseDynamics(24, 3, (2, 2), width=16, num_heads=2)
    video, actions, states = small_play()
    loss = model(video, actions, states)[0][5]
    changed = actions.clone()
    changed[..., 3:] = 1 - changed[..., 3:]
    assert model(video, changed, states)[0][5] == loss
    changed[..., 2] += 1
    assert model(video, changed, states)[0][5] != loss


def test_no_gradient_is_stopped():
    """Bug: the target is detached, so that features need not be predictable (LeWM has no
    stop-gradient, V-JEPA has)."""
    model = small_world()
    video, actions, states = small_play()
    for p in model.predictor.parameters():
        torch.nn.init.zeros_(p)  # a predictor that copies, without any look at its input
    losses, _ = model(video, actions, states)
    weight = model.encoder.blocks[0].mlp.fc1.weight
    (gradient,) = torch.autograd.grad(losses[0], weight)

    z = normalize_features(encode_steps(model.encoder, video, "tubelet", 2))
    stopped = (normalize_features(z[:, :-1]) - z[:, 1:].detach()).square().mean() / 2
    both = (normalize_features(z[:, :-1]) - z[:, 1:]).square().mean() / 2
    (expected,) = torch.autograd.grad(both, weight, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)
    (other,) = torch.autograd.grad(stopped, weight)
    assert (gradient - other).abs().max() > 0.1 * gradient.abs().max()


def test_one_vector_a_step():
    """Bug: steps are mixed; a batch norm that later depends on what else is in the batch."""
    torch.manual_seed(0)
    encoder = PooledEncoder(Encoder(24, 1, 2, patch_size=8), 16)
    video = torch.randn(6, 3, 4, 16, 16)
    for _ in range(80):
        encoder(video)
    in_training = encoder(video)
    encoder.eval()
    assert in_training.shape == (6, 2, 24)
    torch.testing.assert_close(encoder(video), in_training, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(encoder(video[2:3, :, 2:]), encoder(video)[2:3, 1:])

    # what it keeps is in its state
    norm = RunningBatchNorm(24)
    x = torch.randn(64, 24) * 3 + 5
    for _ in range(100):
        norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.running_std, x.std(0, correction=0), rtol=1e-3, atol=1e-3)


def test_what_sigreg_does_not_see_is_seen():
    """Bug: half of the dimensions are dead, which SIGReg hardly notices (1.25 in place of 1.0), and
    nobody is told."""
    torch.manual_seed(0)
    healthy = torch.randn(1024, 192)
    half = healthy * (torch.arange(192) < 96) * 2**0.5
    assert sigreg(healthy[:128], 1024, 0) == pytest.approx(1.0, abs=0.25)
    assert sigreg(half[:128], 1024, 0) == pytest.approx(1.25, abs=0.25)
    assert collapse_sentence(*feature_spread(healthy), 12.0, **OF_WORLDS) is None
    rank, smallest = feature_spread(half)
    assert rank < 96 and smallest < 1e-6
    assert "smallest std 0.000" in collapse_sentence(rank, smallest, 12.0, **OF_WORLDS)


def test_a_low_rank_alone_is_no_collapse():
    """Bug: a healthy run is called dead because its random start had a high rank by chance; one
    without regularisers is not, because its rank goes up and down."""
    # rank, smallest std, rank at the start: of three runs on the demo's play, in which the std
    # rises to 0.6, at their lowest ranks; then of one with --variance 0 --covariance 0
    for rank, smallest, first in ((2.5, 0.29, 16.8), (2.9, 0.32, 5.5), (3.3, 0.37, 15.7)):
        assert collapse_sentence(rank, smallest, first, **OF_WORLDS) is None
    for rank, smallest, first in ((1.5, 0.064, 14.5), (2.7, 0.081, 14.5), (4.6, 0.031, 14.5)):
        assert "COLLAPSE" in collapse_sentence(rank, smallest, first, **OF_WORLDS)


# --- stored frames ---


@pytest.fixture
def play(shards):
    return index_shards([str(shards / f"shard-{i:06d}.tar") for i in range(2)])[0]


def same_clips(one, two):
    assert one.keys() == two.keys()
    assert one["key"] == two["key"] and one["bad"] == two["bad"]
    for name in ("video", "actions", "states"):
        assert torch.equal(one[name], two[name]), name


def test_stored_frames_are_the_decoded_ones(tmp_path, play):
    """Bug: stored frames are cut elsewhere, shifted by one, or of another recording; augmentation
    of actions is lost."""
    options = {"crop_size": 32, "frames_per_clip": 8, "fps": 10.0, "temporal_jitter": 1}
    reader = ClipReader(**options, horizontal_flip=True, action_space=36)
    fill_pixels_cache(play, tmp_path, 32, "pyav", 0)
    assert len(list(tmp_path.glob("*.npy"))) == len(play) == 4
    shares = [1.0] * len(play)
    decoded = Clips(play, shares, reader, 1)
    stored = Clips(play, shares, reader, 1, str(tmp_path))
    for i in range(12):
        item = (0, i, *decoded.locate(i / 12 + 0.01))
        same_clips(decoded[item], stored[item])
    assert all(pixels is not None for *_, pixels in stored.opened.values())

    # other crops and decoders have files of their own
    other = {pixels_path(tmp_path, play[0], c, d) for c in (32, 48) for d in ("pyav", "decord")}
    assert len(other) == 4


def test_a_damaged_store_only_costs_time(tmp_path, play, capsys):
    """Bug: a file that was cut by a full disk gives black frames, ends the run, or stays."""
    reader = ClipReader(crop_size=32, frames_per_clip=8, fps=10.0)
    fill_pixels_cache(play, tmp_path, 32, "pyav", 0)
    path = pixels_path(tmp_path, play[0], 32, "pyav")
    whole = open(path, "rb").read()
    for damaged in (whole[:1000], whole[:40], b"", whole[:-5]):
        open(path, "wb").write(damaged)
        stored = Clips(play, [1.0] * 4, reader, 1, str(tmp_path))
        same_clips(Clips(play, [1.0] * 4, reader, 1)[(0, 0, 0, 0.3)], stored[(0, 0, 0, 0.3)])
        assert f"{path} " in capsys.readouterr().out
    fill_pixels_cache(play, tmp_path, 32, "pyav", 0)
    assert open(path, "rb").read() == whole and open_pixels(path, 300, 32) is not None


# --- runs ---


@pytest.fixture(scope="module")
def world(tmp_path_factory, shards):
    """Flags to train on the first two shards and validate on the third."""
    folder = tmp_path_factory.mktemp("lewm")
    video = shards / "shard-{000000..000001}.tar"
    held = shards / "shard-000002.tar"
    scaler = folder / "scaler.pkl"
    run(folder, "fit_scaler.py", "--data", video, "--output", scaler, "--num_workers 0")
    flags = ["--data", video, "--val_data", held, "--scaler", scaler, TINY]
    return types.SimpleNamespace(folder=folder, flags=flags, video=video, held=held, scaler=scaler)


@pytest.fixture(scope="module")
def trained(world):
    """A finished run of six steps with every term; its folder and what it printed."""
    folder = world.folder / "trained"
    flags = [*world.flags, PLAN, "--sigreg 0.05 --sigreg_directions 32 --auto_steps 2"]
    flags += ["--pixels_cache", world.folder / "pixels"]
    text = run(world.folder, "train_lewm.py", *flags, PEAK, "--out_dir", folder)
    return types.SimpleNamespace(out=folder, text=text, flags=flags)


def same_run(a, b):
    """Two finished runs are bitwise one."""
    assert column(a, "epoch", "itr", *LOSSES) == column(b, "epoch", "itr", *LOSSES)
    assert (a / "val.csv").read_text() == (b / "val.csv").read_text()
    one, two = (checkpoint.load_latest(f)[0] for f in (a, b))
    for part in ("encoder", "predictor", "inverse", "pooling"):
        weights_of_part = two[part] or {}
        assert all(torch.equal(one[part][k], v) for k, v in weights_of_part.items()), part


def test_a_run_learns_logs_and_says_what_comes_next(trained):
    """Bug: a term that is logged and not trained; a monitor that is missing from a log."""
    rows = numbers(trained.out, *LOSSES, "total_loss", "effective_rank", "smallest_std")
    assert rows.shape == (6, 10) and np.isfinite(rows).all() and (rows > 0).all()
    weighted = 2 * rows[:, 0] + 2 * rows[:, 1] + 0.05 * rows[:, 2] + rows[:, 3] + 0.01 * rows[:, 4]
    np.testing.assert_allclose(rows[:, 7], weighted + rows[:, 5], rtol=1e-5)
    assert rows[-1, 5] < rows[0, 5]  # inverse dynamics
    names = ("epoch", "tf_skill", "tf_gap", "effective_rank", "smallest_std", "probe_yaw")
    val = numbers(trained.out, *names, "moves_gap", log="val.csv")
    assert step_flops(trained.out, 4) > 6 * 4 * weight_count(trained.out, "encoder", "predictor")
    assert val[:, 0].tolist() == [1, 2] and np.isfinite(val).all()
    for text in ("held out after epoch 2: skill", "action gap", "effective rank", "yaw R2"):
        assert text in trained.text
    assert "THE ACTION IS IGNORED" in trained.text
    assert f"judge it with: python eval.py --checkpoint {trained.out}" in trained.text
    assert (trained.out / "curves.png").stat().st_size > 10_000

    # the last layer norm has no weights of its own, or features could be made small by its bias
    state, _ = checkpoint.load_latest(trained.out)
    assert (state["encoder"]["module.norm.weight"] == 1).all()
    new = weights.build_encoder("vit_tiny", 32, 8, seed=239).state_dict()
    moved = state["encoder"]["module.blocks.1.mlp.fc1.weight"]
    assert not torch.equal(moved, new["blocks.1.mlp.fc1.weight"])


def test_resume_is_exact_and_frames_may_be_stored_or_not(world, tmp_path, trained):
    """Bug: a weight, Adam's state or SIGReg's directions do not survive a stop in the middle of an
    epoch, or depend on --num_workers or on --pixels_cache."""
    without = [flag for flag in trained.flags if "pixels" not in str(flag)]
    run(tmp_path, "train_lewm.py", *without, "--max_steps 2 --out_dir", tmp_path / "cut")
    again = [*trained.flags, "--resume --num_workers 2 --out_dir", tmp_path / "cut"]
    assert "resumed from" in run(tmp_path, "train_lewm.py", *again)
    same_run(trained.out, tmp_path / "cut")


@pytest.mark.parametrize(
    "kind",
    [
        "--sigreg 0.05 --sigreg_directions 32",
        pytest.param("--pool mean", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(world, tmp_path, kind):
    """Bug: each rank regularises its own few clips; a batch norm of half the batch; a monitor or a
    held-out number that depends on who reads which clip."""
    flags = [*world.flags, PLAN, kind, "--pixels_cache", tmp_path / "pixels", "--out_dir"]
    run(tmp_path, "train_lewm.py", *flags, tmp_path / "one")
    ranks = start_ranks(tmp_path, "train_lewm.py", *flags, tmp_path / "two", "--batch_size 2")
    for rank in ranks:
        code, text = rank.wait()
        assert code == 0, text
    one = numbers(tmp_path / "one", *LOSSES)
    two = numbers(tmp_path / "two", *LOSSES)
    np.testing.assert_allclose(two, one, rtol=5e-3, atol=1e-5)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4, atol=1e-6)
    names = ("tf_skill", "effective_rank", "smallest_std")
    np.testing.assert_allclose(
        numbers(tmp_path / "two", *names, log="val.csv"),
        numbers(tmp_path / "one", *names, log="val.csv"),
        rtol=2e-2,
        atol=1e-2,
    )


def test_later_stages_take_the_run(world, tmp_path, trained):
    """Bug: an encoder that encodes otherwise than the trained one; a predictor that train_ac.py
    does not know; a report that needs the encoder named."""
    state, _ = checkpoint.load_latest(trained.out)
    encoder = weights.load_encoder(trained.out)
    assert weights.encoder_hash(encoder) == state["encoder_hash"]
    own = weights.without_module(state["encoder"])
    assert all(torch.equal(own[k], v) for k, v in encoder.state_dict().items())

    report = [
        "--checkpoint",
        trained.out,
        "--samples 4 --batch_size 4 --num_workers 0 --val_clips 6",
    ]
    text = run(tmp_path, "eval.py", *report, "--out", tmp_path / "report")
    skill = numbers(trained.out, "tf_skill", log="val.csv")[-1, 0]
    assert f"{skill:.3f}" in text

    # first what compares with other runs, then that the rest does not
    lead = text.index("comparable between encoders")
    alone = text.index("in the run's own space: this run trained its encoder")
    assert text.index("yaw R2") < text.index("rank of the true step") < alone
    assert lead < alone < text.index("skill (error / copying")
    comparable = json.loads((tmp_path / "report" / "report.json").read_text())["comparable"]
    assert 0 <= comparable["next_step_rank"][0] <= 1 and np.isfinite(comparable["probe_yaw"])

    flags = ["--data", world.video, "--val_clips 0 --scaler", world.scaler, "--encoder"]
    flags += [trained.out, "--crop_size 32 --frames_per_clip 8 --action_space 36 --predict change"]
    flags += ["--pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4 --num_workers 0"]
    flags += ["--epochs 1 --ipe 2 --warmup 0 --anneal 0 --init_from", trained.out]
    text = run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "ac")
    assert (
        f"--init_from: {len(state['predictor'])} tensors taken; initialised again: nothing" in text
    )
    assert f"encoder {state['encoder_hash']}" in text

    # a run on frozen features is judged on the same clips, by other settings
    both = ["--checkpoint", tmp_path / "ac", "--data", world.held, "--train_data", world.video]
    text = run(tmp_path, "eval.py", *both, *report[2:], "--out", tmp_path / "frozen")
    assert f"in the space of encoder {state['encoder_hash']}" in text
    frozen = json.loads((tmp_path / "frozen" / "report.json").read_text())["comparable"]
    for name in ("fitted_on", "tested_on", "probe_yaw", "probe_keys"):
        assert frozen[name] == pytest.approx(comparable[name], abs=1e-6), name


def test_every_checkpoint_has_its_own_encoder(tmp_path, trained):
    """Bug: an earlier checkpoint, or a run that was moved, is judged with the newest encoder of the
    folder that it was trained in."""
    first = tmp_path / "moved.pth.tar"
    shutil.copy(trained.out / "checkpoint-epoch001.pth.tar", first)
    _, state, _, path = open_run(str(first))
    settings = checkpoint.settings_of(state)
    assert settings["encoder"] == path == str(first)
    hashes = {weights.encoder_hash(weights.load_encoder(p)) for p in (first, trained.out)}
    assert state["encoder_hash"] in hashes and len(hashes) == 2


@pytest.mark.slow
def test_later_stages_take_one_vector_a_step(world, tmp_path):
    """Bug: the MLP and its running means are lost on the way, or later stages get patch tokens."""
    folder = tmp_path / "run"
    flags = [*world.flags, PLAN, "--pool mean --sigreg 0.09 --variance 0 --out_dir", folder]
    run(tmp_path, "train_lewm.py", *flags)
    encoder = weights.load_encoder(folder)
    state, _ = checkpoint.load_latest(folder)
    assert isinstance(encoder, PooledEncoder) and not encoder.training
    assert weights.encoder_hash(encoder) == state["encoder_hash"] and state["grid"] == 1
    assert state["pooling"]["1.running_mean"].abs().max() > 0
    report = ["--checkpoint", folder, "--samples 4 --batch_size 4 --num_workers 0 --val_clips 6"]
    text = run(tmp_path, "eval.py", *report, "--out", tmp_path / "report")
    skill = numbers(folder, "tf_skill", log="val.csv")[-1, 0]
    assert f"{skill:.3f}" in text

    # features of it are one vector a step, and a predictor trains on them
    same = ["--encoder", folder, "--crop_size 32"]
    run(tmp_path, "encode.py", "--data", world.video, *same, "--out", tmp_path / "features")
    flags = ["--data", tmp_path / "features" / "*.tar", "--scaler", world.scaler, "--val_clips 0"]
    flags += ["--crop_size 32 --frames_per_clip 8 --pred_dim 48 --pred_depth 2 --pred_heads 3"]
    flags += ["--batch_size 4 --num_workers 0 --epochs 1 --ipe 2 --warmup 0 --anneal 0"]
    text = run(tmp_path, "train_ac.py", *flags, "--out_dir", tmp_path / "ac")
    assert f"encoder {state['encoder_hash']}" in text
    wrong = ["--data", world.video, "--encoder", folder, "--crop_size 64 --out", tmp_path / "no"]
    assert "give --crop_size 32" in fails(tmp_path, "encode.py", *wrong)

    # and they are probed, beside other encoders
    probe = ["--data", world.video, "--val_data", world.held, "--crop_size 32 --frames_per_clip 8"]
    probe += ["--task inverse --steps 20 --clips 12 --val_clips 6 --num_workers 0"]
    text = run(tmp_path, "probe.py", *probe, "--encoder", folder, "vit_tiny", "--out", tmp_path)
    assert "1 tokens a step" in text and "4 tokens a step" in text


def test_without_regularisers_it_collapses_and_says_so(world, tmp_path):
    """Bug: the loss falls, the features have died, and the log looks healthy."""
    flags = [*world.flags, "--epochs 1 --warmup 0 --anneal 0 --ipe 60 --lr 3e-3 --idm 0"]
    flags += ["--variance 0 --covariance 0 --pixels_cache", tmp_path / "pixels", "--out_dir"]
    text = run(tmp_path, "train_lewm.py", *flags, tmp_path / "dead")
    assert "WARNING: nothing keeps the features from collapsing" in text
    assert "WARNING: THE FEATURES COLLAPSE: effective rank" in text

    # the same training with the regularisers is no collapse
    healthy = "--variance 1 --covariance 0.01 --idm 1 --epochs 2 --ipe 20 --warmup 1 --out_dir"
    text = run(tmp_path, "train_lewm.py", *flags[:-1], healthy, tmp_path / "alive")
    assert "COLLAPSE" not in text

    dead = numbers(tmp_path / "dead", "jloss", "smallest_std", "inverse_loss")
    assert dead[-1, 0] < 0.1 * dead[0, 0] and (dead[:, 2] == 0).all()
    assert checkpoint.load_latest(tmp_path / "dead")[0]["inverse"] is None


def test_without_actions_nothing_depends_on_them(world, tmp_path):
    """Bug: the control sees actions after all, through its states or in a later stage; resuming
    makes its zeros random."""
    flags = [*world.flags, PLAN, "--no-actions --out_dir", tmp_path / "blind"]
    run(tmp_path, "train_lewm.py", *flags, "--max_steps 3")
    text = run(tmp_path, "train_lewm.py", *flags, "--resume")
    assert "resumed" in text
    meter = numbers(tmp_path / "blind", "tf_gap", "ro_gap", "moves_gap", log="val.csv")
    assert meter.shape == (2, 3) and (meter == 0).all() and "THE ACTION IS IGNORED" not in text
    predictor = checkpoint.load_latest(tmp_path / "blind")[0]["predictor"]
    for name in ("action_encoder", "state_encoder"):
        assert not predictor[f"{name}.weight"].any() and not predictor[f"{name}.bias"].any()
    assert predictor["predictor_embed.weight"].any()


def test_a_run_with_another_target_does_not_resume(world, tmp_path, trained):
    """Bug: --idm_hotbar is not read, or weights of 18 targets are taken for those of 36."""
    state, _ = checkpoint.load_latest(trained.out)
    assert len(state["inverse"]["out.bias"]) == 18 and len(state["action_names"]) == 36
    flags = [*trained.flags, "--resume --idm_hotbar --out_dir", trained.out]
    assert "was trained with inverse_of [0, 1, 2, 3, 13" in fails(tmp_path, "train_lewm.py", *flags)


def test_more_of_the_same_training(world, tmp_path, trained):
    """Bug: --init_from drops the predictor, or takes the weights of another encoder."""
    flags = [*world.flags, "--epochs 1 --warmup 0 --anneal 0 --ipe 1 --start_lr 0 --lr 0"]
    flags += ["--init_from", trained.out, "--out_dir", tmp_path / "on"]
    text = run(tmp_path, "train_lewm.py", *flags)
    assert "--init_from: the encoder in" in text and "tensors of the predictor taken" in text
    before, after = (checkpoint.load_latest(f)[0] for f in (trained.out, tmp_path / "on"))
    for part in ("encoder", "predictor"):
        assert all(torch.equal(after[part][k], v) for k, v in before[part].items())


def test_a_dry_run_writes_nothing(world, tmp_path):
    """Bug: --dry_run leaves a folder that a real run then refuses, or skips what can go wrong;
    --recordings picks nothing, or picks among the held-out ones too."""
    names = [record.recording for record in index_shards(expand(str(world.video)))[0]]
    (tmp_path / "names.txt").write_text("\n".join(names[:3]))
    flags = [*world.flags, "--dry_run --batch_size 2 --out_dir", tmp_path / "run"]
    flags += ["--recordings", tmp_path / "names.txt"]
    text = run(tmp_path, "train_lewm.py", *flags)
    assert not (tmp_path / "run").exists()
    assert "dry run, nothing written; 3 recordings to train on, 2 held out" in text
    assert "held out after 3 steps: skill" in text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--prediction 0", "--prediction 0 trains no predictor"),
        ("--sigreg -1", "--sigreg -1.0 is below 0"),
        ("--encoder_arch vit_tinny", "--encoder_arch vit_tinny is none of vit_tiny,"),
        ("--patch_size 12", "--crop_size 32 is no multiple of --patch_size 12"),
        ("--frames_per_step 4", "--frames_per_step 4 is not --tubelet_size 2"),
        (
            "--pixels_cache p --motion_shift 0.1",
            "--motion_shift moves the crop, and --pixels_cache",
        ),
        ("--init_from no.pt --no-actions", "--no-actions: the predictor of --init_from"),
        ("--init_from no.pt", "--init_from no.pt: no such file or run folder"),
        ("--init_from no.pt --encoder_arch vit_tiny", "--encoder_arch: the encoder's size is that"),
        ("--scaler no.pkl", "no action scaler at no.pkl; fit one with"),
        ("--auto_steps 4", "--auto_steps 4"),
    ],
)
def test_what_makes_no_sense_is_refused(world, tmp_path, flags, sentence):
    """Bug: a run that starts with flags that contradict each other."""
    assert sentence in fails(
        tmp_path, "train_lewm.py", *world.flags, flags, "--out_dir", tmp_path / "run"
    )


# --- robots ---


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """Two TFRecords of four episodes, their scaler, and a finished run of six steps: it holds out
    three of them."""
    folder = tmp_path_factory.mktemp("lewm-robot")
    grip = np.sin(np.arange(64) / 5)[:, None] / 2 + 0.5
    for shard in range(2):
        episodes = []
        for i in range(4):
            change = {"observation/gripper_position": np.roll(grip, 3 * i)}
            episodes.append(tfrecord(4 * shard + i, 64, **change))
        write_file(folder / f"arm.tfrecord-0000{shard}-of-00002", *episodes)
    data = ["--dataset droid --val_fraction 0.4 --data", folder / "*.tfrecord*"]
    run(folder, "fit_scaler.py", *data, "--output", folder / "scaler.pkl")
    flags = [*data, "--scaler", folder / "scaler.pkl", TINY, "--frames_per_clip 5"]
    text = run(folder, "train_lewm.py", *flags, PLAN, "--auto_steps 2 --out_dir", folder / "run")
    return types.SimpleNamespace(folder=folder, out=folder / "run", flags=flags, text=text)


def test_a_robot_has_the_monitors_of_play(robot):
    """Bug: pose actions are probed as keys, or the probe is not written; a log without the action
    gap; the page says play where there is none."""
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    columns = [f"probe_{name}" for name in names]
    others = ["tf_skill", "tf_gap_low", "ro_skill", "effective_rank", "smallest_std", "moves_gap"]
    val = numbers(robot.out, "probe_mean", *columns, *others, log="val.csv")
    assert val.shape == (2, 14) and np.isfinite(val).all()
    np.testing.assert_allclose(val[:, 0], val[:, 1:8].mean(1), rtol=1e-6)
    assert "inverse dynamics mean R2" in robot.text and "gripper R2" in robot.text
    assert "THE ACTION IS IGNORED" in robot.text and "AUROC" not in robot.text
    state, _ = checkpoint.load_latest(robot.out)
    assert state["action_names"] == names and state["dataset"] == "droid"
    assert len(state["held_out"]) == 3


def test_pose_actions_are_probed_as_numbers():
    """Bug: a dimension of the pose gets the score of another one, or of a key."""
    generator = np.random.default_rng(0)
    names = ["x", "y", "still"]

    def clips(count):
        z = torch.from_numpy(generator.normal(size=(count, 4, 1, 3))).half()
        noise = generator.normal(size=(count, 3, 3))
        actions = (z[:, 1:, 0] - z[:, :-1, 0]).float().numpy() + [0.01, 3, 0] * noise
        actions[..., 2] = 0.1 + 1e-9 * noise[..., 2]  # a gripper that is always open
        recording = np.repeat([f"r{i}" for i in range(count // 4)], 4)
        return {"z": z, "actions": actions, "recording": recording}

    result = inverse_probe(clips(200), clips(80), names)
    assert result["probe_x"] > 0.95 and 0 < result["probe_y"] < 0.4
    assert np.isnan(result["probe_still"])
    assert result["probe_mean"] == pytest.approx((result["probe_x"] + result["probe_y"]) / 2)


@pytest.mark.slow
def test_a_robots_losses_are_of_its_poses(robot, tmp_path):
    """Bug: dimensions of a pose are taken for keys that are pressed; actions are not scaled; a step
    is two frames; states are those of play."""
    once = "--epochs 1 --ipe 1 --warmup 0 --anneal 0 --lr 0 --out_dir"
    run(tmp_path, "train_lewm.py", *robot.flags, once, tmp_path / "run")
    state, _ = checkpoint.load_latest(tmp_path / "run")

    # the first batch of a run, as train_lora.py would read it
    reader = DroidReader(5, crop_size=32)
    train, _, _ = open_droid([str(robot.folder / "*.tfrecord*")], None, 0.4, reader)
    reader.scaler = ActionScaler.load(robot.folder / "scaler.pkl", "")
    options = {"batches_per_epoch": 1, "num_workers": 0, "seed": 239}
    batch = next(iter(droid_clips(train, 4, reader=reader, **options)))

    encoder = weights.load_encoder(tmp_path / "run")
    z = normalize_features(encode_steps(encoder, batch["video"], "frame", 1))
    inverse = InverseDynamics(192, 7, (2, 2))
    inverse.load_state_dict(state["inverse"])
    error = (inverse(z) - batch["actions"]).square().mean()
    (logged,) = numbers(tmp_path / "run", "inverse_loss", "jloss")
    np.testing.assert_allclose(logged[0], error.item(), rtol=1e-4)

    predictor, _, _, _ = open_run(str(tmp_path / "run"))
    ahead = predict(predictor, z[:, :-1], batch["actions"], batch["states"])
    np.testing.assert_allclose(logged[1], (ahead - z[:, 1:]).square().mean().item() / 2, rtol=1e-4)


def test_a_robots_run_resumes_exactly(robot, tmp_path):
    """Bug: the order of clips, or the camera that is drawn, depends on where a run was stopped."""
    plan = [PLAN, "--auto_steps 2 --out_dir", tmp_path / "cut"]
    run(tmp_path, "train_lewm.py", *robot.flags, *plan, "--max_steps 2")
    text = run(tmp_path, "train_lewm.py", *robot.flags, *plan, "--resume --num_workers 2")
    assert "resumed from" in text
    same_run(robot.out, tmp_path / "cut")
    wrong = [*robot.flags, *plan, "--resume --crop square"]
    assert "was trained with crop reference" in fails(tmp_path, "train_lewm.py", *wrong)


@pytest.mark.slow
def test_two_ranks_of_a_robot_are_one(robot, tmp_path):
    """Bug: both ranks read the same episodes, or validate on their own share alone."""
    flags = [*robot.flags, PLAN, "--auto_steps 2 --batch_size 2 --out_dir", tmp_path / "two"]
    for rank in start_ranks(tmp_path, "train_lewm.py", *flags):
        code, text = rank.wait()
        assert code == 0, text
    one = numbers(robot.out, *LOSSES)
    two = numbers(tmp_path / "two", *LOSSES)
    np.testing.assert_allclose(two, one, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4, atol=1e-6)
    names = ("tf_skill", "ro_skill", "probe_gripper")
    np.testing.assert_allclose(
        numbers(tmp_path / "two", *names, log="val.csv"),
        numbers(robot.out, *names, log="val.csv"),
        rtol=2e-2,
        atol=1e-2,
    )


@pytest.mark.slow
def test_later_stages_take_a_robots_run(robot, tmp_path):
    """Bug: held-out errors are of other states, frames or episodes than those of training; features
    of a robot's encoder are those of gameplay; a traceback where a stage knows play alone."""
    quick = "--samples 4 --ranked_clips 2 --val_clips 6 --batch_size 4 --num_workers 0"
    text = run(tmp_path, "eval.py", "--checkpoint", robot.out, quick, "--out", tmp_path / "report")
    assert "the probe is for gameplay; train_lewm.py writes a robot's into val.csv" in text
    judged = json.loads((tmp_path / "report" / "report.json").read_text())
    names = ["tf_skill", "ro_skill", "tf_gap"]
    in_training = numbers(robot.out, *names, log="val.csv")[-1]
    np.testing.assert_allclose([judged[k] for k in names], in_training, rtol=1e-4, atol=1e-6)

    # features of it are those that it was trained on: the errors are equal, up to bfloat16
    data = ["--data", robot.folder / "*.tfrecord*"]
    encode = ["--dataset droid", *data, "--encoder", robot.out, "--crop_size 32 --num_workers 1"]
    run(tmp_path, "encode.py", *encode, "--out", tmp_path / "features")
    errors = []
    for name, source in (("video", data), ("stored", ["--data", tmp_path / "features"])):
        judge = ["--checkpoint", robot.out, *source, quick, "--val_clips 24"]
        run(tmp_path, "eval.py", *judge, "--out", tmp_path / name)
        report = json.loads((tmp_path / name / "report.json").read_text())
        errors.append([report["clips"], report["tf_skill"], report["ro_skill"]])
    np.testing.assert_allclose(*errors, rtol=1e-2)

    # and a predictor trains on them
    train = ["--data", tmp_path / "features", "--scaler", robot.folder / "scaler.pkl"]
    train += ["--base none --full --crop_size 32 --frames_per_clip 5 --pred_dim 48 --pred_depth 2"]
    train += ["--pred_heads 3 --batch_size 4 --grad_accum 1 --num_workers 0 --max_steps 2"]
    run(tmp_path, "train_lora.py", *train, "--warmup_steps 1 --out_dir", tmp_path / "lora")
    state, _ = checkpoint.load_latest(tmp_path / "lora")
    assert state["encoder_hash"] == checkpoint.load_latest(robot.out)[0]["encoder_hash"]

    # plans are looked for among motions of the arm
    plan = "--horizon 1 --clips 2 --num_samples 8 --num_elites 2 --iterations 1 --out"
    text = run(tmp_path, "plan.py", "--checkpoint", robot.out, plan, tmp_path / "plan.json")
    assert "plans in 2 clips of" in text and (tmp_path / "plan.json").exists()
    line = fails(tmp_path, "probe.py", "--checkpoint", robot.out)
    assert "was trained on robot episodes, and probe.py reads gameplay" in line


def test_a_dry_run_of_a_robot_writes_nothing(robot, tmp_path):
    """Bug: --dry_run counts shards where episodes are meant, or fails without a pixels cache."""
    flags = [*robot.flags, "--dry_run --out_dir", tmp_path / "run"]
    text = run(tmp_path, "train_lewm.py", *flags)
    assert not (tmp_path / "run").exists()
    assert "5 recordings to train on, 3 held out" in text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--pixels_cache p", "--pixels_cache is for --dataset vpt"),
        ("--action_space 18", "--action_space is for --dataset vpt"),
        ("--frames_per_step 2", "--frames_per_step is for --dataset vpt"),
        ("--camera wrist_2", "no camera wrist_2 in it (--camera)"),
        ("--fps 5", "was fitted with --fps 4, this run has 5"),
    ],
)
def test_what_makes_no_sense_for_a_robot_is_refused(robot, tmp_path, flags, sentence):
    """Bug: a flag of play is taken and does nothing; a scaler of other steps is used."""
    assert sentence in fails(
        tmp_path, "train_lewm.py", *robot.flags, flags, "--out_dir", tmp_path / "run"
    )


def test_a_flag_of_robots_is_none_of_play(world, tmp_path):
    """Bug: --stride is taken for play, and nothing reads it."""
    flags = [*world.flags, "--stride 4 --out_dir", tmp_path / "run"]
    assert "--stride is for --dataset droid" in fails(tmp_path, "train_lewm.py", *flags)


def test_features_are_no_video(game, tmp_path):
    """Bug: shards of features are taken for video, and the encoder is trained on nothing."""
    flags = ["--data", game.held, "--scaler", game.folder / "scaler.pkl", TINY, "--val_clips 0"]
    assert "holds features: an encoder is trained on video" in fails(
        tmp_path, "train_lewm.py", *flags, "--out_dir", tmp_path / "run"
    )


def test_the_schedule_is_that_of_the_other_stages():
    """Bug: two schedules of one name drift apart."""
    import train_ac
    import train_lewm

    for step in range(1, 41):
        plan = (step, 40, 8, 12, 1e-4, 1e-3, 1e-6)
        assert train_lewm.lr_at(*plan) == train_ac.lr_at(*plan)
