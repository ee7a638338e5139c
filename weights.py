"""Reading and writing everybody's weights: Meta's V-JEPA 1, V-JEPA 2 and AC files, jepa-wms,
Hugging Face VJEPA2, and our own.

Nothing is loaded in part: a missing, unmatched or misshapen key is an error that lists it. Nothing
is executed: `weights_only=True`. Sizes come from the tensors, but no tensor shows the number of
heads: it is a known architecture's, or must be given."""

import datetime
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from tqdm import tqdm

import checkpoint
from data import STD_RANGE, ActionScaler
from files.disk import CACHE, disk_failed, disk_sentence, write_atomically
from files.features import feature_settings
from model import (
    CONDITION,
    Encoder,
    Linear,
    Predictor,
    add_lora,
    lora_layers,
    merged_state,
    predict_of,
    put_lora,
)

ARCHITECTURES = {  # width, depth, heads, MLP width; vit_tiny is ours, for the demo and the tests
    "vit_tiny": (192, 4, 3, 768),
    "vit_base_16": (768, 12, 12, 3072),
    "vit_large_16": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
    "vit_giant_xformers": (1408, 40, 22, 6144),
}
RELEASED = {
    "vjepa2_vitl": "vjepa2/vitl.pt",
    "vjepa2_vith": "vjepa2/vith.pt",
    "vjepa2_vitg": "vjepa2/vitg.pt",
    "vjepa2_vitg384": "vjepa2/vitg-384.pt",
    "vjepa2_ac_vitg": "vjepa2/vjepa2-ac-vitg.pt",
    "vjepa_vitl": "jepa/vitl16/vitl16.pth.tar",
    "vjepa_vith": "jepa/vith16/vith16.pth.tar",
}


def build_encoder(name, img_size=256, num_frames=16, seed=0):
    """A frozen V-JEPA 2 encoder with seeded random weights."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name!r} is unknown, choose from: {', '.join(ARCHITECTURES)}"
        )
    width, depth, heads, mlp_dim = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (
            Encoder(width, depth, heads, mlp_dim=mlp_dim, img_size=img_size, num_frames=num_frames)
            .eval()
            .requires_grad_(False)
        )


def load_encoder(path, num_heads=None, num_frames=None, pos=None, which="target_encoder"):
    """The frozen encoder in a weight file; `which` of Meta's two where there are two (the EMA one
    serves evaluation and AC training).

    `pos` "rope" or "sincos"; None goes by the released file's name, else by whether there is a
    `pos_embed` that is not all zero. `num_frames` is what a sincos table was made for (default 16).
    """
    state = from_hugging_face(
        part_of(path, which, "patch_embed.proj.weight", "embeddings.patch_embeddings.proj.weight")
    )
    if state["patch_embed.proj.weight"].ndim != 5:
        raise ValueError(
            f"{path}: an image encoder, its patch_embed.proj.weight has no time dimension"
        )
    width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
    sizes = sizes_of(path, state, "blocks.", width, num_heads)
    table = state.get("pos_embed")
    is_jepa1 = {Path(p).name: p.startswith("jepa/") for p in RELEASED.values()}
    pos = pos or (
        "sincos" if is_jepa1.get(Path(path).name, table is not None and table.any()) else "rope"
    )
    if pos == "rope":
        state.pop(
            "pos_embed", None
        )  # released V-JEPA 2 files may still hold one, their models never used it
    elif table is not None:
        T = (num_frames or 16) // tubelet
        grid = round((table.shape[1] / T) ** 0.5)
        if table.shape[1] != T * grid * grid:
            raise ValueError(
                f"{path}: {table.shape[1]} positions are not {T} steps of a square grid: give"
                " num_frames"
            )
        sizes |= {"img_size": grid * patch, "num_frames": T * tubelet}
    with torch.device("meta"):
        encoder = Encoder(width, **sizes, patch_size=patch, tubelet_size=tubelet, pos=pos)
    return load_strict(encoder, state, path).eval().requires_grad_(False)


def load_predictor(path, num_heads=None, grid=(16, 16), use_extrinsics=False):
    """The trainable AC predictor in a weight file, for features on this patch grid. An unused
    extrinsics layer is kept, frozen."""
    state = {
        k.replace("proprio_", "state_"): v
        for k, v in part_of(path, "predictor", "predictor_embed.weight").items()
    }  # jepa-wms
    if "action_encoder.weight" not in state:
        raise ValueError(
            f"{path}: the predictor has no action_encoder, so it is a mask predictor and not an"
            " action-conditioned one"
        )
    pred_dim, embed_dim = state["predictor_embed.weight"].shape
    sizes = sizes_of(path, state, "predictor_blocks.", pred_dim, num_heads)
    action_dim, state_dim = (
        state[k].shape[1] if k in state else 0
        for k in ("action_encoder.weight", "state_encoder.weight")
    )
    has_layer = use_extrinsics or "extrinsics_encoder.weight" in state
    with torch.device("meta"):
        predictor = Predictor(
            embed_dim,
            action_dim,
            state_dim,
            grid,
            pred_dim=pred_dim,
            **sizes,
            use_extrinsics=has_layer,
            predict=predict_of(state),
        )
    load_strict(predictor, state, path)
    if has_layer and not use_extrinsics:
        predictor.use_extrinsics = False
        predictor.extrinsics_encoder.requires_grad_(False)
    return predictor


def meta_state(encoder, predictor):
    """`encoder`, `target_encoder`, `predictor` as in Meta's released AC file: their hub code loads
    it (the predictor where A = S = 7)."""
    bias = torch.zeros(
        predictor.predictor_embed.out_features
    )  # upstream always builds the extrinsics layer and loads strictly
    state = {
        "extrinsics_encoder.weight": bias.new_zeros(len(bias), 6),
        "extrinsics_encoder.bias": bias,
    } | predictor.state_dict()
    frozen = {f"module.{k}": v for k, v in encoder.state_dict().items()}
    return {
        "encoder": frozen,
        "target_encoder": frozen,
        "predictor": {f"module.{k}": v for k, v in state.items()},
    }


def read_file(path):
    """The dictionary in a .safetensors or torch.save file, memory-mapped; one clear sentence for
    what is no weight file."""
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    with open(path, "rb") as f:
        head = f.read(64)
    is_page = head.lstrip().startswith(b"<")
    is_zip = head.startswith(b"PK\3\4")  # torch.save before version 1.6 wrote no zip: not mapped
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True, mmap=is_zip)
        )
    except Exception as e:  # the two readers raise half a dozen types
        if disk_failed(e):  # which says nothing about the file
            raise OSError(disk_sentence(path, e)) from e
        said = f"{type(e).__name__} {e}".splitlines()[0][:120]
        reason = f"no weight file, or only part of one ({said})"
        name = re.search(r"GLOBAL (\S+)", str(e))
        if isinstance(e, pickle.UnpicklingError) and (is_zip or name):
            raise ValueError(
                f"{path}: refused, since it holds {name[1] if name else 'a Python object'}, which"
                " could run code: only tensors and plain values are read"
            ) from e
        if is_page:
            reason = "a web page: fetch it again"
        raise ValueError(f"{path}: these {path.stat().st_size} bytes are {reason}") from e
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def part_of(path, which, *landmarks):
    """The state dict `which` of the file (the file itself, when flat), without the prefix that
    stands before the landmark key."""
    state = read_file(path)
    state = state.get(which, state)
    if state is None:
        state = {}
    if not isinstance(state, dict):
        raise ValueError(f"{path}: {which!r} is a {type(state).__name__}, no weights by name")
    numbered = [k for k in state if not isinstance(k, str)]
    if numbered:
        raise ValueError(
            f"{path}: {len(numbered)} of its {len(state)} keys are no names but"
            f" {type(numbered[0]).__name__}, such as {numbered[0]!r}: an optimizer's state, or"
            " weights without their names"
        )
    found = [(k, k.removesuffix(mark)) for k in state for mark in landmarks if k.endswith(mark)]
    if len(found) != 1:
        raise ValueError(
            f"{path}: {which!r} needs one key that ends in {landmarks[0]}, {len(found)} found; it"
            f" has {some(state)}"
        )
    prefix = found[0][1]
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    check_numbers(part, path)
    return part


def check_numbers(state, path):
    """Refuses (ValueError) what is no plain tensor of finite floats, by name: whole numbers are
    weights that somebody quantised, and one NaN makes every feature NaN."""
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, no tensor")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{path}: {key} has no numbers of its own ({value.layout}, {value.device.type}):"
                " save plain tensors"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(
                f"{path}: {key} holds {str(value.dtype)[6:]}, no floats: quantised weights are not"
                " read, save them in float32 or bfloat16"
            )
        wrong = value.numel() - int(torch.isfinite(value.float()).sum())
        if wrong:
            raise ValueError(
                f"{path}: {wrong} of the {value.numel()} numbers of {key} are NaN or infinite: its"
                " training had diverged, or the file is damaged"
            )


def from_hugging_face(state):
    """VJEPA2Model's encoder under Meta's names, with query, key and value merged; any other state
    as it is."""
    merged = {}
    for key, value in state.items():
        key = key.replace("embeddings.patch_embeddings", "patch_embed").replace("layernorm", "norm")
        merged[key.replace("layer.", "blocks.").replace("attention.", "attn.")] = value
    for query in [k for k in merged if ".query." in k]:
        qkv = [query.replace("query", name) for name in ("query", "key", "value")]
        if all(k in merged for k in qkv):  # else they are listed as unmatched
            merged[query.replace("query", "qkv")] = torch.cat([merged.pop(k) for k in qkv])
    return merged


def sizes_of(path, state, prefix, width, num_heads):
    """Depth, heads and MLP width of the blocks; the heads of the known architectures where none are
    given."""
    first = f"{prefix}0.mlp.fc1.weight"
    if first not in state:
        raise ValueError(f"{path}: no {first} in it; it has {some(state)}")
    depth, mlp_dim = (
        1 + max(int(k.split(".")[1]) for k in state if k.startswith(prefix)),
        state[first].shape[0],
    )
    heads = num_heads or {(w, d, m): heads for w, d, heads, m in ARCHITECTURES.values()}.get(
        (width, depth, mlp_dim)
    )
    if heads is None:
        raise ValueError(
            f"{path}: width {width}, depth {depth}, MLP {mlp_dim} is no known architecture: give"
            " num_heads"
        )
    return {"depth": depth, "num_heads": heads, "mlp_dim": mlp_dim}


def load_strict(model, state, path):
    """Copies `state` into a model made on the meta device, in fp32; every key must be there, and no
    other."""
    want = model.state_dict()
    problems = {
        "missing": [k for k in want if k not in state],
        "unmatched": [k for k in state if k not in want],
        "misshapen": [
            f"{k} {[*v.shape]}, not {[*want[k].shape]}"
            for k, v in state.items()
            if k in want and v.shape != want[k].shape
        ],
    }
    if any(problems.values()):
        raise ValueError(
            f"{path}: "
            + "; ".join(f"{len(v)} {k} keys: {some(v)}" for k, v in problems.items() if v)
        )
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def some(names, most=20):
    names = [*names]
    return (
        ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
        or "nothing"
    )


def find_encoder(name, cache_dir):
    """The local file for a path, a URL or a released file's name, fetched into `cache_dir` once
    (call it on rank 0 only)."""
    url = str(name)
    if name in RELEASED:
        url = (
            os.environ.get("NANOJEPA_WEIGHTS_URL", "https://dl.fbaipublicfiles.com").rstrip("/")
            + "/"
            + RELEASED[name]
        )
        path = Path(cache_dir) / Path(url).name
    elif "://" in url:
        path = Path(cache_dir) / re.sub(r"[^\w.-]", "_", url.split("://")[1].split("?")[0])
    elif not Path(name).exists():
        raise FileNotFoundError(
            f"encoder {url!r}: no such file, and none of the names"
            f" {', '.join([*RELEASED, *ARCHITECTURES])}"
        )
    else:
        return Path(name)
    return path if path.exists() else download(url, path)


def download(url, path, tries=5, timeout=60):
    """`url` to `path`: resumes `path`.part by HTTP Range, checks the length; `path` appears only
    when whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        time.sleep(min(2**attempt, 30) if attempt else 0)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                have = (
                    have if response.status == 206 else 0
                )  # a server that ignores Range sends it all
                total = have + int(response.headers["Content-Length"] or 0)
                every = 0.5 if sys.stderr.isatty() else 30
                bar = tqdm(
                    desc=path.name,
                    total=total,
                    initial=have,
                    unit="B",
                    unit_scale=True,
                    mininterval=every,
                )
                with bar, open(part, "ab" if have else "wb") as f:
                    while data := response.read(1 << 20):
                        bar.update(f.write(data))
                    f.flush()
                    os.fsync(f.fileno())
            if part.stat().st_size == total:
                return part.replace(path)
            reason = f"the transfer ended at {part.stat().st_size} of {total} bytes"
        except (OSError, http.client.HTTPException) as e:
            reason, status = e, getattr(e, "code", 500)
            if status == 416:
                part.unlink()  # longer than the file: no part of it
            elif status < 500:
                break
    raise ConnectionError(
        f"could not download {url} ({reason}). Put the file at {path}, or use --encoder vit_tiny"
        " (--base none --full)"
    )


def fetch(name):
    """The local file of a path, a URL or a released name: fetched once, by rank 0 and then one rank
    of each other node, into the cache."""
    waiting = (
        dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
        if dist.is_initialized()
        else None
    )
    for one in (0, int(os.environ.get("RANK", 0)) if os.environ.get("LOCAL_RANK") == "0" else 0):
        if not dist.is_initialized() or dist.get_rank() == one:
            find_encoder(name, os.path.join(CACHE, "weights"))
        if waiting:
            dist.barrier(waiting)
    return find_encoder(name, os.path.join(CACHE, "weights"))


def open_encoder(name, crop_size, frames_per_clip):
    """The frozen encoder of a path, URL or released name (fetched once, by rank 0, into the cache
    folder), or of an architecture with seeded random weights, which is said."""
    if name in ARCHITECTURES:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"encoder {name}: RANDOM weights (seed 0), for demos and tests")
        encoder = build_encoder(name, crop_size, frames_per_clip)
    else:
        encoder = load_encoder(fetch(name))
    if crop_size % encoder.patch_size:
        raise ValueError(
            f"--crop_size {crop_size} is no multiple of the encoder's patches of"
            f" {encoder.patch_size} pixels"
        )
    return encoder


def encoder_hash(encoder):
    """16 hex digits over names and values of all weights: which encoder features and checkpoints
    belong to."""
    h = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        h.update(key.encode())
        h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def open_source(records, name, *, encode, fps, frames_per_step, crop_size, frames_per_clip):
    """Where a run's features come from: (encoder or None, {"encoder_hash", "grid", "embed_dim"}).

    records of features need no encoder (None comes back if none is named), but ValueError says if
    other settings made them."""
    source = None
    if records and "safetensors" in records[0].members:
        made = feature_settings(records)
        wanted = {
            "encode": encode,
            "fps": fps,
            "frames_per_step": frames_per_step,
            "crop_size": crop_size,
        }
        for k, v in (
            wanted | ({"frames_per_clip": frames_per_clip} if encode == "clip" else {})
        ).items():
            if made.get(k) != str(v):
                raise ValueError(
                    f"{records[0].shard} was made with --{k} {made.get(k)}, this run has {v}:"
                    " change one of them"
                )
        source = {
            "encoder_hash": made["encoder"],
            "grid": int(made["grid"]),
            "embed_dim": made["embed_dim"],
        }
        if name is None:
            return None, source
    encoder = open_encoder(name or "vjepa2_vitl", crop_size, frames_per_clip)
    found = {
        "encoder_hash": encoder_hash(encoder),
        "grid": crop_size // encoder.patch_size,
        "embed_dim": encoder.embed_dim,
    }
    if source and found != source:
        raise ValueError(
            f"{records[0].shard} holds features of encoder {source}, --encoder {name} is {found}"
        )
    return encoder, found


def decoder_of(records, decoder):
    """The video decoder whose pictures a run sees: the one that made the features (encode.py
    writes down all but PyAV), or for video the named one. ValueError if --decoder names another
    than that of features."""
    if not records or "safetensors" not in records[0].members:
        return decoder
    made = feature_settings(records[:1]).get("decoder", "pyav")
    if decoder not in ("pyav", made):
        raise ValueError(
            f"--decoder {decoder}: {records[0].shard} holds features that were made with {made};"
            " leave the flag out"
        )
    return made


def save_adapter(model, folder, base="", also=(), action_encoder=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft.PeftModel.from_pretrained
    loads onto the same predictor. also: whole modules that were trained (modules_to_save);
    action_encoder: of fold_scaler, what to write for it."""
    own = model.state_dict() | {f"action_encoder.{k}": v for k, v in (action_encoder or {}).items()}
    tensors = {f"base_model.model.{k}": v for k, v in own.items() if k.rpartition(".")[0] in also}
    layers, sizes, thirds = lora_layers(model), {}, {}
    for name, m in layers.items():
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": m.lora_A,
            f"base_model.model.{name}.lora_B.weight": m.full_B(),
        }
        short = re.sub(r"^predictor_blocks\.\d+\.", "", name)
        alike = [
            n for n, _ in model.named_modules() if n.endswith("." + short)
        ]  # what PEFT takes a short name for
        same = all(
            n in layers and layers[n].lora_A.shape == m.lora_A.shape and layers[n].scale == m.scale
            for n in alike
        )
        k = len(m.thirds or [0])
        sizes[short if same and alike else name] = (
            k * m.r,
            m.alpha * (math.sqrt(k) if m.rslora else k),
        )
        if m.thirds:
            thirds[name] = m.thirds
    usual, one = max(sizes.values(), key=[*sizes.values()].count), next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": usual[0],
        "lora_alpha": usual[1],
        "lora_dropout": one.dropout,
        "use_rslora": one.rslora,
        "bias": "none",
        "target_modules": [*sizes],
        "inference_mode": True,
        "rank_pattern": {k: r for k, (r, _) in sizes.items() if r != usual[0]},
        "alpha_pattern": {k: a for k, (_, a) in sizes.items() if a != usual[1]},
        "modules_to_save": sorted(also) or None,
    }
    data = safetensors_bytes(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        {"format": "pt", "thirds": json.dumps(thirds)},
    )
    write_atomically(
        os.path.join(folder, "adapter_config.json"), json.dumps(config, indent=1).encode()
    )
    write_atomically(os.path.join(folder, "adapter_model.safetensors"), data)


# adapter_config.json: settings that load_adapter reads, and those that do not change what the
# tensors mean. Any other one that is set is refused.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
}


NEUTRAL = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}


# PEFT's variants of LoRA, none of which is W + scale B A of the base as it is
VARIANTS = {
    "use_dora": "DoRA, which scales the rows of the weights as well",
    "kasa_config": "KaSA, which cuts the base's weights and scales the rank",
    "lora_bias": "LoRA with biases",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal",
    "velora_config": "VeLoRA, which trains with other gradients",
    "monteclora_config": "MonteCLoRA, which samples its weights",
    "arrow_config": "Arrow, which chooses among several adapters",
    "alora_invocation_tokens": "aLoRA, which acts after certain tokens only",
    "target_parameters": "LoRA of single parameters",
    "trainable_token_indices": "LoRA with trained tokens",
    "layer_replication": "LoRA of repeated layers",
    "megatron_config": "LoRA of Megatron's layers",
    "fan_in_fan_out": "LoRA of transposed layers",
}


CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga")


LEAVES_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


def read_adapter(folder):
    """A folder of PEFT's -> (config, {name: tensor} without PEFT's prefix, metadata of the file).
    Whatever keeps it from being read whole is one sentence that names the file."""
    config_file = os.path.join(folder, "adapter_config.json")
    file = os.path.join(folder, "adapter_model.safetensors")
    if os.path.isfile(folder):
        raise ValueError(
            f"{folder} is a file: name the folder that holds adapter_config.json and"
            " adapter_model.safetensors"
        )
    for path in (config_file, file):
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder: a file of that name is expected")
        if not os.path.exists(path):
            there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            weight_files = [x for x in there if x.endswith((".safetensors", ".bin", ".pt"))]
            seen = f"; {some(weight_files)} is not read in its place" if weight_files else ""
            raise FileNotFoundError(f"{folder} is no PEFT adapter: {path} is not there{seen}")
    try:
        with open(config_file, encoding="utf-8") as f:
            config = json.load(f)
    except ValueError as e:
        raise ValueError(f"{config_file} is no JSON, or only part of it: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} holds a {type(config).__name__}, not settings by name")
    tensors = {}
    try:
        with safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            for key in f.keys():
                name = key.removeprefix("base_model.model.")
                if name in tensors:
                    raise ValueError(f"it holds {name} twice, with base_model.model. and without")
                tensors[name] = f.get_tensor(key)
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{file} cannot be read, or is only a part: {e}") from e
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise ValueError(f"{file}: {name} holds {x.dtype}, not floating-point numbers")
        tensors[name] = x.float()
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{file}: {name} holds NaN or infinity: the training of it diverged")
    return config, tensors, meta


def check_adapter_config(file, config):
    """ValueError unless adapter_config.json (a dictionary) is that of a plain LoRA adapter of the
    base as it is."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')}: only LORA is read")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{file}: bias={config['bias']}: biases were trained too; only plain LoRA is read"
        )
    # {} turns some of PEFT's variants on: a setting is off when it is absent, null, false or empty
    for name in sorted({*config} - READ - NEUTRAL):
        value = config[name]
        if value is None or value is False or value == []:
            continue
        if name in VARIANTS:
            raise ValueError(
                f"{file}: {name}={value}: this is {VARIANTS[name]}; only plain LoRA is read"
            )
        raise ValueError(
            f"{file}: {name}={value} is a setting that this reader does not know: only plain LoRA"
            " is read (delete the line if it changes nothing)"
        )
    start = config.get("init_lora_weights", True)
    kind = start.lower() if isinstance(start, str) else start
    if kind == "loftq":
        raise ValueError(
            f"{file}: init_lora_weights={start}: the adapter fits only the base that LoftQ"
            " quantised, which is not here"
        )
    if isinstance(kind, str) and kind.startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{file}: init_lora_weights={start} changed the base's weights too, and the adapter"
            " fits only those: convert it with PEFT's save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...)"
        )
    if not (kind is None or isinstance(kind, bool) or kind in LEAVES_THE_BASE):
        raise ValueError(
            f"{file}: init_lora_weights={start} is unknown: whether it changed the base cannot be"
            " said"
        )
    if not config.get("target_modules"):
        raise ValueError(
            f"{file} has no target_modules: whether the file holds all of its layers cannot be said"
        )
    if "lora_alpha" not in config:
        raise ValueError(
            f"{file} has no lora_alpha, which scales the adapter: write the one it was trained with"
            " into it (PEFT's default is 8)"
        )
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns[name] = config.get(name) or {}
        if not isinstance(patterns[name], dict):
            raise ValueError(f"{file}: {name} is {patterns[name]}, not numbers by layer")
    numbers = [("r", config.get("r", 8)), ("lora_alpha", config["lora_alpha"])]
    numbers += [(f"rank_pattern {k}", v) for k, v in patterns["rank_pattern"].items()]
    numbers += [(f"alpha_pattern {k}", v) for k, v in patterns["alpha_pattern"].items()]
    numbers.append(("lora_dropout", config.get("lora_dropout", 0.0)))
    for name, value in numbers:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{file}: {name} is {value!r}, not a number")
    ranks = [n for n in numbers if n[0] == "r" or n[0].startswith("rank_pattern")]
    for name, value in ranks:
        if value < 1 or value != int(value):
            raise ValueError(f"{file}: {name} is {value}: a rank is a whole number from 1 on")
    for name, value in numbers:
        if value == 0 and "alpha" in name:
            raise ValueError(f"{file}: {name} is 0, which switches the adapter off")
    if config.get("use_rslora") not in (
        None,
        True,
        False,
    ):  # the text "false" would be taken for true
        raise ValueError(
            f"{file}: use_rslora is {config['use_rslora']!r}: true or false is expected"
        )
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise ValueError(f"{file}: lora_dropout {config['lora_dropout']} is not in [0, 1)")


def is_match(file, pattern, name):
    """re.fullmatch of a pattern of adapter_config.json."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as e:
        raise ValueError(f"{file}: {pattern!r} is no regular expression: {e}") from e


def as_list(file, config, name):
    """A setting that is absent, one value or a list of them -> list."""
    value = config.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (str, int)) for v in values):
        raise ValueError(f"{file}: {name} is {value!r}, not names")
    return values


def is_target(file, config, name):
    """Whether PEFT would adapt the layer `name` (its check_target_module_exists)."""
    exclude = config.get("exclude_modules")
    if isinstance(exclude, str) and is_match(file, exclude, name):
        return False
    if isinstance(exclude, list) and any(f".{name}".endswith(f".{x}") for x in exclude):
        return False
    for saved in as_list(file, config, "modules_to_save"):
        if is_match(file, rf"(.*\.)?{saved}(\..*)?", name):
            return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return is_match(file, targets, name)
    targets = as_list(file, config, "target_modules")
    if name in targets:
        return True
    if not any(name.endswith(f".{x}") for x in targets):
        return False
    layers = as_list(file, config, "layers_to_transform")
    if not layers:
        return True
    # the number of the block: after any name, or after those of layers_pattern
    lists = as_list(file, config, "layers_pattern") or [r"[^.]*"]
    found = None
    for pattern in lists:
        prefix = r"(?:^|.*?\.)" if config.get("layers_pattern") else r".*?\."
        found = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        if found:
            break
    return found is not None and int(found[1]) in layers


def number_of(file, patterns, name, usual):
    """Rank or alpha of a layer: of the first pattern that matches, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if is_match(file, rf"(.*\.)?({pattern})", name):
            return value
    return usual


def split_adapter(file, tensors):
    """{name: tensor} of an adapter -> {layer: {"A", "B"}}, {name: tensor} of whole modules.
    ValueError for names that are not PEFT's, and for half a pair."""
    kohya = [k for k in tensors if re.search(r"lora_(down|up)\b|lora\.(down|up)\b|\.alpha$", k)]
    if kohya or any(k.startswith(("lora_unet_", "lora_te")) for k in tensors):
        raise ValueError(
            f"{file} has names as kohya's or diffusers' scripts write them"
            f" ({some(kohya or tensors, 2)}): convert it to PEFT's form first"
        )
    pairs, whole = {}, {}
    for key, x in tensors.items():
        layer, dot, rest = key.partition(".lora_")
        if not dot:
            whole[key] = x
            continue
        named = re.fullmatch(r"[AB]\.(.+)\.weight", rest)
        if named:
            raise ValueError(
                f"{file}: {key} contains the name of an adapter, {named[1]!r}: these are the"
                " tensors of a running model; save them with PEFT's save_pretrained"
            )
        if rest not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{file}: {key} is not read: only plain LoRA, a lora_A.weight and lora_B.weight of"
                " each layer"
            )
        pairs.setdefault(layer, {})[rest[0]] = x
    for layer, pair in pairs.items():
        if len(pair) < 2:
            has, lacks = ("A", "B") if "A" in pair else ("B", "A")
            raise ValueError(f"{file}: {layer} has a lora_{has}, but no lora_{lacks}")
    if not pairs:
        raise ValueError(f"{file} holds no lora_A and lora_B: it has {some(tensors, 4)}")
    return pairs, whole


def thirds_of(file, meta, pairs):
    """What our own files say of adapters of parts of a fused qkv -> {layer: (third, ...)}."""
    try:
        thirds = json.loads(meta.get("thirds", "{}"))
        thirds = {name: tuple(part) for name, part in thirds.items()}
        good = all({*part} <= {0, 1, 2} and part for part in thirds.values())
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{file}: its metadata 'thirds' is damaged: {meta['thirds'][:80]}")
    if unknown := sorted({*thirds} - {*pairs}):
        raise ValueError(f"{file}: its metadata names {some(unknown, 4)}, which it lacks")
    return thirds


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter (a folder: ours, PEFT's, or of inject_adapter_in_model) onto a
    predictor and freeze the rest; whole modules in it replace the model's and stay trainable. It is
    read whole, to the same outputs as PEFT gives, or refused. Returns the names of the modules."""
    if lora_layers(model):
        raise ValueError(f"{folder}: this predictor has adapters already")
    config, tensors, meta = read_adapter(folder)
    config_file = os.path.join(folder, "adapter_config.json")
    file = os.path.join(folder, "adapter_model.safetensors")
    check_adapter_config(config_file, config)
    pairs, whole = split_adapter(file, tensors)
    thirds = thirds_of(file, meta, pairs)

    # the layers that the config names are those that the file holds
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # adapters of the condition encoders would take part in the folding of the action scale
    if both := sorted({*pairs} & {*CONDITION}):
        raise ValueError(
            f"{file} does not fit: no such layers to adapt here: {some(both)} (they take"
            " part in the scaling of actions and states, so they are only read whole: name them in"
            " modules_to_save, not in target_modules)"
        )
    unknown = sorted({*pairs} - linear)
    if unknown:
        raise ValueError(f"{file} does not fit: no such layers to adapt here: {some(unknown, 4)}")
    named = {n for n in linear if is_target(config_file, config, n)}
    if missing := sorted(named - {*pairs}):
        raise ValueError(
            f"{file} is not whole: {config_file} adapts {some(missing, 4)} too, and it holds"
            " nothing for them"
        )
    if extra := sorted({*pairs} - named):
        raise ValueError(
            f"{file} holds adapters of {some(extra, 4)}, which the target_modules of"
            f" {config_file} do not name"
        )

    # so with whole modules: PEFT takes those whose names end so
    saved = as_list(config_file, config, "modules_to_save")
    state = model.state_dict()
    expected = set()
    for name, module in model.named_modules():
        if name and any(name.endswith(str(x)) for x in saved):
            expected |= {f"{name}.{k}" for k in module.state_dict()}
    if missing := sorted(expected - {*whole}):
        raise ValueError(
            f"{file} is not whole: modules_to_save of {config_file} names {some(missing, 4)},"
            " which it lacks"
        )
    if extra := sorted({*whole} - expected):
        raise ValueError(
            f"{file} holds {some(extra, 4)}, which are no modules here that modules_to_save"
            f" of {config_file} names"
        )
    for name, x in whole.items():
        if x.shape != state[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {[*x.shape]}, here it is {[*state[name].shape]}: another"
                " base, or actions and states of another size"
            )

    # all layers are checked before the first is changed
    layers = {}
    for name, pair in pairs.items():
        A, B = pair["A"], pair["B"]
        size = [*model.get_submodule(name).weight.shape]
        fits = A.ndim == 2 and B.ndim == 2 and A.shape[0] == B.shape[1] > 0
        if not fits or [B.shape[0], A.shape[1]] != size:
            raise ValueError(
                f"{file}: {name} has A {[*A.shape]} and B {[*B.shape]}, the layer is {size}:"
                " another base"
            )
        rank = number_of(config_file, config.get("rank_pattern"), name, config.get("r", 8))
        if rank != len(A):
            default = "" if "r" in config else " (it has no r, and 8 is PEFT's default)"
            raise ValueError(
                f"{file}: {name} has rank {len(A)}, and {config_file} says {rank}{default}: they do"
                " not belong together"
            )
        alpha = number_of(config_file, config.get("alpha_pattern"), name, config["lora_alpha"])
        layers[name] = (A, B, len(A), alpha)

    model.requires_grad_(False)
    dropout, rslora = config.get("lora_dropout", 0.0), bool(config.get("use_rslora"))
    for name in sorted(layers):
        A, B, rank, alpha = layers[name]
        part = thirds.get(name)
        blocks = part and split_thirds(B, part)
        # whoever trains our file on in PEFT fills what was zero: then it is one adapter
        k = 1 if blocks is None else len(part)
        alpha = alpha / (math.sqrt(k) if rslora else k)
        part = None if blocks is None else part
        layer = put_lora(model, name, rank // k, alpha, dropout, rslora, part)
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B if blocks is None else blocks)
    modules = sorted({name.rpartition(".")[0] for name in whole})
    model.load_state_dict(whole, strict=False)
    for name in modules:
        model.get_submodule(name).requires_grad_(True)
    return modules


def split_thirds(B, part):
    """A block-diagonal B (out, k r) of thirds -> (k, out / 3, r); None if it has anything outside
    of its blocks."""
    k = len(part)
    if B.shape[0] % 3 or B.shape[1] % k:
        return None
    parts = B.view(3, -1, k, B.shape[1] // k)
    blocks = parts[list(part), :, list(range(k))]
    rest = parts.clone()
    rest[list(part), :, list(range(k))] = 0
    return None if rest.any() else blocks


def open_base(path, source, action_dim, state_dim, size, predict=None):
    """Meta's AC file, a run folder or checkpoint of train_ac.py or train_lora.py --full, an export,
    or "none": random weights of this size (pred_dim, depth, num_heads; of a file only the heads may
    be unknown). source: of open_source; state_dim None: what the file has; predict: of
    Predictor, None what the file has, "features" of random weights. -> (Predictor,
    the ActionScaler it was trained with or None for unscaled actions, the file's dictionary,
    condition encoders made anew since theirs have another size)."""
    if path == "none":
        size = size | {"num_heads": size["num_heads"] or 16}
        return (
            Predictor(
                source["embed_dim"],
                action_dim,
                state_dim,
                (source["grid"],) * 2,
                predict=predict or "features",
                **size,
            ),
            None,
            {},
            [*CONDITION],
        )
    file = os.path.join(path, checkpoint.LATEST) if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(f"--base {path}: no such file or run folder")
    known = read_file(file)
    if "adapter" in known:
        raise ValueError(
            f"{file} holds an adapter alone: name what its run wrote with --export, or give"
            " adapter/ to --init_from"
        )
    predictor = load_predictor(
        file, size["num_heads"] or known.get("num_heads"), (source["grid"],) * 2
    )
    if predict not in (None, predictor.predict):
        raise ValueError(
            f"--predict {predict}, but {file} predicts {predictor.predict}: leave the flag out, or"
            " train from --base none"
        )
    width, anew = predictor.predictor_proj.out_features, []
    if (
        width != source["embed_dim"]
        or known.get("encoder_hash", source["encoder_hash"]) != source["encoder_hash"]
    ):
        raise ValueError(
            f"{file} was trained on features ({width} wide) of encoder"
            f" {known.get('encoder_hash', 'of its own')}, these are {source['embed_dim']} wide of"
            f" {source['encoder_hash']}: name the one of that run"
        )
    if (encode := known.get("encode", "frame")) != "frame":
        raise ValueError(
            f"{file} was trained with --encode {encode}, and robots have one frame a step: train"
            " its base with --encode frame"
        )
    for name, dim in zip(CONDITION, (action_dim, state_dim)):
        if (old := getattr(predictor, name)) is not None and dim not in (None, old.in_features):
            anew.append(name)
            predictor.set_submodule(name, Linear(dim, old.out_features))
            nn.init.trunc_normal_(getattr(predictor, name).weight, std=0.02)
    s = known.get("action_scaler")
    return (
        predictor,
        s and ActionScaler(*(s[k].numpy() for k in ("mean", "var", "scale")), s["n"], s["meta"]),
        known,
        anew,
    )


def adapt(predictor, base_scaler, anew, scaler, options, init_from=None, condition=False):
    """Make the predictor of open_base ready to train on actions scaled by `scaler`: adapters
    (options of add_lora, None to train all of it; or of the PEFT folder init_from), trainable
    condition encoders, the scaler folded in. -> (names of the condition encoders that belong into
    adapter files, the scaler they have there: the base's own, None where made anew, whether step 0
    gives what the base gives)."""
    if init_from and not options:
        raise ValueError(
            "--init_from is an adapter, and --full trains without one: give one of them"
        )
    also, file_scaler = (
        {*CONDITION} if condition else {*anew},
        None if "action_encoder" in anew else base_scaler,
    )
    whole = load_adapter(predictor, init_from) if init_from else []
    if options and not init_from:
        add_lora(predictor, **options)
    for name in also | {*whole}:
        predictor.get_submodule(name).requires_grad_(True)
    if "action_encoder" not in anew or "action_encoder" in whole:
        predictor.action_encoder.load_state_dict(
            fold_scaler(predictor.action_encoder, file_scaler, scaler)
        )
    return also | {*whole}, file_scaler, not anew and not whole


@torch.no_grad()
def fold_scaler(layer, old, new):
    """{"weight" (D, A), "bias" (D,)} that give for actions scaled by `new` what the layer gives for
    those scaled by `old` (ActionScaler, or None for unscaled): W diag(s/s0), b + W (m - m0)/s0, in
    float64."""

    def affine(scaler):
        out = torch.zeros(layer.in_features).double(), torch.ones(layer.in_features).double()
        for full, part in zip(out, (scaler.mean, scaler.scale) if scaler else ()):
            full[: len(part)] = torch.tensor(part)  # a scaler may leave the last dimensions alone
        return (x.to(layer.weight.device) for x in out)

    (mean0, scale0), (mean, scale) = affine(old), affine(new)
    W, b = layer.weight.double(), layer.bias.double()
    return {
        "weight": (W * (scale / scale0)).to(layer.weight.dtype),
        "bias": (b + W @ ((mean - mean0) / scale0)).to(layer.bias.dtype),
    }


def export(predictor, path, action_encoder, known, facts):
    """Write the merged predictor in Meta's layout, with the encoders of the file it started from
    (`known`) if that has them. action_encoder: of fold_scaler; facts: plain values that our --base
    reads and Meta's loader passes over."""
    state = merged_state(predictor) | {f"action_encoder.{k}": v for k, v in action_encoder.items()}
    bias = torch.zeros(
        predictor.predictor_embed.out_features
    )  # upstream always builds the extrinsics layer and loads strictly
    state = {
        "extrinsics_encoder.weight": bias.new_zeros(len(bias), 6),
        "extrinsics_encoder.bias": bias,
    } | state
    file = {k: known[k] for k in ("encoder", "target_encoder") if k in known} | facts
    file["predictor"] = {f"module.{k}": v.cpu() for k, v in state.items()}
    write_atomically(path, lambda f: torch.save(file, f))


def scale_warnings(reader, std, trained, base, scaler):
    """Lines about action dimensions whose std in the data (A,) is over three times off that of the
    ActionScalers of a base and of this run (None: unscaled); or, for a trained base without one,
    outside of what arms do in a step."""
    for whose, other in (("the base's", base), ("--scaler's", scaler)):
        for name, x in zip(
            reader.names, std / other.scale if other and len(other.scale) == len(std) else []
        ):
            if x > 1e-6 and not 1 / 3 < x < 3:
                yield (
                    f"WARNING: {name} is {x:.3g} times as large in the data as in {whose} action"
                    " scale: other units, --fps or robot?"
                )
    for name, unit, x in zip(reader.names, reader.units if trained and base is None else [], std):
        low, high = STD_RANGE.get(unit, (0.0, np.inf))
        if x > 1e-6 and not low <= x <= high:
            yield (
                f"WARNING: {name} has std {x:.3g} {unit} a step; the base takes unscaled actions,"
                f" {low:g} to {high:g}: other units?"
            )
