"""The simulator as a data plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import items, shown
from ..errors import InvalidOptionError, InvalidWeightsError, UnknownNameError
from ..features.columns import FEATURE_NAMES
from ..scenarios import RULES, AnyScenario, Event, Scenario, load_scenario
from ..scenarios.randomization import HORIZON
from ..simulator import Simulation
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot

#: Operations on a Maglev table, each a few ns, above which weights are refused.
_MAGLEV_OPERATIONS = 5e9

RESET_OPTIONS = ("scenario", "load", "rate", "events")


def scenario_with_options(base: AnyScenario, options: Mapping[str, Any] | None) -> AnyScenario:
    """``base`` under the ``options`` of a reset: the scenario of an episode, or the distribution it is drawn from.

    Options: ``scenario`` (a Scenario, a distribution, the name of one or a TOML path), ``load`` or ``rate`` (as in
    ``Workload``), ``events`` (a list of ``Event``, instead of the scenario's).

    Raises:
        UnknownNameError: for another option.
        ScenarioError: for values a scenario cannot have.
        InvalidOptionError: for options of a wrong type, or load and rate together.
    """
    if not options:
        return base
    for key in options:
        if key not in RESET_OPTIONS:
            raise UnknownNameError("option of reset", key, RESET_OPTIONS)
    scenario = load_scenario(options["scenario"]) if options.get("scenario") is not None else base
    changes: dict[str, Any] = {k: options[k] for k in ("load", "rate") if options.get(k) is not None}
    if len(changes) == 2:
        raise InvalidOptionError(f"reset takes the option load or rate, not both; got {changes}")
    if options.get("events") is not None:
        kind = "lbgym.scenarios.Event"
        events = items("the option events", options["events"], kind)
        if not all(isinstance(event, Event) for event in events):
            raise InvalidOptionError(f"the option events must be a list of {kind}, got {shown(list(events))}")
        scenario = scenario.with_events(events)
    return scenario.with_changes(**changes) if changes else scenario


@contextmanager
def room_for(scenario: Scenario, num_replicas: int) -> Iterator[None]:
    """Make a simulator of a scenario.

    Raises:
        InvalidOptionError: in place of a MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        raise _no_room(scenario, num_replicas, error) from error


def _no_room(scenario: Scenario, num_replicas: int, error: MemoryError) -> InvalidOptionError:
    return InvalidOptionError(
        f"not enough memory for {num_replicas:,} replicas of {scenario.num_servers:,} servers behind "
        f"{scenario.balancers:,} balancers, their open flows and reservoirs of {scenario.sampling.capacity:,} samples"
        f"{f': {error}' if str(error) else ''}"
    )


class SimulatedDataPlane:
    """Replicas of a :class:`lbgym.simulator.Simulation` as a :class:`~lbgym.dataplanes.BatchedDataPlane`.

    Args:
        source: the scenario, or the distribution that each episode draws its own from.
        num_replicas: R.
        num_balancers: m, given to every scenario that is simulated; None: that of ``source``, and scenarios with
            another number are refused.
        num_servers: N, room for servers; None: as many as the source has, or may draw.
        dispatch: overrides the scenario's dispatch rule.
        interval: seconds per step.
        horizon: seconds up to which random events are drawn.
        num_threads: threads that share the replicas; None: one per core, fewer where there is little to share.

    Attributes:
        simulation: the simulator of all replicas.
        horizon: as given.
    """

    features = frozenset(FEATURE_NAMES)
    has_ground_truth = True
    has_interval = True

    def __init__(
        self,
        source: AnyScenario,
        num_replicas: int = 1,
        *,
        num_balancers: int | None = None,
        num_servers: int | None = None,
        dispatch: str | None = None,
        interval: float = DEFAULT_STEP_INTERVAL,
        horizon: float = HORIZON,
        num_threads: int | None = 1,
    ) -> None:
        self._balancers, self._dispatch = num_balancers, dispatch
        self._source = self._behind(source)
        self.horizon = horizon
        self.info: Mapping[str, NDArray[Any]] = {}
        self.interval = interval
        with room_for(self._source.reference, num_replicas):
            self.simulation = Simulation(
                self._source.reference,
                num_replicas,
                num_servers=num_servers,
                dispatch=dispatch,
                num_threads=num_threads,
            )
        self.num_replicas = self.simulation.num_replicas
        self.num_balancers = self.simulation.num_balancers
        self.num_servers = self.simulation.num_servers
        # Whether some weights could take too long.
        self._slow_maglev = 100.0 * self.num_servers**2 > _MAGLEV_OPERATIONS

    def source(self, options: Mapping[str, Any] | None = None) -> AnyScenario:
        """The source of episodes with these options; options and errors: :func:`scenario_with_options`.

        Raises:
            ScenarioError: also for scenarios with more servers than there is room for, or other numbers of balancers.
        """
        source = self._behind(scenario_with_options(self._source, options))
        if source is not self._source:
            # Everything that it may draw must fit, not only what the next seed draws.
            self.simulation.check(source.reference)
        return source

    def _behind(self, source: AnyScenario) -> AnyScenario:
        """The source with as many balancers as asked for; itself if it has them."""
        if self._balancers in (None, source.balancers):
            return source
        return source.with_changes(balancers=self._balancers)

    def reset(
        self,
        seeds: Sequence[int],
        mask: NDArray[np.bool_] | None = None,
        source: AnyScenario | None = None,
    ) -> Snapshot:
        """Begin episodes of the masked replicas (None: all): empty servers, unit weights, flows from ``seeds``."""
        self._draw(seeds, mask, self._source if source is None else source)
        return self.simulation.reset(seeds, mask)

    def no_index_reason(self, source: AnyScenario | None = None) -> str | None:
        """Names a dispatch rule of the episodes that counts flows by no formula that takes a background load."""
        rules = (source or self._source).dispatch_rules if self._dispatch is None else (self._dispatch,)
        without = [rule for rule in rules if not RULES[rule].takes_background]
        if not without:
            return None
        is_or_may_be = "is" if len(rules) == 1 else "may be"
        return f"its dispatch rule {is_or_may_be} {without[0]!r}; give dispatch='marginal' or another that counts"

    def step(
        self,
        weights: NDArray[np.float64],
        *,
        background: NDArray[np.float64] | None = None,
        delays: NDArray[np.float64] | None = None,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
    ) -> Snapshot:
        """Apply float64[R, m, N] weights, simulate one interval, observe; see :meth:`Simulation.step`."""
        if reset is not None:
            self._draw(seeds or (), reset, self._source)
        if self._slow_maglev:
            self._check_maglev(weights)
        try:
            return self.simulation.step(
                weights, self.interval, background=background, delays=delays, seeds=seeds, reset=reset
            )
        except MemoryError as error:
            raise _no_room(self._source.reference, self.num_replicas, error) from error

    def _check_maglev(self, weights: NDArray[np.float64]) -> None:
        """Refuse weights whose Maglev tables would take more than a few seconds each.

        A table of 100 N entries is filled in rounds; in each, every server earns its weight over the largest one.
        """
        n = self.num_servers
        per_round = weights.sum(axis=-1) / np.maximum(weights.max(axis=-1), np.finfo(np.float64).tiny)
        operations = 100.0 * n * n / np.maximum(per_round, 1.0)
        if operations.max() > _MAGLEV_OPERATIONS and any(
            (self._dispatch or self.scenario_of(i).dispatch) == "maglev" for i in range(self.num_replicas)
        ):
            b = np.unravel_index(operations.argmax(), operations.shape)
            raise InvalidWeightsError(
                f"a Maglev table of {n:,} servers takes too long where one weight dominates: the largest is "
                f"{weights[b].max():g}, the mean {weights[b].mean():g}; use weights that are closer together"
            )

    def _draw(self, seeds: Sequence[int], mask: NDArray[np.bool_] | None, source: AnyScenario) -> None:
        """Give the masked replicas the scenarios of their next episodes."""
        chosen = range(self.num_replicas) if mask is None else np.flatnonzero(mask).tolist()
        # Replicas that share a seed share the scenario.
        drawn = {seed: source.draw(seed, horizon=self.horizon) for seed in {seeds[i] for i in chosen}}
        running = self.simulation.scenario_of
        others = {i: drawn[seeds[i]] for i in chosen if drawn[seeds[i]] is not running(i)}
        if others:
            self.simulation.set_scenarios(others)

    def scenario_of(self, replica: int) -> Scenario:
        """The scenario of a replica's episode."""
        return self.simulation.scenario_of(replica)

    def initial_weights(self) -> NDArray[np.float64]:
        """1 for every server, also for those that the scenario of an episode does not have."""
        return np.ones((self.num_replicas, self.num_balancers, self.num_servers))

    def weights_in_force(self) -> NDArray[np.float64]:
        """The weights that place flows now, float64[R, m, N]."""
        return self.simulation.weights_in_force()

    def close(self) -> None:
        """Stop the threads; idempotent."""
        self.simulation.close()
