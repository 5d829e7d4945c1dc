"""The recipe for RLlib: an algorithm, its progress, its checkpoints, and its policy in plain torch."""

from __future__ import annotations

import inspect
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError, FileWriteError, InvalidOptionError, MissingExtraError, UnknownNameError

try:
    import ray
    import torch
    from ray.exceptions import RayError
    from ray.rllib.algorithms.algorithm_config import NotProvided
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
    from ray.tune.registry import register_env
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "training with RLlib") from error

from ...env.multi_agent_vector import MultiLoadBalanceVectorEnv
from ...env.vector import LoadBalanceVectorEnv
from ...policies.action_kind import ActionKind
from ...policies.checkpoints import read_checkpoint
from ...policies.neural import ExportedPolicy
from ..checkpoints import check_shapes, write_policy
from ..cluster import ClusterError, connected
from ..config import check_recipe, check_same
from ..runs import Budget, Callback, Progress, Reporter, log_folder, output_file, summary_writer, torch_threads
from . import environment, modules
from .config import ALGORITHMS, RLlibConfig

#: Transitions per gradient step of the off-policy algorithms: with batches of 128 each serves about four times.
TRANSITIONS_PER_GRADIENT_STEP = 32
#: Size of their batches. RLlib's replay buffers take most of a gradient step's time, and that grows with the batch.
BATCH = 128
#: Names of the environments in RLlib's registry.
ENV, MULTI_AGENT_ENV = "lbgym-rllib", "lbgym-rllib-multi-agent"
#: The folder of the modules in the saved state of an algorithm.
_MODULES = Path("learner_group", "learner", "rl_module")
#: RLlib's name of the policy that all balancers share where each is an agent.
SHARED_POLICY = "balancer"


# Arguments of an algorithm's ``training`` that are fields of the configuration or would make another network.
_OWNED = {
    "gamma", "lr", "lr_schedule", "entropy_coeff_schedule", "model", "optimizer", "train_batch_size",
    "train_batch_size_per_learner", "lambda_", "num_epochs", "minibatch_size", "q_model_config", "policy_model_config",
    "num_atoms", "v_min", "v_max", "noisy", "sigma0", "dueling", "hiddens", "burn_in_len", "clip_actions",
    "learner_class", "learner_connector", "add_default_connectors_to_learner_pipeline", "learner_config_dict",
}  # fmt: skip

# A loss of Progress -> names of RLlib's learners; the first one present is taken.
_LOSSES = {
    "policy": ("policy_loss", "mean_pi_loss"),
    "value": ("vf_loss_unclipped", "mean_vf_loss", "vf_loss", "qf_loss", "total_loss"),
    "entropy": ("entropy",),
    "kl": ("mean_kl_loss",),
    "temperature": ("alpha_value",),
    "q": ("qf_mean",),
}


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
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> RLlibResult:
    """Train with an algorithm of RLlib.

    The policy is saved in plain torch and acts without Ray. Beside it, in a folder ``rllib-ppo.rllib`` for
    ``rllib-ppo.pt``, is the state of RLlib's algorithm, which resuming needs.

    Env runners that are lost, alone or with their node, are started again on any node that has a free CPU; the training
    goes on meanwhile. The replay buffer of DQN and SAC is not saved unless ``options`` have
    ``store_buffer_in_checkpoints``: without it, a resumed training fills a new one with as many steps as at the start
    before it continues to learn.

    Args:
        config: None: the defaults.
        out: the checkpoint's file, ending in .pt, or a folder for ``rllib-ppo.pt`` and so on; always written whole or
            not at all. None: keep nothing.
        resume_from: a checkpoint saved here to continue, its pickled parts in the folder included, so files you
            trust: parameters, optimiser, step count, scale of the rewards. Everything else is the configuration's.
        callback: receives the progress after every iteration of RLlib that had steps; returning True stops the
            training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    If it is interrupted or fails, the checkpoint is saved before the exception propagates.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment, or is of another algorithm, network or width.
        ClusterError: if there is no Ray cluster at the address, or it is lost.
        InvalidOptionError: if the Ray cluster has fewer CPUs than env runners.
        UnknownNameError: for an option that the algorithm does not have.
    """
    config = config or RLlibConfig()
    _check_options(config)
    saved = None if resume_from is None else _read_for(config, Path(resume_from))
    checkpoint = output_file(out, f"rllib-{config.algorithm}.pt")
    logs = log_folder(checkpoint, tensorboard)
    with torch_threads(config.torch_threads), connected(config.ray_address), summary_writer(logs) as writer:
        run = _Run(config, saved, None if resume_from is None else Path(resume_from))
        try:
            history = run.train(checkpoint, callback, writer)
            policy = run.policy()
        except RayError as error:
            raise ClusterError(
                f"RLlib's training was lost at step {run.budget.step:,}: {_first_line(error)}"
            ) from error
        finally:
            run.stop()
    return RLlibResult(policy, checkpoint, history)


class _Run:
    """A training under way."""

    def __init__(self, config: RLlibConfig, saved: Mapping[str, Any] | None, path: Path | None) -> None:
        keys = config.environment_kwargs()
        self._config, self._kind = config, ALGORITHMS[config.algorithm]
        self._module_id = SHARED_POLICY if config.multi_agent else DEFAULT_MODULE_ID
        done = saved or {"step": 0, "seconds": 0.0}
        self.budget = Budget(config, int(done["step"]), float(done["seconds"]))
        with _made(config, keys) as env:
            self._num_servers, self._features = env.num_servers, len(env.feature_columns)
            self._observation_space = (
                env.agent_observation_space if config.multi_agent else env.single_observation_space
            )
            self._action_space = env.agent_action_space if config.multi_agent else env.single_action_space
        self._action_kind = ActionKind.of(self._action_space, self._num_servers)
        if saved is not None and path is not None:
            kind = self._action_kind
            shapes = {"features": self._features, "choices": kind.choices, "joint": kind.joint}
            # The networks over servers take any number of them.
            if config.network == "mlp" or self._action_kind.joint:
                shapes["num_servers"] = self._num_servers
            check_shapes(saved, path, shapes, tuple(shapes))
        if saved is None:
            self._scale = environment.measure_reward_scale(
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
            # Fail now, not at the end, if the exported policy would not act as RLlib's module does.
            self.policy()
        except BaseException:
            self.stop()
            raise

    def _module_spec(self) -> RLModuleSpec:
        config, n, features = self._config, self._num_servers, self._features
        kind = self._action_kind
        model: dict[str, Any] = {"network": config.network, "log_std": config.log_std}
        # SAC's critics are given actions as well
        seen = features + 1 if config.algorithm == "sac" else features
        if config.network == "equivariant":
            model["actor"] = kind.actor_arguments(features, config.hidden)
            # An offset common to all means has no effect, but one common to all deviations has.
            model["spread"] = model["actor"] | {"centered": False}
            model["critic"] = {"features": seen, "hidden": config.hidden, "value": True}
        else:
            total = kind.choices**n if kind.joint else n * (kind.choices or 1)
            activation = "relu" if self._kind.off_policy else "tanh"
            widths = [config.hidden, config.hidden]
            model["actor"] = {"sizes": [n * (1 + features), *widths, total], "activation": activation}
            model["spread"] = model["actor"]
            model["critic"] = {"sizes": [n * (1 + seen), *widths, 1], "activation": activation}
        # Keys that RLlib adds to the configurations of its own modules.
        options = dict(self._kind.options) | config.options
        model |= {"twin_q": options.get("twin_q", True), "double_q": options.get("double_q", True)}
        if config.algorithm == "dqn":
            # In environment steps.
            explored = 20_000 if config.total_steps is None else max(1, config.total_steps // 5)
            model["epsilon"] = options.get("epsilon", [(0, 1.0), (explored, 0.05)])
        return RLModuleSpec(
            module_class=getattr(modules, self._kind.rl_module),
            observation_space=self._observation_space,
            action_space=self._action_space,
            model_config=model,
        )

    def _build(self, keys: Mapping[str, Any]) -> Any:
        """RLlib's algorithm."""
        config, kind = self._config, self._kind
        register_env(ENV, environment.make_vector_env)
        register_env(MULTI_AGENT_ENV, environment.make_multi_agent_env)
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
            # Beside the remote env runners RLlib counts a local one, which does not sample.
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
            # A resumed training begins with an empty replay buffer.
            options["num_steps_sampled_before_learning_starts"] += self.budget.step
        made = kind.load()()
        # The environment clips actions itself.
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
        made.callbacks(environment.StatisticsCallback)
        made.fault_tolerance(restart_failed_env_runners=True)
        made.reporting(min_time_s_per_iteration=kind.seconds, min_sample_timesteps_per_iteration=0)
        made.debugging(seed=config.seed, log_level="ERROR")
        if config.multi_agent:
            made.multi_agent(policies={SHARED_POLICY}, policy_mapping_fn=_shared)
        with _quiet():
            return made.build_algo()

    def train(self, checkpoint: Path | None, callback: Callback | None, writer: Any) -> list[Progress]:
        """Train until the budget is used up or the callback stops it; returns the history."""
        budget = self.budget

        def save() -> None:
            if checkpoint is not None:
                self.save(checkpoint)

        reporter = Reporter(budget, callback, writer, save, self._config.checkpoint_every)
        losses: dict[str, float] = {}
        total = self._config.total_steps
        stop = total is not None and budget.step >= total
        with reporter.saving():
            while not stop:
                result = self._algorithm.train()
                # NaN or missing if no env runner had anything to report.
                sums = result.get("env_runners", {}).get("lbgym", {})
                steps = int(_finite(sums.get("steps")))
                budget.advance(steps)
                learned = result.get("learners", {}).get(self._module_id, {})
                for name, keys in _LOSSES.items():
                    key = next((k for k in keys if k in learned), None)
                    if key is not None and math.isfinite(learned[key]):
                        losses[name] = float(learned[key])
                if not steps:
                    # IMPALA's and APPO's env runners had nothing ready.
                    stop = budget.used_up
                    continue
                flows = _finite(sums.get("flows"))
                stop = reporter.report(
                    reward=float(sums["reward"]) / steps,
                    fct_mean=float(sums["fct"]) / flows if flows else math.nan,
                    losses=dict(losses),
                )
        return reporter.history

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all.

        The state of the algorithm has a folder of its own for each checkpoint, and the file names the one that belongs
        to it; so at no time is there a file without its state.
        """
        folder = _state_folder(path)
        folder.mkdir(exist_ok=True)
        name = f"{self.budget.step}-{uuid.uuid4().hex[:8]}"
        unfinished = folder / f".{name}.tmp"
        try:
            self._algorithm.save_to_path(str(unfinished))
            # IMPALA and APPO keep learning meanwhile: export what was saved.
            module = RLModule.from_checkpoint(unfinished / _MODULES / self._module_id)
            os.replace(unfinished, folder / name)
            self._export(path, module, name)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(folder / name, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, FileWriteError):
                raise FileWriteError(f"cannot write {folder}: {error.strerror or error}") from error
            raise
        for other in folder.iterdir():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def policy(self) -> ExportedPolicy:
        """Export the policy as it is now."""
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
            network=config.network,
            arguments=self._spec.model_config["actor"],
            parameters={
                name.removeprefix(prefix): value
                for name, value in module.state_dict().items()
                if name.startswith(prefix)
            },
            kind=self._action_kind,
            num_servers=self._num_servers,
            features=self._features,
            squash=kind.squash,
            step=self.budget.step,
            seconds=self.budget.seconds,
            trainer={"state": state, "reward_scale": self._scale},
        )
        policy = ExportedPolicy(read_checkpoint(path))
        self._check_export(policy, module)
        return policy

    def _check_export(self, policy: ExportedPolicy, module: Any) -> None:
        """Check that an exported policy acts as RLlib's module does.

        Raises:
            CheckpointError: if their actions differ.
        """
        n, rows = self._num_servers, 16
        rng = np.random.default_rng(0)
        flat = np.concatenate([np.ones((rows, n)), rng.random((rows, n * self._features))], -1).astype(np.float32)
        info = {"weights": rng.uniform(0.5, 2.0, (rows, n))}
        with torch.no_grad():
            outputs = module.forward_inference({Columns.OBS: torch.from_numpy(flat)})
            if Columns.ACTIONS in outputs:
                wanted = outputs[Columns.ACTIONS].numpy()
            else:
                distribution = module.get_inference_action_dist_cls().from_logits(outputs[Columns.ACTION_DIST_INPUTS])
                wanted = distribution.to_deterministic().sample().numpy()
        if not self._action_kind.choices:
            # The environment clips likewise.
            wanted = wanted.clip(-1.0, 1.0)
        acted = policy.act(flat, info)
        if not np.allclose(acted, wanted, atol=1e-5):
            raise CheckpointError(
                f"the exported policy acts differently from RLlib's module of {self._config.algorithm!r}: {acted[0]} "
                f"instead of {wanted[0]} for the same observation"
            )

    def stop(self) -> None:
        """Stop the env runners."""
        self._algorithm.stop()
        # RLlib always makes a log folder in the user's home, even if it stays empty.
        shutil.rmtree(self._algorithm.logdir, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _finite(value: Any) -> float:
    """Read a sum among RLlib's metrics, which is NaN or missing where nothing was added."""
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _shared(agent: Any, *args: Any, **kwargs: Any) -> str:
    """The policy of every agent."""
    return SHARED_POLICY


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence RLlib's advice, such as that on the API in use."""
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
    """Make one replica of the environment, for its spaces."""
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
            # Arguments that are deprecated or of the old API stack have no effect or raise errors of their own.
            known |= {p.name for p in parameters if p.default is NotProvided and not p.name.startswith("_")}
    known -= _OWNED
    for name in config.options:
        if name not in known:
            raise UnknownNameError("option", name, known, f"options of {config.algorithm!r}")


def _check_cpus(config: RLlibConfig) -> None:
    """Refuse env runners that RLlib would wait for forever."""
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if config.env_runners > cpus:
        raise InvalidOptionError(
            f"env_runners={config.env_runners} need a CPU each, but the Ray cluster has {cpus:g} of them"
        )


def _state_folder(path: Path) -> Path:
    """Locate the state of RLlib's algorithm beside a checkpoint; RLlib would take a relative path for an address."""
    return path.absolute().with_suffix(".rllib")


def _read_for(config: RLlibConfig, path: Path) -> dict[str, Any]:
    """Read a checkpoint to resume from; check all that needs no environment."""
    saved = read_checkpoint(path)
    check_recipe(path, saved["algo"], "rllib", config.algorithm)
    check_same(path, saved["config"], config, ("network", "hidden"))
    state = _state_folder(path) / saved["trainer"]["state"]
    if not state.is_dir():
        raise CheckpointError(
            f"checkpoint {path} can act, but not be trained further: the state of its training, {state}, is missing"
        )
    return saved
