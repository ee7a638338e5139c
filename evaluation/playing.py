"""Play inside a predictor, without a browser: the window of steps that it sees, what keys, mouse
and sliders do, and the real steps that predicted ones are compared with. play.py shows it on a
page."""

import functools
import io
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFont

from data import collate, windows
from evaluation.closed_loop import in_recorded_units, seen_from_first
from evaluation.decoded import Decoder, as_image
from evaluation.films import STRONG, labelled, mp4_bytes, side_by_side
from evaluation.held_out import recording_of, states_from
from evaluation.pictures import find_videos, look_up
from evaluation.runs import Run, open_held_out, play_reader, print_left_out
from files.progress import tqdm
from files.vpt import DEGREES_PER_PIXEL, HOTBAR, SLOTS
from model import predict_on

# side of real frames in pixels where no decoder says how large its pictures are
FRAME_SIZE = 144

# real steps whose own nearest neighbour is looked for, to know how far apart real steps are
NEIGHBOURS = 256

# steps of a film: what is recorded is kept in memory
LONGEST_FILM = 300

# clips that are encoded at once while real steps are read
AT_ONCE = 8

# arrow keys, which turn as the mouse does: (dx, dy)
ARROWS = {"turn.left": (-1, 0), "turn.right": (1, 0), "turn.up": (0, -1), "turn.down": (0, 1)}


def structure(z):
    """How much the patches of features (..., N, E) differ: their mean |difference| from the mean
    patch (...). Where all patches are alike, nothing is left to see."""
    return (z - z.mean(-2, keepdim=True)).abs().mean((-2, -1))


def usual_and_band(values):
    """The median of what real steps have, and what four of five of them are within, as shares of
    the median; None where that is 0."""
    usual = float(np.median(values))
    band = None
    if usual > 0:
        band = [float(np.quantile(values, q)) / usual for q in (0.1, 0.9)]
    return usual, band


def share(value, usual):
    """A value in units of what is usual for real steps; None where that is 0."""
    return value / usual if usual > 0 else None


def jpeg_bytes(image):
    """A picture (H, W, 3) uint8 as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


# --- the window ---


class Window:
    """The last steps of play, which the predictor sees, at most `size` of them, with the keys and
    values of all but the newest. When it is full, the older half is forgotten and the rest is
    encoded again, from position 0 on and with yaw counted from its first step, as in a clip of
    training. So one can play for ever, and a prediction is always that of the plain predictor on
    the steps in the window."""

    def __init__(self, run, compose, size):
        self.run = run
        self.compose = compose
        self.size = size

    def begin(self, z, actions, states):
        """Start from c true steps: z (c, N, E), scaled actions (c-1, A) between them, states (c,
        S)."""
        self.z = z
        self.actions = actions
        self.states = states
        self.encode()

    @torch.no_grad()
    def encode(self):
        """The keys and values of all steps but the newest."""
        self.past = None
        if len(self.z) == 1:
            return
        states = seen_from_first(self.states[None])
        with self.run.autocast():
            _, self.past = predict_on(
                self.run.predictor, self.z[None, :-1], self.actions[None], states
            )

    @torch.no_grad()
    def step(self, actions):
        """Scaled actions (n, A) that could follow -> features of the next step under each of them
        (n, N, E). The first one is done, and its step joins the window."""
        # full: forget the older half
        if len(self.z) > self.size:
            keep = (self.size + 1) // 2
            self.z = self.z[-keep:]
            self.actions = self.actions[len(self.actions) + 1 - keep :]
            self.states = self.states[-keep:]
            self.encode()

        # one step under all actions at once, which share the past
        n = len(actions)
        states = seen_from_first(self.states[None])[:, -1:]
        with self.run.autocast():
            z, present = predict_on(
                self.run.predictor,
                self.z[None, -1:].expand(n, -1, -1, -1),
                actions[:, None],
                states.expand(n, -1, -1),
                self.past,
            )
        z = z[:, 0].float()

        # what is done becomes the past; copied, because a view would keep what was not done
        self.past = [(k[:1].clone(), v[:1].clone()) for k, v in present]
        done = actions[:1]
        next_state = self.compose(self.states[-1:], torch.stack([done, done], dim=1))[:, 1]
        self.z = torch.cat([self.z, z[:1]])
        self.actions = torch.cat([self.actions, done])
        self.states = torch.cat([self.states, next_state])
        return z


# --- what a player does ---


def number_within(value, most):
    """A number of a message as a float; ValueError for anything else, and beyond +-most."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:20]!r} is no number")
    if not -most <= value <= most:  # a nan is in no range
        raise ValueError(f"{str(value)[:20]} is not within {-most:g} to {most:g}")
    return float(value)


class Limits(NamedTuple):
    """What recorded play reaches."""

    # pixels that an arrow key turns in a step, and the largest motion of the mouse in a step
    turn: float
    most: float

    # radians, upwards and downwards
    pitch: tuple

    @classmethod
    def of(cls, names, actions, states):
        """Of recorded actions (n, A), not scaled, and states (m, 2)."""
        dx = np.abs(actions[:, names.index("mouse_dx")])
        dy = np.abs(actions[:, names.index("mouse_dy")])
        turn = float(np.quantile(dx, STRONG))
        pitch = (float(states[:, 1].min()), float(states[:, 1].max()))
        return cls(turn, float(max(dx.max(), dy.max())), pitch)


class Keyboard:
    """Keys, mouse and hotbar of one player, between one step and the next."""

    def __init__(self, names, limits):
        self.names = names
        self.limits = limits
        self.can_hold = [n for n in names if n.startswith(("key.", "mouse."))] + list(ARROWS)

        # what is held now, what was held at any time since the last step, pixels since then, and
        # the open slot of the hotbar
        self.held = set()
        self.tapped = set()
        self.dx = 0.0
        self.dy = 0.0
        self.slot = 0

    def begin(self, action):
        """Start where this action (A,), not scaled, was recorded: with its slot of the hotbar. What
        is held stays held."""
        self.tapped = set(self.held)
        self.dx = 0.0
        self.dy = 0.0
        self.slot = 0
        for k, name in enumerate(SLOTS):
            if name in self.names and action[self.names.index(name)] == 1:
                self.slot = k

    def hear(self, message):
        """A message of the page: {"type": "held", "names": [...]}, all that is held now; {"type":
        "mouse", "dx", "dy"}, pixels since the last one. ValueError for any other."""
        if message["type"] == "held":
            held = message.get("names")
            if not isinstance(held, list) or not all(name in self.can_hold for name in held):
                raise ValueError(f"names of held keys: a list of {' '.join(self.can_hold)}")
            self.held = set(held)

            # a key that is pressed for a moment counts for the whole step, as in recordings
            self.tapped |= self.held
        elif message["type"] == "mouse":
            most = 1e4
            dx = self.dx + number_within(message.get("dx"), most)
            dy = self.dy + number_within(message.get("dy"), most)
            self.dx = max(-most, min(dx, most))
            self.dy = max(-most, min(dy, most))
        else:
            raise ValueError(f"no message of type {str(message['type'])[:20]!r} is known")

    def action(self, pressed, dx, dy, state):
        """An action (A,), not scaled, of names that are pressed and pixels of the mouse, from a
        state (yaw, pitch)."""
        # arrows turn, too, and nothing turns faster than anybody did
        for name, (right, down) in ARROWS.items():
            if name in pressed:
                dx += right * self.limits.turn
                dy += down * self.limits.turn
        dx = max(-self.limits.most, min(dx, self.limits.most))
        dy = max(-self.limits.most, min(dy, self.limits.most))

        # the camera follows the mouse; upwards and downwards it stops where it did in recordings
        low, high = self.limits.pitch
        pitch = float(state[1])
        new_pitch = max(low, min(pitch + math.radians(dy * DEGREES_PER_PIXEL), high))
        values = {
            "mouse_dx": dx,
            "mouse_dy": dy,
            "yaw_diff": math.radians(dx * DEGREES_PER_PIXEL),
            "pitch_diff": new_pitch - pitch,
            SLOTS[self.slot]: 1.0,
        }
        values |= dict.fromkeys(pressed, 1.0)
        return np.array([values.get(name, 0.0) for name in self.names])

    def take(self, state):
        """What was done since the last step, and what rest would be: (2, A), not scaled."""
        both = np.stack(
            [
                self.action(self.tapped, self.dx, self.dy, state),
                self.action(set(), 0.0, 0.0, state),
            ]
        )

        # a digit opens its slot after the step in which it is pressed, as in recordings
        for k, name in enumerate(HOTBAR):
            if name in self.tapped:
                self.slot = k
        self.tapped = set(self.held)
        self.dx = 0.0
        self.dy = 0.0
        return both


class Sliders:
    """A robot's actions, dimension by dimension. They stay until they are moved."""

    def __init__(self, names, scale):
        self.names = names

        # as far as nearly all recorded actions go
        self.most = [3 * float(s) for s in scale]
        self.values = np.zeros(len(self.names))

    def begin(self, action):
        """Start where this action was recorded. Sliders stay where they are."""

    def hear(self, message):
        """A message of the page: {"type": "sliders", "values": [A numbers]}, not scaled. ValueError
        for any other."""
        if message["type"] != "sliders":
            raise ValueError(f"no message of type {str(message['type'])[:20]!r} is known")
        values = message.get("values")
        if not isinstance(values, list) or len(values) != len(self.names):
            raise ValueError(f"values of sliders: a list of {len(self.names)} numbers")
        pairs = zip(values, self.most)
        self.values = np.array([number_within(value, most) for value, most in pairs])

    def take(self, state):
        """What is done now, and what rest would be: (2, A), not scaled."""
        return np.stack([self.values, np.zeros_like(self.values)])


# --- real steps ---


def seconds_in(record, place, reader, robot):
    """Seconds from the start of a recording to the first step of its window `place`."""
    length = reader.frames / reader.fps
    if robot:
        return record.first / record.rate + place * length
    if record.is_features:
        return int(record.key.rpartition("@")[2]) / 20 + place * length
    return place * length


class RealSteps:
    """Steps of recorded clips: where play starts, and what predicted steps are compared with."""

    def __init__(self, run, dataset, features_of, videos, size, count, seed):
        """Read `count` clips of a dataset. videos: of find_videos, for features, or None. size: of
        their frames in pixels. ValueError for fewer than two."""
        # frames that features were made from are larger than those for a small encoder
        reader = dataset.reader
        if videos:
            reader = play_reader(run.settings | {"crop_size": size}, run.scaler, "pyav")
        robot = run.state["dataset"] == "droid"

        # of each clip: its steps, their frames, where it is from
        steps, actions = [], []
        states = []
        self.frames = []
        self.recordings = []
        self.seconds = []
        batches = windows(dataset, AT_ONCE, count, seed=seed)
        for items in tqdm(batches, "real steps", delay=5, unit=f" x {AT_ONCE} clips"):
            clips = [dataset[item] for item in items]
            batch = collate(clips)
            z, a, s = features_of(batch)
            for i, (_, _, number, place) in enumerate(items):
                # in place of a damaged clip another one was read, from an unknown place
                if clips[i]["bad"]:
                    continue
                record = dataset.records[number]
                steps.append(z[i])
                actions.append(a[i])
                states.append(s[i])
                self.recordings.append(recording_of(record.key, batch))
                self.seconds.append(seconds_in(record, place, dataset.reader, robot))

                # as JPEGs: they are shown again and again
                if videos or "video" in batch:
                    frames = look_up(clips[i], record, place, videos, reader)
                    self.frames += [jpeg_bytes(np.ascontiguousarray(x)) for x in frames]
        if len(steps) < 2:
            raise ValueError(
                f"{len(steps)} held-out clips can be read, and real steps are compared with those"
                " of another clip: name other --data"
            )

        self.z = torch.stack(steps)  # (clips, T, N, E)
        self.actions = torch.stack(actions)  # (clips, T-1, A), scaled
        self.states = torch.stack(states)  # (clips, T, S)
        self.measure()

    @torch.no_grad()
    def measure(self):
        """How far apart real steps are, and how much they change in a step."""
        T = self.z.shape[1]
        self.rows = self.z.flatten(0, 1).flatten(1)
        self.change = (self.z[:, 1:] - self.z[:, :-1]).abs().mean().item()

        # the neighbours of a step are in other recordings, because those of its own are the same
        # moment again; where there is only one recording, in other clips
        names = list(dict.fromkeys(self.recordings))
        groups = [names.index(name) for name in self.recordings]
        if len(names) == 1:
            groups = list(range(len(groups)))
        self.groups = torch.tensor(groups).repeat_interleave(T).to(self.rows.device)
        apart = []
        for i in range(0, len(self.rows), -(-len(self.rows) // NEIGHBOURS)):
            apart.append(self.nearest(self.rows[i], self.groups[i])[1])

        # where most steps have a twin, or features are of one patch, there is no such unit
        self.usual_distance, self.distance_band = usual_and_band(apart)
        of_patches = structure(self.z).flatten().cpu().numpy()
        self.usual_structure, self.structure_band = usual_and_band(of_patches)

    @torch.no_grad()
    def nearest(self, z, group):
        """The number of the real step that is nearest to features z, by mean |difference|, and the
        distance to the nearest one outside of a group."""
        distance = torch.cdist(z.reshape(1, -1), self.rows, p=1)[0] / self.rows.shape[1]
        outside = distance.masked_fill(self.groups == group, math.inf)
        return int(distance.argmin()), float(outside.min())

    def name_of(self, number, seconds):
        """(recording, seconds since its start) of a real step; seconds: of a step."""
        clip, t = divmod(number, self.z.shape[1])
        return self.recordings[clip], self.seconds[clip] + t * seconds


# --- a player ---


class Playground(NamedTuple):
    """What all players share, and none changes."""

    run: Run
    compose: Callable
    decoder: Decoder | None
    real: RealSteps

    # steps in a window, and seconds of a step
    window: int
    seconds: float

    # a function that gives a player something to act with
    new_controls: Callable


def open_playground(run, decoder, data, video, encoder, window, clips, seed):
    """A Run and its held-out data -> Playground. Arguments as the flags say."""
    state = run.state
    T = state["frames_per_clip"] // state["frames_per_step"]
    window = T - 1 if window is None else window
    if not 1 <= window < T:
        raise ValueError(
            f"--window {window}: choose 1 to {T - 1} steps, because the predictor was never trained"
            " on more"
        )
    if decoder is not None:
        decoder.check(run)

    # held-out recordings, and their frames
    dataset, features_of, compose, bad = open_held_out(
        state, run.scaler, data, encoder, run.device, run.dtype
    )
    print_left_out(bad)
    is_features = "safetensors" in dataset.records[0].members
    if is_features and not video and decoder is None:
        remedy = "with --video the shards that they were made from"
        if state["dataset"] == "droid":
            remedy = "with --data the episodes that they were made from"
        raise ValueError(
            "these data are features without pictures: name a run of train_decoder.py with"
            f" --decoder, or {remedy}"
        )
    videos = find_videos(video, dataset.records) if video else None
    size = decoder.pictures.size if decoder is not None else FRAME_SIZE
    real = RealSteps(run, dataset, features_of, videos, size, clips, seed)

    # keys and mouse for a game, sliders for a robot
    names = state["action_names"]
    if state["dataset"] == "droid":
        new_controls = functools.partial(Sliders, names, run.scaler.scale)
    else:
        recorded = in_recorded_units(real.actions.flatten(0, 1), run.scaler)
        limits = Limits.of(names, recorded, real.states.flatten(0, 1).cpu().numpy())
        new_controls = functools.partial(Keyboard, names, limits)
    return Playground(
        run=run,
        compose=states_from(compose, run.scaler, run.device),
        decoder=decoder,
        real=real,
        window=window,
        seconds=state["frames_per_step"] / state["fps"],
        new_controls=new_controls,
    )


class Shown(NamedTuple):
    """A step as it is shown."""

    # the clip that play started from, and steps since then: the start itself is step 0
    start: int
    step: int

    # JPEG; None without a decoder
    predicted: bytes | None

    # number of the nearest real step
    nearest: int

    # distance to real steps of other recordings, and how much patches differ: 1 is what real steps
    # usually have, None where that is 0
    distance: float | None
    structure: float | None

    # how far the action moved the prediction away from the one under rest, as a share of what
    # real steps change; None at the start
    gap: float | None


class Player:
    """One player's own play in a shared Playground."""

    def __init__(self, ground):
        self.ground = ground
        self.window = Window(ground.run, ground.compose, ground.window)
        self.controls = ground.new_controls()

        # what is filmed, and whether it is filmed now
        self.film = []
        self.is_filming = False

    def begin(self, clip):
        """Start from the first steps of a real clip, half a window at most -> Shown."""
        real = self.ground.real
        count = min((self.ground.window + 1) // 2, real.z.shape[1])
        self.window.begin(
            real.z[clip, :count], real.actions[clip, : count - 1], real.states[clip, :count]
        )
        self.group = real.groups[clip * real.z.shape[1]]
        following = real.actions[clip, count - 1]
        self.controls.begin(in_recorded_units(following, self.ground.run.scaler))
        self.start = clip
        self.step_number = 0
        return self.show(self.window.z[-1], None)

    def take(self):
        """What the player does now, and rest: scaled (2, A)."""
        state = self.window.states[-1].tolist()
        both = self.ground.run.scaler.transform(self.controls.take(state))
        return torch.from_numpy(both).float().to(self.window.z.device)

    def step(self, actions):
        """One step under the first of these actions; the second is rest -> Shown."""
        z, at_rest = self.window.step(actions)
        self.step_number += 1
        gap = (z - at_rest).abs().mean().item() / self.ground.real.change
        return self.show(z, gap)

    def show(self, z, gap):
        """Features (N, E) -> Shown."""
        predicted = None
        if self.ground.decoder is not None:
            predicted = jpeg_bytes(as_image(self.ground.decoder(z[None])[0]))
        real = self.ground.real
        nearest, distance = real.nearest(z, self.group)
        shown = Shown(
            start=self.start,
            step=self.step_number,
            predicted=predicted,
            nearest=nearest,
            distance=share(distance, real.usual_distance),
            structure=share(structure(z).item(), real.usual_structure),
            gap=gap,
        )
        if self.is_filming and not self.film_is_full():
            self.film.append(shown)
        return shown

    def start_film(self):
        """Film from the next step on; what was filmed before is forgotten."""
        self.film = []
        self.is_filming = True

    def film_is_full(self):
        """Whether the film has as many steps as a film may have."""
        return len(self.film) == LONGEST_FILM

    def take_film(self):
        """The end of filming: [Shown]."""
        film = self.film
        self.film = []
        self.is_filming = False
        return film


def film_of(film, ground):
    """[Shown] -> bytes of an mp4 at the speed of the run: what was predicted, beside the nearest
    real frame."""
    font = ImageFont.load_default(14)
    real = ground.real
    pages = []
    for shown in film:
        columns = []
        if shown.predicted is not None:
            image = np.array(Image.open(io.BytesIO(shown.predicted)))
            seconds = shown.step * ground.seconds
            columns.append(labelled(image, f"predicted  +{seconds:.1f} s", font))
        if real.frames:
            image = np.array(Image.open(io.BytesIO(real.frames[shown.nearest])))
            columns.append(labelled(image, "nearest real frame", font))
        pages.append(side_by_side(columns))
    return mp4_bytes(pages, 1 / Fraction(ground.seconds).limit_denominator(1000))
