"""Makes the plain page at the root of the server: what it serves, and how to ask it."""

from html import escape
from typing import TYPE_CHECKING

from starlette.requests import Request

from apcnet.serve.openapi import OTHERS, PREDICTIONS

if TYPE_CHECKING:
    from apcnet.serve.app import Server

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>apcnet serve</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
td {{ padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }}
pre {{ background: #f3f3f0; padding: 0.8rem; overflow-x: auto; }}
</style>
<h1>apcnet serve</h1>
<p>Models: {models}.</p>
<pre>curl --data-binary @photo.jpg -H "Content-Type: image/jpeg" {url}/overlay -o overlay.jpg</pre>
<table>
{rows}
</table>
<p>Images: at most {limits.max_bytes:,} bytes and {limits.max_pixels:,} pixels. Every error is JSON.
<a href="/openapi.json">OpenAPI document</a></p>
</html>
"""


def page(server: "Server", request: Request) -> str:
    """Returns the page as HTML."""
    paths = [("POST", PREDICTIONS), ("GET", OTHERS)]
    rows = [
        f"<tr><td>{method}</td><td><code>{path}</code></td><td>{escape(text)}</td></tr>"
        for method, described in paths
        for path, (text, _) in described.items()
    ]
    models = ", ".join(f"{escape(name)} ({len(served.classes)} classes)" for name, served in server.models.items())
    return PAGE.format(
        models=models, url=escape(str(request.base_url).rstrip("/")), rows="\n".join(rows), limits=server.limits
    )
