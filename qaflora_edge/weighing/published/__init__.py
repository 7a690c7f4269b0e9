"""The paper's method and its kin: a module for each, imported when it is named."""
