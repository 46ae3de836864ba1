"""The thin trainer: distil one causal language model into another with transformers."""
