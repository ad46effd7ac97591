"""Sweeps: spaces, staged trials, their search with Ray Tune and Optuna, and the table."""

DEFAULT_STORAGE = "golf-sweeps"
"""Where sweeps go if nobody says where: a folder below the current one."""
