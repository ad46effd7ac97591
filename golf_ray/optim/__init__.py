"""Optimizers, schedules, clipping, the moving average, and their communication."""
