"""What is tried and not settled: the core does not know it."""
