"""What terms read from full logits, token by token; positions outside the mask give 0 and a gradient of 0, whatever they hold.

Only the rows of the mask are looked at, so padding costs no softmax. Legend of shapes as in `term`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import kl_div


def token_logits(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The raw logits of given tokens, (B, T) float32.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64, ids below V where `mask` is True.
        mask: (B, T) bool.
    """
    return _spread(logits[mask].float().gather(1, tokens[mask][:, None]).squeeze(1), mask)


def token_logps(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The log-probs of given tokens, (B, T) float32; arguments as in `token_logits`."""
    return _spread(logits[mask].float().log_softmax(dim=1).gather(1, tokens[mask][:, None]).squeeze(1), mask)


def token_kl(ref_logits: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy) of the next token over the whole vocabulary, (B, T) float32.

    Args:
        ref_logits: (B, T, V), without gradient.
        logits: (B, T, V).
        mask: (B, T) bool.
    """
    policy, reference = (each[mask].float().log_softmax(dim=1) for each in (logits, ref_logits))
    return _spread(kl_div(policy, reference, reduction="none", log_target=True).sum(dim=1), mask)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the mask's True positions, in row order, put back into (B, T)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
