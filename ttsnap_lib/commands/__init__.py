"""One module for each command of the command line; heavy imports stay inside the functions they serve."""
