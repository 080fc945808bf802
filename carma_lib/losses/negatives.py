"""The draw of negatives: tokens in an order in which rows, documents and constituents are stretches."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_negatives(constituent_ids: Tensor, attention_mask: Tensor, num_negatives: int, *,
                     document_ids: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The draw of `mutual_information_loss`: up to `num_negatives` tokens of each anchor's row or document.

    Anchors are the real tokens with a later token of their constituent. Their negatives are drawn from the
    eligible tokens, uniformly and without replacement (Floyd's algorithm over ranks, so that the time grows
    with the tokens that are drawn).

    Returns:
        (B, T, num_negatives) int64, positions in the row; −1 if there is none, and for tokens that are no anchors.
    """
    order = Order.of(constituent_ids, attention_mask.bool(), document_ids)
    anchors = order.later.nonzero().flatten()
    drawn, missing = order.draw(anchors, num_negatives, generator)
    positions = torch.full((constituent_ids.numel(), num_negatives), -1, device=constituent_ids.device)
    positions[order.tokens[anchors]] = (drawn % constituent_ids.size(1)).masked_fill(missing, -1)
    return positions.view(*constituent_ids.shape, num_negatives)


class Order(NamedTuple):
    """The N = B · T tokens sorted by row (padding last), document, constituent and position.

    A section (row or document) is then one stretch, and within it each constituent is one, whether or not its
    tokens are neighbours in the text. `tokens` are positions in the flattened batch; all else is by place in
    this order: where the token's section and constituent begin and end, and how many partners come later.
    """

    tokens: Tensor
    sections: tuple[Tensor, Tensor]
    constituents: tuple[Tensor, Tensor]
    later: Tensor

    @classmethod
    def of(cls, ids: Tensor, real: Tensor, documents: Tensor | None) -> Order:
        ids, tokens = ids.flatten(), torch.arange(ids.numel(), device=ids.device)
        row = torch.where(real.flatten(), tokens // real.size(1), len(real))
        section = [row] if documents is None else [row, documents.flatten()]
        for key in (ids, *reversed(section)):
            tokens = tokens[key[tokens].argsort(stable=True)]
        constituents = _stretches([*section, ids], tokens)
        has_partners = (ids[tokens] >= 0) & (row[tokens] < len(real))
        later = (constituents[1] - 1 - torch.arange(len(ids), device=ids.device)) * has_partners
        return cls(tokens, _stretches(section, tokens), constituents, later)

    def draw(self, anchors: Tensor, number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Negatives (anchors, number), and which of them are missing; `anchors` are places in this order."""
        start, end = (bounds[anchors] for bounds in self.sections)
        own_start, own_end = (bounds[anchors] for bounds in self.constituents)
        eligible = end - start - (own_end - own_start)
        random = torch.randint(2**62, (len(anchors), number), generator=generator, device=anchors.device)
        ranks = torch.full_like(random, -1)
        for column in range(number):  # Floyd: the last column may take any rank, each before one rank less
            highest = eligible - number + column
            rank = random[:, column] % (highest + 1).clamp_min(1)
            taken = (ranks[:, :column] == rank.unsqueeze(1)).any(1)
            ranks[:, column] = torch.where(taken, highest, rank).where(highest >= 0, -1)
        places = start.unsqueeze(1) + ranks
        places = places + (own_end - own_start).unsqueeze(1) * (places >= own_start.unsqueeze(1))
        return self.tokens[places.clamp(0, len(self.tokens) - 1)], ranks < 0


def _stretches(keys: list[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each place in the order `tokens`, the first place and the end of the stretch of equal keys around it."""
    changed = torch.stack([key[tokens][1:] != key[tokens][:-1] for key in keys]).any(0)
    stretch = F.pad(changed.long().cumsum(0), (1, 0))
    sizes = torch.zeros_like(tokens).scatter_add_(0, stretch, torch.ones_like(tokens))
    ends = sizes.cumsum(0)[stretch]
    return ends - sizes[stretch], ends
