"""The recipes in launch/ name fields and files that exist, and the exit codes of a run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from yocou_jax.config import FIELDS
from yocou_jax.training.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".md")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_fields_and_commands_of_recipes_exist(path):
    text = path.read_text(encoding="utf-8")
    assert "experiments.train" in text
    assert set(re.findall(r"--config\.(\w+\.\w+)", text)) <= FIELDS.keys()
    for config in re.findall(r"--config=(\S+)", text):
        assert (ROOT / config).is_file(), config


def test_a_mixture_with_stars_stays_as_it_is():
    """The shell does not put names of files in their place."""
    mixture = "'0.5 * /mnt/a/*.txt + 0.5 * python'"
    recipe = (ROOT / "launch/gke_tpu.sh").read_text(encoding="utf-8")
    edited = recipe.replace("'/mnt/runs/text/*.jsonl.gz'", mixture)
    job = printed(edited)["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"][2]
    assert f"--config.data.source={mixture[1:-1]}" in shlex.split(command)


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm_gpus.sbatch"])
def test_other_recipes_keep_a_mixture_too(tmp_path, name):
    """With programs that print their words in place of those of the system."""
    for program in ("gcloud", "srun", "scontrol"):
        (tmp_path / program).write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        (tmp_path / program).chmod(0o755)
    recipe = (ROOT / "launch" / name).read_text(encoding="utf-8")
    mixture = "0.5 * /mnt/a/*.txt + 0.5 * python"
    for old in ("/mnt/runs/text/*.jsonl.gz", "$HOME/text/*.jsonl.gz"):
        recipe = recipe.replace(old, mixture)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/home/me", "SLURM_CPUS_PER_TASK": "8"}
    words = ["bash", "-s", "start"]
    found = subprocess.run(words, input=recipe, capture_output=True, text=True, check=True, env=env)
    source = f"--config.data.source={mixture}"
    if name == "slurm_gpus.sbatch":
        assert source in found.stdout.splitlines()
    else:
        command = found.stdout.partition("nohup ")[2].partition(">")[0]
        assert source in shlex.split(command)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_edited_in_two_places(path):
    """Both are at its beginning; what follows them names nothing that a user must change."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"EDIT.*", text) == [
        "EDIT: where.",
        "EDIT: what. The workdir must be on storage that all hosts see.",
    ]
    subprocess.run(["bash", "-n", path], check=True)


def printed(recipe: str) -> dict:
    """What a changed recipe for GKE asks for."""
    found = subprocess.run(
        ["bash", "-s", "print"], input=recipe, capture_output=True, text=True, check=True
    )
    return yaml.safe_load(found.stdout)


def test_the_jobset_follows_what_a_user_edits():
    recipe = (ROOT / "launch/gke_tpu.sh").read_text(encoding="utf-8")
    for topology, hosts in (("16x16", 64), ("4x4x4", 16), ("2x2", 1)):
        edited = recipe.replace("TOPOLOGY=16x16", f"TOPOLOGY={topology}")
        job = printed(edited)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["parallelism"] == job["completions"] == hosts
        assert topology in job["template"]["spec"]["nodeSelector"].values()
    for topology in ("1x1", "2x3", "v5e:16x16"):
        edited = recipe.replace("TOPOLOGY=16x16", f"TOPOLOGY={topology}")
        with pytest.raises(subprocess.CalledProcessError) as error:
            printed(edited)
        assert f"TOPOLOGY={topology} is not a whole number of hosts" in error.value.stderr
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"]
    words = shlex.split(command[2])
    assert words[:4] == ["exec", "python", "-m", "experiments.train"]
    assert "--config.data.source=/mnt/runs/text/*.jsonl.gz" in words
    assert words[-1] == "--workdir=/mnt/runs/yocou"


def test_a_disruption_is_no_restart_that_counts():
    """Each rule of the Job leads to the reason that the JobSet does not count. One is for the host
    that is taken away, one for the others, which end with the code of a run that was asked to
    stop."""
    spec = printed((ROOT / "launch/gke_tpu.sh").read_text(encoding="utf-8"))["spec"]
    (ignored,) = spec["failurePolicy"]["rules"]
    assert ignored["name"]  # some versions require it
    assert ignored["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert ignored["onJobFailureReasons"] == ["PodFailurePolicy"]

    job = spec["replicatedJobs"][0]["template"]["spec"]
    taken, others = job["podFailurePolicy"]["rules"]
    assert taken["action"] == others["action"] == "FailJob"
    # Some versions of JobSet refuse a condition without a status. A status is a string.
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert others["onExitCodes"]["operator"] == "In"
    assert others["onExitCodes"]["values"] == [EXIT_PREEMPTED]

    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes requires it for a podFailurePolicy
    assert others["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
