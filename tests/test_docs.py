"""The documentation site: it builds strictly, needs no network, and what it shows runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lbgym
from lbgym.env.rewards import REWARDS
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FRAMEWORKS = sorted(f"frameworks/{page.stem}" for page in DOCS.glob("frameworks/*.md"))
PAGES = ["index", "quickstart", "multi-agent", "training", "clusters", *FRAMEWORKS]
#: What makes a training of the pages short.
SHORTER = {
    "total_steps=1_500_000": "total_steps=4_096",
    '"total_steps": 1_500_000': '"total_steps": 4_096',
    'network="equivariant", total_steps=300_000': 'network="equivariant", total_steps=2_048, num_envs=8, max_steps=32',
    "total_steps=300_000": "total_steps=2_048, num_envs=8, warmup=1, max_steps=32",
    "total_steps=500_000": "total_steps=1_024, num_envs=8, max_steps=32",
    "total_timesteps=100_000": "total_timesteps=1_024",
    "seeds=10": "seeds=2, duration=5.0",
}
#: Modules a page's Python needs beyond the core.
NEEDS = {
    "quickstart": ("torch", "rich", "scipy"),
    "multi-agent": ("pettingzoo",),
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
    for module in ("mkdocs", "material", "latex2mathml"):
        pytest.importorskip(module)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"},
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
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "live.md").open("a") as page:
        page.write("\n[a](../src/none.py) [b](none.md) [c](theory.md#none)\n\n$x \\nosuchcommand y$\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for what in ("links to ../src/none.py", "'none.md'", "'#none'", "nosuchcommand"):
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
        assert 'class="arithmatex"' not in text, page.name
        assert "<!-- settings" not in text, page.name
    assert not list(site.rglob("*.py"))


def test_reference_names_what_the_code_has(site: Path) -> None:
    page = (site / "environments.html").read_text()
    for name in (*FEATURE_NAMES, *GROUND_TRUTH_NAMES, *REWARDS):
        assert f"<code>{name}</code>" in page, name
    for env in (lbgym.LoadBalanceEnv(max_steps=1), lbgym.FlowDispatchEnv(max_steps=1)):
        env.reset(seed=0)
        *_, info = env.step(env.action_space.sample())
        env.close()
        assert not [key for key in info if f"<code>{key}</code>" not in page]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(compile(code, f"docs/{page}.md", "exec"), {"__name__": "docs"})


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

    lines = "".join(blocks(page, "sh")).splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("lbgym ")]
    for words in commands:
        command = typer.main.get_command(_app())
        # Down to the command itself, whose parser refuses options it does not know.
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        command.make_context("lbgym", words)
