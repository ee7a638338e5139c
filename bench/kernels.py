"""How fast is each kernel, against its alternatives and against what the hardware can do?

    python -m bench.kernels                                 # all four; some minutes on a CPU
    python -m bench.kernels --of attention --dtypes bfloat16 --batch_size 8 --steps 2 7 8 16
    python -m bench.kernels --of rope --shapes 8,16,2064,64 --dtypes bfloat16
    python -m bench.kernels --of moments --megabytes 64 --columns 1408
    python -m bench.kernels --of linear --width 384 --rows 1848

Prints a table for each kernel. Times are medians of interleaved repeats. Shares are of a large
matmul or of a large copy, which are measured in the same run. Everything that is compared is
checked first: a result that is off ends the run.

attention  Block-causal attention by our implementations and by FlexAttention, which has no
           backward on a CPU and is used nowhere else. Useful FLOPs are those of the scores that
           the mask lets through: 4 hd for each score forward, 2.5 times that backward. `auto`
           marks what impl="auto" takes.
rope       RoPE of q and k from a fused qkv, down to the gradient of qkv. The speed-ups are over
           "stack": the stacked q and k rotated by the definition, as upstream does. `of_copy`
           counts q and k read and written once each way.
moments    Count, mean and M2 of the columns of a matrix. `error` is the relative error of the
           first column's M2 at mean 1000 and std 1. The orjson row parses the JSON lines that
           such rows come from; its GB/s are those of the JSON.
linear     The affine map of the transformer layers by BLAS (MKL on x86) and by oneDNN, forward
           and backward in fp32. It is timed on the CPU: on a GPU there is nothing to choose."""

import argparse
import functools
import itertools
import sys

import orjson
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bench
from bench.scaler import contractor_lines
from kernels import ATTENTION, LINEAR, attention_impl, block_causal_attention, linear
from kernels.reference import moments_two_pass, rope_plain, rotate_pairs
from model import rope_tables

KERNELS = ["attention", "rope", "moments", "linear"]

# what each implementation of attention is compared with
OTHERS = ("reference", "prefix", "flex")


def relative_error(x, exact):
    difference = x.double() - exact
    return (difference.norm() / exact.norm()).item()


def forward_backward(function, inputs, grads):
    """Gradients of the inputs, for given gradients of what the function returns."""
    outputs = function(inputs)
    return torch.autograd.grad(outputs, inputs, grads)


# --- attention ---


def attend(qkv, block, impl):
    return block_causal_attention(*qkv, block, impl)


def flex_attend(flex, block, L, device):
    """FlexAttention with our mask, as a function of (q, k, v)."""

    def sees(b, h, query, key):
        return key // block <= query // block

    mask = create_block_mask(sees, None, None, L, L, device=device)
    return lambda qkv: flex(*qkv, block_mask=mask)


def attention_rows(shape, steps, dtype, with_flex, device, repeats):
    """Rows of the table of attention. shape: (B, heads, head_dim, tokens of a step)."""
    B, nh, hd, block = tuple(shape)
    matmul_flops, _ = bench.ceilings(device, dtype)
    flex = torch.compile(flex_attention, dynamic=False)

    # 16 bits differ by their rounding
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    rows = []
    for T in steps:
        L = T * block

        # q, k and v, strided as a fused projection leaves them
        qkv = torch.randn(B, L, 3, nh, hd, device=device).to(dtype)
        qkv = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 times (B, nh, L, hd)
        trained = [x.detach().requires_grad_() for x in qkv]
        grad = torch.randn(B, nh, L, hd, device=device).to(dtype)

        # on a CPU Triton has its interpreter only, whose time says nothing
        functions = {}
        for name in ATTENTION:
            if name != "triton" or device.type == "cuda":
                functions[name] = functools.partial(attend, block=block, impl=name)
        if with_flex:
            functions["flex"] = flex_attend(flex, block, L, device)

        # all must compute the same
        exact = functions["reference"](qkv).double()
        for name, function in functions.items():
            off = relative_error(function(qkv), exact)
            if not off <= bound:  # nan is off, too
                raise SystemExit(f"attention: {name} is off by {off:.1e} at T={T}")

        # forward, then forward and backward
        forward = {}
        both = {}
        for name, function in functions.items():
            forward[name] = functools.partial(function, qkv)
            if name != "flex" or device.type == "cuda":
                both[name] = functools.partial(forward_backward, function, trained, grad)
        forward_seconds = bench.medians(forward, device, repeats)
        both_seconds = bench.medians(both, device, repeats)

        # a step sees itself and all before it: T (T + 1) / 2 blocks of scores
        scores = B * nh * block**2 * T * (T + 1) / 2
        useful_flops = 4 * hd * scores
        chosen = attention_impl(device, dtype, hd, block, L)
        for name, seconds in forward_seconds.items():
            row = {"B": B, "nh": nh, "hd": hd, "block": block, "T": T, "L": L}
            row["impl"] = name
            row["auto"] = name == chosen

            # the forward pass
            row["fwd ms"] = 1e3 * seconds
            for other in OTHERS:
                if other in forward_seconds:
                    row[f"{other} / it"] = forward_seconds[other] / seconds
            row["of matmul"] = useful_flops / seconds / matmul_flops

            # with the backward pass, which alone is the difference of both
            if name in both:
                total = both_seconds[name]
                backward = total - seconds
                row["fwd+bwd ms"] = 1e3 * total
                for other in OTHERS:
                    if other in both_seconds:
                        row[f"{other} / it, both"] = both_seconds[other] / total
                row["bwd of matmul"] = 2.5 * useful_flops / backward / matmul_flops
                row["TFLOP/s, both"] = 3.5 * useful_flops / total / 1e12
                row |= bench.peak_memory(both[name], device)
            rows.append(row)

    # FlexAttention has fewer columns than the others, and a table needs all of them
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "no backward") for column in columns} for row in rows]


# --- rope ---


def stack(qkv, cos, sin):
    """(B, L, 3, nh, hd) -> q, k, v. The partners are a copy, and every operator keeps its result in
    the fp32 of the tables."""
    # the partner of a channel is its neighbour
    qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, nh, L, hd)
    partners = torch.stack((qk[..., 1::2], qk[..., ::2]), dim=-1).flatten(-2)
    rotated = qk * cos + partners * sin
    q, k = rotated.to(v.dtype).unbind(0)
    return q, k, v[0]


def by_definition(qk, cos, sin):
    return [rotate_pairs(x, cos, sin) for x in qk]


def apart(rope):
    """What model.Attention does: q and k apart, so no gradient is copied into a larger one."""

    def rotated(qkv, cos, sin):
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, nh, L, hd) each
        return *rope((q, k), cos, sin), v

    return rotated


def rope_functions(device):
    """{name: function of qkv, cos, sin}."""
    functions = {"stack": stack, "definition": apart(by_definition), "plain": apart(rope_plain)}

    # the same by the compiler: a kernel is worth its lines only where it is faster than these
    for name, function in list(functions.items()):
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        functions[f"{name}, compiled"] = compiled
    if device.type == "cuda":
        from kernels.rope import rope_triton  # needs Triton

        functions["triton"] = apart(rope_triton)
    return functions


def rope_rows(shapes, dtype, device, repeats):
    """Rows of the table of RoPE. shapes: [(B, heads, L, head_dim)]."""
    _, bandwidth = bench.ceilings(device, torch.float32)
    functions = rope_functions(device)

    # 16 bits differ by their rounding
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    rows = []
    for B, nh, L, hd in shapes:
        # time, row and column of each token
        positions = torch.randint(16, (L, 3), device=device).float()
        cos, sin = rope_tables(positions, hd)
        qkv = torch.randn(B, L, 3, nh, hd, device=device).to(dtype).requires_grad_()
        grads = [torch.randn(B, nh, L, hd, device=device).to(dtype) for _ in range(3)]

        # all must compute what "stack" does in double precision; a nan is off too
        exact = stack(qkv.detach().double(), cos.double(), sin.double())
        for name, function in functions.items():
            for result, expected in zip(function(qkv, cos, sin), exact):
                off = relative_error(result, expected)
                if not off < bound:
                    raise SystemExit(f"rope: {name} is off by {off:.2g}")

        # forward, then down to the gradient of qkv
        forward = {}
        both = {}
        for name, function in functions.items():
            one_way = functools.partial(function, cos=cos, sin=sin)
            forward[name] = functools.partial(one_way, qkv)
            both[name] = functools.partial(forward_backward, one_way, qkv, grads)
        with torch.no_grad():
            forward_seconds = bench.medians(forward, device, repeats)
        both_seconds = bench.medians(both, device, repeats)

        # the least that can be moved: q and k, read and written
        elements = 4 * B * nh * L * hd
        copy_seconds = elements * dtype.itemsize / bandwidth
        for name in functions:
            one_way = forward_seconds[name]
            total = both_seconds[name]
            row = {
                "shape": f"{B},{nh},{L},{hd}",
                "impl": name,
                "forward_ms": 1e3 * one_way,
                "forward_speedup": forward_seconds["stack"] / one_way,
                "forward_of_copy": copy_seconds / one_way,
                "both_ms": 1e3 * total,
                "both_speedup": both_seconds["stack"] / total,
                "both_of_copy": 2 * copy_seconds / total,
            }
            rows.append(row)

        # the compiler keeps a few shapes of a function at most: it starts over with the next
        torch.compiler.reset()
    return rows


def parse_shape(text):
    return tuple(map(int, text.split(",")))


# --- moments ---


def naive(x):
    """E[x^2] - E[x]^2, one pass over a copy in float64: shows what cancellation costs."""
    n = len(x)
    x = x.double()
    mean = x.mean(0)
    squares = (x * x).sum(0)
    return n, mean, squares - n * mean * mean


def var_mean(x):
    """PyTorch's own function (Welford), in float64."""
    n = len(x)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    return n, mean, var * n


def parse_lines(lines):
    """The four numbers of every JSON line."""
    numbers = []
    for line in lines:
        fields = orjson.loads(line)
        mouse = fields["mouse"]
        numbers.append((mouse["dx"], mouse["dy"], fields["yaw"], fields["pitch"]))
    return numbers


def matrix_of(n, d, along, dtype, device):
    """(n, d) at mean 1000 and std 1. along: whether the elements of "rows" or of "columns" are
    neighbours in memory."""
    shape = (n, d) if along == "rows" else (d, n)
    x = torch.randn(shape, device=device).add_(1000).to(dtype)
    return x if along == "rows" else x.T


def exact_squares(column):
    """M2 of a column in float64; what is left of its mean after centring is taken off as well."""
    centred = column.double()
    centred = centred - centred.mean()
    return (centred * centred).sum() - centred.sum() ** 2 / len(column)


def moments_rows(megabytes, widths, dtype, device, repeats):
    """Rows of the table of moments: matrices of this size and of each of the widths."""
    functions = {"two_pass": moments_two_pass, "var_mean": var_mean, "naive": naive}
    if device.type == "cuda":
        from kernels.stats import moments_triton  # needs Triton

        functions["triton"] = moments_triton
    _, bandwidth = bench.ceilings(device, torch.float32)
    size = megabytes * 10**6
    rows = []
    for d, along in itertools.product(widths, ("rows", "columns")):
        n = size // d // dtype.itemsize
        x = matrix_of(n, d, along, dtype, device)
        exact = exact_squares(x[:, 0])
        calls = {name: functools.partial(f, x) for name, f in functions.items()}
        seconds_of = bench.medians(calls, device, repeats, warmup=1)
        for name, seconds in seconds_of.items():
            _, _, squares = functions[name](x)
            row = {"impl": name, "rows": n, "columns": d, "along": along}
            row["ms"] = 1e3 * seconds
            row["gb_s"] = size / seconds / 1e9
            row["rows_s"] = n / seconds
            row["speedup"] = seconds_of["two_pass"] / seconds

            # the matrix is read, and hardly anything is written; a copy does both
            row["of_copy"] = size / seconds / bandwidth
            row["error"] = (squares[0] / exact - 1).abs().item()
            rows.append(row)

        # there may be no room for two of them
        del x, calls
    rows.append(parsing_row(repeats))
    return rows


def parsing_row(repeats):
    """The row of orjson: the JSON lines of one recording of 2.5 KB lines, parsed whole."""
    lines = contractor_lines(0).splitlines()
    calls = {"parse": functools.partial(parse_lines, lines)}
    seconds = bench.medians(calls, torch.device("cpu"), repeats, warmup=1)["parse"]
    return {
        "impl": "orjson",
        "rows": len(lines),
        "columns": 4,
        "along": "rows",
        "ms": 1e3 * seconds,
        "gb_s": sum(map(len, lines)) / seconds / 1e9,
        "rows_s": len(lines) / seconds,
        "speedup": "",
        "of_copy": "",
        "error": "",
    }


def print_cost_of_parsing(rows):
    """How many times longer a row of JSON takes to parse than to count."""
    # the narrowest matrix is the nearest to the four columns of the JSON
    *counted, parsed = rows
    narrowest = min(row["columns"] for row in counted)
    candidates = [row for row in counted if row["columns"] == narrowest]
    fastest = max(candidates, key=lambda row: row["rows_s"])
    times = fastest["rows_s"] / parsed["rows_s"]
    print(
        f"parsing a row of JSON takes {times:,.0f} times as long as its statistics"
        f" ({fastest['impl']})",
        file=sys.stderr,
    )


# --- linear ---


def affine(inputs, impl):
    return linear(*inputs, impl)


def linear_rows(tokens, width, repeats):
    """Rows of the table of affine maps: layers of 1, 3 and 4 times the width, on the CPU."""
    rows = []
    for n, outputs in itertools.product(tokens, (width, 3 * width, 4 * width)):
        x = torch.randn(n, width, requires_grad=True)
        weight = torch.randn(outputs, width, requires_grad=True)
        bias = torch.randn(outputs, requires_grad=True)
        inputs = (x, weight, bias)
        grad = torch.randn(n, outputs)

        # forward and backward by each library
        calls = {}
        for name in LINEAR:
            function = functools.partial(affine, impl=name)
            calls[name] = functools.partial(forward_backward, function, inputs, grad)
        seconds_of = bench.medians(calls, torch.device("cpu"), repeats)

        # 2 FLOPs for each weight and token forward, 4 backward
        gflop = 6e-9 * n * outputs * width
        row = {"rows": n, "K": width, "N": outputs}
        for name, seconds in seconds_of.items():
            row[f"{name} GFLOP/s"] = gflop / seconds
        row["blas / onednn"] = seconds_of["blas"] / seconds_of["onednn"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--of", nargs="+", default=KERNELS, choices=KERNELS, help="which kernels (default: all)")
    dtypes = ["float32", "float16", "bfloat16"]
    flag("--dtypes", nargs="+", default=dtypes[:1], choices=dtypes, help="default float32")
    flag("--repeats", type=int, default=10, help="timed calls of each (default 10)")
    flag("--json", action="store_true", help="print rows as JSON lines")

    flag = parser.add_argument_group("attention").add_argument
    flag("--batch_size", type=int, default=1, help="clips (default 1)")
    flag("--heads", type=int, default=16, help="attention heads (default 16)")
    flag("--head_dim", type=int, default=64, help="dims of a head (default 64)")
    flag("--block", type=int, default=258, help="tokens of a step (default 258)")
    flag("--steps", type=int, nargs="+", default=[2, 7, 8], help="steps T (default 2 7 8)")
    switch = argparse.BooleanOptionalAction
    flag("--flex", action=switch, default=True, help="time FlexAttention too; it must be compiled")

    flag = parser.add_argument_group("rope").add_argument
    shapes_help = "B,nh,L,hd (default 4,6,528,64 1,16,2064,64, on a GPU 8,16,2064,64 too)"
    flag("--shapes", type=parse_shape, nargs="+", help=shapes_help)

    flag = parser.add_argument_group("moments").add_argument
    flag("--megabytes", type=int, help="of the matrix (default 64, on a GPU 1000)")
    columns_help = "its widths (default 4 14 1408: continuous actions, ..., ViT-g features)"
    flag("--columns", type=int, nargs="+", default=[4, 14, 1408], help=columns_help)

    flag = parser.add_argument_group("linear").add_argument
    flag("--width", type=int, default=384, help="of the model (default 384)")
    rows_help = "tokens of a batch (default 66 528 1848)"
    flag("--rows", type=int, nargs="+", default=[66, 528, 1848], help=rows_help)
    args = parser.parse_args()

    # --- defaults that depend on the machine ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if not on_gpu:
        print("triton: needs a GPU")
    shapes = args.shapes
    if shapes is None:
        shapes = [(4, 6, 528, 64), (1, 16, 2064, 64)]
        if on_gpu:
            shapes.append((8, 16, 2064, 64))
    megabytes = args.megabytes or (1000 if on_gpu else 64)

    # --- measure ---
    torch.manual_seed(0)
    shape = (args.batch_size, args.heads, args.head_dim, args.block)
    for kernel in args.of:
        # the choice of a library for linear is one of fp32 on a CPU, whatever --dtypes says
        names = args.dtypes
        measured_on = device
        if kernel == "linear":
            names = ["float32"]
            measured_on = torch.device("cpu")

        # a table for each dtype
        for name in names:
            dtype = getattr(torch, name)
            if kernel == "attention":
                rows = attention_rows(shape, args.steps, dtype, args.flex, device, args.repeats)
            elif kernel == "rope":
                rows = rope_rows(shapes, dtype, device, args.repeats)
            elif kernel == "moments":
                rows = moments_rows(megabytes, args.columns, dtype, device, args.repeats)
            else:
                rows = linear_rows(args.rows, args.width, args.repeats)
            rows = [{"kernel": kernel, "dtype": name} | row for row in rows]
            bench.report(rows, args.json, measured_on)
            if kernel == "moments":
                print_cost_of_parsing(rows)
