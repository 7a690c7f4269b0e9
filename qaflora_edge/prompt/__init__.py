"""Conversations: the base's template, turns, and typed text that stays text."""
