"""Where teacher targets come from: a live model, a cache, a server."""
