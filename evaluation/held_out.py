"""Errors on held-out recordings: the action meter, intervals over recordings, and the base's errors
beside an adapted model's."""

import contextlib
import functools
import gc
import math
import zlib

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import stdtrit
from torch.utils.data import DataLoader

from data import collate, leave_signals, windows
from kernels import chosen
from model import ac_losses, compose_states, lora_layers, merge_lora, predict, without_lora


def bands_of(errors, recordings):
    """95 % intervals over recordings of what is shown by horizon, {name: (low (K,), high (K,))}:
    the error rolled out under true, shuffled and zero actions and of the copy, gap and skill."""
    found = {k: errors[f"ro_{k}"] for k in ("true", "shuffled", "zero", "copy")}
    bands = {k: ratio_interval(x, torch.ones_like(x), recordings) for k, x in found.items()}
    low, high = ratio_interval(found["shuffled"], found["true"], recordings)
    bands["gap"] = (low - 1, high - 1)
    bands["skill"] = ratio_interval(found["true"], found["copy"], recordings)
    return {k: (low.tolist(), high.tolist()) for k, (low, high) in bands.items()}


def gap_of(other, true, recordings):
    """other / true - 1 of errors (n, K), averaged over clips and K -> [gap, low, high]: with its 95
    % interval over recordings."""
    other, true = (x.double().mean(1) for x in (other, true))
    low, high = ratio_interval(other, true, recordings)
    return [(other.mean() / true.mean() - 1).item(), low.item() - 1, high.item() - 1]


def leave_group():
    """Collective: ends the process group after the last reference to a DistributedDataParallel. Its
    threads must end before Python does, or the process aborts with "terminate called without an
    active exception", one run in five (pytorch/pytorch#190489)."""
    gc.collect()
    dist.destroy_process_group()


def precision_of(asked, state, device):
    """The precision that a run is judged in: `asked` (--dtype) or what it was trained in. Returns
    (its name, a function that opens the autocast of training). On a GPU matrices of float32 are
    multiplied in TF32, as in training. Without a run (state None) it is float32."""
    dtype = asked or (state["args"].get("dtype") if state else "float32")
    if dtype is None:  # a checkpoint that does not say: what training takes without --dtype
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    autocast = functools.partial(
        torch.autocast, device.type, getattr(torch, dtype), enabled=dtype != "float32"
    )
    return dtype, autocast


def encoder_dtype(dtype, run):
    """The dtype of the encoder's weights in a run of train_ac.py or train_lora.py."""
    whole = dtype != "bfloat16" or run.get("save_encoder")
    return torch.float32 if whole else torch.bfloat16


def precision_text(dtype, device, predictor, steps):
    """What computes a pass of the predictor over `steps` steps, for a person."""
    C = 1 + (predictor.state_encoder is not None)
    S = C + predictor.grid[0] * predictor.grid[1]
    tf32 = " (matrices in TF32)" if dtype == "float32" and device.type == "cuda" else ""
    kernels = chosen(device, getattr(torch, dtype), predictor.head_dim, S, steps * S)
    return f"{dtype}{tf32} on {device.type}; {kernels}"


def another_recording(recordings):
    """For each clip the place of a clip of another recording, or None if all are of one. Clips of
    a batch are shifted by the largest recording, so that each is taken once where that is
    possible."""
    places = {}
    for i, name in enumerate(recordings):
        places.setdefault(name, []).append(i)
    largest = max(map(len, places.values()))
    order, partner = list(places), [None] * len(recordings)
    for number, name in enumerate(order if len(order) > 1 else []):
        following = order[number + 1 :] + order[:number]
        others = [i for other in following for i in places[other]]
        for k, i in enumerate(places[name]):
            partner[i] = others[(k + largest - len(places[name])) % len(others)]
    return partner


def from_other_recordings(dataset, items):
    """A function from the recordings (B,) and actions (B, K, A) of a batch to shuffled actions (B,
    K, A): for each clip those of a clip of another recording.

    Clips of a batch serve each other. For a batch of one recording a clip of another one is read,
    of `items` (all that are evaluated), or of the other recordings of the dataset if these few are
    of one recording. Without any other recording the result is nan: actions of the same recording
    are alike, and the gap would be too small."""

    def others(recordings, actions):
        partner = another_recording(recordings)
        if None not in partner:
            return actions[partner]
        apart = [i for i in items if dataset.records[i[2]].recording != recordings[0]]
        if not apart:
            every = sum(windows(dataset, 1, None), [])
            apart = [i for i in every if dataset.records[i[2]].recording != recordings[0]]
        # not always the same one: begin elsewhere in the list for every recording
        begin = zlib.crc32(recordings[0].encode()) % max(len(apart), 1)
        for item in apart[begin:] + apart[:begin]:
            clip = dataset[item]  # may be of this recording after all, if that one is damaged
            if recording_of(clip["key"], clip) != recordings[0]:
                return clip["actions"].to(actions).expand_as(actions)
        return torch.full_like(actions, math.nan)

    return others


def recording_of(key, batch):
    """The recording of a clip: members of features have its first tick in their key."""
    return key.rpartition("@")[0] if "z" in batch else key


@torch.no_grad()
def held_out(
    predictor,
    dataset,
    inputs,
    batch_size,
    clips,
    num_workers,
    auto_steps,
    loss_exp,
    autocast=contextlib.nullcontext,
    compose=compose_states,
):
    """Losses and action meter of at most `clips` windows of a Clips dataset, shared among ranks
    (all get everyone's): ({name: (n, K) errors}, [recording], [bad clip of this rank]); "jloss" and
    "sloss" are (n, 1). compose: model.compose_states, or what makes states of actions on another
    robot.

    Shuffled actions are those of another recording (`from_other_recordings`); their errors are nan
    where there is only one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training = predictor.training
    predictor.eval()
    items = windows(dataset, max(batch_size, 2), clips)
    others = from_other_recordings(dataset, sum(items, []))
    rows, bad = [], []
    for batch in DataLoader(
        dataset,
        batch_sampler=items[rank::world],
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=leave_signals,
    ):
        bad += batch["bad"]
        z, actions, states = inputs(batch)
        mean, scale = (
            torch.tensor(x, device=z.device).float()
            for x in (dataset.reader.scaler.mean, dataset.reader.scaler.scale)
        )
        recordings = [recording_of(key, batch) for key in batch["key"]]
        shuffled = others(recordings, actions)
        with autocast():
            losses = ac_losses(predictor, z, actions, states, None, auto_steps, loss_exp)
            errors = action_meter(
                predictor,
                z,
                actions,
                states,
                shuffled,
                lambda s, a, m=mean, d=scale: compose(s, a, m, d),
            )
        errors |= {k: x.expand(len(z), 1) for k, x in zip(("jloss", "sloss"), losses)}
        rows.append(({k: x.float().cpu() for k, x in errors.items()}, recordings))
    predictor.train(training)
    if dist.is_initialized():
        dist.all_gather_object(everyone := [None] * world, rows)
        rows = [r for part in everyone for r in part]
    return (
        {k: torch.cat([r[0][k] for r in rows]) for k in rows[0][0]},
        [k for r in rows for k in r[1]],
        bad,
    )


def interval_text(low, high, recordings, form="+.2%"):
    """The 95 % interval of `ratio_interval` for a person, or why there is none."""
    if math.isfinite(low) and math.isfinite(high):
        return f"[{low:{form}}, {high:{form}}]"
    if (count := len(set(recordings))) < FEWEST_RECORDINGS:
        return f"(no interval: that needs at least {FEWEST_RECORDINGS} recordings, here {count})"
    return "(no interval: all recordings give exactly the same, or an error is 0 or not finite)"


def gap_text(gap, low, high, recordings):
    """An action gap with its interval for a person, or why there is none."""
    if math.isnan(gap) and len(set(recordings)) < 2:
        return "not given: shuffled actions must come from another recording, and here is only one"
    return f"{gap:+.2%} {interval_text(low, high, recordings)}"


def blank(row):
    """A row of val.csv in which what could not be given is None: an empty cell."""
    mays = ("shuffled", "gap", "base", "help")
    return {
        k: None if math.isnan(x) and any(word in k for word in mays) else x for k, x in row.items()
    }


HELP = ["base_tf", "base_ro", "help", "help_low", "help_high"]


def beside_columns(K):
    """Columns of val.csv that `beside` fills, for clips that predict K steps."""
    return [
        "jloss",
        "sloss",
        *METERS,
        *HELP,
        *(f"{name}_{k + 1}" for name in ("error", "base") for k in range(K)),
    ]


def beside(errors, recordings, base):
    """Held-out errors of a fine-tuned model, with those of the base on the same clips or None ->
    (row of val.csv: METERS, HELP, error_k and base_k rolled out k steps; two lines for a person).
    help = error of the base / error - 1 one step ahead, with its 95 % interval over recordings: the
    meter's gap, with the base in place of shuffled actions. What could not be given is None."""
    row = {k: errors[k].mean().item() for k in ("jloss", "sloss")} | dict.fromkeys(HELP, math.nan)
    errors = {k: x for k, x in errors.items() if k not in row}
    row |= meter_summary(errors, recordings)
    for name, found in (("error", errors), ("base", base or {})):
        row |= {
            f"{name}_{k + 1}": x
            for k, x in enumerate(
                (found.get("ro_true", errors["ro_true"] * math.nan)).mean(0).tolist()
            )
        }
    gap = gap_text(row["tf_gap"], row["tf_gap_low"], row["tf_gap_high"], recordings)
    if not math.isnan(row["ro_gap"]):
        gap += f"; rolled out {row['ro_gap']:+.2%}"
    text = f"skill {row['tf_skill']:.3f} (error / copying), action gap {gap}"
    if base is not None:
        versus = meter_summary(
            errors | {f"{p}_shuffled": base[f"{p}_true"] for p in ("tf", "ro")}, recordings
        )
        row |= dict(
            zip(
                HELP,
                (
                    versus[k]
                    for k in ("tf_shuffled", "ro_shuffled", "tf_gap", "tf_gap_low", "tf_gap_high")
                ),
            )
        )
        between = interval_text(row["help_low"], row["help_high"], recordings)
        text += (
            f"\n  does it help? error {row['tf_true']:.4f}, the base's {row['base_tf']:.4f}:"
            f" {row['help']:+.2%} {between}; rolled out {row['ro_true']:.4f} and"
            f" {row['base_ro']:.4f}"
        )
    return blank(row), text


def hold_state(state0, actions, mean, scale):
    """In place of compose_poses for a robot of which we do not know what its actions do to its
    state: that stays the first."""
    return state0[:, None].expand(-1, actions.shape[1], -1)


def check_adapters(model, inputs, autocast, trained):
    """A generator: looks at one clip before training on it, and yields after it what holds;
    RuntimeError for what does not."""

    def losses():
        with autocast(), torch.no_grad():
            return torch.stack(model.eval()(*inputs)).float()

    frozen = {n: p.clone() for n, p in model.predictor.named_parameters() if n not in trained}
    with without_lora(model.predictor):
        base = losses()
    start = losses()
    model.train()
    yield
    end, moved = (
        losses(),
        [
            n
            for n, p in model.predictor.named_parameters()
            if n in frozen and not torch.equal(p, frozen[n])
        ],
    )
    found = {
        f"loss {start.sum():.4f} fell to {end.sum():.4f} on this clip": end.sum() < start.sum(),
        f"{len(frozen)} frozen tensors are as they were": not moved,
    }
    if lora_layers(model.predictor):
        found |= {
            "before the first step the losses were those of the base, bit for bit": torch.equal(
                start, base
            )
        }
        merge_lora(model.predictor)
        found |= {
            f"merged, the losses differ by {(losses() - end).abs().max():.1e}": (
                (losses() - end).abs().max() < 1e-2 * end.max()
            )
        }
    if not all(found.values()):
        raise RuntimeError(
            "--debug: this does not hold: " + "; ".join(k for k, v in found.items() if not v)
        )
    yield from found


@torch.no_grad()
def action_meter(predictor, z, actions, states, others, compose):
    """Mean absolute error of each clip at each of K = T-1 horizons, (B, K), one step ahead (`tf_`)
    and rolled out from step 0 (`ro_`): under the true actions, under shuffled ones (`others` (B, K,
    A): what was done in another recording), under zero ones (the mean action), and of copying the
    last known step. One step ahead the states are the true ones; rolled out they are
    `compose(state0, actions)`, since true states would tell what the true actions were."""
    z, target = z.float(), z[:, 1:].float()
    errors = {"tf_copy": z[:, :-1], "ro_copy": z[:, :1]}
    for name, a in (
        ("true", actions),
        ("shuffled", others),
        ("zero", torch.zeros_like(actions)),
    ):
        if torch.isnan(a).any():  # there is no other recording whose actions could be taken
            errors[f"tf_{name}"] = errors[f"ro_{name}"] = torch.full_like(target, math.nan)
            continue
        errors[f"tf_{name}"] = predict(predictor, z[:, :-1], a, states)
        errors[f"ro_{name}"] = predictor.rollout(z[:, :1], a, compose(states[:, 0], a))
    return {name: (p - target).abs().mean((2, 3)) for name, p in errors.items()}


METERS = [
    f"{p}_{n}"
    for p in ("tf", "ro")
    for n in ("true", "shuffled", "zero", "copy", "gap", "gap_low", "gap_high", "skill")
]


# With fewer recordings no interval is given. Those of 3 to 20 recordings contain the truth 90 to
# 97 % of the time in every row that `python -m bench.intervals` simulates; those of two would be
# wider than any gap.
FEWEST_RECORDINGS = 3


def ratio_interval(top, bottom, recordings):
    """95 % interval (low (K,), high (K,)) of mean(top) / mean(bottom), both positive, (n, K) over n
    clips; nan with fewer than FEWEST_RECORDINGS recordings, and where all give exactly the same
    (they all did the same, or the action is ignored): that says nothing of others.

    Clips of one recording are alike, so a recording counts as one observation. The standard error
    of the ratio's logarithm is the jackknife's (one recording left out at a time), the factor is
    Student's t. Recordings of equal weight give t G - 1 degrees of freedom. Where few of them hold
    most clips there are fewer: two thirds of the way to the effective number of recordings, 1 /
    (sum of squared weights), which is what bench.intervals found to cover."""
    names = {name: i for i, name in enumerate(dict.fromkeys(recordings))}
    G = len(names)
    if G < FEWEST_RECORDINGS:
        none = torch.full(top.shape[1:], math.nan, dtype=torch.double)
        return none, none.clone()
    group = torch.tensor([names[r] for r in recordings])
    above, below = (
        torch.zeros(G, *x.shape[1:], dtype=torch.double).index_add_(0, group, x.double())
        for x in (top, bottom)
    )
    ratio = above.sum(0) / below.sum(0)
    without = (above.sum(0) - above) / (below.sum(0) - below)  # (G, K)
    error = ((G - 1) / G * (without / ratio).log().square().sum(0)).sqrt()
    effective = 1 / (below / below.sum(0)).square().sum(0)
    freedom = (G + effective) / 2 - 1
    error = torch.where(error > 0, error, math.nan)
    reach = 1.06 * torch.from_numpy(np.asarray(stdtrit(freedom.numpy(), 0.975))) * error
    return ratio * (-reach).exp(), ratio * reach.exp()


def meter_summary(errors, recordings):
    """Action meter of many clips -> METERS: {tf_, ro_}{true, shuffled, zero, copy} mean errors, gap
    = shuffled/true - 1, its 95 % interval over recordings (gap_low, gap_high: `ratio_interval`, nan
    with too few) and skill = true/copy. errors: name -> (n, K)."""
    out = {}
    for p in ("tf", "ro"):
        clips = {}
        for name in ("true", "shuffled", "zero", "copy"):
            clips[name] = errors[f"{p}_{name}"].double().mean(1)
            out[f"{p}_{name}"] = clips[name].mean().item()
        low, high = ratio_interval(clips["shuffled"], clips["true"], recordings)
        out[f"{p}_gap"] = out[f"{p}_shuffled"] / out[f"{p}_true"] - 1
        out[f"{p}_gap_low"] = low.item() - 1
        out[f"{p}_gap_high"] = high.item() - 1
        out[f"{p}_skill"] = out[f"{p}_true"] / out[f"{p}_copy"]
    return out
