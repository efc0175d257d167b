"""``consilium systems``: the published systems, and one of them explained."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME[:SIZE]", help="explain this system and size; default: list all"
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli import listing
    from consilium.recipes import catalogue

    if options.name is None:
        found = catalogue.systems()
        data: dict[str, object] = {"systems": [listing.system_data(one) for one in found]}
        print(json.dumps(data, indent=2) if options.json else listing.listing(found))
    else:
        one, size = catalogue.parse(options.name)
        details = listing.system_details(one)
        print(json.dumps(details, indent=2) if options.json else listing.explanation(one, size))
    return 0
