"""Making, changing and publishing bundles."""
