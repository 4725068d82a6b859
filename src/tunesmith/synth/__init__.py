"""Data that tunesmith makes: python (rows with true answers from Python's own library)."""
