"""RLlib's algorithms, in this process or with env runners on a Ray cluster: one recipe for all of them.

What the algorithms differ in is one table, :data:`ALGORITHMS`; the recipe, :func:`train_rllib`, is the same for all.
Env runners step the native vector environment; the networks are in plain torch, so that a trained policy acts without
Ray.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode

from ..errors import (
    CheckpointError,
    InvalidOptionError,
    LbgymError,
    MissingExtraError,
    UnknownNameError,
)

try:
    import ray
    import torch
    from ray.rllib.algorithms.algorithm_config import NotProvided
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
    from ray.tune.registry import register_env
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "training with RLlib") from error

from ..env.multi_agent_vector import MultiLoadBalanceVectorEnv
from ..env.vector import LoadBalanceVectorEnv
from ..policies.action_kind import ActionKind
from ..policies.checkpoints import read_checkpoint
from ..policies.inputs import with_weights
from ..policies.neural import ExportedPolicy
from . import rllib_env, rllib_modules
from .cluster import connected
from .config import PER_ALGORITHM, TrainingConfig, saved_config
from .exported import check_shapes, write_policy
from .runs import Progress, log, output_file, summary_writer, torch_threads

#: Transitions per gradient step of the off-policy algorithms: with batches of 128 each serves about four times.
TRANSITIONS_PER_GRADIENT_STEP = 32
#: Size of their batches. RLlib's replay buffers take most of a gradient step's time, and that grows with the batch.
BATCH = 128
#: Names of the environments in RLlib's registry.
ENV, MULTI_AGENT_ENV = "lbgym-rllib", "lbgym-rllib-multi-agent"
#: Where RLlib keeps the modules in the state of an algorithm.
_MODULES = Path("learner_group", "learner", "rl_module")
#: RLlib's name of the policy that all balancers share where each is an agent.
SHARED_POLICY = "balancer"


@dataclass(frozen=True)
class Algorithm:
    """What one algorithm of RLlib takes, and its defaults here.

    Attributes:
        module: where its configuration's class is.
        name: of that class.
        rl_module: name of its class in :mod:`lbgym.training.rllib_modules`.
        actor: where the actor's parameters are in it.
        action_types: those it takes, the default first.
        policies: the networks it has.
        num_envs: replicas.
        num_steps: steps of every replica between two updates.
        learning_rate: step size of the optimiser.
        env_runners: remote env runners.
        multi_agent: whether balancers can be its agents.
        off_policy: whether it learns from a replay buffer.
        squash: whether its continuous actions are squashed by tanh.
        seconds: the least time of an iteration, for those whose updates are too short to be told of one by one.
        options: further arguments of its configuration's ``training``.
        env_kwargs: keys of the environment.
    """

    module: str
    name: str
    rl_module: str
    actor: str
    action_types: tuple[str, ...]
    policies: tuple[str, ...]
    num_envs: int
    num_steps: int
    learning_rate: float
    env_runners: int = 0
    multi_agent: bool = True
    off_policy: bool = False
    squash: bool = False
    seconds: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """The class of its configuration."""
        found: type[Any] = getattr(import_module(f"ray.rllib.algorithms.{self.module}"), self.name)
        return found


_ANY_NETWORK = ("mlp", "equivariant")
_ON_POLICY = ("normalized", "discrete", "joint")
# With gamma 0.95 a reward matters for some 20 steps: what the policy did long ago is of no use.
_REPLAY = {
    "replay_buffer_config": {"type": "EpisodeReplayBuffer", "capacity": 100_000},
    "num_steps_sampled_before_learning_starts": 4_096,
}
# Looking for samples without waiting would take a core from those who make them.
_ASYNCHRONOUS = {"entropy_coeff": 0.0, "timeout_s_sampler_manager": 0.05}

#: The algorithms by name.
ALGORITHMS = {
    "ppo": Algorithm(
        "ppo",
        "PPOConfig",
        "ActorCriticModule",
        "actor",
        _ON_POLICY,
        _ANY_NETWORK,
        64,
        32,
        1e-3,
        options={"use_kl_loss": False, "clip_param": 0.2, "grad_clip": 0.5, "grad_clip_by": "global_norm"},
    ),
    "dqn": Algorithm(
        "dqn",
        "DQNConfig",
        "QModule",
        "af",
        ("joint",),
        _ANY_NETWORK,
        64,
        4,
        5e-4,
        multi_agent=False,
        off_policy=True,
        seconds=0.5,
        options=_REPLAY | {"target_network_update_freq": 4_096},
        # two levels make 2 ** 8 joint actions of the 8 servers of "heterogeneous"; three would be too many
        env_kwargs={"action_weights": [1.0, 4.0]},
    ),
    "sac": Algorithm(
        "sac",
        "SACConfig",
        "SACModule",
        "pi.mean",
        ("normalized",),
        _ANY_NETWORK,
        64,
        4,
        1e-3,
        multi_agent=False,
        off_policy=True,
        squash=True,
        seconds=0.5,
        # the entropy of an action per server outweighs scaled rewards for long if its weight begins at 1
        options=_REPLAY | {"initial_alpha": 0.02, "tau": 0.02},
    ),
    "impala": Algorithm(
        "impala",
        "IMPALAConfig",
        "ActorCriticModule",
        "actor",
        _ON_POLICY,
        _ANY_NETWORK,
        64,
        8,
        5e-4,
        env_runners=1,
        seconds=0.5,
        options=_ASYNCHRONOUS,
    ),
    "appo": Algorithm(
        "appo",
        "APPOConfig",
        "TargetActorCriticModule",
        "actor",
        _ON_POLICY,
        _ANY_NETWORK,
        64,
        8,
        1e-3,
        env_runners=1,
        seconds=0.5,
        # each sample is learnt from twice; an older actor that is renewed seldom would hold the new one back
        options=_ASYNCHRONOUS
        | {
            "circular_buffer_num_batches": 2,
            "circular_buffer_iterations_per_batch": 2,
            "target_network_update_freq": 0.5,
        },
    ),
}

# Arguments of an algorithm's ``training`` that are fields of the configuration or would make another network.
_OWNED = {
    "gamma", "lr", "lr_schedule", "entropy_coeff_schedule", "model", "optimizer", "train_batch_size",
    "train_batch_size_per_learner", "lambda_", "num_epochs", "minibatch_size", "q_model_config", "policy_model_config",
    "num_atoms", "v_min", "v_max", "noisy", "sigma0", "dueling", "hiddens", "burn_in_len", "clip_actions",
    "learner_class", "learner_connector", "add_default_connectors_to_learner_pipeline", "learner_config_dict",
}  # fmt: skip

# What is logged, by the names of Progress and those of RLlib's learners, of which the first found counts.
_LOSSES = {
    "policy": ("policy_loss", "mean_pi_loss"),
    "value": ("vf_loss_unclipped", "mean_vf_loss", "vf_loss", "qf_loss", "total_loss"),
    "entropy": ("entropy",),
    "kl": ("mean_kl_loss",),
    "temperature": ("alpha_value",),
    "q": ("qf_mean",),
}


@dataclass(kw_only=True)
class RLlibConfig(TrainingConfig):
    """What to train on and how, with an algorithm of RLlib.

    The fields whose default depends on the algorithm hold it once the configuration is made; so ``dataclasses.replace``
    with another ``algorithm`` keeps those of the first.

    Rewards are divided by the standard deviation of discounted returns under equal weights, measured once before the
    training. The off-policy algorithms (DQN, SAC) make one gradient step per 32 transitions, whatever the number of
    replicas; another ratio is ``options={"training_intensity": ...}``.
    """

    algorithm: str = "ppo"
    """"ppo", "dqn", "sac", "impala" or "appo": a name of ``ALGORITHMS``"""
    policy: str = "mlp"
    """"mlp", or "equivariant", parameters shared over the servers"""
    multi_agent: bool = False
    """every balancer of the scenario is an agent, and all share one policy; "ppo", "impala" and "appo" only"""
    env_runners: int = PER_ALGORITHM
    """env runners in processes of their own, on any node of the Ray cluster, which share the replicas; 0: sampling
    takes place in this process. 1 for "impala" and "appo", which need at least that, and 0 for the others."""
    ray_address: str | None = None
    """of a Ray cluster, such as "auto" or "ray://10.0.0.1:10001"; None: that of RAY_ADDRESS, else a local Ray. A Ray
    that this process is connected to already is used, and left running, in any case."""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the ``training`` of the algorithm's configuration over those of ``ALGORITHMS``"""

    action_type: str = PER_ALGORITHM
    """an ``action_type`` of ``LoadBalanceEnv``: "normalized" (default), "discrete" or "joint" for "ppo", "impala" and
    "appo", "joint" for "dqn" and "normalized" for "sac"."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of the environment; "dqn" has ``action_weights`` of 1 and 4 unless told otherwise"""

    num_envs: int = PER_ALGORITHM
    """replicas, all env runners together; 64, but 16 with ``multi_agent``, where each is stepped on its own"""
    num_steps: int = PER_ALGORITHM
    """steps of every replica between two updates; 32 for "ppo", 8 for "impala" and "appo", 4 for "dqn" and "sac"."""
    learning_rate: float = PER_ALGORITHM
    """step size of the optimiser; 1e-3, but 5e-4 for "dqn" and "impala"."""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate; "ppo" only"""
    epochs: int = 4
    """passes over the rollout per update; "ppo" only"""
    minibatches: int = 4
    """minibatches per pass; "ppo" only"""
    hidden: int = 64
    """width of the layers, two of them with "mlp"."""
    log_std: float = -2.0
    """initial log standard deviation of continuous actions. With much more noise than this the first thing that dense
    layers learn is to keep all actions beyond the bounds of the space, where the noise is cut off"""

    autoreset_mode: ClassVar[AutoresetMode] = AutoresetMode.NEXT_STEP
    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {
        "env_runners": 0,
        "epochs": 1,
        "minibatches": 1,
    }

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UnknownNameError("algorithm", self.algorithm, ALGORITHMS, "RLlibConfig")
        kind = ALGORITHMS[self.algorithm]
        self.fill_in(
            action_type=kind.action_types[0],
            num_envs=16 if self.multi_agent else kind.num_envs,
            num_steps=kind.num_steps,
            learning_rate=kind.learning_rate,
            env_runners=kind.env_runners,
        )
        super().__post_init__()
        self.env_kwargs = {**kind.env_kwargs, **self.env_kwargs}
        self.check_action_type(f"the recipe for RLlib's {self.algorithm.upper()}", kind.action_types, "ppo")
        if self.policy not in kind.policies:
            raise UnknownNameError("policy", self.policy, kind.policies, f"RLlibConfig of {self.algorithm!r}")
        if self.multi_agent and not kind.multi_agent:
            having = ", ".join(name for name, other in ALGORITHMS.items() if other.multi_agent)
            raise LbgymError(f"multi_agent=True is for {having}, not for {self.algorithm!r}")
        if self.env_runners < kind.env_runners:
            raise LbgymError(
                f"{self.algorithm!r} samples while it learns: RLlibConfig.env_runners must be at least "
                f"{kind.env_runners}, got {self.env_runners}"
            )
        if self.num_envs % max(1, self.env_runners):
            raise LbgymError(
                f"the env runners share the replicas evenly: RLlibConfig.num_envs must be a multiple of "
                f"env_runners={self.env_runners}, got {self.num_envs}"
            )

    def environment_kwargs(self) -> dict[str, Any]:
        """All keys of the environment to train on, but the number of replicas and the autoreset mode."""
        # runners in processes of their own share the cores as it is
        threads = {} if self.multi_agent or not self.env_runners else {"num_threads": 1}
        return threads | super().environment_kwargs()


@dataclass(frozen=True)
class RLlibResult:
    """A finished training run: the policy, in plain torch, its file (None without ``out``) and the history."""

    policy: ExportedPolicy
    checkpoint: Path | None
    history: list[Progress]


def train_rllib(
    config: RLlibConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    tensorboard: bool = False,
) -> RLlibResult:
    """Train with an algorithm of RLlib.

    The policy is saved in plain torch and acts without Ray. Beside it, in a folder ``rllib-ppo.rllib`` for
    ``rllib-ppo.pt``, is the state of RLlib's algorithm, which resuming needs.

    Env runners that are lost, alone or with their node, are started again on any node that has a free CPU; the training
    goes on meanwhile. The replay buffer of DQN and SAC is not saved unless ``options`` have
    ``store_buffer_in_checkpoints``: without it, a resumed training fills a new one with as many steps as at the start
    before it goes on learning.

    Args:
        config: None: the defaults.
        out: the checkpoint's file, ending in .pt, or a folder for ``rllib-ppo.pt`` and so on; always written whole or
            not at all. None: keep nothing.
        resume_from: a checkpoint saved here to go on with, its pickled parts in the folder included, so files you
            trust: parameters, optimiser, step count, scale of the rewards. Everything else is the configuration's.
        callback: told the progress after every iteration of RLlib that had steps; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    On KeyboardInterrupt the checkpoint is saved before the exception goes on.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment, or is of another algorithm, policy or width.
        ClusterError: if there is no Ray cluster at the address.
        InvalidOptionError: if the Ray cluster has fewer CPUs than env runners.
        UnknownNameError: for an option that the algorithm does not have.
    """
    config = config or RLlibConfig()
    _check_options(config)
    saved = None if resume_from is None else _read_for(config, Path(resume_from))
    checkpoint = output_file(out, f"rllib-{config.algorithm}.pt")
    logs = checkpoint.parent / "tensorboard" if checkpoint is not None and tensorboard else None
    with torch_threads(config.torch_threads), connected(config.ray_address), summary_writer(logs) as writer:
        run = _Run(config, saved, None if resume_from is None else Path(resume_from))
        try:
            try:
                run.train(checkpoint, callback, writer)
            finally:
                if checkpoint is not None:
                    run.save(checkpoint)
            policy = run.policy()
        finally:
            run.stop()
    return RLlibResult(policy, checkpoint, run.history)


class _Run:
    """A training under way."""

    def __init__(self, config: RLlibConfig, saved: Mapping[str, Any] | None, path: Path | None) -> None:
        keys = config.environment_kwargs()
        self._config, self._kind = config, ALGORITHMS[config.algorithm]
        self._module_id = SHARED_POLICY if config.multi_agent else DEFAULT_MODULE_ID
        self.history: list[Progress] = []
        self.step = 0 if saved is None else int(saved["step"])
        self._seconds = 0.0 if saved is None else float(saved["seconds"])
        with _made(config, keys) as env:
            self._num_servers, self._features = env.num_servers, len(env.feature_columns)
            self._action_space = env.agent_action_space if config.multi_agent else env.single_action_space
        self._action_kind = ActionKind.of(self._action_space, self._num_servers)
        if saved is not None and path is not None:
            shapes = {"features": self._features, "choices": self._action_kind.choices}
            # the networks over servers take any number of them
            if config.policy == "mlp" or self._action_kind.joint:
                shapes["num_servers"] = self._num_servers
            check_shapes(saved, path, **shapes, joint=self._action_kind.joint)
        if saved is None:
            self._scale = rllib_env.measure_reward_scale(
                keys, config.gamma, config.seed, multi_agent=config.multi_agent
            )
        else:
            self._scale = float(saved["trainer"]["reward_scale"])
        self._spec = self._module_spec()
        _check_cpus(config)
        self._algorithm = self._build(keys)
        try:
            if saved is not None and path is not None:
                self._algorithm.restore_from_path(str(_state_folder(path) / saved["trainer"]["state"]))
            # fails now, not at the end, if what is exported would not act as RLlib's module does
            self.policy()
        except BaseException:
            self.stop()
            raise

    def _module_spec(self) -> RLModuleSpec:
        config, n, features = self._config, self._num_servers, self._features + 1
        kind = self._action_kind
        model: dict[str, Any] = {"network": config.policy, "log_std": config.log_std}
        # SAC's critics are given actions as well
        seen = features + 1 if config.algorithm == "sac" else features
        if config.policy == "equivariant":
            model["actor"] = kind.actor_arguments(features, config.hidden)
            # what all means have in common says nothing, but what all deviations have in common does
            model["spread"] = model["actor"] | {"centered": False}
            model["critic"] = {"features": seen, "hidden": config.hidden, "value": True}
        else:
            total = kind.choices**n if kind.joint else n * (kind.choices or 1)
            activation = "relu" if self._kind.off_policy else "tanh"
            widths = [config.hidden, config.hidden]
            model["actor"] = {"sizes": [n * (1 + features), *widths, total], "activation": activation}
            model["spread"] = model["actor"]
            model["critic"] = {"sizes": [n * (1 + seen), *widths, 1], "activation": activation}
        # what RLlib puts into the configurations of its own modules by itself
        options = dict(self._kind.options) | config.options
        model |= {"twin_q": options.get("twin_q", True), "double_q": options.get("double_q", True)}
        if config.algorithm == "dqn":
            # by the steps of the environment
            explored = 20_000 if config.total_steps is None else max(1, config.total_steps // 5)
            model["epsilon"] = options.get("epsilon", [(0, 1.0), (explored, 0.05)])
        return RLModuleSpec(
            module_class=getattr(rllib_modules, self._kind.rl_module),
            observation_space=rllib_env.observation_space(n, self._features),
            action_space=self._action_space,
            model_config=model,
        )

    def _build(self, keys: Mapping[str, Any]) -> Any:
        """RLlib's algorithm."""
        config, kind = self._config, self._kind
        register_env(ENV, rllib_env.make_vector_env)
        register_env(MULTI_AGENT_ENV, rllib_env.make_multi_agent_env)
        keys = dict(keys) | {"reward_scale": self._scale}
        sampling: dict[str, Any] = {}
        if not config.multi_agent:
            keys["autoreset_mode"] = config.autoreset_mode
            sampling["gym_env_vectorize_mode"] = "vector_entry_point"
        transitions = config.num_envs * config.num_steps
        learning: dict[str, Any] = {"gamma": config.gamma}
        if config.algorithm == "sac":
            learning |= dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), config.learning_rate)
        else:
            learning["lr"] = config.learning_rate
        if kind.off_policy:
            learning["train_batch_size_per_learner"] = BATCH
            # RLlib counts a local env runner beside the remote ones, which does not sample
            runners = config.env_runners
            share = runners / (runners + 1) if runners else 1.0
            learning["training_intensity"] = share * BATCH / TRANSITIONS_PER_GRADIENT_STEP
        else:
            learning["train_batch_size_per_learner"] = transitions
        if config.algorithm == "ppo":
            learning |= {"lambda_": config.gae_lambda, "num_epochs": config.epochs}
            learning["minibatch_size"] = max(2, transitions // config.minibatches)
        options = dict(kind.options) | config.options
        if kind.off_policy and not options.get("store_buffer_in_checkpoints"):
            # a resumed training begins with an empty replay buffer
            options["num_steps_sampled_before_learning_starts"] += self.step
        made = kind.load()()
        # the environment clips actions itself
        made.environment(
            MULTI_AGENT_ENV if config.multi_agent else ENV,
            env_config=keys,
            disable_env_checking=True,
            normalize_actions=False,
            clip_actions=False,
        )
        made.env_runners(
            num_env_runners=config.env_runners,
            num_envs_per_env_runner=config.num_envs // max(1, config.env_runners),
            rollout_fragment_length=config.num_steps,
            **sampling,
        )
        made.learners(num_learners=0)
        made.training(**learning | options)
        made.rl_module(rl_module_spec=self._spec)
        made.callbacks(rllib_env.StatisticsCallback)
        made.fault_tolerance(restart_failed_env_runners=True)
        made.reporting(min_time_s_per_iteration=kind.seconds, min_sample_timesteps_per_iteration=0)
        made.debugging(seed=config.seed, log_level="ERROR")
        if config.multi_agent:
            made.multi_agent(policies={SHARED_POLICY}, policy_mapping_fn=_shared)
        with _quiet():
            return made.build_algo()

    def train(self, checkpoint: Path | None, callback: Callable[[Progress], bool | None] | None, writer: Any) -> None:
        """Train until the budget is used up or the callback says so."""
        config = self._config
        began = time.perf_counter() - self._seconds
        written = last = time.perf_counter()
        losses: dict[str, float] = {}
        stop = config.total_steps is not None and self.step >= config.total_steps
        while not stop:
            result = self._algorithm.train()
            now = time.perf_counter()
            self._seconds = now - began
            # NaN, or nothing, where no env runner had anything to tell
            told = result.get("env_runners", {}).get("lbgym", {})
            steps = _finite(told.get("steps"))
            self.step += int(steps)
            by_steps = self.step / config.total_steps if config.total_steps is not None else 0.0
            by_time = self._seconds / config.seconds if config.seconds is not None else 0.0
            fraction = min(1.0, max(by_steps, by_time))
            stop = fraction >= 1.0
            learned = result.get("learners", {}).get(self._module_id, {})
            for name, keys in _LOSSES.items():
                key = next((k for k in keys if k in learned), None)
                if key is not None and math.isfinite(learned[key]):
                    losses[name] = float(learned[key])
            if not steps:
                # those who sample by themselves had nothing ready
                continue
            flows = _finite(told.get("flows"))
            progress = Progress(
                step=self.step,
                seconds=self._seconds,
                fraction=fraction,
                steps_per_second=steps / (now - last),
                reward=float(told["reward"]) / steps,
                fct_mean=float(told["fct"]) / flows if flows else math.nan,
                losses=dict(losses),
            )
            last = now
            self.history.append(progress)
            if writer is not None:
                log(writer, progress)
            if checkpoint is not None and now - written >= config.checkpoint_every:
                self.save(checkpoint)
                written = now
            if callback is not None and callback(progress):
                stop = True

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all.

        The state of the algorithm has a folder of its own for each checkpoint, and the file names the one that belongs
        to it; so at no time is there a file without its state.
        """
        folder = _state_folder(path)
        folder.mkdir(exist_ok=True)
        name = f"{self.step}-{uuid.uuid4().hex[:8]}"
        unfinished = folder / f".{name}.tmp"
        try:
            self._algorithm.save_to_path(str(unfinished))
            # IMPALA and APPO go on learning meanwhile: what is exported is what was saved
            module = RLModule.from_checkpoint(unfinished / _MODULES / self._module_id)
            os.replace(unfinished, folder / name)
            self._export(path, module, name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(folder / name, ignore_errors=True)
            raise
        for other in folder.iterdir():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def policy(self) -> ExportedPolicy:
        """The policy as it is now."""
        module = self._spec.build()
        module.set_state(self._algorithm.get_weights([self._module_id])[self._module_id])
        with tempfile.TemporaryDirectory(prefix="lbgym-") as folder:
            return self._export(Path(folder) / "policy.pt", module, "")

    def _export(self, path: Path, module: Any, state: str) -> ExportedPolicy:
        config, kind = self._config, self._kind
        prefix = f"{kind.actor}."
        write_policy(
            path,
            config,
            algo=f"rllib-{config.algorithm}",
            network=config.policy,
            arguments=self._spec.model_config["actor"],
            parameters={
                name.removeprefix(prefix): value
                for name, value in module.state_dict().items()
                if name.startswith(prefix)
            },
            kind=self._action_kind,
            num_servers=self._num_servers,
            features=self._features,
            sees_weights=True,
            squash=kind.squash,
            step=self.step,
            seconds=self._seconds,
            trainer={"state": state, "reward_scale": self._scale},
        )
        policy = ExportedPolicy(read_checkpoint(path))
        self._check_export(policy, module)
        return policy

    def _check_export(self, policy: ExportedPolicy, module: Any) -> None:
        """Hold an exported policy to RLlib's module, which must act alike.

        Raises:
            CheckpointError: if their actions differ.
        """
        n, rows = self._num_servers, 16
        rng = np.random.default_rng(0)
        flat = np.concatenate([np.ones((rows, n)), rng.random((rows, n * self._features))], -1).astype(np.float32)
        info = {"weights": rng.uniform(0.5, 2.0, (rows, n))}
        seen = with_weights(torch.from_numpy(flat), info["weights"], self._features)
        with torch.no_grad():
            told = module.forward_inference({Columns.OBS: seen})
            if Columns.ACTIONS in told:
                wanted = told[Columns.ACTIONS].numpy()
            else:
                distribution = module.get_inference_action_dist_cls().from_logits(told[Columns.ACTION_DIST_INPUTS])
                wanted = distribution.to_deterministic().sample().numpy()
        if not self._action_kind.choices:
            # as the environment does
            wanted = wanted.clip(-1.0, 1.0)
        acted = policy.act(flat, info)
        if not np.allclose(acted, wanted, atol=1e-5):
            raise CheckpointError(
                f"the exported policy acts otherwise than RLlib's module of {self._config.algorithm!r}: {acted[0]} "
                f"instead of {wanted[0]} for the same observation"
            )

    def stop(self) -> None:
        """End the env runners."""
        self._algorithm.stop()
        # a folder in the user's home that RLlib makes for itself, whether it has anything to put there or not
        shutil.rmtree(self._algorithm.logdir, ignore_errors=True)


def _finite(value: Any) -> float:
    """A sum among RLlib's metrics, which is NaN or missing where nothing was added."""
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _shared(agent: Any, *args: Any, **kwargs: Any) -> str:
    """The policy of every agent."""
    return SHARED_POLICY


@contextmanager
def _quiet() -> Iterator[None]:
    """Without RLlib's advice on what is as it should be, such as the API in use."""
    loggers = [logging.getLogger(name) for name in ("ray.rllib", "ray.tune")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _made(config: RLlibConfig, keys: Mapping[str, Any]) -> Iterator[Any]:
    """One replica of the environment, for its spaces."""
    env = MultiLoadBalanceVectorEnv(1, **keys) if config.multi_agent else LoadBalanceVectorEnv(1, **keys)
    try:
        yield env
    finally:
        env.close()


def _check_options(config: RLlibConfig) -> None:
    kind = ALGORITHMS[config.algorithm].load()
    known: set[str] = set()
    for base in kind.__mro__:
        if "training" in vars(base):
            parameters = inspect.signature(vars(base)["training"]).parameters.values()
            # what is deprecated or of the old API stack has no effect, or an error of its own
            known |= {p.name for p in parameters if p.default is NotProvided and not p.name.startswith("_")}
    known -= _OWNED
    for name in config.options:
        if name not in known:
            raise UnknownNameError("option", name, known, f"options of {config.algorithm!r}")


def _check_cpus(config: RLlibConfig) -> None:
    """Refuse what RLlib would wait for without end."""
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if config.env_runners > cpus:
        raise InvalidOptionError(
            f"env_runners={config.env_runners} need a CPU each, but the Ray cluster has {cpus:g} of them"
        )


def _state_folder(path: Path) -> Path:
    """Where the state of RLlib's algorithm is, beside a checkpoint; RLlib takes a relative path for an address."""
    return path.absolute().with_suffix(".rllib")


def _read(path: Path) -> dict[str, Any]:
    saved = read_checkpoint(path)
    if not str(saved["algo"]).startswith("rllib-"):
        raise CheckpointError(f"checkpoint {path} is of the recipe {saved['algo']!r}, not of RLlib's")
    return saved


def _check_algorithm(path: Path, saved: Mapping[str, Any], wanted: str) -> None:
    algorithm = saved["config"]["algorithm"]
    if algorithm != wanted:
        raise CheckpointError(f"checkpoint {path} was trained with algorithm {algorithm!r}, not {wanted!r}")


def _read_for(config: RLlibConfig, path: Path) -> dict[str, Any]:
    """A checkpoint to go on with, as far as can be told without the environment."""
    saved = _read(path)
    _check_algorithm(path, saved, config.algorithm)
    for name in ("policy", "hidden"):
        was, wanted = saved["config"][name], getattr(config, name)
        if was != wanted:
            raise CheckpointError(
                f"checkpoint {path} was trained with {name} {was!r}, but the configuration has {wanted!r}"
            )
    state = _state_folder(path) / saved["trainer"]["state"]
    if not state.is_dir():
        raise CheckpointError(
            f"checkpoint {path} can act, but not be trained further: the state of its training, {state}, is missing"
        )
    return saved


def config_of(path: str | os.PathLike[str], algorithm: str | None = None) -> RLlibConfig:
    """The configuration that a checkpoint was trained with.

    Args:
        path: the checkpoint's file.
        algorithm: the one it must be of; None: any.

    Raises:
        CheckpointError: if the file is no checkpoint saved here or of another algorithm, or its configuration had a
            part with no plain form.
    """
    path = Path(path)
    saved = _read(path)
    if algorithm is not None:
        _check_algorithm(path, saved, algorithm)
    return RLlibConfig(**saved_config(saved["config"], path))
