"""Reading and writing everybody's weights: Meta's V-JEPA 1, 2, 2.1 and AC files, jepa-wms, Hugging
Face VJEPA2 and DINO, PEFT adapters, and our own.

Nothing is loaded in part: a missing, unmatched or misshapen key is an error that lists it. Nothing
is executed: `weights_only=True`. Sizes come from the tensors. Only the number of heads is in no
tensor: it is that of a known architecture, or must be given.

In this order: names and downloads · files of Meta, Hugging Face and ours · opening an encoder ·
autoencoders and judges of pictures · PEFT adapters · bases and exports."""

import datetime
import glob
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

import checkpoint
from data import STD_RANGE, ActionScaler
from files.disk import CACHE, is_storage_error, storage_sentence, write_atomically
from files.features import feature_settings
from files.latents import open_vae
from files.progress import tqdm
from model import (
    CONDITION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DiffusersPictures,
    Encoder,
    Encoder21,
    Linear,
    MaskPredictor,
    MaskPredictor21,
    PictureEncoder,
    PooledEncoder,
    Predictor,
    TinyAutoencoder,
    add_lora,
    lora_layers,
    merged_state,
    predict_of,
    wrap_with_lora,
)

# --- names and downloads ---


class Architecture(NamedTuple):
    """Sizes of an encoder."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int


# vit_tiny is ours: the size of doom_tiny and arm_tiny, or random weights
ARCHITECTURES = {
    "vit_tiny": Architecture(192, 4, 3, 768),
    "vit_base_16": Architecture(768, 12, 12, 3072),
    "vit_large_16": Architecture(1024, 24, 16, 4096),
    "vit_huge": Architecture(1280, 32, 16, 5120),
    "vit_giant_xformers": Architecture(1408, 40, 22, 6144),
    "vit_gigantic_xformers": Architecture(1664, 48, 26, 8192),
}
# encoders in this repository, in half precision; encoders/README.md says how they were made
SHIPPED = {
    "doom_tiny": "encoders/doom_tiny.safetensors",
    "arm_tiny": "encoders/arm_tiny.safetensors",
}
# places of the released files on Meta's server
RELEASED = {
    "vjepa2_vitl": "vjepa2/vitl.pt",
    "vjepa2_vith": "vjepa2/vith.pt",
    "vjepa2_vitg": "vjepa2/vitg.pt",
    "vjepa2_vitg384": "vjepa2/vitg-384.pt",
    "vjepa2_ac_vitg": "vjepa2/vjepa2-ac-vitg.pt",
    "vjepa2_1_vitb": "vjepa2/vjepa2_1_vitb_dist_vitG_384.pt",
    "vjepa2_1_vitl": "vjepa2/vjepa2_1_vitl_dist_vitG_384.pt",
    "vjepa2_1_vitg": "vjepa2/vjepa2_1_vitg_384.pt",
    "vjepa2_1_vitG": "vjepa2/vjepa2_1_vitG_384.pt",
    "vjepa_vitl": "jepa/vitl16/vitl16.pth.tar",
    "vjepa_vith": "jepa/vith16/vith16.pth.tar",
}


def find_encoder(name, cache_dir):
    """The local file for a path, a URL, or the name of a shipped or released file. What is not here
    yet is downloaded into `cache_dir`, so call it on one rank at a time."""
    if name in SHIPPED:
        return Path(__file__).parent / SHIPPED[name]
    url = str(name)
    if name in RELEASED:
        server = os.environ.get("NANOJEPA_WEIGHTS_URL", "https://dl.fbaipublicfiles.com")
        url = f"{server.rstrip('/')}/{RELEASED[name]}"
        path = Path(cache_dir) / Path(url).name
    elif "://" in url:
        address = url.split("://")[1].split("?")[0]
        path = Path(cache_dir) / re.sub(r"[^\w.-]", "_", address)
    elif Path(name).exists():
        return Path(name)
    else:
        names = ", ".join([*RELEASED, *ARCHITECTURES, *SHIPPED])
        raise FileNotFoundError(f"encoder {url!r}: no such file, and none of the names {names}")
    return path if path.exists() else download(url, path)


def download(url, path, tries=5, timeout=60):
    """Download `url` to `path`. A transfer that broke is resumed from `path`.part by HTTP Range.
    `path` appears only when the file is whole and on disk. ConnectionError after `tries` tries, or
    at once where the server says that the file is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        if attempt:
            time.sleep(min(2**attempt, 30))
        try:
            total = transfer(url, part, path.name, timeout)
        except (OSError, http.client.HTTPException) as e:
            reason = e
            status = getattr(e, "code", 500)
            if status == 416:
                part.unlink()  # longer than the file, so no part of it
            elif status < 500:
                break
            continue
        size = part.stat().st_size
        if size == total:
            return part.replace(path)
        reason = f"the transfer ended at {size} of {total} bytes"
    raise ConnectionError(
        f"could not download {url} ({reason}). Put the file at {path}, or try --encoder doom_tiny"
        " (--base none --full)"
    )


def transfer(url, part, name, timeout):
    """Append to the file `part` what it lacks of `url`. Returns the bytes that the whole file has,
    as the server says; fewer may have arrived. name: of the progress bar."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != 206:
            have = 0  # a server that ignores Range sends all of it
        total = have + int(response.headers["Content-Length"] or 0)
        progress = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True)
        with progress, open(part, "ab" if have else "wb") as f:
            while data := response.read(1 << 20):
                progress.update(f.write(data))
            f.flush()
            os.fsync(f.fileno())
    return total


def fetch(name):
    """The local file of a path, a URL or a released name. It is downloaded once: by rank 0, and
    then by one rank of each other node, whose cache may be another disk. Collective."""
    folder = os.path.join(CACHE, "weights")
    if not dist.is_initialized():
        return find_encoder(name, folder)

    # the others wait longer than NCCL's ten minutes: a file may have 5 GB
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    if dist.get_rank() == 0:
        find_encoder(name, folder)
    dist.barrier(waiting)
    if os.environ.get("LOCAL_RANK") == "0":
        find_encoder(name, folder)
    dist.barrier(waiting)
    return find_encoder(name, folder)


# --- files of Meta, Hugging Face and ours ---

# the EMA encoder in Meta's files, and what ema_part finds it by
EMA = "target_encoder"

# names of V-JEPA 2.1's layers and no other's
MARKS_OF_21 = ("patch_embed_img.", "img_mod_embed", "video_mod_embed", "norms_block.")


def load_encoder(path, num_heads=None, num_frames=None, pos=None, which=EMA):
    """The frozen encoder in a weight file. Meta's files contain two: `which` EMA is the one that
    serves evaluation and AC training, "encoder" the other.

    `pos` is "rope" or "sincos". None goes by the released file's name, else by whether there is a
    `pos_embed` that is not all zero. `num_frames` is what a sincos table was made for (default 16).
    V-JEPA 2.1 is known by the names of its layers. ValueError for files that are not whole, or of
    another kind."""
    landmarks = ("patch_embed.proj.weight", "embeddings.patch_embeddings.proj.weight")
    state = from_hugging_face(part_of(path, which, *landmarks), path)
    kernel = state["patch_embed.proj.weight"]
    if kernel.ndim != 5:
        raise ValueError(
            f"{path}: an image encoder, its patch_embed.proj.weight has no time dimension"
        )
    width, _, tubelet_size, patch_size, _ = kernel.size()
    sizes = sizes_of(path, state, "blocks.", width, num_heads)
    sizes |= {"patch_size": patch_size, "tubelet_size": tubelet_size}

    if any(key.startswith(MARKS_OF_21) for key in state):
        if pos not in (None, "rope"):
            raise ValueError(f"{path}: pos={pos!r}, but this is a V-JEPA 2.1 file, which has rope")
        with torch.device("meta"):
            encoder = Encoder21(width, **sizes)
        return load_strict(encoder, state, path).eval().requires_grad_(False)

    table = state.get("pos_embed")
    if pos is None:
        pos = position_kind(path, table)
    if pos == "rope":
        # released V-JEPA 2 files may still contain a table, which their models never used
        state.pop("pos_embed", None)
    elif table is not None:
        T = (num_frames or 16) // tubelet_size
        grid = round((table.shape[1] / T) ** 0.5)
        if table.shape[1] != T * grid * grid:
            raise ValueError(
                f"{path}: {table.shape[1]} positions are not {T} steps of a square grid: give"
                " num_frames"
            )
        sizes |= {"img_size": grid * patch_size, "num_frames": T * tubelet_size}

    with torch.device("meta"):
        encoder = Encoder(width, **sizes, pos=pos)
    load_strict(encoder, state, path)

    # a run of train_lewm.py --pool mean has one vector a step
    whole_file = read_file(path)
    pooling = whole_file.get("pooling")
    if pooling is not None:
        encoder = PooledEncoder(encoder, whole_file["settings"]["crop_size"])
        load_strict(encoder.projector, pooling, path)
    return encoder.eval().requires_grad_(False)


def position_kind(path, table):
    """Which positions the model of a file uses, "rope" (V-JEPA 2) or "sincos" (V-JEPA 1). A
    released file's name decides, else whether its table (or None) has a number that is not 0."""
    is_vjepa1 = {
        Path(released).name: released.startswith("jepa/") for released in RELEASED.values()
    }
    name = Path(path).name
    if name in is_vjepa1:
        return "sincos" if is_vjepa1[name] else "rope"
    return "sincos" if table is not None and table.any() else "rope"


def load_predictor(path, num_heads=None, grid=(16, 16), use_extrinsics=False):
    """The trainable AC predictor in a weight file, for features on this patch grid. A layer for
    camera extrinsics that is not used is kept, frozen."""
    state = {}
    for key, value in part_of(path, "predictor", "predictor_embed.weight").items():
        state[key.replace("proprio_", "state_")] = value  # jepa-wms' name
    if "action_encoder.weight" not in state:
        raise ValueError(
            f"{path}: the predictor has no action_encoder, so it is a mask predictor and not an"
            " action-conditioned one"
        )
    pred_dim, embed_dim = state["predictor_embed.weight"].size()
    action_dim = state["action_encoder.weight"].shape[1]
    state_dim = 0
    if "state_encoder.weight" in state:
        state_dim = state["state_encoder.weight"].shape[1]
    has_layer = use_extrinsics or "extrinsics_encoder.weight" in state
    sizes = sizes_of(path, state, "predictor_blocks.", pred_dim, num_heads)
    sizes |= {"pred_dim": pred_dim, "use_extrinsics": has_layer, "predict": predict_of(state)}
    with torch.device("meta"):
        predictor = Predictor(embed_dim, action_dim, state_dim, grid, **sizes)
    load_strict(predictor, state, path)
    if has_layer and not use_extrinsics:
        predictor.use_extrinsics = False
        predictor.extrinsics_encoder.requires_grad_(False)
    return predictor


def predictor_weights(state):
    """The predictor's weights in a checkpoint; --save_encoder writes them in Meta's layout, with a
    prefix and an unused layer."""
    return {
        k.removeprefix("module."): v
        for k, v in state["predictor"].items()
        if "extrinsics_encoder" not in k
    }


def without_module(state):
    """A state dict with "module." before each name, as Meta's files have it, under our names."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def ac_predictor_in(path):
    """The state dict of the action-conditioned predictor in a weight file or run folder, or None if
    it has none (or a mask predictor)."""
    if "predictor" not in read_file(path):
        return None
    state = part_of(path, "predictor", "predictor_embed.weight")
    return state if "action_encoder.weight" in state else None


def meta_state(encoder, predictor):
    """`encoder`, `target_encoder`, `predictor` as in Meta's released AC file: their hub code loads
    it (the predictor where A = S = 7)."""
    frozen = {f"module.{k}": v for k, v in encoder.state_dict().items()}
    state = with_extrinsics(predictor.state_dict(), predictor)
    trained = {f"module.{k}": v for k, v in state.items()}
    return {"encoder": frozen, "target_encoder": frozen, "predictor": trained}


def with_extrinsics(state, predictor):
    """A predictor's state with a layer for camera extrinsics: Meta's code always builds that layer
    and loads strictly. It is zero where the predictor has none."""
    width = predictor.predictor_embed.out_features
    layer = {
        "extrinsics_encoder.weight": torch.zeros(width, 6),
        "extrinsics_encoder.bias": torch.zeros(width),
    }
    return layer | state


def load_mask_predictor(path, grid, encoder, num_heads=None):
    """The trainable mask predictor of V-JEPA 2's or 2.1's pretraining in a weight file, for this
    encoder and patch grid: (predictor, names of layers that are new).

    Without num_heads it is the number that a run of train_vjepa.py wrote down, or Meta's 12. New
    are 2.1's two heads where the file's teacher had another width than this encoder, which is its
    own teacher: Meta's ViT-B and ViT-L had ViT-G. All other keys must fit exactly."""
    is_21 = isinstance(encoder, Encoder21)
    landmarks = ["predictor_embed.weight"]
    if is_21:
        landmarks.append("predictor_embed.0.weight")  # for four levels
    state = part_of(path, "predictor", *landmarks)
    if "action_encoder.weight" in state:
        raise ValueError(
            f"{path}: the predictor has an action_encoder, so it is an action-conditioned one"
            " (train_ac.py) and not a mask predictor"
        )
    written_down = read_file(path).get("settings", {}).get("pred_heads", 12)
    sizes = sizes_of(path, state, "predictor_blocks.", None, num_heads or written_down)
    tokens = [int(key.split(".")[1]) for key in state if key.startswith("mask_tokens.")]
    if not tokens:
        raise ValueError(f"{path}: the predictor has no mask_tokens, so it is no mask predictor")
    sizes |= {
        "pred_dim": state["predictor_blocks.0.mlp.fc1.weight"].shape[1],
        "num_mask_tokens": 1 + max(tokens),
    }
    if not is_21:
        with torch.device("meta"):
            predictor = MaskPredictor(encoder.embed_dim, grid, **sizes)
        return load_strict(predictor, state, path), []

    # the file's own width of the heads: load_strict then says whether both have it
    num_levels = 1 if "predictor_embed.weight" in state else len(encoder.levels)
    own_width = num_levels * encoder.embed_dim
    out_dim = own_width
    if "predictor_proj.bias" in state:
        out_dim = state["predictor_proj.bias"].numel()
    with torch.device("meta"):
        predictor = MaskPredictor21(
            encoder.embed_dim, grid, num_levels=num_levels, out_dim=out_dim, **sizes
        )
    load_strict(predictor, state, path)
    if out_dim == own_width:
        return predictor, []
    return predictor, predictor.new_heads(own_width)


def pretraining_state(encoder, teacher, predictor):
    """`encoder`, `target_encoder`, `predictor` as in Meta's released V-JEPA 2 files: state dicts ->
    a dictionary that Meta's hub code and `load_encoder` read."""
    parts = {"encoder": encoder, "target_encoder": teacher, "predictor": predictor}
    state = {}
    for name, tensors in parts.items():
        state[name] = {f"module.backbone.{key}": value for key, value in tensors.items()}
    return state


def without_prefix(state):
    """A part of `pretraining_state` under the names of our modules."""
    return {key.removeprefix("module.backbone."): value for key, value in state.items()}


def read_file(path):
    """The dictionary in a .safetensors or torch.save file, memory-mapped; of a folder, that of its
    newest checkpoint (a run) or model.safetensors. ValueError, one clear sentence, for what is no
    weight file."""
    path = Path(path)
    if path.is_dir():
        newest = path / checkpoint.LATEST
        path = newest if newest.exists() else path / "model.safetensors"
    with open(path, "rb") as f:
        head = f.read(64)
    is_zip = head.startswith(b"PK\3\4")  # torch.save before version 1.6 wrote no zip: not mapped
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    except Exception as e:  # the two readers raise half a dozen types
        if is_storage_error(e):  # which says nothing about the file
            raise OSError(storage_sentence(path, e)) from e
        raise unreadable(path, head, is_zip, e) from e
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def unreadable(path, head, is_zip, error):
    """The ValueError that says why a file, which begins with the bytes `head`, cannot be read."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and (is_zip or name):
        return ValueError(
            f"{path}: refused, since it holds {name[1] if name else 'a Python object'}, which"
            " could run code: only tensors and plain values are read"
        )
    if head.lstrip().startswith(b"<"):
        reason = "a web page: fetch it again"
    else:
        first_line = f"{type(error).__name__} {error}".splitlines()[0]
        reason = f"no weight file, or only part of one ({first_line[:120]})"
    return ValueError(f"{path}: these {path.stat().st_size} bytes are {reason}")


def ema_part(path, state):
    """The name of the EMA encoder in a file's dictionary: V-JEPA 2.1's distilled files, ViT-B and
    ViT-L, call it ema_encoder, all others target_encoder."""
    names = [name for name in (EMA, "ema_encoder") if name in state]
    if len(names) > 1:
        raise ValueError(
            f"{path}: holds a target_encoder and an ema_encoder, and released files have one of"
            " them (beside a distilled encoder the target may be its teacher): save the one you"
            " want alone"
        )
    return names[0] if names else EMA


def part_of(path, which, *landmarks):
    """The state dict `which` of the file (the file itself, when flat), without the prefix that
    stands before the landmark key. ValueError unless exactly one key ends in a landmark, and all
    keys of a part have its prefix."""
    state = read_file(path)
    if which == EMA:
        which = ema_part(path, state)
    is_part = which in state
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

    prefixes = []
    for key in state:
        prefixes += [key.removesuffix(mark) for mark in landmarks if key.endswith(mark)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{path}: {which!r} needs one key that ends in {landmarks[0]}, {len(prefixes)} found;"
            f" it has {shorten_list(state)}"
        )
    prefix = prefixes[0]
    # a flat file may hold other models beside this one, a part of a file may not
    outside = [key for key in state if not key.startswith(prefix)]
    if is_part and outside:
        raise ValueError(
            f"{path}: {len(outside)} keys of {which!r} lack the prefix {prefix} of the others:"
            f" {shorten_list(outside)}"
        )
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    check_numbers(part, path)
    return part


def check_numbers(state, path):
    """ValueError, with its name, for a value that is no plain tensor of finite floats: whole
    numbers are quantised weights, and one NaN makes every feature NaN."""
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


def from_hugging_face(state, path):
    """VJEPA2Model's encoder under Meta's names, with query, key and value merged. V-JEPA 2.1's
    further layers go by the names in the open pull request (transformers #45497). Any other state
    is returned as it is. ValueError for two keys that mean one layer."""
    merged = {}
    for key, value in state.items():
        name = key.replace("embeddings.patch_embeddings", "patch_embed")
        name = name.replace("layernorm", "norm").replace("embeddings.", "")
        name = name.replace("layer.", "blocks.").replace("attention.", "attn.")
        if name in merged:
            raise ValueError(f"{path}: two of its keys, one of them {key}, mean {name}")
        merged[name] = value
    for query in [k for k in merged if ".query." in k]:
        qkv = [query.replace("query", name) for name in ("query", "key", "value")]
        if all(k in merged for k in qkv):  # else load_strict lists them as unmatched
            merged[query.replace("query", "qkv")] = torch.cat([merged.pop(k) for k in qkv])
    return merged


def sizes_of(path, state, prefix, width, num_heads):
    """{"depth", "num_heads", "mlp_dim"} of the blocks whose keys start with `prefix`. Without
    num_heads (None) they are those of the known architecture of these sizes."""
    first = f"{prefix}0.mlp.fc1.weight"
    if first not in state:
        raise ValueError(f"{path}: no {first} in it; it has {shorten_list(state)}")
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith(prefix))
    mlp_dim = state[first].shape[0]
    if not num_heads:
        for known in ARCHITECTURES.values():
            if (known.width, known.depth, known.mlp_dim) == (width, depth, mlp_dim):
                num_heads = known.num_heads
    if not num_heads:
        raise ValueError(
            f"{path}: width {width}, depth {depth}, MLP {mlp_dim} is no known architecture: give"
            " num_heads"
        )
    return {"depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}


def load_strict(model, state, path):
    """Copy `state` into a model made on the meta device, in fp32. ValueError with a list unless it
    has every key of the model, and no other, in the model's shapes."""
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    unmatched = [k for k in state if k not in expected]
    misshapen = []
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            misshapen.append(f"{key} {[*value.shape]}, not {[*expected[key].shape]}")

    raise_unless_whole(path, missing, unmatched, misshapen)
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def raise_unless_whole(path, missing, unmatched, misshapen):
    """ValueError that lists the keys of a file that do not fit its model, if there are any."""
    problems = []
    lists = {"missing": missing, "unmatched": unmatched, "misshapen": misshapen}
    for kind, keys in lists.items():
        if keys:
            problems.append(f"{len(keys)} {kind} keys: {shorten_list(keys)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")


def shorten_list(names, most=20):
    """Names as one line, shortened."""
    names = [*names]
    if not names:
        return "nothing"
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


# --- opening an encoder ---
#
# The contract: what every other file may ask of an encoder, ours or your own. It is a frozen
# nn.Module in eval mode, with
#
#   patch_size      side of a patch, in pixels
#   tubelet_size    frames that it merges into one step; 1 if it takes frames one by one
#   embed_dim       D, width of its features
#   picture_frames  frames that it takes for one picture, which --encode frame repeats that often;
#                   may be left out, then tubelet_size
#   parameters      of one float dtype, which its input has too, and on one device
#   state_dict()    tensors by name, the same in every process: encoder_hash is made of them
#   encoder(video)  video (B, 3, T * tubelet_size, H, W) for any B and T, or (B, 3, picture_frames,
#                   H, W), where H = W = --crop_size is a multiple of patch_size. Pixels are 0 to 1,
#                   less the mean and through the std of ImageNet (model.IMAGENET_MEAN, _STD); an
#                   encoder that was trained on others converts them itself.
#                   -> float features (B, T * N, D) of N = (H / patch_size) * (W / patch_size)
#                   patches, step by step, each row by row, without class or register tokens; not
#                   yet layer-normed (normalize_features does that)
#
# To use another one, return it from open_encoder: check_encoder says what it lacks. PictureEncoder
# in model.py is an example, open_dino below loads one.


def check_encoder(encoder, name, crop_size):
    """ValueError, one sentence, for what does not keep the contract above, or has patches that do
    not fit into crops of `crop_size` pixels."""
    lacks = []
    for attribute in ("patch_size", "tubelet_size", "embed_dim"):
        if not is_count(getattr(encoder, attribute, None)):
            lacks.append(f"{attribute} (a whole number)")
    if not is_count(getattr(encoder, "picture_frames", 1)):
        lacks.append("picture_frames that are a whole number")
    if not isinstance(encoder, nn.Module):
        lacks.append("parameters (of an nn.Module)")
    else:
        lacks += missing_state(encoder)
    if lacks:
        raise ValueError(
            f"encoder {name}: {type(encoder).__name__} lacks {', '.join(lacks)}: weights.py says"
            " what an encoder must have, above check_encoder"
        )
    if isinstance(encoder, PooledEncoder) and crop_size != encoder.patch_size:
        raise ValueError(
            f"--crop_size {crop_size}: encoder {name} makes one vector of a picture of"
            f" {encoder.patch_size} pixels, give --crop_size {encoder.patch_size}"
        )
    if crop_size % encoder.patch_size:
        below = crop_size // encoder.patch_size * encoder.patch_size
        fitting = [str(size) for size in (below, below + encoder.patch_size) if size]
        raise ValueError(
            f"--crop_size {crop_size} is no multiple of the encoder's patches of"
            f" {encoder.patch_size} pixels: choose {' or '.join(fitting)}"
        )
    if not isinstance(encoder, Encoder):
        check_features_of(encoder, name, crop_size)


def is_count(value):
    """Whether a value is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def missing_state(encoder):
    """What a module lacks to be a frozen encoder whose weights can be named: a list of phrases."""
    lacks = []
    if not any(True for _ in encoder.parameters()):
        lacks.append("parameters (of an nn.Module)")
    dtypes = sorted({str(p.dtype) for p in encoder.parameters()})
    devices = sorted({str(p.device) for p in encoder.parameters()})
    if len(dtypes) > 1 or len(devices) > 1:
        lacks.append(f"one dtype and one device ({', '.join(dtypes + devices)})")
    elif not all(p.is_floating_point() for p in encoder.parameters()):
        lacks.append(f"float parameters (they are {dtypes[0]})")
    if any(m.training for m in encoder.modules()):
        lacks.append("eval mode (call .eval())")
    if any(p.requires_grad for p in encoder.parameters()):
        lacks.append("frozen parameters (call .requires_grad_(False))")
    others = [k for k, v in encoder.state_dict().items() if not isinstance(v, torch.Tensor)]
    if others:
        lacks.append(f"a state_dict of tensors alone ({shorten_list(others, 4)})")
    return lacks


@torch.no_grad()
def check_features_of(encoder, name, crop_size):
    """Try somebody's encoder on two grey steps and on one picture: ValueError unless it gives
    finite features (1, 2 N, D) and (1, N, D)."""
    weight = next(encoder.parameters())
    N = (crop_size // encoder.patch_size) ** 2
    tubelet = encoder.tubelet_size
    for frames, steps in ((2 * tubelet, 2), (getattr(encoder, "picture_frames", tubelet), 1)):
        video = weight.new_zeros(1, 3, frames, crop_size, crop_size)
        begin = f"encoder {name}: from video {[*video.shape]}"
        end = "weights.py says what is expected, above check_encoder"
        try:
            features = encoder(video)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise ValueError(f"{begin} it makes no features ({reason}): {end}") from e

        expected = [1, steps * N, encoder.embed_dim]
        shape = [*getattr(features, "shape", [])]
        if shape != expected:
            result = shape or type(features).__name__
            raise ValueError(f"{begin} it makes {result}, not features {expected}: {end}")
        if not features.is_floating_point() or not features.isfinite().all():
            kind = str(features.dtype).removeprefix("torch.")
            raise ValueError(f"{begin} it makes {kind} that are no finite floats: {end}")


# model_type in the config.json of models for pictures that transformers opens
DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def model_type_of(path):
    """What the config.json of a Hugging Face folder calls its model; None for a file, or a folder
    without one. ValueError if it cannot be read."""
    config = os.path.join(path, "config.json")
    if not os.path.exists(config):
        return None
    with open(config, "rb") as f:
        text = f.read()
    try:
        kind = json.loads(text)["model_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{config}: no JSON with a model_type: copy the folder again") from e
    return str(kind)


def open_dino(folder):
    """DINOv2 or DINOv3 of a Hugging Face folder (config.json, model.safetensors) as a frozen
    encoder of single frames, in fp32. ValueError unless every weight is in the file, and no
    other."""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(
            f"--encoder {folder} is opened by the package transformers, which is not here: pip"
            " install transformers"
        ) from e
    check_picture_norm(folder)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder}: quantised weights are not read: save them in float32 or bfloat16"
        )

    # transformers reports what does not fit in a table, and fills what is missing with random
    # numbers: the same is an error here
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        backbone, report = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as e:
        raise ValueError(f"{folder}: its weights cannot be read ({e}): copy it again") from e
    finally:
        log.set_verbosity(verbosity)
    misshapen = []
    for key, shape, expected in sorted(report["mismatched_keys"]):
        misshapen.append(f"{key} {[*shape]}, not {[*expected]}")
    missing = sorted(report["missing_keys"])
    raise_unless_whole(folder, missing, sorted(report["unexpected_keys"]), misshapen)
    check_numbers(backbone.state_dict(), folder)

    extra_tokens = 1 + getattr(config, "num_register_tokens", 0)  # the class token comes first
    encoder = PictureEncoder(backbone, config.hidden_size, config.patch_size, extra_tokens)
    return encoder.eval().requires_grad_(False)


def check_picture_norm(folder):
    """ValueError if the pictures that a folder's model was trained on were not normalised with the
    mean and std of ImageNet, which is what encoders get."""
    path = os.path.join(folder, "preprocessor_config.json")
    if not os.path.exists(path):
        return
    with open(path, "rb") as f:
        text = f.read()
    try:
        config = json.loads(text)
        mean = [float(x) for x in config.get("image_mean", IMAGENET_MEAN)]
        std = [float(x) for x in config.get("image_std", IMAGENET_STD)]
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: no JSON with image_mean and image_std: copy it again") from e
    if not np.allclose([mean, std], [IMAGENET_MEAN, IMAGENET_STD], atol=1e-3):
        raise ValueError(
            f"{path}: its pictures have mean {mean} and std {std}, and encoders get ImageNet's:"
            " convert them in PictureEncoder.forward (model.py)"
        )


def open_encoder(name, crop_size, frames_per_clip):
    """The frozen encoder of a path, URL or released name (fetched once, by rank 0, into the cache
    folder), or of an architecture with seeded random weights (a message says so). A path may be a
    Hugging Face folder: config.json says of which model."""
    if name in ARCHITECTURES:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"encoder {name}: RANDOM weights (seed 0), for demos and tests")
        encoder = build_encoder(name, crop_size, frames_per_clip)
    else:
        path = fetch(name)
        kind = model_type_of(path)
        if kind in DINO:
            encoder = open_dino(path)
        elif name in SHIPPED:
            encoder = load_encoder(path).float()
        elif kind is None or kind.startswith("vjepa"):
            encoder = load_encoder(path)
        else:
            raise ValueError(
                f"--encoder {name}: its config.json says model_type {kind}, and vjepa2,"
                f" {', '.join(DINO)} are known: write an adapter, weights.py says how above"
                " check_encoder"
            )
    check_encoder(encoder, name, crop_size)
    return encoder


def build_encoder(name, img_size=256, num_frames=16, seed=0, *, patch_size=16, tubelet_size=2):
    """A frozen V-JEPA 2 encoder with seeded random weights."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name!r} is unknown, choose from: {', '.join(ARCHITECTURES)}"
        )
    size = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(
            size.width,
            size.depth,
            size.num_heads,
            mlp_dim=size.mlp_dim,
            patch_size=patch_size,
            tubelet_size=tubelet_size,
            img_size=img_size,
            num_frames=num_frames,
        )
    return encoder.eval().requires_grad_(False)


def encoder_hash(encoder):
    """16 hex digits over names and values of all weights. Features and checkpoints name the encoder
    that they belong to by it."""
    h = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        h.update(key.encode())
        h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def open_source(records, name, *, encode, fps, frames_per_step, crop_size, frames_per_clip):
    """Where a run's features come from -> (encoder or None, {"encoder_hash", "grid", "embed_dim"}).

    Records of features need no encoder (None comes back if none is named). ValueError if they were
    made with other settings than those given, or by another encoder than the one that is named."""
    stored = None
    if records and "safetensors" in records[0].members:
        made_with = feature_settings(records)
        settings = {
            "encode": encode,
            "fps": fps,
            "frames_per_step": frames_per_step,
            "crop_size": crop_size,
        }
        if encode == "clip":
            settings["frames_per_clip"] = frames_per_clip
        for flag, value in settings.items():
            if made_with.get(flag) != str(value):
                raise ValueError(
                    f"{records[0].shard} was made with --{flag} {made_with.get(flag)}, this run has"
                    f" {value}: change one of them"
                )
        stored = {
            "encoder_hash": made_with["encoder"],
            "grid": int(made_with["grid"]),
            "embed_dim": made_with["embed_dim"],
        }
        if name is None:
            return None, stored

    encoder = open_encoder(name or "vjepa2_vitl", crop_size, frames_per_clip)
    opened = {
        "encoder_hash": encoder_hash(encoder),
        "grid": crop_size // encoder.patch_size,
        "embed_dim": encoder.embed_dim,
    }
    if stored and opened != stored:
        raise ValueError(
            f"{records[0].shard} holds features of encoder {stored}, --encoder {name} is {opened}"
        )
    return encoder, opened


def decoder_of(records, decoder, flag="--decoder"):
    """The video decoder whose pictures a run sees: for features the one that made them (encode.py
    writes down all but PyAV), for video the one that is named. flag: that names it. ValueError if
    it names another one than that of features."""
    if not records or "safetensors" not in records[0].members:
        return decoder
    made_with = feature_settings(records[:1]).get("decoder", "pyav")
    if decoder not in ("pyav", made_with):
        raise ValueError(
            f"{flag} {decoder}: {records[0].shard} holds features that were made with"
            f" {made_with}; leave the flag out"
        )
    return made_with


# --- autoencoders of pictures ---


def open_picture_vae(spec):
    """A frozen autoencoder of pictures from the disk -> an object with encode, decode, `channels`
    and `factor` (see model.TinyAutoencoder).

    spec: "diffusers:FOLDER" with config.json and weights of AutoencoderTiny or AutoencoderKL, or
    "taesd:FOLDER" with NAME_encoder.pth and NAME_decoder.pth of madebyollin/taesd (taesd, taef1,
    taef2 and their relatives). ValueError for anything else."""
    kind, _, folder = spec.partition(":")
    if kind == "diffusers" and os.path.exists(os.path.join(folder, "config.json")):
        vae = open_diffusers_pictures(spec, folder)
    elif kind == "taesd" and os.path.isdir(folder):
        vae = open_tiny_autoencoder(spec, folder)
    else:
        raise ValueError(
            f"--vae {spec}: give diffusers:FOLDER, with config.json and weights of AutoencoderTiny"
            " or AutoencoderKL, or taesd:FOLDER, with NAME_encoder.pth and NAME_decoder.pth"
        )
    return vae.requires_grad_(False).eval()


def open_latent_vae(spec, dtype):
    """The VAE whose latents train_lam.py reads, frozen: of pictures (open_picture_vae) or of video
    (files.latents.open_vae). ValueError for anything else."""
    kind, _, folder = spec.partition(":")
    config = os.path.join(folder, "config.json")
    of_pictures = kind == "taesd"
    if kind == "diffusers" and os.path.exists(config):
        with open(config) as f:
            of_pictures = json.load(f).get("_class_name") in ("AutoencoderTiny", "AutoencoderKL")
    return open_picture_vae(spec).to(dtype) if of_pictures else open_vae(spec, dtype)


def open_diffusers_pictures(spec, folder):
    """open_picture_vae for a folder of diffusers."""
    with open(os.path.join(folder, "config.json")) as f:
        name = json.load(f).get("_class_name")
    if name not in ("AutoencoderTiny", "AutoencoderKL"):
        raise ValueError(f"--vae {spec} is a {name}: AutoencoderTiny and AutoencoderKL are known")
    try:
        import diffusers
    except ImportError as e:
        raise ValueError("--vae diffusers: needs: pip install diffusers") from e
    vae = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    return DiffusersPictures(vae.float())


def open_tiny_autoencoder(spec, folder):
    """open_picture_vae for the two files of a TAESD model."""
    parts = {}
    for part in ("encoder", "decoder"):
        files = glob.glob(os.path.join(glob.escape(folder), f"*_{part}.pth"))
        if len(files) != 1:
            raise ValueError(f"--vae {spec}: {len(files)} files *_{part}.pth there, not one")
        parts[part] = read_file(files[0])
    if "1.weight" not in parts["decoder"]:
        raise ValueError(f"--vae {spec}: its decoder has no 1.weight: no TAESD model")

    # the number of channels and the wider blocks differ between models
    channels = parts["decoder"]["1.weight"].shape[1]
    vae = TinyAutoencoder(channels, "3.pool.0.weight" in parts["decoder"])
    state = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
    return load_strict(vae, state, f"--vae {spec}")


# --- networks that judge pictures ---


def open_torchscript(flag, path):
    """A network in a TorchScript file, frozen. flag: that names it. ValueError for another file,
    and OSError where there is none."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{flag} {path} is a folder: it takes one TorchScript file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path}: no such file (it names a TorchScript file)")
    try:
        network = torch.jit.load(path, map_location="cpu")
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[-1]
        raise ValueError(f"{flag} {path} is no TorchScript file: {reason}") from e

    # such a network has no requires_grad_ of its own
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


class Lpips(nn.Module):
    """LPIPS of two batches of pictures (B, 3, H, W) in [0, 1] -> distances (B,), by NVIDIA's
    vgg16.pt (stylegan2-ada-pytorch): a TorchScript file that takes pictures from 0 to 255 and gives
    vectors whose squared distance is LPIPS. ValueError for another file."""

    def __init__(self, path):
        super().__init__()
        self.network = open_torchscript("--lpips", path)

        # tried at once, because pictures are judged at the end of long runs
        grey = torch.full((1, 3, 32, 32), 0.5)
        try:
            self(grey, grey)
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[-1]
            raise ValueError(
                f"--lpips {path} makes no features of pictures ({reason}): NVIDIA's vgg16.pt does"
            ) from e

    def forward(self, a, b):
        # VGG was made for pictures of 224 pixels: below 32 its last layers have nothing left
        of_a = self.network(255 * a, resize_images=False, return_lpips=True)
        of_b = self.network(255 * b, resize_images=False, return_lpips=True)
        return (of_a - of_b).square().sum(1)


# --- PEFT adapters ---


def save_adapter(model, folder, base="", also=(), action_encoder=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft.PeftModel.from_pretrained
    loads onto the same predictor.

    base: written down as base_model_name_or_path. also: names of whole modules that were trained
    (PEFT's modules_to_save). action_encoder: {"weight", "bias"} of fold_scaler, written in place of
    the model's."""
    folded = {f"action_encoder.{k}": v for k, v in (action_encoder or {}).items()}
    state = model.state_dict() | folded
    tensors = {}
    for key, value in state.items():
        if key.rpartition(".")[0] in also:
            tensors[f"base_model.model.{key}"] = value

    layers = lora_layers(model)
    sizes = {}  # what target_modules calls a layer: (rank, alpha)
    qkv_parts = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.full_B()
        # to PEFT the adapters of k parts of a fused qkv are one, of k times the rank
        k = len(layer.qkv_parts or [0])
        alpha = layer.alpha * (math.sqrt(k) if layer.rslora else k)
        sizes[peft_name(model, layers, name)] = (k * layer.r, alpha)
        if layer.qkv_parts:
            qkv_parts[name] = layer.qkv_parts

    pairs = [*sizes.values()]
    usual_rank, usual_alpha = max(pairs, key=pairs.count)
    first_layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "lora_dropout": first_layer.dropout,
        "use_rslora": first_layer.rslora,
        "bias": "none",
        "target_modules": [*sizes],
        "inference_mode": True,
        "rank_pattern": {k: rank for k, (rank, _) in sizes.items() if rank != usual_rank},
        "alpha_pattern": {k: alpha for k, (_, alpha) in sizes.items() if alpha != usual_alpha},
        "modules_to_save": sorted(also) or None,
    }
    config_file = os.path.join(folder, "adapter_config.json")
    write_atomically(config_file, json.dumps(config, indent=1).encode())
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    data = safetensors_bytes(tensors, {"format": "pt", "thirds": json.dumps(qkv_parts)})
    write_atomically(os.path.join(folder, "adapter_model.safetensors"), data)


def peft_name(model, layers, name):
    """What target_modules calls an adapted layer: its name without the block, if PEFT takes that
    for layers which all have adapters of this rank and scale, else its whole name."""
    layer = layers[name]
    short = re.sub(r"^predictor_blocks\.\d+\.", "", name)
    matched = [n for n, _ in model.named_modules() if n.endswith("." + short)]
    if not matched:
        return name
    for other in matched:
        if other not in layers:
            return name
        if layers[other].lora_A.shape != layer.lora_A.shape or layers[other].scale != layer.scale:
            return name
    return short


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
# Values of init_lora_weights. The first kind writes into the base's weights at the start of
# training, so such an adapter does not fit the base as it was.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
LEAVES_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


def read_adapter(folder):
    """A folder of PEFT's -> (config, {name: tensor} without PEFT's prefix, metadata of the file).
    ValueError or FileNotFoundError, one sentence that names the file, if not all can be read."""
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
            seen = (
                f"; {shorten_list(weight_files)} is not read in its place" if weight_files else ""
            )
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

    # a variant is off when its setting is absent, null, false or []; {} turns some of them on
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

    # some ways to start change the base, and then the adapter fits only that one
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

    # what PEFT would fill in by a guess
    if not config.get("target_modules"):
        raise ValueError(
            f"{file} has no target_modules: whether the file holds all of its layers cannot be said"
        )
    if "lora_alpha" not in config:
        raise ValueError(
            f"{file} has no lora_alpha, which scales the adapter: write the one it was trained with"
            " into it (PEFT's default is 8)"
        )

    # the numbers are numbers
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
        is_rank = name == "r" or name.startswith("rank_pattern")
        if is_rank and (value < 1 or value != int(value)):
            raise ValueError(f"{file}: {name} is {value}: a rank is a whole number from 1 on")
        if value == 0 and "alpha" in name:
            raise ValueError(f"{file}: {name} is 0, which switches the adapter off")
    rslora = config.get("use_rslora")
    if rslora not in (None, True, False):  # the text "false" would be taken for true
        raise ValueError(f"{file}: use_rslora is {rslora!r}: true or false is expected")
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise ValueError(f"{file}: lora_dropout {config['lora_dropout']} is not in [0, 1)")


def is_match(file, pattern, name):
    """re.fullmatch of a pattern of adapter_config.json."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as e:
        raise ValueError(f"{file}: {pattern!r} is no regular expression: {e}") from e


def as_list(file, config, name):
    """The values of a setting, which may be absent, one value or a list -> list."""
    value = config.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (str, int)) for v in values):
        raise ValueError(f"{file}: {name} is {value!r}, not names")
    return values


def is_target(file, config, name):
    """Whether PEFT would adapt the layer `name` (its check_target_module_exists)."""
    # what is excluded, or trained as a whole
    exclude = config.get("exclude_modules")
    if isinstance(exclude, str) and is_match(file, exclude, name):
        return False
    if isinstance(exclude, list) and any(f".{name}".endswith(f".{x}") for x in exclude):
        return False
    for saved in as_list(file, config, "modules_to_save"):
        if is_match(file, rf"(.*\.)?{saved}(\..*)?", name):
            return False

    # target_modules is a pattern, or names or their ends
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return is_match(file, targets, name)
    targets = as_list(file, config, "target_modules")
    if name in targets:
        return True
    if not any(name.endswith(f".{x}") for x in targets):
        return False

    # layers_to_transform: the number of the block, after any name or after those of layers_pattern
    layers = as_list(file, config, "layers_to_transform")
    if not layers:
        return True
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
            f" ({shorten_list(kohya or tensors, 2)}): convert it to PEFT's form first"
        )
    pairs = {}
    whole = {}
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
        raise ValueError(f"{file} holds no lora_A and lora_B: it has {shorten_list(tensors, 4)}")
    return pairs, whole


def qkv_parts_of(file, meta, pairs):
    """Which parts of a fused qkv the adapters of our own files are of -> {layer: (third, ...)}."""
    try:
        qkv_parts = json.loads(meta.get("thirds", "{}"))
        qkv_parts = {name: tuple(part) for name, part in qkv_parts.items()}
        good = all({*part} <= {0, 1, 2} and part for part in qkv_parts.values())
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{file}: its metadata 'thirds' is damaged: {meta['thirds'][:80]}")
    unknown = sorted({*qkv_parts} - {*pairs})
    if unknown:
        raise ValueError(f"{file}: its metadata names {shorten_list(unknown, 4)}, which it lacks")
    return qkv_parts


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter (a folder: ours, PEFT's, or of inject_adapter_in_model) onto a
    predictor and freeze the rest. Whole modules in it replace the model's and stay trainable.
    Returns the names of those modules. ValueError unless all of it can be read, to the outputs that
    PEFT gives; the model is changed only then."""
    if lora_layers(model):
        raise ValueError(f"{folder}: this predictor has adapters already")
    config, tensors, meta = read_adapter(folder)
    config_file = os.path.join(folder, "adapter_config.json")
    file = os.path.join(folder, "adapter_model.safetensors")
    check_adapter_config(config_file, config)
    pairs, whole = split_adapter(file, tensors)
    qkv_parts = qkv_parts_of(file, meta, pairs)

    # all is checked before the first layer is changed
    check_targets(model, file, config_file, config, pairs)
    check_whole_modules(model, file, config_file, config, whole)
    layers = {}  # name: (A, B, rank, alpha)
    for name, pair in pairs.items():
        layers[name] = check_layer(model, file, config_file, config, name, pair)

    model.requires_grad_(False)
    dropout = config.get("lora_dropout", 0.0)
    rslora = bool(config.get("use_rslora"))
    for name, (A, B, rank, alpha) in sorted(layers.items()):
        part = qkv_parts.get(name)
        blocks = part and split_qkv_parts(B, part)
        # whoever trains our file further in PEFT fills what was zero: then it is one adapter
        k = 1 if blocks is None else len(part)
        alpha = alpha / (math.sqrt(k) if rslora else k)
        part = None if blocks is None else part
        layer = wrap_with_lora(model, name, rank // k, alpha, dropout, rslora, part)
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B if blocks is None else blocks)

    modules = sorted({name.rpartition(".")[0] for name in whole})
    model.load_state_dict(whole, strict=False)
    for name in modules:
        model.get_submodule(name).requires_grad_(True)
    return modules


def check_targets(model, file, config_file, config, pairs):
    """ValueError unless the layers that the config names are those that the file has adapters of,
    and layers of this model."""
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    conditions = sorted({*pairs} & {*CONDITION})
    if conditions:
        raise ValueError(
            f"{file} does not fit: no such layers to adapt here: {shorten_list(conditions)} (they"
            " take part in the scaling of actions and states, so they are only read whole: name"
            " them in modules_to_save, not in target_modules)"
        )
    unknown = sorted({*pairs} - linear)
    if unknown:
        raise ValueError(
            f"{file} does not fit: no such layers to adapt here: {shorten_list(unknown, 4)}"
        )
    named = {n for n in linear if is_target(config_file, config, n)}
    missing = sorted(named - {*pairs})
    if missing:
        raise ValueError(
            f"{file} is not whole: {config_file} adapts {shorten_list(missing, 4)} too, and it"
            " holds nothing for them"
        )
    extra = sorted({*pairs} - named)
    if extra:
        raise ValueError(
            f"{file} holds adapters of {shorten_list(extra, 4)}, which the target_modules of"
            f" {config_file} do not name"
        )


def check_whole_modules(model, file, config_file, config, whole):
    """The same of whole modules: modules_to_save means those whose names end in one of its."""
    saved = as_list(config_file, config, "modules_to_save")
    state = model.state_dict()
    expected = set()
    for name, module in model.named_modules():
        if name and any(name.endswith(str(x)) for x in saved):
            expected |= {f"{name}.{k}" for k in module.state_dict()}
    missing = sorted(expected - {*whole})
    if missing:
        raise ValueError(
            f"{file} is not whole: modules_to_save of {config_file} names"
            f" {shorten_list(missing, 4)}, which it lacks"
        )
    extra = sorted({*whole} - expected)
    if extra:
        raise ValueError(
            f"{file} holds {shorten_list(extra, 4)}, which are no modules here that modules_to_save"
            f" of {config_file} names"
        )
    for name, x in whole.items():
        if x.shape != state[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {[*x.shape]}, here it is {[*state[name].shape]}: another"
                " base, or actions and states of another size"
            )


def check_layer(model, file, config_file, config, name, pair):
    """A layer's pair {"A", "B"} -> (A, B, rank, alpha). ValueError unless they have the sizes of
    the model's layer and the rank that the config gives."""
    A = pair["A"]
    B = pair["B"]
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
    return A, B, len(A), alpha


def split_qkv_parts(B, part):
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


# --- bases and exports ---


class Base(NamedTuple):
    """A predictor to start from, see open_base."""

    predictor: Predictor
    # the ActionScaler that it was trained with, None for unscaled actions
    scaler: ActionScaler
    # what its file says beside weights, {} of random weights
    facts: dict
    # names of the condition encoders that have new random weights, since the file's are of another
    # size
    reinitialised: list


def open_base(path, source, action_dim, state_dim, size, predict=None):
    """Open the predictor that training starts from -> Base.

    path: Meta's AC file, a run folder or checkpoint of train_ac.py or train_lora.py --full, an
    export, or "none": random weights.
    source: what the features are, of open_source.
    state_dim: None takes the file's.
    size: {"pred_dim", "depth", "num_heads"} of random weights. For a file only num_heads counts; it
    may be None if the file or its architecture tells.
    predict: of Predictor. None takes the file's, or "features" for random weights.
    ValueError if the file does not fit."""
    grid = (source["grid"], source["grid"])
    if path == "none":
        size = size | {"num_heads": size["num_heads"] or 16, "predict": predict or "features"}
        predictor = Predictor(source["embed_dim"], action_dim, state_dim, grid, **size)
        return Base(predictor, None, {}, [*CONDITION])

    file = os.path.join(path, checkpoint.LATEST) if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(f"--base {path}: no such file or run folder")
    state = read_file(file)
    if "adapter" in state:
        raise ValueError(
            f"{file} holds an adapter alone: name what its run wrote with --export, or give"
            " adapter/ to --init_from"
        )
    predictor = load_predictor(file, size["num_heads"] or state.get("num_heads"), grid)
    check_base(file, state, predictor, source, predict)

    # a robot of other dimensions gets new condition encoders
    reinitialised = []
    for name, dim in zip(CONDITION, (action_dim, state_dim)):
        layer = getattr(predictor, name)
        if layer is not None and dim not in (None, layer.in_features):
            reinitialised.append(name)
            predictor.set_submodule(name, Linear(dim, layer.out_features))
            nn.init.trunc_normal_(getattr(predictor, name).weight, std=0.02)

    scaler = None
    s = state.get("action_scaler")
    if s:
        arrays = [s[k].clone().numpy() for k in ("mean", "var", "scale")]
        scaler = ActionScaler(*arrays, s["n"], s["meta"])
    return Base(predictor, scaler, facts_of(state), reinitialised)


def facts_of(state):
    """What the dictionary of a file says beside weights. Its tensors are copied: one that is mapped
    would keep the whole file in memory."""
    facts = {}
    for name, value in state.items():
        if not isinstance(value, dict | torch.Tensor):
            facts[name] = value
    if state.get("feature_stats"):
        facts["feature_stats"] = {}
        for name, value in state["feature_stats"].items():
            facts["feature_stats"][name] = None if value is None else value.clone()
    return facts


def check_base(file, state, predictor, source, predict):
    """ValueError unless the predictor of a file predicts what is asked for (`predict`, or None), on
    features of this `source`, of one frame a step."""
    if predict not in (None, predictor.predict):
        raise ValueError(
            f"--predict {predict}, but {file} predicts {predictor.predict}: leave the flag out, or"
            " train from --base none"
        )
    width = predictor.predictor_proj.out_features
    same_encoder = state.get("encoder_hash", source["encoder_hash"]) == source["encoder_hash"]
    if width != source["embed_dim"] or not same_encoder:
        raise ValueError(
            f"{file} was trained on features ({width} wide) of encoder"
            f" {state.get('encoder_hash', 'of its own')}, these are {source['embed_dim']} wide of"
            f" {source['encoder_hash']}: name the one of that run"
        )
    encode = state.get("encode", "frame")
    if encode != "frame":
        raise ValueError(
            f"{file} was trained with --encode {encode}, and robots have one frame a step: train"
            " its base with --encode frame"
        )


class Adapted(NamedTuple):
    """What `adapt` did to a predictor."""

    # names of the condition encoders that are trained, so they belong into the adapter's files
    saved_modules: set
    # the ActionScaler whose actions the action encoder in those files takes: the base's own. None:
    # unscaled actions, also where that encoder has new random weights
    file_scaler: ActionScaler
    # whether the predictions before the first step are those of the base
    starts_as_base: bool


def adapt(predictor, base_scaler, reinitialised, scaler, options, init_from=None, condition=False):
    """Prepare the predictor of open_base for training on actions scaled by `scaler` -> Adapted.

    It gets adapters: new ones (options of add_lora) or those of the PEFT folder init_from; options
    None trains all of it instead. Condition encoders are trained if they are new, come with the
    PEFT folder, or `condition` asks for them. `scaler` is folded into the action encoder."""
    if init_from and not options:
        raise ValueError(
            "--init_from is an adapter, and --full trains without one: give one of them"
        )
    loaded_modules = []
    if init_from:
        loaded_modules = load_adapter(predictor, init_from)
    elif options:
        add_lora(predictor, **options)

    saved_modules = {*(CONDITION if condition else reinitialised), *loaded_modules}
    for name in saved_modules:
        predictor.get_submodule(name).requires_grad_(True)

    # new random weights take any scale, those that were trained take their own
    is_new = "action_encoder" in reinitialised
    file_scaler = None if is_new else base_scaler
    if not is_new or "action_encoder" in loaded_modules:
        layer = predictor.action_encoder
        layer.load_state_dict(fold_scaler(layer, file_scaler, scaler))
    return Adapted(saved_modules, file_scaler, not reinitialised and not loaded_modules)


@torch.no_grad()
def fold_scaler(layer, old, new):
    """{"weight" (D, A), "bias" (D,)} that give for actions scaled by `new` what the layer gives for
    those scaled by `old` (ActionScaler, or None for unscaled): W diag(s/s0), b + W (m - m0)/s0, in
    float64."""
    mean0, scale0 = mean_and_scale(old, layer)
    mean, scale = mean_and_scale(new, layer)
    W = layer.weight.double()
    b = layer.bias.double()
    return {
        "weight": (W * (scale / scale0)).to(layer.weight.dtype),
        "bias": (b + W @ ((mean - mean0) / scale0)).to(layer.bias.dtype),
    }


def mean_and_scale(scaler, layer):
    """The mean and scale (A,) of a scaler, float64, for all inputs of a layer. A scaler may leave
    the last dimensions alone, and None leaves all."""
    mean = torch.zeros(layer.in_features).double()
    scale = torch.ones(layer.in_features).double()
    if scaler:
        mean[: len(scaler.mean)] = torch.tensor(scaler.mean)
        scale[: len(scaler.scale)] = torch.tensor(scaler.scale)
    return mean.to(layer.weight.device), scale.to(layer.weight.device)


def export(predictor, path, action_encoder, base, facts):
    """Write the merged predictor in Meta's layout, with the encoders of the file that it started
    from (`base`, or "none") if that has them. action_encoder: {"weight", "bias"} of fold_scaler;
    facts: plain values that our --base reads and Meta's loader passes over."""
    folded = {f"action_encoder.{k}": v for k, v in action_encoder.items()}
    state = with_extrinsics(merged_state(predictor) | folded, predictor)
    base_file = {} if base == "none" else read_file(base)
    file = {k: base_file[k] for k in ("encoder", "target_encoder") if k in base_file}
    file |= facts
    file["predictor"] = {f"module.{k}": v.cpu() for k, v in state.items()}
    write_atomically(path, lambda f: torch.save(file, f))


def scale_warnings(reader, std, trained, base, scaler):
    """Lines about action dimensions whose std in the data (A,) is over three times off that of the
    ActionScalers of a base and of this run (None: unscaled); or, for a trained base without one,
    outside of what arms do in a step."""
    for whose, other in (("the base's", base), ("--scaler's", scaler)):
        if not other or len(other.scale) != len(std):
            continue
        for name, ratio in zip(reader.names, std / other.scale):
            if ratio > 1e-6 and not 1 / 3 < ratio < 3:
                yield (
                    f"WARNING: {name} is {ratio:.3g} times as large in the data as in {whose}"
                    " action scale: other units, --fps or robot?"
                )
    if not trained or base is not None:
        return
    for name, unit, x in zip(reader.names, reader.units, std):
        low, high = STD_RANGE.get(unit, (0.0, np.inf))
        if x > 1e-6 and not low <= x <= high:
            yield (
                f"WARNING: {name} has std {x:.3g} {unit} a step; the base takes unscaled actions,"
                f" {low:g} to {high:g}: other units?"
            )
