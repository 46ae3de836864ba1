"""Speed and memory of the losses: ``python -m benchmarks.<name>`` from the root of the repository; see docs/benchmarks.md."""
