"""Sends the records of a run to trackers: TensorBoard, Weights & Biases, trackio, MLflow.

`metrics.jsonl` is the truth, and a tracker is a copy that may fail without harm to the run. `trackers` holds all of a
run, `follower` one of them and what it has been sent, and there is a module for each library.
"""
