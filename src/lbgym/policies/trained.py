"""Trained models as policies, whatever trained them: :class:`TrainedPolicy`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium

from ..env.actions import ActionCodec, make_action_codec
from ..env.observations import ObservationLayout
from ..errors import PolicyError

#: File names that mean a trained model.
TRAINED_SUFFIXES = (".pt", ".zip")

#: Attribute of a Stable-Baselines3 model, hence a key of its zip file: the keys of the environment it was trained on.
ENV_KWARGS_ATTRIBUTE = "lbgym_env_kwargs"


class TrainedPolicy(ABC):
    """A trained model as a :class:`~lbgym.policies.Policy`.

    Attributes:
        path: the file it was read from; None: none.
        env_kwargs: keys of the environment that its observations and actions belong to: ``observation``, ``normalize``,
            ``use_ground_truth``, ``observe_weights``, ``action_type`` and so on.
            ``LoadBalanceEnv(**env_kwargs, scenario=...)`` makes one.
        weights_alone: whether weights without the background loads that it sets serve a data plane that takes weights
            only.
        spaces: observation and action space it was trained on, and so a number of servers; None: not recorded.
    """

    weights_alone: bool = False

    def __init__(
        self,
        path: Path | None,
        env_kwargs: Mapping[str, Any],
        spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]] | None = None,
    ) -> None:
        self.path, self.env_kwargs, self.spaces = path, dict(env_kwargs), spaces

    @property
    def dispatch(self) -> str | None:
        """The dispatch rule it was trained with, if other than the scenario's own."""
        rule = self.env_kwargs.get("dispatch")
        return None if rule is None else str(rule)

    @property
    def step_interval(self) -> float | None:
        """Seconds per step it was trained with, if recorded."""
        step = self.env_kwargs.get("step_interval")
        return None if step is None else float(step)

    @property
    def uses_ground_truth(self) -> bool:
        """True if its observations include the ground truth."""
        return bool(self.env_kwargs.get("use_ground_truth", False))

    @property
    def uses_features(self) -> tuple[str, ...]:
        """The features that its observations show."""
        return self._layout(1).features

    @property
    def observes_weights(self) -> bool:
        """True if its observations include the weights in force."""
        return bool(self.env_kwargs.get("observe_weights", False))

    @property
    def num_servers(self) -> int | None:
        """The only number of servers it can act for; None: any."""
        if self.spaces is None:
            return None
        space: Any = self.spaces[0]
        if isinstance(space, gymnasium.spaces.Dict):
            space = space["features"]
        shape: tuple[int, ...] = space.shape
        if len(shape) == 2:
            return shape[0]
        # Flat: an active flag and a row of features per server.
        return shape[0] // (1 + len(self._layout(1).columns))

    @abstractmethod
    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: forget the last one, and restart the stream of drawn actions from ``seed`` if given."""

    @abstractmethod
    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The model's action for one observation of its environment."""

    @abstractmethod
    def copy(self) -> TrainedPolicy:
        """An independent policy with the same network, at the start of an episode."""

    def _layout(self, num_servers: int) -> ObservationLayout:
        keys = self.env_kwargs
        names = ("normalize", "use_ground_truth", "observe_weights", "observe_background", "observe_configured")
        return ObservationLayout(
            num_servers,
            keys.get("observation", "matrix"),
            features=keys.get("features"),
            **{name: bool(keys.get(name, False)) for name in names},
        )

    def codecs(self, num_servers: int) -> tuple[ObservationLayout, ActionCodec]:
        """The layout of its observations and the codec of its actions, for so many servers.

        Raises:
            PolicyError: if the model was trained on other spaces than these.
        """
        keys = self.env_kwargs
        layout = self._layout(num_servers)
        names = ("action_weights", "min_weight", "max_weight", "relative_to_configured")
        weights = {k: keys[k] for k in names if k in keys}
        codec = make_action_codec(num_servers, keys.get("action_type", "discrete"), **weights)
        what = "the model" if self.path is None else str(self.path)
        if self.spaces is not None:
            for kind, trained, here in zip(
                ("observations", "actions"), self.spaces, (layout.space, codec.space), strict=True
            ):
                if _shape(trained) != _shape(here):
                    raise PolicyError(
                        f"{what} was trained on {kind} {trained}, but {num_servers} servers and its environment's "
                        f"keys {keys} make them {here}"
                    )
        elif self.num_servers not in (None, num_servers):
            raise PolicyError(f"{what} was trained on {self.num_servers} servers and cannot act for {num_servers}")
        return layout, codec


def _shape(space: gymnasium.Space[Any]) -> Any:
    """The part of a space that must be equal for a model of one space to serve in another."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: part.shape for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(space.nvec.tolist())
    return type(space), space.shape
