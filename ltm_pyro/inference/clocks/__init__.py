"""The two clocks: local parameters move fast, weights move slowly."""
