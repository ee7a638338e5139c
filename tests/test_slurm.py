"""docs/slurm.sh: what sbatch will be given, run here with stand-ins for SLURM's own commands."""

import csv
import os
import re
import stat
import subprocess
import sys

import pytest

from tests.harness import PLAN, ROOT, TINY

SCRIPT = os.path.join(ROOT, "docs", "slurm.sh")


def test_sbatch_accepts_the_script():
    """Bug: a block in a README that sbatch refuses (no #!, no CPUs for the loaders), or a run that
    is ended at its time limit without a checkpoint and is not queued again."""
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    with open(SCRIPT) as f:
        text = f.read()
    assert text.startswith("#!/bin/bash\n")
    options = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(\S+))?$", text))
    assert len(options) == len(re.findall(r"(?m)^#SBATCH", text))
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "requeue"} <= {*options}
    assert options["signal"] == "B:USR1@300" and "scontrol requeue" in text
    assert text.rstrip().splitlines()[-1].startswith("srun torchrun ")


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_two_agents_started_by_the_script_train_together(tmp_path, shards):
    """Bug: a rendezvous that the nodes do not find, quotes that keep the glob from being expanded,
    flags of the user that do not reach train_ac.py."""
    tools = tmp_path / "bin"
    tools.mkdir()
    port = 29000 + os.getpid() % 1000
    program(tools, "scontrol", "echo localhost")
    program(tools, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')

    # srun starts its command once on every node
    program(
        tools,
        "srun",
        f'args=("${{@//:29500/:{port}}}")\n"${{args[@]}}" & "${{args[@]}}" && wait $!',
    )
    os.symlink(shards, tmp_path / "VPT")
    os.symlink(os.path.join(ROOT, "train_ac.py"), tmp_path / "train_ac.py")
    fit = [sys.executable, "fit_scaler.py", "--data", str(shards / "*.tar")]
    subprocess.run([*fit, "--output", str(tmp_path / "scaler.pkl")], cwd=ROOT, check=True)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    env["SLURM_JOB_NODELIST"] = "a[1-2]"
    flags = (f"{TINY} {PLAN} --ipe 2 --encoder vit_tiny --scaler scaler.pkl --out_dir out").split()
    done = subprocess.run(
        ["bash", SCRIPT, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    with open(tmp_path / "out" / "train.csv") as f:
        assert len(list(csv.DictReader(f))) == 6
