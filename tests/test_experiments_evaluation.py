"""The measures of the experiments against scikit-learn, and the statistics of their tables against SciPy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch import nn

from igm_rs.experiments import evaluation, statistics
from igm_rs.experiments.data import DataSet, Split
from igm_rs.experiments.networks import Branches

COUNT, CLASSES = 60, 4


@pytest.fixture
def labels():
    return torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def probabilities():
    logits = 2 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.softmax(logits, -1)


def split_of(inputs, labels):
    return Split(inputs, labels, torch.arange(len(labels)))


@pytest.fixture
def data():
    """Two modalities of vectors, three classes; each split from another seed."""

    def part(seed):
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (40,), generator=random)
        means = nn.functional.one_hot(labels, 3).float()
        return split_of({name: means + torch.randn(40, 3, generator=random) for name in ("a", "b")}, labels)

    kinds = {"a": "vector", "b": "vector"}
    return DataSet(3, part(0), part(1), part(2), class_names=("x", "y", "z"), kinds=kinds, vocabulary={}, name="toy")


# Measures


def test_measures_are_those_of_scikit_learn(probabilities, labels):
    found = evaluation.measures(probabilities, labels, torch.arange(COUNT) // 7)
    guess, known = probabilities.argmax(-1).numpy(), labels.numpy()
    one_hot = nn.functional.one_hot(labels, CLASSES).numpy()
    expected = {
        "accuracy": metrics.accuracy_score(known, guess),
        "by_origin": metrics.accuracy_score(
            known, guess, sample_weight=1 / np.bincount(np.arange(COUNT) // 7)[np.arange(COUNT) // 7]
        ),
        "map": metrics.average_precision_score(one_hot, probabilities.numpy(), average="macro"),
        "macro_f1": metrics.f1_score(known, guess, average="macro"),
        "nll": metrics.log_loss(known, probabilities.numpy()),
    }
    assert tuple(found) == evaluation.MEASURES
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_class_without_examples_is_left_out(probabilities, labels):
    kept = labels != 2
    known, guess = labels[kept].numpy(), probabilities[kept].argmax(-1).numpy()
    found = evaluation.measures(probabilities[kept], labels[kept], labels[kept])
    one_hot = nn.functional.one_hot(labels[kept], CLASSES).numpy()
    there = [0, 1, 3]
    precision = metrics.average_precision_score(one_hot[:, there], probabilities[kept].numpy()[:, there])
    assert 2 in guess
    assert found["map"] == pytest.approx(precision, rel=1e-6)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(known, guess, average="macro"), rel=1e-6)


def test_measures_by_hand():
    probabilities = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    found = evaluation.measures(probabilities, torch.tensor([0, 1, 0, 1]), torch.tensor([5, 5, 5, 6]))
    assert found["accuracy"] == 0.75
    assert found["by_origin"] == pytest.approx((2 / 3 + 1) / 2)
    # class 0 by its probability: 0 (right), 1 (wrong), 0 (right), 1: (1 + 2/3) / 2; class 1: 1, 0, 1, 0: (1 + 2/3) / 2
    assert found["map"] == pytest.approx(5 / 6)
    # class 0: 2 found, 1 wrong, none missed; class 1: 1 found, none wrong, 1 missed
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["nll"] == pytest.approx(-math.log(0.6 * 0.3 * 0.9 * 0.8) / 4)


def test_probabilities_past_one_by_rounding_are_still_probabilities(probabilities, labels):
    over = probabilities.clone()
    over[0] = 0
    over[0, labels[0]] = 1 + 2e-16
    exact = over.clamp(max=1)
    assert over.max() > 1
    assert evaluation.measures(over, labels, labels)["map"] == evaluation.measures(exact, labels, labels)["map"]


def test_a_prediction_without_doubt_has_a_finite_nll():
    ones = torch.tensor([1, 1])
    found = evaluation.measures(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), ones, ones)
    assert found["nll"] == pytest.approx(-math.log(torch.finfo(torch.float64).tiny) / 2)


# Predictions


class Given(nn.Module):
    """A network whose logits are its inputs."""

    def __init__(self, joined=False):
        super().__init__()
        self.joined = joined

    def measured(self, inputs, means=None):
        return dict(inputs), inputs["a"] - inputs["b"] if self.joined else None


def test_every_branch_and_fusion_is_measured(labels):
    random = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(COUNT, CLASSES, generator=random) for name in ("a", "b")}
    split = split_of(inputs, labels)
    product = evaluation.Calibration(evaluation.fusion.fit(inputs, labels), None)
    found = evaluation.predictions(Given(), split, product)
    assert list(found) == ["a", "b", *evaluation.FUSIONS]
    a, b = (inputs[name].double().softmax(-1) for name in ("a", "b"))
    t = product.temperatures
    torch.testing.assert_close(found["mean"], (a + b) / 2)
    torch.testing.assert_close(found["sum"], a * b / (a * b).sum(-1, keepdim=True))
    tempered = a ** (1 / t["a"]) * b ** (1 / t["b"])
    torch.testing.assert_close(found["calibrated"], tempered / tempered.sum(-1, keepdim=True))
    entropy = [torch.special.entr(p).sum(-1, keepdim=True) for p in (a, b)]
    share = torch.softmax(torch.cat([-entropy[0], -entropy[1]], -1), -1)
    torch.testing.assert_close(found["entropy"], share[:, :1] * a + share[:, 1:] * b)
    scores = evaluation.score(Given(), split, product)
    assert tuple(scores) == evaluation.MEASURES
    for name, values in found.items():
        assert {measure: scores[measure][name] for measure in scores} == evaluation.measures(
            values, labels, split.origins
        )
    watched = evaluation.watched(Given(), split)
    assert watched.accuracy == {name: value for name, value in scores["accuracy"].items() if name != "calibrated"}
    assert watched.by_origin == pytest.approx(watched.accuracy)  # every example is an origin of its own


def test_every_origin_counts_once():
    right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 0, 1])  # right, right, wrong; right, wrong; wrong
    origins = torch.tensor([7, 7, 7, 2, 2, 9])
    assert evaluation.accuracy(right, labels) == pytest.approx(3 / 6)
    assert evaluation.accuracy_by_origin(right, labels, origins) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    for alike in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        assert evaluation.accuracy_by_origin(right, labels, alike) == pytest.approx(3 / 6)


def test_a_joint_head_has_a_prediction_of_its_own(labels):
    random = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(COUNT, CLASSES, generator=random) for name in ("a", "b")}
    split = split_of(inputs, labels)
    joint = (inputs["a"] - inputs["b"]).double()
    data = SimpleNamespace(validation=split)
    calibration = evaluation.calibrated(Given(joined=True), data)
    found = evaluation.predictions(Given(joined=True), split, calibration)
    assert list(found) == ["a", "b", *evaluation.FUSIONS, "joint", "joint-calibrated"]
    torch.testing.assert_close(found["joint"], joint.softmax(-1))
    assert list(calibration.temperatures) == ["a", "b", "joint"]
    torch.testing.assert_close(found["joint-calibrated"], (joint / calibration.temperatures["joint"]).softmax(-1))
    nll = {name: evaluation.measures(found[name], labels, labels)["nll"] for name in ("joint", "joint-calibrated")}
    assert nll["joint-calibrated"] < nll["joint"]  # fitted on these very logits
    stands = {fusion: evaluation.of_fusion(nll, fusion) for fusion in evaluation.FUSIONS}
    assert stands == dict.fromkeys(evaluation.FUSIONS, nll["joint"]) | {"calibrated": nll["joint-calibrated"]}
    assert list(evaluation.predictions(Given(joined=True), split, None))[-1] == "joint"


def test_a_single_modality_has_no_fusion(data):
    model = Branches.of(data, ["b"], head="own", seed=0)
    found = evaluation.evaluate(model, data, {"last": model.state_dict()})
    scores = found.scores["last"]["nll"]
    assert list(scores) == ["b", "calibrated"]
    assert list(found.temperatures["last"]) == ["b"]
    assert [evaluation.of_fusion(scores, name) for name in ("mean", "calibrated")] == list(scores.values())
    assert scores["b"] != scores["calibrated"]


@pytest.mark.parametrize("head", ["own", "shared", "concat", "trunk"])
def test_a_test_split_is_opened_once_for_all_weights_and_after_every_calibration(data, head, monkeypatch):
    one, two = (Branches.of(data, data.modalities, head=head, seed=seed) for seed in (0, 1))
    weights = {"chosen": {name: value.clone() for name, value in one.state_dict().items()}, "last": two.state_dict()}
    order = []
    fit, open_test = evaluation.fusion.fit, data.open_test
    monkeypatch.setattr(evaluation.fusion, "fit", lambda *given: order.append("fit") or fit(*given))
    monkeypatch.setattr(data, "open_test", lambda: order.append("open") or open_test())
    found = evaluation.evaluate(two, data, weights)
    assert order == ["fit"] * (4 if head == "concat" else 2) + ["open"]
    assert data.test_openings == 1
    for name, model in (("chosen", one), ("last", Branches.of(data, data.modalities, head=head, seed=1))):
        product = evaluation.calibrated(model, data)
        assert found.temperatures[name] == product.temperatures
        assert found.scores[name] == evaluation.score(model, data._test, product)
    assert found.scores["chosen"] != found.scores["last"]


def test_no_weights_are_refused_with_the_test_split_shut(data):
    model = Branches.of(data, data.modalities, head="own", seed=0)
    with pytest.raises(ValueError, match="weights: expected at least one state dict to measure, got none"):
        evaluation.evaluate(model, data, {})
    assert data.test_openings == 0


# Statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 30, 101])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.6, 0.975, 0.9995])
def test_student_quantile_is_that_of_scipy(probability, degrees):
    expected = float(stats.t.ppf(probability, degrees))
    assert statistics.student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("probability", "degrees", "message"),
    [
        (1.0, 3, "probability is 1.0, expected a number between 0 and 1"),
        (0.975, 0, "degrees is 0, expected a whole number of at least 1"),
    ],
)
def test_student_quantile_refuses_what_is_out_of_range(probability, degrees, message):
    with pytest.raises(ValueError, match=message):
        statistics.student_quantile(probability, degrees)


def test_interval_of_a_paired_difference_is_that_of_scipy():
    random = np.random.default_rng(0)
    one, two = random.normal(size=6), random.normal(size=6)
    found = statistics.paired_difference(dict(enumerate(one)), dict(enumerate(two)))
    expected = stats.ttest_rel(one, two).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.seeds == 6


def test_differences_are_taken_seed_by_seed_over_the_seeds_in_common():
    found = statistics.paired_difference({3: 1.0, 1: 5.0, 7: 0.0}, {1: 4.0, 3: -1.0, 8: 9.0})
    assert (found.mean, found.seeds) == (1.5, 2)  # 5 − 4 and 1 − (−1)
    assert found.half_width == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), rel=1e-5)
    assert not found.clear
    assert statistics.Difference(1.0, 0.5, 3).clear
    assert not statistics.Difference(1.0, None, 1).clear


def test_differences_without_a_common_seed_are_refused():
    with pytest.raises(ValueError, match=r"no seed in common: \[1\] and \[2\]"):
        statistics.paired_difference({1: 0.0}, {2: 0.0})


def test_summary_by_hand():
    assert statistics.summary([1.0, 2.0, 4.0]) == statistics.Summary(pytest.approx(7 / 3), pytest.approx(1.5275252), 3)
    assert statistics.summary([1.0]) == statistics.Summary(1.0, None, 1)
    with pytest.raises(ValueError, match="values: expected one for each seed, got none"):
        statistics.summary([])
    assert statistics.half_width([1.0]) is None
