"""Makes the run folders of the report's tests available here."""

from __future__ import annotations

from report.run_folders import make_run

__all__ = ["make_run"]
