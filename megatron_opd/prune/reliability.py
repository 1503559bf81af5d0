"""From drift events to reliability, prune weights and effective lengths (docs/method.md items 2 to 5).

    B_t = 1 where the overlap O_t < threshold, on response tokens only           drift event
    C_t = B_1 + ... + B_t                                                        the event's own token counts
    R_t = clip(1 - w_drop C_t, 0, 1)                                             reliability: falls, never recovers
    L_t = R_t + w_base on response tokens, 0 on padding                          prune weight of the loss
    E   = number of response tokens with R_t > 1e-8                              effective length

Departures from the paper (arXiv 2605.07804):
- R is computed in float64, and values up to 1e-8, the paper's own tolerance, count as 0. So a response is spent after
  1 / w_drop events for every w_drop, however floats round.
- w_base = 0 is allowed: the loss weight then is R itself and a spent sequence teaches nothing more. The paper's is 0.5.
- An overlap that is NaN on a response token is an error; in the paper's code it would compare as "no event".
- Counts can be carried from segment to segment (`ReliabilityState`) and across context-parallel ranks
  (`prefix_event_counts`); both give the numbers of the one-shot computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SPENT = 1e-8  # reliability up to this counts as 0


@dataclass(frozen=True)
class Reliability:
    """Of B responses and T positions; everything is 0 on positions outside the mask."""

    weight: Tensor  # [B, T] float32, R in 0..1
    loss_weight: Tensor  # [B, T] float32, L = R + w_base
    events: Tensor  # [B, T] bool, B
    effective_length: Tensor  # [B] int64, E in tokens

    @property
    def total_events(self) -> Tensor:
        """[B] int64: drift events of each response."""
        return self.events.sum(1)


def _check_weights(w_drop: float, w_base: float) -> None:
    if not w_drop >= 0:
        raise ValueError(f"w_drop must not be negative, got {w_drop}")
    if not w_base >= 0:
        raise ValueError(f"w_base must not be negative, got {w_base}")


def _check_shapes(name: str, values: Tensor, mask: Tensor) -> None:
    if values.dim() != 2 or values.shape != mask.shape:
        raise ValueError(f"{name} and mask must both be [B, T], got {list(values.shape)} and {list(mask.shape)}")


def drift_events(overlap: Tensor, mask: Tensor, threshold: float = 0.7) -> Tensor:
    """B_t: response tokens whose overlap lies below the threshold, [B, T] x 2 -> bool [B, T].

    Raises ValueError where the overlap is NaN on a response token: an unmeasured token is neither event nor agreement.
    """
    _check_shapes("overlap", overlap, mask)
    mask = mask.bool()
    unmeasured = overlap.isnan() & mask
    if bool(unmeasured.any()):
        raise ValueError(f"overlap is NaN on {int(unmeasured.sum())} response token(s)")
    return (overlap < threshold) & mask


def _reliability_of_counts(counts: Tensor, w_drop: float) -> Tensor:
    left = (1.0 - w_drop * counts.to(torch.float64)).clamp_(0.0, 1.0)
    return torch.where(left > SPENT, left, 0.0)


def _from_counts(events: Tensor, mask: Tensor, counts: Tensor, w_drop: float, w_base: float) -> Reliability:
    weight = torch.where(mask, _reliability_of_counts(counts, w_drop), 0.0)
    return Reliability(
        weight=weight.to(torch.float32),
        loss_weight=torch.where(mask, weight + w_base, 0.0).to(torch.float32),
        events=events,
        effective_length=(weight > 0).sum(1),
    )


def from_events(
    events: Tensor,
    mask: Tensor,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> Reliability:
    """Reliability from drift events of any signal; for the alternative one, events = ~teacher_top_p_accept(...).

    events, mask [B, T] bool: events outside the mask do not count.
    group: a context-parallel group; T is then this rank's part in the layout of `prefix_event_counts`, the weights are
    this rank's and the effective lengths are of the whole responses.
    """
    _check_shapes("events", events, mask)
    _check_weights(w_drop, w_base)
    mask = mask.bool()
    events = events.bool() & mask
    result = _from_counts(events, mask, prefix_event_counts(events, group), w_drop, w_base)
    if group is not None:
        dist.all_reduce(result.effective_length, group=group)
    return result


def reliability(
    overlap: Tensor,
    mask: Tensor,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> Reliability:
    """Reliability from the top-k overlap.

    overlap [B, T] in 0..1; mask [B, T]: true on response tokens; positions in the order of generation.
    w_drop: price of an event (0.01: spent after 100). w_base: floor of the loss weight. group: see `from_events`.
    Raises ValueError on shapes that differ, negative weights, and NaN overlap on a response token.
    """
    return from_events(drift_events(overlap, mask, threshold), mask, w_drop, w_base, group)


def prefix_event_counts(local_events: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """C_t of this rank's positions under context parallelism: events [B, T_local] -> int64 [B, T_local].

    Layout (Megatron's, balanced for causal attention): every sequence is cut into 2 * cp chunks of equal length and
    rank r holds the chunks r and 2 * cp - 1 - r, one after the other. One all-reduce of 2 * cp integers per sequence.
    Raises ValueError where the local length is odd. Without a group this is the plain running count.
    """
    running = local_events.to(torch.int64).cumsum(1)
    cp = 1 if group is None else dist.get_world_size(group)
    if cp == 1:
        return running
    sequences, length = running.shape
    if length % 2:
        raise ValueError(f"context parallelism leaves each rank two chunks of equal length, got {length} positions")
    rank, half = dist.get_rank(group), length // 2
    counts = torch.zeros((sequences, 2 * cp), dtype=torch.int64, device=running.device)
    halves = local_events.to(torch.int64).unflatten(1, (2, half))
    counts[:, rank], counts[:, 2 * cp - 1 - rank] = halves.sum(2).unbind(1)
    dist.all_reduce(counts, group=group)
    before = counts.cumsum(1) - counts
    starts = torch.stack([before[:, rank], before[:, 2 * cp - 1 - rank]], dim=1)
    return (halves.cumsum(2) + starts[:, :, None]).flatten(1)


class ReliabilityState:
    """Reliability of responses that arrive in segments, for pruning while they are being generated.

    Feeding the segments one after the other gives, side by side, exactly what `reliability` gives for the whole.
    """

    def __init__(
        self,
        responses: int,
        threshold: float = 0.7,
        w_drop: float = 0.01,
        w_base: float = 0.5,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_weights(w_drop, w_base)
        self.threshold, self.w_drop, self.w_base = threshold, w_drop, w_base
        self.counts = torch.zeros(responses, dtype=torch.int64, device=device)  # events so far
        self.effective_length = torch.zeros(responses, dtype=torch.int64, device=device)  # so far, in tokens

    @property
    def spent(self) -> Tensor:
        """[responses] bool: no reliability left, whatever comes next."""
        return _reliability_of_counts(self.counts, self.w_drop) == 0

    def update(self, overlap: Tensor, mask: Tensor, responses: Tensor | None = None) -> Reliability:
        """Takes the next segment [b, S] of `responses` [b] (None: all of them) and returns its reliability.

        `effective_length` in the result counts this segment's tokens; the running total is on this object.
        """
        return self.update_from_events(drift_events(overlap, mask, self.threshold), mask, responses)

    def update_from_events(self, events: Tensor, mask: Tensor, responses: Tensor | None = None) -> Reliability:
        """As `update`, from drift events [b, S] of any signal."""
        _check_shapes("events", events, mask)
        responses = torch.arange(len(self.counts), device=self.counts.device) if responses is None else responses
        if len(responses) != len(events):
            raise ValueError(f"{len(events)} segments for {len(responses)} responses")
        mask = mask.bool()
        events = events.bool() & mask
        counts = self.counts[responses, None] + prefix_event_counts(events)
        result = _from_counts(events, mask, counts, self.w_drop, self.w_base)
        self.counts[responses] += result.total_events
        self.effective_length[responses] += result.effective_length
        return result
