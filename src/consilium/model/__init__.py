"""Blocks, the decoder and multi-token prediction, and the one place that builds them from a configuration."""
