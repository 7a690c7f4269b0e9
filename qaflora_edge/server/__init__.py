"""The server: bundles for programs and browsers that speak OpenAI's API."""
