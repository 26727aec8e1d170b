"""What runs in the child processes: the zygote that forks, and the worker with its handler."""
