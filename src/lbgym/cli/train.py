"""``lbgym train``: train a policy and say where its checkpoint went."""

from __future__ import annotations

import math
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidOptionError
from ..training.config import PRETRAINING
from ..training.recipes import RECIPES, algo_of, make_config, read_config, recipe_of, to_toml
from ..training.recipes import train as run_recipe
from ._comparison import require_extras
from ._console import print_json
from ._options import installed
from ._progress import ProgressBar
from ._signals import Interrupted, stop_on_signal

if TYPE_CHECKING:
    from ..training import Progress
    from ..training.config import TrainingConfig
    from ..training.recipes import TrainingResult


class Network(StrEnum):
    """Networks of the recipes that have a choice."""

    MLP = "mlp"
    EQUIVARIANT = "equivariant"


class Backend(StrEnum):
    """Places for a training to run."""

    LOCAL = "local"
    RAY = "ray"


# no commas: the longest name just fits the column of a narrow terminal
ALGO_HELP = f"The recipe, one of {' '.join(RECIPES)}"
SET_HELP = "KEY=VALUE, any setting of the recipe's configuration, the value as in TOML. May be repeated."


def train(
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario", "-s", help="Name of a scenario or path of a TOML file.", show_default="heterogeneous"
        ),
    ] = None,
    algo: Annotated[str | None, typer.Option(metavar="NAME", help=ALGO_HELP, show_default="ppo, or --resume's")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file: algo, and settings of the recipe's configuration.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Environment steps to train, over all replicas, those before --resume included.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds to train, those before --resume included and compilation not."),
    ] = None,
    num_envs: Annotated[int | None, typer.Option(min=1, help="Replicas of the scenario, stepped at once.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds everything.")] = None,
    reward: Annotated[str | None, typer.Option(help="What is maximised; any reward of the environment.")] = None,
    reward_field: Annotated[str | None, typer.Option(help="The feature that a fairness reward looks at.")] = None,
    action_type: Annotated[str | None, typer.Option(help='"normalized" (continuous), "discrete" or "joint".')] = None,
    network: Annotated[
        Network | None,
        typer.Option(
            metavar="NAME",
            help="Network of an sb3-, rllib- or benchmarl- recipe: mlp, or equivariant, which shares weights.",
            show_default="the recipe's",
        ),
    ] = None,
    dispatch: Annotated[str | None, typer.Option(help="Dispatch rule.", show_default="the scenario's")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Step size of the optimiser.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint's file (.pt, .zip), or a folder for it.", show_default="out/train, or --resume"
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint to continue.")] = None,
    evaluate: Annotated[
        int, typer.Option(min=0, metavar="SEEDS", help="Then compare it with the usual rules on so many seeds.")
    ] = 0,
    backend: Annotated[
        Backend,
        typer.Option(
            metavar="NAME", help="local: in this process; ray: on a Ray cluster, where the loss of a node is survived."
        ),
    ] = Backend.LOCAL,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, with --backend ray.", show_default="RAY_ADDRESS, else a local one"),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            help="Log to a folder tensorboard beside the checkpoint.", show_default="if TensorBoard is installed"
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration as TOML, and do not train.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a policy; it is saved from time to time, at the end, and when interrupted.

    What is not given comes from --config, then from the checkpoint of --resume, then from the recipe's defaults.
    Ctrl-C ends the training after the update in progress, saves the checkpoint and exits with code 130.
    """
    own: dict[str, Any] = {
        "scenario": scenario,
        "num_envs": num_envs,
        "seed": seed,
        "reward_type": reward,
        "reward_field": reward_field,
        "action_type": action_type,
        "network": None if network is None else str(network),
        "dispatch": dispatch,
        "learning_rate": learning_rate,
        "total_steps": steps,
        "seconds": seconds,
    }
    options = with_settings(own, settings)
    if address is not None and backend is not Backend.RAY:
        raise InvalidOptionError(f"--address {address} needs --backend ray")
    algo, chosen = chosen_config(algo, config, options, resume)
    if print_config:
        typer.echo(to_toml(algo, chosen), nl=False)
        return
    if evaluate:
        require_extras(evaluate, plots=False)
    out = out or resume or Path("out/train")
    if tensorboard is None:
        tensorboard = installed("tensorboard")
    with stop_on_signal() as stop, ProgressBar("training", quiet=as_json, status="preparing the simulator") as bar:

        def callback(progress: Progress) -> bool:
            bar.show(progress.fraction, _status(progress))
            return stop.is_set()

        keywords: dict[str, Any] = {"out": out, "resume_from": resume, "callback": callback, "tensorboard": tensorboard}
        if backend is Backend.RAY:
            from ..training.cluster import train_on_ray

            result: TrainingResult = train_on_ray(algo, chosen, address=address, **keywords)
        else:
            result = run_recipe(algo, chosen, **keywords)
    assert result.checkpoint is not None
    wanted = evaluate if stop.signum is None else 0
    if as_json:
        _print_json(_compared(chosen), result.checkpoint, result.history, stop.is_set(), wanted)
    else:
        _report(_compared(chosen), result.checkpoint, result.history)
        if wanted:
            from .compare import compare

            compare(scenario=_compared(chosen), policies=_contenders(result.checkpoint), seeds=wanted)
    if stop.signum is not None:
        raise Interrupted(stop.signum)


def _contenders(checkpoint: Path) -> str:
    """What a policy is compared with, and itself."""
    return f"ecmp,lsq,sed,{checkpoint}"


def _compared(config: TrainingConfig) -> str:
    """The scenario to compare a policy on: its own, or one of those that it was made for."""
    return "heterogeneous" if config.scenario == PRETRAINING else str(config.scenario)


def chosen_config(
    algo: str | None, file: Path | None, options: dict[str, Any], resume: Path | None
) -> tuple[str, TrainingConfig]:
    """The recipe's name and its configuration: the checkpoint's, the file's over it, the options over both.

    Raises:
        LbgymError: what the user can put right.
    """
    in_file: dict[str, Any] = {}
    named = None
    if file is not None:
        named, in_file = read_config(file)
    algo = algo or named or (algo_of(resume) if resume is not None else "ppo")
    if "network" in options and recipe_of(algo).algorithm is None:
        raise InvalidOptionError(
            f"{algo} has one network; only the sb3-, rllib- and benchmarl- recipes have a choice of --network"
        )
    if "total_steps" in options or "seconds" in options:
        # a budget on the command line is all of it
        in_file = {key: value for key, value in in_file.items() if key not in ("total_steps", "seconds")}
    if in_file:
        make_config(algo, in_file, where=str(file))
    return algo, make_config(algo, in_file | options, resume_from=resume, where="the options")


def with_settings(own: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """The settings that have an option of their own (None: not given) and those of ``--set``; a budget is all of it.

    Raises:
        InvalidOptionError: for a setting that is given both ways.
    """
    given = {key: value for key, value in own.items() if value is not None}
    further = parse_settings(settings or [])
    for key in given.keys() & further.keys():
        option = {"total_steps": "steps", "reward_type": "reward"}.get(key, key).replace("_", "-")
        raise InvalidOptionError(f"give --{option} or --set {key}, not both; got {given[key]!r} and {further[key]!r}")
    if given.keys() & {"total_steps", "seconds"}:
        given = {"total_steps": None, "seconds": None} | given
    return given | further


def parse_settings(items: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts; a value that is no TOML is a text."""
    settings = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise InvalidOptionError(f"--set takes KEY=VALUE, got {item!r}")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = text.strip()
    return settings


def _status(progress: Progress) -> str:
    parts = [f"{progress.step:,} steps", f"{progress.steps_per_second:,.0f} steps/s", f"reward {progress.reward:.3f}"]
    if math.isfinite(progress.fct_mean):
        parts.append(f"mean FCT {progress.fct_mean:.3f} s")
    return "  ".join(parts)


def _print_json(scenario: str, checkpoint: Path, history: list[Progress], interrupted: bool, seeds: int) -> None:
    """One document, with the comparison on so many seeds in it."""
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "interrupted": interrupted}
    if history:
        last = history[-1]
        result |= {"steps": last.step, "seconds": round(last.seconds, 3), "reward": last.reward}
        result |= {"fct_mean": last.fct_mean}
    if seeds:
        from ..evaluation import compare

        result["comparison"] = compare(scenario, _contenders(checkpoint), seeds).to_dict()
    print_json(result, indent=None)


def _report(scenario: str, checkpoint: Path, history: list[Progress]) -> None:
    if history:
        last = history[-1]
        typer.echo(f"{last.step:,} steps in {last.seconds:.1f} s, {last.step / last.seconds:,.0f} steps/s")
    else:
        typer.echo("nothing was trained: --steps and --seconds count what was trained before, and are used up")
    typer.echo(f"checkpoint: {checkpoint}")
    typer.echo(f"compare it: lbgym compare --scenario {scenario} --policies lsq,sed,{checkpoint}")
