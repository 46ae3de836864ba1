"""What a causal language model makes of its tokens, without its logits: hidden states, and the head that would follow them."""
