"""The package: what it imports, what it refuses, what the built module links to, and how it is built and installed."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import igm_rs
from igm_rs import _igm_rs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20

sys.path.insert(0, str(ROOT / "build_backend"))
import igm_build  # noqa: E402


def python(code, *, cwd=None):
    """Run code in a fresh interpreter where warnings are errors, away from the source tree."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cargo():
    return tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))


# ---- what is said about the package --------------------------------------------------------------------------------


def test_versions_agree(cargo):
    assert igm_rs.__version__ == _igm_rs.__version__ == cargo["package"]["version"]
    assert importlib.metadata.version("igm-rs") == cargo["package"]["version"]


def test_torch_is_pinned_to_the_version_built_for(pyproject):
    assert pyproject["project"]["dependencies"][0] == f"torch=={_igm_rs.TORCH_VERSION}"
    assert f"torch=={_igm_rs.TORCH_VERSION}" in importlib.metadata.requires("igm-rs")
    assert torch.__version__.partition("+")[0] == _igm_rs.TORCH_VERSION


def test_tch_is_the_one_of_the_pair(cargo):
    """The crates that are bound to one torch have one version, in the manifest and in the lock file."""
    pinned = {name: cargo["dependencies"][name] for name in ("tch", "pyo3-tch", "torch-sys")}
    assert len(set(pinned.values())) == 1, pinned
    packages = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))["package"]
    locked = {package["name"]: package["version"] for package in packages if package["name"] in pinned}
    assert locked.keys() == pinned.keys()
    assert all(version.startswith(pinned[name] + ".") for name, version in locked.items()), locked


def test_the_pair_is_pinned_nowhere_else():
    files = [ROOT / "Makefile", ROOT / "build.rs", ROOT / ".ci/run"]
    for folder in ("src", "python", "build_backend", ".github", ".cargo"):
        files += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {".rs", ".cpp", ".py", ".pyi", ".yml", ".toml"}
        ]
    assert len(files) > 20
    pin = re.compile(rf'("|==){re.escape(_igm_rs.TORCH_VERSION)}')
    assert [str(path) for path in files if pin.search(path.read_text(encoding="utf-8"))] == []


LICENCES = "MIT AND BSD-3-Clause AND CC-BY-4.0 AND LicenseRef-Public-Domain"
"""Of the code, and of the data sets that come with it."""


def test_metadata():
    metadata = importlib.metadata.metadata("igm-rs")
    assert metadata["License-Expression"] == LICENCES
    assert set(metadata["Requires-Python"].replace(" ", "").split(",")) == {">=3.10", "<3.14"}
    assert set(metadata.get_all("Provides-Extra")) == {
        "bench", "dev", "experiments", "lightning", "notebook", "paper", "peers", "pretrained", "test", "transformers",
    }  # fmt: skip
    plain = [requirement for requirement in importlib.metadata.requires("igm-rs") if "extra ==" not in requirement]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in plain} == {"torch", "numpy"}


# ---- what an import does -------------------------------------------------------------------------------------------


def test_import_needs_torch_and_numpy_only(tmp_path):
    code = (
        "import sys, numpy, torch\n"
        "before = set(sys.modules)\n"
        "import igm_rs\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    new = set(ast.literal_eval(result.stdout))
    assert "igm_rs" in new
    assert new - sys.stdlib_module_names - {"igm_rs", "torch", "numpy"} == set()


def test_import_takes_no_noticeable_time(tmp_path):
    code = "import time, torch, numpy\nstart = time.perf_counter()\nimport igm_rs\nprint(time.perf_counter() - start)"
    assert min(float(python(code, cwd=tmp_path).stdout) for _ in range(3)) < 0.3


def test_import_without_torch(tmp_path):
    result = python("import sys; sys.modules['torch'] = None; import igm_rs", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: igm_rs needs torch=={_igm_rs.TORCH_VERSION}, and no torch is installed: "
        f"pip install torch=={_igm_rs.TORCH_VERSION}"
    )


@pytest.mark.parametrize("other", ["2.13.0", "2.11.1+cu130", "1.0"])
def test_import_under_another_torch_names_both(tmp_path, other):
    result = python(f"import torch; torch.__version__ = {other!r}; import igm_rs", cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert other.partition("+")[0] in last
    assert _igm_rs.TORCH_VERSION in last


@pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
def test_import_under_another_build_of_the_same_torch(tmp_path, suffix):
    version = _igm_rs.TORCH_VERSION + suffix
    result = python(f"import torch; torch.__version__ = {version!r}; import igm_rs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_of_a_debug_build_warns(tmp_path):
    """The flag is set by hand: this is the real module, which was built with optimisation."""
    code = (
        "import sys, torch, warnings\n"
        "from importlib.machinery import ExtensionFileLoader\n"
        "from importlib.util import module_from_spec, spec_from_loader\n"
        f"loader = ExtensionFileLoader('igm_rs._igm_rs', {_igm_rs.__file__!r})\n"
        "module = module_from_spec(spec_from_loader('igm_rs._igm_rs', loader))\n"
        "loader.exec_module(module)\n"
        "module.DEBUG = True\n"
        "sys.modules['igm_rs._igm_rs'] = module\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import igm_rs\n"
        "print([(each.category.__name__, str(each.message)) for each in caught])"
    )
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    [(category, message)] = ast.literal_eval(result.stdout)
    assert category == "RuntimeWarning"
    assert "built without optimisation" in message


def test_this_is_no_debug_build():
    assert _igm_rs.DEBUG is False


# ---- the built module ----------------------------------------------------------------------------------------------

LINKED = {
    *("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so"),
    *("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "libdl.so.2"),
    *("libgomp.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}


def dynamic_section(path):
    """Return (tag, value) of the dynamic section: NEEDED, SONAME, RPATH, RUNPATH and so on."""
    output = subprocess.run(["readelf", "-dW", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\((\w+)\)\s+(?:.*\[([^\]]*)\])?", output)


def test_module_is_small():
    assert Path(_igm_rs.__file__).stat().st_size <= 5 * MEBIBYTE


def test_module_finds_its_libraries_by_name_only():
    """With a path in it, the module would load torch's libraries without torch, and crash."""
    entries = dynamic_section(_igm_rs.__file__)
    needed = {value for tag, value in entries if tag == "NEEDED"}
    assert {"libtorch_python.so", "libtorch_cpu.so", "libc10.so"} <= needed
    assert needed <= LINKED
    assert not {tag for tag, _ in entries} & {"RPATH", "RUNPATH"}


def test_there_is_one_thread_pool(tmp_path):
    """Libgomp is the copy that torch has loaded, not a second one."""
    code = (
        "import torch, igm_rs\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "print(len(names))"
    )
    result = python(code, cwd=tmp_path)
    assert result.stdout == "1\n", result.stderr


def test_module_alone_imports_torch_itself(tmp_path):
    """Loaded without the package in front, it is still no crash: its own libraries are missing, and it says so."""
    code = (
        "from importlib.machinery import ExtensionFileLoader\n"
        "from importlib.util import module_from_spec, spec_from_loader\n"
        f"loader = ExtensionFileLoader('igm_rs._igm_rs', {_igm_rs.__file__!r})\n"
        "module_from_spec(spec_from_loader('igm_rs._igm_rs', loader))"
    )
    result = python(code, cwd=tmp_path)
    assert result.returncode == 1
    assert re.match(r"ImportError: lib\w+\.so: cannot open shared object file", result.stderr.splitlines()[-1])


# ---- the build backend ---------------------------------------------------------------------------------------------


def test_backend_asks_for_the_pinned_torch():
    assert igm_build.get_requires_for_build_wheel() == [f"torch=={_igm_rs.TORCH_VERSION}"]
    assert igm_build.get_requires_for_build_editable() == [f"torch=={_igm_rs.TORCH_VERSION}"]
    assert igm_build.get_requires_for_build_sdist() == []


@pytest.mark.parametrize(
    "hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist"]
)
def test_backend_refuses_early_without_cargo(monkeypatch, tmp_path, hook):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^igm-rs is built from source and needs Rust: no `cargo` .* rustup"):
        getattr(igm_build, hook)()


def test_backend_refuses_another_torch(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "2.13.0+cpu")
    needed = re.escape(_igm_rs.TORCH_VERSION)
    message = (
        rf"^igm-rs is built against torch {needed}, but torch 2\.13\.0\+cpu is installed: pip install torch=={needed}$"
    )
    with pytest.raises(SystemExit, match=message), igm_build.build_environment():
        pass


def test_backend_refuses_a_missing_torch(monkeypatch):
    monkeypatch.setattr(igm_build.importlib.util, "find_spec", lambda _name: None)
    needed = re.escape(_igm_rs.TORCH_VERSION)
    message = rf"^igm-rs is built against torch {needed}, and no torch is installed: pip install torch=={needed}$"
    with pytest.raises(SystemExit, match=message), igm_build.build_environment():
        pass


@pytest.mark.parametrize("name", ["python", "python3"])
def test_backend_puts_the_running_interpreter_first(monkeypatch, tmp_path, name):
    """Whatever PATH and the active virtual environment say, torch-sys asks this interpreter."""
    for other in ("python", "python3"):
        (tmp_path / other).write_text("#!/bin/sh\necho wrong\n", encoding="utf-8")
        (tmp_path / other).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    monkeypatch.setenv("LIBTORCH_USE_PYTORCH", "1")
    before = dict(os.environ)
    with igm_build.build_environment():
        asked = subprocess.run(
            [name, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert asked == sys.prefix
        assert os.environ["LIBTORCH_USE_PYTORCH"] == str(Path(torch.__file__).parent)
        assert os.environ["VIRTUAL_ENV"] == sys.prefix
        assert os.environ["PYO3_PYTHON"] == sys.executable
        assert "CONDA_PREFIX" not in os.environ
        assert shutil.which("maturin") is not None
    assert dict(os.environ) == before


def test_backend_puts_the_environment_back_after_an_error():
    before = dict(os.environ)
    with pytest.raises(KeyError), igm_build.build_environment():
        raise KeyError
    assert dict(os.environ) == before


def test_backend_as_a_script():
    script = [sys.executable, str(ROOT / "build_backend/igm_build.py")]
    printed = subprocess.run([*script, "requirements"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(rf"maturin\S+\ntorch=={re.escape(_igm_rs.TORCH_VERSION)}\n", printed)
    assert subprocess.run([*script, "sh", "-c", "exit 7"], check=False).returncode == 7


def test_source_distribution_is_complete(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / igm_build.build_sdist(str(tmp_path))) as archive:
        names = {Path(name).relative_to(Path(name).parts[0]) for name in archive.getnames()}
    patterns = [
        "src/*.*",
        "src/python/*",
        "python/igm_rs/**/*.py*",
        "python/igm_rs/experiments/archives/*",
        "python/igm_rs/experiments/configurations/*",
        "tests/*.py",
        "build_backend/*.py",
        "notebooks/*.ipynb",
        ".cargo/*",
    ]
    wanted = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern) if path.suffix != ".pyc"}
    top = ["Cargo.toml", "Cargo.lock", "pyproject.toml", "build.rs", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"]
    assert len(wanted) > 20
    assert (wanted | {Path(name) for name in top}) - names == set()
    assert [name for name in names if name.suffix in {".so", ".pyc"} or name.parts[0] in {"target", "dist"}] == []


# ---- pip, for real: compiles several times ---------------------------------------------------------------------------


@pytest.mark.slow
def test_pip_installs_every_way(tmp_path):
    """With and without isolation, twice in a row, from elsewhere, by a path with a space, editable, as a wheel."""
    tree = tmp_path / "source tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns("target", ".venv*", ".git", "*.so", "__pycache__", "dist")
    )
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}

    def run(*command, cwd=elsewhere):
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    interpreter = str(environment / "bin/python")

    def pip(*arguments, cwd=elsewhere):
        run(interpreter, "-m", "pip", *arguments, cwd=cwd)
        code = "import igm_rs; print(igm_rs.__file__)"
        return Path(run(interpreter, "-W", "error", "-c", code).strip())

    installed = environment / "lib"
    for _ in range(2):
        assert installed in pip("install", str(tree)).parents
    assert installed in pip("install", "--force-reinstall", "--no-deps", ".", cwd=tree).parents
    pip("install", *igm_build_requirements())
    for _ in range(2):
        assert installed in pip("install", "--no-build-isolation", str(tree)).parents
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(tree))
    [wheel] = (tmp_path / "dist").glob("*.whl")
    check_wheel(wheel)
    run(interpreter, "-m", "pip", "uninstall", "--yes", "igm-rs")
    assert installed in pip("install", str(wheel)).parents
    assert tree in pip("install", "--no-build-isolation", "--editable", str(tree)).parents


def igm_build_requirements():
    script = [sys.executable, str(ROOT / "build_backend/igm_build.py"), "requirements"]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()


def check_wheel(path):
    """The archives of the experiments are 7 MB of it."""
    assert path.stat().st_size <= 12 * MEBIBYTE
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("/METADATA"))))
    assert {Path(name).parts[0] for name in names} == {"igm_rs", f"igm_rs-{metadata['Version']}.dist-info"}
    assert [Path(name).name.partition(".")[0] for name in names if ".so" in Path(name).name] == ["_igm_rs"]
    assert "igm_rs/py.typed" in names
    assert "igm_rs/_igm_rs.pyi" in names
    archives = ROOT / "python" / "igm_rs" / "experiments" / "archives"
    assert {f"igm_rs/experiments/archives/{file.name}" for file in archives.iterdir()} <= set(names)
    assert metadata["License-Expression"] == LICENCES
    texts = {Path(name).name for name in names if "/licenses/" in name}
    assert texts == {"LICENSE", "LICENCES.md", "watch.LICENSE"}
