"""Checkpoints of the first version (commit 3db0ca8), which hold flags in place of settings, open as
they did there. tests/fixtures/first_version: two steps each of train_ac.py (ac), train_lam.py (lam)
and train_lora.py (lora, on base.pt) at the smallest sizes."""

import os
import shutil

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import settings_of
from evaluation.held_out import held_out
from evaluation.runs import load_run, open_held_out, open_lam, open_run
from model import lora_layers
from tests.harness import contractor, film, jsonl, write_tar

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures", "first_version")

# mean errors that the first version's eval.py reported for ac.pth.tar on the play of the test below
ERRORS = {"tf_true": 1.1275658692632402, "ro_true": 1.1338239078010832}


def test_a_run_on_play_gives_the_same_errors(tmp_path):
    """Bug: a setting that has another name now is taken as its default: other frames, another
    crop, features that are not standardised, weights that are not loaded."""
    play = {}
    for seed, name in enumerate("abc"):
        play[f"{name}.mp4"] = film(200)
        play[f"{name}.jsonl"] = jsonl(contractor(200, seed=seed))
    shard = str(write_tar(tmp_path / "play.tar", play))

    run = load_run(os.path.join(FIXTURES, "ac.pth.tar"))
    assert run.settings["stage"] == "ac" and run.settings["predict"] == "features"
    assert run.dtype == "float32" and not run.predictor.training
    dataset, features_of, compose, bad = open_held_out(
        run.state, run.scaler, [shard], None, run.device, run.dtype, print0=lambda line: None
    )
    errors, _, _ = held_out(
        run.predictor, dataset, features_of, 8, 8, 0, run.settings["auto_steps"], 1.0
    )
    assert not bad and len(errors["tf_true"]) == 8
    for name, value in ERRORS.items():
        np.testing.assert_allclose(errors[name].mean().item(), value, rtol=1e-3)


def test_adapters_open_on_their_base(tmp_path, monkeypatch):
    """Bug: options of the adapters, which settings hold together now, are not found; a base that
    is gone is a traceback."""
    for name in ("lora.pth.tar", "base.pt"):
        shutil.copy(os.path.join(FIXTURES, name), tmp_path)
    monkeypatch.chdir(tmp_path)
    predictor, state, _, _ = open_run("lora.pth.tar")
    settings = settings_of(state)
    assert settings["stage"] == "lora" and settings["cameras"] == ["exterior_1"]
    assert settings["lora"]["r"] == 2 and settings["encode"] == "frame"
    assert len(lora_layers(predictor)) == 4  # qkv, proj, fc1, fc2 of its only block
    tensors = predictor.state_dict()
    for name, value in state["adapter"].items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, msg=name)

    (tmp_path / "base.pt").unlink()
    with pytest.raises(FileNotFoundError, match="base of this run is not at base.pt"):
        open_run("lora.pth.tar")


def test_latent_actions_open():
    """Bug: eval_lam.py reads a setting that the first version did not write."""
    model, state, _ = open_lam(os.path.join(FIXTURES, "lam.pth.tar"))
    settings = settings_of(state)
    assert settings["stage"] == "lam" and settings["dtype"] == "float32"
    assert (model.num_codes, model.quantizer.K) == (2, 4) and not model.training


def test_a_newer_format_is_one_sentence(tmp_path):
    """Bug: a checkpoint of a later version opens, with the defaults of what it calls otherwise."""
    state = checkpoint.load(os.path.join(FIXTURES, "ac.pth.tar"))
    path = checkpoint.save(str(tmp_path), state | {"format": 3}, 1)
    with pytest.raises(ValueError, match="has format 3, this version of nanojepa reads formats up"):
        open_run(path)
    bare = {name: value for name, value in state.items() if name != "args"}
    path = checkpoint.save(str(tmp_path), bare, 2)
    with pytest.raises(ValueError, match="holds no settings: it is no checkpoint of a training"):
        open_run(path)
