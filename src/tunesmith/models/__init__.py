"""Find, load, adapt and run networks. In reading order:

- ``network``: facts about a network, a layer or a config
- ``find``: a model's name to its folder
- ``load``: a folder to a network
- ``heads``: logits and log-probabilities
- ``adapters``: what peft adds to a network
- ``fast``: packed attention and fused layers
- ``generate``: answers
- ``forward_groups``: forward passes without gradients in groups that fit into memory
"""
