#!/usr/bin/env python
"""What runs came to, as one page to look at, keep, send or print: ``python job/report.py RUN [RUN ...]``.

The page needs nothing but itself: no network, no script, no other file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, Optional

if not __package__:  # run as a script: find the package from any directory, and keep job/ itself off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from job import command
from job.config import from_home
from job.data.dataset import FASHION_MNIST
from job.errors import JobError
from job.monitoring import curves
from job.monitoring.history import History, read_runs
from job.monitoring.records import Record
from job.run_dir import write_whole

TEMPLATE = Path(__file__).parent / "monitoring" / "report.html"
NOTHING = "-"
COLUMNS = "Run,State,Ranks,Steps,Last test accuracy,Best test accuracy,Last test loss,Training,Images/s".split(",")


def page(runs: Sequence[History]) -> str:
    """The report on ``runs`` as HTML, the same for the same runs. Where their records lack something, it says so."""
    split = "validation" if all(run.judged_by == "validation" for run in runs) else "test"
    best = max(runs, key=lambda run: run.last("accuracy", split) or 0.0)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(run.name for run in runs)),
        colours="\n".join(_colour(place) for place in range(len(runs))),
        headline=_headline(best, runs, split),
        facts=_facts(best),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for run in runs for note in run.notes),
        curves=_curves(runs),
        runs_title="The run" if len(runs) == 1 else f"The {len(runs)} runs",
        runs=_table(COLUMNS, [_row(run, place) for place, run in enumerate(runs)], "runs") + _weights(runs),
        configuration=_configuration(runs),
        ranks=_ranks(runs),
        confusion=_confusions(runs),
    )


def _colour(place: int) -> str:
    """A colour for each run: the golden angle keeps the hues apart, and the page says how light they are."""
    hue = (255 + 137.508 * place) % 360
    return f"  --run-{place}: oklch(var(--run-lightness) var(--run-chroma) {hue:.0f});"


def _headline(best: History, runs: Sequence[History], split: str) -> str:
    name = escape(best.name)
    measured = [record for record in best.of(split) if record.get("accuracy") is not None]
    if not measured:
        return f"<strong>{_count(best.records[-1]['step'], 'step')}</strong> of {name}, and no evaluation yet"
    last, among = measured[-1], f", the highest of {len(runs)} runs" if len(runs) > 1 else ""
    steps = _count(last["step"], "step")
    return f"<strong>{last['accuracy']:.4f}</strong> {split} accuracy of {name} after {steps}{among}"


def _facts(run: History) -> str:
    facts = []
    if examples := run.last("examples", run.judged_by):
        facts.append(f"Measured on {_count(examples, f'{run.judged_by} image')}.")
    if run.judged_by == "validation" and (accuracy := run.last("accuracy")) is not None:
        facts.append(f"Test accuracy, measured once, at the end: {accuracy:.4f}.")
    if peak := _peak(run):
        facts.append(f"Best at an evaluation: {peak['accuracy']:.4f} after {_count(peak['step'], 'step')}.")
    if not run.summary:
        facts.append("The run is not complete: it is going on, or it was stopped.")
    return f"<p>{escape(' '.join(facts))}</p>"


def _peak(run: History) -> Optional[Record]:
    """The evaluation with the highest accuracy, the first of equals."""
    return max(run.evaluations(), key=lambda record: record["accuracy"], default=None)


def _curves(runs: Sequence[History]) -> str:
    drawings = {plot.title: curves.draw(plot, runs) for plot in curves.PLOTS}
    missing = "".join(f"<p>{title}: no record holds a value.</p>" for title, svg in drawings.items() if not svg)
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawings.values() if svg)
    legend = " ".join(_name(run, place) for place, run in enumerate(runs))
    return (
        f'<p class="key">{legend}<br>Lines with dots are evaluations on validation or test images, lines without are'
        " training. A long curve of training is drawn as the mean of neighbouring records, and these faintly behind"
        " it.</p>"
        f'{missing}<div class="curves">{figures}</div>'
    )


def _row(run: History, place: int) -> list[str]:
    peak = _peak(run)
    speeds = run.series("train", "images_per_second")[1]
    speed = run.summary.get("images_per_second", median(speeds) if speeds else None)
    return [
        _name(run, place),
        "complete" if run.summary else "not complete",
        " → ".join(str(span.ranks or "?") for span in run.spans()) if _has_ranks(run) else NOTHING,
        f"{run.records[-1]['step']:,}",
        _figure(run.last("accuracy"), ".4f"),
        _best_of(peak) if peak else NOTHING,
        _figure(run.last("loss"), ".4f"),
        _duration(run.summary.get("train_seconds")),
        _figure(speed, ",.0f"),
    ]


def _best_of(peak: Record) -> str:
    held_out = " (validation)" * (peak["split"] == "validation")
    return f"{peak['accuracy']:.4f}{held_out}<br>after {_count(peak['step'], 'step')}"


def _weights(runs: Sequence[History]) -> str:
    """Which of the complete runs ended with the same weights; nothing if there are no two to compare."""
    groups: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        if digest := run.summary.get("weights_sha256"):
            groups.setdefault(str(digest), []).append(_name(run, place))
    if sum(map(len, groups.values())) < 2:
        return ""
    return "".join(
        f"<p>{'Same weights, to the last bit' if len(names) > 1 else 'Other weights'}: {', '.join(names)}"
        f" (SHA-256 {escape(digest[:12])}).</p>"
        for digest, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    )


def _configuration(runs: Sequence[History]) -> str:
    without = [escape(run.name) for run in runs if not run.config]
    parts = [f"<p>{', '.join(without)}: no config.yaml in the folder.</p>"] if without else []
    configured = [(place, run) for place, run in enumerate(runs) if run.config]
    if len(configured) > 1:
        parts.append(_differences(configured))
    for place, run in enumerate(runs):
        if run.config or run.summary:
            keys = "\n".join(f"{key} = {_plain(value)}" for key, value in run.config.items())
            summary = json.dumps(run.summary, indent=2) if run.summary else ""
            held = " and ".join(name for name, text in (("configuration", keys), ("summary", summary)) if text)
            text = escape("\n\n".join(filter(None, (keys, summary))))
            parts.append(f"<details><summary>{_name(run, place)}: {held}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _differences(runs: Sequence[tuple[int, History]]) -> str:
    """The keys in which runs differ. run.dir always does."""
    keys = {key: None for _, run in runs for key in run.config if key != "run.dir"}  # in the order of the schema
    values = {key: [_plain(run.config[key]) if key in run.config else NOTHING for _, run in runs] for key in keys}
    rows = [[f"<code>{escape(key)}</code>", *map(escape, row)] for key, row in values.items() if len(set(row)) > 1]
    if not rows:
        return "<p>All keys but run.dir are the same.</p>"
    return "<p>Keys in which the runs differ:</p>" + _table(["Key", *(_name(run, place) for place, run in runs)], rows)


def _ranks(runs: Sequence[History]) -> str:
    last = max(run.records[-1]["step"] for run in runs)
    return "\n".join(
        _timeline(run, place, last) if _has_ranks(run) else _no("number of ranks", run)
        for place, run in enumerate(runs)
    )


def _timeline(run: History, place: int, last: int) -> str:
    """A bar as long as the run, of those of all runs, cut where the number of ranks changes."""
    spans = run.spans()
    pieces = "".join(
        f'<span style="--steps: {span.end - span.start}; --strength: {(45, 25)[turn % 2]}%">{span.ranks or "?"}</span>'
        for turn, span in enumerate(spans)
    )
    turns = ", ".join(
        f"{_count(span.ranks, 'rank') if span.ranks else 'not recorded'} to step {span.end:,}" for span in spans
    )
    width = 100 * run.records[-1]["step"] / max(last, 1)
    return (
        f"<p>{_name(run, place)}: {turns}</p>"
        f'<div class="bar" aria-hidden="true" style="width: {width:.2f}%; --run: var(--run-{place})">{pieces}</div>'
        f"{_changes(run) if run.changes else ''}"
    )


def _changes(run: History) -> str:
    """Why the ranks of the run changed, and what each time cost."""
    rows = [
        [
            f"{change.step:,}",
            f"{change.ranks_before} → {change.ranks}",
            escape(change.why),
            f"{change.replayed_steps:,}",
            f"{change.lost_seconds:,.1f}",
        ]
        for change in run.changes
    ]
    return _table(["Went on after step", "Ranks", "Why", "Steps computed again", "Seconds lost"], rows)


def _confusions(runs: Sequence[History]) -> str:
    parts = []
    for place, run in enumerate(runs):
        title = f"<h3>{_name(run, place)}</h3>" if len(runs) > 1 else ""
        matrix = run.last("confusion")
        parts.append(f"<div>{title}{_confusion(matrix, run) if matrix else _no('confusion matrix', run)}</div>")
    return f'<div class="matrices">{"".join(parts)}</div>'


def _confusion(matrix: Sequence[Sequence[int]], run: History) -> str:
    names = [escape(name) for name in _classes(len(matrix), run)]
    mistakes = [
        (count, f"{names[true]} taken for {names[predicted]}, {_count(count, 'time')}")
        for true, counts in enumerate(matrix)
        for predicted, count in enumerate(counts)
        if count and true != predicted
    ]
    told = "; ".join(words for _, words in sorted(mistakes, key=lambda mistake: -mistake[0])[:3])
    heads = "".join(f'<th scope="col"><span>{name}</span></th>' for name in ("true \\ predicted", *names, "right"))
    rows = ""
    for true, counts in enumerate(matrix):
        cells = "".join(_cell(count, sum(counts), true == predicted) for predicted, count in enumerate(counts))
        recall = _figure(counts[true] / sum(counts) if sum(counts) else None, ".1%")
        rows += f'<tr><th scope="row">{names[true]}</th>{cells}<td class="recall">{recall}</td></tr>'
    return (
        f"<p>{f'Most frequent mistakes: {told}.' if told else 'Not one mistake.'}</p>"
        f'<div class="wide"><table class="confusion"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return '<td class="none">0</td>'
    share = count / total
    strength = 0.65 * share if right else min(0.75, 1.5 * share**0.75)
    return f'<td class="{"right" if right else "wrong"}" style="--share: {strength:.2f}">{count}</td>'


def _classes(number_of_classes: int, run: History) -> Sequence[str]:
    """Their names as the run's folder has them. An older one has none: then those of Fashion-MNIST, if it is that."""
    older = FASHION_MNIST.classes if run.config.get("data.sha256.test_labels") != "any" else ()
    names = run.data.get("classes", older)
    return names if len(names) == number_of_classes else [str(index) for index in range(number_of_classes)]


def _no(what: str, run: History) -> str:
    return f"<p>The records of {escape(run.name)} hold no {what}.</p>"


def _has_ranks(run: History) -> bool:
    return any("ranks" in record for record in run.records)


def _name(run: History, place: int) -> str:
    return f'<span class="run" style="--run: var(--run-{place})">{escape(run.name)}</span>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose first column names the rows. All is HTML already. One of a kind has the heads in its cells too."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in header)
    body = ""
    for first, *cells in rows:
        tds = "".join(
            f'<td data-head="{head}">{cell}</td>' if kind else f"<td>{cell}</td>"
            for head, cell in zip(header[1:], cells)
        )
        body += f'<tr><th scope="row">{first}</th>{tds}</tr>'
    return f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _count(how_many: int, what: str) -> str:
    return f"{how_many:,} {what}{'s' * (how_many != 1)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _figure(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else NOTHING


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _plain(value: Any) -> str:
    """A value as the configuration file has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def main() -> None:
    """Read the runs, write the page, say where it is."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Make one HTML page of runs: their curves, results, differences, confusion matrices and ranks.",
        epilog="The runs need not be complete. exit codes: 0 done; 1 cannot write the page; 2 bad usage or no runs",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run (run.dir)")
    parser.add_argument(
        "--output", type=from_home, metavar="FILE", help="the page to write (default: report.html in the first RUN)"
    )
    options = parser.parse_args()
    output = options.output or options.runs[0] / "report.html"
    if os.path.isdir(output):  # not Path.is_dir, which raises where permission is lacking
        parser.error(f"{output} is a folder; --output names a file")
    runs = read_runs(options.runs)
    try:
        write_whole(output, page(runs).encode("utf-8", "backslashreplace").decode("utf-8"))
    except OSError as error:
        raise JobError(f"{output}: cannot be written: {error.strerror}; give another --output FILE") from None
    for note in (note for run in runs for note in run.notes):
        print(f"note: {note}", file=sys.stderr)
    print(f"report of {_count(len(runs), 'run')}: {output}")


if __name__ == "__main__":
    command.run(main)
