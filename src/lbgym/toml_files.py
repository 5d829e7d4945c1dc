"""Configurations in TOML files."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import checks
from .errors import InvalidOptionError


def read_toml(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A configuration file and its content.

    Raises:
        InvalidOptionError: for a file that is not there, cannot be read or is no TOML.
    """
    file = Path(path).expanduser()
    try:
        values = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InvalidOptionError(f"there is no configuration file {file}") from None
    except OSError as error:
        raise InvalidOptionError(f"cannot read configuration file {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidOptionError(f"{file} is not valid TOML: {error}") from error
    for key, value in _leaves(values):
        # Python takes any, TOML's have 64 bits; there are ones too large for a float, or to be printed.
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise InvalidOptionError(f"{file}: {key} must be a whole number of 64 bits, got {checks.shown(value)}")
    return file, values


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values within tables and lists, by the key that they are below."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value
