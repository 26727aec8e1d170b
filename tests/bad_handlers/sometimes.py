"""Can be imported as long as the file `broken` is not there; counts its imports in the file `starts`."""

import os
from pathlib import Path
from typing import Any

here = Path(os.environ["BLASTDOOR_TEST_DIR"])
with (here / "starts").open("a") as starts:
    starts.write(".")
if (here / "broken").exists():
    raise RuntimeError("the import is broken for now")


def app(request: Any, response: Any) -> bytes:
    if request.path == "/die":
        os._exit(1)
    return b"sometimes"
