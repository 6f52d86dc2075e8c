"""The contract: every check on IGMOptimizer, the peers beside it, a fault that each check catches, and the README."""

import json
import re
from pathlib import Path

import pytest
from contract import ROWS, run
from contract_checks import CHECKS
from contract_faults import FAULTS
from contract_subjects import OURS, PEERS, SUBJECTS
from contract_table import BEGIN, END, README, RESULTS, outcome, results, section, shown

ROWS_OF_THE_CONTRACT = [*(f"A{n}" for n in range(1, 15)), *(f"B{n}" for n in range(1, 9))]
every_check = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.cuda] if check.cuda else []) for name, check in CHECKS.items()]
)


@every_check
def test_igm_optimizer(name):
    came = outcome(CHECKS[name], OURS)
    assert came.verdict == "pass", f"{CHECKS[name].row}, {CHECKS[name].what}: {came.why}"


@every_check
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_peer_can_be_asked(name, peer):
    """A peer may pass or fail; where it fails, that it does so every time is seen by the README's table."""
    came = outcome(CHECKS[name], peer)
    assert came.verdict in {"pass", "fail", "n/a"}
    assert (came.verdict == "fail") == bool(came.why)
    assert (came.verdict == "n/a") == (not peer.has(CHECKS[name].needs))


@every_check
def test_check_can_fail(name):
    """A check that no optimizer fails would check nothing."""
    if name in FAULTS:
        fault = FAULTS[name]()
        came = run(CHECKS[name], fault)
        assert came.verdict == "fail", f"{type(fault).__name__} was not caught"
        assert not re.match(r"\w+Error:", came.why), f"{type(fault).__name__} failed for another reason: {came.why}"
    else:
        assert "fail" in {outcome(CHECKS[name], peer).verdict for peer in PEERS}


def test_faults_are_of_checks_that_exist():
    assert FAULTS.keys() <= CHECKS.keys()


def test_every_row_of_the_contract_has_a_check():
    assert {check.row for check in CHECKS.values()} == set(ROWS)
    assert set(ROWS_OF_THE_CONTRACT) <= set(ROWS)


def test_checks_are_named_after_their_rows():
    for name, check in CHECKS.items():
        assert name.startswith(check.row.split()[0].lower() + "_")


def test_table_in_the_readme_is_the_one_that_the_checks_make():
    found = results()
    assert found == json.loads(RESULTS.read_text())
    assert shown(README.read_text()) == section(found)


def test_table_in_the_readme_tells_no_paths_and_no_addresses():
    text = shown(README.read_text())
    assert len(text) > 1000
    assert not re.search(r"0x[0-9a-f]+|/home|/tmp|/usr|site-packages", text)
    assert str(Path(__file__).parents[1]) not in text


def test_ours_is_green_wherever_no_gpu_is_needed():
    rows = [line.split(" | ") for line in shown(README.read_text()).splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(ROWS)
    column = 2 + SUBJECTS.index(OURS)
    marks = {row[0].removeprefix("| "): row[column].removesuffix(" |").strip() for row in rows}
    assert {row for row, mark in marks.items() if mark != "✓"} == {row for row in ROWS if "CUDA" in row}


def test_markers_stand_once():
    page = README.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
