"""The explorer's server: for this machine's own browser, and for nobody else."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from skipcoder.errors import UserError
from skipcoder.evals.explorer.explorer import Asked, Explorer

HOSTS = ["127.0.0.1", "localhost"]
SITE = Path(__file__).with_name("site")


def app(explorer: Explorer) -> Starlette:
    """The server's application. Requests for other hosts (a foreign name that leads here) and from pages of other
    origins are refused."""
    alone = asyncio.Lock()  # a model is run, and edited, by one request at a time

    def answering(compute: Callable[[Asked], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            own = {f"{request.url.scheme}://{request.headers.get('host', '')}"}
            if request.headers.get("origin") not in own:
                return JSONResponse({"error": "requests come from the explorer's own page"}, 403)
            try:
                asked = Asked.model_validate_json(await request.body())
                async with alone:
                    return JSONResponse(await run_in_threadpool(compute, asked))
            except ValidationError as error:
                fault = error.errors()[0]
                where = ".".join(map(str, fault["loc"]))
                return JSONResponse({"error": f"{where}: {fault['msg']}".removeprefix(": ")}, 422)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 422)

        return answer

    async def about(_: Request) -> Response:
        return JSONResponse(explorer.about())

    async def front(_: Request) -> Response:
        return RedirectResponse("/index.html")

    computed: dict[str, Callable[[Asked], dict[str, Any]]] = {
        "annotate": lambda asked: explorer.annotate(asked.text),
        "continue": explorer.continued,
        "difference": lambda asked: explorer.difference(asked.text, asked.other),
    }
    routes: list[Route | Mount] = [Route(f"/{name}", answering(f), methods=["POST"]) for name, f in computed.items()]
    routes += [Route("/about", about), Route("/", front)]
    if explorer.pages.is_dir():
        routes.append(Mount("/features", StaticFiles(directory=explorer.pages, html=True)))
    routes.append(Mount("/", StaticFiles(directory=SITE)))
    ours = [
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
        Middleware(BaseHTTPMiddleware, dispatch=_ours_alone),
    ]
    return Starlette(routes=routes, middleware=ours)


async def _ours_alone(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Pages of other origins may neither load these files, as scripts, nor frame them."""
    response = await answer(request)
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["X-Frame-Options"] = "DENY"
    return response
