"""Generation: requests, sampling, and batches of sequences decoded against a cache."""
