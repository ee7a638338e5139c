"""The simulated arm as a world for evaluation.closed_loop: goals by picture, success by true
position.

    reach    the tool at another place, 15 to 35 cm away
    push     a block 6 to 16 cm further, which the closed gripper stands behind

An action is what robot episodes have: the tool's motion in metres, its turn in radians, and how
far the gripper closes. A step is as many rows as lie between two frames of a run. Every trial has
blocks and cameras of its own, drawn as those of episodes are."""

import math

import numpy as np
from scipy.spatial.transform import Rotation

from droid import POSE
from evaluation.arm import (
    RATE,
    SUBSTEPS,
    WORLDS,
    cameras,
    free_spots,
    joints_for,
    measure,
    open_world,
    put_arm,
    put_blocks,
    reach,
    steer,
)
from evaluation.closed_loop import Task, World

# success: nearer than this at the end; the tool or the block
TASKS = {
    "reach": Task({"cm": 5}, 5.0),
    "push": Task({"cm": 4}, 4.0),
}

# where the tool may be, in metres of an arm of size 1: above the table, and within reach
LOWEST = np.array([0.25, -0.35, 0.03])
HIGHEST = np.array([0.68, 0.35, 0.5])

# of reach: where it starts and where its goals are, and how far apart
FROM = np.array([0.32, -0.22, 0.14])
TO = np.array([0.58, 0.22, 0.38])
REACH_LEAST = 0.15
REACH_MOST = 0.35

# of push: how far behind the block the tool starts, how high, how far it moves, and how far the
# block must have moved
BEHIND = 0.08
HEIGHT_OF_PUSH = 0.03
STROKE = (0.14, 0.22)
PUSHED_LEAST = 0.06

# rows at the end of a step in which the arm comes to rest: it follows a command with a lag
REST_ROWS = 4


class Arm(World):
    """The arm in steps of `stride` rows, seen by a camera. which: of WORLDS; farthest: metres that
    the oracle moves in a step along each axis, as a plan does."""

    tasks = TASKS

    def __init__(self, which, camera, stride, farthest):
        self.name = f"arm {which}"
        self.which = which
        self.camera = camera
        self.stride = stride
        self.farthest = farthest
        self.size = WORLDS[which]["size"]
        # MuJoCo is imported there: it must know how to draw before
        self.mujoco, self.model, self.renderer = open_world(which)
        self.ghost = self.mujoco.MjData(self.model)

    # --- moving ---

    def put(self, position, angles, grip):
        """Put the tool to a position at once, at rest, with everything else as it is."""
        self.position = np.array(position)
        self.rotation = Rotation.from_euler("xyz", angles)
        self.grip = grip
        self.joints = joints_for(self.mujoco, self.model, self.ghost, position, self.rotation)
        put_arm(self.data, self.joints, grip)
        self.data.qvel[:9] = 0
        self.look_around()

    def look_around(self):
        """Bring what is measured and seen up to date."""
        self.mujoco.mj_forward(self.model, self.data)
        if self.look:
            self.renderer.update_scene(self.data, self.view)
            self.picture = self.renderer.render().copy()

    def act(self, action):
        # where the tool is told to go, from where it was told to be: a lag does not add up
        start = self.position
        turned_before = self.rotation
        goal = np.clip(start + action[:3], LOWEST * self.size, HIGHEST * self.size)
        turn = Rotation.from_euler("xyz", action[3:6]).as_rotvec()
        self.grip = float(np.clip(self.grip + action[6], 0, 1))

        # a straight way, row by row, and rest at its end
        rows = max(self.stride - REST_ROWS, 1)
        for t in range(1, self.stride + 1):
            share = min(t / rows, 1)
            self.position = start + share * (goal - start)
            self.rotation = Rotation.from_rotvec(share * turn) * turned_before
            self.joints = reach(
                self.mujoco, self.model, self.ghost, self.joints, self.position, self.rotation
            )
            steer(self.data, self.joints, self.grip)
            for _ in range(SUBSTEPS):
                self.mujoco.mj_step(self.model, self.data)
        self.look_around()

    # --- trials ---

    def begin(self, task, seed, trial, look=True):
        self.task = task
        self.look = look
        rng = np.random.default_rng([seed, trial, ord(self.which)])
        prepare = {"reach": self.prepare_reach, "push": self.prepare_push}

        # a scene in which the task can be done
        ready = False
        while not ready:
            self.data = self.mujoco.MjData(self.model)
            self.spots = free_spots(rng, self.size)
            self.turns = rng.uniform(0, np.pi, 4)
            put_blocks(self.data, self.spots, self.turns)
            self.view = cameras(self.mujoco, rng, WORLDS[self.which])[self.camera]
            ready = prepare[task](rng)

    def remember_goal(self):
        """The goal is what is seen here, and where tool and block are."""
        if self.look:
            self.goal = self.seen()
        self.goal_position = self.tool()
        self.goal_block = self.block()

    def prepare_reach(self, rng):
        """A place of the tool, and another one as the goal. Whether they are apart, not too far."""
        start, goal = rng.uniform(FROM, TO, (2, 3)) * self.size
        angles = rng.uniform(-0.2, 0.2, 3)
        if not REACH_LEAST < math.dist(start, goal) < REACH_MOST:
            return False
        self.put(goal, angles, 0)
        self.remember_goal()
        self.put(start, angles, 0)
        return True

    def prepare_push(self, rng):
        """The gripper behind the first block, and what is seen after a push. Whether the block
        moved, and not too far for the arm."""
        # from behind the block, through it
        heading = rng.uniform(-np.pi, np.pi)
        ahead = np.array([math.cos(heading), math.sin(heading), 0])
        start = self.spots[0] - BEHIND * ahead
        start[2] = HEIGHT_OF_PUSH
        stroke = ahead * rng.uniform(*STROKE)
        within = [LOWEST * self.size < p for p in (start, start + stroke)]
        within += [p < HIGHEST * self.size for p in (start, start + stroke)]
        free = min(math.dist(start, spot) for spot in self.spots[1:4])
        if not np.all(np.array(within)[:, :2]) or free < 0.07:
            return False

        # do it, in as many steps as it takes
        angles = [0, 0, (heading + np.pi / 2) % np.pi - np.pi / 2]
        look = self.look
        self.look = False
        self.put(start, angles, 1)
        block = self.block()
        for share in np.diff(np.linspace(0, 1, 1 + math.ceil(0.25 / self.farthest))):
            self.act([*(share * stroke), 0, 0, 0, 0])
        self.look = look
        self.look_around()
        self.remember_goal()

        # and back to the start
        put_blocks(self.data, self.spots, self.turns)
        self.data.qvel[:] = 0
        self.put(start, angles, 1)
        return PUSHED_LEAST < math.dist(block[:2], self.goal_block[:2]) < STROKE[1]

    # --- what the harness asks for ---

    def tool(self):
        """(3,): where the tool is, in metres."""
        return self.data.site_xpos[0].copy()

    def block(self):
        """(3,): where the first block is."""
        return self.data.qpos[9:12].copy()

    def seen(self):
        return [self.picture]

    def state(self):
        fields = measure(self.data)
        pose = fields["observation/cartesian_position"]
        return np.concatenate([pose, fields["observation/gripper_position"]])

    def distance(self):
        if self.task == "push":
            return {"cm": 100 * math.dist(self.block()[:2], self.goal_block[:2])}
        return {"cm": 100 * math.dist(self.tool(), self.goal_position)}

    def oracle(self):
        # straight to where the tool is in the goal; a push is this way too
        away = self.goal_position - self.position
        return np.array([*np.clip(away, -self.farthest, self.farthest), 0, 0, 0, 0])


def check_arm(state, path="this run"):
    """ValueError for a run that cannot move the arm. state: of its checkpoint."""
    if state["dataset"] != "droid":
        raise ValueError(f"{path} was trained on play: the arm needs a run on robot episodes")
    if state["action_names"] != POSE:
        raise ValueError(
            f"{path} has actions {' '.join(state['action_names'])}: the arm knows differences of"
            f" the pose, {' '.join(POSE)}"
        )


def stride_of_arm(settings):
    """Rows of the arm in a step of a run: its --stride, or what its --fps makes of 15 rows a
    second. settings: of the run."""
    return settings["stride"] or math.ceil(RATE / settings["fps"] - 1e-6)
