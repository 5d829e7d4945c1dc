"""Trained networks as policies, in NumPy: one class per way of acting, made by :func:`lbgym.policies.load_policy`."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import boolean
from ..env.actions import MAX_BACKGROUND
from ..errors import CheckpointError, PolicyError
from ..features.columns import NUM_FEATURES
from .acting import ACTING
from .action_kind import ActionKind
from .estimator import LARGEST_CHANGE, NEEDED
from .inputs import Encoder, server_inputs, with_weights
from .trained import TrainedPolicy


class NetworkPolicy(TrainedPolicy):
    """A network from a checkpoint.

    Args:
        state: content of a checkpoint; see :func:`lbgym.policies.checkpoints.contents`.
        deterministic: the most likely action instead of a drawn one.
        seed: of drawn actions; None: a fresh one for this policy and each of its copies.
        path: the file it was read from.
        env_kwargs: keys of the environment over those in ``state``.

    Attributes:
        env_kwargs: keys of the environment that its observations and actions belong to.
        config: the configuration it was trained with, as plain data.
        step: environment steps it was trained for.
        algo: the recipe that trained it.
        parameters: of the network, by name, float32.
        features: F, columns per server of its observations.
        kind: the kind of its actions.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
        path: Path | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        keys = {**state["observation"], **state["action"], **state["environment"], **(env_kwargs or {})}
        super().__init__(path, keys)
        shapes, network = state["shapes"], state["network"]
        self.config: dict[str, Any] = dict(state["config"])
        self.step: int = state["step"]
        self.algo: str = state["algo"]
        self.deterministic = boolean("deterministic", deterministic, error=PolicyError)
        self.features: int = shapes["features"]
        # Policies from before observations could show the weights in force are given them beside.
        self._adds_weights: bool = state["inputs"]["weights"]
        self._inputs = self.features + self._adds_weights
        self.kind = ActionKind(shapes["choices"], shapes["joint"], shapes.get("numbers", 1))
        # Dense layers are for the servers they were trained with, all other networks for any number.
        self._num_servers: int | None = shapes["num_servers"] if network["name"] == "mlp" else None
        self.parameters = {name: np.asarray(value) for name, value in network["parameters"].items()}
        arguments = {name: value for name, value in network["arguments"].items() if name not in _FOR_TRAINING}
        self._network: Any = ACTING[network["name"]](self.parameters, **arguments)
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._prepare(state)
        self.reset()

    @property
    def num_servers(self) -> int | None:
        """The only number of servers it can act for; None: any."""
        return self._num_servers

    def copy(self) -> NetworkPolicy:
        """An independent policy with the same network and seed, at the start of an episode."""
        return copy.copy(self)

    def __copy__(self) -> NetworkPolicy:
        twin: NetworkPolicy = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._rng = np.random.default_rng(self._seed)
        twin._separate()
        twin.reset()
        return twin

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: forget the last one; seeded draws start over, from ``seed`` if given."""
        if seed is not None:
            self._seed = seed
        if self._seed is not None:
            self._rng = np.random.default_rng(self._seed)
        self._forget()

    def act(self, observation: Any, info: Mapping[str, Any]) -> Any:
        """The action for a flat observation [N (1 + F)], or one per row of [R, N (1 + F)].

        ``info["weights"]`` are the weights in force, [N] or [R, N].

        Raises:
            CheckpointError: for an observation that is not made of ``1 + F`` numbers per server, or of other servers
                than the only ones it can act for.
        """
        flat, weights = np.asarray(observation), np.asarray(info["weights"])
        single = flat.ndim == 1
        n = weights.shape[-1]
        if self.num_servers not in (None, n):
            raise CheckpointError(f"the policy was trained on {self.num_servers} servers and cannot act for {n}")
        if flat.ndim not in (1, 2) or flat.shape[-1] != n * (1 + self.features):
            raise CheckpointError(
                f"the policy was trained on flat observations of {1 + self.features} numbers per server; for "
                f"{n} servers it takes shape ({n * (1 + self.features)},), got {flat.shape}"
            )
        rows = np.atleast_2d(flat)
        if self._adds_weights:
            rows = with_weights(rows, np.atleast_2d(weights), self.features)
        actions = self.kind.encode(self._choose(rows))
        return actions[0] if single else actions

    @abstractmethod
    def _choose(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Choices [B, N] for flat observations [B, N (1 + inputs)]."""

    def _draw(self, logits: NDArray[Any], active: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Choices [...] of logits [..., K]: the most likely ones, or drawn, where active, by adding Gumbel noise."""
        if not self.deterministic:
            noise = self._rng.gumbel(size=logits.shape)
            logits = logits + (noise if active is None else noise * active[..., None])
        return logits.argmax(-1)

    def _prepare(self, state: Mapping[str, Any]) -> None:
        """Set up what a kind of policy has beside its network."""

    def _separate(self) -> None:
        """Give a copy its own of everything that acting changes in place."""

    def _forget(self) -> None:
        """Forget the episode so far."""


class PPOPolicy(NetworkPolicy):
    """Acts by the actor of PPO, which reads the observation and its moving average; for any number of servers."""

    def _prepare(self, state: Mapping[str, Any]) -> None:
        self.encoder = Encoder(self._inputs, state["inputs"]["memory"])

    def _separate(self) -> None:
        self.encoder = Encoder(self._inputs, self.encoder.memory)

    def _forget(self) -> None:
        self.encoder.reset()

    def _choose(self, flat: NDArray[Any]) -> NDArray[Any]:
        inputs, active = self.encoder(flat)
        out: NDArray[Any] = self._network(inputs, active)
        if self.kind.choices:
            return self._draw(out, active)
        if self.deterministic:
            return out
        where = active if self.kind.numbers == 1 else active[..., None]
        return out + self._network.std * self._rng.standard_normal(out.shape) * where


class SACGRUPolicy(NetworkPolicy):
    """Acts by the recurrent actor of SAC-GRU; for any number of servers."""

    def _forget(self) -> None:
        self._memory: NDArray[np.float32] | None = None

    def _choose(self, flat: NDArray[Any]) -> NDArray[Any]:
        inputs, active = server_inputs(flat, self._inputs)
        if self._memory is not None and self._memory.shape[:2] != active.shape:
            self._memory = None
        logits, self._memory = self._network(inputs, active, self._memory)
        return self._draw(logits, active)


class ExportedPolicy(NetworkPolicy):
    """Acts by a network without memory that another framework trained; the framework is not needed.

    Attributes:
        squash: whether continuous actions are the hyperbolic tangent of the network's outputs.
    """

    def _prepare(self, state: Mapping[str, Any]) -> None:
        self.squash: bool = state["outputs"]["squash"]

    def _choose(self, flat: NDArray[Any]) -> NDArray[Any]:
        out: NDArray[Any] = self._network(np.ascontiguousarray(flat, np.float32))
        if not self.kind.choices:
            out = np.tanh(out) if self.squash else out
            return out if self.kind.numbers == 1 else out.reshape(*out.shape[:-1], -1, self.kind.numbers)
        n = flat.shape[-1] // (1 + self._inputs)
        index = self._draw(out if self.kind.joint else out.reshape(*out.shape[:-1], n, self.kind.choices))
        if not self.kind.joint:
            return index
        # Joint choices are numbered with the last server's varying fastest.
        powers = self.kind.choices ** np.arange(n - 1, -1, -1)
        return index[..., None] // powers % self.kind.choices


class EstimatorPolicy(NetworkPolicy):
    """Acts by estimates of speeds and loads with a learned part; for any number of servers.

    Its weights are estimated capacities, which make sense by themselves.
    """

    weights_alone = True

    @property
    def uses_features(self) -> tuple[str, ...]:
        """The features that it cannot do without: where durations are 0, estimates are made of FCTs alone."""
        return tuple(name for name in super().uses_features if name in NEEDED)

    def _separate(self) -> None:
        self._network = self._network.copy()

    def _forget(self) -> None:
        self._network.reset()

    def _choose(self, flat: NDArray[Any]) -> NDArray[Any]:
        rows, active = server_inputs(flat, self._inputs)
        weights, cores, balancers = (rows[..., NUM_FEATURES + i].astype(np.float64) for i in range(3))
        change, background = self._network(
            rows[..., :NUM_FEATURES], active, weights, cores, balancers.max(-1, keepdims=True)
        )
        loads = 2.0 * np.log1p(background) / math.log1p(MAX_BACKGROUND) - 1.0
        return np.stack([change / LARGEST_CHANGE, loads], axis=-1)


#: Keywords of networks that matter to their training alone.
_FOR_TRAINING = ("log_std", "gain", "value")

#: The policy that acts by each of ``NETWORKS``.
POLICIES: dict[str, type[NetworkPolicy]] = {
    "mlp": ExportedPolicy,
    "equivariant": ExportedPolicy,
    "actor-critic": PPOPolicy,
    "recurrent": SACGRUPolicy,
    "index-estimator": EstimatorPolicy,
}
