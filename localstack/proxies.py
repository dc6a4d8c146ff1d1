"""What keeps clients of a server on this machine from asking a proxy for it."""

from __future__ import annotations

import os
import urllib.request

from localstack.ports import HOST

_NAMES = ("NO_PROXY", "no_proxy")


def past_proxies() -> dict[str, str]:
    """The variables to set where a proxy is configured in this environment; what is excepted already stays so."""
    if not {"http", "all"} & urllib.request.getproxies_environment().keys():
        return {}
    excepted = next((os.environ[name] for name in _NAMES if os.environ.get(name)), None)
    return dict.fromkeys(_NAMES, f"{excepted},{HOST}" if excepted else HOST)
