"""Several front processes behind one address, and the parent that starts, watches and ends them."""
