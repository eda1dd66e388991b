"""Serves pictures over HTTP from many replicas. Only `deployment` needs Ray; the logic is plain Python."""
