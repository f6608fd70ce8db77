"""Joins several processes to one run, and lets them wait for each other, compare values and end together."""
