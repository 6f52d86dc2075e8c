"""A training process that is killed at random points and started again ends with the weights of one left in peace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import differences
from kill_script import LIVES, STEPS, VARIANTS

import igm_rs

SCRIPT = Path(__file__).with_name("kill_script.py")


def run(*arguments):
    """Run the script in a new process with this project's package and tests to import."""
    places = [str(SCRIPT.parent), str(Path(igm_rs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the killed processes told, by variant, the checkpoints they left, and those at the end of all runs."""
    directory = tmp_path_factory.mktemp("lives")
    killed = json.loads(run(7, directory))

    def checkpoints(name):
        return {
            variant: torch.load(directory / variant / name / "checkpoint.pt", weights_only=True) for variant in VARIANTS
        }

    left = checkpoints("wild")
    run(directory)  # the last life, in a new interpreter
    return {
        variant: (killed[variant], left[variant], wild, calm)
        for (variant, wild), calm in zip(checkpoints("wild").items(), checkpoints("calm").values(), strict=True)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_started_again_twenty_times(variant, told):
    """SIGKILL in either pass, in the base's step, while a checkpoint is written: it ends as if it had lived once."""
    killed, left, wild, calm = told[variant]
    assert len(killed) == LIVES >= 20
    assert all("e" not in marks for marks in killed), "none of them had come to its end"
    assert sum("d" in marks for marks in killed) >= LIVES // 3, "there is progress between the kills"
    assert len({marks[-1] for marks in killed}) > 1, "they are not killed at the same point of a step"
    assert 0 < left["position"] < STEPS
    assert sum(marks.count("s") for marks in killed) > left["position"], "some steps were begun more than once"
    assert wild["position"] == calm["position"] == STEPS
    assert not differences(wild, calm)
