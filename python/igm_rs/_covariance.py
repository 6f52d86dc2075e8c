"""What is remembered of a layer's features: Ȳ of Eq. (2), as rows while there are fewer than d of them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import _igm_rs

__all__ = ["Covariance", "Turns"]

_FEWEST = 16
"""Rows that a buffer is made for at first; it becomes four times as long, but no longer than is needed to the last."""

_MOST = 1024
"""Rows gathered before one product adds them to Ȳ, once Ȳ is kept as a matrix."""


class Covariance:
    """Sum of outer products of d-dimensional rows, uncentred, with what centring needs beside it.

    Of a layer of G groups a row holds the d numbers of each group side by side, and Ȳ is (G, d, d).

    Rows are buffered, so that one product serves many batches (Eq. 2). Until d of them have come only the rows are
    held. On the CPU everything is float64; on CUDA at least float32, and rows left out are zeros there, so that
    nobody waits for the device.

    No tensor that an attribute has held is changed later, but for rows appended behind the used ones: the attributes,
    kept aside, are a way back.
    """

    def __init__(self, d: int, *, groups: int = 1, only_rows: bool = False) -> None:
        self.d = d
        self.groups = groups
        self.only_rows = only_rows
        self.matrix: torch.Tensor | None = None
        self.buffer: torch.Tensor | None = None
        self.capacity = 0
        self.used = 0
        self.total: torch.Tensor | None = None
        """Sum of all rows but those in the buffer from `summed` on: nobody needs it at every batch."""
        self.summed = 0
        self.count: torch.Tensor | float = 0.0
        self.left_out: torch.Tensor | int = 0

    def __bool__(self) -> bool:
        return self.used > 0 or self.matrix is not None

    @property
    def rows(self) -> torch.Tensor | None:
        """The buffered rows, (used, G·d), a view; None where there are none."""
        return None if self.buffer is None or not self.used else self.buffer[: self.used]

    def sum(self) -> torch.Tensor | None:
        """The sum of all rows, (G·d,), which centring needs beside Ȳ; None where there have been none."""
        if self.buffer is None or self.summed == self.used:
            return self.total
        if self.total is None:
            total = torch.zeros(self.groups * self.d, dtype=self.buffer.dtype, device=self.buffer.device)
        else:
            total = self.total.clone()
        _igm_rs.add_rows_(total, self.buffer[self.summed : self.used])
        return total

    def add(self, rows: torch.Tensor, usable: torch.Tensor | None = None) -> None:
        """Append `rows` (n, G·d); rows with a NaN or an infinity are left out and counted.

        `usable`: a bool on the device; where it is False the rows are zeros and do not count.
        """
        n = rows.shape[0]
        if not n:
            return
        kept = self.matrix if self.buffer is None else self.buffer
        if kept is not None and rows.dtype != kept.dtype:  # loaded from a run on another device
            rows = rows.to(kept.dtype)
        held_as_rows = self.only_rows or (self.matrix is None and self.used + n < self.d)
        buffer = self.buffer
        if buffer is None or self.used + n > self.capacity:
            buffer = self._longer(n, rows, held_as_rows)
        before = self.used
        self.used, left_out = _igm_rs.append_rows_(buffer, before, rows)
        added: torch.Tensor | int = self.used - before
        if isinstance(left_out, int):
            self.left_out += left_out
        else:  # a number on the device, for which nobody waits
            self.left_out = self.left_out + left_out
            added = added - left_out
        self.count = self.count + (added if usable is None else usable * added)
        if not held_as_rows and self.used >= _MOST:
            self.flush()

    def flush(self) -> None:
        """Add the buffered rows to Ȳ with one product (Eq. 2)."""
        rows = self.rows
        if rows is None:
            return
        if self.matrix is None:
            shape = (self.d, self.d) if self.groups == 1 else (self.groups, self.d, self.d)
            matrix = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        else:
            matrix = self.matrix.clone()
        _igm_rs.accumulate_(matrix, rows)
        self.total = self.sum()
        self.matrix, self.buffer, self.capacity, self.used, self.summed = matrix, None, 0, 0, 0

    def merge(self, other: Covariance) -> None:
        """Add everything that `other` holds."""
        left_out, count = self.left_out, self.count
        total, more = self.sum(), other.sum()
        if other.matrix is not None:
            self.flush()
            self.matrix = other.matrix if self.matrix is None else self.matrix + other.matrix
        if other.rows is not None:
            self.add(other.rows)
        self.total = total if more is None else more if total is None else total + more
        self.summed = self.used
        self.count = count + other.count
        self.left_out = left_out + other.left_out

    def decay(self, factor: float) -> None:
        """Ȳ ← factor · Ȳ, that is each row times √factor."""
        total = self.sum()
        if self.matrix is not None:
            self.matrix = self.matrix.clone()
            _igm_rs.decay_([self.matrix], factor)
        if self.rows is not None:
            self.buffer, self.capacity = self.rows.clone(), self.used
            _igm_rs.decay_([self.buffer], factor**0.5)
        if total is not None:
            self.total = total.clone()
            _igm_rs.decay_([self.total], factor)
        self.summed = self.used
        self.count = self.count * factor

    def value(self, *, centred: bool = False) -> torch.Tensor | None:
        """Ȳ as a new matrix, (d, d) or (G, d, d), Σ z zᵀ, or Σ (z − μ)(z − μ)ᵀ when `centred`; None without rows."""
        if not self:
            return None
        result = Covariance(self.d, groups=self.groups)
        result.matrix, result.buffer, result.used, result.summed = self.matrix, self.buffer, self.used, self.used
        result.flush()
        if result.matrix is not None and result.matrix is self.matrix:
            result.matrix = self.matrix.clone()
        total = self.sum() if centred else None
        if result.matrix is not None and total is not None and float(self.count) > 0:
            trace = result.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
            _igm_rs.centre_(result.matrix, total, float(self.count))
            left = result.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
            same = left <= self.d * torch.finfo(result.matrix.dtype).eps * trace  # rows that are all the same
            result.matrix.masked_fill_(same[..., None, None], 0.0)
        return result.matrix

    def around_its_mean(self) -> Covariance:
        """Return Σ (z − μ)(z − μ)ᵀ as a Ȳ that has no mean: to be added to others, each around its own."""
        result = Covariance(self.d, groups=self.groups)
        result.matrix = self.value(centred=True)
        return result

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a state dict."""
        return {
            "rows": None if self.rows is None else self.rows.clone(),
            "matrix": None if self.matrix is None else self.matrix.clone(),
            "total": None if self.total is None else self.total.clone(),
            "summed": self.summed,
            "count": float(self.count),
            "left_out": int(self.left_out),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what :meth:`state` gave, on `device`, in the precision it was saved with; float64 on the CPU."""

        def copied(value: torch.Tensor | None) -> torch.Tensor | None:
            if value is None:
                return None
            return value.detach().to(device, torch.float64 if device.type == "cpu" else value.dtype, copy=True)

        self.matrix, self.total = copied(state["matrix"]), copied(state["total"])
        self.buffer = copied(state["rows"])
        self.used = self.capacity = 0 if self.buffer is None else self.buffer.shape[0]
        self.summed = state.get("summed", self.used)  # of version 2 and older: all
        self.count, self.left_out = state["count"], state["left_out"]

    def _longer(self, n: int, like: torch.Tensor, held_as_rows: bool) -> torch.Tensor:
        """Return a buffer with room for `n` more rows; where not only rows are held, it may first be emptied into Ȳ."""
        if held_as_rows:
            most = None if self.only_rows else self.d
        else:
            most = max(_MOST, n)
            if self.used + n > most:
                self.flush()
        needed = self.used + n
        capacity = max(needed, _FEWEST, 4 * self.capacity)
        if most is not None:
            capacity = max(needed, min(capacity, most))
        buffer = torch.empty(capacity, self.groups * self.d, dtype=like.dtype, device=like.device)
        rows = self.rows
        if rows is not None:
            buffer[: self.used].copy_(rows)
        self.buffer, self.capacity = buffer, capacity
        return buffer


class Turns:
    """Ȳ of one layer for one modality: what earlier turns left, and what the present turn has brought."""

    def __init__(self, d: int, *, groups: int = 1, only_rows: bool = False) -> None:
        self.d = d
        self.groups = groups
        self.only_rows = only_rows
        self.past = self.empty()
        self.present = self.empty()

    def empty(self) -> Covariance:
        """Return a Ȳ of nothing."""
        return Covariance(self.d, groups=self.groups, only_rows=self.only_rows)

    def begin(self, life: float) -> None:
        """Start a turn: Ȳ of the turns before lives on times `life` (0 fresh, 1 kept, between: decayed)."""
        if life == 0:
            self.past = self.empty()
        else:
            past = copy.copy(self.past)
            past.merge(self.present)
            if life < 1:
                past.decay(life)
            self.past = past
        self.present = self.empty()

    def restart(self) -> None:
        """Forget what the present turn has brought."""
        self.present = self.empty()

    def clear(self) -> None:
        """Forget everything: what there was is in the projector (the orthogonal recursion)."""
        self.past = self.empty()
        self.restart()

    def all(self) -> Covariance:
        """Past and present as one; the present itself where there is no past."""
        if not self.past:
            return self.present
        result = self.empty()
        result.merge(self.past)
        result.merge(self.present)
        return result
