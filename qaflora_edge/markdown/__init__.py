"""Markdown as models write it: what of it is markup, its blocks, and as data for a page."""
