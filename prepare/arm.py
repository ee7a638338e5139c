"""The arm of prepare.robot: Franka's kinematics in MuJoCo, a table with four blocks, an operator
who moves one, three cameras.

Poses are measured, at the moment of the picture; a row's action_dict is what is commanded then,
which the arm follows with a lag. The tool frame is such that a gripper that points down has angles
0 (Franka's has roll near +-pi, where it jumps). World b's arm is shorter, quicker and of other
colours, and its cameras stand on the other side and higher: +x and +y go to the other side of the
picture, and a metre is another number of pixels. Some grasps miss, and in every episode the
operator rests at the start and once later."""

import functools
import os
import sys

import numpy as np
from scipy.spatial.transform import Rotation

RATE, SUBSTEPS, WIDTH, HEIGHT = 15, 16, 320, 180
HOME = np.array([0, 0.1, 0, -2.0, 0, 2.1, -np.pi / 4])
COLOURS = {
    "red": "0.85 0.1 0.1",
    "green": "0.1 0.65 0.2",
    "blue": "0.1 0.25 0.85",
    "yellow": "0.95 0.8 0.1",
}
# size: of the arm; speed: metres a second; views: (azimuth, elevation, distance) of the exterior
# cameras, degrees and metres
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
# (position, quaternion, joint range, capsule from the joint to there, its radius): Franka's
# kinematics (mujoco_menagerie, panda.xml)
CHAIN = [
    ((0, 0, 0.333), "1 0 0 0", 2.9, (0, 0, -0.2), 0.075),
    ((0, 0, 0), "1 -1 0 0", 1.8, (0, -0.316, 0), 0.065),
    ((0, -0.316, 0), "1 1 0 0", 2.9, (0.0825, 0, 0), 0.065),
    ((0.0825, 0, 0), "1 1 0 0", 3.1, (-0.0825, 0.384, 0), 0.055),
    ((-0.0825, 0.384, 0), "1 -1 0 0", 2.9, (0, 0, -0.06), 0.055),
    ((0, 0, 0), "1 1 0 0", 3.8, (0.088, 0, 0), 0.05),
    ((0.088, 0, 0), "1 1 0 0", 2.9, (0, 0, 0.09), 0.045),
]


def scene(world):
    """The XML of a world: arm, gripper, table, four blocks."""
    w = WORLDS[world]
    fingers, blocks = "", ""
    for i, side in enumerate((1, -1)):
        fingers += f"""<body pos="0 0 0.0584"><joint name="f{i}" type="slide" axis="0 {side} 0" range="0 0.04" damping="5" armature="0.1"/>
            <geom type="box" pos="0 {side * 0.008} 0.028" size="0.011 0.008 0.03" rgba="0.2 0.2 0.2 1" friction="2 0.1 0.01" mass="0.1"/>
            </body>"""
    arm = f"""<body pos="0 0 {0.107 * w["size"]}" quat="0.9238795 0 0 -0.3826834">
        <geom class="arm" type="box" pos="0 0 0.03" size="0.025 0.1 0.035" rgba="{w["joints"]} 1"/>
        <site name="tool" pos="0 0 0.103" quat="0 1 0 0" group="4"/>
        <camera name="wrist" pos="0.09 0 0" xyaxes="0 1 0 0.94 0 0.34" fovy="75"/>{fingers}</body>"""
    for i, (at, quat, limit, to, radius) in reversed([*enumerate(CHAIN)]):
        at, to = (" ".join(f"{x * w['size']:.4f}" for x in p) for p in (at, to))
        arm = f"""<body pos="{at}" quat="{quat}" gravcomp="1"><joint name="j{i}" range="{-limit} {limit}" damping="2" armature="0.2"/>
            <geom class="arm" type="sphere" size="{radius * 1.2:.3f}" rgba="{w["joints"]} 1"/>
            <geom class="arm" type="capsule" fromto="0 0 0 {to}" size="{radius}" rgba="{w["links"]} 1"/>{arm}</body>"""
    for name, rgba in COLOURS.items():
        blocks += f"""<body name="{name}"><freejoint/><geom type="box" size="0.024 0.024 0.024" rgba="{rgba} 1" mass="0.08"
            friction="1.5 0.05 0.01" condim="4"/></body>"""
    servos = "".join(f'<position joint="j{i}" kp="1500" kv="150"/>' for i in range(7))
    servos += "".join(
        f'<position joint="f{i}" kp="400" kv="20" forcerange="-15 15"/>' for i in (0, 1)
    )
    return f"""<mujoco><compiler angle="radian"/><option timestep="{1 / RATE / SUBSTEPS}" integrator="implicitfast" cone="elliptic"/>
        <visual><global offwidth="{WIDTH}" offheight="{HEIGHT}" fovy="50"/>
        <quality shadowsize="0" offsamples="0" numslices="20" numstacks="10"/>
        <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0.1 0.1 0.1"/></visual>
        <default><default class="arm"><geom contype="0" conaffinity="0"/></default></default>
        <asset><texture type="skybox" builtin="flat" rgb1="0.6 0.66 0.7" rgb2="0.6 0.66 0.7" width="32" height="32"/>
        <texture name="wood" type="2d" builtin="flat" width="128" height="128" rgb1="{w["table"]}" mark="random" markrgb="0.5 0.4 0.3"
        random="0.02"/><material name="wood" texture="wood" texrepeat="2 2"/></asset>
        <worldbody><light pos="0.5 -1 2.5" dir="0 0.4 -1" diffuse="0.5 0.5 0.5" castshadow="false"/>
        <geom class="arm" type="plane" pos="0 0 -0.6" size="4 4 1" rgba="{w["floor"]} 1"/>
        <geom type="box" pos="0.45 0 -0.02" size="0.75 0.6 0.02" material="wood" friction="1 0.05 0.01"/>
        <geom class="arm" type="cylinder" pos="0 0 0.06" size="0.1 0.06" rgba="{w["joints"]} 1"/>
        {arm}{blocks}</worldbody><actuator>{servos}</actuator></mujoco>"""


@functools.lru_cache(1)
def open_world(world):
    """(mujoco, model, renderer) of this process. ValueError if MuJoCo is absent or cannot draw
    here."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(scene(world))
        return mujoco, model, mujoco.Renderer(model, HEIGHT, WIDTH)
    except (
        ImportError,
        AttributeError,
        RuntimeError,
    ) as e:  # PyOpenGL and MuJoCo, where a library is missing
        raise ValueError(
            f"cannot draw ({e}): pip install mujoco==4.0.0, and for EGL apt install libegl1 libgl1;"
            " or MUJOCO_GL=osmesa"
        ) from e


def waypoints(rng, block, angle, goal):
    """What the operator does: [(xyz, angles, gripper, steps to wait there)]: to a block, lift,
    carry, put down, wander on."""
    beside = np.array([0, 0.1, 0]) * rng.choice([-1, 1]) * (rng.random() < 0.3)  # some grasps miss
    turn = np.array(
        [0, 0, (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4]
    )  # the nearest one that takes a face of it

    def somewhere():
        return rng.uniform((0.3, -0.25, 0.1), (0.6, 0.25, 0.4)), tilt(), int(rng.random() < 0.3), 2

    def tilt():
        return turn + rng.uniform(-0.3, 0.3, 3)

    up, take, put = np.array([0, 0, rng.uniform(0.14, 0.26)]), block + beside, goal + [0, 0, 0.01]
    out = [
        (take + up, tilt(), 0, 0),
        (take + [0, 0, 0.06], turn, 0, 0),
        (take, turn, 0, 1),
        (take, turn, 1, 6),
        (block + up, tilt(), 1, 0),
        (goal + up, tilt(), 1, 0),
        (put, turn, 1, 1),
        (put, turn, 0, 4),
        (goal + up, tilt(), 0, 0),
    ]
    return [somewhere()] * (rng.random() < 0.5) + out + [somewhere() for _ in range(12)]


def reach(mujoco, model, ghost, joints, position, rotation):
    """Joint angles near `joints` that bring the tool to a pose: damped least squares, pulled gently
    to HOME."""
    for _ in range(4):
        ghost.qpos[:7] = joints
        mujoco.mj_kinematics(model, ghost)
        mujoco.mj_comPos(model, ghost)
        jacobian = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, ghost, jacobian[:3], jacobian[3:], 0)
        j = jacobian[:, :7]
        turn = rotation * Rotation.from_matrix(ghost.site_xmat[0].reshape(3, 3)).inv()
        off = np.concatenate([position - ghost.site_xpos[0], turn.as_rotvec()])
        inverse = j.T @ np.linalg.inv(j @ j.T + 1e-3 * np.eye(6))
        joints = joints + inverse @ off + 0.02 * (np.eye(7) - inverse @ j) @ (HOME - joints)
    return joints


def play(world, seed, number, steps):
    """One episode -> (rows {field: (T, d)}, pictures {camera: [(180, 320, 3) uint8]}, what was
    asked, whether it was done)."""
    mujoco, model, renderer = open_world(world)
    rng, w = np.random.default_rng([seed, number, ord(world)]), WORLDS[world]
    data, ghost = mujoco.MjData(model), mujoco.MjData(model)
    spots = []
    while len(spots) < 5:  # four blocks and a goal, apart from each other
        spot = rng.uniform((0.34, -0.24), (0.62, 0.24))
        spots += [spot] * all(np.hypot(*(spot - s)) > 0.09 for s in spots)
    spots = np.column_stack([np.array(spots) * w["size"], np.full(5, 0.02)])
    wanted, turns = int(rng.integers(4)), rng.uniform(0, np.pi, 4)
    for i in range(4):
        data.qpos[9 + 7 * i :][:7] = [*spots[i], np.cos(turns[i] / 2), 0, 0, np.sin(turns[i] / 2)]
    goal, path = spots[4], waypoints(rng, spots[wanted], turns[wanted], spots[4])
    views = {}
    for name, where in w["views"].items():
        views[name] = mujoco.MjvCamera()
        views[name].azimuth, views[name].elevation, views[name].distance = where + rng.normal(
            0, (1.5, 1, 0.02)
        )
        views[name].lookat[:] = np.array([0.4, 0, 0.2]) * w["size"] + rng.normal(0, 0.01, 3)
    views["wrist"] = "wrist"
    pauses = {
        0: int(rng.integers(3, 15)),
        int(rng.integers(steps // 4, steps)): int(rng.integers(8, 26)),
    }  # step -> steps of rest
    position, angles = (
        rng.uniform((0.35, -0.15, 0.2), (0.5, 0.15, 0.38)) * w["size"],
        rng.uniform(-0.2, 0.2, 3),
    )
    joints, velocity, spin = HOME.copy(), np.zeros(3), np.zeros(3)
    for _ in range(20):
        joints = reach(mujoco, model, ghost, joints, position, Rotation.from_euler("xyz", angles))
    data.qpos[:7] = data.ctrl[:7] = joints
    data.qpos[7:9] = data.ctrl[7:] = 0.04
    rows, pictures, idle, wait, grip = {}, {name: [] for name in views}, 0, 0, 0.0
    for t in range(steps):
        mujoco.mj_forward(model, data)
        for name, view in views.items():
            renderer.update_scene(data, view)
            pictures[name].append(renderer.render().copy())
        pose = np.concatenate(
            [
                data.site_xpos[0],
                Rotation.from_matrix(data.site_xmat[0].reshape(3, 3)).as_euler("xyz"),
            ]
        )
        before, joints_before = np.array([*position, *angles, grip]), joints
        idle = max(idle - 1, 0, pauses.get(t, 0))
        if idle:
            velocity, spin = np.zeros(3), np.zeros(3)
        else:
            to, turn, grip_to, hold = path[0]
            away = to - position
            distance = np.linalg.norm(away)
            velocity = velocity + 0.5 * (away / max(distance, 0.06) * w["speed"] - velocity)
            spin = spin + 0.5 * (np.clip(4 * (turn - angles), -1.5, 1.5) - spin)
            position, angles = position + velocity / RATE, angles + spin / RATE
            if distance < 0.02 and np.abs(turn - angles).max() < 0.1:
                grip, wait = grip + np.clip(grip_to - grip, -0.34, 0.34), wait + 1
                if wait > hold and abs(grip - grip_to) < 0.01 and len(path) > 1:
                    path, wait = path[1:], 0
            joints = reach(
                mujoco, model, ghost, joints, position, Rotation.from_euler("xyz", angles)
            )
        data.ctrl[:7], data.ctrl[7:] = joints, 0.04 * (1 - grip)
        command = np.array([*position, *angles, grip])
        speed = (command - before) * RATE
        found = {
            "observation/cartesian_position": pose,
            "observation/gripper_position": [1 - data.qpos[7:9].sum() / 0.08],
            "observation/joint_position": data.qpos[:7].copy(),
            "action_dict/cartesian_position": command[:6],
            "action_dict/cartesian_velocity": speed[:6],
            "action_dict/gripper_position": [grip],
            "action_dict/gripper_velocity": speed[6:],
            "action_dict/joint_position": joints,
            "action_dict/joint_velocity": (joints - joints_before) * RATE,
            "action": [*speed[:6], grip],
        }
        for k, x in found.items():
            rows.setdefault(k, []).append(x)
        for _ in range(SUBSTEPS):
            mujoco.mj_step(model, data)
    end = data.qpos[9 + 7 * wanted :][:3]
    done = bool(np.hypot(*(end - goal)[:2]) < 0.06 and end[2] < 0.05)
    return (
        {k: np.array(x, dtype=np.float32) for k, x in rows.items()},
        pictures,
        list(COLOURS)[wanted],
        done,
    )
