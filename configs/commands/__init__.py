"""What both command lines share: only here may configs import typer."""
