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
        # always seed 0: every encoder is shown the same frames of a window
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
        cells = z.flatten(0, -3).transpose(1, 2)
        cells = cells.unflatten(2, (grid, grid))  # (..., D, grid, grid)
        means = F.adaptive_avg_pool2d(cells, side)
        means = means.flatten(2).transpose(1, 2)
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
    batches_of_this_rank = share(windows(dataset, batch_size, limit))
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of_this_rank,
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
            steps = reader.frames // reader.frames_per_step
            nothing = torch.zeros(len(good), steps - 1, 0)
            batch |= {"actions": nothing, "states": nothing}
        z, _, states = features_of(batch)
        result["z"] = pool(z, side)

        # and those that the predictor expects under the true actions, scaled as it takes them
        if predictor is not None:
            scaled = np.float32(scaler.transform(batch["actions"].numpy()))
            scaled = torch.from_numpy(scaled).to(z.device)
            with torch.no_grad(), autocast():
                ahead = predict(predictor, z[:, :-1], scaled, states)
                result["ahead"] = pool(ahead, side)

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

    # labels from elsewhere are looked up by the place of a clip
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
        stride = max(len(tokens) // 50_000, 1)
        tokens = tokens[::stride].float().numpy()
        rank = min(RANK, *tokens.shape)
        self.pca = PCA(rank, random_state=0).fit(tokens)

        # all inputs in the same units, or the penalty would favour some of them
        x = self.inputs(a, b)
        self.scaler = StandardScaler().fit(x[fit])
        x = self.scaler.transform(x)

        # a ridge of all columns for each penalty; one of a single column leaves its dimension out
        weights = []
        biases = []
        errors = []
        for penalty in PENALTIES:
            ridge = Ridge(alpha=penalty * fit.sum()).fit(x[fit], y[fit])
            guess = ridge.predict(x[dev]).reshape(y[dev].shape)
            errors.append(np.square(guess - y[dev]).mean(0))
            weights.append(np.atleast_2d(ridge.coef_))
            biases.append(np.atleast_1d(ridge.intercept_))

        # columns differ in how hard they are, so each has the penalty of its least dev error
        best = np.argmin(errors, axis=0)
        columns = np.arange(len(best))
        self.weight = np.stack(weights)[best, columns]
        self.bias = np.stack(biases)[best, columns]
        return self

    def components(self, x):
        """Tokens (n, M, D) -> their principal components (n, M, RANK)."""
        rows = self.pca.transform(x.flatten(0, 1).float().numpy())
        return torch.from_numpy(np.float32(rows)).unflatten(0, x.shape[:2])

    def inputs(self, a, b):
        """What the regression is on, (n, RANK (RANK - 1) / 2 + 2 D)."""
        # all products of a component of one step with one of the next
        before = self.components(a)
        after = self.components(b)
        products = before.transpose(1, 2) @ after  # (n, RANK, RANK)

        # what changes its sign with the direction of time: half of the matrix holds all of it
        i, j = torch.triu_indices(*products.shape[1:], 1)
        turned = (products - products.mT)[:, i, j]

        # what the pictures show: a key need not move anything
        a_mean = a.float().mean(1)
        b_mean = b.float().mean(1)
        return torch.cat([turned, a_mean, b_mean], dim=1).numpy()

    def predict(self, a, b):
        x = self.scaler.transform(self.inputs(a, b))
        return x @ self.weight.T + self.bias


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
        x, _ = self.block(x)
        x = self.norm(x)
        queries = self.query.expand(len(x), -1, -1)
        x, _ = self.attend(queries, x, x, need_weights=False)

        # what all queries have collected tells the action
        x = self.out_norm(x.flatten(1))
        return self.head(self.drop(x))

    def train_on(self, inputs, n, loss, steps):
        """AdamW on random batches; inputs(rows) -> (rows, tokens, dim), loss(outputs, rows)."""
        # strong decay and short runs: heads learn small data by heart
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(steps), desc="attentive head", unit=" steps", delay=10):
            rows = torch.randint(n, (min(n, 128),), generator=generator)
            outputs = self(inputs(rows))
            loss(outputs, rows).backward()
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
            rows = fit[rows]
            return torch.cat([a[rows], b[rows]], dim=2).float().to(device)

        def loss(outputs, rows):
            truth = y[rows]
            camera = 0
            pressed = 0
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
        for a_part, b_part in zip(a.split(1024), b.split(1024)):
            x = torch.cat([a_part, b_part], dim=2)
            outputs.append(self(x.float().to(device)))
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

    # thresholds: as often above them as the key is pressed. Motion has a mean, not a share: its
    # threshold is not used
    shares = y[dev].mean(0).clip(0, 1)
    for head in heads.values():
        scores = head.predict(a[dev], b[dev])
        levels = [np.quantile(p, 1 - pressed) for p, pressed in zip(scores.T, shares)]
        head.threshold = np.array(levels)
    return heads


def score(y, p, names, threshold):
    """{name: {"r2"} or {"auroc", "share", "f1"}} of scores p (n, O); nothing for what does not vary
    in y."""
    # a key that is never pressed, or always, has no AUROC
    scores = {}
    for i, name in enumerate(names):
        truth = y[:, i]
        guess = p[:, i]
        if name in CONTINUOUS:
            scores[name] = {"r2": float(r2_score(truth, guess))}
        elif 0 < truth.mean() < 1:
            is_pressed = guess > threshold[i]
            scores[name] = {
                "auroc": float(roc_auc_score(truth, guess)),
                "share": float(truth.mean()),
                "f1": float(f1_score(truth, is_pressed, zero_division=0)),
            }
    return scores


def group_means(scores):
    """{"camera": mean R² of mouse and angles, "keys": mean AUROC of keys and buttons, "hotbar": of
    its keys and slots, "gui": of an open GUI}; nothing for a group without scores.

    The hotbar is apart because it can be read at the bottom of every picture."""
    groups = {"camera": [], "keys": [], "hotbar": [], "gui": []}
    for name, of_action in scores.items():
        if "r2" in of_action:
            groups["camera"].append(of_action["r2"])
        elif name in HOTBAR + SLOTS:
            groups["hotbar"].append(of_action["auroc"])
        elif name == "gui_open":
            groups["gui"].append(of_action["auroc"])
        else:
            groups["keys"].append(of_action["auroc"])
    return {group: float(np.mean(values)) for group, values in groups.items() if values}


# --- tasks ---


def pairs(clips, second="z"):
    """Tokens of steps t and t+1 (of "ahead": predicted) and action t of all clips: (n, M, D), (n,
    M, D), (n, A)."""
    # "ahead" has no first step, which nothing precedes
    a = clips["z"][:, :-1]
    b = clips["ahead"] if second == "ahead" else clips["z"][:, 1:]
    actions = clips["actions"]
    return a.flatten(0, 1), b.flatten(0, 1), actions.reshape(-1, actions.shape[-1])


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

        # judged on recordings that no head has seen
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
        actions = clips["actions"][:, :, columns]
        following = [actions[:, k : k + last] for k in range(horizon + 1)]
        y = np.stack(following, axis=2)
        before = clips["z"][:, :last]
        now = clips["z"][:, 1 : last + 1]
        return before.flatten(0, 1), now.flatten(0, 1), y.reshape(-1, horizon + 1, A)

    # action t-1 is known at step t: it is what "repeat" says, and no head is asked for it
    a, b, y = cut(train)
    a_val, b_val, y_val = cut(val)
    ahead = y[:, 1:]
    ahead_val = y_val[:, 1:]
    dev = np.repeat(dev, last)
    heads = fit_heads(a, b, ahead.reshape(len(ahead), -1), dev, keys, steps)

    # guesses and their thresholds
    guesses = {}
    levels = {}
    for name, head in heads.items():
        guesses[name] = head.predict(a_val, b_val).reshape(-1, horizon, A)
        levels[name] = head.threshold.reshape(horizon, A)

    # baselines that see no picture
    guesses["repeat"] = np.repeat(y_val[:, :1], horizon, axis=1)
    guesses["mean"] = np.broadcast_to(ahead.mean(0), ahead_val.shape)
    for name in ("repeat", "mean"):
        levels[name] = np.full((horizon, A), 0.5)

    # a row for each action ahead
    rows = []
    for k in range(horizon):
        row = {}
        for name, guess in guesses.items():
            row[name] = score(ahead_val[:, k], guess[:, k], labels, levels[name][k])
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
    for name, head in heads.items():
        guess = head.predict(a_val, b_val)
        of_moves = {}
        for i, column in enumerate(columns):
            r2 = r2_score(y_val[:, column], guess[:, i])
            of_moves[MOVES[column]] = {"r2": float(r2)}
        scores[name] = of_moves
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
    for name, head in heads.items():
        guess = head.predict(a_val, b_val)
        auroc = roc_auc_score(y_val[:, 0], guess[:, 0])

        # two steps are always as far apart: there is nothing to explain
        r2 = math.nan
        if T > 2:
            r2 = r2_score(y_val[:, 1], guess[:, 1])
        scores[name] = {"first": {"auroc": float(auroc)}, "apart": {"r2": float(r2)}}
    return scores


def classes_in_both(y, y_val, column):
    """Labels that clips to fit on and clips to test on have ("": none). Prints which only one of
    them has; ValueError if there is nothing to tell apart."""
    # one value in all clips can be told from nothing
    values = (set(y) | set(y_val)) - {""}
    if len(values) < 2:
        raise ValueError(
            f"the label {column} is {min(values, default='empty')} in every clip: there is nothing"
            " to tell apart"
        )

    # classes that only one split has cannot be learned, or not be tested
    both = sorted((set(y) & set(y_val)) - {""})
    for name in sorted(values - set(both)):
        split = "--data" if name in y else "--val_data"
        print(f"left out: {column} {name} occurs in {split} only")
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

    # the linear head, on the mean token; rare classes weigh as much as common ones
    regression = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced")
    linear = make_pipeline(StandardScaler(), regression)
    linear.fit(x.float().mean(1).numpy(), y)
    guesses = {"linear": linear.predict(x_val.float().mean(1).numpy())}

    # the attentive head, with the same weights of classes
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = np.bincount(y)
    weight = torch.from_numpy(len(y) / (len(classes) * counts)).float().to(device)
    target = torch.from_numpy(y)

    def inputs(rows):
        return x[rows].float().to(device)

    def loss(outputs, rows):
        return F.cross_entropy(outputs, target[rows].to(device), weight)

    head = Attentive(x.shape[1], x.shape[2], len(classes)).to(device)
    head.train_on(inputs, len(x), loss, steps)

    # in parts, because the features of all clips need not fit on the GPU
    with torch.no_grad():
        parts = [head(part.float().to(device)).argmax(1).cpu() for part in x_val.split(256)]
    guesses["attentive"] = torch.cat(parts).numpy()

    # the bar: always the commonest class of the fitting clips
    guesses["chance"] = np.full(len(y_val), counts.argmax())
    scores = {}
    for name, guess in guesses.items():
        scores[name] = {
            "accuracy": accuracy_score(y_val, guess),
            "balanced": balanced_accuracy_score(y_val, guess),
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
            yield f"  {name:18} R2 {'':20}{linear['r2']:11.3f} {attentive['r2']:11.3f}"
        else:
            # F1 depends on how often a key is pressed, AUROC does not
            pressed = f"{linear['share']:5.1%}"
            cells = [f"{s['auroc']:7.3f} {s['f1']:.2f}" for s in (linear, attentive)]
            yield f"  {name:18} AUROC, F1 (pressed {pressed})  {' '.join(cells)}"

    # means of the groups, for all four ways
    yield "fitted on -> tested on     camera R2: linear  attentive   keys AUROC: linear  attentive"
    for way, heads in scores.items():
        linear = group_means(heads["linear"])
        attentive = group_means(heads["attentive"])
        yield (
            f"  {way:25}"
            f" {linear.get('camera', math.nan):16.3f}"
            f" {attentive.get('camera', math.nan):10.3f}"
            f" {linear.get('keys', math.nan):20.3f}"
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
        label = f"{group} {metric}"
        for k, ahead in enumerate(scores):
            # an action lasts a step, so it is ahead from when to when
            span = f"{k * seconds:.1f} to {(k + 1) * seconds:.1f} s ahead"
            means = {name: group_means(s).get(group, math.nan) for name, s in ahead.items()}
            yield (
                f"  {label:14} {span:26}"
                f" {means['linear']:12.3f} {means['attentive']:10.3f}"
                f" {means['repeat']:12.3f} {means['mean']:8.3f}"
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
        linear = scores["linear"][name][metric]
        attentive = scores["attentive"][name][metric]
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
        yaw = {head: s.get("yaw_diff", {}) for head, s in of_heads.items()}
        real = {head: group_means(s) for head, s in of_heads.items()}
        add("inverse: yaw R2", yaw, "r2")
        add("inverse: camera R2", real, "camera")
        add("inverse: keys AUROC", real, "keys")
        add("inverse: hotbar AUROC", real, "hotbar")
        add("inverse: GUI AUROC", real, "gui")

    # the action that follows at once, beside the last one again
    if "anticipation" in report:
        first = {head: group_means(s) for head, s in report["anticipation"][0].items()}
        add("anticipation: camera R2", first, "camera")
        add("anticipation: keys AUROC", first, "keys")
        add("anticipation, repeat last: keys AUROC", first, "keys", ["repeat"])

    # how far; a move that does not vary in both splits has no score
    of_motion = report.get("motion", {})
    for name in MOVES:
        of_move = {head: s.get(name, {}) for head, s in of_motion.items()}
        add(f"motion: {name} R2", of_move, "r2")

    # two steps of a clip
    if "order" in report:
        first = {head: s["first"] for head, s in report["order"].items()}
        apart = {head: s["apart"] for head, s in report["order"].items()}
        add("order: which step is earlier, AUROC", first, "auroc")
        add("order: steps between, R2", apart, "r2")

    # which class, beside the commonest one
    if "classify" in report:
        add("classes: balanced accuracy", report["classify"], "balanced")
        add("classes, commonest: balanced accuracy", report["classify"], "balanced", ["chance"])
    return rows


def comparison_table(reports):
    """{encoder: report} -> lines for a person: the better head's score, a column an encoder."""
    # what one encoder lacks is nan in its column
    columns = {name: rows_to_compare(report) for name, report in reports.items()}
    labels = dict.fromkeys(label for rows in columns.values() for label in rows)

    # names of files are long: their ends tell them apart
    titles = [name[-24:] for name in columns]
    width = max(12, *(len(title) + 2 for title in titles))
    cells = [f"{title:>{width}}" for title in titles]
    yield f"{'the better of both heads':42}" + "".join(cells)
    for label in labels:
        cells = [f"{rows.get(label, math.nan):{width}.3f}" for rows in columns.values()]
        yield f"  {label:40}" + "".join(cells)


def classify_table(scores, column):
    """Lines for a person."""
    yield (
        f"clip classification: {column}, {len(scores['classes'])} classes       accuracy   balanced"
    )
    labels = {"linear": "linear", "attentive": "attentive", "chance": "chance (commonest)"}
    for name, label in labels.items():
        accuracy = scores[name]["accuracy"]
        balanced = scores[name]["balanced"]
        yield f"  {label:45} {accuracy:8.3f} {balanced:10.3f}"
