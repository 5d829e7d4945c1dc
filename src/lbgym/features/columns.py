"""The one table of feature columns: names, order, units and aliases."""

from __future__ import annotations

from ..errors import UnknownNameError

#: Statistics of one reservoir, in column order.
STATISTICS = ("mean", "p90", "std", "mean_decay", "p90_decay")

#: Features per server, in column order. Counts and seconds.
FEATURE_NAMES = (
    "n_flow_on",
    *(f"fct_{s}" for s in STATISTICS),
    *(f"duration_{s}" for s in STATISTICS),
)
NUM_FEATURES = len(FEATURE_NAMES)

#: Ground truth of a server: CPU use (0..1), memory use (0..1), flows in service.
GROUND_TRUTH_NAMES = ("cpu_usage", "memory_usage", "busy_workers")
NUM_GROUND_TRUTH = len(GROUND_TRUTH_NAMES)

#: Statistics of the flows that ended during one control interval (see ``Snapshot.interval``). A rejected or failed
#: flow counts with an FCT of ``reject_timeout``.
SERVICE_NAMES = (
    "completed",  # flows that completed in the interval
    "rejected",  # flows that were rejected or failed in the interval
    "fct_mean",  # s
    "fct_p50",  # s
    "fct_p90",  # s
    "fct_p99",  # s
    "log_slowdown",  # mean of ln(FCT / demand)
    "open_flows",  # flows in the system, mean over the interval's time
)
NUM_SERVICE = len(SERVICE_NAMES)

_MARLLB_STATISTICS = {"avg": "mean", "90": "p90", "avg_decay": "mean_decay", "90_decay": "p90_decay"}


def _aliases() -> dict[str, str]:
    aliases: dict[str, str] = {}
    for metric, prefixes in (("fct", ("fct",)), ("duration", ("duration", "flow_duration"))):
        for prefix in prefixes:
            for statistic in STATISTICS:
                aliases[f"{prefix}_{statistic}"] = f"{metric}_{statistic}"
            for old, new in _MARLLB_STATISTICS.items():
                aliases[f"{prefix}_{old}"] = f"{metric}_{new}"
    return {alias: name for alias, name in aliases.items() if alias != name}


#: Other accepted spellings (``flow_duration_avg_decay``, the MARLLB names) and the column each means.
FEATURE_ALIASES = _aliases()


def column_index(name: str, *, ground_truth: bool = True) -> int:
    """Column of a feature (0..10) or, if allowed, of a ground-truth field (11..13).

    Raises:
        UnknownNameError: for a name that is neither a column nor an alias; the message lists the known ones.
    """
    names = FEATURE_NAMES + GROUND_TRUTH_NAMES if ground_truth else FEATURE_NAMES
    try:
        return names.index(FEATURE_ALIASES.get(name, name))
    except (ValueError, TypeError):  # a list has no hash
        raise UnknownNameError("feature", name, (*names, *FEATURE_ALIASES)) from None
