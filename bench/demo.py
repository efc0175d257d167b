"""Records and pictures from finished runs: the demo, and the same run without balancing.

usage: python bench/demo.py runs/demo [runs/no-balance]
       python bench/demo.py --heat-map runs/heat 1

The runs come from ``consilium demo --compare dense`` and
``consilium train runs/demo/config.yaml --balance none --out runs/no-balance``, that of the heat map from
``consilium train deepseek-v3:tiny --params 2M --steps 400 --batch 8 --seq 64 --out runs/heat``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from consilium.benchmarking.record import once, record
from consilium.records.bench import Figure
from consilium.records.io import read_json, write_json
from consilium.records.loads import WINDOW, LoadFile
from consilium.records.run import SUMMARY_FILE, BitsPerByte, Summary
from consilium.report.curves import balance_chart
from consilium.report.lines import line_chart
from consilium.report.rasters import load_strip
from consilium.report.source import read_run
from consilium.report.svg import standalone

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
PICTURE = ROOT / "docs" / "pictures" / "balance.svg"
HEAT_MAP = ROOT / "docs" / "pictures" / "experts.svg"
STYLE = ROOT / "src" / "consilium" / "report" / "templates" / "report.css"


def bits(summary: Summary) -> list[Figure]:
    """Held-out bits per byte, mean over the five domains."""
    unit = "bits per byte"
    others: list[tuple[str, BitsPerByte | None]] = [
        ("untrained", summary.untrained),
        ("dense twin", summary.dense and summary.dense.bits_per_byte),
        ("byte trigram model", summary.trigram),
        ("xz", summary.xz),
    ]
    found = {name: figure.macro for name, figure in others if figure is not None}
    trained = once("trained", unit, summary.trained.macro, ("untrained", found["untrained"]))
    return [trained, *(once(name, unit, value) for name, value in found.items())]


def speed(summary: Summary) -> list[Figure]:
    against = None if summary.dense is None else ("dense twin", summary.dense.tokens_per_second)
    return [
        once("training speed", "tokens/s", summary.tokens_per_second, against),
        once("training time", "s", summary.seconds),
        once("tokens", "", summary.tokens),
    ]


def loads(run: Path, label: str = "") -> list[Figure]:
    """max/mean load of each layer, averaged over the last steps, and experts that got nothing in them."""
    final = LoadFile.open(run).final()
    found = [
        once(f"{label}layer {layer}: max/mean load, mean of the last {WINDOW} steps", "", load.ratio)
        for layer, load in final.items()
    ]
    dead = sum(len(load.dead) for load in final.values())
    return [*found, once(f"{label}dead experts in the last {WINDOW} steps", "", dead)]


def write(name: str, command: str, figures: list[Figure]) -> None:
    write_json(RECORDS / f"{name}.json", record(name, command, figures))


def picture(balanced: Path, unbalanced: Path) -> None:
    """Both runs' curves as one SVG that stands alone."""
    drawn = line_chart(balance_chart([read_run(balanced), read_run(unbalanced)]))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(standalone(drawn, STYLE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def heat_map(run: Path, row: int) -> None:
    """The load of every expert of the ``row``-th MoE layer, for the top of the README."""
    found = read_run(run)
    assert found.loads is not None, "a run without experts has no heat map"
    name = found.layer_name(found.loads.layers[row])
    drawn = load_strip(found.loads, row, name, width=900, hover_cells=0)
    HEAT_MAP.write_text(standalone(drawn, STYLE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> None:
    if arguments[0] == "--heat-map":
        heat_map(Path(arguments[1]), int(arguments[2]))
        return
    run = Path(arguments[0])
    summary = read_json(Summary, run / SUMMARY_FILE)
    command = "consilium demo" if summary.dense is None else "consilium demo --compare dense"
    write("demo", command, bits(summary) + speed(summary) + loads(run))
    if len(arguments) > 1:
        other = Path(arguments[1])
        bare = read_json(Summary, other / SUMMARY_FILE)
        bare_bits, balanced_bits = bare.trained.macro, summary.trained.macro
        figures = [
            once("balanced", "bits per byte", balanced_bits, ("balance off", bare_bits)),
            once("balance off", "bits per byte", bare_bits),
            *loads(run, "balanced, "),
            *loads(other, "balance off, "),
        ]
        write("balance", "consilium train runs/demo/config.yaml --balance none", figures)
        picture(run, other)


if __name__ == "__main__":
    main(sys.argv[1:])
