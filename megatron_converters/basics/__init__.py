"""Shared basics: errors, element types, quantities as text, JSON."""
