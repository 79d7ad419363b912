"""How near vLLM comes to koff."""

# Log-probabilities in fp32, whose sums koff and vLLM add up in another order.
CLOSE = 1e-4
