"""Losses, bits per byte and simple language models to compare with."""
