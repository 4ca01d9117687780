"""How far to trust a posterior: bounds, k-hat, collapse, cost."""
