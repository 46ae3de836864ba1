"""Black-box and emergent-ability distillation: in-context learning, chain of thought, instruction following."""
