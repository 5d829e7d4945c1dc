"""The package as a whole: what it exports, what importing it costs, who may import whom, what a wheel contains."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

import lbgym
from lbgym.env.rewards import reward_table
from lbgym.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lbgym"

#: Modules that cost time or are optional; `import lbgym` must not touch them.
HEAVY = (
    "numba",
    "torch",
    "matplotlib",
    "rich",
    "typer",
    "pyarrow",
    "stable_baselines3",
    "pandas",
    "scipy",
    "PIL",
    "grpc",
    "tensorboard",
    "pettingzoo",
    "prometheus_client",
    "ray",
    "benchmarl",
    "torchrl",
)

#: Every module or package of lbgym by level; a module imports its own level's own package and lower levels.
LEVELS = (
    ("_lazy", "errors"),
    ("atomic", "checks", "formatting", "http_server", "ray_cluster"),
    ("scenarios", "features", "metrics_page", "toml_files"),
    ("snapshot",),
    ("simulator", "sharedmemory"),
    ("dataplanes", "drivers", "monitor"),
    ("env", "rewards", "wrappers"),
    ("policies",),
    ("evaluation", "training", "controller", "recording"),
    ("lab", "report"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
#: Import paths of the documentation lead into the room they are named after.
ROOM = dict.fromkeys(("env", "rewards", "wrappers"), "environment")


def test_exported_names_exist_and_are_documented() -> None:
    assert len(set(lbgym.__all__)) == len(lbgym.__all__)
    for name in lbgym.__all__:
        value = getattr(lbgym, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"lbgym.{name} has no docstring"


def packages() -> list[str]:
    """The package and its rooms, as dotted names; a room is a folder without an underscore."""
    found = {path.parent.relative_to(SOURCE.parent) for path in SOURCE.rglob("__init__.py")}
    return sorted(".".join(path.parts) for path in found if not any(part.startswith("_") for part in path.parts))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def shown(path: Path, *, imports: bool = True) -> set[str]:
    """Names without an underscore that a module binds: what it defines and, with ``imports``, imports from lbgym."""
    found: set[str] = set()
    statements = list(ast.parse(path.read_text()).body)
    for node in statements:
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            statements.extend(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (name for target in targets for name in ast.walk(target))
            found.update(name.id for name in names if isinstance(name, ast.Name))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "lbgym"):
            found.update(alias.asname or alias.name for alias in node.names if imports)
    return {name for name in found if not name.startswith("_")}


#: Public modules that are no folders, and whether what they import is theirs to show.
PUBLIC = {"checks": False, "errors": False, "rewards": True, "snapshot": False, "wrappers": True}


@pytest.mark.parametrize("package", packages())
def test_packages_show_exactly_what_they_export(package: str) -> None:
    try:
        module = importlib.import_module(package)
    except MissingExtraError as error:
        # A framework; the other environment of the tests has it.
        pytest.skip(str(error))
    assert module.__doc__
    path = SOURCE.parent.joinpath(*package.split("."), "__init__.py")
    exported = set(getattr(module, "__all__", ())) - {"__version__"}
    assert exported == shown(path)
    missing = set()
    for name in exported:
        try:
            assert hasattr(module, name), f"{package}.{name} is exported and does not exist"
        except MissingExtraError as error:
            # no environment has all frameworks; between them the tests' environments do
            missing.add(error.name)
    frameworks = {"torch", "stable_baselines3", "ray", "benchmarl", "torchrl"}
    assert missing <= (frameworks if package.startswith("lbgym.training") else set())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_show_exactly_what_they_export(name: str) -> None:
    module = importlib.import_module(f"lbgym.{name}")
    assert set(module.__all__) == shown(SOURCE / f"{name}.py", imports=PUBLIC[name])


def test_import_of_what_a_package_shows_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "__init__.py"
    path.write_text("from .a import b as c\nimport os\nfrom os import path\nD: int = 1\n_e = 2\nclass F: ...\n")
    assert shown(path) == {"c", "D", "F"}
    assert shown(path, imports=False) == {"D", "F"}


def test_import_brings_nothing_heavy() -> None:
    script = f"import sys, lbgym; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lbgym.no_such_name  # type: ignore[attr-defined]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield ".".join(["lbgym", *path.relative_to(SOURCE).with_suffix("").parts]), path


def imported(name: str, path: Path) -> set[str]:
    """Modules of lbgym that a file imports when it runs, wherever in the file, as dotted names."""
    package = name.split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            # `from . import x` and `from lbgym import x` name modules.
            found.update(".".join([*module, alias.name]) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {module for module in found if module.split(".")[0] == "lbgym"}


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules()])
def test_layers_import_downwards(name: str, path: Path) -> None:
    part = name.split(".")[1]
    if part in ("__init__", "__main__"):
        return
    assert part in LEVEL, f"lbgym.{part} has no level in tests/test_package.py"
    for module in imported(name, path):
        if module == "lbgym.__version__":
            continue
        pieces = module.split(".")
        other = pieces[1] if len(pieces) > 1 else ""
        # `from lbgym import LoadBalanceEnv` from inside would go through the top.
        assert other in LEVEL, f"{name} imports {module} through the package's top"
        same = other == part or (part in ROOM and other in ROOM)
        assert same or LEVEL[other] < LEVEL[part], f"{name} imports {module}, which is not below it"


def test_layer_check_sees_an_upward_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from ..evaluation.runner import run\n    from .. import training\n")
    assert imported("lbgym.simulator.module", path) == {"lbgym.evaluation.runner.run", "lbgym.training"}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(set(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return [group for group in found if len(group) > 1]


def test_no_modules_import_each_other() -> None:
    paths = dict(modules())
    known = {name.removesuffix(".__init__") for name in paths}

    def target(dotted: str) -> str | None:
        pieces = dotted.split(".")
        names = (".".join(pieces[:end]) for end in range(len(pieces), 1, -1))
        return next((name for name in names if name in known), None)

    graph = {
        name.removesuffix(".__init__"): {to for to in map(target, imported(name, path)) if to is not None}
        for name, path in paths.items()
    }
    for name, others in graph.items():
        others.discard(name)
    assert circles(graph) == []


def test_circle_of_imports_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_long_files_have_a_reason() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE).as_posix()
        if path.suffix in (".py", ".h", ".c", ".in") and f"`{name}`" not in contributing:
            assert len(path.read_text().splitlines()) <= 700, f"{name} is long; split it, or say why in CONTRIBUTING.md"


def test_package_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_version_has_one_source() -> None:
    try:
        installed = version("lbgym")
    except PackageNotFoundError:
        pytest.skip("lbgym is not installed, only on the path")
    assert lbgym.__version__ == installed


def test_wheel_contains_what_the_package_needs(tmp_path: Path) -> None:
    if find_spec("build") is None or find_spec("hatchling") is None:
        pytest.skip("needs build and hatchling")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("lbgym-*.whl")
    assert wheel.name.startswith(f"lbgym-{lbgym.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    files = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Compiled where `lbgym dataplane afpacket` first runs.
    core = (ROOT / "plugins" / "balancer-core").iterdir()
    files |= {f"lbgym/drivers/afpacket/balancer-core/{path.name}" for path in core}
    assert files <= names
    assert {name for name in names if not name.startswith("lbgym-")} == files
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Lower bounds only: an upper bound in a library is a conflict in somebody's stack.
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert required
    assert not [line for line in required if "<" in line or "==" in line.split(";")[0]]


def test_theory_shows_the_registered_rewards() -> None:
    assert reward_table() in (ROOT / "docs" / "theory.md").read_text()


#: Pages that exist only where the site has been built; its strict build (tests/test_docs.py) checks the links to them.
GENERATED = (ROOT / "docs" / "environments.md", ROOT / "docs" / "environments")


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(
            page.relative_to(ROOT).as_posix()
            for page in (ROOT / "docs").rglob("*.md")
            if not any(page.is_relative_to(made) for made in GENERATED)
        ),
    ],
)
def test_links_of_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    targets = {part.split(")")[0] for part in text.split("](")[1:]}
    anchors = {
        "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c == "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, f"{document} links to {target}"
        elif "://" not in target:
            file = (path.parent / target.split("#")[0]).resolve()
            made = any(file.is_relative_to(page) for page in GENERATED)
            assert made or file.exists(), f"{document} links to {target}"
