"""``consilium runs``: the training runs in a folder, and what each came to."""

from __future__ import annotations

import dataclasses
import json
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

from consilium.cli.arguments import json_flag, path
from consilium.errors import ConsiliumError
from consilium.words.say import say


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=path,
        default=Path("runs"),
        metavar="DIR",
        help="where to look; default runs",
    )
    parser.add_argument(
        "--dropped",
        action="store_true",
        help="list the texts that filters took out of the data of the run DIR",
    )
    parser.add_argument(
        "--open",
        action="store_true",
        help="show the runs in a browser, while they train and after; Ctrl-C ends it",
    )
    parser.add_argument("--until-closed", action="store_true", help=SUPPRESS)
    json_flag(parser)


def run(options: Namespace) -> int:
    if options.open:
        if options.json or options.dropped:
            raise ConsiliumError(
                "runs: --open shows a page and prints no list; leave out --json and --dropped."
            )
        return _open(options)
    if options.dropped:
        return _dropped(options)
    return _runs(options)


def _open(options: Namespace) -> int:
    from consilium.cli.installed import check_installed
    from consilium.cli.progress import note

    if not options.until_closed and not options.folder.is_dir():
        raise ConsiliumError(f"runs: no such folder: {options.folder}; give the folder that holds your runs.")
    check_installed("runs --open")
    from consilium.machine.browser import show
    from consilium.serving.alone import address, own_listener, serve_page

    with own_listener() as listener:
        place = address(listener)
        if options.until_closed:  # whoever started this one tells it, and opens it at its run
            print(place, flush=True)
        else:
            note(
                say(
                    "the page of the runs in {folder}: {place}; Ctrl-C ends it",
                    folder=options.folder,
                    place=place,
                )
            )
            show(place)
        serve_page(listener, options.folder, until_closed=options.until_closed)
    return 0


def _dropped(options: Namespace) -> int:
    from consilium.records.dropped import read_dropped
    from consilium.records.run import META_FILE
    from consilium.report.plain import columns

    if not (options.folder / META_FILE).is_file():
        raise ConsiliumError(f"runs: {options.folder} is no run; give the folder of one with --dropped.")
    found = read_dropped(options.folder)
    if options.json:
        print(json.dumps({"dropped": [dataclasses.asdict(one) for one in found]}))
    elif not found:
        print(say("no filter took anything out of the data of {folder}", folder=options.folder))
    else:
        print(columns([(one.filter, f"{one.score:.3f}", one.domain, one.name) for one in found]))
    return 0


def _runs(options: Namespace) -> int:
    from consilium.report import compare
    from consilium.report.plain import columns

    if not options.folder.is_dir():
        raise ConsiliumError(f"runs: no such folder: {options.folder}; give the folder that holds your runs.")
    read = [compare.read_or_refusal(folder) for folder in compare.runs_in(options.folder)]
    found = [compare.figures(one) for one in read if not isinstance(one, str)]
    damaged = [one for one in read if isinstance(one, str)]
    if options.json:
        print(json.dumps({"runs": found, "damaged": damaged}, indent=2))
        return 0
    if not read:
        command = "consilium train deepseek-v3:tiny --out runs/first"
        print(say("no runs in {folder}; make one: {command}", folder=options.folder, command=command))
        return 0
    print(columns([compare.headings(), *map(compare.cells, found)], right=range(2, 9)))
    for text in damaged:
        print(say("damaged: {sentence}", sentence=text))
    return 0
