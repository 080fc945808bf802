"""How the two terms are computed: who meets whom, the draw of negatives, and both gradients.

Time and memory grow with the number of tokens. Only the pairs and the drawn negatives are gathered, in chunks,
and the backward pass reads the given hidden states again instead of keeping anything of their size. The formulas
are those of `carma_lib.losses`. Shapes: B rows, T tokens, N = B · T tokens of the flattened batch, D width.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**22  # numbers that one gathered tensor may hold


def sample_negatives(constituent_ids: Tensor, attention_mask: Tensor, num_negatives: int, *,
                     document_ids: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The draw of `mutual_information_loss`: up to `num_negatives` tokens of each anchor's row or document.

    Anchors are the real tokens with a later token of their constituent. Their negatives are drawn from the
    eligible tokens, uniformly and without replacement (Floyd's algorithm over ranks, so that the time grows
    with the tokens that are drawn).

    Returns:
        (B, T, num_negatives) int64, positions in the row; −1 if there is none, and for tokens that are no anchors.
    """
    order = _Order.of(constituent_ids, attention_mask.bool(), document_ids)
    anchors = order.later.nonzero().flatten()
    drawn, missing = order.draw(anchors, num_negatives, generator)
    positions = torch.full((constituent_ids.numel(), num_negatives), -1, device=constituent_ids.device)
    positions[order.tokens[anchors], : drawn.size(1)] = (drawn % constituent_ids.size(1)).masked_fill(missing, -1)
    return positions.view(*constituent_ids.shape, num_negatives)


class _Order(NamedTuple):
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
    def of(cls, ids: Tensor, real: Tensor, documents: Tensor | None) -> _Order:
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
        """Negatives (anchors, at most number), and which of them are missing; `anchors` are places here."""
        start, end = (bounds[anchors] for bounds in self.sections)
        own_start, own_end = (bounds[anchors] for bounds in self.constituents)
        eligible = end - start - (own_end - own_start)
        number = min(number, len(self.tokens))
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


@dataclass
class _Batch:
    """All that the terms need beside the states; N = B · T tokens, flattened."""

    dtype: torch.dtype  # of the computation
    real: Tensor  # (B, T)
    squares: Tensor  # (L, N), squared length of each state, 0 at padding
    mi: range = range(0)  # indices of the layers of the first term
    stability: range = range(0)
    movement: Tensor | None = None  # squared distance of each two consecutive layers
    values: Tensor | None = None  # real tokens times width
    padded: bool = False
    temperature: float = 1.0
    similarity: str = "cosine"
    ids: Tensor | None = None
    documents: Tensor | None = None
    order: _Order | None = None
    num_pairs: int = 0
    anchors: Tensor | None = None  # (A,) places in the order
    drawn: tuple[Tensor, Tensor] | None = None  # negatives of each anchor, and which are missing
    columns: Tensor | None = None  # (B, M) if every eligible token is a negative: the anchors of each row

    def raised(self, state: Tensor) -> Tensor:
        """(N, D) in the type of the computation, padding at 0."""
        flat = state.reshape(-1, state.size(-1)).to(self.dtype)
        return flat.masked_fill(~self.real.view(-1, 1), 0) if self.padded else flat

    def scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """s_ij / τ = h_i · h_j × scale_i × scale_j, and how its gradient is drawn back to h_i itself."""
        if self.similarity == "dot":
            return torch.full_like(self.squares[0], self.temperature**-0.5), torch.zeros_like(self.squares[0])
        inverse = 1 / (self.squares[layer] + 1e-16)
        return (inverse / self.temperature).sqrt(), inverse

    def pairs(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Anchors (n, 1) and positives (n, 1) of all pairs, in chunks."""
        later = self.order.later[self.anchors]
        ends, step = later.cumsum(0), max(1, CHUNK // width)
        for first in range(0, self.num_pairs, step):
            numbers = torch.arange(first, min(first + step, self.num_pairs), device=ends.device)
            anchor = torch.searchsorted(ends, numbers, right=True)
            place = self.anchors[anchor]
            partner = place + 1 + numbers - (ends - later)[anchor]
            yield self.order.tokens[place].unsqueeze(1), self.order.tokens[partner].unsqueeze(1)

    def rivals(self, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Anchors (b, m), tokens (b, n), and which are no negatives (b, m, n), in chunks over anchors."""
        if self.drawn is not None:
            negatives, missing = self.drawn
            tokens = self.order.tokens[self.anchors].unsqueeze(1)
            step = max(1, CHUNK // (width * negatives.size(1)))
            for first in range(0, len(tokens), step):
                some = slice(first, first + step)
                yield tokens[some], negatives[some], missing[some].unsqueeze(1)
            return
        rows = torch.arange(self.real.numel(), device=self.real.device).view_as(self.real)
        for anchors in self.columns.split(max(1, CHUNK // self.real.numel()), 1):
            excluded = self.ids.gather(1, anchors).unsqueeze(2) == self.ids.unsqueeze(1)
            excluded |= ~self.real.unsqueeze(1)
            if self.documents is not None:
                excluded |= self.documents.gather(1, anchors).unsqueeze(2) != self.documents.unsqueeze(1)
            yield rows.gather(1, anchors), rows, excluded


class _Terms(torch.autograd.Function):
    """Both terms of a batch; keeps the given states alone and reads them again in the backward pass."""

    @staticmethod
    def forward(ctx, batch: _Batch, *states: Tensor) -> tuple[Tensor, Tensor]:
        ctx.batch, ctx.rivals = batch, []
        ctx.save_for_backward(*states)
        costs = steps = batch.squares.new_zeros(())
        with torch.autocast(batch.real.device.type, enabled=False):
            for layer in batch.mi if batch.num_pairs else ():
                cost, rivals = _layer_costs(batch, layer, batch.raised(states[layer]))
                costs = costs + cost
                ctx.rivals.append(rivals)
            if batch.stability:
                steps = (batch.movement / _sizes_of_steps(batch)).sum()
        return costs / (max(1, len(batch.mi)) * max(1, batch.num_pairs)), steps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_costs: Tensor, of_steps: Tensor):
        batch, states, gradients, near = ctx.batch, ctx.saved_tensors, [], {}
        of_costs = of_costs / (max(1, len(batch.mi)) * max(1, batch.num_pairs))
        with torch.autocast(batch.real.device.type, enabled=False):
            pulls = _stability_pulls(batch, of_steps)
            for layer, state in enumerate(states):
                near = {other: near[other] if other in near else batch.raised(states[other])
                        for other in (layer - 1, layer, layer + 1) if 0 <= other < len(states)}
                if not ctx.needs_input_grad[layer + 1]:
                    gradients.append(None)
                    continue
                gradient, own = torch.zeros_like(near[layer]), torch.zeros_like(batch.squares[layer])
                if layer in batch.mi and batch.num_pairs:
                    _add_pulls_of_pairs(batch, layer, near[layer], ctx.rivals[layer - batch.mi[0]], of_costs,
                                        gradient, own)
                for other, pull in pulls.get(layer, {}).items():
                    if other == layer:
                        own = own + pull
                    else:
                        gradient.addcmul_(near[other], pull)
                gradient.addcmul_(near[layer], own.unsqueeze(1))
                gradients.append(gradient.to(state.dtype).view(state.shape))
        return None, *gradients


def _scores(states: Tensor, scale: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
    """s / τ of each anchor (b, m) with each of its tokens (b, n), (b, m, n)."""
    return (states[anchors] @ states[others].transpose(1, 2)) * scale[anchors].unsqueeze(2) * scale[others].unsqueeze(1)


def _layer_costs(batch: _Batch, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a layer's costs over the pairs, and log Σ_n exp(s_in / τ) of each anchor, (N,)."""
    scale, _ = batch.scales(layer)
    # finfo.min, not −inf: an anchor without negatives then has a finite sum and a zero gradient.
    lowest = torch.finfo(states.dtype).min
    rivals = torch.full_like(scale, lowest)
    for anchors, others, excluded in batch.rivals(states.size(1)):
        scores = _scores(states, scale, anchors, others).masked_fill_(excluded, lowest)
        rivals[anchors] = scores.logsumexp(2)
    cost = scale.new_zeros(())
    for anchors, positives in batch.pairs(states.size(1)):
        cost = cost - F.logsigmoid(_scores(states, scale, anchors, positives)[:, 0] - rivals[anchors]).sum()
    return cost, rivals


def _add_pulls_of_pairs(batch, layer, states, rivals, of_costs, gradient, own) -> None:
    """Add the first term's gradient of one layer; `own` (N,) is the share along a state itself."""
    scale, inverse = batch.scales(layer)

    def add(anchors, others, scores, of_scores):
        weights = of_scores * scale[anchors].unsqueeze(2) * scale[others].unsqueeze(1)
        along = of_scores * scores
        for ends, far, weight, sums in ((anchors, others, weights, along.sum(2)),
                                        (others, anchors, weights.transpose(1, 2), along.sum(1))):
            gradient.index_add_(0, ends.flatten(), (weight @ states[far]).flatten(0, 1))
            own.index_add_(0, ends.flatten(), -(sums * inverse[ends]).flatten())

    of_rivals = torch.zeros_like(rivals)
    for anchors, positives in batch.pairs(states.size(1)):
        scores = _scores(states, scale, anchors, positives)
        pull = of_costs * torch.sigmoid(rivals[anchors].unsqueeze(2) - scores)
        of_rivals.index_add_(0, anchors.flatten(), pull.flatten())
        add(anchors, positives, scores, -pull)
    for anchors, others, excluded in batch.rivals(states.size(1)):
        scores = _scores(states, scale, anchors, others)
        shares = (scores - rivals[anchors].unsqueeze(2)).exp_().masked_fill_(excluded, 0)
        add(anchors, others, scores, shares * of_rivals[anchors].unsqueeze(2))


def _sizes_of_steps(batch: _Batch) -> Tensor:
    """The denominators of the stability term, times the number of values."""
    layers = batch.squares[batch.stability[0] : batch.stability[-1] + 1].sum(1)
    return layers[1:] + layers[:-1] + 1e-8 * batch.values


def _stability_pulls(batch: _Batch, of_steps: Tensor) -> dict[int, dict[int, Tensor]]:
    """Gradient of the stability term: by layer, the factors of its own states and of its neighbours'."""
    pulls: dict[int, dict[int, Tensor]] = {layer: {} for layer in batch.stability}
    if not batch.stability:
        return pulls
    inverse = 2 * of_steps / _sizes_of_steps(batch)
    own = inverse * (1 - batch.movement / _sizes_of_steps(batch))
    for step, (before, after) in enumerate(zip(batch.stability, batch.stability[1:])):
        for layer, other in ((before, after), (after, before)):
            pulls[layer][other] = -inverse[step]
            pulls[layer][layer] = pulls[layer].get(layer, 0) + own[step]
    return pulls


def carma_terms(states: list[Tensor], attention_mask: Tensor, ids: Tensor | None, documents: Tensor | None,
           mi: range | None, stability: range | None, sampling: tuple = (1.0, None, "cosine"),
           generator: torch.Generator | None = None, read: Sequence[Tensor] = ()) -> tuple:
    """Check everything, draw, and compute: the first term, the second, and the scalars to read."""
    _check_shapes(states, {"attention_mask": attention_mask, "constituent_ids": ids, "document_ids": documents})
    temperature, num_negatives, similarity = sampling
    batch = _measured(states, attention_mask.bool(), mi or range(0), stability or range(0))
    batch.temperature, batch.similarity, batch.ids, batch.documents = temperature, similarity, ids, documents
    facts = [batch.real.sum(), batch.squares.sum() / (temperature if similarity == "dot" else 1)]
    if mi:
        batch.order = _Order.of(ids, batch.real, documents)
        is_anchor = batch.order.later > 0
        by_row = torch.zeros_like(is_anchor).index_copy_(0, batch.order.tokens, is_anchor).view_as(ids)
        facts += [ids.min(), batch.order.later.sum(), is_anchor.sum(), by_row.sum(1).max()]
    # All that the host must know, in one transfer; a sum is finite only if all its parts are.
    exact = torch.float32 if ids is not None and ids.device.type == "mps" else torch.float64
    facts = torch.stack([fact.detach().to(exact) for fact in (*facts, *read)]).tolist()
    num_real, size, *facts = facts
    if not math.isfinite(size):
        raise ValueError("hidden_states hold NaN or infinity: lower the learning rate or check the input")
    batch.padded = num_real < batch.real.numel()
    if mi:
        lowest_id, batch.num_pairs, num_anchors, most_in_a_row = map(int, facts[:4])
        if lowest_id < -1:
            raise ValueError("constituent_ids must be −1 (no constituent) or not negative")
        batch.anchors = is_anchor.long().argsort(descending=True, stable=True)[:num_anchors]
        if num_negatives is None:
            batch.columns = by_row.long().argsort(descending=True, stable=True)[:, :most_in_a_row]
        else:
            batch.drawn = batch.order.draw(batch.anchors, num_negatives, generator)
    return *_Terms.apply(batch, *states), tuple(facts[4:] if mi else facts)


def _measured(states: list[Tensor], real: Tensor, mi: range, stability: range) -> _Batch:
    """The sizes of all states and, for the second term, how far they move; padding counts 0."""
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    squares, movement, before = [], [], None
    with torch.no_grad(), torch.autocast(real.device.type, enabled=False):
        for layer, state in enumerate(states):
            state = state.reshape(-1, state.size(-1)).to(dtype)
            squares.append(_squared_length(state).where(real.flatten(), 0))
            if layer in stability and layer - 1 in stability:
                movement.append(_squared_length(state - before).where(real.flatten(), 0).sum())
            before = state
        values = (real.sum() * states[0].size(-1)).clamp_min(1)
        return _Batch(dtype, real, torch.stack(squares), mi, stability, torch.stack(movement or [values]), values)


def _squared_length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def _check_shapes(states: list[Tensor], others: dict[str, Tensor | None]) -> None:
    if not states or any(not isinstance(state, Tensor) or state.dim() != 3 for state in states):
        raise ValueError("hidden_states must be layers × (batch, tokens, width), at least one layer")
    if any(state.shape != states[0].shape for state in states):
        raise ValueError(f"hidden_states differ in shape: {[tuple(state.shape) for state in states]}")
    if not states[0].is_floating_point():
        raise ValueError(f"hidden_states must be floating point, got {states[0].dtype}")
    if not states[0].numel():
        raise ValueError(f"hidden_states are empty: their shape is {tuple(states[0].shape)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != states[0].shape[:2]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, hidden_states have (batch, tokens) = "
                             f"{tuple(states[0].shape[:2])}")
        if tensor is not None and tensor.is_floating_point():
            raise ValueError(f"{name} must hold integers or booleans, got {tensor.dtype}")

