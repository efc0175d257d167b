"""Balance losses of documents that are packed into a row, and the transports that a model is built with."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch

from consilium.config.balance import Balance, CommunicationLoss, DeviceLoss, SequenceLoss
from consilium.config.model import Model
from consilium.model.build import build
from consilium.model.types import Inputs, Options
from consilium.moe.transport import Local, LocalTicket, Transport
from consilium.moe.types import Mode
from small import DEEPSEEK, lively
from support import relative_error

LOSSES = (
    SequenceLoss(coefficient=1.0),
    DeviceLoss(coefficient=1.0, devices=4, scope="sequence"),
    CommunicationLoss(coefficient=1.0, devices=4, most=2),
)
TRAINING = Options(Mode(training=True))


def balanced(sequence: Literal["document", "row"]) -> Model:
    assert DEEPSEEK.moe is not None
    balance = Balance(losses=LOSSES, sequence=sequence)
    return dataclasses.replace(DEEPSEEK, moe=dataclasses.replace(DEEPSEEK.moe, balance=balance))


def passes(sequence: Literal["document", "row"]) -> tuple[dict[str, float], dict[str, float]]:
    """Losses of two documents in one row and in two."""
    model = lively(balanced(sequence))
    one_S, two_S = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    document_BS = torch.tensor([0, 1]).repeat_interleave(20)[None]
    packed = Inputs(torch.cat((one_S, two_S))[None], document_BS, torch.arange(20).repeat(2)[None])
    apart = Inputs(torch.stack((one_S, two_S)))
    with torch.no_grad():
        first, second = (model.hidden(inputs, options=TRAINING) for inputs in (packed, apart))
    assert relative_error(first.final_BSD.flatten(0, 1), second.final_BSD.flatten(0, 1)) < 1e-5
    one, two = (
        {name: float(loss) for name, loss in hidden.reports[0].losses.items()} for hidden in (first, second)
    )
    return one, two


def test_a_packed_document_counts_like_one_in_a_row_of_its_own() -> None:
    packed, apart = passes("document")
    assert packed == pytest.approx(apart, rel=1e-5)


def test_a_row_counts_as_one_sequence_where_the_configuration_says_so() -> None:
    packed, apart = passes("row")
    assert apart == pytest.approx(passes("document")[1], rel=1e-6)
    assert all(abs(packed[name] - apart[name]) > 1e-3 * apart[name] for name in apart)


def test_documents_are_numbered_through_the_micro_batch() -> None:
    document_BS = torch.tensor([[0, 0, 1], [0, 1, 2]])
    tokens = Inputs(torch.zeros(2, 3, dtype=torch.long), document_BS).tokens()
    assert tokens.sequence_T.tolist() == [0, 0, 1, 3, 4, 5]
    assert tokens.row_T is not None
    assert tokens.row_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert tokens.sequences == 6
    assert Inputs(torch.zeros(2, 0, dtype=torch.long), document_BS[:, :0]).tokens().sequences == 2


def test_every_moe_layer_gets_the_transport_that_the_model_is_built_with() -> None:
    asked: list[int] = []

    def transports(layer: int) -> Transport[LocalTicket]:
        asked.append(layer)
        return Local()

    model = build(DEEPSEEK, transports=transports)
    assert asked == list(model.moe_modules())
