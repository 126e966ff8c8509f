"""Pictures x rewards -> reward tensor."""
