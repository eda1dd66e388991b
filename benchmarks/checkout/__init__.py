"""Cases that need the stand-ins in tests/support. They run from a checkout and are not installed."""
