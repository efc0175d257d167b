"""From the options of ``train`` and ``demo`` to a complete training configuration and a budget."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from consilium.config import io
from consilium.config.model import Model
from consilium.config.training import AdamW, TextPath, Training
from consilium.errors import ConsiliumError
from consilium.planner.scaling import scale_to
from consilium.recipes import catalogue
from consilium.recipes.variants import with_balance
from consilium.training import budget
from consilium.training.precision import faster_dtype
from consilium.training.resume import refuse_unnamed


def training_config(model: str, options: Namespace, stored: Training | None = None) -> Training:
    """What ``model`` (a recipe or a YAML file) and the options describe; ``steps`` is still open.

    Where a run goes on, ``stored`` says all that the options leave out.
    """
    base = _from_file(model) if is_file(model) else _from_recipe(model)
    if stored is None:
        return _settled(base, options)
    if options.dtype == "auto":  # measured when the run began
        options = Namespace(**(vars(options) | {"dtype": stored.dtype}))
    if not is_file(model):
        return _settled(_of_run(base, stored, options), options)
    config = _settled(stored, options)
    refuse_unnamed(config, _settled(base, options), options.out, length=_says_length(options))
    return config


def _settled(base: Training, options: Namespace) -> Training:
    config = _apply(base, options)
    assignments = dict(_assignment(text) for text in options.set)
    return io.replace(config, assignments) if assignments else config


def sets_steps(options: Namespace) -> bool:
    """Whether ``--set steps=N`` says how long."""
    return "steps" in dict(_assignment(text) for text in options.set)


def _says_length(options: Namespace) -> bool:
    return any(value is not None for value in (options.steps, options.tokens, options.minutes)) or sets_steps(
        options
    )


def chosen_budget(options: Namespace, default: budget.Budget) -> budget.Budget:
    if options.steps is not None:
        return budget.Steps(options.steps)
    if options.tokens is not None:
        return budget.Tokens(options.tokens)
    if options.minutes is not None:
        if not 0 < options.minutes < float("inf"):
            raise ConsiliumError(
                f"--minutes {options.minutes:g} is not a positive number; give the minutes to train for."
            )
        return budget.Minutes(options.minutes)
    return default


def is_file(model: str) -> bool:
    """A YAML file is a complete configuration and carries its own steps."""
    return Path(model).suffix in (".yaml", ".yml")


def _from_file(name: str) -> Training:
    return io.read_yaml(Training, Path(name))


def _of_run(asked: Training, stored: Training, options: Namespace) -> Training:
    """The run's own configuration; the dial alone starts from the recipe again, as it did at the start."""
    if asked.name != stored.name:
        raise ConsiliumError(
            f"cannot resume {options.out}: it trains {stored.name or stored.model.family}, not {asked.name};"
            " name that or choose another --out."
        )
    return stored if options.params is None else dataclasses.replace(stored, model=asked.model)


def _from_recipe(name: str) -> Training:
    found, size = catalogue.parse(name)
    model = found.model(size)
    rate = AdamW(learning_rate=default_rate(model))
    return Training(name=f"{found.name}:{size}", model=model, steps=1, optimizer=rate)


def default_rate(model: Model) -> float:
    """0.006 at the tiny width of 192, falling with the width (as in muP, 2203.03466), in two digits."""
    return float(f"{min(6e-3, 6e-3 * 192 / model.hidden_size):.2g}")


def _apply(base: Training, options: Namespace) -> Training:
    model = _model(base.model, options)
    data = io.changed(
        base.data,
        where="train",
        **_given(
            sources=[TextPath(path=path) for path in options.data] if options.data else None,
            sequence_length=options.seq,
        ),
    )
    optimizer = io.changed(base.optimizer, where="train", **_given(learning_rate=options.lr))
    changes = _given(
        batch=options.batch,
        save_every=options.save_every,
        eval_every=options.eval_every,
        seed=options.seed,
        threads=options.threads,
        dtype=faster_dtype() if options.dtype == "auto" else options.dtype,
    )
    return io.changed(base, where="train", model=model, data=data, optimizer=optimizer, **changes)


def _model(model: Model, options: Namespace) -> Model:
    if options.params is not None:
        model = scale_to(model, options.params)
    return model if options.balance is None else with_balance(model, options.balance)


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConsiliumError(f"--set {text!r} has no '='; write --set key.path=value.")
    return key.removeprefix("train."), value


DEMO_MODEL = "deepseek-v3:tiny"


def demo_config() -> Training:
    """The demo's configuration but for its steps."""
    return _from_recipe(DEMO_MODEL)
