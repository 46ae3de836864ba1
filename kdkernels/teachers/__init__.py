"""Teacher targets from a live model, a cache or a server."""
