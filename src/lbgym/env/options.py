"""The keys of an environment, checked: :class:`EnvOptions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from ..checks import boolean, choice, items, seconds, whole
from ..errors import InvalidOptionError
from ..scenarios import DISPATCH_RULES, AnyScenario, load_scenario
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot
from .actions import ActionCodec, make_action_codec
from .observations import ObservationLayout, features_named
from .rendering import RENDER_MODES
from .rewards import make_reward

#: Most steps of an episode: what counts them has 64 bits.
MAX_STEPS = 2**63 - 1


class EnvOptions:
    """The keys that all environments of weights share; their meaning: :class:`~lbgym.LoadBalanceEnv`.

    Attributes:
        num_servers: N; None: as many as the scenario or the data plane has.
        source: the scenario of every episode, or the distribution that each draws its own from; None: the default.
        dispatch: dispatch rule instead of the scenario's; None: the scenario's.
        step_interval: seconds per step.
        max_steps: steps per episode.
        render_mode: one of ``RENDER_MODES``, or None.
        use_ground_truth: whether observations have the ground-truth columns.
        reward: a :class:`~lbgym.env.rewards.Reward`.

    Raises:
        UnknownNameError: for an unknown name of an action type, layout, reward, field, dispatch rule, render mode or
            scenario.
        InvalidOptionError: for a value out of its range.
    """

    def __init__(
        self,
        *,
        num_servers: int | None = None,
        action_type: str = "discrete",
        action_weights: Sequence[float] = (1.0, 1.5, 2.0),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
        reward_type: str | Mapping[str, float] | Callable[[Snapshot], Any] = "jain",
        reward_field: str = "flow_duration_avg_decay",
        max_steps: int = 10_000,
        max_episode_steps: int | None = None,
        use_ground_truth: bool = False,
        relative_to_configured: bool = False,
        observe_weights: bool = False,
        observe_background: bool = False,
        observe_configured: bool = False,
        observation: str = "matrix",
        features: Sequence[str] | None = None,
        normalize: bool = False,
        scenario: AnyScenario | str | PathLike[str] | None = None,
        dispatch: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_servers = None if num_servers is None else whole("num_servers", num_servers)
        self.source = None if scenario is None else load_scenario(scenario)
        self._check_room()
        self.dispatch = None if dispatch is None else choice("dispatch rule", dispatch, DISPATCH_RULES)
        self.step_interval = seconds("step_interval", step_interval)
        self.render_mode = None if render_mode is None else choice("render mode", render_mode, RENDER_MODES)
        self.max_steps = steps_of(max_steps, max_episode_steps)
        self.use_ground_truth = boolean("use_ground_truth", use_ground_truth)
        self.reward = make_reward(reward_type, reward_field)
        # What is looked at more than once is taken over: an iterator would be empty the second time.
        self._action: dict[str, Any] = {
            "action_type": action_type,
            "action_weights": None if action_weights is None else items("action_weights", action_weights),
            "min_weight": min_weight,
            "max_weight": max_weight,
            "relative_to_configured": relative_to_configured,
        }
        self._observation: dict[str, Any] = {
            "observation": observation,
            "features": None if features is None else features_named(features),
            "normalize": normalize,
            "use_ground_truth": use_ground_truth,
            "observe_weights": observe_weights,
            "observe_background": observe_background,
            "observe_configured": observe_configured,
        }
        # Bad keys are refused here, before a simulator is compiled or a region attached to.
        servers = self.num_servers or (1 if self.source is None else self.source.max_servers)
        self.codec(servers)
        self.layout(servers)

    @property
    def horizon(self) -> float:
        """Seconds of an episode."""
        return self.max_steps * self.step_interval

    def codec(self, num_servers: int) -> ActionCodec:
        """The action codec for N servers."""
        return make_action_codec(num_servers, **self._action)

    def layout(self, num_servers: int) -> ObservationLayout:
        """The observation layout for N servers."""
        return ObservationLayout(num_servers, **self._observation)

    def _check_room(self) -> None:
        wanted, source = self.num_servers, self.source
        if wanted is None or source is None:
            return
        name, most = source.name, source.max_servers
        # Servers that a distribution does not draw are inactive.
        if wanted == most or (wanted > most and source.varies):
            return
        if source.varies:
            has, rest = f"distribution {name!r} draws up to {most} servers", "give at least as many"
        else:
            has, rest = f"scenario {name!r} has {most} servers", "give it no scenario"
        raise InvalidOptionError(f"num_servers={wanted}, but {has}; leave num_servers out, or {rest}")


def steps_of(max_steps: Any, max_episode_steps: Any = None, *, name: str = "max_steps") -> int:
    """The steps of an episode: the smaller one of two limits.

    Args:
        max_steps: one.
        max_episode_steps: the other; None: there is none.
        name: of the first.

    Raises:
        InvalidOptionError: for a limit that is no whole number from 1 to ``MAX_STEPS``.
    """
    steps = whole(name, max_steps, high=MAX_STEPS)
    if max_episode_steps is None:
        return steps
    return min(steps, whole("max_episode_steps", max_episode_steps, high=MAX_STEPS))


def checked_seed(seed: Any) -> int | None:
    """A seed as Python's own number, which Gymnasium insists on; None stays None.

    Raises:
        InvalidOptionError: unless ``seed`` is None or a whole number of at least 0.
    """
    return None if seed is None else whole("seed", seed, low=0)
