"""What stays in the repository of the benchmarks: committed results, the report that draws README.md and docs/ from them, and the suite
that finds regressions. The measuring itself is kdkernels/bench; see docs/benchmarks.md."""
