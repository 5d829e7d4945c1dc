"""CMA-ES over the parameters of :class:`lbgym.policies.estimator.IndexEstimator`: the recipe of policy ``adaptive``.

N. Hansen and A. Ostermeier, "Completely Derandomized Self-Adaptation in Evolution Strategies" (2001), by the package
``cma``. What is minimised is as the benchmark's score, the logarithms of the mean and of the p99 FCT over those of
SED, which no reward per step adds up to. A few dozen parameters, a simulator of two million flows per second, and the
same flows for every candidate of a generation make that cheap.

First the constants are searched for; from generation ``network_from`` on, the residual network as well, whose
covariances are left at 0, since there are too many of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..checks import choice, number
from ..env.observations import CONFIGURED_NAMES
from ..errors import CheckpointError, InvalidOptionError, MissingExtraError
from ..features.columns import NUM_FEATURES
from ..policies.checkpoints import contents, load_policy, read_checkpoint
from ..policies.estimator import CONSTANTS, initial_parameters
from ..policies.neural import EstimatorPolicy
from ..policies.pretrained import pretrained_file, pretrained_names
from ..scenarios import AnyScenario, load_scenario
from ..snapshot import DEFAULT_STEP_INTERVAL
from .config import NOT_NEGATIVE, POSITIVE, PRETRAINING, TrainingConfig, plain_config, saved_config
from .pretraining import SEVERAL, SEVERAL_VALIDATION, SHAPES, VALIDATION, Score, Shape, draw_scenarios, measure
from .runs import Budget, Callback, Progress, Reporter, log_folder, output_file, summary_writer, write_torch

try:
    import torch
except ModuleNotFoundError as error:  # pragma: no cover - the import of .runs fails first
    raise MissingExtraError("torch", "train", "training with CMA-ES") from error

ALGO = "cma-es"
_VALIDATION_STREAM = 0x76616C69


@dataclass(kw_only=True)
class CMAESConfig(TrainingConfig):
    """The configuration of CMA-ES; there is no reward, discount or batch here."""

    scenario: str | Path | AnyScenario | None = PRETRAINING
    """a scenario or a distribution; "pretraining": that of the policy adaptive"""
    action_type: str = "index"
    """"index" alone"""
    dispatch: str | None = "marginal"
    """dispatch rule: "marginal", or another that counts flows"""
    observe_weights: bool = False
    """not read"""
    num_envs: int = 12
    """candidates of a generation, each of which runs on all of its scenarios"""
    max_steps: int = 192
    """steps of an episode"""
    learning_rate: float = 0.4
    """first step size, in units of the constants' own"""
    hidden: int = 6
    """hidden units of the residual network; 0: constants only"""

    total_steps: int | None = 10_000_000
    """environment steps, all replicas together; None: no limit"""
    scenarios: int = 2
    """times the scenarios of a generation, which are nine, and of the validation, which are 17"""
    warmup: float = 12.0
    """seconds at the start of an episode whose flows do not count"""
    penalty: float = 1.0
    """how much more it counts to be worse than SED than to be better"""
    network_from: int = 80
    """generation from which the residual network is learned"""
    network_step: float = 0.05
    """first step size of the network's parameters"""
    validate_every: int = 6
    """generations between two runs on scenarios that training does not see; the best on them is kept"""
    initial: str | None = None
    """a file of this recipe or a pretrained policy to begin with"""
    fixed: dict[str, float] = field(default_factory=dict)
    """constants that stay at these values, by name"""
    free: tuple[str, ...] = ()
    """constants to search for alone, by name; none: all that are not fixed"""
    several: bool = False
    """train on scenarios of several balancers alone, without delays"""
    threads: int | None = None
    """threads of the simulator, which change no result; None: one per core"""

    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {
        "num_envs": 4, "hidden": 0, "scenarios": 1, "network_from": 0, "validate_every": 1, "threads": 1,
    }  # fmt: skip
    numbers: ClassVar[dict[str, dict[str, Any]]] = TrainingConfig.numbers | {
        "learning_rate": POSITIVE, "network_step": POSITIVE, "warmup": NOT_NEGATIVE, "penalty": NOT_NEGATIVE,
    }  # fmt: skip
    needed: ClassVar[dict[str, Any]] = {"observation": "flat", "normalize": False, "observe_configured": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_action_type("CMA-ES", ("index",), "ppo")
        for name, value in self.fixed.items():
            choice("constant", name, CONSTANTS, where="CMAESConfig.fixed")
            number(f"CMAESConfig.fixed[{name!r}]", value)
        self.free = tuple(choice("constant", name, CONSTANTS, where="CMAESConfig.free") for name in self.free)
        if len(self.searched) < 2:
            raise InvalidOptionError(
                f"CMAESConfig must leave two constants or more to search for, got {len(self.searched)}: fixed has "
                f"{len(self.fixed)} of {len(CONSTANTS)}, free {len(self.free)}"
            )
        duration = self.max_steps * DEFAULT_STEP_INTERVAL
        if not self.warmup < duration:
            raise InvalidOptionError(
                f"CMAESConfig.warmup must be below the episode's {duration:g} s, which are max_steps={self.max_steps}; "
                f"got {self.warmup:g}"
            )

    @property
    def searched(self) -> list[int]:
        """Places of the constants that are searched for."""
        return [i for i, name in enumerate(CONSTANTS) if name not in self.fixed and name in (self.free or CONSTANTS)]

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on."""
        keys = super().observation_kwargs()
        return keys | {**self.needed, "observe_weights": False}


@dataclass(frozen=True)
class CMAESResult:
    """Result of :func:`train_cma_es`.

    Attributes:
        policy: the trained policy.
        checkpoint: its file; None without ``out``.
        history: the progress after every generation. ``reward`` is minus what is minimised, in the mean over the
            candidates; the losses are the logarithms of the mean and p99 FCT over SED's (``mean``, ``p99``), the same
            on the validation's scenarios (``validation_mean``, ``validation_p99``), and the step size.
    """

    policy: EstimatorPolicy
    checkpoint: Path | None
    history: list[Progress]


def train_cma_es(
    config: CMAESConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> CMAESResult:
    """Train a policy with CMA-ES.

    Args:
        config: None: the defaults, or the checkpoint's with ``resume_from``.
        out: the checkpoint's file, ending in .pt, or a folder for ``cma-es.pt``; always written whole or not at all.
            None: keep nothing.
        resume_from: a checkpoint to continue, which goes on bit for bit as if it had not been interrupted.
        callback: receives the progress after every generation; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    Raises:
        CheckpointError: if the checkpoint does not fit the configuration.
        FileWriteError: if the checkpoint cannot be written.
        MissingExtraError: without cma, or if TensorBoard is asked for and not installed.
    """
    saved = None if resume_from is None else read_checkpoint(resume_from, ALGO)
    if config is None:
        config = CMAESConfig() if saved is None else CMAESConfig(**saved_config(saved["config"], resume_from or ""))
    checkpoint = output_file(out, f"{ALGO}.pt")
    search = Search(config)
    budget = Budget(config)
    if saved is not None:
        search.restore(saved["trainer"], str(resume_from))
        budget = Budget(config, saved["step"], saved["seconds"])
    state = search.state(budget)

    def save() -> None:
        if checkpoint is not None:
            write_torch(checkpoint, state)

    with summary_writer(log_folder(checkpoint, tensorboard)) as writer:
        reporter = Reporter(budget, callback, writer, save, config.checkpoint_every)
        search.prepare()
        reporter.start()
        stop = budget.used_up
        with reporter.saving():
            while not stop:
                total, seconds, losses = search.generation()
                budget.advance(search.steps)
                state = search.state(budget)
                stop = reporter.report(reward=-total, fct_mean=seconds, losses=losses)
    return CMAESResult(EstimatorPolicy(state), checkpoint, reporter.history)


class Search:
    """The search under way.

    Its state is the scores of all generations so far: from them the same candidates are drawn again.

    Args:
        config: what to train on and how.

    Attributes:
        scores: what was minimised, one row of candidates per generation.
        best: the parameters that did best on the validation's scenarios, a vector.
    """

    def __init__(self, config: CMAESConfig) -> None:
        try:
            import cma
        except ModuleNotFoundError as error:
            raise MissingExtraError("cma", "train", "training with CMA-ES") from error
        self._make = cma.CMAEvolutionStrategy
        self.config = config
        self._base = None if config.scenario == PRETRAINING else load_scenario(config.scenario or "heterogeneous")
        self._shapes: tuple[Shape, ...]
        self._validation: tuple[Shape, ...]
        if self._base is None:
            shapes = SEVERAL if config.several else SHAPES
            validation = SEVERAL_VALIDATION if config.several else VALIDATION
            self._shapes, self._validation = (
                tuple(replace(shape, count=shape.count * config.scenarios) for shape in kind)
                for kind in (shapes, validation)
            )
        else:
            most = self._base.max_servers
            self._shapes = (Shape(self._base.balancers, most, 4 * config.scenarios),)
            self._validation = (Shape(self._base.balancers, most, 8 * config.scenarios),)
        first = _initial(config)
        self._names, self._places = list(first), {name: value.shape for name, value in first.items()}
        self._first = np.concatenate([value.ravel() for value in first.values()])
        self._constants = len(CONSTANTS)
        for name, value in config.fixed.items():
            self._first[list(CONSTANTS).index(name)] = value
        self.scores: list[NDArray[np.float64]] = []
        self.best, self._best_score = self._first.copy(), math.inf
        self._losses = {"validation_mean": math.nan, "validation_p99": math.nan}
        self._strategy: Any = None

    @property
    def steps(self) -> int:
        """Environment steps of a generation, over all candidates and scenarios."""
        return self.config.num_envs * self.config.max_steps * sum(shape.count for shape in self._shapes)

    def prepare(self) -> None:
        """Compile the simulator, and measure what training begins with."""
        if not self.scores:
            self._validate(self._first)

    def generation(self) -> tuple[float, float, dict[str, float]]:
        """Measure a generation and learn from it: the mean score, the mean FCT in seconds, and the losses."""
        number = len(self.scores)
        candidates = self._ask()
        score, seconds = self._measure(candidates, self._shapes, [self.config.seed, number])
        self._tell(candidates, score.total(self.config.penalty))
        if (number + 1) % self.config.validate_every == 0:
            self._validate(self._mean())
        losses = {"mean": float(score.fct_mean.mean()), "p99": float(score.fct_p99.mean())}
        losses |= self._losses | {"step_size": float(self._strategy.sigma)}
        return float(score.total(self.config.penalty).mean()), seconds, losses

    def state(self, budget: Budget) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        config = self.config
        parameters = {
            name: torch.from_numpy(value[0].astype(np.float32)) for name, value in self._split(self.best[None]).items()
        }
        return contents(
            algo=ALGO,
            config=plain_config(config),
            env_kwargs=config.observation_kwargs(),
            shapes={
                "features": NUM_FEATURES + len(CONFIGURED_NAMES),
                "choices": 0,
                "joint": False,
                "numbers": 2,
                "num_servers": max(shape.servers for shape in self._shapes),
            },
            network="index-estimator",
            arguments={"step_interval": DEFAULT_STEP_INTERVAL},
            parameters=parameters,
            step=budget.step,
            seconds=budget.seconds,
            trainer={
                "scores": torch.from_numpy(np.array(self.scores).reshape(-1, config.num_envs)),
                "best": torch.from_numpy(self.best.copy()),
                "best_score": self._best_score,
                "validation": dict(self._losses),
            },
        )

    def restore(self, trainer: Mapping[str, Any], path: str) -> None:
        """Continue from a checkpoint's ``trainer``, which was read from ``path``.

        Raises:
            CheckpointError: if it has other candidates or parameters.
        """
        scores, best = trainer["scores"].numpy(), trainer["best"].numpy()
        if scores.shape[1] != self.config.num_envs or best.shape != self._first.shape:
            raise CheckpointError(
                f"checkpoint {path} has {scores.shape[1]} candidates of {best.size} parameters, but the configuration "
                f"{self.config.num_envs} of {self._first.size}"
            )
        for row in scores:
            self._tell(self._ask(), row)
        self.best, self._best_score = best.copy(), trainer["best_score"]
        self._losses = dict(trainer["validation"])

    def _ask(self) -> NDArray[np.float64]:
        """The candidates of the next generation, float64[P, D]."""
        config, generation = self.config, len(self.scores)
        with_network = config.hidden > 0 and generation >= config.network_from
        if self._strategy is None or (with_network and generation == config.network_from):
            # A generator of its own: the package would seed NumPy's global one.
            rng = np.random.default_rng([config.seed, generation])
            widths = np.full(self._first.size, config.network_step / config.learning_rate)
            widths[: self._constants] = [step for _, step in CONSTANTS.values()]
            start, sigma = self._first, config.learning_rate
            if self._strategy is not None:
                # The constants go on where they are, in smaller steps.
                start, sigma = self._mean(), config.learning_rate
                widths[: self._constants] *= 0.3
            network = np.arange(self._constants, self._first.size if with_network else self._constants)
            self._free = np.concatenate([np.array(config.searched, np.int64), network])
            self._start = start
            self._strategy = self._make(
                start[self._free],
                sigma,
                {
                    "popsize": config.num_envs,
                    "CMA_stds": widths[self._free],
                    "CMA_diagonal": with_network,
                    "randn": lambda *shape: rng.standard_normal(shape),
                    "seed": np.nan,
                    "verbose": -9,
                },
            )
        drawn = self._start[None].repeat(config.num_envs, 0)
        drawn[:, self._free] = self._strategy.ask()
        return drawn

    def _tell(self, candidates: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
        self._strategy.tell(list(candidates[:, self._free]), scores.tolist())
        self.scores.append(np.asarray(scores, np.float64))

    def _mean(self) -> NDArray[np.float64]:
        vector = self._start.copy()
        vector[self._free] = self._strategy.mean
        return vector

    def _validate(self, vector: NDArray[np.float64]) -> None:
        """Measure parameters on scenarios that training does not see, and keep them if they are the best so far."""
        score, _ = self._measure(vector[None], self._validation, [self.config.seed, _VALIDATION_STREAM])
        total = float(score.total(self.config.penalty)[0])
        self._losses = {
            "validation_mean": float(score.fct_mean.mean()),
            "validation_p99": float(score.fct_p99.mean()),
        }
        if total < self._best_score:
            self.best, self._best_score = vector.copy(), total

    def _measure(
        self, candidates: NDArray[np.float64], shapes: Sequence[Shape], seed: Sequence[int]
    ) -> tuple[Score, float]:
        """Candidates [P, D] on the scenarios of all shapes, and the mean FCT of all flows, seconds."""
        config, rng, parts = self.config, np.random.default_rng(list(seed)), []
        for shape in shapes:
            scenarios = draw_scenarios(shape, rng, self._base)
            parts.append(
                measure(
                    self._split(candidates),
                    scenarios,
                    [int(s) for s in rng.integers(2**31, size=len(scenarios))],
                    servers=shape.servers,
                    duration=config.max_steps * DEFAULT_STEP_INTERVAL,
                    warmup=config.warmup,
                    delay=shape.delay,
                    dispatch=config.dispatch or "marginal",
                    num_threads=config.threads,
                )
            )
        mean, p99 = (
            np.concatenate(columns, axis=1) for columns in zip(*((x.fct_mean, x.fct_p99) for x in parts), strict=True)
        )
        return Score(mean, p99), float(np.mean([part.seconds for part in parts]))

    def _split(self, vectors: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Parameters by name, each [P, ...], of vectors [P, D]."""
        sizes = [math.prod(self._places[name]) for name in self._names]
        parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
        return {
            name: part.reshape(len(vectors), *self._places[name]) for name, part in zip(self._names, parts, strict=True)
        }


def _initial(config: CMAESConfig) -> dict[str, NDArray[np.float64]]:
    """The parameters to begin with.

    Raises:
        CheckpointError: for a file of another recipe.
    """
    parameters = initial_parameters(config.hidden, config.seed)
    if config.initial is None:
        return parameters
    path = pretrained_file(config.initial) if config.initial.lower() in pretrained_names() else Path(config.initial)
    policy = load_policy(path)
    if not isinstance(policy, EstimatorPolicy) or len(policy.parameters["constants"]) != len(CONSTANTS):
        raise CheckpointError(f"{path} was not written by this version's recipe {ALGO!r}, and cannot be begun with")
    given = {name: np.asarray(value, np.float64) for name, value in policy.parameters.items()}
    same = all(name in given and given[name].shape == value.shape for name, value in parameters.items())
    # A network of another width begins anew.
    return {name: given[name] for name in parameters} if same else parameters | {"constants": given["constants"]}
