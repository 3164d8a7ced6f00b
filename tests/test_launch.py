"""The recipes in launch/ name fields and files that exist, and the exit codes of a run."""

import re
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


def test_a_disruption_is_no_restart_that_counts():
    """Each rule of the Job leads to the reason that the JobSet does not count. One is for the host
    that is taken away, one for the others, which end with the code of a run that was asked to
    stop."""
    spec = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text(encoding="utf-8"))["spec"]
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
