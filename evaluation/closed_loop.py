"""Planning in closed loop: act, look, plan again, until the trial ends. Nothing here knows of a
game or a robot: those are worlds.

A world begins a trial, does an action, and says what is seen and how far the goal is. A policy
chooses the actions. It is a function of (world, generator) that starts a trial and returns `act`, a
function that returns the next action. An action (A,) is in the units of recordings: pixels, radians
and keys of 0 or 1, or metres."""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from evaluation.search import draw, energy, rest, search
from files.progress import tqdm
from files.vpt import wrap

# --- what a world is ---


class Task(NamedTuple):
    """What is to be reached in a trial."""

    # {unit: the trial succeeds if it ends nearer than this}, for every unit
    limits: dict

    # how long a trial lasts
    seconds: float

    # names of keys that may be pressed, where nothing else is asked for
    keys: tuple = ()


class World:
    """What the harness needs of a game, a simulator or a robot. Subclasses say how."""

    # for files: results of one world are not compared with those of another
    name = ""

    # {name: Task}
    tasks = {}

    # what `seen` would give at the goal, set by `begin`
    goal = None

    # whether the trial has ended early: then nothing moves any more
    ended = False

    def begin(self, task, seed, trial, look=True):
        """Begin a trial of a task (its name). It depends on these numbers alone, so that all
        policies begin alike. Afterwards a first step has been seen. look=False: nobody will ask
        what is seen, so no picture need be made."""
        raise NotImplementedError

    def act(self, action):
        """One step: do an action (A,), in the units of recordings."""
        raise NotImplementedError

    def seen(self):
        """Pictures of the last step, as many as the run has in a step, the latest last: arrays (H,
        W, 3) uint8 or av.VideoFrames."""
        raise NotImplementedError

    def state(self):
        """State (S,) after the last step, as recordings have it: of play yaw and pitch in radians,
        positive to the right and down."""
        raise NotImplementedError

    def distance(self):
        """{unit: how far the goal is}, for each limit of the task. Only the judge knows it."""
        raise NotImplementedError

    def oracle(self):
        """The action (A,) of one who knows where everything is."""
        raise NotImplementedError


# --- policies ---


class Policy(NamedTuple):
    """How actions are chosen, and whether that needs pictures."""

    begin: Callable
    looks: bool = False


def in_recorded_units(action, scaler):
    """A scaled action (..., A) as a world takes it, float64."""
    action = action.double().cpu().numpy()
    continuous = len(scaler.mean)
    action[..., :continuous] = action[..., :continuous] * scaler.scale + scaler.mean
    return action


def resting(space, scaler):
    """Does nothing: what a model that copies the last step does, because no action helps."""
    still = in_recorded_units(rest(space, 1)[0], scaler)
    return Policy(lambda world, generator: lambda: still)


def random_actions(space, scaler):
    """Draws every action as a search draws its first candidates."""

    def begin(world, generator):
        return lambda: in_recorded_units(draw(space, 1, 1, generator)[0, 0], scaler)

    return Policy(begin)


def same_action(space, scaler):
    """Repeats the last action that was done. The first one is random, because every trial begins
    at rest and rest would be repeated."""

    def begin(world, generator):
        first = in_recorded_units(draw(space, 1, 1, generator)[0, 0], scaler)
        return lambda: first

    return Policy(begin)


def oracle():
    """Knows true positions: shows that the task can be done."""
    return Policy(lambda world, generator: world.oracle)


def planned(choose, features, scaler):
    """Plans before every step, and does the first action of the plan. choose: of `chooser`;
    features: from pictures of a step to (N, E)."""

    def begin(world, generator):
        goal = features(world.goal)
        # everything since the trial began: a plan may look back as far as it likes
        seen, done = [], []

        def act():
            # what is seen now corrects what was expected
            seen.append((features(world.seen()), world.state()))
            plan = choose(seen, done, goal, generator)
            done.append(plan[:1].cpu())
            return in_recorded_units(plan[0], scaler)

        return act

    return Policy(begin, looks=True)


def seen_from_first(states):
    """States (1, c, S) as a clip that begins with the first of them has them: the yaw of VPT
    states (yaw, pitch) counts from there, a robot's pose stays."""
    if states.shape[-1] != 2:
        return states

    # a turn over the half circle is a small one the other way, and in float64 the difference of
    # two angles keeps its digits
    yaw = wrap((states[..., 0] - states[:, :1, 0]).cpu().double().numpy())
    return torch.stack([torch.from_numpy(yaw).to(states), states[..., 1]], dim=-1)


def chooser(
    predictor,
    space,
    compose,
    horizon,
    context,
    chunk,
    options,
    autocast=contextlib.nullcontext,
    measure="distance",
):
    """For `planned`: a function choose(seen, done, goal, generator) -> scaled actions (H, A).

    seen: [(z (N, E), state (S,))] of the steps until now; done: the scaled actions [(1, A)] between
    them. It plans from the last `context` steps, and rests when the plan promises no less than
    resting does."""

    def choose(seen, done, goal, generator):
        # the past
        z, states = zip(*seen[-context:])
        states = torch.from_numpy(np.stack(states))[None]
        states = seen_from_first(states).float()

        # what was done between the steps that the predictor sees, on the CPU as it was sent
        still = rest(space, horizon, goal.device)
        all_done = torch.cat([still[:0].cpu(), *done])
        actions = all_done[len(done) + 1 - len(z) :]

        # the plan, from here to the goal
        # a cosine does not say how near a plan comes: whether to follow it is judged by distance
        rest_measure = "distance" if measure == "direction" else measure
        costs = {}
        for name in {measure, rest_measure}:
            costs[name] = energy(
                predictor,
                torch.stack(z)[None],
                actions[None].to(goal),
                states.to(goal),
                goal,
                compose,
                chunk,
                autocast=autocast,
                measure=name,
                still=still,
            )
        plan = search(
            costs[measure], space, horizon, generator=generator, device=goal.device, **options
        )

        # a plan that does not come nearer is not followed: at the goal it is best to rest, and
        # there no direction is better than another. Both are predictions, because a predicted step
        # is never exactly what will be seen
        after_plan, after_rest = costs[rest_measure](torch.stack([plan, still])).tolist()
        return plan if after_plan < after_rest else still

    return choose


def check_steps(state, context, horizon):
    """ValueError for a plan that is longer than the clips that a run was trained on: its predictor
    has never seen more steps. state: of the checkpoint."""
    steps = state["frames_per_clip"] // state["frames_per_step"]
    if context + horizon > steps:
        raise ValueError(
            f"--context {context} and --horizon {horizon} are more steps than the clips of this"
            f" run have: {steps}"
        )


# --- trials ---


def play_trials(world, task, policy, seed, trials, steps, title):
    """Trials of a task with a policy -> ({unit: (trials, steps + 1) distances after 0, 1, ...
    steps}, seconds of a trial). Shows progress under `title`."""
    tracks = {unit: [] for unit in world.tasks[task].limits}
    began = time.monotonic()
    for trial in tqdm(range(trials), unit=" trials", desc=title):
        # the same place and goal for every policy, and the same draws whatever was done before
        world.begin(task, seed, trial, policy.looks)
        number = np.random.SeedSequence([seed, trial]).generate_state(1)[0]
        act = policy.begin(world, torch.Generator().manual_seed(int(number)))

        # the distances after each step
        distances = [world.distance()]
        for _ in range(steps):
            if not world.ended:
                world.act(act())
            distances.append(world.distance())
        for unit, track in tracks.items():
            track.append([round(d[unit], 3) for d in distances])
    return tracks, (time.monotonic() - began) / trials
