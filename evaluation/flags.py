"""How the programs that judge a run show their flags, and the flags of the planner, which plan.py
and evaluation.benchmark share. Imports nothing that takes time, so `--help` answers at once."""

import argparse
import math


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, then the flags, with the default of each that has one."""

    def _get_help_string(self, action):
        unset = action.default in (None, argparse.SUPPRESS) or action.default is False
        if unset or "(default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"

    def _format_action_invocation(self, action):
        """The first spelling only: the others are old names, and names in other people's guides."""
        names = action.option_strings
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{names[0]}, --no-{names[0][2:]}"
        if len(names) < 2 or "--help" in names:
            return super()._format_action_invocation(action)
        return f"{names[0]} {self._format_args(action, names[0][2:].upper())}"


# --- the planner ---

# what a plan is judged by: see evaluation.search.energy
MEASURES = ["distance", "change", "direction"]


def planner_flags(parser, horizon, horizon_help):
    """Add the flags of the planner: what may be done, and how it is searched. horizon: its default,
    a list of steps."""
    # bounds of the actions
    flag = parser.add_argument_group("what may be done").add_argument
    keys_help = "may be pressed (default: what the task needs; none in recordings)"
    flag("--keys", nargs="*", default=[], metavar="key.w", help=keys_help)
    flag("--reach", type=float, default=1.0, help="std of mouse motion, in the recorded ones")

    # more samples and iterations find better plans, and take longer
    flag = parser.add_argument_group("search").add_argument
    flag("--horizon", type=int, nargs="+", default=horizon, help=horizon_help)
    energy_help = (
        "what a plan is judged by. distance: from its predicted end to the goal; change: the same,"
        " with its end taken as what is seen now and what the plan changes; direction: whether its"
        " change points to the goal"
    )
    flag("--energy", default="distance", choices=MEASURES, help=energy_help)
    flag("--context", type=int, default=1, help="past steps that the predictor sees")
    flag("--num_samples", type=int, default=128, help="candidates of an iteration")
    flag("--num_elites", type=int, default=16, help="best candidates to draw the next ones around")
    flag("--iterations", type=int, default=2, help="times that candidates are drawn")
    flag("--momentum_mean", type=float, default=0.0, help="share of the old mean that is kept")
    flag("--momentum_std", type=float, default=0.0, help="share of the old std that is kept")
    flag("--temperature", type=float, default=0.0, help="0: CEM; above: MPPI, exp(-energy / this)")
    flag("--correlation", type=float, default=0.0, help="of a motion and the next, 0 to 1")
    flag("--chunk", type=int, default=512, help="candidates at once: bounds memory")


def check_planner(parser, args):
    """End the program for flags of planner_flags that make no plan: one check, one message."""
    for name in ("context", "iterations", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} makes no plan: at least 1")
    # one elite has no spread to draw from
    if args.num_elites < 2:
        parser.error(f"--num_elites {args.num_elites} makes no plan: at least 2")

    # the search itself; a nan is in no range
    if min(args.horizon) < 1:
        parser.error(f"--horizon {args.horizon} makes no plan: at least one step")
    if args.num_elites > args.num_samples:
        parser.error(f"--num_elites {args.num_elites} makes no plan: of {args.num_samples} samples")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature {args.temperature} makes no plan: 0 (CEM) or above, finite")

    # bounds of motion, and shares of what was before
    if not 0 < args.reach < math.inf:
        parser.error(f"--reach {args.reach} makes no plan: above 0, and finite")
    for name in ("momentum_mean", "momentum_std", "correlation"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} makes no plan: from 0 to below 1")


def search_options(args):
    """The options of evaluation.search.search in these flags. --temperature 0 is CEM."""
    return {
        "num_samples": args.num_samples,
        "num_elites": args.num_elites,
        "iterations": args.iterations,
        "momentum_mean": args.momentum_mean,
        "momentum_std": args.momentum_std,
        "correlation": args.correlation,
        "temperature": args.temperature or None,
    }
