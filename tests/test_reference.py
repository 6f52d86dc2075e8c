"""Holds the oracle itself: cases worked by hand for every equation, and for the order of Algorithm 1."""

import ast
import copy
import math
from pathlib import Path

import pytest
import reference as paper
import torch
from torch import nn

F64 = torch.float64


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def near(actual, expected, tolerance=1e-15):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_oracle_does_not_use_the_package():
    tree = ast.parse(Path(paper.__file__).read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported == {"contextlib", "itertools", "torch"}


def half_square(theta):
    """Return the loss L = θ²/2."""
    return lambda: theta.square().sum() / 2


# -- Eq. (2) ----------------------------------------------------------------------------------------------------------


def test_mean_and_outer_product_by_hand():
    mean = paper.batch_rows(matrix([1, 2], [3, 6]))
    assert mean.tolist() == [[2, 4]]
    assert paper.outer_product(mean).tolist() == [[4, 8], [8, 16]]


def test_cumulative_covariance_by_hand():
    # Two batches with means (2, 4) and (1, -1): [[4, 8], [8, 16]] + [[1, -1], [-1, 1]].
    rows = torch.cat([paper.batch_rows(matrix([1, 2], [3, 6])), paper.batch_rows(matrix([1, -1]))])
    assert paper.cumulative_covariance(rows).tolist() == [[5, 7], [7, 17]]
    # The first one decayed to one quarter, and both around their mean (1.5, 1.5).
    near(paper.cumulative_covariance(rows, torch.tensor([0.25, 1.0], dtype=F64)), matrix([2, 1], [1, 5]))
    near(paper.cumulative_covariance(rows, centred=True), matrix([0.5, 2.5], [2.5, 12.5]))


def test_token_features_give_one_row_for_each_position():
    features = matrix([1, 2, 3, 4], [5, 6, 7, 8]).reshape(2, 2, 2)  # (n_B, s, d)
    assert paper.batch_rows(features).tolist() == [[3, 4], [5, 6]]
    assert paper.batch_rows(features, "samples").tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


# -- Eqs. (3) and (4) -------------------------------------------------------------------------------------------------


def test_spectrum_by_hand():
    near(paper.spectrum(matrix([2, 1], [1, 2])), torch.tensor([3.0, 1.0], dtype=F64))


def test_change_of_output_along_a_singular_direction_is_its_singular_value():
    # Eq. (3): ‖Z γ v_i‖ = γ λ_i, with Z = U Λ Vᵀ.
    features = matrix([3, 0], [0, 1], [0, 0])
    _, lambdas, vh = torch.linalg.svd(features)
    for i, value in enumerate(lambdas):
        near(torch.linalg.vector_norm(features @ (0.5 * vh[i])), 0.5 * value)


def test_flat_projector_by_hand():
    # λ = 3 along (1, 1)/√2 and λ = 1 along (1, −1)/√2; with τ = ln 2, Σ = diag(1/2, 1).
    near(paper.flat_projector(matrix([2, 1], [1, 2]), math.log(2)), matrix([0.75, -0.25], [-0.25, 0.75]))
    # λ = 4, 2, 0 gives Σ = e^−τ, e^−τ/2, 1.
    diagonal = torch.diag(torch.tensor([2.0, 0.0, 4.0], dtype=F64))
    expected = torch.diag(torch.tensor([0.5**0.5, 1.0, 0.5], dtype=F64))
    near(paper.flat_projector(diagonal, math.log(2)), expected)


@pytest.mark.parametrize("covariance", [torch.zeros(3, 3), 7 * torch.eye(3), torch.full((1, 1), 5.0)])
def test_flat_projector_of_a_flat_spectrum_is_the_identity(covariance):
    assert torch.equal(paper.flat_projector(covariance, 0.4), torch.eye(len(covariance), dtype=F64))


def test_orthogonal_projector_by_hand():
    # r = (1, 0), α = 1: k = (1, 0), P = I − diag(1, 0)/2. Then r = (2, 2), α = 0.5: k = (1, 2), rᵀk = 6.
    once = paper.orthogonal_projector(torch.eye(2), matrix([1, 0]), [1.0])
    near(once, matrix([0.5, 0], [0, 1]))
    twice = paper.orthogonal_projector(torch.eye(2), matrix([1, 0], [2, 2]), [1.0, 0.5])
    near(twice, matrix([0.5 - 1 / 6.5, -2 / 6.5], [-2 / 6.5, 1 - 4 / 6.5]))
    near(paper.orthogonal_projector(torch.eye(2), matrix([1, 0]), [1.0], normalise=True), once / math.sqrt(1.25), 1e-15)


# -- Eqs. (5), (7), (8), (9) ------------------------------------------------------------------------------------------


def test_projected_gradient_acts_from_the_right():
    assert paper.projected_gradient(matrix([1, 2]), matrix([1, 10], [100, 1000])).tolist() == [[201, 2010]]


def test_perturbation_has_one_norm_over_all_tensors():
    first, missing, second = paper.perturbation([matrix([3, 0]), None, matrix([0, 4])], 0.5)
    near(first, matrix([0.3, 0]))
    assert missing is None
    near(second, matrix([0, 0.4]))
    first, second = paper.perturbation([matrix([3]), matrix([4])], [1.0, 10.0])
    near(torch.cat([first, second]), matrix([0.6], [8]))


def test_sam_gradient_of_one_parameter_by_hand():
    # L = θ²/2 at θ = 2: g = 2, ε* = 0.05, ∇L(θ + ε*) = 2.05, L(θ + ε*) = 2.05²/2.
    theta = nn.Parameter(torch.tensor([2.0], dtype=F64))
    place = theta.data_ptr()
    (gradient,), value = paper.sam_gradient(half_square(theta), [theta], 0.05)
    assert gradient.item() == 2.05
    assert value == 2.05**2 / 2
    assert theta.item() == 2.0
    assert theta.data_ptr() == place


def test_sam_step_of_one_parameter_by_hand():
    # θ ← 2 − 0.1 · 2.05 in one turn of one modality with nothing projected.
    theta = nn.Parameter(torch.tensor([2.0], dtype=F64))
    oracle = paper.Algorithm1({"only": [theta]}, torch.optim.SGD([theta], lr=0.1), rho=0.05)
    assert oracle.step("only", half_square(theta)) == 2.0
    near(theta.detach(), torch.tensor([1.795], dtype=F64))
    assert oracle.losses == [(2.0, 2.05**2 / 2)]


# -- line 9 and the order of Algorithm 1 ------------------------------------------------------------------------------


def test_source_index_is_line_nine():
    assert [paper.source_index(j, 2) for j in (1, 2)] == [2, 1]
    assert [paper.source_index(j, 3) for j in (1, 2, 3)] == [3, 1, 2]
    assert paper.source_index(1, 1) == 1


def test_source_names():
    names = ("a", "v", "t")
    assert [paper.source_names(n, names, "previous") for n in names] == [["t"], ["a"], ["v"]]
    assert [paper.source_names(n, names, "others") for n in names] == [["v", "t"], ["t", "a"], ["a", "v"]]
    assert paper.source_names("only", ("only",), "others") == ["only"]
    assert paper.source_names("a", names, {"a": None}) == []
    assert paper.source_names("a", names, {"a": "v"}) == ["v"]
    assert paper.source_names("a", names, {"a": ["t", "v"]}) == ["t", "v"]


def test_schedule_of_turns_and_of_alternation():
    turns = [(i, name, t, last) for i, name, t, last in paper.schedule(["a", "v"], 2, 2)]
    assert turns == [
        (0, "a", 0, False),
        (0, "a", 1, True),
        (0, "v", 0, False),
        (0, "v", 1, True),
        (1, "a", 2, False),
        (1, "a", 3, True),
        (1, "v", 2, False),
        (1, "v", 3, True),
    ]
    alternating = [(name, t) for _, name, t, _ in paper.schedule(["a", "v"], 1, 2, alternate=True)]
    assert alternating == [("a", 0), ("v", 0), ("a", 1), ("v", 1)]


# -- whole runs -------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two modalities of one Linear layer each, whose input is the data: L = ½ Σ (W z)² averaged over the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.v = (nn.Linear(2, 1, bias=False, dtype=F64) for _ in range(2))
        with torch.no_grad():
            self.a.weight.copy_(matrix([1, 1]))
            self.v.weight.copy_(matrix([1, 1]))

    def loss(self, name, z):
        return getattr(self, name)(z).square().mean() / 2


def oracle_of(model, **options):
    settings = {"rho": 0.0, "tau": math.log(2), **options}
    lr = settings.pop("lr", 0.5)
    return paper.Algorithm1(
        {"a": [model.a], "v": [model.v]},
        torch.optim.SGD(model.parameters(), lr=lr),
        {"a": [model.a], "v": [model.v]},
        **settings,
    )


def test_two_turns_by_hand():
    # Turn of a, z = (1, 0): T⁽ᵛ⁾ = I, ∇W = (1, 0), W ← (0.5, 1). Then Ȳ⁽ᵃ⁾ = diag(1, 0) and T⁽ᵃ⁾ = diag(1/2, 1).
    # Turn of v, z = (1, 1): W z = 2, ∇W = (2, 2), ∇W T⁽ᵃ⁾ = (1, 2), W ← (0.5, 0).
    model = Pair()
    oracle = oracle_of(model)
    with oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
        assert oracle.projectors["a"] == {}
    near(model.a.weight.detach(), matrix([0.5, 1]))
    near(oracle.projectors["a"][model.a], matrix([0.5, 0], [0, 1]))
    with oracle.turn("v"):
        oracle.step("v", lambda: model.loss("v", matrix([1, 1])))
    near(model.v.weight.detach(), matrix([0.5, 0]))
    near(model.a.weight.detach(), matrix([0.5, 1]))


def test_turn_projects_with_sam_by_hand():
    # As above with ρ = 1 in the turn of v: ε* = (1, 1)/√2, W z at θ + ε* = 2 + √2, ∇W T⁽ᵃ⁾ = (1 + √2/2, 2 + √2).
    model = Pair()
    oracle = oracle_of(model, rho={"a": 0.0, "v": 1.0})
    for name, z in (("a", matrix([1, 0])), ("v", matrix([1, 1]))):
        with oracle.turn(name):
            oracle.step(name, lambda name=name, z=z: model.loss(name, z))
    root = math.sqrt(2)
    near(model.v.weight.detach(), matrix([1 - (1 + root / 2) / 2, 1 - (2 + root) / 2]))


def test_update_projection_by_hand():
    # With SGD and no momentum, projecting the update is projecting the gradient; with weight decay it is not:
    # update = −0.5 (2 + 0.2, 2 + 0.2) = (−1.1, −1.1), times diag(1/2, 1) = (−0.55, −1.1).
    model = Pair()
    oracle = oracle_of(model, project="update")
    oracle.base.param_groups[0]["weight_decay"] = 0.2
    oracle.projectors["a"][model.a] = matrix([0.5, 0], [0, 1])
    oracle.step("v", lambda: model.loss("v", matrix([1, 1])))
    near(model.v.weight.detach(), matrix([0.45, -0.1]))


def test_covariance_fresh_kept_and_decayed():
    batches = [matrix([1, 0]), matrix([0, 2])]  # outer products diag(1, 0) and diag(0, 4)
    for covariance, expected in (("fresh", (0, 4)), ("kept", (1, 4)), (0.5, (0.5, 4))):
        model = Pair()
        oracle = oracle_of(model, covariance=covariance)
        for z in batches:
            with oracle.turn("a"):
                oracle.step("a", lambda z=z, model=model: model.loss("a", z))
            with oracle.turn("a"):
                pass  # an empty turn changes nothing
        near(oracle.covariance_of("a", model.a), torch.diag(torch.tensor(expected, dtype=F64)))


def test_refresh_at_the_end_of_implicit_turns_every_n_steps_and_by_hand():
    def run(refresh):
        model = Pair()
        oracle = oracle_of(model, refresh=refresh)
        made = []
        for name in ("a", "a", "v", "a"):
            oracle.step(name, lambda name=name: model.loss(name, matrix([1.0, 0.5])))
            made.append(sorted(k for k, layers in oracle.projectors.items() if layers))
        return oracle, made

    assert run("turn")[1] == [[], [], ["a"], ["a", "v"]]
    assert run(2)[1] == [[], ["a"], ["a"], ["a"]]
    assert run(1)[1] == [["a"], ["a"], ["a", "v"], ["a", "v"]]
    oracle, made = run("manual")
    assert made == [[], [], [], []]
    oracle.refresh("v")
    assert list(oracle.projectors["v"]) == oracle.heads["v"]


def test_fresh_covariance_starts_anew_after_every_n_steps():
    model = Pair()
    oracle = oracle_of(model, refresh=2)
    for x in (1.0, 2.0, 3.0):
        oracle.step("a", lambda x=x: model.loss("a", matrix([x, 0])))
    assert oracle.covariance_of("a", model.a)[0, 0] == 9


def test_collect_replaces_the_rows_of_its_turn():
    model = Pair()
    oracle = oracle_of(model, covariance="kept")
    with oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
    with oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([2, 0])))
        oracle.collect("a", [lambda: model.a(matrix([3, 0])), lambda: model.a(matrix([0, 4]))])
        oracle.step("a", lambda: model.loss("a", matrix([5, 0])))
    near(oracle.covariance_of("a", model.a), matrix([10, 0], [0, 16]))
    oracle.collect("v", [lambda: model.v(matrix([1, 0]))])
    near(oracle.projectors["v"][model.v], matrix([0.5, 0], [0, 1]))


def test_micro_batches_are_summed_by_hand():
    # L₁ = θ²/2 and L₂ = 2θ at θ = 2: L = 2 + 4, g = 2 + 2. ε* = 0.05, ∇L(θ + ε*) = 2.05 + 2. A part that one of them
    # does not know has the other's gradient, one that none knows has none.
    theta, other, unused = (nn.Parameter(torch.tensor([2.0], dtype=F64)) for _ in range(3))

    def linear():
        return (2 * theta + 0 * other).sum()

    losses = [half_square(theta), linear]
    value, gradients = paper.gradients_of(losses, [theta, other, unused])
    assert value == 6.0
    assert [g if g is None else g.item() for g in gradients] == [4.0, 0.0, None]
    oracle = paper.Algorithm1({"only": [theta]}, torch.optim.SGD([theta], lr=0.1), rho=0.05)
    assert oracle.step("only", losses) == 6.0
    near(theta.detach(), torch.tensor([2 - 0.405], dtype=F64))


def test_every_micro_batch_brings_a_row():
    model = Pair()
    oracle = oracle_of(model)
    oracle.step("a", [lambda: model.loss("a", matrix([1, 0])), lambda: model.loss("a", matrix([0, 2]))])
    near(oracle.covariance_of("a", model.a), matrix([1, 0], [0, 4]))


def test_clipping_by_hand():
    # ‖(3, 4)‖ = 5: to norm 1 both are divided by 5 (and the millionth that PyTorch adds), to norm 10 they stay.
    first, missing, second = paper.clipped([matrix([3]), None, matrix([4])], 1.0)
    near(torch.cat([first, second]), matrix([0.6], [0.8]), 1e-6)
    assert missing is None
    assert paper.clipped([matrix([3]), matrix([4])], 10.0)[1].item() == 4


def test_projected_gradients_are_clipped():
    # As in the two turns by hand: ∇W T⁽ᵃ⁾ = (1, 2) has norm √5 and is clipped to 1; unclipped ∇W = (2, 2) was not.
    model = Pair()
    oracle = oracle_of(model, max_grad_norm=1.0)
    oracle.projectors["a"][model.a] = matrix([0.5, 0], [0, 1])
    oracle.step("v", lambda: model.loss("v", matrix([1, 1])))
    near(model.v.weight.detach(), matrix([1 - 0.5 / math.sqrt(5), 1 - 1 / math.sqrt(5)]), 1e-6)


def test_group_has_its_own_rho_and_tau():
    # ‖g‖ = ‖(3, 4)‖ = 5; ε* = 0.5 · 3/5 for the one, 5 · 4/5 for the other, whose group says so.
    one, other = (nn.Parameter(torch.tensor([value], dtype=F64)) for value in (3.0, 4.0))
    base = torch.optim.SGD([{"params": [one]}, {"params": [other], "rho": 5.0}], lr=1.0)
    oracle = paper.Algorithm1({"only": [one, other]}, base, rho=0.5)
    oracle.step("only", lambda: half_square(one)() + half_square(other)())
    near(torch.stack([one.detach(), other.detach()]), matrix([-0.3], [-4]))

    model = Pair()
    oracle = oracle_of(model, tau=0.4)
    oracle.base.param_groups[0]["tau"] = math.log(2)
    oracle.collect("a", [lambda: model.a(matrix([1, 0]))])
    near(oracle.projectors["a"][model.a], matrix([0.5, 0], [0, 1]))


def test_projector_keeps_the_tau_it_was_made_with():
    model = Pair()
    oracle = oracle_of(model)
    with oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
    oracle.tau = 0.0
    near(oracle.projector_for("v", model.v), matrix([0.5, 0], [0, 1]))
    oracle.refresh("a")
    assert oracle.projector_for("v", model.v) is None


def test_added_group_moves_in_every_turn():
    model = Pair()
    oracle = oracle_of(model, lr=0.1)
    shift = nn.Parameter(torch.tensor([1.0], dtype=F64))
    oracle.add_param_group({"params": [shift], "lr": 0.25})
    for name, expected in (("a", 0.75), ("v", 0.5625)):
        oracle.step(name, half_square(shift))
        near(shift.detach(), torch.tensor([expected], dtype=F64))


def test_reset_at_the_first_step_of_a_turn():
    # Momentum 0.5 and g = 1 throughout: 1, then 1.5; anew in the next turn, 1, with the lr that the base came with.
    theta = nn.Parameter(torch.zeros(1, dtype=F64))
    base = torch.optim.SGD([theta], lr=1.0, momentum=0.5)
    oracle = paper.Algorithm1({"only": [theta]}, base, rho=0.0, reset=("momentum", "lr"))
    for lr, positions in ((1.0, (-1.0, -2.5)), (0.25, (-3.5, -5.0))):
        base.param_groups[0]["lr"] = lr
        with oracle.turn("only"):
            for expected in positions:
                oracle.step("only", theta.sum)
                assert theta.item() == expected


def test_plain_step_with_a_zero_gradient_is_the_bases_own():
    # Nothing is asked for but the base: weight decay 0.1 with lr 0.5 takes 1 to 0.95. With SAM it is skipped.
    for rho, expected, skipped in ((0.0, 0.95, 0), (0.05, 1.0, 1)):
        theta = nn.Parameter(torch.ones(1, dtype=F64))
        oracle = paper.Algorithm1(
            {"only": [theta]}, torch.optim.SGD([theta], lr=0.5, weight_decay=0.1), rho=rho, tau=0.4
        )
        oracle.step("only", lambda theta=theta: 0 * theta.sum())
        assert (theta.item(), oracle.skipped) == (expected, skipped)


def test_skipped_step_ends_no_turn():
    model = Pair()
    oracle = oracle_of(model)
    oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
    oracle.step("v", lambda: math.nan * model.loss("v", matrix([1, 0])))
    assert (oracle.open, oracle.turns, oracle.projectors["a"]) == ("a", 0, {})
    oracle.step("v", lambda: model.loss("v", matrix([1, 0])))
    assert (oracle.open, oracle.turns, list(oracle.projectors["a"])) == ("v", 1, [model.a])


def test_turn_left_by_an_exception_goes_on_or_is_dropped():
    for between, expected, turns in (((), (1, 4), 1), (("v",), (0, 4), 2)):
        model = Pair()
        oracle = oracle_of(model)
        with pytest.raises(KeyboardInterrupt), oracle.turn("a"):
            oracle.step("a", lambda model=model: model.loss("a", matrix([1, 0])))
            raise KeyboardInterrupt
        assert (oracle.projectors["a"], oracle.turns) == ({}, 0)
        for name in (*between, "a"):
            with oracle.turn(name):
                oracle.step(name, lambda name=name, model=model: model.loss(name, matrix([0, 2])))
        near(oracle.covariance_of("a", model.a), torch.diag(torch.tensor(expected, dtype=F64)))
        assert oracle.turns == turns


def test_kept_covariance_loses_the_rows_of_a_dropped_turn_only():
    model = Pair()
    oracle = oracle_of(model, covariance="kept")
    with oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
    with pytest.raises(KeyboardInterrupt), oracle.turn("a"):
        oracle.step("a", lambda: model.loss("a", matrix([3, 0])))
        raise KeyboardInterrupt
    near(oracle.covariance_of("a", model.a), matrix([10, 0], [0, 0]))
    oracle.step("v", lambda: model.loss("v", matrix([1, 0])))
    near(oracle.covariance_of("a", model.a), matrix([1, 0], [0, 0]))


def test_gradients_at_hand_count_what_was_forwarded_and_closures_do_not():
    # z = 3 is forwarded without a step. With a closure only z = 1 counts; with gradients at hand both, and no SAM.
    for how, expected, second in (("closure", 1, True), ("gradients", 10, False), ("replay", 10, True)):
        model = Pair()
        oracle = oracle_of(model, rho=0.05)
        oracle.forward(lambda model=model: model.a(matrix([3, 0])))
        oracle.step("a", lambda model=model: model.loss("a", matrix([1, 0])), how)
        assert oracle.covariance_of("a", model.a)[0, 0] == expected
        assert (oracle.losses[-1][1] is not None) == second
        assert oracle.unperturbed == (not second)


def test_two_calls_make_two_passes_even_without_sam():
    model = Pair()
    oracle = oracle_of(model)
    oracle.step("a", lambda: model.loss("a", matrix([1, 0])), "two calls")
    assert oracle.losses == [(0.5, 0.5)]


def test_copy_of_twin_and_oracle_goes_on_alone():
    model = Pair()
    oracle = oracle_of(model)
    oracle.enter("a")
    oracle.step("a", lambda: model.loss("a", matrix([1, 0])))
    twin, copied = copy.deepcopy((model, oracle))
    copied.forget()
    oracle.step("a", lambda: model.loss("a", matrix([5, 0])))
    copied.enter("a")
    copied.step("a", lambda: twin.loss("a", matrix([0, 2])))
    copied.leave()
    near(copied.covariance_of("a", twin.a), matrix([1, 0], [0, 4]))
    assert (copied.turns, oracle.turns) == (1, 0)
    assert model.a not in copied.rows["a"]


def test_only_the_active_and_the_shared_move():
    parts = {n: nn.Parameter(torch.ones(1, dtype=F64)) for n in ("a", "v", "pair", "all")}
    base = torch.optim.SGD(parts.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    oracle = paper.Algorithm1(
        {"a": [parts["a"], parts["pair"]], "v": [parts["v"], parts["pair"]], "t": [nn.Parameter(torch.ones(1))]},
        base,
        rho=0.05,
    )

    def moved_by(name):
        before = {n: p.item() for n, p in parts.items()}
        oracle.step(name, lambda: sum((p**2).sum() for p in parts.values()))
        return {n for n, p in parts.items() if p.item() != before[n]}

    assert moved_by("a") == {"a", "pair", "all"}
    assert moved_by("v") == {"v", "pair", "all"}
    assert moved_by("t") == {"all"}


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_bad_gradient_in_either_pass_is_skipped(bad, which):
    model = Pair()
    oracle = oracle_of(model, rho=0.05)
    oracle.step("a", lambda: model.loss("a", matrix([1, 2])))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(oracle.base.state_dict())
    factors = [1.0, 1.0]
    factors[which] = bad
    oracle.step("a", lambda: factors.pop(0) * model.loss("a", matrix([1, 2])))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str(oracle.base.state_dict()) == str(state)
    assert oracle.skipped == 1
    assert len(oracle.rows["a"][model.a]) == 1


def test_non_finite_rows_are_left_out():
    model = Pair()
    oracle = oracle_of(model, features="samples")
    with oracle.turn("a"):
        seen = {}
        with oracle._watch("a", seen):
            model.a(matrix([1, 0], [math.nan, 0], [0, math.inf], [2, 0]))
        oracle._keep("a", seen)
    near(oracle.covariance_of("a", model.a), matrix([5, 0], [0, 0]))


def test_orthogonal_projector_belongs_to_the_layer():
    head = nn.Linear(2, 1, bias=False, dtype=F64)
    oracle = paper.Algorithm1(
        {"a": [head], "v": [head]},
        torch.optim.SGD(head.parameters(), lr=0.1),
        {"a": [head], "v": [head]},
        rho=0.0,
        projector="orthogonal",
        covariance="kept",
        refresh=1,
        alpha=0.1,
        batches=2,
    )
    rows = {"a": matrix([1, 0], [1, 1], [0, 3]).split(1), "v": matrix([0, 2], [2, 1], [1, 1]).split(1)}
    for i in range(3):
        for name in "av":
            oracle.step(name, lambda z=rows[name][i]: head(z).square().sum())
    # α = 0.1^(1 + batch/2) with batch = 0, 1, 0: counted for each modality.
    order = torch.cat([rows[name][i] for i in range(3) for name in "av"])
    alphas = [0.1, 0.1, 0.1**1.5, 0.1**1.5, 0.1, 0.1]
    near(oracle.layer_projectors[head], paper.orthogonal_projector(torch.eye(2), order, alphas))
    assert oracle.projector_for("a", head) is not None


def test_several_sources_multiply_in_the_order_of_training():
    layers = {n: nn.Linear(2, 1, bias=False, dtype=F64) for n in "avt"}
    parameters = [layer.weight for layer in layers.values()]
    oracle = paper.Algorithm1(
        {n: [layer] for n, layer in layers.items()},
        torch.optim.SGD(parameters, lr=0.1),
        {n: [layer] for n, layer in layers.items()},
        sources="others",
    )
    oracle.projectors["t"][layers["t"]] = matrix([1, 2], [0, 1])
    oracle.projectors["a"][layers["a"]] = matrix([1, 0], [3, 1])
    near(oracle.projector_for("v", layers["v"]), matrix([7, 2], [3, 1]))  # T⁽ᵗ⁾ T⁽ᵃ⁾
    assert torch.equal(oracle.projector_for("t", layers["t"]), oracle.projectors["a"][layers["a"]])


def test_batch_norm_statistics_advance_once():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    oracle = paper.Algorithm1({"a": [model]}, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    oracle.step("a", lambda: model(torch.randn(5, 2, dtype=F64)).square().mean())
    assert model[0].num_batches_tracked.item() == 1


def test_whole_run_steps_in_the_order_of_algorithm_one():
    model, order = Pair(), []
    data = {"a": [matrix([1, 0]), matrix([0, 1])], "v": [matrix([1, 1])]}

    def loss(name, z):
        order.append((name, tuple(z[0].tolist())))
        return model.loss(name, z)

    ended = []
    oracle = paper.run_algorithm1(
        {"a": [model.a], "v": [model.v]},
        data,
        loss,
        2,
        1,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        after=lambda _, i, name: ended.append((i, name)),
        heads={"a": [model.a], "v": [model.v]},
        rho=0.0,
        tau=0.4,
    )
    assert order == [("a", (1, 0)), ("v", (1, 1)), ("a", (0, 1)), ("v", (1, 1))]
    assert ended == [(0, "a"), (0, "v"), (1, "a"), (1, "v")]
    assert oracle.active is None
    near(oracle.covariance_of("a", model.a), matrix([0, 0], [0, 1]))


# -- layers of every kind ---------------------------------------------------------------------------------------------


def test_conv_rows_by_hand():
    # The mean of (1, 2) and (3, 4) is (2, 3); padded 0 2 3 0, a kernel of two meets it at three positions.
    conv = nn.Conv1d(1, 1, 2, padding=1)
    batch = matrix([1, 2], [3, 4])[:, None]
    assert paper.conv_rows(conv, batch).tolist() == [[0, 2], [2, 3], [3, 0]]
    samples = [[0, 1], [1, 2], [2, 0], [0, 3], [3, 4], [4, 0]]
    assert paper.conv_rows(conv, batch, "samples").tolist() == samples
    assert paper.conv_rows(conv, batch[0]).tolist() == samples[:3]  # without a batch dimension
    assert paper.conv_rows(conv, batch[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"padding": "same"}, [[1, 2], [2, 3], [3, 4], [4, 0]]),  # one too many: it goes to the right
        ({"padding": "valid"}, [[1, 2], [2, 3], [3, 4]]),
        ({"stride": 2}, [[1, 2], [3, 4]]),
        ({"dilation": 2}, [[1, 3], [2, 4]]),
        ({"dilation": 3, "padding": "same"}, [[0, 3], [1, 4], [2, 0], [3, 0]]),
        ({"padding": 1, "padding_mode": "reflect"}, [[2, 1], [1, 2], [2, 3], [3, 4], [4, 3]]),
        ({"padding": 1, "padding_mode": "replicate"}, [[1, 1], [1, 2], [2, 3], [3, 4], [4, 4]]),
        ({"padding": 1, "padding_mode": "circular", "stride": 3}, [[4, 1], [3, 4]]),
    ],
    ids=str,
)
def test_conv_rows_of_each_geometry_by_hand(options, expected):
    assert paper.conv_rows(nn.Conv1d(1, 1, 2, **options), matrix([[1, 2, 3, 4]])).tolist() == expected


def test_conv_rows_put_channels_side_by_side():
    conv = nn.Conv2d(2, 2, (1, 2), groups=2)
    image = matrix([[1, 2], [3, 4]], [[5, 6], [7, 8]])[None]
    assert paper.conv_rows(conv, image).tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]


CONVS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect", groups=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", groups=4),
    nn.Conv3d(4, 2, (2, 3, 1), stride=(2, 1, 1), padding=(0, 1, 0), padding_mode="replicate"),
    nn.Conv3d(4, 6, 2, padding="same", dilation=(1, 2, 1), groups=2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_a_convolution_is_its_rows_times_its_matrix(conv):
    conv = copy.deepcopy(conv).double()
    features = torch.randn(3, 4, *[5] * len(conv.kernel_size), dtype=F64)
    rows = paper.conv_rows(conv, features, "samples").unflatten(1, (conv.groups, -1))
    outputs = torch.einsum("ngd,god->ngo", rows, paper.matrix_of(conv, conv.weight)).flatten(1) + conv.bias
    near(outputs.reshape(3, -1, conv.out_channels).transpose(1, 2), conv(features).flatten(2), 1e-13)
    mean = paper.conv_rows(conv, features).unflatten(1, (conv.groups, -1))
    near(mean, rows.unflatten(0, (3, -1)).mean(dim=0), 1e-14)  # padding and unfolding are linear


def test_conv_rows_are_what_torch_unfolds():
    conv = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1))
    features = torch.randn(2, 2, 6, 5, dtype=F64)
    unfolded = nn.functional.unfold(features, (3, 2), dilation=(2, 1), padding=(2, 1), stride=(1, 2))
    assert torch.equal(paper.conv_rows(conv, features, "samples"), unfolded.transpose(1, 2).flatten(0, 1))


def test_attention_has_four_layers():
    attention = nn.MultiheadAttention(4, 2, dtype=F64)
    layers = paper.layers_of(attention)
    assert layers == [(attention, part) for part in ("q", "k", "v", "out")]
    assert paper.layers_of(attention.out_proj) == [attention.out_proj]
    assert all(paper.weight_of(layer) is attention.in_proj_weight for layer in layers[:3])
    for i, layer in enumerate(layers[:3]):
        assert torch.equal(paper.matrix_of(layer, attention.in_proj_weight)[0], attention.in_proj_weight.chunk(3)[i])
    assert paper.weight_of(layers[3]) is attention.out_proj.weight
    separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, dtype=F64)
    assert [paper.width_of(layer) for layer in paper.layers_of(separate)] == [(1, 4), (1, 3), (1, 5), (1, 4)]


def test_attention_rows_by_hand():
    # q, k, v: means over the batch, position by position. With Q = K = 0 attention is the mean of the values.
    attention = nn.MultiheadAttention(2, 1, batch_first=True, bias=False, dtype=F64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([torch.zeros(4, 2), torch.eye(2)]))
    query, key = matrix([1, 0], [3, 4]).reshape(2, 1, 2), matrix([1, 2], [5, 6], [3, 0], [1, 2]).reshape(2, 2, 2)
    rows = [paper.layer_rows(layer, query, key, key) for layer in paper.layers_of(attention)]
    assert [found.tolist() for found in rows] == [[[2, 2]], [[2, 1], [3, 4]], [[2, 1], [3, 4]], [[2.5, 2.5]]]
    samples = paper.layer_rows((attention, "q"), query, key=key, value=key, reduce="samples")
    assert samples.tolist() == [[1, 0], [3, 4]]
    masked = paper.layer_rows((attention, "out"), query, key, key, attn_mask=torch.tensor([[False, True]]))
    assert masked.tolist() == [[2, 1]]
    padded = torch.tensor([[True, False], [False, True]])
    assert paper.layer_rows((attention, "out"), query, key, key, padded).tolist() == [[4, 3]]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float", "of each head"])
def test_attention_is_its_output_rows_times_out_proj(batch_first, sizes, mask):
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=batch_first, dtype=F64, **sizes)
    nn.init.normal_(attention.in_proj_bias)
    shapes = [(3, 5, 4), (3, 6, sizes.get("kdim", 4)), (3, 6, sizes.get("vdim", 4))]
    inputs = [torch.randn(shape, dtype=F64) for shape in shapes]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    masks = {
        "bool": torch.rand(5, 6) > 0.7,
        "float": torch.randn(5, 6, dtype=F64),
        "of each head": torch.rand(6, 5, 6) > 0.7,
    }
    rows = paper.layer_rows((attention, "out"), *inputs, reduce="samples", attn_mask=masks.get(mask))
    expected, _ = attention.eval()(*inputs, attn_mask=masks.get(mask))
    expected = expected if batch_first else expected.transpose(0, 1)
    near(attention.out_proj(rows).detach(), expected.detach().flatten(0, 1), 1e-13)
    single = [x[0] if batch_first else x[:, 0] for x in inputs]
    if mask != "of each head":
        near(paper.layer_rows((attention, "out"), *single, attn_mask=masks.get(mask)), rows[:5], 1e-13)


def test_weight_norm_has_its_direction_projected():
    with pytest.warns(FutureWarning, match="deprecated"):
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert paper.weight_of(new) is new.parametrizations.weight.original1
    assert paper.weight_of(old) is old.weight_v
    assert paper.width_of(new) == (1, 3)


class Conv1D(nn.Module):
    """As transformers has it: W is (d, out), and the output z W + b."""

    def __init__(self, out, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, out)), nn.Parameter(torch.zeros(out))


def test_projected_layer_by_hand():
    # Linear: [1 2 | 3] T, where T moves the first column to the last, the last to the first.
    swap = matrix([0, 0, 1], [0, 1, 0], [1, 0, 0])
    weight, bias = paper.projected_layer(nn.Linear(2, 1), matrix([1, 2]), matrix(3), swap)
    assert (weight.tolist(), bias.tolist()) == ([[3, 2]], [1])
    # Conv1D: the same on the transposed.
    weight, bias = paper.projected_layer(Conv1D(1, 2), matrix([1], [2]), matrix(3), swap)
    assert (weight.tolist(), bias.tolist()) == ([[3], [2]], [1])
    # Two groups of one output and a kernel of two: each by its own T.
    both = torch.stack([matrix([0, 1], [1, 0]), matrix([2, 0], [0, 3])])
    weight, bias = paper.projected_layer(nn.Conv1d(2, 2, 2, groups=2), matrix([[1, 2]], [[3, 4]]), None, both)
    assert (weight.tolist(), bias) == ([[[2, 1]], [[6, 12]]], None)
    weight, bias = paper.projected_layer(nn.Conv1d(2, 2, 1, groups=2), matrix([[1]], [[3]]), matrix(2, 4), both)
    assert (weight.tolist(), bias.tolist()) == ([[[2]], [[6]]], [1, 12])
    # k of an attention: the middle third of weight and bias.
    attention = nn.MultiheadAttention(2, 1)
    before = torch.arange(12.0, dtype=F64).reshape(6, 2), torch.arange(6.0, dtype=F64)
    weight, bias = paper.projected_layer((attention, "k"), *before, 2 * torch.eye(3, dtype=F64))
    assert weight.tolist() == [[0, 1], [2, 3], [8, 10], [12, 14], [8, 9], [10, 11]]
    assert bias.tolist() == [0, 1, 4, 6, 4, 5]
    assert before[0].tolist()[2] == [4, 5]


def test_constant_feature_stands_after_each_groups_columns():
    assert paper.layer_rows(nn.Linear(2, 1), matrix([1, 2], [3, 6]), augment=True).tolist() == [[2, 4, 1]]
    assert paper.layer_rows(nn.Linear(2, 1, bias=False), matrix([1, 2]), augment=True).tolist() == [[1, 2]]
    conv = nn.Conv1d(2, 2, 2, groups=2)
    assert paper.layer_rows(conv, matrix([[1, 2], [3, 4]]), augment=True).tolist() == [[1, 2, 1, 3, 4, 1]]
    assert paper.width_of(conv, augment=True) == (2, 3)


def test_grouped_covariance_by_hand():
    rows = matrix([1, 2, 3, 0], [0, 1, 0, 1])
    expected = torch.stack([matrix([1, 2], [2, 5]), matrix([9, 0], [0, 1])])
    assert torch.equal(paper.grouped_covariance(rows, 2), expected)
    assert paper.grouped_covariance(rows, 1).shape == (4, 4)
    near(paper.grouped_covariance(rows, 2, centred=True)[1], matrix([4.5, -1.5], [-1.5, 0.5]))


def test_layers_of_every_kind_bring_rows_and_are_projected():
    parts = nn.ModuleDict(
        {"conv": nn.Conv1d(2, 3, 2, groups=1), "attention": nn.MultiheadAttention(3, 1, batch_first=True)}
    )
    model, twin = parts.double(), copy.deepcopy(parts).double()
    modules = {"a": list(model.values()), "v": list(twin.values())}
    parameters = [*model.parameters(), *twin.parameters()]
    oracle = paper.Algorithm1(modules, torch.optim.SGD(parameters, lr=0.1), modules, rho=0.0, augment_bias=True)
    features = torch.randn(4, 2, 5, dtype=F64)

    def loss(net):
        tokens = net["conv"](features).transpose(1, 2)
        return net["attention"](tokens, tokens, value=tokens)[0].square().sum()

    with oracle.turn("a"):
        oracle.step("a", lambda: loss(model))
    near(
        oracle.covariance_of("a", model["conv"]),
        paper.grouped_covariance(paper.layer_rows(model["conv"], features, augment=True), 1),
    )
    gradients = paper.gradients_of(lambda: loss(twin), list(twin.parameters()))[1]
    before = [p.detach().clone() for p in twin.parameters()]
    with oracle.turn("v"):
        oracle.step("v", lambda: loss(twin))
    moved = {name: (old - p.detach()) / 0.1 for (name, p), old in zip(twin.named_parameters(), before, strict=True)}
    given = dict(zip(moved, gradients, strict=True))
    weight, bias = "attention.in_proj_weight", "attention.in_proj_bias"
    for part, third in zip("qkv", range(3), strict=True):
        T = oracle.projectors["a"][model["attention"], part]
        whole = torch.cat([given[weight].chunk(3)[third], given[bias].chunk(3)[third][:, None]], dim=1) @ T
        near(moved[weight].chunk(3)[third], whole[:, :-1], 1e-13)
        near(moved[bias].chunk(3)[third], whole[:, -1], 1e-13)
    T = oracle.projectors["a"][model["conv"]]
    whole = torch.cat([given["conv.weight"].flatten(1), given["conv.bias"][:, None]], dim=1) @ T
    near(moved["conv.weight"].flatten(1), whole[:, :-1], 1e-13)


def test_tied_weights_are_one_layer_that_hears_both_modules():
    first, second = (nn.Linear(2, 2, bias=False, dtype=F64) for _ in range(2))
    second.weight = first.weight
    oracle = paper.Algorithm1(
        {"a": [first, second]}, torch.optim.SGD(first.parameters(), lr=0.1), {"a": [first, second]}, rho=0.0
    )
    assert oracle.heads["a"] == [first]
    oracle.step("a", lambda: first(matrix([1, 0])).sum() + second(matrix([0, 2])).sum())
    assert oracle.covariance_of("a", first).tolist() == [[1, 0], [0, 4]]


# -- the other projectors ---------------------------------------------------------------------------------------------


def test_ridge_projector_by_hand():
    # mean λ = 2 and α = 2: 1/(1 + 3), 1/(1 + 1).
    near(paper.ridge_projector(matrix([3, 0], [0, 1]), 2.0), matrix([0.25, 0], [0, 0.5]))
    assert torch.equal(paper.ridge_projector(torch.zeros(2, 2), 2.0), torch.eye(2, dtype=F64))


def test_null_space_projector_by_hand():
    diagonal = torch.diag(torch.tensor([4.0, 1.0, 2.0], dtype=F64))
    near(paper.null_space_projector(diagonal, 2.0), torch.diag(torch.tensor([0, 1, 1], dtype=F64)) / math.sqrt(2))
    # Nothing is within a factor of λ_min = 0 but 0 itself; 1e-17 is rounding.
    near(
        paper.null_space_projector(torch.diag(matrix(4, 1e-17, 1e-3, 0)), 10.0),
        torch.diag(matrix(0, 1, 0, 1)) / math.sqrt(2),
    )
    assert torch.equal(paper.null_space_projector(torch.zeros(2, 2), 10.0), torch.eye(2, dtype=F64))
    q = torch.linalg.qr(matrix([1, 2], [3, 5]))[0]
    near(paper.null_space_projector(q @ matrix([3, 0], [0, 0]) @ q.T, 10.0), torch.outer(q[:, 1], q[:, 1]))


def test_controls_by_hand():
    # T = diag(1/2, 1); its λ_max comes first: in the basis of the columns (0, 1), (1, 0) it is diag(1, 1/2).
    covariance, swapped = matrix([2, 0], [0, 1]), matrix([0, 3], [5, 0])
    near(paper.projector_of(covariance, "flat", math.log(2), "random", swapped), matrix([1, 0], [0, 0.5]))
    near(paper.projector_of(covariance, "flat", math.log(2), "scalar"), 0.75 * torch.eye(2, dtype=F64))
    near(paper.projector_of(covariance, "ridge", 1.5, "random", swapped), matrix([0.5, 0], [0, 1 / 3]))
    near(paper.projector_of(7 * torch.eye(2), "flat", 1.0, "random", swapped), torch.eye(2, dtype=F64))
    both = torch.stack([covariance, 7 * torch.eye(2)])
    near(paper.projector_of(both, "flat", math.log(2))[0], matrix([0.5, 0], [0, 1]))
    near(paper.projector_of(both, "flat", math.log(2))[1], torch.eye(2, dtype=F64))


@pytest.mark.parametrize("kind", ["flat", "ridge", "null_space"])
def test_random_control_has_the_same_eigenvalues(kind):
    rows = torch.randn(9, 5, dtype=F64)
    projector = paper.projector_of(rows.T @ rows, kind, 3.0)
    other = paper.projector_of(rows.T @ rows, kind, 3.0, "random", torch.randn(5, 5, dtype=F64))
    near(torch.linalg.eigvalsh(other), torch.linalg.eigvalsh(projector), 1e-13)
    assert (other - projector).abs().max() > 0.01


def test_every_projector_in_a_run():
    # Ȳ⁽ᵃ⁾ = diag(1, 0): ridge with α = 3/2: 1/(1 + 1.5 · 1/(1/2)) = 1/4; null space: diag(0, 1).
    for options, expected in (
        ({"projector": "ridge", "alpha": 1.5}, matrix([0.25, 0], [0, 1])),
        ({"projector": "ridge"}, matrix([1 / 61, 0], [0, 1])),
        ({"projector": "null_space"}, matrix([0, 0], [0, 1])),
        ({"control": "scalar"}, matrix([0.75, 0], [0, 0.75])),
        ({"control": "random", "noise": lambda *_: matrix([0, 1], [1, 0])}, matrix([1, 0], [0, 0.5])),
        ({"projector": "identity"}, None),
    ):
        model = Pair()
        oracle = oracle_of(model, **options)
        with oracle.turn("a"):
            oracle.step("a", lambda model=model: model.loss("a", matrix([1, 0])))
        found = oracle.projector_for("v", model.v)
        assert found is expected or torch.allclose(found, expected, rtol=0, atol=1e-15)


# -- several sources, other pairs -------------------------------------------------------------------------------------


def test_earlier_sources():
    names = ("a", "v", "t")
    assert [paper.source_names(n, names, "earlier") for n in names] == [[], ["a"], ["a", "v"]]


def test_one_projector_of_the_sum_of_covariances():
    # Ȳ⁽ᵃ⁾ = diag(1, 0), Ȳ⁽ᵛ⁾ = diag(2, 3): the sum is 3 I, whose T is I; the product would be diag(1/2, 1/2).
    layers = {n: nn.Linear(2, 1, bias=False, dtype=F64) for n in "avt"}
    for combine, expected in (("sum", matrix([1, 0], [0, 1])), ("product", matrix([0.5, 0], [0, 0.5]))):
        oracle = paper.Algorithm1(
            {n: [layer] for n, layer in layers.items()},
            torch.optim.SGD([layer.weight for layer in layers.values()], lr=0.1),
            {n: [layer] for n, layer in layers.items()},
            tau=math.log(2),
            sources="earlier",
            combine=combine,
        )
        oracle.collect("a", [lambda: layers["a"](matrix([1, 0]))])
        near(oracle.projector_for("t", layers["t"]), matrix([0.5, 0], [0, 1]))
        oracle.collect("v", [lambda: layers["v"](matrix([2**0.5, 0])), lambda: layers["v"](matrix([0, 3**0.5]))])
        near(oracle.projector_for("t", layers["t"]), expected)
        assert oracle.projector_for("a", layers["a"]) is None


def test_pairing_by_each_rule():
    mine = [nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)]
    theirs = [nn.Linear(3, 3), nn.Linear(4, 3), nn.Linear(3, 2)]
    names = dict(zip(mine, "0123", strict=True)) | dict(zip(theirs, "203", strict=True))

    def pairs(rule):
        found = [paper.paired(layer, mine, theirs, rule, names) for layer in mine]
        return [[theirs.index(other) for other in others] for others in found]

    assert pairs("position") == [[], [0], [], [2]]
    assert pairs("name") == [[1], [], [0], [2]]
    assert pairs("shape") == [[1], [0], [0], [2]]
    assert pairs({mine[3]: theirs[0], mine[1]: None}) == [[], [], [], [0]]
    assert paper.paired(theirs[2], theirs, [mine[1], mine[2], theirs[2]], "shape") == [theirs[2]]
    assert paper.paired(mine[2], mine, [mine[1], mine[2]], "shape") == mine[1:3]
    assert paper.paired(mine[1], mine, [mine[1], mine[2]], "position") == [mine[1]]


def test_several_layers_of_one_source_act_in_their_order():
    mine, first, second = (nn.Linear(2, 2, bias=False, dtype=F64) for _ in range(3))
    heads = {"a": [first, second], "v": [mine]}
    base = torch.optim.SGD([layer.weight for layer in (mine, first, second)], lr=0.1)
    oracle = paper.Algorithm1(heads, base, heads, pairing="shape")
    oracle.projectors["a"] = {first: matrix([1, 2], [0, 1]), second: matrix([1, 0], [3, 1])}
    near(oracle.projector_for("v", mine), matrix([7, 2], [3, 1]))
    oracle.pairing = {"v": {mine: second}}
    near(oracle.projector_for("v", mine), matrix([1, 0], [3, 1]))
    oracle.pairing = {mine: None}
    assert oracle.projector_for("v", mine) is None


# -- other perturbations, cheaper SAM ---------------------------------------------------------------------------------


def test_perturbations_of_the_maximum_norm_and_adaptive_ones_by_hand():
    gradients, theta = [matrix([3, -4]), None, matrix([0])], [matrix([0.99, -1.99]), matrix([1]), matrix([5])]
    first, missing, second = paper.perturbation(gradients, 0.5, math.inf)
    assert (first.tolist(), missing, second.tolist()) == ([[0.5, -0.5]], None, [[0]])
    near(paper.perturbation(gradients, 0.5, math.inf, theta)[0], matrix([0.5, -1]))
    # T = (1, 2): T g = (3, −8), T² g = (3, −16), ‖T g‖ = √73.
    near(paper.perturbation(gradients, 0.5, 2.0, theta)[0], 0.5 * matrix([3, -16]) / math.sqrt(73))
    near(paper.perturbation(gradients, [1.0, 1.0, 9.0], 2.0, theta)[0], matrix([3, -16]) / math.sqrt(73))


@pytest.mark.parametrize(
    ("options", "epsilon"),
    [({"p": math.inf}, 0.5), ({"adaptive": True}, 0.5 * 2.01), ({"p": math.inf, "adaptive": True}, 0.5 * 2.01)],
    ids=str,
)
def test_steps_with_other_perturbations_by_hand(options, epsilon):
    # L = θ²/2 at θ = 2, where ε alone decides: θ ← 2 − 0.1 (2 + ε). Of one number T² g/‖T g‖ = T.
    theta = nn.Parameter(torch.tensor([2.0], dtype=F64))
    oracle = paper.Algorithm1({"only": [theta]}, torch.optim.SGD([theta], lr=0.1), rho=0.5, **options)
    oracle.step("only", half_square(theta))
    near(theta.detach(), torch.tensor([2 - 0.1 * (2 + epsilon)], dtype=F64), 1e-14)


def test_every_third_step_of_each_modality_perturbs():
    parts = {n: nn.Parameter(torch.ones(1, dtype=F64)) for n in "av"}
    oracle = paper.Algorithm1(
        {n: [p] for n, p in parts.items()}, torch.optim.SGD(parts.values(), lr=0.1), rho=0.05, sam_every=3
    )
    for name in "aavavaaav":
        oracle.step(name, half_square(parts[name]))
    assert [i for i, (_, second) in enumerate(oracle.losses) if second is not None] == [0, 2, 5]
    oracle.step("v", lambda: 0 * parts["v"].sum())  # a step that is skipped does not count
    oracle.step("v", half_square(parts["v"]))
    assert [oracle.taken[n] for n in "av"] == [6, 4]
    assert oracle.losses[-1][1] is not None
    assert oracle.unperturbed == 0
    oracle.step("a", half_square(parts["a"]), "gradients")
    assert oracle.unperturbed == 1


def test_head_alone_is_perturbed_by_hand():
    # out = h e with e = 2, h = 3: ∇ = (18, 12). ε = 0.5 for h, the feature stays 2: out = 7, ∇h = 14, L = 24.5.
    encoder, head = (nn.Linear(1, 1, bias=False, dtype=F64) for _ in range(2))
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(encoder.weight.item()))
    with torch.no_grad():
        encoder.weight.fill_(2.0)
        head.weight.fill_(3.0)
    base = torch.optim.SGD([encoder.weight, head.weight], lr=0.1)
    oracle = paper.Algorithm1({"a": [encoder]}, base, {"a": [head]}, rho=0.5, tau=0.0, sam_scope="head")
    oracle.step("a", lambda: head(encoder(matrix([1]))).square().sum() / 2)
    near(torch.cat([encoder.weight, head.weight]).detach(), matrix([0.2], [1.6]), 1e-15)
    assert oracle.losses == [(18.0, 24.5)]
    assert "forward" not in vars(encoder)
    encoder(matrix([1]))
    assert calls[-1] == encoder.weight.item()


def test_head_scope_plays_back_every_call_and_every_micro_batch():
    encoder, head = (nn.Linear(1, 1, bias=False, dtype=F64) for _ in range(2))
    base = torch.optim.SGD([encoder.weight, head.weight], lr=0.1)
    oracle = paper.Algorithm1({"a": [encoder]}, base, {"a": [head]}, rho=0.5, tau=0.0, sam_scope="head")
    with torch.no_grad():
        encoder.weight.fill_(1.0)
        head.weight.fill_(1.0)
    # Features 1 + 2, then 4: L = h (3 + 4), ∇h = 7 in either pass, ∇e = 7. The loss at h = 1.5 is 10.5.
    losses = [lambda: head(encoder(matrix([1])) + encoder(matrix([2]))).sum(), lambda: head(encoder(matrix([4]))).sum()]
    oracle.step("a", losses)
    assert oracle.losses == [(7.0, 10.5)]
    near(torch.cat([encoder.weight, head.weight]).detach(), matrix([0.3], [0.3]), 1e-15)
