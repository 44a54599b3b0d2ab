// The WebSocket of `/ws`: JSON both ways, and the video as binary messages. serve/README.md describes the messages.

/** Where the WebSocket is, beside the page, with the token if there is one. */
export function socketUrl(page, token) {
  const url = new URL("ws", page);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.hash = url.search = "";
  if (token) url.searchParams.set("token", token);
  return url.href;
}

export class Connection {
  #socket;
  #waiting = []; // what was sent before the socket was open

  /**
   * @param handlers `message(object)`, `media(arrayBuffer)`, and `closed({ wasOpen, code, reason })`, which is called
   *   once unless the page itself closed the connection.
   */
  constructor(url, { message, media, closed }) {
    let wasOpen = false;
    this.#socket = new WebSocket(url);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onopen = () => {
      wasOpen = true;
      for (const text of this.#waiting.splice(0)) this.#socket.send(text);
    };
    this.#socket.onmessage = ({ data }) => (typeof data === "string" ? message(JSON.parse(data)) : media(data));
    this.#socket.onclose = ({ code, reason }) => closed({ wasOpen, code, reason });
  }

  send(type, fields = {}) {
    const text = JSON.stringify({ type, ...fields });
    if (this.#socket.readyState === WebSocket.CONNECTING) this.#waiting.push(text);
    else if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(text);
  }

  get isUsable() {
    return this.#socket.readyState <= WebSocket.OPEN;
  }

  close() {
    this.#socket.onclose = this.#socket.onmessage = null;
    this.#socket.close();
  }
}
