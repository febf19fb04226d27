"""The results of an evaluation as lines for people to read."""

from __future__ import annotations

from micrograd_gpt.evaluation.records import Row

STDERR = "_stderr"
SHARES = ("accuracy", "exact_match")  # what is said in percent


def report_lines(report: Row) -> list[str]:
    """A line for each figure, with its standard error where there is one."""
    names = [name for name in report if not name.endswith(STDERR)]
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        value, error = report[name], report.get(name + STDERR)
        shown = figure(name, value)
        if error is not None:
            shown += f" ± {figure(name, error)}"
        lines.append(f"{name.replace('_', ' '):{width}}  {shown}")
    return lines


def figure(name: str, value: float | None) -> str:
    """A figure, with as many decimals as its kind deserves."""
    if value is None:
        return "unknown"
    if isinstance(value, int):
        return f"{value:,}"
    if any(kind in name for kind in SHARES):
        return f"{value:.2%}"
    if "perplexity" not in name:
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1e9 else f"{value:.3g}"
