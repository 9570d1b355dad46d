"""Bridges to other libraries: their call signatures and their weights."""
