"""How many candidates a second does the planner try?

    python -m bench.plan
    python -m bench.plan --width 1024 --depth 24 --grid 16 --horizons 1 2     # the released size
    python -m bench.plan --of candidates --grid 14 --repeats 3

--of cache: with keys and values kept and shared, and with the whole sequence run again for each
step (as upstream does). --of candidates: a step of one vector (train_lewm.py --pool mean), and a
step of patch tokens, in predictors of the same size.

Each timed call is one whole search (CEM), from the same noise, on a predictor with random weights.
Prints for each horizon both rates (medians of interleaved repeats) and their ratio. For the cache
also the largest difference between the actions that the two ways chose."""

import argparse
import functools

import torch

from bench import medians, report
from evaluation.search import energy, search, vpt_space
from files.vpt import ACTION_SPACES
from model import Predictor, compose_states, normalize_features, predict


class NoScaler:
    """Actions are in units of the data already."""

    mean = torch.zeros(4)
    scale = torch.ones(4)


def energy_from_scratch(predictor, z, actions, states, goal, compose):
    """evaluation.search.energy as the reference computes it. For every step of a candidate the
    whole sequence runs again, and nothing is shared."""

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


def problem_of(width, depth, grid, context, device):
    """What energy takes, of noise: a predictor of this size with random weights, `context` steps of
    grid x grid tokens and a goal."""
    names = ACTION_SPACES[36]
    size = {"pred_dim": width, "depth": depth, "num_heads": max(width // 64, 1)}
    predictor = Predictor(192, len(names), 2, (grid, grid), **size).to(device).eval()
    z = normalize_features(torch.randn(1, context + 1, grid**2, 192, device=device))
    actions = torch.randn(1, context - 1, len(names), device=device)
    states = torch.zeros(1, context, 2, device=device)

    # units of the actions
    mean = NoScaler.mean.to(device)
    scale = NoScaler.scale.to(device)
    compose = functools.partial(compose_states, mean=mean, scale=scale)
    return predictor, z[:, :-1], actions, states, z[0, -1], compose


def plan(energy_of, problem, horizon, samples, iterations, device):
    """One search. energy_of: which of the ways computes the energy."""
    with torch.no_grad():
        cost = energy_of(*problem)
    return search(
        cost,
        vpt_space(ACTION_SPACES[36], NoScaler),
        horizon,
        num_samples=samples,
        iterations=iterations,
        generator=torch.Generator().manual_seed(0),
        device=device,
    )


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    kinds = ["cache", "candidates"]
    flag("--of", default="cache", choices=kinds, help="which comparison (default cache)")
    flag("--width", type=int, default=192, help="of the predictor (default 192)")
    flag("--depth", type=int, default=4, help="blocks of the predictor (default 4)")
    flag("--grid", type=int, default=4, help="patches along a side (default 4)")
    flag("--context", type=int, default=1, help="steps of the past (default 1)")
    flag("--samples", type=int, default=64, help="candidates of an iteration (default 64)")
    flag("--iterations", type=int, default=2, help="of CEM (default 2)")
    horizons_help = "steps planned ahead, a row each (default 1 2 4 8)"
    flag("--horizons", type=int, nargs="+", default=[1, 2, 4, 8], help=horizons_help)
    flag("--repeats", type=int, default=15, help="timed rounds (default 15)")
    flag("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()

    # --- predictors, and a past and a goal of noise for each ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    # two ways on one problem, or one way on two
    size = args.width, args.depth
    patches = problem_of(*size, args.grid, args.context, device)
    if args.of == "cache":
        sides = {"kept": (energy, patches), "again": (energy_from_scratch, patches)}
    else:
        sides = {
            "vector": (energy, problem_of(*size, 1, args.context, device)),
            "patches": (energy, patches),
        }

    # --- time ---
    rows = []
    candidates = args.samples * args.iterations
    for horizon in args.horizons:
        numbers = horizon, args.samples, args.iterations, device
        searches = {name: functools.partial(plan, *side, *numbers) for name, side in sides.items()}
        seconds = medians(searches, device, args.repeats, warmup=1)
        row = {"width": args.width, "depth": args.depth, "tokens of a step": args.grid**2}
        row |= {"context": args.context, "samples": args.samples, "horizon": horizon}
        for name in sides:
            row[f"{name} candidates/s"] = candidates / seconds[name]

        # how many times as fast the first way is
        first, second = sides
        row[f"{second} / {first}"] = seconds[second] / seconds[first]
        if args.of == "cache":
            difference = searches["kept"]() - searches["again"]()
            row["actions differ by"] = difference.abs().max().item()
        rows.append(row)
    report(rows, args.json, device)
