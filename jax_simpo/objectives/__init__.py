"""Preference objectives: pure functions from the log-probs of responses to losses and metrics."""
