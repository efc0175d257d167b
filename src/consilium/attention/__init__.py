"""Attention layers: grouped-query and multi-head latent, with what a pass tells all of them."""
