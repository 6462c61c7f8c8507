"""One-shot N:M: the largest weights of each group, chosen once, then fine-tuned."""

from __future__ import annotations

from .base import SPARSITY, SparsityMethod


@SPARSITY.register('one_shot')
class OneShot(SparsityMethod):
    """Uniform N:M by magnitude, the baseline of SLS and SR-STE (2:4 as Mishra et al. 2021 run it on GPUs).

    N is the same in every masked layer, the largest that meets the budget. The mask is of the weights that training or
    calibration starts from, and stays.
    """

    name = 'one_shot'
