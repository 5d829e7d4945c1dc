"""The batched simulation: arrays, compiled kernel, threads."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import InvalidWeightsError, ResetNeeded, ScenarioError
from ..scenarios import DISPATCH_RULES, model
from ..scenarios import workload as laws
from ..snapshot import IntervalStatistics, Snapshot
from . import layout as at
from .parameters import maglev_table_size, scenario_rows
from .threads import Workers, available_cores
from .tournament import TREE_FROM

logger = logging.getLogger("lbgym")

#: Flow slots per server; fewer where they are many, which find more of what they need in the processor's cache.
_INITIAL_FLOWS, _INITIAL_FLOWS_OF_MANY = 32, 8
_INITIAL_LOG = 256
#: Servers, over all replicas, from which another thread pays.
_SERVERS_PER_THREAD = 128
_MASK64 = (1 << 64) - 1


def _kernel() -> Any:
    """The compiled functions; logs a warning before they are compiled for the first time."""
    from . import kernel

    global _announced
    if not _announced:
        _announced = True
        from ..features.kernel_cache import is_compiled, is_kept

        if not is_compiled(kernel.step_replicas):
            often = "once per machine and version" if is_kept(kernel.step_replicas) else "in every process"
            logger.warning("compiling the simulator (%s; takes about 20 seconds) ...", often)
            started = time.perf_counter()
            _warm_up(kernel)
            logger.warning("compiled in %.0f s", time.perf_counter() - started)
    return kernel


_announced = False


def _warm_up(kernel: Any) -> None:
    scenario = model.Scenario(servers=(model.Server(),), workload=laws.Workload(load=0.5))
    simulation = Simulation(scenario)
    simulation.reset([0])
    simulation.step(np.ones((1, 1, 1)), 0.25)


class Simulation:
    """Replicas of one scenario in struct-of-arrays memory, stepped together.

    R replicas, m balancers, N servers. The flows of a replica (arrival times, demands, hashes) depend on its seed and
    the scenario only, never on weights or dispatch rule; results are the same bit for bit on any number of threads.

    A scenario of fewer servers than N is simulated on the first ones; the others do not exist: they are inactive for
    good, with zero rows, and nothing else differs, bit for bit, from a simulation without them.

    ``copy.deepcopy`` and ``pickle`` give a simulation that continues bit for bit like the original, also in another
    process.

    Args:
        scenario: what to simulate. Replicas may be given others by :meth:`set_scenario`.
        num_replicas: R.
        num_servers: N, room for the largest scenario a replica will be given; None: the scenario's.
        dispatch: overrides the scenario's dispatch rule.
        reservoirs: keep the balancers' samples; without them every feature but ``n_flow_on`` is 0.
        service: keep the FCTs of each interval for ``Snapshot.interval``.
        record_flows: keep every flow that ends, for :meth:`take_flows`.
        num_threads: threads that share the replicas; None: one per core, fewer where there is little to share.
    """

    def __init__(
        self,
        scenario: model.Scenario,
        num_replicas: int = 1,
        *,
        num_servers: int | None = None,
        dispatch: str | None = None,
        reservoirs: bool = True,
        service: bool = True,
        record_flows: bool = False,
        num_threads: int | None = 1,
    ) -> None:
        num_replicas = checks.whole("num_replicas", num_replicas, error=ScenarioError)
        if num_servers is None:
            num_servers = scenario.num_servers
        num_servers = checks.whole("num_servers", num_servers, high=model.MAX_SERVERS, error=ScenarioError)
        if num_threads is None:
            # A thread must be worth waking: about 0.1 ms of work each.
            num_threads = max(1, min(available_cores(), num_replicas * num_servers // _SERVERS_PER_THREAD))
        num_threads = checks.whole("num_threads", num_threads, error=ScenarioError)
        if dispatch is not None:
            checks.choice("dispatch rule", dispatch, DISPATCH_RULES)
        self.scenario = scenario
        self.num_replicas = num_replicas
        self.num_balancers = scenario.balancers
        self.num_servers = num_servers
        self.num_threads = min(num_threads, self.num_replicas)
        count = min(4 * self.num_threads, self.num_replicas)
        bounds = np.linspace(0, self.num_replicas, count + 1).astype(int).tolist()
        self._parts = list(pairwise(bounds))
        self._dispatch = dispatch
        self._reservoirs = checks.boolean("reservoirs", reservoirs, error=ScenarioError)
        self._service = checks.boolean("service", service, error=ScenarioError)
        self._record_flows = checks.boolean("record_flows", record_flows, error=ScenarioError)
        self._scenarios = [scenario] * self.num_replicas
        self._workers = Workers(self.num_threads - 1)
        self._started = np.zeros(self.num_replicas, np.bool_)
        #: Replicas with events of this episode beside those of their scenarios.
        self._inserted: set[int] = set()
        self._pending = np.full(self.num_replicas, at.PAUSED)
        self._all_started = False
        self._output: at.Output | None = None
        self._keep_weights = np.empty((0, self.num_balancers, 1, self.num_servers))
        # Weights and background loads on their way: when they come into force, seconds on the replica's clock, or inf
        # for a free place.
        self._due = np.empty((0, self.num_balancers, 0))
        self._queued = np.empty((0, self.num_balancers, 0, 2, self.num_servers))
        self._reservoir_capacity = scenario.sampling.capacity if self._reservoirs else 0
        self._state = at.allocate_state(
            self.num_replicas,
            self.num_servers,
            self.num_balancers,
            flows=_INITIAL_FLOWS if self.num_servers < TREE_FROM else _INITIAL_FLOWS_OF_MANY,
            reservoir=self._reservoir_capacity,
            maglev=1,
            log=_INITIAL_LOG if self._service else 1,
            record=_INITIAL_LOG if self._record_flows else 1,
        )
        self._parameters = at.allocate_parameters(self.num_replicas, self.num_servers)
        self._table_end = 0
        self.set_scenario(scenario)
        self._kernel = _kernel()

    def __getstate__(self) -> dict[str, Any]:
        # A module is a handle of the process; all else is data, or knows how to be copied.
        return {name: value for name, value in self.__dict__.items() if name != "_kernel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kernel = _kernel()

    @property
    def dispatch(self) -> str:
        """The dispatch rule in force in replica 0."""
        return self._dispatch or self._scenarios[0].dispatch

    def scenario_of(self, replica: int) -> model.Scenario:
        """The scenario a replica runs."""
        return self._scenarios[replica]

    def set_scenario(self, scenario: model.Scenario, mask: NDArray[np.bool_] | None = None) -> None:
        """Give the masked replicas (None: all) another scenario; takes effect with their next ``reset``.

        Raises:
            ScenarioError: if it has more servers than there is room for, another number of balancers, or another
                reservoir capacity.
        """
        chosen = range(self.num_replicas) if mask is None else np.flatnonzero(mask).tolist()
        self.set_scenarios(dict.fromkeys(chosen, scenario))

    def set_scenarios(self, scenarios: Mapping[int, model.Scenario]) -> None:
        """Give some replicas a scenario each; takes effect with their next ``reset``. The others are not touched.

        Raises:
            ScenarioError: as :meth:`set_scenario`; no replica has another scenario then.
        """
        replicas: dict[int, list[int]] = {}
        for r, scenario in scenarios.items():
            replicas.setdefault(id(scenario), []).append(r)
        for chosen in replicas.values():
            self.check(scenarios[chosen[0]])
        for chosen in replicas.values():
            scenario = scenarios[chosen[0]]
            self._write_parameters(scenario, chosen)
            for r in chosen:
                self._scenarios[r] = scenario
                self._started[r] = False
        self._all_started = bool(self._started.all())

    def check(self, scenario: model.Scenario) -> None:
        """Refuse a scenario that does not fit into the arrays.

        Raises:
            ScenarioError: as :meth:`set_scenario`.
        """
        if scenario.num_servers > self.num_servers:
            raise ScenarioError(
                f"scenario {scenario.name!r} has {scenario.num_servers} servers; this simulation has room for "
                f"{self.num_servers}"
            )
        if scenario.balancers != self.num_balancers:
            raise ScenarioError(
                f"scenario {scenario.name!r} has {scenario.balancers} balancers; this simulation was built for "
                f"{self.num_balancers}"
            )
        if self._reservoirs and scenario.sampling.capacity != self._reservoir_capacity:
            raise ScenarioError(
                f"scenario {scenario.name!r} has reservoirs of {scenario.sampling.capacity}; "
                f"this simulation was built for {self._reservoir_capacity}"
            )

    def _write_parameters(self, scenario: model.Scenario, replicas: list[int]) -> None:
        """Put a scenario into the kernel's arrays; what the replicas had before is forgotten."""
        rule = self._dispatch or scenario.dispatch
        if rule == "maglev" and self._state.maglev.shape[2] == 1:
            shape = (self.num_replicas, self.num_balancers, maglev_table_size(self.num_servers))
            self._state = self._state._replace(maglev=np.zeros(shape, np.int32))
        if rule.endswith("whittle"):
            self._widen_tables(at.SCORES_BEYOND_CORES + max(server.usable_cores for server in scenario.servers))
        rows, entries = scenario_rows(scenario, rule, self._reservoirs, self._service, self._record_flows)
        if entries is not None:
            self._parameters.pi[replicas, at.P_TABLE_LENGTH] = 0
            rows["pi"][at.P_TABLE_START] = self._add_to_table(entries)
            rows["pi"][at.P_TABLE_LENGTH] = len(entries)
        self._put(rows, replicas)

    def add_events(self, replica: int, scenario: model.Scenario) -> None:
        """Give a replica, within its episode, a scenario that differs from its own by further events to come alone."""
        self._scenarios[replica] = scenario
        self._put_events(replica)

    def _put_events(self, replica: int) -> None:
        """Write the events of a replica's scenario, and no others."""
        scenario = self._scenarios[replica]
        rule = self._dispatch or scenario.dispatch
        rows, _ = scenario_rows(scenario, rule, self._reservoirs, self._service, self._record_flows)
        self._put({name: rows[name] for name in ("events", "rate_events")}, [replica])

    def _put(self, rows: dict[str, NDArray[Any]], replicas: list[int]) -> None:
        """Write one scenario's rows of parameter arrays, which grow as they need."""
        self._parameters = at.widened(self._parameters, rows)
        where: Any = replicas[0] if len(replicas) == 1 else replicas
        for name, row in rows.items():
            array = getattr(self._parameters, name)
            if row.shape == array.shape[1:]:
                array[where] = row
            else:
                array[where] = at.PADDING.get(name, 0.0)
                array[(where, *(slice(size) for size in row.shape))] = row

    def _add_to_table(self, entries: NDArray[np.float64]) -> int:
        """Copy a trace or measured demands into the table that the replicas share; returns where they begin."""
        pi, table = self._parameters.pi, self._parameters.table
        start = self._table_end
        if start + len(entries) > len(table):
            # What replicas still use moves to the front of a larger table.
            used = pi[:, at.P_TABLE_LENGTH] > 0
            parts = {int(row[at.P_TABLE_START]): int(row[at.P_TABLE_LENGTH]) for row in pi[used]}
            kept = sum(parts.values())
            bigger = np.zeros((2 * (kept + len(entries)), 2))
            start = 0
            moved: dict[int, int] = {}
            for first, length in parts.items():
                bigger[start : start + length] = table[first : first + length]
                moved[first] = start
                start += length
            pi[used, at.P_TABLE_START] = [moved[int(first)] for first in pi[used, at.P_TABLE_START]]
            self._parameters = self._parameters._replace(table=bigger)
            table = bigger
        table[start : start + len(entries)] = entries
        self._table_end = start + len(entries)
        return start

    def reset(self, seeds: Sequence[int], mask: NDArray[np.bool_] | None = None) -> Snapshot:
        """Empty the masked replicas (None: all) and start their flows from ``seeds``, one per replica.

        Returns the batched snapshot, at time 0 for the replicas that were reset; the others' rows are those of the
        snapshot before.
        """
        words = self.seed_words(seeds)
        if mask is None or self._output is None:
            output = at.allocate_output(self.num_replicas, self.num_servers, self.num_balancers)
        else:
            output = at.Output._make([array.copy() for array in self._output])
        if mask is None:
            mask = np.ones(self.num_replicas, np.bool_)
        elif self._output is None:
            for array in output:
                array[...] = 0
        self._reset(output, words, mask)
        return self._snapshot(output)

    def seed_words(self, seeds: Sequence[int]) -> NDArray[np.uint64]:
        """Seeds as the kernel takes them, uint64[R].

        Raises:
            ScenarioError: they are not one per replica.
        """
        if len(seeds) != self.num_replicas:
            raise ScenarioError(f"reset needs {self.num_replicas} seeds, one per replica, got {len(seeds)}")
        return np.array([int(seed) & _MASK64 for seed in seeds], np.uint64)

    def _reset(self, output: at.Output, words: NDArray[np.uint64], mask: NDArray[np.bool_]) -> None:
        for r in [r for r in self._inserted if mask[r]]:
            self._inserted.discard(r)
            self._put_events(r)
        self._kernel.reset_replicas(self._parameters, self._state, output, words, mask)
        if len(self._due):
            self._due[mask] = math.inf
        self._started |= mask
        self._all_started = bool(self._started.all())

    def step(
        self,
        weights: ArrayLike | None,
        duration: float,
        *,
        background: ArrayLike | None = None,
        tables: ArrayLike | None = None,
        delays: NDArray[np.float64] | None = None,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
    ) -> Snapshot:
        """Apply ``weights`` float[R, m, N] (None: keep the present ones), run ``duration`` seconds, observe.

        Args:
            weights: of every balancer; None: the present ones, and those on their way, stay.
            duration: seconds; the statistics of the interval cover all of it, whatever comes into force meanwhile.
            background: float[R, m, N], flows that others are believed to hold at a server, which the rules that count
                flows add to the balancer's own; goes with ``weights``. None: 0.
            tables: float[R, m, N, Q], scores by the balancer's own open flows at a server, for the rule ``table``;
                beyond Q - 1 flows they go on by their last difference, which must not be negative. Only their order
                matters. Goes with ``weights``. None: the present ones; after a reset the scores 0, 1, 2, ...
            delays: float[R, m], seconds from now until the weights come into force, in this step or in a later one;
                those of a balancer that would come into force at the same time or after these are dropped. None: 0.
            seeds: of the replicas that begin again.
            reset: bool[R], the replicas that begin again instead.

        Raises:
            InvalidWeightsError: for a wrong shape, or weights, background loads or tables that are negative or not
                finite.
            ScenarioError: for a bad duration, bad delays, tables with delays or under another rule, or seeds that are
                not one per replica; nothing has happened then.
            ResetNeeded: before the first ``reset``.
        """
        if type(duration) is not float or not 0.0 <= duration < math.inf:
            duration = checks.seconds("duration", duration, low=0.0, error=ScenarioError)
        ready = self._all_started if reset is None else (self._started | reset).all()
        if not ready:
            raise ResetNeeded("call reset() before step(): no flow has been drawn yet, or a step was interrupted")
        checked = self._keep_weights if weights is None else self._action(weights, background, tables)
        words = None if reset is None else self.seed_words(seeds or ())
        if weights is not None:
            if delays is not None:
                if tables is not None:
                    raise ScenarioError("tables of scores come into force at once: give no delays with tables")
                self._queue(checked, delays)
                checked = self._keep_weights
            elif len(self._due):
                self._due[...] = math.inf
        output = at.allocate_output(self.num_replicas, self.num_servers, self.num_balancers)
        self._call(output, checked, duration, None if reset is None else ~reset)
        if reset is not None and words is not None:
            self._reset(output, words, reset)
        return self._snapshot(output)

    def _action(
        self, weights: ArrayLike, background: ArrayLike | None, tables: ArrayLike | None
    ) -> NDArray[np.float64]:
        """The rows that the kernel sets, checked, float64[R, m, rows, N]: weights, background loads, table columns."""
        checked = self._checked("weights", weights)
        if background is None and tables is None:
            return checked[:, :, None]
        others = np.zeros_like(checked) if background is None else self._checked("background loads", background)
        rows = np.stack([checked, others], axis=2)
        return rows if tables is None else np.concatenate([rows, self._table_rows(tables)], axis=2)

    def _checked(self, what: str, values: ArrayLike, columns: tuple[int, ...] = ()) -> NDArray[np.float64]:
        array = np.ascontiguousarray(values, np.float64)
        shape = (self.num_replicas, self.num_balancers, self.num_servers, *columns)
        if array.shape != shape:
            raise InvalidWeightsError(
                f"{what} must have shape {shape} (replicas, balancers, servers{', scores' if columns else ''}), "
                f"got {array.shape}"
            )
        # min and max are cheaper than isfinite().all(), and a NaN fails either comparison.
        if not (array.min() >= 0.0 and array.max() < math.inf):
            raise InvalidWeightsError(f"{what} must be finite and at least 0, got {_first_bad(array)!r}")
        return array

    def _table_rows(self, tables: ArrayLike) -> NDArray[np.float64]:
        """Tables as the kernel takes them, float64[R, m, Q, N], as wide as those in force, which grow if need be."""
        if "table" not in {self._dispatch or scenario.dispatch for scenario in self._scenarios}:
            raise ScenarioError(f"tables of scores need the dispatch rule 'table', got {self.dispatch!r}")
        given = np.shape(tables)
        if len(given) != 4 or given[3] < at.NUM_SCORES:
            raise InvalidWeightsError(
                f"tables must have shape (replicas, balancers, servers, scores) with at least {at.NUM_SCORES} scores, "
                f"got {given}"
            )
        array = self._checked("tables", tables, (given[3],))
        falling = array[..., -1] < array[..., -2]
        if falling.any():
            raise InvalidWeightsError(
                "tables must not fall at their end, where they go on by their last difference, got "
                f"{array[falling][0, -2:].tolist()}"
            )
        self._widen_tables(given[3])
        return np.moveaxis(_continued(array, self._state.bf.shape[3] - at.NUM_BF), 3, 2)

    def _widen_tables(self, columns: int) -> None:
        """Make room for so many scores; those in force go on by their last difference."""
        if self._state.bf.shape[3] - at.NUM_BF < columns:
            head, scores = np.split(self._state.bf, [at.NUM_BF], axis=3)
            self._state = self._state._replace(bf=np.concatenate([head, _continued(scores, columns)], axis=3))

    def _queue(self, rows: NDArray[np.float64], delays: NDArray[np.float64]) -> None:
        """Let weights come into force later, in the place of all that would do so after them."""
        if delays.shape != rows.shape[:2]:
            raise ScenarioError(
                f"delays must have shape {rows.shape[:2]} (replicas, balancers), got shape {delays.shape}"
            )
        if not (delays.min() >= 0.0 and delays.max() < math.inf):
            raise ScenarioError(f"delays must be finite and at least 0 seconds, got {_first_bad(delays)!r}")
        r, m = delays.shape
        when = self._state.rf[:, at.R_CLOCK, None] + delays
        if not len(self._due):
            self._due = np.full((r, m, 1), math.inf)
            self._queued = np.zeros((r, m, 1, 2, self.num_servers))
        self._due[self._due >= when[..., None]] = math.inf
        free = np.isinf(self._due)
        if not free.any(axis=-1).all():
            self._due = np.concatenate([self._due, np.full((r, m, 1), math.inf)], axis=-1)
            self._queued = np.concatenate([self._queued, np.zeros((r, m, 1, 2, self.num_servers))], axis=2)
            free = np.isinf(self._due)
        place = free.argmax(axis=-1)[..., None]
        np.put_along_axis(self._due, place, when[..., None], axis=-1)
        if rows.shape[2] == 1:
            rows = np.concatenate([rows, np.zeros_like(rows)], axis=2)
        np.put_along_axis(self._queued, place[..., None, None], rows[:, :, None], axis=2)

    def weights_in_force(self) -> NDArray[np.float64]:
        """The weights that the balancers place flows by now, float64[R, m, N]."""
        return self._state.bf[..., at.B_WEIGHT].copy()

    def background_in_force(self) -> NDArray[np.float64]:
        """The background loads that the balancers place flows by now, float64[R, m, N]."""
        return self._state.bf[..., at.B_BACKGROUND].copy()

    def observe(self) -> Snapshot:
        """A snapshot of this instant; begins a new interval."""
        return self.step(None, 0.0)

    def _call(
        self, output: at.Output, weights: NDArray[np.float64], duration: float, mask: NDArray[np.bool_] | None
    ) -> None:
        """One interval of the masked replicas."""
        step = self._kernel.step_replicas

        def part(first: int, last: int, status: NDArray[np.int64]) -> None:
            step(
                self._parameters, self._state, output, weights, self._due, self._queued, duration, first, last, status
            )  # fmt: skip

        self.run_parts(part, mask)

    # What a loop of another module over the same kernel needs (FlowSimulation); nobody outside the package.

    def kernel_arrays(self) -> tuple[at.Parameters, at.State]:
        """The kernel's arrays as they are now: look them up in every call, as they are replaced when they grow."""
        return self._parameters, self._state

    def have_started(self, others: NDArray[np.bool_]) -> bool:
        """True if every replica but ``others`` has drawn its first flow."""
        return self._all_started or bool((self._started | others).all())

    def mark_started(self, mask: NDArray[np.bool_]) -> None:
        """The masked replicas have drawn their first flow."""
        if not self._all_started:
            self._started |= mask
            self._all_started = bool(self._started.all())

    def run_parts(
        self, part: Callable[[int, int, NDArray[np.int64]], None], mask: NDArray[np.bool_] | None = None
    ) -> None:
        """Call ``part(first, last, status)`` of the kernel on all threads, until the masked replicas are done.

        Arrays grow as it asks by ``status``; it must look them up anew in every call. An exception on the way, such as
        KeyboardInterrupt, leaves intervals half simulated: every replica must be reset then.
        """
        status = self._pending.copy()
        if mask is not None:
            status[~mask] = at.DONE
        try:
            while True:
                self._run_once(part, status)
                if not status.any():
                    return
                if (status == at.GROW_FLOWS).any():
                    self._state = at.grown(self._state, flows=2 * self._state.heap.shape[2])
                if (status == at.GROW_LOG).any():
                    self._grow_logs()
                status[status != at.DONE] = at.PAUSED
        except BaseException:
            self._started[:] = self._all_started = False
            raise

    def _run_once(self, part: Callable[[int, int, NDArray[np.int64]], None], status: NDArray[np.int64]) -> None:
        if self.num_threads == 1:
            part(0, self.num_replicas, status)
            return
        # Whoever is free takes the next part, so that a core that is busy elsewhere does not hold up the rest.
        parts = iter(self._parts)

        def work() -> None:
            for first, last in parts:
                part(first, last, status)

        self._workers.run(work)

    def _grow_logs(self) -> None:
        open_flows = self._state.ri[:, at.R_OPEN]
        sizes: dict[str, int] = {}
        for name, column, used in (
            ("log", at.R_LOGGED, self._service),
            ("record", at.R_RECORDED, self._record_flows),
        ):
            if used:
                needed = int((self._state.ri[:, column] + open_flows).max()) + 2
                have = getattr(self._state, name).shape[1]
                if needed > have:
                    sizes[name] = max(2 * have, needed)
        self._state = at.grown(self._state, **sizes)

    def _snapshot(self, output: at.Output) -> Snapshot:
        self._output = output
        started, completed, rejected, failed = output.counts
        return Snapshot(
            sequence_id=output.sequence_id,
            timestamp=output.timestamp,
            active=output.active,
            stats=output.stats,
            ground_truth=output.ground_truth,
            started=started,
            completed=completed,
            rejected=rejected,
            failed=failed,
            unrouted=output.unrouted,
            interval=IntervalStatistics(output.service) if self._service else None,
        )

    def take_flows(self, replica: int = 0) -> dict[str, NDArray[Any]]:
        """The flows of a replica that ended since the last call, in the order in which they are known to have ended.

        Keys: ``flow_id`` int64 (order of arrival from 0), ``arrival``, ``fct`` (``reject_timeout`` unless completed),
        ``demand`` float64, ``server`` int64 (-1: none was active), ``balancer`` int64, ``status`` int64 (0 completed,
        1 rejected, 2 failed, 3 unrouted).

        Raises:
            ScenarioError: if the simulation does not record flows.
        """
        if not self._record_flows:
            raise ScenarioError("this simulation records no flows; build it with record_flows=True")
        count = int(self._state.ri[replica, at.R_RECORDED])
        rows = self._state.record[replica, :count]
        self._state.ri[replica, at.R_RECORDED] = 0
        names = ("flow_id", "arrival", "fct", "demand", "server", "balancer", "status")
        whole = {"flow_id", "server", "balancer", "status"}
        return {name: rows[:, i].astype(np.int64 if name in whole else np.float64) for i, name in enumerate(names)}

    def open_flows(self, replica: int = 0) -> dict[str, NDArray[Any]]:
        """The flows of a replica that have not ended: flow_id, arrival, demand, server, balancer."""
        state = self._state
        parts: list[tuple[int, NDArray[Any]]] = []
        for j in range(self.num_servers):
            served = int(state.si[replica, j, at.S_SERVED])
            waiting = int(state.si[replica, j, at.S_WAITING])
            head = int(state.si[replica, j, at.S_WAIT_HEAD])
            ring = (head + np.arange(waiting)) % state.heap.shape[2]
            flows = state.flow_i[replica, j]
            parts.append((j, np.concatenate([flows[:served, at.F_HEAP], flows[ring, at.F_WAIT]])))
        rows = np.concatenate([state.flow_f[replica, j, slots] for j, slots in parts])
        return {
            "flow_id": rows[:, at.F_ID].astype(np.int64),
            "arrival": rows[:, at.F_ARRIVAL].copy(),
            "demand": rows[:, at.F_DEMAND].copy(),
            "server": np.concatenate([np.full(len(slots), j) for j, slots in parts]),
            "balancer": np.concatenate(
                [state.flow_i[replica, j, slots, at.F_BALANCER].astype(np.int64) for j, slots in parts]
            ),
        }

    def server_status(self, replica: int = 0) -> NDArray[np.int64]:
        """Status of a replica's servers, int64[N]: ``layout.UP``, ``DRAINING`` or ``DOWN``."""
        return self._state.si[replica, :, at.S_STATUS].astype(np.int64)

    def drain(self, server: int, replica: int = 0) -> None:
        """Send a server of a replica no new flows from now on, until its next ``reset``; it finishes those it has."""
        self._happens(replica, at.EVENT_DRAIN, server)

    def undrain(self, server: int, replica: int = 0) -> None:
        """Send a server of a replica flows again from now on."""
        self._happens(replica, at.EVENT_UP, server)

    def _happens(self, replica: int, kind: int, server: int) -> None:
        """Insert an event before those of the scenario that are still to come."""
        events = self._parameters.events
        following = int(self._state.ri[replica, at.R_EVENT])
        now = self._state.rf[replica, at.R_TARGET]
        row = np.insert(events[replica], following, [now, kind, server, 0.0], axis=0)
        wider = np.full((len(events), len(row), events.shape[2]), math.inf)
        wider[:, :-1] = events
        wider[replica] = row
        self._parameters = self._parameters._replace(events=wider)
        self._inserted.add(replica)

    def integrals(self) -> dict[str, NDArray[Any]]:
        """Exact integrals since reset, per replica and server [R, N], and the clocks [R].

        ``queue``: of flows in the server over time; ``busy``: of busy cores; ``work``: core-seconds served;
        ``fct_sum``: over completed flows; ``lost_time``: spent in the server by flows that failed; ``age_sum``: of
        open flows; ``open``: how many. By Little's law queue = fct_sum + lost_time + age_sum.
        """
        sf = self._state.sf
        clock = self._state.rf[:, at.R_CLOCK].copy()
        age = np.zeros((self.num_replicas, self.num_servers))
        for r in range(self.num_replicas):
            flows = self.open_flows(r)
            np.add.at(age[r], flows["server"], clock[r] - flows["arrival"])
        return {
            "queue": sf[..., at.S_QUEUE_INTEGRAL].copy(),
            "busy": sf[..., at.S_BUSY_INTEGRAL].copy(),
            "work": sf[..., at.S_WORK_DONE].copy(),
            "fct_sum": sf[..., at.S_FCT_SUM].copy(),
            "lost_time": sf[..., at.S_LOST_TIME].copy(),
            "age_sum": age,
            "open": self._state.si[..., at.S_SERVED] + self._state.si[..., at.S_WAITING],
            "clock": clock,
        }

    def close(self) -> None:
        """Stop the threads; idempotent."""
        self._workers.close()


def _first_bad(weights: NDArray[np.float64]) -> float:
    bad = weights[~((weights >= 0.0) & (weights < math.inf))]
    return float(bad[0])


def _continued(scores: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Tables of scores [..., Q] with at least so many columns, by their last difference."""
    more = columns - scores.shape[-1]
    if more <= 0:
        return scores
    last = scores[..., -1:]
    step = last - scores[..., -2:-1]
    return np.concatenate([scores, last + step * np.arange(1, more + 1)], axis=-1)
