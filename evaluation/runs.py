"""Opening a finished run of train_ac.py or train_lora.py, and the data to judge it on."""

import os

import checkpoint
from data import ActionScaler, Clips, open_records, open_split, windows
from droid import POSE, DroidClips, DroidReader, compose_poses, open_droid
from evaluation.held_out import encoder_dtype, hold_state, precision_of
from files.remote import cached
from files.shards import expand
from files.vpt import CONTINUOUS, ClipReader
from model import Predictor, compose_states, make_features_of, predict_of
from weights import (
    adapt,
    decoder_of,
    encoder_hash,
    fetch,
    open_base,
    open_source,
    predictor_weights,
)

# --- the model ---


def scaler_of(state):
    """The ActionScaler in a checkpoint's dictionary."""
    s = state["action_scaler"]
    return ActionScaler(s["mean"].numpy(), s["var"].numpy(), s["scale"].numpy(), s["n"], s["meta"])


def whole_predictor(state):
    """The Predictor of a run whose checkpoint has all of its weights."""
    weights = predictor_weights(state)
    state_dim = 0
    if "state_encoder.weight" in weights:
        state_dim = weights["state_encoder.weight"].shape[1]
    predictor = Predictor(
        state["embed_dim"],
        len(state["action_names"]),
        state_dim,
        (state["grid"], state["grid"]),
        predict=predict_of(weights),
        pred_dim=state["pred_dim"],
        depth=state["depth"],
        num_heads=state["num_heads"],
        mlp_dim=len(weights["predictor_blocks.0.mlp.fc1.bias"]),
    )
    predictor.load_state_dict(weights)
    return predictor


def adapted_predictor(state):
    """The Predictor of a LoRA run: its base as train_lora.py opened it, with the adapters and what
    else was trained. FileNotFoundError without the base, ValueError if the base has changed."""
    run = state["args"]
    try:
        file = fetch(run["base"])
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"the base of this run is not at {run['base']} ({e}): start in the folder that it was"
            " trained in"
        ) from e

    # the base
    state_dim = None  # that of the base, unless the run trained another state encoder
    if "state_encoder.weight" in state["adapter"]:
        state_dim = state["adapter"]["state_encoder.weight"].shape[1]
    size = {k: state[k] for k in ("pred_dim", "depth", "num_heads")}
    predictor, base_scaler, _, reinitialised = open_base(
        file, state, len(state["action_names"]), state_dim, size
    )
    if not reinitialised:
        found = encoder_hash(predictor)
        if found != state["base_hash"]:
            raise ValueError(
                f"{file} has changed: its weights hash to {found}, those that this run adapted to"
                f" {state['base_hash']}"
            )

    # the adapters
    options = {k: run[k] for k in ("targets", "r", "alpha", "dropout", "rslora", "fused_qkv")}
    adapt(
        predictor,
        base_scaler,
        reinitialised,
        scaler_of(state),
        options,
        run["init_from"],
        run["train_condition_encoders"],
    )
    predictor.load_state_dict(predictor.state_dict() | state["adapter"])
    return predictor


def open_run(path):
    """A run folder or checkpoint of train_ac.py or train_lora.py -> (Predictor in eval mode, its
    checkpoint dictionary, ActionScaler, file path).

    The dictionary of either kind has: dataset ("vpt" or "droid"), encode, fps, frames_per_step,
    frames_per_clip, action_names, state_dim, held_out (names of recordings; [] if unknown).
    FileNotFoundError or ValueError for what is no such run."""
    # read the file
    if not os.path.exists(path):
        raise FileNotFoundError(f"--checkpoint {path}: no such run folder or file")
    if os.path.isdir(path):
        folder = path
        state, path = checkpoint.load_latest(folder)
        if state is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
    else:
        state = checkpoint.load(path)
    if "lam" in state:
        raise ValueError(f"{path} is a run of train_lam.py: judge it with eval_lam.py")
    if not ("adapter" in state or "predictor" in state) or "action_scaler" not in state:
        raise ValueError(
            f"{path} is no checkpoint of train_ac.py or train_lora.py: it has no predictor, or no"
            " action_scaler"
        )

    # what only one kind of run writes down
    if "base_hash" in state:
        kind = {"dataset": "droid", "encode": "frame", "frames_per_step": 1, "held_out": []}
    else:
        kind = {"dataset": "vpt"}
    state = kind | state

    predictor = adapted_predictor(state) if "adapter" in state else whole_predictor(state)
    state["state_dim"] = 0
    if predictor.state_encoder is not None:
        state["state_dim"] = predictor.state_encoder.in_features
    return predictor.eval(), state, scaler_of(state), path


# --- its data ---


def open_episodes(state, scaler, data):
    """Robot episodes for a run of train_lora.py -> (DroidClips, compose of action_meter, [Episode],
    [bad]). data: patterns, or None: what the run held out."""
    run = state["args"]
    names = state["action_names"]
    reader = DroidReader(
        state["frames_per_clip"],
        fps=run["fps"],
        crop_size=run["crop_size"],
        crop=run["crop"],
        camera=run["camera"],
        stride=run["stride"],
        state_keys=run["state_keys"],
        action_keys=run["action_keys"],
        scaler=scaler,
    )

    # all of the data named, or the run's own split
    which = {"idle_filter": run["idle_filter"], "success": run["success"]}
    if data:
        records, _, bad = open_droid(data, None, 0.0, reader, **which)
    else:
        val_fraction = run["val_fraction"] if run["val_clips"] else 0.0
        _, records, bad = open_droid(run["data"], run["val_data"], val_fraction, reader, **which)

    scaler.check("the scaler in the checkpoint", reader.names, run["fps"], 1, run["stride"] or 0)
    if (reader.names, reader.state_dim) != (names, state["state_dim"] or reader.state_dim):
        raise ValueError(
            f"the run has actions {names} and {state['state_dim']}-D states, these episodes"
            f" {reader.names} and {reader.state_dim}-D states"
        )
    compose = compose_poses if (names, reader.state_dim) == (POSE, 7) else hold_state
    return DroidClips(records, reader, run["seed"]), compose, records, bad


def open_play(state, scaler, data, decoder, print0):
    """VPT shards for a run of train_ac.py -> (Clips, [Record], [bad]). data: patterns, or None:
    what the run held out. decoder: of video, None: the run's."""
    run = state["args"]
    scaler.check("the scaler in the checkpoint", CONTINUOUS, state["fps"], state["frames_per_step"])

    def through_cache(groups):
        """URLs are read as the run read them: through its --cache_dir."""
        if not groups or not run.get("cache_dir"):
            return groups
        return cached([expand(g) for g in groups], run["cache_dir"], run["cache_size"])

    # all of the data named, or the run's own split
    if data:
        records, bad = open_records(through_cache([data]))
    else:
        own = through_cache(run["data"] or [["VPT/*.tar"]])
        _, _, records, bad = open_split(
            own, None, through_cache(run["val_data"]), run["val_fraction"]
        )

    # other decoders give other pixels
    trained_with = state.get("decoder", run.get("decoder", "pyav"))
    judged_with = decoder_of(records, decoder or "pyav")
    if not decoder and records and "mp4" in records[0].members:
        judged_with = trained_with
    if judged_with != trained_with:
        print0(
            f"WARNING: the run was trained on pictures of --decoder {trained_with}, these are of"
            f" {judged_with}, whose pixels differ"
        )

    reader = ClipReader(
        state["frames_per_clip"],
        state["fps"],
        state["frames_per_step"],
        crop_size=run["crop_size"],
        action_space=run["action_space"],
        scaler=scaler,
        encode=state["encode"],
        decoder=judged_with,
        gui=run["gui"],
    )
    return Clips(records, [1.0] * len(records), reader, run["seed"]), records, bad


def warn_of_training_data(records, state, scaler, print0):
    """Say a warning if recordings to judge a run on may be among those it was trained on."""
    names = {r.name for r in records}
    held_out_names = set(state["held_out"])
    if held_out_names:
        doubtful = names - held_out_names
        reason = "not among those the run held out"
    else:
        doubtful = names & set(scaler.meta.get("recordings", []))
        reason = "among those its scaler was fitted on"
    if doubtful:
        print0(
            f"WARNING: {len(doubtful)} of {len(names)} recordings are {reason}: was it trained on"
            " them?"
        )


def encoder_name(records, encoder, state):
    """Weights of the encoder for video: `encoder`, or what the run used; None for features.
    ValueError if they are needed and not known."""
    if "safetensors" in records[0].members:
        return None
    name = encoder or state["args"]["encoder"]
    if not name and state["dataset"] == "droid":
        name = fetch(state["args"]["base"])
    if not name:
        raise ValueError(
            "these shards hold video: name the --encoder of the run (train_ac.py's default is"
            " vjepa2_vitl)"
        )
    return name


def open_held_out(
    state, scaler, data, encoder, device, dtype="float32", decoder=None, print0=print
):
    """Data for a run of open_run, read as its training read them -> (Clips or DroidClips,
    features_of from make_features_of, compose of action_meter: computes states from actions,
    [bad]).

    data: VPT shards, video or features, or robot episodes; None: what the run held out. encoder:
    weights, for video; None: what the run used. dtype: as `precision_of` names it. decoder: of
    video; None: what the run used, and a warning for another one. print0: called with each warning.
    ValueError for what belongs to another encoder, fps or action space, and for fewer than two
    clips."""
    if state["dataset"] == "droid":
        dataset, compose, records, bad = open_episodes(state, scaler, data)
    else:
        dataset, records, bad = open_play(state, scaler, data, decoder, print0)
        compose = compose_states
    warn_of_training_data(records, state, scaler, print0)

    if sum(map(len, windows(dataset, 1, 2))) < 2:
        span = f"{state['frames_per_clip']} frames at {state['fps']:g} fps"
        raise ValueError(
            f"{len(records)} held-out recordings hold fewer than two clips of {span}: name more"
            " with --data"
        )

    # the encoder, which must be that of the run
    run = state["args"]
    model, source = open_source(
        records,
        encoder_name(records, encoder, state),
        encode=state["encode"],
        fps=state["fps"],
        frames_per_step=state["frames_per_step"],
        frames_per_clip=state["frames_per_clip"],
        crop_size=run["crop_size"],
    )
    if source["encoder_hash"] != state["encoder_hash"]:
        raise ValueError(
            f"the run was trained on features of encoder {state['encoder_hash']}, these are of"
            f" {source['encoder_hash']}"
        )
    if model is not None:
        model.to(device, encoder_dtype(dtype, run))

    autocast = precision_of(dtype, state, device)[1]
    feature_stats = stats_on(state, device)
    features_of = make_features_of(
        model, state["encode"], state["frames_per_step"], feature_stats, device, autocast
    )
    return dataset, features_of, compose, bad


def stats_on(state, device):
    """The feature statistics of a checkpoint's dictionary, on a device."""
    return {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}
