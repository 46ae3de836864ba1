"""Read hidden states and the LM head of a causal language model, without its logits."""
