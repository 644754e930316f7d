"""How weights are stored narrow: round-to-nearest, GPTQ, AWQ, NF4."""
