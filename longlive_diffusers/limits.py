"""The limits of what can be asked for, in Python as on the command line, which parses its options without torch."""

MAX_GUIDANCE_SCALE = 1000  # beyond all use: distilled models take 1, others about 3
MAX_BLEND_CHUNKS = 16  # that a blend from one prompt to another may last
MAX_SIDE = 16_384  # pixels; H.264 knows no larger picture
