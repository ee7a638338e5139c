"""Opening a finished run of train_ac.py, train_lewm.py, train_lora.py or train_lam.py, and the data
to judge it on. All programs that judge a run start here, so that they see it as it was trained:
with its encoder, decoder, precision and scale."""

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
from checkpoint import settings_of
from data import ActionScaler, Clips, open_records, open_split, windows
from droid import ASPECTS, POSE, DroidClips, DroidReader, compose_poses, crop_resize, open_droid
from evaluation.held_out import encoder_dtype, hold_state, precision_of
from files.remote import cached
from files.shards import expand
from files.vpt import CONTINUOUS, ClipReader
from model import (
    LatentActionModel,
    Predictor,
    compose_states,
    encode_steps,
    make_features_of,
    normalize_features,
    picture_features,
    predict_of,
)
from weights import (
    adapt,
    decoder_of,
    encoder_hash,
    fetch,
    open_base,
    open_encoder,
    open_source,
    predictor_weights,
)

# --- the model ---


def pick_device():
    """The GPU if there is one; with torchrun each rank of a node has its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def read_checkpoint(path, flag="--checkpoint"):
    """A run folder or a file -> (its dictionary, file path). flag: that names it. FileNotFoundError
    or ValueError for what is no checkpoint, or one that this version cannot read."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{flag} {path}: no such run folder or file")

    # of a folder the newest good one
    if os.path.isdir(path):
        folder = path
        state, path = checkpoint.load_latest(folder)
        if state is None:
            raise FileNotFoundError(f"{flag}: no checkpoint in {folder}")
    else:
        state = checkpoint.load(path)
    settings_of(state, path)
    return state, path


def scaler_of(state):
    """The ActionScaler in a checkpoint's dictionary."""
    s = state["action_scaler"]
    return ActionScaler(s["mean"].numpy(), s["var"].numpy(), s["scale"].numpy(), s["n"], s["meta"])


def stats_on(state, device):
    """The feature statistics of a checkpoint's dictionary, on a device."""
    return {k: None if v is None else v.to(device) for k, v in state["feature_stats"].items()}


def whole_predictor(state):
    """The Predictor of a run whose checkpoint has all of its weights."""
    # sizes that are not written down follow from the weights
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
    # the base is a file of its own, where training found it
    settings = settings_of(state)
    try:
        file = fetch(settings["base"])
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"the base of this run is not at {settings['base']} ({e}): start in the folder that it"
            " was trained in"
        ) from e

    # the state encoder is that of the base, unless the run trained another one
    state_dim = None
    if "state_encoder.weight" in state["adapter"]:
        state_dim = state["adapter"]["state_encoder.weight"].shape[1]

    # adapters fit on one base only, so a base that has changed is an error
    size = {k: state[k] for k in ("pred_dim", "depth", "num_heads")}
    predictor, base_scaler, _, reinitialised = open_base(
        file, state, len(state["action_names"]), state_dim, size
    )
    if not reinitialised:
        base_hash = encoder_hash(predictor)
        if base_hash != state["base_hash"]:
            raise ValueError(
                f"{file} has changed: its weights hash to {base_hash}, those that this run adapted"
                f" to {state['base_hash']}"
            )

    # wrap the layers as training did, then fill in what it learned
    adapt(
        predictor,
        base_scaler,
        reinitialised,
        scaler_of(state),
        settings["lora"],
        settings["init_from"],
        settings["train_condition_encoders"],
    )
    predictor.load_state_dict(predictor.state_dict() | state["adapter"])
    return predictor


def open_run(path):
    """A run folder or checkpoint of train_ac.py, train_lewm.py or train_lora.py -> (Predictor in
    eval mode, its checkpoint dictionary, ActionScaler, file path).

    The dictionary of either kind has: dataset ("vpt" or "droid"), encode, fps, frames_per_step,
    frames_per_clip, action_names, state_dim, held_out (names of recordings; [] if unknown).
    FileNotFoundError or ValueError for what is no such run."""
    # the kind of checkpoint shows in what it holds
    state, path = read_checkpoint(path)
    if "lam" in state:
        raise ValueError(f"{path} is a run of train_lam.py: judge it with eval_lam.py")
    if not ("adapter" in state or "predictor" in state) or "action_scaler" not in state:
        raise ValueError(
            f"{path} is no checkpoint of train_ac.py, train_lewm.py or train_lora.py: it has no"
            " predictor, or no action_scaler"
        )

    # an encoder that was trained with the predictor is in the same checkpoint. Its folder may have
    # moved since, and may contain later ones
    if settings_of(state, path)["stage"] == "lewm":
        state["settings"] = state["settings"] | {"encoder": path}

    # what only one kind of run writes down
    if "base_hash" in state:
        kind = {"dataset": "droid", "encode": "frame", "frames_per_step": 1, "held_out": []}
    else:
        kind = {"dataset": "vpt"}
    state = kind | state

    # strictly: every tensor has its place, and no place stays empty
    predictor = adapted_predictor(state) if "adapter" in state else whole_predictor(state)
    state["state_dim"] = 0
    if predictor.state_encoder is not None:
        state["state_dim"] = predictor.state_encoder.in_features
    return predictor.eval(), state, scaler_of(state), path


def open_lam(path):
    """A run folder or checkpoint of train_lam.py -> (LatentActionModel in eval mode, its checkpoint
    dictionary, file path)."""
    state, path = read_checkpoint(path)
    if "lam" not in state:
        raise ValueError(
            f"{path}: no checkpoint of train_lam.py (eval.py judges those of train_ac.py)"
        )
    # strictly, and with the quantizer's counts
    model = LatentActionModel(**state["lam"])
    model.load_state_dict(state["model"])
    return model.eval(), state, path


class Run(NamedTuple):
    """A finished run, ready to be judged."""

    # Predictor in eval mode, on the device
    predictor: torch.nn.Module

    # of open_run, and of checkpoint.settings_of
    state: dict
    settings: dict

    scaler: ActionScaler
    path: str
    device: torch.device

    # the name of the precision, and a function that opens its autocast
    dtype: str
    autocast: Callable


def load_run(path, dtype=None):
    """Open a run of train_ac.py, train_lewm.py or train_lora.py on this machine -> Run. dtype:
    --dtype, None for what it was trained in."""
    # what a --dtype does not say, the run does
    predictor, state, scaler, path = open_run(path)
    device = pick_device()
    dtype, autocast = precision_of(dtype, state, device)
    settings = settings_of(state, path)
    return Run(predictor.to(device), state, settings, scaler, path, device, dtype, autocast)


# --- its encoder ---


def check_encoder(state, features_hash, what):
    """ValueError unless the run was trained on features of the encoder with this hash. what: whose
    hash it is, as a sentence begins."""
    if features_hash != state["encoder_hash"]:
        raise ValueError(
            f"{what} features of encoder {features_hash}, but the run was trained on features of"
            f" encoder {state['encoder_hash']}"
        )


def encoder_name(records, encoder, state):
    """Weights of the encoder for video: `encoder`, or what the run used; None for features.
    ValueError if they are needed and not known."""
    if "safetensors" in records[0].members:
        return None
    settings = settings_of(state)
    name = encoder or settings["encoder"]

    # Meta's AC file holds encoder and predictor
    if not name and state["dataset"] == "droid":
        name = fetch(settings["base"])
    if not name:
        raise ValueError(
            "these shards hold video: name the --encoder of the run (train_ac.py's default is"
            " vjepa2_vitl)"
        )
    return name


def features_of_records(records, name, settings, device, dtype, state=None):
    """A function from batches of these records to (z, actions, states), as make_features_of says.

    name: weights of the encoder, None for records of features. settings: how clips are cut and
    encoded. state: of the run, whose encoder and feature statistics these must be; None without a
    run. ValueError for features or an encoder that do not fit."""
    # features say what they were made with, an encoder is hashed
    encoder, source = open_source(
        records,
        name,
        encode=settings["encode"],
        fps=settings["fps"],
        frames_per_step=settings["frames_per_step"],
        frames_per_clip=settings["frames_per_clip"],
        crop_size=settings["crop_size"],
    )

    # other features have other channels
    feature_stats = {}
    if state is not None:
        check_encoder(state, source["encoder_hash"], f"{records[0].shard}:")
        feature_stats = stats_on(state, device)
    if encoder is not None:
        encoder.to(device, encoder_dtype(dtype, settings))

    # in the run's precision, weights and activations
    autocast = precision_of(dtype, state, device)[1]
    return make_features_of(
        encoder, settings["encode"], settings["frames_per_step"], feature_stats, device, autocast
    )


def features_of_pictures(run, name=None):
    """A function from [av.VideoFrame] to features, as the Run was trained on. name: of the encoder;
    None: what the run used. ValueError if it is unknown or another one."""
    # pictures need an encoder, whatever the run was trained on
    settings = run.settings
    name = name or settings["encoder"]
    if not name:
        raise ValueError("this run was trained on features: name the --encoder that made them")
    encoder = open_encoder(name, settings["crop_size"], settings["frames_per_clip"])
    encoder.to(run.device).eval()
    check_encoder(run.state, encoder_hash(encoder), f"--encoder {name} gives")
    weights_dtype = encoder_dtype(run.dtype, settings)
    encoder.to(weights_dtype)
    feature_stats = stats_on(run.state, run.device)

    # weights in bf16 need no autocast, as in make_features_of
    precision = run.autocast if weights_dtype == torch.float32 else contextlib.nullcontext

    def features_of_robot(frames):
        # cut as frames of episodes are, and not as those of play
        pictures = [
            f if isinstance(f, np.ndarray) else f.to_ndarray(format="rgb24") for f in frames
        ]
        video = crop_resize(pictures, settings["crop_size"], *ASPECTS[settings["crop"]])[None]
        with precision():
            h = encode_steps(encoder, video.to(run.device), settings["encode"], len(frames))
        return normalize_features(h, **feature_stats)[0, 0]

    if run.state["dataset"] == "droid":
        return features_of_robot

    def features(frames):
        with precision():
            return picture_features(
                frames,
                encoder=encoder,
                encode=settings["encode"],
                crop_size=settings["crop_size"],
                feature_stats=feature_stats,
            )

    return features


# --- its data ---


def print_left_out(bad):
    """A line for each (file, key, reason) that could not be read."""
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")


def open_episodes(state, scaler, data):
    """Robot episodes for a run of train_lora.py -> (DroidClips, compose of action_meter, [Episode],
    [bad]). data: patterns, or None: what the run held out."""
    # frames are cut and actions computed as in training
    settings = settings_of(state)
    names = state["action_names"]
    reader = DroidReader(
        state["frames_per_clip"],
        fps=settings["fps"],
        crop_size=settings["crop_size"],
        crop=settings["crop"],
        camera=settings["cameras"],
        stride=settings["stride"],
        state_keys=settings["state_keys"],
        action_keys=settings["action_keys"],
        scaler=scaler,
    )

    # all of the data named, or the run's own split
    which = {"idle_filter": settings["idle_filter"], "success": settings["success"]}
    if data:
        records, _, bad = open_droid(data, None, 0.0, reader, **which)
    else:
        val_fraction = settings["val_fraction"] if settings["val_clips"] else 0.0
        _, records, bad = open_droid(
            settings["data"], settings["val_data"], val_fraction, reader, **which
        )

    # the same actions and states as in training
    scaler.check(
        "the scaler in the checkpoint", reader.names, settings["fps"], 1, settings["stride"] or 0
    )
    if (reader.names, reader.state_dim) != (names, state["state_dim"] or reader.state_dim):
        raise ValueError(
            f"the run has actions {names} and {state['state_dim']}-D states, these episodes"
            f" {reader.names} and {reader.state_dim}-D states"
        )

    # what an action does to the state is known for poses only
    compose = compose_poses if (names, reader.state_dim) == (POSE, 7) else hold_state
    return DroidClips(records, reader, settings["seed"]), compose, records, bad


def through_cache(groups, settings):
    """Groups of patterns, or None. URLs are read as the run read them: through its --cache_dir."""
    if not groups or not settings["cache_dir"]:
        return groups
    return cached([expand(g) for g in groups], settings["cache_dir"], settings["cache_size"])


def split_of_run(settings, data=None, val_data=None):
    """Play that a run was trained on and play that it held out, or the patterns named in their
    place -> what data.open_split returns. The --recordings of the run pick from its own data."""
    return open_split(
        through_cache(data or settings["data"], settings),
        None,
        through_cache(val_data or settings["val_data"], settings),
        settings["val_fraction"],
        only=None if data else settings.get("recordings"),
    )


def decoder_for(records, asked, settings, print0=print):
    """The video decoder to judge a run with: `asked` (--video_decoder), or the run's. Other
    decoders give other pixels, so a warning is printed for another one."""
    # features say which decoder made them; video is decoded as in training
    trained_with = settings["decoder"]
    judged_with = decoder_of(records, asked or "pyav", "--video_decoder")
    if not asked and records and "mp4" in records[0].members:
        judged_with = trained_with
    if judged_with != trained_with:
        print0(
            f"WARNING: the run was trained on video that {trained_with} decoded, this is decoded by"
            f" {judged_with}, whose pixels differ"
        )
    return judged_with


def play_reader(settings, scaler, decoder):
    """The ClipReader that cuts play as these settings say; scaler None leaves actions as they were
    recorded."""
    return ClipReader(
        settings["frames_per_clip"],
        settings["fps"],
        settings["frames_per_step"],
        crop_size=settings["crop_size"],
        action_space=settings["action_space"],
        scaler=scaler,
        encode=settings["encode"],
        decoder=decoder,
        gui=settings["gui"],
    )


def open_play(state, scaler, data, decoder, print0):
    """VPT shards for a run of train_ac.py -> (Clips, [Record], [bad]). data: patterns, or None:
    what the run held out. decoder: of video, None: the run's."""
    # a scaler of other steps would give other units
    settings = settings_of(state)
    scaler.check("the scaler in the checkpoint", CONTINUOUS, state["fps"], state["frames_per_step"])

    # all of the data named, or the run's own split
    if data:
        records, bad = open_records(through_cache([data], settings))
    else:
        _, _, records, bad = split_of_run(settings)

    # cut as in training, without its augmentation
    reader = play_reader(settings, scaler, decoder_for(records, decoder, settings, print0))
    return Clips(records, [1.0] * len(records), reader, settings["seed"]), records, bad


def warn_of_training_data(records, state, scaler, print0=print):
    """Print a warning if recordings to judge a run on may be among those it was trained on."""
    # features of a recording come in several members
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
    # records, and how states follow from actions
    if state["dataset"] == "droid":
        dataset, compose, records, bad = open_episodes(state, scaler, data)
    else:
        dataset, records, bad = open_play(state, scaler, data, decoder, print0)
        compose = compose_states
    warn_of_training_data(records, state, scaler, print0)

    # shuffled actions come from another clip, so one clip is too few
    if sum(map(len, windows(dataset, 1, 2))) < 2:
        span = f"{state['frames_per_clip']} frames at {state['fps']:g} fps"
        raise ValueError(
            f"{len(records)} held-out recordings hold fewer than two clips of {span}: name more"
            " with --data"
        )

    # the run's encoder, for records of video
    name = encoder_name(records, encoder, state)
    features_of = features_of_records(records, name, settings_of(state), device, dtype, state)
    return dataset, features_of, compose, bad
