"""Which replica a new client is sent to: the one with the fewest.

Ray's own router compares two that it draws by lot. That evens out short requests; a stream lasts for minutes, and
would wait in one replica while another one, which was not drawn, has room.
"""

import random

from ray.serve.request_router import (  # pyright: ignore[reportMissingImports]
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)


class FewestClients(FIFOMixin, RequestRouter):
    """Of all replicas, chooses the one with the fewest open requests, which are the WebSockets."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        # The router takes the first of those with the fewest; by lot, so that two proxies do not choose alike.
        return [random.sample(candidate_replicas, len(candidate_replicas))]
