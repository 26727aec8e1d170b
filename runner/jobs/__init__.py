"""One round trip seen from the host: the request, its tries, and the drivers for threads and tasks."""
