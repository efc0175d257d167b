"""One dial: a recipe scaled to a number of parameters."""

from __future__ import annotations

from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.planner.parameters import parameters
from consilium.recipes.scaling import scaled

TOLERANCE = 0.25


def scale_to(model: Model, wanted: int) -> Model:
    """Return ``model`` scaled so that its total is as near to ``wanted`` parameters as whole widths allow.

    Raises ConsiliumError when even the nearest is more than a quarter off, as with a vocabulary that alone is
    larger.
    """
    low, high = 0.02, 64.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _total(scaled(model, middle)) < wanted else (low, middle)
    best = min((scaled(model, low), scaled(model, high)), key=lambda m: abs(_total(m) - wanted))
    if abs(_total(best) - wanted) > TOLERANCE * wanted:
        raise ConsiliumError(
            f"--params {wanted:,}: {model.family} comes no nearer than {_total(best):,} parameters;"
            " choose another size or recipe."
        )
    return best


def _total(model: Model) -> int:
    counts = parameters(model)
    return counts.total + counts.mtp
