"""Whole runs of IGMOptimizer against the oracle: every option of Algorithm 1, weights compared after every step."""

import math

import pytest
import reference as paper
import torch
from models import LAYERS, OfLayers, OwnHeads, Pair, SharedHead, distance

from igm_rs._projection import noise

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd+momentum+wd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
TWO, THREE = ("audio", "video"), ("audio", "video", "text")
# float64: rounding of some hundred operations. float32: one step's rounding is 6e-8 of weights of order one, and the
# two sides round in different orders for a few dozen steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def agree(pair, **run):
    worst = 0.0
    moved = [p.detach().clone() for p in pair.model.parameters()]
    for gap in pair.run(**run):
        worst = max(worst, gap)
    assert worst <= TOLERANCE[pair.dtype], f"weights differ by {worst:.3g}"
    assert all(not torch.equal(p, q) for p, q in zip(pair.model.parameters(), moved, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("rho", [0.05, 0.0], ids=["sam", "plain"])
def test_run_equals_reference_float64(kind, names, base, rho):
    agree(Pair(kind(names), BASES[base], names, rho=rho, tau=1.5))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
def test_run_equals_reference_float32(kind, names, base):
    pair = Pair(kind(names), BASES[base], names, dtype=torch.float32, tau=1.5)
    if base.startswith("adam"):
        # Adam divides by √v: where a gradient is near 0 it turns rounding of 1e-7 into up to lr of motion; a smaller lr
        # keeps the comparison about the arithmetic.
        for optimizer in (pair.opt, pair.oracle.base):
            optimizer.param_groups[0]["lr"] = 1e-3
    agree(pair)


OPTIONS = [
    {"sources": "others"},
    {"sources": {"audio": None, "video": "audio", "text": ["audio", "video"]}},
    {"features": "samples"},
    {"features": "centred"},
    {"covariance": "kept"},
    {"covariance": 0.5},
    {"covariance": 0.5, "features": "centred"},
    {"covariance": "kept", "features": "samples"},
    {"refresh": 2},
    {"refresh": 3, "covariance": "kept"},
    {"refresh": "manual"},
    {"project": "update"},
    {"project": "update", "rho": 0.0},
    {"route": "svd"},
    {"route": "eigh", "features": "samples"},
    {"rho": {"audio": 0.05, "video": 0.0, "text": 0.02}},
    {"tau": {"audio": 10.0, "video": 0.0, "text": 0.4}},
    {"tau": 0.0},
    {"projector": "orthogonal", "covariance": "kept", "batches": 4},
    {"projector": "orthogonal", "covariance": "kept", "alpha": 0.5, "normalise": True},
    {"projector": "orthogonal", "sources": "others", "covariance": "kept", "refresh": 2},
    {"projector": "orthogonal"},
    {"projector": "ridge"},
    {"projector": "ridge", "alpha": 3.0, "features": "samples", "covariance": "kept"},
    {"projector": "ridge", "alpha": 3.0, "sources": "earlier", "tau": {"audio": 0.0, "video": 1.0, "text": 0.4}},
    {"projector": "null_space", "features": "samples"},
    {"projector": "null_space", "alpha": 2.0, "project": "update"},
    {"projector": "identity"},
    {"control": "scalar"},
    {"control": "scalar", "projector": "ridge", "alpha": 3.0},
    {"control": "scalar", "projector": "null_space", "features": "samples"},
    {"sources": "earlier"},
    {"sources": "earlier", "combine": "sum"},
    {"sources": "others", "combine": "sum", "features": "samples"},
    {"sources": "others", "combine": "sum", "features": "centred", "covariance": "kept", "refresh": 2},
    {"sources": "others", "combine": "sum", "projector": "ridge", "alpha": 3.0},
    {"sources": "others", "combine": "sum", "control": "scalar"},
    {"sources": "previous", "combine": "sum"},
    {"augment_bias": True},
    {"augment_bias": True, "project": "update", "features": "samples"},
    {"augment_bias": True, "features": "centred", "covariance": 0.5},
    {"augment_bias": True, "projector": "orthogonal", "covariance": "kept", "batches": 4},
    {"augment_bias": True, "projector": "ridge", "sources": "others", "max_grad_norm": 0.1},
    {"pairing": "shape"},
    {"pairing": "shape", "sources": "others"},
    {"p": math.inf, "rho": 0.01},
    {"adaptive": True},
    {"p": math.inf, "adaptive": True, "rho": {"audio": 0.02, "video": 0.0, "text": 0.01}},
    {"sam_every": 2},
    {"sam_every": 3, "adaptive": True},
    {"skip_inert": True},
    {"route": "polynomial"},
    {"route": "gram"},
]


@pytest.mark.parametrize("alternate", [False, True], ids=["turns", "per batch"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_reference(options, kind, alternate):
    agree(Pair(kind(THREE), BASES["sgd+momentum+wd"], THREE, **{"tau": 1.5, **options}), alternate=alternate)


@pytest.mark.parametrize("base", ["sgd+momentum+wd", "adam"])
def test_update_projection_differs_from_gradient_projection(base):
    runs = []
    for project in ("gradient", "update"):
        torch.manual_seed(0)
        pair = Pair(OwnHeads(), BASES[base], project=project, tau=10.0)
        agree(pair)
        runs.append(pair.model)
    assert distance(*runs) > 1e-4


def test_manual_refresh_equals_reference():
    pair = Pair(OwnHeads(), BASES["sgd+momentum+wd"], refresh="manual", tau=3.0)
    agree(pair, rounds=1)
    for name in TWO:
        pair.opt.refresh(name)
        pair.oracle.refresh(name)
    assert set(pair.opt.projectors["audio"]) == {"audio.0", "audio.1"}
    agree(pair, rounds=2)


def test_losses_and_projected_norms_are_those_of_the_reference():
    pair = Pair(OwnHeads(), BASES["sgd"], tau=3.0)
    list(pair.run(rounds=2))
    stats = pair.opt.last_stats
    first, second = pair.oracle.losses[-1]
    assert stats["loss"] == pytest.approx(first, abs=1e-12)
    assert stats["loss_perturbed"] == pytest.approx(second, abs=1e-12)
    assert stats["sharpness"] == pytest.approx(second - first, abs=1e-12)


OF_LAYERS = [
    {},
    {"augment_bias": True},
    {"augment_bias": True, "features": "samples", "project": "update"},
    {"features": "centred", "covariance": "kept", "refresh": 2},
    {"projector": "ridge", "alpha": 3.0, "sources": "others", "combine": "sum", "augment_bias": True},
    {"projector": "orthogonal", "covariance": "kept", "rho": 0.0},
    {"control": "scalar", "features": "samples"},
]

GROUPED = ("conv1d", "conv2d", "conv3d")
"""Kinds of layer of which there are grouped convolutions in the model."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", OF_LAYERS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_equal_reference(kind, options):
    if kind == "Conv1D":
        pytest.importorskip("transformers")
    if options.get("projector") == "orthogonal" and kind in GROUPED:
        with pytest.raises(
            ValueError, match=r"^projector is 'orthogonal' and layer .*\) is grouped, expected another projector$"
        ):
            Pair(OfLayers(kind, THREE), BASES["sgd+momentum+wd"], THREE, **{"tau": 1.5, **options})
        return
    agree(Pair(OfLayers(kind, THREE), BASES["sgd+momentum+wd"], THREE, **{"tau": 1.5, **options}))


@pytest.mark.parametrize("kind", ["conv2d", "self-attention", "weight norm"])
def test_layers_of_every_kind_equal_reference_float32(kind):
    agree(Pair(OfLayers(kind), BASES["sgd+momentum+wd"], dtype=torch.float32, tau=1.5, augment_bias=True))


def test_second_passes_that_cannot_differ_are_skipped_and_equal_reference():
    pair = Pair(OwnHeads(THREE), BASES["sgd+momentum+wd"], THREE, skip_inert=True, rho=1e-30, tau=1.5)
    with pytest.warns(UserWarning, match="rho = 1e-30 is below the resolution"):
        agree(pair, rounds=2)
    assert pair.opt.inert_steps == len(pair.oracle.losses) == 24
    assert pair.opt.last_stats["second_pass"] == "unchanged"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projector": "ridge", "alpha": 3.0, "sources": "others"},
        {"projector": "null_space", "features": "samples"},
        {"sources": "others", "combine": "sum", "features": "samples", "seed": 7},
        {"augment_bias": True, "route": "svd"},
    ],
    ids=str,
)
def test_random_basis_equals_reference(options):
    # The oracle is given the same numbers.
    def given(twin):
        names = {twin.heads[n][2 * i]: f"{n}.{i}" for n in THREE for i in range(2)}
        extra = options.get("augment_bias", False)

        def numbers(modality, layer):
            return noise(options.get("seed", 0), modality, names[layer], layer.in_features + extra)

        return {"noise": numbers}

    told = {key: value for key, value in options.items() if key != "seed"}
    pair = Pair(
        OwnHeads(THREE),
        BASES["sgd+momentum+wd"],
        THREE,
        tau=1.5,
        control="random",
        of_the_optimizer=lambda _: {"seed": options.get("seed", 0)},
        of_the_oracle=given,
        **told,
    )
    agree(pair)


def whole_heads(model):
    """The heads as they stand in the model, so that a layer's name below its root is its number in the Sequential."""
    return {"modalities": {n: [model.encoders[n]] for n in THREE}, "heads": dict(model.heads)}


def named(twin):
    return {"names": {layer: name for head in twin.heads.values() for name, layer in head.named_children()}}


def test_pairing_by_name_equals_reference():
    agree(
        Pair(
            OwnHeads(THREE),
            BASES["sgd"],
            THREE,
            pairing="name",
            tau=1.5,
            of_the_optimizer=whole_heads,
            of_the_oracle=named,
        )
    )


@pytest.mark.parametrize("by_modality", [False, True])
def test_pairing_by_a_map_equals_reference(by_modality):
    # Of the video's head the last layer alone is projected, of the audio's and the text's the first.
    wanted = {"video.1": "audio.1", "video.0": None, "audio.0": "text.0", "text.0": "video.0"}

    def names(_):
        if not by_modality:
            return {"pairing": wanted}
        return {"pairing": {n: {k: v for k, v in wanted.items() if k.startswith(n)} for n in THREE}}

    def layers(twin):
        found = {f"{n}.{i}": twin.heads[n][2 * i] for n in THREE for i in range(2)}
        return {"pairing": {found[k]: found.get(v) for k, v in wanted.items()}}

    pair = Pair(OwnHeads(THREE), BASES["sgd"], THREE, tau=3.0, of_the_optimizer=names, of_the_oracle=layers)
    agree(pair)
    assert pair.opt.pairs["video"]["audio"] == [("video.1", "audio.1")]


@pytest.mark.parametrize("base", ["sgd+momentum+wd", "adam"])
@pytest.mark.parametrize("options", [{}, {"p": math.inf, "rho": 0.01}, {"adaptive": True, "sam_every": 2}], ids=str)
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
def test_sam_of_the_head_alone_equals_reference(kind, options, base):
    def heads(model):
        return whole_heads(model) if kind is OwnHeads else {}

    def oracles(twin):
        return {"modalities": {n: [twin.encoders[n]] for n in THREE}}

    pair = Pair(
        kind(THREE),
        BASES[base],
        THREE,
        tau=1.5,
        sam_scope="head",
        of_the_optimizer=heads,
        of_the_oracle=oracles,
        **options,
    )
    agree(pair)
    assert pair.oracle.losses[0][1] != pair.oracle.losses[0][0]


@pytest.mark.parametrize("scope", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["conv1d", "self-attention"])
def test_scope_equals_reference(kind, scope):
    # Layers from the output backwards until they hold this share of the parameters, bias and all.
    def no_heads(_):
        return {"heads": None, "scope": scope}

    def taken(twin):
        heads = {}
        for name, net in twin.nets.items():
            wanted, found = scope * sum(p.numel() for p in net.parameters()), []
            layers = [layer for module in net.children() for layer in parts(module)]
            while wanted > 0:
                found.insert(0, layers.pop())
                wanted -= size(found[0])
            heads[name] = found
        return {"heads": heads}

    def parts(module):
        return paper.layers_of(module)

    def size(layer):
        bias = paper.bias_of(layer)
        rows = 0 if bias is None else len(bias[paper._thirds(layer, bias)])
        return paper.matrix_of(layer, paper.weight_of(layer)).numel() + rows

    agree(Pair(OfLayers(kind, THREE), BASES["sgd"], THREE, tau=1.5, of_the_optimizer=no_heads, of_the_oracle=taken))


@pytest.mark.cuda
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("rho", [0.05, 0.0], ids=["sam", "plain"])
def test_run_equals_reference_on_cuda(kind, base, rho):
    agree(Pair(kind(TWO), BASES[base], TWO, device="cuda", rho=rho, tau=1.5))


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_reference_on_cuda(options):
    agree(Pair(OwnHeads(THREE), BASES["sgd+momentum+wd"], THREE, device="cuda", **{"tau": 1.5, **options}))


@pytest.mark.cuda
def test_non_finite_features_on_cuda_are_zeros_and_told_at_the_refresh():
    pair = Pair(OwnHeads(), BASES["sgd"], device="cuda", rho=0.0, features="samples")
    layer = pair.model.heads["audio"][0]
    with pytest.warns(RuntimeWarning, match="1 rows of features of 'audio'"), pair.opt.collect("audio"):
        layer(torch.tensor([[1.0] * 8, [float("nan")] * 8], dtype=torch.float64, device="cuda"))
    expected = torch.ones(8, 8, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(pair.opt.covariances["audio"]["audio.0"], expected)
