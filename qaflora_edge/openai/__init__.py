"""OpenAI's shapes: options and messages in, answers and chunks out."""
