#!/bin/sh
# Print the build requirements of pyproject.toml, one per line.
cd "$(dirname "$0")/.."
exec python3 -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")'
