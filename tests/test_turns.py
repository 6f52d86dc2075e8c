"""Turns, collecting passes and refreshes: when Ȳ begins, what it holds, and when T is made from it."""

import copy

import pytest
import torch
from models import OwnHeads, SharedHead, batches, closure_for
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, _igm_rs

TWO = ("audio", "video")
DATA = batches(TWO, 12)


def make(kind=OwnHeads, **options):
    torch.manual_seed(0)
    model = kind().double()
    mine = model.options()
    if kind is SharedHead:
        mine = {"modalities": mine["modalities"], "head": model.head}
    return model, IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **mine, **options)


def step(model, opt, name, t):
    return opt.step(closure_for(opt, model, name, DATA[name][t]))


def mean_rows(model, name, indices):
    """z̄ of each batch at the first projected layer, with the weights as they are."""
    with torch.no_grad():
        return torch.stack([model.encoders[name](DATA[name][t][0]).mean(0) for t in indices])


def test_projector_is_the_identity_until_a_modality_has_had_its_turn():
    model, opt = make(tau=1.5)
    assert opt.projectors == {"audio": {}, "video": {}}
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
        assert opt.last_stats["projected"] == {}
    assert set(opt.projectors["audio"]) == {"audio.0", "audio.1"}
    with opt.turn("video"):
        step(model, opt, "video", 0)
        assert set(opt.last_stats["projected"]) == {"video.0", "video.1"}


def test_an_empty_turn_changes_nothing():
    model, opt = make(tau=1.5)
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
    before = copy.deepcopy(opt.state_dict())
    for name in TWO:
        with opt.turn(name):
            pass
    with opt.collect("audio"):
        pass
    after = opt.state_dict()
    assert str(after) == str(before)
    assert opt.turns == 1


def test_fresh_kept_and_decayed_covariance_by_hand():
    """The encoder does not move (lr 0), so z̄ of each batch is known."""
    for covariance, weight in (("fresh", 0.0), ("kept", 1.0), (0.25, 0.25)):
        model, opt = make(covariance=covariance, rho=0.0)
        opt.param_groups[0]["lr"] = 0.0
        for turn in ((0, 1), (2, 3, 4)):
            with opt.turn("audio"):
                for t in turn:
                    step(model, opt, "audio", t)
        old, new = mean_rows(model, "audio", (0, 1)), mean_rows(model, "audio", (2, 3, 4))
        torch.testing.assert_close(
            opt.covariances["audio"]["audio.0"], weight * old.T @ old + new.T @ new, rtol=0, atol=1e-14
        )


def test_the_second_pass_evaluation_and_eval_mode_leave_no_rows():
    model, opt = make(rho=0.05)
    opt.param_groups[0]["lr"] = 0.0
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
        with torch.no_grad():
            model("audio", DATA["audio"][1][0])
        model.eval()
        model("audio", DATA["audio"][2][0])
        model.train()
        step(model, opt, "audio", 3)
    rows = mean_rows(model, "audio", (0, 3))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)


def test_gradient_accumulation_counts_every_micro_batch():
    model, opt = make(rho=0.0)
    opt.param_groups[0]["lr"] = 0.0
    with opt.turn("audio"):
        for t in range(3):
            cross_entropy(model("audio", DATA["audio"][t][0]), DATA["audio"][t][1]).backward()
        opt.step()
    rows = mean_rows(model, "audio", range(3))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)


@pytest.mark.parametrize("inside", [True, False])
def test_collect_replaces_the_turns_rows_or_refreshes_outside(inside):
    model, opt = make(tau=1.5)
    opt.param_groups[0]["lr"] = 0.0
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
        if inside:
            with opt.collect("audio"), torch.no_grad():
                for t in range(4, 8):
                    model("audio", DATA["audio"][t][0])
            step(model, opt, "audio", 1)
    if not inside:
        made = opt.projectors["audio"]["audio.0"].clone()
        model.eval()
        with opt.collect("audio"):
            for t in range(4, 8):
                model("audio", DATA["audio"][t][0])
                model("video", DATA["video"][t][0])
        assert not torch.equal(made, opt.projectors["audio"]["audio.0"])
        assert opt.projectors["video"] == {}
    rows = mean_rows(model, "audio", range(4, 8))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)
    assert opt.turns == 1


def test_a_collecting_pass_that_fails_changes_nothing():
    model, opt = make(tau=1.5)
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
    before = str(opt.state_dict())

    def broken():
        with opt.collect("audio"):
            model("audio", DATA["audio"][1][0])
            raise ValueError("no more data")

    with pytest.raises(ValueError, match="no more data"):
        broken()
    assert str(opt.state_dict()) == before


def test_refresh_every_n_steps_and_at_the_end_of_the_turn():
    model, opt = make(tau=1.5, refresh=2)
    made = []
    with opt.turn("audio"):
        for t in range(5):
            step(model, opt, "audio", t)
            made.append(opt.projectors["audio"].get("audio.0"))
    last = opt.projectors["audio"]["audio.0"]
    assert made[0] is None
    assert torch.equal(made[1], made[2])
    assert torch.equal(made[3], made[4])
    assert not torch.equal(made[1], made[3])
    assert not torch.equal(made[3], last)


def test_a_turn_left_by_an_exception_is_taken_up_again_by_the_same_modality_only():
    def interrupted(model, opt):
        with opt.turn("audio"):
            step(model, opt, "audio", 0)
            raise KeyboardInterrupt

    model, opt = make(tau=1.5, rho=0.0)
    opt.param_groups[0]["lr"] = 0.0
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, opt)
    assert opt.projectors["audio"] == {}
    assert opt.turns == 0
    with opt.turn("audio"):
        step(model, opt, "audio", 1)
    rows = mean_rows(model, "audio", (0, 1))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)

    model, opt = make(tau=1.5, rho=0.0)
    opt.param_groups[0]["lr"] = 0.0
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, opt)
    for name in ("video", "audio"):
        with opt.turn(name):
            step(model, opt, name, 1)
    rows = mean_rows(model, "audio", (1,))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)
    assert opt.turns == 2


def test_steps_outside_turns_are_turns_of_one_batch():
    """Per-batch alternation with the steps' own inference is the same as naming each step's turn."""
    (model, opt), (twin, named) = make(SharedHead, tau=1.5, rho=0.0), make(SharedHead, tau=1.5, rho=0.0)
    for t in range(4):
        for name in TWO:
            step(model, opt, name, t)
            with named.turn(name):
                step(twin, named, name, t)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert opt.turns == named.turns - 1  # the last implicit turn is still open
    assert opt.last_stats["projected"]["head"]["cosine"] < 1


def test_n_steps_outside_any_turn_are_a_turn():
    model, opt = make(SharedHead, tau=1.5, rho=0.0, refresh=2)
    for t in range(4):
        for name in TWO:
            step(model, opt, name, t)
        assert opt.turns == 2 * ((t + 1) // 2)
    assert opt.round == 2


@pytest.mark.parametrize("reset", [(), "momentum", "lr", ("momentum", "lr")])
def test_reset_at_the_start_of_a_turn(reset):
    model, opt = make(rho=0.0, reset=reset)
    for t in range(2):
        with opt.turn("audio"):
            closure_for(opt, model, "audio", DATA["audio"][t])()
            gradient = model.encoders["audio"][0].weight.grad.clone()
            opt.step()
        opt.param_groups[0]["lr"] *= 0.5
    momentum = opt.state[model.encoders["audio"][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, gradient) == ("momentum" in reset)
    assert opt.param_groups[0]["lr"] == (0.05 if "lr" in reset else 0.025)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_block_without_a_step_keeps_the_lr(tensor):
    """That of construction is there from the block's beginning, for a scheduler; without a step it goes again."""
    model = OwnHeads().double()
    first = torch.tensor(0.1) if tensor else 0.1
    opt = IGMOptimizer(torch.optim.Adam(model.parameters(), lr=first, foreach=False), **model.options(), reset="lr")
    group = opt.param_groups[0]

    def give(lr):
        if tensor:
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    give(0.025)
    with opt.turn("audio"):
        assert float(group["lr"]) == pytest.approx(0.1)
    assert float(group["lr"]) == pytest.approx(0.025)
    with pytest.raises(ZeroDivisionError), opt.turn("audio"):
        raise ZeroDivisionError
    assert float(group["lr"]) == pytest.approx(0.025)
    with opt.turn("audio"):
        give(0.05)
    assert float(group["lr"]) == pytest.approx(0.05)  # set there, and kept
    with opt.turn("audio"):
        give(0.05)
        step(model, opt, "audio", 0)
    assert float(group["lr"]) == pytest.approx(0.05)
    give(0.025)
    with pytest.raises(ZeroDivisionError), opt.turn("audio"):
        step(model, opt, "audio", 1)
        give(0.0125)
        raise ZeroDivisionError
    with opt.turn("audio"):  # the same turn goes on
        assert float(group["lr"]) == pytest.approx(0.0125)
    assert (group["lr"] is first) == tensor


def test_reset_of_an_lr_that_is_a_tensor():
    model = OwnHeads().double()
    base = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), capturable=False, foreach=False)
    opt = IGMOptimizer(base, **model.options(), rho=0.0, reset="lr")
    lr = opt.param_groups[0]["lr"]
    for t in range(2):
        with opt.turn("audio"):
            step(model, opt, "audio", t)
        assert lr.item() == pytest.approx(0.1)
        lr.mul_(0.5)
    assert opt.param_groups[0]["lr"] is lr


def test_counters():
    model, opt = make(rho=0.0)
    for i in range(2):
        for j, name in enumerate(TWO):
            assert (opt.turns, opt.round) == (2 * i + j, i)
            with opt.turn(name):
                step(model, opt, name, i)
    assert opt.last_stats["step"] == 4
    assert opt.last_stats["turn"] == 3


def test_own_heads_that_all_run_in_every_forward_are_told_apart():
    """A joint forward in the turn of one modality: only its own layer's rows count for it."""
    model, opt = make(rho=0.0)
    opt.param_groups[0]["lr"] = 0.0

    def closure():
        opt.zero_grad()
        outputs = {n: model(n, DATA[n][0][0]) for n in TWO}
        loss = cross_entropy(outputs["audio"], DATA["audio"][0][1])
        loss.backward()
        return loss

    with opt.turn("audio"):
        opt.step(closure)
    assert opt.covariances["video"] == {}
    rows = mean_rows(model, "audio", (0,))
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=0, atol=1e-14)


def test_more_rows_than_features_go_over_from_rows_to_a_matrix():
    """d = 8, 12 batches a turn and 9 samples a batch: both ways of keeping Ȳ, and the same numbers."""
    for features in ("mean", "samples", "centred"):
        model, opt = make(rho=0.0, features=features)
        opt.param_groups[0]["lr"] = 0.0
        with opt.turn("audio"):
            for t in range(12):
                step(model, opt, "audio", t)
        with torch.no_grad():
            z = torch.cat([model.encoders["audio"](x) for x, _ in DATA["audio"]])
        rows = mean_rows(model, "audio", range(12)) if features == "mean" else z
        if features == "centred":
            rows = z - z.mean(0)
        torch.testing.assert_close(opt.covariances["audio"]["audio.0"], rows.T @ rows, rtol=1e-13, atol=1e-13)


def test_hooks_leave_with_the_optimizer():
    model, opt = make()
    assert len(model.heads["audio"][0]._forward_pre_hooks) == 1
    del opt
    assert len(model.heads["audio"][0]._forward_pre_hooks) == 0


def test_linear_with_further_dimensions_adds_a_row_for_each_position():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    opt = IGMOptimizer(torch.optim.SGD(layer.parameters(), lr=0.0), {"a": layer}, heads={"a": layer}, rho=0.0)
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    with opt.turn("a"):
        layer(x).square().mean().backward()
        opt.step()
    rows = x.mean(0)
    torch.testing.assert_close(opt.covariances["a"]["a"], rows.T @ rows, rtol=0, atol=1e-14)


def test_a_model_that_is_converted_goes_on():
    """float32 projectors meet float64 gradients: the product is in float64, and the next T is too."""
    torch.manual_seed(0)
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), tau=1.5)
    single = batches(TWO, 2, torch.float32)
    for name in TWO:
        with opt.turn(name):
            opt.step(closure_for(opt, model, name, single[name][0]))
    assert opt.projectors["video"]["video.0"].dtype == torch.float32
    model.double()
    gradients = []

    def closure():
        loss = closure_for(opt, model, "audio", DATA["audio"][1])()
        gradients.append(model.heads["audio"][0].weight.grad.clone())
        return loss

    with opt.turn("audio"):
        made = opt.state_dict()["igm"]["projection"]["projectors"]["video"]["video.0"]["factor"]
        assert made[0].dtype == torch.float32
        opt.step(closure)
        factor = tuple(part.double() if isinstance(part, torch.Tensor) else part for part in made)
        expected = gradients[-1] @ _igm_rs.dense_projector(factor)
    torch.testing.assert_close(model.heads["audio"][0].weight.grad, expected, rtol=0, atol=1e-14)
    assert opt.projectors["audio"]["audio.0"].dtype == torch.float64
