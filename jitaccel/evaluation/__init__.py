"""How good pictures are: methods beside each other on the same prompts, scored. Imported only when asked for."""
