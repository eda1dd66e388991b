"""Cases that need the stand-ins of tests/support: they run from a checkout and are not installed."""
