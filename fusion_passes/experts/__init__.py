"""Mixtures of experts in a graph: what the fusions of experts and of routers have in common.

A block is found from its grouped products outwards, by what its tensors mean and not by how they are written:
`routing` says of an index tensor whether it holds pairs, tokens, experts or slots, `products` what a grouped product
multiplies, `activations` what stands between two of them, and `block` puts them and the weighted sum together.
A router is found from its top-k outwards: `scores` says what experts are chosen by, `routers` what becomes of it.
"""
