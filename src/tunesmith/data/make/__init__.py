"""Makers of data: rows with answers that are known to be true, made from the Python that runs."""
