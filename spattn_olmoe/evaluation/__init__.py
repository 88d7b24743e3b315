"""Evaluation: checkpoints under lm-eval, the paper's tables, paired comparisons and held-out loss.

Importing :mod:`spattn_olmoe.evaluation.model` makes lm-eval know the model ``spattn_olmoe``.
"""
