"""Pure functions of arrays: attention, log-probabilities, matrix products. They know no model, file or run."""
