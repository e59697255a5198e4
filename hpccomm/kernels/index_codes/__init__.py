"""Codes for the indices of selected elements."""
