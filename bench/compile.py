"""Would every kernel and tile be fast on GPUs that are not here? Compiles them, and refuses what
would be slow.

    python -m bench.compile                                     # everything, sm_80, 90 and 100
    python -m bench.compile --arch 90 --kernel 'dkdv bf16.*HD=64'
    python -m bench.compile --arch 90 --kernel stats --control  # must fail: adds a tile that spills

Needs no GPU: ptxas and cuobjdump come with triton. Prints a row for each kernel, tile and
architecture: registers, shared memory, blocks that fit on a multiprocessor, tensor-core
instructions. The exit code is 1, with a line for each, if a kernel spills registers, asks for more
shared memory than there is, does not use the tensor cores, or copies to shared memory four bytes at
a time."""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import report

MODULES = [
    f"kernels.{name}"
    for name in ("attention", "stats", "rope")
    if importlib.util.find_spec(f"kernels.{name}")
]
# bytes of shared memory that a block may ask for, and that a multiprocessor has; for 80 what sm_86
# and sm_89 grant, which run its rows too
SHARED = {80: (99 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
NARROW = 16  # copies of 4 or 8 bytes: a row vector takes a few
MATMUL = r"HGMMA|HMMA|UTC\w*MMA"  # sm_90, sm_80, sm_100
CONTROL = ("attention._dkdv bf16 HD=64 ", {"BM": 128, "BN": 128}, 4)  # spills everywhere


def describe(row):
    """A row of compile_rows in words, which --kernel is matched with."""
    name, _, types, constants, _, warps, stages, _ = tuple(row)
    return f"{name} {dtype_of(types)} {sizes_of(constants)} warps={warps} stages={stages}"


def dtype_of(types):
    return next(iter(types.values())).lstrip("*")


def sizes_of(constants):
    return " ".join(f"{k}={v}" for k, v in constants.items())


def rows_of(arch, pattern, control):
    """What the kernel modules want compiled for sm_`arch`, filtered; with `control` also a tile
    that must be refused."""
    for module in MODULES:
        for row in importlib.import_module(module).compile_rows(arch):
            if re.search(pattern, describe(row)):
                yield row
            if control and describe(row).startswith(CONTROL[0]):
                name, kernel, types, constants, divisible, _, stages, needs_mma = tuple(row)
                tile = constants | CONTROL[1]
                warps = CONTROL[2]
                yield f"control {name}", kernel, types, tile, divisible, warps, stages, needs_mma
                control = False  # once is enough


def compile_row(row, arch):
    """A row compiled by Triton for sm_`arch`."""
    _, kernel, types, constants, divisible, warps, stages, _ = tuple(row)
    position = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
        {position[argument]: value for argument, value in constants.items()},
        {position[argument]: [["tt.divisibility", 16]] for argument in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(cubin):
    """(usage of resources, names of all instructions) of machine code, by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        dump = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        usage = dump([triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]).stdout
        sass = dump([triton.knobs.nvidia.cuobjdump.path, "-sass", f.name]).stdout
    return usage, re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.M)


def blocks_that_fit(arch, warps, shared, registers, columns):
    """Blocks of a kernel that a multiprocessor runs at a time. columns: of sm_100's tensor
    memory."""
    on_chip = SHARED[arch][1]
    by_warps = 64 // warps
    by_shared = on_chip // (shared + 1024)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)  # given out in eights
    fewest = min(by_warps, by_shared, by_registers)
    return min(fewest, 512 // columns) if columns else fewest


def check(job, pattern, control):
    """Compile one row for one architecture: (table row, reasons to refuse it), as read from the
    machine code."""
    arch, index = job
    tile_row = list(rows_of(arch, pattern, control))[index]
    name, _, types, constants, _, warps, stages, needs_mma = tuple(tile_row)
    compiled = compile_row(tile_row, arch)
    usage, opcodes = disassemble(compiled.asm["cubin"])

    # what the machine code does
    def count(instruction):
        return sum(bool(re.match(instruction, opcode)) for opcode in opcodes)

    spills = count("LDL|STL")
    matmuls = count(MATMUL)
    narrow = count("LDGSTS") - count(r"LDGSTS.*\.128")

    # what it needs
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    shared = compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    limit = SHARED[arch][0]
    blocks = blocks_that_fit(arch, warps, shared, registers, columns)

    refused = {
        f"{stack} bytes of stack, {spills} loads and stores of spilled registers": stack or spills,
        f"{shared} bytes of shared memory, there are {limit}": shared > limit,
        "no tensor-core instruction": needs_mma and not matmuls,
        f"{narrow} copies narrower than 16 bytes": narrow > NARROW,
        "no block fits on a multiprocessor": blocks == 0,
        "no instruction found: has the disassembler's format changed?": not opcodes,
    }
    row = {"kernel": name, "dtype": dtype_of(types), "sizes": sizes_of(constants)}
    row |= {"warps": warps, "stages": stages, "arch": arch}
    row |= {"registers": registers, "shared": shared, "ctas_per_sm": blocks}
    row |= {"mma": matmuls, "narrow": narrow, "instructions": len(opcodes)}
    row["ok"] = not any(refused.values())
    where = f"sm_{arch} {describe(tile_row)}"
    return row, [f"{where}: {reason}" for reason, is_bad in refused.items() if is_bad]


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    archs = sorted(SHARED)
    arch_help = "compute capabilities x 10 (default: all three)"
    flag("--arch", type=int, nargs="+", default=archs, choices=archs, help=arch_help)
    kernel_help = "regular expression: compile what it is found in, e.g. 'dq bf16 HD=64'"
    flag("--kernel", default="", help=kernel_help)
    control_help = "compile a tile that spills as well: the exit code must be 1"
    flag("--control", action="store_true", help=control_help)
    flag("--jobs", type=int, default=os.cpu_count(), help="processes")
    flag("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit(
            "TRITON_INTERPRET is set: the interpreter has nothing to compile, unset it"
        )

    # --- compile ---
    jobs = []
    for arch in args.arch:
        for i, _ in enumerate(rows_of(arch, args.kernel, args.control)):
            jobs.append((arch, i))
    if not jobs:
        raise SystemExit(f"--kernel {args.kernel!r} is found in no row")
    rows = []
    failures = []
    work = functools.partial(check, pattern=args.kernel, control=args.control)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for row, refused in tqdm(pool.imap(work, jobs), total=len(jobs), unit="kernel"):
            rows.append(row)
            failures += refused

    # --- report ---
    report(rows, args.json, torch.device("cpu"))
    for line in failures:
        print("REFUSED", line, file=sys.stderr)
    raise SystemExit(1 if failures else 0)
