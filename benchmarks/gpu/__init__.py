"""What a GPU can answer in a quarter of an hour, in stages; `python -m benchmarks.gpu --help`."""
