"""Sets that lie in files: the same batches whatever decodes them, resumed to the bit, and networks of a set's own."""

import copy
import dataclasses
import math
import os
import re

import filed_sets
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from igm_rs.experiments import data, evaluation, feeding, store
from igm_rs.experiments.columns import Column, Reading, seeded
from igm_rs.experiments.configuration import DEVIATIONS, Config
from igm_rs.experiments.feeding import Means, feed
from igm_rs.experiments.methods import METHODS, Row
from igm_rs.experiments.networks import AT_ONCE, Branches, Frozen, frozen
from igm_rs.experiments.on_disk.faults import DataFault
from igm_rs.experiments.training import Stopped, Training
from igm_rs.released import Released, mixup, mixup_loss

NAMES = ("a", "b")
TINY = Config(data="filed", steps=12, turn_steps=4, batch_size=8, seeds=1, tuning_seeds=(1,))
BY_TURNS = [key for key, each in METHODS.items() if each.schedule != "single" and each.key != "igm-one-sided"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("filed")
    filed_sets.write(made)
    return made


@pytest.fixture
def filed(folder):
    return data.load("filed", folder)


def batches(column, *, begin=0, loaders=0, count=5, seed=3):
    stream = feed(column, 8, seed, begin, Means(loaders=loaders))
    return [next(stream) for _ in range(count)]


# Batches


def test_batches_are_the_same_however_many_processes_decode(filed):
    alone, beside = (batches(filed.train.inputs["a"], loaders=loaders) for loaders in (0, 2))
    assert len(alone) == 5
    assert all(map(torch.equal, alone, beside))


def test_batches_begin_where_they_are_told_to(filed):
    whole = batches(filed.train.inputs["a"], count=10)  # more than a pass of six
    assert all(map(torch.equal, whole[7:], batches(filed.train.inputs["a"], begin=7, count=3)))


def test_random_numbers_are_those_of_the_run_the_batch_and_the_example(filed):
    column = filed.train.inputs["a"]
    first, again, other = batches(column), batches(column), batches(column, seed=4)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    whole = torch.cat(batches(column, count=12))  # two passes
    plain = column[torch.arange(len(column))]
    nearest = torch.cdist(whole, plain).argmin(1)
    assert sorted(nearest[:48].tolist()) == list(range(48))
    moved = [whole[nearest == place] - plain[place] for place in range(48)]
    assert all(len(each) == 2 and not torch.equal(*each) for each in moved)  # others in the second pass


def test_torchs_own_generator_is_left_alone(filed):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches(filed.train.inputs["a"])
    batches(filed.train.inputs["a"], loaders=1, count=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_the_generator_of_a_gpu_is_left_alone(filed):
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    batches(filed.train.inputs["a"])
    Branches.of(filed, NAMES, head="own", seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_only_torchs_own_generator_is_seeded(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"^inside$"), seeded(3):
        first = torch.rand(2)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))


class Torn(filed_sets.Rows):
    """A column, one file of which cannot be decoded."""

    def example(self, place, seed):
        if place == 4:
            raise ValueError(f"file {self.paths[4].name} is torn")
        return super().example(place, seed)


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_file_that_cannot_be_decoded_is_said_as_it_was(filed, loaders):
    torn = Torn(filed.train.inputs["a"].paths, 5)
    with pytest.raises(ValueError, match=r"^file 004.npy is torn$"):
        batches(torn, loaders=loaders, count=6)
    split = dataclasses.replace(filed.train, inputs={**filed.train.inputs, "a": torn})
    with pytest.raises(ValueError, match=r"^file 004.npy is torn$"):
        Branches.of(filed, NAMES, head="own", seed=0).measured(split.inputs, Means(loaders=loaders))


def test_a_column_is_indexed_like_a_tensor(filed):
    column = filed.train.inputs["b"]
    assert column[2:5].shape == (3, 7)
    assert torch.equal(column[torch.tensor([4, 2])], column[[4, 2]])
    assert torch.equal(column[2:3][0], column.example(2, None))


# Training


@pytest.mark.parametrize("key", BY_TURNS)
def test_every_method_trains_on_files_and_goes_on_to_the_bit_in_the_middle_of_a_turn(filed, key):
    def made(loaders=0):
        return Training(filed.without_test(), Row(key, NAMES), TINY, 0.05, 7, Means(loaders=loaders))

    whole = made().run()
    left = made(loaders=1)
    calls = iter(range(100))
    with pytest.raises(Stopped):
        left.run(stop=lambda: next(calls) == 6)
    state = left.state()
    again = made()
    again.load_state(state)
    found = again.run()
    assert found.curve == whole.curve
    for name, value in whole.weights["last"].items():
        assert torch.equal(found.weights["last"][name], value), name
    assert all(math.isfinite(point["loss"]) for point in whole.curve)


class Deadly(Column):
    """Ends the process that decodes it."""

    def __len__(self):
        return 4

    @property
    def shape(self):
        return 4, 1

    def example(self, place, seed):
        os._exit(3)

    def digest_lines(self):
        return []


def test_a_lost_process_is_told_with_what_may_be_done():
    with pytest.raises(ChildProcessError) as told:
        next(feeding.feed(Deadly(), 2, 0, 0, Means(loaders=1)))
    assert re.fullmatch(
        r"a process that decodes files is gone \(DataLoader worker .*\), most likely for want of memory or of room in "
        r"/dev/shm: try fewer --loaders; --resume goes on from what was saved, where trainings are kept",
        str(told.value),
    )


class Undecodable(Deadly):
    """Says so as any column of a user's may."""

    def example(self, place, seed):
        raise ValueError("x.jpg: it cannot be decoded")


@pytest.mark.parametrize("loaders", [0, 1])
def test_what_cannot_be_decoded_is_a_fault_of_the_data(loaders):
    with pytest.raises(DataFault, match=r"^x\.jpg: it cannot be decoded$"):
        next(feeding.in_order(Undecodable(), 2, Means(loaders=loaders)))


class Failing(Deadly):
    """Fails as torch does."""

    def example(self, place, seed):
        raise RuntimeError("shapes do not fit")


def test_an_error_within_a_process_is_no_lost_process():
    with pytest.raises(RuntimeError, match=r"shapes do not fit"):
        next(feeding.feed(Failing(), 2, 0, 0, Means(loaders=1)))


def test_a_process_lost_in_the_middle_of_a_step_is_told_too(filed, monkeypatch):
    training = Training(filed.without_test(), Row("igm", NAMES), TINY, 0.05, 7)

    def lost(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    monkeypatch.setattr(training, "step_on", lost)
    with pytest.raises(ChildProcessError, match=r"\(DataLoader worker \(pid 1\) is killed by signal: Killed\), most"):
        training.run()


def test_cudnn_computes_alike_and_is_otherwise_as_it_was(filed, monkeypatch):
    cudnn, names = torch.backends.cudnn, ("enabled", "allow_tf32", "deterministic", "benchmark")
    for name, value in zip(names, (True, False, False, True), strict=True):
        monkeypatch.setattr(cudnn, name, value)
    seen = []

    class Noted(Training):
        def step_on(self, active, chosen, inputs):
            seen.append(tuple(getattr(cudnn, name) for name in names))
            return super().step_on(active, chosen, inputs)

    Noted(filed.without_test(), Row("igm", NAMES), TINY, 0.05, 7).run()
    assert set(seen) == {(True, False, True, False)}
    assert tuple(getattr(cudnn, name) for name in names) == (True, False, False, True)


def test_other_errors_of_torch_are_its_own():
    with pytest.raises(RuntimeError, match=r"^out of memory$") as told, feeding.lost_process_told():
        raise RuntimeError("out of memory")
    assert not isinstance(told.value, OSError)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_batches_for_a_gpu_are_pinned(filed, monkeypatch, device, pinned):
    found = {}

    def loader(*_, **options):
        found.update(options)
        return []

    monkeypatch.setattr(feeding, "DataLoader", loader)
    list(feeding.feed(filed.train.inputs["a"], 4, 0, 0, Means(device, 2)))
    assert (found["pin_memory"], found["num_workers"]) == (pinned, 2)


@pytest.mark.parametrize("step", [*range(1, 24, 2), *range(4, 24, 4)])
def test_the_released_arithmetic_goes_on_to_the_bit_wherever_it_is_left(filed, step):
    whole = Training(filed.without_test(), Row("released", NAMES), TINY, 0.05, 7).run()
    left, again = (Training(filed.without_test(), Row("released", NAMES), TINY, 0.05, 7) for _ in range(2))
    with pytest.raises(Stopped):
        left.run(stop=lambda: left.done == step)
    again.load_state(left.state())
    found = again.run()
    assert found.curve == whole.curve
    assert all(torch.equal(found.weights["last"][name], value) for name, value in whole.weights["last"].items())


def test_a_checkpoint_of_another_kind_of_device_is_refused(filed):
    training = Training(filed.without_test(), Row("igm", NAMES), TINY, 0.05, 7)
    state = training.state()
    state["random"] = state["random"] * 2
    with pytest.raises(ValueError, match=r"^its random numbers are those of another kind of device, expected cpu$"):
        training.load_state(state)


def test_a_training_learns_from_files(filed):
    config = dataclasses.replace(TINY, steps=90, turn_steps=15)
    trained = Training(filed.without_test(), Row("igm", NAMES), config, 0.05, 7).run()
    first, last = trained.curve[0], trained.curve[-1]
    assert last["loss"] < 0.9 * first["loss"]
    assert last["accuracy"]["sum"] > 0.6  # chance is a third


def test_what_is_measured_does_not_depend_on_the_portions(filed, monkeypatch):
    model = Branches.of(filed, NAMES, head="own", seed=0)
    inputs = filed.train.inputs
    assert len(filed.train) <= AT_ONCE
    whole = model.logits(inputs)
    monkeypatch.setattr("igm_rs.experiments.networks.AT_ONCE", 10)
    parts = model.logits(inputs)
    beside, none = model.measured(inputs, Means(loaders=2))
    assert none is None
    assert all(torch.equal(beside[name], parts[name]) for name in NAMES)
    assert model.training
    monkeypatch.setattr("igm_rs.experiments.feeding.NUMBERS_AT_ONCE", 21)  # three examples of 7 numbers
    sizes = [len(own["a"]) for own in model._portions(inputs, Means())]
    assert set(sizes) == {3}
    monkeypatch.setattr("igm_rs.experiments.feeding.NUMBERS_AT_ONCE", 1)
    assert len(list(model._portions(inputs, Means()))) == len(filed.train)
    for name in NAMES:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)  # other sizes of matrix products


def test_a_digest_knows_the_files(filed, folder, tmp_path):
    before = store.data_digest(filed)
    assert store.data_digest(data.load("filed", folder)) == before
    other = copy.deepcopy(filed)
    other.train.inputs["a"].paths.reverse()
    assert store.data_digest(other) != before
    renamed = dataclasses.replace(
        filed, encoders={**filed.encoders, "a": dataclasses.replace(filed.encoders["a"], digest="x")}
    )
    assert store.data_digest(renamed) != before


# Networks


def test_the_image_head_of_text_and_image_begins_with_one_more_layer(filed):
    model = Branches.of(filed, NAMES, head="own", seed=0)
    shapes = {
        name: [tuple(layer.weight.shape) for layer in model.heads[name] if isinstance(layer, nn.Linear)]
        for name in NAMES
    }
    assert shapes["a"] == [(256, 8), (64, 256), (3, 64)]
    assert shapes["b"] == [(8, 12), *shapes["a"]]
    assert len(model.narrow) == 0


@pytest.mark.parametrize("head", ["shared", "concat", "trunk"])
def test_where_something_is_shared_that_layer_stands_before_it(filed, head):
    model = Branches.of(filed, NAMES, head=head, seed=0)
    assert tuple(model.narrow["b"].weight.shape) == (8, 12)
    assert list(model.narrow) == ["b"]
    assert model.narrow["b"] in model.parts_of("b")
    inputs = {name: column[0:6] for name, column in filed.train.inputs.items()}
    assert model.joint(inputs).shape == (6, 3)
    for name in NAMES:
        assert model.branch(name, inputs[name]).shape == (6, 3)
    held = {p for name in NAMES for part in model.parts_of(name) for p in part.parameters()}
    assert held == set(model.parameters())


def test_unlike_widths_cannot_share(filed):
    filed = dataclasses.replace(
        filed, encoders={**filed.encoders, "b": dataclasses.replace(filed.encoders["b"], narrowed=None)}
    )
    message = r"^features are of unlike widths \(a 8, b 12\), expected one to share a head or a trunk$"
    with pytest.raises(ValueError, match=message):
        Branches.of(filed, NAMES, head="shared", seed=0)


def test_a_frozen_encoder_stays_as_it_is(filed):
    encoders = {
        name: dataclasses.replace(spec, make=lambda spec=spec: frozen(spec.make))
        for name, spec in filed.encoders.items()
    }
    filed = dataclasses.replace(filed, encoders=encoders)
    training = Training(filed.without_test(), Row("igm", NAMES), TINY, 0.05, 7)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    assert isinstance(training.model.encoders["a"], Frozen)
    after = training.run().weights["last"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("heads.")}
    assert not training.model.encoders["a"].encoder.training


# The paper's settings


def test_each_modality_has_its_own_rho(filed):
    config = dataclasses.replace(TINY, rho={"b": 0.02, "a": 0.1})
    turns = Training(filed.without_test(), Row("igm", NAMES), config, 0.05, 7).optimizer
    assert dict(turns.rho) == {"a": 0.1, "b": 0.02}
    training = Training(filed.without_test(), Row("sam", NAMES), config, 0.05, 7)
    joint = training.optimizer
    assert [group["rho"] for group in joint.param_groups] == [0.1, 0.02]
    counts = [sum(p.numel() for p in group["params"]) for group in joint.param_groups]
    assert counts == [
        sum(p.numel() for part in training.model.parts_of(name) for p in part.parameters()) for name in NAMES
    ]
    training.run()
    assert joint.last_stats["effective_perturbation"] == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match=r"^rho has no 'b', expected one number, or one for each of a, b$"):
        dataclasses.replace(TINY, rho={"a": 0.1}).rho_of(NAMES)
    with pytest.raises(ValueError, match=r"^rho of a is -1, expected a finite number >= 0$"):
        dataclasses.replace(TINY, rho={"a": -1})


def test_joint_sam_with_one_rho_for_each_is_that_with_one_rho_for_all(filed):
    def weights(rho):
        config = dataclasses.replace(TINY, rho=rho)
        return Training(filed.without_test(), Row("sam", NAMES), config, 0.05, 7).run().weights["last"]

    one, each = weights(0.05), weights({"a": 0.05, "b": 0.05})
    for name, value in one.items():
        torch.testing.assert_close(each[name], value, rtol=1e-5, atol=1e-6)  # sums in another order


class Watched(Training):
    """Notes the learning rate of each step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rates = []

    def step_on(self, active, chosen, inputs):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        super().step_on(active, chosen, inputs)
        return torch.tensor(1.0)  # a loss that is saturated from the start


def test_the_learning_rate_is_a_tenth_when_the_loss_is_saturated(filed):
    config = dataclasses.replace(TINY, schedule="plateau", patience=1, steps=28)
    training = Watched(filed.without_test(), Row("igm", NAMES), config, 0.05, 7)
    training.run()
    by_round = [set(training.rates[at : at + 8]) for at in range(0, 56, 8)]
    expected = [0.05, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]  # the third equal loss is the second without a smaller
    for found, rate in zip(by_round, expected, strict=True):
        assert len(found) == 1
        assert found.pop() == pytest.approx(rate)


def test_a_plateau_is_resumed(filed):
    config = dataclasses.replace(TINY, schedule="plateau", patience=1, steps=28)
    whole = Watched(filed.without_test(), Row("igm", NAMES), config, 0.05, 7)
    whole.run()
    left = Watched(filed.without_test(), Row("igm", NAMES), config, 0.05, 7)
    with pytest.raises(Stopped):
        left.run(stop=lambda: left.done == 37)
    again = Watched(filed.without_test(), Row("igm", NAMES), config, 0.05, 7)
    again.load_state(left.state())
    again.run()
    assert left.rates + again.rates == whole.rates


def test_modalities_one_after_another_begin_at_the_full_rate(filed):
    config = dataclasses.replace(TINY, schedule="plateau", patience=1, steps=28)
    training = Watched(filed.without_test(), Row("shared-plain", NAMES), config, 0.05, 7)
    training.run()
    assert training.rates[0] == training.rates[28] == 0.05
    assert training.rates[27] < 0.05


# The released scripts


def test_without_a_deviation_it_is_igm_to_the_bit(filed):
    def weights(key, **overrides):
        return Training(filed.without_test(), Row(key, NAMES, overrides), TINY, 0.05, 7).run().weights["last"]

    igm, none = weights("igm"), weights("released", released=())
    for name, value in igm.items():
        assert torch.equal(none[name], value), name


STEPPED = tuple(name for name in DEVIATIONS if name not in ("shape", "best", "macro-f1"))
"""Those that make other weights here: in these heads each layer has one partner, by place as by shape, and each turn
ends at better weights than the one before."""


@pytest.mark.parametrize("deviation", STEPPED)
def test_each_deviation_makes_a_difference(filed, deviation):
    igm = Training(filed.without_test(), Row("igm", NAMES), TINY, 0.05, 7).run().weights["last"]
    config = dataclasses.replace(TINY, released=(deviation,))
    other = Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7).run().weights["last"]
    assert any(not torch.equal(other[name], value) for name, value in igm.items())


PAPER = Released(
    norm="all", restore=True, second_pass="whole", flat_ratio=1.0, gather="turn", layers="all", pairing="position",
    reset=(),
)  # fmt: skip
ASKED = {
    "tensor-norm": {"norm": "tensor"},
    "kept": {"restore": False},
    "stale-head": {"second_pass": "head"},
    "mixed-loss": {"flat_ratio": 0.3},
    "pass": {"gather": "pass"},
    "shape": {"layers": "linear", "pairing": "shape"},
    "best": {},
    "rebuild": {"reset": ("momentum",)},
    "step-lr": {},
    "macro-f1": {},
}
"""What each deviation asks of the optimizer."""


@pytest.mark.parametrize("deviations", [(), *((name,) for name in DEVIATIONS), tuple(DEVIATIONS)], ids=str)
def test_what_is_asked_of_the_optimizer(filed, deviations):
    config = dataclasses.replace(TINY, released=deviations)
    optimizer = Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7).optimizer
    expected = PAPER
    for name in deviations:
        expected = dataclasses.replace(expected, **ASKED[name])
    assert optimizer.mode == expected


def test_macro_f1_of_the_mean_fusion_chooses(filed, monkeypatch):
    """The round with the highest one, whatever the accuracy is."""
    told = iter([1.0, 0.1, 0.3, 0.2, 0.9, 1.0, 0.4])  # before training, then after each of two turns a round

    def watched(*_):
        return evaluation.Watched({"sum": 0.5}, {"sum": 0.5}, next(told))

    monkeypatch.setattr("igm_rs.experiments.training.watched", watched)
    config = dataclasses.replace(TINY, released=("macro-f1",))
    assert Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7).run().rounds["chosen"] == 2


def test_macro_f1_is_that_of_the_mean_fusion(filed):
    model = Branches.of(filed, NAMES, head="own", seed=0)
    split = filed.validation
    guessed = sum(values.double().softmax(1) for values in model.logits(split.inputs).values()).argmax(1)
    expected = f1_score(split.labels, guessed, average="macro")
    assert evaluation.watched(model, split).macro_f1 == pytest.approx(expected, abs=1e-6)  # float32


def test_the_heads_have_a_rho_of_their_own(filed):
    def weights(**values):
        config = dataclasses.replace(TINY, released=("kept",), learning_rate=0.05, **values)
        return Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7).run().weights["last"]

    usual, same, other = weights(), weights(rho_head=TINY.rho), weights(rho_head=0.0)
    assert all(torch.equal(same[name], value) for name, value in usual.items())
    assert any(not torch.equal(other[name], value) for name, value in usual.items())


def test_the_rate_of_the_scripts_is_stepped_before_each_pass_and_begun_anew_each_turn(filed):
    config = dataclasses.replace(
        TINY, released=("step-lr",), steps=36, turn_steps=18, rate_passes=2
    )  # three passes a turn
    training = Watched(filed.without_test(), Row("released", NAMES), config, 0.05, 7)
    training.run()
    turn = [0.05] * 6 + [0.005] * 12
    assert training.rates == pytest.approx(turn * 4)


def test_a_second_pass_of_the_whole_network_has_the_unmixed_labels(filed):
    """L(θ) of mixed labels first, then L(θ + ε*) of those that the examples have."""
    config = dataclasses.replace(TINY, released=("mixed-loss",), rho=0.0)
    training = Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7)
    model, chosen = training.model.eval(), torch.arange(8)
    inputs, labels = {"a": training.examples("a", chosen)}, training.labels(chosen)
    torch.manual_seed(1)
    mixed, y_a, y_b, share = mixup(inputs["a"], labels, 1.0)
    torch.manual_seed(1)
    first = training.step_on(("a",), chosen, inputs)
    told = training.optimizer.last_stats
    model.load_state_dict(Branches.of(filed, NAMES, head="own", seed=7).state_dict())
    logits = model.branch("a", mixed)
    torch.testing.assert_close(first, mixup_loss(logits, y_a, y_b, share))
    torch.testing.assert_close(told["loss_perturbed"], nn.functional.cross_entropy(logits, labels).item())


def test_a_turn_begins_at_the_best_weights(filed, monkeypatch):
    """Where no later turn is as good as the first, all begin where that has ended."""
    values = iter(range(100, 0, -1))
    monkeypatch.setattr("igm_rs.experiments.training.of_fusion", lambda *_: next(values))
    config = dataclasses.replace(TINY, released=("best",))
    training = Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7)
    begun = []
    begin = training._begin_turn

    def watched(turn):
        arrived = copy.deepcopy(training.model.state_dict())
        begin(turn)
        begun.append((arrived, copy.deepcopy(training.model.state_dict())))

    training._begin_turn = watched
    training.run()
    assert len(begun) == 6
    _, first = begun[1]
    for arrived, left in begun[2:]:
        assert all(torch.equal(left[name], first[name]) for name in first)
        assert any(not torch.equal(arrived[name], first[name]) for name in first)


def test_the_pass_makes_the_t_of_the_modality_before(filed, monkeypatch):
    """Of Σ z̄ z̄ᵀ over the batches of one pass by the best weights, in evaluation mode; the first are the best here."""
    values = iter(range(100, 0, -1))
    monkeypatch.setattr("igm_rs.experiments.training.of_fusion", lambda *_: next(values))
    config = dataclasses.replace(TINY, released=("best", "pass"))
    training = Training(filed.without_test(), Row("released", NAMES), config, 0.05, 7)
    begin, checked = training._begin_turn, []

    def watched(turn):
        before = training.turn_before
        begin(turn)
        assert training.model.training
        if before is None:
            return
        assert before != turn.modality
        twin = copy.deepcopy(training.model).eval()
        twin.load_state_dict(training.best)
        rows = []
        layers = [layer for layer in twin.head_of(before) if isinstance(layer, nn.Linear)]
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].detach().double().mean(0)))
        batches = list(training.one_pass(before))
        assert len(batches) == len(filed.train) // config.batch_size > 1
        for batch in batches:
            twin.branch(before, batch)
        gathered = training.optimizer.covariances[before].values()
        for at, found in enumerate(gathered):
            mine = torch.stack(rows[at :: len(layers)])
            torch.testing.assert_close(found.double(), mine.T @ mine, rtol=1e-5, atol=1e-6)  # sums of float32 rows
        assert len(gathered) == len(layers) > 2
        checked.append(before)

    training._begin_turn = watched
    training.run()
    assert checked == ["a", "b"] * (len(checked) // 2) + ["a"]


# What is said


def test_what_a_set_has_no_use_for_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"^network is 'pretrained', expected one of default, small, frozen for filed$"
    ):
        data.load("filed", folder, Reading(network="pretrained"))
    with pytest.raises(
        ValueError, match=r"^network is 'small', expected one of default, pretrained, frozen for openclipart$"
    ):
        data.load("openclipart", None, Reading(network="small"))
    for option, given in {
        "weights": {"weights": {"a": folder}},
        "skip_broken": {"skip_broken": True},
        "speakers": {"speakers": "shared"},
    }.items():
        message = rf"^{option} is given, expected none for watch: it is no set in a folder of the user's$"
        with pytest.raises(ValueError, match=message):
            data.load("watch", None, Reading(**given))
    with pytest.raises(ValueError, match=r"^weights names 'smell', expected some of audio, video for crema-d$"):
        data.load("crema-d", folder, Reading(weights={"smell": folder}))
    with pytest.raises(ValueError, match=r"^network is 'huge', expected 'default', 'small', 'pretrained', 'frozen'$"):
        Reading(network="huge")
    with pytest.raises(ValueError, match=r"^speakers is 'loud', expected 'apart', 'shared'$"):
        Reading(speakers="loud")


def test_a_set_in_a_folder_must_be_given_one():
    message = r"^data is 'crema-d' without a folder, expected --data-root FOLDER, where its files lie$"
    with pytest.raises(ValueError, match=message):
        data.load("crema-d")
    with pytest.raises(
        ValueError,
        match=r"^data set is 'watch', expected one that lies in a folder: crema-d, kinetics-sounds, twitter2015, ",
    ):
        data.on_disk_of("watch")


def test_stored_splits_must_fit_together(filed):
    splits = {"train": filed.train, "validation": filed.validation, "test": filed.open_test()}

    def stored(**changes):
        return data.DataSet.stored(
            {**splits, **changes}, kinds=filed.kinds, class_names=filed.class_names, encoders=filed.encoders
        )

    assert stored().sizes == filed.sizes
    one = dataclasses.replace(filed.validation, labels=filed.validation.labels + 1)
    with pytest.raises(ValueError, match=r"^the data are not as expected: labels go from 0 to 3, expected 0 to 2$"):
        stored(validation=one)
    two = dataclasses.replace(filed.train, labels=filed.train.labels.clamp(max=1))
    with pytest.raises(ValueError, match=r"no training example belongs to z$"):
        stored(train=two)
    three = dataclasses.replace(filed.validation, origins=filed.validation.origins - 1)
    with pytest.raises(ValueError, match=r"train and validation have 1 origins in common, the first is \[47\]$"):
        stored(validation=three)
    four = dataclasses.replace(filed.validation, labels=filed.validation.labels[:5])
    with pytest.raises(ValueError, match=r"a of validation has 18 rows, not 5$"):
        stored(validation=four)
    five = dataclasses.replace(filed.train, labels=filed.train.labels[:0])
    with pytest.raises(ValueError, match=r"no example belongs to the train split$"):
        stored(train=five)
