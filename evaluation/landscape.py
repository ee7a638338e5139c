"""The energy around a recorded action: is it lowest where the action was? As Meta's notebook draws
it (vjepa2 notebooks/energy_landscape_example.ipynb), for any held-out steps.

Two motions of an action vary over a grid, everything else stays as it was recorded. A planner finds
the action if its energy has one valley, and the valley is at the action."""

import math
from typing import NamedTuple

import numpy as np
import torch

from files.disk import write_atomically
from files.vpt import DEGREES_PER_PIXEL

# values of each motion
POINTS = 15


class Motion(NamedTuple):
    """What varies along one side of a grid."""

    name: str

    # {dim of an action: how much of the motion it has, in the units of recordings}
    dims: dict

    # the grid is from -most to most, in the units that are shown
    most: float
    unit: str


class Landscape(NamedTuple):
    """Energies (POINTS, POINTS) of one step: a row for each value of the second motion."""

    motions: tuple
    values: tuple
    energies: np.ndarray

    # values of both motions: as recorded, and where the energy is lowest
    recorded: tuple
    lowest: tuple


def motion_pairs(robot, maxnorm, std):
    """Pairs of Motions to vary: of a robot x with y and x with z, of play yaw with pitch. maxnorm:
    metres of a step; std: (2,) pixels of mouse motion in a step."""
    if robot:
        along = [Motion(name, {i: 0.01}, 100 * maxnorm, "cm") for i, name in enumerate("xyz")]
        return [(along[0], along[1]), (along[0], along[2])]

    # the camera follows the mouse: a degree is so many pixels, and an angle in radians
    pair = []
    for i, name in enumerate(("yaw", "pitch")):
        dims = {i: 1 / DEGREES_PER_PIXEL, i + 2: math.radians(1)}
        pair.append(Motion(name, dims, 3 * std[i] * DEGREES_PER_PIXEL, "degrees"))
    return [tuple(pair)]


def landscape(cost, action, pair, scaler):
    """The Landscape around a scaled action (A,). cost: of evaluation.search.energy; pair: of
    motion_pairs."""
    # where the recorded action is, from the first dim of each motion
    recorded = []
    for motion in pair:
        dim, factor = next(iter(motion.dims.items()))
        value = action[dim].item() * scaler.scale[dim] + scaler.mean[dim]
        recorded.append(float(value / factor))

    # the grid holds it, even if it is beyond what a plan may do
    values = []
    for motion, value in zip(pair, recorded):
        most = max(motion.most, 1.2 * abs(value))
        values.append(np.linspace(-most, most, POINTS))

    # one candidate for each point, a row of the picture after the other
    candidates = action.repeat(POINTS, POINTS, 1)
    across = torch.tensor(values[0]).expand(POINTS, -1)
    upwards = torch.tensor(values[1])[:, None].expand(-1, POINTS)
    for motion, grid in zip(pair, (across, upwards)):
        for dim, factor in motion.dims.items():
            scaled = (grid * factor - scaler.mean[dim]) / scaler.scale[dim]
            candidates[:, :, dim] = scaled.to(action)
    with torch.no_grad():
        energies = cost(candidates.flatten(0, 1)[:, None])
    energies = energies.view(POINTS, POINTS).double().cpu().numpy()

    row, column = np.unravel_index(np.argmin(energies), energies.shape)
    lowest = (values[0][column], values[1][row])
    return Landscape(pair, tuple(values), energies, tuple(recorded), lowest)


def distances(landscapes):
    """How far recorded actions are from the lowest energies, and from no motion, which is what a
    model that ignores actions would do: ((n,), (n,)), in the unit that is shown."""
    off = [math.dist(x.recorded, x.lowest) for x in landscapes]
    still = [math.hypot(*x.recorded) for x in landscapes]
    return np.array(off), np.array(still)


def draw(rows, file):
    """Write a picture of rows of Landscapes: a column for each step, a cross at the recorded action
    and a ring at the lowest energy."""
    from matplotlib.figure import Figure  # takes a second to import

    size = (2.6 * len(rows[0]) + 0.4, 2.6 * len(rows) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, of_row in zip(rows, axes):
        for one, ax in zip(row, of_row):
            across, upwards = one.values
            ax.pcolormesh(across, upwards, one.energies, cmap="viridis", shading="nearest")
            ax.plot(*one.recorded, "x", color="white", ms=10, mew=2.5)
            ax.plot(*one.lowest, "o", color="red", ms=10, mew=2, fillstyle="none")
            ax.set_xlabel(f"{one.motions[0].name}, {one.motions[0].unit}")
            ax.set_ylabel(f"{one.motions[1].name}, {one.motions[1].unit}")
    figure.suptitle("energy, dark is low; cross: as recorded, ring: lowest")
    write_atomically(file, lambda f: figure.savefig(f, dpi=110))
