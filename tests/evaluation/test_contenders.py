from __future__ import annotations

from pathlib import Path

import pytest

from lbgym.errors import PolicyError, UnknownNameError
from lbgym.evaluation import WEIGHTED_RULES, Contender, parse_contender, parse_contenders
from lbgym.policies import HEURISTICS
from lbgym.scenarios import DISPATCH_RULES


@pytest.mark.parametrize("rule", DISPATCH_RULES)
def test_every_rule_is_a_contender_with_weights_from_the_cores(rule: str) -> None:
    assert parse_contender(rule) == Contender(rule, rule, "cores")


@pytest.mark.parametrize("rule", WEIGHTED_RULES)
@pytest.mark.parametrize("policy", [name for name, e in HEURISTICS.items() if not (e.tables or e.background)])
def test_every_weighted_rule_takes_every_policy(rule: str, policy: str) -> None:
    assert parse_contender(f"{rule}+{policy}") == Contender(f"{rule}+{policy}", rule, policy)


@pytest.mark.parametrize("policy", [name for name, entry in HEURISTICS.items() if entry.tables])
def test_tables_of_scores_have_a_rule_of_their_own(policy: str) -> None:
    assert parse_contender(policy) == Contender(policy, "table", policy)
    with pytest.raises(PolicyError, match=f"the policy '{policy}' sets tables of scores, and .* 'sed' does not read"):
        parse_contender(f"sed+{policy}")


def test_background_loads_need_a_rule_that_counts() -> None:
    assert parse_contender("lsq+field") == Contender("lsq+field", "lsq", "field")
    assert parse_contender("marginal+field+latency") == Contender("marginal+field+latency", "marginal", "field+latency")
    with pytest.raises(PolicyError, match="sets background loads, and the dispatch rule 'wcmp' counts no flows"):
        parse_contender("wcmp+field")
    with pytest.raises(PolicyError, match="'latency' sets weights, and the dispatch rule 'table' reads tables"):
        parse_contender("table+latency")


@pytest.mark.parametrize(
    ("text", "contender"),
    [
        ("awcmp", Contender("awcmp", "wcmp", "awcmp")),
        ("wcmp-uniform", Contender("wcmp-uniform", "wcmp", "uniform")),
        ("wcmp_uniform", Contender("wcmp_uniform", "wcmp", "uniform")),
        (" Round-Robin ", Contender("round-robin", "round_robin", "cores")),
        ("sed+littles_law", Contender("sed+littles_law", "sed", "littles-law")),
        ("mine=sed+latency", Contender("mine", "sed", "latency")),
        ("two words = ecmp", Contender("two words", "ecmp", "cores")),
    ],
)
def test_other_spellings(text: str, contender: Contender) -> None:
    assert parse_contender(text) == contender


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("a/agent.pt", "b/agent.pt", "lr=3/model.zip"):
        path = tmp_path / name
        path.parent.mkdir()
        path.touch()
    return tmp_path


def test_trained_models_are_paths(models: Path) -> None:
    path = str(models / "a/agent.pt")
    assert parse_contender(path) == Contender("agent", path=path)
    assert parse_contender(f"p2c_sed+{path}") == Contender("p2c_sed+agent", "p2c_sed", path=path)
    assert parse_contender(f"best={path}") == Contender("best", path=path)
    assert parse_contender(str(models / "lr=3/model.zip")).label == "model"
    assert parse_contender(f"x={models / 'lr=3/model.zip'}").label == "x"


def test_a_relative_path_is_kept_absolute(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    assert parse_contender("a/agent.pt").path == str(models / "a/agent.pt")


def test_models_of_one_name_are_told_apart_by_their_folder(models: Path) -> None:
    chosen = parse_contenders(f"sed,{models / 'a/agent.pt'},{models / 'b/agent.pt'}")
    assert [contender.label for contender in chosen] == ["sed", "a/agent", "b/agent"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedd", r"unknown contender 'sedd'.*Did you mean 'sed'.*wcmp-uniform"),
        ("sedd+latency", r"unknown dispatch rule 'sedd'.*Did you mean 'sed'"),
        ("c3+sed", r"unknown dispatch rule 'c3'\. Known: ecmp, "),
        ("sed+latenzy", r"unknown policy 'latenzy' in contender 'sed\+latenzy'.*Did you mean 'latency'"),
        ("latency", r"unknown contender 'latency'"),
        ("", r"unknown contender ''"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        parse_contender(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lsq+latency", "'lsq' reads no weights"),
        ("oracle_sed+cores", "'oracle_sed' reads no weights"),
        ("nowhere.pt", "no trained model at 'nowhere.pt'"),
        ("sed+nowhere.zip", "no trained model at 'nowhere.zip'"),
        ("=sed", "LABEL=CONTENDER"),
        ("x=", "LABEL=CONTENDER"),
    ],
)
def test_what_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_contender(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "at least one"), (" , ", "at least one"), ("sed,lsq,sed", "two contenders are called 'sed'")],
)
def test_what_cannot_be_together(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_contenders(text)
