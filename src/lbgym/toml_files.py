"""Configurations in TOML files."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from .errors import InvalidOptionError


def read_toml(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A configuration file and its content.

    Raises:
        InvalidOptionError: for a file that is not there, cannot be read or is no TOML.
    """
    file = Path(path).expanduser()
    try:
        return file, tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InvalidOptionError(f"there is no configuration file {file}") from None
    except OSError as error:
        raise InvalidOptionError(f"cannot read configuration file {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidOptionError(f"{file} is not valid TOML: {error}") from error
