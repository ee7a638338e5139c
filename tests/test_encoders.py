"""Encoders beside V-JEPA 1 and 2: V-JEPA 2.1 against a forward pass written here in float64 and
against the released files' counts; DINO from a Hugging Face folder; the contract of one's own."""

import functools
import json
import math
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weights
from model import Encoder, Encoder21, PictureEncoder, encode_steps, grid_positions, rope_tables
from tests.harness import fails, numbers, run
from weights import load_encoder, open_encoder

# --- V-JEPA 2.1 ---


class Released(NamedTuple):
    """The encoder in a released file."""

    arch: str  # a key of ARCHITECTURES
    heads: int
    parameters: int
    tensors: int
    levels: list


RELEASED_21 = {
    "vjepa2_1_vitb": Released("vit_base_16", 12, 86_833_152, 158, [2, 5, 8, 11]),
    "vjepa2_1_vitl": Released("vit_large_16", 16, 304_680_960, 302, [5, 11, 17, 23]),
    "vjepa2_1_vitg": Released("vit_giant_xformers", 22, 1_013_267_968, 494, [9, 19, 29, 39]),
    "vjepa2_1_vitG": Released("vit_gigantic_xformers", 26, 1_845_216_768, 590, [11, 23, 37, 47]),
}


def shapes_of_21(D, depth, hidden):
    """{name: shape} of the encoder in a V-JEPA 2.1 file, without prefix."""
    shapes = {
        "patch_embed.proj.weight": (D, 3, 2, 16, 16),
        "patch_embed.proj.bias": (D,),
        "patch_embed_img.proj.weight": (D, 3, 1, 16, 16),
        "patch_embed_img.proj.bias": (D,),
        "img_mod_embed": (1, 1, D),
        "video_mod_embed": (1, 1, D),
    }
    layers = {
        "norm1": (D,),
        "attn.qkv": (3 * D, D),
        "attn.proj": (D, D),
        "norm2": (D,),
        "mlp.fc1": (hidden, D),
        "mlp.fc2": (D, hidden),
    }
    for i in range(depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{i}.{layer}.weight"] = shape
            shapes[f"blocks.{i}.{layer}.bias"] = shape[:1]
    for i in range(4):
        shapes[f"norms_block.{i}.weight"] = (D,)
        shapes[f"norms_block.{i}.bias"] = (D,)
    return shapes


# small: two heads of 44 dims, of which 42 are rotated
D = 88
DEPTH = 4
HEADS = 2


@functools.cache
def small_state(seed=0, width=D, hidden=2 * D):
    """A 2.1 encoder's tensors, all of which matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes_of_21(width, DEPTH, hidden).items():
        state[name] = 0.15 * torch.randn(shape, generator=generator)
    return state


def file_of_21(path, state, ema="ema_encoder", prefix="module.backbone.", also=None):
    """A file as Meta's: `state` as the EMA encoder, others beside it."""
    encoder = {prefix + k: v for k, v in state.items()}
    online = {prefix + k: v + 1 for k, v in state.items()}
    predictor = {prefix + "predictor_embed.weight": torch.zeros(16, D)}
    parts = {"encoder": online, ema: encoder, "predictor": predictor, "opt": {}, "epoch": 3}
    torch.save(parts | (also or {}), path)
    return path


def norm64(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def rotate64(x, turn):
    """Each pair of dims (n, hd) as a complex number, times `turn` (n, hd / 2)."""
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2))
    return torch.view_as_real(pairs * turn).flatten(1)


def forward64(state, video, heads=HEADS):
    """V-JEPA 2.1 by its description, one video (3, frames, H, W): rotation as complex numbers,
    patches cut by hand. Returns the four levels (T*N, D)."""
    w = {k: v.double() for k, v in state.items()}
    video = video.double()
    kind = "img" if video.shape[1] == 1 else "video"
    tubelet = 1 if kind == "img" else 2
    proj = "patch_embed_img.proj" if kind == "img" else "patch_embed.proj"
    T = video.shape[1] // tubelet
    H = video.shape[2] // 16
    W = video.shape[3] // 16

    tokens = []
    positions = []
    for t in range(T):
        for row in range(H):
            for col in range(W):
                patch = video[:, t * tubelet : (t + 1) * tubelet]
                patch = patch[:, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
                tokens.append(w[f"{proj}.weight"].flatten(1) @ patch.flatten() + w[f"{proj}.bias"])
                y = row * 15 / (H - 1) if H > 1 else 0.0
                x = col * 15 / (W - 1) if W > 1 else 0.0
                positions.append((float(t), y, x))
    x = torch.stack(tokens) + w[f"{kind}_mod_embed"][0, 0]
    width = x.shape[1]
    hd = width // heads

    # one factor e^(i angle) for each pair of dims: time, rows, columns; the rest stays
    pairs = hd // 3 // 2
    angles = torch.zeros(len(positions), hd // 2, dtype=torch.float64)
    for n, position in enumerate(positions):
        for axis in range(3):
            for j in range(pairs):
                angles[n, axis * pairs + j] = position[axis] * 10000 ** (-j / pairs)
    turn = torch.polar(torch.ones_like(angles), angles)

    levels = []
    for i in range(DEPTH):
        b = f"blocks.{i}."
        h = norm64(x, w[b + "norm1.weight"], w[b + "norm1.bias"])
        qkv = h @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]
        outputs = []
        for head in range(heads):
            mine = slice(head * hd, (head + 1) * hd)
            q = rotate64(qkv[:, :width][:, mine], turn)
            k = rotate64(qkv[:, width : 2 * width][:, mine], turn)
            v = qkv[:, 2 * width :][:, mine]
            outputs.append((q @ k.T / math.sqrt(hd)).softmax(-1) @ v)
        h = torch.cat(outputs, dim=1) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        x = x + h
        h = norm64(x, w[b + "norm2.weight"], w[b + "norm2.bias"])
        h = h @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
        levels.append(norm64(x, w[f"norms_block.{i}.weight"], w[f"norms_block.{i}.bias"]))
    return levels


@pytest.mark.parametrize("name", RELEASED_21)
def test_released_21_has_these_tensors(name):
    """Bug: a layer too many, too few or of another size, so the released file is refused; ViT-g or
    ViT-G read with 16 heads, which no shape would show."""
    released = RELEASED_21[name]
    size = weights.ARCHITECTURES[released.arch]
    shapes = shapes_of_21(size.width, size.depth, size.mlp_dim)
    state = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    sizes = weights.sizes_of(name, state, "blocks.", size.width, None)
    expected = {"depth": size.depth, "num_heads": released.heads, "mlp_dim": size.mlp_dim}
    assert sizes == expected
    with torch.device("meta"):
        encoder = Encoder21(size.width, **sizes)
    own = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    assert own == shapes
    assert sum(map(math.prod, own.values())) == released.parameters
    assert len(own) == released.tensors
    assert encoder.levels == released.levels


@pytest.mark.parametrize("size", [(3, 4, 48, 80), (1, 1, 48, 80), (1, 2, 16, 48), (1, 1, 48, 16)])
def test_21_is_its_description(tmp_path, size):
    """Bug: V-JEPA 2's tiled frequencies, rows and columns that are not scaled (or divided by zero
    for a side of one patch), a picture taken through the video's patch embedding or repeated, the
    wrong one of the modality embeddings, or another norm at the end."""
    encoder = load_encoder(file_of_21(tmp_path / "a.pt", small_state()), num_heads=HEADS)
    assert isinstance(encoder, Encoder21)
    video = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
    expected = [forward64(small_state(), clip) for clip in video]
    levels = encoder(video, out_layers=[0, 1, 2, 3])
    for level, features in enumerate(levels):
        reference = torch.stack([one[level] for one in expected])
        torch.testing.assert_close(features.double(), reference, rtol=0, atol=5e-5)
    assert torch.equal(encoder(video), levels[-1])
    # and what was to be told apart is apart
    assert (levels[-1] - levels[2]).abs().max() > 0.1


def test_positions_of_21():
    """Bug: positions scaled at 256 pixels too, or time scaled; the tables of V-JEPA 2 changed."""
    encoder = Encoder21(132, 4, 2)  # 66 dims a head, all rotated
    for a, b in zip(
        encoder.rotary_tables(3, 16, 16, "cpu"),
        rope_tables(grid_positions(3, 16, 16).view(-1, 3), 66, tiled=False),
    ):
        assert torch.equal(a, b)
    cos, sin = encoder.rotary_tables(2, 24, 31, "cpu")
    cos16, sin16 = encoder.rotary_tables(2, 16, 16, "cpu")
    # corners of the last step are where they are at 256 pixels
    for corner, corner16 in ((0, 0), (30, 15), (23 * 31, 240), (24 * 31 - 1, 255)):
        torch.testing.assert_close(cos[24 * 31 + corner], cos16[256 + corner16])
        torch.testing.assert_close(sin[24 * 31 + corner], sin16[256 + corner16])
    # a rotation keeps lengths: both dims of a pair turn by one angle
    assert torch.equal(cos[:, ::2], cos[:, 1::2]) and torch.equal(sin[:, ::2], -sin[:, 1::2])
    tiled, _ = rope_tables(grid_positions(2, 4, 4).view(-1, 3), 66)
    assert not torch.equal(tiled[:, ::2], tiled[:, 1::2])


def test_21_keeps_positions_under_masks(tmp_path):
    """Bug: kept tokens are numbered from zero, or take the rows of another grid."""
    encoder = load_encoder(file_of_21(tmp_path / "a.pt", small_state()), num_heads=HEADS)
    video = torch.randn(1, 3, 4, 48, 80, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    shuffled = encoder(video, masks=order[None])
    torch.testing.assert_close(shuffled, encoder(video)[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
@pytest.mark.parametrize("ema", ["ema_encoder", "target_encoder"])
def test_21_files_of_both_kinds(tmp_path, prefix, ema):
    """Bug: the online encoder, or nothing, is taken of distilled files, whose EMA encoder has
    another name (the trap of vjepa2 #147)."""
    path = file_of_21(tmp_path / "a.pt", small_state(), ema, prefix)
    state = load_encoder(path, num_heads=HEADS).state_dict()
    assert state.keys() == small_state().keys()
    assert all(torch.equal(state[k], v) for k, v in small_state().items())
    online = load_encoder(path, num_heads=HEADS, which="encoder").state_dict()
    assert torch.equal(online["img_mod_embed"], small_state()["img_mod_embed"] + 1)


def test_21_refuses_what_it_does_not_know(tmp_path):
    """Bug: a key is dropped or filled with random numbers: a norm of V-JEPA 2, a position table, a
    lost patch embedding, half of a file without the prefix, a teacher beside the student."""
    state = small_state()
    lost = {k: v for k, v in state.items() if not k.startswith("patch_embed_img")}
    no_marks = {k: v for k, v in lost.items() if "mod_embed" not in k and "norms" not in k}
    cases = [
        (state | {"norm.weight": torch.ones(D)}, "1 unmatched keys: norm.weight"),
        (state | {"pos_embed": torch.ones(1, 8, D)}, "1 unmatched keys: pos_embed"),
        (state | {"blocks.0.attn.q_norm.weight": torch.ones(44)}, "1 unmatched keys: .*q_norm"),
        (lost, "2 missing keys: patch_embed_img.proj.weight, patch_embed_img.proj.bias$"),
        (no_marks, "2 missing keys: norm.weight, norm.bias"),
        (state | {"img_mod_embed": torch.ones(D)}, r"img_mod_embed \[88\], not \[1, 1, 88\]"),
        ({k: v for k, v in state.items() if k != "norms_block.1.bias"}, "1 missing keys: norms_bl"),
    ]
    for change, reason in cases:
        path = file_of_21(tmp_path / "a.pt", change)
        with pytest.raises(ValueError, match=f"a.pt: .*{reason}"):
            load_encoder(path, num_heads=HEADS)

    half = {"module.backbone." + k: v for k, v in state.items()} | {"extra": torch.ones(1)}
    path = file_of_21(tmp_path / "half.pt", state, also={"ema_encoder": half})
    with pytest.raises(ValueError, match="1 keys of 'ema_encoder' lack the prefix .*: extra"):
        load_encoder(path, num_heads=HEADS)
    path = file_of_21(tmp_path / "both.pt", state, also={"target_encoder": state})
    with pytest.raises(ValueError, match="a target_encoder and an ema_encoder.* its teacher"):
        load_encoder(path, num_heads=HEADS)
    torch.save({"ema": state, "predictor": {}}, tmp_path / "key.pt")
    with pytest.raises(ValueError, match="'target_encoder' needs .*0 found; it has ema, predictor"):
        load_encoder(tmp_path / "key.pt", num_heads=HEADS)
    with pytest.raises(ValueError, match="pos='sincos', but this is a V-JEPA 2.1 file"):
        load_encoder(file_of_21(tmp_path / "a.pt", state), num_heads=HEADS, pos="sincos")
    with pytest.raises(ValueError, match=r"out_layers \[2\]: .*after blocks \[1, 3, 5, 7\] only"):
        Encoder21(24, 8, 2)(torch.zeros(1, 3, 2, 16, 16), out_layers=[2, 7])
    with pytest.raises(ValueError, match="6 blocks have no quarters"):
        Encoder21(24, 6, 2)


def test_21_under_the_names_of_the_hugging_face_request(tmp_path):
    """Bug: a converted file is refused, or an unknown layer in it is dropped."""
    names = {
        "patch_embed.": "embeddings.patch_embeddings.",
        "patch_embed_img.": "embeddings.patch_embeddings_img.",
        "img_mod": "embeddings.img_mod",
        "video_mod": "embeddings.video_mod",
        "blocks.": "layer.",
    }
    file = {"predictor.proj_context.weight": torch.zeros(4, 4)}
    for key, value in small_state().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = key.replace(ours, theirs, 1)
                break
        key = "encoder." + key.replace(".attn.", ".attention.")
        if ".qkv." not in key:
            file[key] = value
            continue
        for third, name in zip(value.chunk(3), ("query", "key", "value")):
            file[key.replace("qkv", name)] = third.clone()
    save_file(file, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vjepa2_1"}')
    state = load_encoder(tmp_path, num_heads=HEADS).state_dict()
    assert state.keys() == small_state().keys()
    assert all(torch.equal(state[k], v) for k, v in small_state().items())
    for extra, reason in (
        ("encoder.layer.0.norm3.weight", "1 unmatched keys: blocks.0.norm3.weight"),
        ("encoder.img_mod_embed", "two of its keys, one of them img_mod_embed, mean img_mod_emb"),
    ):
        save_file(file | {extra: torch.zeros(D)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=reason):
            load_encoder(tmp_path, num_heads=HEADS)


def test_frame_mode_takes_the_path_for_pictures(tmp_path):
    """Bug: V-JEPA 2.1 sees a single frame as a video that stands still (vjepa2 #146), or V-JEPA 2
    no longer does."""
    new = load_encoder(file_of_21(tmp_path / "a.pt", small_state()), num_heads=HEADS)
    torch.manual_seed(0)
    old = Encoder(D, 2, HEADS).eval()
    video = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    pixels = (video.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).transpose(
        1, 2
    )
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    for mode, frames_per_step in (("frame", 2), ("tubelet", 1)):
        for encoder, repeat in ((new, 1), (old, 2)):
            h = encode_steps(encoder, video, mode, frames_per_step)
            second = pixels[:, :, frames_per_step][:, :, None].expand(-1, -1, repeat, -1, -1)
            torch.testing.assert_close(h[:, 1], encoder(second), rtol=0, atol=2e-6)
    # two different frames are a video for both
    h = encode_steps(new, video, "tubelet", 2)
    torch.testing.assert_close(h[:, 1], new(pixels[:, :, 2:]), rtol=0, atol=2e-6)


# --- DINO ---


def dino(folder, kind, **sizes):
    """A tiny DINO with random weights, saved as Hugging Face does -> (the model, pixels of a
    patch, tokens before the patches)."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | sizes
    torch.manual_seed(0)
    if kind == "dinov2":
        config = transformers.Dinov2Config(patch_size=14, image_size=70, **sizes)
        model = transformers.Dinov2Model(config)
    elif kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(patch_size=14, image_size=70, **sizes)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.DINOv3ViTConfig(
            patch_size=16, num_register_tokens=4, intermediate_size=48, **sizes
        )
        model = transformers.DINOv3ViTModel(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder)
    return model, config.patch_size, 1 if kind == "dinov2" else 5


@pytest.mark.parametrize("kind", ["dinov2", "registers", "dinov3"])
def test_dino_gives_the_patches_of_each_frame(tmp_path, kind):
    """Bug: class or register tokens among the patches (as many tokens, all moved), frames and
    clips mixed up, pixels that are not normalised, weights filled with random numbers."""
    model, patch_size, extra = dino(tmp_path, kind)
    side = 3 * patch_size
    encoder = open_encoder(str(tmp_path), side, 16)
    assert isinstance(encoder, PictureEncoder) and encoder.patch_size == patch_size
    assert (encoder.tubelet_size, encoder.embed_dim) == (1, 24)
    video = torch.randint(0, 256, (2, 4, 3, side, side), dtype=torch.uint8)
    h = encode_steps(encoder, video, "frame", 2)  # (B, T, N, D)
    assert h.shape == (2, 2, 9, 24)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for b in range(2):
        for t in range(2):
            picture = (video[b, 2 * t].float() / 255 - mean) / std
            with torch.no_grad():
                tokens = model(picture[None]).last_hidden_state[0]
            assert len(tokens) == 9 + extra
            torch.testing.assert_close(h[b, t], tokens[extra:], rtol=0, atol=1e-5)
    # two frames a step need a flag, half precision is that of the weights
    with pytest.raises(ValueError, match="needs the encoder's 1 frames a step.*--encode frame"):
        encode_steps(encoder, video, "tubelet", 2)
    assert encode_steps(encoder.bfloat16(), video, "frame", 2).dtype == torch.bfloat16


def test_dino_is_loaded_whole_or_not_at_all(tmp_path, monkeypatch):
    """Bug: transformers prints a table, fills what is missing with random numbers, and a run
    trains on them; or pictures of another mean (DINOv3 for satellites) are taken for ImageNet's."""
    dino(tmp_path, "dinov2")
    weight_file = tmp_path / "model.safetensors"
    state = load_file(weight_file)
    name = "encoder.layer.1.norm1.bias"
    lost = {k: v for k, v in state.items() if k != name}
    for change, reason in (
        (lost, f"1 missing keys: {name}"),
        (state | {"head.weight": torch.ones(2)}, "1 unmatched keys: head.weight"),
        (state | {name: torch.ones(7)}, rf"1 misshapen keys: {name} \[7\], not \[24\]"),
        (state | {name: torch.full((24,), math.nan)}, f"24 of the 24 numbers of {name} are NaN"),
    ):
        save_file(change, weight_file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{tmp_path}: {reason}"):
            open_encoder(str(tmp_path), 28, 16)
    weight_file.write_bytes(weight_file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        open_encoder(str(tmp_path), 28, 16)
    save_file(state, weight_file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--crop_size 64 is no multiple .*14 pixels: choose 56 or"):
        open_encoder(str(tmp_path), 64, 16)

    config = tmp_path / "config.json"
    text = config.read_text()
    eight_bits = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.write_text(json.dumps(json.loads(text) | {"quantization_config": eight_bits}))
    with pytest.raises(ValueError, match="quantised weights are not read"):
        open_encoder(str(tmp_path), 28, 16)
    config.write_text(text)

    norm = tmp_path / "preprocessor_config.json"
    norm.write_text(json.dumps({"image_mean": [0.43, 0.411, 0.296], "image_std": [0.2] * 3}))
    with pytest.raises(ValueError, match="preprocessor_config.json: its pictures have mean"):
        open_encoder(str(tmp_path), 28, 16)
    norm.write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406]}))
    open_encoder(str(tmp_path), 28, 16)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # as if it were not installed
        with pytest.raises(ValueError, match="transformers, which is not here: pip install transf"):
            open_encoder(str(tmp_path), 28, 16)


def test_folders_of_other_models_are_named(tmp_path):
    """Bug: a folder of SigLIP, say, ends in a list of keys that V-JEPA does not have."""
    config = tmp_path / "config.json"
    for text, reason in (
        ('{"model_type": "siglip"}', "its config.json says model_type siglip, and vjepa2, dinov2"),
        ("{", "config.json: no JSON with a model_type"),
        ("[]", "config.json: no JSON with a model_type"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=reason):
            open_encoder(str(tmp_path), 32, 16)


# --- from the command line ---


@pytest.fixture(scope="module")
def scaler(tmp_path_factory, shards):
    """Action statistics of the first shard."""
    folder = tmp_path_factory.mktemp("scaler")
    flags = ["--data", shards / "shard-000000.tar", "--output", folder / "s.pkl"]
    run(folder, "fit_scaler.py", *flags, "--num_workers 0")
    return folder / "s.pkl"


@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize("kind", ["dinov2", "vjepa2_1"])
def test_a_run_on_a_frozen_encoder_of_another_kind(tmp_path, shards, scaler, kind):
    """Bug: a script asks an encoder for what only V-JEPA 1 and 2 have (patch_embed.proj, norm), or
    features made once are not those of training on video."""
    encoder = tmp_path / "encoder"
    size = "--encode frame --crop_size 28"
    if kind == "dinov2":
        dino(encoder, "dinov2")
    else:
        # sizes of vit_tiny, so that the number of heads is known
        encoder = file_of_21(tmp_path / "tiny.pt", small_state(width=192, hidden=768))
        size = "--encode frame --crop_size 32"
    data = ["--data", shards / "shard-{000000..000001}.tar", "--encoder", encoder]
    run(tmp_path, "encode.py", *data, "--out", tmp_path / "features", size)

    # a learning rate of 0: the losses depend on the features alone
    flags = ["--scaler", scaler, size, "--pred_dim 24 --pred_depth 1 --pred_heads 2 --batch_size 2"]
    flags.append("--num_workers 0 --epochs 1 --ipe 2 --warmup 0 --anneal 0 --lr 0 --start_lr 0")
    flags.append("--frames_per_clip 8 --val_clips 16 --log_every 1")
    losses = {}
    for name, folder in (("video", shards), ("features", tmp_path / "features")):
        data = ["--data", folder / "shard-000000.tar", "--val_data", folder / "shard-000001.tar"]
        if name == "video":
            data += ["--encoder", encoder]
        run(tmp_path, "train_ac.py", *flags, *data, "--out_dir", tmp_path / name)
        losses[name] = numbers(tmp_path / name, "jloss", log="val.csv").item()
    assert losses["features"] == pytest.approx(losses["video"], rel=0.02)

    if kind == "dinov2":
        data = ["--data", shards / "shard-000000.tar", "--val_clips 0", "--encoder", encoder]
        error = fails(tmp_path, "train_ac.py", *flags, *data, "--save_encoder")
        assert f"--save_encoder writes Meta's layout, and --encoder {encoder} is no V-JEPA" in error


# --- those in this repository ---


@pytest.mark.parametrize("name", weights.SHIPPED)
def test_a_shipped_encoder_is_trained(name):
    """Bug: its file is missing, or holds the random weights of its architecture."""
    encoder = open_encoder(name, 64, 2)
    random = open_encoder("vit_tiny", 64, 2)
    pictures = torch.randn(2, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(pictures)
        of_random = random(pictures)
    assert features.shape == of_random.shape
    assert features.isfinite().all()
    assert not torch.allclose(features, of_random, atol=0.1)
    assert not torch.allclose(features[0], features[1], atol=0.1)
