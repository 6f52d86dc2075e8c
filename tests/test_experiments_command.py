"""The command igm-rs and its configuration: every value from file and command line, what is said, what is written."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import filed_sets
import pytest
import trees_b

import igm_rs
from igm_rs.experiments import command, configuration, data, plans, registering, running
from igm_rs.experiments.configuration import Config, load_config, override
from igm_rs.experiments.feeding import Means
from igm_rs.experiments.methods import METHODS

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).with_name("toy_sets.py")
WORDS = ["--data", "toy", "--register", str(TOY), "--workers", "1", "--seeds", "2"]
SHORT = ["--steps", "4", "--turn-steps", "2", "--batch-size", "16"]


def call(*words):
    return command.main([str(word) for word in words])


# Configuration


@pytest.mark.parametrize("name", ["watch", "mfeat", "openclipart"])
def test_each_shipped_set_has_a_readable_file(name):
    text = (configuration.FOLDER / f"{name}.toml").read_text()
    assert text.startswith("# ")
    config = load_config(name)
    assert config.data == name
    assert config.protocol == "validation"
    assert config.seeds == 5
    assert name in data.names()
    # what the file leaves out has no sensible text: none; or is for other sets, or one method
    named = set(re.findall(r"^(\w+) =", text, re.MULTILINE))
    left_out = {
        "data",
        "scope",
        "sources",
        "learning_rate",
        "network",
        "patience",
        "released",
        "rho_head",
        "rate_passes",
    }
    assert {each.name for each in fields(Config)} - named == left_out


def test_all_sets_have_the_same_budget_and_grid_for_every_method():
    """Nothing in a configuration is said for one method alone but what only it has."""
    own = {"rho", "tau", "trunk_tau", "alpha", "scope", "sources"}
    assert not own & {"steps", "rates", "tuning_seeds", "learning_rate", "momentum", "weight_decay"}
    for method in METHODS.values():
        assert not hasattr(method, "steps")
        assert not hasattr(method, "rates")


def test_a_set_without_a_file_takes_the_default(tmp_path):
    assert load_config("toy") == override(Config(), {"data": "toy"})
    file = tmp_path / "mine.toml"
    file.write_text("rho = 0.02\nrates = [0.1]\n[sources]\na = 'none'\nb = 'a'\n")
    config = load_config("toy", {"rho": 0.03}, file)
    assert (config.rho, config.rates, config.sources) == (0.03, (0.1,), {"a": None, "b": "a"})
    assert json.loads(json.dumps(config.plain()))["rates"] == [0.1]
    assert hash(config) == hash(load_config("toy", {"rho": 0.03}, file))


def test_turns_use_up_the_budget():
    lengths = [load_config("toy", {"steps": steps, "turn_steps": 40}).turn_lengths for steps in (80, 85, 3)]
    assert lengths == [[40, 40], [40, 40, 5], [3]]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, expected an integer from 1"),
        ({"steps": 1.5}, TypeError, "steps is 1.5, expected an integer"),
        ({"seeds": True}, TypeError, "seeds is True, expected an integer"),
        ({"first_seed": -1}, ValueError, "first_seed is -1, expected an integer from 0"),
        ({"rho": -0.1}, ValueError, "rho is -0.1, expected a finite number >= 0"),
        ({"tau": float("nan")}, ValueError, "tau is nan, expected a finite number >= 0"),
        ({"alpha": 0}, ValueError, "alpha is 0, expected a finite number > 0"),
        ({"momentum": 1.0}, ValueError, r"momentum is 1.0, expected a number in \[0, 1\)"),
        ({"weight_decay": "x"}, TypeError, "weight_decay is 'x', expected a number"),
        ({"scope": 1.5}, ValueError, r"scope is 1.5, expected a share in \[0, 1\] or none"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0, expected a finite number > 0"),
        ({"rates": []}, ValueError, r"rates is \[\], expected one learning rate or more, each once"),
        ({"rates": [0.1, 0.1]}, ValueError, r"rates is \[0.1, 0.1\], expected one learning rate or more, each once"),
        ({"rates": 0.1}, TypeError, "rates is 0.1, expected a list"),
        ({"rates": [-1.0]}, ValueError, "rates is -1.0, expected a finite number > 0"),
        ({"tuning_seeds": ["a"]}, TypeError, "tuning_seeds is 'a', expected an integer"),
        ({"tuning_seeds": [104]}, ValueError, r"tuning_seeds is \[104\], expected none of the final seeds 100 to 104"),
        ({"base": "lion"}, ValueError, "base is 'lion', expected 'sgd' or 'adam'"),
        ({"protocol": "test"}, ValueError, "protocol is 'test', expected 'validation' or 'paper'"),
        ({"rho_head": -0.1}, ValueError, "rho_head is -0.1, expected a finite number >= 0"),
        ({"rate_passes": 0}, ValueError, "rate_passes is 0, expected an integer from 1"),
        ({"sources": "b"}, TypeError, "sources is 'b', expected a mapping of modality to modality or None"),
        ({"rhoo": 1}, ValueError, "there is no setting 'rhoo', expected some of alpha, base, batch_size"),
    ],
)
def test_unfit_values_are_refused_with_the_file(values, error, message):
    with pytest.raises(error, match=f"configuration watch.toml: {message}"):
        load_config("watch", values)


def test_unfit_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"configuration file .*none\.toml does not exist"):
        load_config("toy", file=tmp_path / "none.toml")
    file = tmp_path / "torn.toml"
    file.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"configuration file .*torn\.toml is no TOML file that can be read"):
        load_config("toy", file=file)


# The command line


def test_every_value_can_be_overridden(monkeypatch, tmp_path):
    given = {
        "steps": ("7", 7), "turn_steps": ("3", 3), "batch_size": ("9", 9), "base": ("adam", "adam"),
        "momentum": ("0.5", 0.5), "weight_decay": ("0", 0.0), "rho": ("0.02", 0.02), "tau": ("1", 1.0),
        "trunk_tau": ("10", 10.0), "alpha": ("0.2", 0.2), "scope": ("0.3", 0.3),
        "sources": ("a=none,b=a", {"a": None, "b": "a"}), "rates": ("0.1 0.2", (0.1, 0.2)),
        "learning_rate": ("0.4", 0.4), "tuning_seeds": ("1 2 3", (1, 2, 3)), "first_seed": ("50", 50),
        "seeds": ("4", 4), "protocol": ("paper", "paper"), "network": ("default", "default"),
        "schedule": ("plateau", "plateau"),
        "patience": ("2", 2), "released": ("shape kept", ("kept", "shape")),
        "rho_head": ("0.01", 0.01), "rate_passes": ("3", 3),
    }  # fmt: skip
    assert {each.name for each in fields(Config)} - set(given) == {"data"}
    apart = {name: given.pop(name) for name in ("momentum", "learning_rate")}  # have no part beside adam and rates
    for several in (given, apart):
        words = [word for name, (text, _) in several.items() for word in (command._option(name), *text.split())]
        options = command._parser().parse_args(
            ["train", "--method", "igm", "--data", "toy", "--register", str(TOY), *words, "--out", str(tmp_path)]
        )
        _, config, _ = command._begin(options)
        found = {name: getattr(config, name) for name in several}
        assert found == {name: value for name, (_, value) in several.items()}
        again = shlex.split(command._command(options).replace("train ''", "train --method igm"))
        assert again[0] == "igm-rs"
        again[again.index("--register") + 1] = str(TOY)
        assert command._begin(command._parser().parse_args([*again[1:], "--out", str(tmp_path)]))[1] == config
    words = ["train", "--method", "igm", "--data", "toy", "--scope", "none", "--out", str(tmp_path)]
    assert command._begin(command._parser().parse_args(words))[1].scope is None


def test_runs_stand_side_by_side_where_they_are_small(tmp_path, monkeypatch):
    filed_sets.write(tmp_path / "filed")
    train = ["train", "--method", "igm", "--out", str(tmp_path / "out"), "--data"]
    filed = ["filed", "--folder", str(tmp_path / "filed")]

    def workers(*words):
        options = command._parser().parse_args([*train, *words])
        command._begin(options)
        return options.workers

    assert workers("mfeat") == configuration.cores()
    monkeypatch.setattr(command, "_means", lambda options: Means("cuda", 0))
    assert workers("mfeat", "--device", "cuda") == 1
    assert workers(*filed) == 1
    assert workers(*filed, "--workers", "3") == 3


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"igm-rs {igm_rs.__version__}\n"


def test_a_users_own_method_may_go_by_any_value(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "from igm_rs.experiments.methods import Method, base_optimizer, method\n"
        "@method\nclass Own(Method):\n    key = 'own'\n    label = 'own'\n    schedule = 'joint'\n"
        "    def optimizer(self, model, modalities, config, learning_rate, batches, seed=0):\n"
        "        return base_optimizer(model, config, config.tau * learning_rate)\n"
    )
    told = ["train", "--method", "own", "--data", "toy", "--tau", "1", "--register", str(own), str(TOY)]
    told += ["--learning-rate", "0.1", "--steps", "2", "--turn-steps", "1", "--seeds", "1", "--workers", "1"]
    assert command.main([*told, "--out", str(tmp_path / "out")]) == 0
    assert "1 seed\n" in capsys.readouterr().out
    from igm_rs.experiments.methods import METHODS

    del METHODS["own"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train", "--data", "toy"], "the following arguments are required: --method"),
        (["table", "1"], "the following arguments are required: --data"),
        (["table", "9", "--data", "toy"], "argument number: invalid choice: 9"),
        (["figure", "2", "--data", "toy"], "argument name: invalid choice: '2'"),
        (["table", "1", "--data", "toy", "--workers", "0"], "argument --workers: '0' is not a positive integer"),
        (["table", "1", "--data", "toy", "--workers", "x"], "argument --workers: 'x' is not a positive integer"),
        (["table", "1", "--data", "toy", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["table", "1", "--data", "toy", "--sources", "a"], "'a' is not such as audio=video,video=none"),
        (["table", "1", "--data", "toy", "--protocol", "test"], "argument --protocol: invalid choice: 'test'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "igm", "--data", "iris"], "data set is 'iris', expected one of watch, mfeat"),
        (["train", "--method", "ogm", "--data", "toy"], "method is 'ogm', expected one of single, joint-concat"),
        (["table", "1", "--data", "toy", "--methods", "ogm"], "method is 'ogm', expected one of"),
        (["table", "2", "--data", "toy", "--methods", "igm"], "methods: table 2 is about the methods that it has"),
        (["table", "1", "--data", "toy", "--rho", "-1"], "configuration default.toml: rho is -1.0, expected"),
        (["table", "1", "--data", "toy", "--steps", "0"], "configuration default.toml: steps is 0, expected"),
        (["train", "--method", "igm", "--data", "toy", "--sources", "a=c"], "sources names 'c', expected a, b or none"),
        (
            ["train", "--method", "igm", "--data", "toy", "--sources", "a=b"],
            "sources has no 'b', expected whose T acts on",
        ),
        (
            ["train", "--method", "igm-one-sided", "--data", "toy"],
            "method is 'igm-one-sided' without --sources, expected it",
        ),
        (
            ["table", "1", "--data", "toy", "--methods", "igm-one-sided"],
            "methods has igm-one-sided, which is that of table 3",
        ),
        (
            ["train", "--method", "mla", "--data", "toy", "--tau", "5"],
            "--tau has no part in mla, expected one of igm-no-sam, igm",
        ),
        (
            ["train", "--method", "turns", "single", "--data", "toy", "--rho", "1"],
            "--rho has no part in turns, single, exp",
        ),
        (
            ["train", "--method", "igm-shared", "--data", "toy", "--scope", "1"],
            "--scope has no part in igm-shared, expected",
        ),
        (
            ["table", "1", "--data", "toy", "--methods", "mla", "--tau", "1"],
            "--tau has no part in mla, expected one of igm-no-sam",
        ),
        (
            ["table", "2", "--data", "toy", "--rho", "0"],
            "rho is 0 and tau 0.4, expected both above 0: table 2 is with and",
        ),
        (
            ["table", "3", "--data", "toy", "--sources", "a=b,b=a"],
            "sources is given, expected none: table 3 has its own",
        ),
        (
            ["table", "4", "--data", "toy", "--scope", "0.3"],
            "scope is 0.3, expected none: table 4 has its own for every",
        ),
        *(
            (
                ["table", "5", "--data", "toy", *words],
                f"{name} is given, expected none: not every row of table 5 goes by",
            )
            for name, words in (
                ("scope", ["--scope", "0.3"]),
                ("sources", ["--sources", "a=b,b=a"]),
                ("rho_head", ["--rho-head", "0.01"]),
            )
        ),
        (
            ["table", "1", "--data", "toy", "--base", "adam", "--momentum", "0.5"],
            "momentum is 0.5 with base adam, expected",
        ),
        (
            ["table", "1", "--data", "toy", "--learning-rate", "1", "--rates", "1"],
            "rates or tuning_seeds beside learning_r",
        ),
        (["table", "1", "--data", "watch", "--folder", "/nowhere"], "data file /nowhere/watch.npz does not exist"),
        (["table", "1", "--data", "toy", "--config", "/nowhere.toml"], "configuration file /nowhere.toml does not"),
        (["table", "1", "--data", "toy", "--compare", "/nowhere.json"], "table file /nowhere.json does not exist"),
        (
            ["figure", "4", "--data", "toy", "--protocol", "paper"],
            "protocol is 'paper', expected 'validation': fig",
        ),
        (
            ["figure", "1", "--data", "toy", "--tau", "0"],
            "rho is 0.05 and tau 0, expected both above 0: figure 1",
        ),
        (
            ["figure", "5a", "--data", "toy", "--alpha", "1"],
            "--alpha has no part in igm-no-sam, igm, expected one",
        ),
        (
            ["figure", "3", "--data", "toy", "--trunk-tau", "1"],
            "--trunk-tau has no part in igm, expected one of igm",
        ),
        *(
            (
                ["figure", name, "--data", "toy", "--resume", *words],
                f"--resume has no part in figure {name}, expected none",
            )
            for name, words in (("5c", []), ("1", ["--learning-rate", "0.1"]), ("4", ["--learning-rate", "0.1"]))
        ),
        (
            ["figure", "5c", "--data", "toy", "--seeds", "3"],
            "--seeds has no part in figure 5c, expected none: it",
        ),
        (["list", "--register", "/nowhere.py"], "file /nowhere.py does not exist"),
        (["page", "--out", "/nowhere"], "file /nowhere/findings.md does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_any_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "run_all", lambda *_, **__: pytest.fail("trained"))
    registering.register_files([TOY])
    assert command.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_an_output_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("train", "--method", "igm", *WORDS, "--out", tmp_path / "file" / "out") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_values_of_the_wrong_type_in_a_file_are_said(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("steps = 'many'\n")
    assert call("train", "--method", "igm", *WORDS, "--config", file, "--out", tmp_path) == 1
    assert capsys.readouterr().err == "error: configuration mine.toml: steps is 'many', expected an integer\n"


def test_interrupts_are_said(monkeypatch, tmp_path, capsys):
    for error, words in (
        (running.InterruptedRuns, "interrupted: runs under way were saved; the same command with --resume goes on\n"),
        (KeyboardInterrupt, "interrupted: finished runs are kept\n"),
    ):

        def interrupted(*_, error=error, **__):
            raise error

        monkeypatch.setattr(running, "tune", interrupted)
        assert call("train", "--method", "igm", *WORDS, "--out", tmp_path) == 130
        assert capsys.readouterr().err == words

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("igm_rs.experiments.figures"), "figure", stopped)
    for name, words in (
        ("4", "interrupted: of this figure only runs that choose a learning rate are kept, where it has any\n"),
        ("5c", "interrupted: of this figure nothing is kept\n"),
    ):
        assert call("figure", name, *WORDS[:-2], "--out", tmp_path) == 130  # --seeds has no part in 5c
        assert capsys.readouterr().err == words

    monkeypatch.setattr(importlib.import_module("igm_rs.experiments.on_disk.check"), "check", stopped)
    assert call("data", "check", "crema-d", tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"  # a check keeps nothing

    def lost(*_, **__):
        raise running.ProcessLostError("a process ended")

    monkeypatch.setattr(running, "tune", lost)
    assert call("train", "--method", "igm", *WORDS, "--out", tmp_path) == 1
    assert capsys.readouterr().err == "error: a process ended\n"


# What is done


def test_train_prints_what_each_method_reaches(tmp_path, capsys):
    words = [*WORDS, *SHORT, "--learning-rate", "0.05", "--out", tmp_path]
    assert call("train", "--method", "single", "joint-concat", "gentle", *words) == 0
    said = capsys.readouterr().out
    assert "toy: made on the spot: test accuracy in percent at the chosen round, 2 seeds" in said
    for label in ("a alone", "b alone", "joint, concatenation", "gentle turns"):
        assert re.search(rf"^{label}  +0\.05 +[\d.–]+", said, re.MULTILINE)
    assert f"Runs: {tmp_path / 'runs' / 'toy'}" in said
    assert len(list(tmp_path.glob("runs/toy/*/*/*/run.json"))) == 8


def test_the_papers_protocol_is_said_first(tmp_path, capsys):
    words = [*WORDS, *SHORT, "--learning-rate", "0.05", "--out", tmp_path, "--protocol", "paper"]
    assert call("train", "--method", "igm", *words) == 0
    assert capsys.readouterr().out.strip().startswith("SELECTED ON THE TEST SET (--protocol paper)")
    assert call("table", "2", *words) == 0
    assert capsys.readouterr().out.strip().startswith("SELECTED ON THE TEST SET (--protocol paper)")
    text = (tmp_path / "tables" / "table-2-toy-paper.md").read_text()
    assert text.startswith("**SELECTED ON THE TEST SET")
    assert "THE ROUND WITH THE HIGHEST TEST ACCURACY" in text


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """All four tables of the toy set, with the runs they share."""
    out = tmp_path_factory.mktemp("results")
    words = [*WORDS, *SHORT, "--rates", "0.02", "0.05", "--tuning-seeds", "7", "--out", out]
    statuses = [call("table", number, *words) for number in plans.TABLES]
    return out, words, statuses


def test_every_table_is_made_and_written(tables):
    out, _, statuses = tables
    assert statuses == [0] * len(plans.TABLES)
    names = {f"table-{number}-toy.{ending}" for number in plans.TABLES for ending in ("md", "csv", "json")}
    assert {path.name for path in (out / "tables").iterdir()} == names
    first = json.loads((out / "tables" / "table-1-toy.json").read_text())
    assert first["command"] == (
        "igm-rs table 1 --data toy --steps 4 --turn-steps 2 --batch-size 16 --rates 0.02 0.05 --tuning-seeds 7 "
        "--seeds 2 --register toy_sets.py"
    )
    keys = [row["key"] for row in first["rows"]]
    assert keys[:3] == ["single-a", "single-b", "joint-concat"]
    assert "gentle" in keys
    assert first["config"]["steps"] == 4
    third = json.loads((out / "tables" / "table-3-toy.json").read_text())
    assert {row["tuned_as"] for row in third["rows"]} == {"igm"}


def test_tables_share_their_runs(tables, monkeypatch, capsys):
    _, words, _ = tables
    monkeypatch.setattr(running, "run_job", lambda *_, **__: pytest.fail("a run was made twice"))
    assert call("table", "1", *words, "--methods", "igm", "turns") == 0
    assert "IGM" in capsys.readouterr().out
    assert call("table", "1", *words) == 0


def test_a_table_is_compared_with_a_stored_one(tables, tmp_path, capsys):
    out, words, _ = tables
    stored = out / "tables" / "table-2-toy.json"
    copy = tmp_path / "stored.json"
    copy.write_text(stored.read_text())
    assert call("table", "2", *words, "--compare", copy) == 0
    assert "reproduced: " in capsys.readouterr().out
    assert call("table", "2", *words, "--compare", copy, "--rho", "0.02") == 1
    said = capsys.readouterr().out
    assert "NOT reproduced" in said
    assert "rho is 0.02, stored 0.05" in said


def test_the_page_is_written(tables, capsys):
    out, _, _ = tables
    (out / "findings.md").write_text("What was found.\n")
    assert call("page", "--out", out) == 0
    assert capsys.readouterr().out == f"Written: {out / 'README.md'}\n"
    assert "What was found." in (out / "README.md").read_text()


def test_a_figure_is_passed_on(tmp_path, monkeypatch, capsys):
    figures = importlib.import_module("igm_rs.experiments.figures")
    seen = []
    monkeypatch.setattr(figures, "figure", lambda *given, **named: seen.append((given, named)) or (Path("x.png"),))
    assert call("figure", "5a", *WORDS, "--out", tmp_path) == 0
    ((name, config, out), named) = seen[0]
    assert (name, config.data, out, named["seeds"]) == ("5a", "toy", tmp_path, 2)
    assert named["command"] == "igm-rs figure 5a --data toy --seeds 2 --register toy_sets.py"
    assert capsys.readouterr().out == "Written: x.png\n"


def test_the_list_names_what_there_is(capsys):
    assert call("list", "--register", TOY) == 0
    said = capsys.readouterr().out
    for word in ("watch", "mfeat", "openclipart", "toy", "igm-shared", "gentle", "5c"):
        assert re.search(rf"^  {word}\b", said, re.MULTILINE)


# What it needs


def said_without(package, words, folder):
    """Run the command where a package is missing; return what it says as it fails."""
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from igm_rs.experiments.command import main; sys.exit(main({words!r}))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=folder)
    assert told.returncode == 1
    return told.stderr


@pytest.mark.parametrize("package", ["matplotlib", "torchmetrics", "tqdm", "tensorboard"])
def test_a_missing_package_is_named_with_what_to_install(package, tmp_path):
    words = ["figure", "1"] if package == "matplotlib" else ["train", "--method", "igm"]
    said = said_without(package, [*words, "--data", "watch"], tmp_path)
    assert said == f"error: the experiments need {package}: pip install 'igm-rs[experiments]'\n"


@pytest.mark.parametrize("package", ["soundfile", "torchvision", "PIL", "torchaudio"])
def test_a_package_that_decodes_is_named_with_its_extra(package, tmp_path):
    said = said_without(package, ["data", "check", "crema-d", str(tmp_path)], tmp_path)
    assert said == f"error: the paper's data sets and networks need {package}: pip install 'igm-rs[paper]'\n"


@pytest.mark.parametrize("loaders", ["0", "1"])
@pytest.mark.parametrize("package", ["av", "cv2"])
def test_a_package_that_decodes_videos_is_named_wherever_they_are_decoded(package, loaders, tmp_path):
    trees_b.nvgesture(tmp_path, classes=25, later=1)
    words = ["data", "check", "nvgesture", str(tmp_path), "--network", "small", "--loaders", loaders]
    said = said_without(package, words, tmp_path)
    assert said == f"error: the paper's data sets and networks need {package}: pip install 'igm-rs[paper]'\n"


def test_any_other_missing_package_is_no_matter_of_the_extra():
    extra = importlib.import_module("igm_rs.experiments.extra")
    with pytest.raises(ModuleNotFoundError):
        extra.what_to_install(ModuleNotFoundError("no", name="somewhere"))


def test_help_imports_none_of_them(tmp_path):
    program = (
        "import sys\nfrom igm_rs.experiments.command import main\n"
        "try:\n    main(['table', '--help'])\nexcept SystemExit:\n    print(*sys.modules)"
    )
    told = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True,
                          cwd=tmp_path)  # fmt: skip
    said, loaded = told.stdout.rsplit("\n", 2)[0], told.stdout.splitlines()[-1].split()
    assert "values of the configuration" in said
    for each in fields(Config):
        assert each.name == "data" or command._option(each.name) in said
    assert not {"matplotlib", "torchmetrics", "tensorboard"} & set(loaded)  # torch itself takes tqdm if it is there
    assert not told.stderr


def test_it_runs_as_a_module_and_is_installed_as_a_command(tmp_path):
    told = subprocess.run([sys.executable, "-W", "error", "-m", "igm_rs.experiments", "--help"], capture_output=True,
                          text=True, check=True, cwd=tmp_path)  # fmt: skip
    assert "usage: igm-rs" in told.stdout
    text = (ROOT / "pyproject.toml").read_text()
    assert 'igm-rs = "igm_rs.experiments.command:main"' in text
    assert re.search(r"^demo: install\n\t\$\(BIN\)/igm-rs table 1 ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_core_imports_nothing_of_the_experiments():
    found = subprocess.run(
        [sys.executable, "-c", "import igm_rs, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    loaded = found.stdout.split()
    assert "igm_rs.optimizer" in loaded
    assert not {"matplotlib", "torchmetrics", "igm_rs.experiments"} & set(loaded)
