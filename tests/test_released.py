"""``mode="released"`` against the steps of the released scripts, each switch by itself; by hand; turns."""

import copy
import dataclasses
import functools
import math
import warnings

import pytest
import torch
from faults import differences
from released_models import (
    ADAM,
    F32,
    F64,
    PAPER,
    RHO,
    SGD,
    TAU,
    THREE,
    TWO,
    batches,
    closure_for,
    copied,
    net,
)
from released_reference import Scripts
from torch import nn

from igm_rs import IGMOptimizer, Released, _igm_rs

RHO_HEAD = 0.08
GATHERING = Released(gather="turn")


class Trial:
    """A model under IGMOptimizer and its twin under the scripts, in the same stages, on the same batches.

    `stages`: the modality of each, and the lengths of its epochs; the lr goes down in the second. The state of the
    model two steps before a stage's end is loaded where the next one begins.
    """

    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
    device = "cpu"

    def __init__(self, stages, base=SGD, dtype=F64, mode="released", convolutions=False, **switches):
        self.stages = stages
        names = tuple(dict.fromkeys(name for name, _ in stages))
        self.model = net(names, dtype, convolutions=convolutions).to(self.device)
        self.twin = copy.deepcopy(self.model)
        self.opt = self.model.optimizer(base, mode=mode)
        self.gathers = isinstance(mode, Released) and mode.gather == "turn"
        self.scripts = Scripts(self.twin.encoders, self.twin.heads, base, rho=RHO, tau=TAU, **switches)
        self.data = {
            name: [
                {
                    key: value.to(self.device) if isinstance(value, torch.Tensor) else value
                    for key, value in each.items()
                }
                for each in mine
            ]
            for name, mine in batches(names, 10, dtype).items()
        }

    def run(self):
        """Run all stages; yield the greatest distance between the weights after each step."""
        best, before = None, None
        for name, epochs in self.stages:
            if before is not None:
                self.model.load_state_dict(best[0])
                self.twin.load_state_dict(best[1])
                if not self.gathers:
                    self.collect(before)
            self.scripts.stage(name, before, None if before is None else self.data[before])
            steps = iter(range(sum(epochs)))
            with self.opt.turn(name):
                schedulers = [type(self).schedule(base) for base in (self.opt, self.scripts.base)]
                for length in epochs:
                    with warnings.catch_warnings():  # the scripts step it before the epoch
                        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                        for scheduler in schedulers:
                            scheduler.step()
                    for _ in range(length):
                        t = next(steps)
                        self.step(name, self.data[name][t])
                        if t == sum(epochs) - 3:
                            best = copied(self.model.state_dict()), copied(self.twin.state_dict())
                        yield self.distance()
            before = name

    def collect(self, name):
        """A pass in evaluation mode over the batches of a modality."""
        self.model.eval()
        with self.opt.collect(name), torch.no_grad():
            for batch in self.data[name]:
                self.model.heads[name](self.model.encoders[name](batch["x"]))
        self.model.train()

    def step(self, name, batch):
        loss = self.opt.step(closure_for(self.model, name, batch))
        expected = self.scripts.step(name, batch)
        told = self.opt.last_stats
        tolerance = 1e-5 if loss.dtype == F32 else 1e-11  # a little more than the weights may differ by
        assert loss.item() == told["loss"] == pytest.approx(expected[0], abs=tolerance) or self.distance() > tolerance
        assert told["loss_perturbed"] == pytest.approx(expected[1], abs=tolerance) or self.distance() > tolerance

    def distance(self):
        pairs = zip(self.model.parameters(), self.twin.parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)


STAGES = {
    "two": [("audio", [5, 5]), ("video", [5, 5])],
    "three": [("rgb", [4, 3]), ("of", [4, 3]), ("depth", [3, 3])],
    "two, three stages": [("audio", [4, 3]), ("video", [4, 3]), ("audio", [3, 3])],
    "three, five stages": [(name, [2, 2]) for name in ("rgb", "of", "depth", "rgb", "of")],
}
"""20 steps each."""


# --- against the scripts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("stages", STAGES)
def test_weights_are_those_of_the_scripts(stages, base, dtype):
    """20 steps, T of the modality before from the second stage on: rounding, a few units in the last place a step."""
    trial = Trial(STAGES[stages], base, dtype)
    start = copied(trial.model.state_dict())
    distances = list(trial.run())
    assert len(distances) == 20
    assert max(distances) <= (1e-12 if dtype == F64 else 1e-6)
    assert trial.opt.last_stats["projected"].keys() == {f"{STAGES[stages][-1][0]}.{i}" for i in (0, 2, 4)}
    for name, p in trial.model.named_parameters():
        assert (p - start[name]).abs().max() > 1e-3, name  # each of them has been perturbed and stepped


@pytest.mark.parametrize(
    "schedule",
    [
        functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1]),
        functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: (epoch + 1) / 3),
    ],
    ids=lambda schedule: schedule.func.__name__,
)
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
def test_a_scheduler_that_moves_the_lr_before_the_first_step_counts(base, schedule, monkeypatch):
    """The scripts step it before each epoch, the first of a stage too, on an optimizer that is new there."""
    monkeypatch.setattr(Trial, "schedule", schedule)
    assert max(Trial(STAGES["two, three stages"], base).run()) <= 1e-12


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("stages", STAGES)
def test_weights_are_those_of_the_scripts_on_cuda(stages, base, dtype, monkeypatch):
    """Sums run in another order there, and ε of each tensor is divided by a norm of float32 rounding."""
    monkeypatch.setattr(Trial, "device", "cuda")
    assert max(Trial(STAGES[stages], base, dtype).run()) <= (1e-11 if dtype == F64 else 1e-5)


def test_convolutions_are_not_projected():
    """Those of both heads have one shape; a T of them would act with layers="all"."""
    stages = STAGES["two, three stages"]
    trial = Trial(stages, convolutions=True)
    assert max(trial.run()) <= 1e-12
    assert trial.opt.last_stats["projected"].keys() == {f"audio.{i}" for i in (4, 6, 8)}
    every = Trial(stages, mode=Released(layers="all"), convolutions=True)
    assert max(every.run()) > 1e-3
    assert every.opt.last_stats["projected"].keys() == {f"audio.{i}" for i in (1, 4, 6, 8)}


def test_of_a_scope_linear_layers_alone_are_projected():
    found = {}
    for layers in ("linear", "all"):
        model = net(THREE)
        members = {name: [model.encoders[name], model.heads[name]] for name in THREE}
        opt = IGMOptimizer(SGD(model.parameters()), members, scope=1.0, model=model, mode=Released(layers=layers))
        found[layers] = {mine for mine, _ in opt.pairs["of"]["rgb"]}, opt.projected_share["of"]
    linear = {"encoders.of.4", *(f"heads.of.{i}" for i in (0, 2, 4))}
    assert found["linear"][0] == linear
    assert found["all"][0] == linear | {"encoders.of.0"}
    assert found["linear"][1] < found["all"][1]


def test_a_modality_without_a_linear_layer_is_refused():
    def made(**options):
        model = nn.ModuleDict({name: nn.Conv1d(3, 4, 1) for name in TWO})
        members = {name: [model[name]] for name in TWO}
        return IGMOptimizer(SGD(model.parameters()), members, model=model, **options)

    said = (
        r"^'audio' has audio to be projected and no Linear layer among them, expected one: the released scripts "
        r"project no other, mode=Released\(layers='all'\) does$"
    )
    for layers in ({"heads": {name: name for name in TWO}}, {"scope": 0.1}):
        with pytest.raises(ValueError, match=said):
            made(mode="released", **layers)
        assert made(mode=Released(layers="all"), **layers).pairs["video"]["audio"] == [("video", "audio")]


def test_where_no_t_acts_a_linear_layer_is_not_asked_for():
    model = nn.ModuleDict({name: nn.Conv1d(3, 4, 1) for name in TWO})
    heads, sources = dict(model), {name: [] for name in TWO}
    opt = IGMOptimizer(SGD(model.parameters()), heads, heads=heads, mode="released", sources=sources)
    assert opt.sources == sources


def test_a_later_modality_without_a_linear_layer_is_refused():
    model = net(THREE)
    opt = model.optimizer(SGD, mode="released")
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"^'sound' has .* to be projected and no Linear layer among them"):
        opt.add_modality("sound", nn.Linear(3, 3), head=nn.Conv1d(3, 4, 1))
    assert opt.modalities == THREE
    assert not differences(before, opt.state_dict())


def test_a_base_that_is_not_fused():
    rmsprop = functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5)
    assert max(Trial(STAGES["two"], rmsprop).run()) <= 1e-12


SWITCHES = {
    "norm": {"norm": "all"},
    "rho_head": {"rho_head": RHO_HEAD},
    "rho_head 0": {"rho_head": 0.0},
    "restore": {"restore": True},
    "second_pass": {"second_pass": "whole"},
    "flat_ratio": {"flat_ratio": 0.9},
    "flat_ratio 0": {"flat_ratio": 0.0},
    "flat_ratio 1": {"flat_ratio": 1.0},
    "gather": {"gather": "turn"},
    "pairing": {"pairing": "position"},
    "no reset": {"reset": ()},
    "reset of momentum": {"reset": "momentum"},
    "reset of lr": {"reset": ("lr",)},
    "all but one": {"norm": "all", "restore": True, "flat_ratio": 1.0, "gather": "turn", "reset": ()},
    "the paper's": {
        field.name: getattr(PAPER, field.name)
        for field in dataclasses.fields(PAPER)
        if field.name not in ("rho_head", "layers")
    },
}


@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_each_switch_is_that_of_the_scripts_and_makes_a_difference(switches, base):
    given = SWITCHES[switches]
    stages = STAGES["two, three stages"]  # a modality's momentum is there to be reset in its second stage
    told = given if isinstance(given.get("reset", ()), tuple) else given | {"reset": (given["reset"],)}
    assert max(Trial(stages, base, mode=Released(**given), **told).run()) <= 1e-12
    plain = {key: value for key, value in told.items() if key == "gather"}  # else the twin has no T at all
    other = Trial(stages, base, mode=Released(**given), **plain)
    if "gather" in given and len(given) == 1:
        other.scripts.gather = "pass"
    assert max(other.run()) > 1e-3


def test_every_field_has_its_switch_in_the_test_above():
    tried = {key for given in SWITCHES.values() if len(given) == 1 for key in given}
    assert tried == {field.name for field in dataclasses.fields(Released)} - {"layers"}  # whose own test is above


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(
    "base", [SGD, ADAM, functools.partial(torch.optim.RMSprop, lr=1e-3)], ids=["SGD", "Adam", "RMSprop"]
)
def test_with_every_switch_at_the_papers_a_step_is_the_papers(base, dtype):
    """To the bit: ε is rounded alike, and the same operations follow."""
    models = [net(dtype=dtype) for _ in range(2)]
    opts = [models[0].optimizer(base, mode=PAPER), models[1].optimizer(base, mode="paper")]
    data = batches(TWO, 4, dtype)
    for name in (*TWO, *TWO):
        with opts[0].turn(name), opts[1].turn(name):
            for batch in data[name]:

                def papers(name=name, batch=batch):
                    opts[1].zero_grad()
                    loss, _ = closure_for(models[1], name, batch)()
                    loss.backward()
                    return loss

                losses = opts[0].step(closure_for(models[0], name, batch)), opts[1].step(papers)
                assert torch.equal(*losses)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q)
    told = [dict(opt.last_stats) for opt in opts]
    assert told[0].pop("second_pass") == "whole"
    assert told[1].pop("second_pass") == "taken"
    assert told[0].pop("effective_perturbation") == pytest.approx(told[1].pop("effective_perturbation"), rel=1e-6)
    assert told[0] == told[1]


# --- by hand ----------------------------------------------------------------------------------------------------------


class Scalars(nn.Module):
    """z = a x, y = b z, both weights single numbers; the head is a Linear layer or a convolution."""

    def __init__(self, kind, a=2.0, b=3.0):
        super().__init__()
        self.encoder = nn.Conv1d(1, 1, 1, bias=False) if kind == "convolution" else nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        self.convolutional = kind == "convolution"
        self.double()
        self.encoder.weight.data.fill_(a)
        self.head.weight.data.fill_(b)

    def step(self, opt, x=1.0):
        def closure():
            given = torch.full((1, 1, 1) if self.convolutional else (1, 1), x, dtype=F64)
            z = self.encoder(given).flatten(1)
            return self.head(z).sum(), lambda: self.head(z).sum()

        return opt.step(closure)

    def weights(self):
        return self.encoder.weight.item(), self.head.weight.item()


def test_one_step_by_hand():
    """L = b a x = 6; ε: a → 2.1, b → 3.2; F = 3.2 · 2, on the z of a = 2; ∂/∂a = 0.7 · 3 + 0.3 · 3.2, ∂/∂b = 2."""
    model = Scalars("linear")
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), {"one": model.encoder}, heads={"one": model.head}, rho=0.1,
        mode=Released(rho_head=0.2),
    )  # fmt: skip
    with opt.turn("one"):
        loss = model.step(opt)
    assert loss.item() == 6
    assert model.weights() == pytest.approx((2.1 - 0.5 * 3.06, 3.2 - 0.5 * 2))
    told = opt.last_stats
    assert told["loss"] == 6
    assert told["loss_perturbed"] == pytest.approx(6.4)
    assert told["sharpness"] == pytest.approx(0.4)
    assert told["grad_norm"] == pytest.approx(math.hypot(3, 2))
    assert told["grad_norm_perturbed"] == pytest.approx(math.hypot(3.06, 2))
    assert told["effective_perturbation"] == pytest.approx(1)
    assert told["moved"] == 1
    assert told["second_pass"] == "head"


class Deep(nn.Module):
    """y = c b a x: an encoder of two layers of one number each, of which the second is a convolution or Linear."""

    def __init__(self, second):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = second
        self.head = nn.Linear(1, 1, bias=False)
        self.double()
        for p, value in zip(self.parameters(), (2.0, 3.0, 5.0), strict=True):
            p.data.fill_(value)


@pytest.mark.parametrize(
    ("second", "seen"),
    [(nn.Conv1d(1, 1, 1, bias=False), 3.1), (nn.Linear(1, 1, bias=False), 3.0)],
    ids=["conv", "linear"],
)
def test_what_a_backward_pass_sees_of_an_encoders_perturbation(second, seen):
    """∂F/∂a = c b x with b perturbed where it is a convolution's, though no loss is evaluated at that b."""
    model = Deep(second)
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), {"one": [model.first, model.second]}, heads={"one": model.head},
        rho=0.1, mode=Released(flat_ratio=1.0),
    )  # fmt: skip

    def closure():
        z = model.second(model.first(torch.ones(1, 1, 1, dtype=F64)))
        return model.head(z).sum(), lambda: model.head(z).sum()

    with opt.turn("one"):
        opt.step(closure)
    assert model.first.weight.grad.item() == pytest.approx(5.1 * seen)
    assert model.second.weight.grad.item() == pytest.approx(5.1 * 2.0)
    assert model.head.weight.grad.item() == pytest.approx(3.0 * 2.0)  # of the features at θ


def test_what_is_maximised_is_perturbed_downhill():
    model = Scalars("linear")
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, maximize=True), {"one": model.encoder}, heads={"one": model.head},
        rho=0.1, mode=Released(rho_head=0.2),
    )  # fmt: skip
    with opt.turn("one"):
        model.step(opt)
    assert model.weights() == pytest.approx((1.9 + 0.5 * (0.7 * 3 + 0.3 * 2.8), 2.8 + 0.5 * 2))


def test_a_groups_own_rho_wins_over_both():
    model = Scalars("linear")
    groups = [{"params": model.encoder.parameters(), "rho": 0.3}, {"params": model.head.parameters(), "rho": 0.4}]
    opt = IGMOptimizer(
        torch.optim.SGD(groups, lr=0.0), {"one": model.encoder}, heads={"one": model.head}, rho=0.1,
        mode=Released(rho_head=0.2),
    )  # fmt: skip
    with opt.turn("one"):
        model.step(opt)
    assert model.weights() == pytest.approx((2.3, 3.4))


def test_a_shared_head_has_the_rho_of_heads():
    model = Scalars("linear")
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), {"one": model.encoder}, head=model.head, rho=0.1, tau=0.0,
        mode=Released(rho_head=0.2),
    )  # fmt: skip
    model.step(opt)
    assert model.weights() == pytest.approx((2.1, 3.2))


def test_without_a_rho_of_its_own_the_head_has_that_of_the_modality():
    models = {"one": Scalars("linear"), "two": Scalars("linear")}
    everything = [p for model in models.values() for p in model.parameters()]
    opt = IGMOptimizer(
        torch.optim.SGD(everything, lr=0.0),
        {name: model.encoder for name, model in models.items()},
        heads={name: model.head for name, model in models.items()},
        rho={"one": 0.1, "two": 0.3}, tau=0.0, mode="released",
    )  # fmt: skip
    for name, rho in opt.rho.items():
        with opt.turn(name):
            models[name].step(opt)
        assert models[name].weights() == pytest.approx((2 + rho, 3 + rho))


def test_a_modality_that_comes_later_has_a_head_too():
    model, later = Scalars("linear"), Scalars("linear")
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), {"one": model.encoder}, heads={"one": model.head}, rho=0.1,
        mode=Released(rho_head=0.2),
    )  # fmt: skip
    opt.add_modality("two", later.encoder, head=later.head)
    with opt.turn("two"):
        later.step(opt)
    assert later.weights() == pytest.approx((2.1, 3.2))
    assert model.weights() == (2, 3)


def test_rho_zero_perturbs_nothing_and_steps_on_both_losses():
    model = Scalars("linear")
    opt = model_optimizer(model, rho=0.0)
    with opt.turn("one"):
        model.step(opt)
    assert model.weights() == pytest.approx((2 - 0.5 * 3, 3 - 0.5 * 2))
    assert opt.last_stats["effective_perturbation"] is None
    assert opt.last_stats["moved"] == 0


def model_optimizer(model, lr=0.5, **options):
    told = {"heads": {"one": model.head}, "mode": "released"} | options
    return IGMOptimizer(torch.optim.SGD(model.parameters(), lr=lr), {"one": model.encoder}, **told)


# --- other settings ---------------------------------------------------------------------------------------------------


PLAIN = functools.partial(torch.optim.SGD, lr=0.1)
RMSPROP = functools.partial(torch.optim.RMSprop, lr=1e-3)


def end_of(base=PLAIN, **options):
    """Weights and optimizer after two stages with T in the second."""
    trial = Trial([("audio", [4]), ("video", [4])], base)
    trial.opt = trial.model.optimizer(base, **options)
    list(trial.run())
    return trial


def test_the_update_projected_is_the_gradient_projected_where_they_are_one():
    """SGD without momentum and weight decay; the update begins at the perturbed weights."""
    one, other = end_of(), end_of(project="update")
    assert other.opt.last_stats["projected"].keys() == {"video.0", "video.2", "video.4"}
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_without_atomic_the_numbers_are_the_same():
    rmsprop = functools.partial(torch.optim.RMSprop, lr=1e-3)
    for base in (SGD, rmsprop):
        one, other = end_of(base), end_of(base, atomic=False)
        assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_gradients_are_clipped_after_projection():
    trial = end_of(max_grad_norm=0.01)
    norm = _igm_rs.gradient_norm([p.grad for p in trial.model.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(0.01, rel=1e-4)  # torch adds 1e-6 to the norm


def in_half(function):
    """The function in bfloat16, as torch.autocast chooses."""

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    return run


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_autocast_around_the_step_is_autocast_in_the_closure(mode):
    """It keeps casts of the weights, which at the perturbed weights are others."""
    batch = batches(TWO, 1, F32)["audio"][0]

    def end(around):
        model = net(dtype=F32)
        opt = model.optimizer(mode=mode, rho=0.5)
        losses = closure_for(model, "audio", batch)

        def released():
            loss, flat = losses()
            return loss, flat if around else in_half(flat)

        def papers():
            opt.zero_grad()
            loss, _ = losses()
            loss.backward()
            return loss

        closure = released if mode == "released" else papers
        with opt.turn("audio"):
            if around:
                in_half(lambda: [opt.step(closure) for _ in range(2)])()
            else:
                for _ in range(2):
                    opt.step(in_half(closure))
        return [*model.parameters(), torch.tensor(opt.last_stats["loss_perturbed"])]

    assert all(map(torch.equal, end(around=False), end(around=True)))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    "base", [SGD, ADAM, functools.partial(torch.optim.RMSprop, lr=1e-3)], ids=["SGD", "Adam", "RMSprop"]
)
def test_every_parameter_keeps_its_memory_and_the_inactive_ones_their_weights(base, restore):
    model = net()
    opt = model.optimizer(base, mode=Released(restore=restore))
    params = list(model.parameters())
    memory = [(p.data_ptr(), p.stride(), p.dtype) for p in params]
    inactive = [p.detach().clone() for p in model.heads["video"].parameters()]
    with opt.turn("audio"):
        for batch in batches(TWO, 3)["audio"]:
            opt.step(closure_for(model, "audio", batch))
    assert [(p.data_ptr(), p.stride(), p.dtype) for p in params] == memory
    assert all(map(torch.equal, inactive, model.heads["video"].parameters()))
    assert all(p.grad is None for p in model.heads["video"].parameters())


def test_statistics_of_a_head_advance_once_a_step():
    model = net()
    model.heads["audio"].insert(1, nn.BatchNorm1d(6).double())
    for mode in (Released(), Released(second_pass="whole")):
        twin = copy.deepcopy(model)
        opt = twin.optimizer(mode=mode)
        with opt.turn("audio"):
            opt.step(closure_for(twin, "audio", batches(TWO, 1)["audio"][0]))
        counts = [
            m.num_batches_tracked.item() for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        assert counts == [2, 1, 1]  # one of the lazy layers' making; the head's own has had none


# --- turns and T ------------------------------------------------------------------------------------------------------


def test_a_turn_makes_no_t_and_a_pass_between_turns_does():
    trial = Trial(STAGES["two"])
    with trial.opt.turn("audio"):
        trial.step("audio", trial.data["audio"][0])
        trial.opt.refresh("audio")  # nothing was gathered, and nothing is complained of
    assert (trial.opt.turns, trial.opt.projectors, trial.opt.covariances) == (
        1,
        {"audio": {}, "video": {}},
        {"audio": {}, "video": {}},
    )
    trial.collect("audio")
    assert trial.opt.projectors["audio"].keys() == {"audio.0", "audio.2", "audio.4"}
    with trial.opt.turn("audio"):  # its Ȳ begins anew, its T stays
        trial.step("audio", trial.data["audio"][1])
        assert trial.opt.covariances["audio"] == {}
    assert trial.opt.projectors["audio"].keys() == {"audio.0", "audio.2", "audio.4"}


def test_a_turn_that_no_pass_has_made_a_t_for_is_warned_about_once():
    trial = Trial(STAGES["two"])
    step = trial.opt.step
    with trial.opt.turn("audio"):  # the first of all: no other modality has been trained
        step(closure_for(trial.model, "audio", trial.data["audio"][0]))
    said = (
        r"^the turn of 'video' begins and 'audio' has no T to act on it: the mode's gather is 'pass', expected a pass "
        r"over the training data between the two turns, with opt.collect\('audio'\), torch.no_grad\(\): and the "
        r"model in eval\(\); or gather='turn'$"
    )
    with trial.opt.turn("video"):
        with pytest.warns(UserWarning, match=said):
            step(closure_for(trial.model, "video", trial.data["video"][0]))
        step(closure_for(trial.model, "video", trial.data["video"][1]))
    with trial.opt.turn("audio"):
        step(closure_for(trial.model, "audio", trial.data["audio"][1]))  # once is enough


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.0}, {"projector": "identity"}, {"mode": GATHERING}, {"sources": {"audio": [], "video": []}}],
    ids=str,
)
def test_where_nothing_would_be_projected_no_pass_is_missed(options):
    model = net()
    opt = model.optimizer(**{"mode": "released"} | options)
    for name in TWO:
        with opt.turn(name):
            opt.step(closure_for(model, name, batches(TWO, 1)[name][0]))


def test_no_pass_is_missed_of_a_source_that_never_acts():
    """Its τ is 0, so that a pass of it makes no T; that of the other has been made."""
    model = net(THREE)
    first, second, last = THREE
    opt = model.optimizer(tau={first: 0.0, second: 0.4, last: 0.4}, sources="earlier")
    for name in THREE:
        with opt.turn(name):
            opt.step(closure_for(model, name, batches(THREE, 1)[name][0]))
        with opt.collect(name), torch.no_grad():
            model.heads[name](model.encoders[name](batches(THREE, 1)[name][0]["x"]))
    assert opt.projectors[first] == {}
    assert opt.last_stats["projected"]


def test_a_pass_inside_the_turn_makes_t_at_its_end():
    trial = Trial(STAGES["two"])
    with trial.opt.turn("audio"):
        trial.step("audio", trial.data["audio"][0])
        trial.collect("audio")
        assert trial.opt.projectors["audio"] == {}
    inside = trial.opt.projectors["audio"]
    trial.collect("audio")
    for layer, T in trial.opt.projectors["audio"].items():
        torch.testing.assert_close(inside[layer], T, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:the turn of 'video' begins and 'audio' has no T")
def test_outside_turns_the_modality_is_the_one_whose_parameters_the_loss_depends_on():
    models = [net(), net()]
    opts = [model.optimizer() for model in models]
    for name, epochs in (("audio", 2), ("video", 2)):
        for batch in batches(TWO, epochs)[name]:
            opts[0].step(closure_for(models[0], name, batch))
        with opts[1].turn(name):
            for batch in batches(TWO, epochs)[name]:
                opts[1].step(closure_for(models[1], name, batch))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert opts[0].last_stats["active"] == "video"


def test_one_modality_outside_turns_is_not_warned_about():
    """Its T is made by a pass, in turns or not."""
    model = Scalars("linear")
    model.step(model_optimizer(model))


def test_only_the_modality_before_acts():
    """As in the scripts, whose earlier T's go with the model object that held them."""
    three = net(THREE).optimizer()
    assert three.sources == {"rgb": ["depth"], "of": ["rgb"], "depth": ["of"]}
    assert net().optimizer().sources == {"audio": ["video"], "video": ["audio"]}
    pairs = three.pairs["rgb"]["depth"]
    assert [(mine[-1], theirs[-1]) for mine, theirs in pairs] == [
        ("0", "0"),
        ("0", "2"),
        ("2", "0"),
        ("2", "2"),
        ("4", "4"),
    ]


# --- steps that cannot be taken ---------------------------------------------------------------------------------------


def spoil(model, name, batch, loss=None, flat=None):
    """A closure whose losses are changed by these."""

    def closure():
        first, second = closure_for(model, name, batch)()
        return loss(first) if loss else first, (lambda: flat(second())) if flat else second

    return closure


@pytest.mark.parametrize(
    "spoilt",
    [
        {"loss": lambda value: 0 * value},
        {"loss": lambda value: math.nan * value},
        {"loss": lambda value: math.inf * value},
        {"flat": lambda value: math.nan * value},
        {"flat": lambda value: math.inf * value},
    ],
    ids=["zero", "NaN", "inf", "NaN in flat", "inf in flat"],
)
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
def test_an_unusable_gradient_skips_the_step(base, spoilt):
    model = net()
    opt = model.optimizer(base)
    first, second = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(model, "audio", first))
        before = copy.deepcopy((dict(model.named_parameters()), opt.state_dict()["state"]))
        opt.step(spoil(model, "audio", second, **spoilt))
        assert not differences(before, (dict(model.named_parameters()), opt.state_dict()["state"]))
        assert opt.skipped_steps == 1
        assert opt.last_stats["skipped"]
        assert opt.last_stats["second_pass"] == ("head" if "flat" in spoilt else None)
        opt.step(closure_for(model, "audio", second))
    assert opt.skipped_steps == 1


def test_a_tensor_without_gradient_is_stepped_but_not_perturbed():
    """The scripts divide its gradient by a norm of zero: all of it becomes NaN."""
    model = Scalars("linear")
    model.idle = nn.Parameter(torch.ones(3, dtype=F64))
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1), {"one": [model.encoder, model.idle]},
        heads={"one": model.head}, rho=0.1, mode="released",
    )  # fmt: skip

    def closure():
        z = model.encoder(torch.ones(1, 1, dtype=F64))
        return model.head(z).sum() + 0 * model.idle.sum(), lambda: model.head(z).sum()

    with opt.turn("one"):
        opt.step(closure)
    assert model.idle.tolist() == pytest.approx([1 - 0.5 * 0.1] * 3)
    assert opt.last_stats["moved"] == 1  # of the weights with a gradient


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_parameter_of_one_pass_alone(base):
    """With F alone: what has a gradient in the first pass only is perturbed and not stepped, and the reverse."""
    model = Scalars("linear")
    model.first, model.second = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))
    opt = IGMOptimizer(
        base(model.parameters(), lr=0.5), {"one": [model.encoder, model.first, model.second]},
        heads={"one": model.head}, rho=0.1, mode=Released(flat_ratio=1.0),
    )  # fmt: skip

    def closure():
        z = model.encoder(torch.ones(1, 1, dtype=F64))
        flat = lambda: (model.head(z) * model.second).sum()  # noqa: E731,PLW0108  # at the weights of the moment
        return (model.head(z) * model.first).sum(), flat

    with opt.turn("one"):
        opt.step(closure)
    assert model.first.item() == pytest.approx(1.1)
    gradient = 3.1 * 2
    assert model.second.grad.item() == pytest.approx(gradient)
    if base is torch.optim.SGD:
        assert model.second.item() == pytest.approx(1 - 0.5 * gradient)
    assert model.first.grad is None


def test_forward_passes_before_a_step_are_no_features_of_it():
    """Of a turn that gathers: the step's own closure is what counts."""
    found = []
    for stray in (False, True):
        model = net()
        opt = model.optimizer(mode=Released(gather="turn"))
        one, other = batches(TWO, 2)["audio"]
        with opt.turn("audio"):
            if stray:
                closure_for(model, "audio", other)()
            opt.step(closure_for(model, "audio", one))
        found.append(opt.covariances)
    assert found[0]["audio"]
    assert not differences(*found)


def test_a_perturbation_below_the_resolution_is_warned_about():
    model = net(dtype=F32)
    opt = model.optimizer(rho=1e-10)
    with opt.turn("audio"), pytest.warns(UserWarning, match="rho = 1e-10 is below the resolution of the weights"):
        opt.step(closure_for(model, "audio", batches(TWO, 1, F32)["audio"][0]))
    assert opt.last_stats["effective_perturbation"] < 0.5


def test_a_perturbation_beyond_the_dtype_is_warned_about_as_such():
    model = net(dtype=F32)
    opt = model.optimizer(rho=1e38)
    with opt.turn("audio"), pytest.warns(UserWarning, match=r"rho = 1e\+38 over the norm of a gradient is beyond the"):
        opt.step(closure_for(model, "audio", batches(TWO, 1, F32)["audio"][0]))
    assert opt.last_stats["moved"] == 0
    assert opt.last_stats["effective_perturbation"] is None
