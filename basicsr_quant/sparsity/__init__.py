"""Sparsity: N:M masks that compose with quantization, and filter pruning. Importing this registers the former."""

from . import one_shot, sls, sr_ste
from .base import SPARSITY, SparseTraining, SparsityMethod, apply_sparsity, sparsity_of
from .options import SparsityConfig, read_sparsity

__all__ = [
    'SPARSITY',
    'SparseTraining',
    'SparsityConfig',
    'SparsityMethod',
    'apply_sparsity',
    'one_shot',
    'read_sparsity',
    'sls',
    'sparsity_of',
    'sr_ste',
]
