"""What the command line, which parses its options without torch, shares with the rest: the limits of what can be asked
for, and the frame rate."""

FPS = 24  # the frame rate of the model
MAX_STEPS = 1000  # the timesteps that the model was trained with
MAX_GUIDANCE_SCALE = 1000  # beyond all use: distilled models take 1, others about 3
MAX_BLEND_CHUNKS = 16  # that a blend from one prompt to another may last
MAX_SIDE = 16_384  # pixels; H.264 knows no larger picture
