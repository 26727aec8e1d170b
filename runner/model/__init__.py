"""What users say of a pool and a request, as data: limits, recycling, sandboxes, requests, cancel scopes."""
