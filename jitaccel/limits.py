"""The largest sizes and numbers that are taken: beyond what models do; more would never end or fit."""

MOST_SIDE = 16_384  # of a picture, in pixels
MOST_TEXT_TOKENS = 4_096
MOST_BATCH = 1_024
MOST_SHARED = 4_096  # what numbers of tokens are rounded up to a multiple of
