"""Generated data: ``python`` makes rows with true answers from Python's own library."""
