"""Dialects: each reads a body into an Ask, and tells a Generation in its own shape."""
