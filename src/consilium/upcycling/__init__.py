"""Sparse models out of trained ones: what each expert gets, how its gate begins, and how far off it is."""
