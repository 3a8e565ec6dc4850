"""Metadata lives in setup.cfg; this file is the place where compiled operations are built."""

from setuptools import setup

setup()
