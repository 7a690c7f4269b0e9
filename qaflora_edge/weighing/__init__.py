"""How adapters are weighed for a query: strategies, the probe, the numbers."""
