"""Grammars that answers follow: GBNF, and JSON schemas turned into it."""
