"""Processors, memory and its limits, the allocator."""
