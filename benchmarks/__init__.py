"""Measure what a round costs a leaf, ours and the official client's, in one run: ``make bench``."""
