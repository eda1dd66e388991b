"""Quality evaluation: compares and scores methods on the same prompts. Imported only when needed."""
