"""Stable-Baselines3 on the vector environment: a thin adapter, and PPO through it.

Stable-Baselines3 has no adapter for Gymnasium's vector environments, and wrapping single environments one by one is
many times slower than stepping all replicas at once.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ..errors import CheckpointError, LbgymError, MissingExtraError

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.save_util import load_from_zip_file
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
except ModuleNotFoundError as error:
    raise MissingExtraError("stable_baselines3", "sb3", "training with Stable-Baselines3") from error

from .runs import Progress, output_file, plain_config, torch_threads, write_whole

if TYPE_CHECKING:
    from ..scenarios import Scenario
    from ..vector_env import LoadBalanceVectorEnv

CHECKPOINT_NAME = "sb3-ppo.zip"


class SB3VecEnv(VecEnv):
    """A :class:`lbgym.LoadBalanceVectorEnv` as Stable-Baselines3's ``VecEnv``.

    The replicas start again in the step that ends their episode, as Stable-Baselines3 expects; the last observation is
    in ``infos[i]["terminal_observation"]``, and ``infos[i]["TimeLimit.truncated"]`` is True, so that its value is
    bootstrapped. Between two ends of episodes the infos are empty: filling a dictionary per replica and step would cost
    more than the step. Attributes and methods are those of the one vector environment, whichever indices are asked for.

    Args:
        env: made with ``autoreset_mode=AutoresetMode.SAME_STEP``.

    Raises:
        LbgymError: for another autoreset mode.
    """

    def __init__(self, env: LoadBalanceVectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise LbgymError(f"SB3VecEnv needs a vector environment with autoreset_mode SAME_STEP, got {mode}")
        self.env = env
        self._actions: NDArray[Any] | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Start every replica, with the seeds and options that :meth:`seed` and :meth:`set_options` left."""
        if any(options != self._options[0] for options in self._options):
            raise LbgymError("the replicas of one vector environment take the same options, got different ones")
        seeds = None if any(seed is None for seed in self._seeds) else [int(seed or 0) for seed in self._seeds]
        observation, _ = self.env.reset(seed=seeds, options=dict(self._options[0]) or None)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every replica."""
        observation, rewards, terminated, truncated, info = self.env.step(self._actions)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            final = info["final_obs"]
            for i in np.flatnonzero(dones):
                last = {k: v[i] for k, v in final.items()} if isinstance(final, dict) else final[i]
                infos[i] = {
                    "terminal_observation": last,
                    "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                }
        return observation, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """Frames of the replicas."""
        frames = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector environment's attribute, once per index."""
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment; for all replicas or none."""
        if self._count(indices) != self.num_envs:
            raise LbgymError(
                f"the replicas share one vector environment: {attr_name!r} can be set for all {self.num_envs} of them, "
                f"not for {self._count(indices)}"
            )
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; its result, once per index."""
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)] * self._count(indices)

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False: the replicas are no environments of their own and carry no wrappers."""
        return [False] * self._count(indices)

    def _count(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))


@dataclass(kw_only=True)
class SB3Config:
    """What to train on and how, with Stable-Baselines3's PPO and its MlpPolicy."""

    scenario: str | Path | Scenario | None = "heterogeneous"
    """a scenario's name, a TOML path or a Scenario"""
    num_servers: int | None = None
    """servers; None: the scenario's"""
    action_type: str = "normalized"
    """any ``action_type`` of ``LoadBalanceEnv``"""
    reward_type: Any = "open_flows"
    """what is maximised; any ``reward_type`` of the environment"""
    reward_field: str | None = None
    """the feature that a fairness reward is taken on; None: the environment's default"""
    dispatch: str | None = None
    """dispatch rule; None: the scenario's"""
    max_steps: int = 256
    """steps of an episode"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of ``LoadBalanceVectorEnv``"""

    seed: int = 1
    """seeds the network, the actions and the replicas"""
    total_steps: int | None = 1_000_000
    """environment steps, all replicas together; None: no limit"""
    seconds: float | None = None
    """wall-clock limit; None: no limit"""
    num_envs: int = 256
    """replicas"""
    num_steps: int = 64
    """steps of every replica between two updates"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    gamma: float = 0.95
    """discount per step"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    epochs: int = 4
    """passes over the rollout per update"""
    minibatches: int = 4
    """minibatches per pass"""
    hidden: int = 64
    """width of the two layers of actor and critic"""
    log_std: float = -1.0
    """initial log standard deviation of continuous actions"""
    torch_threads: int = 1
    """threads of torch; more than one rarely pays for a network this small"""
    checkpoint_every: float = 30.0
    """seconds between checkpoints"""

    def __post_init__(self) -> None:
        if self.total_steps is None and self.seconds is None:
            raise LbgymError("SB3Config needs total_steps, seconds or both, got neither")

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on."""
        keys: dict[str, Any] = {"observation": "flat", "normalize": True, "action_type": self.action_type}
        keys |= {"dispatch": self.dispatch, "step_interval": 0.25}
        return keys | {k: v for k, v in self.env_kwargs.items() if k not in ("num_threads", "render_mode")}

    def make_env(self) -> LoadBalanceVectorEnv:
        """The vector environment to train on."""
        from ..vector_env import LoadBalanceVectorEnv

        keys: dict[str, Any] = {"scenario": self.scenario, "num_servers": self.num_servers, "max_steps": self.max_steps}
        keys |= {"reward_type": self.reward_type} | self.observation_kwargs() | self.env_kwargs
        if self.reward_field is not None:
            keys["reward_field"] = self.reward_field
        return LoadBalanceVectorEnv(num_envs=self.num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **keys)


@dataclass(frozen=True)
class SB3Result:
    """A finished training run: Stable-Baselines3's model, its zip file (None without ``out``) and the history."""

    model: PPO
    checkpoint: Path | None
    history: list[Progress]


class _Watch(BaseCallback):
    """Reports progress, saves now and then, and stops at the time limit or when told to."""

    def __init__(
        self,
        config: SB3Config,
        checkpoint: Path | None,
        callback: Callable[[Progress], bool | None] | None,
        elapsed: float,
    ) -> None:
        super().__init__()
        self.config, self.checkpoint, self.told = config, checkpoint, callback
        self.history: list[Progress] = []
        self.started = time.perf_counter() - elapsed
        self.written = self.begun = time.perf_counter()
        self.reward = 0.0
        self.steps = 0
        self.stop = False

    def _on_step(self) -> bool:
        normalizer = self.training_env
        assert isinstance(normalizer, VecNormalize)
        self.reward += float(normalizer.get_original_reward().mean())
        self.steps += 1
        return not self.stop

    def _on_rollout_end(self) -> None:
        now = time.perf_counter()
        seconds = now - self.started
        config = self.config
        by_steps = self.num_timesteps / config.total_steps if config.total_steps is not None else 0.0
        by_time = seconds / config.seconds if config.seconds is not None else 0.0
        logged = getattr(self.logger, "name_to_value", {})
        names = {"policy": "policy_gradient_loss", "value": "value_loss", "kl": "approx_kl", "clipped": "clip_fraction"}
        progress = Progress(
            step=self.num_timesteps,
            seconds=seconds,
            fraction=min(1.0, max(by_steps, by_time)),
            steps_per_second=self.steps * config.num_envs / (now - self.begun),
            reward=self.reward / self.steps,
            fct_mean=float("nan"),
            losses={name: float(logged[f"train/{key}"]) for name, key in names.items() if f"train/{key}" in logged},
        )
        self.history.append(progress)
        self.begun, self.reward, self.steps = now, 0.0, 0
        self.model.lbgym_seconds = seconds  # type: ignore[attr-defined]
        if self.checkpoint is not None and now - self.written >= config.checkpoint_every:
            write_whole(self.checkpoint, _saver(self.model))
            self.written = now
        told = bool(self.told(progress)) if self.told is not None else False
        self.stop = told or (config.seconds is not None and seconds >= config.seconds)


def train_sb3_ppo(
    config: SB3Config | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    tensorboard: bool = False,
) -> SB3Result:
    """Train Stable-Baselines3's PPO.

    The model is saved in Stable-Baselines3's own format with one attribute more, ``lbgym_env_kwargs``: the environment
    keys that its observations and actions depend on.

    Args:
        config: None: the defaults.
        out: the model's file, ending in .zip, or a folder for ``sb3-ppo.zip``; always written whole or not at all.
            None: keep nothing.
        resume_from: a model saved here to go on with: parameters, optimiser and step count. The scale of the rewards is
            estimated anew.
        callback: told the progress after every rollout; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the model.

    On KeyboardInterrupt the model is saved before the exception goes on.

    Raises:
        CheckpointError: if the model does not fit the environment.
    """
    config = config or SB3Config()
    checkpoint = output_file(out, CHECKPOINT_NAME)
    logs = checkpoint.parent / "tensorboard" if checkpoint is not None and tensorboard else None
    vector = config.make_env()
    with torch_threads(config.torch_threads):
        try:
            vector.reset(seed=config.seed)
            vector.step(vector.action_space.sample())  # compiles the simulator outside the time budget
            # the networks learn from rewards of any scale; observations are in [0, 1] already
            env = VecNormalize(VecMonitor(SB3VecEnv(vector)), norm_obs=False, gamma=config.gamma)
            model = _load(resume_from, env) if resume_from is not None else _new(config, env)
            model.set_logger(configure(str(logs), ["tensorboard"]) if logs is not None else configure(None, []))
            model.lbgym_env_kwargs = config.observation_kwargs()  # type: ignore[attr-defined]
            model.lbgym_config = plain_config(config)  # type: ignore[attr-defined]
            watch = _Watch(config, checkpoint, callback, getattr(model, "lbgym_seconds", 0.0))
            # learn() counts from where the model stands
            remaining = (2**62 if config.total_steps is None else config.total_steps) - model.num_timesteps
            try:
                if remaining > 0:
                    model.learn(remaining, callback=watch, reset_num_timesteps=False)
                if watch.stop:
                    # a callback can only stop in a step; that one was not learnt from
                    model.num_timesteps = watch.history[-1].step
            finally:
                if checkpoint is not None:
                    write_whole(checkpoint, _saver(model))
        finally:
            vector.close()
    return SB3Result(model, checkpoint, watch.history)


def _new(config: SB3Config, env: VecEnv) -> PPO:
    model = PPO(
        "MlpPolicy",
        env,
        learning_rate=config.learning_rate,
        n_steps=config.num_steps,
        batch_size=max(2, config.num_envs * config.num_steps // config.minibatches),
        n_epochs=config.epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        seed=config.seed,
        device="cpu",
        policy_kwargs={"net_arch": [config.hidden] * 2, "log_std_init": config.log_std},
    )
    model.lbgym_seconds = 0.0  # type: ignore[attr-defined]
    return model


def _saver(model: BaseAlgorithm) -> Callable[[BinaryIO], None]:
    def save(stream: BinaryIO) -> None:
        assert isinstance(stream, io.BufferedIOBase)
        model.save(stream)

    return save


def _load(path: str | os.PathLike[str], env: VecEnv) -> PPO:
    try:
        return PPO.load(Path(path), env=env, device="cpu")
    except ValueError as error:
        saved = PPO.load(Path(path), device="cpu")
        raise CheckpointError(
            f"model {os.fspath(path)} takes observations {saved.observation_space} and gives actions "
            f"{saved.action_space}, but the environment to train on has {env.observation_space} and {env.action_space}"
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"model {os.fspath(path)} does not exist") from error


def config_of(path: str | os.PathLike[str]) -> SB3Config:
    """The configuration that a saved model was trained with.

    Raises:
        CheckpointError: if the file is no model saved here, or its configuration had a part with no plain form.
    """
    try:
        data, _, _ = load_from_zip_file(Path(path), device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"model {os.fspath(path)} does not exist") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{os.fspath(path)} is not a model that can be read: {error}") from error
    plain = dict(data or {}).get("lbgym_config")
    if plain is None:
        raise CheckpointError(f"{os.fspath(path)} is a Stable-Baselines3 model, but was not trained by lbgym")
    for name in ("scenario", "reward_type"):
        if plain[name] is None:
            raise CheckpointError(
                f"model {os.fspath(path)} was trained with a {name} that is a Python object: resume it from Python "
                f"with a config that has it"
            )
    return SB3Config(**plain)
