"""Eq. (2) in Rust: rows of features, the row buffer, and the cumulative covariance Ȳ."""

import math

import pytest
import reference as paper
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust
from igm_rs._covariance import Covariance

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAN, INF = math.nan, math.inf


def working(dtype, device):
    """Return W: float64 on the CPU; on CUDA float64 only for float64."""
    return torch.float64 if device.type == "cpu" or dtype == torch.float64 else torch.float32


def near(actual, expected, scale=1.0):
    """Compare to 1e-12 in float64 and 1e-6 in float32, relative to the largest entry."""
    size = max(expected.abs().max().item() if expected.numel() else 0.0, torch.finfo(torch.float64).tiny)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=0, atol=scale * tolerance * size)


def w(*rows, device="cpu", dtype=None):
    """Return rows in W of the device."""
    dtype = dtype or working(torch.float32, torch.device(device))
    return torch.tensor(rows, dtype=dtype, device=device)


# -- batch_rows -------------------------------------------------------------------------------------------------------


def test_batch_rows_by_hand(device):
    features = torch.tensor([[1.0, 2], [3, 6]], device=device)
    assert rust.batch_rows(features, "mean").tolist() == [[2, 4]]
    assert rust.batch_rows(features, reduce="samples").tolist() == [[1, 2], [3, 6]]
    tokens = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]], device=device)
    assert rust.batch_rows(features=tokens, reduce="mean").tolist() == [[3, 4], [5, 6]]
    assert rust.batch_rows(tokens, "samples").tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduce", ["mean", "samples"])
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_batch_rows_agree_with_the_reference(device, dtype, reduce, shape):
    features = (3 * torch.randn(shape) + 1).to(device, dtype)
    kept = features.clone()
    rows = rust.batch_rows(features, reduce)
    assert rows.dtype == working(dtype, device)
    assert rows.device.type == device.type
    near(rows, paper.batch_rows(features, reduce))
    assert torch.equal(features, kept)


@pytest.mark.parametrize("reduce", ["mean", "samples"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, :, 1:],
        lambda x: x[:, :1].expand(-1, 7, -1),
        lambda x: x.permute(2, 0, 1),
        lambda x: x[0, 0].expand(3, 4, -1),
    ],
)
def test_batch_rows_of_any_memory_layout(device, reduce, view):
    features = view(torch.randn(4, 3, 6, dtype=torch.float64, device=device))
    near(rust.batch_rows(features, reduce), paper.batch_rows(features, reduce))


@pytest.mark.parametrize("reduce", ["mean", "samples"])
@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (1, 1, 3)])
def test_batch_rows_are_new_and_outside_autograd(device, reduce, shape):
    features = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    kept = features.detach().clone()
    rows = rust.batch_rows(features, reduce)
    assert not rows.requires_grad
    rows.fill_(7)
    assert torch.equal(features, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (5, 1024), (4, 1025), (2, 3, 700), (3, 40_000), (2, 9, 5000)])
def test_batch_rows_of_any_width(device, dtype, shape):
    # Wide rows are summed in pieces, the widest by several threads.
    features = torch.randn(shape, device=device).to(dtype)
    near(rust.batch_rows(features, "mean"), paper.batch_rows(features, "mean"))
    whole = torch.stack([features, features])
    near(rust.batch_rows(whole[:, 1:], "mean"), paper.batch_rows(whole[:, 1:], "mean"))


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 3)])
def test_batch_rows_of_an_empty_batch(device, shape):
    for reduce in ("mean", "samples"):
        rows = rust.batch_rows(torch.zeros(shape, device=device), reduce)
        assert rows.shape == (0, 3)
        assert rows.dtype == working(torch.float32, device)


def test_batch_rows_keep_non_finite_values_for_the_buffer_to_judge(device):
    features = torch.tensor([[1.0, NAN], [INF, 2]], device=device)
    rows = rust.batch_rows(features, "samples")
    assert torch.isfinite(rows).tolist() == [[True, False], [False, True]]


def test_batch_rows_of_half_floats_do_not_overflow(device):
    features = torch.full((4, 2), 60000.0, dtype=torch.float16, device=device)
    assert rust.batch_rows(features, "mean").tolist() == [[60000.0, 60000.0]]


# -- append_rows_ -----------------------------------------------------------------------------------------------------


def test_append_rows_by_hand(device):
    buffer = w(*[[9.0, 9]] * 5, device=device)
    place = buffer.data_ptr()
    used, left_out = rust.append_rows_(buffer, 1, w([1, 2], [3, 4], device=device))
    assert (used, int(left_out)) == (3, 0)
    assert buffer.tolist() == [[9, 9], [1, 2], [3, 4], [9, 9], [9, 9]]
    used, left_out = rust.append_rows_(buffer=buffer, used=used, rows=w([5, 6], [7, 8], device=device))
    assert (used, int(left_out)) == (5, 0)
    assert buffer.tolist() == [[9, 9], [1, 2], [3, 4], [5, 6], [7, 8]]
    assert buffer.data_ptr() == place


def test_append_rows_leaves_non_finite_rows_out(device):
    buffer = w(*[[9.0, 9]] * 6, device=device)
    rows = w([1, 2], [NAN, 0], [3, 4], [INF, 1], [0, -INF], device=device)
    kept = rows.clone()
    used, left_out = rust.append_rows_(buffer, 0, rows)
    assert int(left_out) == 3
    if device.type == "cpu":  # dropped
        assert isinstance(left_out, int)
        assert used == 2
        assert buffer.tolist() == [[1, 2], [3, 4]] + [[9, 9]] * 4
    else:  # zeros, which add nothing to Ȳ, so that nothing waits for the device
        assert (left_out.dtype, left_out.ndim, left_out.device.type) == (torch.int64, 0, device.type)
        assert used == 5
        assert buffer.tolist() == [[1, 2], [0, 0], [3, 4], [0, 0], [0, 0], [9, 9]]
    assert torch.equal(rows.nan_to_num(), kept.nan_to_num())


def test_append_nothing_changes_nothing(device):
    buffer = w([1, 2], device=device)
    used, left_out = rust.append_rows_(buffer, 1, buffer.new_zeros(0, 2))
    assert (used, int(left_out)) == (1, 0)
    assert buffer.tolist() == [[1, 2]]


def test_append_to_a_buffer_that_is_too_small_writes_nothing(device):
    buffer = w([9, 9], [9, 9], [9, 9], device=device)
    with pytest.raises(ValueError, match=r"buffer.*3"):
        rust.append_rows_(buffer, 2, w([1, 2], [3, 4], device=device))
    assert buffer.tolist() == [[9, 9]] * 3


@given(counts=st.lists(st.integers(0, 4), max_size=5), bad=st.integers(0, 3))
def test_appended_rows_are_the_finite_ones_in_order(counts, bad):
    torch.manual_seed(sum(counts) + bad)
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in counts]
    for batch in batches:
        batch[:bad][::2] = NAN
    buffer, used, out = torch.zeros(20, 3, dtype=torch.float64), 0, 0
    for batch in batches:
        used, left_out = rust.append_rows_(buffer, used, batch)
        out += int(left_out)
    everything = torch.cat([*batches, torch.zeros(0, 3, dtype=torch.float64)])
    finite = everything[everything.isfinite().all(dim=1)]
    assert used == len(finite)
    assert out == len(everything) - len(finite)
    assert torch.equal(buffer[:used], finite)


def test_append_rows_of_any_memory_layout(device):
    rows = w([1, 2], [3, 4], [5, 6], device=device)
    whole = rows.new_zeros(9, 2)
    buffer = whole[3:6]
    used, _ = rust.append_rows_(buffer, 0, rows.T.contiguous().T)
    assert used == 3
    assert torch.equal(buffer, rows)
    rust.append_rows_(buffer, 0, rows[:1].expand(3, -1))
    assert buffer.tolist() == [[1, 2]] * 3
    rust.append_rows_(buffer, 1, torch.stack([rows, 9 * rows], dim=1)[:2, 0])  # rows with gaps between them
    assert buffer.tolist() == [[1, 2], [1, 2], [3, 4]]
    assert whole[:3].count_nonzero() == whole[6:].count_nonzero() == 0


# -- accumulate_ ------------------------------------------------------------------------------------------------------


def test_accumulate_by_hand(device):
    covariance = w([1, 1], [1, 1], device=device)
    place = covariance.data_ptr()
    assert rust.accumulate_(covariance, w([1, 2], [3, 4], device=device)) is None
    assert covariance.tolist() == [[11, 15], [15, 21]]
    rust.accumulate_(covariance=covariance, rows=w([0, 1], device=device))
    assert covariance.tolist() == [[11, 15], [15, 22]]
    assert covariance.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(d=st.integers(1, 9), counts=st.lists(st.integers(0, 7), max_size=4), scale=st.sampled_from([1e-100, 1.0, 1e100]))
def test_accumulate_agrees_with_the_reference(device, dtype, d, counts, scale):
    if working(dtype, device) == torch.float32:
        scale = 1.0
    rows = [scale * torch.randn(n, d, dtype=torch.float64) for n in counts]
    covariance = torch.zeros(d, d, dtype=working(dtype, device), device=device)
    for batch in rows:
        rust.accumulate_(covariance, batch.to(covariance))
    expected = paper.cumulative_covariance(torch.cat([*rows, torch.zeros(0, d, dtype=torch.float64)]))
    # The reference adds one outer product after the other: the sums differ by round-off of the terms.
    near(covariance, expected)


@pytest.mark.parametrize("d", [255, 256, 257, 385, 600])
def test_wide_products_are_exactly_symmetric(device, d):
    # From 256 columns on only bands up to the diagonal are computed, the rest is mirrored.
    covariance = torch.zeros(2 * d, 2 * d, dtype=working(torch.float64, device), device=device)[::2, ::2]
    whole = covariance.clone()
    rows = torch.randn(2, 40, d, dtype=torch.float64)
    for batch in rows:
        rust.accumulate_(covariance, batch.to(covariance))
        rust.accumulate_(whole, batch.to(whole))
    expected = paper.cumulative_covariance(rows.flatten(0, 1))
    for found in (covariance, whole):
        near(found, expected)
        assert torch.equal(found, found.T) or d < 256


def test_accumulate_takes_nothing_and_any_memory_layout(device):
    rows = torch.randn(5, 4, device=device).to(working(torch.float32, device))
    covariance = torch.zeros_like(rows[:4])
    rust.accumulate_(covariance, rows[:0])
    assert covariance.count_nonzero() == 0
    whole = rows.new_zeros(8, 8)
    for view in (covariance, covariance.clone().T, whole[::2, ::2]):
        for layout in (rows, rows.T.contiguous().T, rows[:, :1].expand(-1, 4)):
            view.zero_()
            kept = layout.clone()
            rust.accumulate_(view, layout)
            near(view, paper.cumulative_covariance(layout.double().cpu()))
            assert torch.equal(layout, kept)
    assert whole[1::2].count_nonzero() == 0


# -- add_rows_ --------------------------------------------------------------------------------------------------------


def test_add_rows_by_hand(device):
    total = w(1, 1, device=device)
    place = total.data_ptr()
    assert rust.add_rows_(total, w([1, 2], [3, 4], device=device)) is None
    assert total.tolist() == [5, 7]
    rust.add_rows_(total=total, rows=w([1, 2], [3, 4], device=device)[:0])
    assert total.tolist() == [5, 7]
    assert total.data_ptr() == place


@given(n=st.integers(0, 9), d=st.integers(1, 6))
def test_add_rows_sums_in_any_memory_layout(device, n, d):
    rows = torch.randn(n, 2 * d, device=device).to(working(torch.float32, device))[:, ::2]
    for layout in (rows, rows.T.contiguous().T, rows[:, :1].expand(-1, d)):
        kept, whole = layout.clone(), rows.new_zeros(3 * d)
        total = whole[::3]
        rust.add_rows_(total, layout)
        near(total, layout.double().cpu().sum(dim=0), max(1, n))  # round-off of the terms, not of their sum
        assert torch.equal(layout, kept)
        assert torch.equal(whole.count_nonzero(), total.count_nonzero())


# -- centre_ and decay_ -----------------------------------------------------------------------------------------------


def test_centre_by_hand(device):
    covariance = w([10, 14], [14, 20], device=device)  # of the rows (1, 2) and (3, 4)
    place = covariance.data_ptr()
    assert rust.centre_(covariance, w(4, 6, device=device), 2) is None
    near(covariance, w([2, 2], [2, 2]))
    assert covariance.data_ptr() == place


@given(n=st.integers(1, 9), d=st.integers(1, 6), shift=st.sampled_from([0.0, 1.0, -30.0]))
def test_centred_covariance_agrees_with_the_reference_and_ignores_a_shift(device, n, d, shift):
    rows = (torch.randn(n, d, device=device) + shift).to(working(torch.float32, device))
    covariance = rows.new_zeros(d, d)
    rust.accumulate_(covariance, rows)
    size = covariance.abs().max().item()
    rust.centre_(covariance=covariance, total=rows.sum(dim=0), count=n)
    expected = paper.cumulative_covariance(rows.double().cpu(), centred=True)
    # Subtraction loses what the mean is larger than the spread, so the error is relative to Ȳ before it.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[rows.dtype]
    torch.testing.assert_close(covariance.double().cpu(), expected, rtol=0, atol=tolerance * size)


def test_centre_takes_the_weight_of_decayed_rows():
    # Rows 1 and 3, the first decayed to one half: Σ w = 1.5, Σ w z = 3.5, Σ w z² = 9.5, so 9.5 − 3.5²/1.5 = 4/3.
    covariance = w([9.5])
    rust.centre_(covariance, w(3.5), 1.5)
    near(covariance, w([4 / 3]))
    rows, weights = w([1], [3]), torch.tensor([0.5, 1.0], dtype=torch.float64)
    near(covariance, paper.cumulative_covariance(rows, weights, centred=True))


def test_decay_by_hand(device):
    first, second = w([1, 2], [3, 4], device=device), w(5, 6, device=device)
    places = first.data_ptr(), second.data_ptr()
    assert rust.decay_([first, second], 0.5) is None
    assert first.tolist() == [[0.5, 1], [1.5, 2]]
    assert second.tolist() == [2.5, 3]
    assert (first.data_ptr(), second.data_ptr()) == places
    rust.decay_(tensors=[], factor=0.5)


def test_decayed_covariance_agrees_with_the_reference():
    rows = torch.randn(6, 4, dtype=torch.float64)
    covariance, weights = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for pair in rows.split(2):
        rust.decay_([covariance], 0.9)
        rust.accumulate_(covariance, pair)
        weights = torch.cat([0.9 * weights, torch.ones(2, dtype=torch.float64)])
    near(covariance, paper.cumulative_covariance(rows, weights))


# -- errors -----------------------------------------------------------------------------------------------------------

C = torch.zeros(2, 2, dtype=torch.float64)
R = torch.zeros(3, 2, dtype=torch.float64)
V = torch.zeros(2, dtype=torch.float64)

ERRORS = [
    (lambda: rust.batch_rows(torch.zeros(3), "mean"), ValueError, ["features", "(3,)"]),
    (lambda: rust.batch_rows(torch.tensor(1.0), "mean"), ValueError, ["features", "()"]),
    (lambda: rust.batch_rows(torch.zeros(3, 2, dtype=torch.int64), "mean"), ValueError, ["features", "int64"]),
    (lambda: rust.batch_rows(torch.zeros(3, 2, dtype=torch.bool), "mean"), ValueError, ["features", "bool"]),
    (lambda: rust.batch_rows(torch.zeros(3, 2, dtype=torch.complex64), "mean"), ValueError, ["features", "complex"]),
    (lambda: rust.batch_rows(torch.zeros(3, 2), "median"), ValueError, ["reduce", "median", "mean", "samples"]),
    (lambda: rust.batch_rows([[1.0, 2.0]], "mean"), TypeError, ["features", "list"]),
    (lambda: rust.append_rows_(C, 0, R), ValueError, ["buffer", "3", "2"]),
    (lambda: rust.append_rows_(C, 3, R[:0]), ValueError, ["used", "3"]),
    (lambda: rust.append_rows_(C, -1, R[:1]), ValueError, ["used", "-1"]),
    (lambda: rust.append_rows_(C, 0, torch.zeros(1, 3, dtype=torch.float64)), ValueError, ["rows", "3"]),
    (lambda: rust.append_rows_(C, 0, V), ValueError, ["rows", "(2,)"]),
    (lambda: rust.append_rows_(V, 0, R[:1]), ValueError, ["buffer", "(2,)"]),
    (lambda: rust.append_rows_(C, 0, R[:1].float()), ValueError, ["rows", "float32", "float64"]),
    (lambda: rust.append_rows_(C.long(), 0, R[:1].long()), ValueError, ["buffer", "int64"]),
    (lambda: rust.append_rows_(C.T, 0, R[:1]), ValueError, ["buffer", "contiguous"]),
    (lambda: rust.append_rows_(R, 0, R[:2]), ValueError, ["rows", "shares memory", "buffer"]),
    (lambda: rust.append_rows_(C, 0, None), TypeError, ["rows", "None"]),
    (lambda: rust.accumulate_(R, R), ValueError, ["covariance", "(3, 2)"]),
    (lambda: rust.accumulate_(C, torch.zeros(3, 4, dtype=torch.float64)), ValueError, ["rows", "4"]),
    (lambda: rust.accumulate_(C, V), ValueError, ["rows", "(2,)"]),
    (lambda: rust.accumulate_(C, R.float()), ValueError, ["rows", "float32", "float64"]),
    (lambda: rust.accumulate_("C", R), TypeError, ["covariance", "str"]),
    (lambda: rust.add_rows_(V, V), ValueError, ["rows", "(2,)"]),
    (lambda: rust.add_rows_(C, R), ValueError, ["total", "(2, 2)"]),
    (lambda: rust.add_rows_(torch.zeros(3, dtype=torch.float64), R), ValueError, ["total", "(3,)", "(2,)"]),
    (lambda: rust.add_rows_(V, R.float()), ValueError, ["rows", "float32", "float64"]),
    (lambda: rust.add_rows_(V.long(), R.long()), ValueError, ["total", "int64"]),
    (lambda: rust.add_rows_(V, None), TypeError, ["rows", "None"]),
    (lambda: rust.centre_(C, V, 0), ValueError, ["count", "0"]),
    (lambda: rust.centre_(C, V, -3), ValueError, ["count", "-3"]),
    (lambda: rust.centre_(C, V, math.nan), ValueError, ["count", "NaN"]),
    (lambda: rust.centre_(C, R, 3), ValueError, ["total", "(3, 2)"]),
    (lambda: rust.centre_(C, torch.zeros(3, dtype=torch.float64), 3), ValueError, ["total", "3"]),
    (lambda: rust.centre_(R, V, 3), ValueError, ["covariance", "(3, 2)"]),
    (lambda: rust.centre_(C, V.float(), 3), ValueError, ["total", "float32"]),
    (lambda: rust.centre_(C, None, 3), TypeError, ["total", "None"]),
    (lambda: rust.decay_([C, None], 0.5), TypeError, ["tensors", "None"]),
    (lambda: rust.decay_([C], math.nan), ValueError, ["factor", "NaN"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    for tensor in (C, R, V):
        assert tensor.count_nonzero() == 0


@pytest.mark.cuda
def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"rows.*cpu"):
        rust.append_rows_(C.cuda(), 0, R[:1])
    with pytest.raises(ValueError, match=r"rows.*cpu"):
        rust.accumulate_(C.cuda(), R)
    with pytest.raises(ValueError, match=r"rows.*cpu"):
        rust.add_rows_(V.cuda(), R)
    with pytest.raises(ValueError, match=r"total.*cpu"):
        rust.centre_(C.cuda(), V, 2)


def test_centred_rows_that_are_all_the_same_have_no_spread():
    """Σ (z − μ)(z − μ)ᵀ is 0 then, not the rounding of two equal sums: T is I, and no direction is made of noise."""
    rows = torch.full((7, 3), 0.1, dtype=torch.float64) * torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    covariance = Covariance(3)
    for row in rows:
        covariance.add(row[None])
    assert torch.equal(covariance.value(centred=True), torch.zeros(3, 3, dtype=torch.float64))
    covariance.add(rows[:1] + 1e-3)
    assert covariance.value(centred=True).trace() > 1e-7


@given(
    d=st.integers(1, 6),
    groups=st.sampled_from([1, 3]),
    only_rows=st.booleans(),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from([0, 1, 2, 5, 40, 1100]), st.booleans()),
            st.tuples(st.just("decay"), st.sampled_from([0.5, 0.9]), st.just(False)),
            st.tuples(st.sampled_from(["flush", "save", "merge", "merge into"]), st.just(3), st.just(False)),
        ),
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
def test_covariance_is_the_sum_of_what_has_been_added(d, groups, only_rows, steps, seed):
    """Whatever is buffered, flushed, decayed, merged or saved between: Ȳ, its centred form, the sum and the counts."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * d

    def drawn(n):
        return torch.randn(n, width, dtype=torch.float64, generator=generator) + 1

    covariance = Covariance(d, groups=groups, only_rows=only_rows)
    rows, weights, left_out = torch.zeros(0, width, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0
    for what, amount, spoilt in steps:
        if what == "add":
            new = drawn(amount)
            if spoilt and amount:
                new[-1, 0] = NAN
                left_out += 1
            covariance.add(new)
            new = new[new.isfinite().all(1)]
            rows, weights = torch.cat([rows, new]), torch.cat([weights, torch.ones(len(new), dtype=torch.float64)])
        elif what == "decay":
            covariance.decay(amount)
            weights = weights * amount
        elif what == "flush":
            covariance.flush()
        elif what == "save":
            state = covariance.state()
            covariance = Covariance(d, groups=groups, only_rows=only_rows)
            covariance.load(state, torch.device("cpu"))
        else:
            other = Covariance(d, groups=groups, only_rows=only_rows)
            new = drawn(amount)
            other.add(new)
            before = dict(vars(other))
            if what == "merge":
                covariance.merge(other)
                assert vars(other) == before  # the same objects
            else:
                other.merge(covariance)
                covariance = other
            rows, weights = torch.cat([rows, new]), torch.cat([weights, torch.ones(amount, dtype=torch.float64)])
    assert bool(covariance) == bool(len(rows))
    assert (covariance.count, covariance.left_out) == (pytest.approx(weights.sum().item()), left_out)
    if not len(rows):
        assert covariance.value() is None
        return
    total = (weights[:, None] * rows).sum(0)
    near(covariance.sum(), total)
    apart = rows.view(len(rows), groups, d).transpose(0, 1)
    expected = (apart.mT * weights) @ apart
    shaped = expected[0] if groups == 1 else expected
    near(covariance.value(), shaped)
    mean = total.view(groups, d, 1) / weights.sum()
    centred = expected - weights.sum() * mean @ mean.mT
    size = expected.abs().max()
    found = covariance.value(centred=True).view(groups, d, d)
    torch.testing.assert_close(found / size, centred / size, rtol=0, atol=1e-12)
