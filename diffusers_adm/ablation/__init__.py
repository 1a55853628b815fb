"""Ablations: comparisons of training runs that differ in a few options and have equal budgets, as in the paper's Tables 1 to 3."""
