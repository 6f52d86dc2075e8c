"""The paper's five sets from small trees: one command trains, measures, resumes, and prints the table or the figure."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import trees_a
import trees_b

from igm_rs import analysis
from igm_rs.experiments import command, configuration, data, figures, finetuning, running, tables
from igm_rs.experiments.columns import Reading
from igm_rs.experiments.configuration import load_config
from igm_rs.experiments.methods import Row
from igm_rs.experiments.running import Job, Source
from igm_rs.experiments.training import Training

WRITERS = {
    "crema-d": trees_a.write_crema,
    "kinetics-sounds": trees_a.write_kinetics,
    "twitter2015": trees_b.twitter2015,
    "sarcasm": trees_b.sarcasm,
    "nvgesture": trees_b.nvgesture,
}
MODALITIES = {
    "crema-d": ("audio", "video"),
    "kinetics-sounds": ("audio", "video"),
    "twitter2015": ("text", "image"),
    "sarcasm": ("text", "image"),
    "nvgesture": ("rgb", "flow", "depth"),
}
SHORT = ("--network", "small", "--steps", "4", "--turn-steps", "2", "--batch-size", "6", "--seeds", "1")
QUIET = "ignore:rho = .* is below the resolution of the weights"
"""What is said of the paper's ρ, and rightly."""


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Every tree, written when it is asked for."""

    class Trees(dict):
        def __missing__(self, name):
            folder = tmp_path_factory.mktemp(name) / "tree"
            folder.mkdir()
            WRITERS[name](folder)
            self[name] = folder
            return folder

    return Trees()


def words_of(name, trees, *more, out):
    root = ["--data", name, "--data-root", str(trees[name])]
    return [*more, *root, *SHORT, "--out", str(out), "--workers", "1"]


def records_of(out):
    found = [json.loads(path.read_text()) for path in sorted(out.rglob("run.json"))]
    assert found
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_a_set_has_the_papers_configuration(name):
    config = load_config(name)
    text_image = name in ("twitter2015", "sarcasm")
    assert config.base == ("adam" if text_image else "sgd")
    assert config.learning_rate == (1e-5 if text_image else 1e-2)
    assert config.batch_size == (6 if name == "nvgesture" else 12)
    assert config.tau == 0.4
    assert set(config.rho) == set(MODALITIES[name])
    assert config.rho == {each: 1e-10 if each == "audio" else 1e-15 for each in MODALITIES[name]}
    assert (config.momentum, config.weight_decay, config.schedule) == (0.9, 1e-4, "plateau")
    assert config.steps % config.turn_steps == 0
    assert (configuration.FOLDER / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("name", WRITERS)
def test_one_command_trains_measures_and_prints_the_table(name, trees, tmp_path, capsys):
    methods = ["joint-sum", "mla", "igm"] if name == "nvgesture" else ["single", "joint-sum", "sam", "mla", "igm"]
    assert command.main(words_of(name, trees, "table", "1", "--methods", *methods, out=tmp_path)) == 0
    told = capsys.readouterr().out
    assert f"Table 1: all methods. {data.known_set(name).title}" in told
    assert "Chosen round, test" in told
    for label in ("joint, sum", "MLA", "IGM"):
        assert label in told
    table = tables.Table.read(tmp_path / "tables" / f"table-1-{name}-part.json")
    assert table.results["modalities"] == list(MODALITIES[name])
    assert table.results["config"]["network"] == "small"
    assert f"--data {name} " in table.results["command"]
    assert str(trees[name]) not in table.results["command"]
    for record in records_of(tmp_path):
        scores = record["chosen"]["scores"]
        assert set(scores) == {"accuracy", "by_origin", "map", "macro_f1", "nll"}
        assert record["device"] == "cpu"
        assert record["skipped"] == 0


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_run_goes_on_to_the_same_numbers(name, trees, tmp_path):
    whole, left = tmp_path / "whole", tmp_path / "left"
    train = ("train", "--method", "igm")
    assert command.main(words_of(name, trees, *train, out=whole)) == 0
    (record,) = records_of(whole)

    source = Source(trees[name], (), Reading())
    overrides = {"network": "small", "steps": 4, "turn_steps": 2, "batch_size": 6, "seeds": 1}
    config = load_config(name, overrides)
    job = Job(config, Row("igm", MODALITIES[name]), config.first_seed, config.learning_rate, True)
    folder = job.folder(left, source.digest(config))
    calls = iter(range(100))
    stop = lambda: next(calls) == 3  # noqa: E731  # in the middle of the second turn
    assert running.run_job(job, source.of(config), folder, lambda _: None, stop) is None
    assert (folder / "checkpoint.pt").is_file()

    assert command.main(words_of(name, trees, *train, "--resume", "--loaders", "1", out=left)) == 0
    (again,) = records_of(left)
    assert not (folder / "checkpoint.pt").exists()
    for told in ("curve", "chosen", "last", "temperatures"):
        assert again[told] == record[told]


def test_what_comes_with_a_command_is_in_the_command_of_its_table(trees, tmp_path, capsys):
    folder = tmp_path / "shared"
    shutil.copytree(trees["crema-d"], folder)
    listed = (folder / "annotations" / "train.csv").read_text()
    (folder / "annotations" / "valid.csv").write_text("".join(line + "\n" for line in listed.splitlines()[:6]))
    (folder / "annotations" / "train.csv").write_text(
        "".join(line + "\n" for line in [*listed.splitlines()[6:], "1001_no_such,NEU"])
    )
    words = [
        "table",
        "2",
        "--data",
        "crema-d",
        "--data-root",
        str(folder),
        *SHORT,
        "--rho",
        "0.05",
        "--workers",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert command.main(words) == 1
    said = capsys.readouterr().err
    assert "train.csv, line 13" in said
    assert "--skip-broken" in said
    assert command.main([*words, "--skip-broken"]) == 0
    caught = capsys.readouterr()
    assert caught.err.startswith("left out of crema-d: 2 missing files; see igm-rs data check\n")
    table = tables.Table.read(tmp_path / "tables" / "table-2-crema-d.json")
    assert "--skip-broken" in table.results["command"]


@pytest.mark.parametrize(
    ("number", "of"),
    [*((number, "crema-d") for number in (2, 3, 4, 5)), (3, "nvgesture"), (2, "twitter2015"), (5, "sarcasm")],
)
def test_every_table_of_the_paper_is_made_from_a_tree(number, of, trees, tmp_path, capsys):
    """Of every kind of set: with sound, with text and Adam, of three modalities."""
    words = words_of(of, trees, "table", str(number), out=tmp_path)
    assert command.main([*words, "--rho", "0.05"]) == 0
    assert capsys.readouterr().out.lstrip().startswith(f"Table {number}: ")
    table = tables.Table.read(tmp_path / "tables" / f"table-{number}-{of}.json")
    assert len(table.results["rows"]) == {2: 4, 3: len(MODALITIES[of]) + 1, 4: 5, 5: 14}[number]


@pytest.mark.filterwarnings("ignore:tight_layout|constrained_layout")
@pytest.mark.parametrize(
    ("name", "of"),
    [*((name, "crema-d") for name in ("1", "3", "4", "5a", "5c")), ("1", "nvgesture"), ("5a", "sarcasm")],
)
def test_every_figure_of_the_paper_is_made_from_a_tree(name, of, trees, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "POINTS", 3)
    monkeypatch.setattr(figures, "TIMING", 0.2)
    monkeypatch.setattr(analysis, "TAUS", (0.4, 10.0))
    monkeypatch.setattr(analysis, "RHOS", (1e-10, 0.05))
    words = words_of(of, trees, "figure", name, out=tmp_path)
    if name == "5c":  # times one training of each
        at = words.index("--seeds")
        del words[at : at + 2]
    assert command.main([*words, "--rho", "0.05"]) == 0
    told = json.loads((tmp_path / "figures" / f"figure-{name}-{of}.json").read_text())
    assert told["config"]["network"] == "small"
    assert (tmp_path / "figures" / f"figure-{name}-{of}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of a small CLIP."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    trees_b.clip(folder, ["awful", "plain", "lovely", "ann", "bob", "and", "today"])
    return folder


def words_of_5b(name, trees, seeds, out):
    words = ["figure", "5b", "--data", name, "--data-root", str(trees[name]), "--steps", "4"]
    words += ["--turn-steps", "2", "--batch-size", "6", "--seeds", str(seeds), "--workers", "1", "--out", str(out)]
    return words


@pytest.mark.filterwarnings(QUIET)
def test_figure_5b_fine_tunes_the_clip_that_is_given(trees, clip, tmp_path, capsys):
    words = words_of_5b("twitter2015", trees, 2, tmp_path)
    assert command.main(words) == 1
    assert "--weights text=" in capsys.readouterr().err
    assert command.main([*words, "--weights", f"text={clip}", f"image={clip}"]) == 0
    told = json.loads((tmp_path / "figures" / "figure-5b-twitter2015.json").read_text())
    assert told["command"].endswith("--weights text=clip --weights image=clip")
    assert "--network" not in told["command"]
    runs = told["numbers"]["runs"]
    assert set(runs) == {"frozen", "pretrained"}
    for network in runs.values():
        assert set(network) == {"joint-sum", "mla-three-layer", "igm"}
        assert all(len(each) == 2 for each in network.values())
    assert [run["parameters"] for run in runs["frozen"]["igm"]] == [
        run["parameters"] for run in runs["pretrained"]["igm"]
    ]
    caption = told["caption"]
    assert "the round chosen on validation: mean ± standard deviation over 2 runs" in caption
    assert "Encoders frozen, 4 steps of each modality, learning rates chosen on validation: plain " in caption
    assert "Encoders trained on, 4 steps of each modality, learning rates as configured: plain " in caption
    assert "IGM over plain" in caption
    assert caption.count(" points (95 % interval).") == 2


@pytest.mark.filterwarnings(QUIET)
def test_figure_5b_says_what_was_chosen_where(trees, clip, tmp_path):
    words = words_of_5b("sarcasm", trees, 1, tmp_path)
    given = ["--weights", f"text={clip}", f"image={clip}", "--protocol", "paper", "--learning-rate", "none"]
    assert command.main([*words, *given, "--rates", "0.001"]) == 0
    caption = json.loads((tmp_path / "figures" / "figure-5b-sarcasm-paper.json").read_text())["caption"]
    assert (
        "the round chosen on the test split by every example, as the released scripts do: one run of each method"
        in caption
    )
    assert caption.count("learning rates chosen on validation") == 2
    assert "interval" not in caption


def test_figure_5b_counts_each_origin_once_and_tells_both_where_they_differ(tmp_path):
    def run(seed, mean, by_origin):
        scores = {"accuracy": {"mean": mean}, "by_origin": {"mean": by_origin}}
        return {"seed": seed, "chosen": {"scores": scores}}

    config = configuration.Config(seeds=2, first_seed=1)
    order = SimpleNamespace(config=config, configs=dict.fromkeys(finetuning.NETWORKS, config))
    methods = enumerate(finetuning.METHODS)
    runs = {("frozen", key): [run(1, 0.5, 0.6 + at / 10), run(2, 0.5, 0.6)] for at, key in methods}
    runs |= {("pretrained", key): [run(1, 0.5, 0.5), run(2, 0.7, 0.7)] for key in finetuning.METHODS}
    rates = {network: dict.fromkeys(finetuning.METHODS, 0.1) for network in finetuning.NETWORKS}
    caption = finetuning._caption(order, runs, rates)
    assert "plain 60.0 ± 0.0 (0.1), MLA 65.0 ± 7.1 (0.1), IGM 70.0 ± 14.1 (0.1); IGM over plain +10.0" in caption
    assert (
        "With every example counting: plain 50.0 ± 0.0, MLA 50.0 ± 0.0, IGM 50.0 ± 0.0; IGM over plain +0.0" in caption
    )
    assert caption.count("With every example") == 1, "where the encoders are trained on both are the same"


@pytest.mark.parametrize("given", [("--rho", "0"), ("--tau", "0")])
def test_figure_5b_is_about_igm(given, trees, clip, tmp_path, capsys):
    words = words_of_5b("twitter2015", trees, 1, tmp_path)
    assert command.main([*words, "--weights", f"text={clip}", f"image={clip}", *given]) == 1
    assert "expected both above 0: figure 5b is about IGM" in capsys.readouterr().err


@pytest.mark.filterwarnings(QUIET)
def test_figure_5b_is_made_of_the_clip_art_with_the_encoders_of_packages(tmp_path):
    words = ["figure", "5b", "--data", "openclipart", "--steps", "2", "--turn-steps", "1", "--batch-size", "4"]
    words += ["--seeds", "1", "--learning-rate", "0.001", "--workers", "1", "--out", str(tmp_path)]
    assert command.main(words) == 0
    told = json.loads((tmp_path / "figures" / "figure-5b-openclipart.json").read_text())
    runs = told["numbers"]["runs"]
    assert set(runs) == {"frozen", "pretrained"}
    assert all(set(each) == {"joint-sum", "mla-three-layer", "igm"} for each in runs.values())
    assert "With every example counting" in told["caption"], "titles repeat"
    assert (tmp_path / "figures" / "figure-5b-openclipart.png").stat().st_size > 10_000


# igm-rs data check


@pytest.mark.parametrize("name", WRITERS)
def test_a_whole_folder_is_said_to_be_one(name, trees, capsys):
    assert command.main(["data", "check", name, str(trees[name]), "--network", "small"]) == 0
    told = capsys.readouterr().out
    for each in MODALITIES[name]:
        assert each in told


def test_a_broken_folder_is_said_to_be_one(trees, tmp_path, capsys):
    folder = tmp_path / "tree"
    shutil.copytree(trees["crema-d"], folder)
    path = next((folder / "AudioWAV").iterdir())
    trees_a.cut(path)
    assert command.main(["data", "check", "crema-d", str(folder)]) == 1
    told = capsys.readouterr().out
    assert path.name in told
    assert command.main(["data", "check", "crema-d", str(folder), "--loaders", "2"]) == 1
    assert capsys.readouterr().out == told
    assert command.main(["data", "check", "crema-d", str(tmp_path / "nowhere")]) == 1
    assert f"folder {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().out
    assert command.main(["data", "check", "watch", str(folder)]) == 1
    assert "expected one that lies in a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"hello world", b"", b"\x80\x04not a pickle"])
def test_weights_that_cannot_be_read_are_told_before_a_training(content, trees, tmp_path, capsys):
    file = tmp_path / "image.pth"
    file.write_bytes(content)
    given = ["--weights", f"image={file}"]
    assert command.main(["data", "check", "twitter2015", str(trees["twitter2015"]), "--network", "small", *given]) == 1
    assert f"A training would not start: weights {file} cannot be read (" in capsys.readouterr().out
    words = words_of("twitter2015", trees, "train", "--method", "igm", out=tmp_path / "out")
    assert command.main([*words, *given]) == 1
    assert capsys.readouterr().err.startswith(f"error: weights {file} cannot be read (")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(QUIET)
def test_a_training_begins_with_the_weights_that_are_given(trees, tmp_path):
    found = data.load("crema-d", trees["crema-d"], Reading("small"))
    torch.manual_seed(5)
    state = found.encoders["audio"].make().state_dict()
    torch.save(state, tmp_path / "audio.pt")
    words = words_of("crema-d", trees, "train", "--method", "igm", out=tmp_path)
    given = ["--weights", f"audio={tmp_path / 'audio.pt'}", "--learning-rate", "1e-30"]
    assert command.main([*words, *given]) == 0
    reading = Reading("small", weights={"audio": tmp_path / "audio.pt"})
    begun = data.load("crema-d", trees["crema-d"], reading).encoders["audio"].make().state_dict()
    assert all(torch.equal(begun[name], value) for name, value in state.items())
    (record,) = records_of(tmp_path)
    other = tmp_path / "other"
    assert command.main([*words_of("crema-d", trees, "train", "--method", "igm", out=other), *given[2:]]) == 0
    assert records_of(other)[0]["digests"]["data"] != record["digests"]["data"]
    assert records_of(other)[0]["curve"] != record["curve"]


def test_a_device_that_is_none_is_refused(trees, tmp_path, capsys):
    words = words_of("crema-d", trees, "train", "--method", "igm", out=tmp_path)
    assert command.main([*words, "--device", "toaster"]) == 1
    assert capsys.readouterr().err.startswith("error: device is 'toaster', expected cpu or cuda, which torch can use: ")
    for device in ("meta", "mps", "xla"):
        assert command.main([*words, "--device", device]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: device is '{device}', expected cpu or cuda, which torch can use: ")
        assert len(said) < 300
    if not torch.cuda.is_available():
        assert command.main([*words, "--device", "cuda"]) == 1
        assert capsys.readouterr().err.startswith(
            "error: device is 'cuda', expected cpu or cuda, which torch can use: "
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loaders", "1"], "loaders is 1, expected none for mfeat: it does not lie in files"),
        (["--patience", "3"], "patience is 3 with schedule cosine, expected schedule plateau"),
        (
            ["--weights", "fou=here"],
            "weights is given, expected none for mfeat: it is no set in a folder of the user's",
        ),
        (["--network", "small"], "network is 'small', expected one of default for mfeat"),
        (["--rho", "fou=0.1"], "rho has no 'zer', expected one number, or one for each of fou, zer, mor"),
        (["--rho", "fou=1,zer=1,mor=1,kar=1"], "rho names 'kar', expected each of fou, zer, mor"),
    ],
)
def test_what_has_no_use_is_refused(words, message, tmp_path, capsys):
    assert command.main(["train", "--method", "igm", "--data", "mfeat", "--out", str(tmp_path), *words]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rho", "fou=x,zer=0.1", "'fou=x,zer=0.1' is no number, nor such as audio=1e-10,video=1e-15, each once"),
        ("--rho", "fou=1,fou=2", "'fou=1,fou=2' is no number, nor such as"),
        ("--rho", "much", "'much' is no number, nor such as"),
        ("--loaders", "-1", "'-1' is not an integer from 0"),
        ("--loaders", "two", "'two' is not an integer from 0"),
    ],
)
def test_what_cannot_be_read_is_told(option, value, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["train", "--method", "igm", "--data", "mfeat", f"{option}={value}"])
    assert message in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.filterwarnings(QUIET)
def test_a_set_is_trained_on_a_gpu(trees, tmp_path):
    words = words_of("crema-d", trees, "train", "--method", "igm", "mla", out=tmp_path)
    assert command.main([*words, "--device", "cuda", "--loaders", "1"]) == 0
    assert {record["device"] for record in records_of(tmp_path)} == {"cuda"}


def test_the_folder_is_not_in_what_is_kept(trees, tmp_path):
    source = Source(Path(trees["crema-d"]), (), Reading())
    moved = tmp_path / "moved"
    shutil.copytree(trees["crema-d"], moved)
    config = load_config("crema-d", {"network": "small"})
    assert source.digest(config) == Source(moved, (), Reading()).digest(config)


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize(
    ("name", "network"),
    [*((name, "small") for name in WRITERS), ("twitter2015", "pretrained"), ("sarcasm", "frozen")],
)
def test_an_epoch_of_every_loader_through_its_network(name, network, trees, clip):
    """Every training example once (but for a short last batch), decoded, through encoder and head, forth and back."""

    class Noted(Training):
        seen: ClassVar[dict] = {}

        def step_on(self, active, chosen, inputs):
            (modality,) = active
            assert len(inputs[modality]) == len(chosen)
            self.seen.setdefault(modality, []).extend(chosen.tolist())
            return super().step_on(active, chosen, inputs)

    Noted.seen = {}
    weights = {} if network == "small" else {"text": clip, "image": clip}
    found = data.load(name, trees[name], Reading(network, weights))
    batches = len(found.train) // 6
    config = load_config(name, {"network": network, "batch_size": 6, "steps": batches, "turn_steps": batches})
    training = Noted(found.without_test(), Row("igm", MODALITIES[name]), config, 1e-3, 3)
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    trained = training.run()
    for modality in MODALITIES[name]:
        assert len(set(Noted.seen[modality])) == len(Noted.seen[modality]) == 6 * batches
    assert all(math.isfinite(point["loss"]) for point in trained.curve)
    after = trained.weights["last"]
    parameters = training.model.named_parameters()
    still = [key for key, value in parameters if value.requires_grad and torch.equal(before[key], after[key])]
    assert [key for key in still if "embedding" not in key] == []  # words that no text has do not move
    if network == "frozen":
        assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoders."))
