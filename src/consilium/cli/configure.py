"""From the options of ``train`` and ``demo`` to a complete training configuration and a budget."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.cli.arguments import assignments
from consilium.config import io
from consilium.config.data import read_source
from consilium.config.model import Model
from consilium.config.optimizer import AdamW
from consilium.config.training import Folder, StartWeights, Training
from consilium.errors import ConsiliumError
from consilium.planner.scaling import scale_to
from consilium.recipes import catalogue
from consilium.recipes.variants import with_balance
from consilium.training.budget import Budget, Minutes, Steps, Tokens
from consilium.training.precision import faster_dtype
from consilium.training.resume import refuse_unnamed

DEMO_MODEL = "deepseek-v3:tiny"
FROM_WEIGHTS = 0.1
"""Peak learning rate of weights that are trained already, in that of random ones."""


def training_config(options: Namespace, stored: Training | None = None) -> Training:
    """What MODEL and the options describe; ``steps`` is still open.

    Where a run goes on, ``stored`` says all that the options leave out.
    """
    model = options.model
    if stored is not None and options.dtype == "auto":  # measured when the run began
        options = Namespace(**(vars(options) | {"dtype": stored.dtype}))
    if stored is None:
        return _settled(_base(model), options)
    if not is_file(model):
        return _settled(_of_run(stored, options), options)
    config = _settled(stored, options)
    refuse_unnamed(config, _settled(_base(model), options), options.out, length=_says_length(options))
    return config


def demo_config() -> Training:
    """The demo's configuration but for its steps."""
    return _from_recipe(DEMO_MODEL)


def budget_of(options: Namespace, config: Training, stored: Training | None) -> Budget:
    """How long to train: what the options say, else the run or the file, else three minutes."""
    if options.steps is not None:
        return Steps(options.steps)
    if options.tokens is not None:
        return Tokens(options.tokens)
    # Minutes of a run that goes on were turned into steps when it began.
    if stored is not None or (options.minutes is None and (is_file(options.model) or _sets_steps(options))):
        return Steps(config.steps)
    return Minutes(positive_minutes("train", 3.0 if options.minutes is None else options.minutes))


def positive_minutes(verb: str, minutes: float) -> float:
    if not 0 < minutes < float("inf"):
        raise ConsiliumError(
            f"{verb}: --minutes {minutes:g} is not a positive number; give the minutes to train for."
        )
    return minutes


def is_file(model: str) -> bool:
    """A YAML file is a complete configuration and carries its own steps."""
    return Path(model).suffix in (".yaml", ".yml")


def _base(model: str) -> Training:
    if is_file(model):
        return io.read_yaml(Training, Path(model))
    return _from_recipe(model) if _is_recipe(model) else _from_weights(model)


def _is_recipe(model: str) -> bool:
    """As everywhere, a recipe's name wins over a folder of the same name; ``./name`` is the folder.

    What is neither is no recipe that is known, and is said so with the nearest.
    """
    named = model.partition(":")[0] in catalogue.names()
    return named or not (Path(model).exists() or model != Path(model).name or model.endswith(".gguf"))


def _from_recipe(name: str) -> Training:
    found, size = catalogue.parse(name)
    model = found.model(size)
    rate = AdamW(learning_rate=_default_rate(model))
    return Training(name=f"{found.name}:{size}", model=model, steps=1, optimizer=rate)


def _from_weights(name: str) -> Training:
    """Somebody's weights with their tokenizer: of a checkpoint, of a run's newest one, or of a .gguf file."""
    place = checkpoint_in(Path(name))
    model = store.open_folder(place).config
    start = Folder(path=str(place))
    rate = AdamW(learning_rate=float(f"{FROM_WEIGHTS * _default_rate(model):.2g}"))
    return Training(
        name=Path(name).resolve().name, model=model, init=start, tokenizer=start, steps=1, optimizer=rate
    )


def _default_rate(model: Model) -> float:
    """0.006 at the tiny width of 192, falling with the width (as in muP, 2203.03466), in two digits."""
    return float(f"{min(6e-3, 6e-3 * 192 / model.hidden_size):.2g}")


def _of_run(stored: Training, options: Namespace) -> Training:
    """The run's own configuration; the dial alone starts from the recipe again, as it did at the start."""
    if not _is_recipe(options.model):
        return dataclasses.replace(stored, init=_same_start(stored, options))
    asked = _from_recipe(options.model)
    if asked.name != stored.name:
        raise ConsiliumError(
            f"cannot resume {options.out}: it trains {stored.name or stored.model.family}, not {asked.name};"
            " name that or choose another --out."
        )
    return stored if options.params is None else dataclasses.replace(stored, model=asked.model)


def _same_start(stored: Training, options: Namespace) -> StartWeights:
    """What MODEL names, be it gone by now: the checkpoint has its weights."""
    began = stored.init
    path = Path(options.model)
    if isinstance(began, Folder) and Path(began.path).is_relative_to(path):
        return began
    return Folder(path=str(path))


def _settled(base: Training, options: Namespace) -> Training:
    config = _apply(base, options)
    assignments = _assignments(options)
    return io.replace(config, _keeping_rate(config, assignments)) if assignments else config


def _keeping_rate(config: Training, assignments: dict[str, str]) -> dict[str, str]:
    """Another kind of optimizer has its own defaults, but the rate that suits the model or was given."""
    if "optimizer.kind" not in assignments:
        return assignments
    return {"optimizer.learning_rate": str(config.optimizer.learning_rate), **assignments}


def _apply(base: Training, options: Namespace) -> Training:
    sources = None if options.data is None else [read_source(text) for text in options.data]
    data = io.changed(base.data, where="train", **_given(sources=sources, sequence_length=options.seq))
    optimizer = io.changed(base.optimizer, where="train", **_given(learning_rate=options.lr))
    model = _model(base, options)
    changes = _given(
        batch=options.batch,
        save_every=options.save_every,
        eval_every=options.eval_every,
        seed=options.seed,
        threads=options.threads,
        dtype=faster_dtype(model) if options.dtype == "auto" else options.dtype,
    )
    return io.changed(base, where="train", model=model, data=data, optimizer=optimizer, **changes)


def _model(base: Training, options: Namespace) -> Model:
    model = base.model
    if options.params is not None:
        if isinstance(base.init, Folder):
            raise ConsiliumError(
                f"--params {options.params:,}: the weights of {base.init.path} have one size; drop --params."
            )
        model = scale_to(model, options.params)
    return model if options.balance is None else with_balance(model, options.balance)


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _assignments(options: Namespace) -> dict[str, str]:
    """``--set train.key`` is ``--set key``: the configuration is that of training."""
    return {key.removeprefix("train."): value for key, value in assignments(options.set).items()}


def _sets_steps(options: Namespace) -> bool:
    return "steps" in _assignments(options)


def _says_length(options: Namespace) -> bool:
    values = (options.steps, options.tokens, options.minutes)
    return _sets_steps(options) or any(value is not None for value in values)
