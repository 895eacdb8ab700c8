"""Runs: training with its hooks and signals, prediction, test-time augmentation.

May import every room but ``cli``.
"""
