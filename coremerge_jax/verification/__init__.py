"""Verification that a merge is what its recipe makes of its sources, or what went wrong."""

from coremerge_jax.verification.findings import KINDS, Check, Finding, Verification
from coremerge_jax.verification.verify import verify

__all__ = ["KINDS", "Check", "Finding", "Verification", "verify"]
