"""Committed results, the report that draws README.md and docs/ from them, and the suite that finds regressions.

kdkernels/bench measures; see docs/benchmarks.md."""
