"""Put on PYTHONPATH by the driver: starts the probe in every process of an engine.

vLLM's scheduler lives in a child process, whichever way that was started; ``site`` imports this
module in all of them. It does nothing unless the driver asked for a probe.
"""

from __future__ import annotations

import os

if os.environ.get("KVBENCH_PROBE"):
    import connector_probe

    connector_probe.install()
