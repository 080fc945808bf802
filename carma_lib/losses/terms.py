"""How the two terms are computed: who meets whom, the draw of negatives, and both gradients.

Memory grows with the number of tokens, time with that of tokens and pairs: a word of n tokens has n (n − 1) / 2. Only the pairs and the drawn negatives are gathered, in chunks,
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

from carma_lib.losses.negatives import Order

CHUNK = 2**19  # numbers that one gathered tensor may hold: it stays in a processor's cache
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # types of ids and masks
EDGES = 2**18  # pairs of tokens that are weighed at a time


class _Meetings(NamedTuple):
    """Anchors (b, m) that meet tokens (b, n), as positions in the flattened batch.

    Either m is 1, or each anchor is named once and `others` are all tokens of the batch. For m = 1, `by_end` sorts
    the meetings, each seen from both its ends, by the token at this end; `bags` says where each token's begin.
    """

    anchors: Tensor
    others: Tensor
    excluded: Tensor | None = None  # (b, m, n), True where two do not meet
    by_end: Tensor | None = None
    bags: Tensor | None = None

    @classmethod
    def of_single(cls, anchors: Tensor, others: Tensor, num_tokens: int, excluded: Tensor | None = None) -> _Meetings:
        ends, by_end = torch.cat([anchors.expand_as(others).flatten(), others.flatten()]).sort(stable=True)
        bags = torch.searchsorted(ends, torch.arange(num_tokens, device=ends.device))
        return cls(anchors, others, excluded, by_end, bags)

    def scores(self, states: Tensor, scale: Tensor) -> Tensor:
        """s / τ, (b, m, n)."""
        step = len(self.anchors)
        if self.bags is not None:
            step = max(1, CHUNK // (states.size(1) * self.others.size(1)))
        products = torch.cat([_rows(states, anchors) @ _rows(states, others).transpose(1, 2)
                              for anchors, others in zip(self.anchors.split(step), self.others.split(step))])
        scores = products * scale[self.anchors].unsqueeze(2) * scale[self.others].unsqueeze(1)
        if self.excluded is None:
            return scores
        # finfo.min, not −inf: an anchor without negatives then has a finite sum and a zero gradient.
        return scores.masked_fill_(self.excluded, torch.finfo(scores.dtype).min)

    def add_pulls(self, states: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """Add to each token's `gradient` (N, D) the states of those that it meets, by `weights` (b, m, n)."""
        if self.bags is not None:
            far = torch.cat([self.others.flatten(), self.anchors.expand_as(self.others).flatten()])[self.by_end]
            gradient += F.embedding_bag(far, states, self.bags, mode="sum",
                                        per_sample_weights=weights.flatten().repeat(2)[self.by_end])
            return
        of_rows, states_of_rows = (tensor.view(*self.others.shape, -1) for tensor in (gradient, states))
        pulls, anchors = (weights @ states_of_rows).flatten(0, 1), self.anchors.flatten()
        of_rows.baddbmm_(weights.transpose(1, 2), _rows(states, self.anchors))
        gradient.index_copy_(0, anchors, gradient.index_select(0, anchors) + pulls)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    return states.index_select(0, places.flatten()).view(*places.shape, -1)


@dataclass
class _Batch:
    """All that the terms need beside the states; N = B · T tokens, flattened."""

    real: Tensor  # (B, T)
    squares: Tensor  # (L, N), squared length of each state, 0 at padding, in the type of the computation
    movement: Tensor  # squared distance of each two consecutive layers of the second term
    width: int
    mi: range  # indices of the layers of the first term
    stability: range
    padded: bool = False
    scale: Tensor | None = None  # (L, N): s_ij / τ = h_i · h_j × scale_i × scale_j
    inverse: Tensor | None = None  # (L, N): how the gradient of a score is drawn back to the state itself
    ids: Tensor | None = None
    documents: Tensor | None = None
    order: Order | None = None
    num_pairs: int = 0
    anchors: Tensor | None = None  # (A,) places in the order
    drawn: tuple[Tensor, Tensor] | None = None  # negatives of each anchor, and which are missing
    columns: Tensor | None = None  # (B, M) if every eligible token is a negative: the anchors of each row
    few: tuple[list[_Meetings], list[_Meetings]] | None = None  # rivals and pairs, if they are few

    def raised(self, state: Tensor) -> Tensor:
        """(N, D) in the type of the computation, padding at 0."""
        flat = state.reshape(-1, state.size(-1)).to(self.squares.dtype)
        return flat.masked_fill(~self.real.view(-1, 1), 0) if self.padded else flat

    def pairs(self) -> Iterator[_Meetings]:
        """Each pair, its anchor first, in chunks."""
        later = self.order.later[self.anchors]
        ends = later.cumsum(0)
        for first in range(0, self.num_pairs, EDGES):
            numbers = torch.arange(first, min(first + EDGES, self.num_pairs), device=ends.device)
            anchor = torch.searchsorted(ends, numbers, right=True)
            place = self.anchors[anchor]
            partner = place + 1 + numbers - (ends - later)[anchor]
            tokens = self.order.tokens
            yield _Meetings.of_single(tokens[place].unsqueeze(1), tokens[partner].unsqueeze(1), len(tokens))

    def rivals(self) -> Iterator[_Meetings]:
        """Each anchor and its negatives, in chunks."""
        if self.drawn is not None:
            chunks = (self.order.tokens[self.anchors].unsqueeze(1), self.drawn[0], self.drawn[1].unsqueeze(1))
            step = max(1, EDGES // self.drawn[0].size(1))
            for anchors, negatives, missing in zip(*(chunk.split(step) for chunk in chunks)):
                yield _Meetings.of_single(anchors, negatives, self.real.numel(), missing)
            return
        rows = torch.arange(self.real.numel(), device=self.real.device).view_as(self.real)
        for anchors in self.columns.split(max(1, CHUNK // self.real.numel()), 1):
            excluded = self.ids.gather(1, anchors).unsqueeze(2) == self.ids.unsqueeze(1)
            excluded |= ~self.real.unsqueeze(1)
            if self.documents is not None:
                excluded |= self.documents.gather(1, anchors).unsqueeze(2) != self.documents.unsqueeze(1)
            yield _Meetings(rows.gather(1, anchors), rows, excluded)

    @property
    def sizes_of_steps(self) -> Tensor:
        """The denominators of the second term, times the number of values."""
        layers = self.squares[self.stability[0] : self.stability[-1] + 1].sum(1)
        return layers[1:] + layers[:-1] + 1e-8 * self.width * self.real.sum().clamp_min(1)


class _Terms(torch.autograd.Function):
    """Both terms of a batch; keeps the given states alone and reads them again in the backward pass."""

    @staticmethod
    def forward(ctx, batch: _Batch, *states: Tensor) -> tuple[Tensor, Tensor]:
        ctx.batch, ctx.kept = batch, {}
        ctx.save_for_backward(*states)
        costs = steps = batch.squares.new_zeros(())
        with torch.autocast(batch.real.device.type, enabled=False):
            for layer in batch.mi if batch.num_pairs else ():
                cost, ctx.kept[layer] = _layer_costs(batch, layer, batch.raised(states[layer]))
                costs = costs + cost
            if batch.stability:
                steps = (batch.movement / batch.sizes_of_steps).sum()
        return costs / (max(1, len(batch.mi)) * max(1, batch.num_pairs)), steps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_costs: Tensor, of_steps: Tensor):
        batch, states, gradients, near = ctx.batch, ctx.saved_tensors, [], {}
        of_costs = of_costs / (max(1, len(batch.mi)) * max(1, batch.num_pairs))
        with torch.autocast(batch.real.device.type, enabled=False):
            if batch.stability:
                between = 2 * of_steps / batch.sizes_of_steps
                alone = between * (1 - batch.movement / batch.sizes_of_steps)
                alone, between = F.pad(alone, (1, 0)) + F.pad(alone, (0, 1)), -between
            for layer, state in enumerate(states):
                near = {other: near[other] if other in near else batch.raised(states[other])
                        for other in (layer - 1, layer, layer + 1) if 0 <= other < len(states)}
                if not ctx.needs_input_grad[layer + 1]:
                    gradients.append(None)
                    continue
                gradient, own = torch.zeros_like(near[layer]), torch.zeros_like(batch.squares[0])
                if layer in ctx.kept:
                    _add_pulls(batch, layer, near[layer], ctx.kept[layer], of_costs, gradient, own)
                if layer in batch.stability:
                    step = layer - batch.stability[0]
                    own += alone[step]
                    if layer - 1 in batch.stability:
                        gradient.addcmul_(near[layer - 1], between[step - 1])
                    if layer + 1 in batch.stability:
                        gradient.addcmul_(near[layer + 1], between[step])
                gradient.addcmul_(near[layer], own.unsqueeze(1))
                gradients.append(gradient.to(state.dtype).view(state.shape))
        return None, *gradients


def _layer_costs(batch: _Batch, layer: int, states: Tensor) -> tuple[Tensor, tuple]:
    """The sum of a layer's costs over the pairs; log Σ_n exp(s_in / τ) of each anchor, and the scores if few."""
    scale, few = batch.scale[layer], batch.few
    sums, cost, kept = torch.full_like(scale, torch.finfo(scale.dtype).min), scale.new_zeros(()), []
    for rivals in few[0] if few else batch.rivals():
        scores = rivals.scores(states, scale)
        sums[rivals.anchors] = scores.logsumexp(2)
        kept += [scores] if few else []
    for pairs in few[1] if few else batch.pairs():
        scores = pairs.scores(states, scale)
        cost = cost - F.logsigmoid(scores[:, 0] - sums[pairs.anchors]).sum()
        kept += [scores] if few else []
    return cost, (sums, *kept)


def _add_pulls(batch: _Batch, layer: int, states: Tensor, kept: tuple, of_costs: Tensor, gradient: Tensor,
               own: Tensor) -> None:
    """Add the first term's gradient of one layer; `own` (N,) is the factor of each state itself."""
    scale, inverse, few = batch.scale[layer], batch.inverse[layer], batch.few
    sums, of_sums = kept[0], torch.zeros_like(own)

    def add(met: _Meetings, scores: Tensor, of_scores: Tensor) -> None:
        met.add_pulls(states, of_scores * scale[met.anchors].unsqueeze(2) * scale[met.others].unsqueeze(1), gradient)
        along = of_scores * scores
        for places, total in ((met.anchors, along.sum(2)), (met.others, along.sum(1))):
            own.index_add_(0, places.flatten(), -(total * inverse[places]).flatten())

    for pairs in few[1] if few else batch.pairs():
        scores = kept[2] if few else pairs.scores(states, scale)
        pull = of_costs * torch.sigmoid(sums[pairs.anchors].unsqueeze(2) - scores)
        of_sums.index_add_(0, pairs.anchors.flatten(), pull.flatten())
        add(pairs, scores, -pull)
    for rivals in few[0] if few else batch.rivals():
        scores = kept[1] if few else rivals.scores(states, scale)
        shares = (scores - sums[rivals.anchors].unsqueeze(2)).exp_()
        add(rivals, scores, shares * of_sums[rivals.anchors].unsqueeze(2))


def carma_terms(states: list[Tensor], attention_mask: Tensor, ids: Tensor | None, documents: Tensor | None,
                mi: range | None, stability: range | None, sampling: tuple = (1.0, None, "cosine"),
                generator: torch.Generator | None = None, read: Sequence[Tensor] = ()) -> tuple:
    """Check everything, draw, and compute: the first term, the second, and the scalars to read."""
    _check_shapes(states, {"attention_mask": attention_mask, "constituent_ids": ids, "document_ids": documents},
                  optional=("document_ids",) if mi else ("document_ids", "constituent_ids"))
    temperature, num_negatives, similarity = sampling
    batch = _measured(states, attention_mask.bool(), mi or range(0), stability or range(0))
    facts = [batch.real.sum(), batch.squares.sum() / (temperature if similarity == "dot" else 1)]
    if mi:
        batch.ids, batch.documents = ids, documents
        batch.order = Order.of(ids, batch.real, documents)
        is_anchor = batch.order.later > 0
        by_row = torch.zeros_like(is_anchor).index_copy_(0, batch.order.tokens, is_anchor).view_as(ids)
        facts += [ids.min(), batch.order.later.sum(), is_anchor.sum(), by_row.sum(1).max()]
    num_real, size, *facts = _on_host([*facts, *read])  # a sum is finite only if all its parts are
    if not math.isfinite(size):
        raise ValueError("hidden_states hold NaN or infinity: lower the learning rate or check the input")
    batch.padded = num_real < batch.real.numel()
    if mi:
        lowest_id, batch.num_pairs, num_anchors, most_in_a_row = map(int, facts[:4])
        if lowest_id < -1:
            raise ValueError("constituent_ids must be −1 (no constituent) or not negative")
        batch.anchors = is_anchor.long().argsort(descending=True, stable=True)[:num_anchors]
        if num_negatives is None or num_negatives >= ids.size(1):
            batch.columns = by_row.long().argsort(descending=True, stable=True)[:, :most_in_a_row]
        else:
            batch.drawn = batch.order.draw(batch.anchors, num_negatives, generator)
            if max(batch.num_pairs, num_anchors * num_negatives) <= EDGES and batch.num_pairs:
                batch.few = list(batch.rivals()), list(batch.pairs())
        batch.inverse = 1 / (batch.squares + 1e-16) if similarity == "cosine" else torch.zeros_like(batch.squares)
        factor = batch.inverse if similarity == "cosine" else torch.ones_like(batch.squares)
        batch.scale = (factor / temperature).sqrt()
    return *_Terms.apply(batch, *states), tuple(facts[4:] if mi else facts)


def _on_host(scalars: list[Tensor]) -> list[float]:
    """All that the host must know of a batch, in one transfer."""
    exact = torch.float32 if scalars[0].device.type == "mps" else torch.float64
    return torch.stack([scalar.detach().to(scalars[0].device, exact) for scalar in scalars]).tolist()


def _measured(states: list[Tensor], real: Tensor, mi: range, stability: range) -> _Batch:
    """The sizes of all states and, for the second term, how far they move; padding counts 0."""
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    sizes, distances, before = [], [torch.zeros_like(real, dtype=dtype).flatten()], None
    with torch.no_grad(), torch.autocast(real.device.type, enabled=False):
        for layer, state in enumerate(states):
            state = state.reshape(-1, state.size(-1)).to(dtype)
            sizes.append(torch.linalg.vector_norm(state, dim=1))
            if layer in stability and layer - 1 in stability:
                distances.append(torch.linalg.vector_norm(state - before, dim=1))
            before = state
        squares, movement = (torch.stack(norms).square().where(real.flatten(), 0) for norms in (sizes, distances))
    return _Batch(real, squares, movement[1:].sum(1), states[0].size(-1), mi, stability)


def _check_shapes(states: list[Tensor], others: dict[str, Tensor | None], optional: Sequence[str]) -> None:
    if not states or any(not isinstance(state, Tensor) or state.dim() != 3 for state in states):
        raise ValueError("hidden_states must be layers × (batch, tokens, width), at least one layer")
    if any(state.shape != states[0].shape for state in states):
        raise ValueError(f"hidden_states differ in shape: {[tuple(state.shape) for state in states]}")
    if wrong := [state.dtype for state in states if not state.is_floating_point() or state.dtype.itemsize < 2]:
        raise ValueError(f"hidden_states must be floating point of at least 16 bits, got {wrong[0]}")
    if not states[0].numel():
        raise ValueError(f"hidden_states are empty: their shape is {tuple(states[0].shape)}")
    for name, tensor in others.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor (batch, tokens), got {type(tensor).__name__}")
        if tensor.shape != states[0].shape[:2]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, hidden_states have (batch, tokens) = "
                             f"{tuple(states[0].shape[:2])}")
        if tensor.dtype not in WHOLE:
            raise ValueError(f"{name} must hold integers (int64 and smaller) or booleans, got {tensor.dtype}")

