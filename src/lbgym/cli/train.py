"""``lbgym train``: train a policy and say where its checkpoint went."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..training import Progress


class Algorithm(StrEnum):
    """Recipes by name."""

    PPO = "ppo"
    SAC_GRU = "sac-gru"
    SB3_PPO = "sb3-ppo"
    SB3_A2C = "sb3-a2c"
    SB3_DQN = "sb3-dqn"
    SB3_SAC = "sb3-sac"
    SB3_TD3 = "sb3-td3"
    SB3_RECURRENT_PPO = "sb3-recurrent-ppo"


_SB3 = "sb3-"


class Network(StrEnum):
    """Networks of the policies for Stable-Baselines3."""

    MLP = "mlp"
    EQUIVARIANT = "equivariant"


def train(
    scenario: Annotated[
        str | None, typer.Option(help="Name of a scenario or path of a TOML file.", show_default="heterogeneous")
    ] = None,
    algo: Annotated[
        Algorithm,
        typer.Option(metavar="NAME", help=f"The recipe: {', '.join(Algorithm)}. The sb3 ones are Stable-Baselines3's."),
    ] = Algorithm.PPO,
    steps: Annotated[int | None, typer.Option(min=1, help="Environment steps to train, over all replicas.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Seconds to train, compilation not counted.")] = None,
    num_envs: Annotated[int | None, typer.Option(min=1, help="Replicas of the scenario, stepped at once.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seeds everything.")] = None,
    reward: Annotated[str | None, typer.Option(help="What is maximised; any reward of the environment.")] = None,
    reward_field: Annotated[str | None, typer.Option(help="The feature that a fairness reward looks at.")] = None,
    action_type: Annotated[str | None, typer.Option(help='"normalized" (continuous), "discrete" or "joint".')] = None,
    policy: Annotated[
        Network | None,
        typer.Option(
            help="Network of an sb3- algorithm; equivariant shares its parameters over the servers.", show_default="mlp"
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
    resume: Annotated[Path | None, typer.Option(help="A checkpoint to go on with.")] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            help="Log to a folder tensorboard beside the checkpoint.", show_default="if TensorBoard is installed"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a policy; it is saved now and then, at the end, and when interrupted.

    Ctrl-C ends the training after the update in progress, saves the checkpoint and exits with code 130.
    """
    changes: dict[str, Any] = {
        "scenario": scenario,
        "num_envs": num_envs,
        "seed": seed,
        "reward_type": reward,
        "reward_field": reward_field,
        "action_type": action_type,
        "dispatch": dispatch,
        "learning_rate": learning_rate,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if steps is not None or seconds is not None:
        changes |= {"total_steps": steps, "seconds": seconds}

    out = out or resume or Path("out/train")
    if algo.startswith(_SB3):
        scenario, run = _sb3(algo.removeprefix(_SB3), changes | ({"policy": str(policy)} if policy else {}), resume)
    elif policy is not None:
        raise typer.BadParameter(
            f"{algo} has one network; only the sb3- algorithms have a choice", param_hint="--policy"
        )
    else:
        scenario, run = {Algorithm.PPO: _ppo, Algorithm.SAC_GRU: _sac_gru}[algo](changes, resume)
    if tensorboard is None:
        tensorboard = find_spec("tensorboard") is not None
    with _interruptible() as interrupted, _Display(quiet=as_json) as display:

        def callback(progress: Progress) -> bool:
            display.show(progress)
            return interrupted.is_set()

        checkpoint, history = run(out, callback, tensorboard)
    _report(scenario, checkpoint, history, interrupted.is_set(), as_json)
    if interrupted.is_set():
        raise typer.Exit(130)


Run = Callable[[Path, Callable[["Progress"], bool], bool], tuple[Path, list["Progress"]]]


def _ppo(changes: dict[str, Any], resume: Path | None) -> tuple[str, Run]:
    from ..training.ppo import PPOConfig, config_of, read_checkpoint, train_ppo

    saved = config_of(read_checkpoint(resume), resume) if resume is not None else PPOConfig()
    # any number of replicas will do: share the flows among as many as go into it
    replicas = math.gcd(saved.replicas_per_seed, changes.get("num_envs", saved.num_envs))
    config = replace(saved, **changes, replicas_per_seed=replicas)

    def run(out: Path, callback: Callable[[Progress], bool], tensorboard: bool) -> tuple[Path, list[Progress]]:
        result = train_ppo(config, out=out, resume_from=resume, callback=callback, tensorboard=tensorboard)
        assert result.checkpoint is not None
        return result.checkpoint, result.history

    return str(config.scenario), run


def _sac_gru(changes: dict[str, Any], resume: Path | None) -> tuple[str, Run]:
    from ..training.sac_gru import SACGRUConfig, config_of, read_checkpoint, train_sac_gru

    saved = config_of(read_checkpoint(resume), resume) if resume is not None else SACGRUConfig()
    config = replace(saved, **changes)

    def run(out: Path, callback: Callable[[Progress], bool], tensorboard: bool) -> tuple[Path, list[Progress]]:
        result = train_sac_gru(config, out=out, resume_from=resume, callback=callback, tensorboard=tensorboard)
        assert result.checkpoint is not None
        return result.checkpoint, result.history

    return str(config.scenario), run


def _sb3(algorithm: str, changes: dict[str, Any], resume: Path | None) -> tuple[str, Run]:
    from ..training.sb3 import SB3Config, config_of, train_sb3

    if resume is not None:
        config = replace(config_of(resume, algorithm), **changes)
    else:
        config = SB3Config(algorithm=algorithm, **changes)

    def run(out: Path, callback: Callable[[Progress], bool], tensorboard: bool) -> tuple[Path, list[Progress]]:
        result = train_sb3(config, out=out, resume_from=resume, callback=callback, tensorboard=tensorboard)
        assert result.checkpoint is not None
        return result.checkpoint, result.history

    return str(config.scenario), run


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts at once."""
    interrupted = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class _Display:
    """A progress bar on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
            disable=quiet,
        )
        self.task = self.bar.add_task("training", total=1.0, status="preparing the simulator")

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, progress: Progress) -> None:
        parts = [
            f"{progress.step:,} steps",
            f"{progress.steps_per_second:,.0f} steps/s",
            f"reward {progress.reward:.3f}",
        ]
        if math.isfinite(progress.fct_mean):
            parts.append(f"mean FCT {progress.fct_mean:.3f} s")
        self.bar.update(self.task, completed=progress.fraction, status="  ".join(parts))


def _report(scenario: str, checkpoint: Path, history: list[Progress], interrupted: bool, as_json: bool) -> None:
    last = history[-1] if history else None
    if as_json:
        result: dict[str, Any] = {"checkpoint": str(checkpoint), "interrupted": interrupted}
        if last is not None:
            result |= {"steps": last.step, "seconds": round(last.seconds, 3), "reward": last.reward}
            result |= {"fct_mean": last.fct_mean if math.isfinite(last.fct_mean) else None}
        typer.echo(json.dumps(result))
        return
    if last is not None:
        typer.echo(f"{last.step:,} steps in {last.seconds:.1f} s, {last.step / last.seconds:,.0f} steps/s")
    typer.echo(f"checkpoint: {checkpoint}")
    typer.echo(f"compare it: lbgym compare --scenario {scenario} --policies lsq,sed,{checkpoint}")
