"""``consilium report``: write the page of each run, and one that compares several."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from consilium.cli.arguments import json_flag, path
from consilium.errors import ConsiliumError
from consilium.words.say import say


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="a run folder; several are compared"
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="the page that compares several; default: comparison.html beside the first run",
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.report import compare
    from consilium.report.build import build_report
    from consilium.report.plain import columns
    from consilium.report.source import read_run

    out = _page(options, compare.COMPARISON_FILE)
    found = [compare.figures(read_run(folder)) for folder in options.runs]
    pages = [build_report(folder) for folder in options.runs]
    if out is not None:
        pages.append(compare.build_comparison(options.runs, out))
    if options.json:
        print(json.dumps({"runs": found, "pages": [str(page) for page in pages]}, indent=2))
        return 0
    print(columns([compare.headings(), *map(compare.cells, found)], right=range(2, 9)))
    for page in pages:
        print(say("wrote {path}", path=page))
    return 0


def _page(options: Namespace, usual: str) -> Path | None:
    """Where several runs are compared, None for one alone."""
    from consilium.records.io import is_page, refuse_others

    if len(options.runs) == 1:
        if options.out is not None:
            raise ConsiliumError(
                "report: --out is the page that compares several runs; give another RUN, or drop --out."
            )
        return None
    out: Path = options.out or options.runs[0].parent / usual
    refuse_others(out, "page", is_page)
    return out
