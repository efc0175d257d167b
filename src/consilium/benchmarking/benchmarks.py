"""What ``consilium bench`` can measure: paired runs on this machine, each giving one record.

Contestants take turns within one run, so that a machine whose speed drifts favours nobody; medians are
compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from consilium.benchmarking.record import several
from consilium.checkpoint.hf.config import to_hugging_face
from consilium.config.model import MTP, Model
from consilium.config.optimizer import AdamW
from consilium.data.batch import Batch
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from consilium.model.build import build, torch_dtype
from consilium.model.decoder import Decoder
from consilium.model.types import Options
from consilium.moe.types import Mode
from consilium.recipes import catalogue
from consilium.recipes.variants import dense_twin
from consilium.records.bench import Figure
from consilium.training.guard import clip
from consilium.training.objective import Share, training_loss
from consilium.training.optimizer import build_optimizer
from consilium.training.precision import faster_dtype

Contestant = Callable[[], int]
"""One run, which returns the tokens that it was about."""
Progress = Callable[[float, float], None]
"""Told how many runs are done, and of how many."""

MOST_GATHERED = 4 * 2**30

FAR_BEHIND = 4.0
"""Times the fastest, beyond which a contestant's exact figure does not matter."""


WARM_UP = 4
"""Turns before those that count: kernels are compiled for the shapes that steps have."""

PROMPT, DECODED = 64, 32
"""Tokens read and tokens added."""


def _unheard(done: float, total: float) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A training micro-batch and how often to repeat it."""

    model: Model
    batch: int
    length: int
    repeats: int
    optimizer: bool = True
    """Whether the optimizer's step is measured too."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def shapes() -> Mapping[str, Shape]:
    """Training benchmarks by name. Without multi-token prediction, which the rival does not train."""
    tiny = dataclasses.replace(catalogue.recipe("deepseek-v3", "tiny"), mtp=MTP())
    yardstick = dataclasses.replace(catalogue.recipe("deepseek-v3", "1b"), layers=4)
    return {
        "train-tiny": Shape(tiny, 8, 256, 15),
        "train-1b": Shape(yardstick, 4, 512, 3),
        "passes-1b": Shape(yardstick, 4, 512, 5, optimizer=False),
    }


def training(name: str, against: str | None, progress: Progress = _unheard) -> tuple[Figure, ...]:
    """Tokens a second of forward and backward, in steps of ``train-`` with clipping and AdamW too."""
    shape = shapes()[name]
    contestants: dict[str, Contestant] = {"consilium": ours(shape)}
    if against == "transformers":
        contestants |= transformers(shape)
    return figures(take_turns(contestants, shape.repeats, progress), "tokens/s")


def dense_against_moe(progress: Progress = _unheard, repeats: int = 15) -> tuple[Figure, ...]:
    """The tiny MoE beside a dense model of the same active parameters: steps of the same tokens."""
    tiny = shapes()["train-tiny"]
    twin = dataclasses.replace(tiny, model=dense_twin(tiny.model))
    return figures(take_turns({"moe": ours(tiny), "dense twin": ours(twin)}, repeats, progress), "tokens/s")


def yardstick(name: str) -> Decoder:
    """The untrained model that ``decode-tiny`` or ``decode-1b`` decodes with."""
    return build(shapes()[name.replace("decode", "train")].model)


def decoding(model: Decoder, progress: Progress = _unheard, repeats: int = 5) -> tuple[Figure, ...]:
    """Tokens a second of reading a prompt of 64 tokens, and of greedy decoding after it at batch 1 and 8.

    Figures are no rivals: each is measured by itself. A model of a short length gets a shorter prompt.
    """
    engine, most = Engine(model), model.config.max_length
    new = min(DECODED, most // 2)
    prompt = [1 + i % (model.config.vocab_size - 1) for i in range(min(PROMPT, most - new))]
    runs: dict[str, Contestant] = {
        f"prompt of {len(prompt)}": lambda: len(prompt) * len(engine.complete([prompt], max_tokens=1)),
        **{f"batch {batch}": _decode(engine, [prompt] * batch, new) for batch in (1, 8)},
    }
    speeds: dict[str, list[float]] = {}
    for done, (label, run) in enumerate(runs.items()):
        speeds |= take_turns({label: run}, repeats, _share_of(progress, done, len(runs)))
    return tuple(figure for label in speeds for figure in figures({label: speeds[label]}, "tokens/s"))


def _decode(engine: Engine, prompts: Sequence[list[int]], new: int) -> Contestant:
    """A model that has learnt to stop may stop early."""
    return lambda: sum(map(len, engine.complete(prompts, max_tokens=new)))


def _share_of(progress: Progress, before: int, parts: int) -> Progress:
    return lambda done, total: progress(before * total + done, parts * total)


def ours(shape: Shape) -> Contestant:
    """One training step of this library on random tokens, in the dtype that is faster here."""
    model = build(shape.model)
    optimizer = build_optimizer(model, AdamW())
    ids_BS = _ids(shape)
    batch = Batch(
        ids_BS=ids_BS,
        targets_BS=ids_BS.roll(-1, 1),
        sequence_BS=torch.zeros_like(ids_BS),
        position_BS=torch.arange(shape.length).expand_as(ids_BS),
        valid_BS=torch.ones_like(ids_BS, dtype=torch.bool),
    )
    options = Options(mode=Mode(training=True), dtype=torch_dtype(faster_dtype(shape.model)))

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        training_loss(model, batch, Share(shape.tokens, 1), options=options).total.backward()
        if shape.optimizer:
            clip(model, 1.0)
            optimizer.step()
        return shape.tokens

    return step


def transformers(shape: Shape) -> dict[str, Contestant]:
    """The same step in transformers, by experts implementation, in float32 and bfloat16 autocast."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConsiliumError(
            "bench: --against transformers needs the package: pip install 'consilium-moe[bench]'."
        ) from None
    ids_BS = _ids(shape)
    found: dict[str, Contestant] = {}
    fits = _gathered_bytes(shape) < MOST_GATHERED
    for experts in ("grouped_mm", "batched_mm") if fits else ("grouped_mm",):
        config = library.DeepseekV3Config(**to_hugging_face(shape.model, dtype="float32"))
        model = library.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation=experts
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for cast in (False, True):
            kind = "bf16 autocast" if cast else "fp32"
            stepped = optimizer if shape.optimizer else None
            found[f"transformers {library.__version__} {experts} {kind}"] = _theirs(
                model, stepped, ids_BS, cast=cast
            )
    return found


def _gathered_bytes(shape: Shape) -> int:
    """What batched_mm copies for one layer: weights of each chosen expert for each token, in float32."""
    moe = shape.model.moe
    return 0 if moe is None else 4 * shape.tokens * moe.most_active * 3 * moe.width * shape.model.hidden_size


def _theirs(
    model: Any, optimizer: torch.optim.Optimizer | None, ids_BS: torch.Tensor, *, cast: bool
) -> Contestant:
    targets_T = ids_BS.roll(-1, 1).flatten()

    def step() -> int:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            logits_BSV = model(ids_BS, use_cache=False).logits
        F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_T).backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return targets_T.numel()

    return step


def _ids(shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.model.vocab_size, (shape.batch, shape.length), generator=generator)


def take_turns(
    contestants: Mapping[str, Contestant], repeats: int, progress: Progress = _unheard
) -> dict[str, list[float]]:
    """Run all some times to warm up, then in turn; return tokens a second of each run by contestant.

    Who is far behind after the warm-up takes no turn: its first run, which may be minutes, is its figure.
    """
    warm = {name: _timed(run) for name, run in contestants.items()}
    limit = FAR_BEHIND * min(seconds for _, seconds in warm.values())
    near = [name for name, (_, seconds) in warm.items() if seconds < limit]
    speeds = {name: [] if name in near else [tokens / seconds] for name, (tokens, seconds) in warm.items()}
    for name in near * min(WARM_UP, repeats):
        contestants[name]()
    for turn in range(repeats):
        for i, name in enumerate(near):
            tokens, seconds = _timed(contestants[name])
            speeds[name].append(tokens / seconds)
            progress(turn * len(near) + i + 1, repeats * len(near))
    return speeds


def _timed(run: Contestant) -> tuple[int, float]:
    begun = time.perf_counter()
    tokens = run()
    return tokens, time.perf_counter() - begun


def figures(speeds: Mapping[str, Sequence[float]], unit: str) -> tuple[Figure, ...]:
    """One figure a contestant; the first is compared with the best of the others."""
    first, *rivals = speeds
    best = max(rivals, key=lambda name: statistics.median(speeds[name]), default=None)
    return tuple(
        several(name, unit, values, (best, speeds[best]) if name == first and best is not None else None)
        for name, values in speeds.items()
    )
