"""Latent actions: the quantiser, the model, H5 files, train_lam.py as a program, and whether the
codes are the actions."""

import json
import math
import os
import re
import signal

import av
import h5py
import numpy as np
import pytest
import torch

import checkpoint
import evaluation.codes as code_measures
import prepare.latents as make_latents
from data import Latents, latent_sequences
from evaluation import code_films
from files import latents
from files.latents import open_manifest, pack_codes, unpack_codes
from files.shards import Slice, index_shards, read_ticks
from files.video import mp4_times, read_frames
from model import (
    FiniteScalars,
    LatentActionModel,
    TinyAutoencoder,
    VectorQuantizer,
    kmeans,
    match,
    moved,
)
from prepare.manifest import split_counts
from tests.harness import (
    PEAK,
    ROOT,
    Run,
    column,
    fails,
    numbers,
    rows_of,
    run,
    start_ranks,
    step_flops,
    weight_count,
)

TINY = {
    "embed_dim": 16,
    "encoder_depth": 3,
    "decoder_depth": 2,
    "num_heads": 2,
    "patch_dim": 16,
    "codebook_dim": 8,
    "size": (8, 12),
}
SMALL = (
    "--embed_dim 16 --encoder_depth 1 --decoder_depth 1 --num_heads 2 --patch_dim 16 --codebook_dim"
    " 8 --batch_size 4 --num_workers 0"
)
PLAN = "--epochs 3 --ipe 10 --log_every 1 --lr 2e-3 --vq_warmup_steps 8 --val_clips 8"


pytestmark = pytest.mark.usefixtures("forkserver")


def tiny(**change):
    torch.manual_seed(0)
    model = LatentActionModel(**TINY | {"vq_warmup_steps": 0} | change)

    # as after training: at the start the decoder does not listen to the code
    for blk in model.decoder:
        torch.nn.init.normal_(blk.film.weight, std=0.5)
    return model.eval()


def write_h5(path, values, name="embeddings", **options):
    with h5py.File(path, "w") as f:
        f.create_dataset(name, data=values, **options)


def some(seed, n=20, T=2, size=8, C=16, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, C, T, size, size)).astype(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten files of 40 steps of (16, 8, 8), a manifest, and labels beside them."""
    out = tmp_path_factory.mktemp("latents")
    for i in range(10):
        write_h5(out / f"{i}.h5", some(i))
        np.savez(out / f"{i}.actions.npz", move=np.random.default_rng(i).integers(0, 9, 39))
    run(out, "prepare/manifest.py", out, "--size 8", env={"PYTHONPATH": ROOT})
    return out


# --- the quantiser ---


def feed(vq, z, **options):
    vq.train()
    out = vq(z)
    vq.update(**options)
    return out


def test_warmup_then_kmeans_then_codes():
    """Bug: the warm-up quantises, k-means sees the first batch instead of the last ones, or its
    centres are not what is chosen from."""
    torch.manual_seed(0)
    vq = VectorQuantizer(3, 4, 8, warmup=5)
    true = 10 * torch.randn(3, 4, 8)
    for step in range(5):
        names = torch.randint(4, (64, 3))
        noise = torch.randn(64, 3, 8)
        first = step == 0
        z = 1000 * noise if first else true[torch.arange(3), names] + 0.01 * noise
        z_q, _, codebook, commitment = feed(vq, z)
        assert torch.equal(z_q, z)
        assert codebook == 0 and commitment == 0
        assert vq.active() == (step == 4)

        # the first batch is forgotten when 1024 newer ones have come
        if first:
            vq.recent.zero_()
            vq.seen[1].zero_()

    z_q, indices, codebook, _ = vq.eval()(true[torch.arange(3), names])
    assert (z_q - true[torch.arange(3), names]).abs().max() < 0.02
    assert codebook < 1e-3
    for slot in range(3):
        pairs = {(a, b) for a, b in zip(names[:, slot].tolist(), indices[:, slot].tolist())}

        # a renaming
        assert len(pairs) == 4

    # one table per slot
    assert len({tuple(c.flatten().tolist()) for c in vq.codebook}) == 3


def test_kmeans_finds_the_clusters_and_survives_few_points():
    """Bug: k-means with fewer points than centres, or with equal points, ends in NaN."""
    x = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0]])
    found = kmeans(x, 3, torch.Generator().manual_seed(0)).sort(0).values
    torch.testing.assert_close(found, torch.tensor([[0.05], [5.05], [9.0]]))
    assert torch.isfinite(kmeans(torch.ones(2, 4), 6, torch.Generator().manual_seed(0))).all()


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_dead_code_comes_back_and_its_sums_are_reset(codebook):
    """Bug: a revived code is pulled back to where it died by its old EMA sum, dies again at once,
    or comes back while the run settles."""
    torch.manual_seed(0)
    vq = VectorQuantizer(2, 3, 4, codebook=codebook, warmup=0, kmeans=False)
    with torch.no_grad():
        vq.codebook[:] = torch.tensor([0.0, 1.0, 1000.0]).view(1, 3, 1).expand(2, 3, 4)
        vq.sums.copy_(vq.codebook * 1.0)
    z = torch.cat(
        [torch.zeros(40, 2, 4), torch.ones(40, 2, 4), torch.full((40, 2, 4), 7.0)]
    ) + 0.01 * torch.randn(120, 2, 4)
    vq.mass[:, 2] = 1e-3
    feed(vq, z, settle=True)
    assert (vq.codebook[:, 2] > 100).all()

    feed(vq, z)
    assert (vq.codebook[:, 2] < 8).all()
    assert (vq.mass[:, 2] > 0.3 * vq.mass[:, :2].mean()).all()
    torch.testing.assert_close(vq.sums[:, 2], vq.codebook.detach()[:, 2] * vq.mass[:, 2:])

    for _ in range(300):
        feed(vq, z)
    used = vq.eval()(z)[1]
    assert all(len(used[:, slot].unique()) == 3 for slot in range(2))


def test_ema_converges_to_the_mean_of_what_chose_it():
    """Bug: sums and counts decay at different rates or Laplace smoothing biases a table of few
    counts."""
    vq = VectorQuantizer(1, 2, 2, warmup=0, kmeans=False)
    z = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, -3.0]]).unsqueeze(1)
    with torch.no_grad():
        vq.codebook[:] = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
        vq.sums.copy_(vq.codebook)
    for _ in range(1500):
        feed(vq, z)
    torch.testing.assert_close(
        vq.codebook.detach()[0], torch.tensor([[3.0, 0.0], [0.0, -3.0]]), atol=1e-3, rtol=0
    )


def test_gradients_pass_straight_through():
    """Bug: the quantiser blocks the decoder's gradient, or the codebook loss trains the encoder and
    the commitment loss the codebook."""
    vq = VectorQuantizer(2, 3, 4, codebook="loss", warmup=0)
    z = torch.randn(5, 2, 4, requires_grad=True)
    z_q, _, codebook, commitment = vq(z)
    (3 * z_q).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.full_like(z, 3.0))
    assert vq.codebook.grad is None
    z.grad = None
    codebook.backward(retain_graph=True)
    assert z.grad is None and vq.codebook.grad.abs().sum() > 0
    vq.codebook.grad = None
    commitment.backward()
    assert z.grad.abs().sum() > 0 and vq.codebook.grad is None


def test_fsq_rounds_to_its_levels():
    """Bug: FSQ indices and vectors disagree (decode of indices is not what training decoded), or a
    level cannot be reached."""
    torch.manual_seed(0)
    fsq = FiniteScalars(12, 6)
    z_q, indices, _, _ = fsq(5 * torch.randn(4000, 3, 6))
    assert indices.min() == 0
    assert indices.max() == 11
    assert len(indices.unique()) == 12
    torch.testing.assert_close(fsq.lookup(indices), z_q)


def test_vector_quantize_pytorch_agrees():
    """Bug: our distance, straight-through, or commitment loss is not what the well-known library
    computes (where it is installed)."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = library.VectorQuantize(
        dim=8, codebook_size=12, commitment_weight=0.25, decay=0.99, rotation_trick=False
    ).eval()
    ours = VectorQuantizer(1, 12, 8, warmup=0).eval()
    with torch.no_grad():
        ours.codebook[0] = theirs._codebook.embed[0]
    z = torch.randn(50, 8)
    z_q, indices, _ = theirs(z)
    mine = ours(z.unsqueeze(1))
    assert torch.equal(mine[1][:, 0], indices)
    torch.testing.assert_close(mine[0][:, 0], z_q)


def test_pack_and_unpack():
    """Bug: two actions share a number, or a number means other codes than it was made from."""
    ids = torch.arange(12**3)
    codes = unpack_codes(ids, 12, 3)
    assert codes.shape == (1728, 3)
    assert len(codes.unique(dim=0)) == 1728
    assert codes.max() == 11
    assert torch.equal(pack_codes(codes, 12), ids)
    assert codes[13].tolist() == [0, 1, 1]
    assert np.array_equal(pack_codes(codes.numpy(), 12), ids.numpy())


# --- the model ---


def test_codes_do_not_know_the_future_nor_the_past():
    """Bug: the code of t to t+1 changes with step t+2 (the guide's origin leaks through its depth),
    or with where the clip began."""
    model = tiny(quantizer="none")
    z = torch.randn(2, 6, 16, 8, 12)
    before = model.encode(z)[1]
    for step in range(6):
        changed = z.clone()
        changed[:, step] += torch.randn(2, 16, 8, 12)
        same = (model.encode(changed)[1] == before).all(-1).all(-1)[0]
        assert same.tolist() == [t not in (step - 1, step) for t in range(5)]


def test_decoding_at_once_is_decoding_step_by_step():
    """Bug: generation runs another path than training (the guide's origin has two decoders), or the
    decoder sees later steps."""
    model = tiny(warp="neighbours", reach=2)
    torch.nn.init.normal_(model.warp_out.weight)
    z = torch.randn(2, 6, 16, 8, 12)
    indices = model.encode(z)[0]
    whole = model.decode(z[:, :-1], indices)
    for t in range(1, 6):
        torch.testing.assert_close(
            model.decode(z[:, :t], indices[:, :t])[:, -1], whole[:, t - 1], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(
        model.decode(z[:, 0], indices[:, 0]), whole[:, 0], atol=1e-5, rtol=1e-5
    )

    ahead = model.rollout(z[:, 0], indices[:, :3])
    context = z[:, :1]
    for t in range(3):
        context = torch.cat([context, model.decode(context, indices[:, : t + 1])[:, -1:]], dim=1)
    torch.testing.assert_close(ahead, context[:, 1:])
    assert (model.decode(z[:, :-1], (indices + 1) % 12) - whole).abs().max() > 1e-3


def test_the_shift_moves_what_the_encoder_sees_and_nothing_else():
    """Bug: the two steps of a pair move differently, by whole patches only, so that codes can name
    places inside a patch, or the decoder's input moves too."""
    model = tiny(quantizer="none", rollout_horizon=1, reach=2, warp="neighbours")
    z = torch.randn(2, 3, 16, 8, 12)
    shift = torch.tensor([[[1, 2], [0, 5]], [[3, 0], [7, 11]]])
    z_e = model.encode(z, shift)[1]
    for b in range(2):
        for t in range(2):
            rolled = torch.roll(z[b : b + 1, t : t + 2], shift[b, t].tolist(), (3, 4))
            torch.testing.assert_close(
                model.encode(rolled)[1][0, 0], z_e[b, t], atol=1e-5, rtol=1e-5
            )

    with torch.no_grad():
        # the code says nothing: only the decoder's input is left
        model.to_code.weight.zero_()
    assert model(z, shift)["mse"] == model(z)["mse"]


def test_a_mirrored_shift_continues_the_picture():
    """Bug: "reflect" wraps, or repeats the pixel at the edge."""
    x = torch.randn(2, 3, 5, 6)
    move = torch.tensor([[2, -1], [0, 4]])
    mirrored = moved(x, move, "reflect")
    for n, (down, right) in enumerate(move.tolist()):
        wide = np.pad(x[n].numpy(), ((0, 0), (5, 5), (6, 6)), mode="symmetric")
        place = wide[:, 5 - down : 10 - down, 6 - right : 12 - right]
        np.testing.assert_array_equal(mirrored[n], place)
    assert torch.equal(moved(x, move)[0], torch.roll(x[0], (2, -1), (1, 2)))


def test_each_patch_is_found_where_it_was():
    """Bug: the encoder is told of another place than a patch came from (left for right, rows for
    columns), or edges have no other side; a patch of noise matches as well as any."""
    before = torch.randn(3, 16, 16, 32)
    for down, right in ((0, 0), (2, -3), (-4, 4)):
        fits = match(before, torch.roll(before, (down, right), (2, 3)), 4, 4)
        assert fits.shape == (3, 32, 81)
        assert (fits.argmax(-1) == 9 * (down + 4) + right + 4).all()
        assert 0.8 < fits.amax(-1).min() <= 1

    faint = before.clone()
    faint[:, :, :4, :4] *= 1e-3
    assert match(faint, faint, 4, 4)[:, 0].abs().max() < 0.02


@pytest.mark.parametrize("warp", ["neighbours", "flow"])
def test_a_warp_can_move_the_whole_picture(warp):
    """Bug: a decoder that reads from another side than it is told to, or not around the edges; one
    that moves things before it has learned to."""
    model = tiny(warp=warp, reach=3, size=(8, 12))
    z = torch.randn(2, 16, 8, 12)
    h = torch.zeros(2, 6, 16)
    # at first it is nearest to what it was
    kept = model.carry(z, h)
    for move in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        assert (kept - z).abs().mean() < 0.8 * (kept - torch.roll(z, move, (2, 3))).abs().mean()

    # bias alone: two down, one to the left
    with torch.no_grad():
        if warp == "neighbours":
            places = model.warp_out.bias.view(2, 7, 16)
            places.zero_()
            places[0, 3 + 2] = 50
            places[1, 3 - 1] = 50
        else:
            places = model.warp_out.bias.view(2, 16)
            places[0] = math.atanh(-2 / 3)
            places[1] = math.atanh(1 / 3)
    rolled = torch.roll(z, (2, -1), (2, 3))
    torch.testing.assert_close(model.carry(z, h), rolled, atol=1e-4, rtol=1e-4)


def test_rollout_loss():
    """Bug: the rollout loss is zero (a two-step window at the guide's origin), or is not the error
    of generation."""
    model = tiny(mean=0.5, std=2.0)
    z = torch.randn(2, 3, 16, 8, 12)
    losses = model(z)
    ahead = model.rollout(z[:, 0], losses["indices"])
    torch.testing.assert_close(losses["rollout"], ((ahead[:, 1] - z[:, 2]) / 2).square().mean())
    assert losses["rollout"] > 0.1
    assert abs(losses["rollout"] - losses["mse"]) > 1e-4

    total = losses["mse"] + losses["codebook"] + 0.25 * losses["commitment"] + losses["rollout"]
    torch.testing.assert_close(losses["loss"], total)

    for horizon, T in ((2, 2), (3, 3)):
        with pytest.raises(
            ValueError,
            match=(
                f"--rollout_horizon {horizon} needs windows of {horizon + 1} steps,"
                f" --sequence_length is {T}"
            ),
        ):
            tiny(rollout_horizon=horizon)(z[:, :T])
    assert tiny(rollout_horizon=1)(z[:, :2])["rollout"] == 0


@pytest.mark.parametrize(
    "quantizer, codebook", [("vq", "ema"), ("vq", "loss"), ("fsq", "ema"), ("none", "ema")]
)
def test_every_parameter_gets_a_gradient(quantizer, codebook):
    """Bug: a layer that nothing uses: DistributedDataParallel then waits for it, and `none` or the
    warm-up trains only half."""
    for warmup, warp in ((0, "none"), (5, "neighbours"), (5, "flow")):
        more = {"vq_warmup_steps": warmup, "warp": warp, "reach": 0 if warp == "none" else 2}
        model = tiny(quantizer=quantizer, codebook=codebook, **more).train()
        model(torch.randn(2, 4, 16, 8, 12))["loss"].backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_full_size_is_the_guides():
    """Bug: the shapes of the guide's table are not those of the model (256 patches of 256, 3 codes
    of 12, 128 dims)."""
    with torch.device("meta"):
        model = LatentActionModel()
    assert model.grid == (16, 16)
    assert model.adapter.weight.shape == (256, 16, 4, 4)
    assert model.out_adapter.weight.shape == (256, 16, 4, 4)
    assert model.quantizer.codebook.shape == (3, 12, 128)
    assert len(model.encoder) == len(model.decoder) == 3

    # the guide's origin, with its second decoder
    assert sum(p.numel() for p in model.parameters()) < 39_058_448


# --- measures ---


def test_purity_is_not_bought_with_many_codes():
    """Bug: purity is learned on what it is scored on, so that a code for every transition scores
    1; or on other windows of the same recordings, so that codes that name recordings do."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 9, 2000)
    recordings = np.repeat(np.arange(4), 500)
    assert code_measures.purity(np.arange(2000), actions, recordings) == 0
    assert code_measures.purity(actions * 7 + rng.integers(0, 7, 2000), actions, recordings) == 1
    assert abs(code_measures.purity(rng.integers(0, 20, 2000), actions, recordings) - 1 / 9) < 0.05
    of_recordings = 100 * recordings + (actions + 2 * recordings) % 9
    assert code_measures.purity(of_recordings, actions, recordings) == 0
    assert np.isnan(code_measures.purity(actions, actions, 0 * recordings))

    # by hand: code 0 is action 0 elsewhere for both, code 1 is in recording 1 alone
    codes = np.array([0, 0, 0, 1])
    truth = np.array([0, 1, 0, 0])
    assert code_measures.purity(codes, truth, np.array([0, 0, 1, 1])) == 0.5
    assert code_measures.perplexity(np.array([[0, 1], [0, 2], [0, 1], [0, 2]])) == pytest.approx(2)


def test_purity_is_one_number_whatever_the_order_and_batches():
    """Bug: a collapsed codebook had purity 0.000 in training and 0.143 in eval_lam: which half a
    transition fell into depended on the order. It is what one code for everything gets."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 4, 42)
    recordings = np.repeat([0, 1, 2], 14)
    order = rng.permutation(42)
    one = code_measures.purity(0 * actions, actions, recordings)
    assert code_measures.purity(0 * actions, actions[order], recordings[order]) == one > 0
    found = {k: np.ones(42) for k in code_measures.ERRORS} | {"var": np.ones(42)}
    found |= {"codes": np.zeros((42, 3), int), "labels": actions[:, None], "recording": recordings}
    summary = code_measures.code_summary(found, 12)
    assert summary["purity"] == summary["purity_one_code"] == one
    constant = code_measures.code_summary(found | {"labels": np.zeros((42, 1), int)}, 12)
    assert np.isnan(constant["purity"]) and np.isnan(constant["ami"])


def test_both_sides_of_same_over_own_are_of_the_same_transitions():
    """Bug: the error with another clip's code was of the transitions that have such a clip, the own
    one of all: rare actions are harder, and a model that ignores its code got 0.05 for 1."""
    same = np.array([1.0, 1.0, np.nan])
    own = np.array([1.0, 1.0, 100.0])
    found = {k: own for k in code_measures.ERRORS} | {"same": same, "var": own}
    summary = code_measures.code_summary(found, None)
    assert summary["same_over_own"] == 1 and summary["psnr_same"] == 0

    # was a ZeroDivisionError
    still = code_measures.code_summary(found | {"copy": np.zeros(3)}, None)
    assert still["mse_over_copy"] == np.inf


def test_a_lone_window_has_no_other_clips(folder):
    """Bug: the codes of other clips of a lone window were its own, so that the decoder seemed to
    ignore the code; and the last batch of three windows by twos was a lone window."""
    _, splits = open_manifest(folder / "manifest.json")
    dataset = Latents(splits["validation"], 8)
    for batch_size in (1, 2, 3, 4):
        for limit in range(2, 6):
            batches = dataset.windows(batch_size, limit)
            assert min(map(len, batches)) > 1 and sum(map(len, batches)) == limit
    model = tiny(size=(8, 8), quantizer="none")
    found = code_measures.held_out_codes(model, dataset, 4, 1)
    assert np.isnan(found["marginal"]).all() and np.isnan(found["random"]).all()

    summary = code_measures.code_summary(found, None)
    assert np.isnan(summary["mse_over_marginal"])
    assert np.isfinite(summary["mse_over_copy"])

    list(code_measures.complaints(summary, False))


def test_the_warmup_of_a_quantiser_is_not_judged_as_codes(folder):
    """Bug: before the end of the warm-up the decoder works from vectors, and random codes were
    looked up in a table that it has never seen."""
    _, splits = open_manifest(folder / "manifest.json")
    dataset = Latents(splits["train"], 8)
    model = tiny(size=(8, 8), vq_warmup_steps=5)
    assert not code_measures.quantises(model)
    assert code_measures.quantises(tiny(quantizer="fsq"))
    with torch.no_grad():
        model.quantizer.codebook.fill_(1e6)
    assert np.isfinite(code_measures.held_out_codes(model, dataset, 4, 8)["random"]).all()
    assert code_measures.held_out_codes(model, dataset, 4, 8)["random"].max() < 1e6
    model.quantizer.seen[0] = 5
    assert code_measures.quantises(model)


class Oracle(LatentActionModel):
    """Steps count up by 1, 2 or 3 everywhere; codes say which."""

    deaf = False

    def encode(self, z, shift=None):
        step = (z[:, 1:] - z[:, :-1]).mean((2, 3, 4))
        z_q = step[:, :, None, None].expand(-1, -1, 3, 8).clone()
        return step.round().long().unsqueeze(-1).expand(-1, -1, 3), z_q, z_q

    def codes(self, indices):
        if indices.is_floating_point():
            return indices
        return indices.unsqueeze(-1).expand(*indices.shape, 8).float()

    def predict(self, z, codes, x=None):
        return z + (2.0 if self.deaf else codes.mean((2, 3))[:, :, None, None, None] + 0.01)


class NamesPlaces(Oracle):
    """The control: codes name (recording, place), by the value of the next step. They are all that
    its decoder needs, and say nothing in another recording."""

    def encode(self, z, shift=None):
        value = z[:, 1:].mean((2, 3, 4))
        z_q = value[:, :, None, None].expand(-1, -1, 3, 8).clone()
        return latents.unpack_codes(value.round().long(), 12, 3), z_q, z_q

    def predict(self, z, codes, x=None):
        return 0 * z + codes.mean((2, 3))[:, :, None, None, None] + 0.01


class CountingWindows(Latents):
    """Two recordings that count up, by steps of 1 to 3; each begins at a value of its own. `turns`:
    after so many counts a recording is where it began, as a picture on a torus."""

    def __init__(self, turns=None):
        self.files = [latents.LatentFile("", 200, ()) for _ in range(2)]
        self.length, self.seed = 4, 0
        self.starts = np.array([197, 197])
        self.labels = ["step"]
        self.step = np.random.default_rng(0).integers(1, 4, 399)
        self.turns = turns

    def __getitem__(self, item):
        number, first = item[2:]
        value = np.concatenate([[0], self.step.cumsum()])[first : first + 4]
        if self.turns:
            value = number * self.turns + value % self.turns
        z = torch.tensor(value, dtype=torch.float32)[:, None, None, None].expand(4, 16, 8, 12)
        labels = torch.tensor(self.step[first : first + 3, None])
        return {"z": z.clone(), "labels": labels, "key": "", "bad": []}


def test_the_measures_of_a_perfect_and_of_a_deaf_decoder():
    """Bug: the baselines are mixed up: a decoder that ignores its code, or codes that name the next
    frame, look good."""
    model = Oracle(**TINY, vq_warmup_steps=0).eval()
    found = code_measures.held_out_codes(model, CountingWindows(), 10, 60)
    s = code_measures.code_summary(found, 12)
    assert len(found["own"]) == 180
    assert found["own"].mean() == pytest.approx(1e-4, rel=0.01)
    assert s["purity"] == 1
    assert s["ami"] == pytest.approx(1)
    assert s["joint_codes"] == 3
    assert s["same_over_own"] == pytest.approx(1, rel=0.01)
    assert s["mse_over_copy"] < 1e-4
    assert s["mse_over_zero"] < 1e-4
    assert 1e-4 < s["mse_over_marginal"] < 1e-3
    assert s["psnr_random"] > 30
    assert not list(code_measures.complaints(s, True))

    model.deaf = True
    found_deaf = code_measures.held_out_codes(model, CountingWindows(), 10, 60)
    s = code_measures.code_summary(found_deaf, 12)
    assert s["mse_over_zero"] == pytest.approx(1)
    assert "ignores the code" in " ".join(code_measures.complaints(s, True))

    collapsed = found | {"codes": np.zeros_like(found["codes"])}
    assert "collapsed" in " ".join(
        code_measures.complaints(code_measures.code_summary(collapsed, 12), True)
    )

    positions = found | {"same": 30 * found["own"]}
    assert "codes are no actions" in " ".join(
        code_measures.complaints(code_measures.code_summary(positions, 12), True)
    )


def test_codes_that_name_recording_and_place_fail_every_measure():
    """Bug: AMI and NMI were of codes and actions of the same transitions: a code for each place of
    each recording, which says nothing anywhere else, gained by that. Its error is perfect."""
    from eval_lam import linear_probe

    model = NamesPlaces(**TINY, vq_warmup_steps=0).eval()
    windows = CountingWindows(turns=40)
    found = code_measures.held_out_codes(model, windows, 10, 100)
    s = code_measures.code_summary(found, 12)
    assert s["mse_over_copy"] < 1e-3 and s["joint_codes"] > 60
    assert s["purity"] == 0
    assert abs(s["nmi"]) < 0.01 and abs(s["ami"]) < 0.01
    assert s["same_over_own"] > 100

    # what the measures saw before: codes and actions of the same transitions
    from sklearn.metrics import normalized_mutual_info_score

    ids = latents.pack_codes(found["codes"], 12)
    actions = found["labels"][:, 0]
    assert normalized_mutual_info_score(actions, ids) > 0.1

    # a probe that is fitted on one recording is at chance on the other
    one_hot = np.float64(ids[:, None] == np.unique(ids))
    rows = found["recording"] == 0
    probe = linear_probe(one_hot[rows], actions[rows], one_hot[~rows], actions[~rows])
    assert abs(probe - 1 / 3) < 0.02

    # codes that name actions pass all of them
    honest = code_measures.held_out_codes(
        Oracle(**TINY, vq_warmup_steps=0).eval(), windows, 10, 100
    )
    s = code_measures.code_summary(honest, 12)
    assert s["purity"] > 0.9


# --- files ---


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (3, 16, 1, 8, 8)},
        {"chunks": (1, 5, 1, 3, 8), "compression": "gzip"},
        {"compression": "lzf", "shuffle": True},
    ],
)
def test_windows_cross_chunks(tmp_path, options, T):
    """Bug: steps inside a chunk are out of order, a window ends at a chunk's border, HDF5 chunking
    or compression changes what is read."""
    for i, dtype in enumerate((np.float32, np.float16)):
        data = some(i, n=9, T=T, dtype=dtype)
        layout = options | (
            {
                "chunks": (
                    *options["chunks"][:2],
                    min(options["chunks"][2], T),
                    *options["chunks"][3:],
                )
            }
            if "chunks" in options
            else {}
        )
        write_h5(tmp_path / f"{i}.h5", data, **layout)
        steps = np.concatenate(list(data.transpose(0, 2, 1, 3, 4))).astype(np.float32)
        np.savez(tmp_path / f"{i}.actions.npz", move=np.arange(len(steps) - 1))

    flags = [tmp_path, "--size 8 --val_ratio 0.2 --test_ratio 0"]
    run(tmp_path, "prepare/manifest.py", *flags, env={"PYTHONPATH": ROOT})
    meta, splits = open_manifest(tmp_path / "manifest.json")
    assert meta["steps_per_chunk"] == T
    assert [len(splits[k]) for k in ("train", "validation", "test")] == [1, 1, 0]

    for f in splits["train"] + splits["validation"]:
        data = some(
            int(os.path.basename(f.path)[0]),
            n=9,
            T=T,
            dtype=(np.float32, np.float16)[int(os.path.basename(f.path)[0])],
        )
        steps = np.concatenate(list(data.transpose(0, 2, 1, 3, 4))).astype(np.float32)
        dataset = Latents([f], 5)
        for first in range(9 * T - 4):
            clip = dataset[0, 0, 0, first]
            assert np.array_equal(clip["z"].numpy(), steps[first : first + 5])
            assert clip["labels"][:, 0].tolist() == [*range(first, first + 4)]


def test_the_order_is_a_function_of_seed_epoch_and_world(folder):
    """Bug: the order of windows depends on the number of workers or on where a run was resumed;
    ranks share windows or leave some out."""
    _, splits = open_manifest(folder / "manifest.json")
    dataset = Latents(splits["train"], 8, seed=3)

    def keys(n, **options):
        batches = iter(latent_sequences(dataset, **options))
        return [next(batches)["key"] for _ in range(n)]

    whole = keys(12, batch_size=4, batches_per_epoch=5)
    assert keys(7, batch_size=4, batches_per_epoch=5, epoch=1) == whole[5:]
    assert keys(4, batch_size=4, batches_per_epoch=5, epoch=1, itr=3, num_workers=2) == whole[8:]

    halves = [keys(12, batch_size=2, batches_per_epoch=5, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    assert sorted(sum(whole[:5], [])) != sorted(sum(whole[5:10], []))
    assert len({k for b in whole for k in b}) > 30
    assert (
        keys(3, batch_size=4, batches_per_epoch=5) == whole[:3] != [b["key"] for b in [{"key": []}]]
    )

    everyone = [dataset.windows(3, 20, rank, 2) for rank in range(2)]
    assert sorted(i for part in everyone for b in part for i in b) == sorted(
        i for b in dataset.windows(3, 20) for i in b
    )
    assert all(first % 8 == 0 for part in everyone for b in part for _, _, _, first in b)


def test_the_manifest_refuses_or_skips_what_is_wrong(tmp_path):
    """Bug: a file of another shape or with a NaN stops the run a day later; a bad split is made
    without a word."""
    error = fails(tmp_path, "prepare/manifest.py", tmp_path, env={"PYTHONPATH": ROOT})
    assert "no *.h5 file in" in error

    for i in range(10):
        write_h5(tmp_path / f"good{i}.h5", some(i))
    write_h5(tmp_path / "shape.h5", some(1, C=8))
    write_h5(tmp_path / "short.h5", some(1, n=3))
    write_h5(tmp_path / "integers.h5", some(1).astype(np.int32))
    nan = some(1)
    nan[13, 3, 1, 2, 2] = np.nan
    write_h5(tmp_path / "nan.h5", nan)
    with h5py.File(tmp_path / "two.h5", "w") as f:
        f["a"] = some(1)
        f["inner/b"] = some(2)
    (tmp_path / "text.h5").write_bytes(b"<html>")
    write_h5(tmp_path / "labels.h5", some(1))
    np.savez(tmp_path / "labels.actions.npz", move=np.zeros(40))
    make = ["prepare/manifest.py", tmp_path, "--size 8"]
    for flags, sentence in (
        ("--val_ratio 0.3", "must be shares that sum to 1, not 0.8 + 0.3 + 0.1"),
        ("--train_ratio 1.1 --val_ratio -0.2", "must be shares that sum to 1"),
    ):
        assert sentence in fails(tmp_path, *make, flags, env={"PYTHONPATH": ROOT})

    text = run(tmp_path, *make, env={"PYTHONPATH": ROOT})
    reasons = {
        "shape": "shape [20, 8, 2, 8, 8], not [chunks, 16, 1 or 2, 8, 8]",
        "short": "3 chunks of 2 steps are fewer than the 8 steps",
        "integers": "dtype int32",
        "nan": "chunk 13 holds values that are not finite",
        "two": "2 datasets (a, inner/b)",
        "text": "",
        "labels": "move has shape (40,), 40 steps need (39,)",
    }
    for name, reason in reasons.items():
        assert f"left out: {name}.h5: " in text and reason in text

    manifest = json.load(open(tmp_path / "manifest.json"))
    names = [e["path"] for part in manifest["splits"].values() for e in part]
    assert manifest["metadata"]["files"] == {"train": 8, "validation": 1, "test": 1}
    assert sorted(names) == [f"good{i}.h5" for i in range(10)]

    values = np.concatenate([some(int(e["path"][4])) for e in manifest["splits"]["train"]]).astype(
        np.float64
    )
    assert manifest["metadata"]["mean"] == pytest.approx(values.mean())
    assert manifest["metadata"]["std"] == pytest.approx(values.std())
    np.testing.assert_allclose(manifest["metadata"]["channel_std"], values.std((0, 2, 3, 4)))

    again = run(tmp_path, *make, "--output", tmp_path / "again.json", env={"PYTHONPATH": ROOT})
    assert "8 files of 320 steps in train" in again
    assert json.load(open(tmp_path / "again.json")) == manifest

    run(tmp_path, *make, "--seed 1 --output", tmp_path / "other.json", env={"PYTHONPATH": ROOT})
    other = json.load(open(tmp_path / "other.json"))
    assert other["splits"] != manifest["splits"]
    assert other["metadata"]["fingerprint"] == manifest["metadata"]["fingerprint"]

    run(
        tmp_path,
        *make,
        "--test_files good[34]* --output",
        tmp_path / "held.json",
        env={"PYTHONPATH": ROOT},
    )
    held = {
        k: [e["path"] for e in v]
        for k, v in json.load(open(tmp_path / "held.json"))["splits"].items()
    }
    assert held["test"] == ["good3.h5", "good4.h5"]
    assert sorted(map(len, held.values())) == [1, 2, 7]
    assert "--test_files nothing* takes 0 of 10 files" in fails(
        tmp_path, *make, "--test_files nothing*", env={"PYTHONPATH": ROOT}
    )
    assert split_counts(2, (0.8, 0.1, 0.1)) == [1, 1, 0]
    assert split_counts(1, (0.8, 0.1, 0.1)) == [1, 0, 0]

    write_h5(tmp_path / "good0.h5", some(1, n=30))
    with pytest.raises(
        ValueError, match="good0.h5 is not as it was: run python -m prepare.manifest again"
    ):
        open_manifest(tmp_path / "manifest.json")


SHAPE = (20, 16, 2, 8, 8)


def write_virtual(path, parts):
    """A virtual dataset of SHAPE of other files: [(file, chunks)]."""
    layout = h5py.VirtualLayout(SHAPE, dtype="f4")
    first = 0
    for source, count in parts:
        shape = (count, *SHAPE[1:])
        layout[first : first + count] = h5py.VirtualSource(str(source), "latents", shape=shape)
        first += count
    with h5py.File(path, "w") as f:
        f.create_virtual_dataset("latents", layout)


def write_parts(path, shape=SHAPE, written=5, filters=(), **options):
    """A chunked dataset of which only the first chunks were written."""
    with h5py.File(path, "w") as f:
        data = f.create_dataset("latents", shape, "f4", chunks=(1, *SHAPE[1:]), **options)
        data[:written] = some(0, n=written)


def write_filtered(path, mask):
    """Chunks of a filter that nobody has; with mask 1 the writer left it out."""
    with h5py.File(path, "w") as f:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((1, *SHAPE[1:]))
        settings.set_filter(32111, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple(SHAPE)
        data = h5py.h5d.create(f.id, b"latents", h5py.h5t.IEEE_F32LE, space, settings)
        for i, chunk in enumerate(some(77)):
            data.write_direct_chunk((i, 0, 0, 0, 0), chunk.tobytes(), filter_mask=mask)


def test_what_would_read_as_zeros_is_left_out_by_name(tmp_path):
    """Bug: HDF5 gives zeros, without an error, for what was never written and for values in files
    that are gone: such latents were trained on; or one odd file ended the manifest of all."""

    # hidden: no latents of their own
    parts = tmp_path / ".parts"
    parts.mkdir()
    for i, name in enumerate(("a", "b")):
        write_h5(parts / f"{name}.h5", some(90 + i, n=10), name="latents")
    write_parts(parts / "unwritten.h5")
    write_virtual(tmp_path / "whole.h5", [(".parts/a.h5", 10), (parts / "b.h5", 10)])
    write_virtual(tmp_path / "gone.h5", [(parts / "a.h5", 10), (parts / "c.h5", 10)])
    write_virtual(tmp_path / "half.h5", [(parts / "a.h5", 10)])
    write_virtual(tmp_path / "short.h5", [(parts / "a.h5", 20)])
    write_virtual(tmp_path / "behind.h5", [(parts / "unwritten.h5", 20)])
    write_parts(tmp_path / "died.h5")
    write_parts(tmp_path / "grown.h5", written=20)
    with h5py.File(tmp_path / "grown.h5", "r+") as f:
        del f["latents"]
        data = f.create_dataset("latents", (5, *SHAPE[1:]), "f4", maxshape=(None, *SHAPE[1:]))
        data[:] = some(0, n=5)
        data.resize(20, 0)
    with h5py.File(tmp_path / "contiguous.h5", "w") as f:
        f.create_dataset("latents", SHAPE, "f4")
    with h5py.File(tmp_path / "null.h5", "w") as f:
        f["latents"] = h5py.Empty("f4")
    write_h5(tmp_path / "zeros.h5", np.concatenate([some(3)[:15], 0 * some(3)[:5]]))
    write_h5(tmp_path / "still.h5", np.repeat(np.repeat(some(4)[:1, :, :1], 2, 2), 20, 0))
    write_filtered(tmp_path / "filter.h5", 0)
    write_filtered(tmp_path / "skipped.h5", 1)
    write_h5(tmp_path / "T1.h5", some(5, n=40, T=1))
    for i in range(3):
        write_h5(tmp_path / f"good{i}.h5", some(10 + i))
    (tmp_path / "linked.h5").symlink_to(tmp_path / "good0.h5")
    text = run(tmp_path, "prepare/manifest.py", tmp_path, "--size 8", env={"PYTHONPATH": ROOT})
    for name, reason in {
        "gone": "a virtual dataset whose source ",
        "half": "values come from nowhere",
        "short": "has shape [10, 16, 2, 8, 8], which is less than it needs",
        "behind": "15 of 20 chunks of the H5 file were never written",
        "died": "15 of 20 chunks of the H5 file were never written",
        "grown": "never written",
        "contiguous": "its values were never written",
        "null": "is empty (null)",
        "zeros": "all values of chunk 15, step 0 are 0",
        "still": "all its steps are the same",
        "filter": "pip install hdf5plugin",
        "T1": "steps a chunk: 1, most files have 2",
        "linked": "the same latents as good0.h5",
    }.items():
        lines = [line for line in text.splitlines() if f"left out: {name}.h5: " in line]
        assert len(lines) == 1 and reason in lines[0], (name, lines)

    _, splits = open_manifest(tmp_path / "manifest.json")
    names = sorted(os.path.basename(f.path) for files in splits.values() for f in files)
    assert names == ["good0.h5", "good1.h5", "good2.h5", "skipped.h5", "whole.h5"]

    whole = np.concatenate([some(90, n=10), some(91, n=10)]).swapaxes(1, 2).reshape(40, 16, 8, 8)
    assert np.array_equal(latents.read_steps(str(tmp_path / "whole.h5"), 18, 23), whole[18:23])

    # after the manifest was made
    (parts / "b.h5").unlink()
    latents._open.cache_clear()
    with pytest.raises(ValueError, match="whole.h5, steps 0 to 3, cannot be read .*b.h5 is not"):
        latents.read_steps(str(tmp_path / "whole.h5"), 0, 4)


def test_latents_in_folders_and_labels_beside_them(tmp_path):
    """Bug: shards with folders in their keys are encoded into folders that the manifest did not
    look into; damaged labels ended it with a library's error; misnamed ones were not noticed."""
    rng = np.random.default_rng(0)
    for key in ("day1/clip", "day2/clip", "day2/more", "clip"):
        z = rng.standard_normal((40, 16, 8, 8)).astype(np.float32)
        latents.write_latents(tmp_path, key, z, {"move": rng.integers(0, 9, 39)})
    with pytest.raises(ValueError, match="../clip leads out of"):
        latents.write_latents(tmp_path, "../clip", z, {})

    (tmp_path / "day2" / "loop").symlink_to(tmp_path)
    for name, raw in (("empty", b""), ("cut", (tmp_path / "clip.actions.npz").read_bytes()[:100])):
        write_h5(tmp_path / f"{name}.h5", some(len(name)))
        (tmp_path / f"{name}.actions.npz").write_bytes(raw)
    np.savez(tmp_path / "other_actions.npz", move=np.zeros(39))
    make = ["prepare/manifest.py", tmp_path, "--size 8"]
    text = run(tmp_path, *make, "--test_files", "day2/*", env={"PYTHONPATH": ROOT})
    for name in ("empty", "cut"):
        assert f"left out: {name}.h5: {tmp_path / name}.actions.npz is damaged" in text
    assert "not used: other_actions.npz: labels are KEY.actions.npz beside KEY.h5" in text
    assert "4 of 4 files have labels move" in text

    splits = json.load(open(tmp_path / "manifest.json"))["splits"]
    assert [e["path"] for e in splits["test"]] == ["day2/clip.h5", "day2/more.h5"]
    assert sum(len(v) for v in splits.values()) == 4

    _, splits = open_manifest(tmp_path / "manifest.json")
    dataset = Latents([*splits["test"], *splits["train"]], 8)
    keys = {dataset[0, 0, n, 0]["key"] for n in range(3)}

    # two files are called clip.h5
    assert len(keys) == 3

    import encode

    (tmp_path / encode.SETTINGS).write_text("{}")
    for name in os.listdir(tmp_path):
        if name.endswith(".h5"):
            os.unlink(tmp_path / name)
    with pytest.raises(ValueError, match="holds what other settings made"):
        encode.check_settings(tmp_path, {"vae": "x"})


@pytest.mark.parametrize(
    "values, sentence",
    [
        (np.linspace(-0.9, 0.9, 39), "yaw is -0.9 at entry 0: labels are whole numbers"),
        (np.array([1.0] * 38 + [np.nan]), "yaw is nan at entry 38"),
        (np.full(39, np.inf), "yaw is inf at entry 0"),
        (np.full(39, 2**63, np.uint64), "labels are whole numbers"),
        (np.array(["left"] * 39), "yaw holds <U4: labels are whole numbers"),
        (np.zeros(39, complex), "yaw holds complex128"),
        (np.array([None] * 39), "is damaged or no npz file of numbers"),
        (np.zeros((39, 1)), "yaw has shape (39, 1), 40 steps need (39,)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, values, sentence):
    """Bug: 39 different angles were cut to the label 0, which any code names with purity 1; NaN
    became a class of its own."""
    np.savez(tmp_path / "a.actions.npz", yaw=values)
    with pytest.raises(ValueError) as error:
        latents.read_labels(str(tmp_path / "a.h5"), 40)
    assert sentence in str(error.value) and "a.actions.npz" in str(error.value)


def test_labels_that_are_classes_keep_their_values(tmp_path):
    """Bug: in refusing fractions, whole numbers of other types are refused too."""
    for values in (np.arange(39.0), np.arange(39, dtype=np.uint8), np.arange(39) - 5):
        np.savez(tmp_path / "a.actions.npz", yaw=values)
        assert latents.read_labels(str(tmp_path / "a.h5"), 40)["yaw"].tolist() == values.tolist()
    np.savez(tmp_path / "a.actions.npz", jump=np.arange(39) > 20)
    assert latents.read_labels(str(tmp_path / "a.h5"), 40)["jump"].tolist() == [0] * 21 + [1] * 18


def test_one_file_without_truth_costs_that_file_only(tmp_path):
    """Bug: without the labels of one file, purity, AMI and probes of all were left out, without a
    word."""
    files = []
    for i in range(4):
        write_h5(tmp_path / f"{i}.h5", some(i))
        files.append(latents.LatentFile(str(tmp_path / f"{i}.h5"), 40, SHAPE))
        if i:
            labels = {"move": np.arange(39) % 3} | ({"jump": np.arange(39) % 2} if i > 2 else {})
            np.savez(tmp_path / f"{i}.actions.npz", **labels)

    dataset = Latents(files, 8)
    assert dataset.labels == ["move"] and dataset.unlabelled == ["0.h5"]
    assert (dataset[0, 0, 0, 0]["labels"] == latents.NO_LABEL).all()
    assert dataset[0, 0, 3, 4]["labels"][:, 0].tolist() == [1, 2, 0, 1, 2, 0, 1]

    model = tiny(size=(8, 8))
    found = code_measures.held_out_codes(model, dataset, 5, 20)
    assert np.isnan(found["same"][found["recording"] == 0]).all()

    summary = code_measures.code_summary(found, 12)

    # of 140 transitions; other rows are of clips
    known = found["recording"] > 0
    only = code_measures.code_summary(
        {k: v[known] for k, v in found.items() if len(v) == 140}
        | {k: v for k, v in found.items() if len(v) != 140},
        12,
    )
    assert summary["purity"] == only["purity"] and summary["ami"] == only["ami"]

    notes = " ".join(code_measures.truth_notes(dataset, found, "test"))
    assert "1 of 4 test files have no move" in notes and "0.h5" in notes

    alone = found | {
        "labels": np.where(found["recording"][:, None] == 1, found["labels"], latents.NO_LABEL)
    }
    assert "the test files with truth are under two" in " ".join(
        code_measures.truth_notes(dataset, alone, "test")
    )


def test_labels_of_some_files_are_said(tmp_path):
    """Bug: a label that only some files have switched the others' truth off, or went unnoticed."""
    for i in range(4):
        write_h5(tmp_path / f"{i}.h5", some(i))
        labels = {"move": np.arange(39) % 3} | ({"jump": np.arange(39) % 2} if i > 1 else {})
        np.savez(tmp_path / f"{i}.actions.npz", **labels)
    files = [latents.LatentFile(str(tmp_path / f"{i}.h5"), 40, SHAPE) for i in range(4)]
    dataset = Latents(files, 8)
    assert dataset.labels == ["move"]
    assert dataset.unused == ["jump"]
    assert not dataset.unlabelled

    found = code_measures.held_out_codes(tiny(size=(8, 8)), dataset, 5, 20)
    assert "jump: only some test files" in " ".join(
        code_measures.truth_notes(dataset, found, "test")
    )


def test_a_failing_disk_does_not_make_another_split(tmp_path):
    """Bug: a file that could not be opened for want of handles (or EIO, ESTALE) was called
    damaged and left out."""
    import resource

    write_h5(tmp_path / "a.h5", some(0))
    latents._open.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="fix the disk, then continue with --resume"):
            latents.read_steps(str(tmp_path / "a.h5"), 0, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(latents.read_steps(str(tmp_path / "a.h5"), 0, 4)) == 4


@pytest.mark.parametrize("world", ["grid", "half", "together", "roll"])
def test_labels_say_how_the_picture_moves(world):
    """Bug: a move is labelled as another one, or has another length: purity would still be 1, and
    what a world shows would be something else."""
    rng = np.random.default_rng(0)
    z, labels = make_latents.world_file(world, rng, 30, 8, (16, 32), 0.0, "none")
    assert z.shape == (30, 8, 16, 32) and z.dtype == np.float32
    length = 2 if world == "half" else 4
    for t, move in enumerate(labels["move"]):
        down, right = move // 3 - 1, move % 3 - 1
        np.testing.assert_array_equal(
            np.roll(z[t], (length * down, length * right), (1, 2)), z[t + 1]
        )
    assert len(np.unique(labels["move"])) == 9

    # all of the picture moves, or squares of a sixteenth of it
    filled = (z[0] != 0).mean()
    share = {"roll": (0.99, 1), "together": (0.07, 0.125), "grid": (0.06, 0.0625)}
    low, high = share.get(world, share["grid"])
    assert low <= filled <= high


def test_a_camera_turns_and_a_picture_zooms_as_their_labels_say():
    """Bug: left is labelled right, a turn of 0 changes the picture, rooms are the same in all
    files, or the largest picture still grows."""
    rng = np.random.default_rng(0)
    z, labels = make_latents.world_file("camera", rng, 40, 8, (16, 32), 0.0, "none")
    assert set(labels["yaw"]) == {-2, -1, 0, 1, 2}
    for t, turn in enumerate(labels["yaw"]):
        # a turn to the right moves what is in the middle to the left
        before = z[t][:, 4:12, 12:20]
        moves = range(-8, 9)
        errors = [np.square(z[t + 1][:, 4:12, 12 + m : 20 + m] - before).mean() for m in moves]
        assert np.sign(moves[int(np.argmin(errors))]) == -np.sign(turn)
        if turn == 0:
            np.testing.assert_allclose(z[t + 1], z[t], atol=1e-4)
    other = make_latents.world_file("camera", np.random.default_rng(1), 2, 8, (16, 32), 0.0, "none")
    assert np.square(other[0][0] - z[0]).mean() > 0.5

    z, labels = make_latents.world_file("zoom", rng, 60, 8, (16, 16), 0.0, "none")
    assert set(labels["zoom"]) == {-1, 0, 1}
    level = labels["zoom"].cumsum()
    assert level.max() - level.min() <= 6

    # larger: less changes from one pixel to the next
    detail = np.square(np.diff(z, axis=3)).mean((1, 2, 3))
    assert np.corrcoef(detail[1:], level)[0, 1] < -0.8


def test_eight_channels_that_are_not_square_work_to_the_end(tmp_path):
    """Bug: a room of (8, 16, 32) is written, split, trained on or judged as if it were square, or
    had 16 channels."""
    folder = tmp_path / "room"
    more = "--world camera --size 16 32 --channels 8 --files 10 --chunks 8"
    run(tmp_path, "prepare/latents.py", "--out", folder, more, env={"PYTHONPATH": ROOT})
    made = [folder, "--size 16 32 --channels 8"]
    run(tmp_path, "prepare/manifest.py", *made, env={"PYTHONPATH": ROOT})
    plan = "--epochs 1 --ipe 4 --log_every 1 --vq_warmup_steps 2 --sequence_length 4"
    flags = ["--data_dir", folder, SMALL, plan, "--out_dir", tmp_path / "run"]
    text = run(tmp_path, "train_lam.py", *flags)
    assert "steps of 4x8 patches" in text and "held out after epoch 1" in text
    text = run(tmp_path, "eval_lam.py", "--no-ceiling --checkpoint", tmp_path / "run")
    assert "balanced accuracy of a probe" in text and "  yaw " in text


def test_worlds_refuse_what_they_do_not_have(tmp_path):
    """Bug: a flag of another world is ignored in silence."""
    cases = [
        ("--world roll --distractor steady", "--distractor is for squares, --world roll has none"),
        ("--size 16 24", "--size 24 is no multiple of 16"),
        ("--size 16 16 16", "--size 16 16 16: give height and width, or one number"),
        ("--data x.tar --channels 8", "play is square and has 16 channels"),
    ]
    for words, sentence in cases:
        flags = [words, "--out", tmp_path / "new"]
        assert sentence in fails(tmp_path, "prepare/latents.py", *flags, env={"PYTHONPATH": ROOT})


def test_the_manifest_says_which_size_would_fit(tmp_path):
    """Bug: latents of another size were listed as left out one by one, without the flag that takes
    them; a size that is not square could not be given at all."""
    for i in range(3):
        data = np.random.default_rng(i).standard_normal((8, 4, 2, 12, 8)).astype(np.float16)
        write_h5(tmp_path / f"{i}.h5", data)
    make = ["prepare/manifest.py", tmp_path]
    error = fails(tmp_path, *make, env={"PYTHONPATH": ROOT})
    assert "all for one reason: shape [8, 4, 2, 12, 8]" in error
    assert "for latents of this shape pass --channels 4 --size 12 8" in error

    # the folder after the last number
    flags = "--channels 4 --size 12 8".split()
    text = run(tmp_path, "prepare/manifest.py", *flags, tmp_path, env={"PYTHONPATH": ROOT})
    assert "left out: " not in text

    meta, splits = open_manifest(tmp_path / "manifest.json")
    assert meta["size"] == [12, 8] and meta["channels"] == 4

    z = torch.from_numpy(latents.read_steps(splits["train"][0].path, 0, 4))[None]
    assert tiny(channels=4, size=meta["size"])(z)["mse"] > 0


# --- train_lam.py ---


def same_run(a, b):
    """Two finished runs are bitwise one."""
    assert column(a, "epoch", "itr", "loss", "rollout_loss", "grad_norm", "lr") == column(
        b, "epoch", "itr", "loss", "rollout_loss", "grad_norm", "lr"
    )
    assert (a / "val.csv").read_text() == (b / "val.csv").read_text()
    one, two = (checkpoint.load_latest(f)[0] for f in (a, b))
    assert (one["epoch"], one["itr"]) == (two["epoch"], two["itr"])
    assert all(torch.equal(one["model"][k], v) for k, v in two["model"].items())


@pytest.fixture(scope="module")
def trained(folder):
    flags = ["--data_dir", folder, SMALL, PLAN, PEAK, "--out_dir", folder / "run"]
    run(folder, "train_lam.py", *flags)
    return folder / "run"


@pytest.mark.parametrize(
    "cut", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(23, marks=pytest.mark.slow)]
)
def test_resume_is_exact(folder, trained, tmp_path, cut):
    """Bug: k-means, EMA sums, the buffered encoder outputs or the step of the warm-up do not
    survive; the order depends on workers."""
    flags = ["--data_dir", folder, SMALL, PLAN, "--out_dir", tmp_path / "run"]
    run(tmp_path, "train_lam.py", *flags, f"--max_steps {cut}")
    text = run(tmp_path, "train_lam.py", *flags, "--resume --num_workers 2")
    assert f"at epoch {cut // 10}, itr {cut % 10}" in text
    assert "--num_workers 2 (was 0)" in text
    same_run(trained, tmp_path / "run")


def test_a_signal_saves_and_resumes_exactly(folder, trained, tmp_path):
    """Bug: the step's work is lost or counted twice."""
    flags = ["--data_dir", folder, SMALL, PLAN, "--out_dir", tmp_path / "run"]
    stopped = Run(tmp_path, "train_lam.py", *flags, "--num_workers 2")
    stopped.signal_when(
        tmp_path / "run" / "train.csv", lambda rows: len(rows) >= 12, signal.SIGTERM, True
    )
    code, text = stopped.wait()
    assert code == 0, text
    assert "continue with --resume" in text, text
    assert "Traceback" not in text, text
    run(tmp_path, "train_lam.py", *flags, "--resume")
    same_run(trained, tmp_path / "run")


@pytest.mark.parametrize("codebook", ["ema", pytest.param("loss", marks=pytest.mark.slow)])
def test_two_ranks_and_micro_batches_are_one_batch(folder, tmp_path, codebook):
    """Bug: counts and sums of the codebook are of one rank only, k-means differs between ranks, or
    the tables drift apart."""
    flags = ["--data_dir", folder, SMALL, PLAN, f"--codebook {codebook} --lr 5e-4"]
    run(tmp_path, "train_lam.py", *flags, "--out_dir", tmp_path / "one")
    ranks = start_ranks(
        tmp_path, "train_lam.py", *flags, "--batch_size 2 --out_dir", tmp_path / "two"
    )
    options = [*flags, "--batch_size 2 --grad_accum 2", "--out_dir", tmp_path / "accumulated"]
    run(tmp_path, "train_lam.py", *options)
    for rank in ranks:
        assert rank.wait()[0] == 0, rank.text()

    one = numbers(tmp_path / "one", "mse_loss", "rollout_loss", "vq_loss")
    assert len(one) == 30 and one[-1, 2] > 0

    for name in ("two", "accumulated"):
        np.testing.assert_allclose(
            numbers(tmp_path / name, "mse_loss", "rollout_loss", "vq_loss"),
            one,
            rtol=1e-3,
            atol=1e-5,
            err_msg=name,
        )

        val = [
            numbers(tmp_path / n, "mse_loss", "mse_over_zero", "joint_codes", log="val.csv")
            for n in ("one", name)
        ]
        np.testing.assert_allclose(val[1], val[0], rtol=1e-2)


def quantise_on_two(rank, port, out):
    """A rank of test_codebooks_are_bitwise_equal."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    vq = VectorQuantizer(3, 12, 16, warmup=3).train()
    data = torch.Generator().manual_seed(rank)
    for _ in range(40):
        vq(torch.randn(37, 3, 16, generator=data))
        vq.update()
    torch.save(vq.state_dict(), f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_codebooks_are_bitwise_equal_on_all_ranks(tmp_path):
    """Bug: each rank sums in its own order or draws its own dead codes, and the ranks end with
    different tables."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(quantise_on_two, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert one.keys() == {"codebook", "mass", "sums", "recent", "seen"}
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["seen"][0] == 40 and one["codebook"].std() > 0.1


def test_what_does_not_fit_is_refused_in_one_sentence(folder, trained, tmp_path):
    """Bug: a run goes on with other data or another size than it began with; a run that never
    quantises; a refusal is a traceback."""
    new = ["--out_dir", tmp_path / "new"]
    flags = ["--data_dir", folder, SMALL, PLAN]
    cases = [
        (
            [*flags, "--out_dir", trained],
            "holds checkpoints of an earlier run: pass --resume to continue it, or another",
        ),
        (
            [*flags, "--out_dir", trained, "--resume --embed_dim 32"],
            "was trained with embed_dim 16, this run has 32",
        ),
        (
            [*flags, "--out_dir", trained, "--resume --sequence_length 6"],
            "was trained with sequence_length 8, this run has 6",
        ),
        (
            [*flags, *new, "--data_dir", tmp_path],
            "manifest.json; make it with: python -m prepare.manifest",
        ),
        (
            [*flags, *new, "--sequence_length 2"],
            "--rollout_horizon 2 needs windows of 3 steps, --sequence_length is 2",
        ),
        ([*flags, *new, "--sequence_length 80"], "no file has the 80 steps of a window"),
        (
            [*flags, *new, "--vq_warmup_steps 30"],
            "the run has 30 steps, and 30 of them do not quantise",
        ),
    ]
    for words, sentence in cases:
        assert sentence in fails(tmp_path, "train_lam.py", *words)
    assert not list(tmp_path.glob("new/checkpoint*"))

    text = run(tmp_path, "train_lam.py", *flags, "--dry_run --out_dir", tmp_path / "dry")
    assert "dry run, nothing written; 8 files in train" in text
    assert not (tmp_path / "dry").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    """Bug: NaN goes into the codebook and the next checkpoint."""
    flags = ["--data_dir", folder, SMALL, PLAN, "--lr 1e18 --grad_clip 0"]
    flags += ["--out_dir", tmp_path / "run"]
    error = fails(tmp_path, "train_lam.py", *flags)
    assert "is not finite at epoch 0, itr " in error
    assert ".h5@" in error
    assert "last good checkpoint: none; lower --lr" in error
    assert all(np.isfinite(r[2]) for r in rows_of(tmp_path / "run" / "train.csv"))


def test_a_run_that_diverges_in_its_warmup_says_so(folder, tmp_path):
    """Bug: k-means at the end of the warm-up met NaN before --log_every looked at the loss, and the
    run ended in its error."""
    flags = ["--data_dir", folder, SMALL, "--epochs 1 --ipe 20 --vq_warmup_steps 6 --val_clips 0"]
    more = "--log_every 10 --lr 1e30 --grad_clip 0 --warmup_steps 0 --out_dir"
    error = fails(tmp_path, "train_lam.py", *flags, more, tmp_path / "run")
    assert "is not finite at epoch 0, itr " in error and "lower --lr" in error


def test_the_bar_of_the_overfit_test_is_above_the_noise():
    """Bug: noise between steps, which no code can name, failed the overfit test of our own default
    latents: they alone are an MSE of 0.02. And motion passed for noise."""
    import train_lam

    rng = torch.Generator().manual_seed(0)
    z = torch.zeros(2, 8, 16, 32, 32)
    for t in range(8):
        z[:, t, :, 4 * t : 4 * t + 4, 8:16] = 4
    noise = train_lam.noise_floor(z + 0.1 * torch.randn(z.shape, generator=rng))
    assert noise[0] == pytest.approx(0.02, rel=0.15)
    assert noise[1] == pytest.approx(np.sqrt(2 * 0.02 / np.pi), rel=0.1)
    assert train_lam.noise_floor(z) == (0.0, 0.0)

    moving = torch.randn(2, 8, 16, 32, 32, generator=rng)

    # 5 % of 2
    assert train_lam.noise_floor(moving)[0] == pytest.approx(0.1, rel=0.05)

    losses = {"mse": torch.tensor(0.025), "mae": torch.tensor(0.12), "nmse": torch.tensor(0.025)}
    passed, text = train_lam.overfit_verdict(losses, 0.5, noise, 0.5)
    assert passed and "in raw units MSE 0.00625 (< 0.0069" in text
    assert not train_lam.overfit_verdict(losses, 0.5)[0]
    assert not train_lam.overfit_verdict(losses | {"mse": torch.tensor(0.04)}, 0.9, noise)[0]

    # codes that are ignored
    assert not train_lam.overfit_verdict(losses, 0.03, noise)[0]


@pytest.mark.slow
def test_the_overfit_test_passes_on_our_own_default_latents(tmp_path):
    """Bug: the guide's command failed on the latents that prepare.latents makes by default, whose
    noise alone is an MSE of 0.02."""
    made = ["--size 16 --files 3 --chunks 16 --out", tmp_path / "latents"]
    run(tmp_path, "prepare/latents.py", *made, env={"PYTHONPATH": ROOT})
    make = ["prepare/manifest.py", tmp_path / "latents", "--size 16"]
    run(tmp_path, *make, env={"PYTHONPATH": ROOT})
    manifest = tmp_path / "latents" / "manifest.json"
    flags = ["--data_dir", tmp_path / "latents", "--manifest_path", manifest]
    guide = "--test_mode --num_epochs 1000 --batch_size 4 --learning_rate 1e-3"
    small = "--embed_dim 64 --encoder_depth 1 --decoder_depth 1 --num_heads 4 --patch_dim 64"
    more = "--sequence_length 4 --num_workers 0 --out_dir"
    text = run(tmp_path, "train_lam.py", *flags, guide, small, more, tmp_path / "run")
    assert "above this batch's noise floor (0.01" in text
    assert text.splitlines()[-1].startswith("PASS after ")
    assert "in raw units MSE 0.00" in text


def test_test_mode_passes_and_fails(tmp_path):
    """Bug: PASS with codes that are ignored; FAIL that exits with 0; a PASS that goes on to the
    last step."""
    for i in range(3):
        rng = np.random.default_rng(i)
        field = np.repeat(np.repeat(rng.standard_normal((16, 2, 2)), 4, 1), 4, 2)
        steps = np.stack(
            [
                np.roll(field, 4 * rng.integers(0, 2), 2) * (1 + rng.integers(0, 2))
                for _ in range(20)
            ]
        ).astype(np.float32)
        write_h5(tmp_path / f"{i}.h5", steps.reshape(10, 2, 16, 8, 8).swapaxes(1, 2))

    run(tmp_path, "prepare/manifest.py", tmp_path, "--size 8", env={"PYTHONPATH": ROOT})
    flags = [
        "--data_dir",
        tmp_path,
        SMALL,
        "--embed_dim 32 --test_mode --learning_rate 5e-3 --batch_size 2",
    ]
    text = run(tmp_path, "train_lam.py", *flags, "--out_dir", tmp_path / "pass")
    verdict = text.splitlines()[-1]
    assert verdict.startswith("PASS after ")
    assert 150 <= int(verdict.split()[2]) < 1500
    assert not (tmp_path / "pass").exists()

    code, text = Run(
        tmp_path,
        "train_lam.py",
        *flags,
        "--num_epochs 110 --vq_warmup_steps 100 --lr 1e-6 --out_dir",
        tmp_path / "fail",
    ).wait()
    assert code == 1
    assert text.splitlines()[-1].startswith("FAIL after 110 steps: MSE ")
    assert "Traceback" not in text

    import train_lam

    ignored = {"mse": torch.tensor(0.001), "mae": torch.tensor(0.01), "nmse": torch.tensor(0.001)}
    assert not train_lam.overfit_verdict(ignored, 0.002)[0]
    assert train_lam.overfit_verdict(ignored, 0.02)[0]
    assert not train_lam.overfit_verdict(ignored | {"nmse": torch.tensor(0.5)}, 0.02)[0]


def test_every_metric_of_the_guide_is_logged(trained):
    """Bug: a metric is missing, or logged as a constant."""
    for name in (
        "loss",
        "mse_loss",
        "mae_loss",
        "vq_loss",
        "codebook_loss",
        "commitment_loss",
        "codebook_usage",
    ):
        for log in ("train.csv", "val.csv"):
            values = numbers(trained, name, log=log)
            assert np.isfinite(values).all(), (name, log)
            assert len(np.unique(values)) > 1, (name, log)
    for name in ("lr", "grad_norm", "rollout_loss"):
        assert len(np.unique(numbers(trained, name))) > 3

    assert step_flops(trained, 4) > 6 * 4 * weight_count(trained, "model")
    vq = numbers(trained, "vq_loss")
    codebook = numbers(trained, "codebook_loss")
    commitment = numbers(trained, "commitment_loss")
    np.testing.assert_allclose(vq, codebook + 0.25 * commitment, rtol=1e-5)
    assert (trained / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_nine_moves_are_recovered_and_the_controls_fail(tmp_path):
    """Bug: the recipe no longer learns actions, or the measures no longer tell it from a collapsed
    codebook and from codes of places."""
    import tests.recipes as recipes

    good = recipes.measure(str(tmp_path), "before", 0)
    assert recipes.passes(good), good
    for row in ("guide", "no_shift"):
        trap = recipes.measure(str(tmp_path), row, 0)
        assert not recipes.passes(trap), trap
        assert trap["purity"] < 0.9, trap
        assert trap["same_over_own"] > 5, trap


@pytest.mark.slow
def test_probe_reads_a_run(folder, trained, tmp_path):
    """Bug: eval_lam.py cannot read what train_lam.py wrote, judges the files of training, or writes
    its picture elsewhere."""
    text = run(tmp_path, "eval_lam.py", "--checkpoint", trained, "--val_clips 8 --batch_size 4")
    report = json.load(open(trained / "report.json"))
    assert report["split"] == "test"
    assert f"{report['transitions']} transitions of 1 files (test)" in text
    assert report["probe_move"]["chance"] == pytest.approx(1 / 9)
    assert 0 <= report["probe_move"]["codes"] < 0.5
    assert set(report["probe_move"]["few labels"]) == {"codes", "z_e", "raw latents"}
    assert (trained / "codes.png").stat().st_size > 10_000 and report["codes"]
    assert "is a run of train_lam.py: judge it with eval_lam.py" in fails(
        tmp_path, "eval.py", "--checkpoint", trained
    )
    assert "is damaged or no checkpoint of ours" in fails(
        tmp_path, "eval_lam.py", "--checkpoint", folder / "run" / "args.json"
    )


def test_eval_finds_the_files_of_a_run_and_judges_what_it_can(tmp_path):
    """Bug: a manifest in another folder than the latents was not found again; a label of one value
    ended the report; a run stopped in its warm-up was judged by codes it did not use; the ceiling
    came before the report."""
    data = tmp_path / "latents"
    data.mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        write_h5(data / f"{i}.h5", some(i))
        np.savez(data / f"{i}.actions.npz", move=rng.integers(0, 3, 39), forward=np.zeros(39))
    split = tmp_path / "splits" / "a.json"
    make = ["prepare/manifest.py", data, "--size 8 --train_ratio 0.5 --val_ratio 0.5"]
    run(tmp_path, *make, "--test_ratio 0 --output", split, env={"PYTHONPATH": ROOT})
    other = [*make, "--test_ratio 0 --seed 1"]

    # another split, beside the files
    run(tmp_path, *other, env={"PYTHONPATH": ROOT})
    flags = ["--data_dir", data, "--manifest_path", split, SMALL, PLAN]
    text = run(tmp_path, "train_lam.py", *flags, "--max_steps 30 --out_dir", tmp_path / "run")
    assert "purity 0." in text
    assert "in the other recordings; one code for all" in text

    judge = ["eval_lam.py --split validation --val_clips 8 --no-ceiling --checkpoint"]
    for more in ([], ["--data_dir", data], ["--manifest_path", split]):
        text = run(tmp_path, *judge[0].split(), tmp_path / "run", *more)
        report = json.load(open(tmp_path / "run" / "report.json"))
        assert "were trained on" not in text and report["codes"]
    last = [line for line in open(tmp_path / "run" / "val.csv")][-1].split(",")
    names = open(tmp_path / "run" / "val.csv").readline().strip().split(",")
    assert report["purity"] == pytest.approx(float(last[names.index("purity")]))
    assert "learned on the other recordings" in text
    assert "no probe of forward: it is 0 in all training transitions" in text
    assert report["probe_move"]["chance"] == pytest.approx(1 / 3)
    assert "ceiling" not in report["probe_move"] and "probe_forward" not in report

    text = run(
        tmp_path, *judge[0].split(), tmp_path / "run", "--manifest_path", data / "manifest.json"
    )
    assert "validation files of" in text and "were trained on" in text

    early = ["--max_steps 4 --vq_warmup_steps 8 --out_dir", tmp_path / "early"]
    run(tmp_path, "train_lam.py", *flags, *early)
    text = run(tmp_path, *judge[0].split(), tmp_path / "early")
    report = json.load(open(tmp_path / "early" / "report.json"))
    assert "the run stopped in its warm-up, after 4 of 8 steps" in text
    assert report["joint_codes"] is None and report["quantises"] is False
    assert not (tmp_path / "early" / "codes.png").exists()

    error = fails(tmp_path, *judge[0].split(), tmp_path / "run", "--data_dir", tmp_path)
    assert "name the folder of the latents with --data_dir" in error


def test_frames_need_their_packages_at_once(tmp_path, monkeypatch):
    """Bug: a package that is not installed ended the evaluation after its long part, in a
    traceback."""

    def find(name):
        return None if name == "torchvision" else True

    monkeypatch.setattr(latents.importlib.util, "find_spec", find)
    latents.check_metrics(["psnr", "ssim"])
    with pytest.raises(ValueError, match="--metrics lpips needs: pip install torchvision"):
        latents.check_metrics(["psnr", "lpips"])
    code, text = Run(tmp_path, "eval_lam.py", "--checkpoint x --metrics psnr").wait()
    assert code == 2 and "name the video VAE with --vae" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX"])
def test_a_video_vae_writes_the_guides_format(tmp_path, shards, name):
    """Bug: latents are of other frames than their labels, a VAE's lone first frame shifts all that
    follow, or chunks see each other."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if name == "AutoencoderKLWan":
        vae = diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
        )
    else:
        blocks = {f"{d}_block_types": (f"CogVideoX{d.title()}Block3D",) * 4 for d in ("down", "up")}
        size = {
            "block_out_channels": (8,) * 4,
            "latent_channels": 16,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        }
        vae = diffusers.AutoencoderKLCogVideoX(**blocks, **size)

    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "latents"
    flags = [
        "--data",
        shards / "shard-000000.tar",
        "--vae",
        f"diffusers:{tmp_path / 'vae'}",
        "--crop_size 32 --out",
        out,
    ]
    run(tmp_path, "encode.py", *flags)
    paths = sorted(out.glob("*.h5"))
    assert len(paths) == 2

    steps = latents.open_dataset(str(paths[0]))

    # 300 frames at 20 fps are 120 at 8: 15 chunks of 8
    assert steps.shape == (15, 16, 2, 4, 4)
    assert steps.dtype == np.float16

    from files.latents import vae_latents

    record = next(
        r for r in index_shards([str(shards / "shard-000000.tar")])[0] if r.key == paths[0].stem
    )
    with Slice(record.shard, *record.members["mp4"]) as f:
        frames = read_frames(f, mp4_times(f), np.floor(np.arange(40, 48) * 2.5).astype(int), 32)[
            :, :, 4:36
        ]

    # chunk 5
    mine = vae_latents(vae.eval(), torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())[None])[0]
    np.testing.assert_allclose(steps[5].swapaxes(0, 1), mine.numpy(), atol=2e-3, rtol=2e-3)

    labels = latents.read_labels(str(paths[0]), 30)
    yaw = np.degrees(
        np.diff(read_ticks(record).motion[(np.arange(3, 120, 4) * 2.5).astype(int), 2])
    )
    assert labels["yaw"].tolist() == (np.sign(yaw) * (np.abs(yaw) > 3)).tolist()
    assert set(labels["forward"]) <= {0, 1}

    back = latents.vae_frames(vae, torch.from_numpy(steps[:2].swapaxes(1, 2).astype(np.float32)))
    assert back.shape == (2, 8, 3, 32, 32) and 0 <= back.min() < back.max() <= 1

    # knows the step that follows
    class Oracle:
        scale = torch.zeros(2)
        quantizer = True

        def encode(self, z):
            return (z[:, 1:],)

        def decode(self, z, codes):
            return codes

    z = torch.from_numpy(steps[:4].swapaxes(1, 2).astype(np.float32)).flatten(0, 1)[None]
    scores = latents.decoded_scores(Oracle(), [z], vae, ["psnr", "ssim"])
    assert scores["ssim"][0] == pytest.approx(1, abs=1e-4)
    assert scores["psnr"][0] > scores["psnr"][1] + 10
    assert scores["ssim"][1] < 1

    error = fails(
        tmp_path, "encode.py", *flags, "--vae", f"diffusers:{tmp_path}", "--out", tmp_path / "other"
    )
    assert "give diffusers:FOLDER, with config.json and weights" in error


def test_a_vae_of_pictures_writes_the_guides_format(tmp_path, shards):
    """Bug: a VAE of pictures is refused, its steps are of other frames than their labels, or its
    latents are those of pictures in [-1, 1]."""
    torch.manual_seed(0)
    vae = TinyAutoencoder(8)

    # random weights draw black pictures: these have all shades of grey
    with torch.no_grad():
        vae.decoder[-1].weight *= 0.3 / vae.decode(torch.randn(8, 8, 4, 4)).std()
        vae.decoder[-1].bias.fill_(0.5)
    (tmp_path / "vae").mkdir()
    for part in ("encoder", "decoder"):
        state = getattr(vae, part).state_dict()
        torch.save(state, tmp_path / "vae" / f"tae_{part}.pth")
    spec = f"taesd:{tmp_path / 'vae'}"
    out = tmp_path / "latents"
    flags = ["--data", shards / "shard-000000.tar", "--vae", spec]
    run(tmp_path, "encode.py", *flags, "--crop_size 32 --out", out)
    path = sorted(out.glob("*.h5"))[0]
    steps = latents.open_dataset(str(path))

    # 300 frames at 20 fps are 120 at 8: 60 chunks of 2
    assert steps.shape == (60, 8, 2, 4, 4)

    records = index_shards([str(shards / "shard-000000.tar")])[0]
    record = next(r for r in records if r.key == path.stem)
    shown = np.floor(np.arange(120) * 2.5).astype(int)
    with Slice(record.shard, *record.members["mp4"]) as f:
        frames = read_frames(f, mp4_times(f), shown[40:42], 32)[:, :, 4:36]
    pictures = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        expected = vae.encode(pictures)
    stored = steps[20].swapaxes(0, 1).astype(np.float32)
    np.testing.assert_allclose(stored, expected.numpy(), atol=2e-3, rtol=2e-3)

    labels = latents.read_labels(str(path), 120)
    yaw = np.degrees(np.diff(read_ticks(record).motion[shown, 2]))
    assert labels["yaw"].tolist() == (np.sign(yaw) * (np.abs(yaw) > 3)).tolist()

    # and back, for eval_lam.py
    back = latents.vae_frames(vae, torch.from_numpy(stored)[None])
    assert back.shape == (1, 2, 3, 32, 32)

    # what codes do to them, as films
    model = tiny(channels=8, size=(4, 4), patch_size=4)
    z = torch.from_numpy(steps[:8, :, 0].astype(np.float32))
    code_films.write_films(tmp_path, model, vae, z, {(1, 0, 2): 0.5, (0, 0, 0): 0.25})
    film = tmp_path / "codes" / "1-0-2.mp4"
    with av.open(str(film)) as container:
        pages = [page.to_image() for page in container.decode(video=0)]
    assert len(pages) == code_films.REPEATS + 5

    # the first page shows the starts as the VAE draws them, four of eight
    with torch.no_grad():
        drawn = vae.decode(z[::2]).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    shown = np.asarray(pages[0])[28 : 28 + 160, 4 : 4 + 160][2::5, 2::5]
    assert np.abs(shown - drawn).mean() < 12
    changed = np.asarray(pages[-1])[28 : 28 + 160, 4 : 4 + 160][2::5, 2::5]
    assert np.abs(changed - drawn).mean() > 24
    assert (tmp_path / "codes_decoded.png").stat().st_size > 1000
    # plain video of the same frames has the same latents, and no actions
    with Slice(record.shard, *record.members["mp4"]) as f:
        (tmp_path / "films").mkdir()
        (tmp_path / "films" / "a.mp4").write_bytes(f.read(f.size))
    ten = ["--vae", spec, "--crop_size 32 --fps 10 --out"]
    run(tmp_path, "encode.py", "--data", tmp_path / "films", *ten, tmp_path / "of-film")
    run(tmp_path, "encode.py", *flags[:2], *ten, tmp_path / "of-play")
    of_film = latents.open_dataset(str(tmp_path / "of-film" / "films" / "a.h5"))
    of_play = latents.open_dataset(str(tmp_path / "of-play" / f"{path.stem}.h5"))
    assert np.array_equal(of_film[:], of_play[:])
    assert not list((tmp_path / "of-film").rglob("*.npz"))

    sentence = "--crop_size 36 is no multiple of 8, as --vae needs"
    assert sentence in fails(tmp_path, "encode.py", *flags, "--crop_size 36 --out", tmp_path / "x")


def test_one_file_of_another_scale_does_not_become_the_scale_of_all(tmp_path):
    """Bug: one file with values of 1e30 is all of the mean and std, by which the others are then
    standardised to zero; the same latents in 32 bits are no copy."""
    for i in range(10):
        write_h5(tmp_path / f"good{i}.h5", some(i, dtype=np.float16))
    write_h5(tmp_path / "huge.h5", some(10) * np.float32(1e30))
    write_h5(tmp_path / "tiny.h5", some(11) * np.float32(1e-30))
    write_h5(tmp_path / "scaled.h5", some(12) * 5)
    write_h5(tmp_path / "wide.h5", some(3, dtype=np.float16).astype(np.float32))
    with h5py.File(tmp_path / "packed.h5", "w") as f:
        f.create_dataset("z", data=some(13)).attrs["scale_factor"] = 0.18
    with h5py.File(tmp_path / "link.h5", "w") as f:
        f["z"] = h5py.ExternalLink("good0.h5", "embeddings")
    write_h5(tmp_path / "dangling.h5", some(14))
    os.symlink("nowhere.npz", tmp_path / "dangling.actions.npz")
    write_h5(tmp_path / "upper.h5", some(15))
    with open(tmp_path / "upper.actions.NPZ", "wb") as f:
        np.savez(f, move=np.zeros(39))
    text = run(tmp_path, "prepare/manifest.py", tmp_path, "--size 8", env={"PYTHONPATH": ROOT})
    for line in (
        "left out: huge.h5: its values have std",
        "left out: tiny.h5: its values have std",
        "left out: wide.h5: the same latents as good3.h5",
        "left out: packed.h5: its dataset /z has a scale_factor of 0.18",
        "left out: link.h5: no dataset, only links (z)",
        f"left out: dangling.h5: {tmp_path}/dangling.actions.npz is a link to nowhere.npz",
        "not used: upper.actions.NPZ: labels are KEY.actions.npz",
        "WARNING: 1 files have a std more than three times off the median",
    ):
        assert line in text
    assert json.load(open(tmp_path / "manifest.json"))["metadata"]["std"] < 3


def test_a_manifest_that_someone_edited_is_checked(folder, tmp_path):
    """Bug: a file in two splits is trained and judged on without a word; missing names end in a
    traceback."""
    good = json.load(open(folder / "manifest.json"))
    train = good["splits"]["train"]
    both = good["splits"] | {"test": [train[0] | {"path": f"./{train[0]['path']}"}]}
    for change, sentence in (
        ({"splits": both}, "is in train and in test of"),
        ({"splits": []}, "its metadata or its splits have no names"),
        ({"splits": {"train": train}}, "its splits are train, not train, validation and test"),
        ({"splits": good["splits"] | {"train": [train[0]["path"]]}}, "no path, shape and bytes"),
        ({"metadata": good["metadata"] | {"std": 0.0}}, "standardise nothing"),
        ({"metadata": {}}, "no mean in its metadata"),
    ):
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=re.escape(sentence)):
            open_manifest(str(path), str(folder))
