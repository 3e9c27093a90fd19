"""Checkpoints: written whole, found again, deleted in order, also when a run is stopped or the disk is full."""
