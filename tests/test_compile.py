"""The compile gate: python -m bench.compile in a process of its own, on a few rows; everything
where slow tests run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.harness import ROOT

ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def gate(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile", "--json", *flags],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_training_tiles_pass_and_a_spilling_one_does_not():
    """Catches a kernel that came to spill or to miss the tensor cores at the size that training
    runs (H100, bf16, hd 64), and a gate that cannot fail: the control spills."""
    done, rows = gate(
        "--arch",
        "90",
        "--kernel",
        "attention.*bf16 HD=64 BD=64 BM=(128|64 BN=128)",
        "--control",
        "--jobs",
        "1",
    )
    control = [row for row in rows if row["kernel"].startswith("control")]
    rows = [row for row in rows if row not in control]
    assert {row["kernel"] for row in rows} == {
        f"attention._{name}" for name in ("forward", "delta", "dkdv", "dq")
    }
    assert all(
        row["ok"] and 16 < row["registers"] < 256 and row["instructions"] > 200 for row in rows
    ), done.stderr
    assert all(
        row["mma"] >= 16 and row["shared"] > 32768
        for row in rows
        if row["kernel"] != "attention._delta"
    )
    assert {
        row["kernel"]: row["ctas_per_sm"]
        for row in rows
        if row["kernel"] in ("attention._forward", "attention._dq")
    } == {"attention._forward": 2, "attention._dq": 2}

    refused = [line for line in done.stderr.splitlines() if line.startswith("REFUSED")]
    assert done.returncode == 1 and [row["ok"] for row in control] == [False]
    assert len(refused) == 1
    assert "control attention._dkdv" in refused[0]
    assert "bytes of stack" in refused[0]


def test_a_filter_that_finds_nothing_is_an_error():
    """Catches a renamed kernel whose gate passes because it compiles nothing."""
    done, _ = gate("--kernel", "atention")
    assert done.returncode == 1 and "'atention' is found in no row" in done.stderr


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no launcher"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gate_compiles_what_the_launcher_would(dtype, monkeypatch):
    """Catches types, alignments and tiles in compile_rows other than those of a real call: the gate
    would pass another kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from kernels import attention

    calls = []
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda kernel, *args, grid, warmup, **options: calls.append((kernel, args, options)),
    )

    # multiples of 16 or not: the same kernel
    for L, block in ((3 * 41, 41), (3 * 16, 16)):
        x = torch.zeros(2, L, 3, 4, 64, dtype=dtype)
        q, k, v = x.permute(2, 0, 3, 1, 4)
        o, lse = torch.ops.nanojepa.attention(q, k, v, block)
        torch.ops.nanojepa.attention_backward(torch.zeros_like(o), q, k, v, o, lse, block)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    rows = [
        row
        for row in attention.compile_rows(80)
        if row[3]["HD"] == 64 and row[2].get("Q", row[2].get("DO")) == f"*{name}"
    ]
    assert [kernel for kernel, _, _ in calls] == 2 * [
        attention._forward,
        attention._delta,
        attention._dkdv,
        attention._dq,
    ]

    for kernel, args, options in calls:
        bind = create_function_from_signature(
            kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 80, 32))
        )
        _, special, _ = bind(*args, **options, debug=False)
        row = next(row for row in rows if row[1] is kernel)
        types, constants, divisible = tuple(row[2:5])
        warps, stages = row[5:7]
        expected = []
        for name in kernel.arg_names:
            if name in types:
                expected.append((types[name], "D" if name in divisible else ""))
            else:
                expected.append(("constexpr", constants[name]))
        assert [(kind, value or "") for kind, value in special] == expected
        assert (options["num_warps"], options.get("num_stages", stages)) == (warps, stages)


@pytest.mark.slow
def test_everything_passes():
    """Catches any kernel, tile row, dtype, head dim or architecture that spills, overflows shared
    memory or misses the tensor cores."""
    done, rows = gate()
    assert done.returncode == 0, done.stderr
    assert {(row["arch"], row["dtype"]) for row in rows} >= {
        (arch, t) for arch in (80, 90, 100) for t in ("bf16", "fp16", "fp32")
    }
