"""Reinforcement learning on answers that the policy samples: ``kl`` (estimators of the divergence from the
reference), ``advantages`` (rewards and advantages of each token), ``policy_loss`` (losses of each token).
"""
