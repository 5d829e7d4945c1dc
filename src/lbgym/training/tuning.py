"""Search for the settings of any recipe, with Ray Tune: trials side by side, the poor ones stopped early (ASHA)."""

from __future__ import annotations

import ast
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import write_whole
from ..errors import InvalidOptionError, LbgymError, MissingExtraError, UnknownNameError

# The display is the caller's: Ray Tune's own, which is read when it is imported, would be printed beside it.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

try:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "tuning with Ray Tune") from error

from ..ray_cluster import ClusterError, connected
from .config import TrainingConfig
from .recipes import check_settings, recipe_of, to_toml
from .recipes import train as run_recipe
from .runs import Progress

#: Metrics that rank trials, fields of ``Progress``, and whether more or less is better.
METRICS = {"reward": "max", "fct_mean": "min"}
#: Share of a trial, at its end, over which the metric is averaged, so that no single rollout decides.
TAIL = 0.2
#: Number of reports of a trial that runs to its end.
REPORTS = 50
#: Key under which a trial whose settings are refused reports why, instead of its progress.
REFUSED = "refused"

_DRAWS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice", "grid")


@dataclass(frozen=True)
class Trial:
    """A trial of one set of settings.

    Attributes:
        settings: the fields of the configuration that were drawn.
        metric: at its end; NaN if it failed before the first report.
        fraction: of its budget that it was given.
        error: what it failed with; empty: it did not.
    """

    settings: dict[str, Any]
    metric: float
    fraction: float
    error: str


@dataclass(frozen=True)
class TuningResult:
    """A finished search.

    Attributes:
        config: the best trial's configuration.
        checkpoint: its checkpoint, in ``out``.
        file: its configuration as a TOML file, in ``out``.
        trials: all, the best first.
    """

    config: TrainingConfig
    checkpoint: Path
    file: Path
    trials: list[Trial]


def parse_space(texts: Mapping[str, str]) -> dict[str, Any]:
    """Parse the distributions that settings are drawn from, for :func:`tune_recipe`.

    Args:
        texts: by the setting's name, a distribution as it is written in Python: ``uniform(low, high)``,
            ``loguniform(low, high)``, ``quniform(low, high, step)``, ``randint(low, high)``, ``lograndint(low, high)``
            (``high`` is not drawn), ``choice(a, b, ...)`` or ``grid(a, b, ...)``, which tries each.

    Raises:
        InvalidOptionError: for a text that cannot be parsed.
        UnknownNameError: for an unknown distribution.
    """
    return {name: _parsed(name, text) for name, text in texts.items()}


def _parsed(name: str, text: str) -> Any:
    wanted = f"{name}={text!r}: write a distribution, such as loguniform(1e-4, 1e-2) or choice(32, 64)"
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            raise InvalidOptionError(wanted)
        values = [ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, ValueError) as error:
        raise InvalidOptionError(wanted) from error
    kind = call.func.id
    if kind not in _DRAWS:
        raise UnknownNameError("distribution", kind, _DRAWS, name)
    if kind in ("choice", "grid"):
        if not values:
            raise InvalidOptionError(f"{name}={text!r}: give at least one value")
        return tune.choice(values) if kind == "choice" else tune.grid_search(values)
    count = 3 if kind == "quniform" else 2
    good = len(values) == count and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    if not good or not values[0] < values[1] or ("log" in kind and values[0] <= 0):
        above = ", above 0" if "log" in kind else ""
        raise InvalidOptionError(f"{name}={text!r}: {kind} takes {count} numbers, low < high{above}")
    return getattr(tune, kind)(*values)


def tune_recipe(
    algo: str,
    config: TrainingConfig,
    space: Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    trials: int = 8,
    metric: str = "reward",
    address: str | None = None,
    storage: str | None = None,
    cpus: float = 1.0,
    max_failures: int = 3,
    early_stopping: bool = True,
    seed: int = 0,
    callback: Callable[[list[Mapping[str, Any]]], None] | None = None,
) -> TuningResult:
    """Try settings of a recipe and keep the best.

    Args:
        algo: the recipe's name, one of ``RECIPES``.
        config: the fields that all trials share; its budget is that of each trial.
        space: by a setting's name, what :func:`parse_space` makes or any distribution of Ray Tune.
        out: folder for the best trial's checkpoint and its configuration ``best.toml``.
        trials: to draw; a grid has so many for each of its values.
        metric: a name of ``METRICS``, averaged over the last fifth of a trial.
        address: of a Ray cluster; see :func:`~lbgym.ray_cluster.connected`.
        storage: where trials keep their checkpoints, a folder or an address of cloud storage; with several machines one
            that all of them reach. None: a folder ``trials-...`` in ``out``.
        cpus: that a trial takes.
        max_failures: how often a trial is started again from its last checkpoint when its node is lost.
        early_stopping: stop trials that are worse than most at a fifth, three fifths of the budget (ASHA: Li et al.,
            "A System for Massively Parallel Hyperparameter Tuning", 2020).
        seed: of the draws.
        callback: receives the last report of every trial, now and then: ``percent`` of its budget, ``step``,
            ``seconds``, the metrics, and whether it is ``over``.

    Raises:
        UnknownNameError: for an unknown recipe, metric or setting.
        InvalidOptionError: for a number that makes no sense, or a configuration with a Python object in it.
        ClusterError: without a cluster, or if every trial failed.
        KeyboardInterrupt: if interrupted, once the trials have stopped and the best so far is written.
    """
    recipe = recipe_of(algo)
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    if trials < 1:
        raise InvalidOptionError(f"trials must be at least 1, got {trials!r}")
    if max_failures < 0:
        raise InvalidOptionError(f"max_failures must be at least 0, got {max_failures!r}")
    if not space:
        raise InvalidOptionError("there is nothing to tune: name settings and what to draw them from")
    check_settings(type(config), dict.fromkeys(space), f"the configuration of {algo!r}")
    to_toml(algo, config)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{algo}{recipe.suffix}"

    def trial(settings: dict[str, Any]) -> None:
        _try(algo, config, settings, name)

    stop = threading.Event()
    with connected(address):
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": cpus}),
            param_space=dict(space),
            tune_config=tune.TuneConfig(
                metric=metric,
                mode=METRICS[metric],
                num_samples=trials,
                scheduler=ASHAScheduler(time_attr="percent", max_t=100, grace_period=20, reduction_factor=3)
                if early_stopping
                else None,
                search_alg=tune.search.BasicVariantGenerator(random_state=seed),
            ),
            run_config=tune.RunConfig(
                name=f"trials-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=storage or str(folder.absolute()),
                failure_config=tune.FailureConfig(max_failures=max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                stop=_StopAll(stop),
                callbacks=[_Reports(callback)] if callback is not None else [],
                verbose=0,
            ),
        )
        results, interrupt = _fit(tuner, stop)
        sign = -1.0 if METRICS[metric] == "max" else 1.0
        pairs = sorted(
            ((_tried(result, metric), result) for result in results),
            key=lambda pair: (math.isnan(pair[0].metric), sign * pair[0].metric),
        )
        # A trial that was stopped before its first checkpoint cannot be the best: it was among the worst.
        best = next((result for one, result in pairs if not math.isnan(one.metric) and result.checkpoint), None)
        if best is None and interrupt is not None:
            raise interrupt
        if best is None:
            raise ClusterError(
                f"none of {len(pairs)} trials reached a checkpoint; the first: {pairs[0][0].error or 'no error'}"
            )
        with best.checkpoint.as_directory() as kept:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
    chosen = replace(config, **best.config)
    text = to_toml(algo, chosen)
    write_whole(folder / "best.toml", lambda stream: stream.write(text.encode()))
    if interrupt is not None:
        raise interrupt
    return TuningResult(chosen, folder / name, folder / "best.toml", [one for one, _ in pairs])


class _StopAll(tune.Stopper):
    """Stops every trial once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event: threading.Event | None = event

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles the search so that it can be resumed; another process has no part in the event.
        return {"_event": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.stop_all()

    def stop_all(self) -> bool:
        return self._event is not None and self._event.is_set()


def _fit(tuner: Any, stop: threading.Event) -> tuple[Any, KeyboardInterrupt | None]:
    """Run a search in a thread of its own, so that an interrupt of this one ends the trials in order.

    Ray Tune itself handles SIGINT alone, and then returns as if the search had come to its end.

    Returns:
        Ray Tune's results, and the interrupt, if there was one.
    """
    with ThreadPoolExecutor(1, "tune") as pool:
        future = pool.submit(tuner.fit)
        try:
            return future.result(), None
        except KeyboardInterrupt as error:
            stop.set()
            return future.result(), error


def _tried(result: Any, metric: str) -> Trial:
    """Convert a result of Ray Tune."""
    last = result.metrics or {}
    return Trial(
        settings=dict(result.config or {}),
        metric=float(last.get(metric, math.nan)),
        fraction=last.get("percent", 0) / 100,
        error=last.get(REFUSED, "") if result.error is None else _cause(result.error),
    )


def _cause(error: Exception) -> str:
    """Return why a trial failed, without the traceback of its worker."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__


def _try(algo: str, config: TrainingConfig, settings: Mapping[str, Any], name: str) -> None:
    """Run a trial, on some node, reporting to Ray Tune with checkpoints."""
    history: list[Progress] = []
    reported, written = 0, None
    with tempfile.TemporaryDirectory(prefix="lbgym-") as temporary:
        folder = Path(temporary)
        begun = tune.get_checkpoint()
        if begun is not None:
            begun.to_directory(folder)

        def report(percent: int) -> None:
            tail = [p for p in history if p.fraction >= (1 - TAIL) * history[-1].fraction]
            values = {metric: [x for p in tail if math.isfinite(x := getattr(p, metric))] for metric in METRICS}
            means = {metric: sum(v) / len(v) if v else math.nan for metric, v in values.items()}
            last, checkpoint = history[-1], None
            nonlocal written
            if (folder / name).is_file() and (age := (folder / name).stat().st_mtime_ns) != written:
                written, checkpoint = age, tune.Checkpoint.from_directory(folder)
            tune.report({"percent": percent, "step": last.step, "seconds": last.seconds} | means, checkpoint=checkpoint)

        def callback(progress: Progress) -> None:
            nonlocal reported
            history.append(progress)
            percent = math.floor(100 * progress.fraction)
            if percent >= reported + 100 // REPORTS and percent < 100:
                reported = percent
                report(percent)

        try:
            run_recipe(
                algo,
                replace(config, **settings),
                out=folder / name,
                resume_from=folder / name if (folder / name).is_file() else None,
                callback=callback,
            )
        except LbgymError as error:
            if history or begun is not None:
                raise
            # Refused settings would be refused again, however often the trial was started.
            tune.report({REFUSED: str(error), "percent": 0} | dict.fromkeys(METRICS, math.nan))
        if history:
            report(100)


class _Reports(tune.Callback):
    """Passes the last reports of all trials on."""

    def __init__(self, receive: Callable[[list[Mapping[str, Any]]], None]) -> None:
        self._receive: Callable[[list[Mapping[str, Any]]], None] | None = receive

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles the search with its callbacks, so that it can be resumed; a progress bar has no such form.
        return {"_receive": None}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self._receive is not None:
            self._receive([(one.last_result or {}) | {"over": one.is_finished()} for one in trials])


__all__ = ["METRICS", "Trial", "TuningResult", "parse_space", "tune_recipe"]
