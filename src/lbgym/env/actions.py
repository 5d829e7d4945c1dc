"""From an agent's action to weights, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from ..checks import boolean, choice, items, number
from ..errors import InvalidActionError, InvalidOptionError
from ..scenarios import Configured

ACTION_TYPES = ("discrete", "joint", "continuous", "normalized", "index")
MAX_JOINT_ACTIONS = 4096
#: Largest background load of an index action, flows per core.
MAX_BACKGROUND = 8.0


class ActionCodec(ABC):
    """Actions of one type on N servers, for one environment or a batch of them.

    Attributes:
        num_servers: N.
        configured: what relative actions are relative to, [N] or, for a batch, [num_envs, N]; None: weights and cores
            of 1. Whoever acts keeps it up to date.
        needs_configured: whether actions are relative.
        sets_background: whether actions set background loads besides the weights.
    """

    needs_configured = False
    sets_background = False

    def __init__(self, num_servers: int) -> None:
        self.num_servers = num_servers
        self.configured: Configured | None = None

    @property
    @abstractmethod
    def space(self) -> spaces.Space[Any]:
        """The action space of one environment."""

    @abstractmethod
    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        """Weights float64[N] of one action, or float64[num_envs, N] of a batch.

        Raises:
            InvalidActionError: for a wrong shape or type, an index out of range, a value that is not finite.
        """

    def to_background(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64] | None:
        """Background loads in flows, of the same shape as the weights; None: this type of action sets none.

        Raises:
            InvalidActionError: as :meth:`to_weights`.
        """
        return None

    @abstractmethod
    def encode(self, weights: ArrayLike) -> Any:
        """The action whose weights come nearest, in ratio, to ``weights`` float[..., N].

        Weights are relative, so those outside the allowed range are scaled to its middle.
        """

    def _given(self, name: str, num_envs: int | None) -> NDArray[np.float64]:
        """The configured weights or cores, for one environment or for a batch."""
        if self.configured is None:
            return np.ones(self.num_servers)
        values: NDArray[np.float64] = getattr(self.configured, name)
        # The servers of one environment are the same for all its balancers.
        return values[0] if num_envs is None and values.ndim > 1 else values

    def _relative(self, weights: ArrayLike) -> ArrayLike:
        """Weights [N] or [num_envs, N] over the configured ones, if actions are relative to these."""
        if not self.needs_configured:
            return weights
        values = np.asarray(weights, np.float64)
        return values / self._given("weights", None if values.ndim == 1 else len(values))

    def _array(
        self, action: Any, num_envs: int | None, *, per_server: bool, whole: bool, columns: tuple[int, ...] = ()
    ) -> NDArray[Any]:
        shape = (() if num_envs is None else (num_envs,)) + ((self.num_servers,) if per_server else ()) + columns
        try:
            array = np.asarray(action)
        except (ValueError, TypeError) as error:
            raise InvalidActionError(f"an action must be an array of shape {shape}, got {action!r}") from error
        kinds = "iu" if whole else "fiu"
        if array.dtype.kind not in kinds:
            what = "whole numbers" if whole else "numbers"
            raise InvalidActionError(f"an action must hold {what} in shape {shape}, got {action!r}")
        if array.shape != shape:
            raise InvalidActionError(f"an action must have shape {shape}, got shape {array.shape}")
        return array


def _fit(weights: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """Weights scaled, where they lie outside [low, high], so that the middle of their logarithms is that range's."""
    values = np.asarray(weights, np.float64)
    if values.size and low <= values.min() and values.max() <= high:
        return values
    positive = np.where(values > 0.0, values, np.nan)
    largest = np.fmax.reduce(positive, axis=-1, keepdims=True)
    smallest = np.fmin.reduce(positive, axis=-1, keepdims=True)
    scale = np.nan_to_num(math.sqrt(low * high) / np.sqrt(largest) / np.sqrt(smallest), nan=1.0)
    return np.clip(values * scale, low, high)


class DiscreteActions(ActionCodec):
    """``MultiDiscrete([K] * N)``: an index into ``levels`` per server.

    If ``relative``, levels are times the configured weights.
    """

    def __init__(self, num_servers: int, levels: Sequence[float], *, relative: bool = False) -> None:
        super().__init__(num_servers)
        self.levels = np.array(levels, np.float64)
        self._k = len(self.levels)
        self.needs_configured = relative

    @property
    def space(self) -> spaces.Space[Any]:
        return spaces.MultiDiscrete([self._k] * self.num_servers)

    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        array = self._array(action, num_envs, per_server=True, whole=True)
        # Looking the weights up finds the indices that are too large.
        try:
            weights = self.levels[array]
        except IndexError:
            weights = None
        if weights is None or array.min() < 0:
            bad = array[(array < 0) | (array >= self._k)].flat[0]
            raise InvalidActionError(f"an action must hold indices from 0 to {self._k - 1}, got {bad}")
        return weights * self._given("weights", num_envs) if self.needs_configured else weights

    def encode(self, weights: ArrayLike) -> NDArray[np.int64]:
        fitted = _fit(self._relative(weights), self.levels.min(), self.levels.max())
        return np.abs(np.log(fitted)[..., None] - np.log(self.levels)).argmin(axis=-1)


class JointActions(ActionCodec):
    """``Discrete(K ** N)``: one index for all servers; the last server's level varies fastest.

    If ``relative``, levels are times the configured weights.
    """

    def __init__(self, num_servers: int, levels: Sequence[float], *, relative: bool = False) -> None:
        super().__init__(num_servers)
        self._parts = DiscreteActions(num_servers, levels)
        self.levels = self._parts.levels
        self.needs_configured = relative
        k = len(levels)
        # Compared by logarithm: K ** N of a large cluster has thousands of digits.
        if num_servers * math.log(k) > math.log(MAX_JOINT_ACTIONS) + 1e-9:
            raise InvalidOptionError(
                f"action_type 'joint' has {k} ** {num_servers} actions for {k} action_weights and {num_servers} "
                f"servers; allowed: {MAX_JOINT_ACTIONS:,}. Use 'discrete', or fewer action_weights"
            )
        self._n = k**num_servers
        self._shape = (k,) * num_servers

    @property
    def space(self) -> spaces.Space[Any]:
        return spaces.Discrete(self._n)

    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        array = self._array(action, num_envs, per_server=False, whole=True)
        if array.min() < 0 or array.max() >= self._n:
            bad = array[(array < 0) | (array >= self._n)].flat[0]
            raise InvalidActionError(f"an action must be from 0 to {self._n - 1}, got {bad}")
        weights = self.levels[np.stack(np.unravel_index(array, self._shape), axis=-1)]
        return weights * self._given("weights", num_envs) if self.needs_configured else weights

    def encode(self, weights: ArrayLike) -> Any:
        parts = np.moveaxis(self._parts.encode(self._relative(weights)), -1, 0)
        return np.int64(np.ravel_multi_index(tuple(parts), self._shape))


class ContinuousActions(ActionCodec):
    """``Box(min_weight, max_weight, (N,))``: the weights themselves, clipped to these bounds."""

    def __init__(self, num_servers: int, low: float, high: float) -> None:
        super().__init__(num_servers)
        self.low, self.high = low, high

    @property
    def space(self) -> spaces.Space[Any]:
        return spaces.Box(self.low, self.high, (self.num_servers,), np.float32)

    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        return np.minimum(np.maximum(self._finite(action, num_envs), self.low), self.high)

    def encode(self, weights: ArrayLike) -> NDArray[np.float32]:
        return _fit(weights, self.low, self.high).astype(np.float32).clip(np.float32(self.low), np.float32(self.high))

    def _finite(self, action: Any, num_envs: int | None, columns: tuple[int, ...] = ()) -> NDArray[np.float64]:
        array = self._array(action, num_envs, per_server=True, whole=False, columns=columns).astype(np.float64)
        # The sum of finite actions is finite short of 1e308 / N; only then is each looked at.
        if not math.isfinite(array.sum()) and not np.isfinite(array).all():
            bad = array[~np.isfinite(array)].flat[0]
            raise InvalidActionError(f"an action must be finite, got {bad}")
        return array


class NormalizedActions(ContinuousActions):
    """``Box(-1, 1, (N,))``, clipped, then mapped to [min_weight, max_weight] by logarithm.

    -1, 0 and 1 are the least weight, the geometric mean of both and the largest weight; if ``relative``, times the
    configured weights.
    """

    def __init__(self, num_servers: int, low: float, high: float, *, relative: bool = False) -> None:
        super().__init__(num_servers, low, high)
        self._middle = 0.5 * (math.log(low) + math.log(high))
        self._half = 0.5 * (math.log(high) - math.log(low))
        self.needs_configured = relative
        if relative and abs(self._middle) < 1e-12:
            # The bounds are inverses: 0 is exactly the configured weight, so that equal scores stay equal.
            self._middle = 0.0

    @property
    def space(self) -> spaces.Space[Any]:
        return spaces.Box(-1.0, 1.0, (self.num_servers,), np.float32)

    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        weights = self._factors(self._finite(action, num_envs))
        return weights * self._given("weights", num_envs) if self.needs_configured else weights

    def encode(self, weights: ArrayLike) -> NDArray[np.float32]:
        fitted = _fit(self._relative(weights), self.low, self.high)
        scaled = (np.log(fitted) - self._middle) / self._half if self._half > 0.0 else np.zeros_like(fitted)
        return scaled.astype(np.float32).clip(-1.0, 1.0)

    def _factors(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """[-1, 1], clipped, to [min_weight, max_weight]."""
        clipped = np.minimum(np.maximum(array, -1.0), 1.0)
        return np.minimum(np.maximum(np.exp(self._middle + self._half * clipped), self.low), self.high)


class IndexActions(NormalizedActions):
    """``Box(-1, 1, (N, 2))``: per server a weight and a background load, relative to what is configured.

    For rules that count flows (best under ``marginal``). Column 0, clipped, is mapped to [min_weight, max_weight] by
    logarithm and multiplied by the configured weight: with the default range 0 is that weight itself. Column 1 is the
    background load, flows that others are believed to hold at the server: -1 is none, 1 ``MAX_BACKGROUND`` per
    configured core, by log(1 + load) in between, and 0 two per core.
    """

    sets_background = True

    def __init__(self, num_servers: int, low: float, high: float) -> None:
        super().__init__(num_servers, low, high, relative=True)

    @property
    def space(self) -> spaces.Space[Any]:
        return spaces.Box(-1.0, 1.0, (self.num_servers, 2), np.float32)

    def to_weights(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        factors = self._factors(self._finite(action, num_envs, columns=(2,))[..., 0])
        return factors * self._given("weights", num_envs)

    def to_background(self, action: Any, num_envs: int | None = None) -> NDArray[np.float64]:
        array = self._finite(action, num_envs, columns=(2,))[..., 1]
        share = 0.5 * (np.minimum(np.maximum(array, -1.0), 1.0) + 1.0)
        return np.expm1(share * math.log1p(MAX_BACKGROUND)) * self._given("cores", num_envs)

    def encode(self, weights: ArrayLike) -> NDArray[np.float32]:
        """The action of these weights without a background load."""
        return np.stack([speeds := super().encode(weights), np.full_like(speeds, -1.0)], axis=-1)


def make_action_codec(
    num_servers: int,
    action_type: str = "discrete",
    *,
    action_weights: Sequence[float] = (1.0, 1.5, 2.0),
    min_weight: float = 0.1,
    max_weight: float = 10.0,
    relative_to_configured: bool = False,
) -> ActionCodec:
    """The codec of an ``action_type`` (``ACTION_TYPES``).

    Args:
        num_servers: N.
        action_type: by name.
        action_weights: levels of "discrete" and "joint".
        min_weight: lower end of the range of the other types.
        max_weight: upper end of it.
        relative_to_configured: whether the weights of "discrete", "joint" and "normalized" are times the configured
            ones.

    Raises:
        UnknownNameError: for another action type.
        InvalidOptionError: for weights that are not finite and above 0, an empty list of them, bounds out of order, or
            more than 4,096 joint actions, or "continuous" weights, which are weights themselves, relative to the
            configured ones.
    """
    choice("action type", action_type, ACTION_TYPES)
    relative = boolean("relative_to_configured", relative_to_configured)
    if relative and action_type == "continuous":
        raise InvalidOptionError(
            "relative_to_configured=True is for action_type 'normalized', 'discrete' or 'joint' ('index' always is), "
            "got 'continuous'"
        )
    if action_type in ("discrete", "joint"):
        given = items("action_weights", action_weights)
        levels = [number("each of action_weights", weight, above=0.0) for weight in given]
        if not levels:
            raise InvalidOptionError("action_weights must have at least one number, got none")
        return (DiscreteActions if action_type == "discrete" else JointActions)(num_servers, levels, relative=relative)
    low, high = (number(*each, above=0.0) for each in (("min_weight", min_weight), ("max_weight", max_weight)))
    if low > high:
        raise InvalidOptionError(f"min_weight must be at most max_weight {max_weight}, got {min_weight}")
    if action_type == "normalized":
        return NormalizedActions(num_servers, low, high, relative=relative)
    return (ContinuousActions if action_type == "continuous" else IndexActions)(num_servers, low, high)
