"""Upper bounds on user input: larger than any model needs; larger values would not fit or never finish."""

MOST_SIDE = 16_384  # of a picture, in pixels
MOST_TEXT_TOKENS = 4_096
MOST_BATCH = 1_024
MOST_SHARED = 4_096  # the largest `multiple` that token counts are rounded up to
