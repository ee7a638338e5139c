"""Compile every kernel and tile row for GPUs that are not here, and refuse what would be slow
there.

python -m bench.compile                                      # everything, sm_80, sm_90 and sm_100
python -m bench.compile --arch 90 --kernel 'dkdv bf16.*HD=64'
python -m bench.compile --arch 90 --kernel stats --control  # must fail: adds a tile that spills

Needs no GPU: ptxas and cuobjdump come with triton. Exit code 1 and one line for every kernel that
spills registers, asks for more shared memory than there is, does not use the tensor cores, or
copies to shared memory four bytes at a time."""

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
    name, _, types, constants, _, warps, stages, _ = tuple(row)
    sizes = " ".join(f"{k}={v}" for k, v in constants.items())
    return f"{name} {next(iter(types.values())).lstrip('*')} {sizes} warps={warps} stages={stages}"


def rows_of(arch, pattern, control):
    """What the kernel modules want compiled for sm_`arch`, filtered; with `control` also a tile
    that must be refused."""
    for module in MODULES:
        for row in importlib.import_module(module).compile_rows(arch):
            if re.search(pattern, describe(row)):
                yield row
            if control and describe(row).startswith(CONTROL[0]):
                name, kernel, types, constants, divisible, _, stages, needs_mma = tuple(row)
                control = False
                yield (
                    f"control {name}",
                    kernel,
                    types,
                    constants | CONTROL[1],
                    divisible,
                    CONTROL[2],
                    stages,
                    needs_mma,
                )


def check(job, pattern, control):
    """Compile one row for one architecture: (table row, reasons to refuse it), as read from the
    machine code."""
    arch, index = job
    job_row = list(rows_of(arch, pattern, control))[index]
    name, kernel, types, constants, divisible, warps, stages, needs_mma = tuple(job_row)
    position = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
        {position[argument]: value for argument, value in constants.items()},
        {position[argument]: [["tt.divisibility", 16]] for argument in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        dump = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        usage = dump([triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]).stdout
        sass = dump([triton.knobs.nvidia.cuobjdump.path, "-sass", f.name]).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    patterns = ("LDL|STL", MATMUL, "LDGSTS", r"LDGSTS.*\.128")
    counts = [sum(bool(re.match(pattern, op)) for op in opcodes) for pattern in patterns]
    spills, matmuls, copies, wide = tuple(counts)
    narrow = copies - wide
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    limit, on_chip = SHARED[arch]
    fits = [
        64 // warps,
        on_chip // (shared + 1024),
        65536 // (-(-registers // 8) * 8 * 32 * warps),
    ]  # warps, memory, registers
    fits += [512 // columns] if columns else []  # tensor memory of sm_100
    refused = {
        f"{stack} bytes of stack, {spills} loads and stores of spilled registers": stack or spills,
        f"{shared} bytes of shared memory, there are {limit}": shared > limit,
        "no tensor-core instruction": needs_mma and not matmuls,
        f"{narrow} copies narrower than 16 bytes": narrow > NARROW,
        "no block fits on a multiprocessor": min(fits) == 0,
        "no instruction found: has the disassembler's format changed?": not opcodes,
    }
    sizes = " ".join(f"{k}={v}" for k, v in constants.items())
    row = {
        "kernel": name,
        "dtype": next(iter(types.values())).lstrip("*"),
        "sizes": sizes,
        "warps": warps,
        "stages": stages,
        "arch": arch,
    }
    row |= {
        "registers": registers,
        "shared": shared,
        "ctas_per_sm": min(fits),
        "mma": matmuls,
        "narrow": narrow,
    }
    row |= {"instructions": len(opcodes), "ok": not any(refused.values())}
    return row, [
        f"sm_{arch} {describe(job_row)}: {reason}" for reason, bad in refused.items() if bad
    ]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        choices=sorted(SHARED),
        help="compute capabilities x 10",
    )
    p.add_argument(
        "--kernel",
        default="",
        help="regular expression: compile what it is found in, e.g. 'dq bf16 HD=64'",
    )
    p.add_argument(
        "--control",
        action="store_true",
        help="compile a tile that spills as well: the exit code must be 1",
    )
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    p.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = p.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit(
            "TRITON_INTERPRET is set: the interpreter has nothing to compile, unset it"
        )

    jobs = [
        (arch, i)
        for arch in args.arch
        for i, _ in enumerate(rows_of(arch, args.kernel, args.control))
    ]
    if not jobs:
        raise SystemExit(f"--kernel {args.kernel!r} is found in no row")
    rows, failures = [], []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        work = pool.imap(functools.partial(check, pattern=args.kernel, control=args.control), jobs)
        for row, refused in tqdm(work, total=len(jobs), unit="kernel"):
            rows.append(row)
            failures += refused
    report(rows, args.json, torch.device("cpu"))
    for line in failures:
        print("REFUSED", line, file=sys.stderr)
    raise SystemExit(1 if failures else 0)
