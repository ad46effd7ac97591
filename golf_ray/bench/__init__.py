"""Benchmarks: what a machine does in a second, as ratios taken in one run.

Not tests: nothing here passes or fails. Every report names GPU, torch and shapes, and carries fixed
yardsticks (a matrix product, a copy, an attention shape), so that hosts can be told apart.
"""
