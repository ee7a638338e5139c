"""LoRA: low-rank adapters on a frozen predictor, their files in Hugging Face PEFT's form, and the base they go on.

q, k and v are one fused layer here, `attn.qkv`, as in Meta's files, and that is also what PEFT sees, so names need no map:
    our target       layer of a block      rows of its output       in adapter_model.safetensors
    q_proj k_proj v_proj  attn.qkv         its three thirds         base_model.model.predictor_blocks.i.attn.qkv.lora_{A,B}.weight
    o_proj mlp.fc1 mlp.fc2  attn.proj mlp.fc1 mlp.fc2  all          base_model.model.predictor_blocks.i.LAYER.lora_{A,B}.weight
Thirds that are adapted apart (the default) are one PEFT adapter of rank k r: A stacked, B block-diagonal, with its rank and alpha in
rank_pattern and alpha_pattern such that the scale stays; `fused_qkv` is PEFT's stock form. An action or state encoder that is trained
too is one of PEFT's modules_to_save. Files are made for the base's own action scale: they fit the base as it was released.
"""

import json
import math
import os
import re

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import weights
from fit_scaler import ActionScaler
from kernels import linear
from model import ACModel, Linear, Predictor

TARGETS = {"q_proj": ("attn.qkv", 0), "k_proj": ("attn.qkv", 1), "v_proj": ("attn.qkv", 2), "o_proj": ("attn.proj", None)}
TARGETS |= {"mlp.fc1": ("mlp.fc1", None), "mlp.fc2": ("mlp.fc2", None)}  # -> (layer of a block, which third of its rows)
CONDITION = ("action_encoder", "state_encoder")


# --- layers ---


class LowRank(torch.autograd.Function):
    """x W' + b + scale drop A' B' for a frozen W, in one pass over the output and one over x's gradient; `drop` None stands for x itself.
    Of the activations A's input and the r numbers a token are kept; weights are cast to x's dtype in both passes, not kept twice."""

    @staticmethod
    def forward(ctx, x, drop, weight, bias, A, B, scale):
        ctx.scale, low_in = scale, x if drop is None else drop
        h = F.linear(low_in, A.to(x.dtype))
        ctx.save_for_backward(low_in, weight, A, B, h)
        return linear(x, weight.to(x.dtype), bias.to(x.dtype)).addmm_(h, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, g):
        low_in, weight, A, B, h = ctx.saved_tensors
        low = (g @ B.to(g.dtype)).mul_(ctx.scale)
        gx = linear(g, weight.to(g.dtype).t(), None) if ctx.needs_input_grad[0] else None
        gdrop = low @ A.to(g.dtype) if ctx.needs_input_grad[1] else None
        if gx is not None and gdrop is None:
            gx.addmm_(low, A.to(g.dtype))
        return gx, gdrop, None, None, (low.t() @ low_in).to(A.dtype), (g.t() @ h).mul_(ctx.scale).to(B.dtype), None


class LoRALinear(Linear):
    """A frozen linear layer and its low-rank update W + scale B A (arXiv 2106.09685): A (r, in) Kaiming, B (out, r) zero, both fp32.
    scale is alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), without rslora alpha / r. With `thirds`, k of the three parts of a fused qkv, each
    has its own: A (k r, in), B (k, out / 3, r). Weight and bias keep their names."""

    merged = False

    def __init__(self, base, r, alpha, dropout=0.0, rslora=True, thirds=None):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
        self.r, self.alpha, self.dropout, self.rslora, self.thirds = r, alpha, dropout, rslora, thirds
        self.scale, k, device = alpha / (math.sqrt(r) if rslora else r), len(thirds or [0]), base.weight.device
        self.lora_A = nn.Parameter(torch.empty(k * r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*((k, base.out_features // 3) if thirds else (base.out_features,)), r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def full_B(self):
        """B as one matrix (out, rows of A): block-diagonal for thirds, with zeros for those that have none."""
        if not self.thirds:
            return self.lora_B
        full = self.lora_B.new_zeros(3, self.out_features // 3, len(self.thirds), self.r)
        full[list(self.thirds), :, list(range(len(self.thirds)))] = self.lora_B
        return full.view(self.out_features, -1)

    def full_weight(self, sign=1):
        """W + scale B A, computed in float64: a GPU may multiply fp32 matrices in TF32."""
        return (self.weight.double() + sign * self.scale * (self.full_B().double() @ self.lora_A.double())).to(self.weight.dtype)

    def forward(self, x):
        if self.merged:
            return super().forward(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        drop = F.dropout(x, self.dropout).flatten(0, -2) if self.training and self.dropout else None
        with torch.autocast(x.device.type, enabled=False):
            y = LowRank.apply(x.flatten(0, -2), drop, self.weight, self.bias, self.lora_A, self.full_B(), self.scale)
        return y.view(*x.shape[:-1], -1)


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def put_lora(model, name, r, alpha, dropout, rslora=True, thirds=None):
    """Replace the layer `name` of a model by a LoRALinear around it, which is returned."""
    parent, _, last = name.rpartition(".")
    layer = LoRALinear(model.get_submodule(name), r, alpha, dropout, rslora, thirds)
    setattr(model.get_submodule(parent), last, layer)
    return layer


def add_lora(model, targets=tuple(TARGETS), r=16, alpha=32, dropout=0.0, rslora=True, fused_qkv=False):
    """Freeze a predictor and put adapters of rank r on the targets of all its blocks. `fused_qkv` shares one adapter among q, k and v.
    Returns the number of trainable parameters."""
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"LoRA targets {', '.join(sorted(unknown))} are unknown, choose from: {', '.join(TARGETS)}")
    if not targets or r < 1 or lora_layers(model):
        raise ValueError(f"LoRA with r={r} on {len(targets)} targets: give r >= 1 and a target, and adapt a model once")
    thirds = tuple(sorted(TARGETS[t][1] for t in targets if TARGETS[t][1] is not None))
    if fused_qkv and len(thirds) in (1, 2):
        raise ValueError("--fused_qkv is one adapter for q, k and v: name all three as targets, or none")
    model.requires_grad_(False)
    for name in [f"predictor_blocks.{i}.{n}" for i in range(len(model.predictor_blocks)) for n in {TARGETS[t][0]: 0 for t in targets}]:
        put_lora(model, name, r, alpha, dropout, rslora, thirds if name.endswith("attn.qkv") and not fused_qkv else None)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def merge_lora(model, sign=1):
    """Add the adapters to the weights, at full precision; ValueError if they are in already."""
    layers = lora_layers(model)
    if not layers or any(m.merged != (sign < 0) for m in layers.values()):
        raise ValueError(f"no adapters to {'merge' if sign > 0 else 'unmerge'}: there are none, or that is done already")
    if sign < 0 and any(m.weight.dtype != torch.float32 for m in layers.values()):
        raise ValueError("unmerging in 16 bits does not give the base back (a sixth of its weights change): load the base again")
    for m in layers.values():
        m.weight.copy_(m.full_weight(sign))
        m.merged = sign > 0


def unmerge_lora(model):
    """Take merged adapters out of fp32 weights again, to 1e-7."""
    merge_lora(model, -1)


def lora_state_dict(model, also=()):
    """{name: tensor} of what training changes: the adapters, and the modules named in `also`."""
    return {k: v for k, v in model.state_dict().items() if "lora_" in k.rpartition(".")[2] or k.startswith(tuple(f"{m}." for m in also))}


@torch.no_grad()
def merged_state(model):
    """The state dict of the plain predictor that an adapted one amounts to; the model stays as it is."""
    found = {k: v for k, v in model.state_dict().items() if "lora_" not in k.rpartition(".")[2]}
    return found | {f"{name}.weight": m.full_weight() for name, m in lora_layers(model).items() if not m.merged}


# --- PEFT's files ---


def save_adapter(model, folder, base="", also=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft.PeftModel.from_pretrained loads onto the same predictor.
    also: {name: tensor} of whole modules that were trained (modules_to_save)."""
    layers, tensors, sizes, thirds = lora_layers(model), {f"base_model.model.{k}": v for k, v in (also or {}).items()}, {}, {}
    names = [n for n, _ in model.named_modules()]
    for name, m in layers.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": m.lora_A, f"base_model.model.{name}.lora_B.weight": m.full_B()}
        short = re.sub(r"^predictor_blocks\.\d+\.", "", name)
        alike = [n for n in names if n.endswith("." + short)]  # what PEFT takes a short name for
        same = all(n in layers and layers[n].lora_A.shape == m.lora_A.shape and layers[n].scale == m.scale for n in alike)
        k = len(m.thirds or [0])
        sizes[short if same and alike else name] = k * m.r, m.alpha * (math.sqrt(k) if m.rslora else k)
        if m.thirds:
            thirds[name] = m.thirds
    usual, one = max(sizes.values(), key=[*sizes.values()].count), next(iter(layers.values()))
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": usual[0], "lora_alpha": usual[1], "lora_dropout": one.dropout,
              "use_rslora": one.rslora, "bias": "none", "target_modules": [*sizes], "inference_mode": True,
              "rank_pattern": {k: r for k, (r, _) in sizes.items() if r != usual[0]},
              "alpha_pattern": {k: a for k, (_, a) in sizes.items() if a != usual[1]},
              "modules_to_save": sorted({k.rpartition(".")[0] for k in also or {}}) or None}  # fmt: skip
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {"format": "pt", "nanojepa_thirds": json.dumps(thirds)}
    checkpoint.write_atomically(os.path.join(folder, "adapter_config.json"), json.dumps(config, indent=1).encode())
    checkpoint.write_atomically(os.path.join(folder, "adapter_model.safetensors"), safetensors_bytes(tensors, metadata=meta))


def pattern(found, name, default):
    """The value that PEFT takes for a layer from rank_pattern or alpha_pattern."""
    return next((v for k, v in (found or {}).items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter (a folder: ours, PEFT's, or of inject_adapter_in_model) onto a predictor and freeze the rest; whole modules
    in it replace the model's and stay trainable. Returns their names."""
    try:
        with open(os.path.join(folder, "adapter_config.json")) as f:
            config = json.load(f)
        with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as f:
            tensors, meta = {k: f.get_tensor(k).float() for k in f.keys()}, f.metadata() or {}
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{folder} is no PEFT adapter: {e.filename} is not there") from e
    odd = [f"{k}={config[k]}" for k in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora") if config.get(k)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise ValueError(
            f"{folder} is a {config.get('peft_type')} adapter with bias={config.get('bias')} {' '.join(odd)}: only plain LoRA is read"
        )
    tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    thirds, rslora = json.loads(meta.get("nanojepa_thirds", "{}")), config.get("use_rslora", False)
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = sorted(k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight"))
    whole = sorted({k.rpartition(".")[0] for k in tensors if ".lora_" not in k})
    if not adapted or not inside.issuperset(adapted + whole) or lora_layers(model):
        unknown = sorted({*adapted, *whole} - inside)
        raise ValueError(f"{folder} does not fit: no such layers here: {weights.some(unknown)}" if unknown else f"{folder}: no LoRA to add")
    model.requires_grad_(False)
    for name in adapted:
        A, B, part = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight"), thirds.get(name)
        k, rank = len(part or [0]), len(A)
        alpha = pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        target = model.get_submodule(name)
        if A.shape[1] != target.in_features or B.shape != (target.out_features, rank):
            raise ValueError(f"{folder}: {name} has A {[*A.shape]} and B {[*B.shape]}, the layer is {[*target.weight.shape]}: another base")
        own = alpha / (math.sqrt(k) if rslora else k)
        layer = put_lora(model, name, rank // k, own, config.get("lora_dropout", 0.0), rslora, part and tuple(part))
        if part:
            B = B.view(3, -1, k, rank // k)[list(part), :, list(range(k))]
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
    for name in whole:
        w, b = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        layer = nn.Linear(w.shape[1], w.shape[0], device=model.get_submodule(name).weight.device)
        layer.load_state_dict({"weight": w, "bias": b})
        model.set_submodule(name, layer)
    return whole


# --- the base ---


def open_base(path, grid, num_heads=None):
    """Meta's AC file, a run folder or checkpoint of train_ac.py or train_lora.py --full, or an export -> (Predictor for a grid x grid of
    patches, the ActionScaler it was trained with or None for unscaled actions, the file's dictionary, memory-mapped)."""
    file = os.path.join(path, checkpoint.LATEST) if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(f"--base {path}: no such file or run folder")
    known = weights.read_file(file)
    if "adapter" in known:
        raise ValueError(
            f"{file} holds an adapter alone: name what its run wrote with --export, or give the folder adapter/ to --init_from"
        )
    predictor = weights.load_predictor(file, num_heads or known.get("num_heads"), (grid, grid))
    s = known.get("action_scaler")
    scaler = s and ActionScaler(s["mean"].numpy(), s["var"].numpy(), s["scale"].numpy(), s["n"], s["meta"])
    return predictor, scaler, known


@torch.no_grad()
def fold_scaler(weight, bias, old, new):
    """Weight (D, A) and bias (D,) of an action encoder made for actions scaled by `old` -> those that give the same for actions scaled by
    `new` (ActionScaler, or None for unscaled): W diag(s/s0), b + W (m - m0)/s0, in float64."""

    def affine(scaler):
        out = torch.zeros(weight.shape[1]).double(), torch.ones(weight.shape[1]).double()
        for full, part in zip(out, (scaler.mean, scaler.scale) if scaler else ()):
            full[: len(part)] = torch.tensor(part)  # a scaler may leave the last dimensions alone
        return (x.to(weight.device) for x in out)

    (mean0, scale0), (mean, scale) = affine(old), affine(new)
    shift = weight.double() @ ((mean - mean0) / scale0)
    return (weight.double() * (scale / scale0)).to(weight.dtype), (bias.double() + shift).to(bias.dtype)


# --- memory ---


def activation_bytes(model, *inputs):
    """Bytes that autograd keeps between forward and backward of an ACModel, parameters not counted."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), t  # holding t, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = model(*inputs)  # noqa: F841, the graph must live while it is counted
    return sum(n for n, _ in kept.values())


def estimate_memory(encoder, size, lora, batch_size, steps, dtype, optim_bytes):
    """Rows (what, bytes) that a step will need, from shapes alone: nothing is allocated. encoder: (embed_dim, grid, parameters, bytes of
    one); size: of the Predictor; lora: arguments of add_lora, or None to train all of it."""
    embed_dim, grid, count, width = encoder
    rows = [("encoder weights", count * width)]
    for checkpointing in (False, True):
        kept = []
        for depth in (1, 2, size["depth"]):  # each further block and clip keeps the same
            with torch.device("meta"):
                model = ACModel(Predictor(embed_dim, 7, 7, (grid, grid), **size | {"depth": depth}))
            base = sum(p.numel() for p in model.parameters())
            trained = add_lora(model.predictor, **lora) if lora else base
            model.predictor.activation_checkpointing = checkpointing
            if len(kept) < 2:
                with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    z, a, s = (torch.zeros(1, *x) for x in ((steps, grid * grid, embed_dim), (steps - 1, 7), (steps, 7)))
                    kept.append(activation_bytes(model.to_empty(device="cpu"), z, a, s))
        if not checkpointing:
            rows += [("predictor weights (fp32)", 4 * base), ("adapter weights (fp32)", 4 * trained * bool(lora))]
            rows += [("gradients (fp32)", 4 * trained), ("optimizer moments", optim_bytes * trained)]
        n = batch_size * (kept[0] + (size["depth"] - 1) * (kept[1] - kept[0]))
        rows.append((f"activations{', with --activation_checkpointing' * checkpointing}", n))
    return rows
