"""The training loop: exact order, exact resume, nothing lost."""
