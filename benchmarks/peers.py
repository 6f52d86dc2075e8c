"""The peers: what the released scripts do, the common SAM package, the same step with torch's multi-tensor calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_optimizer import SAM

from .setting import RHO, SGD

Closure = Callable[[], torch.Tensor]


def released_projector(covariance: torch.Tensor, tau: float) -> torch.Tensor:
    """T as the released scripts make it: a full SVD and two products."""
    _, lambdas, v = torch.svd(covariance, some=False)
    sigma = torch.exp(-tau * (lambdas - lambdas.min()) / (lambdas.max() - lambdas.min()))
    return v @ torch.diag(sigma) @ v.t()


def released_covariance(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ȳ as the released scripts gather it: an outer product of the batch's mean, added to a matrix at each batch."""
    total = torch.zeros(batches[0].shape[-1], batches[0].shape[-1], device=batches[0].device)
    for features in batches:
        mean = features.mean(0, keepdim=True)
        total += torch.mm(mean.t(), mean)
    return total


class PackageSAM:
    """`pytorch_optimizer.SAM` as its page says to use it: the first pass by hand, the second one by its step."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        self.optimizer: Any = SAM(params, base, rho=RHO, adaptive=False, **(options or SGD))

    def step(self, closure: Closure) -> None:
        """Two passes and the base's step."""
        closure()
        self.optimizer.step(closure)


class ForeachSAM:
    """The same SAM step in Python with torch's multi-tensor calls, around torch's own SGD(foreach=True)."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.params = list(params)
        self.base = torch.optim.SGD(self.params, foreach=True, **SGD)

    def step(self, closure: Closure) -> torch.Tensor:
        """Two passes and the base's step, as `IGMOptimizer.step` takes it."""
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            having = [p for p in self.params if p.grad is not None]
            gradients = [p.grad for p in having if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            if not (torch.isfinite(norm) and norm > 0):
                return loss
            before = [torch.empty_like(p) for p in having]
            torch._foreach_copy_(before, having)
            torch._foreach_add_(having, list(torch._foreach_mul(gradients, RHO / norm)))
            try:
                with torch.enable_grad():
                    closure()
            finally:
                torch._foreach_copy_(having, before)
        self.base.step()
        return loss


class Copy:
    """A copy that reads and writes `moved` bytes in all: the time that so many bytes need."""

    def __init__(self, moved: float, device: torch.device) -> None:
        self.source = torch.ones(int(moved / 8), device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        """Copy once."""
        self.target.copy_(self.source)
