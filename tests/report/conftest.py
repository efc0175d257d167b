"""Makes the run folders of run_folders available to every test of the report."""

from __future__ import annotations

from run_folders import make_run

__all__ = ["make_run"]
