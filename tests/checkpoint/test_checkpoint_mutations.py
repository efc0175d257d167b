"""Every broken folder gives one clear error or the very model; kinds and counting are in ``mutations``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.mutations import KINDS, Templates, make_templates, mutate

SOMETIMES_HARMLESS = frozenset(
    {
        "flip_anywhere",
        "flip_in_header",
        "rename_tensor",
        "own_key",
        "other_size",
        "drop_size",
        "manifest_entry",
        "any_config",
        "any_generation",
        "any_tokenizer",
        "any_tokenizer_config",
        "any_index",
        "any_yaml",
    }
)
"""They may meet a space, a title, an entry that is not read, a taken name, a default, or what was there."""


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return make_templates(tmp_path_factory.mktemp("templates"))


def test_broken_folders_are_refused_in_one_sentence(templates: Templates, tmp_path: Path) -> None:
    counts = mutate(templates, tmp_path, 6 * len(KINDS))
    assert not counts.failures
    assert set(counts.harmless) <= SOMETIMES_HARMLESS
    assert set(counts.refused) == set(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_broken_folders_are_refused_in_one_sentence(
    templates: Templates, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = mutate(templates, tmp_path, 2000)
    record_property("trials", counts.trials)
    record_property("failures", len(counts.failures))
    record_property("refused", dict(sorted(counts.refused.items())))
    record_property("harmless", dict(sorted(counts.harmless.items())))
    record_property("slowest_seconds", round(counts.slowest, 3))
    assert not counts.failures
    assert set(counts.harmless) <= SOMETIMES_HARMLESS
