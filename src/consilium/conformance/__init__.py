"""Every router against its golden vectors."""
