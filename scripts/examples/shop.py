"""A small Flask app, unchanged: it knows nothing of blastdoor."""

from __future__ import annotations

from flask import Flask, request

app = Flask(__name__)
basket: list[str] = []


@app.get("/")
def index() -> str:
    """The front page."""
    return "<h1>Shop</h1>"


@app.post("/basket")
def add() -> tuple[dict[str, object], int]:
    """Put something into the basket of this worker."""
    basket.append(request.get_json()["item"])
    return {"basket": basket, "path": request.path}, 201
