"""Search for actions in latent space: the cross-entropy method (CEM) and MPPI on candidates that
share the keys and values of the past."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from files.vpt import DEGREES_PER_PIXEL
from model import predict_on

# Meta's bound of a step's motion along each axis, in metres
DROID_NORM = 0.05


# --- what is searched ---


class Space(NamedTuple):
    """What a planner varies: d continuous dimensions and m keys."""

    # (d,): std of the first Gaussian samples
    std: torch.Tensor

    # samples (n, H, d) -> the same within bounds
    clamp: Callable

    # (m,): probability of each key being pressed, at first
    prob: torch.Tensor

    # samples (n, H, d), pressed (n, H, m) -> scaled actions (n, H, A) as the predictor takes them
    actions: Callable


def vpt_space(names, scaler, keys=(), reach=1.0, slot=0):
    """Mouse motion as a Gaussian (`reach`: its std, in those of the data, cut at 3), yaw and pitch
    tied to it at 0.15 degrees a pixel, keys (names of dims) as Bernoulli variables of 0.25, the
    hotbar slot fixed at `slot`. ValueError for a key that the action space lacks."""
    # keys that these actions have
    can_press = [n for n in names if n.startswith(("key.", "mouse."))]
    missing = [k for k in keys if k not in can_press]
    if missing:
        raise ValueError(
            f"--keys {' '.join(missing)}: not in this action space, which has {' '.join(can_press)}"
        )

    # u is in stds of the mouse's motion
    mean = torch.as_tensor(scaler.mean, dtype=torch.float32)
    scale = torch.as_tensor(scaler.scale, dtype=torch.float32)
    key_dims = [names.index(k) for k in keys]
    slot_name = f"slot.{slot + 1}"

    def clamp(u):
        return u.clamp(-3 * reach, 3 * reach)

    def actions(u, pressed):
        # the camera follows the mouse, as it did in the recordings
        pixels = u * scale[:2].to(u)
        moves = torch.cat([pixels, pixels * math.radians(DEGREES_PER_PIXEL)], dim=-1)

        # scaled as the predictor takes them; keys are 0 or 1
        scaled = u.new_zeros(*u.shape[:2], len(names))
        scaled[..., :4] = (moves - mean.to(u)) / scale.to(u)
        scaled[..., key_dims] = pressed.to(u)
        if slot_name in names:
            scaled[..., names.index(slot_name)] = 1
        return scaled

    return Space(
        std=torch.full((2,), reach),
        clamp=clamp,
        prob=torch.full((len(key_dims),), 0.25),
        actions=actions,
    )


def droid_space(scaler, maxnorm=DROID_NORM, close_gripper=None, grips=True):
    """Metres along x, y, z within +-maxnorm and the gripper within +-0.75, no rotation; from step
    `close_gripper` on it closes (vjepa2 notebooks/utils/mpc_utils.py). grips=False: the gripper
    stays as it is, which is easier to search."""
    mean = torch.as_tensor(scaler.mean, dtype=torch.float32)
    scale = torch.as_tensor(scaler.scale, dtype=torch.float32)
    bound = torch.tensor([maxnorm] * 3 + [0.75 * grips])

    def clamp(u):
        u = u.clamp(-bound.to(u), bound.to(u))
        if close_gripper is not None:
            u[:, close_gripper:, 3] = 1
        return u

    def actions(u, pressed):
        no_rotation = torch.zeros_like(u[..., :3])
        moves = torch.cat([u[..., :3], no_rotation, u[..., 3:]], dim=-1)
        return (moves - mean.to(u)) / scale.to(u)

    std = torch.tensor([maxnorm] * 3 + [1.0 * grips])
    return Space(std=std, clamp=clamp, prob=torch.zeros(0), actions=actions)


# --- the search ---


def energy(
    predictor,
    z,
    actions,
    states,
    goal,
    compose,
    chunk=512,
    autocast=contextlib.nullcontext,
    measure="distance",
    still=None,
):
    """A function from candidates (n, H, A) to their energies (n,), low where the step predicted
    after the last action is like the goal.

    measure: what is compared
      "distance"   the predicted step and the goal: their mean |difference|
      "change"     the same of the goal and z[-1] + (prediction - prediction for `still`), the
                   actions (H, A) of rest: what the predictor gets wrong at rest too cancels out.
                   It is no measure where things move by themselves
      "direction"  minus the cosine of (prediction - z[-1]) and (goal - z[-1]): blur far ahead
                   changes how large a predicted change is more than where it points

    z (1, c, N, E): the steps until now, actions (1, c-1, A) between them, states (1, c, S), goal
    (N, E). compose(state0, actions) gives the states before each action. The past is computed once,
    and its keys and values serve all candidates, which run `chunk` at a time."""
    if measure == "change" and still is None:
        raise ValueError('energy "change" needs `still`, the actions of rest')

    # keys and values of all steps but the last
    cache = None
    if z.shape[1] > 1:
        with autocast(), torch.no_grad():
            _, cache = predict_on(predictor, z[:, :-1], actions, states)

    def last_of(part):
        """The step (n, N, E) predicted after the last action of candidates (n, H, A)."""
        # one past for all of them
        n = len(part)
        states_ahead = compose(states[:, -1].expand(n, -1), part)
        all_actions = torch.cat([actions.expand(n, -1, -1), part], dim=1)
        all_states = torch.cat([states[:, :-1].expand(n, -1, -1), states_ahead], dim=1)
        steps = z.expand(n, -1, -1, -1)
        with autocast():
            return predictor.rollout(steps, all_actions, all_states, cache=cache)[:, -1]

    # what actions change is counted from rest, once for all candidates
    error_at_rest = 0.0
    if measure == "change":
        with torch.no_grad():
            error_at_rest = last_of(still[None]) - z[:, -1]

    def cost(candidates):
        # only where a candidate ends is compared with the goal
        energies = []
        for part in candidates.split(chunk):
            last = last_of(part)
            if measure != "direction":
                energies.append((last - error_at_rest - goal).abs().mean((1, 2)))
            else:
                change = (last - z[:, -1]).flatten(1)
                wanted = (goal - z[:, -1]).flatten(1)
                energies.append(-torch.cosine_similarity(change, wanted, dim=1))
        return torch.cat(energies)

    return cost


def noise_of(n, horizon, dims, correlation, generator):
    """Standard normal (n, H, dims). Each step is correlated with the one before (AR(1)), because a
    turn lasts for a while."""
    x = torch.randn(n, horizon, dims, generator=generator)
    for h in range(1, horizon):
        x[:, h] = correlation * x[:, h - 1] + (1 - correlation**2) ** 0.5 * x[:, h]
    return x


def draw(space, n, horizon, generator, device="cpu", correlation=0.0):
    """n candidates as a search starts with: scaled actions (n, H, A)."""
    noise = noise_of(n, horizon, len(space.std), correlation, generator)
    u = space.clamp(space.std * noise)
    pressed = torch.rand(n, horizon, len(space.prob), generator=generator) < space.prob
    return space.actions(u.to(device), pressed.to(device))


def rest(space, horizon, device="cpu"):
    """No motion, no key: scaled actions (H, A)."""
    still = torch.zeros(1, horizon, len(space.std), device=device)
    no_key = torch.zeros(1, horizon, len(space.prob), device=device)
    return space.actions(still, no_key)[0]


@torch.no_grad()
def search(
    cost,
    space,
    horizon,
    *,
    num_samples=128,
    num_elites=16,
    iterations=2,
    momentum_mean=0.0,
    momentum_std=0.0,
    temperature=None,
    correlation=0.0,
    generator=None,
    noise=None,
    device="cpu",
):
    """Scaled actions (H, A) of low cost.

    CEM: the Gaussian (and the probabilities of keys) move to the num_elites best samples; new = (1
    - momentum) elites + momentum old, unbiased std. With a temperature MPPI (arXiv 1509.01149):
    they move to all samples, weighted by exp(-cost / temperature), and the std stays.

    correlation: of a sample's motion in one step and the next. The mean itself is always a
    candidate, unless `noise` (iterations, H, n, d) is given. Candidates whose cost is not finite
    are left out; ValueError if no cost is finite."""
    # what samples are drawn from at first
    mean = torch.zeros(horizon, len(space.std), device=device)
    std = space.std.to(device).expand(horizon, -1)
    prob = space.prob.to(device).expand(horizon, -1)
    for i in range(iterations):
        # candidates; the first one is the mean itself
        if noise is None:
            normal = noise_of(num_samples, *mean.shape, correlation, generator).to(device)
            pressed = torch.rand(num_samples, *prob.shape, generator=generator).to(device) < prob
            normal[0] = 0
            pressed[0] = prob > 0.5
        else:
            normal = noise[i].transpose(0, 1)
            pressed = torch.zeros(noise.shape[2], *prob.shape)
        u = space.clamp(mean + std * normal)

        # their costs; what is not finite can be no elite
        costs = cost(space.actions(u, pressed))
        usable = costs.isfinite()
        count = int(usable.sum())
        costs = costs.where(usable, math.inf)
        if not count:
            raise ValueError(
                f"none of {len(costs)} candidate plans has a finite energy: the predictor has"
                " diverged, or its features are not finite"
            )

        # where to draw from next
        if temperature is None:
            best = costs.topk(min(num_elites, count), largest=False).indices
            mean = (1 - momentum_mean) * u[best].mean(0) + momentum_mean * mean
            if len(best) > 1:  # one sample has no std: the old one stays
                std = (1 - momentum_std) * u[best].std(0) + momentum_std * std
            prob = pressed[best].float().mean(0)
        else:
            weight = (-costs / temperature).softmax(0)
            mean = torch.einsum("n,nhd->hd", weight, u)
            prob = torch.einsum("n,nhm->hm", weight, pressed.float())
        prob = prob.clamp(0.02, 0.98)  # a key must stay possible in later iterations
    return space.actions(mean[None], (prob > 0.5)[None])[0]
