"""A simulated arm, for prepare.robot and evaluation.benchmark: Franka's kinematics in MuJoCo, a
table with four blocks, an operator who moves one of them, and three cameras.

Poses are measured at the moment of the picture. A row's action_dict is what is commanded then; the
arm follows it with a lag. The tool frame is chosen so that a gripper that points down has angles 0
(Franka's own has roll near +-pi, where it jumps). World b has a shorter and quicker arm of other
colours. Its cameras stand on the other side and higher: +x and +y point to the other side of the
picture, and a metre is another number of pixels. Some grasps miss, and in every episode the
operator rests at the start and once later."""

import functools
import os
import sys
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

RATE = 15  # rows a second
SUBSTEPS = 16  # of the simulation, in a row
WIDTH = 320
HEIGHT = 180
HOME = np.array([0, 0.1, 0, -2.0, 0, 2.1, -np.pi / 4])
COLOURS = {
    "red": "0.85 0.1 0.1",
    "green": "0.1 0.65 0.2",
    "blue": "0.1 0.25 0.85",
    "yellow": "0.95 0.8 0.1",
}
# size: of the arm; speed: metres a second; views: (azimuth, elevation, distance) of the exterior
# cameras, in degrees and metres
WORLDS = {
    "a": {
        "size": 1.0,
        "speed": 0.4,
        "links": "0.93 0.93 0.95",
        "joints": "0.15 0.2 0.3",
        "table": "0.72 0.6 0.45",
        "floor": "0.45 0.5 0.55",
        "views": {"exterior_1": (70, -16, 1.0), "exterior_2": (-70, -25, 1.2)},
    },
    "b": {
        "size": 0.85,
        "speed": 0.55,
        "links": "0.95 0.55 0.1",
        "joints": "0.1 0.1 0.1",
        "table": "0.35 0.4 0.38",
        "floor": "0.7 0.68 0.66",
        "views": {"exterior_1": (-115, -42, 0.9), "exterior_2": (115, -30, 1.0)},
    },
}
# The joints, from the base: (position, quaternion, joint range, end of a capsule that starts at the
# joint, its radius). Franka's kinematics (mujoco_menagerie, panda.xml).
CHAIN = [
    ((0, 0, 0.333), "1 0 0 0", 2.9, (0, 0, -0.2), 0.075),
    ((0, 0, 0), "1 -1 0 0", 1.8, (0, -0.316, 0), 0.065),
    ((0, -0.316, 0), "1 1 0 0", 2.9, (0.0825, 0, 0), 0.065),
    ((0.0825, 0, 0), "1 1 0 0", 3.1, (-0.0825, 0.384, 0), 0.055),
    ((-0.0825, 0.384, 0), "1 -1 0 0", 2.9, (0, 0, -0.06), 0.055),
    ((0, 0, 0), "1 1 0 0", 3.8, (0.088, 0, 0), 0.05),
    ((0.088, 0, 0), "1 1 0 0", 2.9, (0, 0, 0.09), 0.045),
]


# --- the scene ---


def scene(world):
    """The XML of a world: arm, gripper, table, four blocks."""
    w = WORLDS[world]
    return f"""<mujoco>
        <compiler angle="radian"/>
        <option timestep="{1 / RATE / SUBSTEPS}" integrator="implicitfast" cone="elliptic"/>
        <visual>
            <global offwidth="{WIDTH}" offheight="{HEIGHT}" fovy="50"/>
            <quality shadowsize="0" offsamples="0" numslices="20" numstacks="10"/>
            <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0.1 0.1 0.1"/>
        </visual>
        <default>
            <default class="arm"><geom contype="0" conaffinity="0"/></default>
        </default>
        <asset>
            <texture type="skybox" builtin="flat" rgb1="0.6 0.66 0.7" rgb2="0.6 0.66 0.7"
                width="32" height="32"/>
            <texture name="wood" type="2d" builtin="flat" width="128" height="128"
                rgb1="{w["table"]}" mark="random" markrgb="0.5 0.4 0.3" random="0.02"/>
            <material name="wood" texture="wood" texrepeat="2 2"/>
        </asset>
        <worldbody>
            <light pos="0.5 -1 2.5" dir="0 0.4 -1" diffuse="0.5 0.5 0.5" castshadow="false"/>
            {furniture(w)}
            {arm(w)}
            {blocks()}
        </worldbody>
        <actuator>{servos()}</actuator>
    </mujoco>"""


def furniture(w):
    """Floor, table, and the foot that the arm stands on."""
    return f"""
        <geom class="arm" type="plane" pos="0 0 -0.6" size="4 4 1" rgba="{w["floor"]} 1"/>
        <geom type="box" pos="0.45 0 -0.02" size="0.75 0.6 0.02" material="wood"
            friction="1 0.05 0.01"/>
        <geom class="arm" type="cylinder" pos="0 0 0.06" size="0.1 0.06" rgba="{w["joints"]} 1"/>"""


def arm(w):
    """The bodies of CHAIN, one in the other, with the gripper in the last."""

    def scaled(point):
        return " ".join(f"{x * w['size']:.4f}" for x in point)

    # from the hand inwards: each body contains the next
    body = gripper(w)
    for i, (position, quaternion, limit, end, radius) in reversed(list(enumerate(CHAIN))):
        body = f"""
            <body pos="{scaled(position)}" quat="{quaternion}" gravcomp="1">
                <joint name="j{i}" range="{-limit} {limit}" damping="2" armature="0.2"/>
                <geom class="arm" type="sphere" size="{radius * 1.2:.3f}" rgba="{w["joints"]} 1"/>
                <geom class="arm" type="capsule" fromto="0 0 0 {scaled(end)}" size="{radius}"
                    rgba="{w["links"]} 1"/>
                {body}
            </body>"""
    return body


def gripper(w):
    """The hand, the tool's frame, the camera at the wrist and two fingers that slide."""
    # two fingers, 8 cm apart when open
    fingers = ""
    for i, side in enumerate((1, -1)):
        fingers += f"""
            <body pos="0 0 0.0584">
                <joint name="f{i}" type="slide" axis="0 {side} 0" range="0 0.04" damping="5"
                    armature="0.1"/>
                <geom type="box" pos="0 {side * 0.008} 0.028" size="0.011 0.008 0.03"
                    rgba="0.2 0.2 0.2 1" friction="2 0.1 0.01" mass="0.1"/>
            </body>"""
    return f"""
        <body pos="0 0 {0.107 * w["size"]}" quat="0.9238795 0 0 -0.3826834">
            <geom class="arm" type="box" pos="0 0 0.03" size="0.025 0.1 0.035"
                rgba="{w["joints"]} 1"/>
            <site name="tool" pos="0 0 0.103" quat="0 1 0 0" group="4"/>
            <camera name="wrist" pos="0.09 0 0" xyaxes="0 1 0 0.94 0 0.34" fovy="75"/>
            {fingers}
        </body>"""


def blocks():
    """The four blocks, free to move."""
    text = ""
    for name, rgb in COLOURS.items():
        text += f"""
            <body name="{name}">
                <freejoint/>
                <geom type="box" size="0.024 0.024 0.024" rgba="{rgb} 1" mass="0.08"
                    friction="1.5 0.05 0.01" condim="4"/>
            </body>"""
    return text


def servos():
    """The motors of seven joints and two fingers: ctrl is the position that each should have."""
    # stiff joints; the force of the fingers is limited
    text = ""
    for i in range(7):
        text += f'<position joint="j{i}" kp="1500" kv="150"/>'
    for i in (0, 1):
        text += f'<position joint="f{i}" kp="400" kv="20" forcerange="-15 15"/>'
    return text


@functools.lru_cache(1)
def open_world(world):
    """(mujoco, model, renderer) of this process. Raises ValueError if MuJoCo is absent or cannot
    draw here."""
    # without a screen MuJoCo draws through EGL
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(scene(world))
        return mujoco, model, mujoco.Renderer(model, HEIGHT, WIDTH)
    except (ImportError, AttributeError, RuntimeError) as e:
        # all three come from PyOpenGL and MuJoCo where a library is missing
        raise ValueError(
            f"cannot draw ({e}): pip install mujoco==4.0.0, and for EGL apt install libegl1 libgl1;"
            " or MUJOCO_GL=osmesa"
        ) from e


# --- the operator ---


class Waypoint(NamedTuple):
    position: np.ndarray  # xyz in metres
    angles: np.ndarray
    grip: int  # 0 open, 1 closed
    wait: int  # steps


def waypoints(rng, block, angle, goal):
    """The operator's path: move to a block, lift it, carry it, put it down, then wander."""
    # to which side it misses, if it does
    side = rng.choice([-1, 1])
    misses = rng.random() < 0.3  # some grasps go beside the block
    beside = np.array([0, 0.1, 0]) * side * misses

    # the nearest turn that takes two faces of the block
    turn = np.array([0, 0, (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4])

    def tilted():
        return turn + rng.uniform(-0.3, 0.3, 3)

    def somewhere():
        position = rng.uniform((0.3, -0.25, 0.1), (0.6, 0.25, 0.4))
        angles = tilted()
        closed = int(rng.random() < 0.3)
        return Waypoint(position, angles, closed, 2)

    # where to hover, where to grasp, where to put down
    up = np.array([0, 0, rng.uniform(0.14, 0.26)])
    take = block + beside
    put = goal + [0, 0, 0.01]
    path = [
        Waypoint(take + up, tilted(), 0, 0),
        Waypoint(take + [0, 0, 0.06], turn, 0, 0),
        Waypoint(take, turn, 0, 1),
        Waypoint(take, turn, 1, 6),
        Waypoint(block + up, tilted(), 1, 0),
        Waypoint(goal + up, tilted(), 1, 0),
        Waypoint(put, turn, 1, 1),
        Waypoint(put, turn, 0, 4),
        Waypoint(goal + up, tilted(), 0, 0),
    ]

    # half of the episodes start with a detour, and all end with wandering
    detour = somewhere()
    if rng.random() < 0.5:
        path.insert(0, detour)
    for _ in range(12):
        path.append(somewhere())
    return path


class Operator:
    """Moves the command for the tool along waypoints, with a lag of its own."""

    def __init__(self, path, speed, position, angles):
        self.path = path
        self.speed = speed  # metres a second
        self.position = position
        self.angles = angles
        self.grip = 0.0  # 0 open to 1 closed
        self.velocity = np.zeros(3)
        self.spin = np.zeros(3)
        self.waited = 0  # steps at the current waypoint

    def command(self):
        """(7,): xyz, angles, gripper."""
        return np.array([*self.position, *self.angles, self.grip])

    def rotation(self):
        return Rotation.from_euler("xyz", self.angles)

    def rest(self):
        self.velocity = np.zeros(3)
        self.spin = np.zeros(3)

    def move(self):
        """One step on the way to the next waypoint; there, first move the gripper and wait."""
        # how far is the next waypoint?
        goal = self.path[0]
        away = goal.position - self.position
        distance = np.linalg.norm(away)

        # speed and turning speed go half of the way to what they should be
        velocity = away / max(distance, 0.06) * self.speed
        spin = np.clip(4 * (goal.angles - self.angles), -1.5, 1.5)
        self.velocity = self.velocity + 0.5 * (velocity - self.velocity)
        self.spin = self.spin + 0.5 * (spin - self.spin)
        self.position = self.position + self.velocity / RATE
        self.angles = self.angles + self.spin / RATE

        # there: first the gripper, a third of its way a step, then the wait
        if distance < 0.02 and np.abs(goal.angles - self.angles).max() < 0.1:
            self.grip = self.grip + np.clip(goal.grip - self.grip, -0.34, 0.34)
            self.waited += 1
            ready = self.waited > goal.wait and abs(self.grip - goal.grip) < 0.01
            if ready and len(self.path) > 1:
                self.path = self.path[1:]
                self.waited = 0


def reach(mujoco, model, ghost, joints, position, rotation):
    """Joint angles near `joints` that bring the tool to a pose: damped least squares, pulled gently
    to HOME. ghost: a MjData for trying them."""
    for _ in range(4):
        # where the tool is with these joints, and how it moves with each
        ghost.qpos[:7] = joints
        mujoco.mj_kinematics(model, ghost)
        mujoco.mj_comPos(model, ghost)
        jacobian = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, ghost, jacobian[:3], jacobian[3:], 0)
        j = jacobian[:, :7]

        # what is missing: metres, and a rotation vector
        turn = rotation * Rotation.from_matrix(ghost.site_xmat[0].reshape(3, 3)).inv()
        error = np.concatenate([position - ghost.site_xpos[0], turn.as_rotvec()])

        # a damped step towards it; joints that are free of it drift to HOME
        inverse = j.T @ np.linalg.inv(j @ j.T + 1e-3 * np.eye(6))
        joints = joints + inverse @ error + 0.02 * (np.eye(7) - inverse @ j) @ (HOME - joints)
    return joints


def joints_for(mujoco, model, ghost, position, rotation):
    """Joint angles (7,) that bring the tool to a pose, from HOME."""
    joints = HOME.copy()
    for _ in range(20):
        joints = reach(mujoco, model, ghost, joints, position, rotation)
    return joints


# --- an episode ---


def put_blocks(data, spots, turns):
    """Put the four blocks to their spots (4 or more, 3), turned by radians (4,)."""
    for i in range(4):
        turn = [np.cos(turns[i] / 2), 0, 0, np.sin(turns[i] / 2)]
        data.qpos[9 + 7 * i :][:7] = [*spots[i], *turn]


def steer(data, joints, grip):
    """Tell the motors: joint angles (7,), and the gripper from 0, open, to 1."""
    data.ctrl[:7] = joints
    data.ctrl[7:] = 0.04 * (1 - grip)


def put_arm(data, joints, grip):
    """Put the arm there, at rest, and tell it to stay."""
    steer(data, joints, grip)
    data.qpos[:9] = data.ctrl


def play(world, seed, number, steps):
    """One episode -> (rows {field: (T, d)}, pictures {camera: [(180, 320, 3) uint8]}, the colour of
    the block that was to be moved, whether it was)."""
    # an episode has a generator of its own: its number decides it, not the order of the work
    mujoco, model, renderer = open_world(world)
    w = WORLDS[world]
    rng = np.random.default_rng([seed, number, ord(world)])
    data = mujoco.MjData(model)
    ghost = mujoco.MjData(model)

    # what stands where, what the operator does, and when it rests
    spots = free_spots(rng, w["size"])
    wanted = int(rng.integers(4))
    turns = rng.uniform(0, np.pi, 4)
    put_blocks(data, spots, turns)
    goal = spots[4]
    path = waypoints(rng, spots[wanted], turns[wanted], goal)
    views = cameras(mujoco, rng, w)
    pauses = rests(rng, steps)

    # the arm starts somewhere above the table, with the gripper open
    position = rng.uniform((0.35, -0.15, 0.2), (0.5, 0.15, 0.38)) * w["size"]
    angles = rng.uniform(-0.2, 0.2, 3)
    operator = Operator(path, w["speed"], position, angles)
    joints = joints_for(mujoco, model, ghost, operator.position, operator.rotation())
    put_arm(data, joints, grip=0)

    rows = {}
    pictures = {name: [] for name in views}
    steps_to_rest = 0
    for t in range(steps):
        # what is seen and measured
        mujoco.mj_forward(model, data)
        for name, view in views.items():
            renderer.update_scene(data, view)
            pictures[name].append(renderer.render().copy())
        measured = measure(data)

        # what the operator commands
        command_before = operator.command()
        joints_before = joints
        steps_to_rest = max(steps_to_rest - 1, 0, pauses.get(t, 0))
        if steps_to_rest:
            operator.rest()
        else:
            operator.move()
            joints = reach(mujoco, model, ghost, joints, operator.position, operator.rotation())
        steer(data, joints, operator.grip)

        row = measured | commanded(operator.command(), command_before, joints, joints_before)
        for name, values in row.items():
            rows.setdefault(name, []).append(values)
        for _ in range(SUBSTEPS):
            mujoco.mj_step(model, data)

    # moved: near the goal, and not on top of another block
    end = data.qpos[9 + 7 * wanted :][:3]
    success = bool(np.hypot(*(end - goal)[:2]) < 0.06 and end[2] < 0.05)
    arrays = {name: np.array(values, dtype=np.float32) for name, values in rows.items()}
    return arrays, pictures, list(COLOURS)[wanted], success


def free_spots(rng, size):
    """(5, 3): places of the four blocks and of the goal, apart from each other."""
    spots = []
    while len(spots) < 5:
        spot = rng.uniform((0.34, -0.24), (0.62, 0.24))
        if all(np.hypot(*(spot - other)) > 0.09 for other in spots):
            spots.append(spot)
    return np.column_stack([np.array(spots) * size, np.full(5, 0.02)])


def cameras(mujoco, rng, w):
    """{name: camera}: the exterior ones stand a little differently in every episode."""
    views = {}
    for name, place in w["views"].items():
        camera = mujoco.MjvCamera()
        place = place + rng.normal(0, (1.5, 1, 0.02))
        camera.azimuth = place[0]
        camera.elevation = place[1]
        camera.distance = place[2]
        camera.lookat[:] = np.array([0.4, 0, 0.2]) * w["size"] + rng.normal(0, 0.01, 3)
        views[name] = camera
    views["wrist"] = "wrist"
    return views


def rests(rng, steps):
    """{step: steps that the operator rests from there}: at the start, and once later."""
    at_start = int(rng.integers(3, 15))
    later = int(rng.integers(steps // 4, steps))
    return {0: at_start, later: int(rng.integers(8, 26))}


def measure(data):
    """What the arm is doing, in DROID's fields."""
    rotation = Rotation.from_matrix(data.site_xmat[0].reshape(3, 3))
    return {
        "observation/cartesian_position": np.concatenate(
            [data.site_xpos[0], rotation.as_euler("xyz")]
        ),
        "observation/gripper_position": [1 - data.qpos[7:9].sum() / 0.08],
        "observation/joint_position": data.qpos[:7].copy(),
    }


def commanded(command, command_before, joints, joints_before):
    """What the arm is told to do, in DROID's fields. Speeds are those from the command before."""
    speed = (command - command_before) * RATE
    return {
        "action_dict/cartesian_position": command[:6],
        "action_dict/cartesian_velocity": speed[:6],
        "action_dict/gripper_position": command[6:],
        "action_dict/gripper_velocity": speed[6:],
        "action_dict/joint_position": joints,
        "action_dict/joint_velocity": (joints - joints_before) * RATE,
        "action": [*speed[:6], command[6]],
    }
