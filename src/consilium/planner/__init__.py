"""Arithmetic from a configuration: parameters, FLOPs and memory, exact and without torch."""

from __future__ import annotations

from consilium.planner.plan import plan as plan
