"""Speed and memory of the losses, against their floor, the dense formula and other libraries: ``kdkernels bench``, see docs/benchmarks.md.

``cases`` says what is measured, ``variants`` and ``peers`` who computes it, ``measure`` how one case is measured, ``suites`` which cases
a run goes through, ``run`` goes through them; ``table``, ``figures`` and ``page`` show what came out.
"""
