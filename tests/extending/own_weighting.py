"""A token weighting of one's own: the first tokens of each response alone."""

import torch

from megatron_opd.prune.token_weighting import TokenWeighting


class FirstTokens(TokenWeighting):
    """The first `count` tokens of each response; the loss is their mean."""

    mean_over_kept = True

    def __init__(self, count: int = 100) -> None:
        if count < 1:
            raise ValueError(f"count: {count} must be at least 1")
        self.count = count

    def weigh(self, rollouts, scores):
        return [(torch.arange(len(r)) < self.count).float() for r in rollouts]
