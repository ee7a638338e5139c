"""model.py against tensors from the reference code (tests/fixtures, fp32, atol 1e-5) and against
its own claims."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from evaluation.held_out import action_meter
from model import (
    CHANGE_MARK,
    ACModel,
    Encoder,
    Predictor,
    ac_losses,
    apply_rope,
    compose_states,
    encode_steps,
    grid_positions,
    normalize_features,
    predict,
    predict_on,
    rope_tables,
)
from tests.harness import (
    A,
    B,
    E,
    N,
    S,
    T,
    close,
    rollout_from_scratch,
    small_batch,
    small_predictor,
)

FIXTURES = Path(__file__).parent / "fixtures"

# sizes of the small predictor below, on 2 x 3 patches


def load(name):
    """The spec and the tensors of a fixture."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as f:
        return json.loads(f.metadata()["spec"]), {k: f.get_tensor(k) for k in f.keys()}


def under(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


# --- parity ---

ENCODERS = {
    "encoder_rope_hd16": ["native", "one_tubelet", "longer", "bigger_nonsquare"],
    "encoder_rope_vitg_style": ["native", "one_tubelet"],
    "encoder_sincos_v1": ["native", "one_tubelet", "shorter", "bigger"],
}


def encoder_of(name):
    """The encoder of a fixture, its own position table before loading, the fixture's tensors."""
    spec, tensors = load(name)
    a = spec["args"]
    encoder = Encoder(
        a["embed_dim"],
        a["depth"],
        a["num_heads"],
        pos="sincos" if "sincos" in name else "rope",
        mlp_dim=int(a["embed_dim"] * a["mlp_ratio"]),
        img_size=64,
        num_frames=a["num_frames"],
    )
    own_table = encoder.pos_embed.clone() if "sincos" in name else None
    encoder.load_state_dict(under(tensors, "w/"))
    return encoder.eval(), own_table, tensors


@pytest.mark.parametrize("name, case", [(n, c) for n, cases in ENCODERS.items() for c in cases])
def test_encoder_parity(name, case):
    """Catches true RoPE in place of Meta's tiled one, rescaled positions, a wrong qkv order or eps,
    tanh GELU, scale-factor rounding."""
    encoder, _, tensors = encoder_of(name)
    x = tensors[f"in/{case}/x"]
    close(encoder(x), tensors[f"out/{case}/y"])
    if f"out/{case}/patch_embed" in tensors:
        close(encoder.patch_embed(x).flatten(2).transpose(1, 2), tensors[f"out/{case}/patch_embed"])
    if f"out/{case}/pos" in tensors:
        table = encoder.position_table(x.shape[2] // 2, x.shape[3] // 16, x.shape[4] // 16)
        close(table, tensors[f"out/{case}/pos"])


def test_masked_encoder_parity():
    """Catches kept tokens renumbered from zero in place of keeping their own positions."""
    encoder, _, tensors = encoder_of("encoder_rope_hd16")
    close(encoder(tensors["in/masked/x"], masks=tensors["in/masked/mask"]), tensors["out/masked/y"])


def test_sincos_table_is_the_references():
    """Catches sin and cos interleaved, axes in another order, or columns cut from the wrong end."""
    _, own_table, tensors = encoder_of("encoder_sincos_v1")
    close(own_table, tensors["w/pos_embed"], atol=1e-7)


def test_out_layers_are_normed_in_order():
    """Catches raw residual streams handed out, and the last layer differing from the plain
    output."""
    encoder, _, tensors = encoder_of("encoder_rope_vitg_style")
    x = tensors["in/native/x"]
    first, last = encoder(x, out_layers=[0, 2])
    assert torch.equal(last, encoder(x))
    assert not torch.allclose(first, last, atol=0.1)

    # the first layer's output is that of an encoder of one layer
    shorter = Encoder(44, 1, 2, mlp_dim=192)
    own = shorter.state_dict()
    shorter.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in own})
    close(first, shorter(x))


PREDICTORS = {
    "ac_predictor_rope": ["full", "short", "single"],
    "ac_predictor_rope_extrinsics": ["full", "short", "single"],
    "ac_predictor_vpt_13_2": ["full", "single"],
}


@pytest.mark.parametrize("name, case", [(n, c) for n, cases in PREDICTORS.items() for c in cases])
def test_predictor_parity(name, case):
    """Catches condition tokens rotated in space or not at all, a token order that shifts the mask,
    residual prediction."""
    _, tensors = load(name)
    weights = under(tensors, "w/")
    inputs = under(tensors, f"in/{case}/")
    predictor = Predictor(
        44,
        weights["action_encoder.weight"].shape[1],
        weights["state_encoder.weight"].shape[1],
        (4, 4),
        pred_dim=48,
        depth=2,
        num_heads=3,
        use_extrinsics="extrinsics_encoder.weight" in weights,
    )
    predictor.load_state_dict(weights)
    predictor.use_extrinsics = "extrinsics" in inputs
    y = predictor(inputs["x"], inputs["actions"], inputs["states"], inputs.get("extrinsics"))
    close(y, tensors[f"out/{case}/y"])


def test_official_shapes_and_parameter_counts():
    """Catches a key, a shape or a bias that released files have and we do not, at full size and
    without the memory."""
    spec, _ = load("official_shapes_v2")

    def shapes(model):
        return {k: list(v.shape) for k, v in model.state_dict().items()}

    def count(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        for model in spec["models"].values():
            mlp_dim = model["keys"]["blocks.0.mlp.fc1.bias"][0]
            encoder = Encoder(model["embed_dim"], model["depth"], model["heads"], mlp_dim=mlp_dim)
            assert shapes(encoder) == model["keys"]
        large = Encoder(1024, 24, 16)
        huge = Encoder(1280, 32, 16)
        giant = Encoder(1408, 40, 22, mlp_dim=6144)
        predictor = Predictor(1408, 7, 7, (16, 16), use_extrinsics=True)
    assert count(large) == 303_885_312
    assert count(huge) == 631_648_000
    assert count(giant) == 1_012_173_952

    spec, _ = load("ac_mask_and_shapes")
    assert shapes(predictor) == spec["released_shapes"]
    assert count(predictor) == spec["released_params"] == 305_220_992


def test_six_training_steps_match_the_reference():
    """Catches what single forwards cannot: a detached rollout, losses with another weight or
    average, gradients into the frozen layer."""
    spec, tensors = load("train_loop_auto2")
    encoder = Encoder(24, 1, 2)
    encoder.load_state_dict(under(tensors, "w/encoder."))
    predictor = Predictor(24, 7, 7, (2, 2), pred_dim=32, depth=2, num_heads=2, use_extrinsics=True)
    predictor.load_state_dict(under(tensors, "w/predictor."))
    predictor.use_extrinsics = False
    predictor.extrinsics_encoder.requires_grad_(False)
    model = ACModel(predictor, auto_steps=2, loss_exp=1.0)

    trained = [p for p in predictor.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    for i in range(6):
        for group in optimizer.param_groups:
            group["lr"] = tensors["out/lr"][i].item()
        optimizer.param_groups[0]["weight_decay"] = tensors["out/wd"][i].item()

        # clips are normalised already; each frame is repeated and encoded alone
        clips = tensors[f"in/step{i}/clips"].transpose(1, 2)  # (B, T, 3, H, W)
        with torch.no_grad():
            z = encoder(clips.flatten(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1))
        z = normalize_features(z).view(2, 4, 4, 24)

        jloss, sloss = model(z, tensors[f"in/step{i}/actions"], tensors[f"in/step{i}/states"])
        assert jloss.item() == pytest.approx(tensors["out/jloss"][i].item(), abs=1e-5)
        assert sloss.item() == pytest.approx(tensors["out/sloss"][i].item(), abs=1e-5)
        optimizer.zero_grad()
        (jloss + sloss).backward()
        optimizer.step()

    for key, expected in under(tensors, "out/predictor.").items():
        difference = (predictor.state_dict()[key] - expected).abs()

        # key biases of dims without rotation have zero gradient; Adam amplifies its rounding
        if key.endswith("attn.qkv.bias"):
            difference[spec["ignore_qkv_bias"]] = 0
        assert difference.max() < 1e-5, key


@pytest.mark.parametrize(
    "hidden, heads, mlp_ratio", [(128, 2, 4.0), (160, 2, 4.0), (64, 4, 48 / 11)]
)
def test_live_hugging_face_parity(hidden, heads, mlp_ratio, tmp_path):
    """Catches drift from transformers at head dims 64 (ViT-L, g) and 80 (ViT-H), where 4 and 2 dims
    stay without rotation."""
    pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    from transformers import VJEPA2Config, VJEPA2Model

    from weights import load_encoder

    torch.manual_seed(0)
    config = VJEPA2Config(
        crop_size=64,
        frames_per_clip=4,
        pred_num_hidden_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=2,
        mlp_ratio=mlp_ratio,
    )
    theirs = VJEPA2Model(config).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path, num_heads=heads)

    x = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x, skip_predictor=True).last_hidden_state
        close(ours(x.transpose(1, 2)), expected)


# --- positions, masks, tokens ---


@pytest.mark.parametrize("head_dim, rotated", [(64, 60), (80, 78), (16, 12), (22, 18), (4, 0)])
def test_rope_rotates_only_its_share(head_dim, rotated):
    """Catches a head dim split into three without remainder: the last h - 3k dims must pass
    unchanged, at any position."""
    pos = torch.tensor([[3.0, 5.0, 7.0]])
    x = torch.randn(1, head_dim)
    y, _ = apply_rope((x, x), *rope_tables(pos, head_dim))
    assert torch.equal(x[:, rotated:], y[:, rotated:])
    if rotated:
        assert not torch.isclose(x[:, :rotated], y[:, :rotated]).all()


def test_rope_angles_do_not_depend_on_autocast():
    """Catches angles rounded to bf16 (up to 0.04 in q and k): tables are fp32 under autocast and in
    a bf16 model."""
    pos = grid_positions(4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        tables = rope_tables(pos, 64)
    for a, b in zip(tables, rope_tables(pos, 64)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_columns_count_in_units_of_the_grid_height():
    """Catches plain column indices, which on a grid that is not square are not upstream's;
    condition tokens have no place in space."""
    predictor = Predictor(E, A, S, (2, 4), pred_dim=24, depth=1, num_heads=2)
    pos = predictor.positions(3, 2).view(3, 10, 3)
    condition = [[2, 0, 0], [2, 0, 0]]
    patches = [[2, row, col / 2] for row in range(2) for col in range(4)]
    assert pos[2].tolist() == condition + patches


def test_odd_head_dim_is_refused():
    """Catches an unreadable shape error from the middle of the attention."""
    with pytest.raises(ValueError, match="head dim of 15 is odd"):
        rope_tables(torch.zeros(1, 3), 15)


@pytest.mark.parametrize("autocast", [False, True])
def test_predictor_cannot_see_the_future(autocast):
    """Catches any leak across steps, to the bit: later features, actions and states changed,
    earlier predictions equal."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    inputs = [z.flatten(1, 2), torch.cat([actions, actions[:, :1]], dim=1), states]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        before = predictor(*inputs).unflatten(1, (T, N))
        for t in range(1, T):
            changed = [x.clone() for x in inputs]
            for x in changed:
                x.unflatten(1, (T, -1))[:, t:] += 10
            after = predictor(*changed).unflatten(1, (T, N))
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.isclose(before[:, t], after[:, t]).all()


@pytest.mark.parametrize("which", ["actions", "states", "extrinsics"])
def test_every_condition_reaches_its_own_step(which):
    """Catches a condition token that nothing attends to: changing it at step t must move the
    prediction made at step t."""
    predictor = small_predictor(use_extrinsics=True)
    z, _, states = small_batch()
    inputs = {"actions": torch.randn(B, T, A), "states": states, "extrinsics": torch.randn(B, T, 6)}
    before = predictor(z.flatten(1, 2), **inputs).unflatten(1, (T, N))
    inputs[which] = inputs[which].clone()
    inputs[which][:, 2] += 1
    after = predictor(z.flatten(1, 2), **inputs).unflatten(1, (T, N))
    assert torch.equal(before[:, :2], after[:, :2])
    assert ((before - after)[:, 2].abs().mean(-1) > 1e-4).all()


def test_order_of_condition_tokens_changes_nothing():
    """Catches positions that depend on the slot of a token in its step: action and state exchanged
    give the same prediction."""
    torch.manual_seed(0)
    one = Predictor(E, S, S, (2, 3), pred_dim=24, depth=2, num_heads=2)
    other = Predictor(E, S, S, (2, 3), pred_dim=24, depth=2, num_heads=2)
    exchange = {"action_encoder": "state_encoder", "state_encoder": "action_encoder"}
    exchanged = {}
    for key, value in one.state_dict().items():
        nn.init.normal_(value, std=0.3)
        layer, _, rest = key.partition(".")
        exchanged[f"{exchange.get(layer, layer)}.{rest}"] = value
    other.load_state_dict(exchanged)

    z = torch.randn(B, T * N, E)
    actions = torch.randn(B, T, S)
    states = torch.randn(B, T, S)
    close(one(z, actions, states), other(z, states, actions))


def test_predictor_refuses_what_does_not_fit():
    """Catches tokens of another grid regrouped into wrong steps, and extrinsics that are silently
    ignored or missing."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    with pytest.raises(ValueError, match="24 patch tokens are not 3 actions x 6 patches"):
        predictor(z.flatten(1, 2), actions, states)
    with pytest.raises(ValueError, match="use_extrinsics=False, but extrinsics were given"):
        predictor(z[:, 1:].flatten(1, 2), actions, states[:, 1:], torch.randn(B, T - 1, 6))
    with pytest.raises(ValueError, match="use_extrinsics=True, but extrinsics were not given"):
        small_predictor(use_extrinsics=True)(z[:, 1:].flatten(1, 2), actions, states[:, 1:])


def test_no_state_token():
    """Catches a zero-wide state still taking a place in each step (jepa-wms "noprop" has 257 tokens
    a step, not 258)."""
    torch.manual_seed(0)
    predictor = Predictor(E, A, 0, (2, 3), pred_dim=24, depth=1, num_heads=2)
    z, actions, _ = small_batch()
    empty = predict(predictor, z[:, :-1], actions, torch.zeros(B, T, 0))
    assert not any("state" in k for k in predictor.state_dict())
    assert empty.isfinite().all()


def test_initialisation():
    """Catches the default init: weights std 0.02, zero biases, residual outputs of block i divided
    by sqrt(2i)."""
    torch.manual_seed(0)
    encoder = Encoder(192, 4, 3)
    for i, block in enumerate(encoder.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * i), rel=0.02)
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not p.any() for k, p in encoder.named_parameters() if k.endswith("bias"))


# --- precision, memory, compile, DDP ---


def test_bf16_autocast_end_to_end():
    """Catches q and k left in fp32 beside a bf16 v (upstream crashes there), and losses computed in
    bf16."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    exact = ac_losses(predictor, z, actions, states)
    with torch.autocast("cpu", torch.bfloat16):
        losses = ac_losses(predictor, z, actions, states)
        prediction = predict(predictor, z[:, :-1], actions, states)

    # the layer norm is not rounded to bf16
    assert prediction.dtype == torch.float32
    assert (prediction != prediction.bfloat16()).any()

    sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in predictor.parameters())
    for a, b in zip(losses, exact):
        assert a.dtype == torch.float32
        assert a.item() != b.item()
        assert a.item() == pytest.approx(b.item(), rel=0.02)


@pytest.mark.parametrize("name", ["encoder_rope_hd16", "encoder_sincos_v1"])
def test_bf16_encoder(name):
    """Catches `encoder.bfloat16()` failing on uint8 video, or rounding positions: weights alone may
    be rounded."""
    encoder, _, _ = encoder_of(name)
    video = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        exact = normalize_features(encode_steps(encoder, video, "tubelet", 2))
        rounded = encode_steps(encoder.bfloat16(), video, "tubelet", 2)
    assert rounded.dtype == torch.bfloat16
    assert (normalize_features(rounded) - exact).abs().mean() < 0.05


def test_training_after_inference_mode():
    """Catches tables cached under inference_mode, which autograd refuses later."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    with torch.inference_mode():
        ac_losses(predictor, z, actions, states)
    sum(ac_losses(predictor, z, actions, states)).backward()


def test_activation_checkpointing_changes_no_gradient():
    """Catches recomputation that differs from the forward, and a flag that is never read."""
    z, actions, states = small_batch()
    grads = []
    calls = []
    for flag in (False, True):
        predictor = small_predictor()
        predictor.activation_checkpointing = flag
        predictor.predictor_blocks[0].register_forward_pre_hook(
            lambda *_, flag=flag: calls.append(flag)
        )
        sum(ac_losses(predictor, z, actions, states)).backward()
        grads.append([p.grad for p in predictor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))

    # each pass ran its blocks twice
    assert calls.count(True) == 2 * calls.count(False)


def test_compile_without_graph_breaks():
    """Catches Python that depends on data (fullgraph raises), and results that change when
    compiled."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    model = torch.compile(ACModel(predictor), fullgraph=True, backend="aot_eager")
    for a, b in zip(model(z, actions, states), ac_losses(predictor, z, actions, states)):
        close(a, b, atol=1e-6)
    encoder, _, tensors = encoder_of("encoder_rope_hd16")
    x = tensors["in/native/x"]
    close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(x), encoder(x), atol=1e-6)
    encoder, _, tensors = encoder_of("encoder_sincos_v1")
    x = tensors["in/shorter/x"]
    close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(x), encoder(x), atol=1e-6)


def test_every_trained_parameter_gets_a_gradient():
    """Catches parameters on which DDP would wait for ever without find_unused_parameters."""
    z, actions, states = small_batch()
    predictor = small_predictor()
    sum(ACModel(predictor)(z, actions, states)).backward()
    for name, p in predictor.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.any(), name


# --- features ---


@pytest.mark.parametrize("mode", ["tubelet", "frame", "clip"])
def test_encode_modes_see_what_they_say(mode):
    """Catches the future leaking into a step: in `clip` it does (the guides' way), in `tubelet` and
    `frame` it must not, to the bit."""
    encoder, _, _ = encoder_of("encoder_rope_hd16")
    torch.manual_seed(0)
    video = torch.randint(0, 256, (2, 6, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        before = encode_steps(encoder, video, mode, 2)

        # the second frame of step 1
        video[:, 3] = 255 - video[:, 3]
        after = encode_steps(encoder, video, mode, 2)
    moved = [not torch.equal(before[:, t], after[:, t]) for t in range(3)]
    expected = {"tubelet": [False, True, False], "frame": [False] * 3, "clip": [True] * 3}
    assert before.shape == (2, 3, 6, 48)
    assert moved == expected[mode]


def test_encode_steps_is_the_encoder_on_normalised_steps():
    """Catches [0, 1] or [-1, 1] pixels in place of ImageNet's, channels mixed with frames, and
    steps mixed with clips."""
    encoder, _, _ = encoder_of("encoder_rope_hd16")
    torch.manual_seed(0)
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = ((video.double() / 255 - mean) / std).float().transpose(1, 2)  # (B, 3, T, H, W)
    with torch.no_grad():
        pair = encoder(pixels[1:, :, 2:4])
        single = encoder(pixels[1:, :, 2:3].expand(-1, -1, 2, -1, -1))
        close(encode_steps(encoder, video, "tubelet", 2)[1, 1], pair[0])
        close(encode_steps(encoder, video, "frame", 2)[1, 1], single[0])
        close(encode_steps(encoder, video, "frame", 1)[1, 2], single[0])
        close(encode_steps(encoder, video, "tubelet", 1)[1, 2], single[0])
        close(encode_steps(encoder, video, "clip", 2).flatten(1, 2), encoder(pixels))


def test_encode_steps_refuses_what_does_not_fit():
    """Catches frames silently dropped or regrouped."""
    encoder, _, _ = encoder_of("encoder_rope_hd16")
    video = torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'pairs' is unknown, choose from: tubelet, frame, clip"):
        encode_steps(encoder, video, "pairs", 2)
    with pytest.raises(ValueError, match="8 frames are not a whole number of steps of 3"):
        encode_steps(encoder, video, "frame", 3)
    needs = "needs the encoder's 2 frames a step"
    with pytest.raises(ValueError, match=f"--encode tubelet {needs}, not 4"):
        encode_steps(encoder, video, "tubelet", 4)
    with pytest.raises(ValueError, match=f"--encode clip {needs}, not 1"):
        encode_steps(encoder, video, "clip", 1)


def test_normalize_features():
    """Catches eps 1e-6 (upstream: 1e-5), a norm over patches, and statistics applied after it."""
    h = torch.randn(2, 3, 4, 8) * 1e-3
    mean = torch.randn(8)
    std = torch.rand(8) + 0.5
    spread = (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    close(normalize_features(h), (h - h.mean(-1, keepdim=True)) / spread)
    close(normalize_features(h, mean, std), F.layer_norm((h - mean) / std, (8,)))
    assert normalize_features(h.half()).dtype == torch.float32


# --- losses, rollouts, the meter ---


@pytest.mark.parametrize("auto_steps, loss_exp", [(1, 1.0), (2, 1.0), (3, 2.0)])
def test_losses_are_the_guides_loop(auto_steps, loss_exp):
    """Catches a causal pass that is not the loop over prefixes, a rollout from the wrong step, and
    averages over other things."""
    predictor = small_predictor()
    z, actions, states = small_batch()

    def last_prediction(history):
        n = history.shape[1]
        out = predictor(history.flatten(1, 2), actions[:, :n], states[:, :n])
        return F.layer_norm(out, (E,))[:, -N:].unsqueeze(1)

    def loss(predictions, targets):
        powers = (torch.cat(predictions, 1) - targets).abs() ** loss_exp
        return powers.sum() / targets.numel() / loss_exp

    z_tf = [last_prediction(z[:, :n]) for n in range(1, T)]
    z_ar = [z[:, :1]]
    for _ in range(auto_steps):
        z_ar.append(last_prediction(torch.cat(z_ar, 1)))
    options = {"auto_steps": auto_steps, "loss_exp": loss_exp}
    jloss, sloss = ac_losses(predictor, z, actions, states, **options)
    close(jloss, loss(z_tf, z[:, 1:]))
    close(sloss, loss(z_ar[1:], z[:, 1 : auto_steps + 1]))

    # the rollout reads no action and no state from beyond its own steps
    actions[:, auto_steps:] = 7.0
    states[:, auto_steps:] = 7.0
    _, same = ac_losses(predictor, z, actions, states, **options)
    close(same, sloss, atol=0)


@pytest.mark.parametrize("auto_steps", [0, T])
def test_auto_steps_must_fit(auto_steps):
    """Catches a rollout longer than the clip, silently cut."""
    with pytest.raises(ValueError, match=f"auto_steps={auto_steps}.*T={T}"):
        ac_losses(small_predictor(), *small_batch(), auto_steps=auto_steps)


def test_rollout_feeds_itself():
    """Catches a rollout that keeps reading the truth, and a context longer than one step continued
    from the wrong place."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    steps = predictor.rollout(z[:, :1], actions, states)
    close(steps[:, :1], predict(predictor, z[:, :1], actions, states))
    again = predict(predictor, torch.cat([z[:, :1], steps[:, :2]], 1), actions, states)
    close(steps[:, 1:], again[:, 1:])
    longer = torch.cat([z[:, :1], steps[:, :1]], 1)
    close(predictor.rollout(longer, actions, states), steps[:, 1:])


@pytest.mark.parametrize("context", [1, 3])
def test_a_predictor_of_changes_adds_the_step(context):
    """Bug: the change is added to another step than the one it follows, in the pass over all steps
    or in a rollout on cached keys and values; or the setting, off by default, alters weights or
    outputs of those who do not ask for it."""
    plain = small_predictor()
    change = small_predictor(predict="change")
    assert {*change.state_dict()} - {*plain.state_dict()} == {CHANGE_MARK}
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, change.state_dict()[name])

    # in one pass over all steps
    z, actions, states = small_batch()
    inputs = (z[:, :-1].flatten(1, 2), actions, states[:, :-1])
    assert torch.equal(change(*inputs), plain(*inputs) + inputs[0])

    # in a rollout
    ahead = change.rollout(z[:, :context], actions, states)
    close(ahead, rollout_from_scratch(change, z[:, :context], actions, states))
    last = torch.cat([z[:, :context], ahead], dim=1)[:, -2]
    history = torch.cat([z[:, :context], ahead[:, :-1]], dim=1)
    output = plain(history.flatten(1, 2), actions, states[:, :-1]).view(history.shape)[:, -1]
    close(ahead[:, -1], normalize_features(last + output))

    # no change is the step itself, layer-normed twice
    nn.init.zeros_(change.predictor_proj.weight)
    nn.init.zeros_(change.predictor_proj.bias)
    copies = predict(change, z[:, :-1], actions, states)
    close(copies, z[:, :-1], atol=1e-4)

    with pytest.raises(ValueError, match="'difference' is unknown, choose from: features, change"):
        small_predictor(predict="difference")


@pytest.mark.parametrize("context", [1, 3])
def test_rollout_of_many_on_one_cache(context):
    """Catches keys and values of one clip shared in the wrong order or at the wrong place, and a
    cache that is not exact."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    past = context - 1
    one = z[:1, :context].expand(B, -1, -1, -1)
    actions[:, :past] = actions[0, :past].clone()
    states[:, :past] = states[0, :past].clone()
    cache = None
    if past:
        _, cache = predict_on(predictor, z[:1, :past], actions[:1], states[:1])

    expected = rollout_from_scratch(predictor, one, actions, states)
    close(predictor.rollout(one, actions, states, cache=cache), expected)
    close(predictor.rollout(one, actions, states), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_continuing_from_keys_and_values_is_exact(checkpointing):
    """Catches positions that start at 0 again, condition tokens lost from the cache, and gradients
    cut at the cached keys and values."""
    predictor = small_predictor(use_extrinsics=True)
    z, actions, states = small_batch()
    predictor.activation_checkpointing = checkpointing
    inputs = [x[:, : T - 1] for x in (z, actions, states, torch.randn(B, T, 6))]

    def extend(start, end, past=None):
        z, *conditions = (x[:, start:end] for x in inputs)
        return predictor.extend(z.flatten(1, 2), *conditions, past)

    whole, _ = extend(0, T - 1)
    steps = []
    past = None
    for t in range(T - 1):
        out, past = extend(t, t + 1, past)
        steps.append(out)
    steps = torch.cat(steps, 1)
    close(steps, whole)

    parameters = list(predictor.parameters())
    expected = torch.autograd.grad(whole.square().sum(), parameters)
    for a, b in zip(torch.autograd.grad(steps.square().sum(), parameters), expected):
        close(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="2 steps cannot follow"):
        extend(0, 2, past)


def test_composed_states():
    """Catches angles left scaled, an action applied one step early, and yaw outside (-pi, pi]."""
    actions = torch.zeros(1, 4, 13)
    actions[..., 2] = 2.0
    actions[..., 3] = -1.0
    mean = torch.tensor([9.0, 9.0, 0.1, 0.05])
    scale = torch.tensor([9.0, 9.0, 0.5, 0.1])

    # yaw +1.1 a step, pitch -0.05
    states = compose_states(torch.tensor([[1.0, 0.2]]), actions, mean, scale)
    yaw = [1.0, 2.1, 3.2 - 2 * math.pi, 4.3 - 2 * math.pi]
    pitch = [0.2, 0.15, 0.1, 0.05]
    close(states[0], torch.tensor([yaw, pitch]).T, atol=1e-6)

    half_turn = compose_states(torch.tensor([[math.pi, 0.0]]), actions[:, :1], mean, scale)
    assert half_turn[0, 0, 0] > 3.14


def test_action_meter():
    """Catches shuffled rollouts that are told the truth by true states, horizons mixed up, and
    errors averaged over clips."""
    predictor = small_predictor()
    z, actions, states = small_batch()
    shuffle = torch.tensor([1, 0])

    def compose(state0, a):
        return state0.unsqueeze(1) + a[..., :S].cumsum(1) - a[..., :S]

    others = actions[shuffle]
    meter = action_meter(predictor, z, actions, states, others, compose)
    names = ("true", "shuffled", "zero", "copy")
    assert set(meter) == {f"{kind}_{name}" for kind in ("tf", "ro") for name in names}
    for errors in meter.values():
        assert errors.shape == (B, T - 1)
        assert not errors.requires_grad

    close(meter["tf_copy"][1, 2], (z[1, 3] - z[1, 2]).abs().mean())
    close(meter["ro_copy"][1, 2], (z[1, 3] - z[1, 0]).abs().mean())
    for name, a in (("true", actions), ("shuffled", actions.flip(0)), ("zero", actions * 0)):
        tf = predict(predictor, z[:, :-1], a, states)
        ro = predictor.rollout(z[:, :1], a, compose(states[:, 0], a))
        close(meter[f"tf_{name}"], (tf - z[:, 1:]).abs().mean((2, 3)))
        close(meter[f"ro_{name}"], (ro - z[:, 1:]).abs().mean((2, 3)))

    # only teacher forcing sees the true states of later steps
    later = states.clone()
    later[:, 1:] += 1
    for name, other in action_meter(predictor, z, actions, later, others, compose).items():
        assert torch.equal(meter[name], other) == (name.startswith("ro") or name == "tf_copy")


def test_a_meter_without_another_recording_has_no_shuffled_error():
    """Bug: the actions of nobody are composed into poses, which ends a robot run with one held-out
    episode in scipy's "zero norm quaternions"."""
    predictor = small_predictor()
    (z, actions, states) = small_batch()

    def compose(state0, a):
        assert torch.isfinite(a).all()
        return state0.unsqueeze(1).expand(-1, a.shape[1], -1)

    nobody = torch.full_like(actions, float("nan"))
    meter = action_meter(predictor, z, actions, states, nobody, compose)
    for name, errors in meter.items():
        assert errors.shape == (B, T - 1)
        assert torch.isnan(errors).all() == name.endswith("shuffled")
