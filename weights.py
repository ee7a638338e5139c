"""Reading and writing everybody's weights: Meta's V-JEPA 1, V-JEPA 2 and AC files, jepa-wms,
Hugging Face VJEPA2, and our own.

Nothing is loaded in part: a missing, unmatched or misshapen key is an error that lists it. Nothing
is executed: `weights_only=True`. Sizes come from the tensors, but no tensor shows the number of
heads: it is a known architecture's, or must be given."""

import http.client
import os
import pickle
import re
import sys
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from files.streams import disk_failed, disk_sentence
from model import Encoder, Predictor, predict_of

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
