"""Text that every Python already has, or that is generated."""
