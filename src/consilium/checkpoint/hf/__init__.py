"""Hugging Face's configurations and names, both ways."""
