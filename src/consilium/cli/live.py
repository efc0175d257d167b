"""The terminal's view of a run: a live page, or a line now and then where lines cannot be written again."""

from __future__ import annotations

import time
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from consilium.planner.plan import plan
from consilium.records.loads import max_over_mean
from consilium.training.events import Evaluated, Event, Finished, Notice, Saved, Started, Stepped
from consilium.training.measures import layer_ratios
from consilium.words.say import say

BARS = " ▁▂▃▄▅▆▇█"
FULL = 2.0
"""Load, in fair shares, that fills a bar."""

QUIET_SECONDS = 10.0


def load_bars(loads: list[int]) -> str:
    """One character an expert: empty is dead, half full is a fair share, full is twice that or more."""
    total = sum(loads)
    shares = [count * len(loads) / total if total else 0.0 for count in loads]
    return "".join(_bar(share) for share in shares)


def _bar(share: float) -> str:
    if share == 0:
        return "·"
    return BARS[min(len(BARS) - 1, max(1, round(share / FULL * (len(BARS) - 1))))]


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@final
class Page:
    """A listener. Use it as a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        rewrites = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=True) if rewrites else None
        self._started: Started | None = None
        self._bits = ""
        self._printed = 0.0

    def __enter__(self) -> Page:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
                self._print(
                    say("model      {sizes}; run folder {folder}", sizes=_sizes(event), folder=event.out)
                )
            case Stepped():
                self._stepped(event)
            case Evaluated(step=step, evaluation=evaluation):
                bits = {"bits": evaluation.bits_per_byte, "step": step}
                self._bits = say("  held-out {bits:.3f} bits/byte at step {step}", **bits)
                parts = "  ".join(f"{name} {bits:.2f}" for name, bits in evaluation.domains.items())
                self._print(
                    say("step {step:>5}  held-out bits per byte {bits:.3f}   ({parts})", parts=parts, **bits)
                )
            case Saved(folder=folder):
                self._print(say("saved      {folder}", folder=folder))
            case Notice(text=text):
                self.notice(text)
            case Finished():
                pass

    def notice(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        """A reader that went away, or a full disk behind it, must not end the training.

        rich leaves by SystemExit where the reader is gone.
        """
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        except (OSError, SystemExit):
            self._console.quiet = True

    def _stepped(self, event: Stepped) -> None:
        if self._live is not None:
            table = [_load_table(event)] if event.result.loads else []
            self._live.update(Group(self._line(event), *table))
        elif time.monotonic() - self._printed > QUIET_SECONDS or event.step == self._steps(event):
            self._printed = time.monotonic()
            ratios = layer_ratios(event.result.loads).values()
            worst = f"  {say('max/mean')} {max(ratios):.2f}" if ratios else ""
            self._print(f"{self._line(event)}{worst}")

    def _steps(self, event: Stepped) -> int:
        return self._started.config.steps if self._started else event.step

    def _line(self, event: Stepped) -> Text:
        steps = self._steps(event)
        return Text(
            say(
                "step {step:>5}/{steps} {share:>3}%  loss {loss:.3f}{bits}  {speed:,.0f} tok/s  ETA {eta}",
                step=event.step,
                steps=steps,
                share=100 * event.step // steps,
                loss=event.result.ce,
                bits=self._bits,
                speed=event.tokens_per_second,
                eta=clock(event.eta_seconds),
            )
        )


def _sizes(event: Started) -> str:
    counts = plan(event.config.model).parameters
    sizes = say("{total:,} parameters, {active:,} active a token", total=counts.total, active=counts.active)
    return sizes + (say(", and {mtp:,} that predict further ahead", mtp=counts.mtp) if counts.mtp else "")


def _load_table(event: Stepped) -> Table:
    table = Table.grid(padding=(0, 2))
    legend = Text(say("half a bar is a fair share, · is idle"), style="dim")
    table.add_row(say("expert load"), legend, say("max/mean"))
    for layer, load in event.result.loads.items():
        counts = load.counts
        table.add_row(say("layer {layer}", layer=layer), load_bars(counts), f"{max_over_mean(counts):.2f}")
    return table
