"""What the verbs do. Imported when a verb runs, because most of it needs torch."""
