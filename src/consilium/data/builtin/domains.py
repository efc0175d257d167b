"""The built-in text: five labelled domains read from the running Python, or generated; nothing is shipped."""

from __future__ import annotations

import importlib
from types import ModuleType

from consilium.data.builtin.arithmetic import mathematics_texts
from consilium.data.builtin.bilingual import bilingual_texts
from consilium.data.builtin.code import code_texts, question_texts, read_modules, standard_library
from consilium.data.documents import Text
from consilium.errors import ConsiliumError

DOMAINS = ("code", "prose", "qa", "mathematics", "bilingual")


def builtin_texts() -> list[Text]:
    """Return the five domains.

    Code and the docstrings of one module share a side; prose is split by topic, generated text by shard.
    Raises ConsiliumError where this Python has no sources to read.
    """
    modules = read_modules(standard_library())
    texts = [*code_texts(modules), *question_texts(modules), *prose_texts()]
    found = [*texts, *mathematics_texts(), *bilingual_texts()]
    return sorted(found, key=lambda text: (text.domain, text.name))


def available_domains() -> tuple[str, ...]:
    """Return the domains. Raises ConsiliumError where this Python has no sources to read; quick."""
    read_modules(standard_library(), limit=1)
    _topics_module()
    return DOMAINS


def prose_texts() -> list[Text]:
    """Return the language reference as ``help()`` shows it, a text a topic."""
    topics = _topics_module().topics
    return [
        Text(text, "prose", topic, f"topic {topic}") for topic, text in sorted(topics.items()) if text.strip()
    ]


def _topics_module() -> ModuleType:
    try:
        return importlib.import_module("pydoc_data.topics")
    except ImportError:
        raise ConsiliumError(
            "the built-in text needs the help topics of Python (pydoc_data) and this Python has none;"
            " use a full Python or give your own text with --data PATH."
        ) from None
