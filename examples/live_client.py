"""A program that directs a live video: python examples/live_client.py [--url ...] [--output video.mp4]

It talks to `longlive serve`, which has to run, and writes what it receives: the file can be watched meanwhile. The
messages are described in longlive_diffusers/serve/README.md. It needs the package websockets, of the extra demo.
"""

import argparse
import json

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="ws://127.0.0.1:7860/ws", help="with a token: ws://HOST:PORT/ws?token=TOKEN")
parser.add_argument("--output", default="video.mp4")
parser.add_argument("--seconds", type=float, default=4.0)
args = parser.parse_args()

FIRST, SECOND = (f"a large {color} circle moves right on a black background" for color in ("red", "blue"))
THIRD = "a small white square stays still on a black background"
# What is said after these chunks: same shot, new prompt; new shot.
CHANGES = {2: {"type": "prompt", "prompt": SECOND}, 6: {"type": "cut", "prompt": THIRD}}

try:
    with connect(args.url, max_size=None) as socket, open(args.output, "wb") as file:
        socket.send(json.dumps({"type": "start", "prompt": FIRST, "seconds": args.seconds, "seed": 0}))
        num_frames, message = 0, {}
        while message.get("type") != "end":
            received = socket.recv()
            if isinstance(received, bytes):  # a frame; all of them, joined, are an mp4
                file.write(received)
                num_frames += 1
                # Only what is watched is made: here, everything at once.
                socket.send(json.dumps({"type": "played", "frame": num_frames - 1}))
                continue
            message = json.loads(received)
            if message["type"] == "chunk":
                print(f"chunk {message['index']}, shot {message['shot_index']}: {message['prompt']}")
                if message["index"] in CHANGES:
                    socket.send(json.dumps(CHANGES[message["index"]]))
            else:
                print(", ".join(f"{name} {message[name]}" for name in message if name != "latency"))
except ConnectionRefusedError:
    raise SystemExit(f"there is no server at {args.url}: start one with `longlive serve`") from None
except ConnectionClosed:  # without an end: the server's process, or the network, has failed
    raise SystemExit(f"the connection is lost after {num_frames} frames") from None
