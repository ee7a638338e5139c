"""How fast are we beside the programs that people would use in our place, on this machine?

    git clone https://github.com/facebookresearch/vjepa2
    git clone https://github.com/facebookresearch/jepa-wms
    pip install einops vector-quantize-pytorch peft torchcodec lerobot
    python -m bench.peers --vjepa2 vjepa2 --jepa_wms jepa-wms    # a CPU: sizes of bench.step
    python -m bench.peers --vjepa2 vjepa2 --size released    # a GPU: the released ViT-L's sizes

Their code is theirs: a checkout is named by its folder, packages are those that can be imported,
and nothing of them is in this repository. A peer that is not there is left out, with a line. Before
anything is timed, both must give the same. Ours and theirs then take turns in one process.

vjepa2      A training step of facebookresearch/vjepa2's VisionTransformerPredictorAC, with our
            weights: on features, and on pixels through its VisionTransformer. Losses and all
            gradients are compared, and the losses after all steps. The step is a closure in
            app/vjepa_droid/train.py and cannot be imported: `vjepa2_step` says the same in its
            order. Left out, in its favour: DDP, normalising pixels (its loader does that).
jepa_wms    The same step on features with facebookresearch/jepa-wms's VisionTransformerPredictorAC,
            conditioned by tokens as V-JEPA 2-AC is, with our weights.
vq          vector-quantize-pytorch's VectorQuantize: forward, backward and the moving average of
            the codes. Codes, gradients and the new tables are compared.
peft        Hugging Face PEFT's LoRA, by what bench.lora compares and times.
torchcodec  The sixteen frames of a clip from an mp4 of 640x360, decoded with one thread and resized
            to a short side of 256. Ours decodes with PyAV. The frames are compared. Once as its
            guide says, and once as our reader would use it: frames by our index, our resize.
lerobot     Clips of a LeRobot data set, by what bench.lerobot compares and counts: CPU seconds,
            where the others are seconds."""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import sys
import time
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F

import bench
import bench.data  # sets a cache of its own before data.py is imported, and makes recordings
from bench.pretrain import (
    encoder_of_reference,
    gradients_off,
    loss_and_gradients,
    open_checkout,
    shared_options,
)
from bench.step import our_step, training_step
from files.video import largest_difference, mp4_times, open_video, read_frames, upright
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Predictor,
    VectorQuantizer,
    make_features_of,
)
from weights import build_encoder

# what has to be installed, and what it is imported as
PACKAGES = {
    "vq": ("vector-quantize-pytorch", "vector_quantize_pytorch"),
    "peft": ("peft", "peft"),
    "torchcodec": ("torchcodec", "torchcodec"),
    "lerobot": ("lerobot", "lerobot"),
}
CHECKOUTS = {
    "vjepa2": ("--vjepa2", "facebookresearch/vjepa2"),
    "jepa_wms": ("--jepa_wms", "facebookresearch/jepa-wms"),
}
PEERS = [*CHECKOUTS, *PACKAGES]


class Size(NamedTuple):
    """What is timed."""

    encoder: str
    crop_size: int
    steps: int
    batch_size: int
    pred_dim: int
    pred_depth: int
    pred_heads: int

    # (rows, tables, codes) that are quantised, and the width of a row in a table
    tables: list
    code_dim: int

    # LoRA's rank, clips of video, clips of a LeRobot data set
    rank: int
    clips: int
    robot_clips: int


# three tables of 12 codes are train_lam.py's; the other one is as large as those of pictures are
TABLES = [(64, 3, 12), (2048, 1, 1024)]
SIZES = {
    "tiny": Size("vit_tiny", 32, 4, 2, 48, 2, 2, [(8, 3, 4)], 16, 2, 1, 2),
    "small": Size("vit_tiny", 128, 8, 4, 384, 6, 6, TABLES, 128, 16, 8, 50),
    "released": Size("vit_large_16", 256, 8, 8, 1024, 24, 16, TABLES, 128, 16, 32, 100),
}

# mean of a block of 8 x 8 pixels: more than this of 255 is another picture
SAME_PICTURE = 6


def check(name, off, bound):
    """Say how far ours is from the peer's. Ends the program if that is more than rounding."""
    print(f"{name}: ours is off by {off:.1e}")
    # nan is not the same, either
    if not off <= bound:
        raise SystemExit(f"{name}: ours computes something else (at most {bound:.0e} is rounding)")


def row_of(peer, what, seconds):
    """A row from {"peer": seconds of a call, "ours": seconds}."""
    row = {"peer": peer, "what": what, "its ms": 1e3 * seconds["peer"]}
    return row | {"our ms": 1e3 * seconds["ours"], "its / ours": seconds["peer"] / seconds["ours"]}


# --- vjepa2 and jepa-wms ---


def size_options(predictor, frames, crop_size, encoder):
    """What both peers' predictors are built with, to be as large as ours."""
    width = predictor.predictor_embed.out_features
    return {
        "embed_dim": encoder.embed_dim,
        "predictor_embed_dim": width,
        "depth": len(predictor.predictor_blocks),
        "num_heads": width // predictor.head_dim,
        **shared_options(encoder, frames, crop_size),
    }


def vjepa2_predictor(predictor, *size):
    """Its action-conditioned predictor, with the weights of ours. size: of size_options."""
    from src.models.ac_predictor import vit_ac_predictor

    theirs = vit_ac_predictor(action_embed_dim=7, **size_options(predictor, *size))
    # a layer for camera poses, which it makes and does not use
    del theirs.extrinsics_encoder
    theirs.load_state_dict(predictor.state_dict())
    return theirs


def jepa_wms_predictor(predictor, *size):
    """The same of jepa-wms."""
    from src.models.ac_predictor import vit_ac_predictor

    inputs = {"action_dim": 7, "proprio_dim": 7, "proprio_encoder_inpred": True}
    theirs = vit_ac_predictor(**inputs, **size_options(predictor, *size))

    # it calls the state "proprio"
    weights = {}
    for name, weight in predictor.state_dict().items():
        weights[name.replace("state_encoder", "proprio_encoder")] = weight
    theirs.load_state_dict(weights)

    # it also returns what it makes of the condition tokens
    theirs.register_forward_hook(lambda module, inputs, outputs: outputs[0])
    return theirs


def vjepa2_step(features_of, predictor, batch, tokens, autocast):
    """A step of app/vjepa_droid/train.py. features_of: () -> the encoder's output (B, T*N, E);
    tokens: N, of a step."""
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-4)

    def ahead(z, steps):
        z = predictor(z, batch["actions"][:, :steps], batch["states"][:, :steps])
        return F.layer_norm(z, (z.size(-1),))

    def losses():
        with autocast():
            with torch.no_grad():
                h = features_of()
                h = F.layer_norm(h, (h.size(-1),))

            # on true steps, and on its own first prediction
            z_tf = ahead(h[:, :-tokens], batch["actions"].shape[1])
            first = z_tf[:, :tokens]
            second = ahead(torch.cat([h[:, :tokens], first], dim=1), 2)[:, -tokens:]
            z_ar = torch.cat([first, second], dim=1)
            jloss = (z_tf - h[:, tokens:]).abs().mean()
            return jloss, (z_ar - h[:, tokens : 3 * tokens]).abs().mean()

    # it reads both losses back in every step
    train = training_step(losses, optimizer)
    return lambda update=True: [float(x) for x in train(update)]


class Setting(NamedTuple):
    """What both are trained on: networks of ours with random weights, and a batch of noise."""

    encoder: torch.nn.Module
    predictor: Predictor
    batch: dict
    on_device: dict
    frames: tuple
    autocast: object


def a_setting(size, device, dtype):
    """The Setting of a size."""
    torch.manual_seed(0)
    encoder = build_encoder(size.encoder, size.crop_size, 2).to(device)
    side = size.crop_size // encoder.patch_size
    shape = {"pred_dim": size.pred_dim, "depth": size.pred_depth, "num_heads": size.pred_heads}
    predictor = Predictor(encoder.embed_dim, 7, 7, (side, side), **shape).to(device)

    B = size.batch_size
    T = size.steps
    frames = (B, 2 * T, 3, size.crop_size, size.crop_size)
    batch = {"video": torch.randint(256, frames, dtype=torch.uint8)}
    batch["actions"] = torch.randn(B, T - 1, 7)
    batch["states"] = torch.randn(B, T, 7)

    # features of both, made once by ours
    no_stats = {"mean": None, "std": None}
    z = make_features_of(encoder, "tubelet", 2, no_stats, device)(batch, normalize=False)[0]
    on_device = {name: batch[name].to(device) for name in ("actions", "states")}

    def autocast():
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype)

    return Setting(encoder, predictor, batch, on_device | {"z": z}, frames, autocast)


def step_row(peer, what, steps, networks, device, dtype, repeats, clock):
    """The row of a training step, once both have given the same. steps, networks: {"peer",
    "ours"}."""
    name = f"{peer}, a {what}"
    bound = 1e-4 if dtype == torch.float32 else 5e-2

    # losses and gradients of the first step
    wanted, gradients_of_peer = loss_and_gradients(steps["peer"], networks["peer"])

    # jepa-wms calls the state "proprio"
    wanted_gradients = {}
    for weight, gradient in gradients_of_peer.items():
        wanted_gradients[weight.replace("proprio_", "state_")] = gradient
    losses, gradients = loss_and_gradients(steps["ours"], networks["ours"])
    check(f"{name}, losses", losses_off(losses, wanted), bound)
    check(f"{name}, gradients", gradients_off(gradients, wanted_gradients), bound)

    # time, and whether both have learned the same by then
    seconds = bench.medians(steps, device, repeats, clock=clock)
    last = {which: step(update=False) for which, step in steps.items()}
    off = losses_off(last["ours"], last["peer"])
    check(f"{name}, losses after all steps", off, 100 * bound)
    return row_of(peer, what, seconds)


def vjepa2_rows(size, device, dtype, repeats, clock, is_compiled):
    """Rows of a step on features and of one on pixels."""
    setting = a_setting(size, device, dtype)
    encoder = setting.encoder
    side = size.crop_size // encoder.patch_size
    B, frames = setting.frames[:2]
    picture = setting.frames[2:]

    # the same clips for its encoder: pairs of frames, as its loader normalises them
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    pairs = (setting.batch["video"].float() / 255 - mean) / std
    pairs = pairs.view(B * size.steps, 2, *picture).transpose(1, 2).to(device)
    their_encoder = encoder_of_reference(encoder, 2, size.crop_size).to(device)

    def encoded():
        return their_encoder(pairs).reshape(B, size.steps * side**2, -1)

    z = setting.on_device["z"].flatten(1, 2)
    ways = {
        "step on features": (None, setting.on_device, lambda: z),
        "step on pixels": (encoder, setting.batch, encoded),
    }
    rows = []
    for what, (our_encoder, our_batch, features_of) in ways.items():
        theirs = vjepa2_predictor(setting.predictor, frames, size.crop_size, encoder).to(device)
        ours = copy.deepcopy(setting.predictor)
        autocast = setting.autocast
        steps = {
            "peer": vjepa2_step(features_of, theirs, setting.on_device, side**2, autocast),
            "ours": our_step(our_encoder, ours, our_batch, autocast, dtype, is_compiled),
        }
        networks = {"peer": theirs, "ours": ours}
        rows.append(step_row("vjepa2", what, steps, networks, device, dtype, repeats, clock))
    return rows


def jepa_wms_rows(size, device, dtype, repeats, clock, is_compiled):
    """The row of a step on features."""
    setting = a_setting(size, device, dtype)
    encoder = setting.encoder
    side = size.crop_size // encoder.patch_size
    frames = setting.frames[1]
    theirs = jepa_wms_predictor(setting.predictor, frames, size.crop_size, encoder).to(device)
    ours = copy.deepcopy(setting.predictor)

    z = setting.on_device["z"].flatten(1, 2)
    autocast = setting.autocast
    steps = {
        "peer": vjepa2_step(lambda: z, theirs, setting.on_device, side**2, autocast),
        "ours": our_step(None, ours, setting.on_device, autocast, dtype, is_compiled),
    }
    networks = {"peer": theirs, "ours": ours}
    what = "step on features"
    return [step_row("jepa_wms", what, steps, networks, device, dtype, repeats, clock)]


def losses_off(losses, wanted):
    """The largest difference of two pairs of losses, as a share."""
    return float(np.max([abs(float(a) / float(b) - 1) for a, b in zip(losses, wanted)]))


# --- vector-quantize-pytorch ---


def quantizers(rows, slots, K, dim, device):
    """({"peer", "ours"}: functions of z (1, rows, slots*dim) that make a step and return z_q,
    indices and loss, {"peer", "ours"}: their tables (slots, K, dim))."""
    from vector_quantize_pytorch import VectorQuantize

    # both with a moving average of 0.99, and with nothing that draws codes again
    ours = VectorQuantizer(slots, K, dim, kmeans=False, revive=False, warmup=0).to(device)
    theirs = VectorQuantize(
        slots * dim,
        K,
        codebook_dim=dim,
        heads=slots,
        separate_codebook_per_head=True,
        decay=0.99,
        rotation_trick=False,
    ).to(device)

    # the same tables, and sums that fit to them
    table = torch.randn(slots, K, dim, device=device)
    ours.codebook.data.copy_(table)
    ours.sums.copy_(table)
    codes = theirs._codebook
    codes.embed.copy_(table)
    codes.embed_avg.copy_(table)

    def step_of_peer(z):
        z_q, indices, loss = theirs(z)
        (z_q.square().mean() + loss.sum()).backward()
        return z_q, indices

    def step_of_ours(z):
        z_q, indices, _, commitment = ours(z.view(1, rows, slots, dim))
        (z_q.square().mean() + commitment).backward()
        ours.update()
        return z_q.flatten(2), indices

    steps = {"peer": step_of_peer, "ours": step_of_ours}
    return steps, {"peer": codes.embed, "ours": ours.codebook}


def vq_rows(size, device, repeats, clock):
    """Rows of a step of vector quantisation."""
    rows = []
    for count, slots, K in size.tables:
        torch.manual_seed(0)
        steps, tables = quantizers(count, slots, K, size.code_dim, device)
        z = torch.randn(1, count, slots * size.code_dim, device=device)

        # one step of both: codes, what goes on, the gradient, and the tables afterwards
        results = {}
        for which, step in steps.items():
            own = z.clone().requires_grad_()
            z_q, indices = step(own)
            results[which] = (z_q.detach(), own.grad, tables[which].detach().clone())
            results[which] += (indices.view(1, count, slots).float(),)
        pairs = list(zip(results["ours"], results["peer"]))
        off = float(np.max([((a - b).norm() / b.norm()).item() for a, b in pairs]))
        what = f"{slots} x {K} codes, {count} rows"
        check(f"vq, {what}", off, 1e-4)

        leaf = z.clone().requires_grad_()
        calls = {which: functools.partial(step, leaf) for which, step in steps.items()}
        seconds = bench.medians(calls, device, 10 * repeats, clock=clock)
        rows.append(row_of("vq", what, seconds))
    return rows


# --- PEFT ---


def peft_rows(size, device, dtype, repeats, clock):
    """Rows of a forward and backward pass with adapters."""
    from bench import lora

    # random features: what is compared does not depend on them
    torch.manual_seed(0)
    side = size.crop_size // 16
    shape = {"pred_dim": size.pred_dim, "depth": size.pred_depth, "num_heads": size.pred_heads}
    base = Predictor(192, 7, 7, (side, side), **shape).to(device)
    B = size.batch_size
    T = size.steps
    shapes = ((B, T, side**2, 192), (B, T - 1, 7), (B, T, 7))
    inputs = [torch.randn(*shape, device=device) for shape in shapes]

    # its rows are one for PEFT and one for ours, of each form of adapter
    measured = lora.peft_rows(base, inputs, size.rank, 0.05, dtype, repeats, clock)
    rows = []
    for theirs, ours in zip(measured[::2], measured[1::2]):
        seconds = {"peer": theirs["ms"] / 1e3, "ours": ours["ms"] / 1e3}
        rows.append(row_of("peft", f"LoRA, {theirs['adapters']}", seconds))
    return rows


# --- torchcodec ---


def index_of(path):
    """What torchcodec wants to know of each frame of an mp4, so that it need not scan the file."""
    frames = []
    with open_video(path) as container:
        for packet in container.demux(video=0):
            if packet.size:
                key_frame = int(packet.is_keyframe)
                frame = {"pts": packet.pts, "duration": packet.duration, "key_frame": key_frame}
                frames.append(frame)
    frames.sort(key=lambda frame: frame["pts"])
    return json.dumps({"frames": frames})


def torchcodec_rows(size, clock):
    """Rows of reading clips of a minute that pans, or of a few seconds, by key frames."""
    if size.clips == 1:
        return clip_rows(60, 5, size.clips, clock)
    return clip_rows(60, 60, size.clips, clock) + clip_rows(250, 60, size.clips, clock)


def clip_rows(gop, seconds, count, clock):
    """Two rows of reading `count` clips of a video of so many seconds with a key frame every `gop`
    frames."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    path = os.path.join(bench.data.SCRATCH, f"clip-{gop}.mp4")
    bench.data.write_video(path, 20 * seconds, (640, 360), gop, np.random.default_rng(0))
    with open(path, "rb") as f:
        times = mp4_times(f)
    index = index_of(path)
    options = {"num_ffmpeg_threads": 1, "dimension_order": "NHWC"}

    # clips at random places, every fourth of 20 frames a second
    starts = np.random.default_rng(1).integers(len(times) - 60, size=count)
    clips = [(start + 4 * np.arange(16)).tolist() for start in starts]

    def by_ours(numbers, short_side=256):
        with open(path, "rb") as f:
            return read_frames(f, times, numbers, short_side)

    # as its guide says, without a scan of the whole file: ours has the index from a cache
    def by_peer(numbers):
        resized = {"seek_mode": "approximate", "transforms": [Resize((256, 455))]}
        return VideoDecoder(path, **options, **resized).get_frames_at(numbers).data.numpy()

    # as our reader would have to use it: exact frames, out of an open file
    def whole_frames(numbers):
        with open(path, "rb") as f:
            decoder = VideoDecoder(f, custom_frame_mappings=index, **options)
            return decoder.get_frames_at(numbers).data.numpy()

    def by_index(numbers):
        pictures = []
        for picture in whole_frames(numbers):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            pictures.append(upright(frame, 256, np.eye(2)))
        return np.stack(pictures)

    # decoded frames are the same; resized ones are alike
    for clip in clips:
        off = np.abs(by_ours(clip, 360).astype(np.int16) - whole_frames(clip)).max()
        check("torchcodec, whole frames", off, 1)
        for name, read in (("frames", by_peer), ("frames by our index", by_index)):
            off = largest_difference(by_ours(clip), read(clip))
            check(f"torchcodec, {name} (of 255)", off, SAME_PICTURE)
    off = np.abs(by_ours(clips[0]).astype(np.int16) - by_index(clips[0]))
    print(f"torchcodec, the first clip: pixels differ by {off.mean():.1f}, at most {off.max()}")

    def all_clips(read):
        for clip in clips:
            read(clip)

    calls = {"peer": by_peer, "by our index": by_index, "ours": by_ours}
    calls = {which: functools.partial(all_clips, read) for which, read in calls.items()}
    taken = bench.medians(calls, torch.device("cpu"), 3, 1, clock)
    of_clip = {which: s / len(clips) for which, s in taken.items()}

    # a row a way
    what = f"a clip, key frames every {gop}"
    as_we_would = {"peer": of_clip["by our index"], "ours": of_clip["ours"]}
    return [
        row_of("torchcodec", what, of_clip),
        row_of("torchcodec", f"{what}, by our index, our resize", as_we_would),
    ]


# --- lerobot ---


def lerobot_rows(size):
    """A row of reading clips of two cameras, in CPU seconds; none without lerobot's loader."""
    from bench import lerobot

    root = os.path.join(bench.data.SCRATCH, "lerobot")
    lerobot.make_set(root, 4, 100)
    of_reader = {row["reader"]: row for row in lerobot.clip_rows(root, 4, 100, size.robot_clips)}

    # the package may lack what its loader imports, and then a line has said so
    if "lerobot" not in of_reader:
        return []
    if of_reader["lerobot"]["clips that differ"]:
        raise SystemExit("lerobot: ours reads other clips")
    seconds = {"peer": 1 / of_reader["lerobot"]["clips/CPU-s"]}
    seconds["ours"] = 1 / of_reader["ours"]["clips/CPU-s"]
    return [row_of("lerobot", "a clip, CPU seconds", seconds)]


def is_there(peer, folders):
    """Whether a peer can be timed. If not, a line says what is missing. folders: {peer: folder of
    its checkout, or None}."""
    if peer in CHECKOUTS:
        flag, repository = CHECKOUTS[peer]
        if not folders[peer]:
            print(f"{peer}: left out, name a checkout of {repository} with {flag}")
        return bool(folders[peer])
    package, module = PACKAGES[peer]
    if not importlib.util.find_spec(module):
        print(f"{peer}: left out, pip install {package}")
        return False

    # a package may be there without the libraries that it loads
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as e:
        reason = str(e).strip().partition("\n")[0]
        print(f"{peer}: left out, {package} cannot be imported ({reason})")
        return False
    return True


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--vjepa2", help="folder of a checkout of facebookresearch/vjepa2")
    flag("--jepa_wms", help="folder of a checkout of facebookresearch/jepa-wms")
    flag("--only", nargs="+", default=PEERS, choices=PEERS, help="peers to time (default: all)")
    flag("--size", default="small", choices=SIZES, help="of what is timed (default small)")
    dtype_help = "autocast of networks, both of ours and theirs (default float32)"
    flag("--dtype", default="float32", choices=["float32", "bfloat16"], help=dtype_help)
    flag("--compile", action="store_true", help="compile our training step")
    flag("--repeats", type=int, default=10, help="steps timed of each (default 10)")
    clock_help = (
        "count CPU seconds of this process, all its threads together: for a CPU that others use"
    )
    flag("--cpu_seconds", action="store_true", help=clock_help)
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    folders = {"vjepa2": args.vjepa2, "jepa_wms": args.jepa_wms}
    for peer, folder in folders.items():
        if folder:
            open_checkout(folder, parser, *CHECKOUTS[peer])

    # --- one peer after the other ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    size = SIZES[args.size]
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    of_step = (size, device, dtype, args.repeats, clock, args.compile)
    measure = {
        "vjepa2": lambda: vjepa2_rows(*of_step),
        "jepa_wms": lambda: jepa_wms_rows(*of_step),
        "vq": lambda: vq_rows(size, device, args.repeats, clock),
        "peft": lambda: peft_rows(size, device, dtype, args.repeats, clock),
        "torchcodec": lambda: torchcodec_rows(size, clock),
        "lerobot": lambda: lerobot_rows(size),
    }
    rows = []
    for peer in args.only:
        if not is_there(peer, folders):
            continue
        # the last checkout that was opened is the one that is imported
        if peer in CHECKOUTS:
            open_checkout(folders[peer], parser, *CHECKOUTS[peer])
        rows += measure[peer]()
    if not rows:
        sys.exit("no peer is there: nothing was timed")

    # --- the table ---
    bench.report(rows, args.json, device)
