"""weights.py on real file formats: the reference's checkpoints, transformers' and our own, whole,
damaged, hostile, and over HTTP."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import weights
from model import Encoder, Predictor, copy_fitting
from weights import build_encoder, download, find_encoder, load_encoder, load_predictor, meta_state

FIXTURES = Path(__file__).parent / "fixtures"
VJEPA1 = FIXTURES / "ckpt_vjepa1.pth.tar"
VJEPA2 = FIXTURES / "ckpt_vjepa2_pretrain.pt"


def under(name, prefix):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as f:
        return {k[len(prefix) :]: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}


def small_encoder():
    torch.manual_seed(0)
    return Encoder(24, 2, 2, patch_size=8)


def small_predictor(action_dim=7, state_dim=7, **options):
    torch.manual_seed(0)
    return Predictor(
        24, action_dim, state_dim, (2, 2), pred_dim=16, depth=2, num_heads=2, **options
    )


def same(module, state):
    got = module.state_dict()
    return got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in got)


# --- layouts ---


@pytest.mark.parametrize("which", ["encoder", "target_encoder"])
def test_vjepa1_checkpoint(which):
    """Catches the online encoder loaded for the EMA one, a lost prefix, and a position table of
    another shape."""
    encoder = load_encoder(VJEPA1, num_heads=3, num_frames=4, pos="sincos", which=which)
    saved = torch.load(VJEPA1, weights_only=True)[which]
    assert same(encoder, {k.removeprefix("module.backbone."): v for k, v in saved.items()})
    assert encoder.table_size == (2, 4, 4)
    assert encoder.tubelet_size == 2 and encoder.patch_size == 16
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_default_is_the_ema_encoder():
    """Catches the default that hub and the HF conversions take (the online encoder)."""
    saved = torch.load(VJEPA1, weights_only=True)
    assert not torch.equal(
        saved["encoder"]["module.backbone.norm.weight"],
        saved["target_encoder"]["module.backbone.norm.weight"],
    )
    norm = load_encoder(VJEPA1, num_heads=3, num_frames=4).norm.weight
    assert torch.equal(norm, saved["target_encoder"]["module.backbone.norm.weight"])


def test_position_kind_goes_by_name_then_by_content(tmp_path):
    """Catches a zero table added as positions (V-JEPA 2 files hold one), a V-JEPA 1 file read as
    RoPE, and the name not being trusted."""
    assert load_encoder(VJEPA2, num_heads=3).table_size is None
    assert load_encoder(VJEPA1, num_heads=3, num_frames=4).table_size == (2, 4, 4)

    # a released V-JEPA 2 file, whatever its unused pos_embed holds
    renamed = tmp_path / "vitl.pt"
    renamed.write_bytes(VJEPA1.read_bytes())
    assert load_encoder(renamed, num_heads=3).table_size is None
    renamed = tmp_path / "vitl16.pth.tar"
    renamed.write_bytes(VJEPA1.read_bytes())

    # 16 frames by default
    assert load_encoder(renamed, num_heads=3).table_size == (8, 2, 2)
    with pytest.raises(
        ValueError, match="32 positions are not 3 steps of a square grid: give num_frames"
    ):
        load_encoder(VJEPA1, num_heads=3, num_frames=6)


@pytest.mark.parametrize("prefix", ["", "vjepa2."])
def test_hugging_face_file(tmp_path, prefix):
    """Catches q, k, v merged in the wrong order, and the classifier files' prefix; the mask
    predictor beside the encoder is left alone."""
    save_file(
        {prefix + k: v for k, v in under("hf_vjepa2", "w/").items()}, tmp_path / "model.safetensors"
    )
    encoder = load_encoder(tmp_path, num_heads=3)
    for case in ("native", "one_tubelet"):
        x = under("hf_vjepa2", f"in/{case}/")["pixel_values_videos"].transpose(1, 2)
        torch.testing.assert_close(
            encoder(x), under("hf_vjepa2", f"out/{case}/")["last_hidden_state"], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module.encoder."])
@pytest.mark.parametrize("nested", [True, False])
def test_any_prefix(tmp_path, prefix, nested):
    """Catches a wrapper's prefix (DDP, compile) that makes every key unmatched; a flat file is the
    state dict itself."""
    encoder = small_encoder()
    state = {prefix + k: v for k, v in encoder.state_dict().items()}
    torch.save({"target_encoder": state, "epoch": 3} if nested else state, tmp_path / "own.pt")
    assert same(load_encoder(tmp_path / "own.pt", num_heads=2), encoder.state_dict())


@pytest.mark.parametrize(
    "name, extrinsics", [("ac_predictor_rope", True), ("ac_predictor_vpt_13_2", False)]
)
def test_predictor_file(tmp_path, name, extrinsics):
    """Catches sizes read from the wrong tensors; the extrinsics layer is kept when the file has it,
    but frozen and unused."""
    state = under(name, "w/")
    torch.save(
        {"predictor": {f"module.{k}": v for k, v in state.items()}, "opt": {}}, tmp_path / "ac.pt"
    )
    predictor = load_predictor(tmp_path / "ac.pt", num_heads=3, grid=(4, 4))
    assert same(predictor, state)

    inputs = under(name, "in/full/")
    y = predictor(inputs["x"], inputs["actions"], inputs["states"])
    torch.testing.assert_close(y, under(name, "out/full/")["y"], rtol=0, atol=1e-5)
    assert {k.split(".")[0] for k, p in predictor.named_parameters() if not p.requires_grad} == (
        {"extrinsics_encoder"} if extrinsics else set()
    )

    if extrinsics:
        used = load_predictor(tmp_path / "ac.pt", num_heads=3, grid=(4, 4), use_extrinsics=True)
        assert used.use_extrinsics
        assert all(p.requires_grad for p in used.parameters())


def test_predictor_with_proprio_encoder_or_without_state(tmp_path):
    """Catches jepa-wms' name for the state encoder, and its "noprop" file that has none."""
    state = small_predictor(13, 2).state_dict()
    torch.save(
        {"predictor": {k.replace("state_encoder", "proprio_encoder"): v for k, v in state.items()}},
        tmp_path / "wms.pt",
    )
    assert same(load_predictor(tmp_path / "wms.pt", num_heads=2, grid=(2, 2)), state)
    state = small_predictor(13, 0).state_dict()
    torch.save({"predictor": state}, tmp_path / "noprop.pt")
    assert same(load_predictor(tmp_path / "noprop.pt", num_heads=2, grid=(2, 2)), state)


@pytest.mark.parametrize("use_extrinsics", [False, True])
def test_metas_own_code_could_load_what_we_write(tmp_path, use_extrinsics):
    """Catches a key that hub's strict load would miss: it strips "module." and "backbone." and
    always wants the extrinsics layer."""
    encoder = small_encoder()
    predictor = small_predictor(use_extrinsics=use_extrinsics)
    torch.save(meta_state(encoder, predictor), tmp_path / "meta.pt")
    saved = torch.load(tmp_path / "meta.pt", weights_only=True)
    cleaned = {
        k: {name.replace("module.", "").replace("backbone.", ""): v for name, v in saved[k].items()}
        for k in saved
    }
    with safe_open(FIXTURES / "ac_mask_and_shapes.safetensors", "pt") as f:
        released = json.loads(f.metadata()["spec"])["released_shapes"]
    assert set(cleaned["predictor"]) == {
        k for k in released if not k.startswith("predictor_blocks.") or int(k.split(".")[1]) < 2
    }
    assert list(cleaned["predictor"]["extrinsics_encoder.weight"].shape) == [16, 6]
    assert same(encoder, cleaned["encoder"])
    assert same(encoder, cleaned["target_encoder"])
    assert same(load_encoder(tmp_path / "meta.pt", num_heads=2), encoder.state_dict())

    ours = load_predictor(
        tmp_path / "meta.pt", num_heads=2, grid=(2, 2), use_extrinsics=use_extrinsics
    ).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in predictor.state_dict().items())


def test_what_is_predicted_travels_with_the_weights(tmp_path):
    """Bug: a predictor of changes is read as one of features, by us or by Meta's strict loader: all
    shapes fit, and every prediction is wrong; or Meta's own weights are taken for changes."""
    change = small_predictor(predict="change")
    plain = small_predictor()
    torch.save({"predictor": change.state_dict()}, tmp_path / "change.pt")
    torch.save(meta_state(small_encoder(), change), tmp_path / "meta.pt")
    torch.save(meta_state(small_encoder(), plain), tmp_path / "plain.pt")
    for name, expected in (("change", change), ("meta", change), ("plain", plain)):
        loaded = load_predictor(tmp_path / f"{name}.pt", num_heads=2, grid=(2, 2))
        assert loaded.predict == expected.predict
        torch.manual_seed(1)
        inputs = (torch.randn(1, 8, 24), torch.randn(1, 2, 7), torch.randn(1, 2, 7))
        assert torch.equal(loaded(*inputs), expected(*inputs))
    with pytest.raises(RuntimeError, match="Unexpected key.*predicts_change"):
        plain.load_state_dict(change.state_dict())
    for one, other in ((plain, change), (change, plain)):
        with pytest.raises(ValueError, match=f"pass --predict {other.predict}"):
            copy_fitting(one, other.state_dict())


def test_heads_of_known_architectures():
    """Catches ViT-g read with 16 heads: same shapes as with its 22, so nothing would fail but the
    numbers."""

    def heads(width, depth, mlp_dim, prefix="blocks."):
        state = {
            f"{prefix}{i}.mlp.fc1.weight": torch.empty(mlp_dim, width, device="meta")
            for i in range(depth)
        }
        return weights.sizes_of("file", state, prefix, width, None)["num_heads"]

    assert [heads(1024, 24, 4096), heads(1280, 32, 5120), heads(1408, 40, 6144)] == [16, 16, 22]
    assert heads(1024, 24, 4096, "predictor_blocks.") == 16
    with pytest.raises(
        ValueError, match="width 1408, depth 40, MLP 5632 is no known architecture: give num_heads"
    ):
        heads(1408, 40, 5632)
    with pytest.raises(
        ValueError, match="width 48, depth 1, MLP 192 is no known architecture: give num_heads"
    ):
        load_encoder(VJEPA1, num_frames=4)


def test_build_encoder_is_seeded():
    """Catches random weights that differ between ranks or runs, and a build that moves the script's
    own random numbers."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = build_encoder("vit_tiny", seed=1)
    two = build_encoder("vit_tiny", seed=1)
    other = build_encoder("vit_tiny", seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert same(one, two.state_dict())
    assert not torch.equal(one.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)
    assert not any(p.requires_grad for p in one.parameters())
    with pytest.raises(ValueError, match="'vit_small' is unknown, choose from: vit_tiny"):
        build_encoder("vit_small")


class Foreign(nn.Module):
    """Somebody's encoder: it keeps the contract, unless it is told to break it."""

    patch_size = 8
    tubelet_size = 2
    embed_dim = 12
    lost = 0
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3 * 2 * 8 * 8, 12)
        self.eval().requires_grad_(False)

    def forward(self, video):
        B, _, frames, H, W = video.size()
        x = video.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)
        x = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
        return self.proj(x)[:, self.lost :] / self.scale


class WithNotes(Foreign):
    """Its state dict has an entry that is no tensor."""

    def get_extra_state(self):
        return {"note": "mine"}


def test_an_encoder_of_ones_own_is_told_what_it_lacks():
    """Bug: an encoder without patch_size, one that adds a class token, or one in training mode,
    fails somewhere inside with an AttributeError or a shape that does not fit, or trains on
    dropout."""
    weights.check_encoder(Foreign(), "own", 64)
    for attribute, value, reason in (
        ("patch_size", None, "lacks patch_size"),
        ("patch_size", 16.0, "lacks patch_size"),
        ("tubelet_size", 0, "lacks tubelet_size"),
        ("embed_dim", "12", "lacks embed_dim"),
        ("embed_dim", True, "lacks embed_dim"),
        ("picture_frames", 0, "lacks picture_frames"),
        ("embed_dim", 13, r"makes \[1, 128, 12\], not features \[1, 128, 13\]"),
        ("lost", 1, r"makes \[1, 127, 12\], not features \[1, 128, 12\]"),
        ("scale", 0.0, "makes float32 that are no finite floats"),
        ("scale", "x", r"makes no features \(TypeError: unsupported operand"),
        ("picture_frames", 1, r"from video \[1, 3, 1, 64, 64\] it makes no features \(RuntimeE"),
        ("picture_frames", 4, r"makes \[1, 128, 12\], not features \[1, 64, 12\]"),
        (
            "patch_size",
            24,
            "--crop_size 64 is no multiple .* patches of 24 pixels: choose 48 or 72",
        ),
        ("training", True, r"lacks eval mode \(call .eval\(\)\)"),
        ("second", nn.Linear(1, 1), r"lacks eval mode .*frozen parameters \(call .requires_grad_"),
        ("second", Foreign().double(), r"lacks one dtype .*\(torch.float32, torch.float64, cpu\)"),
        ("second", WithNotes(), r"lacks a state_dict of tensors alone \(second._extra_state\)"),
    ):
        encoder = Foreign()
        setattr(encoder, attribute, value)
        with pytest.raises(ValueError, match=reason):
            weights.check_encoder(encoder, "own", 64)
    with pytest.raises(ValueError, match=r"lacks patch_size .*, parameters \(of an nn.Module\)"):
        weights.check_encoder(nn.Identity().eval(), "own", 64)


# --- strictness ---


def test_missing_unmatched_and_misshapen_keys_are_listed(tmp_path):
    """Catches strict=False: a half-fitting file that loads in silence and trains on random weights
    (vjepa2 #125)."""
    state = small_encoder().state_dict()
    state["blocks.1.attn.q_norm.weight"] = state.pop("blocks.1.attn.proj.bias")
    state["norm.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError) as e:
        load_encoder(tmp_path / "a.pt", num_heads=2)

    for part in (
        "1 missing keys: blocks.1.attn.proj.bias",
        "1 unmatched keys: blocks.1.attn.q_norm.weight",
        "norm.weight [7], not [24]",
        "a.pt",
    ):
        assert part in str(e.value)


def test_a_missing_block_or_third_of_qkv_is_listed(tmp_path):
    """Catches a gap in the depth, and query, key, value of which one is gone."""
    state = small_encoder().state_dict()
    torch.save(
        {k.replace("blocks.1.", "blocks.2."): v for k, v in state.items()}, tmp_path / "gap.pt"
    )
    with pytest.raises(ValueError, match="12 missing keys: blocks.1.norm1.weight"):
        load_encoder(tmp_path / "gap.pt", num_heads=2)

    hf = under("hf_vjepa2", "w/")
    del hf["encoder.layer.1.attention.key.weight"]
    save_file(hf, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match="1 missing keys: blocks.1.attn.qkv.weight; 2 unmatched keys"
    ):
        load_encoder(tmp_path, num_heads=3)


def test_files_that_hold_something_else(tmp_path):
    """Catches a KeyError or an AttributeError from deep inside for a file of another kind; each
    message names the file and what it has."""
    with pytest.raises(
        ValueError,
        match=(
            "ckpt_vjepa2_pretrain.pt: the predictor has no action_encoder, so it is a mask"
            " predictor"
        ),
    ):
        load_predictor(VJEPA2, num_heads=2)

    torch.save({"predictor": {}, "encoder": None}, tmp_path / "p.pt")
    for which, has in (("target_encoder", "predictor, encoder"), ("encoder", "nothing")):
        with pytest.raises(
            ValueError,
            match=(
                f"'{which}' needs one key that ends in patch_embed.proj.weight, 0 found; it has"
                f" {has}"
            ),
        ):
            load_encoder(tmp_path / "p.pt", which=which)

    torch.save({"patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)}, tmp_path / "image.pt")
    with pytest.raises(ValueError, match="image.pt: an image encoder"):
        load_encoder(tmp_path / "image.pt")

    torch.save({"patch_embed.proj.weight": torch.zeros(24, 3, 2, 16, 16)}, tmp_path / "stem.pt")
    with pytest.raises(ValueError, match="stem.pt: no blocks.0.mlp.fc1.weight in it"):
        load_encoder(tmp_path / "stem.pt")

    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: holds a list, not a dictionary"):
        load_encoder(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_encoder(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_half_a_file(tmp_path, share, kind):
    """Catches a download cut short being read as weights, at any place of the cut."""
    path = tmp_path / f"cut.{kind}"
    whole = (VJEPA2 if kind == "pt" else FIXTURES / "hf_vjepa2.safetensors").read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError,
        match=(
            f"cut.{kind}: these {int(share * len(whole))} bytes are no weight file, or only part"
            " of one"
        ),
    ):
        load_encoder(path, num_heads=3)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_web_page(tmp_path, kind):
    """Catches a proxy's or a login page saved under the name of the weights."""
    path = tmp_path / f"page.{kind}"
    path.write_text("\n<!DOCTYPE html><html><body>Access denied</body></html>" * 50)
    with pytest.raises(ValueError, match="a web page: fetch it again"):
        load_encoder(path)


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("nested", [False, True])
def test_files_of_old_torch_are_read(tmp_path, nested):
    """Bug: what torch.save wrote before version 1.6 is no zip and cannot be mapped: "no weight
    file"."""
    encoder = small_encoder()
    state = encoder.state_dict()
    state = {"target_encoder": {f"module.{k}": v for k, v in state.items()}} if nested else state
    path = tmp_path / "old.pt"
    torch.save(state, path, **OLD)
    assert same(load_encoder(path, num_heads=2), encoder.state_dict())

    whole = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="old.pt: these .* bytes are no weight file, or only"):
            load_encoder(path, num_heads=2)
    torch.save({"target_encoder": state, "x": Bomb(tmp_path / "ran")}, path, **OLD)
    with pytest.raises(ValueError, match=r"old.pt: refused, since it holds (posix|nt|os).system"):
        load_encoder(path, num_heads=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_refused_by_name(tmp_path, value, dtype):
    """Bug: weights of a training that diverged are read, and every feature is NaN."""
    for module, load in ((small_encoder(), load_encoder), (small_predictor(), load_predictor)):
        state = {k: v.to(dtype) for k, v in module.state_dict().items()}
        name = [k for k in state if k.endswith("1.mlp.fc1.weight")][0]
        state[name][3, 2] = value
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: 1 of the .* numbers of {name} are NaN or inf"):
            load(tmp_path / "x.pt", num_heads=2)


def test_keys_and_values_of_another_kind_are_refused(tmp_path):
    """Bug: an AttributeError for keys that are numbers; whole numbers of quantised weights are
    taken as they are."""
    state = small_encoder().state_dict()
    first = "patch_embed.proj.weight"
    for change, reason in (
        (dict(enumerate(state.values())), r"28 of its 28 keys are no names but int, such as 0"),
        (state | {7: torch.zeros(1)}, "1 of its 29 keys are no names but int, such as 7"),
        ({k.encode(): v for k, v in state.items()}, "keys are no names but bytes"),
        ({"target_encoder": dict(enumerate(state.values()))}, "28 of its 28 keys"),
        ({"target_encoder": torch.zeros(3)}, "'target_encoder' is a Tensor, no weights by name"),
        ({"target_encoder": [1]}, "'target_encoder' is a list, no weights by name"),
        (state | {first: [1.0]}, f"{first} is a list, no tensor"),
        (state | {first: state[first].to(torch.int8)}, f"{first} holds int8, no floats"),
        (state | {first: state[first].to("meta")}, f"{first} has no numbers of its own"),
        (state | {"norm.bias": torch.zeros(24).to_sparse()}, "norm.bias has no numbers of its own"),
    ):
        torch.save(change, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: .*{reason}"):
            load_encoder(tmp_path / "x.pt", num_heads=2)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickle_bomb_is_refused(tmp_path):
    """Catches a torch.load that runs what a stranger wrote into a weight file."""
    torch.save(
        {"target_encoder": small_encoder().state_dict(), "x": Bomb(tmp_path / "ran")},
        tmp_path / "bomb.pt",
    )
    for load in (load_encoder, load_predictor):
        with pytest.raises(
            ValueError,
            match=r"bomb.pt: refused, since it holds (posix|nt|os).system, which could run code",
        ):
            load(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_outlive_their_file(tmp_path):
    """Catches parameters that stay mapped to the file: the checkpoint may be rotated away or
    rewritten while training continues."""
    path = tmp_path / "p.pt"
    predictor = small_predictor()
    torch.save({"predictor": predictor.state_dict()}, path)
    loaded = load_predictor(path, num_heads=2, grid=(2, 2))
    nn.init.zeros_(loaded.predictor_norm.weight)
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.predictor_proj.weight, predictor.predictor_proj.weight)


# --- download ---


class Server(ThreadingHTTPServer):
    """Serves `data` at any path except /missing; the first `broken` answers stop halfway;
    `ranges=False` ignores Range."""

    def __init__(self, data, broken=0, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.broken = broken
        self.ranges = ranges
        self.seen = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.seen.append((self.path, wanted))
        if self.path == "/missing":
            return self.send_error(404)
        start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
        if start > len(server.data):
            return self.send_error(416)
        body = server.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.broken:
            server.broken -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    servers = []
    waits = []
    monkeypatch.setattr(weights.time, "sleep", waits.append)

    def start(*args, **options):
        servers.append(Server(*args, **options))
        servers[-1].waits = waits
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_broken_transfer_is_resumed(tmp_path, serve, monkeypatch):
    """Catches half a file under the final name, a restart from zero, and bytes lost or doubled
    where the transfer broke."""
    data = VJEPA1.read_bytes()
    server = serve(data, broken=2)
    monkeypatch.setenv("NANOJEPA_WEIGHTS_URL", server.url + "/mirror/")
    path = find_encoder("vjepa_vitl", tmp_path / "cache")
    assert path == tmp_path / "cache" / "vitl16.pth.tar"
    assert path.read_bytes() == data
    assert server.seen[0] == ("/mirror/jepa/vitl16/vitl16.pth.tar", None)
    half = len(data) // 2
    three_quarters = len(data) // 2 + (len(data) - len(data) // 2) // 2
    assert [r for _, r in server.seen[1:]] == [f"bytes={half}-", f"bytes={three_quarters}-"]

    # it backs off
    assert server.waits == sorted(server.waits)
    assert server.waits[-1] > server.waits[-2] > 0
    assert os.listdir(tmp_path / "cache") == ["vitl16.pth.tar"]

    # fetched once
    assert find_encoder("vjepa_vitl", tmp_path / "cache") == path
    assert len(server.seen) == 3
    assert load_encoder(path, num_heads=3, num_frames=4).embed_dim == 48


def test_a_killed_download_is_resumed_by_the_next_process(tmp_path, serve):
    """Catches a `.part` that is ignored, or kept when the server sends the whole file again."""
    data = os.urandom(3_000_000)
    for ranges in (True, False):
        server = serve(data, ranges=ranges)
        (tmp_path / "w.pt.part").write_bytes(data[:1_000_000])
        download(server.url + "/w.pt", tmp_path / "w.pt")
        assert (tmp_path / "w.pt").read_bytes() == data
        assert server.seen == [("/w.pt", "bytes=1000000-")]


def test_a_part_longer_than_the_file_starts_over(tmp_path, serve):
    """Catches an endless 416, or a file with a stranger's head (two runs wrote the same part)."""
    data = os.urandom(1000)
    (tmp_path / "w.pt.part").write_bytes(bytes(2000))
    download(serve(data).url + "/w.pt", tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == data


def test_download_gives_up_and_says_what_to_do(tmp_path, serve):
    """Catches endless retries, a missing file asked for again and again, and an error without the
    address, the place or what to do."""
    server = serve(b"x" * 1000, broken=100)
    for name, requests in (("/missing", 1), ("/w.pt", 5)):
        before = len(server.seen)
        with pytest.raises(ConnectionError) as e:
            find_encoder(server.url + name, tmp_path)
        place = tmp_path / (
            server.url.removeprefix("http://").replace(":", "_") + name.replace("/", "_")
        )
        for part in (server.url + name, str(place), "--encoder doom_tiny"):
            assert part in str(e.value)
        assert len(server.seen) - before == requests and not place.exists()

    server.shutdown()
    server.server_close()

    # nobody answers: offline
    with pytest.raises(ConnectionError, match="could not download"):
        find_encoder(server.url + "/other.pt", tmp_path)


def test_names_and_paths(tmp_path):
    """Catches a misspelt name taken for a path without a word about the names there are."""
    assert find_encoder(str(VJEPA2), tmp_path) == VJEPA2
    with pytest.raises(
        FileNotFoundError,
        match="'vjepa2_vitL': no such file, and none of the names vjepa2_vitl, .*vit_tiny",
    ):
        find_encoder("vjepa2_vitL", tmp_path)
