"""Records of what lmmono offers, by name; imports nothing heavy."""
