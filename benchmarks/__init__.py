"""What lbgym promises in numbers, and the commands that measure it: ``python -m benchmarks.NAME``."""
