"""``kdkernels demo``: distils a small language model on real text, then measures the loss against a dense one.

- settings.py: all settings; corpus.py: the text; train.py: models and training; compare.py: measurements in fresh processes.
- report.py and figures.py: output; run.py: runs everything in order.
"""
