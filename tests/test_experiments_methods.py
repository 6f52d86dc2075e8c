"""The methods: what each makes of the optimizer, that modification fires where it must, and a method of one's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

import igm_rs
from igm_rs.experiments import data, methods, registering
from igm_rs.experiments.configuration import Config, load_config
from igm_rs.experiments.methods import METHODS, Method, Row
from igm_rs.experiments.networks import Branches
from igm_rs.experiments.training import Training

TOY = Path(__file__).with_name("toy_sets.py")
registering.register_files([TOY])
NAMES = ("a", "b")
TINY = load_config("toy", {"steps": 4, "turn_steps": 2, "batch_size": 16})
OURS = [key for key, kind in METHODS.items() if type(kind).__module__.startswith("igm_rs.")]


@pytest.fixture
def toy():
    return data.load("toy").without_test()


def row(key, overrides=None):
    overrides = overrides or {}
    if key == "igm-one-sided":
        overrides = {"sources": {"a": None, "b": "a"}} | overrides
    return Row(key, NAMES[:1] if METHODS[key].schedule == "single" else NAMES, overrides)


def trained(toy, key, overrides=None, seed=0, config=TINY):
    training = Training(toy, row(key, overrides), config, 0.05, seed)
    return training, training.run()


# Rows


def test_methods_are_in_the_order_of_the_tables():
    assert OURS == [
        "single", "joint-concat", "joint-sum", "sam", "turns", "turns-sam", "mla", "igm-no-sam", "igm", "igm-shared",
        "shared-plain", "shared-frozen", "control-scalar", "control-random", "shared-scalar", "shared-random",
        "igm-one-sided", "released", "mla-three-layer",
    ]  # fmt: skip
    files = {Path(__import__(type(METHODS[key]).__module__, fromlist=["_"]).__file__).name for key in OURS}
    assert len(files) == len(OURS)


def test_a_row_has_a_key_for_files_and_a_label_for_tables():
    assert Row("single", ("a",)).key == "single-a"
    assert Row("single", ("a",)).label == "a alone"
    assert Row("igm", NAMES).key == "igm"
    wide = Row("igm", NAMES, {"scope": 0.3})
    assert (wide.key, wide.label) == ("igm-scope-0.3", "IGM, scope 0.3")
    one = Row("igm-one-sided", NAMES, {"sources": {"a": None, "b": "a"}})
    assert one.key == "igm-one-sided-sources-a.none-b.a"
    assert one.config(TINY).sources == {"a": None, "b": "a"}
    assert len({wide, Row("igm", NAMES, {"scope": 0.3}), one}) == 2


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"method is 'ogm', expected one of single, joint-concat"):
        Row("ogm", NAMES)
    with pytest.raises(ValueError, match=r"method single has \['a', 'b'\], expected one modality"):
        Row("single", NAMES)
    with pytest.raises(ValueError, match=r"method igm has \['a'\], expected two modalities or more"):
        Row("igm", ("a",))
    with pytest.raises(ValueError, match=r"there is no setting 'rhoo', expected some of alpha, base"):
        Row("igm", NAMES, {"rhoo": 1}).config(TINY)


# Optimizers


@pytest.mark.parametrize("key", ["single", "joint-concat", "joint-sum"])
@pytest.mark.parametrize(("base", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_methods_that_need_nothing_else_use_the_optimizer_underneath(toy, key, base, kind):
    config = load_config("toy", {"base": base, "weight_decay": 0.01})
    made = Training(toy, row(key), config, 0.05, 0).optimizer
    assert type(made) is kind
    assert made.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("key", [key for key in OURS if key not in ("single", "joint-concat", "joint-sum")])
def test_sam_and_modification_are_what_the_class_says(toy, key):
    training, result = trained(toy, key)
    method, optimizer = METHODS[key], training.optimizer
    assert isinstance(optimizer, igm_rs.IGMOptimizer)
    assert set(optimizer.rho.values()) == {TINY.rho if method.sam else 0.0}
    assert (result.effective_perturbation is not None) == method.sam
    assert (result.cosine is not None) == method.modifies == (result.projected_share is not None)
    if key in ("control-scalar", "shared-scalar"):
        assert result.cosine == pytest.approx(1, abs=1e-9)
    elif method.modifies:
        assert result.cosine < 0.99999
    assert optimizer.skipped_steps == 0


def test_igm_modifies_the_three_layers_of_each_head_by_the_modality_before(toy):
    optimizer = Training(toy, row("igm"), TINY, 0.05, 0).optimizer
    assert optimizer.sources == {"a": ["b"], "b": ["a"]}
    assert {name: len(pairs) for name, pairs in optimizer.pairs["b"].items()} == {"a": 3}
    assert set(optimizer.tau.values()) == {0.4}


def test_a_scope_modifies_more_than_the_heads(toy):
    shares = [trained(toy, "igm-no-sam", overrides)[1].projected_share for overrides in ({}, {"scope": 1.0})]
    assert shares[0] < shares[1]
    assert trained(toy, "igm-no-sam", {"scope": 0.0})[1].cosine is None


def test_a_one_sided_method_leaves_a_modality_alone_and_says_what_it_needs(toy):
    optimizer = Training(toy, row("igm-one-sided"), TINY, 0.05, 0).optimizer
    assert optimizer.sources == {"a": [], "b": ["a"]}
    with pytest.raises(ValueError, match="sources is None, expected whose T acts on each modality"):
        Training(toy, Row("igm-one-sided", NAMES), TINY, 0.05, 0)


def test_a_one_sided_run_is_igm_until_its_modification_is_first_left_out(toy):
    one, both = (trained(toy, key)[1].after_turn for key in ("igm-one-sided", "igm"))
    assert one[:3] == both[:3]  # initial, a (no T yet), b (modified by a's T)


# MLA


def test_the_projection_of_mla_fires(toy):
    """The gradient that the base uses is the loss's own, times P; before the first row P is I."""
    training = Training(toy, row("mla"), TINY, 0.05, 0)
    model, optimizer = training.model, training.optimizer
    chosen = torch.arange(16)
    training.step_on(("a",), chosen, {"a": toy.train.inputs["a"][chosen]})
    model.eval()  # so that this pass is no feature
    logits = model.branch("b", toy.train.inputs["b"][chosen])
    model.train()
    loss = nn.functional.cross_entropy(logits, toy.train.labels[chosen])
    (before,) = torch.autograd.grad(loss, [model.head.weight])
    training.step_on(("b",), chosen, {"b": toy.train.inputs["b"][chosen]})
    after = model.head.weight.grad
    (T,) = optimizer.projectors["a"].values()
    assert not torch.allclose(after, before, rtol=1e-3)
    assert (after - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(after.double(), before.double() @ T.double(), rtol=1e-4, atol=1e-7)
    ((_, told),) = optimizer.last_stats["projected"].items()
    assert told["cosine"] < 0.999
    assert told["norm_after"] < told["norm_before"]


def test_mla_projects_in_every_step_after_the_first(toy):
    training = Training(toy, row("mla"), TINY, 0.05, 0)
    cosines = []
    for step in range(4):
        for name in NAMES:
            chosen = torch.arange(16) + 16 * step
            training.step_on((name,), chosen, {name: toy.train.inputs[name][chosen]})
            cosines += [layer["cosine"] for layer in training.optimizer.last_stats["projected"].values()]
    assert len(cosines) >= 7
    assert max(cosines[1:]) < 0.999


# Shared trunk


def test_a_frozen_trunk_moves_for_the_first_modality_only(toy):
    training = Training(toy, row("shared-frozen"), TINY, 0.05, 0)
    before = [p.clone() for p in training.model.trunk.parameters()]
    moved = []

    class Watched(Training):
        def step_on(self, active, chosen, inputs):
            loss = super().step_on(active, chosen, inputs)
            now = [p.clone() for p in self.model.trunk.parameters()]
            moved.append((active, any(not torch.equal(x, y) for x, y in zip(now, self.seen, strict=True))))
            self.seen = now
            return loss

    watched = Watched(toy, row("shared-frozen"), TINY, 0.05, 0)
    watched.seen = before
    watched.run()
    assert moved == [(("a",), True)] * 4 + [(("b",), False)] * 4


def test_the_trunk_is_protected_by_the_earlier_modalities_alone(toy):
    training, result = trained(toy, "igm-shared")
    optimizer = training.optimizer
    assert optimizer.sources == {"a": [], "b": ["a"]}
    assert {name: len(pairs) for name, pairs in optimizer.pairs["b"].items()} == {"a": 2}
    assert set(optimizer.tau.values()) == {100.0}
    (T, _) = optimizer.projectors["a"].values()
    assert T.shape == (65, 65)  # with the bias
    assert result.cosine < 0.9


def test_random_bases_are_the_runs_own(toy):
    projectors = []
    for seed in (0, 1):
        training = Training(toy, row("control-random"), TINY, 0.05, seed)
        training.run()
        projectors.append(next(iter(training.optimizer.projectors["a"].values())))
    assert not torch.allclose(*projectors, atol=1e-3)


# One's own


def test_a_method_of_ones_own_is_one_file_with_one_class(toy):
    gentle = METHODS["gentle"]
    assert list(METHODS)[-1] == "gentle"
    training, result = trained(toy, "gentle")
    assert gentle.label == "gentle turns"
    assert set(training.optimizer.rho.values()) == {0.005}
    assert result.effective_perturbation == pytest.approx(1, abs=0.05)


def test_unfit_methods_are_refused(monkeypatch):
    monkeypatch.setattr(methods.base, "METHODS", dict(METHODS))
    with pytest.raises(TypeError, match="method is 3, expected a subclass of Method"):
        methods.method(3)

    class Nameless(Method):
        key = "nameless"
        schedule = "turns"

    with pytest.raises(TypeError, match="method Nameless has no label, expected one"):
        methods.method(Nameless)

    class Spaced(Method):
        key, label, schedule = "a b", "a", "turns"

    with pytest.raises(ValueError, match="method Spaced has the key 'a b', expected small letters"):
        methods.method(Spaced)

    class Second(Method):
        key, label, schedule = "igm", "a", "turns"

    with pytest.raises(ValueError, match="method Second has the key 'igm', which Igm has already"):
        methods.method(Second)
    with pytest.raises(NotImplementedError):
        Method().optimizer(None, (), Config(), 0.1, 1)


def test_files_that_register_nothing_are_refused(tmp_path):
    file = tmp_path / "nothing.py"
    with pytest.raises(FileNotFoundError, match=r"nothing\.py does not exist"):
        registering.register_files([file])
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"nothing\.py registers nothing, expected a function under @register"):
        registering.register_files([file])


@pytest.mark.parametrize("key", OURS)
def test_every_method_starts_a_modality_alike(toy, key):
    mine = row(key)
    model = Branches.of(toy, mine.modalities, head=mine.of.head, seed=3)
    alone = Branches.of(toy, ["a"], head="own", seed=3)
    for one, other in zip(model.encoders["a"].parameters(), alone.encoders["a"].parameters(), strict=True):
        assert torch.equal(one, other)
