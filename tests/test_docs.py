"""The documentation site: it builds strictly, needs no network, and what it shows runs."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lbgym
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.rewards import REWARDS
from lbgym.sharedmemory import region_names
from tests.forked import Template
from tests.report.conftest import Open, browser, open_page

__all__ = ["browser", "open_page"]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FRAMEWORKS = sorted(f"frameworks/{page.stem}" for page in DOCS.glob("frameworks/*.md"))
PAGES = [
    "../README",
    *sorted(
        page.relative_to(DOCS).with_suffix("").as_posix()
        for page in DOCS.rglob("*.md")
        # made when the site is built
        if page.relative_to(DOCS).parts[0] not in ("environments", "environments.md")
    ),
]
#: What makes a training of the pages short.
SHORTER = {
    "total_steps=1_500_000": "total_steps=4_096",
    '"total_steps": 1_500_000': '"total_steps": 4_096',
    'network="equivariant", total_steps=300_000': 'network="equivariant", total_steps=2_048, num_envs=8, max_steps=32',
    "total_steps=300_000": "total_steps=256, num_envs=8, warmup=1, max_steps=32",
    "range(256)": "range(40)",
    "total_steps=500_000": "total_steps=1_024, num_envs=8, max_steps=32",
    "total_timesteps=100_000": "total_timesteps=1_024",
    "seeds=10": "seeds=2, duration=5.0",
    "range(40):  # ten seconds": "range(4):",
}
#: Modules a page's Python needs beyond the core.
NEEDS = {
    "quickstart": ("torch", "rich", "scipy"),
    "multi-agent": ("pettingzoo",),
    "fit": ("pyarrow", "typer"),
    "live": ("h5py", "minari", "pyarrow", "typer"),
    "training": ("torch", "tomli_w"),
    "clusters": ("torch", "ray"),
    "frameworks/rllib": ("ray", "pettingzoo"),
    "frameworks/benchmarl": ("benchmarl",),
    "frameworks/torchrl": ("torchrl",),
    "frameworks/pettingzoo": ("pettingzoo",),
    "frameworks/ppo": ("torch",),
    "frameworks/sac-gru": ("torch",),
    "frameworks/stable-baselines3": ("stable_baselines3",),
}
#: Anything a browser would fetch: not links, which are followed only when clicked.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(\S+?)["'\s>]|<link[^>]*\shref=["']?(\S+?)["'\s>]"""
)


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def fetched(html: str) -> list[str]:
    """Addresses on other hosts that a page has the browser fetch."""
    found = ["".join(groups) for groups in FETCHED.findall(html)]
    return [address for address in found if re.match(r"(https?:)?//", address)]


def build(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The site of the checkout ``root`` into ``folder``."""
    for module in ("sphinx", "myst_parser", "pydata_sphinx_theme", "latex2mathml"):
        pytest.importorskip(module)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    trees = folder.with_name(f"{folder.name}-doctrees")
    return subprocess.run(
        [*(sys.executable, "-m", "sphinx"), "-q", "-W", "--keep-going", "-d", str(trees), "docs", str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_build_refuses_what_is_broken(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("src", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "live.md").open("a") as page:
        page.write("\n[a](../src/none.py) [b](none.md) [c](theory.md#none)\n\n$x \\nosuchcommand y$\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for what in ("a link to ../src/none.py", "'none.md'", "in doc 'theory': 'none'", "nosuchcommand"):
        assert what in done.stderr


def test_site_needs_no_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert fetched(page.read_text()) == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_check_of_the_network_sees_what_is_fetched() -> None:
    assert fetched('<script defer src="https://cdn.example/x.js"></script>') == ["https://cdn.example/x.js"]
    assert fetched('<link rel="stylesheet" href="//fonts.example/css">') == ["//fonts.example/css"]
    assert fetched('<a href="https://example.org"><img src="images/a.png"></a>') == []


def test_site_shows_formulas_and_no_sources(site: Path) -> None:
    theory = (site / "theory.html").read_text()
    assert theory.count("<math") > 50
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert 'class="math' not in text, page.name
        assert "<!-- settings" not in text, page.name
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("page", ["index", "environments", "learning-curves", "results"])
def test_nothing_of_a_page_is_cut_off(site: Path, open_page: Open, page: str, width: int) -> None:
    with open_page((site / f"{page}.html").as_uri(), width) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        # A table that is too wide is in a box that scrolls.
        cut = """tables => tables.filter(table => {
            const box = table.parentElement;
            return table.offsetWidth > box.clientWidth && getComputedStyle(box).overflowX === "visible";
        }).length"""
        assert shown.locator("article table").evaluate_all(cut) == 0


def test_reference_names_what_the_code_has(site: Path) -> None:
    def names(page: str) -> set[str]:
        """What a page shows as code."""
        found = re.findall(r"<code[^>]*>(.*?)</code>", (site / page).read_text(), flags=re.DOTALL)
        return {re.sub(r"<[^>]+>", "", code) for code in found}

    assert {*FEATURE_NAMES, *GROUND_TRUTH_NAMES, *REWARDS} <= names("environments.html")
    for env, page in (
        (lbgym.LoadBalanceEnv(max_steps=1), "load-balance"),
        (lbgym.FlowDispatchEnv(max_steps=1), "flow-dispatch"),
    ):
        env.reset(seed=0)
        *_, info = env.step(env.action_space.sample())
        env.close()
        assert set(info) <= names(f"environments/{page}.html")


#: Pages that drive a live data plane, and the region they name.
LIVE = {"fit": "marllb_lb0", "live": "marllb_lb0"}
#: Times real time that it is emulated at, where the page needs minutes of it.
SPEEDUP = {"fit": 20}
#: What shows that something was printed that nobody can read: <object at 0x7f...>.
NOT_TEXT = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")


def run(python: Template, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(folder / "minari")}
    return python.run(arguments, cwd=folder, env=environment)


@pytest.fixture
def region(page: str) -> Iterator[str]:
    """The name of a region in which an emulator publishes."""
    name = f"docs_{os.getpid()}"
    options = ["--name", name, "--scenario", "heterogeneous", "--seed", "1", "--speedup", str(SPEEDUP.get(page, 1))]
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", "dataplane", "emulate", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120.0
    while name not in region_names() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    yield name
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), errors


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_block_of_python_runs_as_a_file(
    page: str, tmp_path: Path, python: Template, request: pytest.FixtureRequest
) -> None:
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    name = request.getfixturevalue("region") if page in LIVE else None
    if name is not None:
        record = ["-m", "lbgym", "shm", "record", name, "out.parquet", "--duration", "3"]
        done = run(python, record, tmp_path)
        assert done.returncode == 0, done.stderr
    for number, code in enumerate(blocks(page, "python")):
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        if name is not None:
            code = code.replace(LIVE[page], name)
        (tmp_path / f"block_{number}.py").write_text(code)
        done = run(python, [f"block_{number}.py"], tmp_path)
        assert done.returncode == 0, f"docs/{page}.md, block {number}:\n{code}\n{done.stderr}"
        assert not NOT_TEXT.search(done.stdout), f"docs/{page}.md, block {number} prints {done.stdout}"


def test_files_of_settings_are_files_of_settings(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from lbgym.training import make_config, read_config

    files = blocks("training", "toml")
    assert files
    for text in files:
        (tmp_path / "config.toml").write_text(text)
        algo, values = read_config(tmp_path / "config.toml")
        assert algo is not None
        make_config(algo, values)


def test_what_is_made_shorter_is_there() -> None:
    code = "".join(block for page in PAGES for block in blocks(page, "python"))
    assert [long for long in SHORTER if long not in code] == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_of_a_page_exist(page: str) -> None:
    typer = pytest.importorskip("typer")
    from lbgym.cli import _app

    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("lbgym ")]
    # What the shell itself would take: into the background, into a pipe.
    commands = [list(itertools.takewhile(lambda word: word not in ("&", "|", ">"), line[1:])) for line in words]
    for words in commands:
        command = typer.main.get_command(_app())
        # Down to the command itself, whose parser refuses options it does not know.
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        command.make_context("lbgym", words)
