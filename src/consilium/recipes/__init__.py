"""One file a published system: its choices, sizes and published facts. Never imports torch."""

from __future__ import annotations

from consilium.recipes.catalogue import recipe as recipe
from consilium.recipes.catalogue import systems as systems
