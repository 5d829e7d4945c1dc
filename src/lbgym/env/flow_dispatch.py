"""One decision per flow: :class:`FlowDispatchEnv` and :class:`FlowDispatchVectorEnv`."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ..checks import boolean, choice, number
from ..errors import InvalidActionError, InvalidOptionError, ResetNeeded, UnknownNameError
from ..scenarios import (
    AnyScenario,
    ModulatedPoisson,
    OnOff,
    RandomEvents,
    Scenario,
    ScenarioDistribution,
    Sinusoidal,
    load_scenario,
)
from ..scenarios.randomization import HORIZON
from .core import SpecWithLimit
from .info import active_ids
from .observations import COUNT_GAIN, LAYOUTS, TIME_GAIN, TIME_UNIT, log_scale
from .options import checked_seed, steps_of
from .replicas import ReplicaVectorEnv, with_masks

if TYPE_CHECKING:
    from ..simulator.layout import Decision

#: Fields of a server, in the order of the simulator's columns. ``work`` (unfinished core-seconds) and
#: ``delay`` (seconds in which the server would finish them with every core busy) take an oracle, who knows sizes and
#: true speeds. ``open_flows`` (the flows that the balancer of the waiting flow has placed there and that have not
#: ended) and ``active`` (1: takes new flows) are known to a balancer.
SERVER_FIELDS = ("work", "delay", "open_flows", "active")
#: Fields of the waiting flow. ``demand`` (core-seconds) takes an oracle; ``gap``, seconds since the flow
#: before it, is known to a balancer.
FLOW_FIELDS = ("demand", "gap")

_QUANTILES = {"fct_p50": 0.5, "fct_p90": 0.9, "fct_p99": 0.99}


class FlowObservation:
    """Layout of the state at the arrival of a flow.

    N servers with C ``server_fields`` each, and F ``flow_fields``:

    * "flat": float32[..., N * C + F], server by server, then the flow; with the default fields Park's vector: the
      unfinished work of every server, then the size of the flow;
    * "matrix": float32[..., N, C + F], the flow repeated in the row of each server;
    * "dict": ``features`` float32[..., N, C], ``flow`` float32[..., F] (unless F = 0) and ``mask`` int8[..., N], 1 for
      servers that take new flows.

    With ``normalize`` times and counts are in [0, 1] on the logarithmic scale of
    :class:`~lbgym.env.observations.ObservationLayout`. Rows of inactive servers are zero.

    Raises:
        UnknownNameError: for another layout or field.
        InvalidOptionError: for a field named twice, or none at all, or a ``normalize`` that is neither true nor false.
    """

    def __init__(
        self,
        num_servers: int,
        observation: str = "flat",
        *,
        server_fields: Sequence[str] = ("work",),
        flow_fields: Sequence[str] = ("demand",),
        normalize: bool = False,
    ) -> None:
        if observation not in LAYOUTS:
            raise UnknownNameError("observation layout", observation, LAYOUTS)
        self.num_servers = num_servers
        self.observation = observation
        self.normalize = boolean("normalize", normalize)
        self.server_fields = _fields("server_fields", server_fields, SERVER_FIELDS)
        self.flow_fields = _fields("flow_fields", flow_fields, FLOW_FIELDS)
        if not self.server_fields and not self.flow_fields:
            raise InvalidOptionError("server_fields and flow_fields are both empty: there would be nothing to observe")
        self._server_columns = [SERVER_FIELDS.index(name) for name in self.server_fields]
        self._flow_columns = [FLOW_FIELDS.index(name) for name in self.flow_fields]

    @property
    def space(self) -> spaces.Space[Any]:
        """The observation space of one environment."""
        n, c, f = self.num_servers, len(self.server_fields), len(self.flow_fields)
        server, flow = self._highs(self.server_fields), self._highs(self.flow_fields)
        if self.observation == "dict":
            parts: dict[str, spaces.Space[Any]] = {
                "features": _box(np.broadcast_to(server, (n, c))),
                "mask": spaces.MultiBinary(n),
            }
            return spaces.Dict(parts | ({"flow": _box(flow)} if f else {}))
        if self.observation == "matrix":
            return _box(np.broadcast_to(np.concatenate([server, flow]), (n, c + f)))
        return _box(np.concatenate([np.tile(server, n), flow]))

    def _highs(self, names: Sequence[str]) -> NDArray[np.float32]:
        return np.array([1.0 if self.normalize or name == "active" else np.inf for name in names], np.float32)

    def encode(self, decision: Decision) -> Any:
        """Observations, in fresh arrays, of a batch of R replicas."""
        r, n, c, f = len(decision.timestamp), self.num_servers, len(self.server_fields), len(self.flow_fields)
        flow: NDArray[np.float32]
        if self.observation == "flat":
            out = np.empty((r, n * c + f), np.float32)
            self._write(out[:, : n * c].reshape(r, n, c), decision.servers, self.server_fields, self._server_columns)
            self._write(out[:, n * c :], decision.flow, self.flow_fields, self._flow_columns)
            return out
        if self.observation == "matrix":
            out = np.empty((r, n, c + f), np.float32)
            self._write(out[..., :c], decision.servers, self.server_fields, self._server_columns)
            self._write(out[..., c:], decision.flow[:, None], self.flow_fields, self._flow_columns)
            return out
        features, flow = np.empty((r, n, c), np.float32), np.empty((r, f), np.float32)
        self._write(features, decision.servers, self.server_fields, self._server_columns)
        self._write(flow, decision.flow, self.flow_fields, self._flow_columns)
        parts = {"features": features, "mask": active_servers(decision).astype(np.int8)}
        return parts | ({"flow": flow} if f else {})

    def _write(
        self, out: NDArray[np.float32], values: NDArray[np.float64], names: Sequence[str], columns: Sequence[int]
    ) -> None:
        """The ``columns`` of ``values`` [..., ?], scaled as their ``names`` ask for, into ``out`` [..., len(names)]."""
        for k, (name, column) in enumerate(zip(names, columns, strict=True)):
            out[..., k] = values[..., column]
            if self.normalize and name != "active":
                count = name == "open_flows"
                unit, gain = (1.0, COUNT_GAIN) if count else (1.0 / TIME_UNIT, TIME_GAIN)
                log_scale(out[..., k], np.float32(unit), np.float32(gain))


def _box(high: NDArray[np.float32]) -> spaces.Box:
    return spaces.Box(np.zeros_like(high), np.array(high), dtype=np.float32)


def _fields(key: str, names: Any, known: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidOptionError(f"{key} must be a list of names from {', '.join(known)}, got {names!r}")
    listed = tuple(names)
    for name in listed:
        if name not in known:
            raise UnknownNameError("field", name, known, where=key)
    if len(set(listed)) != len(listed):
        raise InvalidOptionError(f"{key} must name each field once, got {list(listed)}")
    return listed


def active_servers(decision: Decision) -> NDArray[np.bool_]:
    """bool[R, N]: servers that take new flows."""
    return decision.servers[..., SERVER_FIELDS.index("active")] > 0.0


def _drawn(source: AnyScenario, seed: int, now: float = 0.0) -> tuple[Scenario, float]:
    """The scenario of a seed, and the time up to which its random events suffice for an episode now at ``now`` seconds.

    An episode has so many flows and not so many seconds, so its events are drawn as its clock goes on. A longer horizon
    only adds later ones, so that nobody can tell.

    Raises:
        ScenarioError: for more events than a scenario may have.
    """
    scenario = source.draw(seed)
    if not isinstance(source, ScenarioDistribution) or not source.events:
        return scenario, math.inf
    ahead = max(HORIZON / 2, _longest_gap(scenario, source.events))
    horizon = HORIZON
    if now + ahead > horizon:
        # Twice as far, so that all draws of a long episode together take twice as long as the last.
        horizon = 2.0 * (now + ahead)
        scenario = source.draw(seed, horizon=horizon)
    return scenario, horizon - ahead


def _longest_gap(scenario: Scenario, random: Sequence[RandomEvents]) -> float:
    """Seconds that no gap between two flows of a scenario under ``random`` events exceeds but by a chance of 1e-13."""
    workload, arrivals, rare = scenario.workload, scenario.workload.arrivals, 30.0
    changes = [event for event in scenario.events if event.kind == "rate"]
    slowest = min((event.value for event in changes if event.value), default=1.0)
    rate = scenario.rate * min(slowest, 1.0)
    silences = [after.time - event.time for event, after in pairwise(changes) if event.value == 0.0]
    silences += [event.longest for event in random if event.kind == "rate"]
    lull = 0.0
    if workload.trace is not None:
        trace = workload.trace
        lull = float(np.diff(trace.times, append=trace.times[0] + trace.period).max()) * trace.rate / rate
    elif isinstance(arrivals, OnOff):
        lull = arrivals.off * (rare if arrivals.random else 1.0)
    elif isinstance(arrivals, ModulatedPoisson):
        lull = max(arrivals.sojourns) * (1.0 if arrivals.fixed_sojourns else rare)
    elif isinstance(arrivals, Sinusoidal):
        lull = arrivals.period
    return rare / rate + lull + max(silences, default=0.0)


class FlowEnvCore:
    """The keys of a flow-dispatch environment, checked, and its R replicas: all that its two forms share.

    Raises:
        UnknownNameError: for an unknown scenario, layout or field.
        InvalidOptionError: for a value out of its range.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        num_threads: int | None = None,
        scenario: AnyScenario | str | PathLike[str] | None = None,
        max_steps: int = 1000,
        max_episode_steps: int | None = None,
        observation: str = "flat",
        server_fields: Sequence[str] = ("work",),
        flow_fields: Sequence[str] = ("demand",),
        normalize: bool = False,
        reward_scale: float = 1.0,
        reject_cost: float | None = None,
        drain: bool = False,
    ) -> None:
        self.drain = boolean("drain", drain)
        self.source = load_scenario("park" if scenario is None else scenario)
        shape = self.source.reference
        self.max_steps = steps_of(max_steps, max_episode_steps)
        self.num_servers = shape.num_servers
        self.reward_scale = number("reward_scale", reward_scale, low=0.0)
        self.reject_cost = None if reject_cost is None else number("reject_cost", reject_cost, low=0.0)
        self.layout = FlowObservation(
            self.num_servers,
            observation,
            server_fields=server_fields,
            flow_fields=flow_fields,
            normalize=normalize,
        )
        self.action_space: spaces.Discrete = spaces.Discrete(self.num_servers)
        from ..dataplanes.simulated import room_for
        from ..simulator import FlowSimulation

        with room_for(shape, num_envs):
            self.simulation = FlowSimulation(shape, num_envs, num_threads=num_threads)
        self.decision: Decision | None = None
        self.steps = np.zeros(num_envs, np.int64)
        self._timeouts = np.full(num_envs, shape.reject_timeout)
        # Where random events go on: what they are drawn from, and the times after which more of them must be drawn.
        self._random: dict[int, tuple[AnyScenario, int]] = {}
        self._known_until = np.full(num_envs, math.inf)

    def source_with(self, options: Mapping[str, Any]) -> AnyScenario:
        """The scenario, or distribution, of episodes that begin with these ``options`` of a reset."""
        from ..dataplanes import scenario_with_options

        source = scenario_with_options(self.source, options)
        self.simulation.check(source.reference)
        return source

    def begin(self, seeds: Sequence[int], mask: NDArray[np.bool_], source: AnyScenario | None = None) -> None:
        """Run the masked replicas from ``seeds`` to their first flow, in ``source`` or else the environment's."""
        self._enter(seeds, mask, self.source if source is None else source)
        self.decision = self.simulation.begin(seeds, None if mask.all() else mask)
        self.steps[mask] = 0

    def _enter(self, seeds: Sequence[int], mask: NDArray[np.bool_], source: AnyScenario) -> None:
        """Give the masked replicas the scenario of their next episode."""
        chosen = np.flatnonzero(mask).tolist()
        # Replicas that share a seed share the scenario.
        drawn = {seed: _drawn(source, seed) for seed in {seeds[i] for i in chosen}}
        running = self.simulation.scenario_of
        scenarios = {i: drawn[seeds[i]][0] for i in chosen if drawn[seeds[i]][0] is not running(i)}
        if scenarios:
            self.simulation.set_scenarios(scenarios)
        for i, scenario in scenarios.items():
            self._timeouts[i] = scenario.reject_timeout
        for i in chosen:
            self._known_until[i] = drawn[seeds[i]][1]
            self._random.pop(i, None)
            if self._known_until[i] < math.inf:
                self._random[i] = source, seeds[i]

    def _draw_more(self, late: NDArray[np.bool_]) -> None:
        """Draw further events of the ``late`` replicas, whose clocks come near the end of those drawn so far."""
        assert self.decision is not None
        for i in np.flatnonzero(late).tolist():
            source, seed = self._random[i]
            scenario, self._known_until[i] = _drawn(source, seed, float(self.decision.timestamp[i]))
            self.simulation.add_events(i, scenario)

    def decide(
        self, actions: Any, *, seeds: Sequence[int] | None = None, reset: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Send the waiting flows to the servers ``actions`` int[R]; reward, terminated and truncated, each [R].

        The replicas marked in ``reset`` begin again instead, with reward 0.
        """
        before = self.decision
        assert before is not None
        if self._random:
            late = (before.timestamp > self._known_until) & before.waiting
            if late.any():
                self._draw_more(late if reset is None else late & ~reset)
        if reset is not None:
            assert seeds is not None
            self._enter(seeds, reset, self.source)
        final = self.steps + 1 >= self.max_steps if self.drain else None
        if final is not None and reset is not None:
            final &= ~reset
        now = self.decision = self.simulation.decide(actions, seeds=seeds, reset=reset, final=final)
        cost = self._timeouts if self.reject_cost is None else self.reject_cost
        rewards = now.flow_seconds - before.flow_seconds
        rewards += cost * (now.ended[:, 1] - before.ended[:, 1])
        rewards *= -self.reward_scale
        self.steps += 1
        if reset is not None:
            rewards[reset] = 0.0
            self.steps[reset] = 0
        terminated = ~now.waiting
        if reset is not None:
            terminated &= ~reset
        truncated = self.steps >= self.max_steps
        return rewards, terminated, truncated & ~terminated if self.drain else truncated

    def observation(self) -> Any:
        """The present observations, in fresh arrays."""
        assert self.decision is not None
        return self.layout.encode(self.decision)

    def info(self, ended: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        """Statistics of every replica since its episode began; quantiles of the FCT where it has ``ended``, else 0.

        They take a pass over all flows of the episode, too long for every step. Parts may be views of the decision,
        which the next reward is computed from: not to be handed out.
        """
        now = self.decision
        assert now is not None
        completed, lost = now.ended[:, 0], now.ended[:, 1]
        # Not NaN, which is unequal to itself: Gymnasium's checker compares infos.
        quantiles = self.simulation.fct_quantiles(ended) if ended.any() else np.zeros((len(ended), len(_QUANTILES)))
        return {
            "timestamp": now.timestamp,
            "active": active_servers(now),
            "completed": completed,
            "rejected": lost,
            "fct_mean": (now.fct_sum + lost * self._timeouts) / np.maximum(completed + lost, 1),
            **{name: quantiles[:, i] for i, name in enumerate(_QUANTILES)},
        }

    def masks(self) -> NDArray[np.bool_]:
        """bool[R, N]: servers that take new flows; all of them where none does."""
        if self.decision is None:
            raise ResetNeeded("call reset() before action_masks(): no flow waits yet")
        active = active_servers(self.decision)
        active[~active.any(axis=1)] = True
        return active


class FlowDispatchEnv(SpecWithLimit, gymnasium.Env[Any, Any]):
    """Choose the server of every single flow: the task of Park's ``load_balance`` (Mao et al., NeurIPS 2019).

    A step is one decision: the flow that waits goes to the chosen server, and time passes until the next flow arrives.

    **Observation**: by default Park's, float32[N + 1]: the unfinished work of each server, core-seconds, and the demand
    of the flow. No real balancer knows sizes; ``server_fields=("open_flows", "active"), flow_fields=()`` shows what one
    does know (:data:`SERVER_FIELDS`, :data:`FLOW_FIELDS`). Layouts: :class:`FlowObservation`.

    **Action**: ``Discrete(N)``, the server. A flow sent to a server that is down or draining is lost, as is any flow
    while no server is active; ``info["active_servers"]`` and :meth:`action_masks` show which servers are active.

    **Reward**: minus the integral of the number of flows in the system from one decision to the next, flow-seconds
    (exact; Park's), minus ``reject_cost`` for each flow rejected, failed or unrouted meanwhile: a lost flow must not
    pay. Times ``reward_scale``. The flow in question counts from its arrival. Without lost flows the sum of an
    episode's rewards over its time is minus the mean number of flows in the system.

    **End**: ``truncated`` after ``max_steps`` decisions; ``terminated`` only when no flow will ever arrive again, as at
    the end of a trace that is not repeated. The servers then finish what they hold, and the last reward counts it. An
    episode in Park always ends in this way, as here with ``drain=True``: no flow follows the ``max_steps``-th, and the
    episode terminates. Otherwise the value of a truncated episode's last state can be bootstrapped.

    **Info**, since the beginning of the episode: ``timestamp`` (s; the arrival of the waiting flow), ``active`` bool[N]
    and ``active_servers`` (their ids, a list), flows ``completed`` and ``rejected`` (or failed or unrouted),
    ``fct_mean`` (s, over both; a rejected flow counts with the scenario's ``reject_timeout``), and ``fct_p50``,
    ``fct_p90`` and ``fct_p99`` (s). These take a pass over the flows of the episode, with 8 bytes of memory for each,
    and are 0 except at its last step. Environments of ``gymnasium.make``, whose wrappers may end an episode at any
    step, keep them up to date at all steps. The keys are the same at every step.

    With a distribution of scenarios each episode draws its own, and N is the largest number of servers that it draws;
    servers an episode does not have are inactive. Random events happen throughout an episode, however long it takes.

    On a scenario with several balancers the agent decides for each of them, and ``open_flows`` are those of the
    balancer whose flow waits.

    Args:
        scenario: a Scenario or a distribution of them, the name of one, or the path of a TOML file; None: "park". Its
            dispatch rule is not used.
        max_steps: decisions per episode.
        max_episode_steps: the same by Gymnasium's name; the smaller one counts.
        observation: "flat", "matrix" or "dict".
        server_fields: what is shown of each server.
        flow_fields: what is shown of the waiting flow.
        normalize: map times and counts to [0, 1] by a fixed logarithmic scale.
        reward_scale: factor of the reward, at least 0.
        reject_cost: flow-seconds that a lost flow costs, at least 0; None: the scenario's ``reject_timeout``.
        drain: end episodes as Park does: after ``max_steps`` flows no other comes, and the last reward counts what the
            servers take to finish.
        render_mode: "ansi": :meth:`render` gives a table of the servers as text; None.

    Raises:
        UnknownNameError: for an unknown name, with the nearest known one.
        InvalidOptionError: for a value out of its range.
        ScenarioError: by ``reset`` or ``step``, for an episode so long that its random events are too many.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        *,
        scenario: AnyScenario | str | PathLike[str] | None = None,
        max_steps: int = 1000,
        max_episode_steps: int | None = None,
        observation: str = "flat",
        server_fields: Sequence[str] = ("work",),
        flow_fields: Sequence[str] = ("demand",),
        normalize: bool = False,
        reward_scale: float = 1.0,
        reject_cost: float | None = None,
        drain: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            choice("render mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self._core = FlowEnvCore(
            1,
            scenario=scenario,
            max_steps=max_steps,
            max_episode_steps=max_episode_steps,
            observation=observation,
            server_fields=server_fields,
            flow_fields=flow_fields,
            normalize=normalize,
            reward_scale=reward_scale,
            reject_cost=reject_cost,
            drain=drain,
        )
        #: The scenario, or distribution, that episodes begin with.
        self.scenario = self._core.source
        self.num_servers = self._core.num_servers
        self.max_steps = self._core.max_steps
        self.observation_layout = self._core.layout
        self.observation_space = self._core.layout.space
        self.action_space = self._core.action_space
        self._over = np.ones(1, np.bool_)
        self._one = np.ones(1, np.bool_)
        # FCTs of the episode in ascending order, where they are kept.
        self._fcts: list[float] = []

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: empty servers, at the arrival of the first flow.

        Seeds, options and errors are those of :meth:`LoadBalanceEnv.reset <lbgym.LoadBalanceEnv.reset>`.
        """
        seed = checked_seed(seed)
        source = self._core.source_with(options or {})
        if seed is not None:
            self.np_random = seeding.np_random(seed)[0]
            self._np_random_seed = seed
        self._core.begin([int(self.np_random.integers(1 << 63))], self._one, source)
        self._over = ~self._one
        self._fcts = []
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Send the waiting flow to a server; go to the arrival of the next.

        Raises:
            InvalidActionError: for anything but a whole number from 0 to N - 1; nothing has happened then.
            ResetNeeded: before ``reset`` or after the end of an episode.
        """
        if self._over[0]:
            when = "call reset() before step()" if self._core.decision is None else "the episode is over: call reset()"
            raise ResetNeeded(when)
        rewards, terminated, truncated = self._core.decide(_choices(action, ()))
        self._over = terminated | truncated
        return self._observation(), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), self._info()

    def action_masks(self) -> NDArray[np.bool_]:
        """bool[N]: servers that take new flows; all of them if none does. The form sb3-contrib's MaskablePPO takes."""
        return self._core.masks()[0]

    def render(self) -> str | None:
        """The servers and the waiting flow as text; None, with a warning, without a ``render_mode``."""
        if self.render_mode is None:
            gymnasium.logger.warn('FlowDispatchEnv.render() needs render_mode="ansi"')
            return None
        decision = self._core.decision
        if decision is None:
            raise ResetNeeded("call reset() before render(): no flow waits yet")
        demand, gap = decision.flow[0]
        lines = [
            f"t = {decision.timestamp[0]:.3f} s; the waiting flow demands {demand:.3f} core-s, gap {gap:.3f} s",
            f"{'server':>6} {'work, core-s':>12} {'delay, s':>9} {'open':>5}",
        ]
        for j, (work, delay, count, active) in enumerate(decision.servers[0]):
            lines.append(f"{j:>6} {work:>12.3f} {delay:>9.3f} {count:>5.0f}{'' if active else '  inactive'}")
        return "\n".join(lines)

    def close(self) -> None:
        """Nothing to release; idempotent."""
        self._core.simulation.close()

    def _observation(self) -> Any:
        batch = self._core.observation()
        return {name: part[0] for name, part in batch.items()} if isinstance(batch, dict) else batch[0]

    def _info(self) -> dict[str, Any]:
        batch = self._core.info(self._over)
        info = {name: part.item() if part.ndim == 1 else part[0] for name, part in batch.items()}
        if self._spec is not None and not self._over[0]:
            info |= self._quantiles()
        return info | {"active_servers": active_ids(info["active"])}

    def _quantiles(self) -> dict[str, float]:
        """The quantiles as of now, from FCTs that are kept in order: a few of them end in a step."""
        fcts = self._fcts
        for fct in self._core.simulation.ended_fcts(since=len(fcts)).tolist():
            insort(fcts, fct)
        last = len(fcts) - 1
        quantiles = {}
        for name, share in _QUANTILES.items():
            # NumPy's linear interpolation, in the kernel's order of operations.
            position = share * last
            low = int(position)
            quantiles[name] = fcts[low] + (position - low) * (fcts[min(low + 1, last)] - fcts[low]) if fcts else 0.0
        return quantiles


class FlowDispatchVectorEnv(SpecWithLimit, ReplicaVectorEnv):
    """``num_envs`` replicas of :class:`FlowDispatchEnv`, a decision for each in one kernel call.

    Equal, replica by replica and bit for bit, to single environments with the same seeds: ``reset(seed=s)`` seeds
    replica i with s + i, or takes a seed per replica. The clocks of the replicas differ, as each is at the arrival of a
    flow of its own. ``info`` holds arrays and, for each ``key``, a mask ``_key`` of the replicas that have it.

    Every server of every replica has room for the longest queue there has been in any of them, 48 bytes a place: a
    policy that sends 1,000 flows to one of 10 servers takes 0.5 MB per replica.

    Args:
        num_envs: replicas.
        autoreset_mode, num_threads: as :class:`~lbgym.LoadBalanceVectorEnv`.
        render_mode: None; a single environment has one.
        keys: those of :class:`FlowDispatchEnv`.

    Raises:
        UnknownNameError, InvalidOptionError: as the single environment.
    """

    # ``make_vec`` wants the mode in here, too; each instance has its own.
    metadata: dict[str, Any] = FlowDispatchEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        render_mode: str | None = None,
        **keys: Any,
    ) -> None:
        if render_mode is not None:
            raise InvalidOptionError(f"render_mode of FlowDispatchVectorEnv must be None, got {render_mode!r}")
        super().__init__(num_envs, autoreset_mode)
        self._core = FlowEnvCore(self.num_envs, num_threads=num_threads, **keys)
        #: The scenario, or distribution, that episodes begin with.
        self.scenario = self._core.source
        self.num_servers = self._core.num_servers
        self.max_steps = self._core.max_steps
        self.observation_layout = self._core.layout
        self._set_spaces(self._core.layout.space, self._core.action_space)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes: all, or those marked in ``options["reset_mask"]`` (bool[num_envs], at least one).

        The other options are those of :meth:`FlowDispatchEnv.reset` and hold for the episodes that begin here. Nothing
        is taken out of ``options``.

        Raises:
            InvalidOptionError: for a bad mask or seeds, and as the single environment.
            ResetNeeded: if it is the first reset, and the mask leaves replicas out.
        """
        mask, rest = self._split(options, first=self._core.decision is None)
        seeds = self._seeds(seed)
        source = self._core.source_with(rest)
        self._seed(mask, seeds)
        self._core.begin(self._draw_seeds(mask), mask, source)
        self._over = self._over & ~mask
        return self._core.observation(), self._info(mask, ~self._all)

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One decision of every replica.

        Raises:
            InvalidActionError: for anything but ``num_envs`` whole numbers from 0 to N - 1; nothing has happened then.
            ResetNeeded: before ``reset``; in DISABLED mode also while the episode of a replica is over.
        """
        if self._core.decision is None:
            raise ResetNeeded("call reset() before step()")
        again = self._to_reset()
        choices = _choices(actions, (self.num_envs,))
        seeds = None
        if again is not None:
            # Looked at before a generator moves.
            choices = self._core.simulation.checked(choices)
            seeds = self._draw_seeds(again)
        rewards, terminated, truncated = self._core.decide(choices, seeds=seeds, reset=again)
        ended = terminated | truncated
        observation = self._core.observation()
        info = self._info(self._all, ended)
        self._over = ended
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            final = self._final(ended, observation, info)
            self._core.begin(self._draw_seeds(ended), ended)
            self._over = ~self._all
            observation, info = self._core.observation(), self._info(self._all, self._over) | final
        return observation, rewards, terminated, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """bool[num_envs, N]: servers that take new flows; all of them where none does."""
        return self._core.masks()

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads."""
        # Gymnasium before 1.4 closes whatever it collects, also what a refused argument left half made.
        if hasattr(self, "_core"):
            self._core.simulation.close()

    def _info(self, mask: NDArray[np.bool_], ended: NDArray[np.bool_]) -> dict[str, Any]:
        info = {name: part.copy() for name, part in self._core.info(ended).items()}
        return with_masks(info | {"active_servers": active_ids(info["active"])}, mask)


def _choices(action: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An action as an array of one number per replica, or an error in the terms of its caller."""
    try:
        array = np.asarray(action)
    except (ValueError, TypeError) as error:
        raise InvalidActionError(f"an action must be an array of shape {shape}, got {action!r}") from error
    if array.shape != shape:
        raise InvalidActionError(f"an action must have shape {shape}, got shape {array.shape}")
    return array.reshape(-1)
