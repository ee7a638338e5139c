"""LoRA: low-rank adapters on a frozen predictor, their files in Hugging Face PEFT's form, and the
base they go on.

q, k and v are one fused layer here, `attn.qkv`, as in Meta's files, and that is also what PEFT
sees, so names need no map:
    our target       layer of a block      rows of its output       in adapter_model.safetensors
    q_proj k_proj v_proj  attn.qkv         its three thirds         base_model.model.predictor_blocks.i.attn.qkv.lora_{A,B}.weight
    o_proj mlp.fc1 mlp.fc2  attn.proj mlp.fc1 mlp.fc2  all          base_model.model.predictor_blocks.i.LAYER.lora_{A,B}.weight
Thirds that are adapted apart (the default) are one PEFT adapter of rank k r: A stacked, B
block-diagonal, with its rank and alpha in rank_pattern and alpha_pattern such that the scale stays;
`fused_qkv` is PEFT's stock form. An action or state encoder that is trained too is one of PEFT's
modules_to_save. Files are made for the base's own action scale: they fit the base as it was
released."""

import contextlib
import json
import math
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

import checkpoint
import weights
from fit_scaler import STD_RANGE, ActionScaler
from kernels import low_rank
from model import Linear, Predictor

TARGETS = {
    "q_proj": ("attn.qkv", 0),
    "k_proj": ("attn.qkv", 1),
    "v_proj": ("attn.qkv", 2),
    "o_proj": ("attn.proj", None),
}
TARGETS |= {
    "mlp.fc1": ("mlp.fc1", None),
    "mlp.fc2": ("mlp.fc2", None),
}  # -> (layer of a block, which third of its rows)
CONDITION = ("action_encoder", "state_encoder")


# --- layers ---


class LoRALinear(Linear):
    """A frozen linear layer and its low-rank update W + scale B A (arXiv 2106.09685): A (r, in)
    Kaiming, B (out, r) zero, both fp32. scale is alpha / sqrt(r) (rsLoRA, arXiv 2312.03732),
    without rslora alpha / r. With `thirds`, k of the three parts of a fused qkv, each has its own:
    A (k r, in), B (k, out / 3, r). Weight and bias keep their names."""

    merged = off = False

    def __init__(self, base, r, alpha, dropout=0.0, rslora=True, thirds=None):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
        self.r, self.alpha, self.dropout, self.rslora, self.thirds = (
            r,
            alpha,
            dropout,
            rslora,
            thirds,
        )
        self.scale, k, device = (
            alpha / (math.sqrt(r) if rslora else r),
            len(thirds or [0]),
            base.weight.device,
        )
        self.lora_A = nn.Parameter(torch.empty(k * r, base.in_features, device=device))
        self.lora_B = nn.Parameter(
            torch.zeros(
                *((k, base.out_features // 3) if thirds else (base.out_features,)), r, device=device
            )
        )
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def full_B(self):
        """B as one matrix (out, rows of A): block-diagonal for thirds, with zeros for those that
        have none."""
        if not self.thirds:
            return self.lora_B
        full = self.lora_B.new_zeros(3, self.out_features // 3, len(self.thirds), self.r)
        full[list(self.thirds), :, list(range(len(self.thirds)))] = self.lora_B
        return full.view(self.out_features, -1)

    def full_weight(self, sign=1):
        """W + scale B A, computed in float64: a GPU may multiply fp32 matrices in TF32."""
        return (
            self.weight.double()
            + sign * self.scale * (self.full_B().double() @ self.lora_A.double())
        ).to(self.weight.dtype)

    def forward(self, x):
        if self.merged or self.off:
            return super().forward(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        drop = F.dropout(x, self.dropout).flatten(0, -2) if self.training and self.dropout else None
        y = low_rank(
            x.flatten(0, -2), drop, self.weight, self.bias, self.lora_A, self.full_B(), self.scale
        )
        return y.view(*x.shape[:-1], -1)


def size_of(predictor):
    width = predictor.predictor_embed.out_features
    return {
        "pred_dim": width,
        "depth": len(predictor.predictor_blocks),
        "num_heads": width // predictor.head_dim,
    }


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def without_lora(model):
    """The model as it was before add_lora, its adapters switched off."""
    for m in lora_layers(model).values():
        m.off = True
    yield
    for m in lora_layers(model).values():
        m.off = False


def put_lora(model, name, r, alpha, dropout, rslora=True, thirds=None):
    """Replace the layer `name` of a model by a LoRALinear around it, which is returned."""
    parent, _, last = name.rpartition(".")
    layer = LoRALinear(model.get_submodule(name), r, alpha, dropout, rslora, thirds)
    setattr(model.get_submodule(parent), last, layer)
    return layer


def add_lora(
    model, targets=tuple(TARGETS), r=16, alpha=32, dropout=0.0, rslora=True, fused_qkv=False
):
    """Freeze a predictor and put adapters of rank r on the targets of all its blocks. `fused_qkv`
    shares one adapter among q, k and v. Returns the number of trainable parameters."""
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(
            f"LoRA targets {', '.join(sorted(unknown))} are unknown, choose from:"
            f" {', '.join(TARGETS)}"
        )
    if not targets or r < 1 or lora_layers(model):
        raise ValueError(
            f"LoRA with r={r} on {len(targets)} targets: give r >= 1 and a target, and adapt a"
            " model once"
        )
    thirds = tuple(sorted(TARGETS[t][1] for t in targets if TARGETS[t][1] is not None))
    if fused_qkv and len(thirds) in (1, 2):
        raise ValueError(
            "--fused_qkv is one adapter for q, k and v: name all three as targets, or none"
        )
    model.requires_grad_(False)
    for name in [
        f"predictor_blocks.{i}.{n}"
        for i in range(len(model.predictor_blocks))
        for n in {TARGETS[t][0]: 0 for t in targets}
    ]:
        put_lora(
            model,
            name,
            r,
            alpha,
            dropout,
            rslora,
            thirds if name.endswith("attn.qkv") and not fused_qkv else None,
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def merge_lora(model, sign=1):
    """Add the adapters to the weights, at full precision; ValueError if they are in already."""
    layers = lora_layers(model)
    if not layers or any(m.merged != (sign < 0) for m in layers.values()):
        raise ValueError(
            f"no adapters to {'merge' if sign > 0 else 'unmerge'}: there are none, or that is done"
            " already"
        )
    if sign < 0 and any(m.weight.dtype != torch.float32 for m in layers.values()):
        raise ValueError(
            "unmerging in 16 bits does not give the base back (a sixth of its weights change): load"
            " the base again"
        )
    for m in layers.values():
        m.weight.copy_(m.full_weight(sign))
        m.merged = sign > 0


def unmerge_lora(model):
    """Take merged adapters out of fp32 weights again, to 1e-7."""
    merge_lora(model, -1)


def lora_state_dict(model):
    """{name: tensor} of the adapters alone."""
    return {k: v for k, v in model.state_dict().items() if "lora_" in k.rpartition(".")[2]}


@torch.no_grad()
def merged_state(model):
    """The state dict of the plain predictor that an adapted one amounts to; the model stays as it
    is."""
    found = {k: v for k, v in model.state_dict().items() if "lora_" not in k.rpartition(".")[2]}
    return found | {
        f"{name}.weight": m.full_weight() for name, m in lora_layers(model).items() if not m.merged
    }


# --- PEFT's files ---


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
    checkpoint.write_atomically(
        os.path.join(folder, "adapter_config.json"), json.dumps(config, indent=1).encode()
    )
    checkpoint.write_atomically(os.path.join(folder, "adapter_model.safetensors"), data)


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter (a folder: ours, PEFT's, or of inject_adapter_in_model) onto a
    predictor and freeze the rest; whole modules in it replace the model's and stay trainable.
    Returns their names."""
    try:
        with open(os.path.join(folder, "adapter_config.json")) as f:
            config = json.load(f)
        with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as f:
            tensors, meta = {k: f.get_tensor(k).float() for k in f.keys()}, f.metadata() or {}
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{folder} is no PEFT adapter: {e.filename} is not there") from e
    odd = [
        f"{k}={config[k]}"
        for k in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")
        if config.get(k)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise ValueError(
            f"{folder} is {config.get('peft_type')}, bias={config.get('bias')} {' '.join(odd)}:"
            " only plain LoRA is read"
        )
    tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    thirds, rslora = json.loads(meta.get("thirds", "{}")), config.get("use_rslora", False)
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = sorted(
        k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")
    )
    whole = sorted({k.rpartition(".")[0] for k in tensors if ".lora_" not in k})
    unknown = sorted(
        ({*adapted, *whole} - inside) | ({*adapted} & {*CONDITION})
    )  # those take part in scaling
    if unknown or not adapted or lora_layers(model):
        raise ValueError(
            f"{folder} does not fit: no such layers to adapt here: {weights.some(unknown)}"
        )
    model.requires_grad_(False)
    for name in adapted:
        A, B, part = (
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
            thirds.get(name),
        )
        k, rank = len(part or [0]), len(A)
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next(
            (a for p, a in patterns if re.fullmatch(rf"(.*\.)?({p})", name)), config["lora_alpha"]
        )  # as PEFT matches
        if [len(B), A.shape[1]] != (size := [*model.get_submodule(name).weight.shape]):
            raise ValueError(
                f"{folder}: {name} has A {[*A.shape]} and B {[*B.shape]}, the layer is {size}:"
                " another base"
            )
        alpha, dropout = alpha / (math.sqrt(k) if rslora else k), config.get("lora_dropout", 0.0)
        layer = put_lora(model, name, rank // k, alpha, dropout, rslora, part and tuple(part))
        if part:
            B = B.view(3, -1, k, rank // k)[list(part), :, list(range(k))]
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
    for name in whole:
        w, b = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        layer = Linear(w.shape[1], w.shape[0], device=model.get_submodule(name).weight.device)
        layer.load_state_dict({"weight": w, "bias": b})
        model.set_submodule(name, layer)
    return whole


# --- the base ---


def open_base(path, source, action_dim, state_dim, size):
    """Meta's AC file, a run folder or checkpoint of train_ac.py or train_lora.py --full, an export,
    or "none": random weights of this size (pred_dim, depth, num_heads; of a file only the heads may
    be unknown). source: of encode.open_source; state_dim None: what the file has. -> (Predictor,
    the ActionScaler it was trained with or None for unscaled actions, the file's dictionary,
    condition encoders made anew since theirs have another size)."""
    if path == "none":
        size = size | {"num_heads": size["num_heads"] or 16}
        return (
            Predictor(source["embed_dim"], action_dim, state_dim, (source["grid"],) * 2, **size),
            None,
            {},
            [*CONDITION],
        )
    file = os.path.join(path, checkpoint.LATEST) if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(f"--base {path}: no such file or run folder")
    known = weights.read_file(file)
    if "adapter" in known:
        raise ValueError(
            f"{file} holds an adapter alone: name what its run wrote with --export, or give"
            " adapter/ to --init_from"
        )
    predictor = weights.load_predictor(
        file, size["num_heads"] or known.get("num_heads"), (source["grid"],) * 2
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
        getattr(predictor, name).requires_grad_(True)
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
    checkpoint.write_atomically(path, lambda f: torch.save(file, f))


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
