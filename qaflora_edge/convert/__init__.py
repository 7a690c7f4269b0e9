"""From an adapter folder to an adapter GGUF, exactly, and back again to prove it."""
