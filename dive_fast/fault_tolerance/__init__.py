"""Fault tolerance: stop requests, lost or stalled ranks, agreement between ranks, non-finite steps."""
