"""What `qaflora bench` measures."""
