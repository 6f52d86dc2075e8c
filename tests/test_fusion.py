"""Late fusion: by hand, invariants, the calibrated product against a second minimiser, errors by class and message."""

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igm_rs import fusion

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(seed, samples=60, classes=4, modalities=("audio", "video"), dtype=torch.float64, scale=2.0):
    """Labels, and logits that know something about them, each modality less than the one before."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes).double()
    logits = {}
    for index, name in enumerate(modalities):
        noise = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
        logits[name] = (scale * (signal / (index + 1) + noise)).to(dtype)
    return logits, labels


def nll(probabilities, labels):
    return -probabilities.double().log()[torch.arange(len(labels)), labels].mean().item()


def product(logits, temperatures):
    """The calibrated product as printed: probabilities multiplied and normalised."""
    result = torch.ones(())
    for name, tensor in logits.items():
        result = result * torch.softmax(tensor.double() / temperatures[name], dim=1)
    return result / result.sum(dim=1, keepdim=True)


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum(dim=1)


# ---- by hand -----------------------------------------------------------------------------------------------------

THREE_TO_ONE = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # softmax (3/4, 1/4)
ONE_TO_NINE = torch.tensor([[0.0, math.log(9.0)]], dtype=torch.float64)  # softmax (1/10, 9/10)


def test_mean_by_hand():
    fused = fusion.mean({"audio": THREE_TO_ONE, "video": ONE_TO_NINE})
    torch.testing.assert_close(fused, torch.tensor([[0.425, 0.575]], dtype=torch.float64))


@pytest.mark.parametrize(
    "weights", [{"video": 2.0, "audio": 6.0}, [3, 1], (1.5e308, 0.5e308), (3e-300, 1e-300)], ids=str
)
def test_weighted_by_hand(weights):
    fused = fusion.weighted({"audio": THREE_TO_ONE, "video": ONE_TO_NINE}, weights)
    expected = 0.75 * torch.tensor([[0.75, 0.25]]).double() + 0.25 * torch.tensor([[0.1, 0.9]]).double()
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-7)


def test_entropy_weighted_by_hand():
    entropies = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))]
    raw = [math.exp(max(entropies) - value) for value in entropies]
    share = raw[0] / sum(raw)
    expected = torch.tensor([[share * 0.75 + (1 - share) * 0.1, share * 0.25 + (1 - share) * 0.9]], dtype=torch.float64)
    assert share < 0.5, "the surer modality has the larger weight"
    torch.testing.assert_close(fusion.entropy_weighted([THREE_TO_ONE, ONE_TO_NINE]), expected)


def test_fit_by_hand_temperature_one():
    """Labels that fall as softmax says leave the temperature at 1; the product is then (3·1 : 1·9) = (1/4, 3/4)."""
    logits = torch.cat([THREE_TO_ONE.expand(4, 2), THREE_TO_ONE.flip(1).expand(4, 2)])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    fitted = fusion.fit({"audio": logits}, labels)
    assert fitted.temperatures == {"audio": pytest.approx(1.0, abs=1e-6)}
    torch.testing.assert_close(fitted({"audio": THREE_TO_ONE}), torch.tensor([[0.75, 0.25]], dtype=torch.float64))


def test_fit_by_hand_temperature_of_overconfident_logits():
    """Logits k times too large have the temperature k."""
    logits = 5.0 * torch.cat([THREE_TO_ONE.expand(4, 2), THREE_TO_ONE.flip(1).expand(4, 2)])
    fitted = fusion.fit([logits], torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]))
    assert fitted.temperatures == {0: pytest.approx(5.0, rel=1e-6)}


def test_product_by_hand():
    logits, labels = draw(3)
    fitted = fusion.fit(logits, labels)
    torch.testing.assert_close(fitted(logits), product(logits, fitted.temperatures), rtol=1e-10, atol=1e-14)


# ---- invariants --------------------------------------------------------------------------------------------------


def fusions(logits, labels):
    weights = {name: index + 1.0 for index, name in enumerate(logits)}
    yield "mean", fusion.mean
    yield "weighted", lambda given_logits: fusion.weighted(given_logits, weights)
    yield "entropy_weighted", fusion.entropy_weighted
    yield "product", fusion.fit(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modalities", [("a",), ("a", "b"), ("a", "b", "c")], ids=len)
def test_rows_are_distributions_in_the_inputs_dtype(dtype, modalities):
    logits, labels = draw(0, modalities=modalities, dtype=dtype)
    for name, fuse in fusions(logits, labels):
        fused = fuse(logits)
        assert fused.dtype == dtype, name
        assert fused.shape == (60, 4), name
        assert bool((fused >= 0).all()), name
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            fused.double().sum(dim=1), torch.ones(60, dtype=torch.float64), rtol=0, atol=tolerance, msg=name
        )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 12),
    classes=st.integers(1, 6),
    count=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_scale_and_dtype(seed, samples, classes, count, scale, dtype):
    logits, labels = draw(seed, samples, classes, tuple("abcd"[:count]), dtype, scale)
    for name, fuse in fusions(logits, labels):
        fused = fuse(logits)
        assert fused.dtype == dtype, name
        assert fused.shape == (samples, classes), name
        assert bool(fused.isfinite().all()), name
        assert (fused.double().sum(dim=1) - 1).abs().max() <= classes * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("modalities", [("a", "b"), ("a", "b", "c")], ids=len)
def test_order_of_modalities_does_not_matter(modalities):
    logits, labels = draw(1, modalities=modalities)
    reversed_logits = dict(reversed(logits.items()))
    for name, fuse in fusions(logits, labels):
        torch.testing.assert_close(fuse(reversed_logits), fuse(logits), rtol=1e-12, atol=1e-15, msg=name)
    backwards = fusion.fit(reversed_logits, labels).temperatures
    assert backwards == pytest.approx(fusion.fit(logits, labels).temperatures, rel=1e-5)


def test_order_of_classes_and_samples_goes_through():
    logits, labels = draw(2)
    classes, samples = torch.tensor([2, 0, 3, 1]), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = {name: tensor[samples][:, classes] for name, tensor in logits.items()}
    for name, fuse in fusions(logits, labels):
        torch.testing.assert_close(fuse(moved), fuse(logits)[samples][:, classes], rtol=1e-12, atol=1e-15, msg=name)


def test_a_constant_for_each_row_changes_nothing():
    logits, labels = draw(4)
    shifted = {name: tensor + 100 * torch.arange(60).unsqueeze(1) for name, tensor in logits.items()}
    for name, fuse in fusions(logits, labels):
        torch.testing.assert_close(fuse(shifted), fuse(logits), rtol=1e-9, atol=1e-12, msg=name)
    assert fusion.fit(shifted, labels).temperatures == pytest.approx(fusion.fit(logits, labels).temperatures, rel=1e-4)


def test_equal_entropies_give_the_mean():
    logits = {"a": THREE_TO_ONE, "b": THREE_TO_ONE.flip(1)}
    torch.testing.assert_close(fusion.entropy_weighted(logits), fusion.mean(logits))


def test_equal_weights_give_the_mean():
    logits, _ = draw(5)
    torch.testing.assert_close(fusion.weighted(logits, [7.0, 7.0]), fusion.mean(logits))


def test_zero_weight_leaves_a_modality_out():
    logits, _ = draw(5)
    torch.testing.assert_close(fusion.weighted(logits, [1.0, 0.0]), logits["audio"].softmax(dim=1))


def test_entropy_weights_are_those_printed():
    logits, _ = draw(6, modalities=("a", "b", "c"))
    probabilities = [tensor.softmax(dim=1) for tensor in logits.values()]
    entropies = torch.stack([entropy(part) for part in probabilities])
    raw = torch.exp(entropies.max(dim=0).values - entropies)
    expected = sum((raw[index] / raw.sum(dim=0)).unsqueeze(1) * part for index, part in enumerate(probabilities))
    torch.testing.assert_close(fusion.entropy_weighted(logits), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_logits_and_masked_classes_stay_finite(dtype):
    huge = torch.finfo(torch.float16).max
    logits = {
        "a": torch.tensor([[huge, -huge, 0.0], [0.0, -torch.inf, 1.0]], dtype=dtype),
        "b": torch.tensor([[huge, 0.0, -huge], [1.0, -torch.inf, 0.0]], dtype=dtype),
    }
    for fuse in (fusion.mean, fusion.entropy_weighted, fusion.fit(*draw(7, classes=3, modalities=("a", "b")))):
        fused = fuse(logits)
        assert bool(fused.isfinite().all())
        assert fused[1, 1] == 0


def test_mixed_dtypes_are_promoted():
    logits = {"a": THREE_TO_ONE.float(), "b": ONE_TO_NINE}
    assert fusion.mean(logits).dtype == torch.float64
    assert fusion.entropy_weighted({"a": THREE_TO_ONE.half(), "b": ONE_TO_NINE.bfloat16()}).dtype == torch.float32


def test_no_sample_gives_no_row():
    empty = {"a": torch.empty(0, 3), "b": torch.empty(0, 3)}
    assert fusion.mean(empty).shape == (0, 3)
    assert fusion.entropy_weighted(empty).shape == (0, 3)


def test_gradients_flow_through():
    logits, labels = draw(8)
    for name, fuse in fusions(logits, labels):
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in logits.items()}
        fuse(leaves)[:, 0].sum().backward()
        assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves.values()), name


# ---- the fit -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 3),
    scale=st.sampled_from([0.05, 1.0, 8.0, 60.0]),
)
def test_fit_is_never_worse_than_temperature_one(seed, count, scale):
    logits, labels = draw(seed, modalities=tuple("abc"[:count]), scale=scale)
    fitted = fusion.fit(logits, labels)
    at_one = nll(torch.log_softmax(sum(logits.values()), dim=1).exp().clamp_min(1e-300), labels)
    assert nll(fitted(logits), labels) <= at_one + 1e-9


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 10.0, 1e6])
def test_fit_finds_the_minimum(scale):
    """Against a grid around it, at every scale of the logits, and the temperatures scale with them."""
    logits, labels = draw(9, samples=400)
    scaled = {name: tensor * scale for name, tensor in logits.items()}
    fitted = fusion.fit(scaled, labels)
    expected = {name: value * scale for name, value in fusion.fit(logits, labels).temperatures.items()}
    assert fitted.temperatures == pytest.approx(expected, rel=1e-6)
    best = nll(fitted(scaled), labels)
    for first in (0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0):
        for second in (0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0):
            factors = {"audio": first, "video": second}
            moved = {name: value * factors[name] for name, value in fitted.temperatures.items()}
            assert nll(product(scaled, moved), labels) >= best - 1e-12


def test_fit_helps_on_fresh_data():
    """Overconfident logits of unequal worth: the calibrated product beats the mean where neither was fitted."""
    logits, labels = draw(10, samples=2000, scale=6.0)
    fitted = fusion.fit({name: part[:1000] for name, part in logits.items()}, labels[:1000])
    fresh = {name: part[1000:] for name, part in logits.items()}
    assert nll(fitted(fresh), labels[1000:]) < nll(fusion.mean(fresh), labels[1000:]) - 0.1
    assert fitted.temperatures["video"] > fitted.temperatures["audio"] > 1


def spread(tensor):
    return (tensor - tensor.mean(dim=1, keepdim=True)).square().mean().sqrt().item()


def test_a_long_step_of_the_line_search_loses_nothing():
    """Four examples that are separable by their last digits: the search steps far past the bound and comes back."""
    logits = {
        "text": [[-0.038294, -0.049098], [-0.038578, -0.049654], [-0.037885, -0.048688], [-0.03851, -0.049578]],
        "image": [[-0.038965, 0.124487], [-0.051251, 0.123935], [-0.039441, 0.123687], [-0.048167, 0.123636]],
    }
    exact = {
        "text": [
            *([-0.03829397261142731, -0.04909843951463699], [-0.03857768326997757, -0.04965370148420334]),
            *([-0.037884533405303955, -0.048687644302845], [-0.03851007670164108, -0.04957783967256546]),
        ],
        "image": [
            *([-0.0389651395380497, 0.12448719143867493], [-0.05125065892934799, 0.12393519282341003]),
            *([-0.03944074735045433, 0.12368696928024292], [-0.04816662520170212, 0.12363620102405548]),
        ],
    }
    for found in (logits, exact):
        given = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
        temperatures = fusion.fit(given, torch.tensor([0, 1, 0, 1])).temperatures
        assert all(0 < value < 1 for value in temperatures.values())


def test_separable_logits_keep_the_temperature_off_zero():
    logits = {"a": 10 * torch.eye(3, dtype=torch.float64)}
    fitted = fusion.fit(logits, torch.arange(3))
    smallest = fusion.TEMPERATURE_RANGE[0] * spread(logits["a"])
    assert smallest <= fitted.temperatures["a"] < 1
    assert nll(fitted(logits), torch.arange(3)) < 1e-6
    torch.testing.assert_close(fitted(logits).sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_misleading_logits_end_at_the_upper_bound():
    """Logits that speak against every label: their best temperature is infinite, the bound stands for it."""
    misleading, helpful = -10 * torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    fitted = fusion.fit({"a": misleading}, torch.arange(3))
    assert fitted.temperatures["a"] == pytest.approx(fusion.TEMPERATURE_RANGE[1] * spread(misleading))
    both = fusion.fit({"a": misleading, "b": helpful}, torch.arange(3))
    assert all(math.isfinite(value) and value > 0 for value in both.temperatures.values())
    assert both({"a": misleading, "b": helpful}).argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e300])
def test_flat_logits_have_temperature_one(value):
    logits, labels = draw(11)
    flat = torch.full((60, 4), value, dtype=torch.float64)
    alone = fusion.fit({"audio": logits["audio"]}, labels).temperatures["audio"]
    assert fusion.fit({"audio": logits["audio"], "flat": flat}, labels).temperatures == {
        "audio": pytest.approx(alone, rel=1e-6),
        "flat": 1.0,
    }


def test_fit_is_deterministic_and_leaves_its_input_alone():
    logits, labels = draw(12)
    before = copy.deepcopy(logits)
    first, second = fusion.fit(logits, labels), fusion.fit(logits, labels)
    assert first.temperatures == second.temperatures
    assert all(torch.equal(logits[name], before[name]) for name in logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fit_works_without_autograd(context):
    logits, labels = draw(13)
    expected = fusion.fit(logits, labels).temperatures
    with context():
        inside, _ = draw(13)
        assert fusion.fit(inside, labels).temperatures == expected


def test_fit_takes_logits_that_require_gradients():
    logits, labels = draw(13)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in logits.items()}
    assert fusion.fit(leaves, labels).temperatures == fusion.fit(logits, labels).temperatures
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = draw(14)
    assert fusion.fit(logits, labels.to(dtype)).temperatures == fusion.fit(logits, labels).temperatures


def test_fit_returns_itself_and_again_replaces():
    logits, labels = draw(15)
    fuse = fusion.CalibratedProduct()
    assert fuse.fit(logits, labels) is fuse
    first = fuse.temperatures
    first["audio"] = -1.0
    assert fuse.temperatures["audio"] > 0, "what is handed out is a copy"
    fuse.fit({"other": logits["audio"]}, labels)
    assert list(fuse.temperatures) == ["other"]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda fuse: pickle.loads(pickle.dumps(fuse))], ids=["copy", "pickle"]
)
def test_a_fitted_product_can_be_kept(again):
    logits, labels = draw(16)
    fuse = fusion.fit(logits, labels)
    assert torch.equal(again(fuse)(logits), fuse(logits))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_agrees_with_cpu_and_waits_for_nothing(dtype):
    logits, labels = draw(17, dtype=dtype)
    on_device = {name: tensor.cuda() for name, tensor in logits.items()}
    fitted = fusion.fit(on_device, labels.cuda())
    assert fitted.temperatures == fusion.fit(logits, labels).temperatures
    for name, fuse in [*list(fusions(logits, labels))[:3], ("product", fitted)]:
        fuse(on_device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused = fuse(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        tolerance = 8 * torch.finfo(torch.promote_types(dtype, torch.float32) if dtype.itemsize > 2 else dtype).eps
        torch.testing.assert_close(fused.cpu(), fuse(logits), rtol=tolerance, atol=tolerance, msg=name)


# ---- errors ------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(3, 2)
LABELS = torch.tensor([0, 1, 0])

BAD_LOGITS = [
    ({}, ValueError, "logits: expected at least one modality, got none"),
    ([], ValueError, "logits: expected at least one modality, got none"),
    (GOOD, TypeError, "logits: expected a mapping or a sequence of tensors, got Tensor"),
    (None, TypeError, "logits: expected a mapping or a sequence of tensors, got NoneType"),
    ({"a": [[0.0, 1.0]]}, TypeError, "logits of modality 'a': expected a tensor, got list"),
    ({"a": GOOD, "b": GOOD[0]}, ValueError, "logits of modality 'b': expected shape (n, c), got (2,)"),
    ({"a": torch.zeros(3, 0)}, ValueError, "logits of modality 'a': expected shape (n, c), got (3, 0)"),
    ({"a": GOOD.long()}, ValueError, "logits of modality 'a': expected a floating dtype, got torch.int64"),
    ({"a": GOOD.cfloat()}, ValueError, "logits of modality 'a': expected a floating dtype, got torch.complex64"),
    (
        {"a": GOOD, "b": torch.zeros(3, 4)},
        ValueError,
        "logits of modality 'b': expected 2 classes as in the first modality, got 4",
    ),
    (
        [GOOD, torch.zeros(5, 2)],
        ValueError,
        "logits of modality 1: expected 3 samples as in the first modality, got 5",
    ),
    (
        {"a": GOOD, "b": GOOD.to("meta")},
        ValueError,
        "logits of modality 'b': expected device cpu as in the first modality, got meta",
    ),
]


@pytest.mark.parametrize(("logits", "error", "message"), BAD_LOGITS, ids=[message for *_, message in BAD_LOGITS])
@pytest.mark.parametrize(
    "fuse",
    [
        fusion.mean,
        lambda logits: fusion.weighted(logits, [1.0]),
        fusion.entropy_weighted,
        lambda logits: fusion.fit(logits, LABELS),
        fusion.fit({"a": GOOD, "b": GOOD}, LABELS),
    ],
    ids=["mean", "weighted", "entropy_weighted", "fit", "product"],
)
def test_bad_logits(fuse, logits, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fuse(logits)


BAD_WEIGHTS = [
    ([1.0], ValueError, "weights: expected 2, one for each modality, got 1"),
    (
        {"a": 1.0, "c": 1.0},
        ValueError,
        "logits are of the modalities ['a', 'b'], but weights are given for ['a', 'c']",
    ),
    ([1.0, -0.5], ValueError, "weight of modality 'b': expected a finite number >= 0, got -0.5"),
    ([math.nan, 1.0], ValueError, "weight of modality 'a': expected a finite number >= 0, got nan"),
    ([1.0, math.inf], ValueError, "weight of modality 'b': expected a finite number >= 0, got inf"),
    ([0.0, 0], ValueError, "weights: at least one must be positive, got only zeros"),
    (["1", 1.0], TypeError, "weight of modality 'a': expected a float, got str"),
    ([True, 1.0], TypeError, "weight of modality 'a': expected a float, got bool"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD_WEIGHTS, ids=[message for *_, message in BAD_WEIGHTS])
def test_bad_weights(weights, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fusion.weighted({"a": GOOD, "b": GOOD}, weights)


BAD_LABELS = [
    ([0, 1, 0], TypeError, "labels: expected a tensor, got list"),
    (torch.tensor([0, 1]), ValueError, "labels: expected shape (3,) as the logits have samples, got (2,)"),
    (LABELS.unsqueeze(1), ValueError, "labels: expected shape (3,) as the logits have samples, got (3, 1)"),
    (LABELS.float(), ValueError, "labels: expected an integer dtype, got torch.float32"),
    (LABELS.bool(), ValueError, "labels: expected an integer dtype, got torch.bool"),
    (LABELS.cfloat(), ValueError, "labels: expected an integer dtype, got torch.complex64"),
    (torch.tensor([0, 2, 1]), ValueError, "labels: expected classes in [0, 2), got 2"),
    (torch.tensor([0, -1, 1]), ValueError, "labels: expected classes in [0, 2), got -1"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS, ids=[message for *_, message in BAD_LABELS])
def test_bad_labels_leave_earlier_temperatures(labels, error, message):
    fuse = fusion.fit({"a": GOOD}, LABELS)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fuse.fit({"b": GOOD}, labels)
    assert fuse.temperatures == {"a": 1.0}


def test_fit_needs_a_sample():
    with pytest.raises(ValueError, match=r"^labels: expected at least one sample, got none$"):
        fusion.fit([torch.empty(0, 2)], torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_fit_names_the_modality_that_is_not_finite(value):
    bad = GOOD.clone()
    bad[1, 1] = value
    with pytest.raises(
        ValueError, match=r"^logits of modality 'video': expected finite values, found NaN or infinity$"
    ):
        fusion.fit({"audio": GOOD, "video": bad}, LABELS)


@pytest.mark.parametrize(
    "logits", [{"a": GOOD}, {"a": GOOD, "c": GOOD}, [GOOD, GOOD]], ids=["fewer", "other", "unnamed"]
)
def test_other_modalities_than_fitted(logits):
    fuse = fusion.fit({"a": GOOD, "b": GOOD}, LABELS)
    given_names = list(logits) if isinstance(logits, dict) else [0, 1]
    message = f"logits are of the modalities {given_names}, but fitted were ['a', 'b']"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fuse(logits)


def test_before_fit():
    fuse = fusion.CalibratedProduct()
    message = r"^CalibratedProduct has no temperatures yet: call fit\(logits, labels\) first$"
    with pytest.raises(RuntimeError, match=message):
        fuse({"a": GOOD})
    with pytest.raises(RuntimeError, match=message):
        _ = fuse.temperatures
