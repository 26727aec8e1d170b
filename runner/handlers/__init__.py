"""How handlers are found and called: `load` finds one, and a bridge per kind (`native`, `wsgi`) calls it."""
