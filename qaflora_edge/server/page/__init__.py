"""The page at `/` of `qaflora serve`."""
