"""The demonstration: its splits, its fairness, its tables and pictures, and what it says when something is wrong."""

import csv
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import igm_rs
from igm_rs.experiments import __main__ as command
from igm_rs.experiments import data, evaluation, figures, methods, networks, protocol, running, tables, training

SHIPPED = Path(__file__).parent.parent / "data"
TINY = methods.Settings(steps=4, turn_steps=2, batch_size=16)


@pytest.fixture(scope="module")
def watch():
    return data.load("watch", SHIPPED)


@pytest.fixture(scope="module")
def mfeat():
    return data.load("mfeat", SHIPPED)


def fresh(dataset):
    """Return the same set with its test split not opened yet."""
    return dataclasses.replace(dataset, test_openings=0)


def row(key, dataset):
    """Return the first line that a method has in the table of a data set."""
    return methods.rows([key], dataset.modalities)[0]


# Data


def test_watch_has_2229_windows_of_disjoint_people(watch):
    splits = watch.train, watch.validation, fresh(watch).open_test()
    assert [len(split) for split in splits] == [1271, 251, 707]
    assert watch.sizes == {"train": 1271, "validation": 251, "test": 707}
    people = [set(split.origins.tolist()) for split in splits]
    assert people == [{1, 2, 3, 4, 5, 6}, {7}, {8, 9, 10}]
    for split in splits:
        assert {name: tuple(x.shape[1:]) for name, x in split.inputs.items()} == {
            "accelerometer": (3, 200),
            "gyroscope": (3, 200),
        }
        assert split.labels.min() >= 0
        assert split.labels.max() < watch.classes == 7


def test_mfeat_is_split_by_class_and_always_alike(mfeat):
    splits = mfeat.train, mfeat.validation, fresh(mfeat).open_test()
    assert [split.labels.bincount().tolist() for split in splits] == [[120] * 10, [40] * 10, [40] * 10]
    origins = torch.cat([split.origins for split in splits])
    assert sorted(origins.tolist()) == list(range(2000))
    assert torch.equal(data.load("mfeat", SHIPPED).train.origins, mfeat.train.origins)
    assert {name: x.shape[1] for name, x in mfeat.train.inputs.items()} == {"fou": 76, "zer": 47, "mor": 6}


def test_windows_by_hand():
    series = np.arange(850, dtype=np.float32).reshape(850, 1)
    cut, origin = data.windows(series, np.array([399, 100, 351]))
    assert cut.shape == (4, 1, 200)
    assert cut[:, 0, 0].tolist() == [0, 100, 499, 599]
    assert origin.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5)])
def test_standardisation_looks_at_training_examples_only(shape):
    values = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    training = np.array([True, True, True, True, False, False])
    axes = (0, 2) if len(shape) == 3 else (0,)
    scaled = data.standardise(values, training)
    np.testing.assert_allclose(scaled[training].mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[training].std(axes), 1, rtol=1e-6)
    other = values.copy()
    other[~training] = 1e6
    np.testing.assert_array_equal(data.standardise(other, training)[training], scaled[training])


def test_standardisation_of_a_constant_feature():
    values = np.array([[2.0], [2.0], [5.0]], dtype=np.float32)
    assert data.standardise(values, np.array([True, True, False])).tolist() == [[0.0], [0.0], [3.0]]


@pytest.mark.parametrize("name", ["watch", "mfeat"])
def test_shipped_sets_are_standardised_with_their_training_split(name, request):
    dataset = request.getfixturevalue(name)
    for values in dataset.train.inputs.values():
        axes = (0, 2) if values.ndim == 3 else (0,)
        assert values.double().mean(axes).abs().max() < 1e-5
        assert (values.double().std(axes, correction=0) - 1).abs().max() < 1e-5


def test_the_test_split_is_counted_and_can_be_shut(watch):
    dataset = fresh(watch)
    shut = dataset.without_test()
    with pytest.raises(RuntimeError, match="test split of watch is shut while settings are chosen"):
        shut.open_test()
    assert "test" not in shut.sizes
    assert dataset.test_openings == shut.test_openings == 0
    dataset.open_test()
    assert dataset.test_openings == 1


def LONG(_):  # noqa: N802
    """One entry for every reading of watch."""
    return np.zeros(244102)


def rewritten(folder, name, **changes):
    """Write a copy of a shipped archive with some arrays changed, or left out where None."""
    with np.load(SHIPPED / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive}
    for key, change in changes.items():
        if change is None:
            del arrays[key]
        else:
            arrays[key] = change(arrays[key])
    np.savez(folder / f"{name}.npz", **arrays)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("watch", {"X": None}, "it has no array X"),
        ("watch", {"X": lambda x: x[:, :4]}, "X has 4 columns, expected 6"),
        ("watch", {"X": lambda x: x[:-1]}, "n adds up to 244102, X has 244101 rows"),
        ("watch", {"y": lambda y: y[:-1]}, r"n, y and subject have \[140, 139, 140\] entries"),
        ("watch", {"subject": lambda s: np.minimum(s, 7)}, "no example belongs to the test split"),
        ("watch", {"n": lambda n: np.repeat(1, n.sum()), "y": LONG, "subject": LONG}, "no series has 200 readings"),
        ("mfeat", {"zer": None, "mor": None}, "it has no array zer, mor"),
        ("mfeat", {"fou": lambda x: x[:10]}, "fou has 10 rows, y has 2000"),
        ("mfeat", {"fou": lambda x: x[:, 0]}, "fou has 1 dimensions, expected 2"),
        ("mfeat", {"y": lambda y: y.astype("U1")}, "y has dtype <U1, expected numbers"),
        ("mfeat", {"y": lambda y: np.where(y == 9, 8, y)}, "expected 200 each"),
        ("mfeat", {"mor": lambda x: np.where(x > 100, np.nan, x)}, "mor holds values that are not finite"),
    ],
)  # fmt: skip
def test_a_foreign_archive_is_refused_with_file_and_reason(tmp_path, name, changes, reason):
    rewritten(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=rf"{name}\.npz is not the expected one: .*{reason}.*; take the copy"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn off", b"words"])
def test_a_damaged_archive_is_refused_with_file_and_reason(tmp_path, content):
    (tmp_path / "mfeat.npz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"mfeat\.npz is not the expected one: it is no NumPy archive that can be read"
    ):
        data.load("mfeat", tmp_path)


def test_a_missing_archive_is_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"watch\.npz does not exist: give the folder .* with --data"):
        data.load("watch", tmp_path)


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="data set is 'iris', expected one of watch, mfeat"):
        data.load("iris", SHIPPED)


# Networks and methods


@pytest.mark.parametrize("name", ["watch", "mfeat"])
def test_every_method_starts_a_modality_from_the_same_weights(name, request):
    dataset = request.getfixturevalue(name)
    last = dataset.modalities[-1]
    alone = networks.Branches.of(dataset, [last], shared_head=False, seed=3)
    whole = networks.Branches.of(dataset, dataset.modalities, shared_head=False, seed=3)
    shared = networks.Branches.of(dataset, dataset.modalities, shared_head=True, seed=3)
    other = networks.Branches.of(dataset, [last], shared_head=False, seed=4)
    for mine, theirs in zip(alone.parameters(), whole.encoders[last].parameters(), strict=False):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(alone.heads.parameters(), whole.heads[last].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(alone.encoders.parameters(), shared.encoders[last].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(next(alone.parameters()), next(other.parameters()))


def test_building_a_network_leaves_the_random_state_alone(mfeat):
    state = torch.random.get_rng_state()
    networks.Branches.of(mfeat, mfeat.modalities, shared_head=True, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_heads_are_the_papers_or_one_linear_layer_for_all(mfeat):
    own = networks.Branches.of(mfeat, mfeat.modalities, shared_head=False, seed=0)
    sizes = [(layer.in_features, layer.out_features) for layer in own.head_of("zer") if isinstance(layer, nn.Linear)]
    assert sizes == [(64, 256), (256, 64), (64, 10)]
    shared = networks.Branches.of(mfeat, mfeat.modalities, shared_head=True, seed=0)
    assert shared.head_of("fou") is shared.head_of("mor")
    assert isinstance(shared.head, nn.Linear)


def test_nothing_in_a_network_is_remembered_between_passes(watch):
    model = networks.Branches.of(watch, watch.modalities, shared_head=False, seed=0)
    assert list(model.buffers()) == []


def test_logits_are_those_of_evaluation_mode_without_gradients(mfeat):
    model = networks.Branches.of(mfeat, mfeat.modalities, shared_head=False, seed=0)
    seen = []
    model.encoders["fou"].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    logits = model.logits(mfeat.validation.inputs)
    assert seen == [False]
    assert model.training
    assert list(logits) == ["fou", "zer", "mor"]
    assert not logits["fou"].requires_grad
    assert logits["fou"].shape == (400, 10)


def test_rows_are_in_the_order_of_the_table_and_single_is_one_for_each_modality():
    lines = methods.rows(["igm", "single"], ["a", "b"])
    assert [(line.key, line.label, line.modalities) for line in lines] == [
        ("single-a", "a alone", ("a",)),
        ("single-b", "b alone", ("b",)),
        ("igm", "IGM", ("a", "b")),
    ]
    with pytest.raises(ValueError, match="method is 'ogm', expected one of single, joint, sam"):
        methods.rows(["ogm"], ["a", "b"])


@pytest.mark.parametrize(("steps", "lengths"), [(80, [40, 40]), (85, [40, 40, 5]), (3, [3])])
def test_turns_use_up_the_budget(steps, lengths):
    assert methods.Settings(steps).turn_lengths == lengths


@pytest.mark.parametrize(
    ("key", "rho", "tau", "layers"),
    [
        ("sam", 0.05, None, 0),
        ("turns", 0, 0, 3),
        ("turns-sam", 0.05, 0, 3),
        ("igm-no-sam", 0, 0.4, 3),
        ("igm", 0.05, 0.4, 3),
    ],
)
def test_optimizers_are_what_the_table_says(mfeat, key, rho, tau, layers):
    line = row(key, mfeat)
    model = networks.Branches.of(mfeat, line.modalities, shared_head=False, seed=0)
    optimizer = methods.make_optimizer(line, model, TINY, 0.1, 10)
    assert isinstance(optimizer, igm_rs.IGMOptimizer)
    assert set(optimizer.rho.values()) == {rho}
    if tau is not None:
        assert set(optimizer.tau.values()) == {tau}
        assert optimizer.modalities == mfeat.modalities
        assert {source: len(pairs) for source, pairs in optimizer.pairs["zer"].items()} == {"fou": layers}


@pytest.mark.parametrize(("scope", "convolutions"), [(0.3, 0), (0.8, 1), (1.0, 3)])
@pytest.mark.parametrize("key", ["igm-no-sam", "igm"])
def test_a_scope_projects_from_the_output_backwards(watch, key, scope, convolutions, monkeypatch):
    """The heads of these networks hold 71 % of the parameters."""
    projected = {}
    note = training._Witness.note

    def noted(witness, optimizer):
        projected.update(optimizer.last_stats["projected"])
        note(witness, optimizer)

    monkeypatch.setattr(training._Witness, "note", noted)
    settings = dataclasses.replace(TINY, scope=scope)
    trained = training.train(watch.without_test(), row(key, watch), settings, 0.03, seed=0)
    model = trained.model
    kinds = {
        f"{name}.{part}{path and '.' + path}": type(module)
        for name in watch.modalities
        for part, root in enumerate((model.encoders[name], model.heads[name]))
        for path, module in root.named_modules()
    }
    assert set(projected) <= set(kinds)
    for name in watch.modalities:
        of_it = [kinds[label] for label in projected if label.startswith(name)]
        assert of_it.count(nn.Conv1d) == convolutions
    assert scope - 0.03 <= trained.projected_share < 1
    assert trained.cosine < 1


@pytest.mark.parametrize("key", ["single", "joint"])
def test_methods_that_need_nothing_else_use_plain_sgd(mfeat, key):
    line = row(key, mfeat)
    model = networks.Branches.of(mfeat, line.modalities, shared_head=False, seed=0)
    assert type(methods.make_optimizer(line, model, TINY, 0.1, 10)) is torch.optim.SGD


# Training


def test_batches_cover_a_pass_without_repeats_and_follow_the_seed():
    stream = training.batch_stream(10, 3, seed=5)
    first = torch.cat([next(stream) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    again = training.batch_stream(10, 3, seed=5)
    assert torch.equal(torch.cat([next(again) for _ in range(3)]), first)
    assert not torch.equal(torch.cat([next(stream) for _ in range(3)]), first)
    assert len(next(training.batch_stream(4, 64, seed=0))) == 4


@pytest.mark.parametrize("key", list(methods.METHODS))
def test_every_method_gives_each_modality_the_same_steps_on_the_same_examples(mfeat, key, monkeypatch):
    seen = {}
    step = training._step

    def watched(model, optimizer, active, chosen, split):
        for name in active:
            seen.setdefault(name, []).append(chosen.tolist())
        return step(model, optimizer, active, chosen, split)

    monkeypatch.setattr(training, "_step", watched)
    told = []
    settings = dataclasses.replace(TINY, steps=5)
    line = row(key, mfeat)
    training.train(mfeat.without_test(), line, settings, 0.05, seed=7, report=lambda *what: told.append(what))
    stream = training.batch_stream(1200, 16, seed=7)
    expected = [next(stream).tolist() for _ in range(5)]
    assert seen == dict.fromkeys(line.modalities, expected)
    assert sum(steps for steps, _, _ in told) == 5 * len(line.modalities)


@pytest.mark.parametrize("key", ["turns", "igm-no-sam", "igm"])
def test_turns_train_one_modality_after_another(mfeat, key, monkeypatch):
    order = []
    step = training._step
    monkeypatch.setattr(training, "_step", lambda *given: order.append(given[2]) or step(*given))
    training.train(mfeat.without_test(), row(key, mfeat), TINY, 0.05, seed=0)
    assert order == [("fou",)] * 2 + [("zer",)] * 2 + [("mor",)] * 2 + [("fou",)] * 2 + [("zer",)] * 2 + [("mor",)] * 2


def test_mla_alternates_within_a_batch_and_its_projection_fires(mfeat, monkeypatch):
    order = []
    step = training._step
    monkeypatch.setattr(training, "_step", lambda *given: order.append(given[2]) or step(*given))
    trained = training.train(mfeat.without_test(), row("mla", mfeat), TINY, 0.05, seed=0)
    assert order == [("fou",), ("zer",), ("mor",)] * 4
    assert trained.cosine < 0.999


def test_what_each_method_reports_of_itself(mfeat):
    figures_of = {
        key: training.train(mfeat.without_test(), row(key, mfeat), TINY, 0.05, seed=0)
        for key in ("joint", "sam", "turns", "igm-no-sam", "igm")
    }
    assert {key: trained.cosine is not None for key, trained in figures_of.items()} == {
        "joint": False, "sam": False, "turns": False, "igm-no-sam": True, "igm": True,
    }  # fmt: skip
    assert {key: trained.effective_perturbation is not None for key, trained in figures_of.items()} == {
        "joint": False, "sam": True, "turns": False, "igm-no-sam": False, "igm": True,
    }  # fmt: skip
    assert figures_of["igm"].effective_perturbation == pytest.approx(1, abs=1e-3)
    assert 0.5 < figures_of["igm"].cosine < 1
    assert all(trained.skipped == 0 for trained in figures_of.values())


def test_turns_without_modification_equal_plain_sgd_on_each_modality(mfeat):
    """An alternating run without SAM and projection is the modalities' own runs, to the bit (heads are their own)."""
    both = training.train(mfeat.without_test(), row("turns", mfeat), TINY, 0.05, seed=0)
    alone = training.train(mfeat.without_test(), methods.rows(["single"], mfeat.modalities)[1], TINY, 0.05, seed=0)
    for mine, theirs in zip(alone.model.encoders.parameters(), both.model.encoders["zer"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_kept_round_is_the_one_asked_for(mfeat):
    line = row("joint", mfeat)
    trained = training.train(mfeat.without_test(), line, TINY, 0.05, seed=0, keep=1)
    assert [point.steps for point in trained.curve] == [2, 4]
    logits = trained.model.logits(mfeat.validation.inputs)
    fused = evaluation.accuracy(sum(logits.values()), mfeat.validation.labels)
    assert (trained.kept, fused) == (1, trained.curve[0].fused)
    with pytest.raises(ValueError, match="keep is 3, expected a round from 1 to 2"):
        training.train(mfeat.without_test(), line, TINY, 0.05, seed=0, keep=3)


def test_the_learning_rate_follows_half_a_cosine(mfeat, monkeypatch):
    rates = []
    step = training._step
    monkeypatch.setattr(training, "_step", lambda *given: rates.append(given[1].param_groups[0]["lr"]) or step(*given))
    training.train(
        mfeat.without_test(), row("igm", mfeat), dataclasses.replace(TINY, steps=3, turn_steps=1), 0.05, seed=0
    )
    assert rates == pytest.approx([0.05] * 3 + [0.05 * 0.75] * 3 + [0.05 * 0.25] * 3)


# Choosing settings


def outcome(curve, seed=0, scores=None):
    points = [training.Point(2 * (at + 1), 1.0, {"a": value}, value) for at, value in enumerate(curve)]
    return running.Outcome(seed, len(points), points, 0.001, 0, None, None, scores or {}, {})


def test_choice_is_the_best_mean_over_seeds_and_neighbouring_rounds():
    runs = [
        (
            0.1,
            outcome([0.1, 1.0, 0.1, 0.4]),
        ),  # one lucky round: means 0.1, 1.0, 0.1, 0.4; smoothed 0.55, 0.4, 0.5, 0.25
        (0.1, outcome([0.1, 1.0, 0.1, 0.4])),
        (0.2, outcome([0.2, 0.5, 0.6, 0.7])),  # means 0.3, 0.6, 0.6, 0.6; smoothed 0.45, 0.5, 0.6, 0.6
        (0.2, outcome([0.4, 0.7, 0.6, 0.5])),
    ]
    choice = running.choose(runs)
    assert (choice.learning_rate, choice.keep) == (0.2, 4)
    assert choice.tried == pytest.approx({0.1: 0.55, 0.2: 0.6})
    with pytest.raises(ValueError, match="no tuning run"):
        running.choose([])


class Forbidden:
    """Stands for a test split; whoever looks at it fails the test."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split was asked for its {name}")

    def __len__(self):
        raise AssertionError("the test split was measured")


@pytest.mark.parametrize("key", list(methods.METHODS))
def test_tuning_never_touches_the_test_split_and_a_final_run_opens_it_once(mfeat, key):
    job = running.Job("mfeat", row(key, mfeat), TINY, 0.05, seed=0, keep=None)
    guarded = dataclasses.replace(mfeat, _test=Forbidden(), test_openings=0)
    tuned = running.run_job(job, guarded, lambda _: None)
    assert (tuned.scores, guarded.test_openings) == ({}, 0)
    dataset = fresh(mfeat)
    final = running.run_job(dataclasses.replace(job, keep=2), dataset, lambda _: None)
    assert dataset.test_openings == 1
    assert [point.fused for point in final.curve] == [point.fused for point in tuned.curve]
    assert all(math.isfinite(value) for values in final.scores.values() for value in values.values())


def test_calibration_is_over_before_the_test_split_opens(mfeat, monkeypatch):
    order = []
    fit = evaluation.fusion.fit
    monkeypatch.setattr(evaluation.fusion, "fit", lambda *given: order.append("fit") or fit(*given))
    dataset = fresh(mfeat)
    monkeypatch.setattr(dataset, "open_test", lambda: order.append("open") or mfeat.validation)
    evaluation.evaluate(networks.Branches.of(mfeat, mfeat.modalities, shared_head=False, seed=0), dataset)
    assert order == ["fit", "open"]


# Measures


class Given(nn.Module):
    """A model whose logits are its inputs."""

    def logits(self, inputs):
        return dict(inputs)


def test_measures_by_hand():
    right = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [4.0, 0, 0]])
    wrong = torch.tensor([[0, 1.0, 0], [0, 1.0, 0], [0, 1.0, 0], [1.0, 0, 0]])
    split = data.Split({"a": right, "b": wrong}, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    dataset = data.DataSet("hand", "hand", 3, split, split, split)
    scores, temperatures = evaluation.evaluate(Given(), dataset)
    assert set(scores) == set(evaluation.MEASURES)
    assert list(scores["accuracy"]) == ["a", "b", *evaluation.FUSIONS]
    assert scores["accuracy"]["a"] == 1
    assert scores["accuracy"]["b"] == pytest.approx(0.5)
    # b: class 0 has 1 of 2 found and nothing wrong, F1 2/3; class 1 1 of 1 and two wrong, F1 1/2; class 2 F1 0
    assert scores["macro_f1"]["b"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["nll"]["a"] == pytest.approx(math.log(1 + 2 * math.exp(-4)), rel=1e-5)
    assert scores["accuracy"]["sum"] == scores["accuracy"]["mean"] == scores["accuracy"]["calibrated"] == 1
    assert set(temperatures) == {"a", "b"}


def test_a_single_modality_has_no_fusion(mfeat):
    model = networks.Branches.of(mfeat, ["mor"], shared_head=False, seed=0)
    scores, _ = evaluation.evaluate(model, fresh(mfeat))
    assert list(scores["accuracy"]) == ["mor"]


# Tables and pictures


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (31, 2.0423)])
def test_half_width_is_students(count, quantile):
    values = [float(value % 2) for value in range(count)]
    expected = quantile * np.std(values, ddof=1) / math.sqrt(count)
    assert tables.half_width(values) == pytest.approx(expected, rel=1e-4)
    assert tables.half_width(values[:1]) is None


def scored(seed, shift, names=("accelerometer", "gyroscope", *evaluation.FUSIONS)):
    values = {name: 0.5 + shift + 0.1 * at for at, name in enumerate(names)}
    curve = [training.Point(2, 1.0, {"accelerometer": 0.5, "gyroscope": 0.4 + shift}, 0.6)]
    return running.Outcome(seed, 1, curve, 0.002, 0, 0.97, 1.0, dict.fromkeys(evaluation.MEASURES, values), {"a": 2.0})


@pytest.fixture
def results(watch):
    single, joint, igm = (row(key, watch) for key in ("single", "joint", "igm"))
    choice = running.Choice(0.05, 1, {0.05: 0.7, 0.1: 0.6})
    dataset = fresh(watch)
    summed = tables.dataset_results(
        dataset,
        [
            (single, TINY, choice, [scored(seed, 0.01 * seed, ("accelerometer",)) for seed in range(3)]),
            (joint, TINY, choice, [scored(seed, 0.01 * seed) for seed in range(3)]),
            (igm, TINY, choice, [scored(seed, 0.02 * seed) for seed in range(3)]),
        ],
    )
    assert dataset.test_openings == 0
    words = protocol.protocol(TINY, 3, 2, tuned=True)
    return {"protocol": words, "options": {}, "versions": {"torch": "2"}, "seconds": 1.0, "datasets": [summed]}


def test_table_has_two_lines_a_method_and_says_what_it_should(results):
    heads, body = tables.table(results["datasets"][0])
    assert heads[:2] == ["method", "%"]
    assert heads[2:7] == ["accelerometer", "gyroscope", "mean", "logit sum", "calibrated"]
    assert heads[7:] == ["vs joint", "ms/step", "lr", "round"]
    assert [line[:2] for line in body] == [
        ["accelerometer alone", "accuracy"], ["", "macro-F1"], ["joint", "accuracy"], ["", "macro-F1"],
        ["IGM", "accuracy"], ["", "macro-F1"],
    ]  # fmt: skip
    assert body[0][2:] == ["51.0 ± 1.0", "–", "–", "–", "–", "–", "2.00", "0.05", "1/2"]
    assert body[2][2:8] == ["51.0 ± 1.0", "61.0 ± 1.0", "71.0 ± 1.0", "81.0 ± 1.0", "101.0 ± 1.0", "–"]
    # differences 0, 1, 2 points: mean 1, and 4.3027 · 1 / √3
    assert body[4][7] == "+1.0 ± 2.5"


def test_plain_table_is_aligned_and_markdown_is_rectangular(results):
    heads, body = tables.table(results["datasets"][0])
    lines = tables.plain(heads, body).splitlines()
    assert len(lines) == 2 + len(body)
    ends = [lines[0].index(head) + len(head) for head in heads[2:]]
    for line, cells in zip(lines[2:], body, strict=True):
        for end, cell in zip(ends, cells[2:], strict=True):
            assert line.ljust(ends[-1])[:end].endswith(cell)
    marked = tables.markdown(heads, body).splitlines()
    assert {line.count("|") for line in marked} == {len(heads) + 1}
    assert marked[1].startswith("| :-- | :-- | --: |")


def test_one_seed_has_no_spread(watch):
    choice = running.Choice(0.05, 1, {})
    lines = [(row(key, watch), TINY, choice, [scored(0, shift)]) for key, shift in (("joint", 0), ("igm", 0.01))]
    _, body = tables.table(tables.dataset_results(fresh(watch), lines))
    assert body[2][2] == "51.0"
    assert body[2][7] == "+1.0"


def test_without_joint_there_is_no_difference_to_it(watch):
    line = (row("igm", watch), TINY, running.Choice(0.05, 1, {}), [scored(0, 0)])
    summed = tables.dataset_results(fresh(watch), [line])
    assert summed["rows"][0]["difference_to_joint"] == {}
    assert tables.table(summed)[1][0][7] == "–"


def test_files_hold_every_run(results, tmp_path):
    paths = tables.write(tmp_path, results)
    assert [path.name for path in paths] == ["results.json", "runs.csv", "summary.csv", "tables.md"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == results
    with paths[1].open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert list(runs[0]) == ["dataset", "method", "seed", "measure", "of", "value"]
    one = [line for line in runs if (line["method"], line["seed"], line["measure"]) == ("igm", "2", "accuracy")]
    assert [line["of"] for line in one] == ["accelerometer", "gyroscope", *evaluation.FUSIONS]
    assert one[0]["value"] == "0.540000"
    with paths[2].open(newline="") as file:
        summary = list(csv.DictReader(file))
    assert summary[0] == {
        "dataset": "watch", "method": "single-accelerometer", "measure": "accuracy", "of": "accelerometer",
        "mean": "0.510000", "sd": "0.010000", "seeds": "3",
    }  # fmt: skip
    page = paths[3].read_text(encoding="utf-8")
    assert all(paragraph in page for paragraph in results["protocol"])
    assert "cosine of a head's gradient before and after projection 0.9700" in page
    assert "1271 examples to train on, 251 to validate, 707 to test." in page


def test_protocol_says_how_settings_were_chosen():
    tuned = " ".join(protocol.protocol(TINY, 3, 2, tuned=True))
    assert "learning rate (of 0.01, 0.03, 0.1)" in tuned
    assert "SAM with ρ = 0.05" in tuned
    assert "4 gradient steps of 16 examples" in tuned
    assert "over 3 seeds, of each modality" in tuned
    untuned = " ".join(protocol.protocol(TINY, 1, 2, tuned=False))
    assert "Choice: none. Every row has learning rate 0.03" in untuned
    assert "over 1 seed, of each modality" in untuned


OKABE_ITO = {"#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#555555"}


def test_accuracy_picture_has_a_dot_for_every_seed(results):
    from matplotlib.colors import to_hex

    figure = figures.accuracy_figure(results["datasets"])
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "."]
    means = [line for line in axes.lines if line.get_marker() != "."]
    assert len(dots) == len(means) == 1 + 2 * 3
    assert all(len(line.get_xdata()) == 3 for line in dots)
    assert {to_hex(line.get_color()) for line in axes.lines} <= OKABE_ITO
    assert [label.get_text() for label in axes.get_yticklabels()] == ["accelerometer alone", "joint", "IGM"]
    assert axes.get_xlabel() == "test accuracy (%)"


def test_curves_are_those_of_joint_training_and_igm(results):
    figure = figures.curves_figure(results["datasets"])
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == [
        "accelerometer, joint", "accelerometer, IGM", "gyroscope, joint", "gyroscope, IGM",
    ]  # fmt: skip
    assert axes.lines[2].get_ydata() == pytest.approx([41.0])
    assert axes.get_xlabel() == "gradient steps of each modality"
    results["datasets"][0]["rows"] = results["datasets"][0]["rows"][:1]
    assert figures.curves_figure(results["datasets"]) is None


# The command


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(command, "LEARNING_RATES", (0.02, 0.05))
    monkeypatch.setattr(command, "TUNING_SEEDS", (1000,))


def test_a_short_run_of_everything(tmp_path, capsys, few):
    status = command.main(
        [
            "--data",
            str(SHIPPED),
            "--out",
            str(tmp_path / "new" / "out"),
            "--seeds",
            "2",
            "--steps",
            "2",
            "--workers",
            "1",
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "watch: exercises of unseen people" in printed.out
    assert "IGM, seed 101, loss" in printed.err
    written = {path.name: path for path in (tmp_path / "new" / "out").iterdir()}
    assert set(written) == {"results.json", "runs.csv", "summary.csv", "tables.md", "accuracy.png", "curves.png"}
    assert all(written[name].read_bytes().startswith(b"\x89PNG") for name in ("accuracy.png", "curves.png"))
    text = written["results.json"].read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(SHIPPED) not in text
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the results"))
    assert results["versions"]["igm-rs"] == igm_rs.__version__
    assert [[line["key"] for line in part["rows"]] for part in results["datasets"]] == [
        ["single-accelerometer", "single-gyroscope", *list(methods.METHODS)[1:]],
        ["single-fou", "single-zer", "single-mor", *list(methods.METHODS)[1:]],
    ]
    for part in results["datasets"]:
        for line in part["rows"]:
            assert line["settings"]["learning_rate"] in (0.02, 0.05)
            assert [tried["learning_rate"] for tried in line["tried"]] == [0.02, 0.05]
            assert [run["seed"] for run in line["runs"]] == [100, 101]
            for run in line["runs"]:
                assert run["seconds_per_step"] > 0
                assert 0 <= min(run["scores"]["accuracy"].values()) <= max(run["scores"]["accuracy"].values()) <= 1


def test_outcomes_do_not_depend_on_the_number_of_processes(mfeat, capsys):
    jobs = [running.Job("mfeat", row(key, mfeat), TINY, 0.05, seed, 2) for key, seed in (("igm", 0), ("mla", 1))]
    here, beside = (running.run_all(jobs, SHIPPED, workers, "runs") for workers in (1, 2))
    capsys.readouterr()
    for one, other in zip(here, beside, strict=True):
        assert dataclasses.replace(one, seconds_per_step=0) == dataclasses.replace(other, seconds_per_step=0)


class Lethal(running.Job):
    """A run that ends the process which takes it up."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_lost_process_is_said(mfeat, capsys):
    jobs = [Lethal("mfeat", row("joint", mfeat), TINY, 0.05, seed, 2) for seed in range(2)]
    with pytest.raises(running.ProcessLostError, match=r"a process ended before its run did.*--workers 1"):
        running.run_all(jobs, SHIPPED, 2, "runs")
    capsys.readouterr()


def test_the_error_of_a_run_ends_all_processes_and_comes_out(mfeat, capsys):
    good = running.Job("mfeat", row("joint", mfeat), dataclasses.replace(TINY, steps=100_000), 0.05, 0, None)
    bad = running.Job("mfeat", row("joint", mfeat), TINY, 0.05, 0, keep=99)
    with pytest.raises(ValueError, match="keep is 99"):
        running.run_all([good, bad], SHIPPED, 2, "runs")
    assert multiprocessing.active_children() == []
    capsys.readouterr()


def test_no_tuning_takes_the_default_and_the_last_round(tmp_path, capsys):
    options = [
        "--datasets",
        "mfeat",
        "--methods",
        "joint",
        "--seeds",
        "1",
        "--steps",
        "41",
        "--no-tuning",
        "--workers",
        "1",
    ]
    assert command.main(["--data", str(SHIPPED), "--out", str(tmp_path), *options]) == 0
    assert "choosing settings" not in capsys.readouterr().err
    (line,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["datasets"][0]["rows"]
    assert (line["settings"]["learning_rate"], line["kept_round"], line["rounds"]) == (
        running.UNTUNED_RATE,
        2,
        2,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "argument --seeds: '0' is not a positive integer"),
        (["--steps", "many"], "argument --steps: 'many' is not a positive integer"),
        (["--workers", "-1"], "argument --workers: '-1' is not a positive integer"),
        (["--datasets", "iris"], "argument --datasets: invalid choice: 'iris'"),
        (["--methods", "ogm"], "argument --methods: invalid choice: 'ogm'"),
        (["--scope", "1.5"], "argument --scope: '1.5' is not a share from 0 to 1"),
        (["--scope", "half"], "argument --scope: 'half' is not a share from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scope", ["0.3", "1"])
def test_a_run_with_a_scope_says_so(tmp_path, capsys, scope):
    words = ["--data", str(SHIPPED), "--out", str(tmp_path), "--datasets", "watch", "--methods", "turns", "igm-no-sam"]
    assert (
        command.main([*words, "--seeds", "1", "--steps", "4", "--no-tuning", "--workers", "1", "--scope", scope]) == 0
    )
    said = capsys.readouterr().out
    assert f"hold {float(scope):.0%} of its parameters, counted from the output" in said
    assert f"of the parameters projected (--scope {scope})" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["scope"] == float(scope)
    rows = {line["key"]: line for line in results["datasets"][0]["rows"]}
    assert rows["igm-no-sam"]["settings"]["scope"] == float(scope)
    assert rows["igm-no-sam"]["runs"][0]["projected_share"] > float(scope) - 0.03
    assert rows["turns"]["runs"][0]["projected_share"] is None
    assert f"(--scope {scope})" in (tmp_path / "tables.md").read_text()


def test_missing_data_are_said_in_one_line(tmp_path, capsys):
    assert command.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: data file ")
    assert "watch.npz does not exist" in said
    assert said.count("\n") == 1


def test_an_output_folder_that_cannot_be_made_is_said_before_any_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--data", str(SHIPPED), "--out", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_an_interrupt_is_said(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_all", interrupted)
    assert command.main(["--data", str(SHIPPED), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: no results were written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "torchmetrics", "tqdm"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package):
    for name in [
        name for name in sys.modules if name.startswith("igm_rs.experiments") or name.split(".")[0] == package
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        SystemExit, match=rf"error: the experiments need {package}: pip install 'igm-rs\[experiments\]'"
    ):
        importlib.import_module("igm_rs.experiments.__main__")


def test_the_core_imports_nothing_of_the_experiments():
    found = subprocess.run(
        [sys.executable, "-c", "import igm_rs, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    loaded = found.stdout.split()
    assert "igm_rs.optimizer" in loaded
    assert not {"matplotlib", "torchmetrics", "igm_rs.experiments"} & set(loaded)
