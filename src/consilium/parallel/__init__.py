"""The only user of torch.distributed: groups of processes, exchanges of rows, sharded parameters."""
