"""What is described: models, routers and runs as frozen, strict data. Never imports torch."""
