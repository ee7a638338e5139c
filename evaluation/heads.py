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
from tqdm import tqdm

from data import Clips, collate, leave_signals, windows
from files.disk import READ_ERRORS, Unreachable, persistently
from files.video import WrongDecoder
from files.vpt import CONTINUOUS
from model import Block, predict

RANK = 48  # principal components of a token whose products the linear head gets


class Windows(Clips):
    """Clips whose item is (item, clip or None, what is wrong with it or None): a label belongs to
    this window and to no other."""

    def __getitem__(self, item):
        r = self.records[item[2]]
        again = functools.partial(self.read_seeded, *item[2:], 0, False)
        try:
            return item, persistently(f"{r.shard} {r.key}", again), None
        except Unreachable as e:  # says nothing about the recording
            raise ValueError(str(e)) from e
        except WrongDecoder as e:
            raise ValueError(f"{r.shard} {r.key}: {e}") from e
        except READ_ERRORS as e:
            return (
                item,
                None,
                (
                    self.records[item[2]].shard,
                    self.records[item[2]].key,
                    f"{type(e).__name__}: {e}",
                ),
            )


def pool(z, side):
    """Tokens (..., N, D) of a square grid -> the mean over at most side x side cells, (..., M, D)
    float16."""
    grid = math.isqrt(z.shape[-2])
    if grid > side:
        cells = z.flatten(0, -3).transpose(1, 2).unflatten(2, (grid, grid))
        z = F.adaptive_avg_pool2d(cells, side).flatten(2).transpose(1, 2).unflatten(0, z.shape[:-2])
    return z.half().cpu()


def load(
    records,
    reader,
    inputs,
    predictor,
    scaler,
    limit,
    *,
    side,
    batch_size,
    num_workers,
    autocast=contextlib.nullcontext,
):
    """At most `limit` windows -> {"z" (n, T, M, D), "ahead" (n, T-1, M, D) (with a predictor: one
    step ahead of the true context under the true action), "actions" (n, T-1, A) as recorded,
    "place": [(Record, window)]}, [bad]."""
    items = windows(dataset := Windows(records, [1.0] * len(records), reader), batch_size, limit)
    loader = DataLoader(
        dataset,
        batch_sampler=items,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=leave_signals,
    )
    out, bad = {"z": [], "ahead": [], "actions": [], "place": []}, []
    for rows in tqdm(loader, desc="features", unit="batch", delay=10):
        bad += [why for _, _, why in rows if why]
        if not (good := [(item, clip) for item, clip, _ in rows if clip]):
            continue
        batch = collate([clip | {"bad": []} for _, clip in good])
        z, actions, states = inputs(batch)
        out["z"].append(pool(z, side))
        if predictor is not None:
            scaled = torch.from_numpy(np.float32(scaler.transform(batch["actions"].numpy()))).to(
                z.device
            )
            with torch.no_grad(), autocast():
                out["ahead"].append(pool(predict(predictor, z[:, :-1], scaled, states), side))
        out["actions"].append(batch["actions"].numpy())
        out["place"] += [(records[item[2]], item[3]) for item, _ in good]
    if not out["z"]:
        raise ValueError(
            f"{records[0].shard} and the others give no clip of {reader.frames} frames at"
            f" {reader.fps:g} fps: {bad[:1]}"
        )
    out |= {"z": torch.cat(out["z"]), "ahead": torch.cat(out["ahead"]) if out["ahead"] else None}
    return out | {"actions": np.concatenate(out["actions"])}, bad


# --- heads: predict(a, b) of tokens (n, M, D) of two steps -> scores (n, O) in the units of y, keys
# as 0 and 1 ---


class Linear:
    """Ridge on what camera motion is linear in: the sum over patches of a_i b_j - a_j b_i, for the
    RANK main components of a token, which changes its sign when time runs backwards; and on the
    mean tokens of both steps. On the two steps alone R² is 0 on the demo."""

    def fit(self, a, b, y, dev):
        tokens = a[~dev].flatten(0, 1)
        self.pca = PCA(min(RANK, a.shape[2]), random_state=0).fit(
            tokens[:: max(len(tokens) // 50_000, 1)].float().numpy()
        )
        x = self.inputs(a, b)
        self.scaler = StandardScaler().fit(x[~dev])
        x = self.scaler.transform(x)
        tried = [
            Ridge(alpha=share * (~dev).sum()).fit(x[~dev], y[~dev]) for share in (0.1, 1, 10, 1000)
        ]
        best = np.argmin(
            [((ridge.predict(x[dev]) - y[dev]) ** 2).mean(0) for ridge in tried], axis=0
        )  # one penalty for each column
        self.weight, self.bias = (
            np.stack(w)[best, np.arange(len(best))]
            for w in zip(*((r.coef_, r.intercept_) for r in tried))
        )
        return self

    def inputs(self, a, b):
        p, q = (
            torch.from_numpy(
                np.float32(self.pca.transform(x.flatten(0, 1).float().numpy()))
            ).unflatten(0, x.shape[:2])
            for x in (a, b)
        )
        products = p.transpose(1, 2) @ q  # (n, RANK, RANK)
        i, j = torch.triu_indices(*products.shape[1:], 1)
        return torch.cat(
            [(products - products.mT)[:, i, j], a.float().mean(1), b.float().mean(1)], dim=1
        ).numpy()

    def predict(self, a, b):
        return self.scaler.transform(self.inputs(a, b)) @ self.weight.T + self.bias


class Attentive(nn.Module):
    """V-JEPA's attentive probe in miniature: a token of both steps -> one block -> learned queries
    attend to all tokens -> linear."""

    def __init__(self, tokens, dim, out, width=128, queries=4, heads=4):
        super().__init__()
        self.embed, self.pos, self.drop = (
            nn.Linear(dim, width),
            nn.Parameter(0.02 * torch.randn(tokens, width)),
            nn.Dropout(0.2),
        )
        self.block, self.norm = Block(width, heads, 2 * width), nn.LayerNorm(width)
        self.query, self.attend = (
            nn.Parameter(0.02 * torch.randn(queries, width)),
            nn.MultiheadAttention(width, heads, batch_first=True),
        )
        self.out_norm, self.head = nn.LayerNorm(queries * width), nn.Linear(queries * width, out)
        self.register_buffer("mean", torch.zeros(out))
        self.register_buffer("std", torch.ones(out))
        self.register_buffer("trust", torch.ones(out))  # 0: the mean is the better guess

    def forward(self, x):
        x = self.norm(self.block(self.embed(self.drop(x)) + self.pos)[0])
        x = self.attend(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0].flatten(1)
        return self.head(self.drop(self.out_norm(x)))

    def train_on(self, inputs, n, loss, steps):
        """AdamW on random batches; inputs(rows) -> (rows, tokens, dim), loss(out, rows)."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(steps), desc="attentive head", unit="step", delay=10):
            rows = torch.randint(n, (min(n, 128),), generator=generator)
            loss(self(inputs(rows)), rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return self.eval()

    def fit(self, a, b, y, dev, keys, steps):
        """keys (O,) bool: which columns of y are 0 or 1."""
        held_out, y, at = (
            y[dev],
            torch.from_numpy(y[~dev]).float(),
            torch.from_numpy(np.flatnonzero(~dev)),
        )
        self.mean[~keys], self.std[~keys] = (
            x.to(self.mean) for x in (y[:, ~keys].mean(0), y[:, ~keys].std(0).clamp_min(1e-6))
        )
        y = ((y - self.mean.cpu()) / self.std.cpu()).to(device := self.mean.device)

        def loss(out, rows):
            camera = F.mse_loss(out[:, ~keys], y[rows][:, ~keys]) if (~keys).any() else 0
            held = (
                F.binary_cross_entropy_with_logits(out[:, keys], y[rows][:, keys])
                if keys.any()
                else 0
            )
            return camera + 3 * held  # at 1 the camera is all that is learned, at 10 the keys

        self.keys = keys
        self.train_on(
            lambda rows: torch.cat([a[at[rows]], b[at[rows]]], dim=2).float().to(device),
            len(y),
            loss,
            steps,
        )
        guess, true = (
            x - self.mean.cpu().numpy() for x in (self.predict(a[dev], b[dev]), held_out)
        )
        slope = np.clip(
            (guess * true).sum(0) / (guess * guess).sum(0), 0, 1
        )  # of truth on guesses: what it has learned by heart is not it
        self.trust[~keys] = torch.from_numpy(slope[~keys]).to(self.trust)
        return self

    @torch.no_grad()
    def predict(self, a, b):
        out = torch.cat(
            [
                self(torch.cat(part, 2).float().to(self.mean.device))
                for part in zip(a.split(1024), b.split(1024))
            ]
        )
        keys, camera = (
            torch.from_numpy(self.keys).to(out.device),
            out * self.std * self.trust + self.mean,
        )
        return torch.where(keys, out.sigmoid(), camera).cpu().double().numpy()


def fit_heads(a, b, y, dev, keys, steps):
    """{"linear", "attentive"}: fitted heads, each with threshold (O,): a key counts as held above
    the score that it exceeds, in the dev recordings, as often as it is held there (nothing is held
    that never is)."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attentive = Attentive(a.shape[1], 2 * a.shape[2], y.shape[1]).to(device)
    heads = {
        "linear": Linear().fit(a, b, y, dev),
        "attentive": attentive.fit(a, b, y, dev, keys, steps),
    }
    for head in heads.values():
        found = head.predict(a[dev], b[dev])
        head.threshold = np.array(
            [np.quantile(p, 1 - min(share, 1)) for p, share in zip(found.T, y[dev].mean(0).clip(0))]
        )
    return heads


def score(y, p, names, threshold):
    """{name: {"r2"} or {"auroc", "f1", "share"}} of scores p (n, O); nothing for what does not vary
    in y."""
    out = {}
    for i, name in enumerate(names):
        if name in CONTINUOUS:
            out[name] = {"r2": float(r2_score(y[:, i], p[:, i]))}
        elif 0 < y[:, i].mean() < 1:
            out[name] = {
                "auroc": float(roc_auc_score(y[:, i], p[:, i])),
                "share": float(y[:, i].mean()),
            }
            out[name]["f1"] = float(f1_score(y[:, i], p[:, i] > threshold[i], zero_division=0))
    return out


def group_means(scores):
    """{"camera": mean R² of mouse and angles, "keys": mean AUROC of keys and buttons, "slots": of
    hotbar slots and the GUI}."""
    groups = {"camera": [s["r2"] for s in scores.values() if "r2" in s]}
    groups["keys"] = [
        s["auroc"] for n, s in scores.items() if n.startswith(("key.", "mouse.")) and "auroc" in s
    ]
    groups["slots"] = [
        s["auroc"] for n, s in scores.items() if n.startswith(("slot.", "gui")) and "auroc" in s
    ]
    return {k: float(np.mean(v)) for k, v in groups.items() if v}


# --- tasks ---


def pairs(clips, second="z"):
    """Tokens of steps t and t+1 (of "ahead": predicted) and action t of all clips: (n, M, D), (n,
    M, D), (n, A)."""
    b = clips["ahead"] if second == "ahead" else clips["z"][:, 1:]
    return (
        clips["z"][:, :-1].flatten(0, 1),
        b.flatten(0, 1),
        clips["actions"].reshape(-1, clips["actions"].shape[-1]),
    )


def inverse(train, val, dev, names, columns, steps):
    """Scores {"real -> real": {head: scores}, ...} of probes fitted on real and predicted pairs ->
    and the heads fitted on real ones."""
    keys, dev = (
        np.array([names[i] not in CONTINUOUS for i in columns]),
        np.repeat(dev, train["actions"].shape[1]),
    )
    kinds, out, first = (
        {"real": "z"} | ({"predicted": "ahead"} if train["ahead"] is not None else {}),
        {},
        None,
    )
    for fitted, kind in kinds.items():
        a, b, y = pairs(train, kind)
        heads = fit_heads(a, b, y[:, columns], dev, keys, steps)
        first = first or heads
        for tested, other in kinds.items():
            a, b, y = pairs(val, other)
            found = {
                k: score(y[:, columns], h.predict(a, b), [names[i] for i in columns], h.threshold)
                for k, h in heads.items()
            }
            out[f"{fitted} -> {tested}"] = found
    return out, first


def anticipation(train, val, dev, names, columns, steps, horizon):
    """[{head or baseline: scores} of the 1st .. horizon-th action after step t], from steps t-1 and
    t. Baselines: the last action again, the training mean."""
    T, A, keys = (
        train["z"].shape[1],
        len(columns),
        np.array([names[i] not in CONTINUOUS for i in columns] * horizon),
    )
    last = T - 1 - horizon  # the last step t that all these actions follow

    def cut(clips):
        y = np.stack(
            [clips["actions"][:, 1 + k : 1 + k + last, columns] for k in range(-1, horizon)], axis=2
        ).reshape(-1, horizon + 1, A)
        return clips["z"][:, :last].flatten(0, 1), clips["z"][:, 1 : last + 1].flatten(0, 1), y

    (a, b, y), (a_val, b_val, y_val) = cut(train), cut(val)
    heads = fit_heads(a, b, y[:, 1:].reshape(len(y), -1), np.repeat(dev, last), keys, steps)
    guesses = {k: h.predict(a_val, b_val).reshape(-1, horizon, A) for k, h in heads.items()}
    guesses |= {
        "repeat": np.repeat(y_val[:, :1], horizon, 1),
        "mean": np.broadcast_to(y[:, 1:].mean(0), y_val[:, 1:].shape),
    }
    levels = {k: h.threshold.reshape(horizon, A) for k, h in heads.items()}
    labels = [names[i] for i in columns]
    return [
        {
            k: score(y_val[:, 1 + t], p[:, t], labels, levels.get(k, np.full((horizon, A), 0.5))[t])
            for k, p in guesses.items()
        }
        for t in range(horizon)
    ]


def classify(train, val, y, y_val, column, steps):
    """{head: {"accuracy", "balanced"}, "chance": ..., "classes"} of labels (n,) of clips ("":
    none), from mean and std over their steps."""
    if len(values := set(y) | set(y_val) - {""}) < 2:
        raise ValueError(
            f"the label {column} is {min(values, default='empty')} in every clip: there is nothing"
            " to tell apart"
        )
    both = sorted((set(y) & set(y_val)) - {""})
    for name in sorted(values - set(both) - {""}):
        print(f"left out: {column} {name} occurs in {'--data' if name in y else '--val_data'} only")
    if len(both) < 2 or len(both) > len(y) / 4:
        raise ValueError(
            f"the label {column} has {len(both)} values that both splits hold, for {len(y)} clips:"
            " a class needs a few clips"
        )
    fit, test = np.flatnonzero(np.isin(y, both)), np.flatnonzero(np.isin(y_val, both))
    y, y_val = np.searchsorted(both, y[fit]), np.searchsorted(both, y_val[test])
    x, x_val = (c["z"][torch.from_numpy(rows)].float() for c, rows in ((train, fit), (val, test)))
    x, x_val = (
        torch.cat([c.mean(1), c.std(1)], dim=2).half() for c in (x, x_val)
    )  # over steps: (n, M, 2D)
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced")
    )
    guess = {
        "linear": linear.fit(x.float().mean(1).numpy(), y).predict(x_val.float().mean(1).numpy())
    }
    torch.manual_seed(0)
    device, target = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        torch.from_numpy(y),
    )
    weight = torch.from_numpy(len(y) / (len(both) * np.bincount(y))).float().to(device)
    head = Attentive(x.shape[1], x.shape[2], len(both)).to(device)
    head.train_on(
        lambda rows: x[rows].float().to(device),
        len(x),
        lambda out, rows: F.cross_entropy(out, target[rows].to(device), weight),
        steps,
    )
    with torch.no_grad():
        guess["attentive"] = torch.cat(
            [head(part.float().to(device)).argmax(1).cpu() for part in x_val.split(256)]
        ).numpy()
    guess["chance"] = np.full(len(y_val), np.bincount(y).argmax())
    out = {
        k: {"accuracy": accuracy_score(y_val, p), "balanced": balanced_accuracy_score(y_val, p)}
        for k, p in guess.items()
    }
    return out | {"classes": both, "clips": [len(y), len(y_val)]}


# --- tables ---


def inverse_table(found):
    """Lines for a person: every action on real pairs, then what probes fitted on real or predicted
    pairs say on either."""
    yield "inverse dynamics: steps t, t+1 -> action t        linear     attentive"
    for name, s in found["real -> real"]["linear"].items():
        other = found["real -> real"]["attentive"][name]
        if "r2" in s:
            yield f"  {name:18} R2                  {s['r2']:11.3f} {other['r2']:11.3f}"
        else:
            cells = "".join(f" {x['auroc']:7.3f} {x['f1']:.2f}" for x in (s, other))
            yield f"  {name:18} AUROC, F1 (held {s['share']:5.1%}) {cells}"
    yield "fitted on -> tested on     camera R2: linear  attentive   keys AUROC: linear  attentive"
    for way, heads in found.items():
        means = {k: group_means(s) for k, s in heads.items()}
        cells = [
            means[k].get(g, math.nan) for g in ("camera", "keys") for k in ("linear", "attentive")
        ]
        yield f"  {way:25} {cells[0]:16.3f} {cells[1]:10.3f} {cells[2]:20.3f} {cells[3]:10.3f}"


def anticipation_table(found, seconds):
    """Lines for a person: mean camera R2 and keys AUROC of the heads and of both baselines, by how
    far ahead an action starts."""
    yield (
        f"anticipation: steps t-1, t -> action         {'linear':>10} {'attentive':>10}"
        f" {'repeat last':>12} {'mean':>8}"
    )
    for group, metric in (("camera", "R2"), ("keys", "AUROC")):
        for k, ahead in enumerate(found):
            row = [
                group_means(ahead[n]).get(group, math.nan)
                for n in ("linear", "attentive", "repeat", "mean")
            ]
            span = f"{k * seconds:.1f} to {(k + 1) * seconds:.1f} s ahead"
            yield (
                f"  {group + ' ' + metric:14} {span:26} {row[0]:12.3f} {row[1]:10.3f}"
                f" {row[2]:12.3f} {row[3]:8.3f}"
            )


def classify_table(found, column):
    """Lines for a person."""
    yield (
        f"clip classification: {column}, {len(found['classes'])} classes       accuracy   balanced"
    )
    for name in ("linear", "attentive", "chance"):
        label = name + (" (commonest)" if name == "chance" else "")
        yield f"  {label:45} {found[name]['accuracy']:8.3f} {found[name]['balanced']:10.3f}"
