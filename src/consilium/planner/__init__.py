"""Arithmetic from a configuration: parameters, FLOPs and memory, exact and without torch."""
