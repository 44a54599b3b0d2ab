"""What `longlive bench` measures, and the memory and device facts that other commands report."""
