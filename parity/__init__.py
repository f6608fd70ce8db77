"""Runs both implementations on the same pairs from the same weights and compares them number by number."""
