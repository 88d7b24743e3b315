"""Synthetic tasks that tell attention types apart: what a small model recalls, by the distance it has to look back."""
