"""The command ``kdkernels train``: options, a plan, a run that goes on where it was interrupted."""
