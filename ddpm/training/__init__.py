"""Training: the loop, the moving averages, and what happens beside it."""
