"""The terms as they were computed before, kept for comparison: every token of a row scored against every other."""
import torch
import torch.nn.functional as F
from torch import Tensor

from carma_lib.losses import CarmaConfig, CarmaTerms


class DenseLoss:
    """`CarmaLoss` in time and memory that grow with the square of the length."""

    def __init__(self, config: CarmaConfig) -> None:
        self.config = config

    def __call__(self, hidden_states, constituent_ids: Tensor, attention_mask: Tensor, *, document_ids=None,
                 generator=None, read=()) -> CarmaTerms:
        config = self.config.for_depth(len(hidden_states) - 1)
        real = attention_mask.bool()
        states = torch.stack([hidden_states[layer + 1] for layer in config.layers]).float()
        states = states.masked_fill(~real.unsqueeze(-1), 0)
        squares = states.square().sum(-1)
        ids = constituent_ids.masked_fill(~real, -1)
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        positives = (same & (ids >= 0).unsqueeze(2)).triu(1)
        eligible = ~same & real.unsqueeze(1)
        keys = torch.where(eligible, torch.rand(eligible.shape, generator=generator), -1)
        drawn = keys.topk(min(config.num_negatives, keys.size(-1)), sorted=False).indices
        negatives = torch.zeros_like(eligible).scatter_(-1, drawn, True) & eligible
        with torch.autocast(states.device.type, enabled=False):
            scaled = states * (squares * config.temperature + 1e-16).rsqrt().unsqueeze(-1)
            scores = scaled @ scaled.transpose(-1, -2)
            rivals = torch.where(negatives, scores, torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
            costs = F.softplus(rivals - scores) * positives
            mutual_information = costs.sum() / (len(states) * positives.sum().clamp_min(1))
            size = squares.sum((1, 2)).unfold(0, 2, 1).sum(-1)
            stability = (states.diff(dim=0).square().sum((1, 2, 3)) / (size + 1e-8)).sum()
        total = config.mi_weight * mutual_information + config.stability_weight * stability
        return CarmaTerms(total, mutual_information, stability, tuple(torch.stack([s.double() for s in read]).tolist()))
