"""Verification that a merge is what its recipe makes of its sources, or what went wrong."""

from coremerge_jax.verification.checking import verify
from coremerge_jax.verification.findings import KINDS, Check, Finding, Verification

__all__ = ["KINDS", "Check", "Finding", "Verification", "verify"]
