"""An engine as lm-evaluation-harness asks models; ``lm_eval`` is installed by who wants its tasks.

Scores are sums of log-probabilities of the engine, whose text depends on no neighbour, so that no size of
batch changes a result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, final

import yaml

from consilium.engine.engine import Engine
from consilium.engine.intake import TextCodec
from consilium.engine.request import Request, Sampling, Scored
from consilium.errors import ConsiliumError, one_line

_UTILS: Any = import_module("lm_eval.utils")
_LM: Any = import_module("lm_eval.api.model").LM
"""By name: type checkers need not find what most users do not install."""

Score = tuple[float, bool]
"""Log-likelihood, and whether the tokens are the greedy ones."""
_MOST_NEW = 256
"""As the harness asks where a task names none."""


@final
class Harness(_LM):
    """Answers in the order of the requests."""

    def __init__(self, engine: Engine, tokenizer: TextCodec) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer

    def loglikelihood(self, requests: list[Any]) -> list[Score]:
        """How likely a text is behind another. What is beyond the model's length is cut off in front."""
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """How likely whole texts are, in windows that overlap by a token."""
        found: list[float] = []
        for request in requests:
            (text,) = request.args
            windows = _UTILS.get_rolling_token_windows(
                self._tokenizer.encode(text), self._opening, max_seq_len=self._length, context_len=1
            )
            pairs = [_UTILS.make_disjoint_window(window) for window in windows]
            found.append(sum(score for score, _ in self._scores(pairs)))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers that end before one of a task's texts; the same question again is another sample."""
        asked, equal = list[Request](), Counter[Request]()
        for one in (self._generating(*request.args) for request in requests):
            asked.append(replace(one, sample=equal[one]))
            equal[one] += 1
        texts = ["" for _ in asked]
        places = [place for place, one in enumerate(asked) if one.max_tokens]
        for piece in self._engine.stream([asked[place] for place in places]):
            texts[places[piece.request]] += piece.text
        return texts

    @property
    def _opening(self) -> int:
        """What stands in front of a text."""
        opening = self._tokenizer.opening_id
        return self._tokenizer.eos_id if opening is None else opening

    @property
    def _length(self) -> int:
        """Of texts that are scored: the engine wants room for a token behind them."""
        return self._engine.length - 2

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as one text has them where no token lies across the border.

        Blanks at the border belong to what follows.
        """
        bare = context.rstrip()
        before, whole = self._tokenizer.encode(bare), self._tokenizer.encode(context + continuation)
        opened = [self._opening, *before]
        if whole[: len(before)] == before:
            return opened, whole[len(before) :]
        return opened, self._tokenizer.encode(context[len(bare) :] + continuation)

    def _scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Of no tokens 0; raises ConsiliumError for a continuation that is longer than the model's length."""
        asked: dict[int, Request] = {}
        for place, (before, behind) in enumerate(pairs):
            if len(behind) > self._length:
                raise ConsiliumError(
                    f"eval: a continuation of {len(behind)} tokens exceeds the {self._length} that this model"
                    " can score at once; leave the task out, or take a model of more."
                )
            if behind:
                tokens = (*before, *behind)[-self._length - 1 :]
                asked[place] = Request(prompt=tokens, max_tokens=1, top=1, scores_prompt=True, stop_ids=())
        found: list[Score] = [(0.0, True) for _ in pairs]
        places = list(asked)
        for piece in self._engine.stream(list(asked.values())):
            place = places[piece.request]
            found[place] = _score(piece.prompt[-len(pairs[place][1]) :])
        return found

    def _generating(self, context: str, settings: dict[str, Any]) -> Request:
        """Raises ConsiliumError for a setting of a task that is not known here."""
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", [])
        most = max(min(int(given.pop("max_gen_toks", _MOST_NEW)), self._engine.length - 1), 0)
        tokens = [self._opening, *self._tokenizer.encode(context)][-(self._engine.length - most) :]
        warm = given.pop("do_sample", float(given.get("temperature", 0.0)) > 0)
        given["temperature"] = float(given.get("temperature", 1.0)) if warm else 0.0
        if not given.get("top_p", 1.0):
            del given["top_p"]
        if unknown := given.keys() - _SETTINGS:
            raise ConsiliumError(
                f"eval: the task asks for {', '.join(sorted(unknown))}, which is not known here."
            )
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return Request(prompt=tuple(tokens), max_tokens=most, sampling=Sampling(**given), stop=stops)


_SETTINGS = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"})


def _score(scored: Sequence[Scored]) -> Score:
    likely = sum(one.logprob or 0.0 for one in scored)
    return likely, all(one.top[0][0] == one.token for one in scored)


def evaluated(
    engine: Engine, tasks: Sequence[str], *, include: str | None = None, shots: int | None, limit: int | None
) -> dict[str, Any]:
    """What the harness finds, in its own words.

    Raises ConsiliumError for a task that it does not know, and for one that it cannot make ready.
    """
    assert engine.tokenizer is not None, "text is what tasks are of"
    lm_eval: Any = import_module("lm_eval")
    if include is not None:
        _check_files(Path(include))
    manager = import_module("lm_eval.tasks").TaskManager(include_path=include)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConsiliumError(
                f"eval: lm-evaluation-harness knows no task {task!r}; lm-eval ls tasks lists its own, and"
                " --tasks-path DIR adds yours."
            )
        _check_ready(manager, task)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=Harness(engine, engine.tokenizer),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return found


def _check_files(folder: Path) -> None:
    """The harness passes over files that it cannot read, and then knows no such task."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            for _ in yaml.parse(file.read_text("utf-8")):
                pass
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ConsiliumError(f"eval: {file} cannot be read as YAML ({one_line(str(error))}).") from None


def _check_ready(manager: Any, task: str) -> None:
    """What a task names is looked up in its data here, before the model is asked anything."""
    try:
        manager.load([task])
    except Exception as error:
        raise ConsiliumError(
            f"eval: lm-evaluation-harness cannot make task {task!r} ready ({type(error).__name__}:"
            f" {one_line(str(error))}); look into its YAML and at the data that it names."
        ) from error


def table(found: dict[str, Any]) -> str:
    return str(_UTILS.make_table(found))
