"""The benchmarks of kernels and step, shrunk, from the command line: what they compare must be
equal before it is timed."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from bench import gpu, laws, lewm, peers
from files.shards import Record
from tests.harness import Run, fails, run, run_bench

pytestmark = pytest.mark.usefixtures("forkserver")


def test_the_baseline_step_has_our_losses(tmp_path):
    """Bug: the step that ours is timed against drifts from it, so that the ratio compares two
    models."""
    size = "--crop_size 32 --pred_dim 48 --pred_depth 2 --pred_heads 2 --steps 4 --batch_size 2"
    rows, text = run_bench(tmp_path, "step", size, "--no-compile --repeats 1")
    assert [row["step"] for row in rows] == ["reference", "ours"]

    # both were compared, and a difference above 1e-5 ends the run
    assert text.count("off by") == 2


def test_a_row_says_whether_training_ended_in_a_collapse(tmp_path):
    """Bug: a run whose features died is a row like any other; minutes leave out what was trained
    before an interruption."""
    clips = {"clips": 3, "recordings": 2}
    same = {"probe_yaw": 0.4, "probe_pitch": 0.3, "probe_keys": 0.6, "action_rank": 0.2}
    same |= {"next_step_rank": [0.1, 0.2], "effective_rank": 5.0, "smallest_std": 0.4}
    same |= {"fitted_on": clips | {"mark": "a"}, "tested_on": clips | {"mark": "b"}}
    report = {"tf_skill": 0.8, "moves_gap": 0.1, "comparable": same}
    report |= {"moves_gap_low": 0.05, "moves_gap_high": 0.15}
    (tmp_path / "report.json").write_text(json.dumps(report))

    # 48 clips at 0.8 a second take a minute
    log = tmp_path / "train.csv"
    log.write_text("effective_rank,smallest_std,clips_per_s\n12,0.3,0.8\n5,0.05,1.6\n")
    row = lewm.row_of("nothing", 0, tmp_path, lewm.minutes_of(tmp_path, 48))
    assert row["interval"] == "0.050 to 0.150"
    assert row["collapsed"] == "yes" and row["minutes"] == pytest.approx(1.5)
    assert [row["yaw R2"], row["step rank"], row["clips"]] == [0.4, 0.1, "a/b"]
    log.write_text("effective_rank,smallest_std,clips_per_s\n12,0.3,0.8\n5,0.3,1.6\n")
    assert lewm.row_of("default", 0, tmp_path, 1.0)["collapsed"] == "no"
    log.write_text("clips_per_s\n0.8\n")
    assert lewm.row_of("vit_tiny", 0, tmp_path, 1.0)["collapsed"] == "frozen"


@pytest.mark.slow
def test_the_ablation_table_from_the_command_line(tmp_path, shards):
    """Bug: rows are trained or judged on other clips; a finished row is trained again; frozen
    features are made otherwise than the run expects."""
    for part, number in (("train", 0), ("val", 1)):
        (tmp_path / "play" / part).mkdir(parents=True)
        shutil.copy(shards / f"shard-00000{number}.tar", tmp_path / "play" / part)
    fit = ["--data", tmp_path / "play" / "train" / "*.tar", "--fps 10 --num_workers 0 --output"]
    run(tmp_path, "fit_scaler.py", *fit, tmp_path / "play" / "scaler.pkl")
    flags = ["--data", tmp_path / "play", "--out", tmp_path / "runs", "--rows nothing --seeds 0"]
    flags += ["--steps 10 --minutes 0.1 --encoders doom_tiny --val_clips 4 --probe_clips 12"]
    rows, text = run_bench(tmp_path, "lewm", *flags)
    assert [row["row"] for row in rows] == ["default", "nothing", "doom_tiny"]
    assert len({row["clips"] for row in rows}) == 1 and "WARNING" not in text
    before = (tmp_path / "runs" / "nothing-0.txt").read_text()
    again, _ = run_bench(tmp_path, "lewm", *flags)
    assert again == rows and (tmp_path / "runs" / "nothing-0.txt").read_text() == before


@pytest.mark.slow
def test_attention_rows_say_what_auto_takes(tmp_path):
    """Bug: the row marked as what impl="auto" takes is another one; FlexAttention left out without
    a word."""
    size = "--heads 2 --head_dim 32 --block 70 --steps 1 4"
    rows, text = run_bench(tmp_path, "kernels", "--of attention", size, "--no-flex --repeats 1")
    assert [(r["T"], r["impl"]) for r in rows if r["auto"]] == [(1, "prefix"), (4, "prefix")]
    assert {r["impl"] for r in rows} == {"reference", "prefix"}
    assert "triton: needs a GPU" in text


def test_a_checkpoint_in_the_loop_and_in_a_thread(tmp_path):
    """Bug: the two ways write other states, or a file counts as written while the thread writes;
    what was written stays on the disk."""
    flags = "--pred_dim 64 --pred_depth 1 --rounds 2"
    rows, _ = run_bench(tmp_path, "checkpoint", flags, env={"TMPDIR": str(tmp_path)})
    loop, thread = rows
    assert (loop["written"], thread["written"]) == ("in the loop", "in a thread")
    assert loop["weights"] == thread["weights"] > 50_000
    assert loop["waits, s"] <= loop["on the disk, s"]
    assert thread["waits, s"] <= thread["on the disk, s"]
    assert not list(tmp_path.glob("nanojepa-bench-*"))


@pytest.mark.slow
def test_scaling_measures_each_row_by_itself(tmp_path):
    """Bug: memory of a row holds what earlier rows left behind, so that it never falls."""
    sweeps = "--sweeps depth width --crop_size 32 --repeats 1 --out"
    rows, _ = run_bench(tmp_path, "scaling", "--of sizes", sweeps, tmp_path / "plot.png")
    assert [r["size"] for r in rows] == [3, 6, 12, 24, 128, 256, 512, 1024]
    assert rows[4]["MiB"] < rows[3]["MiB"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_day_without_a_gpu(tmp_path):
    """Bug: a section that breaks is found on the day when there is a GPU; what was measured before
    an interruption is measured again, or lost; a section that takes too long takes the others'
    time."""
    day = tmp_path / "day"
    run(tmp_path, "bench/gpu.py", "--out", day, "--minutes 20")
    sections = {path.stem: json.loads(path.read_text()) for path in day.glob("*.json")}
    assert len(sections) == 9
    assert {name: s["error"] for name, s in sections.items() if not s["is_finished"]} == {}
    checked = sections["checks"]["rows"]
    assert {row["check"] for row in checked} == {"attention", "moments", "rope"}
    assert all(row["ok"] and 0 < row["error"] < row["bound"] for row in checked)
    table = (day / "table.md").read_text()
    assert all(f"## {name}" in table for name in sections)

    # one has no time, one is there, and one was measured on another machine
    other = sections["planning"] | {"machine": {"device": "another"}}
    (day / "planning.json").write_text(json.dumps(other))
    (day / "loader.json").unlink()
    text = run(
        tmp_path, "bench/gpu.py", "--out", day, "--only planning facts loader --minutes 0.01"
    )
    assert "facts: measured before" in text and "planning: measured before" not in text
    loader = json.loads((day / "loader.json").read_text())
    assert not loader["is_finished"] and "--minutes" in loader["error"]
    assert "continues with them" in text


def test_a_damaged_section_is_measured_again(tmp_path, capsys):
    """Bug: a section cut by a full disk or by hand ends every later call in a traceback, and so
    does an --out that is a file."""
    path = tmp_path / "facts.json"
    section = {"section": "facts", "machine": {}, "is_finished": True, "error": "", "rows": []}
    gpu.write_section(path, section)
    assert gpu.read_section(path) == section
    for text in ('{"section": "fa', "[]", '{"section": "facts"}'):
        path.write_text(text)
        assert gpu.read_section(path) is None
        assert f"{path} is damaged" in capsys.readouterr().out
    assert gpu.read_section(tmp_path / "none.json") is None
    assert f"--out {path}: File exists" in fails(tmp_path, "bench/gpu.py", "--out", path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_gpu_day_leaves_nothing_behind(tmp_path, number):
    """Bug: the section under way goes on without the program, beside that of the next call, or the
    program waits for its end after Ctrl-C."""
    day = Run(tmp_path, "bench/gpu.py", "--out", tmp_path, "--only checks --minutes 30")
    path = tmp_path / "checks.json"
    assert day.until(lambda: '"check":' in (path.read_text() if path.exists() else ""))
    os.kill(day.process.pid, number)
    code, text = day.wait(60)
    assert code == (143 if number == signal.SIGTERM else -9)
    assert "Traceback" not in text

    # what was measured stays, and nothing is added: a section of its own would not be done yet
    time.sleep(1)
    measured = path.read_text()
    time.sleep(4)
    assert path.read_text() == measured and gpu.read_section(path)["rows"]
    assert gpu.read_section(path)["error"] == "it was interrupted"


def test_the_law_that_made_the_errors_is_found():
    """Bug: an exponent belongs to another axis; a term that does nothing gets a weight; the best
    width of a budget is that of another one."""
    law = {"floor": 0.6, "weights": np.array([0.02, 0.05, 0.0])}
    law["exponents"] = np.array([0.5, 0.3, 0.7])
    sides = ((0.1, 0.4, 1.0), (0.1, 0.3, 1.0), (0.25, 0.5, 1.0))
    x = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 3)
    fitted = laws.fit(x, laws.predicted(law, x))
    assert fitted["floor"] == pytest.approx(0.6, abs=1e-6)
    assert np.allclose(fitted["weights"], law["weights"], atol=1e-6)
    assert np.allclose(fitted["exponents"][:2], [0.5, 0.3])
    assert np.allclose(laws.gains(fitted), [0.02 * (1 - 2**-0.5), 0.05 * (1 - 2**-0.3), 0])

    # steps and parameters alike: a hundred times the compute is ten times of each
    law["weights"] = np.array([0.1, 0.0, 0.1])
    law["exponents"] = np.array([0.5, 0.5, 0.5])
    sizes = {width: (width**2, width**2) for width in (10, 100, 1000)}
    best = laws.best_sizes(law, np.ones(3), sizes, [1e4, 1e8], sizes.get)
    assert [row["width"] for row in best] == [10, 100]
    assert [row["steps"] for row in best] == [100, 10_000]


def test_minutes_count_no_play_twice():
    """Bug: four phases of a recording count as four times the play; a larger set of minutes is
    other play, so that runs differ in what they saw and not in how much."""
    settings = {"fps": "10", "frames_per_step": "2"}
    records = []
    for i in range(6):
        for tick in (0, 1, 200):
            records.append(Record("a.tar", f"map-{i}@{tick:05}", {"safetensors": (0, 1)}, 25))
    minutes = laws.minutes_of_play(records, settings)
    assert minutes == pytest.approx({f"map-{i}": (5.05 + 5) / 60 for i in range(6)})
    few, _ = laws.choose(minutes, 0.3, 0)
    more, total = laws.choose(minutes, 0.8, 0)
    assert (len(few), len(more)) == (2, 5) and few == more[:2]
    assert total == pytest.approx(5 * 10.05 / 60)
    with pytest.raises(ValueError, match="--minutes 2.*1.0 minutes"):
        laws.choose(minutes, 2, 0)


@pytest.mark.slow
def test_laws_from_the_command_line(tmp_path, shards):
    """Bug: a finished run is trained again; points of a run are those of another one."""
    for part in ("train", "held"):
        number = "{000000..000001}" if part == "train" else "000002"
        data = ["--data", shards / f"shard-{number}.tar"]
        run(
            tmp_path,
            "encode.py",
            *data,
            "--out",
            tmp_path / part,
            "--encoder vit_tiny --crop_size 32",
        )
    fit = ["--data", shards / "shard-00000?.tar", "--num_workers 0 --output"]
    run(tmp_path, "fit_scaler.py", *fit, tmp_path / "s.pkl")
    flags = ["--data", tmp_path / "train" / "*.tar", "--val_data", tmp_path / "held" / "*.tar"]
    flags += ["--scaler", tmp_path / "s.pkl", "--out", tmp_path / "laws"]
    flags += ["--minutes 0.3 --widths 32 64 --depth 1 --steps 8 --batch_size 2 --val_clips 4"]
    rows, text = run_bench(tmp_path, "laws", *flags)
    points = [row for row in rows if "action gap" in row]
    assert [(row["width"], row["steps"]) for row in points] == [
        (width, steps) for width in (32, 64) for steps in (1, 2, 4, 8)
    ]
    assert "doubled, the error falls by" in text
    assert (tmp_path / "laws" / "laws.png").read_bytes().startswith(b"\x89PNG")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "laws").glob("*/val.csv")}
    again, _ = run_bench(tmp_path, "laws", *flags)
    assert again == rows
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "laws").glob("*/val.csv")}


@pytest.mark.parametrize(
    "program, flag", [("pretrain", "--vjepa2"), ("peers", "--vjepa2"), ("peers", "--jepa_wms")]
)
def test_a_folder_that_is_no_checkout_of_the_reference(program, flag, tmp_path):
    """Bug: an ImportError about "src" where the folder of the reference is wrong."""
    line = fails(tmp_path, f"bench/{program}.py", flag, tmp_path)
    assert flag in line and "git clone" in line


def test_peers_that_are_there_are_timed_and_the_others_named(tmp_path):
    """Bug: a peer that is not installed ends the run, or is left out without a word; PEFT's time is
    taken for ours."""
    rows, text = run_bench(tmp_path, "peers", "--size tiny --repeats 1")
    left_out = {line.partition(":")[0] for line in text.splitlines() if ": left out, " in line}
    assert left_out | {row["peer"] for row in rows} == set(peers.PEERS)
    assert {"vjepa2", "jepa_wms"} <= left_out

    # PEFT is a development package; bench.lora has compared losses and gradients
    of_peft = [row for row in rows if row["peer"] == "peft"]
    assert [row["what"] for row in of_peft] == ["LoRA, split", "LoRA, fused qkv"]
    assert "fused qkv, ours: loss" in text
    for row in of_peft:
        assert row["its / ours"] == pytest.approx(row["its ms"] / row["our ms"])


def test_what_differs_from_a_peer_is_not_timed(capsys):
    """Bug: a ratio of two programs that compute different things."""
    peers.check("a step", 2e-6, 1e-5)
    assert "off by 2.0e-06" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a step.*something else"):
        peers.check("a step", 2e-5, 1e-5)
    assert peers.losses_off((1.0, 3.0), (1.0, 2.0)) == 0.5
