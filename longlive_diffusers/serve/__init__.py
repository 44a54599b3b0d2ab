"""`longlive serve`: a page on which a prompt becomes a video while one watches, and a WebSocket protocol under it."""
