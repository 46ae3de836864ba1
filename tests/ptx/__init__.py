"""Runs the PTX that Triton compiles on a CPU.

``program`` parses it, ``opcodes`` says what each instruction computes, ``memory`` checks every access, ``machine`` schedules warps, and
``driver`` stands in for Triton's own, so that a launch of the package's host code runs the compiled kernel on CPU tensors.
"""
