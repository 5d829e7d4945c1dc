"""``lbgym tune``: search for the settings of a recipe, on this machine or on a Ray cluster."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidOptionError
from ._console import results_console
from ._progress import ProgressBar
from .train import ALGO_HELP, SET_HELP, chosen_config, with_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..training.tuning import TuningResult


def tune(
    param: Annotated[
        list[str],
        typer.Option(
            "--param",
            "-p",
            help="SETTING=DISTRIBUTION, such as learning_rate=loguniform(1e-4,1e-2), gamma=uniform(0.9,0.99), "
            "hidden=choice(32,64), epochs=randint(1,5), num_steps=grid(8,16,32). May be repeated.",
        ),
    ],
    scenario: Annotated[
        str | None, typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.")
    ] = None,
    algo: Annotated[str | None, typer.Option(metavar="NAME", help=ALGO_HELP, show_default="ppo")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file: algo, and settings that all trials share.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Environment steps of a trial, over all replicas.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Seconds of a trial.")] = None,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="Trials to draw.")] = 8,
    metric: Annotated[str, typer.Option(help="What counts at the end of a trial: reward or fct_mean.")] = "reward",
    early_stopping: Annotated[bool, typer.Option(help="Stop trials that are worse than most (ASHA).")] = True,
    cpus: Annotated[float, typer.Option(min=0.1, help="Cores that a trial takes.")] = 1.0,
    max_failures: Annotated[
        int, typer.Option(min=0, help="How often a trial continues from its checkpoint when its node is lost.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster.", show_default="RAY_ADDRESS, else a local one")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Folder or address for checkpoints that all machines reach.", show_default="in --out"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the best checkpoint and best.toml.")] = Path(
        "out/tune"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and no progress.")] = False,
) -> None:
    """Try settings of a recipe side by side with Ray Tune, and keep the best.

    Prints all trials, the best first, and writes its checkpoint and a configuration for `lbgym train --config`.
    """
    from ..training.tuning import parse_space, tune_recipe

    texts = {}
    for item in param:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise InvalidOptionError(f"--param takes SETTING=DISTRIBUTION, got {item!r}")
        texts[name.strip()] = text
    options = with_settings({"scenario": scenario, "total_steps": steps, "seconds": seconds}, settings)
    algo, chosen = chosen_config(algo, config, options, None)
    with ProgressBar("tuning", quiet=as_json, status="starting Ray") as bar:
        result = tune_recipe(
            algo,
            chosen,
            parse_space(texts),
            out=out,
            trials=trials,
            metric=metric,
            address=address,
            storage=storage,
            cpus=cpus,
            max_failures=max_failures,
            early_stopping=early_stopping,
            seed=seed,
            callback=lambda last: bar.show(_share(last, trials), _status(last)),
        )
    _report(result, metric, as_json)


def _share(last: list[Mapping[str, Any]], trials: int) -> float:
    """The share of all trials that is done."""
    return float(sum(result.get("percent", 0) for result in last)) / (100 * max(trials, len(last)))


def _status(last: list[Mapping[str, Any]]) -> str:
    percents = [result.get("percent", 0) for result in last]
    running = sum(1 for percent in percents if 0 < percent < 100)
    finished = sum(1 for percent in percents if percent == 100)
    return f"{len(last)} trials started, {running} running, {finished} finished"


def _report(result: TuningResult, metric: str, as_json: bool) -> None:
    if as_json:
        trials = [
            {"settings": one.settings, metric: one.metric if math.isfinite(one.metric) else None}
            | {"fraction": one.fraction, "error": one.error}
            for one in result.trials
        ]
        typer.echo(json.dumps({"checkpoint": str(result.checkpoint), "config": str(result.file), "trials": trials}))
        return
    from rich.table import Table
    from rich.text import Text

    names = list(result.trials[0].settings)
    table = Table("", *names, metric, "budget", box=None)
    for place, one in enumerate(result.trials, start=1):
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (one.settings.get(n, "") for n in names)]
        outcome = f"{one.metric:.5g}" if math.isfinite(one.metric) else one.error or "stopped"
        table.add_row(str(place), *map(Text, values), Text(outcome), f"{one.fraction:.0%}")
    results_console().print(table)
    typer.echo(f"checkpoint: {result.checkpoint}")
    typer.echo(f"train with it: lbgym train --config {result.file}")
