"""Weights in and out in the Hugging Face layout, and training checkpoints that survive a crash."""
