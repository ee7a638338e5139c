"""evaluation/search.py, plan.py and evaluation/closed_loop.py: it finds what is known to be best,
as the reference does, and does it in the game."""

import functools
import json
import math
import os
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from droid import compose_poses
from evaluation.closed_loop import chooser, planned, play_trials
from evaluation.doom import open_doom
from evaluation.search import Space, draw, droid_space, energy, rest, search, vpt_space
from files.vpt import ACTION_SPACES
from model import compose_states, normalize_features
from plan import compared, readable, recorded
from tests.harness import (
    FIXTURES,
    B,
    Moved,
    Pushed,
    T,
    close,
    fails,
    picture,
    rollout_from_scratch,
    run,
    small_batch,
    small_predictor,
)

pytestmark = pytest.mark.usefixtures("forkserver")
PLAIN = types.SimpleNamespace(mean=np.zeros(7), scale=np.ones(7))
MOUSE = types.SimpleNamespace(
    mean=np.array([-4.0, 1, -0.01, 0.002]), scale=np.array([95.0, 32, 0.25, 0.084])
)


# --- the search ---


def reference_cem(noise, pose, cost, maxnorm, topk, mean_momentum, std_momentum, close_gripper):
    """vjepa2's cem (notebooks/utils/mpc_utils.py) sample by sample and step by step, as spec and
    code state it; momenta (xyz, gripper)."""
    steps, rollout, samples, _ = noise.size()
    mean = torch.zeros(rollout, 4)
    std = torch.tensor([maxnorm] * 3 + [1.0]).repeat(rollout, 1)
    for i in range(steps):
        found = []
        for n in range(samples):
            actions = []
            poses = [pose]
            for h in range(rollout):
                a = noise[i, h, n] * std[h] + mean[h]
                a = torch.cat([a[:3].clip(-maxnorm, maxnorm), a[3:].clip(-0.75, 0.75)])
                if close_gripper is not None and h >= close_gripper:
                    a[3] = 1.0
                actions.append(torch.cat([a[:3], torch.zeros(3), a[3:]]))
                p = poses[-1].numpy().astype(np.float64)
                turned = (
                    Rotation.from_euler("xyz", actions[-1][3:6].numpy()).as_matrix()
                    @ Rotation.from_euler("xyz", p[3:6]).as_matrix()
                )
                angles = Rotation.from_matrix(turned).as_euler("xyz")
                move = actions[-1].numpy().astype(np.float64)
                poses.append(
                    torch.tensor(
                        np.r_[p[:3] + move[:3], angles, np.clip(p[6] + move[6], 0, 1)],
                        dtype=torch.float32,
                    )
                )
            found.append(
                (
                    cost(torch.stack(actions), torch.stack(poses[:-1])),
                    torch.stack(actions)[:, [0, 1, 2, 6]],
                )
            )
        elites = torch.stack([a for _, a in sorted(found, key=lambda x: x[0])[:topk]])
        for now, new, (xyz, gripper) in (
            (mean, elites.mean(0), mean_momentum),
            (std, elites.std(0), std_momentum),
        ):
            momentum = torch.tensor([xyz] * 3 + [gripper])
            now.copy_((1 - momentum) * new + momentum * now)
    return torch.cat([mean[:, :3], torch.zeros(rollout, 3), mean[:, 3:]], dim=1)


@pytest.mark.parametrize("case", ["wrapper_default", "notebook", "close_gripper"])
def test_cem_is_the_references(case):
    """Bug: a biased std, momenta of the gripper on xyz, clipping after the choice of elites, poses
    that do not follow the actions, a predictor fed the wrong step. The fixture's noise is injected;
    its closed-form predictor is not told, so this one is the test's own."""
    t = load_file(os.path.join(FIXTURES, "cem.safetensors"))
    z = t[f"in/{case}/rep"]
    goal = t[f"in/{case}/goal"]
    pose = t[f"in/{case}/pose"]
    noise = t[f"in/{case}/noise"]
    settings = {
        "wrapper_default": (0.05, (0.15, 0.15), (0.15, 0.15), None),
        "notebook": (0.075, (0.25, 0.15), (0.75, 0.15), None),
        "close_gripper": (0.05, (0.25, 0.15), (0.95, 0.15), 1),
    }
    maxnorm, mean_momentum, std_momentum, shut = tuple(settings[case])

    def run_on(actions, states):  # (n, H, 7) -> (n,)
        x = z[0].expand(len(actions), -1, -1, -1)[:, 0]
        for h in range(actions.shape[1]):
            x = normalize_features(
                torch.tanh(
                    x @ t["w/wz"]
                    + 9 * (actions[:, h] @ t["w/wa"] + states[:, h] @ t["w/ws"])[:, None]
                )
            )
        return (x - goal[0]).abs().mean((1, 2))

    wanted = reference_cem(
        noise,
        pose[0, 0],
        lambda a, s: run_on(a[None], s[None]).item(),
        maxnorm,
        10,
        mean_momentum,
        std_momentum,
        shut,
    )
    compose = functools.partial(compose_poses, mean=torch.zeros(7), scale=torch.ones(7))
    momenta = [torch.tensor([m[0]] * 3 + [m[1]]) for m in (mean_momentum, std_momentum)]
    found = search(
        lambda a: run_on(a, compose(pose[0].expand(len(a), -1), a)),
        droid_space(PLAIN, maxnorm, shut),
        noise.shape[1],
        num_elites=10,
        iterations=len(noise),
        momentum_mean=momenta[0],
        momentum_std=momenta[1],
        noise=noise,
    )
    close(found, wanted, atol=1e-6)

    # what no predictor can change: 1 - momentum^iterations, in the reference's own output too
    if shut:
        close(found[shut:, 6], t[f"out/{case}/actions"][shut:, 6], atol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.02])
def test_search_finds_a_known_optimum(temperature):
    """Bug: the worst samples are kept, keys are not learned, a sample leaves its bounds, the best
    mean so far is lost."""
    goal = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    seen = []
    space = Space(
        torch.ones(2),
        lambda u: u.clamp(-1.5, 1.5),
        torch.full((2,), 0.25),
        lambda u, k: torch.cat([u, k.to(u)], dim=-1),
    )

    def cost(actions):
        seen.append(actions)
        keys = (actions[..., 2:] - torch.tensor([1.0, 0.0])).abs().sum((1, 2))
        return (actions[..., :2] - goal).square().sum((1, 2)) + keys

    options = {
        "num_samples": 256,
        "iterations": 8,
        "temperature": temperature,
        "generator": torch.Generator().manual_seed(0),
    }
    found = search(cost, space, 2, **options)
    close(found[:, :2], goal.clamp(max=1.5), atol=0.15)
    assert found[:, 2:].tolist() == [[1, 0], [1, 0]]
    assert max(x[..., :2].abs().max() for x in seen) <= 1.5
    assert all(x[0, :, :2].abs().max() > 0.1 for x in seen[2:])
    assert torch.equal(
        found, search(cost, space, 2, **options | {"generator": torch.Generator().manual_seed(0)})
    )


@pytest.mark.parametrize("context", [1, 3])
def test_energy_is_the_same_by_cache_chunk_and_hand(context):
    """Bug: the shared cache stands at other positions, chunks lose or reorder candidates, states
    are not the candidate's; the wanted change is not from the last step that is seen."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    z = normalize_features(z[:1])
    actions = actions[:1]
    states = states[:1]

    # states before each action
    def compose(state0, a):
        return (
            state0[:, None]
            + torch.nn.functional.pad(a[..., : state0.shape[1]].cumsum(1), (0, 0, 1, 0))[:, :-1]
        )

    given = z[:, :context], actions[:, : context - 1], states[:, :context], z[0, -1], compose
    candidates = torch.randn(5, T - context, actions.shape[-1])
    with torch.no_grad():
        whole = energy(predictor, *given)(candidates)
        close(energy(predictor, *given, chunk=2)(candidates), whole)
        by_direction = energy(predictor, *given, chunk=2, measure="direction")(candidates)
        from_rest = {"measure": "change", "still": candidates[0]}
        by_change = energy(predictor, *given, chunk=2, **from_rest)(candidates)
        future = compose(states[:, context - 1].expand(5, -1), candidates)
        s = torch.cat([states[:, : context - 1].expand(5, -1, -1), future], dim=1)
        a = torch.cat([actions[:, : context - 1].expand(5, -1, -1), candidates], dim=1)
        past = z[:, :context].expand(5, -1, -1, -1)
        ahead = rollout_from_scratch(predictor, past, a, s)
    close(whole, (ahead[:, -1] - z[0, -1]).abs().mean((1, 2)))
    change = (ahead[:, -1] - z[:, context - 1]).flatten(1)
    wanted = (z[:, -1] - z[:, context - 1]).flatten(1)
    cosine = (change * wanted).sum(1) / (change.norm(dim=1) * wanted.norm(dim=1))
    close(by_direction, -cosine)

    # the prediction of rest stands for what is seen, whatever it is
    arrived = z[0, context - 1] + ahead[:, -1] - ahead[:1, -1]
    close(by_change, (arrived - z[0, -1]).abs().mean((1, 2)))
    close(by_change[0], (z[0, context - 1] - z[0, -1]).abs().mean())
    assert whole.std() > 1e-4 and B > 1


@pytest.mark.parametrize("temperature", [None, 0.02])
def test_candidates_without_a_finite_energy_are_left_out(temperature):
    """Bug: one candidate whose energy is NaN or infinite makes MPPI's whole plan NaN, or is an
    elite of CEM's; when none is finite the plan is made of noise."""
    names = ACTION_SPACES[36]
    space = vpt_space(names, MOUSE)

    def plan(bad, value, elites=16):
        def cost(candidates):
            e = (candidates[..., 0] - 1).abs().mean(1)
            e[bad] = value
            return e

        options = {"num_samples": 64, "num_elites": elites, "temperature": temperature}
        return search(cost, space, 2, generator=torch.Generator().manual_seed(0), **options)

    for value in (math.nan, math.inf, -math.inf):
        assert torch.equal(plan([3], value), plan([3], 1e30))
        for bad in (list(range(60)), list(range(1, 64)), [0]):
            assert plan(bad, value).isfinite().all()
        with pytest.raises(ValueError, match="none of 64 candidate plans has a finite energy"):
            plan(list(range(64)), value)


@pytest.mark.parametrize("short", [False, True])
def test_plans_are_compared_with_the_best_policy_without_a_model(short):
    """Bug: planning is quoted against random plans, which doing nothing beats; an interval over few
    recordings; a policy that cannot be had (no action before the first) is the best."""
    recordings = [str(i % 4) for i in range(40)]
    g = torch.Generator().manual_seed(0)
    scale = {"plan": 1.0, "random": 4.0, "rest": 2.0, "repeat": 1.5, "mean": 2.1}
    errors = {k: v * (0.9 + 0.2 * torch.rand(40, generator=g)) for k, v in scale.items()}
    if short:
        errors["repeat"] = torch.full((40,), math.nan)
    row = compared(errors, recordings)
    best = "rest" if short else "repeat"
    ratio, low, high = tuple(row["ratios"][best])
    assert row["best"] == best and ratio == pytest.approx(scale[best], rel=0.05)
    assert 1 < low < ratio < high < 1.2 * ratio
    assert math.isnan(compared(errors, ["a"] * 40)["ratios"]["rest"][1])

    still = compared(errors | {"plan": torch.zeros(40)}, recordings)
    assert math.isnan(still["ratios"]["rest"][0])


# --- what is searched ---


def test_vpt_candidates_are_actions_a_recording_could_hold():
    """Bug: the camera does not turn with the mouse, the hotbar changes slot, resting is the mean
    action instead of none."""
    names = ACTION_SPACES[36]
    space = vpt_space(names, MOUSE, ["key.w", "key.space"], slot=3)
    found = draw(space, 200, 2, torch.Generator().manual_seed(0))
    moves = found[..., :4] * torch.tensor(MOUSE.scale).float() + torch.tensor(MOUSE.mean).float()
    close(moves[..., 2:], torch.deg2rad(0.15 * moves[..., :2]), atol=1e-6)
    assert 80 < moves[..., 0].std() < 110 and abs(moves[..., 0].mean()) < 15

    pressed = {n: found[..., i].mean().item() for i, n in enumerate(names) if i > 3}
    assert {n for n, x in pressed.items() if x == 1} == {"slot.4"}
    assert {n for n, x in pressed.items() if 0 < x < 1} == {"key.w", "key.space"}

    still = rest(space, 2)
    close(
        still[:, :4] * torch.tensor(MOUSE.scale).float() + torch.tensor(MOUSE.mean).float(),
        torch.zeros(2, 4),
        atol=1e-5,
    )
    assert readable(still, MOUSE, names)[0][4] == []
    assert still[:, 4:].sum(1).tolist() == [1, 1]
    assert readable(torch.cat([still[:1, :4], found[:1, 0, 4:]], 1) * 0 + 1, MOUSE, names)[0][4][
        :2
    ] == ["1", "2"]
    with pytest.raises(ValueError, match="--keys key.w: not in this action space"):
        vpt_space(ACTION_SPACES[13], MOUSE, ["key.w"])


@pytest.mark.parametrize("horizon", [1, 2])
def test_recorded_actions_are_recovered_by_a_predictor_that_knows(horizon):
    """Bug: another goal than `horizon` steps on, sums over other steps, plan and truth in different
    units, random that is the plan; a clip that takes the place of a damaged one counts as the
    damaged recording's."""
    names, n = ACTION_SPACES[36], 4
    torch.manual_seed(0)
    actions = torch.zeros(n, 4, len(names))
    space = vpt_space(names, MOUSE)
    actions[:, :, :] = draw(space, n, 4, torch.Generator().manual_seed(5))
    predictor = Pushed()
    z = [torch.randn(n, 1, 4, 16)]
    for t in range(4):
        z.append(
            normalize_features(
                predictor.extend(z[-1].flatten(1, 2), actions[:, t : t + 1], None)[0]
            ).view(n, 1, 4, 16)
        )

    z = torch.cat(z, 1)

    class Recorded:
        records = [
            types.SimpleNamespace(recording=f"r{i}", length=5, members={"safetensors": 0})
            for i in range(n)
        ]
        reader = types.SimpleNamespace(scaler=MOUSE, frames=10, frames_per_step=2, fps=10)

        def windows_in(self, record):
            return 1

        def __getitem__(self, item):
            # the first recording is damaged
            i = item[2] or 1
            return {
                "z": z[i],
                "actions": actions[i],
                "states": torch.zeros(5, 2),
                "key": f"r{i}@0",
                "bad": [],
            }

    def inputs(batch):
        return batch["z"], batch["actions"], batch["states"]

    options = {"num_samples": 256, "num_elites": 16, "iterations": 6, "correlation": 0.0}
    compose = functools.partial(
        compose_states, mean=torch.as_tensor(MOUSE.mean), scale=torch.as_tensor(MOUSE.scale)
    )
    how = horizon, 2, 100, 512, torch.Generator().manual_seed(0), options
    sums, random, recordings = recorded(
        predictor, Recorded(), inputs, compose, lambda a: space, *how
    )
    true = (
        actions[:, 1 : 1 + horizon, :4] * torch.tensor(MOUSE.scale).float()
        + torch.tensor(MOUSE.mean).float()
    ).sum(1)
    order = [int(r[1:]) for r in recordings]
    close(sums[:, 0], true[order], atol=1e-3)
    close(sums[:, 2], torch.zeros(n, 4), atol=1e-4)

    scale = torch.tensor(MOUSE.scale).float()
    mean = torch.tensor(MOUSE.mean).float()
    close(sums[:, 3], horizon * (actions[:, 0, :4] * scale + mean)[order], atol=1e-3)
    close(sums[:, 4], (horizon * mean).expand(n, 4), atol=1e-3)

    error = (sums[:, 1] - sums[:, 0]).abs().mean(0)

    # features that were layer-normed twice hardly show which of two actions came first
    if horizon == 1:
        assert (error[:2] < 0.2 * random.mean(0)[:2]).all(), (error, random.mean(0))
    assert sorted(order) == [1, 1, 2, 3] and (random[:, 0] > 40).all()


# --- in the game ---


def test_the_planner_turns_to_a_view_with_a_predictor_that_knows():
    """Bug: it plans from the wrong past, does another action than it planned, or does not rest
    where it has arrived."""
    names = ACTION_SPACES[36]
    space = vpt_space(names, MOUSE)

    class Compass(Moved):
        """Features are a direction of the compass, which the action turns."""

        def extend(self, z, actions, states, extrinsics=None, past=None):
            turn = actions[..., 0] * MOUSE.scale[0] + MOUSE.mean[0]
            z = z.view(*actions.shape[:2], -1)
            heading = torch.atan2(z[..., 1], z[..., 0]) + torch.deg2rad(0.15 * turn)
            out = torch.stack([heading.cos(), heading.sin()], -1)
            return torch.cat([out, -out], -1).flatten(1).view(len(z), -1, 4), [(z, z)]

    def compass_of(world):
        """The player's features: its true direction."""

        def features(pictures):
            looks = world.goal_yaw if pictures is world.goal else world.yaw
            yaw = np.radians(looks)
            found = torch.tensor([np.cos(yaw), np.sin(yaw), -np.cos(yaw), -np.sin(yaw)]).float()
            return normalize_features(found)[None]

        return features

    compose = functools.partial(
        compose_states, mean=torch.as_tensor(MOUSE.mean), scale=torch.as_tensor(MOUSE.scale)
    )
    options = {"num_samples": 256, "num_elites": 8, "iterations": 6}
    choose = chooser(Compass(), space, compose, 1, 1, 512, options)
    cut = {"dataset": "vpt", "encode": "tubelet", "fps": 10, "frames_per_step": 2}
    with open_doom(cut | {"action_names": names}, 0) as world:
        policy = planned(choose, compass_of(world), MOUSE)
        tracks, _ = play_trials(world, "turn", policy, 3, 1, 4, "plan")
    (track,) = tracks["degrees"]
    assert 15 < track[0] < 41 and max(track[1:]) < 2
    assert track[-1] == pytest.approx(track[-2], abs=0.5)


# --- the program ---


def test_plans_of_runs(game, arm, tmp_path):  # noqa: F811
    """Bug: a plan for the wrong robot, in scaled units, a report that lacks what the table
    shows."""
    text = run(
        tmp_path,
        "plan.py",
        "--checkpoint",
        game.out,
        "--data",
        game.held,
        "--clips 3 --num_samples 16 --num_elites 4 --keys key.w",
        "--horizon 1 2 --out",
        tmp_path / "p.json",
    )
    rows = json.loads((tmp_path / "p.json").read_text())["recorded"]
    assert [(r["horizon"], r["dim"]) for r in rows] == [
        (1, "yaw"),
        (1, "pitch"),
        (2, "yaw"),
        (2, "pitch"),
    ]

    for r in rows:
        best = min(("rest", "repeat", "mean"), key=r.get)
        ratio, low, high = tuple(r["ratios"][best])
        numbers = "".join(f"{r[k]:9.2f}" for k in ("plan", "random", "rest", "repeat", "mean"))
        assert f"{numbers}    {ratio:.2f} (no interval" in text
        assert f") {best}\n" in text
        assert r["best"] == best and ratio == pytest.approx(r[best] / r["plan"])
        assert low is None and r["random"] > 0
    assert "WARNING: not shown to be better than the best policy without a model" in text
    assert "float32 on cpu; kernels: attention" in text

    flags = ["--checkpoint", arm / "lora", "--clips 2 --num_samples 16 --num_elites 4"]
    flags += ["--out", tmp_path / "r.json"]
    text = run(tmp_path, "plan.py", *flags)
    rows = json.loads((tmp_path / "r.json").read_text())["recorded"]
    assert [r["dim"] for r in rows] == [*"xyz"] * 2
    assert all(r["plan"] <= 5 * r["horizon"] + r["rest"] for r in rows)


def test_plan_between_two_pictures(game, tmp_path):  # noqa: F811
    """Bug: start and goal change places, pictures are prepared unlike recordings, a bad picture
    ends in a traceback."""
    for name, number, size in (("a", 3, (128, 72)), ("b", 9, (128, 72)), ("c", 9, (64, 48))):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(number)), format="rgb24")
        save_png(tmp_path / f"{name}.png", frame.reformat(*size))
    base = ["--checkpoint", game.out, "--encoder vit_tiny --start", tmp_path / "a.png", "--goal"]
    flags = [*base, tmp_path / "b.png", "--horizon 2 --num_samples 16 --num_elites 4"]
    flags += ["--out", tmp_path / "p.json"]
    text = run(tmp_path, "plan.py", *flags)
    report = json.loads((tmp_path / "p.json").read_text())
    assert len(report["plan"]) == 2
    assert f"after the plan {report['energy']:.4f}" in text
    assert report["energy_now"] > 0.01

    flags = [*base, tmp_path / "a.png", "--horizon 1 --num_samples 16 --num_elites 4"]
    flags += ["--out", tmp_path / "q.json"]
    same = run(tmp_path, "plan.py", *flags)
    assert "now 0.0000" in same

    (tmp_path / "d.png").write_bytes(b"no picture")
    for goal, sentence in (
        ("c", "have different sizes"),
        ("d", "cannot be read as an image"),
        ("e", "No such file"),
    ):
        assert sentence in fails(tmp_path, "plan.py", *base, tmp_path / f"{goal}.png")
    assert "go together" in fails(
        tmp_path, "plan.py", "--checkpoint", game.out, "--start", tmp_path / "a.png"
    )


def save_png(path, frame):
    codec = av.CodecContext.create("png", "w")
    codec.width = frame.width
    codec.height = frame.height
    codec.pix_fmt = "rgb24"
    codec.time_base = Fraction(1)
    path.write_bytes(
        b"".join(bytes(p) for p in [*codec.encode(frame.reformat(format="rgb24")), *codec.encode()])
    )


def test_closed_loop_program(game, tmp_path):  # noqa: F811
    """Bug: policies play other trials, success is counted at another step than the table says."""
    short = "--trials 2 --steps 2 --num_samples 8 --num_elites 2 --out"
    flags = ["--checkpoint", game.out, "--encoder vit_tiny --play turn", short]
    flags += [tmp_path / "p.json"]
    text = run(tmp_path, "plan.py", *flags)
    found = json.loads((tmp_path / "p.json").read_text())["distances"]
    assert [t[0] for t in found["plan"]] == pytest.approx([t[0] for t in found["copy"]], abs=0.01)
    assert len(found["random"][0]) == 3
    assert all(max(t) - min(t) < 0.01 for t in found["copy"])

    share = np.mean([t[-1] < 10 for t in found["plan"]])
    assert f"plan     {share:7.0%}" in text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--context 5 --horizon 4", "more steps than the clips of this run have: 8"),
        ("--keys key.tab", "not in this action space"),
        ("--play turn", "name the --encoder"),
        ("--play turn --encoder vit_base_16", "was trained on features of"),
        ("--num_elites 500", "--num_elites 500 makes no plan"),
        ("--horizon 0", "--horizon [0] makes no plan"),
        ("--correlation 1", "--correlation 1.0 makes no plan"),
        ("--keys slot.1", "which has key.1"),
        ("--temperature -1", "--temperature -1.0 makes no plan"),
        ("--temperature nan", "--temperature nan makes no plan"),
        ("--reach nan", "--reach nan makes no plan"),
        ("--maxnorm inf", "--maxnorm inf makes no plan"),
        ("--state 0 0", "--state is that of the picture --start"),
        ("--clips 1", "--clips 1 makes no plan"),
    ],
)
def test_bad_flags_are_one_sentence(game, tmp_path, flags, sentence):  # noqa: F811
    """Bug: a plan longer than what was trained, or with another encoder, gives numbers; nan is said
    to be the predictor's fault; a --state that nothing uses."""
    assert sentence in fails(
        tmp_path, "plan.py", "--checkpoint", game.out, "--data", game.held, "--clips 2", flags
    )
