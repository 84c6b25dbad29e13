"""`deltaw lab`."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.references import RegistryOption, adapter_path, index_default, registry_default
from deltaw.errors import BadInput


def lab(
    base: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or starter name.")] = "smollm2-135m-instruct",
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8765,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An adapter to attach beside the base; may be repeated."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a static site with recorded data into this new folder, and end."),
    ] = None,
    runs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the workbench keeps runs, data and registry.")
    ] = Path("runs"),
    registry: RegistryOption = None,
) -> None:
    """Open the lab: thirteen live pictures of why adapters work, on a real base, and a workbench."""
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise BadInput(f"the lab needs {' and '.join(missing)}, not installed here: pip install 'deltaw[lab]'.")
    from deltaw.lab.base import Lab
    from deltaw.merge.write import refuse_used
    from deltaw.serve.hosts import check_address, is_loopback

    say = partial(typer.echo, err=True)
    check_address(host, port) if export is None else refuse_used(export)
    opened = Lab(base, {name: adapter_path(path, registry) for name, path in map(_named, adapter or [])}, say)
    if export is not None:
        from deltaw.lab.export import write_site

        say(f"{write_site(opened, export, say)} positions are recorded in {export}; serve it with any web server")
        return
    import gc

    import uvicorn

    from deltaw.lab.desk import desk_in
    from deltaw.lab.server import make_app

    where = registry_default() if registry is None else str(registry)
    app = make_app(opened, host=host, desk=desk_in(runs, where, index_default()))
    if not is_loopback(host):
        say(f"warning: {host} is reached from other machines, and the lab has no passwords.")
    gc.collect()
    gc.set_threshold(200_000, 20, 20)  # a plan makes many objects and leaves few; collected when nobody asks (ahead.py)
    gc.freeze()  # the base and its libraries stay: else each collection looks at all of them, for a tenth of a second
    say(f"the lab is at http://{host}:{port}/ (Ctrl-C ends it)")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)  # streams have no end


def _named(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not (equals and name and path):
        raise BadInput(f"--adapter is {given!r}; write NAME=PATH.")
    return name, path
