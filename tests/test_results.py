"""The committed results: complete, made by today's commands and layout, and quoted as they came out."""

import json
import re
from pathlib import Path

import pytest

from igm_rs.experiments import data, methods, page, plans, tables
from igm_rs.experiments.configuration import LATER, Config, load_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SETS = ("watch", "mfeat", "openclipart")
TABLES = [f"table-{number}-{name}" for name in SETS for number in plans.TABLES]
WITH_PRETRAINED = ("openclipart",)
"""Sets that encoders come pretrained for."""
FIGURES = [
    f"figure-{name}-{of}" for of in SETS for name in page.FIGURES if name != "5b" or of in WITH_PRETRAINED
]  # fmt: skip
FIGURE = re.compile(r"[+−-]?\d+\.\d+ ± \d+\.\d+")
"""A figure with its spread or its interval, as tables and texts have it."""


def told_config(found):
    """The configuration that results were made with; values that came later had the defaults of today."""
    fresh = Config(data=found["dataset"]).plain()
    return {**{name: fresh[name] for name in LATER}, **found["config"]}


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
    assert told_config(found) == load_config(of, {}).plain()
    assert found["protocol"] == "validation"
    loaded = data.load(of)
    assert found["split"] == loaded.sizes
    seeds = list(load_config(of, {}).final_seeds)
    assert all([run["seed"] for run in row["runs"]] == seeds for row in found["rows"])
    own = [line.row for line in plans.plan(found["table"], loaded.modalities)]
    wanted = {row.key for row in own if type(row.of).__module__.startswith("igm_rs.")}  # not those of other tests
    assert {row["key"] for row in found["rows"]} == wanted
    assert re.fullmatch(r"[0-9a-f]{40}", found["revision"]), "made from changed files"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_of_the_default_settings(name):
    picture = RESULTS / "figures" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    of, number = told["dataset"], told["figure"]
    assert told["command"] == f"igm-rs figure {number} --data {of}"
    seeds = {"seeds": len(told["seeds"])}
    if number == "5b":
        configs = told["numbers"]["configs"]
        for network, kept in configs.items():
            today = load_config(of, {**seeds, "network": network}).plain()
            later = {name: today[name] for name in LATER}
            assert {**later, **kept, "released": today["released"]} == today  # none of its methods has deviations
        assert told["config"] == configs["pretrained"]
        assert set(configs) == {"frozen", "pretrained"}
    else:
        assert told_config(told) == load_config(of, seeds).plain()
    assert re.fullmatch(r"[0-9a-f]{40}", told["revision"]), "made from changed files"


def test_the_page_is_made_from_the_files():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page.page(RESULTS)


def every_figure():
    """All figures with a spread that tables and captions hold."""
    found = set()
    for path in (RESULTS / "tables").glob("*.md"):
        found |= set(FIGURE.findall(path.read_text(encoding="utf-8")))
    for path in (RESULTS / "figures").glob("*.json"):
        found |= set(FIGURE.findall(json.loads(path.read_text(encoding="utf-8"))["caption"]))
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


def cell(name, title, row, group, column):
    """What stands in a table: of the part whose title begins so, in this row, group of columns and column."""
    table = tables.Table.read(RESULTS / "tables" / f"{name}.json")
    grid = next(grid for grid in table.grids if grid.title.startswith(title))
    heads = [*((word, "") for word in grid.words), *((group, head) for group, heads in grid.groups for head in heads)]
    cells = next(cells for cells in grid.rows if cells[0].text == row)
    return cells[heads.index((group, column))].text


CHOSEN, LAST = "Chosen round", "What is worth how much at the last round"
EFFECT, FORGETTING = "What is worth how much at the chosen round", "Forgetting"
TITLES = "accuracy, each origin once"
OF_FIRST = {"watch": "accuracy of accelerometer", "mfeat": "accuracy of fou"}
MORE = "more than with the flat modification, ± 95 %"


@pytest.mark.parametrize(
    ("quoted", "name", "place"),
    [
        ("IGM 72.5 ± 3.6", "table-1-watch", (CHOSEN, "IGM", "accuracy", "calibrated")),
        ("MLA 77.2 ± 1.2", "table-1-watch", (CHOSEN, "MLA", "accuracy", "calibrated")),
        ("turns 76.7 ± 1.2", "table-1-watch", (CHOSEN, "turns", "accuracy", "calibrated")),
        ("IGM minus MLA is −4.7 ± 5.0", "table-1-watch", (EFFECT, "IGM − MLA", "accuracy", "calibrated")),
        ("at the last round −4.4 ± 3.0", "table-1-watch", (LAST, "IGM − MLA", "accuracy", "calibrated")),
        ("IGM 88.9 ± 0.9", "table-1-mfeat", (CHOSEN, "IGM", "accuracy", "calibrated")),
        ("IGM 65.3 ± 0.9", "table-1-openclipart", (CHOSEN, "IGM", TITLES, "calibrated")),
        ("joint with SAM 65.7 ± 0.7", "table-1-openclipart", (CHOSEN, "joint, sum + SAM", TITLES, "calibrated")),
        ("MLA has 65.8 ± 1.3", "table-1-openclipart", (CHOSEN, "MLA", TITLES, "mean")),
        ("ahead by +1.6 ± 3.7", "table-1-openclipart", (EFFECT, "IGM − joint (sum)", TITLES, "calibrated")),
        ("clearly by +2.9 ± 2.6", "table-1-openclipart", (EFFECT, "IGM − joint (sum)", TITLES, "sum")),
        ("worth −1.4 ± 5.1 on watch", "table-2-watch", (EFFECT, "modification, without SAM", "accuracy", "calibrated")),
        ("−0.1 ± 0.3 on mfeat", "table-2-mfeat", (EFFECT, "modification, without SAM", "accuracy", "calibrated")),
        (
            "−0.4 ± 1.0 on openclipart",
            "table-2-openclipart",
            (EFFECT, "modification, without SAM", TITLES, "calibrated"),
        ),
        ("place is −0.1 ± 5.6", "table-1-watch", (EFFECT, "IGM − its mean eigenvalue", "accuracy", "calibrated")),
        ("minus none +1.3 ± 3.8", "table-4-watch", (EFFECT, "100% − 0% (none)", "accuracy", "calibrated")),
        ("worse, −4.4 ± 3.0", "table-2-watch", (EFFECT, "SAM, without modification", "accuracy", "calibrated")),
        ("mean fusion +0.095 ± 0.066 on watch", "table-2-watch", (EFFECT, "SAM, without modification", "NLL", "mean")),
        ("turns win, by +9.2 ± 7.7 on watch", "table-1-watch", (EFFECT, "turns − joint (sum)", "accuracy", "mean")),
        ("they are level, +1.1 ± 1.8", "table-1-watch", (EFFECT, "turns − joint (sum)", "accuracy", "calibrated")),
        ("clearly worse, +0.063 ± 0.048", "table-1-watch", (EFFECT, "turns − joint (sum)", "NLL", "calibrated")),
        (
            "costs MLA −1.6 ± 0.8",
            "table-1-openclipart",
            (EFFECT, "MLA: calibrated − mean fusion", TITLES, "calibrated"),
        ),
        *(
            (words, f"table-1-{of}", (FORGETTING, row, OF_FIRST[of], column))
            for words, of, row, column in (
                ("forgets 5.1 ± 2.9 points on watch", "watch", "shared trunk, no modification", "forgotten"),
                ("and 2.8 ± 0.8 on mfeat", "mfeat", "shared trunk, no modification", "forgotten"),
                ("with it 0.1 ± 0.3", "watch", "shared trunk, flat", "forgotten"),
                ("and 0.0 ± 0.7", "mfeat", "shared trunk, flat", "forgotten"),
                ("eigenvalue by +4.7 ± 3.7", "watch", "shared trunk, mean eigenvalue for T", MORE),
                ("random basis by +4.9 ± 4.0", "watch", "shared trunk, random basis for T", MORE),
            )
        ),
    ],
)
def test_a_finding_is_what_the_table_says(quoted, name, place):
    findings = " ".join((RESULTS / "findings.md").read_text(encoding="utf-8").split())
    assert quoted in findings
    assert FIGURE.search(quoted)[0] == cell(name, *place)


@pytest.mark.parametrize(("name", "with_sam", "without"), [
    ("watch", 0.689, 1.160), ("mfeat", 0.610, 0.873), ("openclipart", 0.227, 0.426),
])  # fmt: skip
def test_the_rises_that_are_quoted_are_those_of_figure_4(name, with_sam, without):
    told = json.loads((RESULTS / "figures" / f"figure-4-{name}.json").read_text(encoding="utf-8"))
    rises = [told["numbers"]["surfaces"][label]["mean_rise"][-1] for label in ("IGM", "IGM without SAM")]
    assert rises == pytest.approx([with_sam, without], abs=5e-4)
    assert 0.30 <= 1 - rises[0] / rises[1] <= 0.47
    findings = (RESULTS / "findings.md").read_text(encoding="utf-8")
    assert f"{with_sam:.3f}" in findings
    assert f"{without:.3f}" in findings


def test_titles_repeat_as_the_findings_say():
    loaded = data.load("openclipart")
    findings = " ".join((RESULTS / "findings.md").read_text(encoding="utf-8").split())
    for split, words in ((loaded.validation, "226 of the 790"), (loaded.open_test(), "122 of the 636")):
        _, counts = split.origins.unique(return_counts=True)
        assert words == f"{int(counts.max())} of the {len(split)}"
        assert words in findings
