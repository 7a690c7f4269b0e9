"""Grammars and JSON schemas, checked and put into the words of llguidance."""
