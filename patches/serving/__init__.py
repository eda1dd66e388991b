"""Plug-ins of serving engines, which find them by their entry points. They do nothing unless `JITACCEL_CONFIG` asks."""
