"""Quantisation: Hessians, GPTQ, the public artifact container, and what an artifact weighs."""
