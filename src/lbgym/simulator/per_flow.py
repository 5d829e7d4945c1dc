"""A simulation that asks for the server of every flow: :class:`FlowSimulation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidActionError, ResetNeeded
from ..scenarios import model
from . import layout as at
from .simulation import Simulation
from .threads import available_cores

#: Replicas from which another thread pays: about 0.1 ms of work.
_REPLICAS_PER_THREAD = 256


class FlowSimulation:
    """Replicas of one scenario that stop whenever a flow arrives, for the caller to choose its server.

    The flows, servers and events are those of :class:`Simulation` with the same seed; only the dispatch rule is the
    caller. Asking changes nothing: with the choices that a dispatch rule would make, every FCT is the same to the bit.

    R replicas, N servers. A flow sent to a server that takes none (down or draining) is unrouted.

    ``copy.deepcopy`` and ``pickle`` give a simulation that continues bit for bit like the original.

    Args:
        scenario: what to simulate; its dispatch rule is not used. With several balancers the caller is each of them.
        num_replicas: R.
        record_flows: keep every flow that ends, for :meth:`take_flows`.
        num_threads: threads that share the replicas; None: one per core, fewer where there is little to share.
    """

    def __init__(
        self,
        scenario: model.Scenario,
        num_replicas: int = 1,
        *,
        record_flows: bool = False,
        num_threads: int | None = 1,
    ) -> None:
        if num_threads is None:
            num_threads = max(1, min(available_cores(), num_replicas // _REPLICAS_PER_THREAD))
        self._simulation = Simulation(
            scenario, num_replicas, reservoirs=False, record_flows=record_flows, num_threads=num_threads
        )
        self.num_replicas = self._simulation.num_replicas
        self.num_servers = scenario.num_servers
        self.num_threads = self._simulation.num_threads
        self._decision: at.Decision | None = None
        self._no_choices = np.zeros(self.num_replicas, np.int64)
        self._no_seeds = np.zeros(self.num_replicas, np.uint64)
        self._none = np.zeros(self.num_replicas, np.bool_)
        self._take_over()

    def _take_over(self) -> None:
        self._simulation.kernel_arrays()[0].pi[:, at.P_RULE] = at.EXTERNAL

    def scenario_of(self, replica: int) -> model.Scenario:
        """The scenario a replica runs."""
        return self._simulation.scenario_of(replica)

    def set_scenarios(self, scenarios: Mapping[int, model.Scenario]) -> None:
        """Give some replicas a scenario each; they must :meth:`begin` again. The others are not touched.

        Raises:
            ScenarioError: as :meth:`check`; no replica has another scenario then.
        """
        self._simulation.set_scenarios(scenarios)
        self._take_over()

    def add_events(self, replica: int, scenario: model.Scenario) -> None:
        """See :meth:`Simulation.add_events`."""
        self._simulation.add_events(replica, scenario)

    def check(self, scenario: model.Scenario) -> None:
        """Refuse a scenario that this simulation has no room for.

        Raises:
            ScenarioError: if it has more than N servers, or another number of balancers.
        """
        self._simulation.check(scenario)

    def begin(self, seeds: Sequence[int], mask: NDArray[np.bool_] | None = None) -> at.Decision:
        """Empty the masked replicas (None: all), start their flows from ``seeds`` and run each to its first flow.

        Raises:
            ScenarioError: for seeds that are not one per replica; nothing has happened then.
            ResetNeeded: the other replicas have never begun.
        """
        words = self._simulation.seed_words(seeds)
        chosen = np.ones(self.num_replicas, np.bool_) if mask is None else mask
        self._check_begun(chosen)
        if mask is None or self._decision is None:
            out = at.allocate_decision(self.num_replicas, self.num_servers)
        else:
            out = at.Decision._make([array.copy() for array in self._decision])
        return self._run(out, self._no_choices, words, chosen, self._none, chosen)

    def decide(
        self,
        servers: ArrayLike,
        *,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
        final: NDArray[np.bool_] | None = None,
    ) -> at.Decision:
        """Send the waiting flow of each replica to ``servers`` int[R] and run each replica to its next flow.

        The replicas marked in ``reset`` begin again from their ``seeds`` instead. Where no further flow comes, the
        servers finish what they hold and ``waiting`` is False; from then on a choice changes nothing. So it is at once
        in the replicas marked in ``final``: the waiting flow is their last, whatever the scenario would bring.

        Raises:
            InvalidActionError: for anything but R whole numbers from 0 to N - 1; nothing has happened then.
            ScenarioError: for seeds that are not one per replica; nothing has happened then.
            ResetNeeded: before the first :meth:`begin`.
        """
        choices = self.checked(servers)
        words = self._no_seeds if reset is None else self._simulation.seed_words(seeds or ())
        begin = self._none if reset is None else reset
        self._check_begun(begin)
        out = at.allocate_decision(self.num_replicas, self.num_servers)
        return self._run(out, choices, words, begin, self._none if final is None else final, None)

    def checked(self, servers: ArrayLike) -> NDArray[np.int64]:
        """``servers`` as int64[R].

        Raises:
            InvalidActionError: for anything but R whole numbers from 0 to N - 1.
        """
        choices = np.asarray(servers)
        if choices.dtype.kind not in "iu":
            raise InvalidActionError(f"an action must be the index of a server, a whole number, got {servers!r}")
        if choices.shape != (self.num_replicas,):
            raise InvalidActionError(f"actions must have shape {(self.num_replicas,)}, got shape {choices.shape}")
        # One pass: as an unsigned number, a negative one is far too large. uint64 is what int64 would wrap.
        if (choices.astype(np.uint64, copy=False) >= self.num_servers).any():
            bad = choices[(choices < 0) | (choices >= self.num_servers)][0]
            raise InvalidActionError(
                f"an action must be the index of a server, from 0 to {self.num_servers - 1}, got {bad}"
            )
        return choices.astype(np.int64, copy=False)

    def _check_begun(self, begin: NDArray[np.bool_]) -> None:
        if not self._simulation.have_started(begin):
            raise ResetNeeded("call begin() before decide(): no flow has been drawn yet")

    def _run(
        self,
        out: at.Decision,
        choices: NDArray[np.int64],
        words: NDArray[np.uint64],
        begin: NDArray[np.bool_],
        final: NDArray[np.bool_],
        mask: NDArray[np.bool_] | None,
    ) -> at.Decision:
        from .per_flow_kernel import decide_replicas

        simulation = self._simulation

        def part(first: int, last: int, status: NDArray[np.int64]) -> None:
            parameters, state = simulation.kernel_arrays()
            decide_replicas(parameters, state, out, choices, words, begin, final, first, last, status)

        simulation.run_parts(part, mask)
        simulation.mark_started(begin)
        self._decision = out
        return out

    def fct_quantiles(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """p50, p90 and p99, float64[R, 3] seconds, of the flows of each masked replica that ended since it began.

        A rejected, failed or unrouted flow counts with the scenario's ``reject_timeout``. 0 where none has ended, and
        in the other replicas.
        """
        from .per_flow_kernel import fct_quantiles

        out = np.zeros((self.num_replicas, 3))
        fct_quantiles(self._simulation.kernel_arrays()[1], mask, out)
        return out

    def ended_fcts(self, replica: int = 0, since: int = 0) -> NDArray[np.float64]:
        """The FCTs, float64[...] seconds, that :meth:`fct_quantiles` counts, from number ``since`` on as flows ended.

        In that order only until :meth:`fct_quantiles` has sorted them.
        """
        state = self._simulation.kernel_arrays()[1]
        fcts: NDArray[np.float64] = state.log[replica, since : state.ri[replica, at.R_LOGGED]]
        return fcts.copy()

    def take_flows(self, replica: int = 0) -> dict[str, NDArray[Any]]:
        """See :meth:`Simulation.take_flows`."""
        return self._simulation.take_flows(replica)

    def open_flows(self, replica: int = 0) -> dict[str, NDArray[Any]]:
        """See :meth:`Simulation.open_flows`."""
        return self._simulation.open_flows(replica)

    def close(self) -> None:
        """Stop the threads; idempotent."""
        self._simulation.close()
