"""How closely the engines must agree, relative, by precision; tests and benchmarks read it here.

fp64 and fp32 hold over a whole epoch of tiny models (``test_engines_agree.py``).  tf32 keeps 10
bits of a product's factors: its relative error over a step of ResNet-18 was measured as 2.9e-4,
and a step's losses may be an order of magnitude worse than that.
"""

from __future__ import annotations

ENGINES = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 3e-3}
