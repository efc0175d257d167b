"""A model run over text one block at a time, straight from its files: never more than a block in memory.

Everything is computed in float32, whatever the dtype of the files, on the device that the text is on.

Legend: B rows, S tokens of a row, D hidden size, T tokens of all passages without padding, C some of them,
F width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.attention.context import build_context
from consilium.attention.types import Context
from consilium.checkpoint.source import Source
from consilium.config.model import Model
from consilium.data.corpus import Corpus
from consilium.evaluation.bits import Reading
from consilium.model.block import Block
from consilium.model.types import Inputs
from consilium.moe.types import Mode
from consilium.ops.feed_forward import activate
from consilium.ops.loss import IGNORE, token_nll
from consilium.ops.norm import rms_norm

_CHUNK: Final = 256
"""Tokens whose logits are held at once."""


@final
@dataclass(frozen=True, slots=True)
class Passage:
    """A batch of text of one domain."""

    inputs: Inputs
    targets_BS: Tensor
    """int64, -1 where there is none."""
    bytes: int
    """Of the source behind the targets."""

    @property
    def device(self) -> torch.device:
        return self.inputs.ids_BS.device

    def to(self, device: str) -> Passage:
        return Passage(self.inputs.to(device), self.targets_BS.to(device), self.bytes)

    def tokens(self, x_BSX: Tensor) -> Tensor:
        """What belongs to tokens and not to padding: [T, ...]."""
        valid_BS = self.inputs.valid_BS
        return x_BSX.flatten(0, 1) if valid_BS is None else x_BSX[valid_BS]


@final
@dataclass(frozen=True, slots=True)
class Visit:
    """What one block did; tensors [B, S, D] by passage."""

    layer: int
    block: Block
    before: tuple[Tensor, ...]
    """Its input."""
    normed: tuple[Tensor, ...]
    """The input of its feed-forward network or experts."""
    fed: tuple[Tensor, ...]
    """What those made of it."""
    loads: tuple[Tensor, ...]
    """int64 [E] tokens of each expert by passage; none of a dense block."""
    after: tuple[Tensor, ...]


def passages(corpus: Corpus, reading: Reading) -> tuple[Passage, ...]:
    """The held-out text of all domains, cut as ``reading`` says."""
    found = [labelled for domain in corpus.domains for labelled in reading.batches(corpus, domain)]
    return tuple(
        Passage(Inputs.of(labelled.batch), labelled.batch.targets_BS, int(labelled.bytes_BS.sum()))
        for labelled in found
    )


@torch.no_grad()
def walk(source: Source, text: Sequence[Passage]) -> Iterator[Visit]:
    """Visit the blocks of ``source`` from the first to the last; of who keeps no visit one is in memory."""
    states = embedded(source, text)
    for layer in range(source.config.layers):
        found = visit(block_of(source, layer, text[0].device), source.config, text, states)
        states = found.after
        yield found
        del found


def block_of(source: Source, layer: int, device: torch.device) -> Block:
    """Block ``layer`` with its weights in float32, none of them to be trained."""
    with torch.device("meta"):
        block = Block(source.config, layer)
    block = block.to_empty(device=device).requires_grad_(False)
    for name, values in block.state_dict().items():
        source.fill(f"layers.{layer}.{name}", values)
    return block


def embedded(source: Source, text: Sequence[Passage]) -> tuple[Tensor, ...]:
    """States [B, S, D] before the first block."""
    weight_VD = source.read("embed.weight").to(text[0].device)
    scale = source.config.embedding_scale
    return tuple(F.embedding(passage.inputs.ids_BS, weight_VD).float() * scale for passage in text)


def visit(block: Block, config: Model, text: Sequence[Passage], states: tuple[Tensor, ...]) -> Visit:
    """Run one block on the ``states`` [B, S, D] before it."""
    attended, normed = attend(block, config, text, states)
    results = [
        block.feed(x_BSD, passage.inputs.tokens(), Mode())
        for passage, x_BSD in zip(text, normed, strict=True)
    ]
    fed = tuple(result.x_BSD for result in results)
    after = (x + block.feed_forward_post_norm(y) for x, y in zip(attended, fed, strict=True))
    loads = (result.report.load_E for result in results if result.report is not None)
    return Visit(block.layer, block, states, normed, fed, tuple(loads), tuple(after))


def attend(
    block: Block, config: Model, text: Sequence[Passage], states: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The first half of a block: its result, residual included, and that normed for the second half."""
    attended = tuple(
        block.attend(x_BSD, context_of(config, passage)).y_BSD
        for passage, x_BSD in zip(text, states, strict=True)
    )
    return attended, tuple(block.feed_forward_norm(x_BSD) for x_BSD in attended)


def context_of(config: Model, passage: Passage) -> Context:
    inputs = passage.inputs
    return build_context(
        config.attention,
        inputs.positions(),
        sequence_BS=inputs.sequence_BS,
        valid_BS=inputs.valid_BS,
    )


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """How far values are from those expected, summed over parts."""

    largest: float = 0.0
    squares: float = 0.0
    """Of the differences."""
    expected: float = 0.0
    """Squares of what was expected."""

    @property
    def relative(self) -> float:
        """Euclidean norm of the differences over that of what was expected."""
        return (self.squares / self.expected) ** 0.5 if self.expected else float(self.squares > 0)

    def and_of(self, actual: Tensor, expected: Tensor) -> Difference:
        apart = actual.double() - expected.double()
        largest = torch.cat((apart.flatten().abs(), apart.new_tensor([self.largest]))).max()  # NaN too
        squares = self.squares + float(apart.square().sum())
        return Difference(float(largest), squares, self.expected + float(expected.double().square().sum()))


@final
@dataclass(frozen=True, slots=True)
class Ends:
    """What two models with one head predict."""

    logits: Difference
    bits_per_byte: tuple[float, float]
    """Of the one expected and of the other."""
    tokens: int


@torch.no_grad()
def compare_ends(
    sources: tuple[Source, Source],
    text: Sequence[Passage],
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
) -> Ends:
    """Compare the last states [B, S, D] of two models, each by its own last norm and head."""
    heads = tuple(Head.of(source, text[0].device) for source in sources)
    logits, nats, size, count = Difference(), [0.0, 0.0], 0, 0
    for passage, one_BSD, other_BSD in zip(text, expected, actual, strict=True):
        targets_T = passage.tokens(passage.targets_BS)
        size += passage.bytes
        count += int((targets_T != IGNORE).sum())
        both_TD = [passage.tokens(x_BSD).split(_CHUNK) for x_BSD in (one_BSD, other_BSD)]
        for one_CD, other_CD, targets_C in zip(*both_TD, targets_T.split(_CHUNK), strict=True):
            pair = [head.logits(x_CD) for head, x_CD in zip(heads, (one_CD, other_CD), strict=True)]
            logits = logits.and_of(pair[1], pair[0])
            nats = [n + float(token_nll(x, targets_C).sum()) for n, x in zip(nats, pair, strict=True)]
    bits = [n / torch.log(torch.tensor(2.0)).item() / max(size, 1) for n in nats]
    return Ends(logits, (bits[0], bits[1]), count)


@final
@dataclass(frozen=True, slots=True)
class Head:
    """The last norm and what makes logits of states, in float32."""

    config: Model
    norm_D: Tensor
    weight_VD: Tensor

    @staticmethod
    def of(source: Source, device: torch.device) -> Head:
        name = "embed.weight" if source.config.tied else "head.weight"
        norm_D, weight_VD = (source.read(part, torch.float32).to(device) for part in ("norm.weight", name))
        return Head(source.config, norm_D, weight_VD)

    def logits(self, x_CD: Tensor) -> Tensor:
        normed_CD = rms_norm(x_CD, self.norm_D, self.config.norm_epsilon)
        return (normed_CD * self.config.logit_scale) @ self.weight_VD.T


def importances(
    source: Source, text: Sequence[Passage], before: Mapping[int, tuple[Tensor, ...]]
) -> Iterator[tuple[Block, Tensor]]:
    """Visit the blocks from the last to the first: |activation * gradient| of each hidden neuron, [T, F].

    ``before`` holds the inputs of all blocks by layer, and under the number of layers the last states. The
    gradient is that of the summed loss. Of a block one at a time is in memory.
    """
    config = source.config
    grads = _last_gradients(source, text, before[config.layers])
    for layer in reversed(range(config.layers)):
        block = block_of(source, layer, text[0].device)
        parts, lower = list[Tensor](), list[Tensor]()
        for passage, x_BSD, grad_BSD in zip(text, before[layer], grads, strict=True):
            part_TF, below_BSD = _backward(block, config, passage, x_BSD, grad_BSD)
            parts.append(part_TF)
            lower.append(below_BSD)
        grads = tuple(lower)
        yield block, torch.cat(parts)
        del block


def _last_gradients(source: Source, text: Sequence[Passage], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the summed loss by the last states."""
    head = Head.of(source, text[0].device)
    found: list[Tensor] = []
    for passage, x_BSD in zip(text, states, strict=True):
        parts = zip(
            x_BSD.flatten(0, 1).split(_CHUNK), passage.targets_BS.flatten().split(_CHUNK), strict=True
        )
        found.append(torch.cat([_chunk_gradient(head, x_CD, t_C) for x_CD, t_C in parts]).view_as(x_BSD))
    return tuple(found)


def _chunk_gradient(head: Head, x_CD: Tensor, targets_C: Tensor) -> Tensor:
    with torch.enable_grad():
        x_CD = x_CD.detach().requires_grad_()
        nll = token_nll(head.logits(x_CD), targets_C).sum()
    return torch.autograd.grad(nll, x_CD)[0]


def _backward(
    block: Block, config: Model, passage: Passage, x_BSD: Tensor, grad_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    """|activation * gradient| of the tokens [T, F], and the gradient by the block's input."""
    network = block.feed_forward
    with torch.enable_grad():
        x_BSD = x_BSD.detach().requires_grad_()
        attended_BSD = block.attend(x_BSD, context_of(config, passage)).y_BSD
        if network is None:
            fed = block.feed(block.feed_forward_norm(attended_BSD), passage.inputs.tokens(), Mode())
            y_BSD, hidden_BSF = attended_BSD + block.feed_forward_post_norm(fed.x_BSD), x_BSD
        else:
            hidden_BSF = activate(network.up(block.feed_forward_norm(attended_BSD)), network.activation)
            y_BSD = attended_BSD + block.feed_forward_post_norm(network.down(hidden_BSF))
    grad_x_BSD, grad_hidden_BSF = torch.autograd.grad(y_BSD, (x_BSD, hidden_BSF), grad_BSD)
    return passage.tokens((hidden_BSF * grad_hidden_BSF).abs().detach()), grad_x_BSD
