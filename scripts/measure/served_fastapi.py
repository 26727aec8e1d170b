"""The FastAPI app that is served under load: a small answer, and a segfault on demand."""

import ctypes
from typing import Any

from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def index() -> dict[str, Any]:
    return {"message": "hello", "items": list(range(20))}


@app.get("/die")
async def die() -> str:
    ctypes.string_at(0)
    return "alive"
