"""Errors, files, the terminal and device memory: used by every other folder."""
