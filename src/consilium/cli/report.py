"""``consilium report``: write the page of each run, and one that compares several."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag, path
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

    found = [compare.figures(read_run(folder)) for folder in options.runs]
    pages = [build_report(folder) for folder in options.runs]
    if len(pages) > 1:
        out = options.out or options.runs[0].parent / compare.COMPARISON_FILE
        pages.append(compare.build_comparison(options.runs, out))
    if options.json:
        print(json.dumps({"runs": found, "pages": [str(page) for page in pages]}, indent=2))
        return 0
    print(columns([compare.headings(), *map(compare.cells, found)], right=range(2, 9)))
    for page in pages:
        print(say("wrote {path}", path=page))
    return 0
