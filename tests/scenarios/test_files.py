"""Scenarios as TOML: what is read, what is refused and where the refusal points."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.errors import LbgymError, ScenarioError, TraceError, UnknownNameError
from lbgym.scenarios import (
    BoundedPareto,
    Event,
    Exponential,
    OnOff,
    Poisson,
    Sampling,
    Scenario,
    Server,
    Workload,
    from_toml,
    load_scenario,
    named_scenario,
    read_scenario,
    read_trace,
    scenario_names,
    to_toml,
)

from .strategies import scenarios

FULL = """
name = "mine"
description = "two kinds of server"
balancers = 2
dispatch = "p2c"
reject_timeout = 10
duration = 30.0

[[servers]]
count = 2
cores = 2

[[servers]]
cores = 4
speed = 1.5
workers = 32
backlog = 128

[workload]
load = 0.7
arrivals = { kind = "on_off", on = 1.0, off = 3, random = true }
demand = { kind = "bounded_pareto", alpha = 1.5, minimum = 0.01, maximum = 5.0 }

[[events]]
time = 20
kind = "up"
server = 0

[[events]]
time = 10
kind = "down"
server = 0

[[events]]
time = 5
kind = "rate"
value = 1.5

[sampling]
capacity = 64
algorithm = "uniform"
"""
MINIMAL = "[[servers]]\n[workload]\nload = 0.5\n"


def test_a_full_file_gives_the_scenario_it_describes() -> None:
    assert from_toml(FULL) == Scenario(
        name="mine",
        description="two kinds of server",
        balancers=2,
        dispatch="p2c",
        reject_timeout=10.0,
        duration=30.0,
        servers=(Server(cores=2), Server(cores=2), Server(cores=4, speed=1.5, workers=32, backlog=128)),
        workload=Workload(
            load=0.7,
            arrivals=OnOff(on=1.0, off=3.0, random=True),
            demand=BoundedPareto(alpha=1.5, minimum=0.01, maximum=5.0),
        ),
        events=(
            Event(time=5, kind="rate", value=1.5),
            Event(time=10, kind="down", server=0),
            Event(time=20, kind="up", server=0),
        ),
        sampling=Sampling(capacity=64, algorithm="uniform"),
    )


def test_a_minimal_file_has_the_defaults_and_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(MINIMAL)
    scenario = load_scenario(tmp_path / "small.toml")
    assert scenario == Scenario(name="small", servers=(Server(),), workload=Workload(load=0.5))
    assert load_scenario(str(tmp_path / "small.toml")) == scenario
    assert read_scenario(tmp_path / "small.toml") == scenario
    assert scenario.workload.arrivals == Poisson()


def test_windows_line_ends_and_a_byte_order_mark_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "dos.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_scenario(tmp_path / "dos.toml").load == pytest.approx(0.5)


# Base


def test_a_base_is_changed_where_the_file_says_so() -> None:
    base = named_scenario("heterogeneous")
    scenario = from_toml('base = "heterogeneous"\ndispatch = "lsq"\n[sampling]\ndecay = 0.5\n[workload]\nrate = 99\n')
    assert scenario.servers == base.servers
    assert scenario.dispatch == "lsq"
    assert scenario.sampling == Sampling(decay=0.5)
    assert scenario.workload == Workload(rate=99, demand=base.workload.demand)
    assert scenario.name == "custom"
    assert scenario.description == "The scenario 'heterogeneous' with changes."


def test_a_base_keeps_its_load_when_only_the_demand_changes() -> None:
    scenario = from_toml('base = "uniform"\n[workload]\ndemand = { kind = "exponential", mean = 0.4 }\n')
    assert scenario.workload == Workload(load=0.8, demand=Exponential(mean=0.4))


def test_servers_and_events_replace_those_of_the_base() -> None:
    with pytest.raises(ScenarioError, match=r"event at 35.0 s names server 1; allowed: 0 to 0"):
        from_toml('base = "failure"\n[[servers]]\n')
    scenario = from_toml('base = "failure"\nevents = []\n[[servers]]\ncount = 2\n')
    assert (scenario.num_servers, scenario.events) == (2, ())


def test_synthetic_demand_takes_the_place_of_the_trace_of_a_base() -> None:
    scenario = from_toml('base = "sample-trace"\n[workload]\ndemand = { kind = "exponential" }\n')
    assert scenario.workload == Workload(load=0.8)


# Refusals


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x", "^TOML text is not valid TOML: Expected '='"),
        ("a = " + "[" * 50_000, "^TOML text is not valid TOML: "),
        ("cores = 9" + "0" * 5000, "^TOML text is not valid TOML: "),
        ("[[servers]]\n", "^TOML text: 'workload' is missing; give it, or a base scenario that has it$"),
        ("[workload]\nload = 1\n", "'servers' is missing"),
        ("base = 3\n", "^TOML text: base must be the name of a scenario, got 3"),
        ('base = "heterogenous"\n', "^unknown base scenario 'heterogenous' in TOML text. Did you mean 'heterogeneous'"),
        ("balancer = 2\n" + MINIMAL, "^unknown key 'balancer' in TOML text. Did you mean 'balancers'"),
        (
            "balancers = 1.5\n" + MINIMAL,
            "^TOML text: scenario 'custom': balancers must be a whole number from 1",
        ),
        ("name = 7\n" + MINIMAL, "^TOML text: Scenario.name must be text, got 7"),
        ("duration = 2020-01-01\n" + MINIMAL, r"duration must be a number above 0, got datetime.date\(2020, 1, 1\)"),
        ('dispatch = "sde"\n' + MINIMAL, "^unknown dispatch rule 'sde' in TOML text. Did you mean 'sed'"),
        ("servers = 4\n", r"'workload' is missing"),
        (
            "servers = 4\n[workload]\nload=1\n",
            r"^TOML text: servers must be an array of tables, .*got 4",
        ),
        ("servers = [4]\n[workload]\nload=1\n", r"^TOML text, \[\[servers\]\] number 1 must be a table, got 4"),
        (
            "[[servers]]\n[[servers]]\ncorse = 2\n[workload]\nload = 1\n",
            r"^unknown key 'corse' in TOML text, \[\[servers\]\] number 2. Did you mean 'cores'\?",
        ),
        (
            '[[servers]]\ncores = "two"\n[workload]\nload = 1\n',
            r"^TOML text, \[\[servers\]\] number 1: Server.cores must be a whole number at least 1, got 'two'",
        ),
        (
            "[[servers]]\ncount = 0\n[workload]\nload=1\n",
            r"number 1: count must be from 1 to 65536, got 0",
        ),
        ("[[servers]]\ncount = 99999999999\n[workload]\nload=1\n", r"count must be from 1 to 65536, got 99999999999"),
        ("[[servers]]\n[workload]\n", r"^TOML text, \[workload\]: Workload needs rate"),
        (
            "[[servers]]\n[workload]\nload = nan\n",
            r"\[workload\]: Workload.load must be a finite number.* got nan",
        ),
        ("[[servers]]\n[workload]\nload = true\n", r"Workload.load must be a number above 0, got True"),
        ("[[servers]]\n[workload]\nlaod = 1\n", r"^unknown key 'laod' in TOML text, \[workload\]. Did you mean"),
        ("workload = 3\n[[servers]]\n", r"^TOML text, \[workload\] must be a table, got 3"),
        ("[[servers]]\n[workload]\nload=1\nrate=2\n", "rate or load, not both; got rate=2 and load=1"),
        (
            '[[servers]]\n[workload]\nload=1\narrivals="poisson"\n',
            r'\[workload\] arrivals must be a table such as { kind = "poisson" }, got \'poisson\'',
        ),
        ("[[servers]]\n[workload]\nload=1\narrivals={}\n", r"\[workload\] arrivals: 'kind' is missing; known: poisson"),
        ("[[servers]]\n[workload]\nload=1\ndemand={kind=3}\n", r"\[workload\] demand: kind must be text, got 3"),
        (
            '[[servers]]\n[workload]\nload=1\ndemand={kind="exponental"}\n',
            r"^unknown kind of demand 'exponental' in TOML text, \[workload\] demand. Did you mean 'exponential'",
        ),
        (
            '[[servers]]\n[workload]\nload=1\ndemand={kind="exponential", maen=1}\n',
            r"^unknown key 'maen' in TOML text, \[workload\] demand. Did you mean 'mean'\? Known: kind, mean",
        ),
        (
            '[[servers]]\n[workload]\nload=1\ndemand={kind="empirical"}\n',
            r"^TOML text, \[workload\] demand: 'values' is missing",
        ),
        (
            '[[servers]]\n[workload]\nload=1\ndemand={kind="hyperexponential", means=1}\n',
            r"\[workload\] demand: Hyperexponential.means must be a list of numbers, got 1",
        ),
        ("[[events]]\ntime=1\n" + MINIMAL, r"^TOML text, \[\[events\]\] number 1: 'kind' is missing"),
        (
            '[[events]]\ntime=1\nkind="dwon"\nserver=0\n' + MINIMAL,
            r"^unknown event kind 'dwon' in TOML text, \[\[events\]\] number 1. Did you mean 'down'",
        ),
        (
            '[[events]]\ntime=1\nkind="down"\nserver=1\n' + MINIMAL,
            "^TOML text: scenario 'custom': event at 1.0 s names server 1; allowed: 0 to 0",
        ),
        ("sampling = 1\n" + MINIMAL, r"^TOML text, \[sampling\] must be a table, got 1"),
        (
            "[sampling]\ncapacty=1\n" + MINIMAL,
            r"^unknown key 'capacty' in TOML text, \[sampling\]. Did you",
        ),
        (
            '[sampling]\nalgorithm="x"\n' + MINIMAL,
            r"^unknown sampling algorithm 'x' in TOML text, \[sampling\]. Known: overwrite, uniform",
        ),
        ('[[servers]]\n[workload]\ntrace="x.csv"\n', r"\[workload\] trace must be a table such as { path ="),
        (
            "[[servers]]\n[workload]\ntrace={}\n",
            r"\[workload\] trace: 'path' must be the path of a",
        ),
        (
            '[[servers]]\n[workload]\ntrace={path="x.csv", sped=2}\n',
            r"^unknown key 'sped' in TOML text, \[workload\] trace. Did you mean 'speedup'",
        ),
        (
            '[[servers]]\n[workload]\ntrace={path="x.csv", speedup="2"}\n',
            r"^TOML text, \[workload\] trace: trace speedup must be a finite number above 0, got '2'",
        ),
        (
            '[[servers]]\n[workload]\ntrace={path="x.csv", format="cvs"}\n',
            r"^unknown trace format 'cvs' in TOML text, \[workload\] trace. Did you mean 'csv'",
        ),
        (
            '[[servers]]\n[workload]\ntrace={path="x.csv"}\ndemand={kind="exponential"}\n',
            "a trace replaces arrivals and",
        ),
        ('[[servers]]\n[workload]\ntrace={path="missing.csv"}\n', "^no such trace file: missing.csv"),
    ],
)
def test_refusals_name_the_place_and_what_is_allowed(text: str, sentence: str) -> None:
    with pytest.raises(LbgymError, match=sentence) as caught:
        from_toml(text)
    assert isinstance(caught.value, ValueError)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"no such scenario file: .*missing.toml"):
        load_scenario(tmp_path / "missing.toml")
    with pytest.raises(ScenarioError, match=r"cannot read scenario file .*directory"):
        load_scenario(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(ScenarioError, match=r"scenario file .*latin.toml is not UTF-8 text"):
        load_scenario(tmp_path / "latin.toml")
    with pytest.raises(ScenarioError, match=r"cannot read scenario file .*null byte"):
        load_scenario("a\0.toml")
    (tmp_path / "bad.toml").write_text("[[servers]]\ncors = 1\n[workload]\nload = 1\n")
    with pytest.raises(UnknownNameError, match=r"unknown key 'cors' in .*bad.toml, \[\[servers\]\] number 1"):
        load_scenario(tmp_path / "bad.toml")


def test_load_scenario_takes_a_scenario_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = named_scenario("uniform")
    assert load_scenario(scenario) is scenario
    assert load_scenario("uniform") == scenario
    monkeypatch.chdir(tmp_path)
    Path("uniform").write_text(MINIMAL)
    assert load_scenario("uniform") == scenario
    assert load_scenario("./uniform").num_servers == 1
    Path("noext").write_text(MINIMAL)
    assert load_scenario("noext").name == "noext"
    with pytest.raises(UnknownNameError, match=r"unknown scenario 'unifrom'. Did you mean 'uniform'\?"):
        load_scenario("unifrom")
    with pytest.raises(ScenarioError, match=r"a scenario must be a Scenario, the name of one or the path .* got 3"):
        load_scenario(3)  # type: ignore[arg-type]


# Traces in files


def test_the_path_of_a_trace_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "flows.csv").write_text("at,work\n0,1\n2,3\n")
    (tmp_path / "s.toml").write_text(
        "[[servers]]\n[workload]\n"
        'trace = { path = "data/flows.csv", time_column = "at", demand_column = "work", speedup = 4, repeat = false }\n'
    )
    monkeypatch.chdir(os.sep)
    trace = load_scenario(tmp_path / "s.toml").workload.trace
    assert trace is not None
    assert trace.times.tolist() == [0, 0.5]
    assert not trace.repeat


def test_a_trace_takes_the_place_of_the_workload_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time,demand\n0,1\n1,1\n")
    scenario = from_toml('base = "uniform"\n[workload]\ntrace = { path = "t.csv" }\n', folder=tmp_path)
    assert scenario.rate == pytest.approx(1.0)
    assert scenario.num_servers == 4


def test_a_trace_is_written_by_its_path_and_options(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("time\tquery\n0.5\t/?n=100\nbad\n1.5\t/?n=300\n")
    trace = read_trace(
        tmp_path / "t.tsv", speedup=2, scale=3, seconds_per_iteration=0.01, on_error="skip", random_start=True
    )
    text = to_toml(Scenario(servers=(Server(),), workload=Workload(trace=trace, rate=5)))
    again = from_toml(text).workload
    assert again.rate == 5
    assert again.trace is not None
    assert again.trace.times.tolist() == trace.times.tolist() == [0.0, 0.5]
    assert again.trace.demands.tolist() == trace.demands.tolist() == [3.0, 9.0]
    assert (again.trace.random_start, again.trace.repeat, again.trace.skipped) == (True, True, 1)


def test_a_trace_that_did_not_come_from_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time,demand\n0,1\n1,1\n")
    changed = read_trace(tmp_path / "t.csv").scaled(speedup=2)
    with pytest.raises(ScenarioError, match=r"scenario 'custom' cannot be written as TOML: its trace .*write_trace"):
        to_toml(Scenario(servers=(Server(),), workload=Workload(trace=changed)))


def test_an_error_in_a_trace_names_the_line_of_the_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time,demand\n0,1\n1,x\n")
    with pytest.raises(TraceError, match=r"t.csv:3: demand must be a number, got 'x'"):
        from_toml('[[servers]]\n[workload]\ntrace = { path = "t.csv" }\n', folder=tmp_path)


# Round trip


@given(scenarios())
def test_round_trip(scenario: Scenario) -> None:
    assert from_toml(to_toml(scenario)) == scenario


@pytest.mark.parametrize("name", [name for name in scenario_names() if name != "sample-trace"])
def test_round_trip_of_the_built_in_scenarios(name: str) -> None:
    assert from_toml(to_toml(named_scenario(name))) == named_scenario(name)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    scenario = from_toml(FULL)
    (tmp_path / "again.toml").write_text(to_toml(scenario))
    assert load_scenario(tmp_path / "again.toml") == scenario


def test_text_that_is_no_unicode_cannot_be_written() -> None:
    scenario = Scenario(name="\ud800", servers=(Server(),), workload=Workload(load=1))
    with pytest.raises(ScenarioError, match=r"cannot be written as TOML: .*surrogates"):
        to_toml(scenario)


# Junk

KEYS = (
    *(
        "base",
        "name",
        "servers",
        "workload",
        "events",
        "sampling",
        "balancers",
        "dispatch",
        "duration",
        "count",
        "cores",
    ),
    *(
        "rate",
        "load",
        "arrivals",
        "demand",
        "trace",
        "path",
        "kind",
        "mean",
        "time",
        "server",
        "value",
        "capacity",
        "x",
    ),
)
scalars = (
    st.sampled_from(('"uniform"', '"poisson"', '"exponential"', '"down"', '"sed"', "1979-05-27", "nan", "-inf", "true"))
    | st.integers(-2, 10).map(str)
    | st.floats(-1, 10).map(repr)
    | st.just("0x" + "f" * 5000)
)


def _table(pairs: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {value}" for key, value in pairs.items()) + " }"


values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=2).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3).map(_table)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=5))
def test_wrong_toml_is_refused_by_an_error_of_ours(pairs: dict[str, str]) -> None:
    _read_or_refuse("\n".join(f"{key} = {value}" for key, value in pairs.items()))


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_any_text_is_read_or_refused(text: str) -> None:
    _read_or_refuse(text)


@given(st.integers(0, len(FULL) - 1), st.integers(0, 30), st.text('{}[]="\n.0x\\', max_size=3))
def test_a_damaged_file_is_read_or_refused(start: int, length: int, patch: str) -> None:
    _read_or_refuse(FULL[:start] + patch + FULL[start + length :])


def _read_or_refuse(text: str) -> None:
    try:
        assert from_toml(text).num_servers >= 1
    except LbgymError as error:
        assert str(error)
