"""Evaluation: packed, sliding and test-time training, in one process or on a pool of actors."""
