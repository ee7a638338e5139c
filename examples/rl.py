"""What is a frozen encoder worth to an agent? PPO in a small game of Doom, on one's features.

    python -m examples.rl                      # doom_tiny, our small trained encoder, frozen
    python -m examples.rl --encoder vit_tiny   # the same network with random weights, frozen
    python -m examples.rl --encoder pixels     # a small CNN, trained along with the policy
    python -m examples.rl --encoder pixels --seed 2

All of them see the same two pictures of 48 x 48 pixels, four tics apart: the step that doom_tiny
was made for. All have the same head, two layers, and the same settings.

First some episodes are played at random. Their score is what has to be beaten, and their features
give each channel's mean and std. Writes OUT_DIR/SCENARIO-ENCODER-SEED.csv, a row an update, and
draws OUT_DIR/SCENARIO.png from all such files. Prints a line for each encoder: its seeds' scores
and their mean. After cleanrl's ppo_atari.py (vwxyzjn/cleanrl)."""

import argparse
import atexit
import csv
import glob
import math
import os
import sys
import tempfile
import time

from evaluation.flags import Help

# games of the ViZDoom wheel, and what rewards are multiplied with: PPO likes them around 1
SCENARIOS = {"basic": 0.01, "defend_the_center": 1.0, "health_gathering": 0.01}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
flag = parser.add_argument
flag("--encoder", default="doom_tiny", help="pixels, or a frozen one: a name or a path")
flag("--scenario", default="basic", choices=SCENARIOS, help="game of the ViZDoom wheel")
flag("--total_steps", type=int, default=20_000, help="decisions of the agent, four tics each")
flag("--random_episodes", type=int, default=40, help="episodes at random, before training")
flag("--num_games", type=int, default=8, help="games played side by side")
flag("--num_steps", type=int, default=32, help="decisions in each game between two updates")
flag("--epochs", type=int, default=4, help="passes over them in an update")
flag("--minibatches", type=int, default=4, help="parts of a pass")
flag("--lr", type=float, default=5e-4, help="learning rate; it falls to 0 over the run")
flag("--gamma", type=float, default=0.99, help="what a reward is worth one decision earlier")
flag("--gae_lambda", type=float, default=0.95, help="1 trusts rewards, 0 trusts the values")
flag("--clip", type=float, default=0.2, help="largest change of a probability in an update")
flag("--entropy", type=float, default=0.01, help="weight of the bonus for trying things out")
flag("--width", type=int, default=256, help="of the hidden layer")
flag("--seed", type=int, default=1, help="of weights, actions and games")
flag("--out_dir", default="out/rl", help="folder of the CSV files and the picture")

if __name__ == "__main__":
    args = parser.parse_args()

# heavy imports come after parsing: --help answers at once
import matplotlib
import numpy as np
import torch
import vizdoom
from PIL import Image
from torch import nn
from torch.distributions import Categorical

from checkpoint import short_excepthook
from files.disk import write_atomically
from files.logs import count_text
from files.progress import tqdm
from model import channel_stats, encode_steps, normalize_features
from weights import open_encoder

matplotlib.use("agg")
from matplotlib import pyplot as plt

CROP = 48  # pixels of a picture
TICS = 4  # of the engine, in a decision; there are 35 a second
RECENT = 40  # finished episodes of training that a score is the mean of, the last ones
COLUMNS = ["step", "score", "random", "entropy", "seconds"]


# --- games ---


def open_game(scenario, seed, folder):
    """A game without window and sound. folder: for its settings."""
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_window_visible(False)
    game.set_seed(seed)

    game.set_doom_config_path(os.path.join(folder, "vizdoom.ini"))

    # the engine writes into the working directory while it starts
    here = os.getcwd()
    os.chdir(folder)
    try:
        game.init()
    finally:
        os.chdir(here)
    return game


def picture(game):
    """The middle of the screen, as encode.py cuts it out of a recording: (3, CROP, CROP) uint8."""
    screen = Image.fromarray(game.get_state().screen_buffer)
    middle = screen.reduce(240 // CROP, box=(40, 0, 280, 240))
    return np.asarray(middle).transpose(2, 0, 1)


class Games:
    """Several games, played in step. Each shows its last two pictures. An ended episode is followed
    by the next one."""

    def __init__(self, scenario, count, seed):
        self.folder = tempfile.TemporaryDirectory()
        self.games = []
        for i in range(count):
            self.games.append(open_game(scenario, 1000 * seed + i, self.folder.name))
        buttons = self.games[0].get_available_buttons_size()
        self.presses = np.eye(buttons).tolist()  # one button at a time
        self.shown = [[picture(game)] * 2 for game in self.games]

    def pictures(self):
        """(games, 2, 3, CROP, CROP) uint8."""
        return torch.from_numpy(np.array(self.shown))

    def step(self, actions):
        """Press a button in each game -> (rewards, 1 where an episode ended, scores of those that
        did). Running out of time ends an episode like any other end."""
        rewards = torch.zeros(len(self.games))
        ended = torch.zeros(len(self.games))
        scores = []
        for i, game in enumerate(self.games):
            rewards[i] = game.make_action(self.presses[actions[i]], TICS)
            last = self.shown[i][1]
            if game.is_episode_finished():
                ended[i] = 1
                scores.append(game.get_total_reward())
                game.new_episode()
                last = picture(game)
            self.shown[i] = [last, picture(game)]
        return rewards, ended, scores

    def close(self):
        for game in self.games:
            game.close()
        self.folder.cleanup()


# --- agent ---


def layer(module, gain=2**0.5):
    """Orthogonal weights and no bias, from which PPO usually starts."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def new_cnn():
    """The usual network for Atari games, for our pictures: (B, 6, 48, 48) -> (B, 256)."""
    return nn.Sequential(
        layer(nn.Conv2d(6, 32, 8, stride=4)),
        nn.ReLU(),
        layer(nn.Conv2d(32, 64, 4, stride=2)),
        nn.ReLU(),
        layer(nn.Conv2d(64, 64, 3)),
        nn.ReLU(),
        nn.Flatten(),
    )


class Agent(nn.Module):
    """Policy and value on one hidden layer, over frozen features or over a CNN."""

    def __init__(self, eyes, seen, width, actions):
        super().__init__()
        self.eyes = eyes
        self.hidden = layer(nn.Linear(eyes(seen).shape[1], width))
        self.actor = layer(nn.Linear(width, actions), gain=0.01)
        self.critic = layer(nn.Linear(width, 1), gain=1.0)

    def forward(self, seen):
        """What is seen (B, ...) -> the distribution of actions, the value (B,)."""
        hidden = torch.relu(self.hidden(self.eyes(seen)))
        return Categorical(logits=self.actor(hidden)), self.critic(hidden).squeeze(-1)


@torch.no_grad()
def look(encoder, pictures, feature_stats):
    """Pictures (B, 2, 3, CROP, CROP) -> what the agent sees: features (B, N, D) of a frozen
    encoder, or without one the pixels (B, 6, CROP, CROP)."""
    if encoder is None:
        return pictures.flatten(1, 2).float() / 255
    h = encode_steps(encoder, pictures, "tubelet", 2)  # (B, 1, N, D)
    return normalize_features(h, **feature_stats)[:, 0]


# --- curves ---


def read_runs(out_dir, scenario):
    """Every run of a scenario in a folder: {encoder: [columns by name, of each seed]}."""
    runs = {}
    for path in sorted(glob.glob(f"{glob.escape(out_dir)}/{scenario}-*.csv")):
        encoder = os.path.basename(path)[len(scenario) + 1 :].rpartition("-")[0]
        rows = np.genfromtxt(path, delimiter=",", names=True)
        runs.setdefault(encoder, []).append(np.atleast_1d(rows))
    return runs


def print_runs(runs):
    """A line for each encoder. Seeds differ a lot, so each score is shown."""
    for encoder, seeds in runs.items():
        scores = [rows["score"][-1] for rows in seeds]
        each = " ".join(f"{score:.0f}" for score in scores)
        seeds_text = count_text(len(scores), "seed")
        print(f"{encoder}: score {np.mean(scores):.0f}, mean over {seeds_text} ({each})")


def plot_curves(runs, path, title):
    """Draw `runs` (of read_runs): a thin line for each seed, a thick one for their mean."""
    fig, ax = plt.subplots(figsize=(7, 4))
    for color, (encoder, seeds) in enumerate(runs.items()):
        # a mean over all seeds ends where the shortest run ends
        length = min(map(len, seeds))
        steps = seeds[0]["step"][:length]
        scores = np.stack([rows["score"][:length] for rows in seeds])
        for score in scores:
            ax.plot(steps, score, color=f"C{color}", alpha=0.3, linewidth=0.8)
        label = f"{encoder} ({len(seeds)} seeds)"
        ax.plot(steps, scores.mean(0), color=f"C{color}", label=label)
    random_score = np.mean([rows["random"][0] for seeds in runs.values() for rows in seeds])
    ax.axhline(random_score, color="gray", linestyle=":", label="random play")
    ax.set_xlabel("decisions of the agent")
    ax.set_ylabel(f"score, mean of {RECENT} episodes")
    ax.set_title(title)
    ax.legend()
    fig.tight_layout()
    write_atomically(path, lambda f: fig.savefig(f, dpi=120, format="png"))
    plt.close(fig)


if __name__ == "__main__":
    sys.excepthook = short_excepthook
    counts = ("random_episodes", "num_games", "num_steps", "epochs", "minibatches", "width")
    for name in counts:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: at least 1")
    per_update = args.num_games * args.num_steps
    updates = args.total_steps // per_update
    if updates < 1:
        parser.error(
            f"--total_steps {args.total_steps} is less than one update: give at least"
            f" {per_update} (--num_games times --num_steps)"
        )
    # one decision has no spread to scale advantages by
    if per_update % args.minibatches or per_update < 2 * args.minibatches:
        parser.error(
            f"--minibatches {args.minibatches}: the {per_update} decisions of an update do not make"
            " equal parts of at least 2"
        )

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    began = time.perf_counter()

    # --- eyes ---
    encoder = None
    if args.encoder != "pixels":
        encoder = open_encoder(args.encoder, CROP, 2)
    games = Games(args.scenario, args.num_games, args.seed)
    atexit.register(games.close)
    num_actions = len(games.presses)

    # --- random play: what has to be beaten ---
    random_scores = []
    samples = []
    while len(random_scores) < args.random_episodes:
        scores = games.step(rng.integers(num_actions, size=args.num_games))[2]
        random_scores += scores
        # pictures that follow each other are alike: every tenth is enough
        samples.append(games.pictures())
    random_score = np.mean(random_scores)
    print(f"random play: {random_score:.1f}, mean of {len(random_scores)} episodes")

    # channels of a frozen encoder are centred and scaled by what random play shows
    feature_stats = {}
    if encoder is not None:
        raw = (encode_steps(encoder, x, "tubelet", 2) for x in samples[::10])
        feature_stats = channel_stats(raw, encoder.embed_dim, torch.device("cpu"))

    # --- agent ---
    seen = look(encoder, games.pictures(), feature_stats)
    eyes = nn.Flatten() if encoder is not None else new_cnn()
    agent = Agent(eyes, seen, args.width, num_actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)
    count = sum(p.numel() for p in agent.parameters())
    print(f"{args.encoder}: {count:,} weights are trained")

    # what one update learns from: a row a decision, a column a game
    shape = (args.num_steps, args.num_games)
    all_seen = torch.zeros(*shape, *seen.shape[1:])
    actions = torch.zeros(shape, dtype=torch.long)
    log_probs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    values = torch.zeros(shape)
    ends = torch.zeros(shape)

    # --- train ---
    recent = []
    rows = []
    csv_path = f"{args.out_dir}/{args.scenario}-{args.encoder.replace('/', '_')}-{args.seed}.csv"
    os.makedirs(args.out_dir, exist_ok=True)
    bar = tqdm(range(updates), unit="update")
    for update in bar:
        optimizer.param_groups[0]["lr"] = args.lr * (1 - update / updates)

        # play
        for t in range(args.num_steps):
            with torch.no_grad():
                policy, values[t] = agent(seen)
            all_seen[t] = seen
            actions[t] = policy.sample()
            log_probs[t] = policy.log_prob(actions[t])
            reward, ends[t], scores = games.step(actions[t].tolist())
            rewards[t] = reward * SCENARIOS[args.scenario]
            recent = (recent + scores)[-RECENT:]
            seen = look(encoder, games.pictures(), feature_stats)

        # how much better was each action than expected? (GAE, arXiv 1506.02438)
        with torch.no_grad():
            next_value = agent(seen)[1]
        advantages = torch.zeros(shape)
        advantage = torch.zeros(args.num_games)
        for t in reversed(range(args.num_steps)):
            continues = 1 - ends[t]
            error = rewards[t] + args.gamma * next_value * continues - values[t]
            advantage = error + args.gamma * args.gae_lambda * continues * advantage
            advantages[t] = advantage
            next_value = values[t]
        returns = advantages + values

        # learn (PPO, arXiv 1707.06347)
        flat_seen = all_seen.flatten(0, 1)
        for _ in range(args.epochs):
            for ids in torch.randperm(per_update).chunk(args.minibatches):
                policy, value = agent(flat_seen[ids])
                log_prob = policy.log_prob(actions.flatten()[ids])
                ratio = (log_prob - log_probs.flatten()[ids]).exp()

                # good actions become more likely, but not by more than --clip
                gain = advantages.flatten()[ids]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = -torch.min(ratio * gain, clipped * gain).mean()

                value_loss = 0.5 * (value - returns.flatten()[ids]).square().mean()
                entropy = policy.entropy().mean()
                loss = policy_loss + 0.5 * value_loss - args.entropy * entropy

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()

        # log; before the first episode of training ends there is no score
        score = np.mean(recent) if recent else math.nan
        bar.set_postfix_str(f"score {score:.1f}")
        seconds = time.perf_counter() - began
        rows.append([(update + 1) * per_update, score, random_score, entropy.item(), seconds])

    # --- end ---
    games.close()
    with open(csv_path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    seconds = time.perf_counter() - began
    print(
        f"{args.encoder}, seed {args.seed}: score {score:.1f}, mean of the last {len(recent)}"
        f" episodes; random play {random_score:.1f}; {seconds / 60:.1f} minutes"
    )

    # beside all other runs in the folder
    runs = read_runs(args.out_dir, args.scenario)
    picture_path = f"{args.out_dir}/{args.scenario}.png"
    print_runs(runs)
    plot_curves(runs, picture_path, args.scenario)
    print(f"{csv_path}; all runs in {picture_path}")
