"""The paper's encoders: shapes and published sizes, what they compute, weights of files and folders, steps of IGM."""

import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18
from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPConfig, CLIPModel

import igm_rs
from igm_rs.experiments import encoders
from igm_rs.experiments.encoders import bert
from igm_rs.experiments.networks import three_layer_head

IDS = 50


def tokens(ids=IDS, length=16):
    return torch.randint(1, ids, (4, length))


SMALL = {
    "audio": (lambda: encoders.audio_resnet18(small=True), lambda: torch.randn(4, 1, 33, 30)),
    "frames": (lambda: encoders.frames_resnet18(small=True), lambda: torch.randn(4, 3, 2, 32, 32)),
    "image": (lambda: encoders.image_resnet50(small=True), lambda: torch.randn(4, 3, 32, 32)),
    "text": (lambda: encoders.text_bert(True, None, IDS), tokens),
    "CLIP's text": (lambda: encoders.clip_text(None, small=True), lambda: tokens(64)),
    "CLIP's image": (lambda: encoders.clip_image(None, small=True), lambda: torch.randn(4, 3, 32, 32)),
    "RGB": (lambda: encoders.i3d(small=True), lambda: torch.randn(4, 3, 8, 32, 32)),
    "flow": (lambda: encoders.i3d(small=True, channels=2), lambda: torch.randn(4, 2, 8, 32, 32)),
    "depth": (lambda: encoders.i3d(small=True, channels=1), lambda: torch.randn(4, 1, 8, 32, 32)),
}

PUBLISHED = {
    # torchvision's figures are those with ImageNet's classifier, 513,000 of ResNet18; one channel: 2 · 64 · 7² fewer
    "ResNet18, audio": (encoders.audio_resnet18, 11_689_512 - 513_000 - 2 * 64 * 7 * 7, 512),
    "ResNet18, frames": (encoders.frames_resnet18, 11_689_512 - 513_000, 512),
    "ResNet50": (encoders.image_resnet50, 25_557_032, 1000),
    # bert-base-uncased without its pooling layer, 768² + 768
    "BERT-base": (lambda: encoders.text_bert(False, None, 30522), 109_482_240 - 768 * 769, 768),
    # CLIP ViT-B/32 has 151,277,313: both halves and the temperature
    "CLIP's text": (lambda: encoders.clip_text(None), 63_428_096, 512),
    "CLIP's image": (lambda: encoders.clip_image(None), 151_277_313 - 63_428_096 - 1, 512),
    # the 12.7 M of the usual checkpoint without its classifier 1024 → 400; less 7³ · 64 for each channel less
    "I3D, RGB": (encoders.i3d, 12_697_264 - 400 * 1025, 1024),
    "I3D, flow": (lambda: encoders.i3d(channels=2), 12_697_264 - 400 * 1025 - 64 * 7**3, 1024),
    "I3D, depth": (lambda: encoders.i3d(channels=1), 12_697_264 - 400 * 1025 - 2 * 64 * 7**3, 1024),
}


def scrambled(network):
    """A network in evaluation mode whose every tensor matters: statistics and biases are no zeros and ones."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("bn1.weight", "bn.weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.1)
    return network.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Shapes and sizes


@pytest.mark.parametrize("name", SMALL)
def test_small_encoders_give_features_of_their_width(name):
    spec, inputs = SMALL[name][0](), SMALL[name][1]()
    encoder = spec.make()
    assert encoder(inputs).shape == (4, spec.width)
    assert all(module.training for module in encoder.modules())
    assert spec.digest == ""


@pytest.mark.parametrize("name", SMALL)
def test_pickled_specs_make_the_same_encoder_from_the_same_seed(name):
    spec = SMALL[name][0]()
    states = []
    for of in (spec, pickle.loads(pickle.dumps(spec))):
        torch.manual_seed(3)
        states.append(of.make().state_dict())
    torch.manual_seed(4)
    other = spec.make().state_dict()
    assert all(torch.equal(one, two) for one, two in zip(*map(dict.values, states), strict=True))
    assert any(not torch.equal(states[0][key], other[key]) for key in other)


def test_modalities_of_a_set_are_as_wide_as_each_other():
    for small in (True, False):
        text = encoders.text_bert(small, None, IDS)
        assert encoders.image_resnet50(small).narrowed == text.width
        assert encoders.audio_resnet18(small).width == encoders.frames_resnet18(small).width
        assert len({encoders.i3d(small, channels=channels).width for channels in (1, 2, 3)}) == 1
        assert text.narrowed is None
    assert encoders.image_resnet50(narrowed=1024).narrowed == 1024


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_the_published_one(name):
    make, parameters, width = PUBLISHED[name]
    spec = make()
    with torch.device("meta"):
        encoder = spec.make()
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert spec.width == width


def test_full_size_takes_the_papers_inputs():
    inputs = {
        encoders.audio_resnet18(): torch.empty(2, 1, 257, 188, device="meta"),
        encoders.frames_resnet18(): torch.empty(2, 3, 3, 224, 224, device="meta"),
        encoders.i3d(): torch.empty(2, 3, 64, 224, 224, device="meta"),
    }
    for spec, batch in inputs.items():
        with torch.device("meta"):
            assert spec.make()(batch).shape == (2, spec.width)


# ----------------------------------------------------------------------------------------------------------------------
# What they compute


def test_resnet_is_torchvisions_with_its_weights(tmp_path):
    theirs = scrambled(resnet18())
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = encoders.frames_resnet18(weights=tmp_path / "resnet18.pth").make().eval()
    theirs.fc = nn.Identity()
    clips = torch.randn(2, 3, 3, 64, 64)
    each = torch.stack([theirs(clips[:, :, frame]) for frame in range(3)])
    # the same convolutions in batches of 6 and of 2, which may add up in another order: some units of float32's 1e-7
    torch.testing.assert_close(ours(clips), each.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(clips[:, :, 0]), each[0], rtol=1e-5, atol=1e-5)
    assert each[0].std(0).mean() > 0.01  # the pictures differ


def test_one_channel_gets_the_mean_of_three(tmp_path):
    file = tmp_path / "frames.pt"
    theirs = scrambled(encoders.frames_resnet18(small=True).make())
    torch.save(theirs.state_dict(), file)
    ours = encoders.audio_resnet18(small=True, weights=file).make().eval()
    sound = torch.randn(2, 1, 33, 30)
    torch.testing.assert_close(ours(sound), theirs(sound.expand(2, 3, 33, 30) / 3), rtol=1e-5, atol=1e-5)


def test_bert_gives_the_first_token_whatever_the_padding():
    encoder = encoders.text_bert(True, None, IDS).make().eval()
    ids = tokens()
    ids[1:, 9:] = 0
    ids[2, 4:] = 0
    features = encoder(ids)
    alone = encoder.bert(input_ids=ids[2:3, :4]).last_hidden_state[0, 0]
    # masked places add exact zeros, but sums over 16 places and over 4 are taken in another order
    torch.testing.assert_close(features[2], alone, rtol=1e-5, atol=1e-6)
    longer = torch.cat([ids, torch.zeros(4, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(encoder(longer), features, rtol=1e-5, atol=1e-6)
    assert encoder.bert.pooler is None
    assert encoder.train()(ids).sub(features).abs().max() > 1e-3  # its dropout is on


def same(size, kernel, stride):
    """Zeros before and behind, as TensorFlow's manual has it."""
    total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    return [total // 2, total - total // 2]


def published_i3d(state, clips):
    """I3D in functions, layer by layer as in the paper's figure 3; pooling pads with −∞."""

    def padded(x, kernel, stride, value):
        sides = [same(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
        return functional.pad(x, [*sides[2], *sides[1], *sides[0]], value=value)

    def unit(x, name, stride=1):
        weight = state[f"{name}.conv3d.weight"]
        x = functional.conv3d(padded(x, weight.shape[2:], (stride,) * 3, 0.0), weight, stride=stride)
        mean, var, scale, shift = (state[f"{name}.bn.{of}"] for of in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, scale, shift, eps=1e-3).relu()

    def pool(x, kernel, stride):
        return functional.max_pool3d(padded(x, kernel, stride, -torch.inf), kernel, stride)

    def mixed(x, name):
        one, two = unit(unit(x, f"{name}.b1a"), f"{name}.b1b"), unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        three = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")
        return torch.cat([unit(x, f"{name}.b0"), one, two, three], 1)

    x = pool(unit(clips, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, f"Mixed_4{letter}")
    x = mixed(mixed(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    return functional.avg_pool3d(x, (2, *x.shape[3:]), stride=1)[..., 0, 0].mean(2)


def test_i3d_is_the_published_network():
    encoder = scrambled(encoders.i3d(small=True).make())
    clips = torch.randn(2, 3, 21, 47, 60)  # odd sizes: the zeros stand behind; three positions over time
    batch_norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
    for module in batch_norms:  # statistics of these clips, or their differences are lost on the way
        module.momentum = 1.0
    encoder.train()(clips)
    encoder.eval()
    with torch.no_grad():
        expected = published_i3d(encoder.state_dict(), clips)
        # the same sums of float32, but for the mean over positions; each layer's roundings go through those behind it
        torch.testing.assert_close(encoder(clips), expected, rtol=1e-4, atol=1e-5)
        assert expected.std(0).mean() > 0.01  # the clips differ


def test_i3d_names_its_tensors_as_the_usual_checkpoints():
    with torch.device("meta"):
        names = {name.rsplit(".", 1)[0] for name in encoders.i3d().make().state_dict()}
    blocks = [f"Mixed_{block}" for block in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")]
    units = [f"{block}.{unit}" for block in blocks for unit in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]
    units += ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
    assert names == {f"{unit}.{part}" for unit in units for part in ("conv3d", "bn")}


# ----------------------------------------------------------------------------------------------------------------------
# Weights of files


@pytest.fixture
def saved(tmp_path):
    """A small network for frames, its state dict, and a function that saves what it is given."""
    network = scrambled(encoders.frames_resnet18(small=True).make())

    def save(held, name="weights.pt"):
        torch.save(held, tmp_path / name)
        return tmp_path / name

    return network.state_dict(), save


def test_file_may_be_wrapped_prefixed_and_have_a_classifier(saved):
    state, save = saved
    classified = state | {"fc.weight": torch.zeros(5, 64), "fc.bias": torch.zeros(5)}
    prefixed = {f"module.{name}": tensor for name, tensor in classified.items()}
    uncounted = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for held in (state, classified, prefixed, {"state_dict": prefixed, "epoch": 3}, {"model": state}, uncounted):
        spec = encoders.frames_resnet18(small=True, weights=save(held))
        loaded = spec.make().state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in uncounted.items())


def test_i3d_reads_a_checkpoint_with_its_classifier(saved):
    _, save = saved
    state = scrambled(encoders.i3d(small=True).make()).state_dict()
    file = save(state | {"logits.conv3d.weight": torch.zeros(400, 64, 1, 1, 1), "logits.conv3d.bias": torch.zeros(400)})
    stem = "Conv3d_1a_7x7.conv3d.weight"
    assert torch.equal(encoders.i3d(True, file).make().state_dict()[stem], state[stem])
    depth = encoders.i3d(True, file, channels=1).make().state_dict()
    torch.testing.assert_close(depth[stem], state[stem].mean(1, keepdim=True))
    message = (
        f"weights {file} do not fit a small I3D of 2 channels: of its tensors the file has of another shape 1 ({stem} "
        "(4, 3, 7, 7, 7) for (4, 2, 7, 7, 7))"
    )
    with pytest.raises(ValueError, match=r"^weights ") as raised:
        encoders.i3d(True, file, channels=2).make()
    assert str(raised.value) == message


def test_what_does_not_fit_is_told_at_once(saved):
    state, save = saved
    held = {name: tensor for name, tensor in state.items() if not name.startswith("layer1.0.")}
    held |= {"head.weight": torch.zeros(2), "bn1.bias": torch.zeros(3)}
    file = save(held)
    with pytest.raises(ValueError, match=r"^weights ") as raised:
        encoders.frames_resnet18(small=True, weights=file).make()
    assert str(raised.value) == (
        f"weights {file} do not fit a small ResNet18: of its tensors the file lacks 10 (layer1.0.conv1.weight, "
        "layer1.0.bn1.weight, layer1.0.bn1.bias, …); has unknown 1 (head.weight); has of another shape 1 (bn1.bias "
        "(3,) for (8,))"
    )


def test_picture_network_needs_its_classifier(saved):
    _, save = saved
    state = encoders.image_resnet50(small=True).make().state_dict()
    spec = encoders.image_resnet50(small=True, weights=save(state))
    assert torch.equal(spec.make().state_dict()["fc.weight"], state["fc.weight"])
    del state["fc.weight"]
    with pytest.raises(
        ValueError, match=r"do not fit a small ResNet50: of its tensors the file lacks 1 \(fc\.weight\)$"
    ):
        encoders.image_resnet50(small=True, weights=save(state)).make()


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"epoch": 3, "lr": 0.1}, "a mapping with 'epoch', 'lr'"),
        ({0: torch.zeros(2)}, "a mapping with 0"),
        ({}, "nothing"),
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
    ],
)
def test_file_without_a_state_dict(saved, held, told):
    file = saved[1](held)
    with pytest.raises(ValueError, match=r"^weights ") as raised:
        encoders.i3d(small=True, weights=file).make()
    assert str(raised.value) == (
        f"weights {file} hold {told}, expected a state dict, tensors by name, bare or under 'state_dict' or 'model'"
    )


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "objects"])
def test_file_that_cannot_be_read(saved, damage):
    state, save = saved
    file = save(nn.Linear(2, 2) if damage == "objects" else state)
    if damage != "objects":
        whole = file.read_bytes()
        file.write_bytes({"text": b"no weights here", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=r"cannot be read \(.+\), expected a file of tensors alone, as torch\.save"
    ) as no:
        encoders.frames_resnet18(small=True, weights=file).make()
    assert str(no.value).startswith(f"weights {file} ")


@pytest.mark.parametrize("content", [b"hello world", b"<!doctype html>", b"\x80\x04\x95", b"0" * 99], ids=str)
def test_a_file_of_anything_is_told_without_bad_advice(tmp_path, content):
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^weights .* cannot be read \(.+\), expected a file of tensors al") as no:
            encoders.frames_resnet18(small=True, weights=tmp_path / name).make()
        assert "set to" not in str(no.value)
        assert "\x1b" not in str(no.value)


class Act:
    """Something that a pickle would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_code_in_a_file_is_not_run_and_nobody_is_told_to_run_it(saved, tmp_path):
    file = saved[1]({"fc.weight": Act(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"cannot be read \(it is none of torch's files, or holds other things than "):
        encoders.frames_resnet18(small=True, weights=file).make()
    assert not (tmp_path / "run").exists()


def test_a_file_of_safetensors_is_read(saved, tmp_path):
    state, _ = saved
    save_file(state, tmp_path / "weights.safetensors")
    loaded = encoders.frames_resnet18(small=True, weights=tmp_path / "weights.safetensors").make().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


UNSOUND = {
    "NaN": lambda tensor: tensor * math.nan,
    "infinite": lambda tensor: tensor + math.inf,
    "integers": lambda tensor: tensor.to(torch.int8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "sparse": lambda tensor: tensor.to_sparse(),
    "on no device": lambda tensor: tensor.to("meta"),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}


def test_a_file_in_half_precision_is_read(saved):
    state, save = saved
    file = save({name: tensor.half() for name, tensor in state.items()})
    loaded = encoders.frames_resnet18(small=True, weights=file).make().state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.half().to(tensor.dtype)), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", UNSOUND)
def test_tensors_that_hold_no_finite_numbers(saved, kind):
    state, save = saved
    name = next(name for name, value in state.items() if value.dim() == 4)
    file = save(state | {name: UNSOUND[kind](state[name])})
    with pytest.raises(ValueError, match=rf"the file has of another kind or not finite 1 \({re.escape(name)}\)$"):
        encoders.frames_resnet18(small=True, weights=file).make()


def test_a_folder_whose_tensors_hold_no_finite_numbers(bert_folder):
    folder, bert = bert_folder
    with torch.no_grad():
        bert.encoder.layer[0].output.dense.bias.fill_(math.nan)
    bert.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the file has of another kind or not finite 1 \(.*output\.dense\.bias\)$"):
        encoders.text_bert(True, folder, IDS).make()


# ----------------------------------------------------------------------------------------------------------------------
# Weights of folders


@pytest.fixture
def bert_folder(tmp_path):
    """A small BERT with its pooling layer and a head, as it is published."""
    config = BertConfig(
        vocab_size=IDS, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model.bert


@pytest.fixture
def clip_folder(tmp_path):
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    text = size | {"vocab_size": 40, "bos_token_id": 38, "eos_token_id": 39, "projection_dim": 20}
    image = size | {"image_size": 16, "patch_size": 8, "projection_dim": 20}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=20)).eval()
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", model


def quiet(capfd):
    """Nothing but what is asked for was written."""
    told = capfd.readouterr()
    return told.out + told.err == ""


def test_bert_of_a_folder(bert_folder, capfd):
    folder, theirs = bert_folder
    capfd.readouterr()
    spec = encoders.text_bert(False, folder, IDS)
    ours = pickle.loads(pickle.dumps(spec)).make()
    assert quiet(capfd)
    assert all(module.training for module in ours.modules())
    ids = tokens()
    assert spec.width == 24
    # one attention kernel with a mask of ones, one without
    expected = theirs(input_ids=ids).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.eval()(ids), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_of_a_folder_becomes_float32(bert_folder):
    folder, theirs = bert_folder
    theirs.half().save_pretrained(folder)
    assert {p.dtype for p in encoders.text_bert(False, folder, IDS).make().parameters()} == {torch.float32}


def test_old_names_and_pooling_layers_of_berts_are_read(bert_folder):
    """The published bert-base-uncased says gamma and beta, and has a pooling layer."""
    folder, theirs = bert_folder
    state = {f"bert.{name}": tensor for name, tensor in BertModel(theirs.config).state_dict().items()}
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    assert len(set(renamed) - set(state)) == 2 * 3
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    ours = encoders.text_bert(False, folder, IDS).make().bert.state_dict()
    assert all(torch.equal(tensor, state[f"bert.{name}"]) for name, tensor in ours.items())


def test_clip_of_a_folder(clip_folder, capfd):
    folder, theirs = clip_folder
    capfd.readouterr()
    text, image = encoders.clip_text(folder), encoders.clip_image(folder)
    ours, other = text.make(), image.make()
    assert quiet(capfd)
    assert text.width == image.width == 20
    assert ours.training
    ids = torch.cat([torch.full((4, 1), 38), torch.randint(1, 38, (4, 5)), torch.full((4, 1), 39)], 1)
    pictures = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        whole = theirs(input_ids=ids, pixel_values=pictures)
        features, seen = ours.eval()(ids), other.eval()(pictures)
        # the whole model gives them at unit length, which costs a rounding
        torch.testing.assert_close(functional.normalize(features), whole.text_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(functional.normalize(seen), whole.image_embeds, rtol=1e-5, atol=1e-6)
        # nothing that follows the end token counts, whatever its id
        for padding in (0, 39, 5):
            longer = torch.cat([ids, torch.full((4, 3), padding)], 1)
            torch.testing.assert_close(ours(longer), features, rtol=1e-5, atol=1e-6)


def test_clip_is_as_wide_as_its_outer_configuration_says(clip_folder):
    folder, _ = clip_folder
    config = json.loads((folder / "config.json").read_text())
    for half in ("text_config", "vision_config"):
        config[half]["projection_dim"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    assert encoders.clip_text(folder).width == 20
    assert encoders.clip_text(folder).make()(torch.full((2, 3), 39)).shape == (2, 20)


def changed(folder, change):
    """Rewrite a folder's tensors."""
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file(change(state), file, metadata={"format": "pt"})


def test_folder_that_does_not_fit_is_told(bert_folder):
    folder, _ = bert_folder
    key = "bert.embeddings.LayerNorm.weight"
    changed(
        folder,
        lambda state: (
            {name: tensor for name, tensor in state.items() if "layer.0.output" not in name and name != key}
            | {key: torch.zeros(5), "bert.more": torch.zeros(1)}
        ),
    )
    with pytest.raises(ValueError, match=r"^weights ") as raised:
        encoders.text_bert(False, folder, IDS).make()
    lacking = "encoder.layer.0.output."
    assert str(raised.value) == (
        f"weights {folder} do not fit BertModel: of its tensors the file lacks 4 ({lacking}LayerNorm.bias, "
        f"{lacking}LayerNorm.weight, {lacking}dense.bias, …); has unknown 1 (bert.more); has of another shape 1 "
        "(embeddings.LayerNorm.weight (5,) for (24,))"
    )


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_folder_that_cannot_be_read(bert_folder, damage):
    folder, _ = bert_folder
    file = folder / "model.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"cannot be read \(.+\), expected what BertModel\.save_pretrained writes"
    ) as no:
        encoders.text_bert(False, folder, IDS).make()
    assert str(no.value).startswith(f"weights {folder} ")


def test_folder_of_another_model_is_refused(bert_folder, clip_folder):
    with pytest.raises(ValueError, match=r"config\.json has model_type 'clip', expected 'bert'$"):
        encoders.text_bert(False, clip_folder[0], IDS)
    for make in (encoders.clip_text, encoders.clip_image):
        with pytest.raises(ValueError, match=r"config\.json has model_type 'bert', expected 'clip'$"):
            make(bert_folder[0])
    (bert_folder[0] / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json names no model_type, expected 'bert', as save_pretrained"):
        encoders.text_bert(False, bert_folder[0], IDS)


def test_folder_that_knows_too_few_ids_is_refused(bert_folder):
    folder, _ = bert_folder
    assert encoders.text_bert(False, folder, IDS - 1).make().bert.config.vocab_size == IDS
    with pytest.raises(ValueError, match=r"^weights ") as raised:
        encoders.text_bert(False, folder, IDS + 1)
    assert str(raised.value) == (
        f"weights {folder} know 50 ids, expected vocabulary_size 51 or more: use the tokenizer that belongs to them"
    )


OF_FILES = (encoders.audio_resnet18, encoders.frames_resnet18, encoders.image_resnet50, encoders.i3d)
OF_FOLDERS = (lambda _, path: encoders.text_bert(True, path, IDS), lambda _, path: encoders.clip_image(path))


def test_names_of_a_hub_and_things_of_the_wrong_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    hub = "names are not looked up on any hub, download the weights and give their path"
    file, folder = "a file with a state dict", "a folder with config.json and model.safetensors"
    for make in OF_FILES:
        with pytest.raises(
            FileNotFoundError, match=f"^weights microsoft/resnet-18 are not there, expected {file}: {hub}$"
        ):
            make(False, Path("microsoft/resnet-18"))
        with pytest.raises(
            IsADirectoryError, match=f"^weights folder are a folder, expected {file}: give the file in it$"
        ):
            make(False, Path("folder"))
    for make in OF_FOLDERS:
        with pytest.raises(FileNotFoundError, match=f"^weights bert-base are not there, expected {folder}: {hub}$"):
            make(False, Path("bert-base"))
        with pytest.raises(
            NotADirectoryError, match=f"^weights file.pt are a file, expected {folder}: give the folder"
        ):
            make(False, Path("file.pt"))
        with pytest.raises(FileNotFoundError, match=rf"^weights folder have no config\.json, expected {folder}$"):
            make(False, Path("folder"))


def test_digest_tells_weights_apart_and_nothing_else(saved, bert_folder):
    state, save = saved
    first = encoders.frames_resnet18(small=True, weights=save(state, "one.pt")).digest
    assert encoders.frames_resnet18(small=True, weights=save(state, "one.pt")).digest == first
    assert len(first) == 16
    assert int(first, 16) > 0
    state["bn1.bias"][0] += 1
    assert encoders.frames_resnet18(small=True, weights=save(state, "one.pt")).digest != first
    folder, _ = bert_folder
    first = encoders.text_bert(False, folder, IDS).digest
    (folder / "vocab.txt").write_text("[PAD]\n")
    assert encoders.text_bert(False, folder, IDS).digest == first
    changed(folder, lambda state: state | {"bert.embeddings.LayerNorm.bias": torch.ones(24)})
    assert encoders.text_bert(False, folder, IDS).digest != first


def test_unfit_weights_leave_transformers_as_talkative_as_it_was(bert_folder):
    from transformers import logging

    folder, _ = bert_folder
    (folder / "model.safetensors").unlink()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="cannot be read"):
        encoders.text_bert(False, folder, IDS).make()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# ----------------------------------------------------------------------------------------------------------------------
# Under the optimizer


def head_of(spec, classes=3):
    """The head of a modality: the paper's, behind a layer that narrows where there is one."""
    if spec.narrowed is None:
        return three_layer_head(classes, spec.width)
    return nn.Sequential(nn.Linear(spec.width, spec.narrowed), *three_layer_head(classes, spec.narrowed))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_igm(name):
    spec, inputs = SMALL[name][0](), SMALL[name][1]()
    wide = spec.width if spec.narrowed is None else spec.narrowed
    model = nn.ModuleDict(
        {
            "encoder": spec.make(),
            "head": head_of(spec),
            "others": three_layer_head(3, wide),
        }
    )
    parts = {"other": [model["others"]], name: [model["encoder"], model["head"]]}
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    heads = {"other": model["others"], name: model["head"]}
    opt = igm_rs.IGMOptimizer(base, parts, heads=heads, model=model, rho=0.05)
    seen = torch.randn(4, wide)
    labels = torch.tensor([0, 1, 2, 0])

    def closure_of(forward):
        def closure():
            opt.zero_grad()
            loss = functional.cross_entropy(forward(), labels)
            loss.backward()
            return loss

        return closure

    with opt.turn("other"):
        opt.step(closure_of(lambda: model["others"](seen)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with opt.turn(name):
        loss = opt.step(closure_of(lambda: model["head"](model["encoder"](inputs))))
        told = dict(opt.last_stats)
    assert torch.isfinite(loss)
    assert told["second_pass"] == "taken"
    assert not told["skipped"]
    assert list(told["sources"]) == ["other"]
    assert len(told["projected"]) == 3  # every layer of the paper's head has its T; the one that narrows has no partner
    assert all(0 < layer["cosine"] < 1 for layer in told["projected"].values())
    assert len(opt.projectors[name]) == len([layer for layer in model["head"] if isinstance(layer, nn.Linear)])
    after = model.state_dict()
    counts = [int(after[key]) for key in after if key.endswith("num_batches_tracked")]
    assert counts == [1] * len([m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))])
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert not any(key.startswith("others") for key in moved)
    assert any(key.startswith("encoder") for key in moved)
    assert any(key.startswith("head") for key in moved)


def test_sizes_are_written_down_once():
    assert bert.WIDTH == encoders.text_bert(False, None, IDS).width == BertConfig().hidden_size
