"""The method of arXiv:2603.10744 in pure functions of tensors and numbers. Knows no model and no codebase."""
