"""The paper's method and its kin, imported when they are named."""
