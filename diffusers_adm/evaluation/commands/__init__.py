"""Commands of sampling and evaluation: their options, and the functions that they run."""
