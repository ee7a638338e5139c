"""How fast is a step of play.py, does memory stay flat, and where does play drift to in a minute?

    python -m bench.play --checkpoint out/demo --decoder out/decoder \\
        --data 'demo/features/val/*.tar'

From a few starts the model is played for --seconds of its own time: at rest, and by a player who
presses random keys and arrows, new ones about every second. Prints for some moments, as means over
the starts: the distance to the nearest real step of another recording (1 is usual for real steps),
how much patches differ (structure, 1 is usual for real steps), what the action did (a share of what
real steps change), the resident memory, and the median time of a step, and of the processors in it,
with all that play.py does: prediction, rest beside it, decoder, nearest step, JPEG."""

import argparse
import os
import statistics
import time

import numpy as np

from bench import report
from evaluation.decoded import Decoder
from evaluation.playing import Player, open_playground
from evaluation.runs import load_run
from files.progress import tqdm

POLICIES = ["rest", "random"]

# chance that a random player changes what is pressed, in each step
CHANGE = 0.2


def random_keys(can_hold, rng):
    """What a random player presses: each key that moves with a chance of one half, and a turn half
    of the time."""
    pressed = []
    for name in ("key.w", "key.a", "key.d"):
        if name in can_hold and rng.random() < 0.5:
            pressed.append(name)
    if rng.random() < 0.5:
        pressed.append(str(rng.choice(["turn.left", "turn.right"])))
    return pressed


def resident():
    """MiB that this process holds now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--checkpoint", required=True, help="a run on play")
    flag("--decoder", required=True, help="a run of train_decoder.py")
    flag("--data", nargs="+", help="held-out features (default: the run's)")
    flag("--window", type=int, help="steps that the predictor sees (default: as in training)")
    flag("--clips", type=int, default=256, help="recorded clips (default 256)")
    flag("--starts", type=int, default=5, help="clips to start from (default 5)")
    flag("--seconds", type=float, default=60.0, help="of play from each (default 60)")
    flag("--seed", type=int, default=0, help="of clips and keys (default 0)")
    flag("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args()

    # --- play ---
    run = load_run(args.checkpoint)
    decoder = Decoder(args.decoder, run.device)
    ground = open_playground(
        run, decoder, args.data, None, None, args.window, args.clips, args.seed
    )
    if run.state["dataset"] == "droid":
        raise ValueError(
            f"--checkpoint {args.checkpoint} is a robot's run: bench.play presses keys"
        )
    count = len(ground.real.recordings)
    if not 1 <= args.starts <= count:
        raise ValueError(f"--starts {args.starts}: choose 1 to {count}, the clips that were read")
    steps = max(round(args.seconds / ground.seconds), 1)
    times, cpu_times = [], []
    tracks = {}
    for policy in POLICIES:
        tracks[policy] = []
        for start in tqdm(range(args.starts), policy, unit=" starts"):
            rng = np.random.default_rng([args.seed, start])
            player = Player(ground)
            track = [player.begin(start)]
            memory = [resident()]
            for _ in range(steps):
                if policy == "random" and rng.random() < CHANGE:
                    names = random_keys(player.controls.can_hold, rng)
                    player.controls.hear({"type": "held", "names": names})
                began = time.perf_counter()
                cpu_began = time.process_time()
                track.append(player.step(player.take()))
                times.append(time.perf_counter() - began)
                cpu_times.append(time.process_time() - cpu_began)
                memory.append(resident())
            measured = []
            for step, mib in zip(track, memory):
                measured.append([step.distance, step.structure, step.gap or 0, mib])
            tracks[policy].append(measured)

    # --- rows ---
    # at the start, and after ever longer times
    moments = [0]
    for seconds in (0.2, 0.4, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600):
        step = round(seconds / ground.seconds)
        if moments[-1] < step <= steps:
            moments.append(step)
    rows = []
    for policy in POLICIES:
        means = np.mean(tracks[policy], axis=0)
        for step in moments:
            mean = means[step].tolist()
            rows.append(
                {
                    "play": policy,
                    "seconds": round(step * ground.seconds, 2),
                    "distance": mean[0],
                    "structure": mean[1],
                    "gap": mean[2],
                    "resident MiB": mean[3],
                    "ms a step": 1000 * statistics.median(times),
                    "CPU ms a step": 1000 * statistics.median(cpu_times),
                    "starts": args.starts,
                }
            )
    report(rows, args.json, run.device)
