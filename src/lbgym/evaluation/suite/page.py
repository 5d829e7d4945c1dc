"""The tables of a suite as data, and the page of the leaderboard with its plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...atomic import whole_file
from ..tables import Cell, Table, Verdict
from .protocol import Protocol
from .scores import Estimate, Scores

#: The probability of improvement is over this contender where it was measured, else over the baseline.
RIVAL = "sed"


def score_table(scores: Scores) -> Table:
    """A row per contender, the best first: scores with their 95 % intervals."""
    rival = RIVAL if RIVAL in scores.labels else scores.protocol.baseline
    best = {
        metric: min(scores.geometric_mean(label, metric).value for label in scores.labels)
        for metric in ("fct_mean", "fct_p99")
    }

    def row(label: str) -> tuple[Cell, ...]:
        means = [scores.geometric_mean(label, metric) for metric in best]
        case, worst = scores.worst(label, "fct_mean")
        return (
            Cell(label),
            Cell(scores.results[label].entry.knows),
            *(
                _cell(mean, Verdict.BEST if mean.value == best[metric] else Verdict.NONE)
                for mean, metric in zip(means, best, strict=True)
            ),
            _cell(scores.iqm(label, "fct_mean")),
            _cell(scores.iqm(label, "fct_p99")),
            _cell(scores.probability_of_improvement(label, rival, "fct_mean")),
            Cell(f"{worst:.2f} {case}"),
            Cell(f"{100 * scores.rejected(label):.2f}"),
        )

    columns = ("contender", "knows", "mean", "p99", "IQM mean", "IQM p99", f"P(< {rival})", "worst mean", "rejected, %")
    title = f"{_subject(scores)}: FCT over {scores.protocol.baseline}'s, less is better; ± 95 % interval"
    return Table(title, columns, tuple(row(label) for label in scores.labels))


def family_table(scores: Scores, metric: str) -> Table:
    """Geometric means by family, a row per contender."""
    families = scores.protocol.families
    columns = {f: {label: scores.geometric_mean(label, metric, family=f) for label in scores.labels} for f in families}
    best = {family: min(column.values(), key=lambda e: e.value).value for family, column in columns.items()}
    rows = tuple(
        (
            Cell(label),
            *(
                _cell(columns[f][label], Verdict.BEST if columns[f][label].value == best[f] else Verdict.NONE)
                for f in families
            ),
        )
        for label in scores.labels
    )
    name = "mean FCT" if metric == "fct_mean" else "p99 FCT"
    return Table(f"{name} over {scores.protocol.baseline}'s by family ± 95 % interval", ("contender", *families), rows)


def case_table(protocol: Protocol) -> Table:
    """The scenarios of a protocol, a row each."""
    rows = [
        (
            Cell(case.name),
            Cell(case.family),
            Cell(str(case.scenario.num_servers)),
            Cell(str(case.scenario.balancers)),
            Cell(f"{case.scenario.load:.2f}"),
            Cell(f"{case.scenario.rate:,.0f}"),
            Cell(f"{case.warmup:g} to {case.scenario.duration:g}"),
        )
        for case in protocol.cases
    ]
    columns = ("scenario", "family", "servers", "balancers", "load", "flows/s", "window, s")
    seeds = len(protocol.seeds)
    title = f"Protocol {protocol.version}: {len(rows)} scenarios, {seeds} seed{'s' * (seeds > 1)}"
    return Table(title, columns, tuple(rows))


def write_page(scores: Scores, page: Path, *, command: str) -> list[Path]:
    """Write the leaderboard: a Markdown page, and its plots in ``images/`` beside it.

    Args:
        scores: of the contenders to show.
        page: the file, ``leaderboard.md`` or the like; the plots are named after it.
        command: that makes it again.

    Returns:
        The files, in the order they were written.

    Raises:
        FileWriteError: if a file cannot be written.
        MissingExtraError: without Matplotlib.
    """
    from . import plots

    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in (("scores", plots.intervals), ("profiles", plots.profiles), ("scenarios", plots.scenarios)):
        target = images / f"{page.stem}-{name}.png"
        with whole_file(target) as path:
            draw(scores).savefig(path, dpi=110)
        files.append(target)
    with whole_file(page) as path:
        path.write_text(_text(scores, [file.name for file in files], command), encoding="utf-8")
    return [*files, page]


def _text(scores: Scores, images: Sequence[str], command: str) -> str:
    protocol = scores.protocol
    seeds = len(scores.seeds)
    incomplete = (
        ""
        if scores.complete
        else f"\n**Not a complete result:** {seeds} of the protocol's {len(protocol.seeds)} seeds.\n"
    )
    return f"""# Leaderboard

Suite {protocol.version}: {len(protocol.cases)} scenarios in {len(protocol.families)} families, {seeds} seeds, the same flows for everyone.
This page is made by `{command}` from the results in `leaderboard/` beside it; do not edit it. Protocol hash
`{protocol.hash}`.
{incomplete}
A score is an FCT over that of `{protocol.baseline}` on the same scenario and flows: 0.8 is a fifth less, and less is better. Rejected and
failed flows count with the scenario's timeout. *mean* and *p99* are geometric means over the scenarios, with the
Student-t interval over the seeds; *IQM* is the interquartile mean over all runs, *P* the probability that a run has a
lower mean FCT than one of the other contender, both with stratified bootstrap intervals (Agarwal et al., NeurIPS 2021).
*knows* says what a contender is given beside what a balancer sees: nothing, what an operator configures (cores, number
of balancers), the servers' ground truth, or what only an oracle can know.

{_markdown(score_table(scores))}

![Scores with their intervals](images/{images[0]})

![Performance profiles](images/{images[1]})

## By family

{_markdown(family_table(scores, "fct_mean"))}

{_markdown(family_table(scores, "fct_p99"))}

## By scenario

![Scores by scenario](images/{images[2]})

{_markdown(case_table(protocol))}

## Take part

```sh
lbgym suite run --policies mine=PATH.pt --out results      # {len(protocol.cases) * len(protocol.seeds)} runs; killed, it goes on where it was
lbgym suite table results docs/leaderboard                 # beside the results of this page
lbgym suite verify docs/leaderboard/sed.json               # repeat a part of any result, bit for bit
```

With `--backend ray --address HOST:PORT` the same command runs on a Ray cluster. Figures are the same bit for bit as long
as the versions and the kind of machine, which every result records, are the same.
"""  # noqa: E501 - the text of the page


def _markdown(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    def shown(cell: Cell) -> str:
        text = f"{cell.text} {cell.spread}".rstrip()
        return f"**{text}**" if cell.verdict is Verdict.BEST else text

    wide = [line([shown(cell) for cell in row]) for row in table.rows]
    rule = line(["---", *("---:" for _ in table.columns[1:])])
    return "\n".join([f"{table.title}:", "", line(table.columns), rule, *wide])


def _cell(estimate: Estimate, verdict: Verdict = Verdict.NONE) -> Cell:
    """The value and half its interval, with as many digits as it has."""
    half = (estimate.high - estimate.low) / 2
    decimals = 3 if estimate.value < 10 else 1
    if not math.isfinite(half):
        return Cell(f"{estimate.value:.{decimals}f}", "", verdict)
    return Cell(f"{estimate.value:.{decimals}f}", f"±{half:.{decimals}f}", verdict)


def _subject(scores: Scores) -> str:
    count = len(scores.seeds)
    return f"suite {scores.protocol.version}, {len(scores.protocol.cases)} scenarios, {count} seed{'s' * (count > 1)}"
