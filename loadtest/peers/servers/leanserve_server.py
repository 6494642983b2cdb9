"""leanserve as anybody starts it: `leanserve serve` with a config of four lines, so with all it does per request.

`python leanserve_server.py NETWORK.onnx PORT [KEY=YAML ...]`; the further arguments go into the config, as in
`batch='{max_rows: 64}'`, or take the place of what is there. The artifacts, with what was measured of them, are kept
beside the network.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(network: Path, port: str, settings: list[str]) -> None:
    keys = {
        "base": f"{{onnx: {network}}}",
        "data": "{synthetic: 64}",
        "variants": "[{name: float}]",
        "cache": str(network.parent / "leanserve"),
    }
    keys |= dict(setting.split("=", 1) for setting in settings)
    lines = [f"{key}: {value}" for key, value in keys.items()]
    config = network.with_name(f"{network.stem}-{port}.yaml")
    config.write_text("\n".join(lines) + "\n")
    command = ["-m", "leanserve", "serve", "--config", str(config), "--port", port]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
