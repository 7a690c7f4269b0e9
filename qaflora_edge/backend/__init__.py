"""The patched llama.cpp: finding it, and what it holds as things that are closed."""
