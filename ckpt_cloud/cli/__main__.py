"""`python -m ckpt_cloud.cli`."""

from __future__ import annotations

from ckpt_cloud.cli import main

main()
