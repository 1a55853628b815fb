"""Commands of conversion, of the demo and of training data: their options, and the functions that they run."""
