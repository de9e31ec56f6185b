"""Snapshot to committed checkpoint, and back."""
