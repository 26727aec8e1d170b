"""The name of a lane's thread in its worker, by which the kernel tells what it has used (proc_pid_comm(5))."""

from __future__ import annotations


def lane_thread_name(lane: int) -> str:
    """At most 15 bytes, as the kernel has them (prctl(2), PR_SET_NAME)."""
    return f"lane-{lane}"
