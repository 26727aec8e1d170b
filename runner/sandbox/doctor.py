"""`blastdoor doctor`: what this machine can enforce, layer by layer, and what each profile would give here."""

from __future__ import annotations

import os
import platform

from ..model.sandbox import Sandbox
from . import cgroup, probe
from .setup import wanted_layers


def examine() -> int:
    """Print it; 0 where both profiles can be had whole, 1 where a layer is lacking."""
    user = "root" if os.geteuid() == 0 else f"an ordinary user (uid {os.geteuid()})"
    print(f"Linux {platform.release()} on {platform.machine()}, as {user}\n")
    layers = probe.probe_layers()
    for layer in layers:
        print(f"{'no ' if layer.lacking else 'yes'}  {layer.name}: {layer.what}")
        if layer.lacking:
            print(f"       {layer.lacking}")
    where = cgroup.delegated()
    print(
        f"{'yes' if where else 'no '}  control group: limits of memory and processes for each strict worker (optional)"
    )
    print(f"       {where or cgroup.WAY_OUT}\n")
    known = {layer.name: layer for layer in layers}
    whole = True
    for sandbox in (Sandbox.default(), Sandbox.strict()):
        wanted = wanted_layers(sandbox, own_user=probe.OWN_USER in known)
        lacking = [name for name in wanted if known[name].lacking]
        whole = whole and not lacking
        if lacking:
            print(f"Sandbox.{sandbox.profile}(): would not start here for want of {', '.join(lacking)};")
            print(f"    with require='available': {', '.join(name for name in wanted if name not in lacking)}")
        else:
            print(f"Sandbox.{sandbox.profile}(): whole: {', '.join(wanted)}")
    return 0 if whole else 1
