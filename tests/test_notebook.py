"""The notebooks: stored with their output, complete and free of machine paths, and running today as they are stored."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "replace_mla.ipynb"
PICTURES = 6
TWO_LINES = "lines written: 2, lines that fall away: 0"
FIVE_LINES = "lines written: 5, lines that fall away: 6"
TO_THE_BIT = "equal to the unbroken run to the bit: True"
PATHS = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|opt|var|work|Users|mnt|private)\b|[A-Z]:\\|site-packages|\.venv")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """Return all that the notebook printed, as one text."""
    return "".join(
        output.text for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"
    )


def pictures(notebook):
    return [
        output.data["image/png"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]


def speaks(cell):
    """Whether a cell does something to be seen: prints, draws, or shows a progress bar."""
    called = {
        ast.unparse(node.func)
        for statement in ast.parse(cell.source).body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    }
    return bool(called & {"print", "plt.show", "tqdm", "tell"})


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(path, folder, variables):
    """Return a notebook after a run in `folder`, where only it is."""
    copy = shutil.copy(path, folder)
    notebook = nbformat.read(copy, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, whatever the user has installed
        for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(variable, str(folder / variable))
        for variable, value in variables.items():
            patch.setenv(variable, value)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run of two epochs."""
    return run(NOTEBOOK, tmp_path_factory.mktemp("notebooks"), {"IGM_NOTEBOOK_EPOCHS": "2"})


def test_it_runs_and_says_what_it_should(executed):
    # An error in a cell, a failed assertion among them, has already failed the fixture.
    text = printed(executed)
    assert "training: 1271 windows" in text
    assert text.count(TWO_LINES) == text.count(FIVE_LINES) == 1
    assert text.count(TO_THE_BIT) == 2
    assert "Warning" not in text
    assert PATHS.search(text) is None
    assert len(pictures(executed)) == PICTURES


def test_every_cell_that_speaks_has_its_output_stored(stored):
    silent = [cell.source for cell in code_cells(stored) if speaks(cell) and not cell.outputs]
    assert silent == []
    assert sum(speaks(cell) for cell in code_cells(stored)) == 16
    assert not [o for cell in code_cells(stored) for o in cell.outputs if o.output_type == "error"]


def test_pictures_are_stored(stored):
    assert len(pictures(stored)) == PICTURES
    assert all(len(picture) > 10_000 for picture in pictures(stored))


def test_it_was_run_from_top_to_bottom_in_one_go(stored):
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, len(code_cells(stored)) + 1))


def test_stored_text_is_of_the_full_run(stored):
    text = printed(stored)
    assert text.count(TWO_LINES) == text.count(FIVE_LINES) == 1
    assert "of 12, loaded with weights_only=True, continued" in text
    assert text.count(TO_THE_BIT) == 2
    assert "441 of 480 steps were projected" in text  # all but those before the first T of each


def test_nothing_of_a_machine_is_stored(stored):
    everything = NOTEBOOK.read_text(encoding="utf-8")
    for picture in pictures(stored):
        everything = everything.replace(picture, "")
    assert PATHS.search(everything) is None
    assert "Warning" not in everything
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert stored.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert all(cell.metadata == {} for cell in stored.cells)


def test_the_loop_as_it_is_knows_nothing_of_igm_rs(stored):
    cells = code_cells(stored)
    first = next(i for i, cell in enumerate(cells) if "import igm_rs" in cell.source)
    assert cells[first].source.startswith("import igm_rs  # new\n")
    assert any("loss_a.backward()\n    optimizer.step()" in cell.source for cell in cells[:first])
    marked = [line for cell in cells for line in cell.source.splitlines() if line.endswith("# new")]
    assert len(marked) == 2 + 4  # two lines; with SAM the import is there already


# ----------------------------------------------------------------------------------------------------------------------
# The other two


OTHERS = {
    "your_own_model": ("IGM_NOTEBOOK_ROUNDS", "2", 6, "is below the resolution of the weights"),
    "paper_figures": ("IGM_NOTEBOOK_STEPS", "8", 6, "rho of which less than half arrives at the weights: 1e-15"),
}
"""Name to: what makes it short in the tests, pictures, and words that it prints."""


@pytest.mark.parametrize("name", OTHERS)
def test_another_notebook_is_stored_with_its_output(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    _, _, count, words = OTHERS[name]
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert len(pictures(notebook)) == count
    assert words in printed(notebook)
    assert PATHS.search("\n".join([printed(notebook), *(cell.source for cell in notebook.cells)])) is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)


@pytest.mark.parametrize("name", OTHERS)
def test_another_notebook_runs(name, tmp_path):
    variable, value, count, words = OTHERS[name]
    notebook = run(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, {variable: value})
    assert len(pictures(notebook)) == count
    assert words in printed(notebook)
