// Saving what was received.

/** Save it, and return what there is to say about it, or null. */
export function save(stream) {
  const isMp4 = stream.started.mime.startsWith("video/mp4");
  const url = URL.createObjectURL(stream.recording.blob(isMp4 ? "video/mp4" : "video/x-motion-jpeg"));
  const link = document.createElement("a");
  link.href = url;
  link.download = `longlive-${stream.started.seed}.${isMp4 ? "mp4" : "mjpeg"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after this returns
  if (!isMp4) return "It came as JPEG pictures, and is saved as Motion JPEG (.mjpeg), which VLC and ffplay play.";
  return stream.recording.isFull ? "The video is longer than what is kept: this is its first GiB." : null;
}
