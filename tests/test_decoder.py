"""train_decoder.py and films: the right picture for a step; distances between pictures; networks of
others; whole runs: resume, ranks, refusals; what eval.py makes of a decoder."""

import json
import types

import av
import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import weights
from data import Clips, PicturedClips, fill_pixels_cache, windows
from evaluation.decoded import Decoder, Pictures, psnr_of, squared_error, ssim
from evaluation.decoded_actions import action_scores, see_again
from evaluation.films import (
    Wishes,
    clear_turns,
    frechet,
    halves,
    mmd,
    open_networks,
    side_of,
    unscaled,
)
from evaluation.heads import pool
from evaluation.pictures import find_videos
from evaluation.runs import load_run, open_held_out
from files.shards import index_shards
from files.vpt import CONTINUOUS, ClipReader
from model import (
    DecoderModel,
    PictureDecoder,
    TinyAutoencoder,
    growth_of,
    normalize_features,
)
from tests.harness import (
    PEAK,
    Run,
    column,
    error_line,
    fails,
    numbers,
    read_number,
    run,
    start_ranks,
    step_flops,
    weight_count,
)

LOSSES = ("l1_loss", "gradient_loss", "grad_norm")
TINY = (
    "--crop_size 32 --width 24 --depth 1 --num_heads 2 --least_width 12 --batch_size 4"
    " --num_workers 0 --log_every 1 --val_clips 6 --lr 3e-3"
)
PLAN = "--epochs 2 --warmup 0 --anneal 1 --ipe 3"

pytestmark = pytest.mark.usefixtures("forkserver")


# --- the picture of a step ---


@pytest.fixture(scope="module")
def encoded(game):
    """Records of features, and {recording: its video}."""
    records, _ = index_shards(sorted(map(str, game.held.parent.glob("*.tar"))))
    return records, find_videos([str(game.video)], records)


@pytest.mark.parametrize("every_frame", [False, True])
def test_a_step_gets_the_frame_that_it_ends_with(encoded, tmp_path, every_frame):
    """Bug: pictures are of the first frame of a step, one step late, or of another recording."""
    records, videos = encoded
    reader = ClipReader(crop_size=32, action_space=38)
    fill_pixels_cache(list(videos.values()), tmp_path, 64, "pyav", 0)
    options = {"videos": videos, "size": 64, "every_frame": every_frame}
    decoded = PicturedClips(records, [1.0] * len(records), reader, **options)
    stored = PicturedClips(
        records, [1.0] * len(records), reader, **options, pixels_cache=str(tmp_path)
    )
    for number, record in enumerate(records):
        for window in range(decoded.windows_in(record)):
            clip = decoded[(0, 0, number, window)]
            first = int(record.key.rpartition("@")[2]) + window * 16 * 4
            ticks = (first + 4 * np.arange(16)).reshape(8, 2)
            shown = ticks if every_frame else ticks[:, 1:]
            read = [[read_number(frame) for frame in step] for step in clip["pictures"]]
            assert read == shown.tolist()
            assert torch.equal(stored[(0, 0, number, window)]["pictures"], clip["pictures"])


def test_a_video_of_another_recording_is_refused(encoded):
    """Bug: features and the video of another recording that has the same name train a decoder."""
    records, videos = encoded
    first, second = sorted(videos)[:2]
    swapped = videos | {first: videos[second], second: videos[first]}
    clips = PicturedClips(
        records, [1.0] * len(records), ClipReader(crop_size=32, action_space=38), swapped, 64
    )
    with pytest.raises(ValueError, match="has other actions than the features"):
        clips[(0, 0, 0, 0)]


def test_pictures_of_video_are_its_own_frames(shards):
    """Bug: on the fly, a step gets its first frame, or pictures are mixed up between steps."""
    records, _ = index_shards([str(shards / "shard-000000.tar")])
    clips = Clips(records, [1.0] * len(records), ClipReader(crop_size=64))
    clip = clips[(0, 0, 0, 1)]
    batch = {"video": clip["video"][None]}
    for every_frame in (False, True):
        pictures = Pictures(64, 2, "tubelet", every_frame, None, torch.device("cpu"))
        frames = pictures.frames(batch)
        last = [read_number((255 * x[-3:]).numpy()) for x in frames]
        assert last == list(range(64 + 4, 64 + 64, 8))
        assert frames.shape[1] == (6 if every_frame else 3)
    halved = Pictures(32, 2, "tubelet", False, None, torch.device("cpu")).frames(batch)
    torch.testing.assert_close(halved.mean((1, 2, 3)), frames[:, 3:].mean((1, 2, 3)))


# --- distances ---


def test_psnr_and_ssim_are_those_of_torchmetrics():
    """Bug: another window, another constant."""
    image = pytest.importorskip("torchmetrics.image")
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 40, 48, generator=generator)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    theirs = image.StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")(b, a)

    # theirs mirrors the edges, ours leaves them out
    padded = [torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect") for x in (b, a)]
    torch.testing.assert_close(ssim(*padded), theirs, rtol=0, atol=1e-5)
    whole = image.PeakSignalNoiseRatio(data_range=1.0)(b, a).item()
    assert abs(psnr_of(squared_error(a, b)) - whole) < 1e-4
    assert psnr_of(squared_error(a, a)) == np.inf


# --- the network ---


@pytest.mark.parametrize(
    "grid, size, growth",
    [(3, 96, (1, 3, 4)), (16, 224, (7, 0, 2)), (1, 48, (3, 2, 4)), (4, 20, (5, 0, 1))],
)
def test_any_grid_becomes_a_picture_whose_places_are_its_patches(grid, size, growth):
    """Bug: a pixel shuffle that mixes rows and columns of the grid; sizes that are no power of
    two."""
    assert growth_of(size // grid) == growth
    torch.manual_seed(0)
    decoder = PictureDecoder(8, grid, 3, size, width=8, depth=0, num_heads=2, least_width=4)
    nn.init.normal_(decoder.out.weight)
    decoder.mean.fill_(0.25)
    z = torch.zeros(2, grid**2, 8)
    assert decoder(z).shape == (2, 3, size, size)
    if grid == 1:
        return

    # convolutions look at neighbours, so the largest change marks the place
    changed = z.clone()
    changed[0, grid + grid - 1] = 5 * torch.randn(8)  # the last patch of the second row
    moved = (decoder(changed) - decoder(z)).abs().sum(1)
    assert moved[1].max() == 0
    patch = size // grid
    row, column_ = divmod(int(moved[0].argmax()), size)
    assert (row // patch, column_ // patch) == (1, grid - 1)


def test_an_untrained_decoder_shows_the_mean_picture_and_noise_is_repeatable():
    """Bug: the start is grey noise; the noise of a step is another one after a restart; a seed that
    changes nothing."""
    decoder = PictureDecoder(8, 2, 3, 16, width=8, depth=1, num_heads=2)
    decoder.mean.uniform_()
    z = torch.randn(5, 4, 8)
    assert torch.equal(decoder(z), decoder.mean.expand(5, -1, -1, -1))
    nn.init.normal_(decoder.out.weight)
    model = DecoderModel(decoder, 0.8)
    target = torch.rand(5, 3, 16, 16)
    assert torch.equal(model(z, target, seed=3), model(z, target, seed=3))
    assert not torch.equal(model(z, target, seed=3), model(z, target, seed=4))
    quiet = DecoderModel(decoder, 0.0)
    assert torch.equal(quiet(z, target, seed=3), quiet(z, target, seed=4))


# --- networks of others ---


def taesd_folder(vae, folder, pooled_from=None):
    """Weights of diffusers' AutoencoderTiny as madebyollin writes them: numbers without `layers`,
    and one more in the decoder, for the clamp."""
    parts = {"encoder": {}, "decoder": {}}
    for name, value in vae.state_dict().items():
        part, _, number, rest = name.split(".", 3)
        shift = int(part == "decoder")
        parts[part][f"{int(number) + shift}.{rest}"] = value
    folder.mkdir()
    for part, state in parts.items():
        torch.save(state, folder / f"taesd_{part}.pth")
    return folder


def test_an_autoencoder_gives_the_same_from_both_kinds_of_folder(tmp_path):
    """Bug: a layer in the wrong place, a clamp or a range (-1 to 1) that is forgotten."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "hf")
    ours = weights.open_picture_vae(f"taesd:{taesd_folder(vae, tmp_path / 'taesd')}")
    theirs = weights.open_picture_vae(f"diffusers:{tmp_path / 'hf'}")
    assert ours.channels == theirs.channels == 4 and ours.factor == theirs.factor == 8
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        latents = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), latents)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents))
        assert not any(p.requires_grad for p in [*ours.parameters(), *theirs.parameters()])


def test_autoencoders_that_are_none_are_refused(tmp_path):
    """Bug: a folder of something else gives a KeyError, or an autoencoder with random weights."""
    for spec in ("no", f"diffusers:{tmp_path}", "taesd:no/folder"):
        with pytest.raises(ValueError, match="give diffusers:FOLDER"):
            weights.open_picture_vae(spec)
    with pytest.raises(ValueError, match=r"0 files \*_encoder.pth there"):
        weights.open_picture_vae(f"taesd:{tmp_path}")
    for part in ("encoder", "decoder"):
        state = TinyAutoencoder(4).state_dict()
        whole = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(part)}
        torch.save(dict(list(whole.items())[:-1]), tmp_path / f"x_{part}.pth")
    with pytest.raises(ValueError, match="missing keys"):
        weights.open_picture_vae(f"taesd:{tmp_path}")


class FileOfNvidia(nn.Module):
    """What vgg16.pt takes and gives, with one convolution for VGG: a file for tests."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False):
        return self.conv(x / 255).flatten(1)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pt"
    torch.jit.script(FileOfNvidia()).save(str(path))
    return path


def test_lpips_is_a_squared_distance_of_pictures_up_to_255(vgg, tmp_path):
    """Bug: pictures are given from 0 to 1, or the file's own weights are trained."""
    lpips = weights.Lpips(str(vgg))
    network = torch.jit.load(str(vgg))
    a, b = torch.rand(2, 2, 3, 16, 16)
    expected = (network(255 * a) - network(255 * b)).square().sum(1)
    torch.testing.assert_close(lpips(a, b), expected)
    assert not any(p.requires_grad for p in lpips.parameters())
    with pytest.raises(FileNotFoundError, match="--lpips no.pt: no such file"):
        weights.Lpips("no.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        weights.Lpips(str(tmp_path / "text.pt"))


# --- runs ---


@pytest.fixture(scope="module")
def world(game):
    """Flags to train on the features of the game fixture."""
    flags = ["--data", game.folder / "train" / "*.tar", "--val_data", game.held, TINY]
    flags += ["--video", game.video.parent / "shard-{000000..000001}.tar", "--picture_size 64"]
    return flags


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run, its folder and what it printed."""
    out = tmp_path_factory.mktemp("decoder") / "run"
    text = run(out.parent, "train_decoder.py", *world, PLAN, PEAK, "--out_dir", out)
    return types.SimpleNamespace(out=out, text=text)


def same_run(a, b):
    """Two finished runs are bitwise one."""
    assert column(a, "epoch", "itr", *LOSSES) == column(b, "epoch", "itr", *LOSSES)
    assert (a / "val.csv").read_text() == (b / "val.csv").read_text()
    one, two = (checkpoint.load_latest(f)[0]["picture_decoder_weights"] for f in (a, b))
    assert all(torch.equal(one[k], v) for k, v in two.items())


def test_a_decoder_learns_what_features_say():
    """Bug: a layer that gets no gradient, patches that decode into the wrong quarter."""
    torch.manual_seed(0)
    decoder = PictureDecoder(12, 2, 3, 16, width=24, depth=1, num_heads=2, least_width=12)
    model = DecoderModel(decoder, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def examples():
        """Features whose first three channels are the colour of their quarter of the picture."""
        z = torch.rand(32, 4, 12)
        colours = z[..., :3].transpose(1, 2).unflatten(2, (2, 2))
        return normalize_features(z), nn.functional.interpolate(colours, scale_factor=8)

    losses = []
    for seed in range(150):
        loss = model(*examples(), seed=seed)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss[0].item())
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_a_run_logs_and_shows_pictures(trained):
    """Bug: columns that are of other pictures, a total that leaves out a term, a picture that is
    missing."""
    out = trained.out
    rows = numbers(out, "l1_loss", "gradient_loss", "total_loss")
    assert rows.shape == (6, 3) and np.isfinite(rows).all()
    np.testing.assert_allclose(rows[:, 2], rows[:, 0] + rows[:, 1], rtol=1e-4)
    names = ("psnr", "ssim", "mean_psnr", "copy_psnr", "l1_loss")
    val = dict(zip(names, numbers(out, *names, log="val.csv")[-1]))
    assert np.isfinite(list(val.values())).all()
    assert abs(val["psnr"] - val["mean_psnr"]) < 3  # it starts there
    assert f"held out after epoch 2: PSNR {val['psnr']:.2f} dB" in trained.text
    assert f"python eval.py --checkpoint RUN --decoder {out}" in trained.text
    for name in ("curves.png", "pictures.png"):
        assert (out / name).stat().st_size > 10_000

    # MFU: every weight meets at least one token of a step, and a clip has 8 steps
    assert step_flops(out, 4) > 6 * 4 * 8 * weight_count(out, "picture_decoder_weights")

    # the run opens again, and its pictures are as good as those that were validated
    decoder = Decoder(str(out), torch.device("cpu"))
    z = torch.randn(2, 3, 4, 192)
    shown = decoder(z)
    assert shown.shape == (2, 3, 3, 64, 64) and 0 <= shown.min() and shown.max() <= 1
    torch.testing.assert_close(shown[1, 2], decoder(z[1:, 2:])[0, 0])


def test_resume_is_exact_and_frames_may_be_stored_or_not(world, tmp_path, trained):
    """Bug: a weight, the noise or the mean picture does not survive a stop in the middle of an
    epoch, or depends on --num_workers or on --pixels_cache."""
    run(tmp_path, "train_decoder.py", *world, PLAN, "--max_steps 2 --out_dir", tmp_path / "cut")
    again = [*world, PLAN, "--pixels_cache", tmp_path / "pixels", "--resume --num_workers 2"]
    text = run(tmp_path, "train_decoder.py", *again, "--out_dir", tmp_path / "cut")
    assert "resumed from" in text
    same_run(trained.out, tmp_path / "cut")
    assert "nothing left to do" in run(
        tmp_path, "train_decoder.py", *again, "--out_dir", tmp_path / "cut"
    )
    other = fails(tmp_path, "train_decoder.py", *again, "--noise 0 --out_dir", tmp_path / "cut")
    assert "was trained with noise 0.8, this run has 0.0" in other


def test_two_ranks_are_one(world, tmp_path):
    """Bug: the mean picture or the channels of one rank's clips alone; held-out pictures that are
    counted twice."""
    flags = [*world, PLAN, "--noise 0 --feature_norm standardize --out_dir"]
    run(tmp_path, "train_decoder.py", *flags, tmp_path / "one")
    ranks = start_ranks(tmp_path, "train_decoder.py", *flags, tmp_path / "two", "--batch_size 2")
    for rank in ranks:
        code, text = rank.wait()
        assert code == 0, text
    one = numbers(tmp_path / "one", *LOSSES)
    two = numbers(tmp_path / "two", *LOSSES)
    np.testing.assert_allclose(two, one, rtol=5e-3, atol=1e-5)
    names = ("psnr", "ssim", "copy_psnr", "copy_ssim", "mean_psnr")
    held = [numbers(tmp_path / name, *names, log="val.csv") for name in ("one", "two")]
    np.testing.assert_allclose(held[1], held[0], rtol=1e-3)


def test_latents_of_an_autoencoder_are_learned(world, tmp_path):
    """Bug: latents are taken for pixels, or pictures of the run cannot be made without training's
    objects."""
    torch.manual_seed(0)
    folder = tmp_path / "vae"
    folder.mkdir()
    state = TinyAutoencoder(4, pooled=True).state_dict()
    for part in ("encoder", "decoder"):
        whole = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(part)}
        torch.save(whole, folder / f"x_{part}.pth")
    flags = [*world, "--epochs 1 --warmup 0 --anneal 0 --ipe 1 --every_frame"]
    flags += ["--picture_size 32 --batch_size 2 --val_clips 2"]
    flags += ["--vae", f"taesd:{folder}", "--out_dir", tmp_path / "run"]
    run(tmp_path, "train_decoder.py", *flags)
    decoder = Decoder(str(tmp_path / "run"), torch.device("cpu"))
    assert decoder.state["picture_decoder"]["channels"] == 8
    assert decoder.state["picture_decoder"]["size"] == 4
    assert decoder(torch.randn(2, 4, 192)).shape == (2, 3, 32, 32)


def test_on_the_fly_from_video_and_a_dry_run(shards, vgg, tmp_path):
    """Bug: without feature shards the encoder's own crop is not what is decoded; --dry_run leaves a
    folder; LPIPS is not in the loss; --recordings picks nothing, or among the held-out ones too."""
    flags = ["--data", shards / "shard-{000000..000001}.tar", TINY, "--encoder vit_tiny"]
    flags += ["--val_data", shards / "shard-000002.tar", "--lpips", vgg, "--lpips_weight 2"]
    plan = "--epochs 1 --warmup 0 --anneal 0 --ipe 2"
    names = [r.recording for r in index_shards([str(shards / "shard-000000.tar")])[0]]
    (tmp_path / "names.txt").write_text("\n".join(names))
    dry = ["--dry_run --recordings", tmp_path / "names.txt", "--out_dir", tmp_path / "run"]
    text = run(tmp_path, "train_decoder.py", *flags, plan, *dry)
    assert not (tmp_path / "run").exists()
    assert "dry run, nothing written; 2 recordings to train on, 2 held out" in text
    run(tmp_path, "train_decoder.py", *flags, plan, "--out_dir", tmp_path / "run")
    names = ("l1_loss", "gradient_loss", "lpips_loss", "total_loss")
    rows = numbers(tmp_path / "run", *names)
    np.testing.assert_allclose(rows[:, 3], rows[:, 0] + rows[:, 1] + 2 * rows[:, 2], rtol=1e-4)
    assert (rows[:, 2] > 0).all()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--noise -1", "--noise -1.0 is negative"),
        ("--lpips x --vae y", "--lpips compares pictures, and --vae learns latents"),
        ("--vae y", "--vae y: give diffusers:FOLDER"),
        ("--picture_size 63", "a picture of 63 pixels cannot be cut into 2 x 2 patches"),
        ("--warmup 2 --anneal 9 --epochs 10", "do not fit into --epochs 10"),
        ("--recordings no.txt", "--recordings no.txt: no such file"),
        ("--fps 10", "was made with --fps 5.0, this run has 10.0"),
    ],
)
def test_what_makes_no_sense_is_refused(world, tmp_path, flags, sentence):
    """Bug: a run that starts with flags that contradict each other or the data."""
    out = tmp_path / "run"
    assert sentence in fails(tmp_path, "train_decoder.py", *world, flags, "--out_dir", out)


def test_pictures_must_come_from_somewhere(game, shards, tmp_path):
    """Bug: features without video train on nothing; small frames are blown up without a word."""
    flags = [TINY, "--out_dir", tmp_path / "run", "--data"]
    features = [*flags, game.folder / "train" / "*.tar"]
    text = fails(tmp_path, "train_decoder.py", *features, "--val_clips 0")
    assert "name the shards of video that they were made from with --video" in text
    video = [*flags, shards / "*.tar", "--encoder vit_tiny --picture_size 64"]
    text = fails(tmp_path, "train_decoder.py", *video)
    assert "--picture_size 64 is larger than --crop_size 32" in text


def test_the_schedule_is_that_of_the_other_stages():
    """Bug: two schedules of one name drift apart."""
    import train_ac
    import train_decoder

    for step in range(1, 41):
        plan = (step, 40, 8, 12, 1e-4, 1e-3, 1e-6)
        assert train_decoder.lr_at(*plan) == train_ac.lr_at(*plan)


# --- films ---


def panorama(shift, steps=6):
    """A film (steps, 3, 96, 96) in which a scene of soft blobs moves by `shift` pixels to the right
    in each step."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.rand(1, 3, 24, 120, generator=generator)
    wide = nn.functional.interpolate(wide, size=(96, 480), mode="bilinear")[0]
    starts = [200 - shift * t for t in range(steps)]
    return torch.stack([(255 * wide[:, :, s : s + 96]).byte() for s in starts])


def test_a_turn_to_the_right_moves_the_scene_to_the_left():
    """Bug: a sign that is the wrong way round; the brightness or the floor decide; stretches that
    turn both ways, or hardly, count as turns."""
    films = torch.stack([panorama(shift) for shift in (-32, -14, 14, 32)])
    assert side_of(films).tolist() == [-1, -1, 1, 1]
    brighter = films.float() * torch.linspace(0.5, 1, 6).view(6, 1, 1, 1)
    brighter[:, :, :, 64:] = 255
    assert side_of(brighter).tolist() == [-1, -1, 1, 1]

    # yaw grows to the right
    yaw = [[0.3, 0.2, 0.3, -0.2, -0.3, -0.1], [0.3, -0.3, 0.3, 0.01, 0.01, 0.01]]
    numbered = torch.arange(2 * 7).view(2, 7, 1, 1, 1).expand(-1, -1, 3, 2, 2)
    stretches, sides = clear_turns(numbered, np.array(yaw), 0.1)
    assert [s[:, 0, 0, 0].tolist() for s in stretches] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert sides.tolist() == [-1, 1]


def test_distances_of_films_are_those_of_the_papers():
    """Bug: a kernel without the division by D, an unbiased estimate, means without covariances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator).double()
    y = torch.randn(7, 4, generator=generator).double() + 1

    def mean_kernel(a, b):
        return np.mean([[(float(p @ q) / 4) ** 2 for q in b] for p in a])

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert abs(mmd(x, y) - 100 * expected) < 1e-9 and abs(mmd(x, x)) < 1e-9

    # the same spread around another mean: the squared distance of the means
    many = torch.randn(400, 3, generator=generator)
    moved = many + torch.tensor([1.0, 2.0, 0.0])
    assert abs(frechet(many, moved) - 5) < 1e-3
    assert abs(frechet(many, 2 * many) - frechet(many, many) - 3) < 0.6
    one, two = halves(["a", "a", "b", "c", "b"])
    assert (one, two) == ([0, 1], [2, 4])


class FileOfI3D(nn.Module):
    """What StyleGAN-V's i3d_torchscript.pt takes and gives, in little: a file for tests."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = True,
        resize: bool = True,
        return_features: bool = False,
    ):
        # fewer than 16 frames have no sixteenth
        return torch.stack([x.mean([1, 2, 3, 4]), x[:, :, 15].std([1, 2, 3])], dim=1)


def test_a_report_with_films(game, trained, vgg, tmp_path):
    """Bug: predictions are compared with another clip or another step; the ceiling is not the
    decoder on true features; a film that no player opens."""
    torch.jit.script(FileOfI3D()).save(str(tmp_path / "i3d.pt"))
    judged = ["--checkpoint", game.out, "--data", game.held, "--video", game.video]
    judged += ["--samples 2 --batch_size 4 --num_workers 0 --val_clips 6 --encoder vit_tiny"]
    judged += ["--decoder", trained.out, "--lpips", vgg, "--i3d", tmp_path / "i3d.pt"]
    text = run(tmp_path, "eval.py", *judged, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())["pictures"]
    errors = report["errors"]
    clips = report["clips"]
    assert clips >= 4 and set(errors) == {"predicted", "decoded", "copy"}
    for of_kind in errors.values():
        assert {k: len(v) for k, v in of_kind.items()} == {"psnr": 7, "ssim": 7, "lpips": 7}
    assert "true features, decoded" in text and "JEDi-style MMD on vit_tiny" in text
    assert "FVD by i3d.pt (few films make it large)" in text
    turns = report["turns"]
    assert turns["left"][1] == clips and turns["control"][1] == clips
    assert report["mmd"]["recorded"] != report["mmd"]["still"]
    assert "actions that an inverse model reads from decoded pictures" in text
    assert set(report["actions"]) == {"decoded", "predicted", "others"}

    # the copy, from the numbers in the frames: blocks of 16 x 16 that differ between two numbers
    records, _ = index_shards(sorted(map(str, game.held.parent.glob("*.tar"))))
    videos = find_videos([str(game.video)], records)
    reader = ClipReader(crop_size=32, action_space=38)
    dataset = PicturedClips(records, [1.0] * len(records), reader, videos, 64)
    films = []
    for items in windows(dataset, 4, 6):
        films += [dataset[item]["pictures"][:, 0].float() / 255 for item in items]
    film = torch.stack(films)
    for k in (1, 7):
        expected = psnr_of(squared_error(film[:, 0], film[:, k]))
        assert abs(errors["copy"]["psnr"][k - 1] - expected) < 1e-3

    # the film: three clips of eight steps, the first and the last of each shown three times
    with av.open(str(tmp_path / "report" / "film.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 3 * 12 and frames[0].shape[1] == 6 * 168
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data:image/gif;base64" in page and "Error in pixels" in page


def test_a_decoder_of_other_features_is_refused(game, world, tmp_path):
    """Bug: features of another norm are decoded into nonsense; the old name of a flag is taken for
    a folder."""
    plan = "--epochs 1 --warmup 0 --anneal 0 --ipe 1 --val_clips 0 --feature_norm standardize"
    run(tmp_path, "train_decoder.py", *world, plan, "--out_dir", tmp_path / "run")
    judged = ["--checkpoint", game.out, "--data", game.held, "--video", game.video]
    judged += ["--samples 2 --batch_size 4 --num_workers 0 --val_clips 4 --out", tmp_path / "r"]
    text = fails(tmp_path, "eval.py", *judged, "--decoder", tmp_path / "run")
    assert "was trained with feature_norm standardize, the predictor with layer" in text
    text = fails(tmp_path, "eval.py", *judged, "--decoder", game.out)
    assert "is no run of train_decoder.py" in text
    text = fails(tmp_path, "eval.py", *judged, "--decoder decord")
    assert "--decoder decord is now --video_decoder decord" in text
    text = fails(tmp_path, "eval.py", *judged, "--i3d x.pt")
    assert "--i3d judges pictures: name a run of train_decoder.py with --decoder" in text


def test_flags_of_films_are_checked_before_the_evaluation(game, trained, vgg, tmp_path):
    """Bug: a file that is missing, or of another kind, is noticed at the end of a long evaluation,
    or under the name of another flag."""
    (tmp_path / "text.pt").write_text("no network")
    judged_run = load_run(str(game.out))
    for decoder, options, sentence in [
        ("none", {}, "--decoder none: no such run folder or file"),
        (str(trained.out), {"lpips": "no.pt"}, "--lpips no.pt: no such file"),
        (str(trained.out), {"i3d": "no.pt"}, "--i3d no.pt: no such file"),
        (str(trained.out), {"i3d": str(tmp_path / "text.pt")}, "text.pt is no TorchScript file"),
        (str(trained.out), {"i3d": str(vgg)}, "vgg16.pt makes no features of films"),
        (str(trained.out), {"encoder": "doom_tiny"}, "--encoder doom_tiny gives features of"),
    ]:
        with pytest.raises((FileNotFoundError, ValueError), match=sentence):
            open_networks(judged_run, decoder, **options)

    # a network of films does not judge pictures
    torch.jit.script(FileOfI3D()).save(str(tmp_path / "i3d.pt"))
    with pytest.raises(ValueError, match="i3d.pt makes no features of pictures"):
        weights.Lpips(str(tmp_path / "i3d.pt"))

    # the evaluation prints how many clips it has measured
    judged = ["--checkpoint", game.out, "--data", game.held, "--decoder", trained.out]
    for flags, sentence in [
        (["--video", game.video, "--i3d", vgg], "vgg16.pt makes no features of films"),
        ([], "--decoder: name the shards that features were made from with --video"),
        (["--video", game.video.parent / "shard-000001.tar"], "--video holds no recording"),
    ]:
        code, text = Run(tmp_path, "eval.py", *judged, *flags, "--num_workers 0").wait()
        assert sentence in error_line(code, text)
        assert "clips of" not in text


def test_wished_turns_are_turns_and_hold_the_hotbar(game):
    """Bug: left and right exchanged, a mouse that does not move with the camera, another weapon."""
    judged_run = load_run(str(game.out))
    names = judged_run.state["action_names"]
    dataset = open_held_out(
        judged_run.state, judged_run.scaler, [str(game.held)], None, judged_run.device
    )[0]
    actions = torch.stack([dataset[i]["actions"] for i in sum(windows(dataset, 2, 4), [])])
    wishes = Wishes(types.SimpleNamespace(run=judged_run, actions=actions))
    plain = {
        name.split()[-1]: unscaled(wishes.scaler, of(1)) for name, of in wishes.kinds().items()
    }
    yaw = names.index("yaw_diff")
    assert (plain["left"][:, yaw] < 0).all() and (plain["right"][:, yaw] > 0).all()
    np.testing.assert_allclose(plain["left"][:, yaw], -wishes.turn, rtol=1e-4)
    degrees = np.degrees(plain["right"][:, yaw])
    np.testing.assert_allclose(plain["right"][:, names.index("mouse_dx")] * 0.15, degrees, 1e-3)
    assert (plain["walk"][:, names.index("key.w")] == 1).all()
    np.testing.assert_allclose(plain["walk"][:, yaw], 0, atol=1e-6)
    slots = [i for i, name in enumerate(names) if name.startswith("slot.")]
    assert slots and (plain["left"][:, slots] == actions[1, 0, slots].numpy()).all()


def test_a_robots_predictions_are_decoded(arm, tmp_path):
    """Bug: robots refused, or cut in another way than their predictor's; flags of play ignored."""
    robot = ["--dataset droid --data", arm / "a", "--encoder vit_tiny --crop_size 32"]
    robot += ["--frames_per_clip 5 --val_fraction 0.4 --width 24 --depth 1 --num_heads 2"]
    robot += ["--least_width 8 --batch_size 2 --epochs 1 --ipe 4 --warmup 0 --anneal 0"]
    robot += ["--val_clips 4 --num_workers 0 --out_dir"]
    run(tmp_path, "train_decoder.py", *robot, tmp_path / "run", "--max_steps 2")
    text = run(tmp_path, "train_decoder.py", *robot, tmp_path / "run", "--resume")
    assert "resumed from" in text and "held out after epoch 1: PSNR" in text

    # a rollout of the arm as a film
    judged = ["--checkpoint", arm / "base", "--encoder vit_tiny --samples 2 --ranked_clips 2"]
    judged += ["--data", arm / "a", "--val_clips 6 --num_workers 0 --out", tmp_path / "report"]
    text = run(tmp_path, "eval.py", *judged, "--decoder", tmp_path / "run")
    assert "pictures of 6 clips: PSNR in dB" in text and "turns" not in text
    report = json.loads((tmp_path / "report" / "report.json").read_text())["pictures"]
    assert len(report["errors"]["predicted"]["psnr"]) == 4
    with av.open(str(tmp_path / "report" / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) > 4

    # another cut of the picture, and what is for play alone
    run(tmp_path, "train_decoder.py", *robot, tmp_path / "other", "--crop square --val_clips 0")
    wrong = fails(tmp_path, "eval.py", *judged, "--decoder", tmp_path / "other")
    assert "was trained with crop square, the predictor with reference" in wrong
    for flags, sentence in [
        ("--pixels_cache p", "--pixels_cache is for --dataset vpt"),
        ("--dataset vpt --stride 2", "--stride is for --dataset droid"),
    ]:
        flags = [*robot, tmp_path / "no", flags]
        assert sentence in fails(tmp_path, "train_decoder.py", *flags)


def test_an_inverse_model_reads_turns_from_pictures():
    """Bug: pictures of another clip, actions of another step, a fit on the clips that are tested:
    films of noise would tell turns, or films of turns would not."""
    random = np.random.default_rng(0)
    yaw = CONTINUOUS.index("yaw_diff")

    def film_of(turns):
        """A bright bar that turns move to the side (T, 3, 48, 48)."""
        place = 24 + np.concatenate([[0], np.cumsum(turns)])
        x = np.arange(48)
        bar = 255 * np.exp(-np.square((x - place[:, None]) / 6))
        return torch.from_numpy(bar).byte()[:, None, None].expand(-1, 3, 48, -1)

    def clips_of(n):
        actions = random.uniform(-8, 8, (n, 3, len(CONTINUOUS)))
        return torch.stack([film_of(turns) for turns in actions[..., yaw]]), actions

    # the encoder sees the films that the inverse model learns from
    settings = {"crop_size": 48, "encode": "tubelet"}
    state = {"frames_per_step": 2, "action_names": CONTINUOUS}
    device = torch.device("cpu")
    judged_run = types.SimpleNamespace(settings=settings, state=state, device=device)
    torch.manual_seed(0)
    encoder = weights.open_encoder("vit_tiny", 48, 8)
    films, actions = clips_of(60)
    tokens = [pool(see_again(judged_run, encoder, film), 4) for film in films]
    recordings = [str(i) for i in range(60)]
    training = {"z": torch.stack(tokens), "actions": actions, "recording": np.array(recordings)}

    # other films: the turn shows, what moves nothing does not, and noise shows nothing
    films, actions = clips_of(20)
    noise = torch.from_numpy(random.integers(0, 256, tuple(films.shape), np.uint8))
    sets = {"turns": films, "noise": noise}
    scores = action_scores(judged_run, encoder, training, sets, actions, recordings[:20])
    assert scores["turns"]["probe_yaw"] > 0.5
    assert scores["turns"]["probe_pitch"] < 0.2
    assert scores["noise"]["probe_yaw"] < 0.2
