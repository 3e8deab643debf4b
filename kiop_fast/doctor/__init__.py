"""``kiop-fast doctor``: what works on this machine, and whether a run would."""

from kiop_fast.doctor.check import Check, as_finding, failed
from kiop_fast.doctor.machine import machine_checks
from kiop_fast.doctor.plan import plan_checks

__all__ = ["Check", "as_finding", "failed", "machine_checks", "plan_checks"]
