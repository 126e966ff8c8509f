"""Builds the parts of the documentation that come from the code: parameters, commands, the API and the estimates."""
