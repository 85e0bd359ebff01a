"""What the end-to-end and the chaos tests stand on: a whole Stoker, and what is put around it."""
