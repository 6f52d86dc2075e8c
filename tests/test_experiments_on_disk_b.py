"""Twitter2015, Sarcasm and NVGesture from small trees: what is read, what seeds change, and what is told of faults."""

import csv
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees_b as trees
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from igm_rs.experiments import data
from igm_rs.experiments.columns import Reading
from igm_rs.experiments.on_disk import clips, text
from igm_rs.experiments.on_disk.clips import CHANNELS, FLOW_LIMIT, FULL, SMALL, Clip, ClipColumn, ClipForm
from igm_rs.experiments.on_disk.faults import DataFault, Faults
from igm_rs.experiments.on_disk.media import Home
from igm_rs.experiments.on_disk.nvgesture import NVGESTURE
from igm_rs.experiments.on_disk.pictures import CLIP
from igm_rs.experiments.on_disk.sarcasm import SARCASM
from igm_rs.experiments.on_disk.twitter2015 import TWITTER2015

MAKERS = {"twitter2015": trees.twitter2015, "sarcasm": trees.sarcasm, "nvgesture": trees.nvgesture}
SETS = pytest.mark.parametrize("on_disk", [TWITTER2015, SARCASM, NVGESTURE], ids=list(MAKERS))
NEAREST_STEP = 1.01 / 127.5
"""One step of 8 bits where −1 to 1 are 255 of them: what a conversion of colours may round by."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tree of each set, not to be changed."""
    folder = tmp_path_factory.mktemp("trees")
    for name, make in MAKERS.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small BERT and a small CLIP whose tokenizers know three words."""
    folder = tmp_path_factory.mktemp("models")
    words = ["ann", "bob", "and"]
    trees.bert(folder / "bert", words)
    trees.clip(folder / "clip", words)
    return folder


def copied(root, on_disk, folder):
    """Copy a set's tree, to be broken."""
    shutil.copytree(root / on_disk.name, folder, dirs_exist_ok=True)


def small(**options):
    return Reading("small", **options)


# Texts


def test_ids_of_a_folders_tokenizer(models):
    tokenizer = text.tokenizer_of([], Reading(weights={"text": models / "bert"}))
    ids = text.token_ids(["Ann and Bob\tBob", "zoe\tAnn"], tokenizer, 9)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[2, 5, 7, 6, 3, 6, 3, 0, 0], [2, 1, 3, 5, 3, 0, 0, 0, 0]]


def test_the_longer_part_of_a_text_is_cut(models):
    tokenizer = text.tokenizer_of([], Reading(weights={"text": models / "bert"}))
    assert text.token_ids(["ann bob and ann bob\tand"], tokenizer, 7).tolist() == [[2, 5, 6, 7, 3, 7, 3]]
    assert text.token_ids(["ann bob and ann bob"], tokenizer, 5).tolist() == [[2, 5, 6, 7, 3]]


def test_ids_of_clips_tokenizer_are_zero_behind_the_end(models):
    tokenizer = text.tokenizer_of([], Reading(weights={"text": models / "clip"}))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ann, bob, colon = (tokenizer.convert_tokens_to_ids(f"{piece}</w>") for piece in ("ann", "bob", ":"))
    assert end != 0 == text.token_ids(["ann"], tokenizer, 4)[0, -1]
    ids = text.token_ids(["Ann\tBob", "Ann Ann Ann Ann\tBob"], tokenizer, 7)
    assert ids.tolist() == [[begin, bob, colon, ann, end, 0, 0], [begin, bob, colon, ann, ann, ann, end]]


def test_word_pieces_are_those_of_the_training_texts():
    training = ["the cat sat", "the cats sat", "a dog sat"]
    tokenizer = text.tokenizer_of(training, Reading())
    pieces = tokenizer.convert_ids_to_tokens(range(len(text.SPECIAL)))
    assert tuple(pieces) == text.SPECIAL
    ids = text.token_ids(["the sat", "zebra"], tokenizer, 6)
    known = [tokenizer.convert_tokens_to_ids(word) for word in ("[CLS]", "the", "sat", "[SEP]")]
    assert ids[0].tolist() == [*known, 0, 0]
    assert ids[1, 1] == tokenizer.convert_tokens_to_ids("[UNK]"), "z stands in no training text"
    assert max(map(max, ids.tolist())) < len(tokenizer)


def test_word_pieces_have_the_size_of_the_network():
    words = ["".join(letters) for letters in itertools.product("abcdefg", "hijklmn", "opqrstu", "vwxyz")]
    many = [f"{word} {word}" for word in words]
    assert len(text.tokenizer_of(many, small())) <= text.SMALL_PIECES < len(text.tokenizer_of(many, Reading()))


MANY_TIES = [f"{a}{b}{c}{d} {d}{c}{b}{a}" for a in "bcdf" for b in "aeiou" for c in "ghkl" for d in "äöü"] * 2
"""Texts in which many pairs of letters stand side by side equally often: what is joined first is a matter of order."""

ASK = """
import sys
from igm_rs.experiments.columns import Reading
from igm_rs.experiments.on_disk.text import tokenizer_of
print(sorted(tokenizer_of(sys.argv[1:], Reading("small")).get_vocab().items()))
"""


def test_every_process_has_the_same_word_pieces():
    asked = [sys.executable, "-X", "utf8", "-c", ASK, *MANY_TIES]
    told = subprocess.check_output(asked, encoding="utf-8")
    assert told.strip() == str(sorted(text.tokenizer_of(MANY_TIES, small()).get_vocab().items()))


def test_the_environment_is_as_before(monkeypatch):
    for before in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        text.token_ids(["a b"], text.tokenizer_of([f"a b {before}"] * 2, Reading()), 4)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_folders_without_a_tokenizer(tmp_path, models):
    with pytest.raises(FileNotFoundError, match=r"nowhere', which is no folder, expected a pretrained text encoder's"):
        text.tokenizer_of([], Reading(weights={"text": tmp_path / "nowhere"}))
    with pytest.raises(ValueError, match=r"has no tokenizer that can be read, expected a pretrained text encoder's"):
        text.tokenizer_of([], Reading(weights={"text": tmp_path}))
    for path in (models / "bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vocabulary = (tmp_path / "vocab.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(vocabulary)))
    with pytest.raises(ValueError, match=r"pads with id 7, expected 0, as BERT's does, or CLIP's"):
        text.tokenizer_of([], Reading(weights={"text": tmp_path}))


# Clips

TINY = ClipForm(window=10, frames=4, resized=12, size=8)


def shades(path, count=20, grey=True):
    """Write a clip whose shade is 10 times the frame's place, in red only unless grey."""
    frames = np.zeros((count, 12, 12, 3), np.uint8)
    frames[..., : 3 if grey else 1] = 10 * np.arange(count)[:, None, None, None]
    trees.video(path, frames, "FFV1")
    return path


def column(path, shown="depth", window=(3, 13), form=TINY):
    return ClipColumn(Home("nvgesture", path.parent), [Clip(path, *window)], shown, form)


def places(clip):
    """Return which frames of :func:`shades` a clip shows."""
    return ((clip[0, :, 0, 0] + 1) * 127.5 / 10).round().int().tolist()


def test_measured_is_the_whole_window(tmp_path):
    clip = column(shades(tmp_path / "a.avi")).example(0, None)
    assert clip.shape == (1, 10, 8, 8)
    assert clip.dtype == torch.float32
    assert places(clip) == list(range(3, 13))
    assert torch.allclose(clip[0, 4], torch.tensor(70 / 127.5 - 1), atol=NEAREST_STEP)


def test_trained_on_is_any_part_of_the_window(tmp_path):
    from_path = column(shades(tmp_path / "a.avi"))
    starts = set()
    for seed in range(40):
        shown = places(from_path.example(0, seed))
        assert shown == list(range(shown[0], shown[0] + 4))
        starts.add(shown[0])
    assert starts == set(range(3, 10)), (
        "7 beginnings; each of 40 seeds misses one with 6/7: 2 in 100,000 for all but one"
    )


@pytest.mark.parametrize("window", [(15, 25), (15, 30), (15, 20)], ids=["behind the file", "and longer", "short"])
def test_the_last_frame_stands_still(tmp_path, window):
    path = shades(tmp_path / "a.avi")
    assert places(column(path, window=window).example(0, None)) == [15, 16, 17, 18, 19, 19, 19, 19, 19, 19]


def test_longer_windows_are_cut(tmp_path):
    assert places(column(shades(tmp_path / "a.avi"), window=(0, 20)).example(0, None)) == list(range(10))


def test_colours_are_red_green_blue(tmp_path):
    clip = column(shades(tmp_path / "a.avi", grey=False), "colour").example(0, None)
    assert clip.shape == (3, 10, 8, 8)
    assert places(clip) == list(range(3, 13))
    assert torch.allclose(clip[1:], torch.tensor(-1.0), atol=NEAREST_STEP)


def test_crops(tmp_path):
    """Each pixel's shade says where it is: 8 of 12 are cut, from the middle for measuring."""
    frames = np.broadcast_to(10 * np.arange(12, dtype=np.uint8)[None, None, :, None], (20, 12, 12, 3)).copy()
    trees.video(tmp_path / "a.avi", frames, "FFV1")
    of_path = column(tmp_path / "a.avi")

    def left(seed):
        return int(((of_path.example(0, seed)[0, 0, 0, 0] + 1) * 12.75).round())

    assert left(None) == 2
    assert {left(seed) for seed in range(40)} == set(range(5)), "as above: 5 places, missed with 4/5"


def square(step, count=12):
    """Return frames with a textured square that moves by `step` pixels, right and down, a frame."""
    random = np.random.default_rng(0)
    texture = random.integers(60, 255, (16, 16)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    frames = np.zeros((count, 64, 64, 3), np.uint8)
    for place in range(count):
        top, left = 10 + step[1] * place, 10 + step[0] * place
        frames[place, top : top + 32, left : left + 32] = texture[..., None]
    return frames


@pytest.mark.parametrize("step", [(2, 0), (0, 1), (1, 2)])
def test_flow_is_where_a_square_moves(tmp_path, step):
    trees.video(tmp_path / "a.avi", square(step), "FFV1")
    form = ClipForm(window=10, frames=8, resized=64, size=64)
    flow = column(tmp_path / "a.avi", "flow", (0, 10), form).example(0, None)
    assert flow.shape == (2, 10, 64, 64)
    inside = flow[:, 0, 20:34, 20:34].mean((1, 2)) * FLOW_LIMIT
    assert torch.allclose(inside, torch.tensor(step, dtype=torch.float32), atol=0.2), "a tenth of two pixels"
    assert flow[:, 0, :4, -4:].abs().max() * FLOW_LIMIT < 0.2, "nothing moves far from the square"
    assert torch.equal(flow[:, -1], flow[:, -2])


def test_flow_that_is_too_much_is_cut(monkeypatch):
    frames = square((2, 0))
    whole = clips.optical_flow(frames)
    assert whole.max() > 1.5
    monkeypatch.setattr(clips, "FLOW_LIMIT", 1.5)
    assert np.array_equal(clips.optical_flow(frames), whole.clip(-1.5, 1.5))


def test_flow_of_one_frame_is_none():
    assert not clips.optical_flow(square((1, 0), 1)).any()


def test_a_seed_cuts_colour_depth_and_flow_alike(tmp_path):
    random = np.random.default_rng(0)
    grey = random.integers(0, 255, (20, 12, 12, 1), dtype=np.uint8).repeat(3, 3)
    trees.video(tmp_path / "a.avi", grey, "FFV1")
    for seed in (None, 1, 2):
        colour, depth, flow = (column(tmp_path / "a.avi", shown).example(0, seed) for shown in CHANNELS)
        # a shade of grey by way of three colours may be rounded once more
        assert torch.allclose(colour.mean(0), depth[0], atol=2 * NEAREST_STEP)
        pixels = ((colour.permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        assert np.allclose(clips.optical_flow(pixels) / FLOW_LIMIT, flow.permute(1, 2, 3, 0))


def test_seeds_of_clips(root):
    loaded = NVGESTURE.load(root / "nvgesture", small())
    for modality, values in loaded.train.inputs.items():
        first = values.example(3, 5)
        assert first.shape == (
            CHANNELS[{"rgb": "colour"}.get(modality, modality)],
            SMALL.frames,
            SMALL.size,
            SMALL.size,
        )
        assert torch.equal(first, values.example(3, 5))
        assert any(not torch.equal(first, values.example(3, seed)) for seed in range(6, 10))
        assert torch.equal(values.example(3, None), values.example(3, None))


class Examples(Dataset):
    """What a loader's processes are asked for."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return 4

    def __getitem__(self, place):
        return self.values.example(place, 100 + place)


@SETS
def test_processes_decode_alike(root, on_disk):
    """And torch's own generator is where it was."""
    loaded = on_disk.load(root / on_disk.name, small())
    before = torch.get_rng_state()
    for values in loaded.train.inputs.values():
        if isinstance(values, torch.Tensor):
            continue
        alone = torch.stack([values.example(place, 100 + place) for place in range(4)])
        assert torch.equal(pickle.loads(pickle.dumps(values)).example(1, 101), alone[1])
        assert torch.equal(torch.get_rng_state(), before)
        (beside,) = DataLoader(Examples(values), batch_size=4, num_workers=2)
        torch.set_rng_state(before)  # the loader draws its processes' seeds
        assert torch.equal(alone, beside)


def test_clips_that_cannot_be_decoded(tmp_path):
    path = shades(tmp_path / "a.avi")
    told = rf"a\.avi: it cannot be decoded \(.*\); igm-rs data check nvgesture {tmp_path} finds all such files"
    with pytest.raises(DataFault, match=told.replace(r"\(.*\)", r"\(it has no frame 30, where its window begins\)")):
        column(path, window=(30, 40)).example(0, None)
    path.write_bytes(path.read_bytes()[:12] + bytes(500))
    with pytest.raises(DataFault, match=told):
        column(path).example(0, None)


def test_metadata_that_is_no_text_does_not_matter(tmp_path):
    path = shades(tmp_path / "a.avi")
    content = path.read_bytes()
    at = content.index(b"ISFT") + 8
    path.write_bytes(content[:at] + b"\xe9" + content[at + 1 :])
    assert places(column(path).example(0, None)) == list(range(3, 13))


def test_a_folder_whose_name_looks_like_a_protocol(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    shades(tmp_path / "a:b" / "a.avi")
    monkeypatch.chdir(tmp_path)
    assert places(column(Path("a:b/a.avi")).example(0, None)) == list(range(3, 13))


def test_digest_of_clips(tmp_path):
    path = shades(tmp_path / "a.avi")
    size = path.stat().st_size
    head, line = column(path).digest_lines()
    assert head == f"depth {TINY}"
    assert re.fullmatch(rf"a\.avi {size} [0-9a-f]{{12}} 3 13", line)
    assert next(iter(column(path, "flow").digest_lines())) == f"flow {TINY} {clips.FARNEBACK}"


def test_sizes_of_the_released_scripts():
    assert ClipForm(window=80, frames=64, resized=256, size=224) == FULL


# Sets


def test_twitter2015(root):
    folder = root / "twitter2015"
    loaded = data.load("twitter2015", folder, small())
    assert loaded.sizes == {"train": 12, "validation": 6, "test": 6}
    assert loaded.modalities == ("text", "image")
    assert loaded.class_names == ("negative", "neutral", "positive")
    assert loaded.train.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert loaded.train.origins.unique(return_counts=True)[1].tolist() == [2] * 6, "two targets a picture"
    survey = TWITTER2015.survey(folder, small(), Faults(skip=False))
    first, second = survey.examples["train"][:2]
    assert first.text == 'RT @ x : Ann and Bob are awful " today # n1\tAnn'
    assert second.text == 'RT @ x : Ann and Bob are awful " today # n1\tBob'
    assert first.listed == (folder / "annotations" / "train_data.tsv", 2)
    assert loaded.train.inputs["text"].shape == (12, text.SMALL_LENGTH)
    assert loaded.vocabulary["text"] > loaded.train.inputs["text"].max()


def test_the_ids_are_those_of_the_text(root):
    reading = small()
    survey = TWITTER2015.survey(root / "twitter2015", reading, Faults(skip=False))
    training = [example.text for example in survey.examples["train"]]
    tokenizer = text.tokenizer_of(training, reading)
    loaded = TWITTER2015.load(root / "twitter2015", reading)
    ids = loaded.validation.inputs["text"][0].tolist()
    assert tokenizer.decode(ids).startswith("[CLS] rt @ x : ann and bob")
    assert ids == text.token_ids([survey.examples["validation"][0].text], tokenizer, text.SMALL_LENGTH)[0].tolist()


def test_pictures_are_measured_whole(root):
    loaded = SARCASM.load(root / "sarcasm", small())
    decoded = loaded.train.inputs["image"][[0]][0]
    with Image.open(root / "sarcasm" / "images" / "1.jpg") as shown:
        resized = np.asarray(shown.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    mean, deviation = (np.array(numbers, np.float32) for numbers in CLIP)
    assert np.allclose(decoded.permute(1, 2, 0).numpy(), (resized - mean) / deviation, atol=1e-5)  # float32's rounding


def test_sarcasm(root):
    loaded = data.load("sarcasm", root / "sarcasm", small())
    assert loaded.sizes == {"train": 8, "validation": 4, "test": 4}
    assert loaded.train.labels.tolist() == [0, 1] * 4
    survey = SARCASM.survey(root / "sarcasm", small(), Faults(skip=False))
    third = survey.examples["train"][2]
    assert third.text == 'what a "honest" day no 3'
    assert third.listed[1] == 5, "the first text has two lines"
    assert third.files["image"] == (root / "sarcasm" / "images" / "3.jpg",)


def test_sarcasm_takes_columns_in_any_order(root, tmp_path):
    trees.sarcasm(tmp_path)
    path = tmp_path / "annotations" / "train_data.csv"
    path.write_text("﻿,label,image,text\n" + "".join(f"{n - 1},{n % 2},{n}.jpg,day {n}\n" for n in range(1, 9)))
    survey = SARCASM.survey(tmp_path, small(), Faults(skip=False))
    assert [(example.name, example.label) for example in survey.examples["train"]][:2] == [("1.jpg", 1), ("2.jpg", 0)]


def test_nvgesture(root):
    loaded = data.load("nvgesture", root / "nvgesture", small())
    assert loaded.sizes == {"train": 50, "validation": 25, "test": 25}
    assert loaded.modalities == ("rgb", "flow", "depth")
    assert loaded.classes == 25
    assert loaded.train.labels.tolist() == list(range(25)) * 2
    assert len(loaded.train.origins.unique()) == 2, "subjects"
    shapes = {name: values.shape for name, values in loaded.validation.inputs.items()}
    assert shapes == {"rgb": (25, 3, 10, 32, 32), "flow": (25, 2, 10, 32, 32), "depth": (25, 1, 10, 32, 32)}
    for name, values in loaded.validation.inputs.items():
        assert values[[0, 1]].shape == (2, *shapes[name][1:])
        assert values[[0, 1]].abs().max() <= 1


def test_nvgesture_reads_the_window_of_each_sensor(root, tmp_path):
    copied(root, NVGESTURE, tmp_path)
    path = tmp_path / "nvgesture_train_correct_v2.lst"
    trees.change(path, 1, b"color:sk_color:2:12", b"color:sk_color:3:9")
    (first, *_) = NVGESTURE.survey(tmp_path, small(), Faults(skip=False)).examples["train"]
    assert first.windows == {"rgb": (3, 9), "flow": (3, 9), "depth": (2, 12)}
    assert first.files["flow"] == (tmp_path / "Video_data" / "class_01" / "subject1_r1" / "sk_color.avi",)


@SETS
def test_encoders_take_what_is_read(root, on_disk):
    loaded = on_disk.load(root / on_disk.name, small())
    for modality, spec in loaded.encoders.items():
        features = spec.make()(loaded.train.inputs[modality][[0, 1]])
        assert features.shape == (2, spec.width)
        assert torch.isfinite(features).all()


def test_flow_and_depth_have_encoders_of_their_channels():
    specs = NVGESTURE.encoders(Reading(), NVGESTURE.survey)
    with torch.device("meta"):
        channels = [specs[name].make().Conv3d_1a_7x7.conv3d.weight.shape[1] for name in NVGESTURE.modalities]
    assert channels == [3, 2, 1]
    assert {spec.width for spec in specs.values()} == {1024}


def test_bert_from_a_folder_narrows_the_image(root, models):
    loaded = TWITTER2015.load(root / "twitter2015", small(weights={"text": models / "bert"}))
    text_spec, image = loaded.encoders["text"], loaded.encoders["image"]
    assert (text_spec.width, image.narrowed) == (16, 16)
    assert loaded.vocabulary == {"text": 8}


@pytest.mark.parametrize("network", ["pretrained", "frozen"])
def test_clip_from_a_folder(root, models, network):
    reading = Reading(network, weights=dict.fromkeys(("text", "image"), models / "clip"))
    loaded = data.load("sarcasm", root / "sarcasm", reading)
    assert loaded.train.inputs["text"].shape == (8, text.LENGTH)
    assert loaded.train.inputs["image"].shape == (8, 3, 32, 32), "of CLIP's configuration"
    for modality, spec in loaded.encoders.items():
        assert spec.digest
        assert spec.make()(loaded.train.inputs[modality][[0, 1]]).shape == (2, 24)


def test_clip_needs_weights(root, models):
    told = r"network is 'pretrained' without weights of {}, expected --weights text=DIR image=DIR, folders of a CLIP"
    for given, missing in (({}, "text and image"), ({"text": models / "clip"}, "image")):
        with pytest.raises(ValueError, match=told.format(missing)):
            SARCASM.load(root / "sarcasm", Reading("pretrained", weights=given))
    with pytest.raises(ValueError, match=r"model_type 'bert', expected 'clip'"):
        SARCASM.load(root / "sarcasm", Reading("frozen", weights={"text": models / "clip", "image": models / "bert"}))


@pytest.mark.parametrize("network", ["pretrained", "frozen"])
def test_nvgesture_has_no_other_networks(root, network):
    with pytest.raises(ValueError, match=rf"network is '{network}', expected one of default, small for nvgesture"):
        data.load("nvgesture", root / "nvgesture", Reading(network))


# Broken trees

TSV, CSV, LST = "annotations/train_data.tsv", "annotations/train_data.csv", "nvgesture_train_correct_v2.lst"
AVI = "Video_data/class_03/subject1_r1/sk_{}.avi"


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced(name, line, old, new):
    """Return what puts other text into a list's line."""
    return lambda folder: trees.change(folder / name, line, old, new)


def repeated(name, line, other):
    """Return what copies a list's line to the end of another one, or of the same."""

    def change(folder):
        lines = (folder / name).read_bytes().split(b"\n")
        with (folder / other).open("ab") as file:
            file.write(lines[line - 1] + b"\n")

    return change


def hollow(path):
    """Make an AVI end after its header, sizes and all: no frame is left."""
    content = path.read_bytes()
    head = content[: content.index(b"movi") + 4]
    start = head.rindex(b"LIST")
    whole = head[: start + 4] + (4).to_bytes(4, "little") + b"movi"
    path.write_bytes(b"RIFF" + (len(whole) - 8).to_bytes(4, "little") + whole[8:])


BROKEN = {
    "tweet's picture missing": (
        TWITTER2015, lambda at: (at / "twitter2015_images" / "2.jpg").unlink(), "missing", 2, TSV, 4,
        r"file .*2\.jpg does not exist",
    ),
    "tweet's picture cut off": (
        TWITTER2015, lambda at: halved(at / "twitter2015_images" / "2.jpg"), "truncated", 2, TSV, 4,
        r"2\.jpg: its end is missing",
    ),
    "tweet's label out of range": (
        TWITTER2015, replaced(TSV, 4, b"\t1\t2.jpg", b"\t3\t2.jpg"), "label", 1, TSV, 4,
        r"label is '3', expected 0 \(negative\), 1 \(neutral\), 2 \(positive\)",
    ),
    "tweet's label no number": (
        TWITTER2015, replaced(TSV, 4, b"\t1\t2.jpg", b"\t-1\t2.jpg"), "label", 1, TSV, 4, r"label is '-1', expected 0",
    ),
    "tweet listed twice": (
        TWITTER2015, repeated(TSV, 4, TSV), "duplicate", 1, TSV, 14,
        r"2\.jpg with target 'Ann' at letter 10 is listed twice, first in .*train_data\.tsv, line 4",
    ),
    "tweet in two splits": (
        TWITTER2015, repeated("annotations/test_data.tsv", 2, TSV), "duplicate", 1, TSV, 14,
        r"is listed twice, first in .*test_data\.tsv, line 2",
    ),
    "tweet's picture in two splits": (
        TWITTER2015, replaced(TSV, 4, b"\t2.jpg\tRT @ x", b"\t12.jpg\tRT"), "speaker", 1, TSV, 4,
        r"picture 12\.jpg is in the test split too, .*test_data\.tsv, line 6",
    ),
    "tweet no UTF-8": (
        TWITTER2015, replaced(TSV, 4, b"RT", b"R\xff"), "encoding", 1, TSV, 4, r"byte \d+ is 0xff, which is no UTF-8",
    ),
    "tweet without a field": (
        TWITTER2015, replaced(TSV, 4, b"\tAnn", b""), "line", 1, TSV, 4, r"it has 4 fields, expected 5 fields",
    ),
    "tweet without a target": (
        TWITTER2015, replaced(TSV, 4, b"$T$", b"Ann"), "line", 1, TSV, 4,
        r"its tweet is 'RT .*' and its target 'Ann', expected \$T\$ in the tweet",
    ),
    "tweet without a picture's name": (
        TWITTER2015, replaced(TSV, 4, b"2.jpg", b"2"), "line", 1, TSV, 4,
        r"its picture is '2', expected a file's name that ends in \.jpg",
    ),
    "sarcasm's picture missing": (
        SARCASM, lambda at: (at / "images" / "2.jpg").unlink(), "missing", 1, CSV, 4, r"file .*2\.jpg does not exist",
    ),
    "sarcasm's picture cut off": (
        SARCASM, lambda at: halved(at / "images" / "2.jpg"), "truncated", 1, CSV, 4, r"2\.jpg: its end is missing",
    ),
    "sarcasm's label out of range": (
        SARCASM, replaced(CSV, 4, b",1", b",2"), "label", 1, CSV, 4,
        r"label is '2', expected 0 \(not sarcastic\), 1 \(sarcastic\)",
    ),
    "sarcasm listed twice": (
        SARCASM, replaced(CSV, 4, b"/2.jpg", b"/1.jpg"), "duplicate", 1, CSV, 4, r"1\.jpg is listed twice",
    ),
    "sarcasm in two splits": (
        SARCASM, replaced(CSV, 4, b"/2.jpg", b"/16.jpg"), "duplicate", 1, CSV, 4,
        r"16\.jpg is listed twice, first in .*test_data\.csv, line 7",
    ),
    "sarcasm no UTF-8": (
        SARCASM, replaced(CSV, 4, b"day", b"d\xe4y"), "encoding", 1, CSV, 4, r"byte \d+ is 0xe4, which is no UTF-8",
    ),
    "sarcasm no UTF-8 within quotes": (
        SARCASM, replaced(CSV, 3, b"day", b"d\xe4y"), "encoding", 1, CSV, 3, r"byte 2 is 0xe4, which is no UTF-8",
    ),
    "sarcasm without a text": (
        SARCASM, replaced(CSV, 4, b'"what a ""brilliant, of course"" day no 2"', b'" "'), "line", 1, CSV, 4,
        r"its text is empty, expected a tweet",
    ),
    "gesture's video missing": (
        NVGESTURE, lambda at: (at / AVI.format("depth")).unlink(), "missing", 1, LST, 3,
        r"file .*sk_depth\.avi does not exist",
    ),
    "gesture's video cut off": (
        NVGESTURE, lambda at: halved(at / AVI.format("color")), "truncated", 1, LST, 3,
        r"sk_color\.avi: its header says",
    ),
    "gesture's video empty": (
        NVGESTURE, lambda at: hollow(at / AVI.format("color")), "empty", 1, LST, 3, r"sk_color\.avi: it has no frame",
    ),
    "gesture's window behind the video": (
        NVGESTURE, replaced(LST, 3, b"color:sk_color:2:12", b"color:sk_color:14:24"), "empty", 1, LST, 3,
        r"sk_color\.avi: it has 14 frames, the window begins behind them, at 14",
    ),
    "gesture's window turned round": (
        NVGESTURE, replaced(LST, 3, b"depth:sk_depth:2:12", b"depth:sk_depth:12:2"), "line", 1, LST, 3,
        r"the window of depth ends before it begins, expected FIRST < END",
    ),
    "gesture's label out of range": (
        NVGESTURE, replaced(LST, 3, b"label:3", b"label:26"), "label", 1, LST, 3, r"label is '26', expected 1 to 25",
    ),
    "gesture's label 0": (
        NVGESTURE, replaced(LST, 3, b"label:3", b"label:0"), "label", 1, LST, 3, r"label is '0', expected 1 to 25",
    ),
    "gesture listed twice": (
        NVGESTURE, repeated(LST, 3, LST), "duplicate", 1, LST, 51,
        r"class_03/subject1_r1 is listed twice, first in .*train_correct_v2\.lst, line 3",
    ),
    "gesture's subject in two splits": (
        NVGESTURE, lambda at: (
            (at / "Video_data/class_03/subject1_r1").rename(at / "Video_data/class_03/subject4_r1"),
            trees.change(at / LST, 3, b"subject1_r1", b"subject4_r1"),
        ),
        "speaker", 1, LST, 3, r"subject subject4 is in the test split too, .*test_correct_v2\.lst, line 1",
    ),
    "gesture no UTF-8": (
        NVGESTURE, replaced(LST, 3, b"sk_color", b"sk_\xffolor"), "encoding", 1, LST, 3, r"0xff, which is no UTF-8",
    ),
    "gesture without a sensor": (
        NVGESTURE, replaced(LST, 3, b"depth:sk_depth:2:12 ", b""), "line", 1, LST, 3,
        r"it has no depth:FILE:FIRST:END, expected path:.* with spaces between",
    ),
    "gesture elsewhere": (
        NVGESTURE, replaced(LST, 3, b"./Video_data/", b"../other/"), "line", 1, LST, 3,
        r"it has no path:\./Video_data/class_XX/subjectN_rM, expected",
    ),
}  # fmt: skip
"""By name: set, what breaks its tree, kind and number of faults, list and line that are told first, and the reason."""


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_trees_are_told(root, tmp_path, case):
    on_disk, break_it, kind, count, name, line, reason = BROKEN[case]
    copied(root, on_disk, tmp_path)
    break_it(tmp_path)
    with pytest.raises(DataFault) as told:
        on_disk.load(tmp_path, small())
    place = re.escape(f"{tmp_path / name}, line {line}: ")
    assert re.match(rf"{place}.*{reason}", str(told.value)), told.value
    assert ("; --skip-broken leaves such examples out" in str(told.value)) == (kind != "speaker")
    faults = Faults(skip=True)
    survey = on_disk.survey(tmp_path, small(skip_broken=True), faults)
    assert faults.counts == {kind: count}
    assert (faults.found[0].path, faults.found[0].line) == (tmp_path / name, line)
    kept = on_disk.survey(root / on_disk.name, small(), Faults(skip=False)).examples
    added = case.endswith(("twice", "two splits")) and line > len(kept["train"])
    assert len(survey.examples["train"]) == len(kept["train"]) - (0 if added else count)
    assert all(len(survey.examples[part]) == len(kept[part]) for part in ("validation", "test"))


def test_what_is_left_out_is_counted(tmp_path):
    trees.twitter2015(tmp_path)
    (tmp_path / "twitter2015_images" / "2.jpg").unlink()
    trees.change(tmp_path / TSV, 2, b"\t0\t", b"\t9\t")
    loaded = data.load("twitter2015", tmp_path, small(skip_broken=True))
    assert loaded.sizes["train"] == 9
    assert loaded.left_out == "1 labels out of range, 2 missing files"


def test_origins_in_two_splits_may_be_allowed(root, tmp_path):
    on_disk, break_it, *_ = BROKEN["gesture's subject in two splits"]
    copied(root, on_disk, tmp_path)
    break_it(tmp_path)
    assert on_disk.load(tmp_path, small(speakers="shared")).sizes == {"train": 50, "validation": 25, "test": 25}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("on_disk", "name", "old", "new", "told"),
    [
        (TWITTER2015, TSV, b"\t", b",", r"line 1: no line of the list has a tab, found a comma; expected 5 fields"),
        (SARCASM, CSV, b",", b";", r"line 1: .*comma"),
        (
            NVGESTURE,
            LST,
            b" ",
            b",",
            r"line 1: no line of the list has a space, found 'path:\./Video_data/.*; expected",
        ),
        (
            TWITTER2015,
            TSV,
            b"#2 ImageID",
            b"picture",
            r"line 1: the columns are index, .*, expected index, Label, Image",
        ),
        (
            SARCASM,
            CSV,
            b"label",
            b"class",
            r"line 1: the columns are 'image', 'text', 'class', expected image, text",
        ),
    ],
    ids=["tweets", "sarcasm", "gestures", "tweets' header", "sarcasm's header"],
)
def test_lists_of_another_form(root, tmp_path, skip, on_disk, name, old, new, told):
    copied(root, on_disk, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DataFault, match=re.escape(f"{path}, ") + told):
        on_disk.load(tmp_path, small(skip_broken=skip))


@pytest.mark.parametrize("skip", [False, True])
def test_the_published_test_list_of_tweets_has_a_header_of_its_own(root, tmp_path, skip):
    copied(root, TWITTER2015, tmp_path)
    path = tmp_path / "annotations" / "test_data.tsv"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(["index\t#1 ImageID\t#2 String\t#2 String", *lines[1:]]))
    loaded = TWITTER2015.load(tmp_path, small(skip_broken=skip))
    assert loaded.sizes == {"train": 12, "validation": 6, "test": 6}
    assert loaded.left_out == ""
    assert loaded.open_test().labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("skip", [False, True])
def test_a_list_of_tweets_in_utf_16_is_told_of_at_its_first_line(root, tmp_path, skip):
    copied(root, TWITTER2015, tmp_path)
    path = tmp_path / TSV
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(DataFault, match=r"train_data\.tsv, line 1: the columns are "):
        TWITTER2015.load(tmp_path, small(skip_broken=skip))


@pytest.mark.parametrize(
    ("on_disk", "name", "old", "new", "told"),
    [
        (TWITTER2015, TSV, b"\t1\t2.jpg", b"\t" + b"1" * 5000 + b"\t2.jpg", "line 4: label is '1111"),
        (NVGESTURE, LST, b"color:sk_color:2:12", b"color:sk_color:2:" + b"1" * 5000, "line 1: it has no color:FILE"),
    ],
    ids=["label", "frame"],
)
def test_numbers_without_end(root, tmp_path, on_disk, name, old, new, told):
    copied(root, on_disk, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DataFault, match=re.escape(f"{path}, ") + told):
        on_disk.load(tmp_path, small())


# Sarcasm's lists as the authors' scripts read them


JSON = "annotations/train_data.json"


@pytest.fixture
def in_json(root, tmp_path):
    """Sarcasm with lists in JSON."""
    copied(root, SARCASM, tmp_path)
    for part in trees.PARTS.values():
        path = tmp_path / "annotations" / f"{part}_data.csv"
        with path.open(encoding="utf-8", newline="") as file:
            found = [{**record, "label": int(record["label"])} for record in csv.DictReader(file)]
        path.with_suffix(".json").write_text(json.dumps(found))
        path.unlink()
    return tmp_path


def edited_json(folder, change):
    path = folder / JSON
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_lists_in_json_are_those_in_csv(root, in_json):
    one, other = SARCASM.load(root / "sarcasm", small()), SARCASM.load(in_json, small())
    assert one.sizes == other.sizes
    for part in ("train", "validation"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.inputs["text"], theirs.inputs["text"])
        assert torch.equal(mine.inputs["image"][[1]], theirs.inputs["image"][[1]])


@pytest.mark.parametrize(
    ("change", "kind", "entry", "told"),
    [
        (lambda found: found[2].update(label=7), "label", 3, "label is '7', expected 0"),
        (lambda found: found[2].pop("text"), "line", 3, "it has not each of image, text, label as text or an integer"),
        (lambda found: found[2].update(label=[1]), "line", 3, "it has not each of image, text, label"),
        (lambda found: found.__setitem__(2, "a tweet"), "line", 3, "it has not each of image, text, label"),
        (lambda found: found[2].update(image="images/1.jpg"), "duplicate", 3, r"1\.jpg is listed twice, .*, entry 1"),
        (
            lambda found: found[2].update(text="half \ud83d"),
            "encoding",
            3,
            "it has half a letter of two, which is no UTF-8",
        ),
        (lambda found: found[2].update(image="images/99.jpg"), "missing", 3, r"file .*99\.jpg does not exist"),
    ],
    ids=["label", "no text", "label a list", "no entry", "twice", "half a letter", "missing"],
)
def test_broken_lists_in_json(in_json, change, kind, entry, told):
    edited_json(in_json, change)
    with pytest.raises(DataFault, match=re.escape(f"{in_json / JSON}, entry {entry}: ") + told):
        SARCASM.load(in_json, small())
    faults = Faults(skip=True)
    assert len(SARCASM.survey(in_json, small(skip_broken=True), faults).examples["train"]) == 7
    assert faults.counts == {kind: 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[{", r"train_data\.json: it is no JSON that can be read \("),
        (b'["\xff"]', r"train_data\.json: byte 3 is no UTF-8; save the list as UTF-8$"),
        (b'{"image": 1}', r"train_data\.json: it holds a dict, expected a list of entries with image, text, label$"),
        (b"[]", r"train_data\.json: it holds an empty list, expected a list of entries"),
        ("[]".encode("utf-16"), r"train_data\.json: byte 1 is no UTF-8; save the list as UTF-8$"),
        (b"[" * 100_000, r"train_data\.json: it is no JSON that can be read \("),
    ],
    ids=["cut off", "no UTF-8", "no list", "empty", "UTF-16", "deep"],
)
def test_files_that_are_no_list_in_json(in_json, content, told):
    (in_json / JSON).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataFault, match=told):
            SARCASM.load(in_json, small(skip_broken=skip))


def test_lines_of_gestures_may_end_as_they_did_on_old_machines(root, tmp_path):
    copied(root, NVGESTURE, tmp_path)
    path = tmp_path / LST
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert NVGESTURE.load(tmp_path, small()).sizes["train"] == 50


def test_lines_of_sarcasm_that_end_so_are_told_of(root, tmp_path):
    copied(root, SARCASM, tmp_path)
    path = tmp_path / CSV
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r").replace(b"\n", b" "))
    with pytest.raises(DataFault, match=r"line 1: its quotes or ends of lines are not those of a CSV file \("):
        SARCASM.load(tmp_path, small())


def test_an_empty_list_of_gestures(root, tmp_path):
    copied(root, NVGESTURE, tmp_path)
    (tmp_path / LST).write_text("\n")
    with pytest.raises(DataFault, match=r"line 1: no line of the list has a space, found nothing; expected path:"):
        NVGESTURE.load(tmp_path, small())


@SETS
def test_missing_lists_and_folders(root, tmp_path, on_disk):
    with pytest.raises(FileNotFoundError, match=rf"nowhere does not exist, expected one of {on_disk.name}:\n"):
        on_disk.load(tmp_path / "nowhere", small())
    copied(root, on_disk, tmp_path)
    (valid,) = tmp_path.glob("**/*valid*")
    valid.unlink()
    with pytest.raises(FileNotFoundError) as told:
        on_disk.load(tmp_path, small())
    assert f"list {valid} does not exist" in str(told.value)
    assert on_disk.layout in str(told.value)


@SETS
def test_splits_without_an_example(root, tmp_path, on_disk):
    copied(root, on_disk, tmp_path)
    folder = "Video_data" if on_disk is NVGESTURE else on_disk.layout.split("\n")[-1].partition("/")[0]
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(DataFault, match=r"has no example for the train split \(\d+ missing files\)"):
        on_disk.load(tmp_path, small(skip_broken=True))
