"""Times igm_rs against its peers, interleaved in one run: medians, ratios, bytes moved; writes JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from pytorch_optimizer import SAM
from tqdm import tqdm

import igm_rs
from igm_rs import _igm_rs

RHO = 0.05
BLOCK = 0.25
"""Seconds that one side runs before the other has its turn; at least one run."""
SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass
class Row:
    """One comparison: what both sides do, the ratio that is asked for, and what it moves."""

    name: str
    ours: str
    peer: str
    target: str
    smaller_is_better: bool
    limit: float | None
    note: str
    ours_ms: float = 0.0
    ours_spread_ms: float = 0.0
    peer_ms: float = 0.0
    peer_spread_ms: float = 0.0
    ratio: float = 0.0
    reached: bool = False
    ours_runs: int = 0
    peer_runs: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def resnet18_shapes() -> Iterator[tuple[int, ...]]:
    """Shapes of a ResNet18 without its classifier, and a 512 → 256 layer: 62 tensors, 11.3 M parameters."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            yield from ((out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,))
            if stage and not block:
                yield from ((out, width, 1, 1), (out,), (out,))
            width = out
    yield from ((256, 512), (256,))


def released_projector(covariance: torch.Tensor, tau: float) -> torch.Tensor:
    """T as the released scripts make it: a full SVD and two products."""
    _, lambdas, v = torch.svd(covariance, some=False)
    sigma = torch.exp(-tau * (lambdas - lambdas.min()) / (lambdas.max() - lambdas.min()))
    return v @ torch.diag(sigma) @ v.t()


def projector_pair(d: int, rows: int) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """T from the rows of a turn, by igm_rs and as released; and the greatest difference of ours from float64."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.05, 2, d, dtype=torch.float64)
    seen = (torch.randn(rows, d, generator=generator, dtype=torch.float64) * scale + 0.5).relu()
    exact = seen.T @ seen
    single = exact.float()
    if rows < d:

        def ours() -> Any:
            return _igm_rs.flat_projector_from_rows(seen, 0.4, dtype="float32")
    else:

        def ours() -> Any:
            return _igm_rs.flat_projector(exact, 0.4, dtype="float32")

    lambdas, v = torch.linalg.eigh(exact)
    reference = v @ torch.diag(torch.exp(-0.4 * (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0]))) @ v.T
    error = (ours()[0].double() - reference).abs().max().item()
    return ours, lambda: released_projector(single, 0.4), error


def parameters(shapes: list[tuple[int, ...]]) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    """Random parameters of these shapes, and a gradient for each."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return params, [torch.randn(shape, generator=generator) for shape in shapes]


def closure_for(params: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A forward and backward pass that costs nothing: the gradients are put where autograd would have put them."""
    loss = torch.ones(())

    def closure() -> torch.Tensor:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        return loss

    return closure


class ForeachSAM:
    """The same SAM step in Python with torch's multi-tensor calls, around torch's own SGD(foreach=True)."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.base = torch.optim.SGD(params, foreach=True, **SGD)

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Two passes and the base's step, as `IGMOptimizer.step` takes it."""
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            having = [p for p in self.params if p.grad is not None]
            gradients = [p.grad for p in having]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            if not (torch.isfinite(norm) and norm > 0):
                return loss
            before = [torch.empty_like(p) for p in having]
            torch._foreach_copy_(before, having)
            torch._foreach_add_(having, torch._foreach_mul(gradients, RHO / norm))
            try:
                with torch.enable_grad():
                    closure()
            finally:
                torch._foreach_copy_(having, before)
        self.base.step()
        return loss


def step_pair(shapes: list[tuple[int, ...]], peer: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A SAM + SGD step of igm_rs and of its peer on the same shapes, each on its own tensors."""
    params, gradients = parameters(shapes)
    ours = igm_rs.IGMOptimizer(torch.optim.SGD(params, **SGD), rho=RHO)
    mine = closure_for(params, gradients)
    others, other_gradients = parameters(shapes)
    if peer == "package":
        theirs: Any = SAM(others, torch.optim.SGD, rho=RHO, adaptive=False, **SGD)
    else:
        theirs = ForeachSAM(others)
    their_closure = closure_for(others, other_gradients)
    return lambda: ours.step(mine), lambda: theirs.step(their_closure)


def plain_pair(shapes: list[tuple[int, ...]], *, atomic: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """An AdamW step around and without igm_rs on the same shapes, each on its own tensors."""
    params, gradients = parameters(shapes)
    ours = igm_rs.IGMOptimizer(torch.optim.AdamW(params, lr=1e-3), rho=0.0, atomic=atomic)
    mine = closure_for(params, gradients)
    others, other_gradients = parameters(shapes)
    theirs = torch.optim.AdamW(others, lr=1e-3)
    their_closure = closure_for(others, other_gradients)
    return lambda: ours.step(mine), lambda: theirs.step(their_closure)


# ---------------------------------------------------------------------------------------------------------------------
# How it is measured


def interleave(ours: Callable[[], Any], peer: Callable[[], Any], seconds: float, fewest: int) -> tuple[list, list]:
    """Run blocks of both in turn, in changing order, for about `seconds`; return each run's time in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (ours, peer):
        function()
    begin = time.perf_counter()
    blocks = 0
    while blocks < fewest or time.perf_counter() - begin < seconds:
        for side in (0, 1) if blocks % 2 else (1, 0):
            block = start = time.perf_counter()
            while start - block < BLOCK:
                (ours, peer)[side]()
                end = time.perf_counter()
                times[side].append((end - start) * 1e3)
                start = end
        blocks += 1
    return times


def rows() -> Iterator[tuple[Row, Callable[[], Any], Callable[[], Any], int]]:
    """Yield each comparison with its two sides and the fewest blocks of each."""
    for d, kind, limit, fewest in (
        (512, "flat_projector of a float64 Ȳ, float32 T", 2.0, 15),
        (2304, "flat_projector_from_rows of float64 rows, float32 T", 25.0, 8),
    ):
        ours, peer, error = projector_pair(d, 558)
        note = f"558 rows, τ = 0.4; error of ours against float64 {error:.1e}"
        yield (
            Row(f"T, d = {d}, 558 rows", kind, "torch.svd(some=False) + products", "≥", False, limit, note),
            ours,
            peer,
            fewest,
        )
    shapes = list(resnet18_shapes())
    count = sum(torch.Size(shape).numel() for shape in shapes)
    yield (
        Row(
            f"SAM + SGD step, {len(shapes)} tensors, {count / 1e6:.1f} M parameters",
            "igm_rs.IGMOptimizer(SGD)",
            "pytorch_optimizer.SAM(SGD)",
            "≤",
            True,
            0.6,
            f"momentum and weight decay; ours moves 40 B a parameter, {40 * count / 1e6:.0f} MB a step",
        ),
        *step_pair(shapes, "package"),
        15,
    )
    yield (
        Row(
            "SAM + SGD step, 124 tensors of 8 elements",
            "igm_rs.IGMOptimizer(SGD)",
            "SGD(foreach=True) + the same SAM with torch._foreach_*",
            "≤",
            True,
            1.0,
            "momentum and weight decay; all overhead: Python, the boundary to Rust, launches",
        ),
        *step_pair([(8,)] * 124, "foreach"),
        15,
    )
    for atomic in (True, False):
        yield (
            Row(
                f"AdamW step, {len(shapes)} tensors, atomic={atomic}",
                f"igm_rs.IGMOptimizer(AdamW, rho=0, atomic={atomic})",
                "torch.optim.AdamW",
                "",
                True,
                None,
                "no SAM and no projection: what looking at the gradient, and the way back from a failing step, cost",
            ),
            *plain_pair(shapes, atomic=atomic),
            15,
        )


def measure(seconds: float) -> list[Row]:
    """Measure every comparison, with a progress bar."""
    done = []
    for row, ours, peer, fewest in (bar := tqdm(list(rows()), unit="row")):
        bar.set_postfix_str(row.name)
        mine, theirs = interleave(ours, peer, seconds, fewest)
        row.ours_ms, row.peer_ms = median(mine), median(theirs)
        row.ours_runs, row.peer_runs = len(mine), len(theirs)
        row.ours_spread_ms, row.peer_spread_ms = (q[2] - q[0] for q in (quantiles(mine), quantiles(theirs)))
        row.ratio = row.ours_ms / row.peer_ms if row.smaller_is_better else row.peer_ms / row.ours_ms
        if row.limit is not None:
            row.reached = row.ratio <= row.limit if row.smaller_is_better else row.ratio >= row.limit
        done.append(row)
    return done


def copy_speed() -> float:
    """Bytes a second that a copy of 256 MB moves (read and written), the median of 9."""
    source = torch.ones(64_000_000)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / median(times)


def processor() -> str:
    """Return the processor's name as the system tells it."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def revision() -> str:
    """Return the commit that was measured, marked when files have changed since."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(done: list[Row]) -> str:
    """Return the comparisons as a Markdown table."""
    lines = [
        "| what | ours | ms (IQR) | peer | ms (IQR) | ratio | asked for | |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.name} | {row.ours} | {row.ours_ms:.3g} ({row.ours_spread_ms:.2g}) | {row.peer} | "
        f"{row.peer_ms:.3g} ({row.peer_spread_ms:.2g}) | {row.ratio:.2f}× | "
        + (
            f"{row.target} {row.limit:g}× | {'reached' if row.reached else 'missed'} |"
            if row.limit
            else "no figure | |"
        )
        for row in done
    ]
    return "\n".join(lines)


def page(facts: dict[str, Any], done: list[Row]) -> str:
    """Return the benchmark page."""
    notes = "\n".join(
        f"- **{row.name}**: {row.note}. {row.ours_runs} runs of ours, {row.peer_runs} of the peer." for row in done
    )
    return f"""# Benchmarks

Made by `make bench`: each row runs both sides in one process, in turn in blocks of {BLOCK:g} s (at least one run), in
changing order; given are medians over the runs, with the interquartile range in brackets. For T the ratio is
peer ÷ ours (larger is better), for steps ours ÷ peer (smaller is better).

Measured {facts["date"]} at revision {facts["revision"]} on {facts["processor"]}, {facts["threads"]} threads; Python
{facts["python"]}, torch {facts["torch"]}, igm-rs {facts["igm_rs"]}, pytorch_optimizer {facts["pytorch_optimizer"]}.
A copy moves {facts["copy_gb_per_s"]:.1f} GB/s here.

{table(done)}

{notes}

The same numbers stand in `results.json`. No CUDA figures: none have been measured yet.
"""


def main() -> None:
    """Measure, print the table, write `results.json` and `README.md` into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each comparison runs")
    arguments = parser.parse_args()
    from importlib.metadata import version

    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "revision": revision(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "igm_rs": igm_rs.__version__,
        "pytorch_optimizer": version("pytorch_optimizer"),
        "copy_gb_per_s": copy_speed() / 1e9,
    }
    done = measure(arguments.seconds)
    print(table(done))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(
        json.dumps(facts | {"rows": [asdict(row) for row in done]}, indent=2, ensure_ascii=False) + "\n"
    )
    (arguments.out / "README.md").write_text(page(facts, done))


if __name__ == "__main__":
    main()
