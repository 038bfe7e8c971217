"""Muon's arithmetic on plain tensors: momentum, direction, scale, decay, its variants, and the oracle.

In: momenta, gradients and weights, whole or in slices. Out: updates.
Knows neither ranks nor messages; `reference` is the rule on whole matrices in one process.
"""
