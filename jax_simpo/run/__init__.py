"""A run's folder: which files it holds, who may write them, and how they are read again."""
