"""The tables: plans, numbers by hand, layout and files; the results page, the check of a table, and the listing."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from igm_rs.experiments import command, evaluation, grids, listing, page, plans, reproduction, tables
from igm_rs.experiments.configuration import DEVIATIONS, LATER, Config
from igm_rs.experiments.plans import Line

NAMES = ("audio", "video")
ROUNDS = 4


def scores(names, value):
    """Every measure `value` for the first name, one hundredth more for each further one; NLL 1 − that."""
    values = {name: value + 0.01 * at for at, name in enumerate(names)}
    return {
        measure: {name: 1 - x if measure == "nll" else x for name, x in values.items()}
        for measure in evaluation.MEASURES
    }


def record(key, seed, value, modalities=NAMES, joined=False, **others):
    fusions = evaluation.FUSIONS if len(modalities) > 1 else ("calibrated",)
    names = [*modalities, *fusions, *(["joint", "joint-calibrated"] if joined else [])]
    turns = [(0, ""), *((number, name) for number in range(1, ROUNDS + 1) for name in modalities)]
    return {
        "row": key,
        "seed": seed,
        "device": "cpu",
        "learning_rate": 0.03,
        "curve": [{"round": 1, "accuracy": {"mean": 0.5}}] * 100,
        "chosen": {"round": 2 + seed % 2, "scores": scores(names, value)},
        "last": {"round": ROUNDS, "scores": scores(names, value + 0.1)},
        "temperatures": dict.fromkeys(modalities, 1.25),
        "after_turn": [
            {"round": number, "modality": name, "scores": {"accuracy": {"mean": value + 0.01 * at}}}
            for at, (number, name) in enumerate(turns)
        ],
        "seconds_per_step": 0.002,
        "seconds": 3.0,
        "peak_memory": 64 * 2**20,
        "skipped": 0,
        "cosine": None,
        "kept": None,
        "effective_perturbation": None,
        "projected_share": None,
        "parameters": 1000,
    } | others


def line(key, *words, modalities=NAMES, tuned_as=None, schedule="turns"):
    row = SimpleNamespace(key=key, label=key, modalities=modalities, of=SimpleNamespace(schedule=schedule))
    return Line(row, words or (key,), SimpleNamespace(key=tuned_as or key))


ABOUT = {
    "dataset": "watch",
    "title": "watch: exercises",
    "classes": 7,
    "modalities": list(NAMES),
    "split": {"train": 10, "validation": 5, "test": 6},
    "protocol": "validation",
    "methods": None,
    "command": "igm-rs table 1 --data watch",
    "config": {"steps": 4},
    "versions": {"torch": "2", "processor": "this", "instructions": "all"},
    "revision": None,
    "words": ["Budget: few steps.", "Choice: on validation."],
}

ROWS = {
    "single-audio": ((0.50, 0.52, 0.51), ("audio",)),
    "single-video": ((0.60, 0.62, 0.61), ("video",)),
    "joint-concat": ((0.55, 0.55, 0.55), NAMES),
    "joint-sum": ((0.56, 0.58, 0.54), NAMES),
    "mla": ((0.70, 0.71, 0.72), NAMES),
    "igm": ((0.70, 0.72, 0.74), NAMES),
}
"""Values of three seeds, and modalities."""


def of_first(**about):
    records = [
        record(
            key,
            seed,
            value,
            modalities,
            key == "joint-concat",
            **({"cosine": 0.97, "kept": 0.81} if key == "igm" else {}),
        )
        for key, (values, modalities) in ROWS.items()
        for seed, value in reversed(list(enumerate(values)))
    ]
    lines = [line(key, modalities=modalities) for key, (_, modalities) in ROWS.items()]
    records.append(record("another", 0, 0.9))
    return tables.table(1, lines, records, about=ABOUT | about, tried={"igm": {0.01: 0.7, 0.03: 0.8}})


@pytest.fixture
def first():
    return of_first()


def rows_of(grid):
    return {row[0].text: row[len(grid.words) :] for row in grid.rows}


# Plans


def test_first_plan_has_every_method_and_each_modality_alone():
    lines = plans.plan(1, ["a", "b", "c"])
    assert [line.row.key for line in lines][:5] == ["single-a", "single-b", "single-c", "joint-concat", "joint-sum"]
    wanted = [key for key in plans.METHODS if key not in ("single", "igm-one-sided", "released", "mla-three-layer")]
    assert [line.row.method for line in lines][3:] == wanted
    assert all(line.row.overrides == {} for line in lines)
    tuned = {line.row.key: line.tuned_as.key for line in lines if line.tuned_as.key != line.row.key}
    assert tuned == plans.CONTROLS == {
        "control-scalar": "igm", "control-random": "igm", "shared-scalar": "igm-shared", "shared-random": "igm-shared",
    }  # fmt: skip
    assert {line.tuned_as.key for number in (2, 3, 4, 5) for line in plans.plan(number, ["a", "b"])} == {"igm"}
    assert all(line.words == (line.row.label,) for line in lines)
    few = plans.plan(1, ["a", "b"], ["igm", "single"])
    assert [line.row.key for line in few] == ["single-a", "single-b", "igm"]


def test_second_plan_is_sam_by_modification():
    lines = plans.plan(2, ["a", "b"])
    assert {line.words: line.row.key for line in lines} == {
        ("×", "×"): "turns", ("✓", "×"): "turns-sam", ("×", "✓"): "igm-no-sam", ("✓", "✓"): "igm",
    }  # fmt: skip
    for line in lines:
        assert [line.row.of.sam, line.row.of.modifies] == [word == "✓" for word in line.words]


@pytest.mark.parametrize(
    ("modalities", "sources"),
    [
        (["a", "b"], [{"a": "b", "b": None}, {"a": None, "b": "a"}]),
        (
            ["a", "b", "c"],
            [{"a": "c", "b": None, "c": "b"}, {"a": "c", "b": "a", "c": None}, {"a": None, "b": "a", "c": "b"}],
        ),
    ],
)
def test_third_plan_leaves_one_modality_unused_at_a_time(modalities, sources):
    *lines, igm = plans.plan(3, modalities)
    assert [line.row.overrides["sources"] for line in lines] == sources
    assert [line.words[0] for line in lines] == [f"without the T of {name}" for name in modalities]
    assert {line.row.method for line in lines} == {"igm-one-sided"}
    assert {line.tuned_as.key for line in (*lines, igm)} == {"igm"}
    assert len({line.row.key for line in lines}) == len(modalities)


def test_fourth_plan_goes_from_all_to_none():
    lines = plans.plan(4, ["a", "b"])
    assert [line.words[0] for line in lines] == ["100%", "50%", "30%", "head", "0% (none)"]
    assert [line.row.overrides for line in lines] == [{"scope": 1.0}, {"scope": 0.5}, {"scope": 0.3}, {}, {}]
    assert [line.row.method for line in lines] == ["igm"] * 4 + ["turns-sam"]


def test_fifth_plan_has_every_deviation_by_itself_and_all():
    first, *single, every, quiet, every_quiet = plans.plan(5, ["a", "b"])
    assert first.row.key == "igm"
    assert [line.row.overrides for line in single] == [{"released": (name,)} for name in DEVIATIONS]
    assert {line.row.method for line in (*single, every, every_quiet)} == {"released"}
    assert every.row.overrides == {}
    assert quiet.row.overrides == every_quiet.row.overrides == {"rho": 1e-10}
    assert len({line.words for line in plans.plan(5, ["a", "b"])}) == len(DEVIATIONS) + 4


def test_fifth_table_compares_each_deviation_with_the_paper():
    lines = plans.plan(5, ["a", "b"])
    rows = [{"key": line.row.key, "words": list(line.words)} for line in lines]
    effects = tables.Table({"table": 5, "rows": rows}).effects
    assert [effect.mine for effect in effects] == [line.row.key for line in lines[1:]]
    assert {effect.theirs for effect in effects} == {"igm"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "there it is constant, as it falls before pass 40 and a turn has 2"),
        ({"steps": 5}, "there it is constant, as it falls before pass 40 and a turn has 1"),
        ({"rate_passes": 2}, "there it falls to a tenth before pass 2 of a turn, and again every 2 passes"),
        ({"rate_passes": 3}, "there it is constant, as it falls before pass 3 and a turn has 2"),
        (
            {"turn_steps": 21, "rate_passes": 3},
            "there it falls to a tenth before pass 3 of a turn, and again every 3 passes",
        ),
        ({"batch_size": 500, "turn_steps": 3}, "there it is constant, as it falls before pass 40 and a turn has 3"),
    ],
)
def test_fifth_table_says_whether_a_step_lr_falls(changed, said):
    """As the rate of the training itself does, which is asked beside it."""
    values = {"steps": 400, "turn_steps": 11, "batch_size": 30, "rate_passes": 40} | changed
    assert tables._step_lr({"config": values, "split": {"train": 305}}) == said
    config = Config(data="toy", released=["step-lr"], **values)
    last = (min(values["turn_steps"], values["steps"]) - 1) // max(1, 305 // values["batch_size"])
    assert (plans.METHODS["released"].rate_factor(config, last) < 1) == ("falls to a tenth" in said)


def test_tables_share_rows():
    first = {line.row for line in plans.plan(1, ["a", "b"])}
    assert {line.row for line in plans.plan(2, ["a", "b"])} <= first
    assert plans.plan(3, ["a", "b"])[-1].row in first


def test_every_effect_is_of_methods_that_there_are():
    for effects in plans.EFFECTS.values():
        for effect in effects:
            assert {effect.mine, effect.theirs} <= plans.METHODS.keys()


@pytest.mark.parametrize(
    ("number", "modalities", "methods", "message"),
    [
        (6, ["a", "b"], None, "table is 6, expected one of 1, 2, 3, 4, 5"),
        (1, ["a", "b"], ["released"], "methods has released, which is that of table 5, expected others"),
        (1, ["a", "b"], ["other"], "method is 'other', expected one of single, "),
        (2, ["a", "b"], ["igm"], "methods: table 2 is about the methods that it has, expected a choice for table 1"),
        (1, ["a"], None, "modalities are a, expected at least two to compare methods"),
    ],
)
def test_plans_refuse_what_there_is_not(number, modalities, methods, message):
    with pytest.raises(ValueError, match=message):
        plans.plan(number, modalities, methods)


# Numbers


def test_first_table_by_hand(first):
    main = first.grids[0]
    assert [head for _, heads in main.groups for head in heads] == ["mean", "entropy", "calibrated", "sum"] * 3
    assert [name for name, _ in main.groups] == ["accuracy", "MAP", "macro-F1"]
    rows = rows_of(main)
    # the fusions' values are two to four hundredths above the first modality's
    assert [cell.text for cell in rows["igm"][:3]] == ["74.0 ± 2.0", "75.0 ± 2.0", "76.0 ± 2.0"]
    # one prediction for all, and one hundredth more with a temperature
    assert [cell.text for cell in rows["single-video"]] == ["61.0 ± 1.0", "61.0 ± 1.0", "62.0 ± 1.0", "61.0 ± 1.0"] * 3
    # a joint head's own value is the last but one: six hundredths above the first modality's
    assert [cell.text for cell in rows["joint-concat"]] == ["61.0 ± 0.0", "61.0 ± 0.0", "62.0 ± 0.0", "61.0 ± 0.0"] * 3
    assert {key: cells[0].rank for key, cells in rows.items()} == {
        "single-audio": 0, "single-video": 0, "joint-concat": 0, "joint-sum": 0, "mla": 2, "igm": 1,
    }  # fmt: skip
    assert {key: cells[0].worse for key, cells in rows.items()} == {
        "single-audio": False, "single-video": False, "joint-concat": False, "joint-sum": True, "mla": False,
        "igm": False,
    }  # fmt: skip
    last = rows_of(first.grids[1])
    assert last["igm"][0].text == "84.0 ± 2.0"


def test_origins_have_columns_only_where_examples_share_them():
    assert "accuracy, each origin once" not in of_first().plain()
    records = [record(key, seed, 0.5 + 0.1 * (key == "igm")) for key in ("mla", "igm") for seed in (0, 1)]
    for each in records:
        for weights in ("chosen", "last"):
            each[weights]["scores"]["by_origin"] = {
                name: value - 0.2 * each["seed"] for name, value in each[weights]["scores"]["accuracy"].items()
            }
    made = tables.table(1, [line("mla"), line("igm")], records, about=ABOUT, tried={})
    for grid in made.grids[:2]:
        assert [name for name, _ in grid.groups] == ["accuracy", "accuracy, each origin once", "MAP", "macro-F1"]
    assert [cell.text for cell in rows_of(made.grids[0])["igm"][3:5]] == ["65.0 ± 0.0", "52.0 ± 14.1"]
    compared, effects = made.grids[3], made.grids[4]
    assert [name for name, _ in compared.groups][3:] == ["accuracy, each origin once, calibrated", "NLL, calibrated"]
    assert [name for name, _ in effects.groups] == ["", "accuracy", "accuracy, each origin once", "NLL"]
    assert rows_of(effects)["IGM − MLA"][5].text == "+10.0 ± 0.0"


def test_branches_and_nll_have_their_part(first):
    grid = first.grids[2]
    rows = rows_of(grid)
    assert [head for _, heads in grid.groups for head in heads] == [*NAMES, "mean", "entropy", "calibrated"]
    nll = ["0.490 ± 0.010", "0.490 ± 0.010", "0.480 ± 0.010"]
    assert [cell.text for cell in rows["single-audio"]] == ["51.0 ± 1.0", "–", *nll]
    assert [cell.text for cell in rows["igm"]][:3] == ["72.0 ± 2.0", "73.0 ± 2.0", "0.260 ± 0.020"]
    assert rows["igm"][2].rank == 1  # the smallest


def test_differences_are_paired_and_have_an_interval(first):
    grid = first.grids[3]
    assert [name for name, _ in grid.groups] == [
        "accuracy, mean", "accuracy, sum", "accuracy, calibrated", "NLL, calibrated",
    ]  # fmt: skip
    assert grid.groups[0][1] == ["− joint, concat", "− joint, sum", "− MLA"]
    rows = rows_of(grid)
    # 0.00, 0.01, 0.02: mean 0.01 and 4.3027 · 0.01 / √3
    assert rows["igm"][2] == grids.Cell("+1.0 ± 2.5")
    # 0.14, 0.14, 0.20: mean 0.16 and 4.3027 · 0.03464 / √3
    assert rows["igm"][1] == grids.Cell("+16.0 ± 8.6", marked=True)
    assert rows["mla"][2] == grids.Cell("–")
    assert rows["igm"][11] == grids.Cell("−0.010 ± 0.025")


def test_effects_are_those_whose_rows_are_there(first):
    assert [effect.label for effect in first.effects] == [
        "IGM − joint (sum)",
        "IGM − MLA",
        *(f"{row}: calibrated − mean fusion" for row in ("joint (sum)", "MLA", "IGM")),
        *(f"{row}: entropy-weighted − mean fusion" for row in ("joint (sum)", "MLA", "IGM")),
    ]
    chosen, last = first.grids[4:6]
    assert ("chosen round" in chosen.title, "last round" in last.title) == (True, True)
    assert [name for name, _ in chosen.groups] == ["", "accuracy", "NLL"]
    rows = rows_of(chosen)
    assert rows["IGM − MLA"][:2] == [grids.Cell("0.03"), grids.Cell("+1.0 ± 2.5")]
    assert [cell.text for cell in rows["IGM: calibrated − mean fusion"][1:5]] == ["–", "–", "+2.0 ± 0.0", "–"]
    assert rows["IGM: calibrated − mean fusion"][7] == grids.Cell("−0.020 ± 0.000", marked=True)
    assert rows_of(last)["IGM − MLA"][1] == rows["IGM − MLA"][1]  # both are a tenth more there


def test_effects_of_the_last_round_are_of_the_last_round():
    records = [record("mla", seed, 0.5) for seed in (0, 1)] + [record("igm", seed, 0.6) for seed in (0, 1)]
    for each in records[2:]:
        each["last"]["scores"] = scores([*NAMES, *evaluation.FUSIONS], 0.9)
        each["learning_rate"] = 0.1
    made = tables.table(1, [line("mla"), line("igm")], records, about=ABOUT, tried={})
    chosen, last = (rows_of(grid)["IGM − MLA"] for grid in made.grids[-3:-1])
    assert [cell.text for cell in chosen[:2]] == ["0.1, 0.03", "+10.0 ± 0.0"]  # both rates
    assert last[1].text == "+30.0 ± 0.0"
    found = [each for each in csv.DictReader(io.StringIO(made.csv())) if each["minus"] == "mla"]
    of_mean = [each for each in found if (each["measure"], each["of"]) == ("accuracy", "mean")]
    assert [(each["weights"], each["mean"]) for each in of_mean] == [("chosen", "0.1"), ("last", "0.3")]


def test_forgetting_is_compared_seed_by_seed_with_that_under_the_flat_modification():
    rows = {"igm-shared": (0.80, 0.79), "shared-plain": (0.70, 0.75)}  # of the first modality, in the end
    records = [record(key, seed, 0.5) for key in rows for seed in (0, 1)]
    for each in records:
        after_all = rows[each["row"]][each["seed"]]
        for turn, value in zip(each["after_turn"], (0.1, *[0.8] * 7, after_all), strict=True):
            turn["scores"]["accuracy"]["audio"] = value
    made = tables.table(1, [line(key, schedule="once") for key in rows], records, about=ABOUT, tried={})
    grid = next(grid for grid in made.grids if grid.title.startswith("Forgetting"))
    # 0.1 − 0, 0.05 − 0.01: mean 0.07 and 12.706 · 0.0424 / √2
    assert [cells[4].text for cells in grid.rows] == ["–", "+7.0 ± 38.1"]


def test_forgetting_is_of_the_modality_that_was_trained_first():
    records = [record("igm-shared", seed, 0.5) for seed in (0, 1)]
    for seed, each in enumerate(records):
        for turn, value in zip(
            each["after_turn"], (0.1, 0.8, 0.75, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6 + 0.1 * seed), strict=True
        ):
            turn["scores"]["accuracy"]["audio"] = value
    made = tables.table(1, [line("igm-shared", schedule="once")], records, about=ABOUT, tried={})
    grid = next(grid for grid in made.grids if grid.title.startswith("Forgetting of audio"))
    assert [cell.text for cell in grid.rows[0]] == ["igm-shared", "80.0 ± 0.0", "65.0 ± 7.1", "15.0 ± 7.1", "–"]
    kept = [each for each in csv.DictReader(io.StringIO(made.csv())) if each["weights"].startswith("after")]
    assert [(each["weights"], each["of"], each["mean"]) for each in kept] == [
        ("after its own, validation", "audio", "0.8"), ("after all, validation", "audio", "0.65"),
    ]  # fmt: skip
    assert not any("Forgetting" in grid.title for grid in of_first().grids)


def test_a_difference_is_of_fusions(first):
    row = first.results["rows"][-1]
    with pytest.raises(ValueError, match="fusions are mean, other, expected two of mean, entropy, calibrated, sum"):
        tables.difference(row, row, "accuracy", ("mean", "other"))


def test_cost_tells_settings_time_memory_and_what_the_optimizer_told(first):
    grid = first.grids[-1]
    assert [cell.text for cell in rows_of(grid)["igm"]] == [
        "0.03", "2.3 of 4", "2.00", "64", "0", "0.9700", "81.0%", "–", "–",
    ]  # fmt: skip
    row = next(row for row in first.results["rows"] if row["key"] == "igm")
    assert row["tried"] == [
        {"learning_rate": 0.01, "validation_accuracy": 0.7},
        {"learning_rate": 0.03, "validation_accuracy": 0.8},
    ]


@pytest.mark.parametrize(
    ("devices", "columns", "said"),
    [
        (("cpu", "cpu"), [], "the peak of memory above what the process held before the run. "),
        (("cuda", "cuda"), ["cuda", "cuda"], "of memory (with a GPU, of its own memory) above what the process held "),
        (("cpu", "cuda"), ["cpu", "cuda"], "before the run; of rows on different devices neither compares. "),
    ],
)  # fmt: skip
def test_cost_tells_devices_where_one_is_a_gpu(devices, columns, said):
    records = [
        record(key, seed, 0.5, device=device) for key, device in zip("ab", devices, strict=True) for seed in (0, 1)
    ]
    made = tables.table(1, [line("a"), line("b")], records, about=ABOUT, tried={})
    grid = made.grids[-1]
    assert said in grid.note
    assert grid.groups[0][1][: bool(columns)] == ["device"] * bool(columns)
    assert [cells[0].text for cells in rows_of(grid).values() if columns] == columns
    for row in made.results["rows"]:
        for run in row["runs"]:
            del run["device"]  # as tables of earlier versions are stored, all of them made on the CPU
    assert "device" not in made.grids[-1].groups[0][1]


def test_second_table_has_sam_and_modification():
    lines = [line("a", "×", "×"), line("b", "✓", "×"), line("c", "×", "✓"), line("d", "✓", "✓")]
    records = [record(key, seed, 0.5 + 0.1 * at) for at, key in enumerate("abcd") for seed in (0, 1)]
    grid = tables.table(2, lines, records, about=ABOUT, tried={}).grids[0]
    assert grid.words == ["SAM", "GM"]
    assert grid.groups == [("accuracy: each branch, and the fusions", [*NAMES, "mean", "entropy", "calibrated", "sum"])]
    assert [cell.text for cell in grid.rows[3]] == ["✓", "✓", *(f"{80 + at}.0 ± 0.0" for at in range(6))]


def test_third_table_goes_turn_by_turn_and_marks_what_is_igm():
    lines = [line("one", "without audio", tuned_as="igm"), line("igm", "IGM")]
    records = [record("igm", seed, 0.5 + 0.01 * seed) for seed in (0, 1)]
    for seed in (0, 1):
        one = record("one", seed, 0.5 + 0.01 * seed)
        for turn in one["after_turn"][2:]:
            turn["scores"]["accuracy"]["mean"] -= 0.1 * seed
        records.append(one)
    made = tables.table(3, lines, records, about=ABOUT, tried={"igm": {0.03: 0.8}})
    grid = made.grids[0]
    assert grid.groups == [("", ["initial"]), *((f"round {number}", list(NAMES)) for number in (1, 2, 4))]
    assert [cell.text for cell in grid.rows[1]] == [
        "IGM", *(f"{value}.5 ± 0.7" for value in (50, 51, 52, 53, 54, 57, 58)),
    ]  # fmt: skip
    assert [cell.marked for cell in grid.rows[0]] == [False, True, True, False, False, False, False, False]
    assert not any(cell.marked for cell in grid.rows[1])
    assert made.results["rows"][0]["tried"] == [{"learning_rate": 0.03, "validation_accuracy": 0.8}]
    figures = list(csv.DictReader(io.StringIO(made.csv())))
    turn = [figure for figure in figures if figure["weights"] == "round 3 after video, validation"]
    assert [(figure["row"], figure["of"], figure["mean"]) for figure in turn] == [
        ("one", "mean", "0.515"), ("igm", "mean", "0.565"),
    ]  # fmt: skip


def test_fourth_table_shows_the_modified_share_and_compares_with_none():
    lines = [line("igm", "head"), line("wide", "50%"), line("none", "0% (none)")]
    shares = {"wide": 0.61, "igm": 0.3, "none": None}  # the widest goes first
    records = [
        record(key, seed, 0.5 + 0.1 * at + 0.01 * seed, projected_share=shares[key])
        for at, key in enumerate(shares)
        for seed in (0, 1)
    ]
    made = tables.table(4, lines, records, about=ABOUT, tried={})
    grid = made.grids[0]
    assert [row[1].text for row in grid.rows] == ["61.0%", "30.0%", "–"]
    assert [row[0].text for row in grid.rows] == ["50%", "head", "0% (none)"]
    rows = rows_of(made.grids[1])
    assert {key: cells[1].text for key, cells in rows.items()} == {
        "50% − 0% (none)": "−20.0 ± 0.0", "head − 0% (none)": "−10.0 ± 0.0",
    }  # fmt: skip


def test_rows_of_the_fourth_table_that_are_the_same_runs_say_so():
    lines = [line("wide", "50%"), line("igm", "head"), line("none", "0% (none)")]
    shares = {"wide": 0.3, "igm": 0.3, "none": None}
    records = [
        record(key, seed, 0.5 + 0.1 * (key == "none"), projected_share=shares[key]) for key in shares for seed in (0, 1)
    ]
    grid = tables.table(4, lines, records, about=ABOUT, tried={}).grids[0]
    assert [row[1].text for row in grid.rows] == ["30.0% = head", "30.0%", "–"]


def test_time_and_memory_are_the_middle_of_the_seeds():
    records = [record("igm", seed, 0.5, seconds_per_step=slow) for seed, slow in enumerate((0.002, 0.9, 0.003))]
    grid = tables.table(1, [line("igm")], records, about=ABOUT, tried={}).grids[-1]
    assert rows_of(grid)["igm"][2].text == "3.00"


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({}, "table-1-watch"),
        ({"protocol": "paper"}, "table-1-watch-paper"),
        ({"methods": ["igm"]}, "table-1-watch-part"),
        ({"protocol": "paper", "methods": ["igm"]}, "table-1-watch-paper-part"),
    ],
)
def test_what_is_not_the_table_itself_has_a_name_of_its_own(about, name):
    assert of_first(**about).name == name


def test_one_seed_has_no_spread_and_no_interval():
    made = tables.table(1, [line("mla"), line("igm")], [record("mla", 0, 0.5), record("igm", 0, 0.6)],
                        about=ABOUT, tried={})  # fmt: skip
    assert rows_of(made.grids[0])["igm"][0].text == "62.0"
    assert rows_of(made.grids[3])["igm"][0] == grids.Cell("+10.0")
    assert "over 1 seed, in percent" in made.plain()


def test_ranks_are_of_what_is_printed():
    lines = [line(key) for key in "abcd"]
    records = [record(key, 0, value) for key, value in zip("abcd", (0.70041, 0.70001, 0.6, 0.5), strict=True)]
    grid = tables.table(1, lines, records, about=ABOUT, tried={}).grids[0]
    assert [row[1].rank for row in grid.rows] == [1, 1, 2, 0]


def test_a_row_without_runs_is_refused():
    with pytest.raises(ValueError, match="table 1: row 'igm' has no run"):
        tables.table(1, [line("igm")], [record("mla", 0, 0.5)], about=ABOUT, tried={})


# Text and files


def test_selection_on_the_test_set_is_said_in_the_first_line():
    made = of_first(protocol="paper")
    assert made.plain().splitlines()[0] == tables.PAPER_WARNING
    assert made.markdown().splitlines()[0] == f"**{tables.PAPER_WARNING}**"
    assert tables.PAPER_WARNING.startswith("SELECTED ON THE TEST SET (--protocol paper)")
    assert json.loads(made.json())["protocol"] == "paper"
    assert {figure["protocol"] for figure in csv.DictReader(io.StringIO(made.csv()))} == {"paper"}
    assert "TEST SET" not in of_first().plain()


def test_terminal_shows_aligned_columns_and_marks():
    cells = [[grids.Cell("one"), grids.Cell("1.0", 1), grids.Cell("22.0", 2, worse=True)],
             [grids.Cell("three"), grids.Cell("–"), grids.Cell("3.0", marked=True)]]  # fmt: skip
    grid = grids.Grid("Title", ["method"], [("group", ["a", "b"])], cells, "A note.")
    assert grid.plain().splitlines() == [
        "Title",
        "",
        "        ── group ───",
        "method     a       b",
        "────────────────────",
        "one     1.0¹  22.0²†",
        "three      –    3.0*",
        "",
        "A note.",
    ]
    assert grid.markdown().splitlines() == [
        "**Title**",
        "",
        "| method | group: a | group: b |",
        "| :-- | --: | --: |",
        "| one | **1.0** | <ins>22.0</ins>† |",
        "| three | – | **3.0** |",
        "",
        "A note.",
    ]


def test_groups_that_do_not_fit_go_below():
    cells = [[grids.Cell("one"), grids.Cell("1.0"), grids.Cell("2.0")]]
    grid = grids.Grid("Title", ["method"], [("first", ["a"]), ("second", ["b"])], cells)
    narrow = grid.plain(20)
    assert max(map(len, narrow.splitlines())) <= 20
    assert narrow.count("method") == 2
    assert grid.plain(200).count("method") == 1


def test_a_whole_table_fits_a_terminal(first):
    assert max(map(len, first.plain(100).splitlines()[2:])) <= 100
    for number, text in (("first", first.plain(100)), ("markdown", first.markdown())):
        for key in ROWS:
            assert key in text, number


def test_files_hold_every_figure(first, tmp_path):
    paths = first.write(tmp_path / "new" / "tables")
    assert [path.name for path in paths] == ["table-1-watch.md", "table-1-watch.csv", "table-1-watch.json"]
    assert tables.Table.read(paths[2]) == first
    text = paths[0].read_text(encoding="utf-8")
    assert "Made by `igm-rs table 1 --data watch`." in text
    assert "Budget: few steps." in text
    assert "Made with torch 2" in text
    with paths[1].open(newline="", encoding="utf-8") as file:
        figures = list(csv.DictReader(file))
    assert list(figures[0]) == [
        "dataset", "protocol", "row", "weights", "measure", "of", "minus", "mean", "sd", "half_width_95", "seeds",
    ]  # fmt: skip
    igm = [figure for figure in figures if figure["row"] == "igm" and figure["of"] == "mean"]
    one = next(figure for figure in igm if (figure["weights"], figure["measure"]) == ("chosen", "accuracy"))
    assert (one["mean"], one["sd"], one["seeds"], one["minus"]) == ("0.74", "0.02", "3", "")
    other = next(figure for figure in igm if (figure["minus"], figure["measure"]) == ("mla", "accuracy"))
    assert (other["mean"], other["half_width_95"]) == ("0.01", "0.0248414")
    last = figures[-1]
    assert (last["row"], last["of"], last["minus"], last["measure"]) == ("igm", "entropy", "igm: mean", "nll")


def test_runs_are_kept_without_their_curves(first):
    run = first.results["rows"][-1]["runs"][0]
    assert "curve" not in run
    assert run["seed"] == 0
    assert run["rounds"] == {"chosen": 2, "last": 4}
    assert first.results["rows"][-1]["of"] == [*NAMES, *evaluation.FUSIONS]
    assert run["scores"]["chosen"]["accuracy"] == [0.7, 0.71, 0.72, 0.73, 0.74, 0.75]
    assert run["temperatures"] == {"audio": 1.25, "video": 1.25}
    assert len(first.json()) < 20_000


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "table file .*x.json does not exist"),
        ("{", ValueError, "table file .*x.json is not as expected: it is no JSON"),
        ("[]", ValueError, "table file .*x.json is not as expected: it has no table, shows, dataset, title"),
        ('{"table": 1, "rows": []}', ValueError, "table file .*x.json is not as expected: it has no shows, dataset"),
        (
            json.dumps({**ABOUT, "table": 1, "shows": "", "rows": [{"key": "igm"}]}),
            ValueError,
            "table file .*x.json is not as expected: it has no words, modalities, learning_rate, tried, of, runs",
        ),
    ],
)
def test_a_broken_table_file_is_named(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(error, match=message):
        tables.Table.read(tmp_path / "x.json")


# The check that a table is reproduced


def shifted(table, by, **versions):
    results = json.loads(table.json())
    results["versions"] |= versions
    for row in results["rows"]:
        for run in row["runs"]:
            for measures in run["scores"].values():
                for measure, listed in measures.items():
                    measures[measure] = [value + by for value in listed]
    return results


def test_the_same_table_is_reproduced(first):
    found = reproduction.compare(first.results, json.loads(first.json()))
    # 2 sets of weights, 4 measures; 2 + 2 + 8 + 6 + 6 + 6 predictions
    assert (found.exact, found.figures, found.largest, found.problems) == (True, 2 * 4 * 30, 0.0, ())
    assert found.text.startswith("reproduced: 240 figures compared, largest difference 0.000000; made with the same")


def test_a_table_from_before_a_value_came_was_made_with_its_default(first):
    stored = json.loads(first.json())
    fresh = json.loads(first.json())
    fresh["config"] = {**stored["config"], **{name: Config().plain()[name] for name in LATER}}
    assert reproduction.compare(fresh, stored).problems == ()
    fresh["config"]["schedule"] = "plateau"
    assert reproduction.compare(fresh, stored).problems == ("schedule is 'plateau', stored 'cosine'",)


def test_the_same_arithmetic_must_give_the_same_figures(first):
    found = reproduction.compare(first.results, shifted(first, 0.001))
    assert len(found.problems) == found.figures
    assert found.largest == pytest.approx(0.001)
    assert found.problems[0] == (
        "single-audio, chosen round, accuracy of audio: 0.510000, stored 0.511000, difference 0.001000, "
        "allowed 0.000002"
    )
    assert found.text.startswith("NOT reproduced")


@pytest.mark.parametrize("other", [{"torch": "3"}, {"processor": "that"}, {"instructions": "few"}])
def test_other_arithmetic_may_differ_by_what_seeds_do(first, other):
    found = reproduction.compare(first.results, shifted(first, 0.029, **other))
    assert (found.exact, found.problems) == (False, ())
    assert "means must agree within 3 points, or 2 standard errors" in found.text
    # igm has a standard deviation of 0.02: two standard errors of a difference are 2 · 0.02 · √(2/3) = 0.0327
    found = reproduction.compare(first.results, shifted(first, 0.031, **other))
    assert {problem.split(",")[0] for problem in found.problems} == ROWS.keys() - {"igm", "joint-sum"}
    found = reproduction.compare(first.results, shifted(first, 0.033, **other))
    assert len(found.problems) == found.figures


def test_a_gpu_is_other_arithmetic(first):
    stored = shifted(first, 0.029)
    del stored["rows"][0]["runs"][0]["device"]  # made on the CPU, before that was kept
    assert reproduction.compare(first.results, stored).exact
    for results in (json.loads(first.json()), stored):
        results["rows"][1]["runs"][0]["device"] = "cuda"
        assert not reproduction.same_arithmetic(results, first.results)
        found = reproduction.compare(first.results, results)
        assert (found.exact, found.problems) == (False, ())


def test_single_runs_of_other_arithmetic_cannot_be_compared(first):
    one, other = json.loads(first.json()), shifted(first, 0.5, processor="that")
    for row in (*one["rows"], *other["rows"]):
        del row["runs"][1:]
    assert reproduction.compare(one, other).problems == ()


def test_another_choice_of_learning_rate_is_told_and_fails_only_with_the_same_arithmetic(first):
    chosen = json.loads(first.json())
    chosen["rows"][-1]["learning_rate"] = 0.01
    line = (
        "row igm: learning rate 0.01 was chosen (0.01: 70.0%, 0.03: 80.0%), stored is 0.03 (0.01: 70.0%, 0.03: 80.0%); "
        "compared with the stored one"
    )
    found = reproduction.compare(first.results, first.results, chosen)
    assert (found.problems, found.notes) == ((line,), ())
    found = reproduction.compare(first.results, shifted(first, 0, torch="3"), chosen)
    assert (found.problems, found.notes) == ((), (line,))
    assert found.text.endswith(f"\n- {line}")
    found = reproduction.compare(chosen, first.results)
    assert found.problems == ("row igm has learning rate 0.01, stored 0.03",)
    assert reproduction.stored_rates(first.results)["igm"] == 0.03


def test_what_was_made_otherwise_is_not_compared(first):
    stored = json.loads(first.json())
    stored["config"] = {"steps": 5}
    stored["dataset"] = "mfeat"
    stored["rows"][0]["runs"].pop()
    del stored["rows"][1]
    found = reproduction.compare(first.results, stored)
    assert found.figures == 0
    assert found.problems == (
        "dataset is 'watch', stored 'mfeat'",
        "steps is 4, stored 5",
        "row single-audio has seeds [0, 1, 2], stored [0, 1]",
        "row single-video has seeds [0, 1, 2], stored None",
    )


# The page


def stored(folder):
    first = of_first()
    first.write(folder / "tables")
    (folder / "figures").mkdir()
    (folder / "figures" / "figure-3-watch.png").write_bytes(b"")
    told = {
        "command": "igm-rs figure 3 --data watch",
        "caption": "A sweep.",
        "dataset": "watch",
        "versions": {"torch": "9"},
        "revision": "abc",
    }
    (folder / "figures" / "figure-3-watch.json").write_text(json.dumps(told))
    (folder / "findings.md").write_text("## Findings\n\nNothing helps.\n")
    return first


def test_page_has_every_table_and_picture_under_its_command(tmp_path):
    first = stored(tmp_path)
    path = page.write(tmp_path)
    assert path == tmp_path / "README.md"
    text = path.read_text(encoding="utf-8")
    assert "Nothing helps." in text
    assert "- watch: [Table 1](#table-1-watch), [Figure 3](#figure-3-watch)" in text
    assert text.count("```\nigm-rs table 1 --data watch\n```") == 1
    assert text.count("```\nigm-rs figure 3 --data watch\n```") == 1
    assert "![Figure 3 on watch](figures/figure-3-watch.png)" in text
    assert "A sweep. Numbers: [JSON](figures/figure-3-watch.json)." in text
    assert "Numbers: [JSON](tables/table-1-watch.json), [CSV](tables/table-1-watch.csv)." in text
    for grid in first.grids:
        assert grid.markdown() in text
    opened, folded = text.split("<details>")[0], text[text.index("<details>") : text.index("</details>")]
    start = first.grids[0].opening(2)
    assert [name for name, _ in start.groups] == ["accuracy", "MAP"]
    assert start.markdown() in opened
    assert first.grids[0].markdown() in folded  # all of it
    assert first.grids[1].markdown() in folded
    effects = [grid for grid in first.grids if grid.title.startswith("What")]
    assert [grid.markdown() in opened for grid in effects] == [True, False]
    assert opened.index("- watch: [Table 1]") < opened.index("Nothing helps.")
    assert text.count("Budget: few steps.") == 1
    assert "figure-3-watch: made with torch 9 at revision abc." in text
    assert page.page(tmp_path) == text


def test_page_says_which_tables_were_selected_on_the_test_set(tmp_path):
    stored(tmp_path)
    of_first(protocol="paper").write(tmp_path / "tables")
    text = page.page(tmp_path)
    assert f"**{tables.PAPER_WARNING}**" in text
    assert "[Table 1](#table-1-watch), [Table 1 (selected on the test set)](#table-1-watch-paper)" in text
    assert "### Table 1 on watch (selected on the test set): all methods" in text


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda at: (at / "findings.md").unlink(), FileNotFoundError, "findings.md does not exist, expected the findi"),
        (
            lambda at: (at / "tables" / "table-1-watch.json").unlink(),
            FileNotFoundError,
            r"tables has no table-\*.json, expected at least one table",
        ),
        (
            lambda at: (at / "figures" / "figure-3-watch.json").unlink(),
            ValueError,
            "figure-3-watch.png has no numbers that can be read beside it",
        ),
        (
            lambda at: (at / "figures" / "figure-3-watch.json").write_text('{"command": "x"}'),
            ValueError,
            "figure-3-watch.json is not as expected: it has no caption",
        ),
        (
            lambda at: (at / "figures" / "figure-x.png").write_bytes(b""),
            ValueError,
            "figure-x.png is called otherwise than figure-FIGURE-DATASET.png",
        ),
    ],
)
def test_page_names_what_is_missing(tmp_path, spoil, error, message):
    stored(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        page.page(tmp_path)


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.skipif(not (RESULTS / "tables").is_dir(), reason="the repository has no stored tables")
def test_the_page_of_the_repository_is_made_from_its_files():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page.page(RESULTS)


# The commands


def test_a_table_is_made_printed_written_and_compared(tmp_path, capsys):
    told = [
        *("table", "3", "--data", "mfeat", "--out", str(tmp_path), "--workers", "1", "--learning-rate", "0.05"),
        *("--steps", "6", "--turn-steps", "2", "--seeds", "2"),
    ]
    assert command.main(told) == 0
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[0] == "Table 3: one-sided modification, turn by turn. mfeat: handwritten digits"
    file = tmp_path / "tables" / "table-3-mfeat.json"
    assert str(file) in printed
    made = tables.Table.read(file)
    assert made.plain() in printed
    by_turn = made.grids[0]
    assert [name for name, _ in by_turn.groups] == ["", "round 1", "round 2", "round 3"]
    names = made.results["modalities"]
    igm = by_turn.rows[-1]
    for unused, row in zip(names, by_turn.rows, strict=False):
        # up to the first turn whose T is left out; the first of all turns has none
        same = 1 + (names.index(unused) + 1 if unused != names[-1] else len(names))
        assert [cell.text for cell in row[1 : 1 + same]] == [cell.text for cell in igm[1 : 1 + same]]
        assert all(cell.marked for cell in row[1 : 1 + same])
    assert command.main([*told, "--compare", str(file)]) == 0
    assert "reproduced: " in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text(json.dumps(shifted(made, 0.01)))
    assert command.main([*told, "--compare", str(other)]) == 1
    assert "NOT reproduced: " in capsys.readouterr().out


def test_a_table_of_the_papers_protocol_says_so_first(tmp_path, capsys):
    told = [
        *("table", "1", "--methods", "turns", "mla", "--data", "mfeat", "--out", str(tmp_path), "--workers", "1"),
        *("--learning-rate", "0.05", "--steps", "2", "--turn-steps", "1", "--seeds", "1", "--protocol", "paper"),
    ]
    assert command.main(told) == 0
    assert capsys.readouterr().out.strip().splitlines()[0] == tables.PAPER_WARNING
    text = (tmp_path / "tables" / "table-1-mfeat-paper-part.md").read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"**{tables.PAPER_WARNING}**"
    assert "--protocol paper" in text.split("Made by `")[1].splitlines()[0]


def test_the_page_is_a_command(tmp_path, capsys):
    stored(tmp_path)
    assert command.main(["page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page.page(tmp_path)
    (tmp_path / "findings.md").unlink()
    assert command.main(["page", "--out", str(tmp_path)]) == 1
    assert "findings.md does not exist, expected the findings in words" in capsys.readouterr().err


def test_the_list_is_a_command(capsys):
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out.strip() == listing.listing()


# Listing


def test_listing_has_every_data_set_method_table_and_figure():
    text = listing.listing()
    for name in ("watch", "mfeat", "openclipart"):
        assert f"\n  {name}\n" in text
    assert "1271 train, 251 validation, 707 test" in text
    assert "accelerometer (series of 3 × 200)" in text
    assert "always the most frequent class 16.3% (of training)" in text
    assert "BSD 3-Clause" in text
    for key in plans.METHODS:
        assert f"\n  {key} " in text
    assert "\n  4  how much of the network is modified" in text
    assert "\n  5c  training time" in text


def test_listing_says_which_data_set_cannot_be_read(tmp_path):
    assert "\n  watch: cannot be read: data file" in listing.listing(tmp_path)
