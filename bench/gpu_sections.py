"""What bench.gpu measures: a function for each section, which gives its rows one after the other.

A row is a dict of what was measured; what cannot run on this device gives a row with "error"."""

import contextlib
import functools
import itertools
import os
import subprocess
import tempfile
import time
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
from bench.kernels import apart, attend, flex_attend, forward_backward, relative_error
from bench.plan import plan, problem_of
from bench.step import useful_flops
from evaluation.memory import estimate, fullest_moment
from evaluation.search import energy
from kernels import ATTENTION, attention_impl
from kernels.flops import peak_of
from kernels.reference import attention_dense, moments_two_pass, rope_plain
from model import (
    ACModel,
    LatentActionModel,
    Predictor,
    add_lora,
    encode_steps,
    rope_tables,
    size_of,
)
from weights import build_encoder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# what a kernel, a shape or a compiler that does not fit raises
UNFIT = (RuntimeError, ValueError, TypeError, ImportError)


class Sizes(NamedTuple):
    """How large everything is that is measured."""

    repeats: int
    with_compiler: bool

    # of the large matmul and the large copy: see bench.ceilings
    ceilings: tuple | None

    # attention: clips, heads, tokens of a step, steps, dims of a head
    attention: tuple
    attention_steps: tuple
    head_dims: tuple

    # shapes that are checked: clips and heads, dims of a head, (steps, tokens of a step)
    checked_heads: tuple
    checked_dims: tuple
    checked: tuple
    moments: tuple

    # training: clips, patches along a side, {features: their width}, (width, depth, heads)
    batch: int
    grid: int
    features: dict
    predictors: tuple
    encoders: tuple

    # windows of latents: (B, T, C, H, W), and options of the model
    latents: tuple
    lam: dict

    # planning and loading
    samples: int
    horizons: tuple
    seconds_of_play: int
    workers: tuple


FULL = Sizes(
    repeats=10,
    with_compiler=True,
    ceilings=None,
    attention=(8, 16, 258),
    attention_steps=(8, 16),
    head_dims=(64, 80, 88),
    checked_heads=(2, 2),
    checked_dims=(32, 48, 64, 80, 88, 96, 112, 128, 256),
    checked=((2, 70), (7, 37), (8, 258)),
    moments=((16384, 1408), (100_003, 14)),
    batch=8,
    grid=16,
    features={"ViT-L": 1024, "ViT-g": 1408},
    predictors=((1024, 24, 16), (1408, 24, 16)),
    encoders=("vit_large_16", "vit_giant_xformers"),
    latents=(32, 8, 16, 64, 64),
    lam={},
    samples=256,
    horizons=(1, 2),
    seconds_of_play=20,
    workers=(1, 2, 4, 8),
)

# the same on a CPU in seconds: to see that everything runs, not how fast
TINY = Sizes(
    repeats=1,
    with_compiler=False,
    ceilings=(256, 2**20),
    attention=(1, 1, 9),
    attention_steps=(2,),
    head_dims=(88,),
    checked_heads=(1, 1),
    checked_dims=(32,),
    checked=((3, 9),),
    moments=((1000, 14),),
    batch=1,
    grid=2,
    features={"tiny": 48},
    predictors=((48, 1, 2),),
    encoders=("vit_tiny",),
    latents=(2, 3, 4, 8, 8),
    lam={"embed_dim": 32, "num_heads": 2, "codebook_dim": 8, "patch_dim": 16},
    samples=4,
    horizons=(1,),
    seconds_of_play=3,
    workers=(0,),
)


def compute_dtype(device):
    """What is trained and timed in: bf16, and fp32 where that is slower (CPUs)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast_of(device):
    """A function that gives the context of mixed precision."""
    if device.type == "cpu":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, compute_dtype(device))


def modes_of(sizes):
    """Eager, and compiled where that is wanted."""
    return ("eager", "compiled") if sizes.with_compiler else ("eager",)


def name_of(dtype):
    """As rows show it: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def reason(error):
    """The first line of an error, shortened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


# --- facts: the device, and what its matmuls and copies reach ---


def facts(sizes, device):
    """What the device is, then a row for each dtype: its matmuls and copies now."""
    peak = peak_of(device)
    row = bench.machine(device)
    row |= {"CPUs": os.cpu_count(), "CUDA": str(torch.version.cuda)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row["memory GB"] = properties.total_memory / 1e9
        row["multiprocessors"] = properties.multi_processor_count
        row["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        row["cuDNN"] = torch.backends.cudnn.version()
        row["peak assumed, TFLOP/s"] = (peak or 0) / 1e12
        row |= nvidia_smi()
    yield row

    # most CPUs compute 16 bits far slower than fp32: nobody trains in them there
    dtypes = DTYPES if device.type == "cuda" else DTYPES[:1]
    for dtype in dtypes:
        flops, bandwidth = bench.ceilings(device, dtype, sizes.ceilings)
        yield {
            "dtype": name_of(dtype),
            "matmul TFLOP/s": flops / 1e12,
            "of the data sheet": flops / peak if peak else "",
            "copy GB/s": bandwidth / 1e9,
        }


def nvidia_smi():
    """{"driver", "power limit", "clock"}, as nvidia-smi prints them; {} without it."""
    names = {"driver": "driver_version", "power limit": "power.limit", "clock": "clocks.max.sm"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip(names, values))


# --- checks: is what the kernels compute right? ---


def attention_results(function, qkv, grad, block):
    """[output, gradients of q, k, v] in float64."""
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = function(*inputs, block)
    gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return [x.detach().double() for x in (out, *gradients)]


def worst_error(results, exact):
    return max(relative_error(x, wanted) for x, wanted in zip(results, exact))


def attention_bound(dtype, plain, exact):
    """Largest relative error that is allowed: that of sums in fp32, or twice what PyTorch's own
    attention has in these 16 bits. The interpreter cuts off where a GPU rounds."""
    if dtype == torch.float32:
        return 1e-6
    floor = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    return floor if plain is None else 2 * worst_error(plain, exact)


def check_attention(sizes, device):
    """A row for each row of the tile table that runs on this device, and each dtype."""
    from kernels.attention import attention_triton, tile_key

    B, nh = sizes.checked_heads
    for hd, dtype, (T, block) in itertools.product(sizes.checked_dims, DTYPES, sizes.checked):
        # q, k and v, strided as a fused projection leaves them
        L = T * block
        qkv = torch.randn(B, L, 3, nh, hd, device=device).to(dtype)
        qkv = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        grad = torch.randn(B, nh, L, hd, device=device).to(dtype)

        # the specification in float64, and what PyTorch makes of the same 16 bits
        exact = attention_results(attention_dense, [x.double() for x in qkv], grad, block)
        plain = None
        if device.type == "cuda" and dtype != torch.float32:
            plain = attention_results(ATTENTION["prefix"], qkv, grad, block)

        # twice, because the same input must give the same bits
        results = attention_results(attention_triton, qkv, grad, block)
        again = attention_results(attention_triton, qkv, grad, block)
        is_repeated = all(torch.equal(a, b) for a, b in zip(results, again))

        # the case names its row of the tile table
        kind, width = tile_key(device, dtype, hd, L, block)
        error = worst_error(results, exact)
        bound = attention_bound(dtype, plain, exact)
        yield {
            "check": "attention",
            "dtype": name_of(dtype),
            "case": f"hd {hd}, {T} x {block}, tiles {kind} {width}",
            "error": error,
            "bound": bound,
            "ok": error <= bound and is_repeated,
        }


def check_moments(sizes, device):
    """A row for each dtype, shape and order in memory."""
    from kernels.stats import moments_triton

    # sums are in float64 whatever the matrix is in
    bound = 1e-11
    for dtype, (n, d) in itertools.product((*DTYPES, torch.float64), sizes.moments):
        x = (100 + torch.randn(n, d, device=device)).to(dtype)
        _, exact_mean, exact_squares = moments_two_pass(x.double().cpu())
        orders = {"": x, ", by columns": x.T.contiguous().T}
        for order, matrix in orders.items():
            _, mean, squares = moments_triton(matrix)
            mean_error = relative_error(mean.cpu(), exact_mean)
            error = max(relative_error(squares.cpu(), exact_squares), mean_error)
            yield {
                "check": "moments",
                "dtype": name_of(dtype),
                "case": f"{n} x {d}{order}",
                "error": error,
                "bound": bound,
                "ok": error <= bound,
            }


def rope_results(function, qkv, grads, cos, sin):
    """[rotated q, k, and v, gradient of qkv] in float64."""
    x = qkv.detach().requires_grad_()
    out = apart(function)(x, cos, sin)
    gradient = torch.autograd.grad(out, x, [g.to(x.dtype) for g in grads])
    return [y.detach().double() for y in (*out, *gradient)]


def check_rope(sizes, device):
    """A row for each dtype and size of a head."""
    from kernels.rope import rope_triton

    # two steps: more would be the same code on more rows
    B, nh, block = tuple(sizes.attention)
    L = 2 * block
    for dtype, hd in itertools.product(DTYPES, (*sizes.head_dims, 128)):
        # time, row and column of each token
        positions = torch.randint(16, (L, 3), device=device).float()
        cos, sin = rope_tables(positions, hd)
        qkv = torch.randn(B, L, 3, nh, hd, device=device).to(dtype)
        grads = [torch.randn(B, nh, L, hd, device=device).to(dtype) for _ in range(3)]

        # 16 bits differ by the rounding of what is returned
        exact = rope_results(rope_plain, qkv.double(), grads, cos.double(), sin.double())
        results = rope_results(rope_triton, qkv, grads, cos, sin)
        error = worst_error(results, exact)
        bound = 1e-6 if dtype == torch.float32 else 5e-3
        yield {
            "check": "rope",
            "dtype": name_of(dtype),
            "case": f"hd {hd}",
            "error": error,
            "bound": bound,
            "ok": error <= bound,
        }


def checks(sizes, device):
    """Attention, moments and RoPE in Triton, forward and backward, against float64."""
    # there is no Triton for every system, and the other sections need none
    if "triton" not in ATTENTION:
        yield {"error": "Triton is not installed: pip install triton"}
        return
    for check in (check_attention, check_moments, check_rope):
        yield from check(sizes, device)


# --- attention: against everything else that computes it ---


def with_backend(function, backend):
    """The same function, with PyTorch's attention held to one backend."""

    def held(qkv):
        with sdpa_kernel(backend):
            return function(qkv)

    return held


def attention_functions(device, block):
    """{name: function of (q, k, v)}: ours, and PyTorch's with a dense mask or a call a step."""
    # on a CPU Triton has its interpreter only, whose time says nothing
    functions = {}
    for name in ATTENTION:
        if name != "triton" or device.type == "cuda":
            functions[name] = functools.partial(attend, block=block, impl=name)
    if device.type != "cuda":
        return functions

    # by itself PyTorch picks one of these. Flash takes no mask; the others do
    prefix = functions["prefix"]
    dense = functions["reference"]
    functions["prefix, Flash"] = with_backend(prefix, SDPBackend.FLASH_ATTENTION)
    functions["prefix, cuDNN"] = with_backend(prefix, SDPBackend.CUDNN_ATTENTION)
    functions["dense, cuDNN"] = with_backend(dense, SDPBackend.CUDNN_ATTENTION)
    functions["dense, efficient"] = with_backend(dense, SDPBackend.EFFICIENT_ATTENTION)
    return functions


def attention_case(sizes, device, T, hd, functions, matmul_flops):
    """Rows of these functions on one shape. functions: {name: function}."""
    # q, k and v, strided as a fused projection leaves them
    B, nh, block = tuple(sizes.attention)
    L = T * block
    dtype = compute_dtype(device)
    qkv = torch.randn(B, L, 3, nh, hd, device=device).to(dtype)
    qkv = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    trained = [x.detach().requires_grad_() for x in qkv]
    grad = torch.randn(B, nh, L, hd, device=device).to(dtype)
    shape = {"T": T, "hd": hd}
    chosen = attention_impl(device, dtype, hd, block, L)
    exact = attend(qkv, block, "reference").double()

    # what does not run, or computes something else, gives a row that says so
    forward = {}
    both = {}
    for name, function in functions.items():
        try:
            off = relative_error(function(qkv), exact)
            forward_backward(function, trained, grad)
        except UNFIT as e:
            yield shape | {"impl": name, "error": reason(e)}
            continue
        if off > 2e-2:
            yield shape | {"impl": name, "error": f"off by {off:.1e}"}
            continue
        forward[name] = functools.partial(function, qkv)
        both[name] = functools.partial(forward_backward, function, trained, grad)
    if not forward:
        return

    # forward, then forward and backward
    forward_seconds = bench.medians(forward, device, sizes.repeats)
    both_seconds = bench.medians(both, device, sizes.repeats)

    # a step sees itself and all before it: T (T + 1) / 2 blocks of scores
    scores = B * nh * block**2 * T * (T + 1) / 2
    useful = 4 * hd * scores
    for name, seconds in forward_seconds.items():
        # on tiny sizes the noise is larger than the backward pass
        total = both_seconds[name]
        backward = max(total - seconds, 1e-9)
        row = {
            "impl": name,
            "auto": name == chosen,
            "fwd ms": 1e3 * seconds,
            "fwd TFLOP/s": useful / seconds / 1e12,
            "fwd of matmul": useful / seconds / matmul_flops,
            "fwd+bwd ms": 1e3 * total,
            "bwd TFLOP/s": 2.5 * useful / backward / 1e12,
            "bwd of matmul": 2.5 * useful / backward / matmul_flops,
        }
        yield shape | row | bench.peak_memory(both[name], device)


def attention(sizes, device):
    """Useful FLOPs are of the scores that the mask lets through: 4 hd for each forward, 2.5 times
    that backward. Shares are of a large matmul in this run."""
    matmul_flops, _ = bench.ceilings(device, compute_dtype(device), sizes.ceilings)
    block = sizes.attention[2]
    shapes = list(itertools.product(sizes.attention_steps, sizes.head_dims))
    functions = attention_functions(device, block)
    for T, hd in shapes:
        yield from attention_case(sizes, device, T, hd, functions, matmul_flops)

    # FlexAttention is compiled for each shape, which takes longest: it comes last
    if not sizes.with_compiler:
        yield {"impl": "flex", "error": "needs a compiler and has no backward on a CPU"}
        return
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    for T, hd in shapes:
        functions = {"flex": flex_attend(flex, block, T * block, device)}
        yield from attention_case(sizes, device, T, hd, functions, matmul_flops)


# --- steps of training ---


class TrainingStep:
    """A model, its optimizer and a step on given inputs, as the training scripts make it.
    loss_of(model, inputs) gives the loss."""

    def __init__(self, model, inputs, loss_of, device, is_compiled):
        self.model = model
        self.inputs = inputs
        self.loss_of = loss_of
        self.autocast = autocast_of(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        if is_compiled:
            model.compile(dynamic=False)

    def __call__(self):
        with self.autocast():
            loss = self.loss_of(self.model, self.inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def ac_loss(model, inputs):
    return sum(model(*inputs))


def lam_loss(model, inputs):
    return model(*inputs)["loss"]


def timed_step(build, device, repeats):
    """(seconds, MiB at the peak, weights and optimizer included) of the step that build() makes."""
    # what earlier steps left behind is not this one's
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = build()

    # the optimizer's moments come with the first step
    step()
    step()
    peak = ""
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds = bench.medians({"step": step}, device, repeats)["step"]
    return seconds, peak


def batch_of(sizes, width, device):
    """Features, actions and states of a batch of noise."""
    B = sizes.batch
    z = torch.randn(B, 8, sizes.grid**2, width, device=device)
    actions = torch.randn(B, 7, 13, device=device)
    states = torch.randn(B, 8, 2, device=device)
    return z, actions, states


def predictor_of(sizes, width, shape, device):
    """A predictor of (width, depth, heads) on features of this width."""
    size = dict(zip(("pred_dim", "depth", "num_heads"), shape))
    with torch.device(device):
        return Predictor(width, 13, 2, (sizes.grid, sizes.grid), **size)


def build_step(sizes, device, width, predictor, is_compiled, lora, checkpointing=False):
    """A TrainingStep of a predictor. lora: options of add_lora, or None."""
    torch.manual_seed(0)
    module = predictor_of(sizes, width, predictor, device)
    if lora:
        add_lora(module, **lora)
    module.activation_checkpointing = checkpointing
    inputs = batch_of(sizes, width, device)
    return TrainingStep(ACModel(module), inputs, ac_loss, device, is_compiled)


def predicted_mib(sizes, device, width, predictor, lora, checkpointing=False):
    """MiB at the fullest moment of such a step, as train_lora.py --memory_report foretells it."""
    module = predictor_of(sizes, width, predictor, "meta")
    parts = estimate(
        encoder_bytes=0,
        embed_dim=width,
        grid=sizes.grid,
        size=size_of(module),
        options=lora,
        batch_size=sizes.batch,
        steps=8,
        dtype=compute_dtype(device),
        action_dim=13,
        state_dim=2,
    )
    return fullest_moment(parts, checkpointing, False, device) / 2**20


def predictor_flops(sizes, width, predictor):
    """Useful FLOPs of a training step of the predictor alone."""
    # any encoder will do: what it costs is left out
    module = predictor_of(sizes, width, predictor, "meta")
    with torch.device("meta"):
        encoder = build_encoder("vit_tiny")
    _, flops = useful_flops(encoder, module, sizes.batch, 8)
    return flops


def text_of(predictor):
    """(width, depth, heads) as rows show it."""
    width, depth, heads = tuple(predictor)
    return f"{width}x{depth}, {heads} heads"


def speed_of(useful, seconds, device, matmul_flops):
    """Columns of a row: useful TFLOP/s, their share of the data sheet (MFU) and of a matmul."""
    peak = peak_of(device)
    return {
        "useful TFLOP/s": useful / seconds / 1e12,
        "MFU": useful / seconds / peak if peak else "",
        "of matmul": useful / seconds / matmul_flops,
    }


def step(sizes, device):
    """Training steps of the predictor on saved features."""
    matmul_flops, _ = bench.ceilings(device, compute_dtype(device), sizes.ceilings)
    cases = []
    for mode in modes_of(sizes):
        for name, predictor in itertools.product(sizes.features, sizes.predictors):
            cases.append((mode, name, predictor, False))

    # one of them recomputed in the backward pass: second, so that it is there if time runs out
    cases.insert(1, ("eager", next(iter(sizes.features)), sizes.predictors[0], True))
    for mode, name, predictor, checkpointing in cases:
        width = sizes.features[name]
        is_compiled = mode == "compiled"
        build = functools.partial(
            build_step, sizes, device, width, predictor, is_compiled, None, checkpointing
        )
        row = {"features": name, "predictor": text_of(predictor), "mode": mode}
        row["checkpointing"] = checkpointing

        # the largest need not fit into the memory of this device
        try:
            seconds, peak = timed_step(build, device, sizes.repeats)
        except UNFIT as e:
            yield row | {"error": reason(e)}
            continue
        row |= {"ms": 1e3 * seconds, "clips/s": sizes.batch / seconds}
        useful = predictor_flops(sizes, width, predictor)
        row |= speed_of(useful, seconds, device, matmul_flops)
        row["peak MiB"] = peak
        row["estimated MiB"] = predicted_mib(sizes, device, width, predictor, None, checkpointing)
        yield row


def lora(sizes, device):
    """A step of adapters of rank 16 on all layers of the predictor."""
    options = {"r": 16, "alpha": 32, "dropout": 0.05}
    name = list(sizes.features)[-1]
    width = sizes.features[name]
    predictor = sizes.predictors[0]
    for mode in modes_of(sizes):
        is_compiled = mode == "compiled"
        build = functools.partial(build_step, sizes, device, width, predictor, is_compiled, options)
        seconds, peak = timed_step(build, device, sizes.repeats)
        yield {
            "features": name,
            "predictor": text_of(predictor),
            "mode": mode,
            "ms": 1e3 * seconds,
            "clips/s": sizes.batch / seconds,
            "peak MiB": peak,
            "estimated MiB": predicted_mib(sizes, device, width, predictor, options),
        }


def lam(sizes, device):
    """A step of the latent action model. It quantises from the start."""
    B, T, C = tuple(sizes.latents[:3])
    size = sizes.latents[3:]
    z = torch.randn(sizes.latents, device=device)
    shift = torch.randint(-1, 2, (B, T - 1, 2), device=device)

    # without a warm-up and k-means: the first step does what all others do
    def build(is_compiled):
        torch.manual_seed(0)
        with torch.device(device):
            model = LatentActionModel(C, size, vq_warmup_steps=0, kmeans=False, **sizes.lam)
        return TrainingStep(model, (z, shift), lam_loss, device, is_compiled)

    for mode in modes_of(sizes):
        make = functools.partial(build, mode == "compiled")
        seconds, peak = timed_step(make, device, sizes.repeats)
        yield {
            "latents": "x".join(map(str, sizes.latents)),
            "mode": mode,
            "ms": 1e3 * seconds,
            "windows/s": B / seconds,
            "peak MiB": peak,
        }


# --- encoder, planning, loading ---


def encoder(sizes, device):
    """Frozen encoders: clips of 8 steps a second."""
    dtype = compute_dtype(device)
    matmul_flops, _ = bench.ceilings(device, dtype, sizes.ceilings)
    pixels = 16 * sizes.grid
    frames = 16
    shape = (sizes.batch, frames, 3, pixels, pixels)
    video = torch.randint(256, shape, dtype=torch.uint8, device=device)
    for mode, name in itertools.product(modes_of(sizes), sizes.encoders):
        with torch.device(device):
            module = build_encoder(name).to(dtype)

        # any predictor will do: what it costs is left out
        predictor = predictor_of(sizes, module.embed_dim, (64, 1, 1), "meta")
        useful, _ = useful_flops(module, predictor, sizes.batch, 8)
        if mode == "compiled":
            module.compile(dynamic=False)

        # a frozen encoder keeps nothing for a backward pass
        encode = functools.partial(encode_steps, module, video, "tubelet", 2)
        with torch.inference_mode():
            seconds = bench.medians({name: encode}, device, sizes.repeats)[name]
            memory = bench.peak_memory(encode, device)
        row = {
            "encoder": name,
            "mode": mode,
            "ms": 1e3 * seconds,
            "clips/s": sizes.batch / seconds,
            "frames/s": frames * sizes.batch / seconds,
        }
        yield row | speed_of(useful, seconds, device, matmul_flops) | memory


def planning(sizes, device):
    """Candidates a second of one iteration of CEM, from one step of the past."""
    width, depth, _ = tuple(sizes.predictors[0])
    problem = problem_of(width, depth, sizes.grid, 1, device)
    cost_of = functools.partial(energy, autocast=autocast_of(device))

    # an iteration takes long, so it is timed less often than a step
    repeats = max(sizes.repeats // 3, 1)
    for horizon in sizes.horizons:
        call = functools.partial(plan, cost_of, problem, horizon, sizes.samples, 1, device)
        seconds = bench.medians({"plan": call}, device, repeats, warmup=1)["plan"]
        yield {
            "predictor": f"{width}x{depth}",
            "tokens of a step": sizes.grid**2,
            "horizon": horizon,
            "samples": sizes.samples,
            "candidates/s": sizes.samples / seconds,
        }


def loader(sizes, device):
    """Clips of video that loader processes give, with nothing that takes them."""
    # these need a cache of their own, which bench.gpu has named
    from bench.data import make_recording
    from data import open_records, vpt_loader
    from files.vpt import ClipReader

    with tempfile.TemporaryDirectory(prefix="nanojepa-bench-") as folder:
        # a recording as large as the contractors'
        path = os.path.join(folder, "play.tar")
        make_recording(path, 20 * sizes.seconds_of_play, (640, 360), 60)
        records, _ = open_records(path)
        for workers in sizes.workers:
            if workers > os.cpu_count():
                continue

            # without workers this process reads, which makes one as well
            processes = max(workers, 1)
            batches = 4 * processes
            reader = ClipReader(crop_size=16 * sizes.grid, fps=20)
            loader_of_clips = vpt_loader(
                (records, [1.0]),
                sizes.batch,
                num_workers=workers,
                reader=reader,
                batches_per_epoch=batches + workers + 1,
            )
            loaded = iter(loader_of_clips)

            # a batch of each is taken while they start
            for _ in range(processes):
                next(loaded)

            # then all of them work
            began = time.perf_counter()
            for _ in range(batches):
                next(loaded)
            seconds = time.perf_counter() - began
            rate = batches * sizes.batch / seconds
            yield {
                "reads": "640x360, 20 fps",
                "processes": processes,
                "clips/s": rate,
                "clips/s a process": rate / processes,
            }


SECTIONS = {
    "facts": facts,
    "checks": checks,
    "attention": attention,
    "step": step,
    "encoder": encoder,
    "lora": lora,
    "lam": lam,
    "planning": planning,
    "loader": loader,
}


def measure(name, device, keep):
    """Run a section and hand its rows so far to `keep(rows)` after each of them."""
    torch.manual_seed(0)
    sizes = FULL if device.type == "cuda" else TINY
    rows = []
    for row in SECTIONS[name](sizes, device):
        rows.append(row)
        keep(rows)
    return rows
