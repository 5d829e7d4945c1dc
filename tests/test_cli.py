from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

import lbgym
from lbgym.cli._outcome import exit_code_of
from lbgym.cli._signals import Interrupted
from lbgym.scenarios import (
    Trace,
    distribution_names,
    from_toml,
    load_scenario,
    named_distribution,
    scenario_names,
    write_trace,
)
from lbgym.sharedmemory import SharedMemoryRegion
from lbgym.simulator import Simulation
from tests.forked import WARM, Template

SMALL = """
name = "small"
duration = 6.0
reject_timeout = 2.0
[[servers]]
count = 2
cores = 2
[[servers]]
cores = 1
[workload]
load = 0.6
demand = { kind = "exponential", mean = 0.05 }
"""


class Command(Protocol):
    """Runs ``lbgym`` in a process of its own."""

    def __call__(
        self, *arguments: object, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def lbgym_command(python: Template) -> Command:
    def run(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return python.run(["-m", "lbgym", *arguments], env=env, timeout=120)

    return run


def in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from lbgym.cli import main

    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    code = exit_.value.code
    return int(code or 0), captured.out, captured.err


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """No command has to say that it compiles the simulator."""
    Simulation(load_scenario("uniform")).close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_version_and_help(lbgym_command: Command) -> None:
    done = lbgym_command("--version")
    assert (done.returncode, done.stdout) == (0, f"lbgym {lbgym.__version__}\n")
    done = lbgym_command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("compare", "train", "scenarios", "describe"))


def test_the_command_line_starts_without_what_it_may_not_need() -> None:
    script = (
        "import sys\nfrom lbgym.cli import main\n"
        "try: main(['scenarios', '--json'])\n"
        "except SystemExit: pass\n"
        "heavy = 'torch', 'numba', 'matplotlib', 'scipy', 'pyarrow', 'stable_baselines3'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


#: Modules of the extras; the command line does without them where it does nothing with them.
OPTIONAL = (
    "matplotlib", "PIL", "pyarrow", "scipy", "torch", "tensorboard", "tomli_w", "stable_baselines3", "sb3_contrib",
    "ray", "benchmarl", "torchrl", "tensordict", "h5py", "minari", "prometheus_client", "pettingzoo", "pandas",
)  # fmt: skip


#: Makes them missing, whether they are installed or not.
MISSING = f"""
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
assert not {set(OPTIONAL)!r} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def core() -> Iterator[Template]:
    """Gives processes where nothing but the core dependencies can be imported."""
    with Template(["typer", "rich.table", "rich.progress"], MISSING + WARM) as template:
        yield template


class CoreCommand(Protocol):
    """Standard output and error of a command where nothing but the core dependencies can be imported."""

    def __call__(
        self, *arguments: object, expect: int = 0, env: Mapping[str, str] | None = None
    ) -> tuple[str, str]: ...


@pytest.fixture
def core_command(core: Template) -> CoreCommand:
    def run(*arguments: object, expect: int = 0, env: Mapping[str, str] | None = None) -> tuple[str, str]:
        done = core.run(["-m", "lbgym", *arguments], env=os.environ | (env or {}))
        assert done.returncode == expect, done.stderr
        return done.stdout, done.stderr

    return run


def test_with_the_core_alone(small: Path, tmp_path: Path, core_command: CoreCommand) -> None:
    """What `pip install lbgym` gives."""
    env = {"LBGYM_SHM_DIR": str(tmp_path), "COLUMNS": "120"}
    assert core_command("--version")[0].startswith("lbgym ")
    assert "compare" in core_command("--help")[0]
    assert "heterogeneous" in core_command("scenarios")[0]
    for arguments in (("failure",), ("random-clusters", "--draws", 5), (small, "--toml")):
        assert core_command("describe", *arguments)[1] == ""
    core_command("dataplane", "emulate", "--name", "lb0", "--duration", 1, "--speedup", 10, env=env)
    name = f"lbgym-core-{os.getpid()}"
    region = SharedMemoryRegion.create(name, num_servers=2, driver="test")
    try:
        assert name in core_command("shm", "ls")[0]
        assert "binary interface" in core_command("shm", "inspect", name)[0]
        assert "nothing yet" in core_command("shm", "watch", name, "--once")[0]
        assert core_command("shm", "include")[0].strip()
    finally:
        region.close()
    assert core_command("shm", "rm", name)[0] == f"removed {name}\n"
    one = core_command("compare", "-s", small, "-p", "ecmp,sed", "-n", 1, "--processes", 1)[0]
    assert "Difference from ecmp" in one


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("compare", "-n", "2"), "eval"),
        (("compare", "-n", "1", "--out", "out"), "eval"),
        (("train", "--steps", "100"), "train"),
        (("shm", "record", "lb0", "out.parquet"), "offline"),
        (("describe", "random-clusters", "--plot", "draws.png"), "eval"),
        (("tune", "-p", "gamma=uniform(0.9,0.99)"), "rllib"),
    ],
)
def test_what_needs_more_names_the_extra(arguments: tuple[str, ...], extra: str, core_command: CoreCommand) -> None:
    out, err = core_command(*arguments, expect=2)
    assert out == "" and len(err.splitlines()) == 1 and f"pip install 'lbgym[{extra}]'" in err


def test_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "scenarios")
    assert code == 0 and all(name in out for name in scenario_names())
    code, out, _ = in_process(capsys, "scenarios", "--json")
    listed = json.loads(out)
    assert [s["name"] for s in listed] == [*scenario_names(), *distribution_names()]
    assert listed[-1]["servers"] == [7, 7] and listed[-1]["load"] is None
    assert listed[0]["servers"] == load_scenario(listed[0]["name"]).num_servers


@pytest.mark.parametrize("name", scenario_names())
def test_describe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = load_scenario(name)
    code, out, _ = in_process(capsys, "describe", name)
    assert code == 0 and f"{scenario.rate:.4g} flows/s" in out and max(map(len, out.splitlines())) <= 120
    code, out, _ = in_process(capsys, "describe", name, "--json")
    data = json.loads(out)
    assert len(data["servers"]) == scenario.num_servers and data["load"] == pytest.approx(scenario.load)
    assert data["flows_per_step"] == pytest.approx(scenario.rate / 4) and len(data["events"]) == len(scenario.events)


def test_describe_as_toml_reads_back(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "describe", small, "--toml")
    assert code == 0 and from_toml(out) == load_scenario(small)


@pytest.mark.parametrize("name", distribution_names())
def test_describe_a_distribution(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    distribution = named_distribution(name)
    code, out, _ = in_process(capsys, "describe", name, "--draws", "20")
    assert code == 0 and "Drawn for every episode" in out and "of 20 draws" in out
    assert max(map(len, out.splitlines())) <= 120
    code, out, _ = in_process(capsys, "describe", name, "--json", "--draws", "20")
    data = json.loads(out)
    drawn = [distribution.draw(seed) for seed in range(20)]
    assert data["draws"]["servers"]["most"] == max(s.num_servers for s in drawn)
    assert data["draws"]["load"]["least"] == pytest.approx(min(s.load for s in drawn))
    assert data["base"]["balancers"] == distribution.balancers
    code, out, _ = in_process(capsys, "describe", name, "--toml")
    assert from_toml(out) == distribution
    code, out, _ = in_process(capsys, "describe", name, "--toml", "--draw", "7")
    assert code == 0 and from_toml(out) == distribution.draw(7)


def test_brackets_in_what_the_user_wrote_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Paths of tests are as long as it happens.
    monkeypatch.setenv("COLUMNS", "400")
    trace = tmp_path / "[a]tr.csv"
    write_trace(Trace(times=np.arange(1.0, 50.0), demands=np.full(49, 0.01)), trace)
    text = 'name = "my [b] one"\ndescription = "see [/docs] for [red] and [draft] numbers"\nservers = [{cores = 4}]\n'
    (tmp_path / "mine.toml").write_text(f"{text}[workload]\ntrace = {{path = '{trace}', format = 'csv'}}\n")
    randomized = f"{text}[workload]\nload = 0.5\n[randomize]\nload = {{kind = 'uniform', low = 0.3, high = 0.5}}\n"
    (tmp_path / "drawn.toml").write_text(randomized)
    for name in ("mine", "drawn"):
        code, out, err = in_process(capsys, "describe", str(tmp_path / f"{name}.toml"), "--draws", "5")
        assert code == 0, err
        assert "my [b] one  see [/docs] for [red] and [draft] numbers" in out
        assert ("[a]tr.csv: 49 flows" in out) == (name == "mine")
    arguments = ("-s", str(tmp_path / "drawn.toml"), "-p", "[red]=sed,b[b]=lsq", "-n", "1", "--duration", "5")
    code, out, err = in_process(capsys, "compare", *arguments, "--processes", "1")
    assert code == 0, err
    assert "my [b] one, drawn" in out and "[red]" in out and "b[b]" in out


def test_describe_plots_what_a_distribution_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in distribution_names():
        file = tmp_path / f"{name}.png"
        code, out, _ = in_process(capsys, "describe", name, "--draws", "30", "--plot", str(file))
        assert code == 0 and f"wrote {file}" in out and file.read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (("uniform", "--plot", "x.png"), "--plot needs a distribution"),
        (("uniform", "--draw", "1"), "--draw needs a distribution"),
        (("random-clusters", "--plot", "x.txt"), "--plot writes .png, .svg, .pdf"),
        (("random-clusters", "--draw", "1", "--plot", "x.png"), "give one of them"),
        (("random-clusters", "--draws", "2", "--plot", str(tmp_path / "no" / "x.png")), "cannot write the plot"),
    ):
        code, _, err = in_process(capsys, "describe", *arguments)
        assert code == 2 and message in err


XDP = ("dataplane", "xdp", "--name", "a", "--vip", "10.0.0.1:80", "--server", "b=10.0.0.2", "--interface", "lo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("describe", "heterogenous"), "unknown scenario 'heterogenous'. Did you mean 'heterogeneous'"),
        (("describe", "adaptiv"), "Did you mean 'adaptive'? Known: adaptive, "),
        (("describe", "uniform", "--json", "--toml"), "--json or --toml"),
        (("compare", "--policies", "sedd"), "unknown contender 'sedd'. Did you mean 'sed'"),
        (("compare", "--policies", "sed", "--baseline", "lsq"), "unknown baseline 'lsq'"),
        (("compare", "--policies", "sed,none.pt"), "no trained model at 'none.pt'"),
        (("compare", "--load", "0.5", "--rate", "3"), "--load or --rate, not both"),
        (("compare", "--load", "-1"), "load must be"),
        (("compare", "--speedup", "2"), "need --trace"),
        (("compare", "--flows"), "--out, which is missing"),
        (("compare", "--trace", "none.csv"), "none.csv"),
        (("compare", "--warmup", "100"), "warmup must be"),
        (("compare", "--trace", "x", "--trace-option", "spedup=2"), "unknown trace option 'spedup'"),
        (("compare", "--trace", "x", "--trace-option", "scale"), "KEY=VALUE"),
        (
            ("compare", "--trace", "x", "--trace-option", "speedup=10", "--speedup", "1"),
            "give --speedup or --trace-option speedup, not both; got 1.0 and 10.0",
        ),
        (
            ("compare", "--trace", "x", "--trace-option", "on-error=raise", "--skip-malformed"),
            "give --skip-malformed or --trace-option on_error, not both; got 'skip' and 'raise'",
        ),
        (("dataplane", "xdp", "--detach"), "give --name, or --config"),
        ((*XDP, "--region-mode", "rw"), "--region-mode takes octal permissions from 0 to 777, such as 600 or 660, got"),
        ((*XDP, "--region-mode", "1777"), "--region-mode takes octal permissions from 0 to 777"),
        (
            ("dataplane", "haproxy", "--name", "a", "--backend", "b", "--socket", "x", "--metrics-address", "::1"),
            "--metrics-address ::1 needs --metrics-port, too",
        ),
        (("run", "-p", "sed", "--shm", "x", "--metrics-address", "::1"), "'::1' needs metrics_port, too"),
        (("compare", "--policies", "sed+lsq"), "policy 'lsq' in contender 'sed+lsq'. 'lsq' is a dispatch rule, "),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = in_process(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("lbgym: error: ") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "renamed"),
    [
        (("compare", "--interval", "1"), "--interval is now --step-interval"),
        (("run", "--interval=1"), "--interval is now --step-interval"),
        (("run", "--dry-run"), "--dry-run is now --shadow"),
        (("train", "--policy", "mlp"), "--policy is now --network"),
        (("shm", "record", "lb0", "--interval", "1", "out"), "--interval is now --sample-interval"),
    ],
)
def test_an_old_option_is_refused_with_the_new_one(
    arguments: tuple[str, ...], renamed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(capsys, *arguments) == (2, "", f"lbgym: error: {renamed}\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EOFError("Ran out of input"), 1, "fault: EOFError: Ran out of input (test_cli.py:"),
        (ZeroDivisionError(), 1, "fault: ZeroDivisionError (test_cli.py:"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 2, "error: '/tmp/x': No space left on device\n"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "error: Too many open files (test_cli.py:"),
        (MemoryError(), 2, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (Interrupted(signal.SIGHUP), 129, "ended by SIGHUP\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_exception_is_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise error

    monkeypatch.delenv("LBGYM_DEBUG", raising=False)
    assert exit_code_of(command) == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"lbgym: {message}" if message else "") and len(shown.splitlines()) == bool(message)
    assert "Aborted" not in shown and ("LBGYM_DEBUG=1" in shown) == (code == 1)
    monkeypatch.setenv("LBGYM_DEBUG", "1")
    exit_code_of(command)
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(error, KeyboardInterrupt))


def test_compare_prints_tables_and_writes_files(small: Path, tmp_path: Path, lbgym_command: Command) -> None:
    out = tmp_path / "out"
    done = lbgym_command(
        "compare", "-s", small, "-p", "ecmp,sed,mine=wcmp+latency", "-n", 3, "--processes", 1, "--out", out, "--flows"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "…" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.split()[:1] == ["mine"] for line in lines) == 2 and "Difference from ecmp" in done.stdout
    written = {Path(line.removeprefix("wrote ")).name for line in lines if line.startswith("wrote ")}
    assert written == {p.name for p in out.iterdir()} and {"summary.json", "fct_distribution.png"} <= written


def test_compare_as_json(small: Path, tmp_path: Path, lbgym_command: Command) -> None:
    arguments = ("compare", "-s", small, "-p", "ecmp,sed", "-n", 2, "--load", 0.3, "--baseline", "sed", "--json")
    done = lbgym_command(*arguments, "--out", tmp_path / "out", "--no-plots")
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert data["baseline"] == "sed" and data["scenario"]["load"] == pytest.approx(0.3) and data["seeds"] == [0, 1]
    again = json.loads(lbgym_command(*arguments, "--processes", 1).stdout)
    assert again["contenders"] == data["contenders"]
    shifted = json.loads(lbgym_command(*arguments, "--processes", 1, "--first-seed", 1).stdout)
    assert shifted["contenders"][0]["runs"][0] == data["contenders"][0]["runs"][1]


def test_compare_replays_a_trace(small: Path, tmp_path: Path, lbgym_command: Command) -> None:
    rng = np.random.default_rng(0)
    trace = tmp_path / "flows.csv.gz"
    write_trace(Trace(times=np.cumsum(rng.exponential(0.01, 3000)), demands=rng.exponential(0.02, 3000)), trace)
    arguments = ("compare", "-s", small, "-p", "sed,lsq", "-n", 2, "--trace", trace, "--json", "--processes", 1)
    data = json.loads(lbgym_command(*arguments).stdout)
    assert data["scenario"]["trace"] == str(trace) and data["scenario"]["rate"] == pytest.approx(100, rel=0.1)
    # the whole trace, which lasts some 30 s
    assert data["settings"]["duration"] == pytest.approx(30, rel=0.1)
    flows = [run["flows"] for run in data["contenders"][0]["runs"]]
    assert flows[0] == pytest.approx(2500, rel=0.05) and flows[0] != flows[1]
    heavy = json.loads(lbgym_command(*arguments, "--load", 0.8, "--scale", 0.5).stdout)
    assert heavy["scenario"]["load"] == pytest.approx(0.8)
    assert heavy["settings"]["duration"] == pytest.approx(3000 * 0.01 / (0.8 * 5 / 100 / 0.01), rel=0.1)
    fast = json.loads(lbgym_command(*arguments, "--speedup", 2, "--duration", 5, "--warmup", 0).stdout)
    assert fast["scenario"]["rate"] == pytest.approx(200, rel=0.1)
    assert fast["contenders"][0]["runs"][0]["flows"] == pytest.approx(1000, rel=0.15)


def test_compare_reads_a_trace_with_options(small: Path, tmp_path: Path, lbgym_command: Command) -> None:
    trace = tmp_path / "odd.csv"
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["at", "cost"])
    writer.writerows([[f"{0.02 * i:.2f}", "0.01"] for i in range(400)])
    trace.write_text(stream.getvalue() + "oops,1\n")
    columns = ("--trace-option", "time-column=at", "--trace-option", "demand_column=cost")
    arguments = ("compare", "-s", small, "-p", "sed", "-n", 1, "--trace", trace, "--json", "--processes", 1, *columns)
    bad = lbgym_command(*arguments)
    assert bad.returncode == 2 and f"{trace}:402" in bad.stderr
    good = lbgym_command(*arguments, "--skip-malformed")
    assert good.returncode == 0 and "1" in good.stderr and json.loads(good.stdout)["scenario"]["rate"] > 0
    # the same by their names in read_trace
    options = ("--trace-option", "on_error=skip", "--trace-option", "speedup=2", "--trace-option", "format=csv")
    fast = lbgym_command(*arguments, *options)
    assert fast.returncode == 0
    rates = [json.loads(done.stdout)["scenario"]["rate"] for done in (good, fast)]
    assert rates[1] == pytest.approx(2 * rates[0])


COMMANDS = (
    "scenarios",
    "scenarios --json",
    "describe failure --toml",
    "describe random-clusters --draws 20",
    "--version",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        ("| true", 141, ""),
        ("> /dev/full", 2, "lbgym: error: cannot write to standard output: No space left on device\n"),
        (">&-", 2, "lbgym: error: cannot write to standard output: Bad file descriptor\n"),
        ("2>&-", 0, ""),
        ("<&- >/dev/null", 0, ""),
    ],
)
def test_standard_output_that_cannot_be_written(command: str, where: str, code: int, message: str) -> None:
    # The reader is gone before there is anything to read.
    where = "> >(exec true)" if where == "| true" else where
    line = (
        f"exec {sys.executable} -c 'import time; time.sleep(0.2); from lbgym.cli import main; main()' {command} {where}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, message)


def test_what_the_encoding_lacks_is_no_reason_to_lose_a_comparison(small: Path, lbgym_command: Command) -> None:
    arguments = ("compare", "-s", small, "-p", "größe=ecmp,lsq,日本=sed", "-n", 2, "--processes", 1)
    plain = lbgym_command(*arguments, env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "120"})
    assert plain.returncode == 0 and plain.stderr == "" and plain.stdout.isascii()
    full = lbgym_command(*arguments, env=os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "120"})
    assert "größe" in full.stdout and "日本" in full.stdout and "±" in full.stdout
    # The same numbers, and a sign for plus-minus that can be read.
    numbers = re.compile(r"[+-]?\d+\.\d+")
    assert numbers.findall(plain.stdout.replace("+/-", " ")) == numbers.findall(full.stdout.replace("±", " "))
    assert "+/-" in plain.stdout and "gro?e" in plain.stdout


@pytest.mark.parametrize("where", ["full", "folder"])
def test_results_that_cannot_be_saved_are_said_before_the_work(
    where: str, small: Path, tmp_path: Path, lbgym_command: Command
) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out" if where == "folder" else Path("/dev/full/out")
    done = lbgym_command("compare", "-s", small, "-p", "ecmp", "-n", "100000", "--out", target)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lbgym: error: cannot write ") and "Not a directory" in done.stderr


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever inherits it may be slow to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "processes", "whole_group"),
    [
        (signal.SIGINT, 1, False),
        (signal.SIGINT, 2, True),
        (signal.SIGTERM, 1, True),
        (signal.SIGTERM, 2, False),
        (signal.SIGTERM, 2, True),
        (signal.SIGHUP, 2, True),
    ],
)
def test_a_signal_ends_a_comparison_in_order(
    number: signal.Signals, processes: int, whole_group: bool, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    leader, follower = pty.openpty()
    arguments = ["compare", "-s", str(small), "-p", "sed,lsq", "-n", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", *arguments, "--processes", str(processes)],
        stdout=subprocess.PIPE,
        stderr=follower,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(follower)
    shown = b""
    deadline = time.monotonic() + 120
    # a bar that has counted a run means that all is under way
    while not re.search(rb"[1-9]\d*/200000", shown):
        assert time.monotonic() < deadline and process.poll() is None, shown
        if select.select([leader], [], [], 1.0)[0]:
            shown += os.read(leader, 65536)
    children = children_of(process.pid)
    assert len(children) >= (2 if processes == 2 else 0)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    while time.monotonic() < deadline:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so when nobody holds the other end any more
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, shown
    said = b"interrupted" if number == signal.SIGINT else f"ended by {number.name}".encode()
    assert said in shown and b"Traceback" not in shown
    assert stdout == b""
    assert [p.name for p in out.iterdir()] == ["summary.json"] and (out / "summary.json").read_text() == "{}"
    while any(running(child) for child in children):
        assert time.monotonic() < deadline, "a process outlived the command"
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("victim", ["worker", "worker beside a stuck one", "parent"])
def test_a_killed_process_of_a_comparison(victim: str, small: Path) -> None:
    arguments = ["compare", "-s", str(small), "-p", "sed,lsq", "-n", "100000", "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(workers := [c for c in children_of(process.pid) if b"spawn_main" in cmdline(c)]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    # A worker that is still starting has words of its own for a parent that is gone.
    while not all("llvmlite" in Path(f"/proc/{worker}/maps").read_text() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    if victim == "worker beside a stuck one":
        # As one is that waits for a lock which the killed one held.
        os.kill(workers[1], signal.SIGSTOP)
    os.kill(process.pid if victim == "parent" else workers[0], signal.SIGKILL)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if victim != "parent":
        assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1
        assert "one of the 2 processes that make the runs was killed" in err
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.05)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
