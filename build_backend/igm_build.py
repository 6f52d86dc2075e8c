"""The build backend (PEP 517): maturin, told where the torch is that the extension is built against.

torch-sys asks the first ``python`` or ``python3`` on PATH for torch, whatever interpreter pip runs, and does not
notice that torch has moved since the last build. So every hook that compiles puts the running interpreter first on PATH
and sets ``LIBTORCH_USE_PYTORCH`` to the path of its torch: a change of that value makes torch-sys build again. What
cannot be built (no cargo, another torch than the pinned one) is refused before anything is compiled.

Run as a script, it does the same for other commands::

    python build_backend/igm_build.py cargo clippy --release     # any command, in the environment of the build
    python build_backend/igm_build.py requirements               # prints what a build without isolation needs
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Settings = Mapping[str, Any] | None


def torch_requirement() -> str:
    """Return the requirement on torch that ``pyproject.toml`` makes, ``torch==…``."""
    found = re.search(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("igm-rs: pyproject.toml pins no torch")
    return found[1]


def check_cargo() -> None:
    """Refuse to go on without cargo."""
    if shutil.which("cargo") is None:
        raise SystemExit(
            "igm-rs is built from source and needs Rust: no `cargo` was found on PATH. Install Rust with rustup "
            "(https://rustup.rs), then run the same command again."
        )


def torch_path() -> Path:
    """Return the directory of the installed torch; refuse a missing one and one of another version than the pinned."""
    requirement = torch_requirement()
    needed = requirement.removeprefix("torch==")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"igm-rs is built against torch {needed}, and no torch is installed: pip install {requirement}"
        )
    found = importlib.metadata.version("torch")
    if found.partition("+")[0] != needed:
        raise SystemExit(
            f"igm-rs is built against torch {needed}, but torch {found} is installed: pip install {requirement}"
        )
    return Path(spec.origin).parent


@contextmanager
def build_environment(*, torch: bool = True) -> Iterator[None]:
    """Set the environment that torch-sys, pyo3 and maturin read, and put it back afterwards.

    Parameters
    ----------
    torch : bool
        Whether something is compiled, so that torch must be there.
    """
    check_cargo()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="igm-rs-build-") as directory:
        # Scripts, not links: an interpreter finds its virtual environment by the path that it was started with.
        for name in ("python", "python3"):
            script = Path(directory, name)
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        if torch:
            os.environ["LIBTORCH_USE_PYTORCH"] = str(torch_path())
        os.environ["PATH"] = os.pathsep.join([directory, *_maturin_directories(), before.get("PATH", os.defpath)])
        # As maturin sets them, so that cargo on its own does not compile pyo3 again, and maturin a third time.
        os.environ["PYO3_PYTHON"] = sys.executable
        bits = 64 if sys.maxsize > 2**32 else 32
        os.environ["PYO3_ENVIRONMENT_SIGNATURE"] = "{}-{}.{}-{}bit".format(
            sys.implementation.name, *sys.version_info[:2], bits
        )
        # A virtual environment that happens to be active need not be the one that this build is for.
        os.environ["VIRTUAL_ENV"] = sys.prefix
        os.environ.pop("CONDA_PREFIX", None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _maturin_directories() -> list[str]:
    """Return where the program of the importable maturin lies: PATH need not lead to it without build isolation."""
    spec = importlib.util.find_spec("maturin")
    if spec is None or spec.origin is None:
        return []
    scripts = Path(spec.origin).parents[4] / "bin"
    return [str(scripts)] if (scripts / "maturin").exists() else []


def _maturin(hook: str, *arguments: Any, torch: bool = True) -> str:
    """Call maturin's hook of that name in the environment of the build."""
    import maturin

    with build_environment(torch=torch):
        return str(getattr(maturin, hook)(*arguments))


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Ask for torch, once it is sure that there is a compiler to use it with."""
    check_cargo()
    return [torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Ask for what a wheel needs."""
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """Ask for nothing: a source distribution compiles nothing, but cargo lists its files."""
    check_cargo()
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the metadata."""
    return _maturin("prepare_metadata_for_build_wheel", metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the metadata, the same as a wheel's."""
    return _maturin("prepare_metadata_for_build_editable", metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Compile and pack."""
    return _maturin("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Compile into the source tree and pack a link to it."""
    return _maturin("build_editable", wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Pack the sources."""
    return _maturin("build_sdist", sdist_directory, config_settings, torch=False)


def main(command: list[str]) -> int:
    """Print what a build needs, or run a command in the environment of the build."""
    if command == ["requirements"]:
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        print(*re.findall(r'^requires = \["([^"]+)"\]', pyproject, flags=re.MULTILINE), torch_requirement(), sep="\n")
        return 0
    with build_environment():
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
