"""The figures on a data set: picture, numbers and caption; stored runs used; the test split left alone; refusals."""

import concurrent.futures
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from igm_rs import analysis
from igm_rs.experiments import figures, running
from igm_rs.experiments.columns import Column
from igm_rs.experiments.configuration import load_config
from igm_rs.experiments.data import DataSet
from igm_rs.experiments.feeding import Means, batch_stream, feed
from igm_rs.experiments.page import FIGURES, PICTURE
from igm_rs.experiments.running import ProcessLostError, Source
from igm_rs.experiments.training import Training

SOURCE = Source(register=(Path(__file__).with_name("toy_sets.py"),))
SOURCE.load("toy")
TINY = load_config("toy", {"steps": 4, "turn_steps": 2, "batch_size": 16, "learning_rate": 0.03})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(figures, "TIMING", 0.01)
    monkeypatch.setattr(figures, "POINTS", 3)
    monkeypatch.setattr(figures, "WATCHED", 1)
    monkeypatch.setattr(analysis, "TAUS", (0.4, 100.0))
    monkeypatch.setattr(analysis, "RHOS", (1e-15, 0.05))


def make(name, out, *, seeds=2, workers=1, config=TINY):
    picture, text = figures.figure(
        name, config, out, workers=workers, command=f"igm-rs figure {name} --data toy", seeds=seeds, source=SOURCE
    )
    assert picture == out / "figures" / f"figure-{name}-toy{'-paper' * (config.protocol == 'paper')}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 15_000
    assert PICTURE.fullmatch(picture.name)["figure"] == name
    told = json.loads(text.read_text(encoding="utf-8"))
    assert told["command"] == f"igm-rs figure {name} --data toy"
    assert told["shows"] == FIGURES[name]
    assert told["config"]["steps"] == config.steps
    assert set(told) >= {"caption", "versions", "revision", "seeds", "dataset"}
    return told


def test_every_figure_of_the_list_can_be_made():
    assert list(figures.MAKERS) == list(FIGURES) == list(figures.SEEDS) == list(figures.METHODS)


@pytest.mark.parametrize("name", ["1", "4", "5a", "5c"])
def test_no_figure_but_the_sweeps_looks_at_the_test_split(name, tmp_path, monkeypatch):
    def opened(self):
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(DataSet, "open_test", opened)
    make(name, tmp_path, seeds=1)


def test_figure_1_has_the_cosines_of_every_method(tmp_path):
    told = make("1", tmp_path)
    cosines = told["numbers"]["cosines"]
    assert list(cosines) == ["MLA", "IGM without SAM", "IGM", "shared trunk, flat"]
    # 4 steps of 2 modalities and 2 seeds, each with one source; of the shared trunk only the later one has a source
    assert [len(each["after"]) for each in cosines.values()] == [16, 16, 16, 8]
    assert told["numbers"]["learning_rates"] == dict.fromkeys(cosines, 0.03)
    assert told["seeds"] == [TINY.first_seed, TINY.first_seed + 1]
    medians = (figures._number(cosines["MLA"]["median"][which]) for which in ("before", "after", "change"))
    assert f"MLA {' / '.join(medians)};" in told["caption"]
    assert told["caption"].endswith("Learning rate 0.03.")


def test_numbers_in_captions_have_a_minus_sign_and_no_negative_zero():
    assert [figures._number(value) for value in (None, 0.5, -0.0123, -0.0001)] == ["–", "0.500", "−0.012", "0.000"]


def test_a_watched_training_is_the_same_training():
    data = SOURCE.load("toy").without_test()
    row = figures.Row("igm", data.modalities)
    plain, watched = (kind(data, row, TINY, 0.03, 7) for kind in (Training, figures.Watched))
    plain.run()
    watched.run()
    assert len(watched.watch.cosines) == 8
    ends = plain.model.state_dict(), watched.model.state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_figure_3_shows_an_inert_rho_and_takes_stored_runs(tmp_path, monkeypatch):
    told = make("3", tmp_path)
    rho = told["numbers"]["rho"]
    assert rho["values"] == [1e-15, 0.05]
    assert rho["mean_effects"]["effective_perturbation"] == pytest.approx([0, 1], abs=1e-3)
    assert [len(each) for each in rho["scores"]["accuracy"] + rho["scores"]["MAP"]] == [2] * 4
    assert told["numbers"]["tau"]["mean_effects"]["cosine"][0] > told["numbers"]["tau"]["mean_effects"]["cosine"][1]
    assert "Up to ρ = 1e-15 less than half of the perturbation arrives" in told["caption"]

    def trained(*_):
        raise AssertionError("a stored run was made again")

    monkeypatch.setattr(Training, "run", trained)
    assert make("3", tmp_path)["numbers"] == told["numbers"]


def test_figure_3_says_when_every_rho_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "RHOS", (0.01, 0.05))
    told = make("3", tmp_path, seeds=1)
    assert told["caption"].endswith("All values of ρ arrive at the weights.")
    assert "round chosen on validation" in told["caption"]


def test_figure_3_by_the_papers_protocol_says_so(tmp_path):
    told = make("3", tmp_path, seeds=1, config=figures.replace(TINY, protocol="paper"))
    assert "round chosen on the test split, as the released scripts do" in told["caption"]
    assert told["caption"].startswith("SELECTED ON THE TEST SET (--protocol paper)")


def test_a_value_of_the_sweep_that_is_the_configurations_is_the_run_of_the_tables(tmp_path, monkeypatch):
    jobs = []
    run_all = figures.run_all
    monkeypatch.setattr(
        figures, "run_all", lambda given, *rest, **named: jobs.extend(given) or run_all(given, *rest, **named)
    )
    make("3", tmp_path, seeds=1)
    assert [job.row.key for job in jobs] == ["igm", "igm-tau-100", "igm-rho-1e-15"]


def test_figure_4_has_the_surface_of_every_seed(tmp_path):
    told = make("4", tmp_path)
    assert "on 96 of 96 examples" in told["caption"]
    surfaces = told["numbers"]["surfaces"]
    assert list(surfaces) == ["MLA", "IGM without SAM", "IGM", "turns"]
    for each in surfaces.values():
        assert len(each["runs"]) == 2
        assert len(each["runs"][0]["losses"]) == figures.POINTS
        assert each["mean_rise"][0] == 0


def test_processes_side_by_side_find_the_same(tmp_path):
    alone, beside = (make("5a", tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert alone["numbers"] == beside["numbers"]
    means = alone["numbers"]["mean_singular_value"]
    assert list(means) == ["IGM without SAM", "IGM"]
    assert all(len(runs) == 2 for layers in means["IGM"].values() for runs in layers.values())
    pairs = [
        list(zip(means["IGM"][name][layer], runs, strict=True))
        for name, layers in means["IGM without SAM"].items()
        for layer, runs in layers.items()
    ]
    learned = [runs for runs in pairs if any(one != two for one, two in runs)]
    lower = sum(sum(one for one, _ in runs) < sum(two for _, two in runs) for runs in learned)
    every = sum(all(one < two for one, two in runs) for runs in learned)
    assert f"in {lower} of {len(learned)} layers, in {every} of them in every run." in alone["caption"]
    assert len(pairs) - len(learned) == 2  # each modality's first layer
    assert "The 2 layers that see the data themselves are equal and not counted." in alone["caption"]


def test_with_and_without_sam_are_compared_at_one_learning_rate(tmp_path):
    config = load_config("toy", {"steps": 4, "turn_steps": 2, "batch_size": 16, "rates": [0.001, 0.3]})
    for name in ("4", "5a"):
        rates = make(name, tmp_path, seeds=1, config=config)["numbers"]["learning_rates"]
        assert rates["IGM without SAM"] == rates["IGM"]
    tuned = json.loads(next((tmp_path / "tuning").rglob("igm.json")).read_text())["tried"]
    best = max(tuned, key=lambda each: sum(each["validation_accuracy"].values()))
    assert rates["IGM"] == best["learning_rate"]
    assert not list((tmp_path / "tuning").rglob("igm-no-sam.json"))


def test_figure_5a_says_where_rho_does_not_arrive(tmp_path):
    config = load_config("toy", {"steps": 4, "turn_steps": 2, "batch_size": 16, "learning_rate": 0.03, "rho": 1e-15})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ρ
        caption = make("5a", tmp_path, seeds=1, config=config)["caption"]
    assert (
        "With and without SAM they are the same to the last digit: nothing of ρ has arrived at the weights." in caption
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make("5a", tmp_path, seeds=1, config=replace(config, rho={"a": 1e-15, "b": 0.05}))
    means = made["numbers"]["mean_singular_value"]
    equal = sum(
        runs == means["IGM"][name][layer]
        for name, layers in means["IGM without SAM"].items()
        for layer, runs in layers.items()
    )
    assert equal > 2
    assert (
        f"The {equal} layers that are equal to the last digit are not counted: they see the data themselves, or "
        "nothing of ρ has arrived in front of them."
    ) in made["caption"]


class Clips(Column):
    """Pictures with random numbers of their own where a training asks; counts what is decoded."""

    shape = (40, 6)
    decoded = 0

    def __len__(self):
        return 40

    def example(self, place, seed):
        Clips.decoded += 1
        value = torch.arange(6.0) + place
        return value if seed is None else value + torch.rand(6, generator=torch.Generator().manual_seed(seed))

    def digest_lines(self):
        return []


@dataclass
class Forty:
    """A split."""

    inputs: dict

    def __len__(self):
        return 40


def test_figure_5c_takes_what_lies_in_files_as_training_does_and_decodes_it_before():
    config = load_config("toy", {"steps": 4, "turn_steps": 4, "batch_size": 8})
    inputs = {"a": Clips(), "b": torch.rand(40, 6)}
    split = Forty(inputs)
    training = SimpleNamespace(
        config=config, means=Means(), seed=3, data=SimpleNamespace(train=split),
        examples=lambda name, chosen: inputs[name][chosen],
    )  # fmt: skip
    Clips.decoded = 0
    held = figures._held(training)
    assert held.keys() == {"a", "b"}
    assert Clips.decoded == 2 * 8
    of_a, of_b = (list(islice(figures._drawn(training, name, held), 4)) for name in "ab")
    assert Clips.decoded == 2 * 8
    wanted = list(islice(feed(inputs["a"], 8, 3, 0, Means()), 2)) * 2
    assert all(torch.equal(batch, expected) for (_, batch), expected in zip(of_a, wanted, strict=True))
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(of_a, of_b, strict=True))
    assert all(torch.equal(batch, inputs["b"][chosen]) for chosen, batch in of_b)
    training.data.train = Forty({"b": inputs["b"]})
    assert figures._held(training) == {}
    of_b = list(islice(figures._drawn(training, "b", {}), 4))
    assert all(map(torch.equal, (chosen for chosen, _ in of_b), batch_stream(40, 8, 3)))


def test_a_surface_has_as_many_examples_as_are_kept_and_sees_them_in_portions(monkeypatch):
    split = Forty({"a": Clips()})
    shown = SimpleNamespace(train=split)
    assert len(figures._shown_examples(shown)) == 40
    monkeypatch.setattr(figures, "NUMBERS", 60)
    assert figures._shown_examples(shown).tolist() == list(range(0, 40, 4))


def test_the_loss_of_a_surface_is_that_of_all_portions_together(tmp_path, monkeypatch):
    whole = make("4", tmp_path / "whole", seeds=1)["numbers"]["surfaces"]
    monkeypatch.setattr(figures, "at_once", lambda inputs, most, numbers=None: None if numbers else 7)
    parts = make("4", tmp_path / "parts", seeds=1)["numbers"]["surfaces"]
    assert json.dumps(whole) != json.dumps(parts)  # another order of summation
    one, other = (torch.tensor(list(plain_numbers(each)), dtype=torch.float64) for each in (whole, parts))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # float32 losses


def plain_numbers(value):
    """Every number in nested mappings and lists."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from plain_numbers(each)
    elif isinstance(value, float | int):
        yield float(value)


def test_figure_5c_times_every_method(tmp_path):
    numbers = make("5c", tmp_path)["numbers"]
    assert list(numbers) == [figures.Row(key, ("a", "b")).label for key in figures.TIMED]
    assert numbers["joint, sum"]["ratio"] == 1
    assert all(each["calls"] == 2 and each["seconds"] > 0 for each in numbers.values())


def test_figure_5c_counts_a_short_last_round_as_the_part_that_it_is(tmp_path):
    config = load_config("toy", {"steps": 3, "turn_steps": 2, "batch_size": 16, "learning_rate": 0.03})
    numbers = make("5c", tmp_path, config=config)["numbers"]
    assert all(each["calls"] == 1.5 for each in numbers.values())


def test_a_lost_process_is_told(monkeypatch):
    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, context, prepare):
            super().__init__(workers)

    def look(task):
        raise concurrent.futures.process.BrokenProcessPool("gone")

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    with pytest.raises(ProcessLostError, match=r"^a process ended before its run did, most likely for want of memory"):
        figures._side_by_side(look, [1, 1], 2, "lost")


def test_warnings_are_kept_quiet_in_new_processes_and_as_they_were_afterwards(monkeypatch):
    program = "import warnings; warnings.warn('rho = 1 is below'); warnings.warn('other')"
    for before in (None, "error"):
        monkeypatch.delenv("PYTHONWARNINGS", raising=False)
        if before:
            monkeypatch.setenv("PYTHONWARNINGS", before)
        with running.without_warning_of_rho():
            told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stderr
        assert "rho" not in told.replace(program, "")
        assert "UserWarning: other" in told
        assert os.environ.get("PYTHONWARNINGS") == before


def test_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^figure is '2', expected one of 1, 3, 4, 5a, 5b, 5c$"):
        figures.figure("2", TINY, tmp_path, workers=1, command="")
    one = SOURCE.load("toy")
    single = figures.replace(one, train=figures.replace(one.train, inputs={"a": one.train.inputs["a"]}))
    source = type("One", (), {"of": lambda self, config: single})()
    with pytest.raises(ValueError, match=r"^data is 'toy' with one modality, expected two or more to compare methods$"):
        figures.figure("1", TINY, tmp_path, workers=1, command="", source=source)
