"""Lists and files, CREMA-D and Kinetics-Sounds: what is read, what a seed draws, and what is told when broken."""

import math
import pickle
import shutil
import struct

import cv2
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import trees_a as trees
from PIL import Image

from igm_rs.experiments.columns import Reading
from igm_rs.experiments.feeding import Means, feed
from igm_rs.experiments.on_disk.audio import LOG_OFFSET, Sound, SpectrogramColumn
from igm_rs.experiments.on_disk.crema_d import CREMA_D, SOUND
from igm_rs.experiments.on_disk.faults import DataFault, Faults
from igm_rs.experiments.on_disk.kinetics_sounds import KINETICS_SOUNDS
from igm_rs.experiments.on_disk.kinetics_sounds import LABELS as ACTIONS
from igm_rs.experiments.on_disk.kinetics_sounds import SOUND as LONG_SOUND
from igm_rs.experiments.on_disk.lists import rows, table
from igm_rs.experiments.on_disk.media import Home, clip_pictures, file_trouble
from igm_rs.experiments.on_disk.pictures import (
    CLIP,
    IMAGENET,
    FramesColumn,
    Look,
    PictureColumn,
    frame_places,
    picture,
)

SMALL = Reading("small")
SKIPPING = Reading("small", skip_broken=True)


@pytest.fixture(scope="module")
def crema_tree(tmp_path_factory):
    return trees.write_crema(tmp_path_factory.mktemp("crema"))


@pytest.fixture(scope="module")
def kinetics_tree(tmp_path_factory):
    return trees.write_kinetics(tmp_path_factory.mktemp("kinetics"))


@pytest.fixture
def crema(crema_tree, tmp_path):
    """Return a copy that a test may break."""
    return shutil.copytree(crema_tree, tmp_path / "crema")


@pytest.fixture
def kinetics(kinetics_tree, tmp_path):
    return shutil.copytree(kinetics_tree, tmp_path / "kinetics")


@pytest.fixture
def home(tmp_path):
    return Home("crema-d", tmp_path)


# Lists


def listing(tmp_path, content, *, skip=False, delimiter=",", fields=("a", "b"), quoted=True):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    faults = Faults(skip)
    return list(rows(path, delimiter, fields, faults, quoted=quoted)), faults


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"x,1\ny,2\n", [(1, ["x", "1"]), (2, ["y", "2"])]),
        (b"x,1\r\ny,2", [(1, ["x", "1"]), (2, ["y", "2"])]),
        (b"\xef\xbb\xbfx,1\n", [(1, ["x", "1"])]),
        (b"x,1\n\n  ,\ny,2\n", [(1, ["x", "1"]), (3, ["  ", ""]), (4, ["y", "2"])]),
        (b'"x, ""X""\nand more",1\ny,2\n', [(1, ['x, "X"\nand more', "1"]), (3, ["y", "2"])]),
        ("ä,€\n".encode(), [(1, ["ä", "€"])]),
    ],
    ids=["plain", "crlf", "bom", "blank lines", "quotes", "letters"],
)
def test_a_list_is_read_with_its_lines(tmp_path, content, expected):
    found, faults = listing(tmp_path, content)
    assert found == expected
    assert not faults.found


def test_without_quotes_a_quote_is_a_letter(tmp_path):
    found, _ = listing(tmp_path, b'"x\t1\r\ny"\t2\n', delimiter="\t", quoted=False)
    assert found == [(1, ['"x', "1"]), (2, ['y"', "2"])]


BAD_LINES = [
    (b"x,1\ny\nz,3\n", 2, "line", "it has 1 fields, expected 2 fields, a, b, by comma"),
    (b"x,1\ny,2,3\nz,3\n", 2, "line", "it has 3 fields, expected 2 fields"),
    (b"x,1\n\xe4,2\nz,3\n", 2, "encoding", "byte 1 is 0xe4, which is no UTF-8; save the list as UTF-8"),
    (b"x,1\ny,\x00\nz,3\n", 2, "encoding", "it holds a zero byte, expected text in UTF-8"),
    (b'x,1\n"y"2,2\nz,3\n', 2, "line", "its quotes are not those of a CSV file"),
    (b'x,1\n"y\n\xff",2\nz,3\n', 3, "encoding", "byte 1 is 0xff"),
]


@pytest.mark.parametrize(("content", "line", "kind", "reason"), BAD_LINES)
def test_a_bad_line_is_told_or_left_out(tmp_path, content, line, kind, reason):
    with pytest.raises(DataFault) as told:
        listing(tmp_path, content)
    assert str(told.value).startswith(f"{tmp_path / 'list.csv'}, line {line}: {reason}")
    assert "--skip-broken" in str(told.value)
    found, faults = listing(tmp_path, content, skip=True)
    assert [record[0] for _, record in found] == ["x", "z"]
    assert [(fault.kind, fault.line) for fault in faults.found] == [(kind, line)]


def test_without_quotes_a_line_that_is_no_text_is_left_out_alone(tmp_path):
    found, faults = listing(tmp_path, b"x\t1\n\xff\t2\nz\t3\n", skip=True, delimiter="\t", quoted=False)
    assert found == [(1, ["x", "1"]), (3, ["z", "3"])]
    assert faults.counts == {"encoding": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the list is empty, expected 2 fields, a, b, separated by comma"),
        (b"\n \n", "the list is empty"),
        (
            b"x;1\ny;2\n",
            "no line of the list has a comma, found a semicolon; expected 2 fields, a, b, separated by comma",
        ),
        (b"x\t1\n", "no line of the list has a comma, found a tab"),
        (b"x\n", "no line of the list has a comma, found no separator"),
        (b'"x,1\ny,2\n', "a quote is opened and never closed"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_list_of_another_form_is_always_refused(tmp_path, content, reason, skip):
    with pytest.raises(DataFault) as told:
        listing(tmp_path, content, skip=skip)
    assert str(told.value).startswith(f"{tmp_path / 'list.csv'}, line 1: {reason}")


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfother,b,a\r\n0,1,2\r\n")
    assert list(table(path, ",", ("a", "b"), Faults(skip=False))) == [(2, {"other": "0", "b": "1", "a": "2"})]


def test_a_table_of_one_column_has_a_header_too(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a\nx\n")
    assert list(table(path, ",", ("a",), Faults(skip=False))) == [(2, {"a": "x"})]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,c\n1,2\n", "the columns are 'a', 'c', expected a, b once each among them, separated by comma"),
        ("a,b,a\n1,2,3\n", "the columns are 'a', 'b', 'a', expected"),
        ("a;b\n1;2\n", "no line of the list has a comma, found a semicolon"),
        ("\na,b\n", "the columns are , expected"),
        ("", "the list is empty"),
    ],
)
def test_a_table_with_another_header_is_refused(tmp_path, content, reason):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(DataFault) as told:
        list(table(path, ",", ("a", "b"), Faults(skip=True)))
    assert str(told.value).startswith(f"{path}, line 1: {reason}")


# Files without decoding


def test_whole_files_have_no_trouble(tmp_path):
    trees.write_wav(tmp_path / "a.wav", trees.tone(440))
    trees.write_picture(tmp_path / "a.jpg", (9, 99, 200))
    trees.write_picture(tmp_path / "b.png", (9, 99, 200))
    shutil.copy(tmp_path / "b.png", tmp_path / "c.jpg")  # as pictures of tweets are
    write_avi(tmp_path / "a.avi")
    for path in tmp_path.iterdir():
        assert file_trouble(path) is None


def write_avi(path, frames=5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for number in range(frames):
        writer.write(np.full((24, 32, 3), 40 * number, dtype=np.uint8))
    writer.release()


def with_thumbnail():
    """Return a JPEG with a whole JPEG in a segment before the picture, as cameras make it."""
    inner, outer = trees.jpeg_bytes(16), trees.jpeg_bytes(32)
    return outer[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + outer[2:]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_jpeg_without_its_end_is_truncated(tmp_path, share, progressive):
    path = tmp_path / "a.jpg"
    path.write_bytes(trees.jpeg_bytes(64, progressive=progressive))
    assert file_trouble(path) is None
    trees.cut(path, share)
    kind, reason = file_trouble(path)
    assert kind == "truncated"
    assert reason.startswith(f"file {path}: ")


def test_the_end_of_a_thumbnail_is_not_that_of_the_picture(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(with_thumbnail())
    assert file_trouble(path) is None
    trees.cut(path, 0.7)
    assert b"\xff\xd9" in path.read_bytes()
    assert file_trouble(path) == ("truncated", f"file {path}: its end is missing: it has no end-of-image marker")


def test_bytes_behind_a_jpeg_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(trees.jpeg_bytes() + bytes(10_000))
    assert file_trouble(path) is None


def wav_of_unknown_size():
    head = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    return head + b"data\xff\xff\xff\xff" + bytes(100)


def test_a_wav_whose_writer_did_not_know_its_size_is_whole(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_of_unknown_size())
    assert file_trouble(path) is None
    path.write_bytes(wav_of_unknown_size()[:-100])
    assert file_trouble(path) == ("empty", f"file {path}: it has no sample")


FILES = {
    "wav": lambda path: trees.write_wav(path, trees.tone(440)),
    "png": lambda path: trees.write_picture(path, (9, 99, 200)),
    "avi": write_avi,
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_cut_file_is_truncated(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    FILES[kind](path)
    trees.cut(path, share)
    assert file_trouble(path)[0] == "truncated"


@pytest.mark.parametrize("kind", ["wav", "jpg", "png", "avi"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_of_another_kind_is_told(tmp_path, kind, content):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    kind, reason = file_trouble(path)
    assert kind == "truncated"
    assert ("it has no byte" if not content else "it begins with '<html>no', expected") in reason


def test_clips_without_content_are_empty_and_absent_files_missing(tmp_path):
    trees.write_empty_wav(tmp_path / "a.wav")
    assert file_trouble(tmp_path / "a.wav") == ("empty", f"file {tmp_path / 'a.wav'}: it has no sample")
    assert file_trouble(tmp_path / "b.avi") == ("missing", f"file {tmp_path / 'b.avi'} does not exist")


def test_an_avi_of_sound_alone_has_no_frame(tmp_path):
    """Written by hand: a list of chunks in which there is sound and an empty frame."""
    chunks = b"01wb" + struct.pack("<I", 4) + bytes(4) + b"00dc" + struct.pack("<I", 0)
    movi = b"LIST" + struct.pack("<I", 4 + len(chunks)) + b"movi" + chunks
    path = tmp_path / "a.avi"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(movi)) + b"AVI " + movi)
    assert file_trouble(path) == ("empty", f"file {path}: it has no frame")
    path.write_bytes(path.read_bytes().replace(b"01wb", b"00db"))
    assert file_trouble(path) is None


def test_pictures_of_a_clip_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f_10.jpg", "f_2.JPG", "f_1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in clip_pictures(tmp_path)] == ["f_1.png", "f_2.JPG", "f_10.jpg"]
    assert clip_pictures(tmp_path / "nowhere") == ()


# Sound


def by_hand(samples, sound):
    """Return the magnitudes of the STFT in float64 by its definition: (frequencies, windows)."""
    window = scipy.signal.get_window("hann", sound.n_fft, fftbins=True)
    padded = np.pad(samples.astype(np.float64), sound.n_fft // 2)
    starts = range(0, len(padded) - sound.n_fft + 1, sound.hop)
    return np.stack([np.abs(np.fft.rfft(window * padded[start : start + sound.n_fft])) for start in starts], axis=1)


@pytest.mark.parametrize(
    ("sound", "shape"),
    [
        (SOUND, (1, 257, 188)),
        (LONG_SOUND, (1, 257, 1003)),
        (SOUND.small(), (1, 33, 30)),
        (LONG_SOUND.small(), (1, 33, 30)),
    ],
)
def test_a_spectrogram_is_the_logarithm_of_the_stft(sound, shape):
    noise = np.random.default_rng(0).uniform(-1, 1, sound.samples).astype(np.float32)
    found = sound.spectrogram(torch.from_numpy(noise), sound.rate)
    assert found.dtype == torch.float32
    assert tuple(found.shape) == sound.shape == shape
    # float32 adds 512 terms below 1: 1e-5 at most; a window that is shifted by one sample errs by 0.1 and more
    assert np.abs(np.exp(found[0].numpy().astype(np.float64)) - LOG_OFFSET - by_hand(noise, sound)).max() < 1e-4


def test_silence_is_the_logarithm_of_the_offset():
    found = SOUND.spectrogram(torch.zeros(100), 22050)
    assert torch.allclose(found, torch.tensor(math.log(1e-7)))


def test_a_tone_peaks_at_its_frequency_after_resampling():
    for frequency in (430, 2000, 7000):
        found = SOUND.spectrogram(torch.from_numpy(trees.tone(frequency, 3.0)), 16000)[0]
        assert int(found[:, 20:-20].mean(1).argmax()) == round(frequency * 512 / 22050)
    wrong_rate = SOUND.spectrogram(torch.from_numpy(trees.tone(2000, 3.0)), 22050)[0]
    assert int(wrong_rate[:, 20:-20].mean(1).argmax()) == round(2000 * 512 / 16000)


def test_what_is_above_the_new_rate_is_not_folded_down():
    """With 8,000 samples a second 3 kHz are kept; 5.5 kHz would come out as 2.5 kHz."""
    small = SOUND.small()
    low = small.spectrogram(torch.from_numpy(trees.tone(3000, 3.0)), 16000)[0, :, 5:-5].max()
    high = small.spectrogram(torch.from_numpy(trees.tone(5500, 3.0)), 16000)[0, :, 5:-5].max()
    assert low - high > math.log(30)  # torchaudio's filter of width 6 leaves about 1 % there


def test_a_short_clip_is_repeated_a_long_one_cut_and_loud_ones_clipped():
    heard = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, 10_000).astype(np.float32))
    repeated = SOUND.spectrogram(heard.repeat(7)[: SOUND.samples], 22050)
    assert torch.equal(SOUND.spectrogram(heard, 22050), repeated)
    assert torch.equal(SOUND.spectrogram(torch.cat([heard.repeat(7), torch.ones(9)]), 22050), repeated)
    loud = 3 * heard
    assert torch.equal(SOUND.spectrogram(loud, 22050), SOUND.spectrogram(loud.clamp(-1, 1), 22050))


def test_channels_are_averaged(tmp_path, home):
    left, right = trees.tone(300), trees.tone(900)
    trees.write_wav(tmp_path / "a.wav", np.stack([left, right], 1))
    trees.write_wav(tmp_path / "b.wav", (left + right) / 2)
    column = SpectrogramColumn((tmp_path / "a.wav", tmp_path / "b.wav"), home, SOUND)
    both, mean = (torch.exp(spectrogram) for spectrogram in column[[0, 1]])
    assert (both - mean).abs().max() < 512 * 2**-15  # 16 bits are rounded; a window has at most 512 of them
    alone = SOUND.spectrogram(torch.from_numpy(left), 16000).exp()
    assert (both - alone).abs().max() > 1


def test_a_seed_does_nothing_to_sound(crema_tree):
    column = CREMA_D.load(crema_tree, SMALL).train.inputs["audio"]
    assert torch.equal(column.example(3, 1), column.example(3, None))


# Pictures


@pytest.mark.parametrize(
    ("count", "wanted", "places"),
    [(1, 1, [0]), (2, 1, [1]), (3, 1, [1]), (4, 1, [2]), (9, 3, [1, 4, 7]), (4, 3, [0, 2, 3]), (2, 3, [0, 1, 1])],
)
def test_pictures_are_evenly_placed_for_measuring(count, wanted, places):
    assert frame_places(count, wanted, training=False) == places


def test_pictures_are_drawn_in_training():
    drawn = {tuple(frame_places(5, 2, training=True)) for _ in range(200)}
    assert drawn == {(low, high) for high in range(5) for low in range(high)}  # all 10 pairs, ascending
    assert frame_places(2, 3, training=True) == [0, 1, 1]


def test_a_picture_is_resized_and_normalised(tmp_path, home):
    path = tmp_path / "a.png"
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    for look in (Look(32), Look(32, cubic=True, normal=CLIP)):
        way = Image.Resampling.BICUBIC if look.cubic else Image.Resampling.BILINEAR
        mean, deviation = (np.asarray(each)[:, None, None] for each in look.normal)
        resized = np.asarray(Image.fromarray(values).resize((32, 32), way)).transpose(2, 0, 1) / 255
        found = PictureColumn((path,), home, look).example(0, None)
        assert found.dtype == torch.float32
        assert np.abs(found.numpy() - (resized - mean) / deviation).max() < 1e-6  # a few roundings of numbers near 2


def test_grey_and_transparent_pictures_become_red_green_and_blue(tmp_path, home):
    for mode in ("L", "P", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (8, 8)).save(path)
        assert picture(path, home).mode == "RGB"


def test_a_clip_gives_its_middle_picture_for_measuring_and_all_in_training(tmp_path, home):
    levels = (0, 60, 120, 180, 240)
    for number, level in enumerate(levels):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / f"{number}.png")
    column = FramesColumn((clip_pictures(tmp_path),), 1, home, Look(8))

    def level(example):
        return round(255 * (float(example[0].mean()) * IMAGENET[1][0] + IMAGENET[0][0]))

    assert column.shape == (1, 3, 1, 8, 8)
    assert level(column.example(0, None)) == 120
    assert {level(column.example(0, seed)) for seed in range(60)} == set(levels)


def test_crops_and_mirrors_are_drawn_and_not_for_measuring(tmp_path, home):
    path = tmp_path / "a.png"
    Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 1, 3))).save(path)
    column = PictureColumn((path,), home, Look(16))
    slopes = [float(shown[0, 0, -1] - shown[0, 0, 0]) for shown in (column.example(0, seed) for seed in range(200))]
    mirrored = sum(slope < 0 for slope in slopes)
    assert 70 < mirrored < 130  # half of 200 coins, within four standard deviations
    assert len({round(abs(slope), 2) for slope in slopes}) > 20  # crops are 8 to 32 pixels wide
    whole = column.example(0, None)
    assert float(whole[0, 0, -1] - whole[0, 0, 0]) == pytest.approx(240 / 255 / 0.229, rel=0.05)  # averaged ends
    narrow = [PictureColumn((path,), home, Look(16, scale=(0.9, 1.0))).example(0, seed) for seed in range(50)]
    assert min(float((shown[0, 0, -1] - shown[0, 0, 0]).abs()) for shown in narrow) > min(map(abs, slopes))


# Columns


def column_of(tree, modality, *, small=True):
    return CREMA_D.load(tree, SMALL if small else Reading()).train.inputs[modality]


def test_a_seed_makes_an_example_and_leaves_torch_alone(crema_tree):
    column = column_of(crema_tree, "video")
    before = torch.get_rng_state()
    first = column.example(2, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(column.example(2, 7), first)
    assert not torch.equal(column.example(2, 8), first)
    assert torch.equal(column.example(2, None), column.example(2, None))
    assert torch.equal(column[torch.tensor([2, 4])][0], column.example(2, None))
    assert torch.equal(column[2:4], column[[2, 3]])


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_examples_are_the_same_however_many_processes_decode(crema_tree, modality):
    torch.set_num_threads(2)
    column = column_of(crema_tree, modality, small=False)
    batches = []
    for loaders in (0, 2):
        stream = feed(column, 5, 3, 2, Means(loaders=loaders))
        batches.append([next(stream) for _ in range(3)])
        del stream
    for alone, together in zip(*batches, strict=True):
        assert torch.equal(alone, together)
    assert torch.get_num_threads() == 2


def test_columns_can_be_pickled_and_say_what_they_depend_on(crema):
    for modality in ("audio", "video"):
        column = column_of(crema, modality)
        again = pickle.loads(pickle.dumps(column))
        assert torch.equal(again.example(1, 5), column.example(1, 5))
        lines = list(column.digest_lines())
        assert next(iter(column_of(crema, modality, small=False).digest_lines())) != lines[0]
        name, size, _ = lines[1].rsplit(" ", 2)
        first = crema / name
        assert size == str(first.stat().st_size)
        content = first.read_bytes()
        first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # another content of the same size
        assert [one != other for one, other in zip(column.digest_lines(), lines, strict=True)].count(True) == 1
    assert lines[0].startswith("frames 1, side 32, crops (0.08, 1.0), bilinear, normal ((0.485")


# CREMA-D


def test_crema_is_read(crema_tree):
    found = CREMA_D.load(crema_tree, Reading())
    assert found.sizes == {"train": 18, "validation": 6, "test": 12}
    assert found.modalities == ("audio", "video")
    assert found.class_names == ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
    assert found.train.labels.tolist() == list(range(6)) * 3
    assert found.train.inputs["audio"].shape == (18, 1, 257, 188)
    assert found.train.inputs["video"].shape == (18, 3, 1, 224, 224)
    assert found.left_out == ""
    people = [set(split.origins.tolist()) for split in (found.train, found.validation, found.open_test())]
    assert [len(each) for each in people] == [3, 1, 2]
    assert not people[0] & people[1] | people[0] & people[2] | people[1] & people[2]
    assert {name: (spec.width, spec.digest) for name, spec in found.encoders.items()} == {
        "audio": (512, ""),
        "video": (512, ""),
    }


def test_examples_of_crema_belong_to_their_labels(crema_tree):
    """Sound and colour of a class are known: the tone's frequency, and the picture's mean."""
    found = CREMA_D.load(crema_tree, Reading())
    for split in (found.train, found.validation):
        for place, label in enumerate(split.labels.tolist()):
            heard = split.inputs["audio"].example(place, None)[0]
            expected = trees.pitch_of(label) * 512 / 22050
            assert abs(int(heard.mean(1).argmax()) - expected) <= 1  # 0.4 s repeated: not quite one frequency
            shown = split.inputs["video"].example(place, None).mean((1, 2, 3))
            mean, deviation = map(torch.tensor, IMAGENET)
            colour = 255 * (shown * deviation + mean)
            # JPEG's rounding of noise of ±8: a mean of 1,024 pixels is within 2
            assert (colour - torch.tensor(trees.colour_of(label, 6))).abs().max() < 2


def test_small_networks_take_small_examples_and_learn_from_the_encoders_given(crema_tree):
    found = CREMA_D.load(crema_tree, SMALL)
    for modality, shape in (("audio", (1, 33, 30)), ("video", (3, 1, 32, 32))):
        column = found.train.inputs[modality]
        assert column.shape == (18, *shape)
        assert tuple(column.example(0, 1).shape) == shape
        spec = found.encoders[modality]
        assert spec.make()(column[:2]).shape == (2, spec.width)


# What is wrong with an example: what is done to the tree, of which kind it is, the list's line, and the reason


def missing_wav(tree):
    (tree / "AudioWAV" / "1001_DFA_SAD_XX.wav").unlink()


def missing_folder(tree):
    shutil.rmtree(tree / "Image-01-FPS" / "1001_DFA_SAD_XX")


def empty_folder(tree):
    missing_folder(tree)
    (tree / "Image-01-FPS" / "1001_DFA_SAD_XX").mkdir()


def cut_wav(tree):
    trees.cut(tree / "AudioWAV" / "1001_DFA_SAD_XX.wav")


def cut_jpeg(tree):
    trees.cut(tree / "Image-01-FPS" / "1001_DFA_SAD_XX" / "00003.jpg")


def silent_wav(tree):
    trees.write_empty_wav(tree / "AudioWAV" / "1001_DFA_SAD_XX.wav")


def edited(tree, change, line=3, part="train"):
    trees.edit_line(tree / "annotations" / f"{part}.csv", line, change)


def other_label(tree):
    edited(tree, lambda line: line.replace(b",SAD", b",SURPRISE"))


def number_as_label(tree):
    edited(tree, lambda line: line.replace(b",SAD", b",2"))


def listed_twice(tree):
    edited(tree, lambda line: line + line, line=2)


def no_utf8(tree):
    edited(tree, lambda line: line.replace(b",SAD", b",S\xc4D"))


def no_label(tree):
    edited(tree, lambda line: line.replace(b",SAD", b""))


def other_name(tree):
    edited(tree, lambda line: b"../" + line)


def same_speaker(tree):
    """A clip of a speaker of the test split is trained with."""
    edited(tree, lambda line: line.replace(b"1001", b"1005").replace(b"DFA", b"IEO"))
    for folder, end in (("AudioWAV", ".wav"), ("Image-01-FPS", "")):
        (tree / folder / f"1001_DFA_SAD_XX{end}").rename(tree / folder / f"1005_IEO_SAD_XX{end}")


def same_clip(tree):
    edited(tree, lambda line: b"1005_DFA_SAD_XX,SAD\n")


BROKEN = [
    (missing_wav, "missing", "file {tree}/AudioWAV/1001_DFA_SAD_XX.wav does not exist"),
    (missing_folder, "missing", "folder {tree}/Image-01-FPS/1001_DFA_SAD_XX does not exist"),
    (empty_folder, "empty", "folder {tree}/Image-01-FPS/1001_DFA_SAD_XX has no picture"),
    (cut_wav, "truncated", "file {tree}/AudioWAV/1001_DFA_SAD_XX.wav: chunk data has 12800 bytes, the file holds 7662"),
    (cut_jpeg, "truncated", "file {tree}/Image-01-FPS/1001_DFA_SAD_XX/00003.jpg: its header ends at byte"),
    (silent_wav, "empty", "file {tree}/AudioWAV/1001_DFA_SAD_XX.wav: it has no sample"),
    (other_label, "label", "label of 1001_DFA_SAD_XX is 'SURPRISE', expected one of NEU, HAP, SAD, FEA, DIS, ANG"),
    (number_as_label, "label", "label of 1001_DFA_SAD_XX is '2', expected one of NEU"),
    (listed_twice, "duplicate", "1001_DFA_HAP_XX is listed twice, first in {tree}/annotations/train.csv, line 2"),
    (no_utf8, "encoding", "byte 18 is 0xc4, which is no UTF-8"),
    (no_label, "line", "it has 1 fields, expected 2 fields, clip, label, by comma"),
    (other_name, "line", "clip is '../1001_DFA_SAD_XX', expected a name such as 1001_DFA_ANG_XX"),
    (
        same_speaker,
        "speaker",
        "speaker 1005 is in the test split too, {tree}/annotations/test.csv, line 1",
    ),
    (same_clip, "duplicate", "1005_DFA_SAD_XX is listed twice, first in {tree}/annotations/test.csv, line 3"),
]


@pytest.mark.parametrize(("damage", "kind", "reason"), BROKEN, ids=[each[0].__name__ for each in BROKEN])
def test_what_is_wrong_is_told_with_its_line_or_left_out_and_counted(crema, damage, kind, reason):
    damage(crema)
    with pytest.raises(DataFault) as told:
        CREMA_D.load(crema, SMALL)
    message = str(told.value)
    assert message.startswith(f"{crema / 'annotations' / 'train.csv'}, line 3: {reason.format(tree=crema)}")
    assert message.endswith("; --skip-broken leaves such examples out and counts them") == (kind != "speaker")
    found = CREMA_D.load(crema, SKIPPING)
    assert found.sizes == {"train": 18 if damage is listed_twice else 17, "validation": 6, "test": 12}
    assert found.left_out == Faults(skip=True, found=[fault_of(kind)]).said()


def fault_of(kind):
    faults = Faults(skip=True)
    faults.add(kind, None, 3, "")
    return faults.found[0]


def test_faults_of_several_splits_are_all_counted(crema):
    edited(crema, lambda line: line.replace(b",NEU", b",?"), line=1, part="valid")
    cut_wav(crema)
    trees.cut(crema / "AudioWAV" / "1005_DFA_SAD_XX.wav")
    found = CREMA_D.load(crema, SKIPPING)
    assert found.sizes == {"train": 17, "validation": 5, "test": 11}
    assert found.left_out == "1 labels out of range, 2 files that are cut off or damaged"


def test_a_speaker_may_be_in_two_splits_when_that_is_said(crema):
    same_speaker(crema)
    found = CREMA_D.load(crema, Reading("small", speakers="shared"))
    assert found.sizes == {"train": 18, "validation": 6, "test": 12}
    with pytest.raises(DataFault, match="the paper's own split is such; --speakers shared takes the lists as they are"):
        CREMA_D.load(crema, SMALL)


def test_a_speaker_whose_test_clips_are_all_broken_may_be_trained_with(crema):
    same_speaker(crema)
    for path in (crema / "AudioWAV").glob("1005_DFA_*"):
        trees.cut(path)
    found = CREMA_D.load(crema, SKIPPING)
    assert found.sizes == {"train": 18, "validation": 6, "test": 6}


@pytest.mark.parametrize("skip", [False, True])
def test_another_delimiter_is_always_refused(crema, skip):
    path = crema / "annotations" / "valid.csv"
    path.write_text(path.read_text().replace(",", ";"))
    with pytest.raises(DataFault) as told:
        CREMA_D.load(crema, Reading("small", skip_broken=skip))
    assert str(told.value) == (
        f"{path}, line 1: no line of the list has a comma, found a semicolon; expected 2 fields, clip, label, "
        "separated by comma"
    )


def test_missing_lists_are_told_with_the_layout(crema):
    (crema / "annotations" / "valid.csv").unlink()
    with pytest.raises(FileNotFoundError) as told:
        CREMA_D.load(crema, SKIPPING)
    message = str(told.value)
    assert message.startswith(f"list {crema / 'annotations' / 'valid.csv'} does not exist; settings are chosen on the")
    assert f"move some lines of {crema / 'annotations' / 'train.csv'} into it" in message
    assert message.endswith(CREMA_D.layout)
    (crema / "annotations" / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists .*valid\.csv, .*test\.csv do not exist; expected\nannotations"):
        CREMA_D.load(crema, SKIPPING)


def test_a_split_or_a_class_without_an_example_is_refused(crema):
    for path in (crema / "AudioWAV").glob("1004_*"):
        path.unlink()
    with pytest.raises(DataFault, match=r"has no example for the validation split \(6 missing files\)"):
        CREMA_D.load(crema, SKIPPING)


def test_what_only_decoding_shows_names_the_file_and_the_check(crema):
    found = CREMA_D.load(crema, SMALL)
    wav = crema / "AudioWAV" / "1001_DFA_NEU_XX.wav"
    content = bytearray(wav.read_bytes())
    content[20:22] = b"\x99\x99"  # a way of coding that nobody has
    wav.write_bytes(content)
    jpeg = crema / "Image-01-FPS" / "1001_DFA_NEU_XX" / "00002.jpg"
    damage_picture(jpeg)
    again = CREMA_D.load(crema, SMALL)
    for path, modality in ((wav, "audio"), (jpeg, "video")):
        with pytest.raises(DataFault) as told:
            again.train.inputs[modality].example(0, None)
        assert str(told.value).startswith(f"{path}: it cannot be decoded (")
        assert str(told.value).endswith(f"); igm-rs data check crema-d {crema} finds all such files")
    wav.unlink()
    with pytest.raises(DataFault, match=r"NEU_XX\.wav: it cannot be decoded"):
        found.train.inputs["audio"].example(0, None)


def damage_picture(path):
    """Write a PNG under the name, whole by its chunks, whose compressed rows are no such thing."""
    Image.new("RGB", (32, 32)).save(path, "PNG")
    content = path.read_bytes()
    at = content.index(b"IDAT") + 4
    path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
    assert file_trouble(path) is None


def test_sound_that_makes_no_spectrogram_is_told(tmp_path, home):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan], dtype=np.float32), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", np.zeros(0, dtype=np.float32), 8000)
    soundfile.write(tmp_path / "c.wav", np.zeros(99, dtype=np.float32), 44101)
    column = SpectrogramColumn(tuple(tmp_path / f"{name}.wav" for name in "abc"), home, Sound(8000, 1))
    with pytest.raises(DataFault, match=r"a\.wav: it cannot be decoded \(it has samples that are not finite\)"):
        column.example(0, None)
    with pytest.raises(DataFault, match=r"b\.wav: it cannot be decoded \(it has no sample\)"):
        column.example(1, None)
    with pytest.raises(
        DataFault, match=r"c\.wav: .* \(it has 44101 samples a second, expected a usual rate such as 160"
    ):
        column.example(2, None)


# Kinetics-Sounds


def test_kinetics_is_read(kinetics_tree):
    found = KINETICS_SOUNDS.load(kinetics_tree, Reading())
    assert found.sizes == {"train": 62, "validation": 31, "test": 31}
    assert found.classes == 31
    assert found.train.labels.tolist() == [label for label in range(31) for _ in range(2)]
    assert found.train.inputs["audio"].shape == (62, 1, 257, 1003)
    assert found.train.inputs["video"].shape == (62, 3, 3, 224, 224)
    assert tuple(found.train.inputs["audio"].example(0, None).shape) == (1, 257, 1003)
    assert tuple(found.train.inputs["video"].example(0, 1).shape) == (3, 3, 224, 224)
    assert len(set(found.train.origins.tolist())) == 62
    place = 9
    heard = found.train.inputs["audio"].example(place, None)[0]
    # 0.2 s repeated: a line spectrum 5 Hz apart; windows of 69 Hz
    assert abs(int(heard.mean(1).argmax()) - trees.pitch_of(4) * 512 / 35400) <= 1


def test_classes_of_kinetics_are_31_by_the_alphabet():
    assert len(ACTIONS) == len(set(ACTIONS)) == 31
    assert list(ACTIONS) == sorted(ACTIONS)


def test_clips_of_kinetics_may_be_called_by_their_video_alone(kinetics):
    row = trees.kinetics_clips("train")[0]
    for folder, end in ((kinetics / "train_wav", ".wav"), (kinetics / "train_img" / "Image-01-FPS", "")):
        (folder / f"{trees.kinetics_name(row)}{end}").rename(folder / f"{row[1]}{end}")
    name = trees.kinetics_name(trees.kinetics_clips("valid")[0])
    for folder, end in (("wav", ".wav"), ("img/Image-01-FPS", "")):
        (kinetics / f"train_{folder}" / f"{name}{end}").rename(kinetics / f"test_{folder}" / f"{name}{end}")
    found = KINETICS_SOUNDS.load(kinetics, SMALL)
    assert found.sizes == {"train": 62, "validation": 31, "test": 31}
    assert found.train.inputs["audio"].paths[0].name == f"{trees.kinetics_clips('train')[0][1]}.wav"
    assert found.validation.inputs["audio"].paths[0].parent.name == "test_wav"


def test_lists_of_kinetics_need_two_columns_only(kinetics):
    for part in ("train", "valid", "test"):
        rows_ = [(trees.kinetics_name(row), row[0]) for row in trees.kinetics_clips(part)]
        trees.write_list(kinetics / "annotations" / f"{part}.csv", [("youtube_id", "label"), *rows_])
    assert KINETICS_SOUNDS.load(kinetics, SMALL).sizes == {"train": 62, "validation": 31, "test": 31}


def kinetics_edit(tree, change, line=2):
    trees.edit_line(tree / "annotations" / "train.csv", line, change)


def unknown_action(tree):
    kinetics_edit(tree, lambda line: line.replace(b"blowing nose", b"sneezing"))


def no_time(tree):
    kinetics_edit(tree, lambda line: line.replace(b",10,", b",ten,"))


def no_id(tree):
    kinetics_edit(tree, lambda line: line.replace(b"train0-_000", b""))


def absent_clip(tree):
    (tree / "train_wav" / "train0-_000_000000_000010.wav").unlink()


def video_of_the_test_split(tree):
    """Another part of a video that is measured on."""
    kinetics_edit(tree, lambda line: line.replace(b"train0-_000,0,10", b"testx0-_000,30,40"))
    for folder, end in ((tree / "train_wav", ".wav"), (tree / "train_img" / "Image-01-FPS", "")):
        (folder / f"train0-_000_000000_000010{end}").rename(folder / f"testx0-_000_000030_000040{end}")


def kinetics_file(tree, ending=""):
    """The sound of the clip on line 2, or its first picture."""
    clip = "train0-_000_000000_000010"
    return tree / "train_img" / "Image-01-FPS" / clip / ending if ending else tree / "train_wav" / f"{clip}.wav"


def cut_sound(tree):
    trees.cut(kinetics_file(tree))


def cut_picture(tree):
    trees.cut(kinetics_file(tree, "00001.jpg"))


def no_sample(tree):
    trees.write_empty_wav(kinetics_file(tree))


def no_picture(tree):
    for path in kinetics_file(tree, "00001.jpg").parent.iterdir():
        path.unlink()


def listed_again(tree):
    kinetics_edit(tree, lambda line: line.replace(b"train0-_000,0,10", b"train1-_000,2,12"))


def no_text(tree):
    kinetics_edit(tree, lambda line: line.replace(b"blowing", b"bl\xf6wing"))


KINETICS_BROKEN = [
    (cut_sound, "truncated", "file {tree}/train_wav/train0-_000_000000_000010.wav: chunk data has"),
    (cut_picture, "truncated", "file {tree}/train_img/Image-01-FPS/train0-_000_000000_000010/00001.jpg: its "),
    (no_sample, "empty", "file {tree}/train_wav/train0-_000_000000_000010.wav: it has no sample"),
    (no_picture, "empty", "folder {tree}/train_img/Image-01-FPS/train0-_000_000000_000010 has no picture"),
    (no_text, "encoding", "byte 3 is 0xf6, which is no UTF-8"),
    (unknown_action, "label", "label of train0-_000 is 'sneezing', expected one of the 31, such as 'blowing nose'"),
    (no_time, "line", "clip is 'train0-_000', '0', 'ten', expected a youtube_id, and whole seconds as times if any"),
    (no_id, "line", "clip is '', '0', '10', expected a youtube_id"),
    (absent_clip, "missing", "file {tree}/train_wav/train0-_000_000000_000010.wav does not exist"),
    (
        video_of_the_test_split,
        "speaker",
        "video testx0-_000 is in the test split too, {tree}/annotations/test.csv, line 2",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "reason"), KINETICS_BROKEN, ids=[x[0].__name__ for x in KINETICS_BROKEN])
def test_what_is_wrong_with_kinetics_is_told_or_left_out(kinetics, damage, kind, reason):
    damage(kinetics)
    with pytest.raises(DataFault) as told:
        KINETICS_SOUNDS.load(kinetics, SMALL)
    expected = f"{kinetics / 'annotations' / 'train.csv'}, line 2: {reason.format(tree=kinetics)}"
    assert str(told.value).startswith(expected)
    found = KINETICS_SOUNDS.load(kinetics, SKIPPING)
    assert found.sizes == {"train": 61, "validation": 31, "test": 31}
    assert found.left_out == Faults(skip=True, found=[fault_of(kind)]).said()


def test_a_clip_of_kinetics_that_is_listed_twice_is_told(kinetics):
    listed_again(kinetics)
    path = kinetics / "annotations" / "train.csv"
    with pytest.raises(DataFault) as told:
        KINETICS_SOUNDS.load(kinetics, SMALL)
    again = f"{path}, line 3: train1-_000_000002_000012 is listed twice, first in {path}, line 2"
    assert str(told.value).startswith(again)
    assert KINETICS_SOUNDS.load(kinetics, SKIPPING).left_out == "1 examples that are listed twice"


def test_another_delimiter_of_kinetics_is_always_refused(kinetics):
    path = kinetics / "annotations" / "valid.csv"
    path.write_text(path.read_text().replace(",", ";"))
    for reading in (SMALL, SKIPPING):
        with pytest.raises(DataFault, match=r"valid\.csv, line 1: no line of the list has a comma, found a semicolon"):
            KINETICS_SOUNDS.load(kinetics, reading)


def test_a_clip_of_one_picture_is_as_good(kinetics):
    for path in sorted(kinetics_file(kinetics, "00001.jpg").parent.iterdir())[1:]:
        path.unlink()
    shown = KINETICS_SOUNDS.load(kinetics, SMALL).train.inputs["video"].example(0, None)
    assert shown.shape[1] == 3
    assert torch.equal(shown[:, 0], shown[:, 1])


def test_what_is_hidden_is_no_picture(crema):
    folder = crema / "Image-01-FPS" / "1001_DFA_SAD_XX"
    (folder / "._00001.jpg").write_bytes(b"of macOS")
    (folder / ".DS_Store").write_bytes(b"likewise")
    assert CREMA_D.load(crema, SMALL).sizes["train"] == 18


def test_where_all_speakers_are_shared_the_way_out_is_told(crema):
    listed = "".join(f"{name},{emotion}\n" for name, emotion in trees.crema_clips("train"))
    (crema / "annotations" / "test.csv").write_text(listed.replace("DFA", "IEO"))
    for folder, end in (("AudioWAV", ".wav"), ("Image-01-FPS", "")):
        for name, _ in trees.crema_clips("train"):
            of = crema / folder
            make = shutil.copytree if not end else shutil.copy
            make(of / f"{name}{end}", of / f"{name.replace('DFA', 'IEO')}{end}")
    with pytest.raises(DataFault) as told:
        CREMA_D.load(crema, SKIPPING)
    assert str(told.value).endswith(
        "no example for the train split (18 examples of speakers who are in another split); --speakers shared takes "
        "the lists as they are"
    )


def test_a_list_of_kinetics_without_its_header_is_refused(kinetics):
    path = kinetics / "annotations" / "train.csv"
    trees.edit_line(path, 1, lambda _: b"")
    with pytest.raises(DataFault, match=r"train\.csv, line 1: the columns are 'blowing nose', .* expected label"):
        KINETICS_SOUNDS.load(kinetics, SKIPPING)
