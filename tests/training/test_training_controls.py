"""What moves a bias goes on where it was: momentum, errors, schedule; and other programs never see it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from consilium.checkpoint import store
from consilium.config.balance import SMEBU, Balance, BiasRule, PIDBias, QuantileBias
from consilium.config.data import Data, TextPath
from consilium.config.model import Model
from consilium.config.router import Sinkhorn, TopK
from consilium.config.training import Bytes, Training
from consilium.model.build import build
from consilium.training.controls import controls, restore_controls
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from small import DEEPSEEK

RULES: tuple[BiasRule, ...] = (
    SMEBU(rate=0.05),
    PIDBias(),
    QuantileBias(statistics="histogram", momentum=0.5),
)
KEPT = {"smebu": {"momentum_E"}, "pid": {"errors_2E"}, "quantile": set[str]()}


class Killed(BaseException):
    """Like a kill nothing is saved on the way out."""


def balanced(rule: BiasRule) -> Model:
    assert DEEPSEEK.moe is not None
    router = dataclasses.replace(DEEPSEEK.moe.router, select=TopK(k=2))
    moe = dataclasses.replace(DEEPSEEK.moe, router=router, balance=Balance(bias=rule, bias_until=0.7))
    return dataclasses.replace(DEEPSEEK, moe=moe)


def configuration(model: Model, folder: Path) -> Training:
    text = folder / "text" / "a.txt"
    text.parent.mkdir(exist_ok=True)
    text.write_text("".join(f"line {i} of {i * i}.\n" for i in range(200)))
    (text.parent / "b.txt").write_text("other lines\n" * 40)
    return Training(
        model=model,
        tokenizer=Bytes(),
        data=Data(sources=(TextPath(path=str(text.parent)),), sequence_length=24, held_out=0.5),
        steps=6,
        batch=4,
        accumulate=2,
        save_every=2,
        eval_tokens=64,
    )


def stopped_after(step: int) -> object:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return listen


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_stopped_run_balances_on_to_the_same_bits(rule: BiasRule, tmp_path: Path) -> None:
    """Stopped twice, the second time where the bias has come to rest."""
    config = configuration(balanced(rule), tmp_path)
    train(config, tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", resume=True, listeners=(stopped_after(step),))
    train(config, tmp_path / "broken", resume=True)
    found = [tmp_path / name / "checkpoints" / "step-6" for name in ("whole", "broken")]
    weights = [store.load(folder).state_dict() for folder in found]
    states = [store.load_training_state(folder).tensors for folder in found]
    for one, other in (weights, states):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    kept = {name.rpartition("/")[2] for name in states[0] if name.startswith("balance/")}
    assert kept == KEPT[rule.kind]
    assert all(bool(states[0][name].any()) for name in states[0] if name.startswith("balance/"))
    with safe_open(found[0] / "model.safetensors", framework="pt") as file:
        assert not any(part in name for name in file.keys() for part in ("momentum", "errors"))  # noqa: SIM118


def test_a_bias_comes_to_rest_at_its_share_of_the_run(tmp_path: Path) -> None:
    """0.7 of 6 steps: those from 0 to 4 move it, the last does not."""
    config = configuration(balanced(SMEBU(rate=0.05)), tmp_path)
    train(dataclasses.replace(config, save_every=1, keep=6), tmp_path / "run")
    steps = [store.load(tmp_path / "run" / "checkpoints" / f"step-{n}").state_dict() for n in range(1, 7)]
    names = [name for name in steps[0] if name.endswith("bias_E")]
    moved = [any(not torch.equal(a[name], b[name]) for name in names) for a, b in itertools.pairwise(steps)]
    assert moved == [True, True, True, True, False]


def test_controls_come_back_and_leave_the_moments_of_the_optimizer() -> None:
    model, fresh = (build(balanced(SMEBU()), seed=0) for _ in range(2))
    for place, value in enumerate(controls(model).values()):
        value.fill_(place + 0.5)
    moments = {"norm.weight:exp_avg": torch.ones(2)}
    rest = restore_controls(fresh, {name: v.clone() for name, v in controls(model).items()} | moments)
    assert rest == moments
    assert len(controls(model)) == len(model.moe_modules())
    assert all(torch.equal(controls(fresh)[name], value) for name, value in controls(model).items())


def test_a_model_trained_with_a_plan_is_served_by_the_architecture_of_top_k(tmp_path: Path) -> None:
    """Its file says both: what trained it, and what other programs compute."""
    assert DEEPSEEK.moe is not None
    router = dataclasses.replace(DEEPSEEK.moe.router, select=TopK(k=2), offset="none")
    plain = dataclasses.replace(DEEPSEEK.moe, router=router, balance=Balance())
    planned = dataclasses.replace(plain, router=dataclasses.replace(router, select=Sinkhorn(k=2)))
    kinds = []
    for moe in (plain, planned):
        config = dataclasses.replace(DEEPSEEK, moe=moe, mtp=dataclasses.replace(DEEPSEEK.mtp, depth=0))
        folder = tmp_path / moe.router.select.kind
        store.save(build(config, seed=0), folder)
        assert store.load(folder).config == config
        kinds.append((folder / "config.json").read_text().partition('"model_type": ')[2].partition(",")[0])
    assert kinds[0] == kinds[1]
