"""Trained models as policies: checkpoints of this package's recipes (.pt) and Stable-Baselines3 models (.zip)."""

from __future__ import annotations

import copy
import inspect
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ..env.actions import ActionCodec, make_action_codec
from ..env.observations import ObservationLayout
from ..errors import MissingExtraError, PolicyError
from ..features.columns import NUM_FEATURES, NUM_GROUND_TRUTH
from .base import Policy

#: File names that mean a trained model.
TRAINED_SUFFIXES = (".pt", ".zip")

#: Attribute of a Stable-Baselines3 model, hence a key of its zip file: the keys of the environment it was trained on.
ENV_KWARGS_ATTRIBUTE = "lbgym_env_kwargs"

# Columns of an observation without and with the ground truth.
_WIDTHS = (NUM_FEATURES, NUM_FEATURES + NUM_GROUND_TRUTH)


class TrainedPolicy:
    """A trained model as a :class:`Policy`.

    Attributes:
        path: where it was read from.
        env_kwargs: keys of the environment that its observations and actions are of: ``observation``, ``normalize``,
            ``use_ground_truth``, ``action_type`` and so on. ``LoadBalanceEnv(**env_kwargs, scenario=...)`` makes one.
        spaces: observation and action space it was trained on, and so a number of servers; None: it takes any number.
    """

    def __init__(
        self,
        model: Policy,
        path: Path,
        env_kwargs: Mapping[str, Any],
        spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]] | None = None,
    ) -> None:
        self.path, self.env_kwargs, self.spaces = path, dict(env_kwargs), spaces
        self._model = model

    @property
    def dispatch(self) -> str | None:
        """The dispatch rule it was trained with, if that was another than the scenario's own."""
        rule = self.env_kwargs.get("dispatch")
        return None if rule is None else str(rule)

    @property
    def step_interval(self) -> float | None:
        """Seconds per step it was trained with, if recorded."""
        step = self.env_kwargs.get("step_interval")
        return None if step is None else float(step)

    def reset(self) -> None:
        """Begin an episode."""
        self._model.reset()

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The model's action for one observation of its environment."""
        return self._model.act(observation, info)

    def copy(self) -> TrainedPolicy:
        """One with its own memory of the episode, and the same network."""
        return TrainedPolicy(copy.copy(self._model), self.path, self.env_kwargs, self.spaces)

    def codecs(self, num_servers: int) -> tuple[ObservationLayout, ActionCodec]:
        """What turns snapshots of so many servers into its observations, and its actions into weights.

        Raises:
            PolicyError: if the model was trained on other spaces than these.
        """
        keys = self.env_kwargs
        layout = ObservationLayout(
            num_servers,
            keys.get("observation", "matrix"),
            normalize=bool(keys.get("normalize", False)),
            use_ground_truth=bool(keys.get("use_ground_truth", False)),
        )
        weights = {k: keys[k] for k in ("action_weights", "min_weight", "max_weight") if k in keys}
        codec = make_action_codec(num_servers, keys.get("action_type", "discrete"), **weights)
        if self.spaces is not None:
            for what, trained, here in zip(
                ("observations", "actions"), self.spaces, (layout.space, codec.space), strict=True
            ):
                if _shape(trained) != _shape(here):
                    raise PolicyError(
                        f"{self.path} was trained on {what} {trained}, but {num_servers} servers and its environment's "
                        f"keys {keys} make them {here}"
                    )
        return layout, codec


def _shape(space: gymnasium.Space[Any]) -> Any:
    """What two spaces must have in common for a model of one to serve in the other."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: part.shape for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(space.nvec.tolist())
    return type(space), space.shape


class SB3Policy:
    """A Stable-Baselines3 policy network, of whichever algorithm, with its recurrent state where it has one."""

    def __init__(self, network: Any, deterministic: bool = True) -> None:
        self._network, self._deterministic = network, deterministic
        self.reset()

    def reset(self) -> None:
        """Forget the recurrent state."""
        self._state: Any = None
        self._start = np.ones(1, dtype=bool)

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The network's action."""
        action, self._state = self._network.predict(
            observation, state=self._state, episode_start=self._start, deterministic=self._deterministic
        )
        self._start = np.zeros(1, dtype=bool)
        return action


def load_policy(
    path: str | Path,
    *,
    deterministic: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
    algorithm: Any = None,
) -> TrainedPolicy:
    """A trained model from its file. Load only files you trust: a .zip of Stable-Baselines3 holds pickled code.

    Args:
        path: ``.pt`` of ``lbgym train``, or ``.zip`` of Stable-Baselines3 (any algorithm; sb3-contrib's if installed).
        deterministic: the most likely action instead of a drawn one.
        env_kwargs: keys of the environment it was trained on, over those recorded in the file. What a .zip does not
            record is read from its spaces, and where these do not show weights or bounds the defaults are assumed.
        algorithm: Stable-Baselines3 class to load with, for a model that needs its own ``load``; None: the policy
            class recorded in the file.

    Raises:
        PolicyError: for a missing file, one that is no such model, or spaces that no lbgym environment has.
        MissingExtraError: without torch or Stable-Baselines3.
    """
    path = Path(path)
    if not path.is_file():
        raise PolicyError(f"there is no trained model at {str(path)!r}")
    if path.suffix.lower() not in TRAINED_SUFFIXES:
        raise PolicyError(f"a trained model is a {' or '.join(TRAINED_SUFFIXES)} file, got {str(path)!r}")
    load = _load_checkpoint if path.suffix.lower() == ".pt" else _load_sb3
    return load(path, deterministic, dict(env_kwargs or {}), algorithm)


def _load_checkpoint(path: Path, deterministic: bool, env_kwargs: dict[str, Any], algorithm: Any) -> TrainedPolicy:
    # A recipe owns the format and the network of its checkpoints.
    from ..training import load_policy as load_recipe

    model = load_recipe(path, deterministic=deterministic)
    return TrainedPolicy(model, path, {**model.env_kwargs, **env_kwargs})


def _load_sb3(path: Path, deterministic: bool, env_kwargs: dict[str, Any], algorithm: Any) -> TrainedPolicy:
    try:
        from stable_baselines3.common.save_util import load_from_zip_file
    except ImportError:
        raise MissingExtraError("stable_baselines3", "sb3", f"the trained model {str(path)!r}") from None
    if not zipfile.is_zipfile(path):
        raise PolicyError(f"{str(path)!r} is not a zip file of Stable-Baselines3")
    recorded = _recorded_env_kwargs(path)
    if algorithm is not None:
        network = algorithm.load(path, device="cpu").policy
    else:
        try:
            # Schedules are code of the Python version that saved them, and acting needs none.
            schedules = dict.fromkeys(("lr_schedule", "clip_range", "clip_range_vf", "learning_rate"), _no_schedule)
            data, parameters, _ = load_from_zip_file(path, device="cpu", custom_objects=schedules)
        except (ValueError, KeyError, ImportError, AttributeError) as error:
            raise PolicyError(f"{str(path)!r} cannot be read as a Stable-Baselines3 model: {error}") from error
        if (
            not data
            or not {"policy_class", "observation_space", "action_space"} <= data.keys()
            or "policy" not in parameters
        ):
            raise PolicyError(f"{str(path)!r} is not a model of Stable-Baselines3: it records no policy")
        network = _network(data, parameters["policy"])
    spaces = network.observation_space, network.action_space
    known = {**_inferred_env_kwargs(*spaces, path), **recorded, **env_kwargs}
    return TrainedPolicy(SB3Policy(network, deterministic), path, known, spaces)


def _no_schedule(progress: float) -> float:
    return 0.0


def _network(data: Mapping[str, Any], parameters: Any) -> Any:
    """The policy network alone: acting needs neither the algorithm nor its replay buffer."""
    make, kwargs = data["policy_class"], dict(data.get("policy_kwargs") or {})
    if "use_sde" in inspect.signature(make).parameters and "use_sde" in data:
        kwargs.setdefault("use_sde", data["use_sde"])
    network = make(data["observation_space"], data["action_space"], _no_schedule, **kwargs)
    network.load_state_dict(parameters)
    network.set_training_mode(False)
    return network


def _recorded_env_kwargs(path: Path) -> dict[str, Any]:
    """What training wrote down, from the zip file's JSON."""
    with zipfile.ZipFile(path) as archive:
        if "data" not in archive.namelist():
            raise PolicyError(f"{str(path)!r} is not a model of Stable-Baselines3: it has no 'data'")
        recorded = json.loads(archive.read("data")).get(ENV_KWARGS_ATTRIBUTE)
    if isinstance(recorded, dict):
        # Keys with a colon are Stable-Baselines3's own notes on how it serialised the value.
        return {key: value for key, value in recorded.items() if not key.startswith(":")}
    return {}


def _inferred_env_kwargs(observation: Any, action: Any, path: Path) -> dict[str, Any]:
    """Environment keys that the spaces of a model show."""
    spaces = gymnasium.spaces
    layout, features = "matrix", observation
    if isinstance(observation, spaces.Dict):
        layout, features = "dict", observation.spaces.get("features")
    shape = features.shape if isinstance(features, spaces.Box) else ()
    width = shape[1] if len(shape) == 2 else 0
    if len(shape) == 1 and layout == "matrix":
        layout = "flat"
        width = next((w for w in _WIDTHS if shape[0] % (1 + w) == 0 and _serves(action, shape[0] // (1 + w))), 0)
    if width not in _WIDTHS:
        raise PolicyError(
            f"{str(path)!r} was not trained on an lbgym environment: its spaces are {observation} and {action}"
        )
    keys: dict[str, Any] = {
        "observation": layout,
        "use_ground_truth": width == _WIDTHS[1],
        "normalize": bool(np.all(features.high <= 1)),
    }
    if not isinstance(action, spaces.Box):
        keys["action_type"] = "joint" if isinstance(action, spaces.Discrete) else "discrete"
    elif np.all(action.low == -1) and np.all(action.high == 1):
        keys["action_type"] = "normalized"
    else:
        keys |= {"action_type": "continuous", "min_weight": float(action.low.min())}
        keys |= {"max_weight": float(action.high.max())}
    return keys


def _serves(action: Any, num_servers: int) -> bool:
    """Whether an action space can be that of so many servers."""
    if isinstance(action, gymnasium.spaces.Discrete):
        return round(float(action.n) ** (1 / num_servers)) ** num_servers == int(action.n)
    return tuple(action.shape) == (num_servers,)
