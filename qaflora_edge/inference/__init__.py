"""From a request to its answer: scheduling, running, sampling, text."""
