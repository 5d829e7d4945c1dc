"""The notebook of the examples runs from top to bottom, and is committed with what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
#: Bytes that a committed notebook may have: more makes every clone and every page that shows it slow.
LARGEST = 400_000
#: Absolute paths, which tell of the machine it ran on and mean nothing on another.
PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|Users|var)/")


def outputs(notebook: Any) -> Iterator[tuple[int, Any]]:
    """Every output with the number of its cell."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            yield number, output


def texts(output: Any) -> Iterator[str]:
    """All there is to read in an output."""
    yield output.get("text", "")
    yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def complaints(notebook: Any) -> list[str]:
    """Errors and warnings among the outputs."""
    found = []
    for number, output in outputs(notebook):
        if output.output_type == "error":
            found.append(f"cell {number}: {output.ename}: {output.evalue}")
        elif output.get("name") == "stderr" and re.search("warning|error", output.text, flags=re.IGNORECASE):
            found.append(f"cell {number}: {output.text}")
    return found


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_runs_from_top_to_bottom(committed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ipykernel", "matplotlib", "pettingzoo", "rich", "scipy", "torch"):
        pytest.importorskip(module)
    nbclient = pytest.importorskip("nbclient")
    from traitlets.config import Config

    monkeypatch.setenv("LBGYM_NOTEBOOK_STEPS", "20_000")
    monkeypatch.setenv("LBGYM_NOTEBOOK_SEEDS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # figures go into the notebook, not to a display
    monkeypatch.delenv("MPLBACKEND", raising=False)
    ran = nbformat.v4.new_notebook(cells=[cell.copy() for cell in committed.cells], metadata=committed.metadata)
    # Over sockets in files: ports are chosen before the kernel begins, and another process may take one of them.
    sockets = {"transport": "ipc", "connection_file": str(tmp_path / "kernel.json")}
    nbclient.NotebookClient(
        ran,
        kernel_name="python3",
        timeout=180,
        resources={"metadata": {"path": str(tmp_path)}},
        config=Config({"KernelManager": sockets}),
    ).execute()
    assert complaints(ran) == []
    # the same cells say something as in the committed one
    assert {number for number, _ in outputs(ran)} == {number for number, _ in outputs(committed)}


def test_is_committed_with_its_outputs(committed: Any) -> None:
    nbformat.validate(committed)
    assert complaints(committed) == []
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    # in order and without gaps: run once, in a fresh kernel
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = [output for _, output in outputs(committed)]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert sum("text/html" in output.get("data", {}) for output in shown) == 2
    assert NOTEBOOK.stat().st_size < LARGEST


def test_shows_no_paths_of_a_machine(committed: Any) -> None:
    assert [number for number, output in outputs(committed) if any(PATH.search(text) for text in texts(output))] == []
    assert PATH.search("saved to /home/somebody/agent.pt")
    assert not PATH.search('https://host/home/x <a href="../docs/tmp/x"> 1/work/2')
