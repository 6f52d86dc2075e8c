"""The command ``igm-rs``: train, table, figure, data check, list, page; each part is imported when it is called."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import igm_rs

from .columns import SPEAKERS, Reading
from .configuration import CHOICES, DEVIATIONS, Config, cores, count, load_config
from .extra import what_to_install

if TYPE_CHECKING:
    from .data import DataSet
    from .feeding import Means
    from .methods import Row
    from .running import RunRecord, Source

__all__ = ["main"]

OUT = Path("results")

UNKEPT = ("1", "4", "5a", "5c")
"""Figures whose trainings are looked into as they run, and not kept; those that choose a learning rate are."""

SHOWN = 200
"""Letters of torch's own reason against a device that are told, at most."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0; 1 after a failure; 130 after an interrupt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ModuleNotFoundError as missing:
        print(what_to_install(missing), file=sys.stderr)
        return 1
    except (OSError, ValueError, _process_lost()) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{_kept(options, interrupt)}", file=sys.stderr)
        return 130


def _kept(options: argparse.Namespace, interrupt: KeyboardInterrupt) -> str:
    """Return what an interrupted command has kept, where it makes runs."""
    if options.command not in ("train", "table", "figure"):
        return ""
    if type(interrupt).__name__ == "InterruptedRuns":
        return ": runs under way were saved; the same command with --resume goes on"
    if options.command == "figure" and options.name in UNKEPT:
        if options.name == "5c":
            return ": of this figure nothing is kept"
        return ": of this figure only runs that choose a learning rate are kept, where it has any"
    return ": finished runs are kept"


def _process_lost() -> type[BaseException]:
    """Return the error for a lost process; where running was never imported there is none to catch."""
    module = sys.modules.get(f"{__package__}.running")
    found: type[BaseException] = getattr(module, "ProcessLostError", TimeoutError)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is done


def _train(options: argparse.Namespace) -> int:
    """Train a method, or several, and print what each reaches on the test split."""
    from . import plans
    from .methods import Row, keyed
    from .running import tune

    data, config, source = _begin(options)
    _check_used(options, options.method)
    if plans.ONE_SIDED in options.method and config.sources is None:
        raise ValueError(
            f"method is {plans.ONE_SIDED!r} without --sources, expected it, such as audio=video,video=none"
        )
    rows = []
    for key in dict.fromkeys(options.method):
        alone = keyed(key).schedule == "single"
        rows += [Row(key, group) for group in ([(name,) for name in data.modalities] if alone else [data.modalities])]
    choices = tune(rows, config, options.out, options.workers, resume=options.resume, source=source)
    rates = {row: choices[row].learning_rate for row in rows}
    records = _final(rows, rates, config, options, source)
    print(f"\n{_summary(data, config, rows, records)}\n\nRuns: {options.out / 'runs' / data.name}")
    return 0


def _table(options: argparse.Namespace) -> int:
    """Make a table: its runs, where they are not in the store yet; print it and write it."""
    from . import plans, reproduction, tables
    from .protocol import protocol
    from .running import tune, versions, without_warning_of_rho
    from .store import revision

    stored = None if options.compare is None else tables.Table.read(options.compare)
    data, config, source = _begin(options)
    lines = plans.plan(options.number, data.modalities, options.methods)
    _check_own_subject(options.number, config)
    _check_used(options, [line.row.method for line in lines])
    tuned = [line.tuned_as for line in lines]
    choices = tune(tuned, config, options.out, options.workers, resume=options.resume, source=source)
    rates = {line.row: choices[line.tuned_as].learning_rate for line in lines}
    with without_warning_of_rho() if options.number == 5 else nullcontext():
        records = _final([line.row for line in lines], rates, config, options, source)
    about = {
        "dataset": data.name,
        "title": data.title,
        "classes": data.classes,
        "modalities": list(data.modalities),
        "split": data.sizes,
        "protocol": config.protocol,
        "methods": options.methods,
        "command": _command(options),
        "config": config.plain(),
        "versions": versions(),
        "revision": revision(),
        "words": protocol(config, options.workers),
    }
    tried = {row.key: choice.tried for row, choice in choices.items()}
    table = tables.table(options.number, lines, records, about=about, tried=tried)
    paths = table.write(options.out / "tables")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(f"\n{table.plain(width)}\n\nWritten: {', '.join(map(str, paths))}")
    if stored is None:
        return 0
    of_stored = reproduction.stored_rates(stored.results)
    rates.update({line.row: kept for line in lines if (kept := of_stored.get(line.row.key)) is not None})
    records = _final([line.row for line in lines], rates, config, options, source)
    again = tables.table(options.number, lines, records, about=about, tried=tried)
    found = reproduction.compare(again.results, stored.results, chosen=table.results)
    print(f"\n{found.text}")
    return 1 if found.problems else 0


def _figure(options: argparse.Namespace) -> int:
    """Make a figure: picture and numbers."""
    from . import figures

    configs = _configs_of_5b(options) if options.name == "5b" else None
    _, config, source = _begin(options, **({} if configs is None else {"network": list(configs)[-1]}))
    _check_used(options, figures.METHODS[options.name])
    if options.name not in ("3", "5b") and config.protocol == "paper":
        raise ValueError(f"protocol is 'paper', expected 'validation': figure {options.name} looks at no test split")
    if options.name in ("1", "4", "5a", "5b"):
        for each in [config] if configs is None else configs.values():
            _check_both(each, f"figure {options.name} is about IGM")
    given = [name for name in ("rates", "tuning_seeds", "seeds") if getattr(options, name) is not None]
    if options.name == "5c" and given:
        raise ValueError(f"{_option(given[0])} has no part in figure 5c, expected none: it times one training each")
    if options.resume and (options.name == "5c" or (options.name in UNKEPT and config.learning_rate is not None)):
        raise ValueError(f"--resume has no part in figure {options.name}, expected none: its trainings are not kept")
    paths = figures.figure(
        options.name,
        config,
        options.out,
        workers=options.workers,
        command=_command(options),
        seeds=options.seeds,
        resume=options.resume,
        source=source,
        configs=configs,
    )
    print(f"Written: {', '.join(map(str, paths))}")
    return 0


def _configs_of_5b(options: argparse.Namespace) -> dict[str, Config]:
    """Return the configuration for each network of figure 5b.

    Raises
    ------
    ValueError
        If a network is given, or there is something wrong with a value.
    """
    from .finetuning import NETWORKS

    if options.network is not None:
        raise ValueError(f"network is {options.network!r}, expected none: figure 5b has its own")
    return {network: _config(options, network=network) for network in NETWORKS}


def _check(options: argparse.Namespace) -> int:
    """Say what a folder holds of a data set, what is wrong with it, and what a training would use."""
    from .data import check_reading, on_disk_of
    from .on_disk.check import check

    reading = Reading(options.network, options.weights or {}, True, options.speakers)
    found = on_disk_of(options.set)
    check_reading(options.set, reading)
    report = check(found, options.folder, reading, options.loaders)
    print(report.text)
    return 1 if report.problems else 0


def _list(options: argparse.Namespace) -> int:
    """Print data sets, methods, tables and figures."""
    from .listing import listing
    from .registering import register_files

    register_files(options.register)
    print(listing(options.folder))
    return 0


def _page(options: argparse.Namespace) -> int:
    """Write the results page from the stored tables and figures."""
    from . import page

    print(f"Written: {page.write(options.out)}")
    return 0


def _begin(options: argparse.Namespace, **more: Any) -> tuple[DataSet, Config, Source]:
    """Return data set, configuration and where data come from; what can be wrong is found before training.

    `more` are values of the configuration that the command line cannot say.
    """
    from .running import Source

    reading = Reading("default", options.weights or {}, options.skip_broken, options.speakers)
    source = Source(options.folder, tuple(options.register), reading, _means(options))
    try:
        source.known(options.data)
        config = _config(options, **more)
        data = source.of(config)
    except TypeError as error:  # what a file of the user's holds
        raise ValueError(str(error)) from error
    if options.loaders and not data.in_files:
        raise ValueError(f"loaders is {options.loaders}, expected none for {options.data}: it does not lie in files")
    if options.patience is not None and config.schedule != "plateau":
        raise ValueError(f"patience is {options.patience} with schedule {config.schedule}, expected schedule plateau")
    if options.workers is None:  # several at once may be more than a GPU, or the memory, holds
        options.workers = 1 if data.in_files or options.device != "cpu" else cores()
    for spec in data.encoders.values():
        if spec.digest:  # before anything is trained: whether its weights fit is seen by making it
            spec.make()
    if data.left_out:
        print(f"left out of {data.name}: {data.left_out}; see igm-rs data check", file=sys.stderr)
    config.rho_of(data.modalities)
    for name in config.rho if isinstance(config.rho, Mapping) else ():
        if name not in data.modalities:
            raise ValueError(f"rho names {name!r}, expected each of {', '.join(data.modalities)}")
    for name, whose in (config.sources or {}).items():
        for each in (name, whose):
            if each is not None and each not in data.modalities:
                raise ValueError(f"sources names {each!r}, expected {', '.join(data.modalities)} or none")
    missing = [name for name in data.modalities if config.sources is not None and name not in config.sources]
    if missing:
        raise ValueError(
            f"sources has no {missing[0]!r}, expected whose T acts on each of {', '.join(data.modalities)}"
        )
    if options.base == "adam" and options.momentum is not None:
        raise ValueError(f"momentum is {options.momentum:g} with base adam, expected base sgd: Adam has its own")
    if config.learning_rate is not None and (options.rates or options.tuning_seeds):
        raise ValueError(
            "rates or tuning_seeds beside learning_rate, expected one or the other: nothing is tuned with it"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if not os.access(options.out, os.W_OK):
        raise PermissionError(f"folder {options.out} cannot be written to")
    return data, config, source


def _means(options: argparse.Namespace) -> Means:
    """Return device and loading processes.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    import torch

    from .feeding import Means

    try:
        if torch.empty(0, device=options.device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing is tried on such")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        if len(reason) > SHOWN:
            reason = "torch was not built for it"
        raise ValueError(
            f"device is {options.device!r}, expected cpu or cuda, which torch can use: {reason}"
        ) from error
    return Means(options.device, options.loaders)


def _config(options: argparse.Namespace, **more: Any) -> Config:
    """Return the configuration: the data set's file, or another one, what the command line says, and `more`."""
    given = {each.name: getattr(options, each.name) for each in fields(Config) if each.name != "data"}
    overrides = {name: value for name, value in given.items() if value is not None}
    plain = {name: _plain(value) for name, value in overrides.items()}
    return load_config(options.data, {**plain, **more}, options.config)


def _plain(value: Any) -> Any:
    return None if value == "none" else value


def _check_used(options: argparse.Namespace, keys: Sequence[str]) -> None:
    """Refuse a given value that none of the methods goes by.

    Raises
    ------
    ValueError
        If there is one.
    """
    from .methods import METHODS, keyed
    from .methods.base import PARTICULAR

    used = [keyed(key).uses for key in keys]
    if None in used:  # a user's own method
        return
    for name in PARTICULAR:
        if getattr(options, name) is not None and not any(name in uses for uses in used if uses is not None):
            fit = [key for key, method in METHODS.items() if name in (method.uses or ())]
            raise ValueError(
                f"{_option(name)} has no part in {', '.join(dict.fromkeys(keys))}, expected one of {', '.join(fit)}"
            )


def _check_both(config: Config, why: str) -> None:
    """Refuse a configuration without SAM or without modification.

    Raises
    ------
    ValueError
        If ρ or τ is 0.
    """
    if not config.has_sam or config.tau == 0:
        rho = _written(config.rho)
        raise ValueError(f"rho is {rho} and tau {config.tau:g}, expected both above 0: {why}")


def _check_own_subject(number: int, config: Config) -> None:
    """Refuse a value that takes from a table what it is about.

    Raises
    ------
    ValueError
        If there is one.
    """
    if number == 2:
        _check_both(config, "table 2 is with and without")
    if number == 3 and config.sources is not None:
        raise ValueError("sources is given, expected none: table 3 has its own for every row")
    if number == 5:
        _check_both(config, "table 5 is about IGM")
        if config.released != DEVIATIONS:
            raise ValueError("released is given, expected none: table 5 has its own for every row")
        for name in ("scope", "sources", "rho_head"):  # IGM goes by the first two, the deviations by the last
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is given, expected none: not every row of table 5 goes by it")
    if number == 4 and config.scope is not None:
        raise ValueError(f"scope is {config.scope:g}, expected none: table 4 has its own for every row")


def _final(
    rows: Sequence[Row], rates: dict[Row, float], config: Config, options: argparse.Namespace, source: Source
) -> list[RunRecord]:
    """Return the records of all final runs."""
    from .running import Job, run_all

    jobs = [Job(config, row, seed, rates[row], final=True) for row in rows for seed in config.final_seeds]
    return run_all(jobs, options.out, options.workers, "final runs", resume=options.resume, source=source)


def _summary(data: DataSet, config: Config, rows: Sequence[Row], records: Sequence[RunRecord]) -> str:
    """Return test accuracies at the chosen round, mean ± standard deviation over the seeds, for the terminal."""
    from .evaluation import FUSIONS, of_fusion
    from .grids import Cell, Grid
    from .statistics import summary
    from .tables import PAPER_WARNING

    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    grid = Grid(
        f"{data.title or data.name}: test accuracy in percent at the chosen round, {seeds}",
        ["method"],
        [("", ["lr"]), ("branches", list(data.modalities)), ("fusions", list(FUSIONS))],
    )
    for row in rows:
        mine = [record for record in records if record["row"] == row.key]
        cells = [Cell(row.label), Cell(f"{mine[0]['learning_rate']:g}")]
        found = [record["chosen"]["scores"]["accuracy"] for record in mine]
        for name in data.modalities:
            values = [scores[name] for scores in found if name in scores]
            cells.append(Cell(_spread(summary(values)) if values else "–"))
        cells += [Cell(_spread(summary([of_fusion(scores, name) for scores in found]))) for name in FUSIONS]
        grid.rows.append(cells)
    warning = [PAPER_WARNING] if config.protocol == "paper" else []
    return "\n\n".join([*warning, grid.plain()])


def _spread(found: Any) -> str:
    return f"{100 * found.mean:.1f}" + ("" if found.sd is None else f" ± {100 * found.sd:.1f}")


def _command(options: argparse.Namespace) -> str:
    """Return the command line that gives the same numbers; how they were computed, and where, is left out."""
    words = ["igm-rs", options.command, *([str(getattr(options, "number", getattr(options, "name", "")))])]
    words += ["--data", options.data]
    if getattr(options, "methods", None):
        words += ["--methods", *options.methods]
    for each in fields(Config):
        value = getattr(options, each.name)
        if each.name != "data" and value is not None:
            words += [_option(each.name), *(map(str, value) if isinstance(value, list) else [_written(value)])]
    if options.speakers != "apart":
        words += ["--speakers", options.speakers]
    words += ["--skip-broken"] * options.skip_broken
    for name, path in (options.weights or {}).items():
        words += ["--weights", f"{name}={path.name}"]
    for path in options.register:
        words += ["--register", path.name]
    if options.config is not None:
        words += ["--config", options.config.name]
    return shlex.join(words)


def _written(value: Any) -> str:
    if isinstance(value, dict):
        words = {name: each if isinstance(each, str) else _written(each) for name, each in value.items()}
        return ",".join(f"{name}={each}" for name, each in words.items())
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="igm-rs",
        description="The paper's experiments on real data: one command a table, one a figure.",
    )
    parser.add_argument("--version", action="version", version=f"igm-rs {igm_rs.__version__}")
    parts = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = parts.add_parser("train", help="train a method with several seeds and measure it on the test split")
    train.add_argument("--method", nargs="+", required=True, metavar="KEY", help="methods, see igm-rs list")
    _add_run_options(train, _train)
    table = parts.add_parser("table", help="make one of the paper's tables")
    table.add_argument(
        "number", type=int, choices=(1, 2, 3, 4, 5), help="the paper's number of the table; 5: released scripts"
    )
    table.add_argument("--methods", nargs="+", metavar="KEY", help="these rows of table 1 only")
    table.add_argument(
        "--compare", type=Path, metavar="FILE", help="say whether the table is the stored one of this JSON file"
    )
    _add_run_options(table, _table)
    figure = parts.add_parser("figure", help="make one of the paper's figures")
    figure.add_argument("name", choices=("1", "3", "4", "5a", "5b", "5c"), help="the paper's number of the figure")
    _add_run_options(figure, _figure)
    checked = parts.add_parser("data", help="look at a data set in a folder, before training")
    tasks = checked.add_subparsers(dest="task", required=True, metavar="TASK")
    check = tasks.add_parser("check", help="say what is there, what is missing or broken, and what would be used")
    check.add_argument("set", metavar="NAME", help="data set, see igm-rs list")
    check.add_argument("folder", type=Path, metavar="FOLDER", help="where its files lie")
    check.add_argument("--network", choices=CHOICES["network"], default="default", help="for these encoders")
    check.add_argument(
        "--loaders", type=_natural, default=0, metavar="N",
        help="processes that decode (default: 0, the command's own does)",
    )  # fmt: skip
    _add_reading_options(check)
    check.set_defaults(run=_check)
    listed = parts.add_parser("list", help="list data sets, methods, tables and figures")
    _add_source_options(listed)
    listed.set_defaults(run=_list)
    page = parts.add_parser("page", help="write the results page from stored tables and figures")
    page.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="folder of results (default: results)")
    page.set_defaults(run=_page)
    return parser


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", "--folder", type=Path, dest="folder", metavar="FOLDER",
        help="where the data set's files lie, if not in the package",
    )  # fmt: skip
    parser.add_argument(
        "--register", type=Path, nargs="+", default=[], metavar="FILE",
        help="Python files that register data sets or methods",
    )  # fmt: skip


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=_paths, nargs="+", action=_Merge, metavar="MODALITY=PATH",
        help="file or folder with the weights that an encoder begins with",
    )  # fmt: skip
    parser.add_argument(
        "--speakers", choices=SPEAKERS, default="apart",
        help="whether a speaker may be in two splits, as in the paper's split of CREMA-D (default: apart)",
    )  # fmt: skip


def _add_run_options(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Add what train, table and figure have in common: one option for every value of the configuration among it."""
    parser.set_defaults(run=run)
    parser.add_argument("--data", required=True, metavar="NAME", help="data set, see igm-rs list")
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help="folder of results and runs (default: results)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="runs side by side (default: all cores; 1 on a GPU, or of a set that lies in files)",
    )
    parser.add_argument("--resume", action="store_true", help="continue interrupted runs, on the CPU bit for bit")
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where to compute, such as cuda (default: cpu)"
    )
    parser.add_argument(
        "--loaders", type=_natural, default=0, metavar="N",
        help="processes that decode files ahead, of each modality of each run (default: 0, the run's own does)",
    )  # fmt: skip
    _add_source_options(parser)
    _add_reading_options(parser)
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out and count examples that are listed wrongly, or whose files are missing or cut off; what only "
        "decoding shows stops a training: igm-rs data check finds it before",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file in place of the data set's own")
    values = parser.add_argument_group("values of the configuration", "by default those of the data set's TOML file")
    for each in fields(Config):
        if each.name == "data":
            continue
        kind, more = _KINDS[str(each.type)]
        values.add_argument(
            _option(each.name),
            dest=each.name,
            type=kind,
            choices=CHOICES.get(each.name),
            help=each.metadata["help"],
            **more,
        )


def _number_or_none(text: str) -> float | str:
    """Read a number or the word none."""
    return text if text == "none" else float(text)


def _natural(text: str) -> int:
    """Read an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0")
    return int(text)


def _number_or_each(text: str) -> float | dict[str, float]:
    """Read a number, or such as ``audio=1e-10,video=1e-15``."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if "=" not in text:
            return float(text)
        found = {name: float(value) for name, _, value in parts}
    except ValueError:
        found = {}
    if len(found) < len(parts) or "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor such as audio=1e-10,video=1e-15, each once")
    return found


def _paths(text: str) -> dict[str, Path]:
    """Read such as ``text=folder``."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not such as text=FOLDER")
    return {name: Path(path)}


class _Merge(argparse.Action):
    """Puts several mappings together."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        merged: dict[str, Any] = dict(getattr(namespace, self.dest) or {})
        for each in values:
            merged |= each
        setattr(namespace, self.dest, merged)


def _mapping(text: str) -> dict[str, str | None] | str:
    """Read such as ``audio=video,video=none``, or the word none."""
    if text == "none":
        return text
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and sign and whose for name, sign, whose in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not such as audio=video,video=none")
    return {name: None if whose == "none" else whose for name, _, whose in parts}


_KINDS: dict[str, tuple[Callable[[str], Any], dict[str, Any]]] = {
    "int": (int, {"metavar": "N"}),
    "float": (float, {"metavar": "X"}),
    "str": (str, {}),
    "float | None": (_number_or_none, {"metavar": "X"}),
    "Mapping[str, str | None] | None": (_mapping, {"metavar": "A=B,…"}),
    "tuple[float, ...]": (float, {"nargs": "+", "metavar": "X"}),
    "tuple[int, ...]": (int, {"nargs": "+", "metavar": "N"}),
    "tuple[str, ...]": (str, {"nargs": "*", "metavar": "NAME"}),
    "float | Mapping[str, float]": (_number_or_each, {"metavar": "X"}),
}
"""How an option is read, by the type of the configuration's field."""


if __name__ == "__main__":
    sys.exit(main())
