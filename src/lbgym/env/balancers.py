"""The core of the environments in which every balancer is an agent, and the state for centralised training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ..checks import choice, items, whole
from ..errors import InvalidOptionError, InvalidRewardError, ResetNeeded
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES, NUM_FEATURES
from ..scenarios.model import MAX_BALANCERS
from ..snapshot import Snapshot
from .core import EnvCore, live_plane, simulated_plane
from .observations import ObservationLayout
from .options import EnvOptions
from .sharing import REWARD_SHARINGS, shared_rewards
from .timing import ActionTiming
from .views import BalancersView

#: Balancers of an environment that is given neither their number nor a scenario.
DEFAULT_BALANCERS = 2


def balancers_core(
    options: EnvOptions,
    num_envs: int,
    *,
    num_balancers: int | None,
    reward_sharing: str,
    action_offsets: float | Sequence[float] | str,
    action_delay: float | Sequence[float] | Mapping[str, float],
    num_threads: int | None = None,
    shm_names: Sequence[str] | None = None,
    shm_timeout: float = 2.0,
) -> EnvCore:
    """A core that every balancer of every replica acts on.

    The keys and errors are those of :class:`~lbgym.MultiLoadBalanceVectorEnv`; ``shm_names`` (None: simulate) and
    ``shm_timeout`` those of :class:`~lbgym.MultiLoadBalanceEnv`.
    """
    choice("reward sharing", reward_sharing, REWARD_SHARINGS)
    if num_balancers is not None:
        num_balancers = whole("num_balancers", num_balancers, high=MAX_BALANCERS)
    if shm_names is None:
        wanted = num_balancers or (DEFAULT_BALANCERS if options.source is None else options.source.balancers)
        _check_sharing(options, reward_sharing, wanted)
        timing = ActionTiming(action_offsets, action_delay, num_envs, wanted, options.step_interval)
        plane = simulated_plane(options, num_envs, num_balancers=wanted, num_threads=num_threads)
    else:
        shm_names = items("shm_names", shm_names, "names of regions, one per balancer")
        if num_balancers not in (None, len(shm_names)):
            raise InvalidOptionError(f"num_balancers={num_balancers}, but shm_names has {len(shm_names)} regions")
        for key, value in (("action_offsets", action_offsets), ("action_delay", action_delay)):
            if not isinstance(value, (int, float)) or value != 0:
                raise InvalidOptionError(f"{key}={value!r} with shm_names: a live data plane has its own delays")
        _check_sharing(options, reward_sharing, len(shm_names))
        timing = None
        plane = live_plane(options, shm_names, shm_timeout)
    view = BalancersView(plane.num_replicas, plane.num_balancers)
    reward = functools.partial(shared_rewards, options.reward, sharing=reward_sharing)
    return EnvCore(options, plane, view, reward=reward, timing=timing)


def _check_sharing(options: EnvOptions, reward_sharing: str, num_balancers: int) -> None:
    if reward_sharing != "difference":
        return
    if num_balancers == 1:
        raise InvalidOptionError("reward_sharing='difference' needs at least 2 balancers, got 1")
    if options.reward.needs_service or options.reward.needs_ground_truth:
        raise InvalidRewardError(
            f"reward {options.reward.description!r} with reward_sharing='difference': it looks at what is the same for "
            "all balancers, so none makes a difference; use a fairness reward of a feature"
        )


class CentralState:
    """The state of a replica for a central trainer, as one vector.

    Attributes:
        names: of its S numbers.
        space: Box(S,).
    """

    def __init__(self, core: EnvCore) -> None:
        plane = core.plane
        truth = GROUND_TRUTH_NAMES if plane.has_ground_truth else ()
        self._layout = ObservationLayout(
            plane.num_servers, "matrix", normalize=core.layout.normalize, use_ground_truth=bool(truth)
        )
        servers = [f"server_{j}" for j in range(plane.num_servers)]
        self.names: tuple[str, ...] = (
            *(f"{server}/active" for server in servers),
            *(f"{server}/{name}" for server in servers for name in truth),
            *(f"lb_{b}/{s}/{name}" for b in range(plane.num_balancers) for s in servers for name in FEATURE_NAMES),
        )
        matrix = self._layout.space
        assert isinstance(matrix, spaces.Box)
        features = np.tile(matrix.high[:, :NUM_FEATURES].ravel(), plane.num_balancers)
        high = np.concatenate([np.ones(plane.num_servers), matrix.high[:, NUM_FEATURES:].ravel(), features])
        self.space = spaces.Box(np.zeros(len(high), np.float32), high.astype(np.float32), dtype=np.float32)

    def of(self, snapshot: Snapshot | None) -> NDArray[np.float32]:
        """float32[R, S] of a snapshot with leading axes [R, m].

        Raises:
            ResetNeeded: if there is none yet.
        """
        if snapshot is None:
            raise ResetNeeded("call reset() before state(): there is nothing to know yet")
        everything: Any = self._layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active)
        r = len(everything)
        return np.concatenate(
            [
                snapshot.active.any(axis=1),
                everything[:, 0, :, NUM_FEATURES:].reshape(r, -1),
                everything[..., :NUM_FEATURES].reshape(r, -1),
            ],
            axis=-1,
            dtype=np.float32,
        )
