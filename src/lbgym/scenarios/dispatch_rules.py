"""The one table of dispatch rules: how the data plane places a flow, given weights and its own counters.

The simulator's kernel numbers the rules in this order; what it must know of one at compile time is tested against the
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mechanism = Literal["alias", "lookup", "round_robin", "index", "two_choices"]


@dataclass(frozen=True, slots=True)
class DispatchRule:
    """What is known of a rule.

    Attributes:
        name: in scenarios, files and on the command line.
        mechanism: what the data plane does per new flow: draw from an ``alias`` table, ``lookup`` by hash, take
            turns (``round_robin``), take the server with the least ``index`` (a score by the flows it holds), or the
            better of ``two_choices`` by it.
        weighted: whether the rule reads the weights, so that an agent has an effect.
        oracle: whether it sees what no balancer can: all balancers' flows, true speeds.
        description: one line.
        source: where the rule is from, or what it needs to know (docs/theory.md has the references).
    """

    name: str
    mechanism: Mechanism
    weighted: bool
    oracle: bool
    description: str
    source: str

    @property
    def takes_background(self) -> bool:
        """True if it counts a balancer's own flows by a formula that a background load can be added to."""
        return self.mechanism in ("index", "two_choices") and not self.oracle and self.name != "table"


def _rule(name: str, mechanism: Mechanism, description: str, source: str, *, weighted: bool = False) -> DispatchRule:
    return DispatchRule(name, mechanism, weighted, name.startswith("oracle_"), description, source)


#: Every rule by its name, in the order of the kernel's numbers.
RULES: dict[str, DispatchRule] = {
    rule.name: rule
    for rule in (
        _rule("ecmp", "lookup", "a server by the flow's hash, all alike", "RFC 2992"),
        _rule(
            "wcmp",
            "alias",
            "a server by the flow's hash, in proportion to the weights",
            "WCMP (Zhou et al., 2014); alias table of Vose, 1991",
            weighted=True,
        ),
        _rule(
            "maglev",
            "lookup",
            "as wcmp, from a table that changes little when the servers change",
            "Maglev (Eisenbud et al., NSDI 2016), section 3.4",
            weighted=True,
        ),
        _rule(
            "round_robin",
            "round_robin",
            "servers in turn, each as often as its weight says",
            "smooth weighted round robin of NGINX 1.3.1, 2012",
            weighted=True,
        ),
        _rule("lsq", "index", "the server with the fewest own open flows q", "Winston, 1977"),
        _rule(
            "sed", "index", "least (q + 1) / weight: the shortest expected delay", "Shenker and Weinrib", weighted=True
        ),
        _rule(
            "sed_scaled",
            "index",
            "least (m q + 1) / weight: own flows stand for those of all m balancers",
            "as sed, if the other balancers hold as many flows there",
            weighted=True,
        ),
        _rule(
            "marginal",
            "index",
            "least increase of the total delay, own and others': cores / weight while a core is free, then "
            "(2 q + 1) / weight",
            "greedy on the sum of delays, docs/theory.md",
            weighted=True,
        ),
        _rule(
            "whittle",
            "index",
            "least Whittle index of a server that may refuse flows: within 3 % of the optimum for two servers",
            "Whittle, 1988; Argon et al., 2009; benchmarks/optimum.py",
            weighted=True,
        ),
        _rule(
            "table",
            "index",
            "least entry, at the own open flows q, of a table per server that is set from outside",
            "Simulation.step(tables=...); as lsq until one is set",
        ),
        _rule("p2c", "two_choices", "the one of two servers with fewer own open flows", "Mitzenmacher"),
        _rule("p2c_sed", "two_choices", "the one of two with the less (q + 1) / weight", "as p2c", weighted=True),
        _rule("p2c_marginal", "two_choices", "the better of two by marginal", "as p2c and marginal", weighted=True),
        _rule(
            "oracle_lsq",
            "index",
            "the server with the fewest open flows of all balancers",
            "as lsq; needs global counters",
        ),
        _rule(
            "oracle_sed",
            "index",
            "as sed, with all balancers' flows and true speeds; no lower bound: a flow takes one core",
            "as sed; needs counters and speeds",
        ),
        _rule(
            "oracle_marginal",
            "index",
            "as marginal, with all balancers' flows and true speeds",
            "as marginal; needs counters and speeds",
        ),
        _rule(
            "oracle_whittle",
            "index",
            "as whittle, with all balancers' flows and true speeds",
            "as whittle; needs counters and speeds",
        ),
        _rule(
            "oracle_least_work",
            "index",
            "the server that would be done with its work and the flow first",
            "needs counters, speeds and sizes",
        ),
    )
}

#: Names of the rules.
DISPATCH_RULES = tuple(RULES)
#: Names of those on which weights have an effect.
WEIGHTED_RULES = tuple(rule.name for rule in RULES.values() if rule.weighted)
