"""A stand-in for `headrace serve`, for tests of whoever starts and watches processes: same announcement, same routes.

    stand_in_role.py FOLDER serve ROLE [--cpu-affinity LIST] [--set KEY=VALUE]...

It writes its arguments and its end to FOLDER/<name>-<pid>, where tests read them. The setting `worker_id` gives its name;
the file FOLDER/<name>.behaviour, if there is one, says what goes wrong: "dies" at once, "refuses" its settings,
"ignores" SIGTERM.
"""

import http.server
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    folder, role, flags = Path(sys.argv[1]), sys.argv[3], sys.argv[4:]
    settings = dict(flag.split("=", 1) for flag in flags if "=" in flag)
    name = settings.get("worker_id", role)
    record = folder / f"{name}-{os.getpid()}"
    record.write_text(" ".join(flags))
    behaviour_file = folder / f"{name}.behaviour"
    behaviour = behaviour_file.read_text() if behaviour_file.exists() else ""
    sys.stderr.write(f"2026-11-21T00:00:00.000Z WARNING {name} x {name} speaks\n")
    if behaviour == "dies":
        sys.exit(7)
    if behaviour == "refuses":
        sys.stderr.write("headrace: no such transport\n")
        sys.exit(2)

    def on_term(number: int, frame: FrameType | None) -> None:
        if behaviour != "ignores":
            record.write_text(f"ended {time.monotonic_ns()}")
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    server = http.server.HTTPServer(("127.0.0.1", int(settings.get("port", 0))), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    sys.stdout.write(json.dumps({"event": "listening", "role": role, "url": url, "control_url": url}) + "\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
