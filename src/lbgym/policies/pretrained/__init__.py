"""Trained policies that come with the package, by name: ``index.toml`` has a card of each, the files lie beside it."""

from __future__ import annotations

from .cards import Card, card, pretrained_file, pretrained_names

__all__ = ["Card", "card", "pretrained_file", "pretrained_names"]
