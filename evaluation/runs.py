"""What training scripts do around their loop, and what a finished run needs again: features of a
batch, held-out errors, logs, curves."""

import contextlib
import functools
import gc
import math
import os
import zlib

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import checkpoint
from data import Clips, collate, expand, leave_signals, open_records, open_split, windows
from droid import POSE, DroidClips, DroidReader, compose_poses, open_droid
from encode import decoder_of, encoder_hash, fetch, open_source
from files.remote import cached
from files.vpt import CONTINUOUS, ClipReader
from fit_scaler import ActionScaler
from kernels import chosen
from lora import adapt, lora_layers, merge_lora, open_base, without_lora
from model import (
    FEWEST_RECORDINGS,
    METERS,
    Predictor,
    ac_losses,
    action_meter,
    compose_states,
    encode_steps,
    meter_summary,
    normalize_features,
    predict_of,
)


def make_inputs(encoder, encode, frames_per_step, stats, device, autocast=contextlib.nullcontext):
    """A function from a batch of data.py to (z, actions, states) on the device; stats ("mean",
    "std") of channels may be set later."""

    @torch.no_grad()
    def inputs(batch, normalize=True):
        h, actions, states = (
            batch[k].to(device, non_blocking=True)
            for k in ("z" if "z" in batch else "video", "actions", "states")
        )
        if "z" not in batch:
            cast = (
                autocast()
                if encoder.patch_embed.proj.weight.dtype == torch.float32
                else contextlib.nullcontext()
            )
            with (
                torch.inference_mode(),
                cast,
            ):  # bf16 weights need none, which would only go back and forth
                h = encode_steps(encoder, h, encode, frames_per_step)
        return normalize_features(h, **stats) if normalize else h.float(), actions, states

    return inputs


def leave_group():
    """Collective: ends the process group after the last reference to a DistributedDataParallel. Its
    threads must end before Python does, or the process aborts with "terminate called without an
    active exception", one run in five (pytorch/pytorch#190489)."""
    gc.collect()
    dist.destroy_process_group()


def prefetch(batches, device):
    """The same batches; on a GPU each one's copy (from pinned memory, on a stream of its own) runs
    while the one before is computed on."""
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = {
                k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                for k, v in batch.items()
            }
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in batch.values():
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(torch.cuda.current_stream(device))
        ahead = batch
    if ahead is not None:
        yield ahead


# --- precision ---


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


# --- held-out errors ---


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


def own_predictor(state):
    """The predictor's weights in a checkpoint; --save_encoder writes them in Meta's layout, with a
    prefix and an unused layer."""
    return {
        k.removeprefix("module."): v
        for k, v in state["predictor"].items()
        if "extrinsics_encoder" not in k
    }


def adapted_predictor(state):
    """The predictor of a LoRA run: its base as train_lora.py opened it, with the adapters and what
    else was trained."""
    run, size = state["args"], {k: state[k] for k in ("pred_dim", "depth", "num_heads")}
    try:
        file = fetch(run["base"])
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"the base of this run is not at {run['base']} ({e}): start in the folder that it was"
            " trained in"
        ) from e
    state_dim = len(state["adapter"].get("state_encoder.weight", [[]])[0]) or None
    predictor, base_scaler, _, anew = open_base(
        file, state, len(state["action_names"]), state_dim, size
    )
    if not anew and (found := encoder_hash(predictor)) != state["base_hash"]:
        raise ValueError(
            f"{file} has changed: its weights hash to {found}, those that this run adapted to"
            f" {state['base_hash']}"
        )
    options = {k: run[k] for k in ("targets", "r", "alpha", "dropout", "rslora", "fused_qkv")}
    adapt(
        predictor,
        base_scaler,
        anew,
        scaler_of(state),
        options,
        run["init_from"],
        run["train_condition_encoders"],
    )
    predictor.load_state_dict(predictor.state_dict() | state["adapter"])
    return predictor


def scaler_of(state):
    """The ActionScaler in a checkpoint's dictionary."""
    s = state["action_scaler"]
    return ActionScaler(s["mean"].numpy(), s["var"].numpy(), s["scale"].numpy(), s["n"], s["meta"])


def open_run(path):
    """A run folder or checkpoint of train_ac.py or train_lora.py -> (Predictor in eval mode, its
    checkpoint dictionary, ActionScaler, file path). Both kinds have in the dictionary: dataset
    ("vpt" or "droid"), encode, fps, frames_per_step, frames_per_clip, action_names, state_dim,
    held_out (names of recordings; [] if unknown)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"--checkpoint {path}: no such run folder or file")
    state, path = (
        checkpoint.load_latest(folder := path)
        if os.path.isdir(path)
        else (checkpoint.load(path), path)
    )
    if state is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    if "lam" in state:
        raise ValueError(f"{path} is a run of train_lam.py: judge it with eval_lam.py")
    if not ("adapter" in state or "predictor" in state) or "action_scaler" not in state:
        raise ValueError(
            f"{path} is no checkpoint of train_ac.py or train_lora.py: it has no predictor, or no"
            " action_scaler"
        )
    robot = {"dataset": "droid", "encode": "frame", "frames_per_step": 1, "held_out": []}
    state = (robot if "base_hash" in state else {"dataset": "vpt"}) | state
    if "adapter" in state:
        predictor = adapted_predictor(state)
    else:
        found = own_predictor(state)
        size = {k: state[k] for k in ("pred_dim", "depth", "num_heads")} | {
            "mlp_dim": len(found["predictor_blocks.0.mlp.fc1.bias"])
        }
        state_dim = found["state_encoder.weight"].shape[1] if "state_encoder.weight" in found else 0
        predictor = Predictor(
            state["embed_dim"],
            len(state["action_names"]),
            state_dim,
            (state["grid"],) * 2,
            predict=predict_of(found),
            **size,
        )
        predictor.load_state_dict(found)
    state["state_dim"] = (
        predictor.state_encoder.in_features if predictor.state_encoder is not None else 0
    )
    return predictor.eval(), state, scaler_of(state), path


def open_held_out(state, scaler, data, encoder, device, dtype="float32", decoder=None):
    """Data for a run of open_run, read as its training read them -> (Clips or DroidClips, inputs of
    make_inputs, compose of action_meter: states of actions, [bad]). data: VPT shards, video or
    features, or robot episodes; None: what the run held out. encoder: weights, for video; None:
    what the run used. dtype: as `precision_of` names it. decoder: of video; None: what the run
    used. Another one is warned of. ValueError for what belongs to another encoder, fps or action
    space, and for too little."""
    run, names = state["args"], state["action_names"]
    source = {k: state[k] for k in ("encode", "fps", "frames_per_step", "frames_per_clip")} | {
        "crop_size": run["crop_size"]
    }
    if state["dataset"] == "droid":
        reader = DroidReader(
            state["frames_per_clip"],
            *(
                run[k]
                for k in (
                    "fps",
                    "crop_size",
                    "crop",
                    "camera",
                    "stride",
                    "state_keys",
                    "action_keys",
                )
            ),
            scaler=scaler,
        )
        given, fraction = (
            (data, 0.0) if data else (run["data"], run["val_fraction"] * bool(run["val_clips"]))
        )
        train, val, bad = open_droid(
            given,
            None if data else run["val_data"],
            fraction,
            reader,
            idle_filter=run["idle_filter"],
            success=run["success"],
        )
        records = train if data else val
        scaler.check(
            "the scaler in the checkpoint", reader.names, run["fps"], 1, run["stride"] or 0
        )
        if (reader.names, reader.state_dim) != (names, state["state_dim"] or reader.state_dim):
            raise ValueError(
                f"the run has actions {names} and {state['state_dim']}-D states, these episodes"
                f" {reader.names} and {reader.state_dim}-D states"
            )
        dataset = DroidClips(records, reader, run["seed"])
        compose = compose_poses if (names, reader.state_dim) == (POSE, 7) else hold_state
    else:
        scaler.check(
            "the scaler in the checkpoint", CONTINUOUS, state["fps"], state["frames_per_step"]
        )

        def through(groups):
            """URLs are read as the run read them."""
            found = groups and [expand(g) for g in groups]
            return (
                cached(found, run["cache_dir"], run["cache_size"])
                if found and run.get("cache_dir")
                else groups
            )

        if data:
            records, bad = open_records(through([data]))
        else:
            found = (
                through(run["data"] or [["VPT/*.tar"]]),
                None,
                through(run["val_data"]),
                run["val_fraction"],
            )
            _, _, records, bad = open_split(*found)
        trained = state.get("decoder", run.get("decoder", "pyav"))
        seen_by = decoder_of(records, decoder or "pyav")
        if not decoder and records and "mp4" in records[0].members:
            seen_by = trained
        if seen_by != trained:
            print(
                f"WARNING: the run was trained on pictures of --decoder {trained}, these are of"
                f" {seen_by}, whose pixels differ"
            )
        keep = {k: run[k] for k in ("crop_size", "action_space", "gui")} | {"decoder": seen_by}
        reader = ClipReader(
            state["frames_per_clip"],
            state["fps"],
            state["frames_per_step"],
            scaler=scaler,
            encode=state["encode"],
            **keep,
        )
        dataset, compose = Clips(records, [1.0] * len(records), reader, run["seed"]), compose_states
    found, known = {r.name for r in records}, set(state["held_out"])
    if seen := found - known if known else found & set(scaler.meta.get("recordings", [])):
        what = (
            "not among those the run held out" if known else "among those its scaler was fitted on"
        )
        print(
            f"WARNING: {len(seen)} of {len(found)} recordings are {what}: was it trained on them?"
        )
    if sum(map(len, windows(dataset, 1, 2))) < 2:
        span = f"{state['frames_per_clip']} frames at {state['fps']:g} fps"
        raise ValueError(
            f"{len(records)} held-out recordings hold fewer than two clips of {span}: name more"
            " with --data"
        )
    features = "safetensors" in records[0].members
    if not features and not (
        encoder := encoder or run["encoder"] or (state["dataset"] == "droid" and fetch(run["base"]))
    ):
        raise ValueError(
            "these shards hold video: name the --encoder of the run (train_ac.py's default is"
            " vjepa2_vitl)"
        )
    model, source = open_source(records, None if features else encoder, **source)
    if source["encoder_hash"] != state["encoder_hash"]:
        raise ValueError(
            f"the run was trained on features of encoder {state['encoder_hash']}, these are of"
            f" {source['encoder_hash']}"
        )
    if model is not None:
        model.to(device, encoder_dtype(dtype, run))
    autocast = precision_of(dtype, state, device)[1]
    stats = {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}
    return (
        dataset,
        make_inputs(model, state["encode"], state["frames_per_step"], stats, device, autocast),
        compose,
        bad,
    )
