"""Caches: rows of keys and values, or of latents, kept for sequences that go on."""
