"""Normalizing passes: they change no value of a graph, only how often and in which spelling it is computed."""
