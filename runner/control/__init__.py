"""What a pool and its worker processes agree on: configuration, orders, signals, module names, the app's sources."""
