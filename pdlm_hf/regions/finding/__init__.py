"""Regions of an image that nobody has marked: found by models, and selected."""
