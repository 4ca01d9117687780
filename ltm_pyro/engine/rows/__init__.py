"""Where a persistent fit keeps its rows: local parameters and their moments, by sequence id."""
