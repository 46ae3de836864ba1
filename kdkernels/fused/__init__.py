"""The chunked loss: argument checks, custom ops, the loop over chunks, matrix products."""
