"""Measures what each part of the method contributes, with variants that only exist here, on the embedded model."""
