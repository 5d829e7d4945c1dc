"""The header and the documentation's tables are those of the table in abi.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lbgym.sharedmemory import generate, get_include

FILES = ["HEADER_FILE", "DOCUMENT"]


def test_no_generated_file_is_stale() -> None:
    command = [sys.executable, "-m", "lbgym.sharedmemory.generate", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The generated files, somewhere else."""
    found = {}
    for name in FILES:
        original: Path = getattr(generate, name)
        found[name] = tmp_path / original.name
        found[name].write_text(original.read_text())
        monkeypatch.setattr(generate, name, found[name])
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_stale_file_is_named_and_written_anew(name: str, copies: dict[str, Path], capsys) -> None:
    good = copies[name].read_text()
    assert "published_at" in good
    copies[name].write_text(good.replace("published_at", "published"))
    assert generate.main(["--check"]) == 1
    assert f"{copies[name]} is stale" in capsys.readouterr().err
    assert copies[name].read_text() != good
    assert generate.main([]) == 0
    assert copies[name].read_text() == good
    assert generate.main(["--check"]) == 0


def test_a_change_of_the_table_makes_both_stale(copies: dict[str, Path], capsys, monkeypatch) -> None:
    monkeypatch.setattr(generate.abi, "FLAG_SAFE", 8)
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.count("is stale") == 2


def test_prose_around_the_tables_is_kept(copies: dict[str, Path]) -> None:
    text = copies["DOCUMENT"].read_text()
    assert generate.document(f"Before.\n{text}After.\n") == f"Before.\n{text}After.\n"


@pytest.mark.parametrize("line", ["<!-- begin frame (generated) -->\n", "<!-- end header -->\n"])
def test_a_lost_marker_is_refused(line: str) -> None:
    text = generate.DOCUMENT.read_text()
    with pytest.raises(ValueError, match="must have the markers"):
        generate.document(text.replace(line, ""))


def test_an_unknown_option_is_refused(capsys) -> None:
    assert generate.main(["--chekc"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_folder_to_include_has_both_headers() -> None:
    assert {path.name for path in Path(get_include()).iterdir()} >= {"lbgym_shm.h", "lbgym_features.h"}
