"""A model folder to a network in memory. In reading order:

- ``load``: full models and adapters, strictly
- ``head_loading``: a task head on a body that was saved without it
- ``checkpoint_weights``: the weights of a checkpoint in the model of its run
- ``probe``: compare a loaded model's logits with those recorded when it was saved
- ``merge_weights``: an adapter merged into its base
- ``vocabulary``: new tokens
- ``compute_dtype``: the number format that a model computes in
- ``mapped_files``: weights that leave memory once they are copied
- ``huge_pages``: weights where a processor reads them faster
- ``module_patterns``: modules named by a recipe
- ``quantization``, ``dequantized_linear``: a base model in 4 or 8 bits
"""
