"""Requests that come and go, decoded together.

A request's tokens depend on the request alone: no token's routing sees another row, and every row draws from
its own stream. Greedy tokens are those of each prompt alone. With native kernels logits are too, to the last
bit, whoever else runs, however prompts are cut, shared or read again. With modules they are not: the size of
a matrix product decides how it rounds, so that two logits closer than that may change places.

Legend: B rows, V vocabulary, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar, final

from torch import Tensor

from consilium.engine.batch import Batch
from consilium.engine.drafts import Speculation, check_speculation
from consilium.engine.intake import Intake, TextCodec
from consilium.engine.request import Piece, Request, Sampling, requests_of
from consilium.engine.routes import Routes
from consilium.engine.rows import Row, advance, pooled
from consilium.errors import ConsiliumError
from consilium.kv.rows import CacheFormat
from consilium.model.decoder import Decoder
from consilium.model.types import Options
from consilium.moe.types import Mode

MOST_ROWS: Final = 64
"""Requests that run at once unless told otherwise; the others wait for their turn."""
MOST_READ: Final = 2048
"""Tokens of prompts after which a step reads no further part."""

_LOG: Final = logging.getLogger("consilium.engine")
_T = TypeVar("_T")


@final
class Engine:
    """Generates from a model on its own device: ``submit`` requests, then ``step`` until they are finished.

    ``generate``, ``complete`` and ``complete_text`` do both. Raises ConsiliumError for a model without
    weights, one whose experts choose among the tokens at hand or always drop beyond a capacity (neighbours
    and the cache would change its text), and a tokenizer that is larger than the model's vocabulary.
    """

    def __init__(  # noqa: PLR0913 - the public face
        self,
        model: Decoder,
        tokenizer: TextCodec | None = None,
        *,
        mode: Mode = Mode(),
        most_rows: int = MOST_ROWS,
        most_tokens: int | None = None,
        most_length: int | None = None,
        cache: CacheFormat = "model",
        speculation: Speculation | None = None,
        part: int | None = None,
    ) -> None:
        """``cache`` is int8 to keep latents in 8 bits; raises ConsiliumError for a model without.

        ``speculation`` guesses tokens, which changes how fast they come and not which. Raises ConsiliumError
        for modules that the model does not have.

        ``part`` is how many tokens of a prompt are computed at once, by default 512. Beginnings are shared by
        whole parts: smaller ones share more, and take longer to read what is new.

        ``most_tokens`` is what the cache holds of all that run; without, it grows with need. ``most_length``
        is for a sequence, by default the model's length.

        Where it is full the request that joined last waits until there is room, and goes on as if nothing
        had been.
        """
        _check(model)
        check_speculation(model.config, speculation)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._intake = Intake.of(model, tokenizer, most_length, most_tokens)
        self.stop_ids: tuple[int, ...] = self._intake.ends
        self.length = self._intake.length
        """Tokens of a sequence at most, prompt and answer."""
        self.most_rows = most_rows
        options = Options(mode=replace(mode, counts_only=True))
        self._batch = Batch(self.model, options, most_tokens, cache, speculation, part)
        self._speculation = speculation
        self._guessed = self._right = 0
        self._waiting: list[Row] = []
        self._kept: list[Piece] = []
        self._next_id = 0

    @property
    def loads(self) -> Mapping[int, tuple[int, ...]]:
        """How many tokens each of the E experts of each MoE layer computed since the engine began."""
        return {layer: tuple(load.counts) for layer, load in self._batch.loads.result().items()}

    def submit(self, request: Request) -> int:
        """Let ``request`` wait for its turn and return its id.

        Raises ConsiliumError for an empty prompt, an id outside the vocabulary, text without a tokenizer, a
        prompt that with ``max_tokens`` exceeds the model's length, and where nothing is asked for.
        """
        if request.max_tokens == 0 and request.pools is None:
            raise ConsiliumError("a request of no new tokens has no answer; give max_tokens of 1 or more.")
        return self._enter(self._row(request, "the prompt"))

    def step(self) -> list[Piece]:
        """Return a token of every running request, and let waiting ones join, in the order of ids.

        Where tokens are guessed there may be several of a request. A long prompt is read over several steps,
        so that who runs does not wait for all of it. There may be nothing to return while ``busy``. The last
        piece of a request that cannot go on, such as one whose logits are not finite, says why; the others
        have the tokens that they would have had.
        """
        self._decode()
        self._read()
        pieces, self._kept = self._kept, []
        return sorted(pieces, key=lambda piece: piece.request)

    @property
    def by_kernels(self) -> bool:
        """Whether native kernels decode, and not PyTorch's modules."""
        return self._batch.by_kernels

    @property
    def guesses(self) -> tuple[int, int]:
        """How many tokens were guessed since the engine began, and how many of these were right."""
        return self._guessed, self._right

    @property
    def waiting(self) -> int:
        """Requests whose prompt is still to be read."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._batch.rows)

    @property
    def cache_use(self) -> float:
        """The share of the cache's pages that are taken, by rows and by beginnings that are kept."""
        return self._batch.use

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a piece is left that nobody asked for."""
        return bool(self._waiting or self._batch.rows or self._kept)

    def cancel(self, request: int) -> None:
        """Forget a request, whether it waits, runs or has finished."""
        for row in [row for row in (*self._waiting, *self._batch.rows) if row.id == request]:
            self._batch.leave(row)
        self._waiting = [row for row in self._waiting if row.id != request]
        self._kept = [piece for piece in self._kept if piece.request != request]

    def complete(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        max_tokens: int | None = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
    ) -> list[list[int]]:
        """Return the generated token ids of each prompt, end token and stop text included.

        One text is one prompt. With a temperature, the same prompt n times gives n samples, which ``seed``
        repeats. ``generate`` has the finer settings of sampling and the errors of both.
        """
        outputs: list[list[int]] = [[] for _ in _listed(prompts)]
        sampling = Sampling(temperature=temperature, seed=seed)
        for piece in self.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop):
            outputs[piece.request].append(piece.token)
        return outputs

    def complete_text(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        max_tokens: int | None = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
    ) -> list[str]:
        """Return the text that follows each prompt, without what ended it; the rest as ``complete``."""
        if self.tokenizer is None:
            raise ConsiliumError("text out needs a tokenizer; give Engine(model, tokenizer).")
        outputs = ["" for _ in _listed(prompts)]
        sampling = Sampling(temperature=temperature, seed=seed)
        for piece in self.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop):
            outputs[piece.request] += piece.text
        return outputs

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        max_tokens: int | None = 64,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] | str = (),
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[Piece]:
        """Stream pieces, step by step, in the order of the prompts; one text is one prompt or one stop.

        The same prompt for the n-th time is its n-th sample: other prompts change nothing. ``max_tokens`` of
        None goes on until the end. Raises ConsiliumError as ``submit`` does, in the call, before any piece.
        """
        common = Request(
            prompt=(),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=tuple(_listed(stop)),
            stop_ids=None if stop_ids is None else tuple(stop_ids),
        )
        return self.stream(requests_of(common, _listed(prompts)))

    def stream(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """What ``generate`` does, for all that requests may ask; nothing where one asks for no tokens."""
        rows = [self._row(request, f"prompt {index}") for index, request in enumerate(requests)]
        return self._pieces(rows if all(request.max_tokens != 0 for request in requests) else [])

    def _pieces(self, rows: Sequence[Row]) -> Iterator[Piece]:
        """The pieces of ``rows``, numbered by their place; what belongs to others is kept for them."""
        places = {self._enter(row): place for place, row in enumerate(rows)}
        try:
            left = len(places)
            while left:
                pieces = self.step()
                self._kept += [piece for piece in pieces if piece.request not in places]
                for piece in [piece for piece in pieces if piece.request in places]:
                    if piece.error is not None:
                        raise piece.error
                    left -= piece.finished is not None
                    yield replace(piece, request=places[piece.request])
        finally:
            for request in places:
                self.cancel(request)

    def _decode(self) -> None:
        """A token of each row, once all have a page for it."""
        place = 0
        while place < len(self._batch.rows):
            if self._batch.extend(self._batch.rows[place]):
                place += 1
            else:
                self._send_back()
        rows = self._batch.rows
        free = [row for row in rows if row.request.steering is None]
        for together in (free, *([row] for row in rows if row.request.steering is not None)):
            if together:
                self._decode_rows(together, self._guesses(together))

    def _guesses(self, rows: Sequence[Row]) -> list[list[int]]:
        """Of rows that lack no other token, as far as there are pages; none where guessing fails."""
        most, drafts = [self._most_guessed(row) for row in rows], self._batch.drafts
        if drafts is None:
            return [[] for _ in rows]
        try:
            return drafts.guess(rows, most)
        except Exception as error:  # noqa: BLE001 - text does not need guesses
            _LOG.warning("tokens cannot be guessed", exc_info=error)
            return [[] for _ in rows]

    def _most_guessed(self, row: Row) -> int:
        """A guess is a place of a pass: where many rows run there is no room for it."""
        if self._speculation is None or row.cached + 1 < len(row.tokens) or row.request.steering is not None:
            return 0
        most = min(self._speculation.tokens, row.most - len(row.tokens) - 1)
        return most if most > 0 and self._batch.extend(row, most) else 0

    def _decode_rows(self, rows: Sequence[Row], guesses: Sequence[list[int]]) -> None:
        """Where a pass fails, such as for want of memory, each alone: the others have the same tokens so."""
        try:
            decoded = self._batch.decode(rows, guesses)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is that of one request
            if len(rows) == 1:
                self._fail(rows[0], error)
            else:
                for row in tuple(rows):
                    self._decode_rows([row], [[]])
            return
        # Streams draw on the CPU, so that a seed means the same on every device.
        logits_NV, first = decoded.logits_NV.cpu(), 0
        for row, guess in zip(rows, guesses, strict=True):
            end = first + 1 + len(guess)
            routes = None if decoded.routes is None else decoded.routes.part(first, end)
            self._advance(row, guess, logits_NV[first:end], routes)
            first = end

    def _send_back(self) -> None:
        """Let who came last wait again: the prompt that is being read, or else the newest row."""
        if self._waiting and self._waiting[0].pages:
            self._batch.leave(self._waiting[0])
            return
        row = self._batch.rows[-1]
        self._batch.leave(row)
        self._waiting.insert(0, row)

    def _read(self) -> None:
        """Parts of waiting prompts in their order, as far as there is room and a step goes."""
        left = MOST_READ
        while left > 0 and self._waiting and len(self._batch.rows) < self.most_rows:
            row = self._waiting[0]
            if not row.pages and not self._batch.admit(row):
                break
            before = row.cached
            try:
                logits_1V = self._batch.read(row)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is that of this request
                self._waiting.pop(0)
                self._fail(row, error)
                continue
            left -= row.cached - before
            if logits_1V is not None:
                self._waiting.pop(0)
                if row.cached == len(row.tokens):
                    self._give(row, logits_1V[0].cpu())

    def _fail(self, row: Row, error: Exception) -> None:
        told = ConsiliumError(str(error))
        told.__cause__ = error
        self._kept.append(Piece(row.id, -1, "", 0.0, "error", error=told))
        self._batch.leave(row)

    def _enter(self, row: Row) -> int:
        self._waiting.append(row)
        return row.id

    def check(self, request: Request, name: str = "the prompt") -> list[int]:
        """Return the tokens of its prompt, or raise ConsiliumError as ``submit`` would; from any thread."""
        return self._intake.check(request, name)

    def _row(self, request: Request, name: str) -> Row:
        """What will run for ``request``, which the sentence of an error calls ``name``."""
        tokens = self.check(request, name)
        self._next_id += 1
        return self._intake.row(self._next_id, request, tokens)

    def _advance(self, row: Row, guess: Sequence[int], logits_SV: Tensor, routes: Routes | None) -> None:
        """Tokens of a row, as long as they are those that were guessed."""
        self._guessed += len(guess)
        for place, logits_V in enumerate(logits_SV):
            row.tell(row.cached, None if routes is None else routes.part(place, place + 1))
            row.cached += 1
            if row.cached < len(row.tokens):
                return
            self._give(row, logits_V)
            if row.finished is not None or place == len(guess) or row.tokens[-1] != guess[place]:
                return
            self._right += 1

    def _give(self, row: Row, logits_V: Tensor) -> None:
        """One token for a row whose tokens are all in the cache; who has finished or fails leaves."""
        try:
            pooling, meaningless_V = row.request.pools is not None, self._intake.meaningless_V
            self._kept.append(pooled(row) if pooling else advance(row, logits_V, meaningless_V))
        except ConsiliumError as error:
            self._fail(row, error)
            return
        if row.finished is not None:
            self._batch.leave(row)


def _check(model: Decoder) -> None:
    moe = model.config.moe
    if model.device.type == "meta":
        raise ConsiliumError("a model on the meta device has no weights to generate from; load or build one.")
    if moe is not None and not moe.independent:
        raise ConsiliumError(
            "the text of this model would depend on the batch, because its experts choose among the tokens at"
            " hand or always drop beyond a capacity; change moe.router.select, or use scope 'training'."
        )


def _listed(texts: Sequence[_T] | str) -> Sequence[_T | str]:
    """A text is a sequence of characters in Python: here it is one text."""
    return (texts,) if isinstance(texts, str) else texts
