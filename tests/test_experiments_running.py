"""The runs: records, the store, processes side by side, interrupts and what follows, tuning, logs."""

import csv
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from igm_rs.experiments import data, running, store, training
from igm_rs.experiments.configuration import load_config
from igm_rs.experiments.evaluation import FUSIONS, MEASURES
from igm_rs.experiments.methods import Row
from igm_rs.experiments.on_disk.faults import DataFault
from igm_rs.experiments.running import InterruptedRuns, Job, Source, run_all, tune

SOURCE = Source(register=(Path(__file__).with_name("toy_sets.py"),))
SOURCE.load("toy")
NAMES = ("a", "b")
TINY = load_config("toy", {"steps": 4, "turn_steps": 2, "batch_size": 16, "seeds": 2})
TIMES = ("seconds", "seconds_per_step", "started", "peak_memory")


def job(key="igm", seed=100, config=TINY, rate=0.05, final=True, **overrides):
    return Job(config, Row(key, NAMES, overrides), seed, rate, final)


def run(jobs, out, workers=1, **options):
    return run_all(jobs, out, workers, "runs", source=SOURCE, **options)


def numbers(record):
    """A record without times and memory."""
    return {name: value for name, value in record.items() if name not in TIMES}


def folder_of(record_job, out):
    (path,) = out.glob(f"runs/toy/{record_job.row.key}/*/seed-{record_job.seed}")
    return path


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


# One run


def test_a_record_has_everything(tmp_path, capsys):
    (record,) = run([job(scope=1.0)], tmp_path)
    path = folder_of(job(scope=1.0), tmp_path)
    text = (path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the record")) == record
    assert str(tmp_path) not in text
    expected = {
        "dataset": "toy", "method": "igm", "row": "igm-scope-1", "label": "IGM, scope 1", "modalities": ["a", "b"],
        "seed": 100, "learning_rate": 0.05, "final": True, "overrides": {"scope": 1.0}, "skipped": 0,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["config"] == replace(TINY, scope=1.0).plain()
    assert set(record["versions"]) == {
        "igm-rs", "Python", "torch", "numpy", "torchmetrics", "processor", "instructions",
    }  # fmt: skip
    assert record["revision"] is None or len(record["revision"]) >= 40
    assert [point["round"] for point in record["curve"]] == [1, 2]
    for weights in ("chosen", "last"):
        scores = record[weights]["scores"]
        assert set(scores) == set(MEASURES)
        assert set(scores["map"]) == {*NAMES, *FUSIONS}
    assert record["last"]["round"] == 2
    assert set(record["temperatures"]) == set(NAMES)
    assert len(record["after_turn"]) == 5
    assert 0 < record["seconds_per_step"] < record["seconds"]
    assert 0 < record["peak_memory"] < 200 * 2**20  # above what the process held before
    assert record["parameters"] > 10_000
    assert record["cosine"] < 1
    assert 0.6 < record["kept"] < 1  # e^-0.4 is the least
    assert record["effective_perturbation"] == pytest.approx(1, abs=1e-3)
    assert 0 < record["projected_share"] <= 1
    assert not (path / "checkpoint.pt").exists()
    said = capsys.readouterr().err
    assert "IGM, scope 1, seed 100, loss" in said
    assert "sum " in said


def test_a_tuning_run_has_no_test_scores(tmp_path):
    (record,) = run([job(final=False)], tmp_path)
    assert set(record["chosen"]) == set(record["last"]) == {"round"}
    assert record["temperatures"] == {}
    assert record["digests"]["test"] is None


def test_curve_is_logged_as_csv_and_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (record,) = run([job()], tmp_path)
    path = folder_of(job(), tmp_path)
    rows = list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))
    assert [int(row["steps"]) for row in rows] == [2, 4]
    assert [float(row["validation accuracy of mean"]) for row in rows] == [
        point["accuracy"]["mean"] for point in record["curve"]
    ]
    events = EventAccumulator(str(path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "training loss", *(f"validation accuracy/{name}" for name in (*NAMES, "mean", "entropy", "sum")),
    }  # fmt: skip
    told = events.Scalars("training loss")
    assert [event.step for event in told] == [2, 4]
    assert [event.value for event in told] == pytest.approx([point["loss"] for point in record["curve"]])


def test_the_test_split_is_opened_once_by_a_final_run_and_never_by_a_tuning_run(tmp_path):
    for final, openings in ((False, 0), (True, 1)):
        dataset = data.load("toy")
        running.run_job(job(final=final), dataset, tmp_path / str(final), lambda _: None, lambda: False)
        assert dataset.test_openings == openings


def test_a_process_lost_while_a_run_is_measured_is_told(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    monkeypatch.setattr(running, "evaluate", lost)
    with pytest.raises(ChildProcessError, match=r"--resume goes on from what was saved, where trainings are kept$"):
        running.run_job(job(), data.load("toy"), tmp_path, lambda _: None, lambda: False)


def test_a_broken_file_of_the_test_split_is_no_divergence(tmp_path, monkeypatch):
    def broken(*_):
        raise DataFault("x.jpg: it cannot be decoded")

    monkeypatch.setattr(running, "evaluate", broken)
    with pytest.raises(DataFault, match=r"^x\.jpg: it cannot be decoded$"):
        running.run_job(job(), data.load("toy"), tmp_path, lambda _: None, lambda: False)


def test_a_run_that_has_diverged_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"joint, sum, seed 100, learning rate 1e\+09 cannot be measured, most likely"):
        run([job("joint-sum", rate=1e9)], tmp_path)
    (record,) = run([job("joint-sum", rate=1e9, final=False)], tmp_path)
    assert record["curve"][-1]["loss"] is None


# The store


def test_finished_runs_are_used_again(tmp_path, monkeypatch):
    first = run([job(), job(seed=101)], tmp_path)
    monkeypatch.setattr(running, "run_job", lambda *_, **__: pytest.fail("a finished run was run again"))
    # what says which runs there are is nothing to a run
    other = replace(TINY, seeds=7, rates=(1.0,), tuning_seeds=(3,), first_seed=50, learning_rate=0.5)
    assert run([job(seed=101, config=other), job(config=other), job()], tmp_path) == [first[1], first[0], first[0]]


@pytest.mark.parametrize(
    "changed",
    [
        {"config": replace(TINY, rho=0.02)},
        {"config": replace(TINY, protocol="paper")},
        {"rate": 0.06},
        {"final": False},
        {"key": "turns"},
        {"scope": 0.5},
    ],
)
def test_another_run_has_another_folder(changed, tmp_path):
    assert job(**changed).folder(tmp_path, "data") != job().folder(tmp_path, "data")


def test_other_data_and_other_code_are_another_run(tmp_path, monkeypatch):
    one = job().folder(tmp_path, "data")
    assert job().folder(tmp_path, "other") != one
    monkeypatch.setattr(running, "code_digest", lambda: "other")
    assert job().folder(tmp_path, "data") != one


def test_comments_docstrings_and_layout_are_no_other_code():
    one = 'def f(x):\n    """Say."""\n    return x + 1\n'
    assert store._bare(one) == store._bare("# why\ndef f( x ):\n    return x+1\n")
    assert store._bare(one) != store._bare("def f(x):\n    return x + 2\n")
    assert store._bare('class A:\n    """B."""\n') == store._bare("class A:\n    pass\n")


def test_the_source_of_a_users_method_counts():
    assert "class Gentle" in running._user_code(Row("gentle", NAMES))[0]
    assert running._user_code(Row("igm", NAMES)) == []


def test_what_stands_beside_a_users_method_counts_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "mine_base": "class Base(Turns):\n    pass\n",
        "mine": "GENTLE = 0.1\n\n\nclass Mine(Base):\n    key = 'mine'\n",
    }
    heads = {
        "mine_base": "from igm_rs.experiments.methods.turns import Turns\n",
        "mine": "from mine_base import Base\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(heads[name] + text)
    kind = importlib.import_module("mine").Mine
    code = running._user_code(SimpleNamespace(of=kind()))
    assert [text in each for text, each in zip(("GENTLE = 0.1", "class Base"), code, strict=True)] == [True, True]
    for name in texts:
        del sys.modules[name]


def test_a_method_without_a_file_is_refused_and_a_base_class_without_one_counts_by_its_name(monkeypatch):
    home = ModuleType("of_no_file")  # as a notebook's, or that of an extension
    monkeypatch.setitem(sys.modules, "of_no_file", home)
    text = "class Base:\n    pass\n\nclass Mine(Base):\n    key = 'mine'\n"
    exec(text, vars(home))
    with pytest.raises(
        ValueError, match=r"^method 'mine' stands in no file, expected one: save it as one, name it with --register$"
    ):
        running._user_code(SimpleNamespace(of=home.Mine()))

    class Here(home.Base):
        key = "here"

    code = running._user_code(SimpleNamespace(of=Here()))
    assert "class Here" in code[0]
    assert code[1:] == ["of_no_file.Base"]


def test_a_run_measured_on_another_test_split_does_not_count(tmp_path):
    (record,) = run([job()], tmp_path)
    path = folder_of(job(), tmp_path)
    dataset = SOURCE.load("toy")
    assert store.read_record(path, dataset) == record
    test = dataset._test
    other = replace(dataset, _test=data.Split(test.inputs, test.labels.flip(0), test.origins))
    assert store.read_record(path, other) is None
    assert store.data_digest(other) == store.data_digest(dataset)


def test_damaged_files_are_named(tmp_path):
    run([job()], tmp_path)
    path = folder_of(job(), tmp_path) / "run.json"
    path.write_text("{torn")
    with pytest.raises(ValueError, match=r"run file .*run\.json is not as expected .*; delete it to run again"):
        run([job()], tmp_path)
    path.unlink()
    (path.parent / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoint\.pt cannot be read .*; delete it to begin anew"):
        run([job()], tmp_path, resume=True)


def test_a_file_is_written_wholly_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    store.write_whole(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_whole(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_numbers_that_are_not_finite_become_none():
    assert store.finite({"a": (1.5, math.nan, [math.inf, "x", None])}) == {"a": [1.5, None, [None, "x", None]]}


def test_the_revision_is_that_of_our_own_repository_or_none(monkeypatch, tmp_path):
    store.revision.cache_clear()
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    assert store.revision() is None
    monkeypatch.undo()
    store.revision.cache_clear()


# Interrupts


@pytest.mark.parametrize("steps_before", [1, 3, 6])
def test_an_interrupted_run_is_saved_and_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, steps_before):
    (expected,) = run([job()], tmp_path / "whole")
    step = running.Training.step_on
    taken = []

    def pressed(training, *given):
        taken.append(given)
        if len(taken) == steps_before:
            interrupt()
        return step(training, *given)

    with monkeypatch.context() as patched:
        patched.setattr(running.Training, "step_on", pressed)
        with pytest.raises(InterruptedRuns):
            run([job(), job(seed=101)], tmp_path / "left")
    assert len(taken) == steps_before  # the step was finished, no other begun
    path = folder_of(job(), tmp_path / "left")
    assert (path / "checkpoint.pt").is_file()
    assert not (path / "run.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    taken.clear()
    monkeypatch.setattr(running.Training, "step_on", lambda *given: taken.append(0) or step(*given))
    (record,) = run([job()], tmp_path / "left", resume=True)
    assert len(taken) == 8 - steps_before
    assert numbers(record) == numbers(expected)
    assert record["seconds"] > 0
    assert not (path / "checkpoint.pt").exists()
    assert len(list(csv.reader((path / "metrics.csv").read_text().splitlines()))) == 3
    capsys.readouterr()


def test_without_resume_an_interrupted_run_begins_anew_and_says_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(running.Training, "step_on", lambda *given: interrupt() or torch.tensor(1.0))
        with pytest.raises(InterruptedRuns):
            run([job()], tmp_path)
    capsys.readouterr()
    (record,) = run([job()], tmp_path)
    assert "1 interrupted run begins anew; --resume goes on where it was left" in capsys.readouterr().err
    assert numbers(record) == numbers(run([job()], tmp_path / "whole")[0])


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch, capsys):
    def twice(*_):
        interrupt()
        interrupt()

    monkeypatch.setattr(running.Training, "step_on", twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run([job()], tmp_path)
    assert stopped.type is KeyboardInterrupt
    capsys.readouterr()


def test_an_unfinished_run_is_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SAVE_EVERY", 0.0)
    seen = []
    path = tmp_path / "run"

    def tell(progress):
        seen.append((path / "checkpoint.pt").is_file())

    running.run_job(job(), data.load("toy"), path, tell, lambda: False)
    assert seen == [False, True, True, True]


@pytest.mark.parametrize("key", ["igm", "joint-sum"])
def test_a_run_that_dies_after_the_last_step_of_a_turn_is_resumed(key, tmp_path, monkeypatch):
    """It is saved after every step but that one, behind which validation is looked at."""
    config = replace(TINY, steps=12, turn_steps=4)
    whole = running.run_job(
        job(key, config=config), data.load("toy"), tmp_path / "whole", lambda _: None, lambda: False
    )
    looked, watched = iter(range(100)), training.watched
    path = tmp_path / "run"

    def dies(*words):
        if next(looked) == 1:
            raise MemoryError
        return watched(*words)

    with monkeypatch.context() as patched:
        patched.setattr(running, "SAVE_EVERY", -1.0)
        patched.setattr(running, "SAVE_SHARE", 0.0)
        patched.setattr(training, "TELL_EVERY", -1.0)
        patched.setattr(training, "watched", dies)
        with pytest.raises(MemoryError):
            running.run_job(job(key, config=config), data.load("toy"), path, lambda _: None, lambda: False)
    assert (path / "checkpoint.pt").is_file()
    resumed = running.run_job(
        job(key, config=config), data.load("toy"), path, lambda _: None, lambda: False, resume=True
    )
    assert numbers(resumed) == numbers(whole)


@pytest.mark.cuda
def test_memory_on_a_gpu_is_asked_for_before_anything_is_there():
    program = "from igm_rs.experiments.running import begin_memory; print(begin_memory('cuda:0'))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "0\n"


@pytest.mark.cuda
def test_memory_on_a_gpu_is_that_of_its_tensors():
    held = running.begin_memory("cuda")
    values = torch.zeros(2**20, device="cuda")
    assert running.peak_memory("cuda") - held >= 4 * values.numel()
    del values
    assert running.begin_memory("cuda") == held
    assert running.peak_memory("cuda") == held


def test_interrupts_are_left_alone_outside_the_main_thread(tmp_path, capsys):
    found = []
    thread = threading.Thread(target=lambda: found.extend(run([job()], tmp_path)))
    thread.start()
    thread.join()
    assert len(found) == 1
    capsys.readouterr()


# Processes


def test_records_do_not_depend_on_processes_interrupts_and_resumption(tmp_path, capsys):
    config = replace(TINY, steps=200, turn_steps=20)
    jobs = [job(config=config), job("mla", 101, config), job(config=config), job("gentle", config=config)]
    here = run(jobs, tmp_path / "here")
    beside = tmp_path / "beside"
    pressed = threading.Thread(target=_press_once_trained, args=(beside,))
    pressed.start()
    with pytest.raises(InterruptedRuns):
        run(jobs, beside, 2)
    pressed.join()
    assert len(list(beside.glob("runs/toy/*/*/*/checkpoint.pt"))) in (1, 2)
    assert multiprocessing.active_children() == []
    found = run(jobs, beside, 2, resume=True)
    assert [record["row"] for record in found] == ["igm", "mla", "igm", "gentle"]
    for one, other in zip(map(numbers, found), map(numbers, here), strict=True):
        assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set()
    assert list(beside.glob("runs/toy/*/*/*/checkpoint.pt")) == []
    capsys.readouterr()


def _press_once_trained(out):
    """Press Ctrl-C when the first process has ended a round."""
    for _ in range(3000):
        if list(out.glob("runs/toy/*/*/*/metrics.csv")):
            break
        time.sleep(0.02)
    interrupt()


class Lethal(running.Source):
    """A source that ends the process which gets it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_lost_process_is_said(tmp_path, capsys):
    source = Lethal(register=SOURCE.register)
    with pytest.raises(running.ProcessLostError, match=r"a process ended before its run did.*--workers 1"):
        run_all([job(), job(seed=101)], tmp_path, 2, source=source)
    capsys.readouterr()


def test_the_error_of_a_run_ends_all_processes_and_comes_out(tmp_path, capsys):
    good = job(config=replace(TINY, steps=100_000))
    bad = Job(TINY, Row("igm-one-sided", NAMES), 100, 0.05, True)
    with pytest.raises(ValueError, match="sources is None"):
        run([good, bad], tmp_path, 2)
    assert multiprocessing.active_children() == []
    capsys.readouterr()


# Choosing


def test_tuning_takes_the_best_rate_on_validation_and_logs_what_it_tried(tmp_path, capsys):
    rows = [Row("igm", NAMES), Row("single", ("a",)), Row("igm", NAMES)]
    config = replace(TINY, rates=(1e-6, 0.05), tuning_seeds=(7, 8), steps=20, protocol="paper")
    choices = tune(rows, config, tmp_path, 1, source=SOURCE)
    assert list(choices) == rows[:2]
    for row, choice in choices.items():
        assert choice.learning_rate == 0.05
        assert list(choice.tried) == [1e-6, 0.05]
        kept = json.loads((tmp_path / "tuning" / "toy" / f"{row.key}.json").read_text())
        assert kept["chosen"] == 0.05
        values = kept["tried"][1]["validation_accuracy"]
        assert set(values) == {"7", "8"}
        assert sum(values.values()) / 2 == pytest.approx(choice.tried[0.05])
    found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/toy/*/*/*/run.json")]
    assert len(found) == 8
    assert {record["seed"] for record in found} == {7, 8}
    assert not any(record["final"] or "scores" in record["chosen"] for record in found)
    assert {record["config"]["steps"] for record in found} == {20}
    capsys.readouterr()


def test_a_rate_that_diverges_is_not_chosen(tmp_path, capsys):
    config = replace(TINY, rates=(1e9, 1e-9), tuning_seeds=(7,), steps=8)
    row = Row("joint-sum", NAMES)
    choice = tune([row], config, tmp_path, 1, source=SOURCE)[row]
    assert choice.learning_rate == 1e-9
    assert choice.tried == {1e9: 0.0, 1e-9: pytest.approx(0.3, abs=0.2)}
    capsys.readouterr()


def test_one_learning_rate_for_all_needs_no_run(tmp_path):
    choices = tune([Row("igm", NAMES)], replace(TINY, learning_rate=0.2), tmp_path, 1, source=SOURCE)
    assert list(choices.values()) == [running.Choice(0.2, {})]
    assert list(tmp_path.iterdir()) == []
