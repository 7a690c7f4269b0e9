"""Opening, making, changing and publishing bundles."""
