"""Text made safe for a screen or a page, and pictures of weights."""
