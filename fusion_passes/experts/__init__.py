"""Mixtures of experts in a graph: what the fusions of experts and of routers have in common.

A block is found from its grouped products outwards, by what its tensors mean and not by how they are written:
`routing` says of an index tensor whether it holds pairs, tokens, experts or slots, `products` what a grouped product
multiplies and `counts` where its groups end, `activations` what stands between two of them, `combining` how results
become one, and `block` puts them together. Experts that multiply all tokens, with weights that are 0 for most of them,
are found by `dense`; `spread` has such weights. `misses` has the reasons of what is written in a way of its own.
A router is found from its top-k outwards: `scores` says what experts are chosen by, `routers` what becomes of it.
"""
