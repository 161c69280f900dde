"""Environments in processes of their own: `--workers N`, on this machine or as Ray actors.

    parent                                       worker (many environments each)
    RemoteEnv ── Supervisor ── Connection ─────▶ Host ── envs.make(spec)
    (proxy.py)   (supervisor.py) (local.py, actors.py)   (host.py)

Only a spec string and plain data travel to a worker, and only plain data comes back (wire.py). This file stays
empty: a worker imports the package, and must not load what training needs.
"""
