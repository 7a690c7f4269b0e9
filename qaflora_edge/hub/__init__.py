"""Things known by name: the registry, the Hugging Face Hub, and what was pulled from them."""
