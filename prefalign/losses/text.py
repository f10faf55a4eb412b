"""Text preference: the chosen against the rejected answer on the same pictures, with any of TRL's `loss_type`s.

Source: DPO, arXiv 2305.18290, eq. 7 for `sigmoid`; the other losses and their papers are in TRL's paper index. Nothing is
rewritten here. `loss_type: [sft]` is plain negative log-likelihood of the chosen answers (mean over tokens), the
control that a preference method has to beat; it needs no reference.
"""

from __future__ import annotations

from prefalign.losses.term import Term

TEXT = Term(name="text", views=("chosen", "rejected"))
