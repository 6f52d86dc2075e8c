"""Lines 1–2 and 8–9 of Algorithm 1 in Rust: whose turn it is, and whose T is used."""

import pytest
import reference as paper
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust


@pytest.mark.parametrize(
    ("active", "modalities", "source"),
    [(0, 1, 0), (0, 2, 1), (1, 2, 0), (0, 3, 2), (1, 3, 0), (2, 3, 1), (0, 5, 4), (4, 5, 3)],
)
def test_previous_modality_by_hand(active, modalities, source):
    assert rust.previous_modality(active, modalities) == source
    assert rust.previous_modality(active=active, modalities=modalities) == source


@given(st.integers(1, 50).flatmap(lambda m: st.tuples(st.integers(0, m - 1), st.just(m))))
def test_previous_modality_is_line_nine_counted_from_zero(case):
    active, modalities = case
    assert rust.previous_modality(active, modalities) == paper.source_index(active + 1, modalities) - 1


def test_turns_come_in_the_order_of_algorithm_one():
    for m in (1, 2, 3):
        names = [str(i) for i in range(m)]
        steps = paper.schedule(names, rounds=3, inner_iters=1)
        expected = [(i, int(name)) for i, name, _, _ in steps]
        assert [rust.turn_at(index, m) for index in range(3 * m)] == expected
    assert rust.turn_at(index=7, modalities=3) == (2, 1)


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_every_turn_follows_its_source(index, modalities):
    round_, active = rust.turn_at(index, modalities)
    assert round_ * modalities + active == index
    if index:
        assert rust.turn_at(index - 1, modalities)[1] == rust.previous_modality(active, modalities)


NAMES = ["audio", "video", "text"]


@pytest.mark.parametrize(
    ("names", "sources", "expected"),
    [
        (["only"], "previous", [[0]]),
        (["only"], "others", [[0]]),
        (["only"], {"only": None}, [[]]),
        (["a", "v"], "previous", [[1], [0]]),
        (["a", "v"], "others", [[1], [0]]),
        (NAMES, "previous", [[2], [0], [1]]),
        (NAMES, "others", [[1, 2], [2, 0], [0, 1]]),
        (NAMES, {"audio": None, "video": "audio", "text": ["video", "audio"]}, [[], [0], [1, 0]]),
        (NAMES, {"text": [], "video": "video", "audio": ("text",)}, [[2], [1], []]),
    ],
)
def test_source_lists_by_hand(names, sources, expected):
    assert rust.source_lists(names, sources) == expected
    assert rust.source_lists(names=names, sources=sources) == expected


@pytest.mark.parametrize("m", range(1, 6))
@pytest.mark.parametrize("sources", ["previous", "others"])
def test_source_lists_agree_with_the_reference(m, sources):
    names = [f"m{i}" for i in range(m)]
    expected = [[names.index(k) for k in paper.source_names(name, names, sources)] for name in names]
    assert rust.source_lists(names, sources) == expected


ERRORS = [
    (lambda: rust.previous_modality(0, 0), ValueError, ["modalities", "0"]),
    (lambda: rust.previous_modality(2, 2), ValueError, ["active", "2"]),
    (lambda: rust.turn_at(0, 0), ValueError, ["modalities", "0"]),
    (lambda: rust.source_lists(["a", "a"], "previous"), ValueError, ["names", "a"]),
    (lambda: rust.source_lists(NAMES, "all"), ValueError, ["sources", "all", "previous", "others"]),
    (lambda: rust.source_lists(NAMES, {"audio": None, "video": None}), ValueError, ["sources", "text"]),
    (
        lambda: rust.source_lists(NAMES, {"audio": "smell", "video": None, "text": None}),
        ValueError,
        ["sources", "smell", "audio", "video", "text"],
    ),
    (
        lambda: rust.source_lists(NAMES, {"audio": ["video", "smell"], "video": None, "text": None}),
        ValueError,
        ["sources", "smell", "audio", "video", "text"],
    ),
    (
        lambda: rust.source_lists(NAMES, {**dict.fromkeys(NAMES), "smell": None}),
        ValueError,
        ["sources", "smell", "audio", "video", "text"],
    ),
    (lambda: rust.source_lists(NAMES, 3), (TypeError, ValueError), ["sources"]),
    (lambda: rust.source_lists(NAMES, {**dict.fromkeys(NAMES), "audio": 3}), (TypeError, ValueError), ["sources"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
