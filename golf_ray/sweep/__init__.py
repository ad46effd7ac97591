"""Sweeps: spaces, staged trials, their search with Ray Tune and Optuna, and the table."""
