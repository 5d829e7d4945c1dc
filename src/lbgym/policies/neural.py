"""Policies in plain torch, one class per way of acting; :func:`lbgym.policies.load_policy` reads them from files."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, MissingExtraError

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "a policy in plain torch") from error

from .action_kind import ActionKind
from .inputs import Encoder, server_inputs, with_weights
from .networks import NETWORKS, draw
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
        network: the torch module.
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
        self.deterministic = deterministic
        self.features: int = shapes["features"]
        # Policies from before observations could show the weights in force are given them beside.
        self._adds_weights: bool = state["inputs"]["weights"]
        self._inputs = self.features + self._adds_weights
        self.kind = ActionKind(shapes["choices"], shapes["joint"])
        # Dense layers are for the servers they were trained with, all other networks for any number.
        self._num_servers: int | None = shapes["num_servers"] if network["name"] == "mlp" else None
        self.network: Any = NETWORKS[network["name"]](**network["arguments"])
        self.network.load_state_dict(network["parameters"])
        self.network.requires_grad_(False)
        self._seed = seed
        self._generator = torch.Generator()
        self._prepare(state)
        self._begin_stream()
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
        twin._generator = torch.Generator()
        twin._separate()
        twin._begin_stream()
        twin.reset()
        return twin

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: forget the last one; seeded draws start over, from ``seed`` if given."""
        if seed is not None:
            self._seed = seed
        if self._seed is not None:
            self._generator.manual_seed(self._seed)
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
        with torch.inference_mode():
            rows = np.atleast_2d(flat)
            if self._adds_weights:
                rows = with_weights(rows, np.atleast_2d(weights), self.features)
            choice = self._choose(rows)
        actions = self.kind.encode(choice.numpy())
        return actions[0] if single else actions

    @abstractmethod
    def _choose(self, flat: NDArray[Any]) -> Tensor:
        """Choices [B, N] for flat observations [B, N (1 + inputs)]."""

    def _prepare(self, state: Mapping[str, Any]) -> None:
        """Set up what a kind of policy has beside its network."""

    def _separate(self) -> None:
        """Give a copy its own of everything that acting changes in place."""

    def _forget(self) -> None:
        """Forget the episode so far."""

    def _begin_stream(self) -> None:
        if self._seed is None and not self.deterministic:
            self._generator.seed()


class PPOPolicy(NetworkPolicy):
    """Acts by the actor of PPO, which reads the observation and its moving average; for any number of servers."""

    def _prepare(self, state: Mapping[str, Any]) -> None:
        self.encoder = Encoder(self._inputs, state["inputs"]["memory"])

    def _separate(self) -> None:
        self.encoder = Encoder(self._inputs, self.encoder.memory)

    def _forget(self) -> None:
        self.encoder.reset()

    def _choose(self, flat: NDArray[Any]) -> Tensor:
        inputs, active = self.encoder(flat)
        out, _ = self.network(self.network.scale(inputs, active), active)
        if self.deterministic:
            return out.argmax(-1) if self.kind.choices else out
        drawn: Tensor = self.network.sample(out, active, self._generator)
        return drawn


class SACGRUPolicy(NetworkPolicy):
    """Acts by the recurrent actor of SAC-GRU; for any number of servers."""

    def _forget(self) -> None:
        self._memory: Tensor | None = None

    def _choose(self, flat: NDArray[Any]) -> Tensor:
        inputs, active = server_inputs(flat, self._inputs)
        if self._memory is not None and self._memory.shape[:2] != active.shape:
            self._memory = None
        logits, self._memory = self.network.logits(inputs, active, self._memory)
        chosen: Tensor = logits.argmax(-1) if self.deterministic else draw(logits, active, self._generator)
        return chosen


class ExportedPolicy(NetworkPolicy):
    """Acts by a network without memory that another framework trained; the framework is not needed.

    Attributes:
        squash: whether continuous actions are the hyperbolic tangent of the network's outputs.
    """

    def _prepare(self, state: Mapping[str, Any]) -> None:
        self.squash: bool = state["outputs"]["squash"]

    def _choose(self, flat: NDArray[Any]) -> Tensor:
        inputs = torch.from_numpy(np.ascontiguousarray(flat, np.float32))
        out: Tensor = self.network(inputs)
        if not self.kind.choices:
            return out.tanh() if self.squash else out
        n = flat.shape[-1] // (1 + self._inputs)
        logits = out if self.kind.joint else out.unflatten(-1, (n, self.kind.choices))
        if self.deterministic:
            index = logits.argmax(-1)
        else:
            rows = logits.reshape(-1, logits.shape[-1]).softmax(-1)
            index = torch.multinomial(rows, 1, generator=self._generator).view(logits.shape[:-1])
        if not self.kind.joint:
            return index
        # Joint choices are numbered with the last server's varying fastest.
        powers = self.kind.choices ** torch.arange(n - 1, -1, -1)
        return index.unsqueeze(-1) // powers % self.kind.choices


#: The policy that acts by each of ``NETWORKS``.
POLICIES: dict[str, type[NetworkPolicy]] = {
    "mlp": ExportedPolicy,
    "equivariant": ExportedPolicy,
    "actor-critic": PPOPolicy,
    "recurrent": SACGRUPolicy,
}
