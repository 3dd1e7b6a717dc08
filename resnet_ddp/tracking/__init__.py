"""Trackers: Weights & Biases and TensorBoard, which mirror metrics.jsonl and timing.jsonl.

A run never talks to a tracker. It starts a process beside itself (`mirror`) that reads the run's
files (`rows`) and copies them (`process`, `weights_and_biases`, `tensorboard`). Whatever happens to
the network, the server or that process, training does not notice, and `push` copies later what is
missing: row k of the tracker is line k of metrics.jsonl, so that both know what the other has.
"""
