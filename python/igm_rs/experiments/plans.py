"""The plans: which rows each of the paper's tables has, how they are called there, and which of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .configuration import DEVIATIONS
from .methods import METHODS, Row

__all__ = ["EFFECTS", "ONE_SIDED", "RATES", "RELEASED", "SCOPES", "SCRIPTS_RHO", "TABLES", "Effect", "Line", "plan"]

TABLES = {
    1: "all methods",
    2: "SAM and gradient modification, with and without",
    3: "one-sided modification, turn by turn",
    4: "how much of the network is modified",
    5: "the paper's algorithm and the released scripts' arithmetic",
}
"""The tables by number, with what each shows; the numbers are the paper's, but for the last, which it has not."""

SCOPES = (1.0, 0.5, 0.3)
"""Shares of a modality's parameters that Table 4 modifies, beside the head alone and none."""

SCRIPTS_RHO = 1e-10
"""ρ of the released scripts for CREMA-D, in encoder and head."""

YES, NO = "✓", "×"


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes
    ----------
    row : Row
        What is run.
    words : tuple of str
        What the row is called in this table, one entry for each of the table's columns of words.
    tuned_as : Row
        The row whose learning rate it takes. In Table 1 every method has its own, but a control has that of what it
        controls. The rows of the other tables are IGM with something left out or added, and all have IGM's: what
        differs between them is what the table is about.
    """

    row: Row
    words: tuple[str, ...]
    tuned_as: Row


@dataclass(frozen=True)
class Effect:
    """A comparison that answers a question: one row minus another, or one fusion of a row minus another fusion of it.

    Attributes
    ----------
    label : str
        The question, in the tables.
    mine, theirs : str
        Keys of the rows.
    fusions : tuple of str, optional
        The fusion of each side; None: the same fusion on both, for every fusion.
    """

    label: str
    mine: str
    theirs: str
    fusions: tuple[str, str] | None = None


RATES = {
    1: "every method has its own, a control that of what it controls; where the two sides of a comparison differ, both "
    "are given, and the comparison is one of rates, too",
    2: "that of IGM in all rows",
    3: "that of IGM in all rows",
    4: "that of IGM in all rows",
    5: "that of IGM in all rows",
}
"""Which learning rate the rows of each table have, in words."""

EFFECTS = {
    1: (
        Effect("turns − joint (sum)", "turns", "joint-sum"),
        Effect("turns − joint (concatenation)", "turns", "joint-concat"),
        Effect("SAM on joint training", "sam", "joint-sum"),
        Effect("SAM on turns", "turns-sam", "turns"),
        Effect("flat modification, without SAM", "igm-no-sam", "turns"),
        Effect("flat modification, with SAM", "igm", "turns-sam"),
        Effect("IGM − its mean eigenvalue", "igm", "control-scalar"),
        Effect("IGM − its eigenvalues in a random basis", "igm", "control-random"),
        Effect("IGM − joint (sum)", "igm", "joint-sum"),
        Effect("IGM − MLA", "igm", "mla"),
        Effect("shared trunk: modification − none", "igm-shared", "shared-plain"),
        Effect("shared trunk: modification − frozen trunk", "igm-shared", "shared-frozen"),
        Effect("shared trunk: modification − its mean eigenvalue", "igm-shared", "shared-scalar"),
        Effect("shared trunk: modification − random basis", "igm-shared", "shared-random"),
        Effect("shared trunk with modification − own heads (turns)", "igm-shared", "turns"),
        *(
            Effect(f"{label}: {words} − mean fusion", key, key, (fusion, "mean"))
            for fusion, words in (("calibrated", "calibrated"), ("entropy", "entropy-weighted"))
            for key, label in (("joint-sum", "joint (sum)"), ("turns", "turns"), ("mla", "MLA"), ("igm", "IGM"))
        ),
    ),
    2: (
        Effect("SAM, without modification", "turns-sam", "turns"),
        Effect("SAM, with modification", "igm", "igm-no-sam"),
        Effect("modification, without SAM", "igm-no-sam", "turns"),
        Effect("modification, with SAM", "igm", "turns-sam"),
    ),
}
"""Comparisons below the tables, by number; one is left out where its rows are."""


def plan(number: int, modalities: Sequence[str], methods: Sequence[str] | None = None) -> list[Line]:
    """Return the rows of a table, in its order.

    Tables share rows: a row with the same method and overrides is the same run, made once.

    Parameters
    ----------
    number : int
        Of :data:`TABLES`.
    modalities : sequence of str
        Of the data set, in its order.
    methods : sequence of str, optional
        Keys of the methods wanted; all by default. Only Table 1 can do with fewer.

    Raises
    ------
    ValueError
        If there is no such table, a method is unknown, or the table cannot do without a method.
    """
    if number not in TABLES:
        raise ValueError(f"table is {number!r}, expected one of {', '.join(map(str, TABLES))}")
    for key in methods or ():
        if key not in METHODS:
            raise ValueError(f"method is {key!r}, expected one of {', '.join(METHODS)}")
    if methods is not None and number != 1:
        raise ValueError(
            f"methods: table {number} is about the methods that it has, expected a choice for table 1 only"
        )
    for key, of in APART.items():
        if key in (methods or ()):
            raise ValueError(f"methods has {key}, which is that of {of}, expected others for table 1")
    if len(modalities) < 2:
        raise ValueError(f"modalities are {', '.join(modalities)}, expected at least two to compare methods")
    names = tuple(modalities)
    return [_first, _second, _third, _fourth, _fifth][number - 1](names, list(METHODS if methods is None else methods))


CONTROLS = {
    "control-scalar": "igm",
    "control-random": "igm",
    "shared-scalar": "igm-shared",
    "shared-random": "igm-shared",
}
"""The controls, and what they control."""


def _first(modalities: tuple[str, ...], methods: Sequence[str]) -> list[Line]:
    """All methods; each modality alone is a row."""
    out = []
    for key in METHODS:
        if key in methods and key not in APART:
            groups = [(name,) for name in modalities] if METHODS[key].schedule == "single" else [modalities]
            rows = [Row(key, group) for group in groups]
            out += [Line(row, (row.label,), Row(CONTROLS.get(key, key), row.modalities)) for row in rows]
    return out


def _second(modalities: tuple[str, ...], _: Sequence[str]) -> list[Line]:
    """Turns with SAM and modification, each on or off."""
    rows = (("turns", NO, NO), ("turns-sam", YES, NO), ("igm-no-sam", NO, YES), ("igm", YES, YES))
    return [Line(Row(key, modalities), (sam, modified), Row("igm", modalities)) for key, sam, modified in rows]


ONE_SIDED = "igm-one-sided"
RELEASED = "released"
APART = {ONE_SIDED: "table 3", RELEASED: "table 5", "mla-three-layer": "figure 5b"}
"""Methods that are not in Table 1, and where they are."""


def _third(modalities: tuple[str, ...], _: Sequence[str]) -> list[Line]:
    """IGM without the matrix of one modality, for each, and IGM."""
    igm = Row("igm", modalities)
    lines = []
    for place, unused in enumerate(modalities):
        after = modalities[(place + 1) % len(modalities)]
        sources = {name: None if name == after else modalities[at - 1] for at, name in enumerate(modalities)}
        lines.append(Line(Row(ONE_SIDED, modalities, {"sources": sources}), (f"without the T of {unused}",), igm))
    return [*lines, Line(igm, ("IGM",), igm)]


def _fourth(modalities: tuple[str, ...], _: Sequence[str]) -> list[Line]:
    """IGM on more and less of each modality's network."""
    igm = Row("igm", modalities)
    wide = [Line(Row("igm", modalities, {"scope": share}), (f"{share:.0%}",), igm) for share in SCOPES]
    return [*wide, Line(igm, ("head",), igm), Line(Row("turns-sam", modalities), ("0% (none)",), igm)]


def _fifth(modalities: tuple[str, ...], _: Sequence[str]) -> list[Line]:
    """IGM; with one deviation of the released scripts each; with all; and both ends at the scripts' ρ."""
    igm = Row("igm", modalities)
    one = [Line(Row(RELEASED, modalities, {"released": (name,)}), (DEVIATED[name],), igm) for name in DEVIATIONS]
    quiet = {"rho": SCRIPTS_RHO}
    return [
        Line(igm, ("IGM, the paper",), igm),
        *one,
        Line(Row(RELEASED, modalities), ("all ten",), igm),
        Line(Row("igm", modalities, quiet), (f"IGM at ρ = {SCRIPTS_RHO:g}",), igm),
        Line(Row(RELEASED, modalities, quiet), (f"all ten at ρ = {SCRIPTS_RHO:g}",), igm),
    ]


DEVIATED = {
    "tensor-norm": "ε* normalised for each tensor",
    "kept": "perturbation never taken back",
    "stale-head": "head alone at θ + ε*, on the features of θ",
    "mixed-loss": "0.7 L(θ) of mixed examples + 0.3 L(θ + ε*)",
    "pass": "Ȳ from a pass in evaluation mode",
    "shape": "every T of equal shape",
    "best": "each turn from the best weights so far",
    "rebuild": "a new optimizer each turn",
    "step-lr": "StepLR, anew each turn",
    "macro-f1": "macro-F1 of the mean fusion chooses",
}
"""The deviations, as table 5 calls them."""
