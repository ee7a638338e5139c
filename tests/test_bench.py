"""The benchmarks of kernels and step, shrunk, from the command line: what they compare must be
equal before it is timed."""

import pytest

from tests.harness import fails, run_bench

pytestmark = pytest.mark.usefixtures("forkserver")


def test_the_baseline_step_has_our_losses(tmp_path):
    """Bug: the step that ours is timed against drifts from it, so that the ratio compares two
    models."""
    size = "--crop_size 32 --pred_dim 48 --pred_depth 2 --pred_heads 2 --steps 4 --batch_size 2"
    rows, text = run_bench(tmp_path, "step", size, "--no-compile --repeats 1")
    assert [row["step"] for row in rows] == ["reference", "ours"]

    # both were compared, and a difference above 1e-5 ends the run
    assert text.count("off by") == 2


@pytest.mark.slow
def test_attention_rows_say_what_auto_takes(tmp_path):
    """Bug: the row marked as what impl="auto" takes is another one; FlexAttention left out without
    a word."""
    size = "--heads 2 --head_dim 32 --block 70 --steps 1 4"
    rows, text = run_bench(tmp_path, "kernels", "--of attention", size, "--no-flex --repeats 1")
    assert [(r["T"], r["impl"]) for r in rows if r["auto"]] == [(1, "prefix"), (4, "prefix")]
    assert {r["impl"] for r in rows} == {"reference", "prefix"}
    assert "triton: needs a GPU" in text


@pytest.mark.slow
def test_scaling_measures_each_row_by_itself(tmp_path):
    """Bug: memory of a row holds what earlier rows left behind, so that it never falls."""
    sweeps = "--sweeps depth width --crop_size 32 --repeats 1 --out"
    rows, _ = run_bench(tmp_path, "scaling", "--of sizes", sweeps, tmp_path / "plot.png")
    assert [r["size"] for r in rows] == [3, 6, 12, 24, 128, 256, 512, 1024]
    assert rows[4]["MiB"] < rows[3]["MiB"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_pretrain_needs_a_checkout_of_the_reference(tmp_path):
    """Bug: an ImportError about "src" where the folder of the reference is wrong."""
    line = fails(tmp_path, "bench/pretrain.py", "--vjepa2", tmp_path)
    assert "--vjepa2" in line and "git clone" in line
