"""Strategies of other work to compare with: a module for each, imported when it is named."""
