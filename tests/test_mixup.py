"""The scripts' mixup: by hand, its distribution, and what cannot be mixed."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from igm_rs.released import mixup, mixup_loss

F64 = torch.float64


def test_mixup_is_the_sum_with_a_partner():
    x, y = torch.randn(7, 2, 3, dtype=F64), torch.arange(7)
    mixed, y_a, y_b, lam = mixup(x, y, 1.0)
    assert 0 < lam < 1
    assert torch.equal(y_a, y)
    assert sorted(y_b.tolist()) == list(range(7))
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[y_b])


def test_mixup_draws_from_the_generator_it_is_given():
    x, y = torch.randn(7, 2), torch.arange(7)
    before = torch.get_rng_state()
    one, other = (mixup(x, y, 0.4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one[3] == other[3]
    assert torch.equal(one[2], other[2])
    torch.manual_seed(3)
    plain = mixup(x, y, 0.4)
    assert plain[3] == one[3]
    assert plain[3] != mixup(x, y, 0.4)[3]


@pytest.mark.parametrize("alpha", [1.0, 0.2, 4.0])
def test_lambda_has_the_distribution_beta(alpha):
    """Mean 1/2 and variance 1/(4 (2 α + 1)) of 4000 draws, within four standard errors (of the variance roughly)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.zeros(1, 1), torch.zeros(1)
    drawn = torch.tensor([mixup(x, y, alpha, generator)[3] for _ in range(4000)], dtype=F64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert drawn.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 4000))


def test_alpha_zero_is_no_mixup():
    x, y = torch.randn(5, 3), torch.arange(5)
    mixed, _, _, lam = mixup(x, y, 0)
    assert lam == 1
    assert torch.equal(mixed, x)


def test_mixup_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=F64)  # softmax (3/4, 1/4)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert mixup_loss(logits, zero, one, 0.75).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert mixup_loss(logits, zero, one, 1.0).item() == cross_entropy(logits, zero).item()


REFUSED_MIXTURES = [
    (
        lambda: mixup(torch.arange(3), torch.arange(3)),
        TypeError,
        "x is torch.int64, expected a tensor of floating point",
    ),
    (lambda: mixup([1.0], torch.arange(1)), TypeError, "x is a list, expected a tensor of floating point"),
    (lambda: mixup(torch.ones(3), [0, 1, 2]), TypeError, "y is a list, expected a tensor of labels"),
    (lambda: mixup(torch.ones(()), torch.arange(1)), ValueError, "x has the shape (), expected (n_B, …) with n_B >= 1"),
    (lambda: mixup(torch.ones(0, 2), torch.arange(0)), ValueError, "x has the shape (0, 2), expected (n_B, …)"),
    (
        lambda: mixup(torch.ones(3), torch.arange(2)),
        ValueError,
        "y has the shape (2,), expected a label for each of the 3",
    ),
    (lambda: mixup(torch.ones(3), torch.arange(3), -1.0), ValueError, "alpha is -1.0, expected a finite number >= 0"),
    (
        lambda: mixup_loss(torch.ones(1, 2), torch.zeros(1), torch.zeros(1), 1.1),
        ValueError,
        "lam is 1.1, expected a share",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED_MIXTURES, ids=[row[2] for row in REFUSED_MIXTURES])
def test_what_cannot_be_mixed(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
