"""``gemma4-run build``: compile an artifact's engines, on the device that will run them or anywhere."""

from __future__ import annotations

import json
import shlex
import time
from typing import Annotated

import typer

from gemma4_export.configs.command_line import parse_bytes
from gemma4_export.configs.commands.app import completing
from gemma4_export.configs.target import target_names
from gemma4_export.runtime.commands.options import ArtifactFolder
from gemma4_export.runtime.commands.screen import say


def build(
    artifact: ArtifactFolder,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to compile for, e.g. rtx3090; repeated: one engine for all.",
            show_default="the artifact's",
            autocompletion=completing(target_names),
        ),
    ] = None,
    build_memory: Annotated[
        str | None, typer.Option(help="What builds may take together, e.g. 12GB.", show_default="what is free")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile the engines of an artifact; those that are there already and still right are kept."""
    memory_bytes = None if build_memory is None else parse_bytes("--build-memory", build_memory)
    from gemma4_export.configs.artifact import Artifact
    from gemma4_export.runtime.engine.artifact import compile_artifact, target_capabilities
    from gemma4_export.runtime.engine.build import BuiltEngine
    from gemma4_export.runtime.engine.report import engine_line, last_line

    started = time.monotonic()
    opened = Artifact.open(artifact, with_engines=False)

    def on_built(engine: BuiltEngine) -> None:
        say(engine_line(opened.manifest, engine))

    compiled = compile_artifact(
        opened,
        compute_capabilities=target_capabilities(target or [], opened.manifest),
        memory_bytes=memory_bytes,
        on_built=on_built,
    )
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps({"seconds": seconds, "engines": [engine.to_json() for engine in compiled.engines]}))
        return
    print(f"{last_line(compiled)}, {seconds:.0f} s")
    if compiled.removed:
        print(f"removed {len(compiled.removed)} engines that nothing names any more")
    print(f"next: gemma4-run verify {shlex.quote(str(artifact))} hashes them; this version cannot run engines yet")
