"""The check of a folder before a training: what it counts, what it tells, and whether a training would start."""

import shutil

import pytest
import torch
import trees_a as trees
import trees_b
from PIL import Image

from igm_rs.experiments.columns import Reading
from igm_rs.experiments.on_disk.check import SHOWN, check
from igm_rs.experiments.on_disk.crema_d import CREMA_D
from igm_rs.experiments.on_disk.faults import KINDS
from igm_rs.experiments.on_disk.kinetics_sounds import KINETICS_SOUNDS
from igm_rs.experiments.on_disk.nvgesture import NVGESTURE

SMALL = Reading("small", skip_broken=True)


@pytest.fixture(scope="module")
def crema_tree(tmp_path_factory):
    return trees.write_crema(tmp_path_factory.mktemp("crema"))


@pytest.fixture
def crema(crema_tree, tmp_path):
    return shutil.copytree(crema_tree, tmp_path / "crema")


def damaged_pictures(folder, names):
    """Put PNGs in the place of pictures: whole by their chunks, but their rows cannot be unpacked."""
    for name in names:
        path = folder / "Image-01-FPS" / name
        Image.new("RGB", (32, 32)).save(path, "PNG")
        content = path.read_bytes()
        at = content.index(b"IDAT") + 4
        path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])


def test_a_whole_folder_has_no_problems(crema_tree):
    report = check(CREMA_D, crema_tree, Reading())
    assert report.problems == 0
    assert (
        report.text
        == f"""\
crema-d in {crema_tree}

               train  validation        test
listed            18           6          12
usable            18           6          12
  NEU              3           1           2
  HAP              3           1           2
  SAD              3           1           2
  FEA              3           1           2
  DIS              3           1           2
  ANG              3           1           2

A training for the network 'default' would use
  audio: spectrogram 1 × 257 × 188; encoder with 512 features, random weights
  video: frames 3 × 1 × 224 × 224; encoder with 512 features, random weights
  speakers apart: a speaker, subject, video or picture in two splits is a fault

A training would start."""
    )


@pytest.mark.parametrize("skip", [False, True])
def test_all_that_is_wrong_is_told_with_its_line(crema, skip):
    sounds, annotations = crema / "AudioWAV", crema / "annotations"
    (sounds / "1001_DFA_NEU_XX.wav").unlink()
    trees.cut(sounds / "1002_DFA_NEU_XX.wav")
    trees.cut(crema / "Image-01-FPS" / "1002_DFA_NEU_XX" / "00001.jpg")
    trees.edit_line(annotations / "valid.csv", 3, lambda line: line.replace(b"SAD\n", b"GLAD\n"))
    trees.edit_line(annotations / "test.csv", 12, lambda line: line + line)
    report = check(CREMA_D, crema, Reading("small", skip_broken=skip))
    assert report.problems == 5
    lines = report.text.splitlines()
    assert lines[3:6] == [
        "listed            18           6          13",
        "usable            16           5          12",
        "  NEU              1           1           2",
    ]
    train, name = annotations / "train.csv", "1002_DFA_NEU_XX"
    valid, test = annotations / "valid.csv", annotations / "test.csv"
    for line in (
        "1 missing files",
        f"  {train}, line 1: file {sounds / '1001_DFA_NEU_XX.wav'} does not exist",
        "2 files that are cut off or damaged",
        f"  {train}, line 7: file {sounds / name}.wav: chunk data has 12800 bytes, the file holds 7662 of them",
        "1 labels out of range",
        f"  {valid}, line 3: label of 1004_DFA_SAD_XX is 'GLAD', expected one of NEU, HAP, SAD, FEA, DIS, ANG",
        "1 examples that are listed twice",
        f"  {test}, line 13: 1006_DFA_ANG_XX is listed twice, first in {test}, line 12",
    ):
        assert line in lines, line
    assert f"  {train}, line 7: file {crema / 'Image-01-FPS' / name / '00001.jpg'}: its header ends" in report.text
    assert lines[-1] == "A training would not start, but with --skip-broken: without 4 examples."


def test_of_many_faults_twenty_are_told(crema):
    for path in (crema / "AudioWAV").iterdir():
        if not path.name.startswith(("1001", "1004", "1005")):
            path.unlink()
    clips = [(f"10{number}_IEO_FEA_HI", "?") for number in range(40, 40 + SHOWN + 3)]
    trees.write_list(crema / "annotations" / "train.csv", clips)
    report = check(CREMA_D, crema, SMALL)
    lines = report.text.splitlines()
    begin = lines.index(f"{SHOWN + 3} {KINDS['label']}")
    assert [line.startswith("  /") for line in lines[begin + 1 : begin + SHOWN + 1]] == [True] * SHOWN
    assert lines[begin + SHOWN + 1] == "  and 3 more"
    assert lines[-1].startswith("A training would not start: ")
    assert f"has no example for the train split ({SHOWN + 3} labels out of range, 6 missing files)" in lines[-1]
    assert report.problems == 6 + SHOWN + 3 + 1


@pytest.mark.parametrize("loaders", [0, 2])
def test_every_file_is_decoded_also_those_that_measuring_leaves_out(crema, loaders):
    damaged_pictures(crema, ["1001_DFA_HAP_XX/00001.jpg", "1001_DFA_HAP_XX/00002.jpg", "1005_DFA_NEU_XX/00003.jpg"])
    wav = crema / "AudioWAV" / "1004_DFA_NEU_XX.wav"
    content = bytearray(wav.read_bytes())
    content[20:22] = b"\x99\x99"  # a way of coding that nobody has
    wav.write_bytes(content)
    report = check(CREMA_D, crema, SMALL, loaders)
    assert report.problems == 4
    lines = report.text.splitlines()
    begin = lines.index("4 files that cannot be decoded")
    for line, (part, number, path) in zip(
        lines[begin + 1 : begin + 5],
        (
            ("train", 2, crema / "Image-01-FPS" / "1001_DFA_HAP_XX" / "00001.jpg"),
            ("train", 2, crema / "Image-01-FPS" / "1001_DFA_HAP_XX" / "00002.jpg"),
            ("valid", 1, wav),
            ("test", 1, crema / "Image-01-FPS" / "1005_DFA_NEU_XX" / "00003.jpg"),
        ),
        strict=True,
    ):
        expected = f"  {crema / 'annotations' / part}.csv, line {number}: {path}: it cannot be decoded ("
        assert line.startswith(expected)
        assert "igm-rs data check" not in line
    assert lines[-1] == (
        "A training would stop at the first of 4 files that cannot be decoded: take their lines out of the lists."
    )


def test_speakers_in_two_splits_are_told_unless_they_are_shared(crema):
    trees.edit_line(crema / "annotations" / "train.csv", 1, lambda _: b"1005_IEO_NEU_XX,NEU\n")
    for folder, end in (("AudioWAV", ".wav"), ("Image-01-FPS", "")):
        (crema / folder / f"1001_DFA_NEU_XX{end}").rename(crema / folder / f"1005_IEO_NEU_XX{end}")
    report = check(CREMA_D, crema, SMALL)
    assert report.problems == 1
    assert "1 examples of speakers who are in another split\n" in report.text
    shared = check(CREMA_D, crema, Reading("small", speakers="shared"))
    assert shared.problems == 0
    assert (
        "  speakers shared: a speaker, subject, video or picture may be in two splits, and is measured on"
        in shared.text
    )
    assert shared.text.endswith("A training would start.")


def test_a_folder_that_is_not_there_or_lacks_a_list_is_told(crema, tmp_path):
    report = check(CREMA_D, tmp_path / "nowhere", SMALL)
    assert report.problems == 1
    nowhere = tmp_path / "nowhere"
    assert report.text == (
        f"crema-d in {nowhere}\n\nA training would not start: folder {nowhere} does not exist, expected one of "
        f"crema-d:\n{CREMA_D.layout}"
    )
    (crema / "annotations" / "valid.csv").unlink()
    report = check(CREMA_D, crema, SMALL)
    assert report.problems == 1
    assert f"A training would not start: list {crema / 'annotations' / 'valid.csv'} does not exist; " in report.text


def test_another_delimiter_is_told_with_what_was_found_before_it(crema):
    train, test = crema / "annotations" / "train.csv", crema / "annotations" / "test.csv"
    trees.edit_line(train, 1, lambda line: line.replace(b"NEU\n", b"?\n"))
    test.write_text(test.read_text().replace(",", "\t"))
    report = check(CREMA_D, crema, SMALL)
    assert report.problems == 2
    assert f"  {train}, line 1: label of 1001_DFA_NEU_XX is '?'" in report.text
    assert f"A training would not start: {test}, line 1: no line of the list has a comma, found a tab;" in report.text


def test_a_class_that_is_never_trained_keeps_a_training_from_starting(crema):
    for path in (crema / "AudioWAV").glob("100[123]_DFA_SAD_XX.wav"):
        path.unlink()
    report = check(CREMA_D, crema, SMALL)
    assert report.problems == 4
    assert report.text.endswith("no training example belongs to SAD")


def test_weights_that_are_no_file_are_told(crema_tree, tmp_path):
    report = check(CREMA_D, crema_tree, Reading(weights={"audio": tmp_path / "none.pt"}))
    assert report.problems == 1
    assert "A training would not start: " in report.text
    assert "none.pt" in report.text


def test_kinetics_is_checked_too(tmp_path):
    folder = trees.write_kinetics(tmp_path)
    report = check(KINETICS_SOUNDS, folder, Reading("small"))
    assert report.problems == 0
    lines = report.text.splitlines()
    assert lines[3].split() == ["listed", "62", "31", "31"]
    assert "  tickling                       2           1           1" in lines
    assert any(line.startswith("  video: frames 3 × 3 × 32 × 32; encoder with ") for line in lines)


# Gestures: several modalities of one file


def test_a_file_of_several_modalities_is_told_once(tmp_path):
    trees_b.nvgesture(tmp_path, classes=25, later=1)
    path = tmp_path / "Video_data" / "class_03" / "subject1_r1" / "sk_color.avi"
    content = path.read_bytes()
    at = content.index(b"strf") + 8 + 16
    path.write_bytes(content[:at] + b"ZZZZ" + content[at + 4 :])  # a way of coding that nobody has
    report = check(NVGESTURE, tmp_path, SMALL)
    assert report.problems == 1
    assert "1 files that cannot be decoded\n" in report.text
    assert f"line 3: {path}: it cannot be decoded (" in report.text


def test_windows_that_end_behind_their_file_are_told_and_stop_nothing(tmp_path):
    trees_b.nvgesture(tmp_path, classes=25, later=1)
    path = tmp_path / "nvgesture_train_correct_v2.lst"
    trees_b.change(path, 2, b"color:sk_color:2:12", b"color:sk_color:2:12000")
    report = check(NVGESTURE, tmp_path, SMALL)
    assert report.problems == 0
    video = tmp_path / "Video_data" / "class_02" / "subject1_r1" / "sk_color.avi"
    assert f"1 windows end behind their files, the first in {path}, line 2: {video} has 14 frames\n" in report.text
    assert report.text.endswith("A training would start.")


def test_weights_that_do_not_fit_keep_a_training_from_starting(crema_tree, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"fc.weight": torch.ones(2)}, file)
    report = check(CREMA_D, crema_tree, Reading("small", weights={"audio": file}))
    assert report.problems == 1
    assert f"A training would not start: weights {file} do not fit " in report.text
