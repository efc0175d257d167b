"""One file a published system: its choices, sizes and published facts. Never imports torch."""
