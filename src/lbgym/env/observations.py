"""From snapshots to observations: layouts and normalisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ..checks import boolean, choice, items
from ..errors import InvalidOptionError
from ..features.columns import FEATURE_ALIASES, FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..scenarios import Configured

LAYOUTS = ("matrix", "flat", "dict")

#: The column that ``observe_weights`` adds.
WEIGHT_NAME = "weight"
#: The column that ``observe_background`` adds.
BACKGROUND_NAME = "background"
#: The columns that ``observe_configured`` adds.
CONFIGURED_NAMES = ("configured_weight", "cores", "balancers")
#: Smaller weights count as this one in the columns of weights.
LEAST_WEIGHT = 1e-6

#: A count c is mapped to log(1 + c) / log(1 + MAX_COUNT), a time t to log(1 + t / TIME_UNIT) / log(1 + MAX_TIME /
#: TIME_UNIT), both at most 1; CPU and memory use are fractions already.
MAX_COUNT = 10_000.0
TIME_UNIT = 1e-3
MAX_TIME = 100.0

COUNT_GAIN = 1.0 / math.log1p(MAX_COUNT)
TIME_GAIN = 1.0 / math.log1p(MAX_TIME / TIME_UNIT)
_FRACTIONS = {"cpu_usage", "memory_usage"}
_COUNTS = {"n_flow_on", "busy_workers"}


def _scales(columns: tuple[str, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per column, the factors before and after the logarithm."""
    units = [1.0 if name in _COUNTS else 1.0 / TIME_UNIT for name in columns]
    gains = [COUNT_GAIN if name in _COUNTS else TIME_GAIN for name in columns]
    return np.array(units, np.float32), np.array(gains, np.float32)


def log_scale(
    values: NDArray[np.float32], units: NDArray[np.float32] | np.float32, gains: NDArray[np.float32] | np.float32
) -> None:
    """Map ``values`` float32[..., C] in place to [0, 1]: min(1, ``gains`` log(1 + ``units`` values)), per column."""
    # log(1 + x), since NumPy has a vectorised float32 log and no log1p.
    values *= units
    values += np.float32(1.0)
    np.log(values, out=values)
    values *= gains
    np.minimum(values, np.float32(1.0), out=values)


def relative_weights(weights: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Logarithms of weights [..., N] relative to the active servers' geometric mean, float32[..., N]; 0 if inactive.

    Dispatch rules know no other scale of weights. Weights below ``LEAST_WEIGHT`` count as that.
    """
    # C order, so that a server's neighbours are summed in the same order in a batch and alone.
    given = np.where(active, np.asarray(weights, np.float64), 1.0).copy(order="C")
    logarithms = np.log(np.maximum(given, LEAST_WEIGHT))
    mean = logarithms.sum(-1, keepdims=True) / np.maximum(active.sum(-1, keepdims=True), 1)
    return np.where(active, logarithms - mean, 0.0).astype(np.float32)


def features_named(names: Sequence[str]) -> frozenset[str]:
    """Features by their names or aliases, for a key ``features``.

    Raises:
        InvalidOptionError: unless it is a list of at least one name.
        UnknownNameError: for a name that no feature has.
    """
    chosen = items("features", names, "names of features")
    if not chosen:
        raise InvalidOptionError(f"features must name at least one of {', '.join(FEATURE_NAMES)}, got none")
    return frozenset(
        FEATURE_ALIASES[name]
        if isinstance(name, str) and name in FEATURE_ALIASES
        else choice("feature", name, FEATURE_NAMES)
        for name in chosen
    )


class ObservationLayout:
    """Lays out the features of N servers for an agent; the same for one snapshot and for a batch.

    C columns: the 11 features, with ``use_ground_truth`` CPU use, memory use and busy workers, and with
    ``observe_weights`` the weight in force: its logarithm relative to the active servers' geometric mean
    (:func:`relative_weights`), without which a policy could not tell a slow server from one given too much. It has
    either sign and no bounds. ``observe_background`` adds the background load in force as log(1 + flows), and
    ``observe_configured`` what the operator knows: the configured weight, on the scale of the weight in force, and the
    logarithms of the server's cores and of the number of balancers. ``normalize`` leaves all of these as they are.

    * "matrix": float32[..., N, C];
    * "flat": float32[..., N + N * C], 0/1 per server, whether it is active, then the matrix row by row;
    * "dict": ``features`` float32[..., N, C] and ``mask`` int8[..., N].

    Values are flows and seconds, or with ``normalize`` in [0, 1] on a logarithmic scale that depends on nothing but the
    column (``MAX_COUNT``, ``TIME_UNIT``, ``MAX_TIME``). Rows of inactive servers are zero.

    ``features`` are those of the 11 that are shown; the columns of the others stay, so that networks fit every data
    plane, and are 0 whatever happens.

    Attributes:
        features: those shown, in the order of the columns.
        absent: the others.
        configured: for ``observe_configured``, with axes that broadcast to a snapshot's; None: weights and cores of 1,
            one balancer. Whoever encodes keeps it up to date.

    Raises:
        UnknownNameError: for another layout.
        InvalidOptionError: for an option that is neither true nor false.
    """

    def __init__(
        self,
        num_servers: int,
        observation: str = "matrix",
        *,
        normalize: bool = False,
        use_ground_truth: bool = False,
        observe_weights: bool = False,
        observe_background: bool = False,
        observe_configured: bool = False,
        features: Sequence[str] | None = None,
    ) -> None:
        choice("observation layout", observation, LAYOUTS)
        wanted = FEATURE_NAMES if features is None else features_named(features)
        self.features = tuple(name for name in FEATURE_NAMES if name in wanted)
        self.absent = tuple(name for name in FEATURE_NAMES if name not in wanted)
        self._absent = [FEATURE_NAMES.index(name) for name in self.absent]
        self.num_servers = num_servers
        self.observation = observation
        self.normalize = boolean("normalize", normalize)
        self.use_ground_truth = boolean("use_ground_truth", use_ground_truth)
        self.observe_weights = boolean("observe_weights", observe_weights)
        self.observe_background = boolean("observe_background", observe_background)
        self.observe_configured = boolean("observe_configured", observe_configured)
        self.configured: Configured | None = None
        scaled = FEATURE_NAMES + (GROUND_TRUTH_NAMES if self.use_ground_truth else ())
        #: Names of the C columns.
        self.columns: tuple[str, ...] = (
            *scaled,
            *((WEIGHT_NAME,) if self.observe_weights else ()),
            *((BACKGROUND_NAME,) if self.observe_background else ()),
            *(CONFIGURED_NAMES if self.observe_configured else ()),
        )
        self._scaled = len(scaled)
        self._units, self._gains = _scales(scaled)
        self._fractions = [i for i, name in enumerate(scaled) if name in _FRACTIONS]

    def without(self, absent: Collection[str]) -> ObservationLayout:
        """The same layout with some features 0 throughout, in the place of what a data plane does not measure."""
        made = copy.copy(self)
        made.features = tuple(name for name in self.features if name not in absent)
        made.absent = tuple(name for name in FEATURE_NAMES if name not in made.features)
        made._absent = [FEATURE_NAMES.index(name) for name in made.absent]
        return made

    @property
    def space(self) -> spaces.Space[Any]:
        """The observation space of one environment."""
        n, c = self.num_servers, len(self.columns)
        high = 1.0 if self.normalize else np.inf
        matrix = spaces.Box(0.0, high, (n, c), np.float32)
        if not self.normalize or self._scaled < c:
            matrix.high[:, self._fractions] = 1.0
            matrix.low[:, self._scaled :], matrix.high[:, self._scaled :] = -np.inf, np.inf
            # A Box compares and prints by these, too.
            matrix = spaces.Box(matrix.low, matrix.high, dtype=np.float32)
        if self.observation == "matrix":
            return matrix
        if self.observation == "dict":
            return spaces.Dict({"features": matrix, "mask": spaces.MultiBinary(n)})
        low_row = np.concatenate([np.zeros(n, np.float32), matrix.low.ravel()])
        high_row = np.concatenate([np.ones(n, np.float32), matrix.high.ravel()])
        return spaces.Box(low_row, high_row, dtype=np.float32)

    def encode(
        self,
        stats: NDArray[np.float32],
        ground_truth: NDArray[np.float32] | None,
        active: NDArray[np.bool_],
        weights: NDArray[np.float64] | None = None,
        background: NDArray[np.float64] | None = None,
    ) -> Any:
        """Lay out a snapshot, in fresh arrays.

        Args:
            stats: float32[..., N, 11].
            ground_truth: float32[..., N, 3]; None: unknown.
            active: bool[..., N].
            weights: float64[..., N], in force; for ``observe_weights`` only.
            background: float64[..., N], background loads in force, for ``observe_background``; None: 0.

        Raises:
            InvalidOptionError: if ground truth or the weights are to be shown and not given.
        """
        if self.use_ground_truth:
            if ground_truth is None:
                raise InvalidOptionError(
                    "use_ground_truth=True, but this data plane knows nothing of its servers' CPU, memory or workers"
                )
            features = np.concatenate([stats, ground_truth], axis=-1)
        else:
            features = stats.copy()
        if self._absent:
            features[..., self._absent] = 0.0
        if self.normalize:
            self._normalize(features)
        if self.observe_weights:
            if weights is None:
                raise InvalidOptionError("observe_weights=True, but no weights in force are given")
            features = np.concatenate([features, relative_weights(weights, active)[..., None]], axis=-1)
        if self.observe_background:
            loads = np.zeros(active.shape) if background is None else np.where(active, np.log1p(background), 0.0)
            features = np.concatenate([features, loads[..., None]], axis=-1, dtype=np.float32)
        if self.observe_configured:
            features = np.concatenate([features, self._configured_columns(active)], axis=-1)
        if self.observation == "matrix":
            return features
        if self.observation == "dict":
            return {"features": features, "mask": active.astype(np.int8)}
        rows = features.reshape(*features.shape[:-2], -1)
        return np.concatenate([active, rows], axis=-1, dtype=np.float32)

    def _configured_columns(self, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        known = Configured.of(None, self.num_servers) if self.configured is None else self.configured
        columns = np.zeros((*active.shape, len(CONFIGURED_NAMES)), np.float32)
        columns[..., 0] = relative_weights(np.broadcast_to(known.weights, active.shape), active)
        columns[..., 1] = np.where(active, np.log(known.cores), 0.0)
        columns[..., 2] = np.where(active, np.log(known.balancers)[..., None], 0.0)
        return columns

    def _normalize(self, features: NDArray[np.float32]) -> None:
        fractions = features[..., self._fractions] if self._fractions else None
        log_scale(features, self._units, self._gains)
        if fractions is not None:
            features[..., self._fractions] = fractions

    def decode(self, observation: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Features float32[..., N, 11 or 14] in flows and seconds, and active bool[..., N], back from an observation.

        The columns of weights, background loads and what is configured are left out. The matrix layout has no mask:
        there a server counts as inactive when its row is all zero and another's is not, whatever its weight.
        """
        n, c = self.num_servers, len(self.columns)
        if self.observation == "dict":
            features, active = observation["features"], np.asarray(observation["mask"]) > 0
        elif self.observation == "flat":
            observation = np.asarray(observation)
            active = observation[..., :n] > 0
            features = observation[..., n:].reshape(*observation.shape[:-1], n, c)
        else:
            features = np.asarray(observation)
            seen = features[..., : self._scaled].any(axis=-1)
            active = np.logical_or(seen, ~seen.any(axis=-1, keepdims=True))
        features = np.array(features[..., : self._scaled], np.float32)
        if self.normalize:
            fractions = features[..., self._fractions]
            features = np.expm1(features / self._gains) / self._units
            features[..., self._fractions] = fractions
        return features, active


__all__ = ["LAYOUTS", "MAX_COUNT", "MAX_TIME", "TIME_UNIT", "ObservationLayout", "relative_weights"]
