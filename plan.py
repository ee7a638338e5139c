"""Plan in latent space: which actions lead from here to a goal? Cross-entropy method (CEM) or MPPI
on a trained predictor.

    python plan.py --checkpoint out/demo --data 'demo/features/val/*.tar'                      # recorded: are the recorded actions found?
    python plan.py --checkpoint out/demo --encoder vit_tiny --start a.png --goal b.png         # two pictures
    python plan.py --checkpoint out/demo --encoder vit_tiny --play turn --trials 50            # closed loop in ViZDoom, on held-out maps

Reads a run of train_ac.py or train_lora.py. The energy of a candidate is the mean |difference|
between the layer-normed features predicted for its last step and the goal's; all candidates share
the keys and values of the past (KV cache). Prints a table and writes plan.json beside the
checkpoint."""

import argparse
import contextlib
import functools
import math
import os
import sys
import tempfile

import av
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from data import collate, windows
from droid import POSE, compose_poses
from encode import encoder_hash, open_encoder, picture_features
from evaluation.runs import (
    encoder_dtype,
    interval_text,
    open_held_out,
    open_run,
    precision_of,
    precision_text,
    recording_of,
)
from evaluation.search import DROID_NORM, draw, droid_space, energy, rest, search, vpt_space
from files.logs import to_json
from files.vpt import SLOTS, wrap
from model import compose_states, ratio_interval

TRIVIAL = {
    "rest": "doing nothing",
    "repeat": "repeating the last action",
    "mean": "the mean action",
}


def recorded(
    predictor,
    dataset,
    inputs,
    compose,
    space_of,
    horizon,
    context,
    clips,
    chunk,
    generator,
    options,
    autocast=contextlib.nullcontext,
):
    """Plans in held-out clips to the features `horizon` steps later -> sums over the horizon of the
    continuous actions, unscaled: (n, 5, d) as recorded, as planned, and of the policies that need
    no model, in the order of TRIVIAL; mean |random draw - recorded| of 64 draws (n, d);
    [recording].

    Plans start from step `context` of a clip. With a context of one step they start from the second
    one where the clip is long enough: before the first no action is known that could be repeated
    (nan)."""
    scale, mean = (
        torch.tensor(x, dtype=torch.float32)
        for x in (dataset.reader.scaler.scale, dataset.reader.scaler.mean)
    )
    sums, random, recordings = [], [], []
    for item in tqdm(
        [i for batch in windows(dataset, 1, clips) for i in batch],
        unit="clip",
        desc=f"horizon {horizon}",
    ):
        batch = collate([dataset[item]])
        z, actions, states = inputs(batch)
        last = context - 1
        if last == 0 and z.shape[1] > horizon + 1:
            last = 1
        first = last + 1 - context
        space, device = space_of(actions[0, last]), z.device
        cost = energy(
            predictor,
            z[:, first : last + 1],
            actions[:, first:last],
            seen_from_first(states[:, first : last + 1]),
            z[0, last + horizon],
            compose,
            chunk,
            autocast=autocast,
        )
        found = search(cost, space, horizon, generator=generator, device=device, **options)
        before = actions[0, last - 1] if last else torch.full_like(actions[0, 0], math.nan)
        every = (
            actions[0, last : last + horizon],
            found,
            rest(space, horizon, device),
            before.expand(horizon, -1),
            torch.zeros_like(found),  # scaled actions have mean 0
            *draw(space, 64, horizon, generator, device, options["correlation"]),
        )
        total = (torch.stack(every)[..., : len(mean)].cpu() * scale + mean).sum(1)
        sums.append(total[:5])
        random.append((total[5:] - total[0]).abs().mean(0))
        recordings.append(recording_of(batch["key"][0], batch))  # not item's if that is damaged
    return torch.stack(sums), torch.stack(random), recordings


def seen_from_first(states):
    """States (1, c, S) as a clip that begins with the first of them has them: the yaw of VPT
    states (yaw, pitch) counts from there, a robot's pose stays."""
    if states.shape[-1] != 2:
        return states
    yaw = wrap((states[..., 0] - states[:, :1, 0]).cpu().double().numpy())
    return torch.stack([torch.from_numpy(yaw).to(states), states[..., 1]], dim=-1)


def compared(errors, recordings):
    """How plans compare. errors {policy: (n,) |sum - recorded|} of "plan", "random" and TRIVIAL ->
    their means, and error of the policy / error of the plan with its 95 % interval over recordings:
    "ratios" {policy: [ratio, low, high]}, and "best", the policy without a model that does best."""
    means = {k: x.double().mean().item() for k, x in errors.items()}
    ratios = {}
    for name in errors.keys() - {"plan"}:
        low, high = ratio_interval(errors[name], errors["plan"], recordings)
        ratio = means[name] / means["plan"] if means["plan"] else math.nan
        ratios[name] = [ratio, low.item(), high.item()]
    best = min((k for k in TRIVIAL if not math.isnan(means[k])), key=means.get)
    return means | {"ratios": ratios, "best": best}


def readable(actions, scaler, names):
    """Scaled VPT actions (H, A) -> [(dx, dy in pixels, yaw, pitch in degrees, [keys that are
    held])]."""
    moves = actions[:, :4].cpu().double().numpy() * scaler.scale + scaler.mean
    held = [
        [
            n.removeprefix("key.")
            for n, x in zip(names, row)
            if x == 1 and n.startswith(("key.", "mouse."))
        ]
        for row in actions.tolist()
    ]
    return [(*m[:2].round(), *np.degrees(m[2:]), keys) for m, keys in zip(moves, held)]


def read_pictures(paths):
    """Image files -> [av.VideoFrame]. ValueError for what is no image, or if their sizes differ."""
    frames = []
    for path in paths:
        try:
            with av.open(path) as container:
                frames.append(next(container.decode(video=0)))
        except (av.FFmpegError, StopIteration) as e:
            raise ValueError(f"{path} cannot be read as an image: {e}") from e
    if len(sizes := {(f.width, f.height) for f in frames}) > 1:
        raise ValueError(
            f"{' and '.join(paths)} have different sizes {sorted(sizes)}: take both with the same"
            " camera"
        )
    return frames


def agent(player, space, scaler, names, choose):
    """A function act(goal) that does one step in the game: what choose(seen, done, goal) says of
    the steps seen, [(z (N, E), yaw, pitch in radians)], and the scaled actions done between them,
    [(A,)]. It returns scaled actions, of which the first is done."""
    seen, done = [], []

    def act(goal):
        seen.append((player.z, math.radians(player.yaw), math.radians(player.pitch)))
        action = choose(seen, done, goal)[:1].cpu()
        dx, dy, _, _, keys = readable(action, scaler, names)[0]
        player.step(dx, dy, keys)
        done.append(action)

    return act


def chooser(
    predictor,
    space,
    compose,
    horizon,
    context,
    chunk,
    generator,
    options,
    autocast=contextlib.nullcontext,
):
    """For `agent`: plans from the last `context` steps, and rests when no plan promises less than
    the distance of what it sees now."""

    def choose(seen, done, goal):
        z, yaw, pitch = zip(*seen[-context:])
        states = torch.tensor(
            np.stack([wrap(np.subtract(yaw, yaw[0])), pitch], axis=-1), dtype=torch.float32
        )[None].to(goal)
        still = rest(space, horizon, goal.device)
        before = torch.cat([still[:0].cpu(), *done])[len(done) + 1 - len(z) :][None].to(goal)
        cost = energy(
            predictor,
            torch.stack(z)[None],
            before,
            states,
            goal,
            compose,
            chunk,
            autocast=autocast,
        )
        found = search(cost, space, horizon, generator=generator, device=goal.device, **options)
        return found if cost(found[None]) < (z[-1] - goal).abs().mean() else still

    return choose


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--checkpoint",
        required=True,
        help="run folder of train_ac.py or train_lora.py, or one of its checkpoints",
    )
    flag(
        "--data",
        "--data_path",
        nargs="+",
        action="append",
        help="held-out shards or episodes (default: what the run held out)",
    )
    flag(
        "--encoder",
        help=(
            "weights of the encoder, where there are pictures to encode (default: what the run"
            " used)"
        ),
    )
    flag("--start", metavar="IMAGE", help="plan from this picture to --goal")
    flag("--goal", metavar="IMAGE", help="picture of the goal")
    flag(
        "--state",
        type=float,
        nargs="+",
        help="state of --start: yaw and pitch in radians, or a robot's pose (default zeros)",
    )
    flag(
        "--play",
        choices=["turn", "walk"],
        help="closed loop in ViZDoom: turn to a view, walk to a place",
    )
    flag("--trials", type=int, default=50, help="trials of --play")
    flag("--steps", type=int, default=8, help="steps of a trial; each is planned anew")
    flag("--clips", type=int, default=100, help="recorded clips to plan in")
    flag(
        "--horizon",
        type=int,
        nargs="+",
        default=[1, 3],
        help="steps planned ahead; --play and --goal take the first",
    )
    flag("--context", type=int, default=1, help="steps of the past that the predictor sees")
    flag("--num_samples", type=int, default=128, help="candidates of an iteration")
    flag(
        "--num_elites",
        type=int,
        default=16,
        help="candidates that the next iteration is drawn around",
    )
    flag("--iterations", type=int, default=2, help="times the samples are drawn")
    flag("--momentum_mean", type=float, default=0.0, help="share of the old mean that is kept")
    flag("--momentum_std", type=float, default=0.0, help="share of the old std that is kept")
    flag(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0: MPPI, all samples weighted by exp(-energy / temperature)",
    )
    flag(
        "--correlation",
        type=float,
        default=0.0,
        help="of a sample's motion in one step and the next, 0 to 1",
    )
    flag(
        "--reach",
        type=float,
        default=1.0,
        help="std of the first samples of mouse motion, in those of the data",
    )
    flag(
        "--keys",
        nargs="*",
        default=[],
        metavar="key.w",
        help="keys that may be pressed (--play walk: key.w unless given)",
    )
    flag(
        "--maxnorm",
        type=float,
        default=DROID_NORM,
        help="robots: largest motion of a step along an axis, in metres",
    )
    flag("--chunk", type=int, default=512, help="candidates run at once: what bounds memory")
    flag(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="autocast precision (default: what the run was trained in)",
    )
    flag("--seed", type=int, default=0, help="of trials and samples")
    flag(
        "--out",
        help=(
            "where to write the numbers (default: plan.json, plan-pictures.json, plan-turn.json"
            " beside the checkpoint)"
        ),
    )
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    if (args.start is None) != (args.goal is None) or args.start and args.play:
        parser.error("--start and --goal go together, and without --play")
    if args.state is not None and not args.start:
        parser.error("--state is that of the picture --start: name it, or drop --state")
    if not all(map(math.isfinite, args.state or [])):
        parser.error(f"--state {' '.join(map(str, args.state))} must be finite numbers")
    least = {
        "horizon": min(args.horizon),
        "trials": args.trials,
        "steps": args.steps,
        "clips": args.clips - 1,
        "context": args.context,
        "iterations": args.iterations,
        "chunk": args.chunk,
        "num_elites": args.num_elites - 1,
    }
    bad = [k for k, v in least.items() if v < 1] + [
        k for k in ("reach", "maxnorm") if not 0 < getattr(args, k) < math.inf
    ]
    bad += [
        k for k in ("momentum_mean", "momentum_std", "correlation") if not 0 <= getattr(args, k) < 1
    ]
    if not 0 <= args.temperature < math.inf:
        bad.append("temperature")
    if args.num_elites > args.num_samples:
        bad.append("num_elites")
    if bad:
        rule = (
            "two --clips, two --num_elites (of --num_samples), one of all else are the least,"
            " momenta and correlation are below 1, --temperature is 0 or more, --reach and --maxnorm"
            " are above 0, all are finite"
        )
        parser.error(f"--{bad[0]} {getattr(args, bad[0])} makes no plan: {rule}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, state, scaler, path = open_run(args.checkpoint)
    predictor.to(device)
    dtype, autocast = precision_of(args.dtype, state, device)
    names, robot, T = (
        state["action_names"],
        state["dataset"] == "droid",
        state["frames_per_clip"] // state["frames_per_step"],
    )
    if args.context + max(args.horizon) > T:
        raise ValueError(
            f"--context {args.context} and --horizon {max(args.horizon)} are more steps than the"
            f" clips of this run have: {T}"
        )
    if robot and names != POSE:
        raise ValueError(
            f"this run's actions are {' '.join(names)}: plan.py knows those of VPT and"
            f" {' '.join(POSE)}"
        )
    options = {
        k: getattr(args, k)
        for k in (
            "num_samples",
            "num_elites",
            "iterations",
            "momentum_mean",
            "momentum_std",
            "correlation",
        )
    }
    options["temperature"] = args.temperature or None
    mean, scale = (
        torch.tensor(x, dtype=torch.float32, device=device) for x in (scaler.mean, scaler.scale)
    )
    compose = functools.partial(compose_poses if robot else compose_states, mean=mean, scale=scale)
    keys = args.keys or ["key.w"] * (args.play == "walk")
    report = {"checkpoint": path} | vars(args) | {"dtype": dtype}
    print(f"{path}: {precision_text(dtype, device, predictor, args.context)}")

    def space_of(action=None):
        """What may be done where this action was recorded: the hotbar stays as it is."""
        slots = [
            i
            for i, n in enumerate(SLOTS)
            if action is not None and n in names and action[names.index(n)] == 1
        ]
        return (
            droid_space(scaler, args.maxnorm)
            if robot
            else vpt_space(names, scaler, keys, args.reach, *slots)
        )

    if args.start or args.play:
        name = args.encoder or state["args"]["encoder"]
        if not name:
            raise ValueError("this run was trained on features: name the --encoder that made them")
        encoder = (
            open_encoder(name, state["args"]["crop_size"], state["frames_per_clip"])
            .to(device)
            .eval()
        )
        if (found := encoder_hash(encoder)) != state["encoder_hash"]:
            raise ValueError(
                f"--encoder {name} has hash {found}, the run was trained on features of"
                f" {state['encoder_hash']}"
            )
        encoder.to(encoder_dtype(dtype, state["args"]))
        stats = {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}
        kind = {
            "encoder": encoder,
            "encode": state["encode"],
            "crop_size": state["args"]["crop_size"],
            "stats": stats,
        }

        whole = encoder_dtype(dtype, state["args"]) == torch.float32

        def features(frames):
            # weights in bf16 need no autocast, as in make_inputs
            with autocast() if whole else contextlib.nullcontext():
                return picture_features(frames, **kind)

    generator = torch.Generator().manual_seed(args.seed)
    if args.start:
        with torch.no_grad():
            now, goal = (
                features([f] * state["frames_per_step"])
                for f in read_pictures([args.start, args.goal])
            )
            if args.state and len(args.state) != state["state_dim"]:
                raise ValueError(
                    f"--state has {len(args.state)} numbers, states of this run have"
                    f" {state['state_dim']}"
                )
            at = torch.tensor(args.state or [0.0] * state["state_dim"], device=device)[None, None]
            cost = energy(
                predictor,
                now[None, None],
                torch.zeros(1, 0, len(names), device=device),
                at,
                goal,
                compose,
                args.chunk,
                autocast=autocast,
            )
            found = search(
                cost, space_of(), args.horizon[0], generator=generator, device=device, **options
            )
            energies = cost(torch.stack([found, rest(space_of(), len(found), device)])).tolist()
        report |= {
            "energy": energies[0],
            "energy_at_rest": energies[1],
            "energy_now": (now - goal).abs().mean().item(),
        }
        print(
            "distance to the goal (mean |difference| of features): now {energy_now:.4f}, expected"
            " after the plan {energy:.4f}, after doing nothing {energy_at_rest:.4f}".format(
                **report
            )
        )
        if not report["energy"] < report["energy_now"]:
            print(
                "WARNING: no plan promises to come nearer than it is now: the pictures may be too"
                " far apart, or there already"
            )
        if robot:
            moves = found * scale + mean
            moves[:, 6] *= (
                moves[:, 6].abs() >= 0.25
            )  # as Meta's planner: a gripper that is half told to move stays
            report["plan"] = moves.tolist()
            print("step " + "".join(f"{n:>9}" for n in names))
            for i, action in enumerate(report["plan"]):
                print(f"{i:4d} " + "".join(f"{x:9.4f}" for x in action))
        else:
            report["plan"] = readable(found, scaler, names)
            print("step  dx px  dy px  yaw deg  pitch deg  keys")
            for i, (dx, dy, yaw, pitch, held) in enumerate(report["plan"]):
                print(
                    f"{i:4d} {dx:+7.0f}{dy:+7.0f}{yaw:+9.1f}{pitch:+11.1f}  {' '.join(held) or '-'}"
                )
    elif args.play:
        from prepare import doom

        if robot or state["encode"] != "tubelet" or 20 % state["fps"]:
            raise ValueError(
                "--play needs a run on VPT shards with --encode tubelet, at a rate that divides 20"
                " frames a second"
            )
        bar, unit, report["distances"] = (
            *{"turn": (10, "degrees"), "walk": (64, "map units")}[args.play],
            {},
        )
        space = space_of()
        policies = {
            "plan": chooser(
                predictor,
                space,
                compose,
                args.horizon[0],
                args.context,
                args.chunk,
                generator,
                options,
                autocast,
            ),
            "random": lambda seen, done, goal: draw(space, 1, 1, generator)[0],
            "copy": lambda seen, done, goal: rest(
                space, 1
            ),  # a model that copies the last step has no reason to move
        }
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(doom.open_game(doom.SIZE, args.seed, folder)) as game,
        ):
            player = doom.Player(game, state["frames_per_step"], round(20 / state["fps"]), features)
            for policy, choose in policies.items():
                tracks = []
                for trial in tqdm(range(args.trials), unit="trial", desc=policy):
                    rng = np.random.default_rng([args.seed, trial])
                    tracks.append(
                        player.trial(
                            args.play,
                            rng,
                            doom.MAPS["val"],
                            agent(player, space, scaler, names, choose),
                            args.steps,
                        )
                    )
                report["distances"][policy] = tracks
        print(
            f"{args.play}: {args.trials} trials on held-out maps; success: within {bar} {unit} at"
            " the end"
        )
        print(
            f"policy   success   {unit} at the start, at the end: mean, median   success after 1,"
            " 2, ... steps"
        )
        for policy, tracks in report["distances"].items():
            tracks = np.array(tracks)
            ends, by = tracks[:, -1], " ".join(f"{x:4.0%}" for x in (tracks[:, 1:] < bar).mean(0))
            print(
                f"{policy:8} {(ends < bar).mean():7.0%} {tracks[:, 0].mean():12.1f}"
                f" {ends.mean():9.1f} {np.median(ends):9.1f}   {by}"
            )
    else:
        dataset, inputs, compose_from, bad = open_held_out(
            state, scaler, args.data, args.encoder, device, dtype
        )
        compose = functools.partial(compose_from, mean=mean, scale=scale)
        for file, key, reason in bad:
            print(f"left out: {file} {key}: {reason}")
        angles = [("yaw", 2, 180 / math.pi, "deg"), ("pitch", 3, 180 / math.pi, "deg")]
        shown = [(n, i, 100.0, "cm") for i, n in enumerate("xyz")] if robot else angles
        lines, doubts, report["recorded"] = [], [], []
        for horizon in args.horizon:
            how = horizon, args.context, args.clips, args.chunk, generator, options, autocast
            sums, random, recordings = recorded(predictor, dataset, inputs, compose, space_of, *how)
            for name, i, unit, symbol in shown:
                off = unit * (sums[:, 1:, i] - sums[:, :1, i]).abs()
                errors = {"plan": off[:, 0], "random": unit * random[:, i]}
                errors |= {policy: off[:, k] for k, policy in enumerate(TRIVIAL, 1)}
                row = compared(errors, recordings)
                report["recorded"].append({"horizon": horizon, "dim": name, "unit": symbol} | row)
                numbers = "".join(f" {row[k]:8.2f}" for k in errors)
                ratio, low, high = row["ratios"][row["best"]]
                lines.append(
                    f"{horizon:7d}  {name:6} {symbol:4}{numbers}    {ratio:.2f}"
                    f" {interval_text(low, high, recordings, '.2f')} {row['best']}"
                )
                if not low > 1:
                    doubts.append(f"{name} at horizon {horizon}")
        print(
            f"plans in {len(recordings)} clips of {len(set(recordings))} recordings; mean |sum -"
            " recorded|, lower is better"
        )
        print("without a model: " + ", ".join(f"{k} ({v})" for k, v in TRIVIAL.items()))
        header = "".join(f"{k:>9}" for k in errors)
        print(
            f"horizon  of     unit{header}    best of those / plan, 95 % over recordings",
            *lines,
            sep="\n",
        )
        if doubts:
            print(
                "WARNING: not shown to be better than the best policy without a model (the"
                f" interval is not above 1): {', '.join(doubts)}"
            )
    name = (
        "plan-pictures.json"
        if args.start
        else f"plan-{args.play}.json"
        if args.play
        else "plan.json"
    )
    out = args.out or os.path.join(os.path.dirname(path), name)
    checkpoint.write_atomically(out, to_json(report).encode())
    print(f"written to {out}; peak memory {checkpoint.peak_memory(device):.0f} MiB")
