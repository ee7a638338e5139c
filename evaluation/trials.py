"""What trials in closed loop say: success with its interval, and how two policies differ over the
same trials.

A policy's tracks are {unit: (trials, steps + 1) distances to the goal}."""

import math

import numpy as np

# the normal distribution's 97.5 %
Z = 1.959964

RESAMPLES = 10000


def successes(tracks, limits):
    """Which trials were at the goal after each step, (trials, steps + 1) bool: nearer than the
    limit in every unit. The last column is what counts."""
    near = [np.array(tracks[unit]) < limit for unit, limit in limits.items()]
    return np.logical_and.reduce(near)


def wilson(count, trials):
    """95 % interval (low, high) of a success rate (Wilson 1927): it stays within 0 and 1, and 0 of
    10 has a width."""
    rate = count / trials
    middle = rate + Z**2 / (2 * trials)
    reach = Z * math.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def paired_difference(a, b):
    """Success rate of a minus that of b over the same trials, both (trials,) bool, with its 95 %
    interval: (difference, low, high). Trials are drawn again with replacement, both policies with
    each, and the percentiles are those of the bootstrap. ValueError for unequal numbers of trials.

    Where no trial was drawn that differs, as with few trials, the interval is a point."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} trials cannot be paired")
    each = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    drawn = np.random.default_rng(0).integers(len(each), size=(RESAMPLES, len(each)))
    low, high = np.percentile(each[drawn].mean(1), [2.5, 97.5])
    return each.mean(), low, high


def points(difference, low, high):
    """A paired difference for a person, in percentage points."""
    return f"{100 * difference:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"


def same_start(a, b):
    """The first trial that does not begin alike in two tracks, None if all do."""
    for unit in a:
        one = np.array(a[unit])[:, 0]
        other = np.array(b[unit])[:, 0]
        # half a degree, or half a map unit: a step of another length comes to rest elsewhere
        apart = np.flatnonzero(np.abs(one - other) > 0.5)
        if len(apart):
            return int(apart[0])
    return None
