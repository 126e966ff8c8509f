"""The best pruning schedule for a budget."""
