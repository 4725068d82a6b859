"""Names to folders: ``catalog`` (models known by name), ``store`` (the local store), ``locate`` (any MODEL to a folder),
``headers`` (weights read without loading), ``convert`` and ``unpickle`` (old weight files), ``cut`` (fewer layers), ``show``.
"""
