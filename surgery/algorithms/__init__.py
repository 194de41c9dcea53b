"""Algorithms: pure functions on tensors, each with its formula, its source and what it promises. Nothing else."""
