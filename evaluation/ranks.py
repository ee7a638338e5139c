"""Judging a run on several ranks, which torchrun starts. All of them open the run and the data.
Each takes its share of the slow parts and gets the shares of the others, in the order of one rank:
so all continue with the numbers that one rank has. At the end the first rank is alone, and draws
and writes."""

import datetime
import itertools
import os

import torch.distributed as dist


def rank_and_world():
    """(number of this rank, how many there are): (0, 1) for a process that is alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def join():
    """Meet the other ranks, if torchrun has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # what is exchanged is on the CPU. Others wait for a rank whose share is slow; where one
        # dies, torchrun ends them all
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))


def leave():
    """End what ranks do together -> whether this rank continues, alone. The others have nothing
    left to do."""
    rank, world = rank_and_world()
    if world > 1:
        # all leave at once: who hosts the meeting point must not be the first to go
        dist.barrier()
        dist.destroy_process_group()
    return rank == 0


def print0(*parts, sep=" "):
    """Print on the first rank."""
    if rank_and_world()[0] == 0:
        print(*parts, sep=sep)


def share(items):
    """The items (a list or range) that this rank computes: one of every `world`."""
    rank, world = rank_and_world()
    return items[rank::world]


def gathered(results):
    """What all ranks have computed for their `share`, in the order of the items. results: a list,
    one for each item of this rank's share."""
    rank, world = rank_and_world()
    if world == 1:
        return results
    of_ranks = [None] * world
    dist.all_gather_object(of_ranks, results)

    # one of each rank in turn; the last ranks may have one less
    in_turn = itertools.zip_longest(*of_ranks)
    count = sum(map(len, of_ranks))
    return list(itertools.chain.from_iterable(in_turn))[:count]
