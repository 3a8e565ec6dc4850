#!/bin/sh
# What pyproject.toml says is needed to build the project, one requirement a line.
cd "$(dirname "$0")/.."
exec python3 -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")'
