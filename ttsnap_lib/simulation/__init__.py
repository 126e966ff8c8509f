"""What a method gives at a budget, on recorded rewards. Loads no torch."""
