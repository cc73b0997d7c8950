"""Benchmarks: every registered op and fusion against stock `torch.compile` and the copy bandwidth.

`python -m bench run` measures, `show`, `plot` and `compare` present, `tune` distils the results into the
tables that ship with `fusion_passes`, and `readme` writes them into README.md and docs/.
"""
