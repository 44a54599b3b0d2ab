"""Reading and writing video files, frame by frame, in constant memory."""
