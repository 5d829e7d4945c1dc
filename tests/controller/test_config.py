from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lbgym.controller import ControllerConfig, SafetyEnvelope, config_from
from lbgym.controller.config import KEYS, help_of
from lbgym.errors import InvalidOptionError, LbgymError, UnknownNameError

BASE = {"policy": "uniform", "shm": "lb0"}


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "controller.toml"
    path.write_text(
        'policy = "latency"\nshm = "lb1"\ntimeout = 3\nfloor = 0.2\nattach_timeout = inf\nrecover = false\n'
    )
    config = config_from({"shm": "lb0", "floor": 0.3, "lease": None}, path)
    assert config == ControllerConfig(policy="latency", shm="lb0", timeout=3.0, floor=0.3, recover=False)
    assert isinstance(config.timeout, float) and config.lease is None
    assert config.envelope == SafetyEnvelope(floor=0.3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"step_interval": 0}, "step_interval must be a number above 0 and at most 3600, got 0"),
    ({"step_interval": "0.25"}, "step_interval must be a number above 0"),
    ({"lease": math.nan}, "lease must be a number above 0, got nan"),
    ({"lease": 10**400}, "lease must be a number above 0, got 1000"),
    ({"timeout": True}, "timeout must be a number above 0"),
    ({"timeout": 16**5000}, "timeout must be a number above 0 and at most 3600, got int of too many digits to print"),
    ({"attach_timeout": 10**400}, "attach_timeout must be a number of at least 0, got 1000"),
    ({"max_timeouts": -1}, "max_timeouts must be a whole number from 0 to 1000000000, got -1"),
    ({"max_timeouts": 2.0}, "max_timeouts must be a whole number from 0 to 1000000000, got 2.0"),
    ({"fallback_after": 0}, "fallback_after must be a whole number from 1 to"),
    ({"floor": 0.0}, "floor must be a number from 1e-06 to 1, got 0.0"),
    ({"max_ratio": 0.9}, "max_ratio must be a number of at least 1, got 0.9"),
    ({"max_ratio": 10**400}, "max_ratio must be a number of at least 1, got 1000"),
    ({"rate_limit": -math.inf}, "rate_limit must be a number of at least 1"),
    ({"metrics_port": 65_536}, "metrics_port must be a whole number from 0 to 65535, got 65536"),
    ({"recover": 1}, "recover must be true or false, got 1"),
    ({"policy": ""}, "policy must be a text that is not empty"),
    ({"timeout": None}, "timeout must be a number above 0"),
    ({"log_level": "inf"}, "unknown log_level 'inf'. Did you mean 'info'"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[f"{key}-{i}" for i, ((key, *_), _) in enumerate(BAD)])
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(LbgymError) as raised:
        ControllerConfig(**(BASE | values))
    assert message in str(raised.value)


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "controller.toml"
    for text, error, message in (
        ("floor = 7", InvalidOptionError, "floor must be a number from 1e-06 to 1, got 7"),
        (f"rate_limit = {10**400}", InvalidOptionError, "rate_limit must be a whole number of 64 bits, got 1000"),
        ('fallback = ""', InvalidOptionError, "fallback must be a text"),
        ("metrics-port = 1", UnknownNameError, "Did you mean 'metrics_port'"),
        ("[envelope]", UnknownNameError, "unknown key 'envelope'"),
        ("floor =", InvalidOptionError, "not valid TOML"),
        ('policy = "uniform"', InvalidOptionError, "'shm' is missing: give --shm, nor is it in"),
    ):
        path.write_text(text)
        with pytest.raises(error) as raised:
            config_from({}, path)
        assert str(path) in str(raised.value) and message in str(raised.value)
    with pytest.raises(InvalidOptionError, match="no configuration file"):
        config_from({}, tmp_path / "missing.toml")
    with pytest.raises(InvalidOptionError, match="cannot read configuration file"):
        config_from({}, tmp_path)
    with pytest.raises(UnknownNameError, match="'timeouts'"):
        config_from({"timeouts": 1})


def test_help_says_the_default() -> None:
    assert help_of("floor").endswith("default: 0.05.")
    assert help_of("log_format") == "Log lines: json, text; default: json."
    assert all(help_of(key)[0].isupper() and help_of(key).endswith(".") for key in KEYS)
