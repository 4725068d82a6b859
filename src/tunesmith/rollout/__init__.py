"""Reinforcement learning on answers that the policy samples.

``rollouts`` is the source of a run's steps: it samples (``sampled_answers``), scores, measures
(``answer_batch``) and yields mini-batches. ``held_out`` evaluates. ``group_advantages`` compares the answers to
one prompt; ``kl`` (estimators of the divergence from the reference), ``advantages`` (rewards and advantages of
each token) and ``policy_loss`` (losses of each token) are functions of tensors. ``session_protocol`` is what
all of this may use of a run.
"""
