"""What the demo says at its end."""

from __future__ import annotations

from pathlib import Path

from consilium.checkpoint.folders import CHECKPOINTS
from consilium.records.loads import LOADS_FILE, LoadFile, max_over_mean
from consilium.records.run import BitsPerByte, Summary
from consilium.training.loop import WINDOW


def conclusion(out: Path, summary: Summary, model: str) -> str:
    """The end of the demo: figures, balance, a sample and what to try next."""
    parts = [
        (
            f"\n{model}: {summary.steps} steps, {summary.tokens:,} tokens in {summary.seconds:.0f} s"
            f" ({summary.tokens_per_second:,.0f} tok/s)"
        ),
        _figures(summary),
        _balance(out),
    ]
    if summary.sample is not None:
        parts.append(f"sample\n{_indent(summary.sample.prompt + summary.sample.text)}")
    parts.append(
        f"report      {out / 'report.html'}\n"
        f"checkpoint  {out / CHECKPOINTS / f'step-{summary.steps}'}   (Hugging Face layout)\n"
        "try next\n"
        f'  consilium generate {out} --prompt "def " --temperature 0.8\n'
        f"  consilium chat {out}\n"
        f"  consilium eval {out} --data README.md\n"
        f"  consilium demo --compare dense --out {out}\n"
        "  consilium plan deepseek-v3"
    )
    return "\n\n".join(parts)


def _figures(summary: Summary) -> str:
    rows: list[tuple[str, BitsPerByte | None]] = [
        ("untrained", summary.untrained),
        ("trained", summary.trained),
        ("dense twin", summary.dense and summary.dense.bits_per_byte),
        ("trigram", summary.trigram),
        ("xz", summary.xz),
    ]
    domains = list(summary.trained.domains)
    lines = [f"{'bits per byte':<14}{'mean':>8}" + "".join(f"{name:>13}" for name in domains)]
    for name, figure in rows:
        if figure is not None:
            cells = "".join(f"{figure.domains.get(domain, float('nan')):>13.3f}" for domain in domains)
            lines.append(f"{name:<14}{figure.macro:>8.3f}{cells}")
    if summary.untrained is not None:
        share = summary.trained.macro / summary.untrained.macro
        lines.append(f"the trained model needs {share:.1%} of the untrained one's bits")
    if summary.dense is not None:
        lines.append(
            f"dense twin: {summary.dense.parameters:,} parameters,"
            f" {summary.dense.tokens_per_second:,.0f} tok/s against {summary.tokens_per_second:,.0f}"
        )
    return "\n".join(lines)


def _balance(out: Path) -> str:
    if not (out / LOADS_FILE).exists():
        return "no experts, nothing to balance"
    loads = LoadFile.open(out)
    newest = [load_LE for _, load_LE in loads.read()][-WINDOW:]
    lines = [f"expert load over the last {len(newest)} steps (1.00 is fair)"]
    for i, layer in enumerate(loads.header.layers):
        ratios = [max_over_mean(load_LE[i]) for load_LE in newest]
        dead = sum(all(load_LE[i][e] == 0 for load_LE in newest) for e in range(loads.header.experts))
        lines.append(f"  layer {layer}: max/mean {sum(ratios) / len(ratios):.2f}, {dead} dead experts")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
