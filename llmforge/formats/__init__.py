"""Bytes on disk. Nothing in this room knows what a model is."""
