"""Measures picture quality and its uncertainty: metrics, intervals and paired tests. Knows no model."""
