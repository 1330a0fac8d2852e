"""Tests in Triton's interpreter are for a process of its own: see test_interpreter.py."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
