"""Errors on held-out recordings: the precision they are computed in, the action meter, intervals
over recordings, and the errors of the base beside those of an adapted model."""

import contextlib
import functools
import math
import zlib

import numpy as np
import torch
from scipy.special import stdtrit
from torch.utils.data import DataLoader

from checkpoint import settings_of
from data import collate, ignore_signals_in_worker, windows
from evaluation.ranks import gathered, share
from kernels import describe_kernels
from model import ac_losses, compose_states, lora_layers, merge_lora, predict, without_lora

# --- precision ---


def precision_of(asked, state, device):
    """The precision that a run is judged in: `asked` (--dtype) or what it was trained in. Returns
    (its name, a function that opens the autocast of training). On a GPU matrices of float32 are
    multiplied in TF32, as in training. Without a run (state None) it is float32."""
    dtype = asked
    if dtype is None:
        dtype = settings_of(state).get("dtype") if state else "float32"

    # an older checkpoint does not say: take what training takes without --dtype
    if dtype is None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"

    # as in training
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    autocast = functools.partial(
        torch.autocast, device.type, getattr(torch, dtype), enabled=dtype != "float32"
    )
    return dtype, autocast


def encoder_dtype(dtype, settings):
    """The dtype of the encoder's weights in a run of train_ac.py or train_lora.py with these
    settings, judged in the precision `dtype` (a name)."""
    # --save_encoder keeps them in float32, as Meta's files do
    if dtype != "bfloat16" or settings.get("save_encoder"):
        return torch.float32
    return torch.bfloat16


def states_from(compose, scaler, device):
    """compose_states, compose_poses or hold_state for actions of this scaler: a function from
    state0 and scaled actions to states."""
    return functools.partial(
        compose,
        mean=torch.tensor(scaler.mean, device=device).float(),
        scale=torch.tensor(scaler.scale, device=device).float(),
    )


def precision_text(dtype, device, predictor, steps):
    """What computes a pass of the predictor over `steps` steps, for a person."""
    # tokens of a step: conditions and patches
    C = 1 + (predictor.state_encoder is not None)
    S = C + predictor.grid[0] * predictor.grid[1]
    tf32 = " (matrices in TF32)" if dtype == "float32" and device.type == "cuda" else ""
    kernels = describe_kernels(device, getattr(torch, dtype), predictor.head_dim, S, steps * S)
    return f"{dtype}{tf32} on {device.type}; {kernels}"


# --- the action meter ---


METERS = [
    f"{p}_{n}"
    for p in ("tf", "ro")
    for n in ("true", "shuffled", "zero", "copy", "gap", "gap_low", "gap_high", "skill")
]


# columns of val.csv: the gap without the hotbar, and its interval
MOVES_GAP = ["moves_gap", "moves_gap_low", "moves_gap_high"]


@torch.no_grad()
def action_meter(predictor, z, actions, states, others, compose, hotbar=()):
    """What wrong actions cost: mean absolute error of each clip at each of K = T-1 horizons (B, K),
    one step ahead (`tf_`) and rolled out from step 0 (`ro_`).

    Under the true actions, under shuffled ones (`others` (B, K, A): actions of another recording),
    under zero ones (the mean action), and of copying the last known step. One step ahead the states
    are the true ones. Rolled out they are `compose(state0, actions)`, because true states would
    tell what the true actions were.

    With `hotbar` (columns of the actions) also `tf_moves`: shuffled actions, but the true hotbar.
    """
    # copying needs no model
    z = z.float()
    target = z[:, 1:]
    predictions = {"tf_copy": z[:, :-1], "ro_copy": z[:, :1]}

    # the hotbar is in every picture: a model may use that and no other action
    if hotbar:
        moves = others.clone()
        moves[..., hotbar] = actions[..., hotbar]
        predictions["tf_moves"] = torch.full_like(target, math.nan)
        if not torch.isnan(moves).any():
            predictions["tf_moves"] = predict(predictor, z[:, :-1], moves, states)

    # the model under three kinds of actions
    tried = {"true": actions, "shuffled": others, "zero": torch.zeros_like(actions)}
    for name, a in tried.items():
        # nan where there is no other recording to take actions of
        if torch.isnan(a).any():
            predictions[f"tf_{name}"] = torch.full_like(target, math.nan)
            predictions[f"ro_{name}"] = torch.full_like(target, math.nan)
            continue

        # one step ahead from true steps, and rolled out from the first
        predictions[f"tf_{name}"] = predict(predictor, z[:, :-1], a, states)
        predictions[f"ro_{name}"] = predictor.rollout(z[:, :1], a, compose(states[:, 0], a))
    return {name: (p - target).abs().mean((2, 3)) for name, p in predictions.items()}


def meter_summary(errors, recordings):
    """Action meter of many clips -> METERS: {tf_, ro_}{true, shuffled, zero, copy} mean errors, gap
    = shuffled/true - 1, its 95 % interval over recordings (gap_low, gap_high: `ratio_interval`, nan
    with too few) and skill = true/copy. errors: name -> (n, K)."""
    summary = {}
    for p in ("tf", "ro"):
        clips = {}
        for name in ("true", "shuffled", "zero", "copy"):
            clips[name] = errors[f"{p}_{name}"].double().mean(1)
            summary[f"{p}_{name}"] = clips[name].mean().item()

        # what wrong actions cost, and is it better than a copy?
        low, high = ratio_interval(clips["shuffled"], clips["true"], recordings)
        summary[f"{p}_gap"] = summary[f"{p}_shuffled"] / summary[f"{p}_true"] - 1
        summary[f"{p}_gap_low"] = low.item() - 1
        summary[f"{p}_gap_high"] = high.item() - 1
        summary[f"{p}_skill"] = summary[f"{p}_true"] / summary[f"{p}_copy"]
    return summary


def moves_gap(errors, recordings):
    """The gap one step ahead when all actions but the hotbar's are shuffled (the whole gap where
    there is no hotbar) -> {name of MOVES_GAP: value}."""
    shuffled = errors.get("tf_moves", errors["tf_shuffled"])
    return dict(zip(MOVES_GAP, gap_of(shuffled, errors["tf_true"], recordings)))


def gap_of(other, true, recordings):
    """The gap other / true - 1 of two errors (n, K), averaged over clips and K, and its 95 %
    interval over recordings: [gap, low, high]."""
    # the mean over horizons first: clips are what is drawn
    other = other.double().mean(1)
    true = true.double().mean(1)
    low, high = ratio_interval(other, true, recordings)
    return [(other.mean() / true.mean() - 1).item(), low.item() - 1, high.item() - 1]


# --- intervals ---


# With fewer recordings no interval is given. Those of 3 to 20 recordings contain the truth 90 to
# 97 % of the time in every row that `python -m tests.intervals` simulates; those of two would be
# wider than any gap.
FEWEST_RECORDINGS = 3


def ratio_interval(top, bottom, recordings):
    """95 % interval (low (K,), high (K,)) of mean(top) / mean(bottom), both positive, (n, K) over n
    clips; nan with fewer than FEWEST_RECORDINGS recordings, and where all give exactly the same
    (all did the same, or the action is ignored): that tells nothing about others.

    Clips of one recording are alike, so a recording counts as one observation. The standard error
    of the ratio's logarithm is the jackknife's (one recording left out at a time), the factor is
    1.06 times Student's t. Recordings of equal weight give G - 1 degrees of freedom to t. Where few
    of them hold most clips there are fewer: half of the way to the effective number of recordings,
    1 / (sum of squared weights), which is what tests.intervals found to cover."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(recordings))}
    G = len(numbers)
    if G < FEWEST_RECORDINGS:
        none = torch.full(top.shape[1:], math.nan, dtype=torch.double)
        return none, none.clone()

    # sums over the clips of each recording, (G, K)
    group = torch.tensor([numbers[r] for r in recordings])
    above = torch.zeros(G, *top.shape[1:], dtype=torch.double)
    above.index_add_(0, group, top.double())
    below = torch.zeros(G, *bottom.shape[1:], dtype=torch.double)
    below.index_add_(0, group, bottom.double())

    # the jackknife: how far the ratio moves when a recording is left out
    ratio = above.sum(0) / below.sum(0)
    without = (above.sum(0) - above) / (below.sum(0) - below)
    error = ((G - 1) / G * (without / ratio).log().square().sum(0)).sqrt()
    error = torch.where(error > 0, error, math.nan)

    # the factor is Student's t, a little wider: what covers in all rows of tests.intervals
    effective = 1 / (below / below.sum(0)).square().sum(0)
    freedom = (G + effective) / 2 - 1
    reach = 1.06 * torch.from_numpy(np.asarray(stdtrit(freedom.numpy(), 0.975))) * error
    return ratio * (-reach).exp(), ratio * reach.exp()


def bands_of(errors, recordings):
    """95 % intervals over recordings of what is shown by horizon, {name: (low (K,), high (K,))}:
    the error rolled out under true, shuffled and zero actions and of the copy, gap and skill."""
    # errors themselves: their ratio to 1
    rolled_out = {k: errors[f"ro_{k}"] for k in ("true", "shuffled", "zero", "copy")}
    bands = {}
    for name, error in rolled_out.items():
        bands[name] = ratio_interval(error, torch.ones_like(error), recordings)

    # gap and skill, as the meter defines them
    low, high = ratio_interval(rolled_out["shuffled"], rolled_out["true"], recordings)
    bands["gap"] = (low - 1, high - 1)
    bands["skill"] = ratio_interval(rolled_out["true"], rolled_out["copy"], recordings)
    return {k: (low.tolist(), high.tolist()) for k, (low, high) in bands.items()}


def signed(value, form="+.2%"):
    """A number with its sign, for a person; what is nothing when it is rounded has no sign."""
    text = f"{value:{form}}"
    if text[:1] in "+-" and not text.strip("+-0.%"):
        return text[1:]
    return text


def interval_text(low, high, recordings, form="+.2%"):
    """The 95 % interval of `ratio_interval` for a person, or why there is none."""
    if math.isfinite(low) and math.isfinite(high):
        return f"[{signed(low, form)}, {signed(high, form)}]"

    # why there is none
    count = len(set(recordings))
    if count < FEWEST_RECORDINGS:
        return f"(no interval: that needs at least {FEWEST_RECORDINGS} recordings, here {count})"
    return "(no interval: all recordings give exactly the same, or an error is 0 or not finite)"


def gap_text(gap, low, high, recordings):
    """An action gap with its interval for a person, or why there is none."""
    if math.isnan(gap) and len(set(recordings)) < 2:
        return "not given: shuffled actions must come from another recording, and here is only one"
    return f"{signed(gap)} {interval_text(low, high, recordings)}"


# --- held-out errors ---


def recording_of(key, batch):
    """The recording of a clip: members of features have its first tick in their key."""
    return key.rpartition("@")[0] if "z" in batch else key


def another_recording(recordings):
    """For each clip the place of a clip of another recording, or None if all are of one. Clips of
    a batch are shifted by the size of the largest recording, which takes each clip once where that
    is possible."""
    # clips by recording
    places = {}
    for i, name in enumerate(recordings):
        places.setdefault(name, []).append(i)
    partner = [None] * len(recordings)
    if len(places) < 2:
        return partner

    # the clips of all other recordings in a row, from where this one's turn begins
    largest = max(map(len, places.values()))
    order = list(places)
    for number, name in enumerate(order):
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
        # most batches hold several recordings
        partner = another_recording(recordings)
        if None not in partner:
            return actions[partner]

        # a clip of another recording: of those evaluated, or of any
        apart = [i for i in items if dataset.records[i[2]].recording != recordings[0]]
        if not apart:
            every = sum(windows(dataset, 1, None), [])
            apart = [i for i in every if dataset.records[i[2]].recording != recordings[0]]

        # not always the same one: begin elsewhere in the list for every recording
        begin = zlib.crc32(recordings[0].encode()) % max(len(apart), 1)
        for item in apart[begin:] + apart[:begin]:
            # where that recording is damaged, the clip may be of this one after all
            clip = dataset[item]
            if recording_of(clip["key"], clip) != recordings[0]:
                return clip["actions"].to(actions).expand_as(actions)
        return torch.full_like(actions, math.nan)

    return others


@torch.no_grad()
def held_out(
    predictor,
    dataset,
    features_of,
    batch_size,
    clips,
    num_workers,
    auto_steps,
    loss_exp,
    autocast=contextlib.nullcontext,
    compose=compose_states,
    hotbar=(),
):
    """Losses and action meter of at most `clips` windows of a Clips dataset: ({name: (n, K)
    errors}, [recording], [bad clip of this rank]); "jloss" and "sloss" are (n, 1). Each rank
    evaluates a share; the results are gathered, and every rank returns all of them.

    compose: model.compose_states, or what computes states from actions on another robot. hotbar:
    as in action_meter. Shuffled actions are those of another recording (`from_other_recordings`);
    their errors are nan where there is only one."""
    # dropout is off until the end
    training = predictor.training
    predictor.eval()

    # at least two clips in a batch, so that most can serve each other
    items = windows(dataset, max(batch_size, 2), clips)
    others = from_other_recordings(dataset, sum(items, []))

    # each rank takes a share of the batches
    loader = DataLoader(
        dataset,
        batch_sampler=share(items),
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals_in_worker,
    )
    scaler = dataset.reader.scaler
    rows, bad = [], []
    for batch in loader:
        # clips and actions of other recordings
        bad += batch["bad"]
        z, actions, states = features_of(batch)
        states_of = states_from(compose, scaler, z.device)
        recordings = [recording_of(key, batch) for key in batch["key"]]
        shuffled = others(recordings, actions)

        # losses are those of training, errors those of the meter
        with autocast():
            jloss, sloss = ac_losses(predictor, z, actions, states, auto_steps, loss_exp)
            errors = action_meter(predictor, z, actions, states, shuffled, states_of, hotbar)
        errors["jloss"] = jloss.expand(len(z), 1)
        errors["sloss"] = sloss.expand(len(z), 1)
        rows.append(({k: x.float().cpu() for k, x in errors.items()}, recordings))
    predictor.train(training)

    # all ranks know all rows
    rows = gathered(rows)
    names = rows[0][0]
    errors = {k: torch.cat([errors[k] for errors, _ in rows]) for k in names}
    recordings = [name for _, part in rows for name in part]
    return errors, recordings, bad


# --- the base beside an adapted model ---


# columns of val.csv: the base's error one step ahead and rolled out, and what adapting won over it
HELP = ["base_tf", "base_ro", "help", "help_low", "help_high"]


def base_columns(K):
    """Columns of val.csv that `beside` fills, for clips that predict K steps."""
    by_horizon = [f"{name}_{k + 1}" for name in ("error", "base") for k in range(K)]
    return ["jloss", "sloss", *METERS, *HELP, *by_horizon]


def blank(row):
    """A row of val.csv in which what could not be given is None: an empty cell. Only values that
    may be missing are emptied; any other nan is a fault and stays in sight."""
    may_be_missing = ("shuffled", "gap", "base", "help")
    cells = {}
    for name, value in row.items():
        # what was not measured is empty already
        if value is None:
            cells[name] = None
            continue
        missing = math.isnan(value) and any(word in name for word in may_be_missing)
        cells[name] = None if missing else value
    return cells


def compare_with_base(errors, recordings, base):
    """Held-out errors of a fine-tuned model, with those of the base on the same clips or None ->
    (row of val.csv, two lines for a person). The row has METERS, HELP, and error_k and base_k
    rolled out k steps; what could not be given is None.

    help = error of the base / error - 1 one step ahead, with its 95 % interval over recordings: the
    meter's gap, with the base in place of shuffled actions."""
    # the meter's numbers; losses are of one number a clip
    row = {"jloss": errors["jloss"].mean().item(), "sloss": errors["sloss"].mean().item()}
    row |= dict.fromkeys(HELP, math.nan)
    errors = {k: x for k, x in errors.items() if k not in ("jloss", "sloss")}
    row |= meter_summary(errors, recordings)

    # by horizon
    unknown = errors["ro_true"] * math.nan
    rolled_out = {
        "error": errors["ro_true"],
        "base": unknown if base is None else base["ro_true"],
    }
    for name, error in rolled_out.items():
        for k, value in enumerate(error.mean(0).tolist()):
            row[f"{name}_{k + 1}"] = value

    # for a person
    gap = gap_text(row["tf_gap"], row["tf_gap_low"], row["tf_gap_high"], recordings)
    if not math.isnan(row["ro_gap"]):
        gap += f"; rolled out {signed(row['ro_gap'])}"
    text = f"skill {row['tf_skill']:.3f} (error / copying), action gap {gap}"

    # does it help? the meter again, with the base's errors as those of shuffled actions
    if base is not None:
        in_place = {"tf_shuffled": base["tf_true"], "ro_shuffled": base["ro_true"]}
        versus = meter_summary(errors | in_place, recordings)
        row["base_tf"] = versus["tf_shuffled"]
        row["base_ro"] = versus["ro_shuffled"]
        row["help"] = versus["tf_gap"]
        row["help_low"] = versus["tf_gap_low"]
        row["help_high"] = versus["tf_gap_high"]
        between = interval_text(row["help_low"], row["help_high"], recordings)
        text += (
            f"\n  does it help? error {row['tf_true']:.4f}, the base's {row['base_tf']:.4f}:"
            f" {signed(row['help'])} {between}; rolled out {row['ro_true']:.4f} and"
            f" {row['base_ro']:.4f}"
        )
    return blank(row), text


def hold_state(state0, actions, mean, scale):
    """States (B, K, S) for a robot of which we do not know what its actions do to its state: the
    first one, unchanged. In place of compose_poses."""
    return state0[:, None].expand(-1, actions.shape[1], -1)


def check_adapters(model, inputs, autocast, trained):
    """A generator for --debug: looks at the losses of one clip before training on it, yields, and
    after training yields a sentence for each thing that holds. RuntimeError for what does not.
    trained: names of the parameters that may change."""

    def losses():
        with autocast(), torch.no_grad():
            return torch.stack(model.eval()(*inputs)).float()

    # before training
    frozen = {n: p.clone() for n, p in model.predictor.named_parameters() if n not in trained}
    with without_lora(model.predictor):
        base = losses()
    start = losses()
    model.train()
    yield

    # after it
    end = losses()
    now = dict(model.predictor.named_parameters())
    moved = [n for n, before in frozen.items() if n in now and not torch.equal(now[n], before)]
    fell = f"loss {start.sum():.4f} fell to {end.sum():.4f} on this clip"
    checks = {
        fell: end.sum() < start.sum(),
        f"{len(frozen)} frozen tensors are as they were": not moved,
    }
    if lora_layers(model.predictor):
        same = "before the first step the losses were those of the base, bit for bit"
        checks[same] = torch.equal(start, base)
        merge_lora(model.predictor)
        difference = (losses() - end).abs().max()
        close = f"merged, the losses differ by {difference:.1e}"
        checks[close] = difference < 1e-2 * end.max()
    failed = [sentence for sentence, holds in checks.items() if not holds]
    if failed:
        raise RuntimeError("--debug: this does not hold: " + "; ".join(failed))
    yield from checks
