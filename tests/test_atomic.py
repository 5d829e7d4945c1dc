"""Files that are whole or not there, also where the system refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lbgym.atomic import check_writable, write_whole
from lbgym.errors import FileWriteError

#: Runs with a limit on the size of files, which the system enforces as it does a full disk.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""


def test_no_space_is_one_sentence_and_the_former_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "agent.pt"
    target.write_text("former")
    script = LIMITED + (
        "from pathlib import Path\n"
        "from lbgym.atomic import write_whole\n"
        "from lbgym.errors import FileWriteError\n"
        "try:\n    write_whole(Path(sys.argv[1]), lambda stream: stream.write(bytes(100_000)))\n"
        "except FileWriteError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {target}: File too large\n"
    assert target.read_text() == "former"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileWriteError, match=r"cannot write .*agent\.pt: (Not a directory|File exists)"):
        check_writable(tmp_path / "file" / "agent.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileWriteError, match="it is a folder"):
        check_writable(tmp_path / "folder.pt")
    with pytest.raises(FileWriteError, match="No such file or directory"):
        write_whole(tmp_path / "none" / "agent.pt", lambda stream: stream.write(b""))
    with pytest.raises(OSError, match="cannot write"):
        write_whole(tmp_path / "none" / "agent.pt", lambda stream: stream.write(b""))
