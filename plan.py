"""Plan in latent space: which actions lead from here to a goal? Cross-entropy method (CEM) or MPPI
on a trained predictor.

Recorded: are the recorded actions found?

    python plan.py --checkpoint out/demo --data 'demo/features/val/*.tar'

The energy around eight of them, as a picture:

    python plan.py --checkpoint out/demo --data 'demo/features/val/*.tar' --landscape 8

Between two pictures:

    python plan.py --checkpoint out/demo --encoder doom_tiny --start a.png --goal b.png

Closed loop in ViZDoom, on held-out maps:

    python plan.py --checkpoint out/demo --encoder doom_tiny --play turn --trials 50

Reads a run of train_ac.py, train_lewm.py or train_lora.py. The energy of a candidate is the mean
|difference| between the layer-normed features predicted for its last step and the goal's; all
candidates share the keys and values of the past (KV cache). Prints a table and writes plan.json
beside the checkpoint."""

import argparse
import math

from evaluation.flags import Help, check_planner, planner_flags, search_options

# names of torch, which is not imported yet
DTYPES = ["float32", "bfloat16", "float16"]


# --- flags ---


def parse_flags():
    """The flags. Ends the program for those that do not go together or make no plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
    )
    repeated = {"nargs": "+", "action": "append"}

    # which model plans, and how it is seeded
    flag = parser.add_argument_group("run").add_argument
    flag("--checkpoint", required=True, help="a run folder, or one of its checkpoints")
    flag("--encoder", help="weights of the encoder, for pictures (default: what the run used)")
    flag("--dtype", choices=DTYPES, help="autocast precision (default: what the run trained in)")
    flag("--seed", type=int, default=0, help="seed of trials and samples")
    flag("--out", help="file to write (default: plan.json, plan-pictures.json or plan-turn.json)")

    # where: three ways to judge it
    flag = parser.add_argument_group("plan in recordings").add_argument
    flag("--data", "--data_path", **repeated, help="held-out data (default: the run's)")
    flag("--clips", type=int, default=100, help="clips to plan in")
    landscape_help = "draw the energy around the actions of so many clips, and plan nothing"
    flag("--landscape", type=int, default=0, metavar="CLIPS", help=landscape_help)

    flag = parser.add_argument_group("plan between two pictures").add_argument
    flag("--start", metavar="IMAGE", help="plan from this picture to --goal")
    flag("--goal", metavar="IMAGE", help="picture of the goal")
    flag("--state", type=float, nargs="+", help="yaw, pitch (rad) or pose at --start (default: 0)")

    flag = parser.add_argument_group("plan in ViZDoom").add_argument
    play_help = "closed loop: turn to a view, or walk to a place"
    flag("--play", choices=["turn", "walk"], help=play_help)
    flag("--trials", type=int, default=50, help="trials to play")
    flag("--steps", type=int, default=8, help="steps of a trial")

    # the planner: what may be done, and the search
    flag = parser.add_argument_group("robots").add_argument
    flag("--maxnorm", type=float, default=0.05, help="metres a step along each axis")
    planner_flags(parser, [1, 3], "steps ahead; --play: the first")

    # what does not go together
    args = parser.parse_args()

    # a picture to start from and one to reach
    if (args.start is None) != (args.goal is None):
        parser.error("--start and --goal go together")
    if args.state is not None and not args.start:
        parser.error("--state is that of the picture --start: name it, or drop --state")
    if not all(map(math.isfinite, args.state or [])):
        parser.error(f"--state {' '.join(map(str, args.state))}: give finite numbers")
    if args.start and args.energy != "distance":
        parser.error("--start prints distances: leave --energy out")
    if args.start and args.play:
        parser.error("--start and --play do not go together: plan to a picture, or in the game")

    # what makes no plan: one check, one message
    for name in ("trials", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} makes no plan: at least 1")
    if args.landscape < 0:
        parser.error(f"--landscape {args.landscape} draws nothing: at least 1")
    if args.landscape and (args.start or args.play):
        parser.error("--landscape is of recordings: leave --start and --play out")
    if args.landscape and args.energy != "distance":
        parser.error(f"--landscape draws distances: leave --energy {args.energy} out")
    # one clip has no interval
    if args.clips < 2:
        parser.error(f"--clips {args.clips} makes no plan: at least 2")
    if not 0 < args.maxnorm < math.inf:
        parser.error(f"--maxnorm {args.maxnorm} makes no plan: above 0, and finite")
    check_planner(parser, args)
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = parse_flags()

import contextlib
import os
import sys

import numpy as np
import torch

import checkpoint
from data import collate, windows
from droid import POSE, compose_poses
from evaluation.closed_loop import (
    check_steps,
    chooser,
    planned,
    play_trials,
    random_actions,
    resting,
    seen_from_first,
)
from evaluation.held_out import (
    interval_text,
    precision_text,
    ratio_interval,
    recording_of,
    states_from,
)
from evaluation.landscape import distances, landscape, motion_pairs
from evaluation.landscape import draw as draw_landscapes
from evaluation.runs import features_of_pictures, load_run, open_held_out, print_left_out
from evaluation.search import draw, droid_space, energy, rest, search, vpt_space
from files.disk import write_atomically
from files.logs import count_text, to_json
from files.progress import tqdm
from files.video import open_video
from files.vpt import SLOTS
from model import compose_states

# policies that need no model: what a plan must be better than, or it has found nothing
TRIVIAL = {
    "rest": "doing nothing",
    "repeat": "repeating the last action",
    "mean": "the mean action",
}


# --- plans in recordings ---


def recorded(
    predictor,
    dataset,
    features_of,
    compose,
    space_of,
    horizon,
    context,
    clips,
    chunk,
    generator,
    options,
    autocast=contextlib.nullcontext,
    measure="distance",
):
    """Plans in held-out clips to the features `horizon` steps later -> sums over the horizon of the
    continuous actions, unscaled: (n, 5, d) as recorded, as planned, and of the policies that need
    no model, in the order of TRIVIAL; mean |random draw - recorded| of 64 draws (n, d);
    [recording].

    Plans start from step `context` of a clip. With a context of one step they start from the second
    one where the clip is long enough: before the first no action is known that could be repeated
    (nan)."""
    # motion is compared in its units, because stds would hide how much it is
    scaler = dataset.reader.scaler
    mean = torch.tensor(scaler.mean, dtype=torch.float32)
    scale = torch.tensor(scaler.scale, dtype=torch.float32)
    sums, random = [], []
    recordings = []
    items = sum(windows(dataset, 1, clips), [])

    # clip by clip: each has its own goal, and a search of its own
    for item in tqdm(items, unit=" clips", desc=f"horizon {horizon}"):
        batch = collate([dataset[item]])
        z, actions, states = features_of(batch)

        # the step to plan from, and the first one that the predictor sees. Before the first step
        # of a clip no action is known, so the second one is better where there is one
        last = context - 1
        if last == 0 and z.shape[1] > horizon + 1:
            last = 1
        first = last + 1 - context

        # the plan, to the features of the recorded step: the actions that led there are known
        device = z.device
        space = space_of(actions[0, last])
        cost = energy(
            predictor,
            z[:, first : last + 1],
            actions[:, first:last],
            seen_from_first(states[:, first : last + 1]),
            z[0, last + horizon],
            compose,
            chunk,
            autocast=autocast,
            measure=measure,
            still=rest(space, horizon, device),
        )
        plan = search(cost, space, horizon, generator=generator, device=device, **options)

        # the recorded actions, the plan, the trivial policies in the order of TRIVIAL, and random
        # draws, whose mean says how hard the task is
        before = actions[0, last - 1] if last else torch.full_like(actions[0, 0], math.nan)
        every = [
            actions[0, last : last + horizon],
            plan,
            rest(space, horizon, device),
            before.expand(horizon, -1),
            torch.zeros_like(plan),  # scaled actions have mean 0
        ]
        every += draw(space, 64, horizon, generator, device, options["correlation"])

        # compared are sums over the horizon: where a plan ends matters, not how it gets there
        total = (torch.stack(every)[..., : len(mean)].cpu() * scale + mean).sum(1)
        sums.append(total[:5])
        random.append((total[5:] - total[0]).abs().mean(0))

        # not always the recording of the item: if that is damaged, another one was read
        recordings.append(recording_of(batch["key"][0], batch))
    return torch.stack(sums), torch.stack(random), recordings


def compared(errors, recordings):
    """How plans compare. errors {policy: (n,) |sum - recorded|} of "plan", "random" and TRIVIAL ->
    their means, and error of the policy / error of the plan with its 95 % interval over recordings:
    "ratios" {policy: [ratio, low, high]}, and "best", the policy without a model that does best."""
    means = {k: x.double().mean().item() for k, x in errors.items()}

    # how many times worse than the plan each of the others is; above 1 the plan helps
    ratios = {}
    for name in errors:
        if name == "plan":
            continue
        low, high = ratio_interval(errors[name], errors["plan"], recordings)
        ratio = means[name] / means["plan"] if means["plan"] else math.nan
        ratios[name] = [ratio, low.item(), high.item()]

    # the first action of a clip has none before it that could be repeated
    usable = [k for k in TRIVIAL if not math.isnan(means[k])]
    return means | {"ratios": ratios, "best": min(usable, key=means.get)}


def plan_in_recordings(plan_in_clips, horizons, robot):
    """Plan in recorded clips for each horizon, and print how plans compare -> rows of the report.
    plan_in_clips(horizon) returns what `recorded` does."""
    # dimensions that are shown: name, place among the actions, factor and unit; keys and a
    # robot's rotation are left out
    if robot:
        shown = [(name, i, 100.0, "cm") for i, name in enumerate("xyz")]
    else:
        degrees = 180 / math.pi
        shown = [("yaw", 2, degrees, "deg"), ("pitch", 3, degrees, "deg")]

    # for the report, for a person, and where the model is not shown to help
    rows, lines = [], []
    doubts = []
    for horizon in horizons:
        sums, random, recordings = plan_in_clips(horizon)

        # a row for each dimension: how far the sum over the horizon is off what was recorded
        for name, i, unit, symbol in shown:
            # how far the plan is off, a random draw and the policies that need no model
            off = unit * (sums[:, 1:, i] - sums[:, :1, i]).abs()
            errors = {"plan": off[:, 0], "random": unit * random[:, i]}
            errors |= {policy: off[:, k] for k, policy in enumerate(TRIVIAL, 1)}
            row = compared(errors, recordings)
            rows.append({"horizon": horizon, "dim": name, "unit": symbol} | row)

            # the bar is the best policy that needs no model, for this dimension and horizon
            ratio = row["ratios"][row["best"]]
            interval = interval_text(ratio[1], ratio[2], recordings, ".2f")
            numbers = "".join(f" {row[k]:8.2f}" for k in errors)
            lines.append(
                f"{horizon:7d}  {name:6} {symbol:4}{numbers}    {ratio[0]:.2f} {interval}"
                f" {row['best']}"
            )
            if not ratio[1] > 1:  # a nan is in doubt too
                doubts.append(f"{name} at horizon {horizon}")

    print(
        f"plans in {count_text(len(recordings), 'clip')} of"
        f" {count_text(len(set(recordings)), 'recording')}; mean |sum - recorded|, lower is better"
    )

    # what the columns are, then the table: a ratio alone would not say how hard the task is
    print("without a model: " + ", ".join(f"{k} ({v})" for k, v in TRIVIAL.items()))
    columns = "".join(f"{k:>9}" for k in errors)
    print(f"horizon  of     unit{columns}    best of those / plan, 95 % over recordings")
    print(*lines, sep="\n")

    # no ratio without its interval
    if doubts:
        print(
            "WARNING: not shown to be better than the best policy without a model (the interval is"
            f" not above 1): {', '.join(doubts)}"
        )
    return rows


def landscapes_in_recordings(predictor, dataset, features_of, compose, pairs, clips, autocast):
    """Landscapes of the first step of `clips` clips: a row for each pair of motions, which share
    their clips."""
    rows = [[] for _ in pairs]
    items = sum(windows(dataset, 1, clips), [])
    for item in tqdm(items, unit=" clips", desc="landscape"):
        z, actions, states = features_of(collate([dataset[item]]))

        # from the first step to the second, of which the action is known
        cost = energy(
            predictor,
            z[:, :1],
            actions[:, :0],
            seen_from_first(states[:, :1]),
            z[0, 1],
            compose,
            autocast=autocast,
        )
        for row, pair in zip(rows, pairs):
            row.append(landscape(cost, actions[0, 0], pair, dataset.reader.scaler))
    return rows


def report_landscapes(rows, file):
    """Draw rows of Landscapes to a file, and print how far their lowest energies are off -> rows of
    the report."""
    draw_landscapes(rows, file)
    report = []
    for row in rows:
        off, still = distances(row)
        first, second = row[0].motions
        print(
            f"{first.name} and {second.name}: the lowest energy is {np.median(off):.1f}"
            f" {first.unit} from the recorded action (median of {count_text(len(off), 'clip')}),"
            f" no motion {np.median(still):.1f}; nearer in {(off < still).mean():.0%}"
        )
        report.append({"of": [first.name, second.name], "off": off, "still": still})
    print(f"drawn in {file}")
    return [{k: v if k == "of" else v.tolist() for k, v in x.items()} for x in report]


# --- plans between pictures, and in the game ---


def readable(actions, scaler, names):
    """Scaled VPT actions (H, A) -> [(dx, dy in pixels, yaw, pitch in degrees, [keys that are
    pressed])]."""
    # motion in pixels and degrees, from what the predictor takes back to what was recorded
    moves = actions[:, :4].cpu().double().numpy() * scaler.scale + scaler.mean

    # keys are pressed where their value is exactly 1
    rows = []
    for move, action in zip(moves, actions.tolist()):
        pressed = []
        for name, value in zip(names, action):
            if value == 1 and name.startswith(("key.", "mouse.")):
                pressed.append(name.removeprefix("key."))
        rows.append((*move[:2].round(), *np.degrees(move[2:]), pressed))
    return rows


def read_pictures(paths):
    """Image files -> [av.VideoFrame]. ValueError for what is no image, or if their sizes differ."""
    # a picture is a video of one frame: what PyAV decodes, PNG and JPEG among others, serves
    frames = []
    for path in paths:
        try:
            # what decodes as a frame is an image
            with open_video(path) as container:
                frames.append(next(container.decode(video=0)))
        except (ValueError, StopIteration) as e:
            raise ValueError(f"{path} cannot be read as an image: {e}") from e

    # pictures of different cameras have no common plan, whatever the features say
    sizes = {(f.width, f.height) for f in frames}
    if len(sizes) > 1:
        raise ValueError(
            f"{' and '.join(paths)} have different sizes {sorted(sizes)}: take both with the same"
            " camera"
        )
    return frames


@torch.no_grad()
def plan_between(now, goal, space, cost, horizon, generator, options):
    """The plan from the features of one picture to those of another -> (scaled actions (H, A),
    distances for the report). Prints the distances."""
    plan = search(cost, space, horizon, generator=generator, device=now.device, **options)

    # is it better than doing nothing, and than where we are? Doing nothing may be better than both,
    # because a predicted step is never exactly a recorded one
    still = rest(space, len(plan), now.device)
    after_plan, after_rest = cost(torch.stack([plan, still])).tolist()
    distance = (now - goal).abs().mean().item()
    print(
        f"distance to the goal (mean |difference| of features): now {distance:.4f}, expected after"
        f" the plan {after_plan:.4f}, after doing nothing {after_rest:.4f}"
    )

    # then there is nothing to expect of it, and the reader must know
    if not after_plan < distance:
        print(
            "WARNING: no plan promises to come nearer than it is now: the pictures may be too far"
            " apart, or there already"
        )
    return plan, {"energy": after_plan, "energy_at_rest": after_rest, "energy_now": distance}


def robot_plan(plan, scaler, names):
    """A plan (H, 7) in metres and radians, as a list; prints it."""
    # back from stds to metres and radians, which a controller takes
    device = plan.device
    mean = torch.tensor(scaler.mean, dtype=torch.float32, device=device)
    scale = torch.tensor(scaler.scale, dtype=torch.float32, device=device)
    moves = plan * scale + mean

    # as Meta's planner does: a gripper that is half told to move stays
    moves[:, 6] *= moves[:, 6].abs() >= 0.25

    # a row for each step
    rows = moves.tolist()
    print("step " + "".join(f"{n:>9}" for n in names))
    for i, action in enumerate(rows):
        print(f"{i:4d} " + "".join(f"{x:9.4f}" for x in action))
    return rows


def play_plan(plan, scaler, names):
    """A plan (H, A) in pixels, degrees and keys, as `readable` gives it; prints it."""
    rows = readable(plan, scaler, names)

    # a row for each step, as a person would play it
    print("step  dx px  dy px  yaw deg  pitch deg  keys")
    for i, (dx, dy, yaw, pitch, pressed) in enumerate(rows):
        keys = " ".join(pressed) or "-"
        print(f"{i:4d} {dx:+7.0f}{dy:+7.0f}{yaw:+9.1f}{pitch:+11.1f}  {keys}")
    return rows


def print_trials(distances, task, unit, success):
    """How policies did, for a person. distances: {policy: [distances after 0, 1, ... steps of each
    trial]}, in this unit; below `success` a trial succeeds."""
    trials = count_text(len(next(iter(distances.values()))), "trial")
    print(f"{task}: {trials} on held-out maps; success: within {success} {unit} at the end")

    # a row for each policy
    print(
        f"policy   success   {unit} at the start, at the end: mean, median   success after 1, 2,"
        " ... steps"
    )
    for policy, tracks in distances.items():
        # distances (trials, steps + 1): the first is before anything was done, and shows that all
        # policies began alike
        tracks = np.array(tracks)
        start = tracks[:, 0]
        end = tracks[:, -1]

        # how soon it is there
        by_step = " ".join(f"{x:4.0%}" for x in (tracks[:, 1:] < success).mean(0))
        print(
            f"{policy:8} {(end < success).mean():7.0%} {start.mean():12.1f} {end.mean():9.1f}"
            f" {np.median(end):9.1f}   {by_step}"
        )


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # --- run ---
    run = load_run(args.checkpoint, args.dtype)
    predictor = run.predictor
    state = run.state
    scaler = run.scaler
    device = run.device
    names = state["action_names"]
    robot = state["dataset"] == "droid"

    # a landscape is of one step
    if not args.landscape:
        check_steps(state, args.context, max(args.horizon))
    if robot and names != POSE:
        raise ValueError(
            f"this run's actions are {' '.join(names)}: plan.py knows those of VPT and"
            f" {' '.join(POSE)}"
        )
    report = vars(args) | {"dtype": run.dtype}
    print(f"{run.path}: {precision_text(run.dtype, device, predictor, args.context)}")

    # --- what is searched, and how ---
    # fewer keys are easier to search: those that the task needs
    keys = args.keys
    if args.play:
        from evaluation.doom import TASKS, check_playable, open_doom  # ViZDoom is needed here only

        check_playable(state, run.path)
        task = TASKS[args.play]
        keys = keys or task.keys

    # how states follow from actions, as in training
    compose = states_from(compose_poses if robot else compose_states, scaler, device)
    generator = torch.Generator().manual_seed(args.seed)

    options = search_options(args)

    def space_of(action=None):
        """What may be done where this action was recorded: the hotbar stays as it is."""
        if robot:
            return droid_space(scaler, args.maxnorm)

        # one slot is always open: the recorded one, or the first
        slot = 0
        for i, name in enumerate(SLOTS):
            if action is not None and name in names and action[names.index(name)] == 1:
                slot = i
        return vpt_space(names, scaler, keys, args.reach, slot)

    # pictures need the encoder; recordings of features do not, and open_held_out opens its own
    if args.start or args.play:
        features = features_of_pictures(run, args.encoder)

    # --- between two pictures ---
    if args.start:
        if args.state and len(args.state) != state["state_dim"]:
            raise ValueError(
                f"--state has {len(args.state)} numbers, states of this run have"
                f" {state['state_dim']}"
            )

        # a still picture is a step in which nothing moves: the same frame for all of its frames
        with torch.no_grad():
            frames = read_pictures([args.start, args.goal])
            now, goal = (features([f] * state["frames_per_step"]) for f in frames)
        state_now = torch.tensor(args.state or [0.0] * state["state_dim"], device=device)

        # the past is this one step, so no action is known: (1, 0, A)
        cost = energy(
            predictor,
            now[None, None],
            torch.zeros(1, 0, len(names), device=device),
            state_now[None, None],
            goal,
            compose,
            args.chunk,
            autocast=run.autocast,
        )
        plan, distances = plan_between(
            now, goal, space_of(), cost, args.horizon[0], generator, options
        )
        report |= distances
        report["plan"] = (robot_plan if robot else play_plan)(plan, scaler, names)
        file_name = "plan-pictures.json"

    # --- in the game ---
    elif args.play:
        # the plan, and what it must be better than: chance, and not moving at all, as a model that
        # copies the last step has no reason to move
        space = space_of()
        choose = chooser(
            predictor,
            space,
            compose,
            args.horizon[0],
            args.context,
            args.chunk,
            options,
            run.autocast,
            args.energy,
        )
        policies = {
            "plan": planned(choose, features, scaler),
            "random": random_actions(space, scaler),
            "copy": resting(space, scaler),
        }

        # each policy plays all trials, because some places are harder than others
        (unit,) = task.limits
        report["distances"] = {}
        with open_doom(state, args.seed) as world:
            for name, policy in policies.items():
                tracks, _ = play_trials(
                    world, args.play, policy, args.seed, args.trials, args.steps, name
                )
                report["distances"][name] = tracks[unit]
        print_trials(report["distances"], args.play, unit, task.limits[unit])
        file_name = f"plan-{args.play}.json"

    # --- in recordings ---
    else:
        dataset, features_of, compose_from, bad = open_held_out(
            state, scaler, args.data, args.encoder, device, run.dtype
        )
        print_left_out(bad)

        # a robot's own fields have states that no action is known to change: open_held_out says
        # which function serves
        compose = states_from(compose_from, scaler, device)

        # the picture lies beside the file of numbers
        if args.landscape:
            pairs = motion_pairs(robot, args.maxnorm, args.reach * scaler.scale[:2])
            rows = landscapes_in_recordings(
                predictor, dataset, features_of, compose, pairs, args.landscape, run.autocast
            )
            file_name = "plan-landscape.json"
            file = args.out or os.path.join(os.path.dirname(run.path), file_name)
            picture = os.path.splitext(file)[0] + ".png"
            report["landscape"] = report_landscapes(rows, picture)

        def plan_in_clips(horizon):
            """`recorded` of this run, for one horizon."""
            return recorded(
                predictor,
                dataset,
                features_of,
                compose,
                space_of,
                horizon,
                args.context,
                args.clips,
                args.chunk,
                generator,
                options,
                run.autocast,
                args.energy,
            )

        if not args.landscape:
            report["recorded"] = plan_in_recordings(plan_in_clips, args.horizon, robot)
            file_name = "plan.json"

    # --- plan.json ---
    # with all flags: the numbers depend on most of them
    file = args.out or os.path.join(os.path.dirname(run.path), file_name)
    write_atomically(file, to_json(report).encode())
    print(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    print(f"written to {file}")
