"""Names to folders: ``catalog`` (models known by name), ``store`` (the local store), ``pull`` (from the Hub or a registry),
``locate`` (any MODEL to a folder), ``record`` (``tunesmith.json``: hashes, fingerprint of the base),
``headers`` (weights read without loading), ``convert`` and ``unpickle`` (old weight files), ``cut`` (fewer layers), ``show``.
"""
