"""Contenders of a comparison by name: a dispatch rule with a weight policy, or a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import PolicyError, UnknownNameError
from ..policies import HEURISTICS, TRAINED_SUFFIXES, heuristic
from ..policies.pretrained import pretrained_file, pretrained_names
from ..scenarios import DISPATCH_RULES, RULES, WEIGHTED_RULES

#: Short names of common contenders.
SHORTHANDS = {
    "awcmp": "wcmp+awcmp",
    "wcmp-uniform": "wcmp+uniform",
    **{name: f"table+{name}" for name, entry in HEURISTICS.items() if entry.tables},
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A dispatch rule, which places the flows, and a policy, which sets the weights.

    Attributes:
        label: its name in tables and files.
        dispatch: dispatch rule; None: the one that the model was trained with, else the scenario's.
        policy: name of a heuristic; None: the trained model at ``path``.
        path: a trained model's file, absolute.
    """

    label: str
    dispatch: str | None = None
    policy: str | None = None
    path: str | None = None


def parse_contender(text: str) -> Contender:
    """Parse a contender.

    * ``RULE``: a dispatch rule; where it reads weights they are the servers' cores, as an operator would configure;
    * ``RULE+POLICY``: with a heuristic's weights (``sed+latency``, ``wcmp+uniform``, ``p2c_sed+random``,
      ``sed+slow-start+latency``);
    * ``awcmp`` is ``wcmp+awcmp``, ``wcmp-uniform`` is ``wcmp+uniform``; a heuristic that sets tables of scores (``c3``)
      is ``table+`` it;
    * ``adaptive``: a pretrained policy, by name;
    * ``PATH``: a trained model (.pt or .zip) under the rule it was trained with; ``RULE+PATH``: under another;
    * ``LABEL=CONTENDER``: any of these under another name.

    Underscores and hyphens are alike in the names of rules and policies.

    Raises:
        UnknownNameError: for an unknown rule or policy; the message lists the known ones.
        PolicyError: if the model's file does not exist, or the rule ignores weights.
    """
    text = text.strip()
    label, equals, rest = text.partition("=")
    if equals and "/" not in label and not Path(text).is_file():
        if not label.strip() or not rest.strip():
            raise PolicyError(f"a label is written LABEL=CONTENDER, got {text!r}")
        return replace(parse_contender(rest), label=label.strip())
    full = SHORTHANDS.get(text.lower().replace("_", "-"), text)
    head, plus, policy = (part.strip() for part in full.partition("+"))
    rule = head.lower().replace("-", "_")
    if rule not in DISPATCH_RULES:
        if _is_model(text):
            return Contender(Path(text).stem, path=_existing(text))
        if text.lower() in pretrained_names():
            return Contender(text.lower(), path=str(pretrained_file(text)))
        if plus:
            raise UnknownNameError("dispatch rule", head, DISPATCH_RULES)
        paths = (f"PATH{suffix}" for suffix in TRAINED_SUFFIXES)
        known = (*DISPATCH_RULES, *SHORTHANDS, *pretrained_names(), "RULE+POLICY", *paths)
        raise UnknownNameError("contender", head, known)
    if not plus:
        return Contender(text.lower(), rule, "cores")
    if _is_model(policy):
        _check_weighted(rule, text)
        return Contender(f"{rule}+{Path(policy).stem}", rule, path=_existing(policy))
    if policy.lower() in pretrained_names():
        _check_weighted(rule, text)
        return Contender(text.lower(), rule, path=str(pretrained_file(policy)))
    try:
        name, entry = heuristic(policy)
    except UnknownNameError as error:
        known = (*error.known, *(f"PATH{suffix}" for suffix in TRAINED_SUFFIXES))
        where = f"contender {text!r}"
        raise UnknownNameError("policy", error.name, known, where, error.note) from None
    if entry.tables != (rule == "table"):
        sets = "sets tables of scores" if entry.tables else "sets weights"
        reads = "reads tables of scores alone" if rule == "table" else "does not read them"
        raise PolicyError(f"contender {text!r}: the policy {name!r} {sets}, and the dispatch rule {rule!r} {reads}")
    if entry.background:
        check_background(rule, text)
    if not entry.tables and not entry.background:
        _check_weighted(rule, text)
    return Contender(text.lower(), rule, name)


def check_background(rule: str, contender: str) -> None:
    """Refuse a policy of background loads under a rule that does not add them to a balancer's own flows.

    Raises:
        PolicyError: naming both.
    """
    if not RULES[rule].takes_background:
        taking = ", ".join(other.name for other in RULES.values() if other.takes_background)
        raise PolicyError(
            f"contender {contender!r}: the policy sets background loads, and the dispatch rule {rule!r} counts no "
            f"flows that they could be added to; rules that do: {taking}"
        )


def _check_weighted(rule: str, text: str) -> None:
    """Refuse a policy of weights under a rule that reads none."""
    if rule not in WEIGHTED_RULES:
        raise PolicyError(
            f"the dispatch rule {rule!r} reads no weights, so {text!r} would be {rule!r} under another name; "
            f"rules that do: {', '.join(WEIGHTED_RULES)}"
        )


def parse_contenders(items: str | Iterable[str | Contender]) -> list[Contender]:
    """Parse contenders from a comma-separated text or from several texts.

    Models of the same file name are prefixed with their folder's.

    Raises:
        PolicyError: if the list is empty, or two contenders have the same label.
        UnknownNameError: as :func:`parse_contender`.
    """
    if isinstance(items, str):
        items = [part for part in items.split(",") if part.strip()]
    contenders = [item if isinstance(item, Contender) else parse_contender(item) for item in items]
    if not contenders:
        raise PolicyError("a comparison needs at least one contender, such as 'sed' or 'wcmp+latency'")
    return _distinct(contenders)


def _distinct(contenders: Sequence[Contender]) -> list[Contender]:
    """Prefix models of the same file name with their folder's; refuse any other repeated label."""
    given = [contender.label for contender in contenders]
    result = []
    for contender in contenders:
        if contender.path is not None and given.count(contender.label) > 1:
            path = Path(contender.path)
            contender = replace(contender, label=contender.label.replace(path.stem, f"{path.parent.name}/{path.stem}"))
        result.append(contender)
    labels = [contender.label for contender in result]
    for label in labels:
        if labels.count(label) > 1:
            raise PolicyError(f"two contenders are called {label!r}; name one of them with LABEL=CONTENDER")
    return result


def _is_model(text: str) -> bool:
    return text.lower().endswith(TRAINED_SUFFIXES)


def _existing(text: str) -> str:
    path = Path(text).expanduser()
    if not path.is_file():
        raise PolicyError(f"there is no trained model at {str(path)!r}")
    return str(path.resolve())
