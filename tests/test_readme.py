"""The README says what is so: its code runs, its files exist, its tables and figures are the generated ones."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_quick_start_runs(capsys):
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert set(names["opt"].last_stats["projected"]) == {"video"}
    assert "cosine" in capsys.readouterr().out
    assert names["opt"].round == 2


def test_files_that_are_named_exist():
    named = set(re.findall(r"`((?:src|python|tests|notebooks|benchmarks)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_two_commands_are_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)) <= set(targets)


def tables(markdown):
    """The tables of a page, each as its lines."""
    return {match.strip() for match in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)}


def test_the_table_of_the_modality_that_comes_later_is_the_generated_one():
    generated = tables((ROOT / "results" / "later" / "table.md").read_text())
    shown = {table for table in tables(README) if "forgetting of fou" in table}
    assert len(shown) == 1
    assert shown <= generated
    seeds = json.loads((ROOT / "results" / "later" / "results.json").read_text())["seeds"]
    assert re.search(rf"\b{seeds} seeds; `make later` makes it", README)


@pytest.mark.parametrize("file", ["LICENSE", "CHANGELOG.md", "python/igm_rs/experiments/archives/LICENCES.md"])
def test_pages_that_belong_to_it(file):
    assert (ROOT / file).read_text().strip()
