"""The recipe for BenchMARL: an experiment, its progress, its checkpoints, and its policy in plain torch."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...errors import CheckpointError, MissingExtraError, UnknownNameError

try:
    import torch
    from torch import Tensor, nn

    with warnings.catch_warnings():
        # TorchRL and its dependencies warn of their own classes while they are imported.
        warnings.simplefilter("ignore")
        import benchmarl.experiment.experiment as experiments
        from benchmarl.experiment import Callback as Hooks
        from benchmarl.experiment import Experiment, ExperimentConfig
        from benchmarl.models import MlpConfig
        from benchmarl.utils import seed_everything
        from tensordict import TensorDict, TensorDictBase
        from torchrl.envs.utils import ExplorationType, set_exploration_type
except ModuleNotFoundError as error:
    raise MissingExtraError("benchmarl", "benchmarl", "training with BenchMARL") from error

from ...policies.action_kind import ActionKind
from ...policies.checkpoints import read_checkpoint
from ...policies.networks import NETWORKS
from ...policies.neural import ExportedPolicy
from ..checkpoints import check_shapes, network_shapes, write_policy
from ..config import check_recipe, check_same
from ..runs import (
    Budget,
    Callback,
    Progress,
    Reporter,
    check_parameters,
    log_folder,
    output_file,
    summary_writer,
    torch_threads,
)
from ..torchrl_env import GROUP
from .config import ALGORITHMS, BenchMARLConfig
from .model import LoadBalanceModel, LoadBalanceModelConfig
from .task import LoadBalanceTaskClass

# A loss of Progress -> names of BenchMARL's losses; the first one present is taken.
_LOSSES = {
    "policy": ("loss_objective", "loss_actor"),
    "value": ("loss", "loss_critic", "loss_qvalue", "loss_value"),
    "entropy": ("entropy",),
    "kl": ("kl_approx",),
    "clipped": ("clip_fraction",),
    "temperature": ("alpha",),
}


@dataclass(frozen=True)
class BenchMARLResult:
    """A finished training run: the policy of one balancer, its checkpoint (None without ``out``) and the history."""

    policy: ExportedPolicy
    checkpoint: Path | None
    history: list[Progress]


#: Fields of BenchMARL's ``ExperimentConfig`` that ``options`` may have; the others follow from the configuration, or
#: are for files, devices and logs.
_EXPERIMENT_OPTIONS = (
    "adam_eps",
    "adam_extra_kwargs",
    "clip_grad_norm",
    "clip_grad_val",
    "soft_target_update",
    "polyak_tau",
    "hard_target_update_frequency",
    "exploration_eps_init",
    "exploration_eps_end",
    "off_policy_memory_size",
    "off_policy_init_random_frames",
    "off_policy_use_prioritized_replay_buffer",
    "off_policy_prb_alpha",
    "off_policy_prb_beta",
)


class _Stop(BaseException):
    """Ends BenchMARL's loop, which has no other exit; not an ``Exception``, which it would report as a failure."""


class _Experiment(Experiment):
    """BenchMARL's experiment without files, prints and progress bar."""

    def _setup_name(self) -> None:
        # BenchMARL makes a folder and pickles callbacks into it
        self.algorithm_name = self.algorithm_config.associated_class().__name__.lower()
        self.model_name = self.critic_model_name = "lbgym"
        self.environment_name, self.task_name = self.task.env_name(), self.task.name.lower()
        self.name, self.folder_name = f"{self.algorithm_name}_{self.task_name}", Path()
        self.closed = False

    def run(self) -> None:
        """Train until the callback stops it or the budget is used."""
        seed_everything(self.seed)
        with _quiet():
            self._collection_loop()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            super().close()

    def explores(self) -> Any:
        """Return the exploration module, if the algorithm has one, and the name of its amount."""
        last = self.group_policies[GROUP][-1]
        return next(((last, name) for name in ("eps", "sigma") if hasattr(last, name)), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar, the log of TorchRL's buffers, and warnings without a remedy."""
    bar, news = experiments.tqdm, logging.getLogger("torchrl")
    experiments.tqdm, level = partial(bar, disable=True), news.level
    news.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Episodes are longer than what is collected between two updates.
            warnings.filterwarnings("ignore", message="No episode terminated this iteration")
            # BenchMARL uses it.
            warnings.filterwarnings("ignore", message="SyncDataCollector has been deprecated")
            yield
    finally:
        experiments.tqdm = bar
        news.setLevel(level)


class _Watch(Hooks):
    """Reports progress, lets exploration fall, and stops when the reporter says so."""

    def __init__(self, exploration: float, budget: Budget, reporter: Reporter, scaling: tuple[float, float]) -> None:
        super().__init__()
        self.exploration, self.budget, self.reporter, self.scaling = exploration, budget, reporter, scaling
        self.reward = 0.0
        self.collected = 0

    def on_setup(self) -> None:
        """Take exploration over from BenchMARL, whose schedules do not know a budget of time."""
        if (found := self.experiment.explores()) is not None:
            module, _ = found
            module.step = lambda frames=1: None
            self.explore()

    def explore(self) -> None:
        """Set the amount of exploration by the share of the budget that is used."""
        if (found := self.experiment.explores()) is not None:
            module, name = found
            share = min(1.0, self.budget.fraction / self.exploration)
            first, last = (float(getattr(module, f"{name}_{end}")) for end in ("init", "end"))
            getattr(module, name).fill_(first + (last - first) * share)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        loc, scale = self.scaling
        self.reward = (float(batch["next", GROUP, "reward"].mean()) - loc) / scale
        self.collected = batch.numel()

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        self.budget.advance(self.collected)
        losses = {
            name: float(training_td[key].float().mean())
            for name, keys in _LOSSES.items()
            if (key := next((key for key in keys if key in training_td.keys()), None)) is not None  # noqa: SIM118
        }
        self.explore()
        if self.reporter.report(reward=self.reward, fct_mean=float("nan"), losses=losses):
            raise _Stop


def train_benchmarl(
    config: BenchMARLConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> BenchMARLResult:
    """Train with an algorithm of BenchMARL.

    Rewards are scaled once, before the training: with random actions their mean becomes 0 and the standard deviation of
    their discounted sum 1. The time for that and for compiling the simulator is not counted.

    Args:
        config: None: the defaults.
        out: the checkpoint's file, ending in .pt, or a folder for ``benchmarl-qmix.pt`` and so on; always written whole
            or not at all. None: keep nothing.
        resume_from: a checkpoint to continue: parameters, also of critics, mixer and targets, optimisers, step count,
            scale of the rewards. Everything else is the configuration's. The replay buffer is not saved: off-policy
            algorithms fill a new one as they go.
        callback: receives the progress after every update; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    If it is interrupted or fails, the checkpoint is saved before the exception propagates.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment, or is of another algorithm, network or width.
        UnknownNameError: for an option that the algorithm does not have.
    """
    config = config or BenchMARLConfig()
    algorithm_config, experiment_config = _configs(config)
    checkpoint = output_file(out, f"benchmarl-{config.algorithm}.pt")
    logs = log_folder(checkpoint, tensorboard)
    with torch_threads(config.torch_threads), summary_writer(logs) as writer, TemporaryDirectory() as scratch:
        facts = _look_at(config)
        saved = None if resume_from is None else _read(Path(resume_from), config, facts)
        scaling = facts.scaling if saved is None else tuple(saved["trainer"]["scaling"])
        done = saved or {"step": 0, "seconds": 0.0}
        budget = Budget(config, done["step"], done["seconds"])
        path = checkpoint or Path(scratch) / "policy.pt"

        def save() -> None:
            _save(path, config, experiment, facts, budget, scaling)

        reporter = Reporter(budget, callback, writer, save, config.checkpoint_every)
        watch = _Watch(config.exploration, budget, reporter, scaling)
        remaining = 2**62 if config.total_steps is None else config.total_steps - budget.step
        experiment_config.max_n_iters = max(1, -(-remaining // (config.num_envs * config.num_steps)))
        experiment = _experiment(config, algorithm_config, experiment_config, facts, scaling, watch)
        try:
            if saved is not None:
                _restore(experiment, saved, Path(resume_from or ""))
            reporter.start()
            with reporter.saving(), suppress(_Stop):
                if not budget.used_up:
                    experiment.run()
        finally:
            experiment.close()
        policy = ExportedPolicy(read_checkpoint(path))
    return BenchMARLResult(policy, checkpoint, reporter.history)


@dataclass(frozen=True)
class _Facts:
    """Shapes of the networks, and the scaling (loc, scale) of rewards r to ``scale * r + loc``."""

    num_servers: int
    num_balancers: int
    features: int
    kind: ActionKind
    scaling: tuple[float, float]


def _look_at(config: BenchMARLConfig) -> _Facts:
    """Look at a configuration's environment; the scale of its rewards comes from a short run with random actions."""
    env = config.make_env()
    try:
        env.action_space.seed(config.seed)
        env.reset(seed=config.seed)
        steps = min(config.max_steps, 96)
        rewards = np.array([env.step(env.action_space.sample())[1] for _ in range(steps)])
        # The first steps are those of empty servers.
        rewards = rewards[steps // 3 :]
        total = np.zeros(rewards.shape[1:])
        sums = []
        for centred in rewards - rewards.mean():
            total = config.gamma * total + centred
            sums.append(total)
        scale = 1.0 / max(float(np.std(sums)), 1e-6)
        return _Facts(
            num_servers=env.num_servers,
            num_balancers=env.num_balancers,
            features=len(env.feature_columns),
            kind=ActionKind.of(env.agent_action_space, env.num_servers),
            scaling=(-scale * float(rewards.mean()), scale),
        )
    finally:
        env.close()


def _configs(config: BenchMARLConfig) -> tuple[Any, ExperimentConfig]:
    """BenchMARL's configurations of the algorithm and of the experiment."""
    kind = ALGORITHMS[config.algorithm]
    algorithm_config = kind.load().get_from_yaml()
    own = {f.name for f in fields(algorithm_config)} - {"lmbda"}
    options = {**kind.options, **config.options}
    for name in options:
        if name not in own and name not in _EXPERIMENT_OPTIONS:
            raise UnknownNameError("option", name, own | {*_EXPERIMENT_OPTIONS}, f"options of {config.algorithm!r}")
    algorithm_options = {name: value for name, value in options.items() if name in own}
    if kind.on_policy:
        algorithm_options["lmbda"] = config.gae_lambda
    frames = config.num_envs * config.num_steps
    experiment_config = replace(
        ExperimentConfig.get_from_yaml(),
        prefer_continuous_actions=config.action_type != "joint",
        gamma=config.gamma,
        lr=config.learning_rate,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=config.num_envs,
        on_policy_n_minibatch_iters=config.epochs,
        on_policy_minibatch_size=max(1, frames // config.minibatches),
        off_policy_collected_frames_per_batch=frames,
        off_policy_n_envs_per_worker=config.num_envs,
        off_policy_n_optimizer_steps=config.optimizer_steps,
        off_policy_train_batch_size=config.batch_size,
        evaluation=False,
        render=False,
        # Replicas of the environment for evaluations, none of which take place.
        evaluation_episodes=1,
        loggers=[],
        create_json=False,
        **{name: value for name, value in options.items() if name not in own},
    )
    return replace(algorithm_config, **algorithm_options), experiment_config


def _experiment(
    config: BenchMARLConfig,
    algorithm_config: Any,
    experiment_config: ExperimentConfig,
    facts: _Facts,
    scaling: tuple[float, ...],
    watch: _Watch,
) -> _Experiment:
    loc, scale = scaling
    keys = {"reward_loc": loc, "reward_scale": scale}
    model = LoadBalanceModelConfig(network=config.network, num_servers=facts.num_servers, hidden=config.hidden)
    critic = replace(model)
    if not ALGORITHMS[config.algorithm].own_critic:
        critic = MlpConfig(num_cells=[2 * config.hidden] * 2, activation_class=nn.Tanh, layer_class=nn.Linear)
    with _quiet():
        return _Experiment(
            task=LoadBalanceTaskClass("TRAINING", config.environment_kwargs() | keys),
            algorithm_config=algorithm_config,
            model_config=model,
            critic_model_config=critic,
            seed=config.seed,
            config=experiment_config,
            callbacks=[watch],
        )


# Checkpoints


def _save(
    path: Path,
    config: BenchMARLConfig,
    experiment: _Experiment,
    facts: _Facts,
    budget: Budget,
    scaling: tuple[float, ...],
) -> None:
    """Write a checkpoint whose network computes what BenchMARL's policy does."""
    squash = not facts.kind.choices and any(
        getattr(experiment.algorithm_config, name, False) for name in ("use_tanh_normal", "use_tanh_mapping")
    )
    network, arguments, parameters = _actor(config, experiment, facts)
    # First: no two networks that are not finite act alike.
    check_parameters(parameters, budget.step)
    _check_equal(experiment, network, arguments, parameters, squash)
    write_policy(
        path,
        config,
        algo=f"benchmarl-{config.algorithm}",
        network=network,
        arguments=arguments,
        parameters=parameters,
        kind=facts.kind,
        num_servers=facts.num_servers,
        features=facts.features,
        squash=squash,
        step=budget.step,
        seconds=budget.seconds,
        trainer={
            "num_balancers": facts.num_balancers,
            "scaling": list(scaling),
            "losses": {k: v for k, v in experiment.losses[GROUP].state_dict().items() if isinstance(v, Tensor)},
            "optimizers": {name: o.state_dict() for name, o in experiment.optimizers[GROUP].items()},
        },
    )


def _actor(
    config: BenchMARLConfig, experiment: _Experiment, facts: _Facts
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The actor as a network of :mod:`lbgym.policies.networks`: name, arguments and parameters."""
    policy = experiment.algorithm.get_policy_for_loss(GROUP)
    model = next(module for module in policy.modules() if isinstance(module, LoadBalanceModel))
    parameters = {name: value.detach().clone() for name, value in model.network.state_dict().items()}
    n, choices, hidden = facts.num_servers, facts.kind.choices, config.hidden
    last: tuple[str, ...]
    arguments: dict[str, Any]
    if model.equivariant:
        last, outputs = ("head.weight", "head.bias"), facts.kind.numbers
        arguments = facts.kind.actor_arguments(facts.features, hidden)
    else:
        last, outputs = tuple(parameters)[-2:], n * facts.kind.numbers
        arguments = {"sizes": [n * (1 + facts.features), hidden, hidden, choices**n if choices else outputs]}
    if model.parts > 1:
        # The standard deviations, which come after the means, have no part in acting.
        parameters |= {name: parameters[name][:outputs].clone() for name in last}
    return config.network, arguments, parameters


def _check_equal(
    experiment: _Experiment,
    name: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    squash: bool,
) -> None:
    """Check that the network of a checkpoint acts as BenchMARL's policy does on random observations.

    Raises:
        CheckpointError: if its actions differ.
    """
    network = NETWORKS[name](**arguments)
    network.load_state_dict(parameters)
    generator = torch.Generator().manual_seed(0)
    observations = torch.rand((16, *experiment.observation_spec[GROUP, "observation"].shape), generator=generator)
    observed = TensorDict({"observation": observations}, observations.shape[:-1])
    seen = TensorDict({GROUP: observed}, observations.shape[:1])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        wanted = experiment.algorithm.get_policy_for_loss(GROUP)(seen)[GROUP, "action"]
        got = network(observations)
    if wanted.dtype == torch.int64:
        same = bool((got.argmax(-1) == wanted).all())
    else:
        same = torch.allclose(got.tanh() if squash else got, wanted, atol=1e-5)
    if not same:
        raise CheckpointError(
            f"the network {name!r} to be saved acts differently from BenchMARL's policy: options that change "
            "how it acts, such as use_tanh_mapping, must be left as they are"
        )


def _restore(experiment: _Experiment, saved: Mapping[str, Any], path: Path) -> None:
    """Give an experiment the parameters and optimisers of a checkpoint."""
    loss = experiment.losses[GROUP]
    trainer = saved["trainer"]
    try:
        loss.load_state_dict(loss.state_dict() | trainer["losses"])
        for name, optimizer in experiment.optimizers[GROUP].items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(trainer["optimizers"][name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} was trained with other options, action types or networks: {error}"
        ) from error


def _read(path: Path, config: BenchMARLConfig, facts: _Facts) -> dict[str, Any]:
    """Read a checkpoint to resume from, and check that it fits."""
    saved = read_checkpoint(path)
    check_recipe(path, saved["algo"], "benchmarl", config.algorithm)
    check_same(path, saved["config"], config, ("network", "hidden", "observe_weights"))
    kind = facts.kind
    here = network_shapes(kind, facts.num_servers, facts.features)
    check_shapes(saved, path, here, tuple(here))
    if saved["trainer"]["num_balancers"] != facts.num_balancers:
        raise CheckpointError(
            f"checkpoint {path} was trained with {saved['trainer']['num_balancers']} balancers, but the environment to "
            f"train on has {facts.num_balancers}"
        )
    return saved
