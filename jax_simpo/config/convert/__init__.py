"""Converts the config files of other trainers to ours; one table of keys for each trainer.

Every key of a file has one fate: it becomes a key of ours, it is not needed here, or it cannot be kept. A key that
would change what is trained is never dropped in silence.
"""
