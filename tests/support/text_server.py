"""`python text_server.py FOLDER PORT GRPC_PORT CONFIG`: a server process over `text_fleet.py`.

Of CONFIG (JSON) it takes the limits.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from leanserve.api.server import Address, run_server
from leanserve.http.listening import listen
from text_fleet import text_fleet


def main(folder: Path, port: int, grpc_port: int, config: str) -> None:
    claimed, gate = listen("127.0.0.1", port), threading.Event()
    gate.set()
    opened = text_fleet(folder, gate, limits=json.loads(config).get("limits", {}), batch={"queue_rows": 4096})
    run_server(opened.config, Address(claimed, ("127.0.0.1", grpc_port)), opened)


if __name__ == "__main__":
    folder, port, grpc_port, settings = sys.argv[1:]
    main(Path(folder), int(port), int(grpc_port), settings)
