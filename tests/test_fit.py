"""Scenarios from recordings: what was simulated is what is estimated."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lbgym.drivers.proxy.source import TIMES
from lbgym.drivers.proxy.times import FctStatistics, FlowTimes
from lbgym.errors import InvalidOptionError, RecordingError, UnknownNameError
from lbgym.features.reservoir_kernel import RNG
from lbgym.recording import Recording, load_recording, record
from lbgym.recording.fit import Fit, fit_recording
from lbgym.recording.fit.cluster import throughput
from lbgym.recording.fit.counts import Counts
from lbgym.recording.fit.demand import KINDS
from lbgym.recording.fit.replay import quantiles
from lbgym.scenarios import (
    BoundedPareto,
    Demand,
    Deterministic,
    Empirical,
    Exponential,
    Lognormal,
    ModulatedPoisson,
    Poisson,
    Scenario,
    Server,
    Workload,
    from_toml,
    load_scenario,
)
from lbgym.simulator import Simulation
from tests.drivers.emulated import emulator
from tests.recordings import record_at_full_speed
from tests.sharedmemory.conftest import shm_dir

pytest.importorskip("pyarrow")

__all__ = ["shm_dir"]

SERVERS = (Server(cores=1), Server(cores=2, speed=0.5), Server(cores=2, speed=2.0), Server(cores=4, weight=3.0))
#: Speeds if that of the mean core is 1.
RELATIVE = np.array([1.0, 0.5, 2.0, 1.0]) * 9.0 / 10.0
TRUTH = Scenario(servers=SERVERS, workload=Workload(load=0.7, demand=Lognormal(mean=0.25, cv=1.5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def ten_minutes(folder: Path) -> Recording:
    return record_at_full_speed(TRUTH, folder / "ten-minutes.parquet", 600.0)


@pytest.fixture(scope="module")
def fitted(ten_minutes: Recording) -> Fit:
    return fit_recording(ten_minutes)


def test_ten_minutes_at_load_0_7_are_enough(fitted: Fit) -> None:
    assert [server.cores for server in fitted.servers] == [1, 2, 2, 4] and fitted.cores_from == "estimated"
    speeds = np.array([server.speed for server in fitted.servers])
    assert np.abs(speeds / RELATIVE - 1.0).max() < 0.1
    # A 95 % interval is missed now and then, but not by much, and a wide one would be of no use.
    low, high = (np.array([getattr(server, f"speed_{end}") for server in fitted.servers]) for end in ("low", "high"))
    assert ((low < RELATIVE * 1.05) & (high > RELATIVE * 0.95) & (low < speeds) & (speeds < high)).all()
    assert (high / low < 1.25).all()
    law = fitted.demand.law
    assert isinstance(law, Lognormal) and 1.1 < law.cv < 2.0
    assert law.mean == pytest.approx(0.225, rel=0.1)
    assert isinstance(fitted.arrivals.process, Poisson)
    assert fitted.arrivals.rate_low < TRUTH.rate < fitted.arrivals.rate_high
    assert fitted.arrivals.dispersion[1.0] == pytest.approx(1.0, abs=0.3)
    assert fitted.dispatch is not None and fitted.dispatch.rule == "sed"
    assert fitted.overhead == 0.0
    assert fitted.scenario.load == pytest.approx(0.7, rel=0.1)
    # What an operator has configured is kept where it is not the cores.
    assert [server.weight for server in fitted.scenario.servers] == [None] * 4
    assert not fitted.warnings


def test_the_twin_predicts_what_it_was_not_fitted_to(fitted: Fit) -> None:
    assert fitted.seconds == pytest.approx(450.0, abs=0.2) and fitted.held_out_seconds == pytest.approx(150.0, abs=0.2)
    rows = {(row.server, row.measure): row for row in fitted.held_out}
    assert set(rows) == {
        (server, measure)
        for server in ("server-0", "server-1", "server-2", "server-3", "all")
        for measure in ("fct_mean", "fct_p90", "open_flows", "share")
    } - {("all", "share")}
    assert abs(rows["all", "fct_mean"].error) < 0.15
    assert abs(rows["all", "open_flows"].error) < 0.15
    for row in rows.values():
        assert row.low <= row.predicted <= row.high
        assert abs(row.error) < 0.4, row


def test_the_file_is_the_scenario(fitted: Fit, tmp_path: Path) -> None:
    fitted.save(tmp_path / "twin.toml")
    assert load_scenario(tmp_path / "twin.toml") == fitted.scenario
    text = (tmp_path / "twin.toml").read_text()
    assert "the mean core of the cluster has speed 1" in text and "server-2: 2 cores (estimated)" in text


def test_the_mean_demand_may_be_the_convention(ten_minutes: Recording) -> None:
    fit = fit_recording(
        ten_minutes, mean_demand=0.25, cores="weights", dispatch="sed", demand="lognormal", hold_out=0.0
    )
    truth = np.array([1.0, 0.5, 2.0, 1.0])
    assert np.abs(np.array([server.speed for server in fit.servers]) / truth - 1.0).max() < 0.1
    assert fit.scenario.workload.mean_demand == 0.25 and fit.held_out == () and fit.dispatch is None
    assert fit.cores_from == "given"


def test_bursts_weights_in_proportion_and_moving_weights(folder: Path) -> None:
    bursts = ModulatedPoisson(levels=(0.4, 1.6), sojourns=(8.0, 8.0))
    truth = Scenario(
        servers=SERVERS,
        dispatch="wcmp",
        workload=Workload(load=0.5, demand=Exponential(mean=0.25), arrivals=bursts),
    )

    def weights(time: float) -> np.ndarray:
        return np.array([1.0, 1.0, 4.0 if time % 20.0 < 10.0 else 3.0, 3.0])

    recording = record_at_full_speed(truth, folder / "bursts.parquet", 400.0, weights=weights)
    fit = fit_recording(recording, cores=[1, 2, 2, 4])
    assert np.abs(np.array([server.speed for server in fit.servers]) / RELATIVE - 1.0).max() < 0.1
    assert fit.dispatch is not None and fit.dispatch.rule == "wcmp"
    assert isinstance(fit.demand.law, Exponential)
    process = fit.arrivals.process
    assert isinstance(process, ModulatedPoisson) and process.levels == pytest.approx((0.4, 1.6), rel=0.3)
    assert min(process.sojourns) > 3.0 and max(process.sojourns) < 20.0
    assert fit.arrivals.dispersion[5.0] > 5.0
    shares = {row.server: row for row in fit.held_out if row.measure == "share"}
    assert all(abs(row.error) < 0.1 for row in shares.values())


def test_deterministic_demands(folder: Path) -> None:
    truth = Scenario(servers=SERVERS[:2], workload=Workload(load=0.6, demand=Deterministic(mean=0.25)))
    fit = fit_recording(record_at_full_speed(truth, folder / "constant.parquet", 200.0), cores=[1, 2], hold_out=0.0)
    assert isinstance(fit.demand.law, Deterministic)
    assert fit.demand.errors["deterministic"] < fit.demand.errors["exponential"]


#: Most flows are small and nearly alike, one in ten is sixteen times as large.
TWO_KINDS = Empirical(values=(*np.linspace(0.04, 0.06, 90).tolist(), *np.linspace(0.75, 0.85, 10).tolist()))


@pytest.mark.parametrize(
    "demand", [TWO_KINDS, BoundedPareto(alpha=1.3, minimum=0.05, maximum=20.0)], ids=["two kinds", "heavy tail"]
)
def test_demands_of_no_known_form(demand: Demand, folder: Path) -> None:
    truth = Scenario(servers=SERVERS[:3], workload=Workload(load=0.7, demand=demand))
    recording = record_at_full_speed(truth, folder / "odd.parquet", 240.0, interval=0.05)
    fit = fit_recording(recording, cores=[1, 2, 2], mean_demand=demand.mean, hold_out=0.2)
    found, likely = fit.demand, fit.demand.likelihoods
    assert found.singles > 500 and set(likely) == set(KINDS)
    if demand is TWO_KINDS:
        assert isinstance(found.law, Empirical)
        assert likely["empirical"] > max(value for kind, value in likely.items() if kind != "empirical") + 0.5
        # A power of ten lies between the two kinds, and nearly nothing there.
        small = np.mean(np.array(found.law.values) < 0.2)
        assert small == pytest.approx(0.9, abs=0.03)
    assert from_toml(fit.to_toml()).workload.demand == found.law
    normal = np.random.default_rng(0).standard_normal(200_000)
    ours, theirs = (np.quantile(quantiles(law, normal), [0.25, 0.5, 0.75, 0.95, 0.99]) for law in (found.law, demand))
    assert np.abs(np.log(ours / theirs)).max() < 0.4
    assert found.law.mean == pytest.approx(demand.mean, rel=1e-3)
    (error,) = (row.error for row in fit.held_out if (row.server, row.measure) == ("all", "fct_mean"))
    assert abs(error) < 0.3


def test_an_empirical_law_is_refused_without_single_flows(folder: Path) -> None:
    truth = Scenario(servers=SERVERS[:2], workload=Workload(load=0.6, demand=Exponential(mean=0.02)))
    recording = record_at_full_speed(truth, folder / "many.parquet", 30.0, interval=0.25)
    with pytest.raises(
        RecordingError, match=r"shows the FCTs of \d+ single flows, those that ended alone .* needs 400"
    ):
        fit_recording(recording, cores=[1, 2], demand="empirical")


def test_throughput_is_that_of_mean_value_analysis() -> None:
    # Reiser and Lavenberg's recursion for a delay and one queue.
    for delay in (0.0, 0.3, 2.0):
        queue, rates = 0.0, [0.0]
        for n in range(1, 40):
            response = 1.0 + queue
            rates.append(n / (delay + response))
            queue = rates[-1] * response
        assert throughput(1, delay, 40) == pytest.approx(np.array(rates), rel=1e-9)
    assert throughput(4, 0.0, 9).tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]


def delayed(
    overhead: float,
    seconds: float = 400.0,
    interval: float = 0.1,
    rate: float = 4.0,
    demand: Demand | None = None,
    resolution: float | None = None,
) -> Recording:
    """A recording of a simulation whose every flow ends ``overhead`` seconds later than at its server.

    FCTs are logged as by a proxy, rounded down to ``resolution``; None: they are not measured.
    """
    truth = Scenario(
        servers=(Server(cores=1), Server(cores=2)),
        dispatch="ecmp",
        workload=Workload(rate=rate, demand=demand or Exponential(mean=0.3)),
    )
    simulation = Simulation(truth, record_flows=True)
    simulation.reset([1])
    simulation.step(None, seconds + 100.0)
    flows = simulation.take_flows()
    order = np.argsort(flows["arrival"])
    arrival, end, server = flows["arrival"][order], (flows["arrival"] + flows["fct"])[order] + overhead, flows["server"]
    server = server[order]
    times = np.arange(1, round(seconds / interval) + 1) * interval

    def count(instants: np.ndarray) -> np.ndarray:
        return np.stack(
            [np.searchsorted(np.sort(instants[server == j]), times, side="right") for j in range(2)], axis=1
        )

    k, zeros = len(times), np.zeros((len(times), 2), np.int64)
    started, completed = count(arrival), count(end)
    stats = np.zeros((k, 2, 11), np.float32)
    stats[..., 0] = started - completed
    ones, row = np.ones((k, 2)), np.zeros(k, np.int64)
    fct_count, fct_sum, real = row.copy(), row.copy(), ["n_flow_on"]
    if resolution is not None:
        real += TIMES
        log = FctStatistics()
        log._grow(2)
        log._meta[:, RNG] = 1, 2
        last = np.argsort(end)
        fct = np.floor((end - arrival) / resolution + 1e-9) * resolution
        for i, ended in enumerate(np.split(last, np.searchsorted(end[last], times, side="right"))[:k]):
            names = [str(j) for j in server[ended]]
            log.add(FlowTimes(names, fct[ended].tolist(), end[ended].tolist()), {"0": 0, "1": 1})
            fct_count[i], fct_sum[i] = log.count, round(1e9 * log.sum)
            stats[i, :, 1:6] = log.statistics(2)
    return Recording(
        metadata={
            "region": "made",
            "interval": None,
            "producers": [{"instance": 0, "publish_interval": interval, "real_features": real, "names": {}}],
        },
        instance=row, sequence_id=np.arange(1, k + 1), missed=row, timestamp=times,
        published_at=row, applied_sequence_id=row - 1, applied_at=row - 1, safe=row == 0, num_servers=row + 2,
        names_version=row, unrouted=row, fct_count=fct_count, fct_sum=fct_sum, active=ones > 0, stats=stats,
        states=zeros.astype(np.uint8), ground_truth=None, ground_truth_age=ones * np.nan, started=started,
        completed=completed, rejected=zeros, failed=zeros, weights=ones, safe_weights=ones,
    )  # fmt: skip


@pytest.mark.parametrize(
    "demand",
    [Exponential(mean=0.1), Lognormal(mean=0.1, cv=0.5), Deterministic(mean=0.1)],
    ids=lambda law: type(law).__name__.lower(),
)
def test_what_a_proxy_logs_keeps_the_form_of_the_law(demand: Demand) -> None:
    """Some time for every connection, and whole milliseconds: an empirical law has both, and is still not taken."""
    recording = delayed(0.008, seconds=300.0, interval=0.05, rate=8.0, demand=demand, resolution=1e-3)
    fit = fit_recording(recording, cores=[1, 2], dispatch="ecmp", hold_out=0.0)
    assert fit.demand.singles > 1000 and set(fit.demand.likelihoods) == set(KINDS)
    assert type(fit.demand.law) is type(demand)


@pytest.mark.parametrize("overhead", [0.0, 0.2])
def test_time_outside_the_servers_is_told_from_service(overhead: float) -> None:
    recording = delayed(overhead, seconds=1200.0)
    fit = fit_recording(recording, cores=[1, 2], mean_demand=0.3, dispatch="ecmp")
    if overhead:
        assert fit.overhead_low < overhead < fit.overhead_high and fit.overhead == pytest.approx(overhead, rel=0.25)
    else:
        assert fit.overhead == 0.0 and fit.overhead_high < 0.1
    assert [server.speed for server in fit.servers] == pytest.approx([1.0, 1.0], rel=0.1)
    # No FCT is measured there, so that its law cannot be seen.
    assert isinstance(fit.demand.law, Exponential) and len(fit.warnings) == 1
    assert "law of demands cannot be estimated" in fit.warnings[0]
    found = {row.server: row for row in fit.held_out if row.measure == "fct_mean"}
    assert abs(found["all"].error) < 0.25
    assert all(np.isnan(row.recorded) for row in fit.held_out if row.measure == "fct_p90")


def test_a_server_that_slows_down_is_named(folder: Path) -> None:
    from lbgym.scenarios import Event

    truth = replace(TRUTH.with_changes(load=0.4), events=(Event(time=150.0, kind="speed", server=2, value=0.5),))
    fit = fit_recording(record_at_full_speed(truth, folder / "slower.parquet", 300.0), hold_out=0.0)
    changed = [text for text in fit.warnings if "changed its speed" in text]
    assert len(changed) == 1 and changed[0].startswith("server-2 ")
    assert float(re.findall(r"[\d.]+ times", changed[0])[0].split()[0]) == pytest.approx(0.5, rel=0.2)


def test_rows_that_are_too_rare_cannot_show_cores(ten_minutes: Recording) -> None:
    # As `lbgym shm record --sample-interval 1` would have it: one row of ten.
    rows = np.arange(0, len(ten_minutes), 10)
    values = {
        name: value[rows] if isinstance(value, np.ndarray) else value
        for name, value in vars(ten_minutes).items()
        if name in Recording.__dataclass_fields__
    }
    rare = replace(Recording(**values), metadata=ten_minutes.metadata | {"interval": 1.0})
    fit = fit_recording(rare, hold_out=0.0)
    assert "cores cannot be told from speed; assumed 1, 2, 2, 4" in fit.warnings[0]
    assert np.abs(np.array([server.speed for server in fit.servers]) / RELATIVE - 1.0).max() < 0.15


def test_what_cannot_be_fitted_is_refused(ten_minutes: Recording) -> None:
    with pytest.raises(RecordingError, match="needs 10 s"):
        fit_recording(delayed(0.0, seconds=5.0))
    with pytest.raises(RecordingError, match=r"server \d completed \d flows in the part .* needs at least 10"):
        fit_recording(delayed(0.0, seconds=14.0, rate=1.0), hold_out=0.2)
    with pytest.raises(InvalidOptionError, match="cores must be 4 numbers, one per server, got 2"):
        fit_recording(ten_minutes, cores=[1, 2])
    with pytest.raises(InvalidOptionError, match=r"safe weights 1, 2, 2, 3\.5 are no numbers of cores"):
        fit_recording(replace(ten_minutes, safe_weights=ten_minutes.safe_weights - [0, 0, 0, 0.5]), cores="weights")
    with pytest.raises(UnknownNameError, match="dispatch rule"):
        fit_recording(ten_minutes, dispatch="sedd")
    with pytest.raises(InvalidOptionError, match="hold_out"):
        fit_recording(ten_minutes, hold_out=1.0)
    with pytest.raises(RecordingError, match="contradict each other"):
        Counts.of(replace(ten_minutes, completed=ten_minutes.completed[::-1].copy()))


def test_gaps_are_left_out(ten_minutes: Recording) -> None:
    missed = ten_minutes.missed.copy()
    missed[1000:1010] = 1
    counts = Counts.of(replace(ten_minutes, missed=missed))
    assert len(counts) == len(ten_minutes) - 1 - 10
    assert counts.duration == pytest.approx(599.9 - 1.0)


def lbgym(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from lbgym.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    text = capsys.readouterr()
    return int(ended.value.code or 0), text.out, text.err


def test_on_the_command_line(
    ten_minutes: Recording, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "twin.toml"
    code, text, _ = lbgym(
        capsys, "fit", folder / "ten-minutes.parquet", "--out", twin, "--cores", "1,2,2,4", "--demand", "lognormal"
    )
    assert code == 0 and f"wrote {twin}" in text.replace("\n", "")
    for part in ("server-3", "95 % interval", "Lognormal", "Poisson", "sed", "Held out 150 s", "mean FCT, s"):
        assert part in text
    scenario = load_scenario(twin)
    assert scenario.name == "twin"
    code, text, _ = lbgym(
        capsys, "compare", "-s", twin, "-p", "sed,wcmp", "--seeds", 1, "--duration", 3, "--processes", 1, "--json"
    )
    assert code == 0 and json.loads(text)["scenario"]["name"] == "twin"
    code, _, err = lbgym(capsys, "fit", tmp_path / "none.parquet")
    assert code == 2 and "there is no recording" in err
    code, _, err = lbgym(capsys, "fit", folder / "ten-minutes.parquet", "--cores", "two")
    assert code == 2 and "--cores takes whole numbers" in err


@pytest.fixture(scope="module")
def emulated(folder: Path) -> Iterator[Path]:
    """A recording of an emulator in a process of its own."""
    scenario = folder / "truth.toml"
    from lbgym.scenarios import to_toml

    scenario.write_text(to_toml(TRUTH))
    name = f"real-{os.getpid()}"
    with emulator("--name", name, "--scenario", scenario, "--speedup", 40, "--publish-interval", 0.25, "--seed", 1):
        record(name, folder / "real.parquet", steps=600, duration=60.0)
    yield folder / "real.parquet"


def test_a_real_emulator(emulated: Path) -> None:
    recording = load_recording(emulated)
    fit = fit_recording(recording, cores="weights", hold_out=0.0)
    assert np.abs(np.array([server.speed for server in fit.servers]) / RELATIVE - 1.0).max() < 0.2
