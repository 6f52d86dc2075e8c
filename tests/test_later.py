"""The experiment with a modality that comes later: what is forgotten with the projector, without, with its controls."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from igm_rs.experiments import data, later

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mfeat():
    return data.load("mfeat")


def setting(key, seed=0, steps=150, rate=0.1, **changes):
    strength = later.METHODS[key].alphas[0]
    return dataclasses.replace(later.Setting(key, rate, strength, seed, steps, final=False), **changes)


@pytest.fixture(scope="module")
def outcomes(mfeat):
    """Three short runs of every method, on validation data."""
    torch.set_num_threads(1)
    shut = mfeat.without_test()
    return {key: [later.run(shut, setting(key, seed)) for seed in (0, 1, 2)] for key in later.METHODS}


def forgotten(outcomes, key):
    return fmean(one.forgetting for one in outcomes[key])


@pytest.mark.parametrize("key", ["flat", "ridge"])
def test_a_strong_projector_keeps_what_the_first_view_has_learnt(outcomes, key):
    """Measured with seeds 0 to 2 when this was written: see the README for the whole experiment."""
    kept = forgotten(outcomes, key)
    assert kept < 0.02
    assert kept < 0.5 * forgotten(outcomes, "none")
    assert kept < forgotten(outcomes, "random") - 0.01
    assert kept < forgotten(outcomes, "scalar") - 0.01


def test_without_it_the_first_view_is_forgotten_and_the_papers_setting_does_not_help(outcomes):
    assert forgotten(outcomes, "none") > 0.03
    assert forgotten(outcomes, "paper") > 0.03


@pytest.mark.parametrize("key", ["frozen", "own"])
def test_what_does_not_move_is_not_forgotten(outcomes, key):
    assert all(one.forgetting == 0 for one in outcomes[key])


@pytest.mark.parametrize("key", ["flat", "ridge"])
def test_the_later_views_learn_as_well(outcomes, key):
    for view in ("zer", "mor"):
        theirs = [fmean(one.after_own[view] for one in outcomes[other]) for other in (key, "none")]
        assert theirs[0] > theirs[1] - 0.05
        assert theirs[0] > 0.6


def test_only_the_projected_ones_tell_a_cosine(outcomes):
    cosines = {key: runs[0].cosine for key, runs in outcomes.items()}
    assert [key for key, cosine in cosines.items() if cosine is None] == ["none", "frozen", "own"]
    assert cosines["scalar"] == pytest.approx(1, abs=1e-5)
    assert cosines["paper"] > 0.9
    assert cosines["flat"] < 0.8


def test_every_method_starts_alike_and_the_first_view_is_the_same_for_all(outcomes):
    first = {key: runs[0].after_own["fou"] for key, runs in outcomes.items()}
    assert len(set(first.values())) == 1


def test_the_test_split_is_opened_once_by_final_runs_alone(mfeat):
    dataset = dataclasses.replace(mfeat, test_openings=0)
    later.run(dataset, setting("flat", steps=2))
    assert dataset.test_openings == 0
    later.run(dataset, setting("flat", steps=2, final=True))
    assert dataset.test_openings == 1


def test_the_command_writes_results_table_and_picture(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--seeds", "2", "--steps", "2", "--workers", "2"]
    assert later.main(arguments) == 0
    said = capsys.readouterr().out
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"results.json", "table.md", "forgetting.png"}
    found = json.loads(written["results.json"].read_text())
    assert [line["key"] for line in found["rows"]] == list(later.METHODS)
    assert all(len(line["forgetting"]) == 2 for line in found["rows"])
    assert later.table(found) in written["table.md"].read_text()
    assert later.table(found) in said
    assert written["forgetting.png"].stat().st_size > 10_000
    assert found["protocol"] in said


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    assert later.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: data file ")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(later, "_run_all", interrupted)
    assert later.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: no results were written\n"
    with pytest.raises(SystemExit):
        later.main(["--seeds", "0"])
    assert "'0' is not a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "torchmetrics", "tqdm"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package):
    for name in [
        name for name in sys.modules if name.startswith("igm_rs.experiments") or name.split(".")[0] == package
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"error: the experiments need {package}: pip install"):
        importlib.import_module("igm_rs.experiments.later")


def test_it_runs_as_a_module_without_a_warning(tmp_path):
    told = subprocess.run(
        [sys.executable, "-W", "error", "-m", "igm_rs.experiments.later", "--help"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "forgets" in told.stdout
    assert not told.stderr


def test_the_committed_results_are_of_this_experiment():
    found = json.loads((ROOT / "results" / "later" / "results.json").read_text())
    assert [line["key"] for line in found["rows"]] == list(later.METHODS)
    assert [line["label"] for line in found["rows"]] == [method.label for method in later.METHODS.values()]
    assert found["protocol"] == later._protocol(found["seeds"], found["steps"])
    assert later.table(found) in (ROOT / "results" / "later" / "table.md").read_text()
    assert re.search(r"^later:", (ROOT / "Makefile").read_text(), re.MULTILINE)
