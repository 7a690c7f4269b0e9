"""Damaged files for every reader: `make fuzz MINUTES=5`, and a short run in test_fuzz.py."""
