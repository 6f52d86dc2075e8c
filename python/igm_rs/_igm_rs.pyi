# Signatures of the compiled module, the arithmetic on tensors (src/*.rs); help() shows the whole docstrings.
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "DEBUG",
    "TORCH_VERSION",
    "__version__",
    "accumulate_",
    "adam_step_",
    "adam_step_possible",
    "add_rows_",
    "append_rows_",
    "at_perturbed",
    "at_shifted",
    "batch_rows",
    "centre_",
    "conv_rows",
    "decay_",
    "dense_projector",
    "gradient_norm",
    "make_projector",
    "make_projector_from_rows",
    "orthogonal_projector_",
    "perturb_",
    "previous_modality",
    "project_",
    "project_update_",
    "restore_",
    "select_",
    "sgd_step_",
    "sgd_step_possible",
    "singular_values",
    "source_lists",
    "turn_at",
]

_Factor: TypeAlias = tuple[Any, ...]

__version__: Final[str]
TORCH_VERSION: Final[str]
DEBUG: Final[bool]

# Eq. (2): src/covariance.rs
def batch_rows(features: torch.Tensor, reduce: str, augment: bool = False) -> torch.Tensor:
    """Make the rows by which a batch enters the covariance: its mean over the batch, or every sample."""

def conv_rows(
    features: torch.Tensor,
    reduce: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    mode: str,
    groups: int = 1,
    augment: bool = False,
) -> torch.Tensor:
    """Make the rows by which a convolution's batch enters the covariance: the patches that its kernel sees."""

def append_rows_(buffer: torch.Tensor, used: int, rows: torch.Tensor) -> tuple[int, int | torch.Tensor]:
    """Copy the finite rows into a buffer, behind those that it holds; `buffer` is changed."""

def accumulate_(covariance: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the outer products of rows to a covariance, which is changed: covariance += rows.T @ rows."""

def add_rows_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the sum of rows to a total, which is changed: what centring needs beside the covariance."""

def centre_(covariance: torch.Tensor, total: torch.Tensor, count: float) -> None:
    """Turn an uncentred covariance into a centred one, in place: covariance -= outer(total, total) / count."""

def decay_(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply tensors by a factor, in place, so that old turns count for less."""

# Eqs. (3)-(5), (9): src/projector.rs
def make_projector(
    covariance: torch.Tensor,
    kind: str,
    strength: float,
    *,
    route: str = "auto",
    dtype: str | None = None,
    scalar: bool = False,
    noise: torch.Tensor | None = None,
) -> tuple[_Factor, torch.Tensor, dict[str, Any]]:
    """Make a projector T = V sigma(L) V^T of a covariance V L V^T."""

def make_projector_from_rows(
    rows: torch.Tensor,
    kind: str,
    strength: float,
    *,
    route: str = "auto",
    dtype: str | None = None,
    scalar: bool = False,
    noise: torch.Tensor | None = None,
) -> tuple[_Factor, torch.Tensor, dict[str, Any]]:
    """Make a projector of rows.T @ rows from fewer rows than columns, without that matrix: T = scale (I - R^T M R)."""

def dense_projector(factor: _Factor) -> torch.Tensor:
    """Write a factor out: T itself."""

def orthogonal_projector_(
    projector: torch.Tensor,
    rows: torch.Tensor,
    alphas: Sequence[float],
    normalise: bool = False,
) -> None:
    """Update an orthogonal projector P by one row after the other; `projector` is changed."""

def project_(
    gradients: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    factors: Sequence[Sequence[_Factor]],
) -> torch.Tensor:
    """Project gradients, in place: [gradients[i] biases[i]] <- [gradients[i] biases[i]] @ T1 @ T2 ..."""

def project_update_(
    weights: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    biases_before: Sequence[torch.Tensor | None],
    factors: Sequence[Sequence[_Factor]],
) -> torch.Tensor:
    """Project updates, in place: weights[i] <- before[i] + (weights[i] - before[i]) @ T1 @ T2 ..."""

def singular_values(matrix: torch.Tensor, rows: bool = False) -> npt.NDArray[np.float64]:
    """Compute the singular values of a covariance on the host, for diagnosis; waits for the device."""

# Eqs. (6)-(8): src/sam.rs, src/sgd.rs, src/adam.rs
def gradient_norm(
    gradients: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the L2 norm over all gradients together, or that of adaptive SAM."""

def perturb_(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    norm: torch.Tensor,
    rhos: Sequence[float],
    measure: bool = True,
    *,
    p: float = 2.0,
    adaptive: bool = False,
) -> torch.Tensor | None:
    """Climb to the perturbed weights: before[i] <- params[i], params[i] += (rhos[i] / norm) * gradients[i]."""

def restore_(params: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
    """Take the weights back, bit for bit and in place: params[i] <- before[i]."""

def at_perturbed(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    norm: torch.Tensor,
    rhos: Sequence[float],
    body: Callable[[torch.Tensor | None], object],
    measure: bool = True,
    *,
    p: float = 2.0,
    adaptive: bool = False,
) -> torch.Tensor | None:
    """Call a function at the perturbed weights and take the weights back, whatever comes of it."""

def sgd_step_(
    params: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor | None],
    first: Sequence[bool],
    spans: Sequence[tuple[int, float, float, float, float, bool, bool]],
    done: list[bool] | None = None,
) -> None:
    """Take the step of torch.optim.SGD from the unperturbed weights: way back and step in one pass over memory."""

def sgd_step_possible(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor | None],
) -> bool:
    """Tell whether `sgd_step_` takes these tensors: float32 or float64 on the CPU, dense, all strided alike."""

def adam_step_(
    params: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor | None],
    steps: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, float, float, float, float, float, bool, bool, bool]],
    done: list[bool] | None = None,
) -> None:
    """Take the step of torch.optim.Adam or AdamW from the unperturbed weights, way back included."""

def adam_step_possible(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor | None],
    exp_avg_sqs: Sequence[torch.Tensor | None],
    max_exp_avg_sqs: Sequence[torch.Tensor | None],
    steps: Sequence[torch.Tensor | None],
) -> bool:
    """Tell whether `adam_step_` takes these tensors: float32 or float64 on the CPU, dense, all strided alike."""

def select_(tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], usable: torch.Tensor) -> None:
    """Take back what is not usable: tensors[i] <- tensors[i] if usable else kept[i]."""

# method.md, section 4, the released scripts: src/shift.rs
def at_shifted(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    shifted: Sequence[torch.Tensor],
    norm: torch.Tensor | None,
    rhos: Sequence[float],
    body: Callable[[torch.Tensor | None], None],
    measure: bool = True,
) -> torch.Tensor | None:
    """Call a function while the parameters have perturbed weights in other memory, and give them their own again."""

# Algorithm 1, lines 1-2, 8-9: src/schedule.rs
def previous_modality(active: int, modalities: int) -> int:
    """Find the modality trained just before: line 9 of Algorithm 1, counted from zero."""

def turn_at(index: int, modalities: int) -> tuple[int, int]:
    """Find round and modality of a turn: lines 1 and 2 of Algorithm 1, counted from zero."""

def source_lists(names: Sequence[str], sources: str | Mapping[str, str | Sequence[str] | None]) -> list[list[int]]:
    """List for each modality those whose projectors its gradients meet, in the order in which they act."""
