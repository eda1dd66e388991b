"""Pictures over HTTP from many replicas. Only `deployment` needs Ray; what decides is plain Python."""
