"""How closely engines must agree, by precision; tests and benchmarks read it here.

fp64 and fp32 hold over a whole epoch of tiny models (``test_engines_agree.py``), bf16, whose
products have 8 bits, for the losses of a first step (``test_execution.py``).  tf32 keeps 10 bits
of a product's factors: over a step of ResNet-18 its relative error was measured as 2.9e-4.
"""

from __future__ import annotations

ENGINES = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 3e-3, "bf16": 0.05}  # relative
ABSOLUTE = {"bf16": 0.02}  # of a loss, where the relative one asks for less
