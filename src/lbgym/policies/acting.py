"""The networks of :mod:`lbgym.policies.networks` as they act: forward passes in NumPy, so that acting needs no torch.

They agree with torch's to float32 rounding. Parameters have the names of the torch modules' ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .estimator import IndexEstimator
from .inputs import server_inputs

Array = NDArray[Any]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0, out=x),
    "tanh": lambda x: np.tanh(x, out=x),
    "linear": lambda x: x,
}


class _Dense:
    """A linear layer."""

    def __init__(self, parameters: Mapping[str, Array], name: str) -> None:
        self._weight = np.ascontiguousarray(parameters[f"{name}.weight"].T)
        self._bias = parameters[f"{name}.bias"]

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self._weight
        y += self._bias
        return y


class MLP:
    """Dense layers, from [..., sizes[0]] to [..., sizes[-1]]."""

    def __init__(self, parameters: Mapping[str, Array], sizes: list[int], activation: str = "tanh") -> None:
        # Every other module of the torch sequence is an activation.
        self._layers = [_Dense(parameters, str(2 * i)) for i in range(len(sizes) - 1)]
        self._activation = _ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        for layer in self._layers[:-1]:
            x = self._activation(layer(x))
        return self._layers[-1](x)


class _Equivariant:
    """Encoder and head of every server, and the context of all of them."""

    def __init__(self, parameters: Mapping[str, Array], prefix: str = "") -> None:
        self._encoder, self._others, self._own, self._context, self._head = (
            _Dense(parameters, f"{prefix}{name}") for name in ("encoder", "others", "own", "context", "head")
        )

    def encode(self, features: Array, active: Array) -> Array:
        """Features [..., N, F], active [..., N] -> [..., N, H], not negative, 0 where inactive."""
        features = _masked(features, active)
        h = self._encoder(features)
        h += self._others(_mean(features, active))[..., None, :]
        return _masked(np.maximum(h, 0.0, out=h), active)

    def decode(self, h: Array, active: Array) -> Array:
        """Outputs [..., N, O] of encoded servers [..., N, H]."""
        pooled = np.concatenate([_mean(h, active), h.max(-2)], -1)
        own = self._own(h)
        own += self._context(pooled)[..., None, :]
        return self._head(np.maximum(own, 0.0, out=own))


class FlatServerNetwork:
    """From flat observations [..., N (1 + F)]; see the torch module for arguments and outputs."""

    def __init__(
        self,
        parameters: Mapping[str, Array],
        features: int,
        hidden: int,
        outputs: int = 1,
        *,
        joint: bool = False,
        centered: bool = False,
    ) -> None:
        del hidden, outputs
        self._features, self._joint, self._centered = features, joint, centered
        self._network = _Equivariant(parameters)

    def __call__(self, flat: Array) -> Array:
        inputs, active = server_inputs(flat, self._features)
        out = self._network.decode(self._network.encode(inputs, active), active) * active[..., None]
        if self._centered:
            first = out[..., :1]
            first -= _mean(first, active)[..., None, :]
            first *= active[..., None]
        if not self._joint:
            return out.reshape(*out.shape[:-2], -1)
        total = out[..., 0, :]
        for i in range(1, out.shape[-2]):
            total = (total[..., :, None] + out[..., i, None, :]).reshape(*total.shape[:-1], -1)
        return total


class ServerNetwork:
    """The actor of PPO; its inputs are those of :class:`lbgym.policies.inputs.Encoder`."""

    def __init__(
        self, parameters: Mapping[str, Array], features: int, hidden: int, choices: int, numbers: int = 1
    ) -> None:
        del features, hidden
        self._single = not choices and numbers == 1
        self._moments = _Moments(parameters)
        self._network = _Equivariant(parameters)
        self.std = float(np.exp(parameters["log_std"]))

    def __call__(self, inputs: Array, active: Array) -> Array:
        """Inputs [B, N, F], active [B, N] -> logits [B, N, K], or means [B, N] or [B, N, D]."""
        h = self._network.encode(self._moments.scale(inputs, active), active)
        out = self._network.decode(h, active)
        return out[..., 0] if self._single else out


class RecurrentActor:
    """The actor of SAC-GRU."""

    def __init__(self, parameters: Mapping[str, Array], features: int, hidden: int, choices: int) -> None:
        del features, choices
        self._hidden = hidden
        self._moments = _Moments(parameters)
        self._network = _Equivariant(parameters, "actor.")
        self._input, self._recurrent = (
            _Dense({"gru.weight": parameters[f"actor.gru.weight_{kind}_l0"],
                    "gru.bias": parameters[f"actor.gru.bias_{kind}_l0"]}, "gru")
            for kind in ("ih", "hh")
        )  # fmt: skip

    def __call__(self, inputs: Array, active: Array, state: Array | None) -> tuple[Array, Array]:
        """Logits [B, N, K] for inputs [B, N, F], and the next state [B, N, H]; ``state`` None: the first step."""
        x = self._network.encode(self._moments.scale(inputs, active), active)
        if state is None:
            state = np.zeros_like(x)
        # Reset, update and new gate, in torch's order.
        given, kept = self._input(x), self._recurrent(state)
        h = self._hidden
        reset, update = (_sigmoid(given[..., at] + kept[..., at]) for at in (slice(0, h), slice(h, 2 * h)))
        new = np.tanh(given[..., 2 * h :] + reset * kept[..., 2 * h :])
        state = (1 - update) * new + update * state
        remembered = _masked(np.maximum(state, 0.0), active)
        return self._network.decode(remembered, active), state


class _Moments:
    """The mean and standard deviation of a network's inputs."""

    def __init__(self, parameters: Mapping[str, Array]) -> None:
        self._mean = parameters["moments.mean"]
        self._scale = 1 / np.sqrt(parameters["moments.var"] + np.float32(1e-6))

    def scale(self, inputs: Array, active: Array) -> Array:
        """Inputs [..., N, F], normalised and cut off at 10 standard deviations; 0 where inactive."""
        scaled = inputs - self._mean
        scaled *= self._scale
        np.minimum(np.maximum(scaled, -10, out=scaled), 10, out=scaled)
        scaled *= active[..., None]
        return scaled


def _masked(x: Array, active: Array) -> Array:
    return x if active.all() else x * active[..., None]


def _mean(x: Array, active: Array) -> Array:
    """Mean [..., F] over the active servers of x [..., N, F], which is 0 where inactive."""
    count = np.maximum(active.sum(-1, keepdims=True), 1).astype(np.float32)
    mean: Array = x.sum(-2) / count
    return mean


def _sigmoid(x: Array) -> Array:
    # By the hyperbolic tangent, which does not overflow.
    y: Array = 0.5 * np.tanh(0.5 * x) + 0.5
    return y


#: The acting networks by the name that a checkpoint has for them.
ACTING: dict[str, Callable[..., Any]] = {
    "mlp": MLP,
    "equivariant": FlatServerNetwork,
    "actor-critic": ServerNetwork,
    "recurrent": RecurrentActor,
    "index-estimator": IndexEstimator,
}
