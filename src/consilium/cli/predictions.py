"""``consilium plan --law``: what scaling laws predict, asked and told."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Sequence

from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.planner.laws import Law, find
from consilium.planner.predictions import Point, point, predict
from consilium.recipes.catalogue import names
from consilium.records.prediction import Prediction, Predictions, Slopes
from consilium.report.plain import columns, counted
from consilium.words.say import say
from consilium.words.width import wrapped

QUOTED = Point(active=21 * 10**9, experts=8.0)
"""The point whose slopes articles quote; docs/laws.md says what is wrong with the second."""
_WIDTH = 96


def of_model(model: Model, options: Namespace) -> Predictions:
    """Ask the laws that ``--law`` names about ``model``."""
    return predict(_laws(options), point(model, options.tokens))


def of_point(options: Namespace) -> Predictions:
    """Ask them at the N and E of ``--params`` and ``--experts``, and without these at ``QUOTED``."""
    asked = _laws(options)
    if options.params is None and options.experts is not None:
        raise ConsiliumError(
            "plan: --experts E needs --params N beside it; give both, or a MODEL, such as deepseek-v3, before"
            " --law."
        )
    if options.fit is not None or options.against is not None:
        raise ConsiliumError("plan: --fit and --against need a MODEL; give one or leave them out.")
    if options.params is None:
        return predict(asked, dataclasses.replace(QUOTED, tokens=options.tokens))
    return predict(
        asked, Point(active=options.params, experts=float(options.experts or 1), tokens=options.tokens)
    )


def _laws(options: Namespace) -> tuple[Law, ...]:
    if options.model is None and options.law.partition(":")[0] in names():
        raise ConsiliumError(f"plan: MODEL comes first: consilium plan {options.law} --law.")
    return find(options.law)


def predictions_text(found: Predictions) -> str:
    """What the laws answered, their slopes, what they count and why others are silent."""
    parts = [f"\n{say('scaling laws')}\n{_filled(_question(found))}"]
    parts += [part for part in (_losses(found), _slopes(found), _compute(found)) if part]
    parts.append(f"\n{say('how to read them')}\n" + _notes(found.predictions))
    if found.unanswered:
        parts.append(f"\n{say('not answered')}\n" + columns(list(found.unanswered.items()), indent="  "))
    return "\n".join(parts)


def _question(found: Predictions) -> str:
    parts = [
        say("{n} active", n=_amount(found.active)),
        say("{n:.4g} experts for each active one", n=found.experts),
    ]
    if found.total is not None:
        parts.insert(1, say("{n} in all, without embeddings", n=_amount(found.total)))
    if found.granularity is not None:
        parts.append(say("{n:.4g} expert widths active", n=found.granularity))
    if found.tokens is not None:
        parts.append(say("{n} tokens", n=_amount(found.tokens)))
    return say(", ").join(parts)


def _losses(found: Predictions) -> str:
    rows = [
        (one.law, _of(one.parameters, _amount), f"{one.loss:.3f}", *_gain(one.loss, one))
        for one in found.predictions
        if one.loss is not None
    ]
    if not rows:
        return ""
    heading = (say("law"), "N", say("loss"), say("dense, same active"), say("less by"), say("equals a dense"))
    units = say("losses are nats a token of each law's own text: compare within a row, not between laws")
    return f"\n  {units}\n" + columns([heading, *rows], right=range(1, 6), indent="  ")


def _gain(loss: float, one: Prediction) -> tuple[str, str, str]:
    if one.dense_loss is None:
        return "-", "-", "-"
    equals = say("none") if one.dense_equivalent is None else _amount(one.dense_equivalent)
    return f"{one.dense_loss:.3f}", _percent(1 - loss / one.dense_loss), equals


def _slopes(found: Predictions) -> str:
    rows = [(one.law, *_pair(one.slopes), *_pair(one.raw_slopes)) for one in found.predictions if one.slopes]
    if not rows:
        return ""
    heading = (say("law"), "d log L/d log N", "d log L/d log E", "a + c log E", "b + c log N")
    text = say("slopes: per cent of loss for 1 % more; the last two take E for its saturated form")
    return f"\n  {text}\n" + columns([heading, *rows], right=range(1, 5), indent="  ")


def _pair(slopes: Slopes | None) -> tuple[str, str]:
    if slopes is None:
        return "-", "-"
    return _of(slopes.parameters, "{:.4f}".format), _of(slopes.experts, "{:.4f}".format)


def _compute(found: Predictions) -> str:
    """What laws say of the training compute; a sentence a line."""
    lines = [
        say(
            "{law}: a dense model needs {times:.2g} times the training compute for the same loss",
            law=one.law,
            times=one.leverage,
        )
        for one in found.predictions
        if one.leverage is not None
    ]
    lines += [
        say(
            "{law}: the same compute 6 N D is best spent on {parameters} parameters and {tokens} tokens"
            " (loss {loss:.3f})",
            law=one.law,
            parameters=_amount(best.parameters),
            tokens=_amount(best.tokens),
            loss=best.loss,
        )
        for one in found.predictions
        if (best := one.optimum) is not None
    ]
    return "\n".join(["", *map(_filled, lines)]) if lines else ""


def _notes(found: Sequence[Prediction]) -> str:
    """Each sentence once, under all the laws that it is true of."""
    said: dict[str, list[str]] = {}
    for one in found:
        for sentence in (one.counts, *one.notes):
            said.setdefault(sentence, []).append(one.law)
    lines = [f"{', '.join(names)}: {sentence}" for sentence, names in said.items()]
    return "\n".join(map(_filled, lines))


def _filled(line: str) -> str:
    return "  " + "\n    ".join(wrapped(line, _WIDTH - 4))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _amount(value: float) -> str:
    return counted(round(value))


def _of(value: float | None, words: Callable[[float], str]) -> str:
    return "-" if value is None else words(value)
