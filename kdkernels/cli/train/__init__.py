"""The command ``kdkernels train``: options, a plan, training that resumes after an interruption."""
