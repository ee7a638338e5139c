"""How often does a 95 % interval of the action gap contain the truth? Simulated recordings, 2 to 20
of them.

    python -m tests.intervals                # under a minute of one core
    python -m tests.intervals --rounds 1000  # until a cell is known to 0.3 points

The gap is a ratio of means over all clips, minus 1. Recordings contain different numbers of clips.
They differ in how hard they are and in how much the action tells, and their clips differ too.

Prints a table. Rows: what the effect of the action on a recording's clips looks like, and how clips
are spread over recordings. Columns: the number of recordings. A cell is the share of simulated
evaluations whose interval contains the gap of all recordings that there could be. `ratio_interval`
("ours") should stay within 0.90 to 0.97 from FEWEST_RECORDINGS on, and the last line says whether
it does. "bootstrap" resamples recordings, as this project did before."""

import argparse

import torch

from evaluation import held_out

RECORDINGS = (2, 3, 4, 5, 6, 8, 10, 15, 20)
EFFECTS = ("alike", "normal", "skewed")
CLIPS = ("equal", "uniform", "lognormal")


def clips_of(spread, recordings, generator):
    """Numbers of clips (recordings,), at least 1 each."""
    if spread == "equal":
        return torch.full((recordings,), 20)
    if spread == "uniform":  # recordings of any length up to a few minutes
        return torch.randint(1, 60, (recordings,), generator=generator)
    drawn = torch.randn(recordings, generator=generator)
    return (16 * (0.7 * drawn).exp()).ceil().long()


def evaluation(effect, spread, recordings, columns, generator):
    """(errors under shuffled actions (n, columns), under true ones, recording of each of n clips,
    true gap): `columns` independent evaluations with the same numbers of clips."""
    counts = clips_of(spread, recordings, generator)
    names = torch.arange(recordings).repeat_interleave(counts)

    def normal(n):
        return torch.randn(n, columns, generator=generator, dtype=torch.double)

    # of each recording: how hard it is, and how much the action tells
    gap = 0.06
    hard = torch.ones(recordings, columns).double()
    tells = torch.full_like(hard, gap)
    if effect != "alike":
        hard = (0.25 * normal(recordings)).exp()
    if effect == "normal":
        tells = gap + 0.05 * normal(recordings)
    if effect == "skewed":  # in a few recordings the action tells much, in most hardly anything
        uniform = torch.rand(recordings, columns, generator=generator, dtype=torch.double)
        tells = -gap * (1 - uniform).log()

    # of each clip
    true = hard[names] * (0.25 * normal(len(names)) - 0.25**2 / 2).exp()
    shuffled = true + hard[names] * (tells[names] + 0.1 * normal(len(names)))
    return shuffled, true, names.tolist(), gap


def bootstrap(top, bottom, names, samples=400):
    """The percentile bootstrap over recordings, to compare with: (low, high)."""
    # sums by recording
    group = torch.tensor(names)
    sums = torch.zeros(2, max(names) + 1, top.shape[1]).double()
    sums[0].index_add_(0, group, top)
    sums[1].index_add_(0, group, bottom)

    # how often each recording is drawn in each sample
    G = sums.shape[1]
    draws = torch.randint(G, (samples, G), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(samples, G).double()
    weight = torch.zeros(samples, G).double().scatter_add_(1, draws, ones)
    ratio = (weight @ sums[0]) / (weight @ sums[1])
    return ratio.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)


def coverage(effect, spread, recordings, rounds, columns, interval=held_out.ratio_interval, seed=0):
    """(share of intervals that contain the true gap, their median width)."""
    generator = torch.Generator().manual_seed(seed)
    covered = []
    widths = []
    for _ in range(rounds):
        top, bottom, names, gap = evaluation(effect, spread, recordings, columns, generator)
        low, high = interval(top, bottom, names)
        covered.append((low <= 1 + gap) & (1 + gap <= high))
        widths.append(high - low)
    return torch.cat(covered).double().mean().item(), torch.cat(widths).median().item()


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=200, help="draws of numbers of clips")
    parser.add_argument("--columns", type=int, default=40, help="evaluations of each draw")
    args = parser.parse_args()

    # --- simulate ---
    torch.set_num_threads(1)  # tensors are small: more threads only wait for each other
    fewest = held_out.FEWEST_RECORDINGS
    held_out.FEWEST_RECORDINGS = 2  # to see what is left out as well
    outside = []
    counts = "".join(f"{n:>7}" for n in RECORDINGS)
    print(f"effect  clips      interval   {counts}  recordings")
    for effect in EFFECTS:
        for spread in CLIPS:
            for name, interval in (("ours", held_out.ratio_interval), ("bootstrap", bootstrap)):
                cells = ""
                for n in RECORDINGS:
                    share, _ = coverage(effect, spread, n, args.rounds, args.columns, interval)
                    cells += f"{share:7.3f}"
                    if name == "ours" and n >= fewest and not 0.90 <= share <= 0.97:
                        outside.append(f"{effect} {spread} {n} recordings")
                print(f"{effect:7} {spread:10} {name:10} {cells}", flush=True)

    # --- how wide, and does it hold? ---
    for n in RECORDINGS:
        _, width = coverage("normal", "uniform", n, args.rounds, args.columns)
        print(f"median width of an interval of a gap of 6 % over {n:2d} recordings: {width:.1%}")
    print(f"outside 0.90 to 0.97, from {fewest} recordings on: {'; '.join(outside) or 'no cell'}")
