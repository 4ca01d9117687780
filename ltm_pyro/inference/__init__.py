"""Variational Bayes with two clocks: guides, objectives, schedules, the fast and slow loops."""
