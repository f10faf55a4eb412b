"""Conditional image preference: the chosen answer on its picture against the same answer on the other picture.

Source:
    mDPO, arXiv 2406.11839, eq. 4 (L_CoPO); the same term is L_vDPO of Re-Align, arXiv 2502.13146, eq. 1.
Equation:
    -log sigmoid(beta * [d(y_w | images) - d(y_w | rejected_images)]), d = log pi - log pi_ref summed over the answer's
    tokens, end of turn included. ln 2 at the start, and always ln 2 if both sides show the same picture.
Differs from the authors' code:
    mDPO draws a new crop in every forward, so its policy and its reference see different pictures; here the picture is
    the one stored in the pair. Re-Align scores the top-1 or top-2 token instead of the label; here it is the label.
    Both papers add the text term (mDPO an anchor too): train that sum when a run can hold several terms.
"""

from __future__ import annotations

from prefalign.losses.term import Term

VISUAL = Term(
    name="visual",
    views=("chosen", "chosen_on_rejected_image"),
    loss_types=frozenset({"sigmoid", "hinge", "ipo", "robust", "exo_pair", "sigmoid_norm", "discopop"}),
    reference_free=frozenset(),
)
