"""Images with every estimate, on disk: made, written, read and verified."""
