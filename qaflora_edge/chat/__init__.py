"""Conversations: OpenAI's shapes, the base's template, and typed text that stays text."""
