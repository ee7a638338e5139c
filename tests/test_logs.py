"""files/logs.py and what the three training scripts share: flags, arguments that are refused, the
lines that they print, settings in checkpoints."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import checkpoint
from files import logs
from tests.harness import ROOT

SCRIPTS = ("train_ac.py", "train_lam.py", "train_lora.py")


def refusal(script, *flags):
    """The last line of a script that refuses its flags."""
    command = [sys.executable, os.path.join(ROOT, script), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def a_row(**fields):
    row = logs.StepRow(0, 0, 1e-3, torch.tensor([0.5, 0.25]), torch.tensor(2.0), ["a", "b"], 1)
    return row._replace(**fields)


# --- numbers ---


def test_a_row_of_one_rank_stays_as_it_is():
    """Bug: the mean over ranks rounds, mixes up columns, or sums bytes in 24 bits."""
    rows = [a_row(bytes_read=2**40 + 1), a_row(itr=1, losses=torch.tensor([0.1, 0.2]))]
    first, second = logs.mean_over_ranks(rows, 1, torch.float64)
    assert first.losses == [0.5, 0.25] and first.grad_norm == 2.0
    assert first.bytes_read == 2**40 + 1 and first.keys == ["a", "b"]
    assert second.losses == torch.tensor([0.1, 0.2]).tolist() and second.itr == 1


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_number_that_is_not_finite_is_named_with_its_place(tmp_path, loss, norm):
    """Bug: NaN is trained on; float16, which skips such steps, is stopped by a gradient."""
    row = a_row(losses=[loss, 0.0], grad_norm=norm)
    with pytest.raises(ValueError, match="is not finite at epoch 3, itr 4, clips a, b; last good"):
        logs.check_finite(row, loss, "epoch 3, itr 4", str(tmp_path), "bfloat16")
    if math.isinf(norm):
        logs.check_finite(row, loss, "epoch 3, itr 4", str(tmp_path), "float16")


def test_numbers_are_written_as_people_read_them():
    """Bug: "0.00 GiB", "1 recordings", a list of lists, and a resume that reports itself."""
    assert logs.bytes_text(900) == "900 bytes"
    assert logs.bytes_text(3 * 2**20) == "3.0 MiB"
    assert logs.bytes_text(2.5 * 2**40) == "2560.0 GiB"
    assert logs.count_text(1, "recording") == "1 recording"
    assert logs.count_text(2000, "recording") == "2,000 recordings"
    assert logs.eta(93784.4) == "1 day, 2:03:04"

    old = {"resume": False, "data": [["a", "b"], ["c"]], "lr": 1e-3, "gone": 1}
    new = {"resume": True, "data": [["a", "b"], ["d"]], "lr": 1e-3, "added": 2}
    assert logs.changed_flags(old, new) == "changed flags: --data a b d (was a b c)"
    assert logs.changed_flags(old, old) == "the same flags as before"


def test_the_log_line_says_how_well_a_gpu_is_used():
    """Bug: MFU as a share of one or of nothing; MiB as GiB; the memory of a process as that of
    a GPU."""
    row = a_row(losses=[0.5, 0.25])
    columns = logs.train_row(row, ["jloss", "sloss"], 0.5, 0.02, 2, 61.25 * 1024, 0.4123)
    gpu = logs.log_line("epoch 0", "jloss 1", columns, 60, torch.device("cuda", 0))
    assert "8.0 clips/s  data wait   4%  MFU 41.2%  GPU 61.2 GiB  ETA 0:01:00" in gpu
    columns["mfu"] = None
    cpu = logs.log_line("epoch 0", "jloss 1", columns, 60, torch.device("cpu"))
    assert "data wait   4%  ETA" in cpu


def test_a_resumed_log_may_be_older_than_a_column(tmp_path):
    """Bug: rows of a run that was begun before there was MFU are lost or shifted; an unknown MFU
    stops the log."""
    path = str(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("epoch,itr,jloss\n0,0,0.5\n0,1,0.25\n")
    log = logs.open_csv(path, ["epoch", "itr", "jloss", "mfu"], 0, 1, keep=True)
    log({"epoch": 0, "itr": 1, "jloss": 0.125, "mfu": None})
    log({"epoch": 0, "itr": 2, "jloss": 0.5, "mfu": 0.375})
    table = logs.read_csv(path)
    assert table["jloss"].tolist() == [0.5, 0.125, 0.5]
    assert np.isnan(table["mfu"]).tolist() == [True, True, False] and table["mfu"][2] == 0.375


def test_the_disk_is_judged_before_the_folder_exists(tmp_path):
    """Bug: the free space of another disk, or an error, where --out_dir is new."""
    text = checkpoint.disk_text(str(tmp_path / "a" / "b"), 2, 3 * 2**20)
    assert text.startswith("2 checkpoints of 3.0 MiB, ")
    assert text.endswith(": enough")
    assert checkpoint.disk_text(str(tmp_path), 1, 1e18).endswith(": NOT ENOUGH")


def test_curves_of_a_run_in_its_first_epoch(tmp_path, monkeypatch):
    """Bug: the x axis is stretched to a whole epoch; empty panels without a word."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda fig, *a, **k: (figures.append(fig), save(fig, *a, **k))
    )
    columns = ["epoch", "itr", "jloss", "sloss"]
    log = logs.open_csv(str(tmp_path / "train.csv"), columns, 0, 0, False)
    logs.open_csv(str(tmp_path / "val.csv"), ["epoch", "jloss"], 0, 0, False)
    for itr in range(70):
        log({"epoch": 0, "itr": itr, "jloss": 1.0, "sloss": 1.0})
    logs.plot_curves(str(tmp_path), 150)
    loss_ax, *empty = figures[0].axes
    np.testing.assert_allclose(loss_ax.lines[0].get_xdata()[-1], 69 / 150)
    assert [[t.get_text() for t in ax.texts] for ax in empty] == 2 * [["no validation yet"]]


# --- flags ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_shows_defaults(script):
    """Bug: --help imports torch first (8 s), shows no default, or no groups."""
    began = os.times().children_user
    command = [sys.executable, os.path.join(ROOT, script), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert os.times().children_user - began < 1
    assert "\noptimizer:\n" in text and "\nrun:\n" in text
    assert "steps between log lines (default: 10)" in " ".join(text.split())


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_ac.py", "--batch_size 0", "--batch_size 0 is too small"),
        ("train_ac.py", "--epochs 2 --warmup 2 --anneal 1", "--warmup 2 and --anneal 1 do not fit"),
        ("train_ac.py", "--action_space 7", "--action_space 7 is none of 13, 18, 36, 38"),
        ("train_ac.py", "--model_name vit_l_16", "size is read from its weights"),
        ("train_ac.py", "--device cuda:x", "--device cuda:x is none of cpu"),
        ("train_lam.py", "--ipe 0", "--ipe 0 is too small"),
        ("train_lam.py", "--warmup 1 --warmup_steps 9", "give one of them"),
        ("train_lam.py", "--num_embeddings 1", "--num_embeddings 1 is too small"),
        ("train_lora.py", "--data x --lora_r 0", "--lora_r 0 is too small"),
        ("train_lora.py", "--data x --schedule_steps 5", "ends before --max_steps 100000"),
        ("train_lora.py", "--data x --eval_every_n_steps 0", "--eval_every_n_steps 0 is too small"),
    ],
)
def test_a_bad_argument_is_named(script, flags, message):
    """Bug: `--batch_size 0` complains of the warm-up."""
    assert message in refusal(script, *flags.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_is_looked_for_at_once(script):
    """Bug: the import fails after the encoder was opened, as a traceback."""
    if subprocess.run([sys.executable, "-c", "import wandb"], capture_output=True).returncode == 0:
        pytest.skip("wandb is installed")
    data = ["--data", "x"] if script == "train_lora.py" else []
    assert "pip install wandb" in refusal(script, *data, "--wandb_project", "p")


def test_spellings_of_the_guides_are_known():
    """Bug: a flag of a guide is unknown, or sets something else."""
    import train_ac
    import train_lam
    import train_lora

    flags = "--per_device_batch_size 3 --gradient_checkpointing --encoder_path e"
    ac = train_ac.parser.parse_args(flags.split())
    assert (ac.batch_size, ac.activation_checkpointing, ac.encoder) == (3, True, "e")
    assert train_ac.parser.parse_args(["--pretrain_checkpoint", "p"]).encoder == "p"
    lam = train_lam.parser.parse_args("--per_device_batch_size 3 --warmup 2".split())
    assert (lam.batch_size, lam.warmup) == (3, 2)

    flags += " --lora_r 8 --lora_alpha 4 --lora_dropout 0.5 --target_modules q_proj --no-use_rslora"
    flags += " --camera_view wrist --predictor_path b --data x"
    lora = train_lora.parser.parse_args(flags.split())
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (8, 4.0, 0.5, ["q_proj"])
    assert (lora.rslora, lora.camera, lora.base, lora.encoder) == (False, ["wrist"], "b", "e")
    assert train_lora.parser.parse_args(["--data", "x", "--r", "8"]).r == 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_are_the_cpus_that_may_be_used(script):
    """Bug: a job that may use one of 64 CPUs starts eight loaders."""
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); import {script[:-3]} as s"
    code += "; print(s.parser.get_default('num_workers'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_a_log_gets_lines_not_bars():
    """Bug: where the output is no terminal, a log fills with hundreds of bars, or the last line of
    a bar is lost."""
    code = """
import time
from files.progress import tqdm
for _ in tqdm(range(40), "reads", unit="file"):
    time.sleep(0.02)
for _ in tqdm(range(3), "too short to be shown", delay=10):
    pass
print("done")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = ran.stderr.splitlines()
    assert len(lines) == 1 and "\r" not in ran.stderr, ran.stderr
    assert lines[0].startswith("reads: 100%") and "40/40" in lines[0]
