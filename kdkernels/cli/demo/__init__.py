"""``kdkernels demo``: distils a small language model on real text, then measures the loss against a dense one.

settings.py says what is run, corpus.py brings the text, train.py the models, compare.py the measurements in fresh processes,
report.py and figures.py the output, run.py the order of it all.
"""
