"""Weights that are fitted to labelled examples."""
