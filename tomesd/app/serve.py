"""Serving the playground on this machine."""

import os
import tempfile

# Before Gradio is imported: nothing leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from tomesd.app.page import CSS, FONTS, build
from tomesd.app.reading import Reader
from tomesd.app.studio import Studio
from tomesd.shapes.names import DEFAULT

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    opens: bool = False,
    block: bool = True,
) -> str:
    """Serve the page; returns its address, or never if `block`.

    >>> serve(block=False)
    'http://127.0.0.1:7860/'

    model: what the page begins with. If host is not this machine's own, the page can draw with no
        other one, so that nobody elsewhere makes this machine load what they like.
    Raises OSError if the port is taken.
    """
    only = model if host in LOCAL else model or DEFAULT
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="tomesd-"))
    page = build(Studio(only), Reader())
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=opens,
        share=False,
        max_file_size="10mb",
        footer_links=["settings"],
        theme=gr.themes.Default(**FONTS),
        css=CSS,
        prevent_thread_lock=not block,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return str(address)
