"""Heads on frozen features, for probe.py: the clips they are fitted and tested on, a linear and an
attentive one, tasks and scores."""

import contextlib
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    r2_score,
    roc_auc_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader

from data import Clips, collate, ignore_signals_in_worker, windows
from evaluation.ranks import gathered, share
from files.disk import READ_ERRORS, Unreachable, with_storage_retries
from files.progress import tqdm
from files.video import WrongDecoder
from files.vpt import CONTINUOUS, HOTBAR, SLOTS
from model import Block, predict

# principal components of a token whose products the linear head gets
RANK = 48

# penalties that the linear head tries, as shares of the number of rows it is fitted on
PENALTIES = (0.1, 1, 10, 1000)


# --- clips ---


class Windows(Clips):
    """Clips whose item is (item, clip or None, what is wrong with it or None): a label belongs to
    this window and to no other."""

    def __getitem__(self, item):
        r = self.records[item[2]]
        read_again = functools.partial(self.read_seeded, *item[2:], 0, False)
        try:
            return item, with_storage_retries(f"{r.shard} {r.key}", read_again), None
        except Unreachable as e:  # a fault of the network, not of the recording
            raise ValueError(str(e)) from e
        except WrongDecoder as e:
            raise ValueError(f"{r.shard} {r.key}: {e}") from e
        except READ_ERRORS as e:
            return item, None, (r.shard, r.key, f"{type(e).__name__}: {e}")


def pool(z, side):
    """Tokens (..., N, D) of a square grid -> the mean over at most side x side cells, (..., M, D)
    float16."""
    # features of a ViT-g have 256 tokens a step: all windows of them would fill the memory
    grid = math.isqrt(z.shape[-2])
    if grid > side:
        cells = z.flatten(0, -3).transpose(1, 2).unflatten(2, (grid, grid))
        means = F.adaptive_avg_pool2d(cells, side).flatten(2).transpose(1, 2)
        z = means.unflatten(0, z.shape[:-2])
    return z.half().cpu()


def load(
    records,
    reader,
    features_of,
    predictor,
    scaler,
    limit,
    *,
    side,
    batch_size,
    num_workers,
    autocast=contextlib.nullcontext,
):
    """At most `limit` windows -> (clips, [bad]). Each rank reads a share, and gets all. clips: "z"
    (n, T, M, D); "ahead" (n, T-1, M, D), with a predictor: one step ahead of the true context under
    the true action, else None; "actions" (n, T-1, A) as recorded; "place" [(Record, window)].
    ValueError if no window can be read."""
    # windows that are spread over all recordings
    dataset = Windows(records, [1.0] * len(records), reader)
    loader = DataLoader(
        dataset,
        batch_sampler=share(windows(dataset, batch_size, limit)),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=ignore_signals_in_worker,
    )
    batches = []
    for rows in tqdm(loader, desc="features", unit=" batches", delay=10):
        # what cannot be read is left out, and nothing is read in its place
        result = {"bad": [reason for _, _, reason in rows if reason]}
        batches.append(result)
        good = [(item, clip) for item, clip, _ in rows if clip]
        if not good:
            continue

        # features of the true steps
        batch = collate([clip | {"bad": []} for _, clip in good])
        if "actions" not in batch:
            # plain video: nobody knows what was done
            nothing = torch.zeros(len(good), reader.frames // reader.frames_per_step - 1, 0)
            batch |= {"actions": nothing, "states": nothing}
        z, actions, states = features_of(batch)
        result["z"] = pool(z, side)

        # and those that the predictor expects under the true actions, scaled as it takes them
        if predictor is not None:
            scaled = np.float32(scaler.transform(batch["actions"].numpy()))
            scaled = torch.from_numpy(scaled).to(z.device)
            with torch.no_grad(), autocast():
                result["ahead"] = pool(predict(predictor, z[:, :-1], scaled, states), side)

        # labels are the actions as they were recorded
        result["actions"] = batch["actions"].numpy()
        result["items"] = [item for item, _ in good]

    # all ranks know all batches
    batches = gathered(batches)
    bad = sum((result["bad"] for result in batches), [])
    batches = [result for result in batches if "z" in result]
    if not batches:
        raise ValueError(
            f"{records[0].shard} and the others give no clip of {reader.frames} frames at"
            f" {reader.fps:g} fps: {bad[:1]}"
        )
    clips = {
        "z": torch.cat([result["z"] for result in batches]),
        "ahead": None,
        "actions": np.concatenate([result["actions"] for result in batches]),
        "place": [],
    }
    if predictor is not None:
        clips["ahead"] = torch.cat([result["ahead"] for result in batches])
    for result in batches:
        clips["place"] += [(records[item[2]], item[3]) for item in result["items"]]
    return clips, bad


# --- heads ---
# predict(a, b): tokens (n, M, D) of two steps -> scores (n, O), in the units of y, keys as 0 and 1


class RidgeHead:
    """Ridge regression on what camera motion is linear in: the sum over patches of a_i b_j - a_j
    b_i, for the RANK main components of a token, which changes its sign when time runs backwards;
    and on the mean tokens of both steps. On the two steps alone R² is 0 on the demo."""

    def fit(self, a, b, y, dev):
        """a, b: tokens (n, M, D) of two steps; y (n, O); dev (n,) bool: the rows that choose the
        penalties, the others are fitted on."""
        # main components of a token, on 50,000 tokens at most
        fit = ~dev
        tokens = a[fit].flatten(0, 1)
        every = max(len(tokens) // 50_000, 1)
        tokens = tokens[::every].float().numpy()
        self.pca = PCA(min(RANK, *tokens.shape), random_state=0)
        self.pca.fit(tokens)

        # all inputs in the same units, or the penalty would favour some of them
        x = self.inputs(a, b)
        self.scaler = StandardScaler().fit(x[fit])
        x = self.scaler.transform(x)

        # one penalty for each column: the one with the least error on the dev rows
        ridges = [Ridge(alpha=share * fit.sum()).fit(x[fit], y[fit]) for share in PENALTIES]
        errors = []
        for ridge in ridges:
            # a ridge of one column answers (n,), not (n, 1)
            guess = ridge.predict(x[dev]).reshape(y[dev].shape)
            errors.append(((guess - y[dev]) ** 2).mean(0))
        best = np.argmin(errors, axis=0)

        # weights and bias of each column, of the ridge with that penalty
        columns = np.arange(len(best))
        self.weight = np.stack([np.atleast_2d(r.coef_) for r in ridges])[best, columns]
        self.bias = np.stack([np.atleast_1d(r.intercept_) for r in ridges])[best, columns]
        return self

    def components(self, x):
        """Tokens (n, M, D) -> their principal components (n, M, RANK)."""
        rows = self.pca.transform(x.flatten(0, 1).float().numpy())
        return torch.from_numpy(np.float32(rows)).unflatten(0, x.shape[:2])

    def inputs(self, a, b):
        """What the regression is on, (n, RANK (RANK - 1) / 2 + 2 D)."""
        # all products of a component of one step with one of the next
        products = self.components(a).transpose(1, 2) @ self.components(b)  # (n, RANK, RANK)
        i, j = torch.triu_indices(*products.shape[1:], 1)

        # what changes its sign with the direction of time: half of the matrix holds all of it
        turned = (products - products.mT)[:, i, j]
        return torch.cat([turned, a.float().mean(1), b.float().mean(1)], dim=1).numpy()

    def predict(self, a, b):
        return self.scaler.transform(self.inputs(a, b)) @ self.weight.T + self.bias


class Attentive(nn.Module):
    """V-JEPA's attentive probe in miniature: a token of both steps -> one block -> learned queries
    attend to all tokens -> linear, with so many outputs."""

    def __init__(self, tokens, dim, outputs, width=128, queries=4, heads=4):
        super().__init__()
        # tokens of both steps, side by side, with their place
        self.embed = nn.Linear(dim, width)
        self.pos = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.drop = nn.Dropout(0.2)
        self.block = Block(width, heads, 2 * width)
        self.norm = nn.LayerNorm(width)

        # learned queries collect what tells the action
        self.query = nn.Parameter(0.02 * torch.randn(queries, width))
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out_norm = nn.LayerNorm(queries * width)
        self.head = nn.Linear(queries * width, outputs)

        # of the columns that are no keys; where trust is 0 the mean is the better guess
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("std", torch.ones(outputs))
        self.register_buffer("trust", torch.ones(outputs))

    def forward(self, x):
        # one block over the tokens, then the queries attend to them
        x = self.embed(self.drop(x)) + self.pos
        x = self.norm(self.block(x)[0])
        queries = self.query.expand(len(x), -1, -1)
        x = self.attend(queries, x, x, need_weights=False)[0]
        return self.head(self.drop(self.out_norm(x.flatten(1))))

    def train_on(self, inputs, n, loss, steps):
        """AdamW on random batches; inputs(rows) -> (rows, tokens, dim), loss(outputs, rows)."""
        # strong decay and short runs: heads learn small data by heart
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(steps), desc="attentive head", unit=" steps", delay=10):
            rows = torch.randint(n, (min(n, 128),), generator=generator)
            loss(self(inputs(rows)), rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return self.eval()

    def fit(self, a, b, y, dev, keys, steps):
        """As RidgeHead.fit. keys (O,) bool: which columns of y are 0 or 1."""
        # the dev rows are kept for what is chosen after training
        self.keys = keys
        device = self.mean.device
        y_dev = y[dev]
        fit = torch.from_numpy(np.flatnonzero(~dev))

        # motion is learned in units of its spread
        y = torch.from_numpy(y[~dev]).float()
        self.mean[~keys] = y[:, ~keys].mean(0).to(self.mean)
        self.std[~keys] = y[:, ~keys].std(0).clamp_min(1e-6).to(self.mean)
        y = ((y - self.mean.cpu()) / self.std.cpu()).to(device)

        def inputs(rows):
            return torch.cat([a[fit[rows]], b[fit[rows]]], dim=2).float().to(device)

        def loss(outputs, rows):
            truth = y[rows]
            camera, pressed = 0, 0
            if (~keys).any():
                camera = F.mse_loss(outputs[:, ~keys], truth[:, ~keys])
            if keys.any():
                logits = outputs[:, keys]
                pressed = F.binary_cross_entropy_with_logits(logits, truth[:, keys])

            # at 1 the camera is all that is learned, at 10 the keys
            return camera + 3 * pressed

        self.train_on(inputs, len(y), loss, steps)

        # the slope of the truth on the guesses in the dev rows: below 1, the rest of the guess was
        # learned by heart
        mean = self.mean.cpu().numpy()
        guess = self.predict(a[dev], b[dev]) - mean
        true = y_dev - mean
        slope = np.clip((guess * true).sum(0) / (guess * guess).sum(0), 0, 1)
        self.trust[~keys] = torch.from_numpy(slope[~keys]).to(self.trust)
        return self

    @torch.no_grad()
    def predict(self, a, b):
        # in parts, because the features of all clips need not fit on the GPU
        device = self.mean.device
        outputs = []
        for part in zip(a.split(1024), b.split(1024)):
            x = torch.cat(part, 2).float().to(device)
            outputs.append(self(x))
        outputs = torch.cat(outputs)

        # camera in its units, keys as probabilities
        camera = outputs * self.std * self.trust + self.mean
        keys = torch.from_numpy(self.keys).to(device)
        scores = torch.where(keys, outputs.sigmoid(), camera)
        return scores.cpu().double().numpy()


def fit_heads(a, b, y, dev, keys, steps):
    """{"linear", "attentive"}: fitted heads, each with threshold (O,): a key counts as pressed
    above the score that it exceeds, in the dev recordings, as often as it is pressed there (a key
    that never is, never counts)."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attentive = Attentive(a.shape[1], 2 * a.shape[2], y.shape[1]).to(device)
    heads = {
        "linear": RidgeHead().fit(a, b, y, dev),
        "attentive": attentive.fit(a, b, y, dev, keys, steps),
    }

    # thresholds: as often above them as the key is pressed
    shares = y[dev].mean(0).clip(0)
    for head in heads.values():
        scores = head.predict(a[dev], b[dev])
        levels = [np.quantile(p, 1 - min(share, 1)) for p, share in zip(scores.T, shares)]
        head.threshold = np.array(levels)
    return heads


def score(y, p, names, threshold):
    """{name: {"r2"} or {"auroc", "share", "f1"}} of scores p (n, O); nothing for what does not vary
    in y."""
    # a key that is never pressed, or always, has no AUROC
    scores = {}
    for i, name in enumerate(names):
        if name in CONTINUOUS:
            scores[name] = {"r2": float(r2_score(y[:, i], p[:, i]))}
        elif 0 < y[:, i].mean() < 1:
            scores[name] = {
                "auroc": float(roc_auc_score(y[:, i], p[:, i])),
                "share": float(y[:, i].mean()),
                "f1": float(f1_score(y[:, i], p[:, i] > threshold[i], zero_division=0)),
            }
    return scores


def group_means(scores):
    """{"camera": mean R² of mouse and angles, "keys": mean AUROC of keys and buttons, "hotbar": of
    its keys and slots, "gui": of an open GUI}; nothing for a group without scores.

    The hotbar is apart because it can be read at the bottom of every picture."""
    groups = {"camera": [], "keys": [], "hotbar": [], "gui": []}
    for name, s in scores.items():
        if "r2" in s:
            groups["camera"].append(s["r2"])
        elif name in HOTBAR + SLOTS:
            groups["hotbar"].append(s["auroc"])
        elif name == "gui_open":
            groups["gui"].append(s["auroc"])
        else:
            groups["keys"].append(s["auroc"])
    return {k: float(np.mean(v)) for k, v in groups.items() if v}


# --- tasks ---


def pairs(clips, second="z"):
    """Tokens of steps t and t+1 (of "ahead": predicted) and action t of all clips: (n, M, D), (n,
    M, D), (n, A)."""
    a = clips["z"][:, :-1].flatten(0, 1)
    b = clips["ahead"] if second == "ahead" else clips["z"][:, 1:]
    actions = clips["actions"]
    return a, b.flatten(0, 1), actions.reshape(-1, actions.shape[-1])


def inverse(train, val, dev, names, columns, steps):
    """Inverse dynamics: steps t, t+1 -> action t. Returns scores {"real -> real": {head: scores},
    ...} of probes fitted on real and predicted pairs and tested on either, and the heads fitted on
    real ones. dev: clips that choose penalties and thresholds; columns: of the actions to probe."""
    # rows are pairs of steps, so each clip's choice is repeated for its pairs
    labels = [names[i] for i in columns]
    keys = np.array([name not in CONTINUOUS for name in labels])
    dev = np.repeat(dev, train["actions"].shape[1])

    # pairs whose second step is real, and predicted by the run
    kinds = {"real": "z"}
    if train["ahead"] is not None:
        kinds["predicted"] = "ahead"

    # fitted on either kind, tested on either: how much alike are they?
    scores = {}
    on_real = None
    for fitted, fit_kind in kinds.items():
        a, b, y = pairs(train, fit_kind)
        heads = fit_heads(a, b, y[:, columns], dev, keys, steps)
        if fitted == "real":
            on_real = heads
        for tested, test_kind in kinds.items():
            a, b, y = pairs(val, test_kind)
            of_heads = {}
            for name, head in heads.items():
                guess = head.predict(a, b)
                of_heads[name] = score(y[:, columns], guess, labels, head.threshold)
            scores[f"{fitted} -> {tested}"] = of_heads
    return scores, on_real


def anticipation(train, val, dev, names, columns, steps, horizon):
    """[{head or baseline: scores} of the 1st .. horizon-th action after step t], from steps t-1 and
    t. Baselines: the last action again, the training mean."""
    # what is predicted: horizon actions, side by side
    A = len(columns)
    labels = [names[i] for i in columns]
    keys = np.array([name not in CONTINUOUS for name in labels] * horizon)
    last = train["z"].shape[1] - 1 - horizon  # the last step t that all these actions follow

    def cut(clips):
        """Tokens of steps t-1 and t, and actions (n, horizon + 1, A) from t-1 on."""
        actions = clips["actions"]
        following = [actions[:, 1 + k : 1 + k + last, columns] for k in range(-1, horizon)]
        y = np.stack(following, axis=2).reshape(-1, horizon + 1, A)
        before = clips["z"][:, :last].flatten(0, 1)
        now = clips["z"][:, 1 : last + 1].flatten(0, 1)
        return before, now, y

    a, b, y = cut(train)
    a_val, b_val, y_val = cut(val)
    heads = fit_heads(a, b, y[:, 1:].reshape(len(y), -1), np.repeat(dev, last), keys, steps)

    # guesses and their thresholds, of heads and of baselines that see no picture
    guesses = {k: h.predict(a_val, b_val).reshape(-1, horizon, A) for k, h in heads.items()}
    levels = {k: h.threshold.reshape(horizon, A) for k, h in heads.items()}
    guesses["repeat"] = np.repeat(y_val[:, :1], horizon, 1)
    guesses["mean"] = np.broadcast_to(y[:, 1:].mean(0), y_val[:, 1:].shape)
    levels["repeat"] = levels["mean"] = np.full((horizon, A), 0.5)

    # a row for each action ahead
    rows = []
    for t in range(horizon):
        truth = y_val[:, 1 + t]
        row = {}
        for name, guess in guesses.items():
            row[name] = score(truth, guess[:, t], labels, levels[name][t])
        rows.append(row)
    return rows


# what the player does between two steps, in the order of columns
MOVES = ["turn yaw", "turn pitch", "walk forward", "walk sideways"]


def motion(train, val, dev, y, y_val, steps, ahead):
    """How far does the player turn and walk from step t to step t + ahead? Scores {head: {name of
    MOVES: {"r2"}}}, from the tokens of both steps.

    y (n, T - ahead, 4): the truth of the fitting clips, y_val of the others; a column that is not
    known (nan) or does not vary in one of them is left out, {} if none is left. dev: clips that
    choose penalties."""
    # rows are pairs of steps
    y = y.reshape(-1, len(MOVES))
    y_val = y_val.reshape(-1, len(MOVES))
    is_known = np.isfinite(y).all(0) & np.isfinite(y_val).all(0)
    varies = (y.std(0) > 0) & (y_val.std(0) > 0)
    columns = np.flatnonzero(is_known & varies)
    if not len(columns):
        return {}

    # steps that lie `ahead` apart, of all clips
    a = train["z"][:, :-ahead].flatten(0, 1)
    b = train["z"][:, ahead:].flatten(0, 1)
    no_keys = np.zeros(len(columns), bool)
    dev = np.repeat(dev, train["z"].shape[1] - ahead)
    heads = fit_heads(a, b, y[:, columns], dev, no_keys, steps)

    # judged on recordings that neither head has seen
    a_val = val["z"][:, :-ahead].flatten(0, 1)
    b_val = val["z"][:, ahead:].flatten(0, 1)
    scores = {}
    for head, fitted in heads.items():
        guess = fitted.predict(a_val, b_val)
        scores[head] = {
            MOVES[column]: {"r2": float(r2_score(y_val[:, column], guess[:, i]))}
            for i, column in enumerate(columns)
        }
    return scores


def order(train, val, dev, steps):
    """Of two different steps of a clip, which one comes first, and how many steps lie between them?
    Scores {head: {"first": {"auroc"}, "apart": {"r2"}}}; needs no actions. Chance is an AUROC of
    0.5 and an R² of 0. dev: clips that choose penalties."""
    # the same pairs for every encoder: of each clip eight, in either order
    T = train["z"].shape[1]
    every_pair = [(i, j) for i in range(T) for j in range(T) if i != j]
    random = np.random.default_rng(0)

    def cut(clips):
        """Tokens of both steps, and y (n, 2): whether the first one is earlier, and how many steps
        they are apart."""
        n = len(clips["z"])
        pairs = random.choice(every_pair, (n, 8))
        row = torch.arange(n)[:, None]
        a = clips["z"][row, pairs[..., 0]].flatten(0, 1)
        b = clips["z"][row, pairs[..., 1]].flatten(0, 1)
        ahead = pairs[..., 1] - pairs[..., 0]
        y = np.stack([ahead > 0, abs(ahead)], axis=-1)
        return a, b, y.reshape(-1, 2).astype(float)

    a, b, y = cut(train)
    a_val, b_val, y_val = cut(val)
    is_key = np.array([True, False])
    heads = fit_heads(a, b, y, np.repeat(dev, 8), is_key, steps)

    # judged on recordings that neither head has seen
    scores = {}
    for head, fitted in heads.items():
        guess = fitted.predict(a_val, b_val)
        scores[head] = {
            "first": {"auroc": float(roc_auc_score(y_val[:, 0], guess[:, 0]))},
            # two steps are always as far apart
            "apart": {"r2": float(r2_score(y_val[:, 1], guess[:, 1])) if T > 2 else math.nan},
        }
    return scores


def classes_in_both(y, y_val, column):
    """Labels that clips to fit on and clips to test on have ("": none). Prints which only one of
    them has; ValueError if there is nothing to tell apart."""
    # one value in all clips can be told from nothing
    values = set(y) | set(y_val) - {""}
    if len(values) < 2:
        raise ValueError(
            f"the label {column} is {min(values, default='empty')} in every clip: there is nothing"
            " to tell apart"
        )

    # classes that only one split has cannot be learned, or not be tested
    both = sorted((set(y) & set(y_val)) - {""})
    for name in sorted(values - set(both) - {""}):
        print(f"left out: {column} {name} occurs in {'--data' if name in y else '--val_data'} only")
    if len(both) < 2 or len(both) > len(y) / 4:
        raise ValueError(
            f"the label {column} has {len(both)} values that both splits hold, for {len(y)} clips:"
            " a class needs a few clips"
        )
    return both


def classify(train, val, y, y_val, column, steps):
    """Scores {head: {"accuracy", "balanced"}, "chance": ..., "classes", "clips"} of labels (n,) of
    clips ("": none), from mean and std over their steps. column: the label's name, for messages."""
    # clips with a label that both splits have
    classes = classes_in_both(y, y_val, column)
    fit = np.flatnonzero(np.isin(y, classes))
    test = np.flatnonzero(np.isin(y_val, classes))
    y = np.searchsorted(classes, y[fit])
    y_val = np.searchsorted(classes, y_val[test])

    def over_steps(clips, rows):
        """Mean and std of tokens over the steps of clips, (rows, M, 2D) float16."""
        z = clips["z"][torch.from_numpy(rows)].float()
        return torch.cat([z.mean(1), z.std(1)], dim=2).half()

    x = over_steps(train, fit)
    x_val = over_steps(val, test)

    # the linear head, on the mean token
    regression = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced")
    linear = make_pipeline(StandardScaler(), regression)
    linear.fit(x.float().mean(1).numpy(), y)
    guess = {"linear": linear.predict(x_val.float().mean(1).numpy())}

    # the attentive head; rare classes weigh as much as common ones
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.from_numpy(y)
    weight = torch.from_numpy(len(y) / (len(classes) * np.bincount(y))).float().to(device)
    head = Attentive(x.shape[1], x.shape[2], len(classes)).to(device)
    head.train_on(
        lambda rows: x[rows].float().to(device),
        len(x),
        lambda scores, rows: F.cross_entropy(scores, target[rows].to(device), weight),
        steps,
    )
    with torch.no_grad():
        parts = [head(part.float().to(device)).argmax(1).cpu() for part in x_val.split(256)]
    guess["attentive"] = torch.cat(parts).numpy()

    # the bar: always the commonest class of the fitting clips
    guess["chance"] = np.full(len(y_val), np.bincount(y).argmax())
    scores = {}
    for name, p in guess.items():
        scores[name] = {
            "accuracy": accuracy_score(y_val, p),
            "balanced": balanced_accuracy_score(y_val, p),
        }
    return scores | {"classes": classes, "clips": [len(y), len(y_val)]}


# --- tables ---


def inverse_table(scores):
    """Lines for a person: every action on real pairs, then what probes fitted on real or predicted
    pairs say on either."""
    # every action on real pairs
    real = scores["real -> real"]
    yield "inverse dynamics: steps t, t+1 -> action t           linear     attentive"
    for name, linear in real["linear"].items():
        attentive = real["attentive"][name]
        if "r2" in linear:
            yield f"  {name:18} R2                     {linear['r2']:11.3f} {attentive['r2']:11.3f}"
        else:
            cells = "".join(f" {s['auroc']:7.3f} {s['f1']:.2f}" for s in (linear, attentive))
            yield f"  {name:18} AUROC, F1 (pressed {linear['share']:5.1%}) {cells}"

    # means of the groups, for all four ways
    yield "fitted on -> tested on     camera R2: linear  attentive   keys AUROC: linear  attentive"
    for way, heads in scores.items():
        linear = group_means(heads["linear"])
        attentive = group_means(heads["attentive"])
        yield (
            f"  {way:25} {linear.get('camera', math.nan):16.3f}"
            f" {attentive.get('camera', math.nan):10.3f} {linear.get('keys', math.nan):20.3f}"
            f" {attentive.get('keys', math.nan):10.3f}"
        )


def anticipation_table(scores, seconds):
    """Lines for a person: mean camera R2 and keys AUROC of the heads and of both baselines, by how
    far ahead an action starts. seconds: length of a step."""
    yield (
        f"anticipation: steps t-1, t -> action         {'linear':>10} {'attentive':>10}"
        f" {'repeat last':>12} {'mean':>8}"
    )
    for group, metric in (("camera", "R2"), ("keys", "AUROC")):
        for k, ahead in enumerate(scores):
            means = {name: group_means(s).get(group, math.nan) for name, s in ahead.items()}
            span = f"{k * seconds:.1f} to {(k + 1) * seconds:.1f} s ahead"
            yield (
                f"  {group + ' ' + metric:14} {span:26} {means['linear']:12.3f}"
                f" {means['attentive']:10.3f} {means['repeat']:12.3f} {means['mean']:8.3f}"
            )


def motion_table(scores, seconds):
    """Lines for a person; seconds: between the two steps."""
    if not scores:
        yield "note: no motion to probe: nothing turns or walks in both splits"
        return
    title = f"motion: steps {seconds:.2g} s apart -> how far"
    yield f"{title:46} {'linear':>10} {'attentive':>10}"
    for name, linear in scores["linear"].items():
        attentive = scores["attentive"][name]["r2"]
        yield f"  {name:18} R2 {'':22} {linear['r2']:11.3f} {attentive:10.3f}"


def order_table(scores):
    """Lines for a person."""
    yield f"{'order: two steps of a clip, as they come':46} {'linear':>10} {'attentive':>10}"
    for name, metric, text in (
        ("first", "auroc", "which is earlier: AUROC (chance 0.5)"),
        ("apart", "r2", "how far apart: R2 (chance 0)"),
    ):
        linear, attentive = (scores[head][name][metric] for head in ("linear", "attentive"))
        yield f"  {text:44} {linear:10.3f} {attentive:10.3f}"


def rows_to_compare(report):
    """{what is measured: score of the better head} of the report on one encoder: those numbers that
    say most about features."""
    rows = {}

    def add(name, scores, metric, heads=("linear", "attentive")):
        """The better head's, where both have one."""
        values = [scores[head][metric] for head in heads if metric in scores.get(head, {})]
        if values:
            rows[name] = max(values)

    # means over actions, on pairs of true steps
    if "inverse" in report:
        of_heads = report["inverse"]["real -> real"]
        real = {head: group_means(s) for head, s in of_heads.items()}
        yaws = {head: s.get("yaw_diff", {}) for head, s in of_heads.items()}
        add("inverse: yaw R2", yaws, "r2")
        add("inverse: camera R2", real, "camera")
        add("inverse: keys AUROC", real, "keys")
        add("inverse: hotbar AUROC", real, "hotbar")
        add("inverse: GUI AUROC", real, "gui")

    # the action that follows at once
    if "anticipation" in report:
        first = {head: group_means(s) for head, s in report["anticipation"][0].items()}
        add("anticipation: camera R2", first, "camera")
        add("anticipation: keys AUROC", first, "keys")
        add("anticipation, repeat last: keys AUROC", first, "keys", ["repeat"])

    # how far, and which class
    for name in MOVES:
        of_move = {head: s.get(name, {}) for head, s in report.get("motion", {}).items()}
        add(f"motion: {name} R2", of_move, "r2")
    if "order" in report:
        first, apart = (
            {head: s[name] for head, s in report["order"].items()} for name in ("first", "apart")
        )
        add("order: which step is earlier, AUROC", first, "auroc")
        add("order: steps between, R2", apart, "r2")
    if "classify" in report:
        add("classes: balanced accuracy", report["classify"], "balanced")
        add("classes, commonest: balanced accuracy", report["classify"], "balanced", ["chance"])
    return rows


def comparison_table(reports):
    """{encoder: report} -> lines for a person: the better head's score, a column an encoder."""
    columns = {name: rows_to_compare(report) for name, report in reports.items()}
    names = dict.fromkeys(row for rows in columns.values() for row in rows)

    # names of files are long: their ends tell them apart
    width = max(12, *(min(len(name), 24) + 2 for name in columns))
    yield f"{'the better of both heads':42}" + "".join(f"{c[-24:]:>{width}}" for c in columns)
    for row in names:
        cells = "".join(f"{rows.get(row, math.nan):{width}.3f}" for rows in columns.values())
        yield f"  {row:40}" + cells


def classify_table(scores, column):
    """Lines for a person."""
    yield (
        f"clip classification: {column}, {len(scores['classes'])} classes       accuracy   balanced"
    )
    for name in ("linear", "attentive", "chance"):
        label = "chance (commonest)" if name == "chance" else name
        yield f"  {label:45} {scores[name]['accuracy']:8.3f} {scores[name]['balanced']:10.3f}"
