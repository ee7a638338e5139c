"""Films of what a predictor predicts, made visible by a decoder: recorded beside predicted beside
"what if", pixel errors by horizon, distances between sets of films, and whether a turn to the left
looks like one."""

import io
import os
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from evaluation import pictures
from evaluation.decoded import Decoder, as_image, psnr_of, squared_error, ssim
from evaluation.decoded_actions import action_lines, action_scores, see_again
from evaluation.held_out import encoder_dtype
from evaluation.runs import check_encoder
from files.disk import write_atomically
from files.progress import tqdm
from files.vpt import DEGREES_PER_PIXEL
from weights import Lpips, encoder_hash, open_encoder, open_torchscript

# clips whose pictures are compared: each costs two films and some decoding of video
COMPARED = 96

# held-out starts from which the model turns left and right, and how strong that turn is: this
# quantile of recorded turns
STARTS = 50
STRONG = 0.75

# steps of a turn that are looked at: later ones show what was not in sight at the start. The
# measure is checked on recorded turns of as many steps, by more than this share of such a turn
STRETCH = 3
CLEAR = 0.5

# side of the small pictures that are compared to see which way a film turns
COARSE = 48

# side of a picture in film.mp4 and film.gif, in pixels
SHOWN = 160

# frames that I3D looks at
I3D_FRAMES = 16


# --- the networks ---


class Networks(NamedTuple):
    """What films need beside the predictor."""

    decoder: Decoder

    # the run's encoder and its name, for a distance between sets of films; None where the run does
    # not say which it is
    encoder: torch.nn.Module | None
    encoder_name: str | None

    # weights.Lpips, None without --lpips
    lpips: torch.nn.Module | None

    # a network in a TorchScript file and the file's name, None without --i3d
    i3d: torch.nn.Module | None
    i3d_name: str | None


def open_networks(run, decoder, encoder=None, lpips=None, i3d=None):
    """The Networks for films of a Run. They are opened before an evaluation that takes long: a
    mistake in their flags shows at once.

    decoder, lpips, i3d: paths of eval.py's flags; encoder: --encoder, None for what the run used.
    FileNotFoundError or ValueError for what is missing, what is another kind of file, and for a
    decoder or an encoder of other features than the run's."""
    decoder = Decoder(decoder, run.device)
    decoder.check(run)

    # judges of pictures
    judge_of_pictures = Lpips(lpips).to(run.device) if lpips else None
    judge_of_films = open_i3d(i3d, run.device) if i3d else None

    # in the precision in which it made the run's features
    encoder_name = encoder or run.settings["encoder"]
    network = None
    if encoder_name:
        settings = run.settings
        network = open_encoder(encoder_name, settings["crop_size"], settings["frames_per_clip"])
        check_encoder(run.state, encoder_hash(network), f"--encoder {encoder_name} gives")
        network.to(run.device, encoder_dtype(run.dtype, settings)).eval()
    return Networks(
        decoder,
        network,
        encoder_name,
        judge_of_pictures,
        judge_of_films,
        os.path.basename(i3d) if i3d else None,
    )


def open_i3d(path, device):
    """--i3d, a TorchScript file -> its network. ValueError for a network of something else."""
    network = open_torchscript("--i3d", path).to(device)
    grey = torch.full((1, I3D_FRAMES, 3, 32, 32), 128, dtype=torch.uint8)
    try:
        i3d_features(network, grey, device)
    except (AttributeError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[-1]
        raise ValueError(
            f"--i3d {path} makes no features of films ({reason}): StyleGAN-V's i3d_torchscript.pt"
            " does"
        ) from e
    return network


# --- films ---


class Films(NamedTuple):
    """Films of n clips as uint8 (n, T, 3, size, size), all from the same first steps."""

    # the frames that steps end with
    recorded: torch.Tensor

    # their features decoded: the best that any predictor can get
    decoded: torch.Tensor

    # a rollout from the first step under the true actions, decoded; its first picture is decoded
    # from the true features
    predicted: torch.Tensor


def to_bytes(x):
    """Pictures in [0, 1] -> uint8."""
    return (x.clamp(0, 1) * 255).round().byte()


def recorded_film(frames, i, size):
    """Pictures (T, 3, size, size) uint8 of the i-th clip of eval.Frames."""
    film = torch.from_numpy(np.ascontiguousarray(frames.of(i))).permute(0, 3, 1, 2)

    # as large as decoded pictures, with which it is compared
    if film.shape[-1] != size:
        film = to_bytes(F.interpolate(film.float() / 255, size=(size, size), mode="area"))
    return film


@torch.no_grad()
def rollouts(judged, clips, actions_of, batch_size=16):
    """Features (T, N, E) of rollouts from the first step of clips, one after another, that step
    included. actions_of: number of a clip -> scaled actions (K, A)."""
    run = judged.run
    for first in range(0, len(clips), batch_size):
        # the first steps of a batch, and what is done from there
        part = clips[first : first + batch_size]
        z, _, states = judged.clips.load(part)
        actions = torch.stack([actions_of(i) for i in part]).to(run.device)

        # states follow from these actions: recorded ones would tell what was really done
        with run.autocast():
            states = judged.states_of(states[:, 0], actions)
            ahead = run.predictor.rollout(z[:, :1], actions, states)
        yield from torch.cat([z[:, :1], ahead.to(z.dtype)], dim=1)


def true_actions(judged):
    """Of a clip of `judged`, for rollouts."""
    return lambda i: judged.actions[i]


@torch.no_grad()
def make_films(judged, decoder, frames, clips):
    """The Films of some clips."""
    recorded = []
    decoded = []
    predicted = []

    # clip by clip, because only pictures are kept: features of all clips are much larger
    ahead = rollouts(judged, clips, true_actions(judged))
    for i in tqdm(clips, "films", delay=10, unit=" clips"):
        recorded.append(recorded_film(frames, i, decoder.pictures.size))
        decoded.append(to_bytes(decoder(judged.clips.load([i])[0][0])))
        predicted.append(to_bytes(decoder(next(ahead))))
    return Films(torch.stack(recorded), torch.stack(decoded), torch.stack(predicted))


# --- errors in pixels ---


@torch.no_grad()
def pixel_errors(films, lpips=None):
    """{name: {metric: [K]}} of predicted, decoded (the ceiling) and copy (the first recorded
    picture), against what was recorded, by horizon. Metrics: psnr, ssim, and lpips with a function
    of two batches of pictures."""
    # beside the ceiling stands what needs no model: the first picture again
    K = films.recorded.shape[1] - 1
    first = films.recorded[:, :1].expand_as(films.recorded)
    guesses = {"predicted": films.predicted, "decoded": films.decoded, "copy": first}
    errors = {}
    for name, guess in guesses.items():
        rows = {"psnr": [], "ssim": []}
        if lpips is not None:
            rows["lpips"] = []

        # the first picture is the same in all films: errors begin one step later
        for k in range(1, K + 1):
            a = guess[:, k].float() / 255
            b = films.recorded[:, k].float() / 255
            rows["psnr"].append(psnr_of(squared_error(a, b)))
            rows["ssim"].append(ssim(a, b).mean().item())
            if lpips is not None:
                of_parts = [lpips(x, y) for x, y in pairs_of(a, b)]
                rows["lpips"].append(torch.cat(of_parts).mean().item())
        errors[name] = rows
    return errors


def pairs_of(a, b, size=16):
    """Two batches of pictures, a few at once."""
    return zip(a.split(size), b.split(size))


def pixel_lines(errors, seconds, count):
    """Errors in pixels for a person, a column for each horizon."""
    K = len(errors["copy"]["psnr"])
    header = "".join(f"{f'+{k * seconds:.3g} s':>9}" for k in range(1, K + 1))
    labels = {"predicted": "predicted, decoded", "decoded": "true features, decoded"}
    labels["copy"] = "copy of the first picture"

    # a block for each metric that was measured
    units = {"psnr": "PSNR in dB, higher is better", "ssim": "SSIM, higher is better"}
    units["lpips"] = "LPIPS, lower is better"
    lines = []
    for metric, title in units.items():
        if metric not in errors["copy"]:
            continue

        # a row for each kind of film
        lines.append(f"pictures of {count} clips: {title}".ljust(48) + header)
        form = "9.2f" if metric == "psnr" else "9.3f"
        for name, label in labels.items():
            cells = "".join(f"{x:{form}}" for x in errors[name][metric])
            lines.append(f"  {label:46}" + cells)
    return lines


def plot_pixels(errors, seconds):
    """PSNR and SSIM against seconds ahead."""
    styles = {"decoded": "^:", "predicted": "o-", "copy": "x-"}
    labels = {
        "decoded": "true features, decoded (the ceiling)",
        "predicted": "predicted, decoded",
        "copy": "copy of the first recorded picture",
    }
    colors = {"decoded": "C2", "predicted": "C0", "copy": "0.4"}

    # a picture for each metric that was measured
    metrics = [m for m in ("psnr", "ssim", "lpips") if m in errors["copy"]]
    fig = Figure(figsize=(5.2 * len(metrics) + 1, 4.2), layout="constrained")
    axes = fig.subplots(1, len(metrics))
    titles = {"psnr": "PSNR in dB (higher is better)", "ssim": "SSIM (higher is better)"}
    titles["lpips"] = "LPIPS (lower is better)"

    # a line for each kind of film
    for ax, metric in zip(axes, metrics):
        for name, style in styles.items():
            values = errors[name][metric]
            ahead = seconds * np.arange(1, len(values) + 1)
            ax.plot(ahead, values, style, color=colors[name], label=labels[name])
        ax.set_title(titles[metric], fontsize=12)
        ax.set_xlabel("seconds ahead", fontsize=11)
    pictures.legend_below(fig, axes[0])
    return fig


# --- what if ---


def unscaled(scaler, actions):
    """Scaled actions (..., A) -> as they were recorded, float64 numpy."""
    plain = actions.double().numpy().copy()
    scaled = len(scaler.mean)
    plain[..., :scaled] = plain[..., :scaled] * scaler.scale + scaler.mean
    return plain


class Wishes:
    """Actions that nobody recorded: standing still, turning left and right, walking, from the first
    step of a clip on. For play, whose actions are named as in files/vpt.py."""

    def __init__(self, judged):
        self.judged = judged
        self.names = judged.run.state["action_names"]
        self.scaler = judged.run.scaler

        # how strong a turn is: what recorded turns reach
        yaw = unscaled(self.scaler, judged.actions)[..., self.names.index("yaw_diff")]
        self.turn = float(np.quantile(np.abs(yaw), STRONG))

    def of(self, i, turn=0.0, walk=False):
        """Scaled actions (K, A) for the i-th clip: turn in radians a step, positive to the right;
        walk: forward is pressed. What is held in the hotbar stays."""
        # another slot would change the picture without any motion
        plain = np.zeros(self.judged.actions[i].shape)
        first = unscaled(self.scaler, self.judged.actions[i])[0]
        for j, name in enumerate(self.names):
            if name.startswith("slot."):
                plain[:, j] = first[j]

        # the mouse turns the camera: both are in an action
        plain[:, self.names.index("yaw_diff")] = turn
        plain[:, self.names.index("mouse_dx")] = turn / np.radians(DEGREES_PER_PIXEL)
        if walk and "key.w" in self.names:
            plain[:, self.names.index("key.w")] = 1

        # scaled, as the predictor takes them
        return torch.from_numpy(self.scaler.transform(plain)).float()

    def kinds(self):
        """{what the player does: function from the number of a clip to its actions}."""
        kinds = {
            "turn left": lambda i: self.of(i, turn=-self.turn),
            "turn right": lambda i: self.of(i, turn=self.turn),
        }
        if "key.w" in self.names:
            kinds["walk"] = lambda i: self.of(i, walk=True)
        return kinds


def can_turn(run):
    """Whether the actions of a run have a camera that turns."""
    return {"yaw_diff", "mouse_dx"} <= set(run.state["action_names"])


@torch.no_grad()
def what_if(judged, decoder, clips):
    """{what the player does: films (n, T, 3, size, size) uint8}, from the first steps of clips."""
    films = {}
    for name, actions_of in Wishes(judged).kinds().items():
        films[name] = torch.stack(
            [to_bytes(decoder(z)) for z in rollouts(judged, clips, actions_of)]
        )
    return films


# --- which way does a film turn? ---


def side_of(films):
    """Which way the scene of films (n, T, 3, H, W) moves: 1 to the right, -1 to the left (n,). A
    camera that turns right moves the scene to the left.

    It is the side on which a shift, between an eighth and half of the width and the same in all
    steps, makes neighbouring pictures differ least. A forced choice: where nothing moves it is
    chance, because decoded pictures are blurred and what never changes would otherwise decide."""
    # small and grey, without the floor and what the player holds, which do not turn with the
    # camera, and without the brightness, which changes with the light
    x = F.adaptive_avg_pool2d(films.float().mean(2), (COARSE, COARSE))
    x = x[:, :, : 2 * COARSE // 3]  # (n, T, rows, COARSE)
    x = x - x.mean((2, 3), keepdim=True)

    # the least difference under a shift to either side
    least = {}
    for side in (1, -1):
        differences = []
        for s in range(COARSE // 8, COARSE // 2 + 1):
            # what the picture before shows at column c, the next one shows s columns further on
            inner = x[..., : COARSE - s]
            outer = x[..., s:]
            before, after = (inner, outer) if side == 1 else (outer, inner)
            differences.append((before[:, :-1] - after[:, 1:]).abs().mean((1, 2, 3)))
        least[side] = torch.stack(differences).min(0).values
    return torch.where(least[1] < least[-1], 1, -1)


def clear_turns(films, yaw, least):
    """Stretches (m, STRETCH + 1, 3, H, W) of films (n, T, 3, H, W) that turn one way in all of
    their steps, by more than `least` radians a step on average, and the side (m,) to which their
    scene moves. yaw (n, T-1): radians of each step, positive to the right."""
    stretches = []
    sides = []
    for film, turns in zip(films, torch.as_tensor(yaw)):
        # stretches do not overlap: each turn is counted once
        for t in range(0, len(turns) - STRETCH + 1, STRETCH):
            part = turns[t : t + STRETCH]
            one_way = abs(int(part.sign().sum())) == STRETCH
            if one_way and part.mean().abs() > least:
                stretches.append(film[t : t + STRETCH + 1])
                sides.append(-int(part[0].sign()))
    return stretches, torch.tensor(sides)


@torch.no_grad()
def turn_test(judged, decoder, films, clips):
    """Does the decoded film of a turn move the right way? -> {name: (right, of how many)} for
    turns to the left and to the right from the same starts; under actions of another recording,
    judged as if they were such turns, by turns; and for recorded films of clear turns, which says
    how often the measure itself is right."""
    wishes = Wishes(judged)
    starts = pictures.spread_over(clips, judged.recordings, STARTS)
    correct = {}

    # a turn to the left and one to the right from each start
    sides = {"left": 1, "right": -1}  # where the scene goes: the other way
    both = torch.ones(len(starts), dtype=torch.bool)
    for name, direction in sides.items():
        turned = rollouts(judged, starts, wishes.kinds()[f"turn {name}"])
        films_of_turn = torch.stack([to_bytes(decoder(z)) for z in turned])
        is_right = side_of(films_of_turn[:, : STRETCH + 1]) == direction
        both &= is_right
        correct[name] = (int(is_right.sum()), len(starts))

    # who always answers "left" is right in half of the turns, and never in both
    correct["both"] = (int(both.sum()), len(starts))

    # the control: actions of other recordings, from the same starts
    others = judged.others_of(
        [judged.recordings[i] for i in starts], judged.actions[torch.tensor(starts)]
    )
    if not torch.isnan(others).any():
        place = {i: k for k, i in enumerate(starts)}
        random = rollouts(judged, starts, lambda i: others[place[i]])
        films_of_others = torch.stack([to_bytes(decoder(z)) for z in random])
        sides_of_others = side_of(films_of_others[:, : STRETCH + 1])

        # every other one is judged as if it were a turn to the right
        asked = torch.ones(len(starts), dtype=sides_of_others.dtype)
        asked[1::2] = -1
        correct["control"] = (int((sides_of_others == asked).sum()), len(starts))

    # the measure itself, on recorded turns: as they were recorded, and decoded
    yaw = unscaled(judged.run.scaler, judged.actions[torch.tensor(clips)])[
        ..., wishes.names.index("yaw_diff")
    ]
    for name, of_kind in (("recorded", films.recorded), ("decoded", films.decoded)):
        stretches, sides = clear_turns(of_kind, yaw, CLEAR * wishes.turn)
        if stretches:
            is_right = side_of(torch.stack(stretches)) == sides
            correct[name] = (int(is_right.sum()), len(stretches))
    return correct, wishes.turn


def turn_lines(correct, turn):
    """The turns for a person."""

    def share(name):
        right, count = correct[name]
        return f"{right / count:.0%} of {count}"

    lines = [
        f"turns of {np.degrees(turn):.0f} degrees a step, {STRETCH} steps, decoded: the scene moves"
        f" the right way in {share('left')} (left) and {share('right')} (right), both from the"
        f" same start {share('both')}"
    ]
    if "control" in correct:
        lines.append(f"  actions of other recordings in their place: {share('control')}")
    if "recorded" in correct:
        lines.append(
            "  the measure on clear turns that were recorded:"
            f" {share('recorded')}, on their features decoded {share('decoded')}"
        )
    return lines


# --- what an inverse model sees in films ---


def scores_of_actions(judged, networks, films, clips, training):
    """action_scores of decoded true features (the best that any predictor can get), of predictions,
    and of predictions that got the actions of another recording: they should show those, and not
    the true ones."""
    recordings = [judged.recordings[i] for i in clips]
    actions = judged.actions[torch.tensor(clips)]
    sets = {"decoded": films.decoded, "predicted": films.predicted}

    others = judged.others_of(recordings, actions)
    if not torch.isnan(others).any():
        place = {i: k for k, i in enumerate(clips)}
        ahead = rollouts(judged, clips, lambda i: others[place[i]])
        sets["others"] = torch.stack([to_bytes(networks.decoder(z)) for z in ahead])

    raw = unscaled(judged.run.scaler, actions)
    return action_scores(judged.run, networks.encoder, training, sets, raw, recordings)


# --- distances between sets of films ---


def halves(recordings):
    """Two lists of clips of equal length, of different recordings where there are several."""
    # recordings in turn, so that both halves are of the whole set
    names = list(dict.fromkeys(recordings))
    first = set(names[::2])
    one = [i for i, name in enumerate(recordings) if name in first]
    two = [i for i, name in enumerate(recordings) if name not in first]

    # one recording alone is cut in two
    if not two:
        half = len(recordings) // 2
        one = list(range(half))
        two = list(range(half, len(recordings)))

    # distances depend on the number of films
    count = min(len(one), len(two))
    return one[:count], two[:count]


def mmd(x, y):
    """MMD^2 of features x (n, D) and y (m, D) with the kernel (x.y / D)^2, times 100: biased, with
    the diagonal, as in JEDi (arXiv 2410.05203)."""
    D = x.shape[1]

    def kernel(a, b):
        return (a.double() @ b.double().T / D).square().mean()

    return float(100 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def frechet(x, y):
    """Frechet distance of Gaussians fitted to features x (n, D) and y (m, D)."""
    from scipy.linalg import sqrtm  # takes a second to import

    # in float64, because the root of a nearly singular matrix loses digits
    x = x.double().numpy()
    y = y.double().numpy()
    cov_x = np.cov(x, rowvar=False)
    cov_y = np.cov(y, rowvar=False)
    root = np.real(sqrtm(cov_x @ cov_y))
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y - 2 * root))


def encoder_features(run, encoder, films):
    """Mean tokens (n, E) of films (n, T, 3, size, size), as the encoder of a Run sees them."""
    return torch.stack([see_again(run, encoder, film).mean((0, 1)) for film in films])


@torch.no_grad()
def i3d_features(network, films, device):
    """Features (n, 400) of films by an I3D in a TorchScript file (StyleGAN-V's, which repeats the
    original FVD): it takes videos (n, 3, T, H, W) from 0 to 255. Shorter films are shown slower."""
    # each picture is repeated, until there are enough
    times = -(-I3D_FRAMES // films.shape[1])
    rows = []
    for film in films.split(8):
        video = film.repeat_interleave(times, dim=1).transpose(1, 2).float().to(device)
        rows.append(network(video, rescale=True, resize=True, return_features=True).cpu())
    return torch.cat(rows)


def distances(films, recordings, features, distance):
    """A distance from the recorded films of half of the recordings to films of the other half:
    recorded ones (the floor), decoded from true features, predicted, and still pictures. features:
    films -> (n, D)."""
    # all sets are compared with the same films of other recordings
    one, two = halves(recordings)
    still = films.recorded[two, :1].expand_as(films.recorded[two])
    base = features(films.recorded[one])
    sets = {
        "recorded": films.recorded[two],
        "decoded": films.decoded[two],
        "predicted": films.predicted[two],
        "still": still,
    }
    return {name: distance(base, features(of_set)) for name, of_set in sets.items()}, len(one)


def distance_line(title, values, count):
    """Distances for a person."""
    return (
        f"{title}, recorded films of half of the recordings to those of the other half ({count}"
        f" films each): recorded {values['recorded']:.4g} (the floor), true features decoded"
        f" {values['decoded']:.4g}, predicted {values['predicted']:.4g}, still pictures"
        f" {values['still']:.4g}"
    )


# --- strips, film.mp4, film.gif ---


def strip_of(films, others, i, titles):
    """A figure of one clip: a row for each kind of film, a column for each step."""
    # what was recorded, what can be seen of it at best, what was expected
    rows = {
        "recorded": films.recorded[i],
        "recorded,\ndecoded": films.decoded[i],
        "predicted": films.predicted[i],
    }

    # and what would have come of other actions
    rows |= {f"what if:\n{name}": film[i] for name, film in others.items()}
    images = {name: [as_image(x / 255) for x in film.float()] for name, film in rows.items()}
    return pictures.plot_rows(images, titles)


def labelled(image, text, font):
    """A picture (H, W, 3) enlarged to SHOWN pixels, with a line of text above it."""
    side = Image.fromarray(image).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (SHOWN + 8, SHOWN + 28), "white")
    page.paste(side, (4, 24))
    ImageDraw.Draw(page).text((6, 4), text, fill="black", font=font)
    return page


def side_by_side(columns):
    """Pictures of `labelled` as one."""
    page = Image.new("RGB", (len(columns) * (SHOWN + 8), SHOWN + 28), "white")
    for j, column in enumerate(columns):
        page.paste(column, (j * (SHOWN + 8), 0))
    return page


def film_pages(films, others, count, seconds):
    """Pictures of a film of the first `count` clips, side by side: recorded, its features
    decoded, predicted, what if."""
    # the columns of a page
    font = ImageFont.load_default(14)
    kinds = {"recorded": films.recorded, "decoded": films.decoded, "predicted": films.predicted}
    kinds |= {f"if: {name}": film for name, film in others.items()}

    # a page for each step of each clip
    pages = []
    for i in range(count):
        T = films.recorded.shape[1]
        for t in range(T):
            columns = []
            for name, film in kinds.items():
                text = f"{name}  +{t * seconds:.1f} s" if name == "recorded" else name
                columns.append(labelled(as_image(film[i, t].float() / 255), text, font))
            page = side_by_side(columns)

            # the start, which all share, and the end stay for a moment
            pages += [page] * (3 if t in (0, T - 1) else 1)
    return pages


def mp4_bytes(pages, rate):
    """Pictures of one size, with even sides -> an H.264 film of `rate` pictures a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # what every player shows
        stream = container.add_stream("libx264", rate=rate)
        stream.width = pages[0].width
        stream.height = pages[0].height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "threads": "1"}

        # all pages, then what the encoder still holds
        for page in pages:
            container.mux(stream.encode(av.VideoFrame.from_image(page)))
        container.mux(stream.encode())
    return file.getvalue()


def gif_bytes(pages, seconds):
    """Pictures -> a GIF that shows each for some seconds, again and again."""
    # a GIF has 256 colours at most, and half of them are enough
    file = io.BytesIO()
    small = [page.quantize(128) for page in pages]
    small[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=small[1:],
        duration=int(1000 * seconds),
        loop=0,
    )
    return file.getvalue()


# --- the sections of a report ---


def film_report(judged, networks, frames, shown, folder, training=None):
    """All about films for eval.py: (lines for a person, entries of report.json, {heading: [Figure
    or bytes of a GIF]}). Writes film.mp4 and film.gif to the folder.

    networks: of open_networks; frames: eval.Frames; shown: clips for the eye; training: of
    decoded_actions.decoded_training, for an inverse model of pictures, None: there is none."""
    # those that are shown are among those that are measured
    run = judged.run
    decoder = networks.decoder
    seconds = judged.seconds
    others = [i for i in judged.places if i not in shown]
    clips = shown + others[: max(COMPARED - len(shown), 0)]
    films = make_films(judged, decoder, frames, clips)
    recordings = [judged.recordings[i] for i in clips]

    # pixels: the predictor's share of the error is what is below the ceiling
    errors = pixel_errors(films, networks.lpips)
    facts = pixel_lines(errors, seconds, len(clips))
    report = {"pictures": {"clips": len(clips), "errors": errors}}

    # sets of films, as the run's encoder sees them
    if networks.encoder is not None:
        name = networks.encoder_name
        mmds, count = distances(
            films, recordings, lambda x: encoder_features(run, networks.encoder, x), mmd
        )
        title = f"JEDi-style MMD on {name} (x 100; not comparable with published JEDi)"
        facts.append(distance_line(title, mmds, count))
        report["pictures"]["mmd"] = mmds | {"films": count, "encoder": name}

    # and as an I3D does
    if networks.i3d is not None:
        fvds, count = distances(
            films, recordings, lambda x: i3d_features(networks.i3d, x, run.device), frechet
        )
        title = f"FVD by {networks.i3d_name} (few films make it large)"
        facts.append(distance_line(title, fvds, count))
        report["pictures"]["fvd"] = fvds | {"films": count}

    # other actions from the same start
    wished = {}
    if can_turn(run):
        wished = what_if(judged, decoder, shown)
        correct, turn = turn_test(judged, decoder, films, clips)
        facts += turn_lines(correct, turn)
        report["pictures"]["turns"] = {"radians": turn, **correct}

    # do pictures show the actions?
    if training is not None:
        scores = scores_of_actions(judged, networks, films, clips, training)
        facts += action_lines(scores, len(training["z"]), len(clips))
        report["pictures"]["actions"] = scores

    # for the eye
    T = films.recorded.shape[1]
    titles = ["start", *(f"+{k * seconds:.3g} s" for k in range(1, T))]
    strips = [strip_of(films, wished, k, titles) for k in range(len(shown))]
    pages = film_pages(films, wished, len(shown), seconds)

    # one step a picture, as fast as it was played
    rate = Fraction(seconds).limit_denominator(1000)
    gif = gif_bytes(pages, seconds)
    write_atomically(os.path.join(folder, "film.mp4"), mp4_bytes(pages, 1 / rate))
    write_atomically(os.path.join(folder, "film.gif"), gif)
    figures = {
        "Predicted as pictures": [gif, *strips],
        "Error in pixels": [plot_pixels(errors, seconds)],
    }
    return facts, report, figures
