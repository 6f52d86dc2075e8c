"""The data sets: who is in which split, what the test split tells before it is opened, and what is refused and how."""

import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from igm_rs.experiments import data, sets

TEN_LINES = Path(__file__).with_name("ten_lines.py")
LICENCES = sets.ARCHIVES / "LICENCES.md"
SETS = ("watch", "mfeat", "openclipart")
IN_A_FOLDER = ("crema-d", "kinetics-sounds", "twitter2015", "sarcasm", "nvgesture")


@pytest.fixture(scope="module")
def loaded():
    return {name: data.load(name) for name in SETS}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Whatever a test registers is forgotten after it."""
    data.names()
    monkeypatch.setattr(data, "_SETS", dict(data._SETS))


def fresh(dataset):
    """Return the same set with its test split not opened yet."""
    return dataclasses.replace(dataset, test_openings=0)


def splits(dataset):
    return dataset.train, dataset.validation, fresh(dataset).open_test()


# Splits


def test_watch_has_2229_windows_of_disjoint_people(loaded):
    watch = loaded["watch"]
    assert watch.sizes == {"train": 1271, "validation": 251, "test": 707}
    people = [set(split.origins.tolist()) for split in splits(watch)]
    assert people == [{1, 2, 3, 4, 5, 6}, {7}, {8, 9, 10}]
    for split in splits(watch):
        assert {name: tuple(x.shape[1:]) for name, x in split.inputs.items()} == {
            "accelerometer": (3, 200),
            "gyroscope": (3, 200),
        }
        assert split.labels.min() >= 0
        assert split.labels.max() < watch.classes == 7


def test_mfeat_is_split_by_class_and_always_alike(loaded):
    mfeat = loaded["mfeat"]
    assert [split.labels.bincount().tolist() for split in splits(mfeat)] == [[120] * 10, [40] * 10, [40] * 10]
    origins = torch.cat([split.origins for split in splits(mfeat)])
    assert sorted(origins.tolist()) == list(range(2000))
    assert torch.equal(data.load("mfeat").train.origins, mfeat.train.origins)
    assert {name: x.shape[1] for name, x in mfeat.train.inputs.items()} == {"fou": 76, "zer": 47, "mor": 6}


def test_openclipart_has_no_title_in_two_splits(loaded):
    """Looked up in the archive itself: titles that are equal as they stand, and as words."""
    clipart = loaded["openclipart"]
    assert clipart.sizes == {"train": 1659, "validation": 790, "test": 636}
    with np.load(sets.ARCHIVES / "openclipart.npz") as archive:
        titles, fold, label = (archive[name] for name in ("title", "fold", "label"))
    parts = np.where(fold == 4, "test", np.where(fold == 3, "validation", "train"))
    [moved] = np.flatnonzero(titles == "Volley Ball")
    assert parts[moved] == "validation"
    parts[moved] = "train"
    for alike in (str, lambda title: tuple(data.words(title))):
        held = {part: {alike(str(title)) for title in titles[parts == part]} for part in np.unique(parts)}
        assert not held["train"] & held["validation"]
        assert not held["train"] & held["test"]
        assert not held["validation"] & held["test"]
    for split, part in zip(splits(clipart), ("train", "validation", "test"), strict=True):
        assert split.labels.tolist() == label[parts == part].tolist()


@pytest.mark.parametrize("name", SETS)
def test_no_origin_is_in_two_splits(loaded, name):
    first, second, third = (set(split.origins.tolist()) for split in splits(loaded[name]))
    assert not (first & second) | (first & third) | (second & third)


def test_pictures_are_means_of_four_pixels(loaded):
    clipart = loaded["openclipart"]
    with np.load(sets.ARCHIVES / "openclipart.npz") as archive:
        image = archive["image"][archive["fold"] == 4][7].astype(np.float64)
    small = np.array([[image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for c in range(16)] for r in range(16)])
    given = fresh(clipart).open_test().inputs["image"][7].numpy().transpose(1, 2, 0)
    assert given.shape == (16, 16, 3)
    for colour in range(3):  # standardised: a line through the same values
        slope, _ = np.polyfit(small[..., colour].ravel(), given[..., colour].ravel(), 1)
        assert slope > 0
        assert np.corrcoef(small[..., colour].ravel(), given[..., colour].ravel())[0, 1] == pytest.approx(1, abs=1e-6)


def test_windows_by_hand():
    series = np.arange(850, dtype=np.float32).reshape(850, 1)
    cut, origin = sets.windows(series, np.array([399, 100, 351]))
    assert cut.shape == (4, 1, 200)
    assert cut[:, 0, 0].tolist() == [0, 100, 499, 599]
    assert origin.tolist() == [0, 0, 2, 2]


# What the training split alone decides


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5)])
def test_standardisation_looks_at_training_examples_only(shape):
    values = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    training = np.array([True, True, True, True, False, False])
    axes = (0, *range(2, len(shape)))
    scaled = data.standardise(values, training)
    np.testing.assert_allclose(scaled[training].mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[training].std(axes), 1, rtol=1e-6)
    other = values.copy()
    other[~training] = 1e6
    np.testing.assert_array_equal(data.standardise(other, training)[training], scaled[training])


@pytest.mark.parametrize("constant", [2.0, 0.1, 0.0])
def test_standardisation_of_a_constant_feature_only_shifts_it(constant):
    values = np.array([[constant]] * 7 + [[5.0]])
    training = np.arange(8) < 7
    np.testing.assert_allclose(data.standardise(values, training)[:, 0], [*[0.0] * 7, 5 - constant], atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_shipped_sets_are_standardised_with_their_training_split(loaded, name):
    for modality, values in loaded[name].train.inputs.items():
        if loaded[name].kinds[modality] != "title":
            axes = (0, *range(2, values.ndim))
            assert values.dtype == torch.float32
            assert values.double().mean(axes).abs().max() < 1e-5
            assert (values.double().std(axes, correction=0) - 1).abs().max() < 1e-5


def test_words_and_parts_by_hand():
    assert data.words("Clipart - BALLOON_04, Été") == ["clipart", "balloon", "été"]
    assert data.parts("flag") == ["<flag>", "<fl", "fla", "lag", "ag>", "<fla", "flag", "lag>"]
    assert data.parts("a") == ["<a>"]


def test_ids_by_hand():
    ids = data.vocabulary_of(["a cat", "a CAT 2", "an owl", "owl-owl-owl"])
    known = {"<a>", *data.parts("cat"), *data.parts("owl")}
    assert set(ids) == known  # "an" stands in one title only
    assert sorted(ids.values()) == list(range(2, 2 + len(known)))
    a, *_ = data.word_ids(["a"], ids)[0]
    rows = data.word_ids(["A cat", "a dog", "cats", ""], ids)
    assert rows[0] == [a, *(ids[part] for part in data.parts("cat"))]
    assert rows[1] == [a, data.UNKNOWN]
    assert rows[2] == [ids[part] for part in ("<ca", "cat", "<cat")]
    assert rows[3] == []
    assert data.padded(rows, 3).tolist() == [rows[0][:3], [a, data.UNKNOWN, 0], rows[2], [0, 0, 0]]


def small(**changes):
    """Arguments of DataSet.of: two classes, six examples, the last two not for training."""
    given = {
        "inputs": {"force": np.arange(12.0).reshape(6, 2), "note": np.array(["to cut", "to mix"] * 3)},
        "labels": np.array([0, 1, 0, 1, 0, 1]),
        "validation": np.arange(6) == 4,
        "test": np.arange(6) == 5,
    }
    return given | changes


def test_the_vocabulary_is_of_the_training_split_alone():
    same = ["to cut", "to mix"] * 2
    notes = [
        data.DataSet.of(**small(inputs={"note": np.array([*same, *late])}))
        for late in (["cut", "to"], ["ox", "ox ox ox ox ox ox ox ox ox"])
    ]
    one, other = notes
    assert (
        one.vocabulary
        == other.vocabulary
        == {"note": 2 + len({*data.parts("to"), *data.parts("cut"), *data.parts("mix")})}
    )
    assert torch.equal(one.train.inputs["note"], other.train.inputs["note"])
    length = one.train.inputs["note"].shape[1]
    assert other.validation.inputs["note"].tolist() == [[data.UNKNOWN] + [data.PADDING] * (length - 1)]
    assert fresh(other).open_test().inputs["note"].tolist() == [
        [data.UNKNOWN] * min(9, length) + [0] * max(0, length - 9)
    ]


def test_ids_of_openclipart_stay_within_the_vocabulary_and_unknown_words_are_trained(loaded):
    clipart = loaded["openclipart"]
    for split in splits(clipart):
        titles = split.inputs["title"]
        assert titles.dtype == torch.int64
        assert titles.min() >= 0
        assert titles.max() < clipart.vocabulary["title"]
        assert (titles == data.UNKNOWN).any()
        padding = titles == data.PADDING
        assert torch.equal(padding, padding.cummax(-1).values)  # at the end only


# The test split, and what is told without it


def test_the_test_split_is_counted_and_can_be_shut(loaded):
    dataset = fresh(loaded["watch"])
    shut = dataset.without_test()
    with pytest.raises(RuntimeError, match="test split of watch is shut while settings are chosen"):
        shut.open_test()
    assert "test" not in shut.sizes
    assert (dataset.has_test, shut.has_test) == (True, False)
    assert (shut.name, shut.kinds, shut.class_names) == (dataset.name, dataset.kinds, dataset.class_names)
    assert dataset.test_openings == shut.test_openings == 0
    dataset.open_test()
    assert dataset.test_openings == 1


def test_ours_are_named_first_and_described():
    assert data.names()[:3] == list(SETS)
    watch, mfeat, clipart = (data.describe(name) for name in SETS)
    assert watch["modalities"]["gyroscope"] == {"kind": "series", "shape": (3, 200)}
    assert mfeat["modalities"]["mor"] == {"kind": "vector", "shape": (6,)}
    assert clipart["modalities"]["image"] == {"kind": "picture", "shape": (3, 16, 16)}
    assert clipart["modalities"]["title"]["vocabulary"] == 4639
    assert clipart["balance"]["signs_and_symbols"] == 507
    assert clipart["majority"] == 507 / 1659
    assert mfeat["balance"] == {str(digit): 120 for digit in range(10)}
    for told, licence in ((watch, "BSD 3-Clause"), (mfeat, "CC BY 4.0"), (clipart, "public domain")):
        assert told["licence"] == licence
        assert licence in LICENCES.read_text()
        assert sum(told["sizes"].values()) in (2229, 2000, 3085)
        assert sum(told["balance"].values()) == told["sizes"]["train"]
        assert {"joint", *told["modalities"]} == set(told["baselines"])


def test_describing_does_not_open_the_test_split(monkeypatch):
    monkeypatch.setattr(data.DataSet, "open_test", lambda _: pytest.fail("the test split was opened"))
    assert data.describe("mfeat")["sizes"]["test"] == 400


def test_licences_lie_beside_the_archives():
    text = LICENCES.read_text()
    for name in SETS:
        assert f"## {name}.npz" in text
        assert (sets.ARCHIVES / f"{name}.npz").is_file()
    for cited in ("doi:10.1088/1361-6579/aacfd9", "doi:10.24432/C5HC70", "openclipart.org"):
        assert cited in text
    assert "Copyright (c) 2018" in (sets.ARCHIVES / "watch.LICENSE").read_text()


def test_archives_are_read_without_pickle():
    for name in SETS:
        with np.load(sets.ARCHIVES / f"{name}.npz", allow_pickle=False) as archive:
            assert all(archive[key].dtype != object for key in archive)


# What is refused


def LONG(_):  # noqa: N802
    """One entry for every reading of watch."""
    return np.ones(244102, dtype=np.int64)


def put(place, value):
    """Return what changes one entry of an array."""

    def changed(array):
        array = array.copy()
        array[place] = value
        return array

    return changed


def rewritten(folder, name, **changes):
    """Write a copy of a shipped archive with some arrays changed, or left out where None."""
    with np.load(sets.ARCHIVES / f"{name}.npz") as archive:
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
        ("watch", {"X": lambda x: x.astype("S4")}, r"X has dtype \|S4, expected numbers"),
        ("watch", {"X": lambda x: x.astype(complex)}, "X has dtype complex128, expected numbers"),
        ("watch", {"X": put((5, 2), np.nan)}, "accelerometer holds values that are not finite"),
        ("watch", {"X": put((5, 4), np.inf)}, "gyroscope holds values that are not finite"),
        ("watch", {"y": lambda y: y[:-1]}, r"n, y and subject have \[140, 139, 140\] entries"),
        ("watch", {"y": put(3, 7)}, "y goes from 0 to 7, expected 0 to 6"),
        ("watch", {"y": lambda y: y.astype(float)}, "y has dtype float64, expected integers"),
        ("watch", {"n": lambda n: put(0, -n[0])(n)}, "n goes from -[0-9]+ to"),
        ("watch", {"n": lambda n: n[:0]}, "n is empty"),
        ("watch", {"subject": lambda s: s + 1}, "subject goes from 2 to 11, expected 1 to 10"),
        ("watch", {"subject": lambda s: np.minimum(s, 7)}, "no example belongs to the test split"),
        ("watch", {"y": lambda y: np.maximum(y, 1)}, "no training example has label 0"),
        ("watch", {"n": LONG, "y": LONG, "subject": LONG}, "no series has 200 readings"),
        ("mfeat", {"zer": None, "mor": None}, "it has no array zer, mor"),
        ("mfeat", {"fou": lambda x: x[:10]}, "fou has 10 rows, there are 2000 labels"),
        ("mfeat", {"fou": lambda x: x[:, 0]}, "fou has 1 dimensions, expected 2"),
        ("mfeat", {"fou": lambda x: x[:, 1:]}, "fou has 75 columns, expected 76"),
        ("mfeat", {"y": lambda y: y.astype("U1")}, "y has dtype <U1, expected numbers"),
        ("mfeat", {"y": lambda y: y.astype(object)}, "it is no NumPy archive that can be read .*[Oo]bject arrays"),
        ("mfeat", {"y": lambda y: np.where(y == 9, 8, y)}, "expected 200 each"),
        ("mfeat", {"y": put(0, 10)}, "y goes from 0 to 10, expected 0 to 9"),
        ("mfeat", {"mor": lambda x: np.where(x > 100, np.nan, x)}, "mor holds values that are not finite"),
        ("mfeat", {"mor": lambda x: np.where(x > 100, 1e300, x.astype(float))}, "mor holds values that float32 cannot"),
        ("openclipart", {"title": None}, "it has no array title"),
        ("openclipart", {"image": lambda x: x[:, :16]}, r"image has shape \(3085, 16, 32, 3\), expected"),
        ("openclipart", {"image": lambda x: x.astype(np.float32)}, "image has dtype float32, expected uint8"),
        ("openclipart", {"title": lambda x: np.arange(len(x))}, "title has dtype int64, expected strings"),
        ("openclipart", {"title": lambda x: x.astype(object)}, "it is no NumPy archive that can be read .*[Oo]bject"),
        ("openclipart", {"title": lambda x: x[:9]}, r"label and fold have \[3085, 9, 3085, 3085\] entries"),
        ("openclipart", {"title": lambda x: np.full(len(x), "?")}, "no example belongs to the validation split"),
        ("openclipart", {"label": put(0, 11)}, "label goes from 0 to 11, expected 0 to 10"),
        ("openclipart", {"fold": put(0, 5)}, "fold goes from 0 to 5, expected 0 to 4"),
        ("openclipart", {"fold": lambda f: f.astype(float)}, "fold has dtype float64, expected integers"),
        ("openclipart", {"fold": lambda f: np.where(f == 4, 3, f)}, "no example belongs to the test split"),
        ("openclipart", {"classes": lambda c: np.arange(len(c))}, "classes has dtype int64, expected strings"),
    ],
)  # fmt: skip
def test_a_foreign_archive_is_refused_with_file_and_reason(tmp_path, name, changes, reason):
    rewritten(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=rf"data file .*{name}\.npz is not as expected: .*{reason}"):
        data.load(name, tmp_path)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encrypted():
    """An archive whose one member claims to need a password."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("y.npy", npy(np.arange(3)))
    content = bytearray(buffer.getvalue())
    for at in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[at] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 torn off", b"words", npy(np.arange(3)), encrypted()],
    ids=["empty", "torn", "text", "one array", "encrypted"],
)
def test_a_file_that_is_no_archive_is_refused_with_file_and_reason(tmp_path, content):
    (tmp_path / "mfeat.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mfeat\.npz is not as expected: it is no NumPy archive that can be read"):
        data.load("mfeat", tmp_path)


def test_an_archive_that_is_cut_short_or_altered_anywhere_is_refused_or_read_as_it_was(tmp_path):
    whole, path = tmp_path / "whole.npz", tmp_path / "damaged.npz"
    arrays = {"a": np.arange(200.0).reshape(20, 10), "y": np.arange(20)}
    np.savez_compressed(whole, **arrays)
    content, draw = whole.read_bytes(), np.random.default_rng(0)
    damaged = [content[:length] for length in range(0, len(content), 17)]
    for _ in range(150):
        altered = bytearray(content)
        altered[draw.integers(len(content))] ^= int(draw.integers(1, 256))
        damaged.append(bytes(altered))
    refused = read = 0
    for each in damaged:
        path.write_bytes(each)
        told = f"data file {path} is not as expected: it "
        try:
            found = data.read(path, {"a": 2, "y": 1})
        except ValueError as error:
            refused += str(error).startswith(told)
        else:
            read += all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert refused + read == len(damaged)
    assert refused > read


@pytest.mark.parametrize("name", SETS)
def test_a_missing_archive_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"data file .*{name}\.npz does not exist, expected a NumPy archive"):
        data.load(name, tmp_path)


def test_an_unknown_data_set_is_named():
    for asked in (data.load, data.describe):
        with pytest.raises(ValueError, match="data set is 'iris', expected one of watch, mfeat, openclipart"):
            asked("iris")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": {}}, "there is no modality"),
        ({"inputs": {"a.b": np.zeros((6, 2))}}, "a modality is called 'a.b', expected letters"),
        ({"inputs": {"training": np.zeros((6, 2))}}, "a modality is called 'training', expected .* no method's name"),
        ({"inputs": {"a": np.zeros((5, 2))}}, "a has 5 rows, there are 6 labels"),
        ({"inputs": {"a": np.zeros(())}}, "a has 0 rows, there are 6 labels"),
        ({"inputs": {"a": np.zeros(6)}}, "a has 1 dimensions, expected 2, 3 or 4, or strings"),
        ({"inputs": {"a": np.zeros((6, 2), dtype=object)}}, "a has dtype object, expected numbers or strings"),
        ({"inputs": {"a": np.zeros((6, 0))}}, r"a has shape \(6, 0\), expected no empty dimension"),
        ({"inputs": {"a": np.full((6, 2), np.nan)}}, "a holds values that are not finite"),
        ({"inputs": {"a": np.full((6, 2), 1e39)}}, "a holds values that float32 cannot"),
        ({"inputs": {"a": np.full((6, 2), "x")}}, "a holds strings in 2 dimensions, expected 1"),
        ({"inputs": {"a": np.array(list("abcdef"))}}, "a holds no word that stands in 2 titles of the training split"),
        ({"labels": np.zeros((6, 1), dtype=int)}, "labels have 2 dimensions, expected 1"),
        ({"labels": np.zeros(6)}, "labels have dtype float64, expected integers"),
        ({"labels": np.array([-1, 1, 0, 1, 0, 1])}, "labels go from -1 to 1, expected 0 to 1"),
        ({"labels": np.array([0, 1, 0, 1, 0, 2]), "class_names": "ab"}, "labels go from 0 to 2, expected 0 to 1"),
        ({"labels": np.array([0, 1, 0, 1, 0, 2])}, "no training example has label 2"),
        ({"labels": np.zeros(6, dtype=int)}, "there is 1 class, expected 2 or more"),
        ({"validation": np.arange(6)}, "validation has dtype int64, expected bool"),
        ({"test": np.zeros((6, 1), dtype=bool)}, "test has 2 dimensions, expected 1"),
        ({"test": np.zeros(5, dtype=bool)}, "test has 5 rows, there are 6 labels"),
        ({"test": np.zeros(6, dtype=bool)}, "no example belongs to the test split"),
        ({"test": np.ones(6, dtype=bool)}, "1 examples belong to validation and to test"),
        ({"test": np.arange(6) != 4}, "no example belongs to the train split"),
        ({"origins": np.zeros((6, 2), dtype=int)}, "origins has 2 dimensions, expected 1"),
        ({"origins": np.zeros(6)}, "origins has dtype float64, expected integers"),
        ({"origins": np.array([1, 2, 3, 3, 3, 4])}, r"train and validation have 1 origins in .* is \[3\]"),
        ({"origins": np.array([1, 2, 3, 4, 5, 1])}, r"train and test have 1 origins in common, the first is \[1\]"),
        ({"origins": np.array([1, 2, 3, 4, 5, 5])}, "validation and test have 1 origins in common"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_together_are_refused(changes, reason):
    data.DataSet.of(**small())
    with pytest.raises(ValueError, match=f"^the data are not as expected: {reason}"):
        data.DataSet.of(**small(**changes))
    with pytest.raises(ValueError, match=f"^data file here is not as expected: {reason}"):
        data.DataSet.of(**small(**changes), file=Path("here"))


# A set of the user's


def kitchen(folder):
    """Write the archive that ten_lines.py reads, and lay that file beside it."""
    draw = np.random.default_rng(0)
    label = np.arange(70) % 3
    np.savez(
        folder / "kitchen.npz",
        force=draw.normal(size=(70, 4)) + label[:, None],
        sound=draw.normal(size=(70, 2, 40)).astype(np.float32),
        note=np.array(["chop the onion", "stir it", "wash up"])[label],
        label=label,
        day=np.repeat(np.arange(7), 10),
    )
    return Path(shutil.copy(TEN_LINES, folder / "my_sets.py"))


def test_a_data_set_of_ones_own_takes_ten_lines(tmp_path):
    lines = [line for line in TEN_LINES.read_text().splitlines() if line.strip()]
    assert len(lines) <= 10
    file = kitchen(tmp_path)
    data.run_file(file)
    assert data.sets_of(file) == ["kitchen"]
    assert [*data.names()[:3], data.names()[-1]] == [*SETS, "kitchen"]  # other tests may have registered theirs
    found = data.load("kitchen")
    assert (found.name, found.title, found.licence) == ("kitchen", "kitchen: hands at work", "CC0")
    assert found.sizes == {"train": 50, "validation": 10, "test": 10}
    assert found.kinds == {"force": "vector", "sound": "series", "note": "title"}
    assert data.describe("kitchen")["baselines"] == {}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "kitchen.npz").rename(moved / "kitchen.npz")
    assert data.load("kitchen", moved).sizes == found.sizes
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "kitchen.npz"))):
        data.load("kitchen")
    (moved / "kitchen.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"kitchen\.npz is not as expected: it is no NumPy archive"):
        data.load("kitchen", moved)


def test_registering_again_replaces_a_set_but_not_ours(tmp_path):
    file = kitchen(tmp_path)
    data.run_file(file)
    file.write_text(file.read_text().replace("hands at work", "again"))
    data.run_file(file)
    assert data.sets_of(file) == ["kitchen"]
    assert data.load("kitchen").title == "kitchen: again"
    assert data.names().count("kitchen") == 1
    words = {"title": "mine", "licence": "CC0", "source": "me"}
    with pytest.raises(ValueError, match="data set 'watch' comes with the package, expected another name"):
        data.register("watch", **words)(lambda folder: folder)
    with pytest.raises(ValueError, match="data set is called 'my set', expected letters, digits, '-' and '_' only"):
        data.register("my set", **words)
    with pytest.raises(TypeError, match="data set 'mine' is registered with a str, expected a function"):
        data.register("mine", **words)("loader")


def test_ours_come_first_in_a_fresh_process(tmp_path):
    file = kitchen(tmp_path)
    code = (
        "from pathlib import Path\nfrom igm_rs.experiments import data\n"
        f"data.run_file(Path({str(file)!r}))\nprint(data.names())\n"
        "data.register('mfeat', title='', licence='', source='')(lambda folder: folder)"
    )
    told = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert told.stdout == f"{[*SETS, *IN_A_FOLDER, 'kitchen']}\n"
    assert told.stderr.endswith("ValueError: data set 'mfeat' comes with the package, expected another name\n")


def test_a_set_from_a_notebook_is_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    def cell(folder):
        assert folder == Path()
        return data.DataSet.of(**small())

    code = cell.__code__.replace(co_filename="<cell 1>")
    made = types.FunctionType(code, cell.__globals__, closure=cell.__closure__)
    data.register("mine", title="mine", licence="CC0", source="me")(made)
    assert data.load("mine").sizes == {"train": 4, "validation": 1, "test": 1}


def test_a_function_that_returns_something_else_is_refused():
    data.register("mine", title="mine", licence="CC0", source="me")(lambda _: "words")
    with pytest.raises(TypeError, match="registers as 'mine' returned a str, expected a DataSet"):
        data.load("mine")


@pytest.mark.parametrize(
    ("name", "text", "error", "reason"),
    [
        ("absent.py", None, FileNotFoundError, "does not exist, expected a Python file"),
        ("mine.txt", "x = 1", ValueError, r"cannot be run: its name does not end in \.py"),
        ("mine.py", "x = (", ValueError, "cannot be run: SyntaxError: "),
        ("mine.py", "import nothing_like_it", ValueError, "cannot be run: ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path, name, text, error, reason):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=rf"^file {re.escape(str(file))} {reason}"):
        data.run_file(file)
    assert not [module for module in sys.modules if module.startswith("igm_rs_registered_mine")]


@pytest.mark.skipif(sys.platform == "darwin", reason="there every path is UTF-8")
def test_a_file_in_a_folder_that_is_no_utf_8_is_run(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "of_latin_1.py").write_text("WHERE = 'there'\n")
    data.run_file(folder / "of_latin_1.py")
    (name,) = [name for name in sys.modules if name.startswith("igm_rs_registered_of_latin_1_")]
    assert sys.modules.pop(name).WHERE == "there"


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "of_one_name.py").write_text(f"WHERE = {folder!r}\n")
        data.run_file(tmp_path / folder / "of_one_name.py")
    names = [name for name in sys.modules if name.startswith("igm_rs_registered_of_one_name_")]
    assert [sys.modules.pop(name).WHERE for name in names] == ["a", "b"]
