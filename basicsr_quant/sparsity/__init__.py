"""Sparsity: filter pruning."""
