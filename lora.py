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
from safetensors import SafetensorError, safe_open
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
            seen = (
                f"; {weights.some(weight_files)} is not read in its place" if weight_files else ""
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
            f" ({weights.some(kohya or tensors, 2)}): convert it to PEFT's form first"
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
        raise ValueError(f"{file} holds no lora_A and lora_B: it has {weights.some(tensors, 4)}")
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
        raise ValueError(f"{file}: its metadata names {weights.some(unknown, 4)}, which it lacks")
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
            f"{file} does not fit: no such layers to adapt here: {weights.some(both)} (they take"
            " part in the scaling of actions and states, so they are only read whole: name them in"
            " modules_to_save, not in target_modules)"
        )
    unknown = sorted({*pairs} - linear)
    if unknown:
        raise ValueError(
            f"{file} does not fit: no such layers to adapt here: {weights.some(unknown, 4)}"
        )
    named = {n for n in linear if is_target(config_file, config, n)}
    if missing := sorted(named - {*pairs}):
        raise ValueError(
            f"{file} is not whole: {config_file} adapts {weights.some(missing, 4)} too, and it holds"
            " nothing for them"
        )
    if extra := sorted({*pairs} - named):
        raise ValueError(
            f"{file} holds adapters of {weights.some(extra, 4)}, which the target_modules of"
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
            f"{file} is not whole: modules_to_save of {config_file} names {weights.some(missing, 4)},"
            " which it lacks"
        )
    if extra := sorted({*whole} - expected):
        raise ValueError(
            f"{file} holds {weights.some(extra, 4)}, which are no modules here that modules_to_save"
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


# --- the base ---


def open_base(path, source, action_dim, state_dim, size, predict=None):
    """Meta's AC file, a run folder or checkpoint of train_ac.py or train_lora.py --full, an export,
    or "none": random weights of this size (pred_dim, depth, num_heads; of a file only the heads may
    be unknown). source: of encode.open_source; state_dim None: what the file has; predict: of
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
    known = weights.read_file(file)
    if "adapter" in known:
        raise ValueError(
            f"{file} holds an adapter alone: name what its run wrote with --export, or give"
            " adapter/ to --init_from"
        )
    predictor = weights.load_predictor(
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
