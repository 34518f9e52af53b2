"""The tests, one package: a folder for each package of megagrow, helpers beside what uses them.

Helpers are imported by their full name (`from tests.jobs import train`), also in other processes.
"""
