"""What can be compared between runs whose features differ.

Errors, skill and gaps are distances between features: another encoder gives other numbers. What a
probe reads from features, and ranks, have no unit. Fitted and tested on the same clips in the same
way, they compare any two runs on play."""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from data import open_records
from evaluation.heads import load
from evaluation.pretraining import PROBE, SPREAD, inverse_probe
from evaluation.runs import (
    encoder_name,
    features_of_records,
    play_reader,
    split_of_run,
    through_cache,
)
from files.logs import count_text
from files.vpt import ACTION_SPACES
from model import feature_spread

# camera, moves and buttons: what is probed does not depend on the actions that a run was trained on
PROBED = 18

# tokens of a step are averaged over this many cells a side, as in probe.py
SIDE = 4

# names of PROBE for a person, and what the numbers mean
LABELS = {
    "probe_yaw": ("inverse dynamics: yaw R2", "1 is perfect, 0 is the mean"),
    "probe_pitch": ("inverse dynamics: pitch R2", "the same"),
    "probe_camera": ("inverse dynamics: camera R2", "the same, with the mouse"),
    "probe_keys": ("inverse dynamics: keys AUROC", "1 is perfect, 0.5 is chance; no hotbar"),
}


class ClipSet(NamedTuple):
    """Which clips a number stands on. Two sets with the same mark are of the same clips."""

    clips: int
    recordings: int
    mark: str

    def text(self):
        clips = count_text(self.clips, "clip")
        return f"{clips} of {count_text(self.recordings, 'recording')} (mark {self.mark})"


def clip_set(place, settings):
    """The ClipSet of [(Record, window)] that were cut as `settings` say."""
    # features have the first tick of a recording in their key, video begins at 0
    lines = []
    for record, window in place:
        start = int(record.key.rpartition("@")[2]) if record.is_features else 0
        lines.append(f"{record.recording}@{start}/{window}")

    # the same windows of other lengths are other clips
    lines = sorted(lines)
    for name in ("frames_per_clip", "fps", "frames_per_step"):
        lines.append(f"{name} {settings[name]:g}")
    mark = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return ClipSet(len(place), len({record.recording for record, _ in place}), mark)


def training_records(settings, data, held_out):
    """Records to fit a probe on: of shards `data` (patterns), or None: of what the run was trained
    on. Recordings of held_out (Records) are left out. -> ([Record], [bad]). FileNotFoundError where
    the shards are gone; ValueError if nothing is left."""
    if data:
        records, bad = open_records(through_cache([data], settings))
    else:
        records, _, _, bad = split_of_run(settings)

    # a probe that has seen a recording says nothing about it
    names = {record.recording for record in held_out}
    records = [record for record in records if record.recording not in names]
    if not records:
        raise ValueError(
            "no recording is left to fit the probe on: name shards with --train_data that hold"
            " other recordings than --data"
        )
    return records, bad


def features_of_training(run, dataset, features_of, train, encoder):
    """features_of for training Records: they may be video where the held-out ones are features, or
    the other way round. dataset, features_of: of runs.open_held_out; encoder: weights for video, or
    None: the run's."""
    if train[0].is_features == dataset.records[0].is_features:
        return features_of
    name = encoder_name(train, encoder, run.state)
    return features_of_records(train, name, run.settings, run.device, run.dtype, run.state)


class Probed(NamedTuple):
    """What a probe read from the features of a run."""

    # {name of PROBE: R² or AUROC}
    scores: dict

    # of the held-out features: {name of SPREAD: value}
    spread: dict

    fitted: ClipSet
    tested: ClipSet


def probe_run(
    run, dataset, features_of, train, features_of_train, clips, val_clips, batch_size, num_workers
):
    """Fit the ridge probe of inverse dynamics on training clips, test it on held-out ones ->
    (Probed, [bad]).

    dataset, features_of: of runs.open_held_out. train, features_of_train: of training_records and
    features_of_training; at most `clips` windows are read, of the held-out ones at most
    val_clips."""
    # cut as the run was trained on them, with the same actions for every run
    reader = play_reader(run.settings | {"action_space": PROBED}, None, dataset.reader.decoder)
    sets = []
    bad = []
    splits = [(train, features_of_train, clips), (dataset.records, features_of, val_clips)]
    for records, features_of_split, limit in splits:
        windows, failed = load(
            records,
            reader,
            features_of_split,
            None,
            None,
            limit,
            side=SIDE,
            batch_size=batch_size,
            num_workers=num_workers,
            autocast=run.autocast,
        )
        windows["recording"] = np.array([record.recording for record, _ in windows["place"]])
        sets.append(windows)
        bad += failed

    fit, test = sets
    scores = inverse_probe(fit, test, ACTION_SPACES[PROBED])
    spread = dict(zip(SPREAD, feature_spread(test["z"].float().flatten(0, 2))))
    fitted, tested = (clip_set(windows["place"], run.settings) for windows in sets)
    return Probed(scores, spread, fitted, tested), bad


def own_space(state, settings):
    """What the numbers in the space of a run's encoder can be compared with, as a sentence."""
    if settings["stage"] == "lewm":
        return (
            "in the run's own space: this run trained its encoder, so that errors, skill and gaps"
            " compare with no other run"
        )
    return (
        f"in the space of encoder {state['encoder_hash']}: errors, skill and gaps compare only with"
        " runs on the same features"
    )


def comparable_lines(numbers, probed, why, seconds):
    """The comparable numbers (as in report.json) for a person. probed: Probed or None, and why not;
    seconds: length of a step."""
    title = "comparable between encoders, on the same clips"
    if probed is not None:
        title += f": tested on {probed.tested.text()}, fitted on {probed.fitted.text()}"
    lines = [title]

    # what the features say about the action
    if probed is None:
        lines.append(f"  inverse dynamics: not given: {why}")
    for name in PROBE if probed is not None else []:
        label, meaning = LABELS[name]
        value = numbers[name]
        number = "not given: it does not vary" if math.isnan(value) else f"{value:.3f}  ({meaning})"
        lines.append(f"  {label:34} {number}")

    # do the features vary? A few directions are normal, one is a collapse
    if probed is not None:
        text = f"{numbers['effective_rank']:.1f}, std of the weakest channel"
        lines.append(
            f"  {'effective rank of the features':34} {text} {numbers['smallest_std']:.3f}"
        )

    # what the predictions say about it, and about the step that follows
    rank = numbers["action_rank"]
    lines.append(f"  {'rank of the true action':34} {rank:.3f}  (0 is first, 0.5 is chance)")
    of_copy = numbers["copy_rank"]
    for k, rank in enumerate(numbers["next_step_rank"], 1):
        if k in (1, len(of_copy)):
            label = f"rank of the true step, +{k * seconds:.3g} s"
            lines.append(f"  {label:34} {rank:.3f}  (the same; copying {of_copy[k - 1]:.3f})")
    return lines
