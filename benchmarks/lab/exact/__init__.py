"""Exact laboratory: random fields of known spectrum, whose optimal networks and sampling errors have closed forms.

| symbol | name |
|---|---|
| `P(k)` | `power`: variance of the clean field at frequency k |
| `s` | `level`: noise level, 1 is pure noise |
| `f` | `factor`: side of the areas whose latents a pooled step averages |

docs/exact-lab.md explains the computation and its limits.
"""
