"""The scripts of examples/, shrunk, from the command line."""

import re

import numpy as np
import pytest
import torch

from examples.rl import Agent, Games, look
from tests.harness import fails, run
from weights import open_encoder

pytestmark = pytest.mark.usefixtures("forkserver")

# two updates of PPO on two games; each game lasts longer than an episode, which is 75 decisions
SHORT = "--num_games 2 --num_steps 40 --total_steps 160 --random_episodes 8 --seed 3"


def table(path):
    """Columns of a CSV file by name."""
    return np.genfromtxt(path, delimiter=",", names=True)


@pytest.fixture(scope="module")
def games():
    games = Games("basic", 2, seed=3)
    yield games
    games.close()


def test_rl_writes_every_run_and_draws_them_together(tmp_path):
    """Bug: a run writes over that of another encoder; a column that stays empty; the score of
    random play depends on the encoder, or is counted as a score of the agent."""
    for encoder in ("doom_tiny", "pixels"):
        text = run(
            tmp_path, "examples/rl.py", SHORT, "--encoder", encoder, f"--out_dir={tmp_path}/"
        )
        # random play was 8 episodes: fewer were finished since
        episodes = int(re.search(r"mean of the last (\d+) episodes", text)[1])
        assert 2 <= episodes < 8
    frozen = table(tmp_path / "basic-doom_tiny-3.csv")
    pixels = table(tmp_path / "basic-pixels-3.csv")
    assert frozen["step"].tolist() == [80, 160]
    assert frozen["random"].tolist() == pixels["random"].tolist()
    # three actions: a policy that has hardly learned is close to log 3
    assert np.allclose(frozen["entropy"], np.log(3), atol=0.1)
    assert np.isfinite([frozen["score"][-1], pixels["score"][-1]]).all()
    assert f"pixels: score {pixels['score'][-1]:.0f}, mean over 1 seed" in text
    assert (tmp_path / "basic.png").read_bytes().startswith(b"\x89PNG")


def test_rl_refuses_a_run_without_an_update(tmp_path):
    """Bug: a run that is too short for one update ends without a word, and without a score."""
    line = fails(tmp_path, "examples/rl.py", "--total_steps 10")
    assert "--total_steps 10" in line and "256" in line


def test_games_show_what_happened(games):
    """Bug: pictures in the wrong order or of another game; a reward that is not that of the action;
    the first picture of an episode beside the last one of the episode before."""
    before = games.pictures()
    assert before.shape == (2, 2, 3, 48, 48)
    right = games.games[0].get_available_buttons()[1].name
    assert right == "MOVE_RIGHT"
    rewards, ended, _ = games.step([1, 0])
    after = games.pictures()
    assert torch.equal(after[:, 0], before[:, 1])
    assert not torch.equal(after[0, 1], after[1, 1])
    assert rewards.tolist() == [-4, -4]  # one a tic
    assert ended.tolist() == [0, 0]

    # 300 tics end an episode of "basic", and what comes next starts with one picture twice
    scores = []
    while not scores:
        _, ended, scores = games.step([0, 0])
    assert scores[0] == -300
    first = games.pictures()[int(ended.argmax())]
    assert torch.equal(first[0], first[1])


def test_a_frozen_encoder_gets_no_gradient(games):
    """Bug: PPO trains the encoder along, so that "frozen" is not; a policy that does not depend on
    what is seen."""
    encoder = open_encoder("doom_tiny", 48, 2)
    seen = look(encoder, games.pictures(), {})
    agent = Agent(torch.nn.Flatten(), seen, 16, 3)
    policy, value = agent(seen)
    (value.sum() + policy.logits.sum()).backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert agent.hidden.weight.grad.abs().sum() > 0
    assert not torch.equal(policy.logits[0], policy.logits[1])
