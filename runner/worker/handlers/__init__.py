"""How handlers are found and called: `load` finds one, and an adapter per kind (`native`, `wsgi`, `asgi`) calls it."""
