"""Exports a generation's stages as files for deployment. Not named export, which is the package's function."""
