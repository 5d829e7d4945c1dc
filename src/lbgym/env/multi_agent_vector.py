"""Every balancer an agent, in arrays: :class:`MultiLoadBalanceVectorEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..errors import InvalidActionError
from .balancers import CentralState, balancers_core
from .sharing import REWARD_SHARINGS
from .single import LoadBalanceEnv
from .vector import ReplicaEnv


class MultiLoadBalanceVectorEnv(ReplicaEnv):
    """``num_envs`` replicas of m balancers, each of which observes its own flows and sets its own weights.

    The array form of :class:`~lbgym.MultiLoadBalanceEnv`, for trainers that batch: one kernel call steps all replicas
    on all cores. It has the methods of a Gymnasium ``VectorEnv``, but every replica has m rewards, so it is not one.
    With R replicas, m balancers, N servers and C columns:

    * observations: those of :class:`~lbgym.LoadBalanceEnv` with two leading axes, float32[R, m, N, C] for "matrix";
    * actions: whatever :class:`~lbgym.LoadBalanceEnv` takes with two leading axes, int64[R, m, N] for "discrete",
      int64[R, m] for "joint", float[R, m, N, 2] for "index", float[R, m, N] for the others;
    * rewards: float64[R, m]; ``terminated`` (never) and ``truncated``: bool[R], since all balancers of a replica
      end together;
    * :meth:`state`: float32[R, S] for centralised training;
    * ``info``: as :class:`~lbgym.LoadBalanceVectorEnv` with an axis of balancers, such as ``weights`` float64[R, m, N]
      and ``completed`` int64[R, m]. The FCT statistics are of all balancers' flows and the same for each. In SAME_STEP
      mode ``final_state`` float32[R, S] holds the last states of the episodes that ended. Where balancers do not act
      at once, ``weights_in_force`` float64[R, m, N] at the end of the step and ``action_delay`` float64[R, m], seconds
      from the observation to when the weights of this step's action come into force.

    Seeds, options of ``reset`` and autoreset are those of :class:`~lbgym.LoadBalanceVectorEnv`; ``single_*_space`` is
    that of one replica, ``agent_observation_space`` and ``agent_action_space`` of one balancer.

    **Rewards.** Let l_bj be the field of a fairness reward (say, flow duration) of server j at balancer b:

    * "mean" (default): each gets the mean over the balancers of their own rewards F(l_b);
    * "field": each gets the reward G = F(mean over b of l_b) of the mean field;
    * "own": each gets F(l_b);
    * "difference": each gets G - G_b, where G_b is the reward of the mean over the *other* balancers' fields. It is the
      Wonderful Life Utility of Wolpert and Tumer (Advances in Complex Systems 4, 2001), with what balancer b *observes*
      taken out of the field, exactly. It is not the world without b's actions: b's
      flows are still on the servers and in what the others observe, which only a second simulation could undo, and so
      G_b is not quite independent of what b does. Nor is it the Aristocrat Utility, which averages over the actions b
      might have taken. Service rewards count all flows together and leave nothing to take out, so they are refused.

    Service rewards and ground truth are of the cluster, so the first three sharings give everybody the same. A mean
    over balancers is one over those that have the server in service.

    **Asynchrony.** All balancers observe at the same instants, the ends of steps. The weights of the action that
    answers an observation come into force ``action_offsets`` (when the balancer acts) plus ``action_delay`` (until the
    data plane has them) seconds after it; until then, also across steps, the former ones hold. Weights that would come
    into force after newer ones are dropped. Both 0: all act at once, at no cost. Flows, seeds and statistics do not
    depend on it: drawn offsets and delays come from a generator of their own.

    Args:
        num_envs: replicas.
        num_balancers: m; None: the scenario's, or 2 without a scenario.
        reward_sharing: one of ``REWARD_SHARINGS``.
        action_offsets: seconds in [0, ``step_interval``): a number, one per balancer, "even" (b / m of the interval) or
            "random" (drawn uniformly for each balancer at the beginning of an episode).
        action_delay: seconds: a number, one per balancer, or ``{"low": ..., "high": ...}`` to draw uniformly for each
            balancer and step.
        autoreset_mode, num_threads: as :class:`~lbgym.LoadBalanceVectorEnv`.
        keys: those of :class:`~lbgym.LoadBalanceEnv`. A callable ``reward_type`` is given a batched snapshot and
            returns float[...] over its leading axes: [R, m] for each balancer's own view, [R] for the mean field.

    Raises:
        UnknownNameError, InvalidOptionError: as the single environment.
        InvalidRewardError: for a service or ground-truth reward with reward_sharing="difference".
    """

    # The mode of each instance is in its own ``metadata``.
    metadata: dict[str, Any] = LoadBalanceEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        num_balancers: int | None = None,
        reward_sharing: str = "mean",
        action_offsets: float | Sequence[float] | str = 0.0,
        action_delay: float | Sequence[float] | Mapping[str, float] = 0.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(num_envs, autoreset_mode)
        options = self._options(keys, "MultiLoadBalanceEnv takes shm_names, one for each balancer")
        core = self._core = balancers_core(
            options,
            self.num_envs,
            num_balancers=num_balancers,
            reward_sharing=reward_sharing,
            action_offsets=action_offsets,
            action_delay=action_delay,
            num_threads=num_threads,
        )
        self.render_mode = options.render_mode
        self.num_balancers = core.plane.num_balancers
        self.reward_sharing = reward_sharing
        self.agent_observation_space = core.layout.space
        self.agent_action_space = core.codec.space
        self._set_spaces(
            batch_space(self.agent_observation_space, self.num_balancers),
            batch_space(self.agent_action_space, self.num_balancers),
        )
        self._state = CentralState(core)
        #: Box(S,), the space of :meth:`state` of one replica.
        self.state_space = self._state.space

    @property
    def unwrapped(self) -> MultiLoadBalanceVectorEnv:
        """Itself."""
        return self

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the S numbers of :meth:`state`, such as "server_3/cpu_usage" or "lb_0/server_3/fct_mean"."""
        return self._state.names

    def state(self) -> NDArray[np.float32]:
        """All that a central trainer may know of each replica now, float32[R, S], in a fresh array.

        For N servers: 0/1 whether each is in service; its CPU use, memory use and busy workers; then, balancer by
        balancer, the N x 11 features it observes. S = 4 N + 11 m N; :attr:`state_names` lists them. Values are flows
        and seconds, or with ``normalize`` on the scale of the observations.

        Raises:
            ResetNeeded: before the first reset.
        """
        return self._state.of(self._core.snapshot)

    def _to_weights(self, actions: Any) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        r, m = self.num_envs, self.num_balancers
        try:
            array = np.asarray(actions)
        except (ValueError, TypeError) as error:
            raise InvalidActionError(f"actions must be an array, got {actions!r}") from error
        expected = (r, m, *(self.agent_action_space.shape or ()))
        if array.shape != expected:
            raise InvalidActionError(f"actions must have shape {expected}, got shape {array.shape}")
        rows, codec = array.reshape(r * m, *expected[2:]), self._core.codec
        weights, background = codec.to_weights(rows, r * m), codec.to_background(rows, r * m)
        shape = (r, m, self.num_servers)
        return weights.reshape(shape), None if background is None else background.reshape(shape)

    def _final(self, ended: NDArray[np.bool_], observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        final = super()._final(ended, observation, info)
        return final | {"final_state": self.state(), "_final_state": ended.copy()}


__all__ = ["REWARD_SHARINGS", "MultiLoadBalanceVectorEnv"]
