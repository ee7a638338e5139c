"""Candidates a second of the planner: keys and values kept and shared, against running the whole
sequence anew for each step (upstream).

    python -m bench.plan
    python -m bench.plan --width 1024 --depth 24 --grid 16 --samples 64 --horizons 1 2        # the released predictor's size

One whole search each (CEM), from the same noise, on a predictor with random weights. Prints medians
of interleaved repeats and the largest difference between the actions that the two chose."""

import argparse
import functools

import torch

from bench import medians, report
from evaluation.search import energy, search, vpt_space
from files.vpt import ACTION_SPACES
from model import Predictor, compose_states, normalize_features, predict


class NoScaler:
    """Actions are in units of the data already."""

    mean, scale = torch.zeros(4), torch.ones(4)


def energy_from_scratch(predictor, z, actions, states, goal, compose):
    """evaluation.search.energy as the reference computes it: for every step of a candidate the whole
    sequence runs again, and nothing is shared."""

    @torch.no_grad()
    def cost(candidates):
        n = len(candidates)
        states_ahead = compose(states[:, -1].expand(n, -1), candidates)
        all_actions = torch.cat([actions.expand(n, -1, -1), candidates], dim=1)
        all_states = torch.cat([states[:, :-1].expand(n, -1, -1), states_ahead], dim=1)
        steps = z.expand(n, -1, -1, -1)
        while steps.shape[1] <= all_actions.shape[1]:
            past = steps.shape[1]
            last = predict(predictor, steps, all_actions[:, :past], all_states[:, :past])[:, -1:]
            steps = torch.cat([steps, last], dim=1)
        return (steps[:, -1] - goal).abs().mean((1, 2))

    return cost


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    p.add_argument("--width", type=int, default=192, help="of the predictor")
    p.add_argument("--depth", type=int, default=4, help="blocks of the predictor")
    p.add_argument("--grid", type=int, default=4, help="patches along a side")
    p.add_argument("--context", type=int, default=1, help="steps of the past")
    p.add_argument("--samples", type=int, default=64, help="candidates of an iteration")
    p.add_argument("--iterations", type=int, default=2, help="of CEM")
    p.add_argument(
        "--horizons", type=int, nargs="+", default=[1, 2, 4, 8], help="steps planned ahead"
    )
    p.add_argument("--repeats", type=int, default=15, help="timed rounds")
    p.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = p.parse_args()
    device, names = torch.device(args.device), ACTION_SPACES[36]
    torch.manual_seed(0)
    heads = max(args.width // 64, 1)
    size = {"pred_dim": args.width, "depth": args.depth, "num_heads": heads}
    predictor = Predictor(192, len(names), 2, (args.grid, args.grid), **size).to(device).eval()
    z = normalize_features(torch.randn(1, args.context + 1, args.grid**2, 192, device=device))
    actions, states = (
        torch.randn(1, args.context - 1, len(names), device=device),
        torch.zeros(1, args.context, 2, device=device),
    )
    compose = functools.partial(
        compose_states, mean=NoScaler.mean.to(device), scale=NoScaler.scale.to(device)
    )
    space, rows = vpt_space(names, NoScaler), []
    for horizon in args.horizons:

        def plan(cached, horizon=horizon):
            past = (predictor, z[:, :-1], actions, states, z[0, -1], compose)
            with torch.no_grad():
                cost = energy(*past) if cached else energy_from_scratch(*past)
            generator = torch.Generator().manual_seed(0)
            return search(
                cost,
                space,
                horizon,
                num_samples=args.samples,
                iterations=args.iterations,
                generator=generator,
                device=device,
            )

        times = medians(
            {"cache": lambda: plan(True), "anew": lambda: plan(False)},
            device,
            args.repeats,
            warmup=1,
        )
        row = {"horizon": horizon} | {
            f"{k} candidates/s": args.samples * args.iterations / t for k, t in times.items()
        }
        same = (plan(True) - plan(False)).abs().max().item()
        rows.append(
            row | {"anew / cache": times["anew"] / times["cache"], "actions differ by": same}
        )
    print(
        f"width {args.width}, depth {args.depth}, {args.grid}x{args.grid} patches, context"
        f" {args.context}, {args.samples} samples"
    )
    report(rows, args.json, device)
