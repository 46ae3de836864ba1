"""Speed and memory of the losses, against their floor, the dense formula and other libraries: ``kdkernels bench``, see docs/benchmarks.md.

- ``cases``: what is measured; ``suites``: the cases of a run; ``variants`` and ``peers``: the implementations.
- ``measure``: measurements in one process; ``processes``: starts such a process; ``visits``: collects a case's record.
- ``run``: runs the cases of a suite; ``table``, ``figures`` and ``page``: show the results.
"""
