"""Timings against named peers, as ratios in one run. Never part of the tests."""
