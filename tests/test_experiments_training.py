"""The training: fairness, schedules, that it is left and taken up to the bit, and that it sees no test label."""

import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from igm_rs.experiments import data, registering, training
from igm_rs.experiments.configuration import load_config
from igm_rs.experiments.data import Split
from igm_rs.experiments.evaluation import evaluate
from igm_rs.experiments.feeding import batch_stream
from igm_rs.experiments.methods import METHODS, Row
from igm_rs.experiments.training import Stopped, Training, turns_of

registering.register_files([Path(__file__).with_name("toy_sets.py")])
NAMES = ("a", "b")
TINY = load_config("toy", {"steps": 5, "turn_steps": 2, "batch_size": 16})
KEYS = [key for key, kind in METHODS.items() if type(kind).__module__.startswith("igm_rs.")]


@pytest.fixture
def toy():
    return data.load("toy")


def row(key):
    overrides = {"sources": {"a": None, "b": "a"}} if key == "igm-one-sided" else {}
    return Row(key, NAMES[:1] if METHODS[key].schedule == "single" else NAMES, overrides)


def same(one, other):
    """Whether nested values are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Watched(Training):
    """Notes what each step moves and sees, and the learning rate."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen, self.order, self.rates = {}, [], []

    def step_on(self, active, chosen, inputs):
        self.order.append(active)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        for name in active:
            self.seen.setdefault(name, []).append(chosen.tolist())
        return super().step_on(active, chosen, inputs)


# Fairness and schedules


def test_batches_cover_a_pass_without_repeats_and_follow_the_seed():
    stream = batch_stream(10, 3, seed=5)
    first = torch.cat([next(stream) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    again = batch_stream(10, 3, seed=5)
    assert torch.equal(torch.cat([next(again) for _ in range(3)]), first)
    assert not torch.equal(torch.cat([next(stream) for _ in range(3)]), first)
    assert len(next(batch_stream(4, 64, seed=0))) == 4


@pytest.mark.parametrize("key", KEYS)
def test_every_method_gives_each_modality_the_same_steps_on_the_same_examples(toy, key):
    line, told = row(key), []
    watched = Watched(toy.without_test(), line, TINY, 0.05, 7)
    result = watched.run(told.append)
    stream = batch_stream(len(toy.train), 16, seed=7)
    expected = [next(stream).tolist() for _ in range(5)]
    assert watched.seen == dict.fromkeys(line.modalities, expected)
    assert sum(progress.steps for progress in told) == watched.total == 5 * len(line.modalities)
    assert [point["round"] for point in result.curve] == [1, 2, 3]
    assert result.curve[-1]["steps"] == 5


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("single", [("a",)] * 5),
        ("joint-sum", [NAMES] * 5),
        ("igm", [("a",)] * 2 + [("b",)] * 2 + [("a",)] * 2 + [("b",)] * 2 + [("a",), ("b",)]),
        ("mla", [("a",), ("b",)] * 5),
        ("igm-shared", [("a",)] * 5 + [("b",)] * 5),
    ],
)
def test_schedules(toy, key, order):
    watched = Watched(toy.without_test(), row(key), TINY, 0.05, 0)
    watched.run()
    assert watched.order == order


@pytest.mark.parametrize("key", ["joint-sum", "igm", "mla", "igm-shared"])
def test_the_learning_rate_follows_half_a_cosine_over_the_steps_of_each_modality(toy, key):
    watched = Watched(toy.without_test(), row(key), TINY, 0.08, 0)
    watched.run()
    of_b = [rate for active, rate in zip(watched.order, watched.rates, strict=True) if "b" in active]
    factors = [0.5 * (1 + math.cos(math.pi * done / 3)) for done in (0, 0, 1, 1, 2)]
    assert of_b == pytest.approx([0.08 * factor for factor in factors])


def test_rounds_of_modalities_one_after_another_are_equal_shares_of_the_budget():
    config = load_config("toy", {"steps": 4, "turn_steps": 2})
    turns = turns_of(Row("igm-shared", NAMES), config)
    assert [turn.modality for turn in turns] == ["a", "b"]
    stretches = [stretch for turn in turns for stretch in turn.stretches]
    assert [(stretch.round, stretch.ends_round) for stretch in stretches] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip


def test_turns_are_measured_beginning_with_the_initial_weights(toy):
    result = Training(toy.without_test(), row("igm"), TINY, 0.05, 0).run()
    turns = [(turn["round"], turn["modality"]) for turn in result.after_turn]
    assert turns == [(0, ""), *((number, name) for number in (1, 2, 3) for name in NAMES)]
    assert result.after_turn[-1]["scores"]["accuracy"] == result.curve[-1]["accuracy"]
    assert set(result.curve[0]["accuracy"]) == {*NAMES, "mean", "entropy", "sum"}
    assert Training(toy.without_test(), row("mla"), TINY, 0.05, 0).run().after_turn == []


def test_the_round_with_the_best_validation_accuracy_is_chosen_the_later_of_equals(toy):
    result = Training(toy.without_test(), row("igm"), replace(TINY, steps=20), 0.05, 0).run()
    values = [point["by_origin"]["sum"] for point in result.curve]
    best = max(number for number, value in enumerate(values, start=1) if value == max(values))
    assert result.rounds == {"chosen": best, "last": 10}
    model = result.model
    model.load_state_dict(result.weights["chosen"])
    found = training.watched(model, toy.validation)
    assert found.accuracy == result.curve[best - 1]["accuracy"]
    assert found.by_origin == result.curve[best - 1]["by_origin"]


def test_an_origin_with_many_examples_does_not_choose_the_round(toy, monkeypatch):
    accuracies = iter([(0.9, 0.1), (0.2, 0.8), (0.3, 0.5)])  # of all examples; of the origins

    def watched(*_):
        plain, by_origin = next(accuracies)
        return training.Watched({"mean": plain, "sum": plain}, {"mean": by_origin, "sum": by_origin}, plain)

    run = Training(toy.without_test(), row("mla"), TINY, 0.05, 0)
    monkeypatch.setattr(training, "watched", watched)
    assert run.run().rounds == {"chosen": 2, "last": 3}


def test_training_leaves_the_random_state_alone_and_depends_on_the_seed(toy):
    state = torch.random.get_rng_state()
    runs = [Training(toy.without_test(), row("igm"), TINY, 0.05, seed).run() for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(runs[0].weights, runs[1].weights)
    assert not same(runs[0].weights, runs[2].weights)


def test_a_round_that_has_diverged_is_not_chosen(toy):
    class Diverging(Training):
        def step_on(self, active, chosen, inputs):
            loss = super().step_on(active, chosen, inputs)
            return loss * math.nan if self.done >= 4 else loss

    result = Diverging(toy.without_test(), row("joint-sum"), TINY, 0.05, 0).run()
    assert result.rounds == {"chosen": 1, "last": 3}


# Left and taken up


@pytest.mark.parametrize("key", KEYS)
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(toy, key):
    """Stopped before every single step in turn, saved to a file's bytes, and taken up by another training."""
    shut = toy.without_test()
    config = replace(TINY, steps=4)
    whole = Training(shut, row(key), config, 0.05, 1)
    expected = whole.run()
    left: Training | None = None
    stops = 0
    while True:
        now = Training(shut, row(key), config, 0.05, 1)
        if left is not None:
            file = io.BytesIO()
            torch.save(left.state(), file)
            file.seek(0)
            now.load_state(torch.load(file, weights_only=True))
        asked = iter((False, True))
        try:
            result = now.run(stop=lambda asked=asked: next(asked))
            break
        except Stopped:
            left = now
            stops += 1
    assert stops >= 3  # in the middle of turns, too
    for name in (
        *("weights", "rounds", "curve", "after_turn", "skipped"),
        *("cosine", "effective_perturbation", "projected_share"),
    ):
        assert same(getattr(result, name), getattr(expected, name)), name
    assert same(now.optimizer.state_dict(), whole.optimizer.state_dict())


def test_what_random_numbers_do_is_taken_up_too(toy, monkeypatch):
    """A network that draws in its forward pass, as dropout does."""
    branch = training.Branches.branch

    def dropping(model, modality, inputs):
        return torch.nn.functional.dropout(branch(model, modality, inputs), 0.3, model.training)

    monkeypatch.setattr(training.Branches, "branch", dropping)
    whole = Training(toy.without_test(), row("igm"), TINY, 0.05, 0).run()
    first = Training(toy.without_test(), row("igm"), TINY, 0.05, 0)
    asked = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        first.run(stop=lambda: next(asked))
    torch.rand(5)
    second = Training(toy.without_test(), row("igm"), TINY, 0.05, 0)
    second.load_state(first.state())
    assert same(second.run().weights, whole.weights)


# The test split


@dataclass(frozen=True)
class Guarded(Split):
    """A test split whose labels must not be looked at."""

    def __getattribute__(self, name):
        if name in ("labels", "inputs"):
            raise AssertionError(f"{name} of the test split were looked at")
        return super().__getattribute__(name)


def guarded(dataset):
    test = dataset._test
    split = Guarded.__new__(Guarded)
    for name in ("inputs", "labels", "origins"):
        object.__setattr__(split, name, getattr(test, name))
    return replace(dataset, _test=split)


@pytest.mark.parametrize("key", KEYS)
def test_no_training_looks_at_a_test_label(toy, key):
    watched = guarded(toy)
    result = Training(watched, row(key), TINY, 0.05, 0).run()
    assert watched.test_openings == 0
    with pytest.raises(AssertionError, match="of the test split were looked at"):
        evaluate(result.model, watched, result.weights)
    assert same(Training(toy, row(key), TINY, 0.05, 0).run().weights, result.weights)


def test_other_test_labels_change_nothing(toy):
    test = toy._test
    other = replace(toy, _test=Split(test.inputs, test.labels.flip(0), test.origins))
    one, two = (Training(each, row("igm"), TINY, 0.05, 0).run() for each in (toy, other))
    assert same(one.weights, two.weights)
    assert one.rounds == two.rounds
    assert one.curve == two.curve
    scores = [evaluate(run.model, each, run.weights).scores for run, each in ((one, toy), (two, other))]
    assert scores[0] != scores[1]


def test_the_papers_protocol_chooses_on_the_test_split(toy):
    config = replace(TINY, steps=20, protocol="paper")
    dataset = replace(toy)
    result = Training(dataset, row("igm"), config, 0.05, 0).run()
    assert dataset.test_openings == 1
    plain = Training(toy, row("igm"), replace(config, protocol="validation"), 0.05, 0).run()
    assert result.curve == plain.curve
    assert same(result.weights["last"], plain.weights["last"])
    tests = evaluate(result.model, toy, {**result.weights, "validation": plain.weights["chosen"]}).scores
    chosen = tests["chosen"]["accuracy"]["sum"]
    assert chosen >= max(tests["last"]["accuracy"]["sum"], tests["validation"]["accuracy"]["sum"])
    with pytest.raises(AssertionError, match="of the test split were looked at"):
        Training(guarded(toy), row("igm"), config, 0.05, 0).run()


def test_tuning_under_the_papers_protocol_has_no_test_split(toy):
    result = Training(toy.without_test(), row("igm"), replace(TINY, protocol="paper"), 0.05, 0).run()
    assert same(result.weights, Training(toy, row("igm"), TINY, 0.05, 0).run().weights)
