"""Says READY; dies a moment later, as long as the file `broken` is there. Counts its imports in `starts`."""

import os
import threading
import time
from pathlib import Path
from typing import Any

here = Path(os.environ["BLASTDOOR_TEST_DIR"])
with (here / "starts").open("a") as starts:
    starts.write(".")


def die() -> None:
    time.sleep(0.03)
    os._exit(3)


if (here / "broken").exists():
    threading.Thread(target=die, daemon=True).start()


def app(request: Any, response: Any) -> bytes:
    return b""
