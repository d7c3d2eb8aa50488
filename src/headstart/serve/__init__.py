"""A run folder over HTTP: the queue that batches, the app that answers, the server that keeps slow clients out."""
