"""Clients that vanish from a live server of this process, and the bytes that it holds after each round of them:

    python -m tests.programs.visit_server connections
    python -m tests.programs.visit_server pictures

A process of its own, because what else a process has done moves its memory by some MB.
"""

import json
import random
import string
import sys
from collections.abc import Iterator

import PIL.Image

from longlive_diffusers.serve.settings import ServeSettings
from tests.support.held_memory import held_bytes
from tests.support.live_server import BLUE, RED, LiveServer, as_data_url, embedded_pipeline, running_server


PICTURE = PIL.Image.new("RGBA", (5000, 5000), (200, 30, 30, 128))  # of as many pixels as are allowed


def connections(server: LiveServer) -> Iterator[int]:
    """120 streams that end in every way there is; what is held after each 15."""
    chance = random.Random(0)
    for index in range(120):
        client = server.client()
        kind = index % 5
        if kind == 0:
            client.watch(prompt=RED, seconds=0.1, steps=1)
        elif kind == 1:
            client.send("start", prompt=BLUE, steps=1)
            client.until("chunk")
        elif kind == 2:
            client.send("start", prompt=RED, steps=1)
        elif kind == 3:
            client.socket.send("".join(chance.choices(string.printable, k=100_000)))
        else:
            client.send("start", prompt=RED, video="jpeg", steps=1)
            client.until("started")
        client.socket.close() if index % 2 else client.vanish()
        server.wait_until(lambda: server.is_empty)
        if index % 15 == 14:
            yield held_bytes()
    assert server.app.model.sessions.num_open == 0


def pictures(server: LiveServer) -> Iterator[int]:
    """Streams that begin with a picture of 100 MB, in some kilobytes: one in a round, or two, of which one ends."""
    url = as_data_url(PICTURE)
    for index in range(5):
        clients = [server.client() for _ in range(1 + index % 2)]
        for client in clients:
            client.send("start", prompt=RED, image=url, seconds=0.1, steps=1)
        if index % 2:
            clients[0].until("end")
        for client in clients:
            client.vanish()
        server.wait_until(lambda: server.is_empty)
        yield held_bytes()


if __name__ == "__main__":
    rounds = {"connections": connections, "pictures": pictures}[sys.argv[1]]
    with running_server({None: embedded_pipeline()}, ServeSettings(max_sessions=3, max_queue=2)) as server:
        print(json.dumps(list(rounds(server))))
