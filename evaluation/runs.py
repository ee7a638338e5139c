"""Opening a finished run of train_ac.py or train_lora.py, and the data to judge it on."""

import os

import checkpoint
from data import ActionScaler, Clips, open_records, open_split, windows
from droid import POSE, DroidClips, DroidReader, compose_poses, open_droid
from evaluation.held_out import (
    encoder_dtype,
    hold_state,
    precision_of,
)
from files.remote import cached
from files.shards import expand
from files.vpt import CONTINUOUS, ClipReader
from model import (
    Predictor,
    compose_states,
    make_inputs,
    predict_of,
)
from weights import adapt, decoder_of, encoder_hash, fetch, open_base, open_source

# --- precision ---


# --- held-out errors ---


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
