"""The networks: shapes, equal starts, padding, heads, and that the optimizer can project all of them, whole."""

import numpy as np
import pytest
import torch
from torch import nn

import igm_rs
from igm_rs.experiments import data, networks
from igm_rs.experiments.networks import FEATURES, Branches

SETS = ("watch", "mfeat", "openclipart")
HEADS = ("own", "shared", "concat", "trunk")


@pytest.fixture(scope="module")
def loaded():
    return {name: data.load(name) for name in SETS}


@pytest.fixture(scope="module")
def every_kind():
    """A small set with a modality of every kind."""
    draw = np.random.default_rng(0)
    return data.DataSet.of(
        {
            "vector": draw.normal(size=(40, 5)),
            "series": draw.normal(size=(40, 2, 30)),
            "picture": draw.normal(size=(40, 1, 24, 20)),
            "note": np.array(["to cut", "to mix it all"] * 20),
        },
        np.arange(40) % 2,
        validation=np.arange(40) % 5 == 3,
        test=np.arange(40) % 5 == 4,
    )


def loss_of(model, dataset, modality, examples=slice(0, 16)):
    logits = model.branch(modality, dataset.train.inputs[modality][examples])
    return nn.functional.cross_entropy(logits, dataset.train.labels[examples])


def kinds_of_layers(module):
    return [type(layer) for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [*SETS, "every_kind"])
def test_shapes_are_those_of_the_docstrings(loaded, every_kind, name, head):
    dataset = loaded.get(name, every_kind)
    model = Branches.of(dataset, dataset.modalities, head=head, seed=0)
    inputs = {modality: values[:6] for modality, values in dataset.train.inputs.items()}
    for modality, values in inputs.items():
        assert model.encoders[modality](values).shape == (6, FEATURES)
        assert model.branch(modality, values).shape == (6, dataset.classes)
    assert model.joint(inputs).shape == (6, dataset.classes)
    assert model.modalities == dataset.modalities


@pytest.mark.parametrize("name", SETS)
def test_every_method_starts_a_modality_from_the_same_weights(loaded, name):
    dataset = loaded[name]
    last = dataset.modalities[-1]
    alone = Branches.of(dataset, [last], head="own", seed=3)
    for head in HEADS:
        whole = Branches.of(dataset, dataset.modalities, head=head, seed=3)
        for mine, theirs in zip(alone.encoders.parameters(), whole.encoders[last].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    whole = Branches.of(dataset, dataset.modalities, head="own", seed=3)
    for mine, theirs in zip(alone.head_of(last).parameters(), whole.head_of(last).parameters(), strict=True):
        assert torch.equal(mine, theirs)
    other = Branches.of(dataset, [last], head="own", seed=4)
    assert not torch.equal(next(alone.parameters()), next(other.parameters()))


@pytest.mark.parametrize("head", ["shared", "concat", "trunk"])
def test_what_is_shared_starts_alike_whichever_modality_is_first(loaded, head):
    mfeat = loaded["mfeat"]
    one = Branches.of(mfeat, ("fou", "mor"), head=head, seed=1)
    other = Branches.of(mfeat, ("mor", "fou"), head=head, seed=1)
    shared = [(one.head, other.head) if one.trunk is None else (one.trunk, other.trunk)]
    for mine, theirs in shared:
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


def test_building_a_network_leaves_the_random_state_alone(loaded):
    state = torch.random.get_rng_state()
    for head in HEADS:
        Branches.of(loaded["mfeat"], loaded["mfeat"].modalities, head=head, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def linear_sizes(module):
    return [(layer.in_features, layer.out_features) for layer in module.modules() if isinstance(layer, nn.Linear)]


def test_heads_are_the_papers_or_what_their_name_says(loaded):
    mfeat = loaded["mfeat"]
    own, shared, concat, trunk = (Branches.of(mfeat, mfeat.modalities, head=head, seed=0) for head in HEADS)
    assert linear_sizes(own.head_of("zer")) == [(64, 256), (256, 64), (64, 10)]
    assert [type(layer) for layer in own.head_of("zer")] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert own.head_of("fou") is not own.head_of("zer")
    assert shared.head_of("fou") is shared.head_of("mor")
    assert linear_sizes(shared.head_of("fou")) == [(64, 10)]
    assert concat.head_of("fou") is concat.head_of("mor")
    assert linear_sizes(concat.head_of("fou")) == [(192, 256), (256, 64), (64, 10)]
    assert linear_sizes(trunk.trunk) == [(64, 64), (64, 64)]
    assert linear_sizes(trunk.head_of("mor")) == [(64, 10)]
    assert own.trunk is shared.trunk is concat.trunk is None


@pytest.mark.parametrize("head", HEADS)
def test_parts_are_what_a_step_of_the_modality_moves(loaded, head):
    mfeat = loaded["mfeat"]
    model = Branches.of(mfeat, mfeat.modalities, head=head, seed=0)
    loss_of(model, mfeat, "zer").backward()
    moved = {parameter for parameter in model.parameters() if parameter.grad is not None}
    assert moved == {parameter for part in model.parts_of("zer") for parameter in part.parameters()}
    assert model.parts_of("zer")[0] is model.encoders["zer"]
    assert model.parts_of("zer")[-1] is model.head_of("zer")
    assert (model.trunk in model.parts_of("zer")) == (head == "trunk")


def test_joint_is_the_sum_of_the_branches_or_the_head_over_all_features(loaded):
    mfeat = loaded["mfeat"]
    inputs = {name: values[:5] for name, values in mfeat.train.inputs.items()}
    for head in ("own", "shared", "trunk"):
        model = Branches.of(mfeat, mfeat.modalities, head=head, seed=0)
        total = sum(model.branch(name, values) for name, values in inputs.items())
        torch.testing.assert_close(model.joint(inputs), total)
    model = Branches.of(mfeat, mfeat.modalities, head="concat", seed=0)
    features = [model.encoders[name](values) for name, values in inputs.items()]
    torch.testing.assert_close(model.joint(inputs), model.head(torch.cat(features, -1)))
    alone = torch.cat([torch.zeros_like(features[0]), features[1], torch.zeros_like(features[2])], -1)
    torch.testing.assert_close(model.branch("zer", inputs["zer"]), model.head(alone))


@pytest.mark.parametrize("head", ["own", "concat"])
def test_logits_are_those_of_evaluation_mode_without_gradients(loaded, head):
    mfeat = loaded["mfeat"]
    model = Branches.of(mfeat, mfeat.modalities, head=head, seed=0)
    seen = []
    model.encoders["fou"].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    logits, joint = model.measured(mfeat.validation.inputs)
    assert seen == ([False, False] if head == "concat" else [False])
    assert model.training
    assert list(logits) == ["fou", "zer", "mor"]
    assert not logits["fou"].requires_grad
    assert logits["fou"].shape == (400, 10)
    if head == "own":
        assert joint is None
    else:
        assert not joint.requires_grad
        assert joint.shape == (400, 10)


@pytest.mark.parametrize("name", SETS)
def test_nothing_in_a_network_is_remembered_between_passes(loaded, name):
    model = Branches.of(loaded[name], loaded[name].modalities, head="own", seed=0)
    assert list(model.buffers()) == []
    modality = loaded[name].modalities[0]
    with torch.no_grad():
        one, other = (model.branch(modality, loaded[name].train.inputs[modality][:9]) for _ in range(2))
        alone = model.branch(modality, loaded[name].train.inputs[modality][4:5])
    assert torch.equal(one, other)
    torch.testing.assert_close(alone, one[4:5])


def test_padding_has_no_part_in_a_title(loaded):
    clipart = loaded["openclipart"]
    encoder = Branches.of(clipart, ["title"], head="own", seed=0).encoders["title"]
    ids = torch.tensor([[5, 9, 7]])
    long = torch.nn.functional.pad(ids, (0, 40))
    torch.testing.assert_close(encoder(long), encoder(ids))
    by_hand = encoder.layers(encoder.table.weight[ids[0]].mean(0, keepdim=True))
    torch.testing.assert_close(encoder(long), by_hand)
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    assert torch.isfinite(encoder(nothing)).all()
    (encoder(torch.cat([long, long])) ** 3).sum().backward()
    moved = encoder.table.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert moved == [5, 7, 9]
    assert not encoder.table.weight[data.PADDING].any()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (24, 40), (1, 1)])
def test_pictures_of_any_size_are_taken(height, width):
    assert networks.PictureEncoder(3)(torch.randn(2, 3, height, width)).shape == (2, FEATURES)


def test_what_cannot_be_built_is_refused(loaded, every_kind):
    with pytest.raises(ValueError, match="head is 'linear', expected one of 'own', 'shared', 'shared-three-layer', 'c"):
        Branches.of(every_kind, ["vector"], head="linear", seed=0)
    with pytest.raises(ValueError, match="modality is 'video', expected one of accelerometer, gyroscope"):
        Branches.of(loaded["watch"], ["video"], head="own", seed=0)
    short = data.DataSet.of(
        {"series": np.zeros((6, 2, 3))}, np.arange(6) % 2, validation=np.arange(6) == 4, test=np.arange(6) == 5
    )
    with pytest.raises(ValueError, match="series has series of 3 readings, expected 4 or more"):
        Branches.of(short, ["series"], head="own", seed=0)


# With the optimizer


@pytest.mark.parametrize("name", SETS)
def test_a_scope_of_one_projects_every_layer_but_tables_and_norms(loaded, name):
    dataset = loaded[name]
    model = Branches.of(dataset, dataset.modalities, head="own", seed=0)
    base = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    parts = {modality: model.parts_of(modality) for modality in dataset.modalities}
    optimizer = igm_rs.IGMOptimizer(base, parts, scope=1, rho=0.05, tau=0.4, model=model)
    matrices = {
        modality: sum(kind in (nn.Linear, nn.Conv1d, nn.Conv2d) for part in mine for kind in kinds_of_layers(part))
        for modality, mine in parts.items()
    }
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(2):
        for modality in optimizer.modalities:
            with optimizer.turn(modality):
                for _ in range(2):

                    def closure(active=modality):
                        optimizer.zero_grad()
                        loss = loss_of(model, dataset, active)
                        loss.backward()
                        return loss

                    optimizer.step(closure)
    assert optimizer.skipped_steps == 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(mine, old) for mine, old in zip(model.parameters(), before, strict=True))
    for modality in dataset.modalities:
        assert len(optimizer.spectrum(modality)) == matrices[modality]


def paired_layers(model, data_set, scope):
    """Return, by modality, how many matrices and convolutions are paired with a layer of a source."""
    parts = {modality: model.parts_of(modality) for modality in data_set.modalities}
    base = torch.optim.SGD(model.parameters(), lr=0.03)
    optimizer = igm_rs.IGMOptimizer(base, parts, scope=scope, model=model)
    named = dict(model.named_modules())
    found = {}
    for modality, sources in optimizer.pairs.items():
        kinds = [type(named[mine]) for pairs in sources.values() for mine, _ in pairs]
        found[modality] = (kinds.count(nn.Linear), sum(kind in (nn.Conv1d, nn.Conv2d) for kind in kinds))
    return found


@pytest.mark.parametrize(
    ("name", "scope", "found"),
    [
        ("watch", 0.3, {"accelerometer": (2, 0), "gyroscope": (2, 0)}),
        ("watch", 0.5, {"accelerometer": (3, 0), "gyroscope": (3, 0)}),
        ("watch", 0.8, {"accelerometer": (3, 1), "gyroscope": (3, 1)}),
        ("watch", 1, {"accelerometer": (3, 3), "gyroscope": (3, 3)}),
        ("mfeat", 1, {"fou": (4, 0), "zer": (4, 0), "mor": (4, 0)}),
        ("openclipart", 0.1, {"image": (2, 0), "title": (2, 0)}),
        ("openclipart", 1, {"image": (3, 1), "title": (4, 0)}),  # a 1 × 1 convolution and a dense layer, as wide
    ],
)
def test_which_layers_a_scope_gives_a_projector(loaded, name, scope, found):
    """A T has the width of its layer: like networks have one for every layer, unlike ones for their deep layers."""
    model = Branches.of(loaded[name], loaded[name].modalities, head="own", seed=0)
    assert paired_layers(model, loaded[name], scope) == found


@pytest.mark.parametrize("scope", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("head", ["own", "shared", "trunk"])
@pytest.mark.parametrize("name", [*SETS, "every_kind"])
def test_every_scope_can_be_set_on_every_network(loaded, every_kind, name, head, scope):
    dataset = loaded.get(name, every_kind)
    model = Branches.of(dataset, dataset.modalities, head=head, seed=0)
    base = torch.optim.SGD(model.parameters(), lr=0.03)
    parts = {modality: model.parts_of(modality) for modality in dataset.modalities}
    optimizer = igm_rs.IGMOptimizer(base, parts, scope=scope, rho=0, tau=0.4, model=model)
    for modality in optimizer.modalities:
        share = optimizer.projected_share[modality]
        assert share == 0 if scope == 0 else share > 0
        with optimizer.turn(modality):
            optimizer.zero_grad()
            loss_of(model, dataset, modality).backward()
            optimizer.step()
