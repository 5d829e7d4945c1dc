"""What ``lbgym describe`` says of a trained policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..policies import TRAINED_SUFFIXES, load_policy
from ..policies.pretrained import card, pretrained_file, pretrained_names
from ._console import heading, results_console

if TYPE_CHECKING:
    from ..policies import TrainedPolicy
    from ..policies.pretrained import Card


def is_policy(text: str) -> bool:
    """True for the name of a pretrained policy, or what a trained policy's file is called."""
    return text.lower() in pretrained_names() or text.lower().endswith(TRAINED_SUFFIXES)


def describe_policy(text: str, *, as_json: bool) -> None:
    """Print the card of a pretrained policy, or what a file says of itself.

    Raises:
        PolicyError: for a missing or bad file.
    """
    known = card(text) if text.lower() in pretrained_names() else None
    path = pretrained_file(text) if known is not None else Path(text)
    facts = _facts(load_policy(path), path)
    if as_json:
        typer.echo(json.dumps(facts | ({} if known is None else {"card": _plain(known)}), indent=1))
    else:
        _show(facts, known)


def _facts(policy: TrainedPolicy, path: Path) -> dict[str, Any]:
    """What a trained policy's file says."""
    from ..policies.neural import NetworkPolicy

    facts: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
    if isinstance(policy, NetworkPolicy):
        facts |= {
            "recipe": policy.algo,
            "steps": policy.step,
            "scenario": policy.config.get("scenario"),
            "seed": policy.config.get("seed"),
            "parameters": sum(value.size for value in policy.parameters.values()),
        }
    keys = policy.env_kwargs
    facts |= {
        "servers": policy.num_servers,
        "action_type": keys.get("action_type", "discrete"),
        "dispatch": policy.dispatch,
        "step_interval": policy.step_interval,
        "observation": {
            name: value
            for name, value in keys.items()
            if name in ("observation", "normalize", "use_ground_truth") or name.startswith("observe_")
        },
        "weights_alone": policy.weights_alone,
    }
    return facts


def _plain(known: Card) -> dict[str, Any]:
    return {name: getattr(known, name) for name in ("name", "sha256", "version", "description", "trained_on")} | {
        "training": known.training,
        "command": known.command,
        "suite": dict(known.suite),
        "limits": list(known.limits),
    }


def _show(facts: dict[str, Any], known: Card | None) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = results_console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        table.add_row(name, Text(str(value)))

    if known is not None:
        console.print(heading(known.name, f" {known.version}: {known.description}"), soft_wrap=False)
        row("trained on", known.trained_on)
        row("training", known.training)
        row("made by", known.command)
        suite = dict(known.suite)
        row("suite", suite.pop("summary", ""))
        for name, value in suite.items():
            row(f"  {name}", value)
        for i, limit in enumerate(known.limits):
            row("limits" if i == 0 else "", limit)
        row("SHA-256", known.sha256)
    else:
        console.print(heading(facts["file"], ""), soft_wrap=False)
    row("file", f"{facts['file']}, {facts['bytes']:,} bytes")
    if "recipe" in facts:
        row("recipe", f"{facts['recipe']}, {facts['steps']:,} steps, {facts['parameters']:,} parameters")
        if facts["scenario"] is not None:
            row("scenario", f"{facts['scenario']}, seed {facts['seed']}")
    row("servers", "any number" if facts["servers"] is None else f"{facts['servers']} alone")
    rule = facts["dispatch"] or "the scenario's own rule"
    row("actions", f"{facts['action_type']}, under {rule}")
    if facts["action_type"] == "index":
        without = "sets weights alone, and says so" if facts["weights_alone"] else "is refused"
        row("", f"a data plane without an index: {without}")
    if facts["step_interval"] is not None:
        row("step", f"{facts['step_interval']:g} s")
    shown = ", ".join(f"{name}={value}" for name, value in facts["observation"].items())
    row("observations", shown or "as by default")
    console.print(Padding(table, (0, 0, 0, 1)))
