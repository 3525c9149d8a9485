"""The commands that every figure of the documentation comes from."""
