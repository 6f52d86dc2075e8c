"""The committed results: complete, made by today's commands and layout, and quoted as they came out."""

import json
import re
from pathlib import Path

import pytest

from igm_rs.experiments import data, methods, page, plans, tables
from igm_rs.experiments.configuration import load_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SETS = ("watch", "mfeat", "openclipart")
TABLES = [f"table-{number}-{name}" for name in SETS for number in plans.TABLES]
FIGURES = [f"figure-{name}-{of}" for of in SETS for name in page.FIGURES]
FIGURE = re.compile(r"[+−-]?\d+\.\d+ ± \d+\.\d+")
"""A figure with its spread or its interval, as tables and texts have it."""


def results_of(name):
    return json.loads((RESULTS / "tables" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_table_and_every_figure_of_the_three_sets_is_there():
    assert sorted(path.stem for path in (RESULTS / "tables").glob("*.json")) == sorted(TABLES)
    assert sorted(path.stem for path in (RESULTS / "figures").glob("*.png")) == sorted(FIGURES)
    assert sorted(path.stem for path in (RESULTS / "figures").glob("*.json")) == sorted(FIGURES)


@pytest.mark.parametrize("name", TABLES)
def test_files_of_a_table_are_what_its_numbers_give(name):
    table = tables.Table.read(RESULTS / "tables" / f"{name}.json")
    assert (RESULTS / "tables" / f"{name}.md").read_text(encoding="utf-8") == table.markdown()
    assert (RESULTS / "tables" / f"{name}.csv").read_text(encoding="utf-8") == table.csv()
    assert (RESULTS / "tables" / f"{name}.json").read_text(encoding="utf-8") == table.json()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_of_the_default_settings_and_of_todays_data(name):
    found = results_of(name)
    of = found["dataset"]
    assert found["command"] == f"igm-rs table {found['table']} --data {of}"
    assert found["config"] == load_config(of, {}).plain()
    assert found["protocol"] == "validation"
    loaded = data.load(of)
    assert found["split"] == loaded.sizes
    seeds = list(load_config(of, {}).final_seeds)
    assert all([run["seed"] for run in row["runs"]] == seeds for row in found["rows"])
    wanted = plans.plan(found["table"], loaded.modalities)
    assert {row["key"] for row in found["rows"]} == {line.row.key for line in wanted}
    assert re.fullmatch(r"[0-9a-f]{40}", found["revision"]), "made from changed files"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_of_the_default_settings(name):
    picture = RESULTS / "figures" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    of, number = told["dataset"], told["figure"]
    assert told["command"] == f"igm-rs figure {number} --data {of}"
    assert told["config"] == load_config(of, {"seeds": len(told["seeds"])}).plain()
    assert re.fullmatch(r"[0-9a-f]{40}", told["revision"]), "made from changed files"


def test_the_page_is_made_from_the_files():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page.page(RESULTS)


def every_figure():
    """All figures with a spread that tables and captions hold."""
    found = set()
    for path in (RESULTS / "tables").glob("*.md"):
        found |= set(FIGURE.findall(path.read_text(encoding="utf-8")))
    return found | set(FIGURE.findall((RESULTS / "later" / "table.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("text", ["results/findings.md", "README.md"])
def test_figures_that_are_quoted_are_those_of_the_tables(text):
    words = (ROOT / text).read_text(encoding="utf-8")
    if text == "README.md":
        words = words[words.index("## What it does on real data") : words.index("## The optimizer contract")]
    quoted = set(FIGURE.findall(words))
    assert len(quoted) > 20
    assert quoted <= every_figure()


def test_the_summary_in_the_readme_is_that_of_the_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"<!-- results -->\n\n(.*?)\n\n<!-- end of results -->", text, re.DOTALL)[1].splitlines()
    heads, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert heads[1:] == ["watch", "mfeat", "openclipart, each title once"]
    by_label = {method.label: key for key, method in methods.METHODS.items()}
    rows = {name: {row["key"]: row for row in results_of(f"table-1-{name}")["rows"]} for name in SETS}
    assert {"joint, sum", "joint, concatenation", "turns", "MLA", "IGM without SAM", "IGM"} <= {
        line[0] for line in body
    }
    for label, *cells in body:
        for name, cell in zip(SETS, cells, strict=True):
            measure = "by_origin" if name == "openclipart" else "accuracy"
            found = tables.figure(rows[name][by_label[label]], "chosen", measure, "calibrated")
            assert cell == f"{100 * found.mean:.1f} ± {100 * found.sd:.1f}", (label, name)
