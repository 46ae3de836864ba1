"""Do students learn from their teachers? Small, complete experiments on a CPU: ``python -m benchmarks.learning --help``."""
