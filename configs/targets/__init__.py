"""The targets, one TOML file each; this file makes the folder part of the package, so that wheels carry it."""
