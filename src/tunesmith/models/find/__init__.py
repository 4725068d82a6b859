"""A model's name to its folder, without a network in memory. In reading order:

- ``locate``: the folder that MODEL means, checked before a weight is read
- ``catalog``, ``model_store``, ``pull``: models known by name, where they are kept, how they are downloaded
- ``headers``: safetensors headers and JSON files
- ``config_bounds``: a config whose numbers the weights do not have is refused
- ``record``: ``tunesmith.json``, saved next to weights: hashes, and an adapter's base model
- ``saved_files``: files of a saved model, compared with their hashes
- ``folder_summary``: facts about a model folder, for ``tunesmith show``
- ``convert``, ``unpickle``: pickled weights to safetensors
- ``layer_pruning``: a model made of some layers of another
"""
