"""A generation's stages as files, for deployment. Not named export: that is the function of the package."""
