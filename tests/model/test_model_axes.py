"""Norms around branches, scales of embeddings and logits, and what starts at zero or one.

Legend: B rows, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consilium.attention.context import build_context
from consilium.config.model import Model
from consilium.config.router import LearnedNoise, MLPGate, NoNoise, Router, SoftmaxOfSelected, TwoLevel
from consilium.model.block import Block
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Objective, Options
from consilium.moe.types import LayerMode, Mode
from consilium.training.objective import Share, training_loss
from small import DEEPSEEK, DENSE, KINDS, SWITCH, lively, random_batch
from support import relative_error

EMBEDDING, LOGIT = 78.38367176906169, 0.5773502691896257


def around(config: Model) -> Model:
    return dataclasses.replace(config, norms="around")


def scaled(config: Model) -> Model:
    """Grok-1's factors, on a model whose head is a matrix of its own."""
    return dataclasses.replace(config, embedding_scale=EMBEDDING, logit_scale=LOGIT, tied=False)


def by_hand(block: Block, config: Model, x_BSD: Tensor) -> Tensor:
    """First x + norm2(attention(norm1(x))), then the same around the network: norms row by row."""
    inputs = Inputs(torch.arange(x_BSD.shape[1]).expand(x_BSD.shape[:2]))

    def normed(name: str, x: Tensor) -> Tensor:
        weight_D = block.get_parameter(f"{name}.weight")
        rows = [
            row * weight_D / (row.square().mean() + config.norm_epsilon).sqrt() for row in x.flatten(0, 1)
        ]
        return torch.stack(rows).view_as(x)

    context = build_context(config.attention, inputs.positions())
    x_BSD = x_BSD + normed(
        "attention_post_norm", block.attention(normed("attention_norm", x_BSD), context).y_BSD
    )
    inner = normed("feed_forward_norm", x_BSD)
    if block.feed_forward is not None:
        y_BSD = block.feed_forward(inner)
    else:
        assert block.moe is not None
        y_BSD = block.moe(inner.flatten(0, 1), inputs.tokens(), LayerMode()).y_TD.view_as(inner)
    return x_BSD + normed("feed_forward_post_norm", y_BSD)


def lively_block(config: Model, layer: int) -> Block:
    block = Block(config, layer)
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
    return block.double()


@pytest.mark.parametrize(("config", "layer"), [(DEEPSEEK, 0), (DEEPSEEK, 1), (SWITCH, 1), (DENSE, 0)])
def test_norms_around_are_four_norms_in_values_and_gradients(config: Model, layer: int) -> None:
    config = around(config)
    block = lively_block(config, layer)
    x_BSD = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x_BSD.requires_grad_()
    inputs = Inputs(torch.arange(7).expand(2, 7))
    context = build_context(config.attention, inputs.positions())
    ours = block(x_BSD, context, inputs.tokens(), Mode(), None).x_BSD
    expected = by_hand(block, config, x_BSD)
    assert relative_error(ours, expected) < 1e-6
    parameters = [x_BSD, *block.parameters()]
    towards = torch.randn(x_BSD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad((ours * towards).sum(), parameters, materialize_grads=True, allow_unused=True)
    wanted = torch.autograd.grad(
        (expected * towards).sum(), parameters, materialize_grads=True, allow_unused=True
    )
    for got, gradient in zip(found, wanted, strict=True):
        assert relative_error(got, gradient) < 1e-5


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_norms_before_add_no_tensor_and_norms_around_two_a_block(config: Model) -> None:
    plain, more = (set(build(c, device="meta").state_dict()) for c in (config, around(config)))
    blocks = [f"layers.{i}" for i in range(config.layers)] + [
        f"mtp.{k}.block" for k in range(config.mtp.depth)
    ]
    names = {f"{b}.{part}_post_norm.weight" for b in blocks for part in ("attention", "feed_forward")}
    assert plain < more
    assert more - plain == names


def folded(model: Decoder) -> Decoder:
    """The same function without factors: they are in the matrices."""
    config = dataclasses.replace(model.config, embedding_scale=1.0, logit_scale=1.0)
    plain = build(config)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.embed.weight *= EMBEDDING
        plain.head.weight *= LOGIT
    return plain


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_factors_are_factors_of_the_matrices_in_values_and_gradients(config: Model) -> None:
    """The loss of the tokens further ahead reads the same embeddings and the same head."""
    model = lively(scaled(config))
    plain, batch = folded(model), random_batch(2, 24)
    assert relative_error(model(Inputs.of(batch)).logits, plain(Inputs.of(batch)).logits) < 1e-5
    count = int((batch.targets_BS >= 0).sum())
    losses = [training_loss(m, batch, Share(count, 1), options=Options()) for m in (model, plain)]
    assert relative_error(losses[0].nll, losses[1].nll) < 1e-5
    assert relative_error(losses[0].ahead, losses[1].ahead) < 1e-5
    for loss in losses:
        loss.total.backward()
    factors = {"embed.weight": EMBEDDING, "head.weight": LOGIT}
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert relative_error(ours.grad, theirs.grad * factors.get(name, 1.0)) < 1e-4, name


def test_the_loss_of_a_pass_is_that_of_its_logits() -> None:
    model, batch = lively(dataclasses.replace(scaled(SWITCH), tied=True)), random_batch(2, 24)
    losses = model(Inputs.of(batch), objective=Objective(batch.targets_BS))
    expected = torch.nn.functional.cross_entropy(
        model(Inputs.of(batch)).logits.flatten(0, 1),
        batch.targets_BS.flatten(),
        ignore_index=-1,
        reduction="sum",
    )
    assert relative_error(losses.nll, expected) < 1e-5
    assert int(losses.targets) == int((batch.targets_BS >= 0).sum())


def test_embeddings_are_multiplied_in_the_dtype_of_the_states() -> None:
    """In bfloat16 the factor itself is 78.5, and products are rounded before the blocks."""
    model = build(scaled(DENSE), dtype="bfloat16")
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.arange(12)[None])
    expected = (model.embed.weight[:12].double() * 78.5).bfloat16()
    assert torch.equal(seen[0][0], expected)


LEVELS = Router(noise=LearnedNoise(), select=TwoLevel(groups=2, keep=2, k=1), weight=SoftmaxOfSelected())


def with_router(router: Router) -> Model:
    assert SWITCH.moe is not None
    moe = dataclasses.replace(SWITCH.moe, router=router, latent=8)
    return dataclasses.replace(SWITCH, moe=moe, norms="around")


def test_gates_beside_learned_noise_start_at_zero_and_post_norms_at_one() -> None:
    state = build(with_router(LEVELS)).state_dict()
    gates = {name: value for name, value in state.items() if ".router." in name}
    parts = {"projection", "noise", "primary", "primary_noise"}
    assert set(gates) == {f"layers.{i}.moe.router.{part}.weight" for i in (1, 3) for part in parts}
    assert not any(bool(value.any()) for value in gates.values())
    for name, value in state.items():
        if "norm" in name:
            assert bool((value == 1).all()), name
        elif ".router." not in name:
            assert 0.01 < float(value.std()) < 1, name


def test_other_gates_are_drawn() -> None:
    noiseless = build(with_router(dataclasses.replace(LEVELS, noise=NoNoise())))
    tanh = build(with_router(dataclasses.replace(LEVELS, projection=MLPGate())))
    for model, drawn in ((noiseless, ("projection.weight", "primary.weight")), (tanh, ("hidden.weight",))):
        gates = {name: value for name, value in model.named_parameters() if ".router." in name}
        assert all(bool(value.any()) for name, value in gates.items() if name.endswith(drawn))
