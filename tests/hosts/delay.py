"""A way to a host that takes long: HOST PORT SECONDS. A ProxyCommand that holds back what comes from either side for so long.

It stands in for netem, which the kernels of some machines do not have.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue


def carry(read: Callable[[], bytes], write: Callable[[bytes], object], seconds: float) -> None:
    """Writes what is read, each part so many seconds later; ends the process at its end."""
    parts = SimpleQueue[tuple[float, bytes]]()

    def later() -> None:
        while True:
            moment, part = parts.get()
            time.sleep(max(0.0, moment - time.monotonic()))
            if not part:
                os._exit(0)
            write(part)

    threading.Thread(target=later, daemon=True).start()
    while part := read():
        parts.put((time.monotonic() + seconds, part))
    parts.put((time.monotonic() + seconds, b""))


if __name__ == "__main__":
    host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    there = socket.create_connection((host, port))
    there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=carry, args=(lambda: os.read(0, 65536), there.sendall, seconds), daemon=True).start()
    carry(lambda: there.recv(65536), lambda part: os.write(1, part), seconds)
    time.sleep(seconds + 1)
