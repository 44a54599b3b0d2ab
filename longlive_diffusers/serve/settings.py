"""What a server allows, and what its streams are made with unless a client asks for something else."""

from dataclasses import dataclass

from ..models.sparse_attention import check_density
from ..number_checks import check_booleans, check_counts
from ..pipelines.chunk_step import check_clean_pass


LEAD_CHUNKS = 2  # how many chunks are made beyond the one that is being watched
IDLE_SECONDS = 60.0  # a stream that waits so long for its viewer gives its place to one that waits for a place
SEND_SECONDS = 60.0  # a client that takes nothing for so long is not there any more
MAX_CONNECTIONS = 256
# A client that says more is let go. What is played may be said for each frame, and counts a tenth.
MESSAGES_PER_SECOND, MESSAGE_BURST = 100.0, 500
PLAYED_COUNTS = 0.1


@dataclass(frozen=True)
class ServeSettings:
    """
    Args:
        max_sessions: How many streams are made at once, a chunk of each in turn.
        max_queue: How many more may wait for their turn.
        max_minutes: How long a stream may last, from its beginning.
        max_pixels: The largest picture, in pixels; None for as many as the model's own has.
        steps: The solver steps of a chunk.
        max_steps: How many a client may ask for: while a chunk is made, all others wait.
        guidance_scale: The scale of classifier-free guidance; 1 for none.
        window_size, sink_size: The frames of the KV cache, in latent frames; None for the model's own.
        clean_pass, attention_density, split_first_chunk: As `LongLivePipeline.stream` takes them.
    """

    max_sessions: int = 2
    max_queue: int = 16
    max_minutes: float = 30.0
    max_pixels: int | None = None
    steps: int = 4
    max_steps: int = 50
    guidance_scale: float = 1.0
    window_size: int | None = None
    sink_size: int | None = None
    clean_pass: str = "full"
    attention_density: float = 1.0
    split_first_chunk: bool = False

    def __post_init__(self) -> None:
        check_counts(max_sessions=self.max_sessions, steps=self.steps, max_steps=self.max_steps)
        if self.steps > self.max_steps:
            raise ValueError(f"`steps` is {self.steps}, more than the {self.max_steps} of `max_steps`.")
        check_clean_pass(self.clean_pass)
        check_density(self.attention_density)
        check_booleans(split_first_chunk=self.split_first_chunk)
        if not 0 < self.max_minutes < float("inf"):
            raise ValueError(f"`max_minutes` must be a positive number, got {self.max_minutes!r}.")
