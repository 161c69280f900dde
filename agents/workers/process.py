"""The worker's side of a process: it answers requests until the connection closes, within its memory, and it ends
with the process that started it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from tools.processes import kill_descendants, resident_bytes

EXIT_MEMORY = 86
"""Exit code of a worker that ended itself because it held too much."""
_TICK_S = 0.25


def serve() -> None:
    """The process: arguments are the number of its socket, the process it works for, and its memory in bytes."""
    number, parent, ceiling = map(int, sys.argv[1:4])
    guard(ceiling, parent)
    from agents.workers.host import Host
    from agents.workers.wire import Channel, decode, encode

    channel = Channel(socket.socket(fileno=number))
    spec, arguments = decode(channel.receive())
    limit(ceiling)
    try:
        host = Host(spec, arguments)
        facts = encode({"ok": host.facts()})
    except (Exception, SystemExit) as error:
        channel.send(encode({"error": [type(error).__name__, str(error)[:2000]]}))
        return
    channel.send(facts)
    while True:
        try:
            request = channel.receive()
        except (EOFError, OSError):
            break
        channel.send(host.handle(request))
    host.close()


def guard(ceiling: int, parent: int | None = None) -> None:
    """Watch, in a thread, that this process and its children hold at most so many bytes, and that `parent` lives."""
    threading.Thread(target=_watch, args=(ceiling, parent), daemon=True, name="guard").start()


def _watch(ceiling: int, parent: int | None) -> None:
    while True:
        if parent is not None and os.getppid() != parent:
            kill_descendants()
            os.killpg(0, signal.SIGKILL)
        held = resident_bytes(os.getpid())
        if held > ceiling:
            print(f"{held / 2**30:.2f} GiB are held, {ceiling / 2**30:.2f} are allowed", flush=True)
            kill_descendants()  # nobody finds them once this process is gone
            os._exit(EXIT_MEMORY)
        time.sleep(_TICK_S)


def limit(ceiling: int) -> None:
    """Refuse allocations beyond the ceiling at once: what grows faster than the watch looks is an error in its place.

    The limit is on data (private writable memory), on top of what the interpreter has mapped already. A limit on
    address space would break runtimes that reserve much and use little (Java, Go, sanitizers).
    """
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/status", encoding="ascii") as stream:
        mapped = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = ceiling + mapped
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
