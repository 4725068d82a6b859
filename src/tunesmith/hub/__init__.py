"""The only connection to the Hub, for models and data alike: ``ask`` (starts a process for each question),
``client`` (that process: files of a repository), ``splits`` (that process: splits of a data set),
``local_store`` (folders of files that are complete or absent).
"""
