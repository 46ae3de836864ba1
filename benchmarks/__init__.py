"""Committed benchmark results, the report that draws README.md and docs/ from them, and a suite that finds regressions.

The measurements themselves are in kdkernels/bench; see docs/benchmarks.md.
"""
