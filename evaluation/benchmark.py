"""Can it plan? Tasks with goals given by picture: in ViZDoom on held-out maps, with a simulated
robot arm, or in Two Rooms of stable-worldmodel.

    python -m evaluation.benchmark --checkpoint out/lewm
    python -m evaluation.benchmark --checkpoint out/ac out/lewm --tasks turn --trials 20
    python -m evaluation.benchmark --checkpoint out/robot/base --tasks reach --encoder arm_tiny
    python -m evaluation.benchmark --checkpoint out/rooms --tasks rooms
    python -m evaluation.benchmark --compare a.json b.json

Reads runs of train_ac.py, train_lewm.py and train_lora.py; those on robot episodes move the arm of
prepare.robot. Each task is played with the plans of each run, with
random actions, at rest, repeating the last action, and by an oracle that knows true positions. All
play the same trials. Prints success at the end with 95 % intervals, and how much better a plan is
than the best policy without a model.

Writes one JSON file, after each task and policy. The same command again plays what is missing in
it. --compare prints the difference of two files trial by trial."""

import argparse
import math
import os

from evaluation.flags import Help, check_planner, planner_flags, search_options

# those of the game, of the arm, and of Two Rooms
GAME = ["turn", "walk", "turn-and-walk", "find-again"]
ARM = ["reach", "push"]
ROOMS = ["rooms", "rooms-far"]

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]

# of the file: raised when its fields change
FORMAT = 2


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that do not go together or make no plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )

    # what is judged
    flag = parser.add_argument_group("what is judged").add_argument
    flag("--checkpoint", nargs="+", metavar="RUN", help="run folders, or checkpoints")
    flag("--encoder", help="weights of the encoder (default: what each run used)")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what each was trained in)")
    flag("--compare", nargs=2, metavar="JSON", help="compare two files, and play nothing")

    # what is played
    flag = parser.add_argument_group("trials").add_argument
    tasks_help = "what to play (default: all of the game, or of the arm; never the rooms)"
    flag("--tasks", nargs="+", choices=GAME + ARM + ROOMS, help=tasks_help)
    flag("--trials", type=int, default=100, help="trials of a task")
    flag("--arm", default="a", choices=["a", "b"], help="arm and cameras, as prepare.robot --world")
    flag("--seed", type=int, default=0, help="seed of trials and samples")
    flag("--out", help="file to write (default: benchmark.json beside the first checkpoint)")
    maxnorm_help = "of the arm: metres a step along each axis (default: 0.2 a second, Meta's)"
    flag("--maxnorm", type=float, help=maxnorm_help)
    planner_flags(parser, [3], "steps ahead: one number, or one for each of --tasks")

    # what does not go together
    args = parser.parse_args()
    if bool(args.checkpoint) == bool(args.compare):
        parser.error("give --checkpoint to play, or --compare with two files")
    if args.trials < 1:
        parser.error(f"--trials {args.trials} plays nothing: at least 1")
    if args.maxnorm is not None and not 0 < args.maxnorm < math.inf:
        parser.error(f"--maxnorm {args.maxnorm} makes no plan: above 0, and finite")
    if args.tasks and len(args.horizon) not in (1, len(args.tasks)):
        parser.error(
            f"--horizon has {len(args.horizon)} numbers and --tasks {len(args.tasks)} names: give"
            " one number, or as many as tasks"
        )
    check_planner(parser, args)
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import contextlib
import json
import sys

import numpy as np

import checkpoint
from droid import compose_poses
from evaluation.closed_loop import (
    check_steps,
    chooser,
    oracle,
    planned,
    play_trials,
    random_actions,
    resting,
    same_action,
)
from evaluation.held_out import precision_text, states_from
from evaluation.runs import features_of_pictures, load_run
from evaluation.search import DROID_NORM, droid_space, vpt_space
from evaluation.trials import paired_difference, points, same_start, successes, wilson
from files.disk import write_atomically
from files.logs import count_text, to_json
from model import compose_states
from weights import encoder_hash

# policies that need no model: what a plan must be better than, or it has found nothing
TRIVIAL = ["random", "rest", "same action"]

# the share of trials in which the oracle must succeed, or the task is broken
FEASIBLE = 0.9


# --- the file ---


def read_results(path):
    """A file of this program -> its dictionary. FileNotFoundError if there is none, ValueError for
    another one."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of evaluation.benchmark")
    with open(path) as f:
        try:
            results = json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is no file of evaluation.benchmark: {e}") from e
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of evaluation.benchmark of this version")
    return results


def continued(path, settings):
    """What was played before with these settings, or nothing yet: the dictionary of a file.
    ValueError if the file has other settings: its numbers would mean something else."""
    if not os.path.exists(path):
        return {"format": FORMAT, "settings": settings, "tasks": {}}
    results = read_results(path)
    before = results["settings"]
    changed = [
        f"{name} {before.get(name)}, now {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} was played with {'; '.join(changed)}: give another --out, or the same flags"
        )
    return results


# --- tables ---


def plans_in(policies):
    """Names of the policies that a run planned."""
    return [name for name in policies if name.startswith("plan ")]


def best_trivial(at_end):
    """The policy without a model that succeeds most often. at_end: {policy: (trials,) bool}."""
    return max(TRIVIAL, key=lambda name: at_end[name].sum())


def print_task(name, task):
    """How the policies did in a task of the file, for a person. Returns sentences of doubt."""
    limits = task["limits"]
    policies = task["policies"]
    bar = " and ".join(f"{limit:g} {unit}" for unit, limit in limits.items())
    print(f"\n{name}: {count_text(task['steps'], 'step')}; success: within {bar} at the end")

    # a row for each policy
    width = max(map(len, policies))
    units = "".join(f"{unit + ' left':>16}" for unit in limits)
    print(f"{'policy':{width}}  success   95 %         at any time{units}  s a trial")
    at_end = {}
    for policy, played in policies.items():
        near = successes(played["tracks"], limits)
        at_end[policy] = near[:, -1]
        low, high = wilson(near[:, -1].sum(), len(near))

        # how far it is at the end, as a median: a trial gone astray is very far
        left = ""
        for track in played["tracks"].values():
            left += f"{np.median(np.array(track)[:, -1]):16.1f}"
        print(
            f"{policy:{width}}  {near[:, -1].mean():7.0%}   [{low:4.0%}, {high:4.0%}]"
            f"  {near.any(1).mean():11.0%}{left}  {played['seconds']:9.2f}"
        )

    # is a plan better than what needs no model? Only when all of those were played
    doubts = []
    if set(TRIVIAL) <= set(policies):
        best = best_trivial(at_end)
        for plan in plans_in(policies):
            difference = paired_difference(at_end[plan], at_end[best])
            print(f"{plan} - {best}: {points(*difference)}")
            if not difference[1] > 0:
                doubts.append(f"{plan} in {name}")
    if "oracle" in at_end and at_end["oracle"].mean() < FEASIBLE:
        print(f"WARNING: the oracle fails too: {name} is broken, whatever the plans do")
    return doubts


def print_comparison(paths):
    """How the plans of two files differ, trial by trial. ValueError if they did not play the same
    trials."""
    files = [read_results(path) for path in paths]
    for name in ("world", "seed", "trials"):
        one, other = (results["settings"][name] for results in files)
        if one != other:
            raise ValueError(
                f"{paths[0]} has {name} {one} and {paths[1]} {other}: only the same trials can be"
                " compared"
            )
    one, other = (results["tasks"] for results in files)
    common = [name for name in one if name in other]
    if not common:
        raise ValueError(f"{paths[0]} and {paths[1]} have no task in common")

    # every plan of the one with every plan of the other
    trials = count_text(files[0]["settings"]["trials"], "trial")
    print(f"success of the first - of the second, {trials}, 95 %")
    for name in common:
        limits = one[name]["limits"]
        if limits != other[name]["limits"]:
            raise ValueError(
                f"{name} needs {limits} in {paths[0]} and {other[name]['limits']} in {paths[1]}"
            )
        for a in plans_in(one[name]["policies"]):
            for b in plans_in(other[name]["policies"]):
                tracks = [one[name]["policies"][a]["tracks"], other[name]["policies"][b]["tracks"]]
                apart = same_start(*tracks)
                if apart is not None:
                    raise ValueError(
                        f"trial {apart} of {name} begins elsewhere in {paths[1]} than in"
                        f" {paths[0]}: play both with the same version"
                    )
                ends = [successes(track, limits)[:, -1] for track in tracks]
                rates = " - ".join(f"{end.mean():.0%}" for end in ends)
                print(f"{name:14} {a} - {b}: {rates} = {points(*paired_difference(*ends))}")


# --- a world, and how a run plans in it ---


def check_runs(runs, same):
    """ValueError for runs that cannot play the same trials. same: what they must have in common,
    by its name in a checkpoint or in its settings."""
    first = runs[0]
    for run in runs:
        for name in same:
            values = [{**r.settings, **r.state}.get(name) for r in (run, first)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{run.path} has {name} {values[0]}, {first.path} {values[1]}: play them into"
                    " two files, and --compare those"
                )


def game_arena(runs, args):
    """The game for these Runs -> (context manager of its World, seconds of a step, settings for the
    file). ValueError for runs that cannot play it."""
    # ViZDoom is needed here only
    from evaluation.doom import check_playable, open_doom

    for run in runs:
        check_playable(run.state, run.path)
    check_runs(runs, ["fps", "frames_per_step", "action_names"])

    # what random actions are depends on the scaler, and on the planner's bounds
    state = runs[0].state
    settings = {
        "action_names": state["action_names"],
        "scaler_hash": runs[0].scaler.hash,
        "reach": args.reach,
        "keys": args.keys,
    }
    seconds_of_step = state["frames_per_step"] / state["fps"]
    return open_doom(state, args.seed), seconds_of_step, {"world": "doom", **settings}


def arm_arena(runs, args):
    """`game_arena` for the arm: its actions are metres, whatever the scaler."""
    # MuJoCo is needed here only
    from evaluation.robot import RATE, Arm, check_arm, stride_of_arm

    for run in runs:
        check_arm(run.state, run.path)
    check_runs(runs, ["fps", "stride", "cameras"])

    settings = runs[0].settings
    stride = stride_of_arm(settings)
    seconds_of_step = stride / RATE

    # as Meta's planner, which has 4 steps a second
    if args.maxnorm is None:
        args.maxnorm = 4 * DROID_NORM * seconds_of_step
    arm = Arm(args.arm, settings["cameras"][0], stride, args.maxnorm)
    settings = {"world": arm.name, "camera": arm.camera, "maxnorm": args.maxnorm}
    return contextlib.nullcontext(arm), seconds_of_step, settings


def rooms_arena(runs, args):
    """`game_arena` for Two Rooms of stable-worldmodel."""
    from evaluation.rooms import FPS, Rooms, check_rooms

    for run in runs:
        check_rooms(run.state, run.path)
    check_runs(runs, ["fps", "action_names"])

    state = runs[0].state
    rooms = Rooms(state["action_names"], round(FPS / state["fps"]))
    settings = {"world": rooms.name, "action_names": state["action_names"], "keys": args.keys}
    settings |= {"scaler_hash": runs[0].scaler.hash, "reach": args.reach}
    return contextlib.nullcontext(rooms), 1 / state["fps"], settings


def space_for(run, task, args):
    """The Space of a run's actions in a task. args: flags of the planner."""
    # neither task of the arm needs the gripper
    if run.state["dataset"] == "droid":
        return droid_space(run.scaler, args.maxnorm, grips=False)

    # in the units of the run: a std of mouse motion is that of what it was trained on
    keys = args.keys or task.keys
    return vpt_space(run.state["action_names"], run.scaler, keys, args.reach)


def plan_policy(run, features, space, horizon, args):
    """The Policy that plans with a Run. features: of features_of_pictures; args: flags of the
    planner."""
    compose = compose_poses if run.state["dataset"] == "droid" else compose_states
    choose = chooser(
        run.predictor,
        space,
        states_from(compose, run.scaler, run.device),
        horizon,
        args.context,
        args.chunk,
        search_options(args),
        run.autocast,
        args.energy,
    )
    return planned(choose, features, run.scaler)


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # --- two files ---
    if args.compare:
        print_comparison(args.compare)
        sys.exit()

    # --- runs ---
    runs = {}
    for path in args.checkpoint:
        run = load_run(path, args.dtype)
        runs[f"plan {os.path.normpath(path)}"] = run
        print(f"{run.path}: {precision_text(run.dtype, run.device, run.predictor, args.context)}")
    first = next(iter(runs.values()))

    # the game or the arm, as the first run was trained, or the rooms if they are asked for; others
    # are refused there
    robot = first.state["dataset"] == "droid"
    args.tasks = args.tasks or (ARM if robot else GAME)
    open_arena = arm_arena if robot else game_arena
    trials_are_on = "scenes of their own" if robot else "held-out maps"
    if args.tasks[0] in ROOMS:
        open_arena = rooms_arena
        trials_are_on = "episodes of their own"
    arena, seconds_of_step, settings = open_arena(list(runs.values()), args)

    # --- resume ---
    # what the numbers depend on: a file holds results of one setting
    settings |= {
        "seed": args.seed,
        "trials": args.trials,
        "seconds_of_step": seconds_of_step,
        "context": args.context,
        "energy": args.energy,
        **search_options(args),
    }
    file = args.out or os.path.join(os.path.dirname(first.path), "benchmark.json")
    results = continued(file, settings)

    with arena as world:
        # --- policies ---
        # what cannot be played shows before encoders are opened and the first task is played
        horizons = dict(zip(args.tasks, args.horizon * len(args.tasks)))
        for name in args.tasks:
            if name not in world.tasks:
                raise ValueError(
                    f"--tasks {name} is not in the world of {first.path}, which has"
                    f" {' '.join(world.tasks)}"
                )
            for run in runs.values():
                check_steps(run.state, args.context, horizons[name])
            needed = args.keys or world.tasks[name].keys
            lacking = [key for key in needed if key not in first.state["action_names"]]
            if lacking:
                raise ValueError(
                    f"{name} needs {' '.join(lacking)}, which the actions of {first.path} lack:"
                    " leave it out of --tasks"
                )

        # an encoder is opened once for all tasks
        features_of = {plan: features_of_pictures(run, args.encoder) for plan, run in runs.items()}
        policies_of = {}
        for name in args.tasks:
            space = space_for(first, world.tasks[name], args)
            policies_of[name] = {
                "random": random_actions(space, first.scaler),
                "rest": resting(space, first.scaler),
                "same action": same_action(space, first.scaler),
                "oracle": oracle(),
            }
            for plan, run in runs.items():
                own_space = space_for(run, world.tasks[name], args)
                policies_of[name][plan] = plan_policy(
                    run, features_of[plan], own_space, horizons[name], args
                )

        # --- play ---
        for name, policies in policies_of.items():
            task = world.tasks[name]

            # a task's results so far, plans last: the oracle and the bar are known early
            steps = round(task.seconds / seconds_of_step)
            results_of_task = results["tasks"].setdefault(
                name, {"limits": task.limits, "steps": steps, "policies": {}}
            )
            for policy in policies:
                # which model planned, and how far ahead
                identity = {}
                if policy in runs:
                    weights = encoder_hash(runs[policy].predictor)
                    identity = {"horizon": horizons[name], "predictor": weights}
                    identity["dtype"] = runs[policy].dtype

                # a file of before may have it
                played = results_of_task["policies"].get(policy)
                if played is not None:
                    if played["identity"] != identity:
                        raise ValueError(
                            f"{file} has {policy} in {name} with {played['identity']}, now it is"
                            f" {identity}: give another --out"
                        )
                    continue

                # play, and write it whatever comes next
                tracks, seconds = play_trials(
                    world, name, policies[policy], args.seed, args.trials, steps, f"{name} {policy}"
                )
                results_of_task["policies"][policy] = {
                    "identity": identity,
                    "seconds": seconds,
                    "tracks": tracks,
                }
                write_atomically(file, to_json(results).encode())

    # --- report ---
    print(
        f"{count_text(args.trials, 'trial')} of each task on {trials_are_on}; same action: a random"
    )
    print("one, repeated; left: median distance at the end")
    doubts = []
    for name in args.tasks:
        doubts += print_task(name, results["tasks"][name])

    # no success rate without its interval
    if doubts:
        print(
            "\nWARNING: not shown to be better than the best policy without a model (the interval"
            f" is not above 0): {', '.join(doubts)}"
        )
    print(
        f"\nwritten to {file}; compare two: python -m evaluation.benchmark --compare {file} OTHER"
    )
