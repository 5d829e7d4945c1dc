"""Arguments that several commands have."""

from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(help="Name of the region.")]
