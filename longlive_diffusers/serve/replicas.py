"""How many processes serve the application, and what each of them takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replicas:
    """
    Args:
        least, most: How many replicas there are: between the two, as many as the open WebSockets need.
        num_gpus, num_cpus: The GPUs and the cores that are set aside for each.
    """

    least: int
    most: int
    num_gpus: int
    num_cpus: int = 1

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} replica{'s' if self.most > 1 else ''}"
