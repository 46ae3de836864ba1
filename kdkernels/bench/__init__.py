"""Speed and memory of the losses, against their floor, the dense formula and other libraries: ``kdkernels bench``, see docs/benchmarks.md.

``cases`` says what is measured, ``variants`` and ``peers`` who computes it, ``measure`` what one process measures of it,
``processes`` starts another, ``visits`` makes a case's record of what they tell; ``suites`` says which cases a run goes through, ``run``
goes through them, and ``table``, ``figures`` and ``page`` show what came out.
"""
