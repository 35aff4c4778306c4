"""A comparison as the paper's table: booktabs, the best in bold only where that is significant."""

from __future__ import annotations

from statistics import fmean, stdev

from clipkit.tracking.compare import (
    ALPHA,
    Claims,
    Comparison,
    Configuration,
    Entry,
    about,
    paired_claims,
    seed_claims,
)
from clipkit.tracking.metric_names import evaluation_of, higher_is_better, is_share, number, short
from clipkit.tracking.tables import finite, short_params

_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{letter: rf"\{letter}" for letter in "{}$&%#_"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': r"\textquotedbl{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$"},
    **{"…": r"\dots{}", "\n": " ", "\t": " "},
}

Row = Entry | Configuration


def latex(comparison: Comparison) -> str:
    """Return a table environment; needs ``booktabs``.

    With seeds its rows are configurations (mean and standard deviation) and only Welch's t makes
    bold; without, they are checkpoints (with intervals) and only the paired difference does.
    """
    seeds = any(len(one.seeds) > 1 for one in comparison.configurations)
    rows: list[Row] = [*comparison.configurations] if seeds else [*comparison.entries]
    best = {metric: _best(rows, metric) for metric in comparison.metrics}
    claims = _claims(comparison, rows, best)
    params = short_params(comparison.params)
    evaluations = list(dict.fromkeys(evaluation_of(metric) for metric in comparison.metrics))
    metrics = [m for e in evaluations for m in comparison.metrics if evaluation_of(m) == e]
    lead = ["run", *params.values(), *(["seeds"] if seeds else [])]
    lines = [
        r"% \usepackage{booktabs, textcomp}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(comparison, seeds)}}}",
        rf"\begin{{tabular}}{{{'l' * len(lead)}{'c' * len(metrics)}}}",
        r"\toprule",
        *_heads(lead, metrics, evaluations),
        r"\midrule",
    ]
    for row in rows:
        run = row.entries[0].run if isinstance(row, Configuration) else row.run
        cells = [row.name, *(about(run).get(key, "--") for key in params)]
        cells += [str(len(row.seeds))] if seeds and isinstance(row, Configuration) else []
        text = [escape(cell) for cell in cells]
        text += [_cell(row, m, _is_bold(row, m, best, claims, comparison)) for m in metrics]
        lines.append(" & ".join(text) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def escape(text: str) -> str:
    """Return a text in which LaTeX finds nothing to interpret."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def _heads(lead: list[str], metrics: list[str], evaluations: list[str]) -> list[str]:
    groups, rules = [], []
    at = len(lead) + 1
    for evaluation in evaluations:
        width = sum(evaluation_of(metric) == evaluation for metric in metrics)
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(evaluation)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    arrows = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}
    names = [f"{escape(_unit(metric))}{arrows[higher_is_better(metric)]}" for metric in metrics]
    return [
        " & " * len(lead) + " & ".join(groups) + r" \\",
        " ".join(rules),
        " & ".join([*map(escape, lead), *names]) + r" \\",
    ]


def _unit(metric: str) -> str:
    return f"{short(metric)} (%)" if is_share(metric) else short(metric)


def _caption(comparison: Comparison, seeds: bool) -> str:
    beside = "mean and standard deviation over the seeds" if seeds else "with 95 % intervals"
    against = f"the baseline, {comparison.baseline.name}" if comparison.baseline_named else (
        "the second best"
    )  # fmt: skip
    test = "Welch's t over the seeds" if seeds else "paired bootstrap over the rows"
    said = (
        f"{comparison.title}: {comparison.taken}, {beside}. Bold: the best, where its difference "
        f"from {against} is significant ({test}, p < {ALPHA} after Holm)."
    )
    notes = " ".join(f"{note}." for note in comparison.notes if "different data" in note)
    return escape(f"{said} {notes}".strip())


def _cell(row: Row, metric: str, bold: bool) -> str:
    if isinstance(row, Configuration):
        values = row.values(metric)
        if not values:
            return "--"
        value = number(metric, fmean(values))
        beside = rf"$\pm$ {number(metric, stdev(values))}" if len(values) > 1 else ""
    else:
        score = row.scores.get(metric)
        if score is None or finite(score.value) is None:
            return "--"
        value = number(metric, score.value)
        ends = [finite(end) for end in (score.low, score.high)]
        beside = ", ".join(number(metric, end) for end in ends if end is not None)
        beside = rf"{{\scriptsize [{beside}]}}" if beside else ""
    if bold:
        value = rf"\textbf{{{value}}}"
    return f"{value} {beside}".strip()


def _value(row: Row, metric: str) -> float | None:
    if isinstance(row, Configuration):
        values = row.values(metric)
        return fmean(values) if values else None
    score = row.scores.get(metric)
    return None if score is None else finite(score.value)


def _best(rows: list[Row], metric: str) -> list[Row]:
    """Return the rows that have the metric, the best first; none where no way is better."""
    up = higher_is_better(metric)
    having = [(value, row) for row in rows if (value := _value(row, metric)) is not None]
    if up is None:
        return []
    return [row for _, row in sorted(having, key=lambda pair: pair[0], reverse=up)]


def _against(comparison: Comparison, ranked: list[Row]) -> Row | None:
    if not comparison.baseline_named:
        return ranked[1] if len(ranked) > 1 else None
    for row in ranked:
        if row in (comparison.baseline, comparison.baseline_configuration):
            return row
    return None


def _claims(comparison: Comparison, rows: list[Row], best: dict[str, list[Row]]) -> Claims:
    """Return the tests behind the bold figures, with Holm's correction over them."""
    if comparison.baseline_named and rows:
        # Over all rows: the best one was looked for among them.
        runs = isinstance(rows[0], Entry)
        return comparison.checkpoint_claims if runs else comparison.configuration_claims
    made, p = [], []
    for metric, ranked in best.items():
        other = _against(comparison, ranked)
        if other is None or other is ranked[0]:
            continue
        first, second = other, ranked[0]
        if isinstance(first, Configuration) and isinstance(second, Configuration):
            found = seed_claims([(first, second)], [metric], comparison.how)
        elif isinstance(first, Entry) and isinstance(second, Entry):
            found = paired_claims([(first, second)], [metric], comparison.how)
        else:
            continue
        made += found.made
        p += [claim.p for claim in found.made]
    if not made:
        return Claims()
    from clipkit.evaluation.comparison import holm

    return Claims([claim._replace(adjusted=q) for claim, q in zip(made, holm(p), strict=True)])


def _is_bold(
    row: Row, metric: str, best: dict[str, list[Row]], claims: Claims, comparison: Comparison
) -> bool:
    ranked = best[metric]
    other = _against(comparison, ranked)
    if other is None or not ranked or row is not ranked[0]:
        return False
    claim = claims.of(metric, other.label, row.label)
    return claim is not None and claim.verdict == "better"
