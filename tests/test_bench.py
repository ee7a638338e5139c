"""The benchmarks of kernels and step, shrunk, from the command line: what they compare must be
equal before it is timed."""

import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def bench(name, flags):
    """JSON rows that `python -m bench.NAME --json FLAGS` prints."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows and all(row["torch"] and row["device"] for row in rows)
    return rows, done.stdout


def test_the_baseline_step_has_our_losses():
    """Bug: the step that ours is timed against drifts from it, so that the ratio compares two
    models."""
    rows, text = bench(
        "step",
        "--no-compile --crop_size 32 --pred_dim 48 --pred_depth 2 --pred_heads 2 --steps 4"
        " --batch_size 2 --repeats 1",
    )
    assert [row["step"] for row in rows] == ["reference", "ours"]
    assert text.count("off by") == 2  # both were compared, and a difference above 1e-5 ends the run


@pytest.mark.slow
def test_attention_rows_say_what_auto_takes():
    """Bug: the row marked as what impl="auto" takes is another one; FlexAttention left out without
    a word."""
    rows, text = bench(
        "kernels",
        "--of attention --heads 2 --head_dim 32 --block 70 --steps 1 4 --no-flex --repeats 1",
    )
    assert [(r["T"], r["impl"]) for r in rows if r["auto"]] == [(1, "prefix"), (4, "prefix")]
    assert {r["impl"] for r in rows} == {"reference", "prefix"} and "triton: needs a GPU" in text


@pytest.mark.slow
def test_scaling_measures_each_row_by_itself(tmp_path):
    """Bug: memory of a row holds what earlier rows left behind, so that it never falls."""
    rows, _ = bench(
        "scaling",
        f"--of sizes --sweeps depth width --crop_size 32 --repeats 1 --out {tmp_path / 'plot.png'}",
    )
    assert [r["size"] for r in rows] == [3, 6, 12, 24, 128, 256, 512, 1024]
    assert rows[4]["MiB"] < rows[3]["MiB"] and (tmp_path / "plot.png").read_bytes().startswith(
        b"\x89PNG"
    )
