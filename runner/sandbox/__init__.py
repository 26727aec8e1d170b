"""What an untrusted handler is shut into: profiles, their layers, and what a machine can enforce."""

from ..model.sandbox import Sandbox

__all__ = ["Sandbox"]
