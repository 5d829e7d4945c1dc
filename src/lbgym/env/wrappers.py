"""Wrappers that Gymnasium does not have.

What it does have works on the environments of lbgym as it is: ``RescaleAction``, ``FlattenObservation``,
``FrameStackObservation``, ``NormalizeReward``, ``RecordVideo`` and the rest of ``gymnasium.wrappers``.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from ..checks import number, whole
from ..errors import InvalidActionError, InvalidOptionError, ResetNeeded, UnsupportedSpaceError
from ..features.columns import GROUND_TRUTH_NAMES
from .options import checked_seed

__all__ = [
    "DelayedAction",
    "LegacyGymWrapper",
    "MultiDiscreteToDiscrete",
    "SmoothWeights",
    "StripGroundTruth",
]


class MultiDiscreteToDiscrete(gymnasium.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """One ``Discrete`` action for every combination of a ``MultiDiscrete`` space, as DQN and its kin need.

    The last component varies fastest: action 1 of ``MultiDiscrete([3, 3])`` is ``(0, 1)``.

    Args:
        env: an environment with a one-dimensional ``MultiDiscrete`` action space.
        max_actions: the largest number of combinations to accept.

    Raises:
        UnsupportedSpaceError: for another action space, or one with more than ``max_actions`` combinations.
        InvalidOptionError: for a ``max_actions`` that is no whole number of at least 1.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], max_actions: int = 4096) -> None:
        RecordConstructorArgs.__init__(self, max_actions=max_actions)
        gymnasium.ActionWrapper.__init__(self, env)
        inner = env.action_space
        if not isinstance(inner, spaces.MultiDiscrete) or len(inner.shape) != 1:
            raise UnsupportedSpaceError(
                f"MultiDiscreteToDiscrete needs a one-dimensional MultiDiscrete action space, got {inner}"
            )
        max_actions = whole("MultiDiscreteToDiscrete: max_actions", max_actions)
        count = math.prod(int(n) for n in inner.nvec)
        if count > max_actions:
            raise UnsupportedSpaceError(
                f"{inner} has {count:,} combinations; MultiDiscreteToDiscrete allows max_actions={max_actions:,}"
            )
        self._nvec = tuple(int(n) for n in inner.nvec)
        self._start = inner.start
        self._dtype = inner.dtype
        self.action_space = spaces.Discrete(count)

    def action(self, action: Any) -> NDArray[np.integer[Any]]:
        """The components of a ``Discrete`` action.

        Raises:
            InvalidActionError: for an action out of range or not a whole number.
        """
        assert isinstance(self.action_space, spaces.Discrete)
        index = np.asarray(action)
        if index.shape not in ((), (1,)) or not np.issubdtype(index.dtype, np.integer):
            raise InvalidActionError(f"action must be a whole number in 0..{self.action_space.n - 1}, got {action!r}")
        number = int(index.reshape(()))
        if not 0 <= number < self.action_space.n:
            raise InvalidActionError(f"action must be in 0..{self.action_space.n - 1}, got {number}")
        return (np.array(np.unravel_index(number, self._nvec)) + self._start).astype(self._dtype)

    def reverse_action(self, action: Any) -> int:
        """The ``Discrete`` action of the given components."""
        return int(np.ravel_multi_index(tuple(np.asarray(action) - self._start), self._nvec))


class SmoothWeights(gymnasium.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """Exponential smoothing of a continuous action: each step moves only part of the way to the requested weights.

    ``applied = previous + rate * (action - previous)``. Under ``action_type="continuous"`` that is a moving average of
    the weights; under ``"normalized"``, of their logarithms. The first action of an episode is applied as it is.
    Actions are clipped to the bounds of the space first, so that one far outside does not last for many steps.

    Args:
        env: an environment with a ``Box`` action space.
        rate: part of the way, above 0 and at most 1; 1 changes nothing.

    Raises:
        UnsupportedSpaceError: for another action space.
        InvalidOptionError: for another ``rate``.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], rate: float = 0.2) -> None:
        RecordConstructorArgs.__init__(self, rate=rate)
        gymnasium.ActionWrapper.__init__(self, env)
        if not isinstance(env.action_space, spaces.Box):
            raise UnsupportedSpaceError(f"SmoothWeights needs a Box action space, got {env.action_space}")
        self._rate = number("SmoothWeights: rate", rate, above=0.0, high=1.0)
        self._previous: NDArray[np.float64] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        self._previous = None
        return result

    def action(self, action: Any) -> NDArray[Any]:
        """The smoothed action.

        Raises:
            InvalidActionError: for an action of the wrong shape or type, or that is not finite.
        """
        space = self.action_space
        assert isinstance(space, spaces.Box)
        wanted = np.clip(_finite(action, space.shape), space.low, space.high)
        if self._previous is not None:
            wanted = self._previous + self._rate * (wanted - self._previous)
        self._previous = wanted
        # Rounding to the dtype of the space may step over a bound.
        applied: NDArray[Any] = np.clip(wanted.astype(space.dtype), space.low, space.high)
        return applied


def _finite(action: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        given = np.asarray(action)
    except (TypeError, ValueError):
        given = np.asarray(None)
    if given.dtype.kind not in "fiu":
        raise InvalidActionError(f"action must be numbers of shape {shape}, got {action!r}")
    values = given.astype(np.float64)
    if values.shape != shape:
        raise InvalidActionError(f"action must have shape {shape}, got {values.shape}")
    if not np.isfinite(values).all():
        raise InvalidActionError(f"action must be finite, got {values}")
    return values


class DelayedAction(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Actions take effect some steps late, as on a real data plane.

    An action of step t is applied at step t + d. With a range, d is drawn for every action, uniformly; of the actions
    that have arrived the one issued last holds, so that one overtaken on its way is never applied. Until the first
    arrives, ``initial_action`` holds. ``info["action_delay"]`` is the age, in steps, of the action applied, -1 for
    the initial one.

    The observation does not show the actions under way; with ``FrameStackObservation`` an agent can infer them.

    Args:
        env: any environment.
        delay: steps, or ``(low, high)``, both included.
        initial_action: None: equal weights, that is the first choice of a discrete space and, in a ``Box``, all 0 or
            the nearest that is allowed to 1.

    Raises:
        InvalidOptionError: for a delay that is negative or an empty range.
        UnsupportedSpaceError: for an action space that has no equal weights, without an ``initial_action``.
        InvalidActionError: for an ``initial_action`` outside the action space.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], delay: int | tuple[int, int] = 1, initial_action: Any = None
    ) -> None:
        RecordConstructorArgs.__init__(self, delay=delay, initial_action=initial_action)
        gymnasium.Wrapper.__init__(self, env)
        bounds = tuple(delay) if isinstance(delay, (tuple, list)) else (delay, delay)
        if len(bounds) != 2:
            raise InvalidOptionError(f"DelayedAction: delay must be a number of steps or (low, high), got {delay!r}")
        self._low, self._high = (whole("DelayedAction: delay", steps, low=0) for steps in bounds)
        if self._low > self._high:
            raise InvalidOptionError(f"DelayedAction: delay must have low at most high, got {delay!r}")
        if initial_action is None:
            initial_action = _equal_weights(env.action_space)
        elif not _is_in(initial_action, env.action_space):
            raise InvalidActionError(f"initial_action {initial_action!r} is not in {env.action_space}")
        self._initial = initial_action
        self._generator = np.random.default_rng()
        self._step = -1
        self._under_way: deque[tuple[int, int, Any]] = deque()
        self._applied: tuple[int, Any] = (-1, initial_action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed = checked_seed(seed)
        # Before anything is forgotten: a reset that is refused leaves the episode as it was.
        result = super().reset(seed=seed, options=options)
        if seed is not None:
            # Not the environment's generator: a delay must not change the flows of later episodes.
            self._generator = np.random.default_rng([seed, 0x64656C61])
        self._step = 0
        self._under_way.clear()
        self._applied = (-1, self._initial)
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Enqueue ``action`` and step with the newest action that has arrived.

        Raises:
            ResetNeeded: before the first reset.
            InvalidActionError: for an action outside the action space, now and not when it would arrive.
        """
        if self._step < 0:
            raise ResetNeeded("DelayedAction: step before reset; call reset first")
        self._check(action)
        delay = self._low if self._low == self._high else int(self._generator.integers(self._low, self._high + 1))
        self._under_way.append((self._step, self._step + delay, copy.copy(action)))
        arrived = [entry for entry in self._under_way if entry[1] <= self._step]
        if arrived:
            issued, _, newest = arrived[-1]
            self._applied = (issued, newest)
            self._under_way = deque(entry for entry in self._under_way if entry[0] > issued)
        issued, applied = self._applied
        observation, reward, terminated, truncated, info = self.env.step(applied)
        info["action_delay"] = self._step - issued if issued >= 0 else -1
        self._step += 1
        return observation, reward, terminated, truncated, info

    def _check(self, action: Any) -> None:
        space = self.action_space
        if isinstance(space, spaces.Box):
            _finite(action, space.shape)  # beyond the bounds is the environment's to clip
        elif not _is_in(action, space):
            raise InvalidActionError(f"action must be in {space}, got {action!r}")


def _is_in(action: Any, space: spaces.Space[Any]) -> bool:
    """Whether an action is one of a space, by the rules of the environments for whole numbers."""
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return action in space
    try:
        given = np.asarray(action)
    except ValueError:
        return False  # ragged
    # Gymnasium takes booleans for whole numbers.
    return given.dtype.kind in "iu" and given in space


def _equal_weights(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.MultiDiscrete):
        return np.array(space.start, dtype=space.dtype)
    if isinstance(space, spaces.Discrete):
        return int(space.start)
    if isinstance(space, spaces.Box):
        zeros = np.zeros(space.shape, dtype=space.dtype)
        return zeros if zeros in space else np.clip(zeros + 1, space.low, space.high)
    raise UnsupportedSpaceError(f"DelayedAction needs an initial_action for the action space {space}")


class StripGroundTruth(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Removes the ground-truth columns from the observation, in each of its layouts.

    A policy behind it sees what a balancer sees, while ``info["ground_truth"]``, float[N, 3] in the scale of the
    observation, keeps what a critic or an oracle may use.

    Args:
        env: an lbgym environment with ``use_ground_truth=True``, or a wrapper that leaves its observations alone.

    Raises:
        UnsupportedSpaceError: for an environment without ground-truth columns, or a space of another form.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        try:
            layout = env.get_wrapper_attr("observation_layout")
            columns = tuple(env.get_wrapper_attr("feature_columns"))
        except AttributeError:
            raise UnsupportedSpaceError(f"StripGroundTruth needs an lbgym environment, got {env}") from None
        truth = [c for c, name in enumerate(columns) if name in GROUND_TRUTH_NAMES]
        if not truth:
            raise UnsupportedSpaceError(
                "StripGroundTruth needs an environment with ground-truth columns: construct it with "
                f"use_ground_truth=True; it has {', '.join(columns)}"
            )
        self._num_servers, self._width = layout.num_servers, len(columns)
        self._keep = np.array([c for c in range(self._width) if c not in truth])
        self._truth = np.array(truth)
        space = env.observation_space
        # Not by the shape: a wrapper may put the same numbers elsewhere.
        if space != layout.space:
            raise UnsupportedSpaceError(
                f"StripGroundTruth needs the {layout.observation} observation of lbgym with {self._width} columns, "
                f"got {space}; apply it before wrappers that change the observation"
            )
        #: Names of the columns that are left.
        self.feature_columns: tuple[str, ...] = tuple(columns[c] for c in self._keep)
        if isinstance(space, spaces.Dict):
            self.observation_space = spaces.Dict(
                {name: self._box(sub) if name == "features" else sub for name, sub in space.spaces.items()}
            )
        else:
            self.observation_space = self._box(space)

    def _box(self, space: spaces.Space[Any]) -> spaces.Box:
        assert isinstance(space, spaces.Box)
        return spaces.Box(self._strip(space.low), self._strip(space.high), dtype=space.dtype.type)

    def _split(self, array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The active bitmap of a flat layout, empty otherwise, and the features float[N, columns]."""
        if array.ndim == 2:
            return array[:0, 0], array
        return array[: self._num_servers], array[self._num_servers :].reshape(self._num_servers, self._width)

    def _strip(self, array: NDArray[Any]) -> NDArray[Any]:
        bitmap, features = self._split(array)
        kept = features[:, self._keep]
        return kept if array.ndim == 2 else np.concatenate([bitmap, kept.ravel()])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observation(observation), self._with_truth(observation, info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.observation(observation), reward, terminated, truncated, self._with_truth(observation, info)

    def observation(self, observation: Any) -> Any:
        """The observation without its ground-truth columns."""
        if isinstance(observation, dict):
            return {**observation, "features": self._strip(observation["features"])}
        return self._strip(observation)

    def _with_truth(self, observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        array = observation["features"] if isinstance(observation, dict) else observation
        info["ground_truth"] = self._split(array)[1][:, self._truth]
        return info


class LegacyGymWrapper:
    """The interface of Gym before 0.26, for code written against it.

    ``reset()`` returns the observation alone; ``step`` returns ``(observation, reward, done, info)`` with ``done`` at
    either end and, when it is the time limit's doing, ``info["TimeLimit.truncated"]``; ``seed(n)`` seeds the next
    ``reset``. It is deliberately no ``gymnasium.Env``, whose users would misread its results.

    Args:
        env: any Gymnasium environment.
    """

    reward_range = (-math.inf, math.inf)

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env = env
        self._seed: int | None = None

    def __getattr__(self, name: str) -> Any:
        # Only for names that are not found here: spaces, metadata, spec, render_mode and the environment's own.
        if name.startswith("_") or name == "env":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.env.get_wrapper_attr(name)

    @property
    def unwrapped(self) -> gymnasium.Env[Any, Any]:
        """The environment below every wrapper."""
        return self.env.unwrapped

    def seed(self, seed: int | None = None) -> list[int]:
        """Seed the next ``reset``; returns the seeds used.

        Raises:
            InvalidOptionError: unless ``seed`` is None or a whole number of at least 0.
        """
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._seed = whole("seed", seed, low=0)
        return [self._seed]

    def reset(self, **kwargs: Any) -> Any:
        """Begin an episode; returns the first observation. Keywords go to the environment."""
        seed, self._seed = self._seed, None
        if seed is not None:
            kwargs.setdefault("seed", seed)
        if kwargs.pop("return_info", False):
            return self.env.reset(**kwargs)
        return self.env.reset(**kwargs)[0]

    def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """One step; returns ``(observation, reward, done, info)``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        done = bool(terminated or truncated)
        if done:
            info["TimeLimit.truncated"] = bool(truncated and not terminated)
        return observation, float(reward), done, info

    def render(self, mode: str | None = None) -> Any:
        """Render in ``mode``, or in the mode that the environment was made with.

        Args:
            mode: any render mode of an lbgym environment; for others, the mode they were made with.

        Raises:
            UnknownNameError: if an lbgym environment has no such mode.
            ValueError: for another environment in another mode: Gymnasium fixes it at construction.
        """
        if mode is None or mode == self.env.render_mode:
            return self.env.render()
        draw = getattr(self.env.unwrapped, "render_as", None)
        if draw is None:
            raise ValueError(
                f"render(mode={mode!r}): the environment was made with render_mode={self.env.render_mode!r}; "
                "the mode is fixed at construction"
            )
        return draw(mode)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def __enter__(self) -> LegacyGymWrapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return f"<{type(self).__name__}{self.env}>"

    __repr__ = __str__
