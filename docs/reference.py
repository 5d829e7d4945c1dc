"""Pages of the documentation site that are made from the code whenever it is built, so that they cannot go stale.

A feature or an argument without a description fails the build.
"""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium import spaces

import lbgym
from lbgym import wrappers
from lbgym.dataplanes import scenario_with_options
from lbgym.env.actions import make_action_codec
from lbgym.env.flow_dispatch import FlowObservation
from lbgym.env.observations import LAYOUTS, MAX_COUNT, MAX_TIME, TIME_UNIT, ObservationLayout
from lbgym.env.rewards import reward_table
from lbgym.features import FEATURE_ALIASES, FEATURE_NAMES, GROUND_TRUTH_NAMES

PACKAGE = Path(lbgym.__file__).parent

#: Servers of the examples of spaces.
N = 4
ACTION_TYPES = {
    "discrete": "a level of `action_weights` per server",
    "joint": "one number for every combination of levels, the last server's varying fastest",
    "continuous": "the weights, clipped to `min_weight` and `max_weight`",
    "index": "a speed and a background load per server, both relative to what is configured",
    "normalized": "the weights on a logarithmic scale: −1 is `min_weight`, 1 is `max_weight`",
}
STATISTICS = {
    "mean": "mean of {}",
    "p90": "90th percentile of {}",
    "std": "standard deviation of {}",
    "mean_decay": "mean of {}, recent samples counting more",
    "p90_decay": "90th percentile of {}, recent samples counting more",
}
SAMPLES = {"fct": "flow completion times", "duration": "flow durations (ages of open flows)"}
COLUMNS = {
    "n_flow_on": ("flows", "flows that this balancer placed there and that have not ended"),
    "cpu_usage": ("0 to 1", "busy cores over cores, mean over the step (ground truth)"),
    "memory_usage": ("0 to 1", "memory in use (ground truth)"),
    "busy_workers": ("flows", "flows in service (ground truth)"),
} | {f"{f}_{s}": ("s", words.format(what)) for f, what in SAMPLES.items() for s, words in STATISTICS.items()}


# Markdown from the code


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def plain(text: str) -> str:
    """A docstring's text as Markdown: roles, double backquotes and examples become code."""
    text = re.sub(r"^>>> .*(?:\n.+)*", lambda m: f"```pycon\n{m[0]}\n```", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`([^`<]+?)\s*<[^`]*>`", r"`\1`", text)
    text = re.sub(r":\w+:`~([^`]+)`", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)``(?!`)([^`]+)``(?!`)", r"`\1`", text)


def sections(item: Any) -> dict[str, str]:
    """A Google docstring by section; "" is its text."""
    parts = re.split(r"^(Args|Attributes|Raises|Returns|Yields):$", inspect.getdoc(item) or "", flags=re.MULTILINE)
    return {"": parts[0].strip()} | dict(zip(parts[1::2], map(inspect.cleandoc, parts[2::2]), strict=True))


def entries(section: str) -> list[tuple[str, str]]:
    """Names and texts of a section such as "Args"."""
    found = re.findall(r"^(\S[^:\n]*): (.*(?:\n[ \t]+.*)*)", section, flags=re.MULTILINE)
    return [(name, " ".join(text.split())) for name, text in found]


def options_table(item: type) -> str:
    """The arguments of a constructor, with their defaults.

    Raises:
        ValueError: if an argument is not documented, or something else is.
    """
    parameters = inspect.signature(item).parameters
    rows, named = [], []
    for names, text in entries(sections(item).get("Args", "")):
        each = names.split(", ")
        named += each
        defaults = [_default(parameters[name]) for name in each]
        rows.append([", ".join(f"`{name}`" for name in each), ", ".join(defaults), plain(text)])
    if set(named) != set(parameters):
        raise ValueError(f"{item.__name__} documents {named} and takes {list(parameters)}")
    return table(["option", "default", "meaning"], rows)


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return "any"
    if value is inspect.Parameter.empty:
        return "required"
    return f"`{value}`" if isinstance(value, enum.Enum) else f"`{value!r}`"


def errors_list(item: Any) -> str:
    """What a constructor raises."""
    return "\n".join(f"* `{name}`: {plain(text)}" for name, text in entries(sections(item).get("Raises", "")))


def describe(space: spaces.Space[Any]) -> str:
    """A space in one line."""
    if isinstance(space, spaces.Dict):
        return ", ".join(f"`{key}`: {describe(part)}" for key, part in space.spaces.items())
    if isinstance(space, spaces.Box):
        low, high = f"{space.low.min():g}", f"{space.high.max():g}"
        return f"`Box` {space.dtype}{list(space.shape)}, {low} to {high.replace('inf', '∞')}"
    return f"`{space}`"


def features_table() -> str:
    """The columns of an observation.

    Raises:
        KeyError: for a column without a description.
    """
    aliases = {name: sorted(a for a, c in FEATURE_ALIASES.items() if c == name and a != name) for name in COLUMNS}
    rows = []
    for i, name in enumerate(FEATURE_NAMES + GROUND_TRUTH_NAMES):
        unit, meaning = COLUMNS[name]
        rows.append([i, f"`{name}`", unit, meaning, ", ".join(f"`{a}`" for a in aliases[name])])
    return table(["column", "name", "unit", "meaning", "also called"], rows)


def settings_table(file: str, name: str) -> str:
    """The fields of a dataclass of ``file`` in the package, with those it inherits from TrainingConfig behind its own.

    Read, not imported, so that no extra is needed.
    """
    own = _settings(file, name)
    inherited = {} if name == "TrainingConfig" else _settings("training/config.py", "TrainingConfig")
    rows = own | {field: row for field, row in inherited.items() if field not in own}
    return table(["setting", "default", "meaning"], list(rows.values()))


def _settings(file: str, name: str) -> dict[str, list[str]]:
    """Rows by field."""
    tree = ast.parse((PACKAGE / file).read_text())
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    rows = {}
    for field, words in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(words, ast.Expr) and isinstance(words.value, ast.Constant):
            default = ast.unparse(field.value) if field.value else "required"
            default = re.sub(r"field\(default_factory=(\w+)\)", r"\1()", default).replace("PER_ALGORITHM", "its own")
            text = plain(" ".join(str(words.value.value).split())).replace("\\|", "|")
            rows[ast.unparse(field.target)] = [f"`{ast.unparse(field.target)}`", f"`{default}`", text]
    return rows


#: How each environment is made, and what one step of it is; the page that describes it is named after it.
ENVIRONMENTS: dict[type, tuple[str, str, str]] = {
    lbgym.LoadBalanceEnv: (
        "load-balance",
        'gymnasium.make("lbgym:lbgym/LoadBalance-v0", num_servers=4)',
        "a weight per server, for the next 250 ms",
    ),
    lbgym.LoadBalanceVectorEnv: (
        "load-balance-vector",
        'gymnasium.make_vec("lbgym:lbgym/LoadBalance-v0", num_envs=256, num_servers=4)',
        "the same in R replicas, in one call",
    ),
    lbgym.MultiLoadBalanceEnv: (
        "multi-load-balance",
        'lbgym.MultiLoadBalanceEnv(scenario="marllb-moderate")',
        "weights of each balancer, all of them agents",
    ),
    lbgym.MultiLoadBalanceVectorEnv: (
        "multi-load-balance-vector",
        'lbgym.MultiLoadBalanceVectorEnv(256, scenario="marllb-moderate")',
        "the same in R replicas, in one call",
    ),
    lbgym.FlowDispatchEnv: (
        "flow-dispatch",
        'gymnasium.make("lbgym:lbgym/FlowDispatch-v0")',
        "the server of one flow",
    ),
    lbgym.FlowDispatchVectorEnv: (
        "flow-dispatch-vector",
        'gymnasium.make_vec("lbgym:lbgym/FlowDispatch-v0", num_envs=256)',
        "the same in R replicas, in one call",
    ),
}


def pages() -> dict[str, str]:
    """All generated pages: Markdown by the path in docs/."""
    cards = {f"environments/{page}.md": environment_page(item) for item, (page, *_) in ENVIRONMENTS.items()}
    return {"environments.md": environments_page()} | cards


def environment_page(item: type) -> str:
    """An environment's card, and what it is, takes and raises."""
    _, made, step = ENVIRONMENTS[item]
    environment = eval(made, {"gymnasium": gymnasium, "lbgym": lbgym})
    if isinstance(environment, lbgym.MultiLoadBalanceEnv):
        agent = environment.possible_agents[0]
        action, observation = environment.action_space(agent), environment.observation_space(agent)
        whose = " of each agent"
    else:
        vector = item in (lbgym.LoadBalanceVectorEnv, lbgym.FlowDispatchVectorEnv)
        action = environment.single_action_space if vector else environment.action_space
        observation = environment.single_observation_space if vector else environment.observation_space
        whose = " of each replica" if vector else ""
        if item is lbgym.MultiLoadBalanceVectorEnv:
            whose = " of each agent of each replica"
    environment.close()
    card = table(
        ["", item.__name__],
        [
            ["Made by", f"`{made}`"],
            ["One step is", step],
            [f"Action space{whose}", describe(action)],
            [f"Observation space{whose}", describe(observation)],
            ["Import", f"`lbgym.{item.__name__}`"],
        ],
    )
    parts = [f"# {item.__name__}", card, plain(sections(item)[""]), "## Options", options_table(item)]
    if raised := errors_list(item):
        parts += ["## Errors", raised]
    return "\n\n".join(parts) + "\n"


#: What the site lists under the page of all environments.
CHAPTER = "```{toctree}\n:hidden:\n\n" + "\n".join(
    [*(f"environments/{page}" for page, *_ in ENVIRONMENTS.values()), "scenarios", "multi-agent", "theory"]
)


def environments_page() -> str:
    """The reference of all environments, in Markdown."""
    layouts = [
        [
            f'`"{name}"`',
            describe(ObservationLayout(N, name).space),
            describe(ObservationLayout(N, name, normalize=True).space),
        ]
        for name in LAYOUTS
    ]
    actions = [[f'`"{name}"`', describe(make_action_codec(N, name).space), text] for name, text in ACTION_TYPES.items()]
    flows = [[f'`"{name}"`', describe(FlowObservation(N, name).space)] for name in LAYOUTS]
    wrapped = [
        [f"`{name}`", plain(sections(getattr(wrappers, name))[""].split("\n\n")[0])] for name in wrappers.__all__
    ]
    return "\n\n".join(
        [
            "# Environments",
            "Generated from the code. Units are seconds, flows and core-seconds; N is the number of servers. What the "
            "formulas mean is in [theory](theory.md), what can be balanced in [scenarios](scenarios.md).",
            table(
                ["environment", "one step is", "made by"],
                [
                    [f"[`{item.__name__}`](environments/{page}.md)", step, f"`{made}`"]
                    for item, (page, made, step) in ENVIRONMENTS.items()
                ],
            ),
            CHAPTER + "\n```",
            "## Features",
            "What a balancer sees of each server. The last three are there with `use_ground_truth=True`. Rows of "
            "servers that take no new flows are 0. With `observe_weights=True` a row ends with `weight`, the logarithm "
            "of the server's weight relative to the active servers' geometric mean: signed, unbounded, not normalised.",
            features_table(),
            "## Observation spaces",
            f"For N = {N} servers. With `normalize=True` a count c becomes log(1 + c) / log(1 + {MAX_COUNT:g}), a time "
            f"t in seconds log(1 + t / {TIME_UNIT:g}) / log(1 + {MAX_TIME:g} / {TIME_UNIT:g}), each at most 1.",
            table(["`observation`", "space", "with `normalize=True`"], layouts),
            "## Action spaces",
            f"For N = {N} servers and the default levels and bounds.",
            table(["`action_type`", "space", "meaning"], actions),
            f"Of `FlowDispatchEnv`, with its default fields and N = {N}:",
            table(["`observation`", "space"], flows),
            "## Rewards",
            "`reward_type` is one of these names, a mapping of names to weights such as "
            '`{"jain": 1.0, "p99_fct": 0.1, "jain:n_flow_on": 0.5}`, or a function of the `Snapshot`. l are the values '
            "of `reward_field` at the n active servers. Fairness rewards first, then those of the flows that ended in "
            "the step.",
            reward_table(),
            "## Options of reset",
            plain(sections(scenario_with_options)[""]),
            "## Wrappers",
            "In `lbgym.wrappers`, for single environments.",
            table(["wrapper", "what it does"], wrapped),
        ]
    )
