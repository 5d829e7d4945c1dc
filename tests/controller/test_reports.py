"""Lines of the log, and messages to the service manager."""

from __future__ import annotations

import json
import logging
import re
import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.controller.logs import JsonFormatter, TextFormatter, log_event, logging_to_stderr
from lbgym.controller.notify import Notifier

FIELDS: dict[str, Any] = {
    "array": np.array([1.0, np.nan, np.inf]),
    "flags": np.array([True, False]),
    "number": np.float32(0.1),
    "count": np.int64(7),
    "names": ("a", "b"),
    "path": Path("/x"),
    "nothing": None,
}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_every_record_is_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = logging.getLogger("lbgym"), logging.getLogger("py.warnings")
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    with logging_to_stderr("json", "info"):
        log_event(logging.INFO, "thing", "lb0", "it happened", **FIELDS)
        log_event(logging.DEBUG, "step", "lb0")
        logging.getLogger("lbgym").warning("region %r\nis odd", "lb0")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", stacklevel=1)
        try:
            raise RuntimeError("a fault")
        except RuntimeError:
            logging.getLogger("lbgym.x").exception("failed", extra={"event": "crash", "region": "lb0"})
    thing, odd, old, crash = map(json.loads, lines(capsys))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", thing.pop("time"))
    assert thing == {
        "level": "info", "event": "thing", "region": "lb0", "message": "it happened", "array": [1.0, None, None],
        "flags": [True, False], "number": 0.100000001, "count": 7, "names": ["a", "b"], "path": "/x", "nothing": None,
    }  # fmt: skip
    assert odd["event"] == "log" and odd["level"] == "warning" and odd["message"] == "region 'lb0'\nis odd"
    assert "old" in old["message"]
    assert crash["event"] == "crash" and "RuntimeError: a fault" in crash["traceback"]
    assert [(one.handlers[:], one.level, one.propagate) for one in loggers] == before


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("text", "debug"):
        log_event(logging.DEBUG, "step", "lb0", weights=np.ones(2))
        log_event(logging.WARNING, "thing", "lb0", "it happened", count=1)
    first, second = lines(capsys)
    assert first.endswith('Z debug   step region="lb0" weights=[1.0, 1.0]')
    assert second.endswith('Z warning thing: it happened region="lb0" count=1')
    assert isinstance(TextFormatter(), logging.Formatter) and isinstance(JsonFormatter(), logging.Formatter)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_states_reach_the_service_manager(kind: str, shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(shm_dir / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path if kind == "path" else "\0" + path)
        manager.settimeout(10.0)
        monkeypatch.setenv("NOTIFY_SOCKET", path if kind == "path" else "@" + path)
        notifier = Notifier()
        notifier.notify("READY=1", "STATUS=driving")
        assert manager.recv(4096) == b"READY=1\nSTATUS=driving"
    # Nobody listens any more, nor ever did.
    notifier.notify("WATCHDOG=1")
    notifier.close()
    notifier.close()
    monkeypatch.delenv("NOTIFY_SOCKET")
    silent = Notifier()
    silent.notify("READY=1")
    silent.close()
