"""Compressed model to something that runs: TVM, schedules of our own, measurement in child processes."""
