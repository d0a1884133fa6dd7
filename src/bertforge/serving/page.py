"""The page at `/`, on which a person asks the model: three files of this package, sent as they are.

No framework, no build and nothing from elsewhere: the headers have the browser load this server's own style and script
alone, run nothing that stands in the markup, and send nothing anywhere else. Texts are hostile, and so are labels and
mistakes: the script makes text nodes of them all.

The page is an ordinary client: it asks `/v1/...` and holds the API key that is typed into it, so it is sent to anybody
who may connect.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version's script never meets an old one's markup
}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
}
PATHS = tuple(_FILES)
"""Open without an API key."""


def page_routes() -> list[Route]:
    """The page's files, read once."""
    from starlette.responses import Response
    from starlette.routing import Route

    def route(path: str, name: str, media_type: str) -> Route:
        content = resources.files("bertforge.serving").joinpath("page", name).read_bytes()

        async def send(request: Request) -> Response:
            return Response(content, media_type=media_type, headers=HEADERS)

        return Route(path, send)

    return [route(path, *file) for path, file in _FILES.items()]
