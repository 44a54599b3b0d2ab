// What the server says about itself, at /health.

/** Fetch it; null where there is no answer that is understood. */
export async function fetchHealth(page) {
  try {
    return await (await fetch(new URL("health", page))).json(); // a server that is not ready answers 503, and says so
  } catch (error) {
    if (error instanceof TypeError || error instanceof SyntaxError) return null; // no connection, or no JSON
    throw error;
  }
}

/** A line about it: the model, and what it runs on. */
export function describe(health) {
  if (health === null) return "Server not reached";
  if (health.ready === false) return "The server is not ready";
  const model = String(health.model ?? "").replace(/^the e/, "E");
  const device = String(health.device ?? "").replace(/^cpu$/, "CPU");
  return [model, device].filter(Boolean).join(" · ");
}

/** What the server chooses where nothing is entered, by the ids of the fields. */
export function defaults(health) {
  const { steps, guidance_scale: guidance, width, height } = health;
  return { steps, guidance, width, height };
}
