"""Runs of several processes: how they find one another and agree."""
