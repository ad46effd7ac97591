"""The report: one HTML file with everything, which needs no network and asks for none.

The page is a template; its pictures are drawn by Vega-Lite, whose program lies in the file. A
policy in the page's head forbids the browser to fetch anything, whatever a name or reason holds.

Invariant: the file is written whole or not at all, and no text of a record can become markup or
program in it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.records import atomic_write_text
from golf_ray.results.describing import TEXTS
from golf_ray.results.overview import Failure, Summary, failures, summaries, totals
from golf_ray.results.pictures.picture import NoPicture, Picture, Rows
from golf_ray.results.pictures.rows import Trials, trials_of
from golf_ray.results.timeline import Timeline, timeline_of
from golf_ray.results.trial_table import TrialTable, trial_table

if TYPE_CHECKING:
    from golf_ray.results.reading import Results

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a report says and shows."""

    title: str
    made_unix_s: float
    trials: Trials
    summaries: tuple[Summary, ...]
    failures: tuple[Failure, ...]
    groups: tuple[tuple[str, ...], ...]
    """Means over seeds, as rows of text; the first is the head."""
    pictures: tuple[Picture | NoPicture, ...]
    timeline: Timeline
    table: TrialTable
    problems: tuple[str, ...]
    cautions: tuple[str, ...]
    """Why scores that stand side by side are not to be compared."""


def make_report(
    results: Results, *, objective: str | None = None, title: str | None = None
) -> Report:
    """The report on some results.

    Args:
        results: of `load_results`, with intervals and documents where those are to be seen.
        objective: the column that says which trial is best; None for that of the first sweep's
            plan, or the first score that there is.
        title: of the page.

    Raises:
        UsageError: there is no such objective.
    """
    from golf_ray.results.charts import pictures_of

    wanted = objective or _planned_objective(results)
    trials = trials_of(results.trials, results.knobs, wanted, results.records)
    timeline = timeline_of(_named(results, trials))
    parts = summaries(trials, results.records, results.plans, results.folders)
    return Report(
        title=title or _title(parts),
        made_unix_s=time.time(),
        trials=trials,
        summaries=parts,
        failures=failures(trials, results.records),
        groups=_groups(results, trials),
        pictures=pictures_of(results, trials, timeline),
        timeline=timeline,
        table=trial_table(trials),
        problems=results.problems,
        cautions=_cautions(results, trials),
    )


def _cautions(results: Results, trials: Trials) -> tuple[str, ...]:
    """What keeps scores that stand side by side from being compared."""
    told = []
    if trials.objective in TEXTS:
        _, column = TEXTS[trials.objective]
        texts = sorted(set(trials.scored()[column].dropna().astype(int)))
        if len(texts) > 1:
            sizes = ", ".join(f"{size:,}" for size in texts[:4])
            told.append(
                f"Scores are of different texts ({sizes} bytes), so which is lower says nothing."
            )
    for name, plan in results.plans.items():
        objectives = plan.get("objectives")
        first = objectives[0] if isinstance(objectives, list) and objectives else None
        if first is not None and first != trials.objective:
            told.append(
                f"{name} searched for {first}; here its trials are ranked by {trials.objective} "
                "(--objective)."
            )
    return tuple(told)


def _planned_objective(results: Results) -> str | None:
    """The first sweep's, if any trial has a value of it."""
    for plan in results.plans.values():
        objectives = plan.get("objectives") or []
        first = objectives[0] if isinstance(objectives, list) and objectives else None
        if first in results.trials.columns and results.trials[first].notna().any():
            return str(first)
    return None


def _named(results: Results, trials: Trials) -> Iterable[Mapping[str, Any]]:
    """Records with the names that trials are shown by."""
    names = trials.frame["name"].tolist()
    return ({**record, "name": name} for record, name in zip(results.records, names, strict=True))


def _title(parts: Sequence[Summary]) -> str:
    names = [part.name for part in parts]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _groups(results: Results, trials: Trials) -> tuple[tuple[str, ...], ...]:
    """Means over seeds, where any configuration was run under several."""
    from golf_ray.results.describing import SCORES
    from golf_ray.results.grouping import grouped, seed_keys, settings_of

    score = trials.objective
    if score not in SCORES or trials.frame.empty:
        return ()
    settings = settings_of(results.trials, results.records)
    table = grouped(results.trials, seed_keys(results.knobs), settings)
    table = table[(table[f"{score}_n"] > 1) & table[f"{score}_mean"].notna()].sort_values(
        f"{score}_mean"
    )
    if table.empty:
        return ()
    rows = [("configuration", "trainings", "mean", "sample sd", "95% interval", "trials")]
    for row in table.to_dict("records"):
        label = row["label"] if isinstance(row["label"], str) else ""
        source = row["source"] if isinstance(row["source"], str) else "several sources"
        rows.append((
            f"{source}: {label}" if label else source, str(row[f"{score}_n"]),
            trials.number(row[f"{score}_mean"]), f"{row[f'{score}_sd']:.5f}",
            f"{trials.number(row[f'{score}_low'])} to {trials.number(row[f'{score}_high'])}",
            str(row["trials"]),
        ))  # fmt: skip
    return tuple(rows)


# The page -----------------------------------------------------------------------------------------


def write_report(report: Report, path: Path) -> int:
    """Write the page, whole or not at all.

    Returns:
        its size in bytes.

    Raises:
        StorageError: it cannot be written.
    """
    text = rendered(report)
    atomic_write_text(path, text)
    return len(text.encode())


def rendered(report: Report) -> str:
    """The page as text."""
    import jinja2
    import vl_convert
    from markupsafe import Markup

    import golf_ray
    from golf_ray.results.pictures.themes import config

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("golf_ray", "assets"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.tests["drawing"] = lambda shown: isinstance(shown, Picture)

    def part(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    # Nothing that the program itself holds may end its element either.
    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    program = re.sub("<(?=/script|script|!--)", r"\\x3c", bundle)
    return environment.get_template(TEMPLATE).render(
        report=report,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.made_unix_s)),
        version=golf_ray.__version__,
        totals=totals(report.summaries),
        sections=_sections(report),
        css=part("report.css"),
        script=part("report.js"),
        program=Markup(program),
        data=embedded(_data(report)),
        looks=embedded({"light": config("light"), "dark": config("dark")}),
    )


def _sections(report: Report) -> list[tuple[str, str, list[Picture | NoPicture]]]:
    """Pictures under the headings of the page: anchor, heading and pictures."""
    known = {shown.name: shown for shown in report.pictures}
    plan = (
        ("search", "The search", ("history", "parallel", "importances")),
        ("size", "Size", ("sizes",)),
        ("training", "Training", ("curves",)),
        ("documents", "Documents", ("documents", "document_differences")),
        ("cluster", "The cluster", ("timeline",)),
    )
    return [
        (anchor, heading, [known[name] for name in names if name in known])
        for anchor, heading, names in plan
    ]


def _data(report: Report) -> dict[str, Any]:
    """Charts and their data for the page's own program; each table once."""
    tables: dict[str, Rows] = {}
    charts = {}
    for shown in report.pictures:
        if isinstance(shown, Picture):
            tables.update(shown.data)
            charts[shown.name] = {"spec": shown.spec, "data": list(shown.data)}
    return {
        "charts": charts,
        "tables": {n: {"columns": t.columns, "rows": t.values} for n, t in tables.items()},
    }


def embedded(value: Any) -> Any:
    """Data as JSON that is inert inside an HTML page."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(value, dumps=_compact)


def _compact(value: Any, **options: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False, **options)
