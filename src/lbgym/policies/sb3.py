"""Policies of Stable-Baselines3 from its own zip files."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ..checks import boolean
from ..errors import MissingExtraError, PolicyError
from ..features.columns import NUM_FEATURES, NUM_GROUND_TRUTH
from .trained import ENV_KWARGS_ATTRIBUTE, TrainedPolicy

# By the columns of an observation, whether it has the ground truth and the weights in force.
_WIDTHS = {
    NUM_FEATURES + NUM_GROUND_TRUTH * truth + weights: (truth, weights)
    for weights in (False, True)
    for truth in (False, True)
}

# Raised on reading a damaged file, or code that another version pickled.
_DAMAGE = (
    ValueError, KeyError, ImportError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
    pickle.UnpicklingError,
)  # fmt: skip


class SB3Policy(TrainedPolicy):
    """A Stable-Baselines3 policy network of any algorithm, with its recurrent state where it has one.

    Args:
        network: the policy.
        path: the file it was read from.
        env_kwargs: keys of the environment it was trained on.
        deterministic: the most likely action instead of a drawn one.
        seed: of drawn actions; None: they are drawn from torch's global stream.
    """

    def __init__(
        self,
        network: Any,
        path: Path | None,
        env_kwargs: Mapping[str, Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(path, env_kwargs, (network.observation_space, network.action_space))
        self._deterministic = boolean("deterministic", deterministic, error=PolicyError)
        self._network, self._seed = network, seed
        self.reset()

    def copy(self) -> SB3Policy:
        """An independent policy with the same network, at the start of an episode."""
        twin = copy.copy(self)
        twin.reset()
        return twin

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: forget the recurrent state; seeded draws start over."""
        self._seed = self._seed if seed is None else seed
        self._state: Any = None
        self._start = np.ones(1, dtype=bool)
        self._random: Any = None

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The network's action."""
        if self._deterministic or self._seed is None:
            action = self._predict(observation)
        else:
            # The network draws from torch's global stream: lend it one of this policy's own.
            import torch

            with torch.random.fork_rng(devices=[]):
                if self._random is None:
                    torch.manual_seed(self._seed)
                else:
                    torch.set_rng_state(self._random)
                action = self._predict(observation)
                self._random = torch.get_rng_state()
        self._start = np.zeros(1, dtype=bool)
        return action

    def _predict(self, observation: Any) -> Any:
        action, self._state = self._network.predict(
            observation, state=self._state, episode_start=self._start, deterministic=self._deterministic
        )
        return action


def load_sb3_policy(
    path: Path, *, deterministic: bool, seed: int | None, env_kwargs: Mapping[str, Any], algorithm: Any
) -> SB3Policy:
    """The policy of a Stable-Baselines3 model; arguments as of :func:`lbgym.policies.load_policy`.

    Raises:
        PolicyError: for a file that is no such model, or spaces that no lbgym environment has.
        MissingExtraError: without Stable-Baselines3.
    """
    try:
        from stable_baselines3.common.save_util import load_from_zip_file
    except ImportError:
        raise MissingExtraError("stable_baselines3", "sb3", f"the trained model {str(path)!r}") from None
    if not zipfile.is_zipfile(path):
        what = "empty" if path.stat().st_size == 0 else "not a zip file of Stable-Baselines3, or damaged"
        raise PolicyError(f"the trained model {str(path)!r} is {what}")
    recorded = _recorded_env_kwargs(path)
    if algorithm is not None:
        network = algorithm.load(path, device="cpu").policy
    else:
        try:
            # Schedules are code of the Python version that saved them, and acting needs none.
            schedules = dict.fromkeys(("lr_schedule", "clip_range", "clip_range_vf", "learning_rate"), _no_schedule)
            data, parameters, _ = load_from_zip_file(path, device="cpu", custom_objects=schedules)
        except _DAMAGE as error:
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
    return SB3Policy(network, path, known, deterministic=deterministic, seed=seed)


def _no_schedule(progress: float) -> float:
    return 0.0


def _network(data: Mapping[str, Any], parameters: Any) -> Any:
    """The policy network on its own: acting needs neither the algorithm nor its replay buffer."""
    make, kwargs = data["policy_class"], dict(data.get("policy_kwargs") or {})
    if "use_sde" in inspect.signature(make).parameters and "use_sde" in data:
        kwargs.setdefault("use_sde", data["use_sde"])
    network = make(data["observation_space"], data["action_space"], _no_schedule, **kwargs)
    network.load_state_dict(parameters)
    network.set_training_mode(False)
    return network


def _recorded_env_kwargs(path: Path) -> dict[str, Any]:
    """The environment keys that the training recorded in the zip file's JSON."""
    with zipfile.ZipFile(path) as archive:
        if "data" not in archive.namelist():
            raise PolicyError(f"{str(path)!r} is not a model of Stable-Baselines3: it has no 'data'")
        try:
            recorded = json.loads(archive.read("data")).get(ENV_KWARGS_ATTRIBUTE)
        except _DAMAGE as error:
            raise PolicyError(f"the trained model {str(path)!r} is damaged: {error}") from error
    if isinstance(recorded, dict):
        # Keys with a colon are Stable-Baselines3's own notes on how it serialised the value.
        return {key: value for key, value in recorded.items() if not key.startswith(":")}
    return {}


def _inferred_env_kwargs(observation: Any, action: Any, path: Path) -> dict[str, Any]:
    """Environment keys as far as the spaces of a model reveal them."""
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
    truth, weights = _WIDTHS[width]
    keys: dict[str, Any] = {
        "observation": layout,
        "use_ground_truth": truth,
        "observe_weights": weights,
        # The first feature is a count.
        "normalize": bool(features.high[-width if layout == "flat" else (0, 0)] <= 1),
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
    """True if an action space fits so many servers."""
    if isinstance(action, gymnasium.spaces.Discrete):
        return round(float(action.n) ** (1 / num_servers)) ** num_servers == int(action.n)
    return tuple(action.shape) == (num_servers,)
