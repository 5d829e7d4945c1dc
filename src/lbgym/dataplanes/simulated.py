"""The simulator as a data plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidOptionError, UnknownNameError
from ..scenarios import AnyScenario, Event, Scenario, load_scenario
from ..scenarios.randomization import HORIZON
from ..simulator import Simulation
from ..snapshot import Snapshot

RESET_OPTIONS = ("scenario", "load", "rate", "events")


def scenario_with_options(base: AnyScenario, options: Mapping[str, Any] | None) -> AnyScenario:
    """The scenario of an episode, or what it is drawn from: ``base`` under the ``options`` of a reset.

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
        events = options["events"]
        if isinstance(events, str) or not isinstance(events, Iterable) or not all(isinstance(e, Event) for e in events):
            raise InvalidOptionError(f"the option events must be a list of lbgym.scenarios.Event, got {events!r}")
        scenario = scenario.with_events(events)
    return scenario.with_changes(**changes) if changes else scenario


class SimulatedDataPlane:
    """One replica of a :class:`lbgym.simulator.Simulation`, seen by balancer 0; its weights go to every balancer.

    Args:
        scenario: what to simulate, or what is drawn from with the seed of each episode.
        dispatch: overrides the scenario's dispatch rule.
        interval: seconds per step.
        num_servers: N, room for servers; None: as many as the scenario has, or may draw.
        horizon: seconds up to which random events are drawn.
    """

    def __init__(
        self,
        scenario: AnyScenario,
        *,
        dispatch: str | None = None,
        interval: float = 0.25,
        num_servers: int | None = None,
        horizon: float = HORIZON,
    ) -> None:
        self._base = scenario
        self._horizon = horizon
        self.info: dict[str, Any] = {}
        self.interval = interval
        shape = scenario.reference
        self.simulation = Simulation(shape, num_servers=num_servers, dispatch=dispatch)
        self.num_servers = self.simulation.num_servers
        self._weights = np.empty((1, shape.balancers, self.num_servers))

    @property
    def scenario(self) -> Scenario:
        """The scenario of the episode under way."""
        return self.simulation.scenario_of(0)

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Snapshot:
        """Begin an episode; ``options`` as in :func:`scenario_with_options`. No seed: one from the operating system."""
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        scenario = scenario_with_options(self._base, options)
        # Not only what this seed draws must fit.
        self.simulation.check(scenario.reference)
        drawn = scenario.draw(seed, horizon=self._horizon)
        if drawn is not self.simulation.scenario_of(0):
            self.simulation.set_scenario(drawn)
        return _of_balancer(self.simulation.reset([seed]))

    def step(self, weights: NDArray[np.float64]) -> Snapshot:
        """Apply float[N] weights, simulate one interval, observe."""
        self._weights[0] = weights
        return _of_balancer(self.simulation.step(self._weights, self.interval))

    def close(self) -> None:
        """Nothing to release but threads, of which one replica has none."""
        self.simulation.close()


def _of_balancer(batch: Snapshot) -> Snapshot:
    """Balancer 0's part of a batch of one replica."""
    assert batch.ground_truth is not None
    return Snapshot(
        sequence_id=int(batch.sequence_id[0]),
        timestamp=float(batch.timestamp[0]),
        active=batch.active[0],
        stats=batch.stats[0, 0],
        ground_truth=batch.ground_truth[0],
        started=batch.started[0],
        completed=batch.completed[0],
        rejected=batch.rejected[0],
        failed=batch.failed[0],
        unrouted=int(batch.unrouted[0]),
        service=None if batch.service is None else batch.service[0],
    )
