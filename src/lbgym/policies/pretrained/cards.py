"""The cards of the pretrained policies, and their files."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError, UnknownNameError

#: Version of ``index.toml``.
FORMAT = 1
#: Where the files are.
FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a pretrained policy.

    Attributes:
        name: of the policy.
        file: its file, beside ``index.toml``.
        sha256: of the file.
        version: grows with every training whose file takes the place of the last one.
        description: one line.
        trained_on: what it has seen.
        training: how long, with which seeds, on what.
        command: makes it again.
        suite: scores on the benchmark suite, by name.
        limits: what it cannot do, or was not tried on.
    """

    name: str
    file: str
    sha256: str
    version: int
    description: str
    trained_on: str
    training: str
    command: str
    suite: Mapping[str, Any]
    limits: tuple[str, ...]


def pretrained_names() -> tuple[str, ...]:
    """The names."""
    return tuple(_index())


def card(name: str) -> Card:
    """The card of a policy.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name.lower() not in _index():
        raise UnknownNameError("pretrained policy", name, _index())
    return _index()[name.lower()]


def pretrained_file(name: str) -> Path:
    """The file of a policy.

    Raises:
        UnknownNameError: there is none of that name.
        CheckpointError: if the file is missing or is not the one that the index has.
    """
    found = card(name)
    path = FOLDER / found.file
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"pretrained policy {found.name!r}: {path} cannot be read ({error.strerror}); install lbgym again"
        ) from None
    if digest != found.sha256:
        raise CheckpointError(
            f"pretrained policy {found.name!r}: {path} has SHA-256 {digest[:12]}..., and index.toml says "
            f"{found.sha256[:12]}...; install lbgym again"
        )
    return path


@cache
def _index() -> Mapping[str, Card]:
    return read_index((FOLDER / "index.toml").read_text("utf-8"))


def read_index(text: str) -> Mapping[str, Card]:
    """The cards in the text of an ``index.toml``.

    Raises:
        CheckpointError: for another format or missing keys.
    """
    entries = tomllib.loads(text)
    found = entries.pop("format", None)
    if found != FORMAT:
        raise CheckpointError(f"index.toml of pretrained policies has format {found!r}; this lbgym reads {FORMAT}")
    cards = {}
    for name, entry in entries.items():
        missing = [item.name for item in fields(Card) if item.name not in entry and item.name != "name"]
        if missing:
            raise CheckpointError(f"index.toml: pretrained policy {name!r} has no {', '.join(missing)}")
        cards[name] = Card(**{**entry, "name": name, "limits": tuple(entry["limits"])})
    return MappingProxyType(cards)
